"""Writes a checkpoint in TensorFlow's format, in one pass over its bytes: checksum, digest and write together.

`bundle_index` and `bundle_reader` read the format: data files with the bytes of the values, and an index.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from crc32c import crc32c

from keras_ckpt.formats import protobuf
from keras_ckpt.formats.arrays import number_of
from keras_ckpt.formats.bundle_index import KEY_LIMIT, Entry, Slice, masked
from keras_ckpt.formats.dtypes import STRING
from keras_ckpt.store import layout
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile
from keras_ckpt.store.streams import PORTION, NewFile

_PIECE = 1 << 20
_BLOCK = 1 << 16
_MAGIC = bytes.fromhex("57fb808b247547db")


class Place(NamedTuple):
    """The place of a value's bytes in a block of whole memory pages."""

    block: np.ndarray
    begin: int


class Value(NamedTuple):
    """A value to write under a key.

    Attributes:
        dtype: The number of its type in TensorFlow's `DataType`.
        shape: Its shape.
        data: Its bytes as in the data file, an array of `uint8`.
        checksum: The checksum for its entry, `None` to compute it from `data`.
        slices: Its parts, if each part is a separate value; then `data` is empty.
        place: The place of `data` in memory pages that can be written directly, if there is one.
    """

    dtype: int
    shape: tuple[int, ...]
    data: np.ndarray
    checksum: int | None = None
    slices: tuple[Slice, ...] = ()
    place: Place | None = None


class Linked(NamedTuple):
    """A data file of another checkpoint that the new checkpoint shares.

    Attributes:
        file: The file, under its current name in the folder.
        entries: The entries that the new checkpoint uses, by key.
    """

    file: CheckpointFile
    entries: Mapping[bytes, Entry]


def number_value(dtype: int, array: np.ndarray) -> Value:
    """The value of an array of numbers, with the bytes as in memory."""
    return Value(dtype, array.shape, array.reshape(-1).view(np.uint8))


def array_value(array: np.ndarray) -> Value:
    """The value of an array of numbers, or of `bytes`.

    Raises:
        TypeError: A checkpoint cannot hold arrays of this type.
    """
    number = number_of(array.dtype)
    if number == STRING:
        return string_value(array.reshape(-1).tolist(), array.shape)
    return number_value(number, array.astype(array.dtype.newbyteorder("="), copy=False))


def string_value(texts: Sequence[bytes], shape: tuple[int, ...]) -> Value:
    """The value of strings: first all lengths, then a checksum of the lengths, then the strings."""
    lengths = b"".join(struct.pack("<I" if len(text) < 1 << 32 else "<Q", len(text)) for text in texts)
    # Checksums use lengths of a fixed size. The file has lengths of variable size.
    sealed = struct.pack("<I", masked(crc32c(lengths)))
    content = b"".join(texts)
    data = b"".join([*(protobuf.varint(len(text)) for text in texts), sealed, content])
    checksum = crc32c(content, crc32c(lengths + sealed))
    return Value(STRING, shape, np.frombuffer(data, np.uint8), masked(checksum))


def checksum_of(data: np.ndarray) -> int:
    """The checksum of bytes, as stored in the entry of a value."""
    return masked(crc32c(data.data))


def write_bundle(
    folder: Folder, name: str, groups: Sequence[Mapping[bytes, Value]], linked: Sequence[Linked] = ()
) -> tuple[tuple[CheckpointFile, ...], dict[bytes, Entry]]:
    """Writes the files of a checkpoint, and makes them durable.

    Args:
        folder: Where to write.
        name: The checkpoint's name, `"ckpt-10"`.
        groups: Values by key. Each group is written into its own data file, in its order. Values in the pages of one
            block of memory are written as pages, without another copy.
        linked: Files in the folder that hold the other values. They are renamed.

    Returns:
        The files, with their sizes and digests, and the entries of the index by key.

    Raises:
        ValueError: A key is longer than the reader accepts.
        OSError: The files cannot be written.
    """
    _refuse_long(itertools.chain(*groups, *(link.entries for link in linked)))
    shards = len(linked) + len(groups)
    files: list[CheckpointFile] = []
    entries: dict[bytes, Entry] = {}
    for shard, link in enumerate(linked):
        file = msgspec.structs.replace(link.file, name=layout.data(name, shard, shards))
        folder.rename(link.file.name, file.name)
        files.append(file)
        entries |= {key: entry._replace(shard=shard) for key, entry in link.entries.items()}
    with contextlib.ExitStack() as durable:
        for shard, group in enumerate(groups, len(linked)):
            file, found = write_data(folder, layout.data(name, shard, shards), group, shard, durable)
            files.append(file)
            entries |= found
        files.append(write_index(folder, layout.index(name), entries, shards, durable))
    return tuple(files), entries


