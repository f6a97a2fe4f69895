"""The wire format of Protocol Buffers, in which TensorFlow's format has its entries and its object graph."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from keras_ckpt.errors import DamagedCheckpointError

_NUMBER, _BYTES = 0, 2
"""The wire types of numbers of variable size, and of strings and messages."""
_FIXED = {1: 8, 5: 4}
"""The sizes of the wire types of numbers of fixed size."""


class _Fixed(NamedTuple):
    """A number of four or eight bytes."""

    value: int


Kind = TypeVar("Kind", int, bytes, _Fixed)
Fields = dict[int, list[int | bytes | _Fixed]]


def decode(message: bytes) -> Fields:
    """The values of a Protocol Buffers message by the number of their field."""
    fields: Fields = {}
    at, end = 0, len(message)
    while at < end:
        tag, at = read_varint(message, at)
        kind = tag & 7
        value: int | bytes | _Fixed | None = None
        if kind == _NUMBER:
            value, at = read_varint(message, at)
        elif kind == _BYTES:
            length, begin = read_varint(message, at)
            at = begin + length
            value = message[begin:at]
        elif kind in _FIXED:
            begin, at = at, at + _FIXED[kind]
            value = _Fixed(int.from_bytes(message[begin:at], "little"))
        if at > end or value is None or not 0 < tag >> 3 < 1 << 29:
            raise DamagedCheckpointError("is not a valid Protocol Buffers message")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def number(fields: Fields, field: int) -> int:
    """The last number of a field, 0 if the field is absent."""
    value = (_values(fields, field, int) or [0])[-1]
    return value - (1 << 64) if value >> 63 else value


def fixed(fields: Fields, field: int) -> int:
    """The last number of four or eight bytes of a field, 0 if the field is absent."""
    return (_values(fields, field, _Fixed) or [_Fixed(0)])[-1].value


def messages(fields: Fields, field: int) -> list[bytes]:
    """All messages of a field."""
    return _values(fields, field, bytes)


def _values(fields: Fields, field: int, kind: type[Kind]) -> list[Kind]:
    """All values of a field, which must be of one kind."""
    values = [value for value in fields.get(field, ()) if isinstance(value, kind)]
    if len(values) < len(fields.get(field, ())):
        raise DamagedCheckpointError("is not a valid Protocol Buffers message")
    return values


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Decodes a number of seven bits a byte. Returns it with the position after it."""
    if at < len(data) and data[at] < 128:  # the usual case
        return data[at], at + 1
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            # TensorFlow misreads some numbers that are longer than necessary.
            if value >> 64 or not byte:
                break
            return value, at + place + 1
    raise DamagedCheckpointError("has a number that is truncated or too long")


def message(field: int, content: bytes) -> bytes:
    """A field with a message or a string."""
    return bytes([field << 3 | 2]) + varint(len(content)) + content


def numbered(field: int, number: int) -> bytes:
    """A field with a number."""
    return bytes([field << 3]) + varint(number)


def varint(number: int) -> bytes:
    """A number encoded with seven bits a byte."""
    if number < 128:
        return _SMALL[number]
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


_SMALL = [bytes([number]) for number in range(128)]
