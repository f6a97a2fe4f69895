"""Reads values of a TensorFlow checkpoint into memory of the caller, and verifies checksums and digests."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from crc32c import crc32c

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats.bundle_index import CHECKSUM, WHOLE, Entry, Index, Slice, masked, slice_key
from keras_ckpt.formats.dtypes import ITEM_SIZES, NAMES, STRING
from keras_ckpt.formats.protobuf import read_varint
from keras_ckpt.formats.targets import Target, fill
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile

Allocate = Callable[[int, tuple[int, ...]], tuple[Any, memoryview]]
"""Allocates numbers of a type and a shape. Returns the object that holds them, and its memory to fill."""


def read_values(
    files: Folder, index: Index, keys: Iterable[bytes], allocate: Allocate, digested: Sequence[CheckpointFile] = ()
) -> dict[bytes, Any]:
    """Reads and verifies values of a checkpoint. Returns after all are read.

    Args:
        files: A folder with the files of the checkpoint.
        index: The index of the checkpoint.
        keys: The keys of the values.
        allocate: Allocates numbers.
        digested: The data files to read whole and compare with their digests. Values in other files are compared with
            the checksums in the index.

    Returns:
        The values by key: the objects of `allocate`, and arrays of `bytes` for strings.

    Raises:
        DamagedCheckpointError: A checksum or a digest does not match.
        OSError: A file cannot be read.
        TypeError: A value is neither numbers nor strings.
    """
    values: dict[bytes, Any] = {}
    joined: dict[bytes, _Joined] = {}
    targets: list[Target] = []
    for key in keys:
        entry = index.entries[key]
        if entry.dtype != STRING and entry.dtype not in ITEM_SIZES:
            raise TypeError(f"{key.decode(errors='replace')} is a {NAMES[entry.dtype]}, which no array can hold")
        if entry.slices or entry.dtype == STRING:
            joined[key] = _Joined(index, key)
            targets += joined[key].targets
        else:
            values[key], memory = allocate(entry.dtype, entry.shape)
            targets.append(_target(index, key, entry, memory))
    fill(files, targets, digested)
    return values | {key: parts.value(allocate) for key, parts in joined.items()}


def _target(index: Index, key: bytes, entry: Entry, memory: memoryview) -> Target:
    checksum = None if entry.dtype == STRING else entry.checksum
    return Target(key, index.files[entry.shard], entry.offset, memory, checksum)


class _Joined:
    """A value that is joined from separate memory: strings, or a value that TensorFlow saved in parts.

    Attributes:
        targets: The targets to fill before `value` is called.
    """

    def __init__(self, index: Index, key: bytes) -> None:
        self._key = key
        self._entry = entry = index.entries[key]
        places: list[tuple[Slice, Entry]] = [(part, index.entries[slice_key(key, part)]) for part in entry.slices]
        self._parts = [(part, each, memoryview(bytearray(each.size))) for part, each in places or [((), entry)]]
        self.targets = [_target(index, key, each, memory) for _, each, memory in self._parts]

    def value(self, allocate: Allocate) -> Any:
        """The value, after the targets are filled."""
        value, array = self._allocated(allocate)
        filled = np.zeros(array.shape, bool)
        for part, entry, memory in self._parts:
            extents = (slice(None) if extent == WHOLE else slice(extent[0], sum(extent)) for extent in part)
            place = (..., *extents)  # with `...` a scalar is an array too
            is_string = entry.dtype == STRING
            array[place] = _strings(self._key, entry, memory) if is_string else _numbers(entry, memory)
            filled[place] = True
        # The parts have as many elements as the value, so parts that overlap leave a gap.
        if not filled.all():
            raise DamagedCheckpointError(f"{self._key.decode(errors='replace')} has parts that overlap")
        return value

    def _allocated(self, allocate: Allocate) -> tuple[Any, np.ndarray]:
        """The allocated value, and its elements as an array."""
        if self._entry.dtype == STRING:
            array = np.empty(self._entry.shape, object)
            return array, array
        value, memory = allocate(self._entry.dtype, self._entry.shape)
        return value, _numbers(self._entry, memory)


def _numbers(entry: Entry, memory: memoryview) -> np.ndarray:
    """The elements in memory, as an array of raw bytes."""
    return np.ndarray(entry.shape, np.dtype((np.void, ITEM_SIZES[entry.dtype])), memory)


def _strings(key: bytes, entry: Entry, memory: memoryview) -> np.ndarray:
    """Decodes strings: first all lengths, then a checksum of the lengths, then the strings."""
    data, count = bytes(memory), math.prod(entry.shape)
    lengths, at = [], 0
    for _ in range(count):
        length, at = read_varint(data, at)
        lengths.append(length)
    # Checksums use lengths of a fixed size. The file has lengths of variable size.
    fixed = b"".join(struct.pack("<I" if length < 1 << 32 else "<Q", length) for length in lengths)
    sealed = data[at : at + CHECKSUM]
    content = data[at + CHECKSUM :]
    checksum = crc32c(fixed)
    whole = masked(crc32c(content, crc32c(sealed, checksum)))
    if sealed != struct.pack("<I", masked(checksum)) or whole != entry.checksum or sum(lengths) != len(content):
        raise DamagedCheckpointError(
            f"{key.decode(errors='replace')} was changed after it was written: a checksum of its strings does not match"
        )
    array = np.empty(count, object)
    ends = list(itertools.accumulate(lengths, initial=0))
    array[:] = [content[begin:end] for begin, end in itertools.pairwise(ends)]
    return array.reshape(entry.shape)
