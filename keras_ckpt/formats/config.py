"""The config of a model in its checkpoint, from which Keras builds the model again without its code.

The config is JSON, as in a `.keras` file, compressed by zlib: 760 KB become 17 KB, so every checkpoint has its own.
"""

from __future__ import annotations

import re
import zlib
from typing import Annotated, Any

import msgspec

from keras_ckpt.errors import DamagedCheckpointError, FormatVersionError

KEY = "_KERAS_CKPT_CONFIG"
"""The key of the config in a checkpoint."""
VERSION = 1
LIMIT = 1 << 28
"""The maximum bytes of a config that is read."""
_OPTIMIZER_OF_A_BACKEND = re.compile(r"keras\.src\.backend\.\w+\.optimizers\.\w+")


class Place(msgspec.Struct, frozen=True, omit_defaults=True, array_like=True):
    """An object of a model as Keras's own files have it.

    Attributes:
        name: The name of the object, `None` if it has none.
        variables: The names of its variables by Keras's keys. A value that it computes has the name `""`.
        learned: The name of its learned state in the description of the checkpoint, which has its other values.
    """

    name: str | None = None
    variables: dict[str, str] = {}
    learned: str = ""


class Config(msgspec.Struct, frozen=True, omit_defaults=True):
    """The config of a model, or the reason why it has none.

    Attributes:
        config: The config as Keras serializes it, `None` if the model has none.
        paths: The paths of the layers of the model and of its variables, in Keras's order, which the config lacks.
        places: The objects of the model by their paths in Keras's own files.
        reason: The reason why the model has none, a clause.
        keras: The version of Keras that made the config.
        version: The version of this format.
    """

    config: dict[str, Any] | None = None
    paths: list[str] = []
    places: dict[str, Place] = {}
    reason: str = ""
    keras: str = ""
    version: Annotated[int, msgspec.Meta(ge=1)] = VERSION


def uncompiled(config: Any) -> Any:
    """A config without the settings of `compile`, for the models in a model too."""
    if isinstance(config, dict):
        return {name: {} if name == "compile_config" else uncompiled(each) for name, each in config.items()}
    return [*map(uncompiled, config)] if isinstance(config, list) else config


def portable(config: Any) -> Any:
    """A config for every backend: on PyTorch an optimizer of Keras is saved as a class of the backend's own."""
    if isinstance(config, dict):
        found = {name: portable(each) for name, each in config.items()}
        is_optimizer = _OPTIMIZER_OF_A_BACKEND.fullmatch(str(found.get("module")))
        return found | {"module": "keras.optimizers", "registered_name": None} if is_optimizer else found
    return [*map(portable, config)] if isinstance(config, list) else config


def encode(config: Config) -> bytes:
    """Encodes a config."""
    return zlib.compress(msgspec.json.encode(config))


def decode(data: bytes) -> Config:
    """Decodes a config.

    Raises:
        DamagedCheckpointError: The bytes are no config, or would expand to more than `LIMIT`.
        FormatVersionError: The config has a newer format.
    """
    try:
        expander = zlib.decompressobj()
        text = expander.decompress(data, LIMIT)
        if not expander.eof:
            raise DamagedCheckpointError(f"the config of its model is incomplete, or has more than {LIMIT} bytes")
        found = msgspec.json.decode(text, type=Config)
    except (zlib.error, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(f"the config of its model cannot be read: {error}") from None
    if found.version > VERSION:
        raise FormatVersionError(
            f"the config of its model has version {found.version}, this package reads up to {VERSION}: "
            "upgrade keras_ckpt"
        )
    return found
