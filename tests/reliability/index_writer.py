"""Writes checkpoints in TensorFlow's format part by part: any may be wrong while all checksums hold."""

from __future__ import annotations

import dataclasses
import pathlib
import struct

from tensorflow.core.protobuf import tensor_bundle_pb2

from keras_ckpt.formats.bundle_index import _table

Header = tensor_bundle_pb2.BundleHeaderProto
Entry = tensor_bundle_pb2.BundleEntryProto
MAGIC = 0xDB4775248B80FB57


def _crcs() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in table]
    return table


_CRCS = _crcs()


def checksum(data: bytes) -> int:
    """The CRC-32C of the bytes, masked as in all of TensorFlow's files."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRCS[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(number: int) -> bytes:
    """Seven bits a byte."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


@dataclasses.dataclass
class Bundle:
    """The parts of a checkpoint.

    Attributes:
        header: The header's message.
        entries: The messages, or bytes in their place, each with its key in the order of the file.
        data: The data file.
        per_block: Entries in a block.
        restart_interval: Keys from one that is written in full to the next.
        bad_checksums: The numbers of blocks whose checksum is wrong.
        restarts: The restarts of each block, if not those that there are.
        compression: The byte that says how a block is compressed.
        shift: What is added to the offset and to the size of each block in the index of blocks.
        magic: The last eight bytes.
    """

    header: Header | bytes
    entries: list[tuple[bytes, Entry | bytes]]
    data: bytes
    per_block: int = 16
    restart_interval: int = 4
    bad_checksums: tuple[int, ...] = ()
    restarts: tuple[int, ...] | None = None
    compression: int = 0
    shift: tuple[int, int] = (0, 0)
    magic: int = MAGIC

    def entry(self, key: str) -> Entry:
        """The message of a key."""
        return dict(self.entries)[key.encode()]

    def append(self, entry: Entry, content: bytes, crc32c: int) -> None:
        """Gives a variable other bytes, at the end of the data file."""
        entry.offset, entry.size, entry.crc32c = len(self.data), len(content), crc32c
        self.data += content

    def index(self) -> bytes:
        """The index file."""
        table = [(b"", self.header), *self.entries]
        pairs = [(key, each if isinstance(each, bytes) else each.SerializeToString()) for key, each in table]
        blocks = [pairs[at : at + self.per_block] for at in range(0, len(pairs), self.per_block)]
        file, handles = b"", []
        for block in blocks:
            file, handle = self._add(file, self._block(block), len(handles) in self.bad_checksums)
            moved = (max(0, number + by) for number, by in zip(handle, self.shift, strict=True))
            handles.append((block[-1][0], b"".join(map(varint, moved))))
        file, metaindex = self._add(file, struct.pack("<II", 0, 1), bad=False)
        file, index = self._add(file, self._block(handles), bad=False)
        footer = b"".join(map(varint, (*metaindex, *index)))
        return file + footer.ljust(40, b"\0") + struct.pack("<Q", self.magic)

    def write(self, prefix: pathlib.Path | str) -> None:
        """Writes the two files."""
        pathlib.Path(f"{prefix}.data-00000-of-00001").write_bytes(self.data)
        pathlib.Path(f"{prefix}.index").write_bytes(self.index())

    def _block(self, pairs: list[tuple[bytes, bytes]]) -> bytes:
        block, restarts, last = b"", [], b""
        for number, (key, value) in enumerate(pairs):
            shared = 0
            if number % self.restart_interval == 0:
                restarts.append(len(block))
            else:
                while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                    shared += 1
            block += b"".join(map(varint, (shared, len(key) - shared, len(value)))) + key[shared:] + value
            last = key
        if self.restarts is not None:
            restarts = self.restarts
        return block + struct.pack(f"<{len(restarts) + 1}I", *restarts, len(restarts))

    def _add(self, file: bytes, block: bytes, bad: bool) -> tuple[bytes, tuple[int, int]]:
        sealed = block + bytes([self.compression])
        return file + sealed + struct.pack("<I", checksum(sealed) ^ bad), (len(file), len(block))


def read(prefix: pathlib.Path | str) -> Bundle:
    """The parts of a sound checkpoint of one data file."""
    (_, header), *table = _table(pathlib.Path(f"{prefix}.index").read_bytes())
    entries = [(key, Entry.FromString(value)) for key, value in table]
    return Bundle(Header.FromString(header), entries, pathlib.Path(f"{prefix}.data-00000-of-00001").read_bytes())


def string(text: bytes, length: int | None = None) -> tuple[bytes, int]:
    """The bytes of a string and their checksum; with another length than its own if one is given."""
    length = len(text) if length is None else length
    number = struct.pack("<I" if length < 1 << 32 else "<Q", length)
    sealed = struct.pack("<I", checksum(number))
    return varint(length) + sealed + text, checksum(number + sealed + text)
