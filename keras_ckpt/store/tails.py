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
    """Whether a file without a record has the beginning of a record, whose end was cut or changed."""
    return _BEGIN in folder.read_end(name, LIMIT)[1]


def content_size(folder: Reading, name: str) -> int:
    """The bytes of a file's content, without the record at its end."""
    found = read_tail(folder, name)
    return folder.size(name) if found is None else found[0]
