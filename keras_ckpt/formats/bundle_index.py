"""Reads the index of a TensorFlow checkpoint, and refuses an index on which TensorFlow would crash.

TensorFlow trusts an index. A damaged or malicious index crashes the process inside TensorFlow, which Python cannot
catch: for example a negative dimension, or a string of 2^62 bytes. So this module checks each index before TensorFlow
reads it.

An index is a sorted table in LevelDB's format, with Protocol Buffers messages as values. The empty key has a
`BundleHeaderProto`. The name of each variable has a `BundleEntryProto`: the place of its bytes in the data files, and
their checksum.

The content of a variant, such as the state of a dataset iterator, is not checked. TensorFlow crashes on some variants.
Only `tf.train.Checkpoint` reads them, and only into an iterator: do not restore an iterator from an untrusted source.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from crc32c import crc32c

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats import protobuf
from keras_ckpt.formats.dtypes import ITEM_SIZES, STRING, VARIANT
from keras_ckpt.store import layout
from keras_ckpt.store.checks import refuse_changed
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile

_INDEX_LIMIT = 1 << 28
_ENTRY_LIMIT = 1_000_000
KEY_LIMIT = 4096
_DIMENSION_LIMIT = 254
_SHARD_LIMIT = 99_999  # the name of a data file has five digits for the shard

_FOOTER = 48
_MAGIC = bytes.fromhex("57fb808b247547db")
_BLOCK_TRAILER = 5  # a byte for the compression, which TensorFlow does not use, and a checksum of four bytes
CHECKSUM = 4

Slice = tuple[tuple[int, int], ...]
"""A part of a variable: its start and its length in each dimension, or `WHOLE` for the whole dimension."""
WHOLE = (0, -1)


class Entry(NamedTuple):
    """The entry of a variable in an index.

    A variable that was saved in parts has `slices` instead of bytes. Each part has its own entry.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int
    slices: tuple[Slice, ...]


class Index(NamedTuple):
    """The index of a checkpoint.

    Attributes:
        entries: The entries by key, including the entries of parts.
        files: The names of the data files by shard.
        variables: The names of the variables, as `tf.train.list_variables` returns them.
    """

    entries: Mapping[bytes, Entry]
    files: Mapping[int, str]
    variables: Set[str]


def read_index(folder: Folder, name: str, digested: Iterable[CheckpointFile] = ()) -> Index:
    """Reads and checks the index of a checkpoint, so that TensorFlow can read the checkpoint without a crash.

    Args:
        folder: The directory of the checkpoint.
        name: The checkpoint's name, `"ckpt-10"`.
        digested: Files of the checkpoint with digests. If the index is among them, its digest is compared.

    Raises:
        DamagedCheckpointError: The file is not an index, or its content is invalid.
    """
    try:
        for file in digested:
            if file.name == layout.index(name):
                refuse_changed(file, *folder.digest(file.name))
        shards, entries = _decode(folder.read(layout.index(name), _INDEX_LIMIT))
        files = {entry.shard: layout.data(name, entry.shard, shards) for entry in entries.values() if not entry.slices}
        _check_places(entries, {shard: folder.size(file) for shard, file in files.items()})
        _check_texts(folder, files, entries)
    except OSError as error:
        raise DamagedCheckpointError(f"its index or a data file cannot be read: {error}") from error
    return Index(entries, files, _variables(entries))


def _decode(index: bytes) -> tuple[int, dict[bytes, Entry]]:
    """The number of data files, and the entries by key."""
    entries = {}
    key = None
    try:
        (key, header), *table = _table(index)
        if key:
            raise DamagedCheckpointError("comes first, in the place of the header")
        shards = _shards(header)
        for key, value in table:
            entry = entries[key] = _entry(value)
            if not 0 <= entry.shard < shards:
                raise DamagedCheckpointError(f"is in data file {entry.shard}, there are {shards}")
    except DamagedCheckpointError as error:
        raise _refusal(key, error) from None
    return shards, entries


def _table(index: bytes) -> list[tuple[bytes, bytes]]:
    """The keys and values of a sorted table, in ascending order."""
    footer = len(index) - _FOOTER
    if footer < 0 or not index.endswith(_MAGIC):
        raise DamagedCheckpointError(
            f"has {len(index)} bytes and does not end as an index does: it is truncated, or not an index"
        )
    _, at = _place(index, footer)  # the place of a block that TensorFlow leaves empty and never reads
    found: list[tuple[bytes, bytes]] = []
    last, size = b"", 0
    for separator, place in _block(index, *_place(index, at)[0]):
        for key, value in _block(index, *_place(place, 0)[0]):
            if found and key <= last:
                raise DamagedCheckpointError(f"is not sorted, or has a duplicate entry: {key!r:.200}")
            last, size = key, size + len(key)
            found.append((key, value))
            if len(found) > _ENTRY_LIMIT or size > _INDEX_LIMIT:
                raise DamagedCheckpointError(f"has more than {_ENTRY_LIMIT} entries, or too long keys")
        if last > separator:
            raise DamagedCheckpointError("has an entry in the wrong block")
        last = separator
    return found


