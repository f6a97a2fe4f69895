"""Reads values of a checkpoint into memory of TensorFlow's own, by several threads, and checks them on the way."""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import tensorflow as tf
from crc32c import crc32c

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats.bundle_index import Entry, Index, masked, slice_key
from keras_ckpt.model.snapshot import array_of
from keras_ckpt.store.files import Folder
from keras_ckpt.store.listing import refuse_changed
from keras_ckpt.store.record import CheckpointFile

_PIECE = 1 << 20
_LITTLE = 8 << 20
"""So many bytes are read before another thread would have begun."""
_THREADS = min(os.cpu_count() or 1, 8)
# Those of which TensorFlow gives memory that is not filled yet.
_TYPES = {
    dtype.as_datatype_enum: dtype
    for dtype in (
        tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64, tf.complex128, tf.bool,
        tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64,
    )
}  # fmt: skip


class _Target(NamedTuple):
    """Where bytes of a value are, where they go, and what their checksum is."""

    key: bytes
    file: str
    offset: int
    memory: memoryview
    checksum: int


def read_values(
    files: Folder, name: str, index: Index, keys: Sequence[bytes], digested: Sequence[CheckpointFile] = ()
) -> dict[bytes, tf.Tensor]:
    """Reads values of a checkpoint, all of them before any is used.

    Args:
        files: A folder with its files.
        name: Its name.
        index: Its index.
        keys: The keys of the values.
        digested: The data files to read whole, and to compare with their digests. What is in others is compared with
            the checksums in the index.

    Returns:
        The values by key.

    Raises:
        DamagedCheckpointError: Something is not what was written.
        OSError: Something cannot be read.
    """
    tensors: dict[bytes, tf.Tensor] = {}
    targets: list[_Target] = []
    with tf.device("CPU"):
        for key in keys:
            entry = index.entries[key]
            places = _places(index, key, entry)
            if places and entry.dtype in _TYPES:
                tensors[key] = tensor = _empty(entry.dtype, entry.shape)
                targets += _targets(index, key, places, _memory_of(tensor))
    # What is digested is digested by this one too.
    with concurrent.futures.ThreadPoolExecutor(max(1, _THREADS - bool(digested)), "keras_ckpt-read") as threads:
        for file in digested:
            wanted = sorted((target for target in targets if target.file == file.name), key=_offset)
            found = files.scatter(file.name, [(target.offset, target.memory) for target in wanted], threads)
            refuse_changed(file, *found)
        names = {file.name for file in digested}
        groups = _of_equal_size([target for target in targets if target.file not in names])
        for _ in threads.map(functools.partial(_read_together, files), groups):
            pass
    return tensors | _read_by_tensorflow(files, name, index, [key for key in keys if key not in tensors])


def _places(index: Index, key: bytes, entry: Entry) -> Sequence[tuple[Entry, int]]:
    """The entries with the bytes of a value, each with where they begin in it.

    None if the parts are not ranges of rows, one after another: TensorFlow knows others, and refuses what overlaps.
    """
    if not entry.slices:
        return [(entry, 0)]
    places: list[tuple[Entry, int]] = []
    rows = begin = 0
    for start, place in sorted((part[0][0], index.entries[slice_key(key, part)]) for part in entry.slices):
        if start != rows or place.shape[1:] != entry.shape[1:]:
            return []
        places.append((place, begin))
        rows += place.shape[0]
        begin += place.size
    return places


def _targets(index: Index, key: bytes, places: Iterable[tuple[Entry, int]], memory: memoryview) -> Iterator[_Target]:
    for entry, begin in places:
        if entry.size:
            part = memory[begin : begin + entry.size]
            yield _Target(key, index.files[entry.shard], entry.offset, part, entry.checksum)


def _empty(dtype: int, shape: tuple[int, ...]) -> tf.Tensor:
    """A tensor that is yet to be filled. A variable that it is assigned to has this memory."""
    return tf.raw_ops.Empty(shape=_shape(shape), dtype=_TYPES[dtype], init=False)


@functools.lru_cache  # a model has few, and to make one takes as long as the rest
def _shape(shape: tuple[int, ...]) -> tf.Tensor:
    return tf.constant(shape, tf.int32, (len(shape),))


def _memory_of(tensor: tf.Tensor) -> memoryview:
    """The memory of a tensor that nobody else has yet, to be filled."""
    array = array_of(tensor)
    address = array.__array_interface__["data"][0]
    return memoryview((ctypes.c_ubyte * array.nbytes).from_address(address)).cast("B")


def _offset(target: _Target) -> int:
    return target.offset


def _read_together(files: Folder, targets: Sequence[_Target]) -> None:
    """Reads targets one after another, and compares them with their checksums."""
    for file, group in itertools.groupby(targets, lambda target: target.file):
        with files.reading(file) as opened:
            for target in group:
                checksum = 0
                for at in range(0, len(target.memory), _PIECE):
                    piece = target.memory[at : at + _PIECE]
                    opened.read_into([piece], target.offset + at)
                    checksum = crc32c(piece, checksum)
                if masked(checksum) != target.checksum:
                    raise DamagedCheckpointError(
                        f"{file} was changed after it was written: a checksum in it does not match, of "
                        f"{target.key.decode(errors='replace')}"
                    )


def _of_equal_size(targets: Sequence[_Target]) -> list[list[_Target]]:
    """At most so many groups as there are threads, as equal as the greatest of them lets them be."""
    number = _THREADS if sum(len(target.memory) for target in targets) >= _LITTLE else 1
    groups: list[list[_Target]] = [[] for _ in range(number)]
    filled = [0] * number
    for target in sorted(targets, key=lambda target: -len(target.memory)):
        least = filled.index(min(filled))
        groups[least].append(target)
        filled[least] += len(target.memory)
    return [sorted(sorted(group, key=_offset), key=lambda target: target.file) for group in groups if group]


def _read_by_tensorflow(files: Folder, name: str, index: Index, keys: Sequence[bytes]) -> dict[bytes, tf.Tensor]:
    """Strings, types and parts that nothing here knows; TensorFlow checks their checksums."""
    if not keys:
        return {}
    tensors = tf.raw_ops.RestoreV2(
        prefix=files.tensorflow_path(name),
        tensor_names=[key.decode() for key in keys],
        shape_and_slices=[""] * len(keys),
        dtypes=[tf.as_dtype(index.entries[key].dtype) for key in keys],
    )
    return dict(zip(keys, tensors, strict=True))
