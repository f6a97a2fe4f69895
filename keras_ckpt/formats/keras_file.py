"""The bytes of Keras's own files: an HDF5 file, or a zip archive that holds one, with a tail for the record.

A tail is a zip archive's comment, or bytes after the end of HDF5's data. Every reader of these formats skips it.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable

import h5py

from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile

TAIL_LIMIT = (1 << 16) - 1
"""The most bytes of a zip archive's comment."""
_NO_DIGEST = f"blake3:{'0' * 64}"
_END = 22
"""The bytes of a zip archive's last record, whose last two bytes are the size of the comment."""

Tail = Callable[[int, str], bytes]
"""Makes the tail of a file from the size and the digest of all bytes before it."""


def write_hdf5(folder: Folder, name: str, pieces: Iterable[memoryview], tail: Tail) -> CheckpointFile:
    """Writes an HDF5 file and its tail, and makes them durable.

    Args:
        folder: Where to write.
        name: The name of the file.
        pieces: The bytes of the file in order. They must not change before the end.
        tail: Makes the tail.
    """
    with folder.writing(name) as file:
        for piece in pieces:
            file.write(piece)
        file.write(memoryview(tail(*file.finish())))
        return CheckpointFile(name, *file.finish())


def write_archive(folder: Folder, name: str, pieces: Iterable[memoryview], tail: Tail) -> CheckpointFile:
    """Writes a zip archive with the tail as its comment, and makes it durable.

    Args:
        folder: Where to write.
        name: The name of the file.
        pieces: The bytes of an archive without a comment, in order. They must not change before the end.
        tail: Makes the tail. Its size must not depend on the digest.

    Raises:
        ValueError: The tail is too long, or its size depends on the digest.
    """
    with folder.writing(name) as file:
        last = memoryview(b"")
        for piece in pieces:
            file.write(last)
            last = piece
        file.write(last[:-_END])
        size = file.size + _END
        length = len(tail(size, _NO_DIGEST))
        if length > TAIL_LIMIT:
            raise ValueError(f"the tail of {name} has {length} bytes, the limit is {TAIL_LIMIT}")
        file.write(memoryview(bytes(last[-_END:-2]) + struct.pack("<H", length)))
        comment = tail(*file.finish())
        if len(comment) != length:
            raise ValueError(f"the tail of {name} has {len(comment)} bytes, {length} were expected")
        file.write(memoryview(comment))
        return CheckpointFile(name, *file.finish())


def hdf5_in_memory(fill: Callable[[h5py.File], object]) -> bytes:
    """An HDF5 file that a function fills."""
    # h5py writes to a Python object: its driver for real files crashes the process at exit if the disk was full.
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        fill(file)
    return memory.getvalue()