def write_data(
    folder: Folder, file: str, group: Mapping[bytes, Value], shard: int, durable: contextlib.ExitStack
) -> tuple[CheckpointFile, dict[bytes, Entry]]:
    """Writes values into a data file.

    Args:
        folder: Where to write.
        file: The name of the file.
        group: The values by key.
        shard: The number of the file among the data files of the checkpoint.
        durable: A stack whose exit makes the file durable, so that other files are written meanwhile.

    Returns:
        The file, and the entries of the values for the index.
    """
    new = durable.enter_context(folder.writing(file))
    entries = _write_values(new, group, shard)
    return CheckpointFile(file, *new.finish()), entries


def write_index(
    folder: Folder, file: str, entries: Mapping[bytes, Entry], shards: int, durable: contextlib.ExitStack
) -> CheckpointFile:
    """Writes the index of a checkpoint.

    Args:
        folder: Where to write.
        file: The name of the file.
        entries: The entries of all data files, by key.
        shards: The number of data files.
        durable: A stack whose exit makes the file durable.
    """
    table = durable.enter_context(folder.writing(file))
    encoded = ((key, _entry(entries[key])) for key in sorted(entries))
    table.write(memoryview(_table([(b"", _header(shards)), *encoded])))
    return CheckpointFile(file, *table.finish())


def _refuse_long(keys: Iterable[bytes]) -> None:
    longest = max(keys, key=len, default=b"")
    if len(longest) > KEY_LIMIT:
        raise ValueError(
            f"the name of a variable has {len(longest)} bytes, the limit is {KEY_LIMIT}: {longest.decode():.50}..."
        )


def _write_values(file: NewFile, group: Mapping[bytes, Value], shard: int) -> dict[bytes, Entry]:
    """Writes values. Returns their entries by key."""
    entries: dict[bytes, Entry] = {}
    # Below one portion the page cache is faster.
    if sum(len(value.data) for value in group.values()) >= PORTION:
        for run in _runs(group):
            entries |= _write_run(file, run, shard)
    for key, value in group.items():
        if value.slices:
            entries[key] = Entry(value.dtype, value.shape, 0, 0, 0, 0, value.slices)
        elif key not in entries:
            offset = file.size
            file.write(value.data.data)
            checksum = checksum_of(value.data) if value.checksum is None else value.checksum
            entries[key] = Entry(value.dtype, value.shape, shard, offset, len(value.data), checksum, ())
    return entries


class _Run(NamedTuple):
    """Consecutive values in a block of memory, each with its offset in the block."""

    block: np.ndarray
    values: list[tuple[bytes, Value, int]]


def _runs(group: Mapping[bytes, Value]) -> list[_Run]:
    """The values in memory pages, in maximal runs that each start at a page."""
    runs: list[_Run] = []
    block, end = None, 0
    for key, value in group.items():
        if value.place is None:
            continue
        if value.place.block is not block or not 0 <= value.place.begin - end < mmap.PAGESIZE:
            block = value.place.block
            runs.append(_Run(block, []))
        runs[-1].values.append((key, value, value.place.begin))
        end = value.place.begin + len(value.data)
    return [run for run in runs if run.values[0][2] % mmap.PAGESIZE == 0]


