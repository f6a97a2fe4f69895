"""The description of a model in its checkpoint: the variables its optimizers train, and the state of its objects."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from keras_ckpt.errors import DamagedCheckpointError, FormatVersionError

KEY = "_KERAS_CKPT_MODEL"
"""The key of the description in a checkpoint, and the prefix of the keys of its arrays and assets."""
VERSION = 1
ASSET_LIMIT = 1 << 30
"""The maximum size of an asset in bytes."""

Index = Annotated[int, msgspec.Meta(ge=0, lt=1_000_000)]


class Asset(msgspec.Struct, frozen=True):
    """A file that an object wrote with `save_assets`.

    Attributes:
        index: Its number among the assets of the checkpoint.
        size: Its size in bytes.
        digest: `"blake3:"` and its digest in hexadecimal.
    """

    index: Index
    size: Annotated[int, msgspec.Meta(ge=0, le=ASSET_LIMIT)]
    digest: Annotated[str, msgspec.Meta(pattern="^blake3:[0-9a-f]{64}$")]


class Learned(msgspec.Struct, frozen=True, rename={"kind": "class"}, omit_defaults=True):
    """The state of an object, as Keras's saving protocol returns it.

    Attributes:
        kind: The name of its class.
        variables: The names of the variables that it stored, by the keys of its store.
        own: The names of TensorFlow variables in its attributes, which it may only create when it loads them.
        values: The indices of the other arrays that it stored, by the keys of its store.
        assets: The files that it wrote, by path.
        config: Its config as JSON, if it has `adapt`. A boundary or a vocabulary may only be in the config.
        build: Its build config as JSON, if its class defines a build config.
    """

    kind: str
    variables: dict[str, str] = {}
    own: list[str] = []
    values: dict[str, Index] = {}
    assets: dict[str, Asset] = {}
    config: str | None = None
    build: str | None = None


class Description(msgspec.Struct, frozen=True):
    """The description of the model in a checkpoint, in addition to the variables.

    Attributes:
        version: The version of this format.
        optimizers: The names of the variables that each built optimizer trains, by the prefix of the optimizer.
        compiled: The arguments of `compile` as JSON, if the model is compiled.
        lora: The factors of low-rank updates of kernels, by the names of their first factors.
        objects: The states of objects, by name.
        state_dict: The names of the model's variables by the names in its `state_dict`, if Keras ran on PyTorch.
    """

    version: Annotated[int, msgspec.Meta(ge=1)] = VERSION
    optimizers: dict[str, list[str]] = {}
    compiled: str | None = None
    lora: dict[str, float] = {}
    objects: dict[str, Learned] = {}
    state_dict: dict[str, str] = {}


_decode = msgspec.json.Decoder(Description).decode
encode = msgspec.json.Encoder().encode


def decode(text: bytes) -> Description:
    """Decodes a description.

    Raises:
        DamagedCheckpointError: The text is not a description.
        FormatVersionError: The description has a newer format.
    """
    try:
        version = msgspec.json.decode(text, type=dict[str, Any]).get("version")
        if isinstance(version, int) and version > VERSION:
            raise FormatVersionError(
                f"its description of the model has version {version}, this package reads up to {VERSION}: "
                "upgrade keras_ckpt"
            )
        found = _decode(text)
        for learned in found.objects.values():
            _refuse_unsafe(learned)
        return found
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(f"its description of the model cannot be read: {error}") from None


def _refuse_unsafe(learned: Learned) -> None:
    """Refuses an unsafe path of an asset, and an invalid config.

    Raises:
        DamagedCheckpointError: The path of an asset leaves the folder of the assets.
        MsgspecError: A config is not a JSON object.
    """
    for path in learned.assets:
        parts = path.split("/")
        if not path or "\0" in path or "\\" in path or any(part in ("", ".", "..") for part in parts):
            raise DamagedCheckpointError(f"an asset of {learned.kind} has an unsafe path: {path!r:.200}")
    for text in (learned.config, learned.build):
        if text is not None:
            msgspec.json.decode(text, type=dict[str, Any])


def value_key(index: int) -> str:
    """The key of an array in a checkpoint."""
    return f"{KEY}/values/{index}"


def asset_key(index: int) -> str:
    """The key of an asset in a checkpoint."""
    return f"{KEY}/assets/{index}"
