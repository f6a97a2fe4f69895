"""Writes a checkpoint in TensorFlow's format, in one pass over its bytes: checksum, digest and disk together.

It is the format that `bundle` reads: one data file with the bytes of all values, and an index of them.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

from keras_ckpt.files import Folder
from keras_ckpt.record import CheckpointFile

_STRING = 7
_PIECE = 1 << 20
_BLOCK = 1 << 16
_MAGIC = bytes.fromhex("57fb808b247547db")


class Value(NamedTuple):
    """What is to be written under a key.

    Attributes:
        dtype: The number of its type in TensorFlow's `DataType`.
        shape: Its shape.
        data: Its bytes as they are in the data file, an array of `uint8`.
        checksum: The CRC-32C that its entry has, if that is not the one of `data`.
    """

    dtype: int
    shape: tuple[int, ...]
    data: np.ndarray
    checksum: int | None = None


def number_value(dtype: int, shape: tuple[int, ...], array: np.ndarray) -> Value:
    """Numbers, whose bytes are as in memory."""
    return Value(dtype, shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def string_value(texts: Sequence[bytes], shape: tuple[int, ...]) -> Value:
    """Strings: first all lengths, then a checksum of these, then the strings."""
    lengths = b"".join(struct.pack("<I" if len(text) < 1 << 32 else "<Q", len(text)) for text in texts)
    # The checksums are of the lengths as numbers of a fixed size, in whose place the file has shorter ones.
    sealed = struct.pack("<I", _masked(google_crc32c.value(lengths)))
    content = b"".join(texts)
    data = b"".join([*(_varint(len(text)) for text in texts), sealed, content])
    checksum = google_crc32c.extend(google_crc32c.value(lengths + sealed), content)
    return Value(_STRING, shape, np.frombuffer(data, np.uint8), checksum)


def write_bundle(folder: Folder, name: str, values: Mapping[str, Value]) -> tuple[CheckpointFile, ...]:
    """Writes the files of a checkpoint, and makes them durable.

    Args:
        folder: Where to.
        name: The checkpoint's name, `"ckpt-10"`.
        values: What to write, by key.

    Returns:
        The files, with their sizes and digests.
    """
    data, index = f"{name}.data-00000-of-00001", f"{name}.index"
    entries = [(b"", _header())]
    with folder.writing(data) as file:
        for key, value in sorted((key.encode(), value) for key, value in values.items()):
            offset, checksum = file.size, 0
            for piece in _pieces(value.data):
                file.write(piece.data)
                if value.checksum is None:
                    checksum = google_crc32c.extend(checksum, piece)
            checksum = checksum if value.checksum is None else value.checksum
            entries.append((key, _entry(value, offset, _masked(checksum))))
    with folder.writing(index) as table:
        table.write(memoryview(_table(entries)))
    return CheckpointFile(data, file.size, file.digest), CheckpointFile(index, table.size, table.digest)


def _pieces(data: np.ndarray) -> Iterator[np.ndarray]:
    """Small enough for the caches of a processor, so that the second look at each is for nothing."""
    return (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))


def _header() -> bytes:
    """A `BundleHeaderProto`: one data file, this machine's byte order, the format's first version."""
    return _number(1, 1) + _message(3, _number(1, 1))


def _entry(value: Value, offset: int, checksum: int) -> bytes:
    """A `BundleEntryProto`."""
    shape = b"".join(_message(2, _number(1, size)) for size in value.shape)
    place = _number(4, offset) + _number(5, len(value.data)) + b"\x35" + struct.pack("<I", checksum)
    return _number(1, value.dtype) + _message(2, shape) + place


def _table(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A sorted table as LevelDB writes it, each key in full."""
    file = bytearray()
    blocks = []
    for block, last in _blocks(pairs):
        blocks.append((last, _appended(file, block)))
    empty = _appended(file, _block([]))
    index = _appended(file, _block(blocks))
    return bytes(file) + (empty + index).ljust(40, b"\0") + _MAGIC


def _blocks(pairs: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Blocks of about one size, each with its last key."""
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
    entries = [b"\0" + _varint(len(key)) + _varint(len(value)) + key + value for key, value in pairs]
    starts = list(itertools.accumulate(map(len, entries), initial=0))[: len(entries)] or [0]
    return b"".join(entries) + struct.pack(f"<{len(starts) + 1}I", *starts, len(starts))


def _appended(file: bytearray, block: bytes) -> bytes:
    """Appends a block with its checksum; its offset and its size as the index has them."""
    place = _varint(len(file)) + _varint(len(block))
    sealed = block + b"\0"
    file += sealed + struct.pack("<I", _masked(google_crc32c.value(sealed)))
    return place


def _message(field: int, content: bytes) -> bytes:
    return bytes([field << 3 | 2]) + _varint(len(content)) + content


def _number(field: int, number: int) -> bytes:
    return bytes([field << 3]) + _varint(number)


def _varint(number: int) -> bytes:
    """A number of seven bits a byte."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _masked(checksum: int) -> int:
    """A checksum as it is stored, so that one of bytes with a checksum in them is not that of other bytes."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