def _write_run(file: NewFile, run: _Run, shard: int) -> dict[bytes, Entry]:
    """Writes the pages of values, in one pass with their checksums. Returns their entries by key."""
    base, (_, _, first), (_, last, begin) = file.size, run.values[0], run.values[-1]
    # Write to the end of the last page, including the gaps between the values.
    end = -(-(begin + len(last.data)) // mmap.PAGESIZE) * mmap.PAGESIZE
    memory, written = run.block.data, first
    entries = {}
    for key, value, begin in run.values:
        at = begin
        checksum = 0
        for piece in _pieces(value.data):
            checksum = crc32c(piece.data, checksum)
            at += len(piece)
            # Write soon, while the bytes are in the processor's caches.
            if ready := (at - written) // PORTION * PORTION:
                file.write_pages(memory[written : written + ready])
                written += ready
        offset = base + begin - first
        entries[key] = Entry(value.dtype, value.shape, shard, offset, len(value.data), masked(checksum), ())
    if written < end:
        file.write_pages(memory[written:end])
    return entries


def _pieces(data: np.ndarray) -> Iterable[np.ndarray]:
    if len(data) <= _PIECE:
        return (data,)
    return (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))


def _header(shards: int) -> bytes:
    """A `BundleHeaderProto`: the number of data files, little-endian byte order, and version 1 of the format."""
    return protobuf.numbered(1, shards) + protobuf.message(3, protobuf.numbered(1, 1))


def _entry(entry: Entry) -> bytes:
    """A `BundleEntryProto`."""
    place = _located(entry.shard, entry.offset, entry.size) + b"\x35" + struct.pack("<I", entry.checksum)
    slices = b"".join([protobuf.message(7, b"".join(map(_extent, each))) for each in entry.slices])
    return _kind(entry.dtype, entry.shape) + place + slices


@functools.lru_cache  # many variables have the same type and shape
def _kind(dtype: int, shape: Sequence[int]) -> bytes:
    return protobuf.numbered(1, dtype) + protobuf.message(
        2, b"".join(protobuf.message(2, protobuf.numbered(1, size)) for size in shape)
    )


@functools.lru_cache(1 << 12)  # most values keep their place from checkpoint to checkpoint
def _located(shard: int, offset: int, size: int) -> bytes:
    return (protobuf.numbered(3, shard) if shard else b"") + protobuf.numbered(4, offset) + protobuf.numbered(5, size)


def _extent(extent: tuple[int, int]) -> bytes:
    """The encoded start and length of a part in one dimension."""
    return protobuf.message(1, protobuf.numbered(1, extent[0]) + protobuf.numbered(2, extent[1]))


def _table(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A sorted table in LevelDB's format, with each key in full."""
    file = bytearray()
    blocks = []
    for block, last in _blocks(pairs):
        blocks.append((last, _appended(file, block)))
    empty = _appended(file, _block([]))
    index = _appended(file, _block(blocks))
    return bytes(file) + (empty + index).ljust(40, b"\0") + _MAGIC


def _blocks(pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Blocks of about `_BLOCK` bytes, each with its last key."""
    block: list[tuple[bytes, bytes]] = []
    size = 0
    for key, value in pairs:
        block.append((key, value))
        size += len(key) + len(value)
        if size >= _BLOCK:
            yield _block(block), key
            block, size = [], 0
    if block:
        yield _block(block), block[-1][0]


def _block(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    entries = [b"\0" + protobuf.varint(len(key)) + protobuf.varint(len(value)) + key + value for key, value in pairs]
    starts = list(itertools.accumulate(map(len, entries), initial=0))[: len(entries)] or [0]
    return b"".join(entries) + struct.pack(f"<{len(starts) + 1}I", *starts, len(starts))


def _appended(file: bytearray, block: bytes) -> bytes:
    """Appends a block with its checksum. Returns its encoded offset and size."""
    place = protobuf.varint(len(file)) + protobuf.varint(len(block))
    sealed = block + b"\0"
    file += sealed + struct.pack("<I", masked(crc32c(sealed)))
    return place
