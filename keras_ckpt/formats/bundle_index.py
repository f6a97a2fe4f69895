"""TensorFlow's checkpoint format: reads the index of a checkpoint and refuses what TensorFlow would crash on.

TensorFlow trusts an index. One that was damaged, or made to do harm, ends the process inside of it, which nothing in
Python can catch: a negative dimension, a text of 2^62 bytes. So each index is read here before TensorFlow gets it.

An index is a sorted table as LevelDB writes it, of small Protocol Buffers messages: under the empty key a
`BundleHeaderProto`, under the name of each variable a `BundleEntryProto`, which says where its bytes are in the data
files, and their checksum.

What is inside of a variant, such as the state of a dataset's iterator, is not checked, and TensorFlow does crash on
some. Nothing but `tf.train.Checkpoint` reads them, and only into an iterator: do not restore one from somebody whom
you do not trust.
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
from keras_ckpt.formats.dtypes import ITEM_SIZES, STRING, VARIANT
from keras_ckpt.store import layout
from keras_ckpt.store.files import Folder
from keras_ckpt.store.listing import refuse_changed
from keras_ckpt.store.record import CheckpointFile

_INDEX_LIMIT = 1 << 28
_ENTRY_LIMIT = 1_000_000
KEY_LIMIT = 4096
_DIMENSION_LIMIT = 254
_SHARD_LIMIT = 99_999  # as the name of a data file has five digits for it

_FOOTER = 48
_MAGIC = bytes.fromhex("57fb808b247547db")
_BLOCK_TRAILER = 5  # a byte for the compression, which TensorFlow does not use, and four of checksum
CHECKSUM = 4

# How a value of a Protocol Buffers message is written.
_NUMBER, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}


class _Fixed(NamedTuple):
    """A number of four or eight bytes."""

    value: int


_Fields = dict[int, list[int | bytes | _Fixed]]


Slice = tuple[tuple[int, int], ...]
"""A part of a variable: its start and its length in each dimension, or `WHOLE` where it is as long as the variable."""
WHOLE = (0, -1)


class Entry(NamedTuple):
    """What an index says of a variable.

    One that was saved in parts has no bytes, but `slices`. Each part has an entry of its own.
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
        entries: By key, those of parts too.
        files: The names of the data files by their numbers.
        variables: The names of the variables, as `tf.train.list_variables` has them.
    """

    entries: Mapping[bytes, Entry]
    files: Mapping[int, str]
    variables: Set[str]


def read_index(folder: Folder, name: str, digested: Iterable[CheckpointFile] = ()) -> Index:
    """Reads the index of a checkpoint, and checks it, so that TensorFlow can read the checkpoint without a crash.

    Args:
        folder: The directory of the checkpoint.
        name: The checkpoint's name, `"ckpt-10"`.
        digested: Files of the checkpoint. If the index is among them, its digest is compared.

    Raises:
        DamagedCheckpointError: It is no index, or what it says cannot be so.
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
    """The number of data files, and all entries by key."""
    entries = {}
    key = None
    try:
        (key, header), *table = _table(index)
        if key:
            raise DamagedCheckpointError("comes first, where the header should be")
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
            f"has {len(index)} bytes and does not end as an index does: it was cut, or is none"
        )
    _, at = _place(index, footer)  # of a block that TensorFlow leaves empty and never reads
    found: list[tuple[bytes, bytes]] = []
    last, size = b"", 0
    for separator, place in _block(index, *_place(index, at)[0]):
        for key, value in _block(index, *_place(place, 0)[0]):
            if found and key <= last:
                raise DamagedCheckpointError(f"is not sorted, or has an entry twice: {key!r:.200}")
            last, size = key, size + len(key)
            found.append((key, value))
            if len(found) > _ENTRY_LIMIT or size > _INDEX_LIMIT:
                raise DamagedCheckpointError(f"has more than {_ENTRY_LIMIT} entries, or too long ones")
        if last > separator:
            raise DamagedCheckpointError("has an entry in a block that another one should be in")
        last = separator
    return found


