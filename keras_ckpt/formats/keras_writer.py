"""The bytes of Keras's own files: an HDF5 file, or a zip archive that holds one, with a tail for the record.

A tail is a zip archive's comment, or bytes after the end of HDF5's data. Every reader of these formats skips it.
"""

from __future__ import annotations

import io
import math
import mmap
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import h5py
import ml_dtypes
import numpy as np

from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile
from keras_ckpt.store.streams import PORTION, NewFile
from keras_ckpt.store.tails import LIMIT

_NO_DIGEST = f"blake3:{'0' * 64}"
_COMMENT_SIZE = struct.Struct("<H")
_PIECE = 1 << 20
"""The bytes of which the checksum is computed, and which are copied while they are in the processor's caches."""

Tail = Callable[[int, str], bytes]
"""Makes the tail of a file from the size and the digest of all bytes before it."""


def write_hdf5(folder: Folder, name: str, pieces: Iterable[memoryview], tail: Tail) -> CheckpointFile:
    """Writes an HDF5 file and its tail, and makes them durable.

    Args:
        folder: Where to write.
        name: The name of the file.
        pieces: The bytes of the file in order.
        tail: Makes the tail.
    """
    with folder.writing(name) as file:
        _write_in_pages(file, pieces)
        file.write(memoryview(tail(*file.finish())))
        return CheckpointFile(name, *file.finish())


def write_archive(folder: Folder, name: str, pieces: Iterable[memoryview], tail: Tail) -> CheckpointFile:
    """Writes a zip archive with the tail as its comment, and makes it durable.

    Args:
        folder: Where to write.
        name: The name of the file.
        pieces: The bytes of an archive without a comment, in order.
        tail: Makes the tail. Its size must not depend on the digest.

    Raises:
        ValueError: The tail is too long, or its size depends on the digest.
    """
    with folder.writing(name) as file:
        _write_in_pages(file, _without_comment_size(pieces))
        size = file.size + _COMMENT_SIZE.size
        length = len(tail(size, _NO_DIGEST))
        if length > LIMIT:
            raise ValueError(f"the tail of {name} has {length} bytes, the limit is {LIMIT}")
        file.write(memoryview(_COMMENT_SIZE.pack(length)))
        comment = tail(*file.finish())
        if len(comment) != length:
            raise ValueError(f"the tail of {name} has {len(comment)} bytes, {length} were expected")
        file.write(memoryview(comment))
        return CheckpointFile(name, *file.finish())


def _write_in_pages(file: NewFile, pieces: Iterable[memoryview]) -> None:
    """Writes pieces as whole pages, so that the writes bypass the page cache."""
    memory, filled = file.portion(), 0
    for piece in pieces:
        data = np.frombuffer(piece, np.uint8) if piece else np.empty(0, np.uint8)
        while len(data):
            if filled == PORTION:
                file.write_pages(memory)
                memory, filled = file.portion(), 0
            count = min(len(data), PORTION - filled)
            # NumPy lets other threads run meanwhile.
            np.copyto(np.frombuffer(memory, np.uint8, count, filled), data[:count])
            data, filled = data[count:], filled + count
    file.write(memory[:filled])


