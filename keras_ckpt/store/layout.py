"""The file names in a directory of checkpoints. No other module spells them.

    checkpoint                       TensorFlow's state file
    ckpt-120.index                   a plain TensorFlow checkpoint
    ckpt-120.data-00000-of-00001
    ckpt-120.json                    the sidecar; without a sidecar there is no checkpoint
    ckpt-120.keep                    a pin

The folder `.keras_ckpt/` beside these files has locks, stages and trash. `files` and `commit` name its contents.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

STATE_FILE = "checkpoint"
_SIDECAR, _PIN, _INDEX, _DATA = ".json", ".keep", ".index", ".data-"
_SHARD = r"\.data-\d{5}-of-\d{5}"


def numbered(step: int, base: str = "ckpt") -> str:
    """The default name of a step's checkpoint."""
    return f"{base}-{step}"


def sidecar(name: str) -> str:
    """The file name of a checkpoint's sidecar."""
    return name + _SIDECAR


def pin(name: str) -> str:
    """The file name of a checkpoint's pin."""
    return name + _PIN


def index(name: str) -> str:
    """The file name of a TensorFlow checkpoint's index."""
    return name + _INDEX


def data(name: str, shard: int, number: int) -> str:
    """The file name of one of the `number` data shards of a TensorFlow checkpoint."""
    return f"{name}{_DATA}{shard:05d}-of-{number:05d}"


def is_sidecar(file: str) -> bool:
    """Whether a file name is a sidecar's."""
    return file.endswith(_SIDECAR)


def is_data(file: str) -> bool:
    """Whether a file name is a data shard's."""
    return _DATA in file


def of_sidecars(files: Iterable[str]) -> set[str]:
    """The names of the checkpoints with a sidecar among `files`."""
    return {file.removesuffix(_SIDECAR) for file in files if file.endswith(_SIDECAR)}


def of_indexes(files: Iterable[str]) -> set[str]:
    """The names of the checkpoints with an index among `files`."""
    return {file.removesuffix(_INDEX) for file in files if file.endswith(_INDEX)}


def named_by(file: str) -> str:
    """The checkpoint's name in a file name; a checkpoint's name stays as it is."""
    return re.sub(rf"(\.index|\.json|{_SHARD})\Z", "", file)


def is_of(file: str, name: str) -> bool:
    """Whether a file is the sidecar, the index or a data shard of a checkpoint."""
    return file != name and named_by(file) == name


def is_tensorflows(file: str, name: str) -> bool:
    """Whether a file is the index or a data shard of a checkpoint."""
    return is_of(file, name) and not is_sidecar(file)