def _place(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """The offset and the size of a block, and the position after them."""
    offset, at = protobuf.read_varint(data, at)
    size, at = protobuf.read_varint(data, at)
    return (offset, size), at


def _block(index: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block.

    A key is stored without the prefix that it shares with the previous key. At restarts, which the end of the block
    lists, keys are stored in full.
    """
    end = offset + size
    if size < 4 or end + _BLOCK_TRAILER > len(index) - _FOOTER:
        raise DamagedCheckpointError(f"has a block of {size} bytes at {offset}, beyond its end")
    if index[end]:
        raise DamagedCheckpointError("has a compressed block, which TensorFlow does not write")
    checksum = int.from_bytes(index[end + 1 : end + _BLOCK_TRAILER], "little")
    if checksum != masked(crc32c(index[offset : end + 1])):
        raise DamagedCheckpointError(f"has a block of {size} bytes at {offset} with a bad checksum")
    count = int.from_bytes(index[end - 4 : end], "little")
    limit = end - 4 - 4 * count
    if limit < offset:
        raise DamagedCheckpointError(f"has a block of {size} bytes with {count} restarts")
    whole, key, at = set(), b"", offset
    while at < limit:
        began = at
        shared, at = protobuf.read_varint(index, at)
        rest, at = protobuf.read_varint(index, at)
        length, at = protobuf.read_varint(index, at)
        middle = at + rest
        if shared > len(key) or middle + length > limit or shared + rest > KEY_LIMIT:
            raise DamagedCheckpointError(f"has an entry at {began} with an impossible length")
        if not shared:
            whole.add(began - offset)
        key = key[:shared] + index[at:middle]
        at = middle + length
        yield key, index[middle:at]
    restarts = list(struct.unpack_from(f"<{count}I", index, limit))
    # TensorFlow jumps to restarts, so it would read another table than this function does.
    if restarts[:1] != [0] or restarts != sorted(whole.intersection(restarts)):
        raise DamagedCheckpointError("has a block with restarts where no entry begins")


def _shards(header: bytes) -> int:
    """The number of data files."""
    fields = protobuf.decode(header)
    shards, order, version = (
        protobuf.number(fields, 1),
        protobuf.number(fields, 2),
        protobuf.decode(b"".join(protobuf.messages(fields, 3))),
    )
    if not 1 <= shards <= _SHARD_LIMIT:
        raise DamagedCheckpointError(f"has an impossible number of data files, {shards}")
    if order:
        raise DamagedCheckpointError("has another byte order than this machine")
    if protobuf.number(version, 2) > 1:
        raise DamagedCheckpointError("has a newer version of TensorFlow's format")
    return shards


def _entry(message: bytes) -> Entry:
    fields = protobuf.decode(message)
    # A repeated message is joined, as in TensorFlow.
    shape = _shape(b"".join(protobuf.messages(fields, 2)))
    slices = tuple(_slice(each, shape) for each in protobuf.messages(fields, 7))
    dtype, shard, offset, size = (protobuf.number(fields, number) for number in (1, 3, 4, 5))
    entry = Entry(dtype, shape, shard, offset, size, protobuf.fixed(fields, 6), slices)
    if dtype not in ITEM_SIZES and dtype not in (STRING, VARIANT):
        raise DamagedCheckpointError(f"has an unknown type, {dtype}")
    if offset < 0 or size < 0:
        raise DamagedCheckpointError(f"has {size} bytes at {offset}")
    elements = math.prod(shape)
    if slices:
        covered = sum(math.prod(lengths(each, shape)) for each in slices)
        if covered != elements or offset or size or len(set(slices)) < len(slices):
            raise DamagedCheckpointError(f"has parts with {covered} elements in total, its shape is {shape}")
    elif dtype in ITEM_SIZES and elements * ITEM_SIZES[dtype] != size:
        raise DamagedCheckpointError(f"has {size} bytes, its shape is {shape}")
    return entry


@functools.lru_cache  # many variables have the same shape
def _shape(message: bytes) -> tuple[int, ...]:
    fields = protobuf.decode(message)
    dimensions = [protobuf.decode(each) for each in protobuf.messages(fields, 2)]
    # Names of dimensions are refused, because TensorFlow never writes them.
    if fields.keys() - {2} or any(each.keys() - {1} for each in dimensions):
        raise DamagedCheckpointError("has more than numbers in its shape")
    shape = tuple(protobuf.number(each, 1) for each in dimensions)
    if len(shape) > _DIMENSION_LIMIT or any(each < 0 for each in shape) or math.prod(filter(None, shape)) >> 63:
        raise DamagedCheckpointError(f"has a shape that is impossible: {shape!r:.100}")
    return shape


def _slice(message: bytes, shape: Sequence[int]) -> Slice:
    extents = [protobuf.decode(each) for each in protobuf.messages(protobuf.decode(message), 1)]
    part = tuple((protobuf.number(each, 1), protobuf.number(each, 2) if 2 in each else -1) for each in extents)
    if (
        not part
        or len(part) != len(shape)
        or any(
            extent != WHOLE and (extent[0] < 0 or extent[1] < 1 or sum(extent) > dimension)
            for extent, dimension in zip(part, shape, strict=True)
        )
    ):
        raise DamagedCheckpointError(f"has a part that is not within its shape {shape}: {part!r:.100}")
    return part


def lengths(part: Slice, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a part of a variable."""
    return tuple(dimension if extent == WHOLE else extent[1] for extent, dimension in zip(part, shape, strict=True))


def _check_places(entries: Mapping[bytes, Entry], sizes: Mapping[int, int]) -> None:
    """Checks that each variable has its own bytes in a data file."""
    ends = dict.fromkeys(sizes, 0)
    placed = [(entry.shard, entry.offset, entry.size, key) for key, entry in entries.items() if not entry.slices]
    for shard, offset, size, key in sorted(placed):
        if offset + size > sizes[shard]:
            raise _refusal(key, f"has {size} bytes at {offset}, its data file has {sizes[shard]}")
        # Without this check a small file could hold a million variables of its own size.
        if size and offset < ends[shard]:
            raise _refusal(key, "overlaps the bytes of another entry")
        ends[shard] = max(ends[shard], offset + size)


def _check_texts(folder: Folder, files: Mapping[int, str], entries: Mapping[bytes, Entry]) -> None:
    """Checks that the lengths of strings in a data file add up to the size in their entry."""
    sizes = {STRING: _strings_size, VARIANT: _variants_size}
    for key, entry in entries.items():
        if entry.dtype not in sizes or entry.slices:
            continue
        count = math.prod(entry.shape)
        try:
            # Each string takes at least one byte, so an entry of more strings than bytes need not be read.
            if count > entry.size or sizes[entry.dtype](folder, files[entry.shard], entry, count) != entry.size:
                raise DamagedCheckpointError(
                    f"has {entry.size} bytes, but the lengths of its strings do not add up to them"
                )
        except DamagedCheckpointError as error:
            raise _refusal(key, error) from None


def _strings_size(folder: Folder, file: str, entry: Entry, count: int) -> int:
    """The size of strings: first all lengths, then a checksum, then the strings."""
    lengths = folder.read_range(file, entry.offset, min(entry.size, 10 * count))
    at = total = 0
    for _ in range(count):
        length, at = protobuf.read_varint(lengths, at)
        total += length
    return at + CHECKSUM + total


def _variants_size(folder: Folder, file: str, entry: Entry, count: int) -> int:
    """The size of variants, such as the state of a dataset iterator: each a length, a message, and a checksum."""
    size = 0
    for _ in range(count):
        length, used = protobuf.read_varint(folder.read_range(file, entry.offset + size, 10), 0)
        size += used + length + CHECKSUM
        if size > entry.size:
            break
    return size


def _variables(entries: Mapping[bytes, Entry]) -> set[str]:
    """The names of the variables. Checks that each part of a variable has its own entry."""
    parts = set()
    for key, entry in entries.items():
        for each in entry.slices:
            part = slice_key(key, each)
            found = entries.get(part)
            kind = (entry.dtype, lengths(each, entry.shape), ())
            if found is None or (found.dtype, found.shape, found.slices) != kind:
                raise _refusal(key, f"has a part without an entry of its type and its shape: {each}")
            parts.add(part)
    try:
        return {key.decode() for key in entries if key not in parts}
    except UnicodeDecodeError as error:
        raise DamagedCheckpointError(f"its index has a name that is not UTF-8: {error.object!r:.200}") from error


def masked(checksum: int) -> int:
    """The stored form of a checksum. LevelDB masks it, because the CRC of data with CRCs in it is weak."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def slice_key(key: bytes, part: Sequence[tuple[int, int]]) -> bytes:
    """The key of a part in TensorFlow's `OrderedCode`: the name, the rank, and each extent."""
    escaped = key.replace(b"\x00", b"\x00\xff")
    numbers = b"".join(map(_ordered, itertools.chain.from_iterable(part)))
    return b"\x00" + escaped + b"\x00\x01" + bytes([1, len(part)]) + numbers


def _ordered(number: int) -> bytes:
    """Encodes a number: one leading 1 bit a byte, a 0 bit, and its bits. All bits of a negative number are inverted."""
    if number < 0:
        return bytes(byte ^ 255 for byte in _ordered(~number))
    length = number.bit_length() // 7 + 1
    return (((1 << length) - 1) << (7 * length) | number).to_bytes(length, "big")


def _refusal(key: bytes | None, reason: object) -> DamagedCheckpointError:
    """The error of an entry, of the header or of the index, with its reason."""
    entry = "" if key is None else f"the entry {key.decode(errors='replace')!r:.200} of " if key else "the header of "
    return DamagedCheckpointError(f"{entry}its index {reason}")
