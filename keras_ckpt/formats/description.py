"""The description of a model in its checkpoint: what its optimizers train, and what its objects learned."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from keras_ckpt.errors import DamagedCheckpointError, FormatVersionError

KEY = "_KERAS_CKPT_MODEL"
"""The key of the description in a checkpoint. Arrays and assets that it refers to have keys below it."""
VERSION = 1
ASSET_LIMIT = 1 << 30
"""The greatest size of an asset in bytes."""

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
    """What an object learned, as Keras's saving protocol tells it.

    Attributes:
        kind: The name of its class.
        variables: The names of the variables that it stored, by the keys of its store.
        own: The names of TensorFlow's variables in its attributes, which it may make only when it reads them.
        values: The numbers of the other arrays that it stored, by the keys of its store.
        assets: The files that it wrote, by path.
        config: Its config as JSON, if it can be adapted. A boundary or a vocabulary may be in there alone.
        build: Its build config as JSON, if it has one of its own.
    """

    kind: str
    variables: dict[str, str] = {}
    own: list[str] = []
    values: dict[str, Index] = {}
    assets: dict[str, Asset] = {}
    config: str | None = None
    build: str | None = None


class Description(msgspec.Struct, frozen=True):
    """What a checkpoint says of its model beside the variables.

    Attributes:
        version: The version of this format.
        optimizers: The names of the variables that each built optimizer trains, by the prefix of the optimizer.
        compiled: What `compile` was given, as JSON, if the model is compiled.
        lora: The factors of low-rank updates of kernels, by the names of their first factors.
        objects: What objects learned, by name.
    """

    version: Annotated[int, msgspec.Meta(ge=1)] = VERSION
    optimizers: dict[str, list[str]] = {}
    compiled: str | None = None
    lora: dict[str, float] = {}
    objects: dict[str, Learned] = {}


_decode = msgspec.json.Decoder(Description).decode
encode = msgspec.json.Encoder().encode


def decode(text: bytes) -> Description:
    """Reads a description.

    Raises:
        DamagedCheckpointError: The text is no description.
        FormatVersionError: It is one of a newer format.
    """
    try:
        version = msgspec.json.decode(text, type=dict[str, Any]).get("version")
        if isinstance(version, int) and version > VERSION:
            raise FormatVersionError(
                f"its description of the model is version {version}, this package reads up to {VERSION}: "
                "upgrade keras_ckpt"
            )
        found = _decode(text)
        for each in found.objects.values():
            _refuse_unsafe(each)
        return found
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise DamagedCheckpointError(f"its description of the model cannot be read: {error}") from None


def _refuse_unsafe(learned: Learned) -> None:
    """Refuses an unsafe path of an asset, and a config that is not one.

    Raises:
        DamagedCheckpointError: The path of an asset leaves the folder of the assets.
        MsgspecError: A config is not a JSON object.
    """
    for path in learned.assets:
        parts = path.split("/")
        if not path or "\0" in path or "\\" in path or any(part in ("", ".", "..") for part in parts):
            raise DamagedCheckpointError(f"an asset of {learned.kind} is not its own: its path is {path!r:.200}")
    for text in (learned.config, learned.build):
        if text is not None:
            msgspec.json.decode(text, type=dict[str, Any])


def value_key(index: int) -> str:
    """The key of an array."""
    return f"{KEY}/values/{index}"


def asset_key(index: int) -> str:
    """The key of an asset."""
    return f"{KEY}/assets/{index}"