def _place(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """The offset and the size of a block, and where the next thing begins."""
    offset, at = varint(data, at)
    size, at = varint(data, at)
    return (offset, size), at


def _block(index: bytes, offset: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block.

    A key is written without what it shares with the one before. At restarts, which are listed at the end of the
    block, keys are written in full.
    """
    end = offset + size
    if size < 4 or end + _BLOCK_TRAILER > len(index) - _FOOTER:
        raise DamagedCheckpointError(f"has a block of {size} bytes at {offset}, which is not within it")
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
        shared, at = varint(index, at)
        rest, at = varint(index, at)
        length, at = varint(index, at)
        middle = at + rest
        if shared > len(key) or middle + length > limit or shared + rest > KEY_LIMIT:
            raise DamagedCheckpointError(f"has an entry at {began} with a length that cannot be")
        if not shared:
            whole.add(began - offset)
        key = key[:shared] + index[at:middle]
        at = middle + length
        yield key, index[middle:at]
    restarts = list(struct.unpack_from(f"<{count}I", index, limit))
    # TensorFlow jumps to them, so it would see another table than the one that is read here in order.
    if restarts[:1] != [0] or restarts != sorted(whole.intersection(restarts)):
        raise DamagedCheckpointError("has a block with restarts where no entry begins")


def _shards(header: bytes) -> int:
    """The number of data files."""
    fields = _fields(header)
    shards, order, version = _number(fields, 1), _number(fields, 2), _fields(b"".join(_messages(fields, 3)))
    if not 1 <= shards <= _SHARD_LIMIT:
        raise DamagedCheckpointError(f"speaks of {shards} data files")
    if order:
        raise DamagedCheckpointError("is of another byte order than that of this machine")
    if _number(version, 2) > 1:
        raise DamagedCheckpointError("is of a newer version of TensorFlow's format")
    return shards


def _entry(message: bytes) -> Entry:
    fields = _fields(message)
    # A message that comes twice is joined, as TensorFlow does.
    shape = _shape(b"".join(_messages(fields, 2)))
    slices = tuple(_slice(each, shape) for each in _messages(fields, 7))
    dtype, shard, offset, size = (_number(fields, number) for number in (1, 3, 4, 5))
    entry = Entry(dtype, shape, shard, offset, size, _fixed(fields, 6), slices)
    if dtype not in ITEM_SIZES and dtype not in (STRING, VARIANT):
        raise DamagedCheckpointError(f"has a type, {dtype}, that no variable has")
    if offset < 0 or size < 0:
        raise DamagedCheckpointError(f"has {size} bytes at {offset}")
    elements = math.prod(shape)
    if slices:
        covered = sum(math.prod(lengths(each, shape)) for each in slices)
        if covered != elements or offset or size or len(set(slices)) < len(slices):
            raise DamagedCheckpointError(f"has parts of {covered} elements in all, its shape is {shape}")
    elif dtype in ITEM_SIZES and elements * ITEM_SIZES[dtype] != size:
        raise DamagedCheckpointError(f"has {size} bytes, its shape is {shape}")
    return entry


@functools.lru_cache  # many variables are of one shape
def _shape(message: bytes) -> tuple[int, ...]:
    fields = _fields(message)
    dimensions = [_fields(each) for each in _messages(fields, 2)]
    # Names of dimensions, which TensorFlow never writes, would be another thing to check.
    if fields.keys() - {2} or any(each.keys() - {1} for each in dimensions):
        raise DamagedCheckpointError("has more than numbers in its shape")
    shape = tuple(_number(each, 1) for each in dimensions)
    if len(shape) > _DIMENSION_LIMIT or any(each < 0 for each in shape) or math.prod(filter(None, shape)) >> 63:
        raise DamagedCheckpointError(f"has a shape that no variable has: {shape!r:.100}")
    return shape


def _slice(message: bytes, shape: Sequence[int]) -> Slice:
    extents = [_fields(each) for each in _messages(_fields(message), 1)]
    part = tuple((_number(each, 1), _number(each, 2) if 2 in each else -1) for each in extents)
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
    """Each variable has bytes of its own in a data file."""
    ends = dict.fromkeys(sizes, 0)
    placed = [(entry.shard, entry.offset, entry.size, key) for key, entry in entries.items() if not entry.slices]
    for shard, offset, size, key in sorted(placed):
        if offset + size > sizes[shard]:
            raise _refusal(key, f"has {size} bytes at {offset}, its data file has {sizes[shard]}")
        # Without this a small file could hold a million variables of its own size.
        if size and offset < ends[shard]:
            raise _refusal(key, "has bytes of another entry")
        ends[shard] = max(ends[shard], offset + size)


def _check_texts(folder: Folder, files: Mapping[int, str], entries: Mapping[bytes, Entry]) -> None:
    """The lengths of strings, which are in a data file, add up to what their entry says."""
    sizes = {STRING: _strings_size, VARIANT: _variants_size}
    for key, entry in entries.items():
        if entry.dtype not in sizes or entry.slices:
            continue
        count = math.prod(entry.shape)
        try:
            # Each takes a byte at least, so that more of them than bytes need not be read.
            if count > entry.size or sizes[entry.dtype](folder, files[entry.shard], entry, count) != entry.size:
                raise DamagedCheckpointError(
                    f"has {entry.size} bytes, which the lengths of its strings do not add up to"
                )
        except DamagedCheckpointError as error:
            raise _refusal(key, error) from None


def _strings_size(folder: Folder, file: str, entry: Entry, count: int) -> int:
    """The bytes of strings: first all lengths, then a checksum, then the strings."""
    lengths = folder.read_range(file, entry.offset, min(entry.size, 10 * count))
    at = total = 0
    for _ in range(count):
        length, at = varint(lengths, at)
        total += length
    return at + CHECKSUM + total


def _variants_size(folder: Folder, file: str, entry: Entry, count: int) -> int:
    """The bytes of variants, such as the state of a dataset's iterator: each a length, a message, and a checksum."""
    size = 0
    for _ in range(count):
        length, used = varint(folder.read_range(file, entry.offset + size, 10), 0)
        size += used + length + CHECKSUM
        if size > entry.size:
            break
    return size


def _variables(entries: Mapping[bytes, Entry]) -> set[str]:
    """The names of the variables; those saved in parts are compared with the entries of these."""
    parts = set()
    for key, entry in entries.items():
        for each in entry.slices:
            part = slice_key(key, each)
            found = entries.get(part)
            kind = (entry.dtype, lengths(each, entry.shape), ())
            if found is None or (found.dtype, found.shape, found.slices) != kind:
                raise _refusal(key, f"has a part that has no entry of its type and its shape: {each}")
            parts.add(part)
    try:
        return {key.decode() for key in entries if key not in parts}
    except UnicodeDecodeError as error:
        raise DamagedCheckpointError(f"its index has a name that is no text: {error.object!r:.200}") from error


def masked(checksum: int) -> int:
    """A checksum as it is stored, so that one of bytes with a checksum in them is not that of other bytes."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def slice_key(key: bytes, part: Sequence[tuple[int, int]]) -> bytes:
    """The key of a part, in the encoding of TensorFlow's `OrderedCode`: the name, the rank, each extent."""
    escaped = key.replace(b"\x00", b"\x00\xff")
    numbers = b"".join(map(_ordered, itertools.chain.from_iterable(part)))
    return b"\x00" + escaped + b"\x00\x01" + bytes([1, len(part)]) + numbers


def _ordered(number: int) -> bytes:
    """A number as so many leading ones as it has bytes, a zero, and its bits; below zero all bits the other way."""
    if number < 0:
        return bytes(byte ^ 255 for byte in _ordered(~number))
    length = number.bit_length() // 7 + 1
    return (((1 << length) - 1) << (7 * length) | number).to_bytes(length, "big")


def _refusal(key: bytes | None, reason: object) -> DamagedCheckpointError:
    """The reason with what it is said of."""
    entry = "" if key is None else f"the entry {key.decode(errors='replace')!r:.200} of " if key else "the header of "
    return DamagedCheckpointError(f"{entry}its index {reason}")


def _fields(message: bytes) -> _Fields:
    """The values of a Protocol Buffers message by the number of their field."""
    fields: _Fields = {}
    at, end = 0, len(message)
    while at < end:
        tag, at = varint(message, at)
        kind = tag & 7
        value: int | bytes | _Fixed | None = None
        if kind == _NUMBER:
            value, at = varint(message, at)
        elif kind == _BYTES:
            length, begin = varint(message, at)
            at = begin + length
            value = message[begin:at]
        elif kind in _FIXED:
            begin, at = at, at + _FIXED[kind]
            value = _Fixed(int.from_bytes(message[begin:at], "little"))
        if at > end or value is None or not 0 < tag >> 3 < 1 << 29:
            raise DamagedCheckpointError("is not a message as TensorFlow writes them")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: _Fields, field: int) -> int:
    """A field's number, of which the last counts; 0 if there is none."""
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise DamagedCheckpointError("is not a message as TensorFlow writes them")
    return value - (1 << 64) if value >> 63 else value


def _fixed(fields: _Fields, field: int) -> int:
    """The same of a number of four or eight bytes."""
    value = fields.get(field, [_Fixed(0)])[-1]
    if not isinstance(value, _Fixed):
        raise DamagedCheckpointError("is not a message as TensorFlow writes them")
    return value.value


def _messages(fields: _Fields, field: int) -> list[bytes]:
    """All messages of a field."""
    values = [value for value in fields.get(field, ()) if isinstance(value, bytes)]
    if len(values) < len(fields.get(field, ())):
        raise DamagedCheckpointError("is not a message as TensorFlow writes them")
    return values


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next thing begins."""
    if at < len(data) and data[at] < 128:  # most are
        return data[at], at + 1
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            # TensorFlow takes some numbers for others if they are longer than they need be.
            if value >> 64 or not byte:
                break
            return value, at + place + 1
    raise DamagedCheckpointError("has a number that is cut, or longer than one can be")
