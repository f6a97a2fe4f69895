"""The record at the end of a file of Keras: one rename commits both, and a copied file still tells its record.

A file of Keras is its content, then the record as a sidecar has it, the record's length in 8 bytes, and a mark. Zip
readers see the record as the archive's comment. HDF5 readers stop where their data ends.
"""

from __future__ import annotations

import msgspec

from keras_ckpt.store import record as sidecars
from keras_ckpt.store.reading import Reading
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord

_MARK = b"keras_ckpt"
_END = 8 + len(_MARK)
LIMIT = (1 << 16) - 1
"""The most bytes of a zip archive's comment."""
_BEGIN = b'{\n  "format": "keras_ckpt",'
_HDF5, _ARCHIVE, _ARCHIVE_END = b"\x89HDF\r\n\x1a\n", b"PK\3\4", b"PK\5\6"
"""The first bytes of HDF5 files and of zip archives, and the first bytes of the end of an archive."""
_SIZE_OF_END = 22
"""The bytes of the end of a zip archive, without its comment."""
_SIZES = {0: (13, 40), 1: (13, 44), 2: (9, 28), 3: (9, 28)}
"""The places in an HDF5 file of the length of an address, and of the address of its end, by version."""
_LOOK = 1 << 12
"""The bytes at a file's end that are read first; most records are shorter."""


def tail(record: CheckpointRecord, size: int, digest: str) -> bytes:
    """The bytes that follow the content of a file.

    A record that is too long for a zip archive's comment is shortened: only its sidecar has the metadata, and where
    that does not suffice, the seeds.

    Args:
        record: The record, without its file.
        size: The bytes of the content.
        digest: The digest of the content.
    """
    record = msgspec.structs.replace(record, files=(CheckpointFile(record.name, size, digest),))
    data = sidecars.encode(record)
    for member in ("metadata", "seeds"):
        if len(data) > LIMIT - _END:
            record = msgspec.structs.replace(record, **{member: {}})
            data = sidecars.encode(record)
    return data + len(data).to_bytes(8) + _MARK


def read_tail(folder: Reading, name: str) -> tuple[int, CheckpointRecord] | None:
    """The bytes of a file's content and the record after it, `None` if the file has no record.

    Raises:
        DamagedCheckpointError: The file ends as a record does, but the record was changed.
        FormatVersionError: A newer version of this package wrote the record.
        OSError: The file cannot be read.
    """
    size, end = folder.read_end(name, _LOOK)
    length = int.from_bytes(end[-_END : -len(_MARK)])
    if not end.endswith(_MARK) or not 0 < length <= LIMIT - _END or length + _END > size:
        return None
    if length + _END > len(end):
        size, end = folder.read_end(name, length + _END)
    return size - length - _END, sidecars.decode_tail(end[-_END - length : -_END], name, folder.path)


def is_cut(folder: Reading, name: str) -> bool:
    """Whether a file without a record ends early, in its content or in its record. Else another program wrote it."""
    size, end = folder.read_end(name, LIMIT + _SIZE_OF_END)
    begin = folder.read_range(name, 0, _LOOK)
    if begin.startswith(_ARCHIVE) and _ARCHIVE_END not in end:
        return True
    return size == 0 or _BEGIN in end or size < _size_of_hdf5(begin)


def _size_of_hdf5(begin: bytes) -> int:
    """The size of an HDF5 file by its first bytes, 0 if they do not tell."""
    if not begin.startswith(_HDF5) or len(begin) < 64 or begin[8] not in _SIZES:
        return 0
    length, place = _SIZES[begin[8]]
    return int.from_bytes(begin[place : place + 8], "little") if begin[length] == 8 else 0


def content_size(folder: Reading, name: str) -> int:
    """The bytes of a file's content, without the record at its end."""
    found = read_tail(folder, name)
    return folder.size(name) if found is None else found[0]