def _without_comment_size(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """The bytes of an archive without its end: the size of its comment."""
    last = memoryview(b"")
    for piece in pieces:
        yield last
        last = piece
    yield last[: -_COMMENT_SIZE.size]


def hdf5_in_memory(fill: Callable[[h5py.File], object]) -> bytes:
    """An HDF5 file that a function fills."""
    # h5py writes to a Python object: its driver for real files crashes the process at exit if the disk was full.
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        fill(file)
    return memory.getvalue()


class Dataset(NamedTuple):
    """The place of a value in an HDF5 file.

    Attributes:
        offset: The offset of its bytes.
        size: The number of its bytes.
        shape: The shape of the value.
        dtype: Its type.
    """

    offset: int
    size: int
    shape: tuple[int, ...]
    dtype: np.dtype


def dataset_of(path: str, key: str) -> str:
    """The path of a dataset of an object in an HDF5 file."""
    return f"{path}/vars/{key}".lstrip("/")


def datasets_in(file: h5py.File) -> dict[str, Dataset]:
    """The places of the values in an HDF5 file, by the path of the dataset. Follows no link.

    Raises:
        ValueError: The values of a dataset are not in one place, or not plain bytes.
    """
    paths: list[bytes] = []

    def note(path: bytes, info: Any) -> None:
        if info.type == h5py.h5o.TYPE_DATASET:
            paths.append(path)

    h5py.h5o.visit(file.id, note, info=True)
    return {path.decode(): _dataset(path.decode(), h5py.h5d.open(file.id, path)) for path in paths}


def _dataset(path: str, each: h5py.h5d.DatasetID) -> Dataset:
    dtype, shape = each.dtype, tuple(each.shape)
    size, offset = each.get_storage_size(), each.get_offset()
    plain = dtype.kind != "O" and dtype.isnative and size == math.prod(shape) * dtype.itemsize
    if not plain or (size and offset is None):
        raise ValueError(f"the dataset {path:.200} of {dtype} is not plain bytes in one place")
    is_bfloat16 = dtype.kind == "V" and h5py.Dataset(each).attrs.get("dtype") == "bfloat16"
    dtype = np.dtype(ml_dtypes.bfloat16 if is_bfloat16 else dtype.str)  # h5py's own types are not NumPy's
    return Dataset(offset if size else 0, size, shape, dtype)


class Skeleton:
    """An HDF5 file without its values: all bytes but the values are the same in each file of a model.

    Example:

    ```python
    skeleton = Skeleton(image, datasets_in(file))
    pieces = skeleton.filled({"layers/dense/vars/0": memoryview(kernel)}.__getitem__)
    ```

    Args:
        image: The bytes of a file.
        datasets: The places of the values in it.

    Attributes:
        size: The bytes of a file.
    """

    def __init__(self, image: bytes | mmap.mmap, datasets: Mapping[str, Dataset]) -> None:
        self.size = len(image)
        self._parts: list[tuple[memoryview, str]] = []
        end = 0
        for path, each in sorted(datasets.items(), key=lambda item: item[1].offset):
            if each.size:
                self._parts.append((memoryview(image[end : each.offset]), path))
                end = each.offset + each.size
        self._rest = memoryview(image[end:])

    def filled(self, value: Callable[[str], memoryview]) -> Iterator[memoryview]:
        """The bytes of a file with other values, in order.

        Args:
            value: Returns the bytes of the value of a dataset by its path. It is called when they are needed.
        """
        for before, path in self._parts:
            yield before
            yield value(path)
        yield self._rest


def new_skeleton(names: Mapping[str, str], kinds: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> Skeleton:
    """The skeleton of a file as Keras would write it, made without memory for the values.

    Args:
        names: The names of objects, by the paths of the groups of their values.
        kinds: The types and shapes of the values, by the path of the dataset.
    """
    places = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    places.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    places.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with tempfile.TemporaryFile() as sparse:  # its holes, the values, take no room
        with h5py.File(sparse, "w") as file:
            for path, name in names.items():
                file.create_group(path).attrs["name"] = name
            for path, (dtype, shape) in kinds.items():
                # h5py gives a scalar a place when it is written.
                plan = {"dcpl": places} if shape else {"data": np.zeros((), dtype)}
                each = file.create_dataset(path, shape, dtype, **plan)
                if dtype.name == "bfloat16":
                    each.attrs["dtype"] = dtype.name
            datasets = datasets_in(file)
        sparse.flush()
        with mmap.mmap(sparse.fileno(), 0, prot=mmap.PROT_READ) as image:
            return Skeleton(image, datasets)


class Member(NamedTuple):
    """A member of a zip archive: its name, its size, and its bytes in order."""

    name: str
    size: int
    pieces: Iterable[memoryview]


def archive(members: Iterable[Member]) -> Iterator[memoryview]:
    """The bytes of a zip archive of members that are not compressed, in order."""
    stream = _Stream()
    with zipfile.ZipFile(stream, "w") as file:  # type: ignore[call-overload]
        for member in members:
            with file.open(member.name, "w", force_zip64=member.size > zipfile.ZIP64_LIMIT // 2) as opened:
                for piece in member.pieces:
                    for begin in range(0, len(piece), _PIECE):
                        opened.write(piece[begin : begin + _PIECE])
                        yield from stream.taken()
            yield from stream.taken()
    yield memoryview(b"".join(stream.taken()))


class _Stream:
    """A file object that keeps the bytes which `zipfile` writes. Without `tell`, `zipfile` never seeks."""

    def __init__(self) -> None:
        self._written: list[memoryview] = []

    def write(self, data: bytes | memoryview) -> int:
        piece = memoryview(data)
        self._written.append(piece)
        return len(piece)

    def flush(self) -> None:
        pass

    def taken(self) -> list[memoryview]:
        """Takes the bytes that were written since the last call."""
        taken, self._written = self._written, []
        return taken


def members_of(image: bytes) -> dict[str, bytes]:
    """The members of a zip archive by name."""
    with zipfile.ZipFile(io.BytesIO(image)) as file:
        return {name: file.read(name) for name in file.namelist()}
