"""Reads the layout of one of Keras's own files: the places of its values, and its assets. Runs no code of the file."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import h5py
import msgspec
import numpy as np

from keras_ckpt.formats import config
from keras_ckpt.formats.config import Config
from keras_ckpt.formats.keras_writer import Dataset, datasets_in
from keras_ckpt.formats.targets import fill
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.streams import OpenFile

_WEIGHTS, _ASSETS, _CONFIG, _METADATA = "model.weights.h5", "assets/", "config.json", "metadata.json"
_ARCHIVE = b"PK\3\4"
"""The first bytes of a zip archive."""
_HDF5 = b"\x89HDF\r\n\x1a\n"
"""The first bytes of an HDF5 file."""
_HEADER = 30
"""The bytes of a member's header in a zip archive, without its name."""


class KerasFile(NamedTuple):
    """The layout of a file.

    Attributes:
        datasets: The values by path. The offsets are those in the file.
        weights: The offset and the size of the HDF5 data in the file.
        is_archive: Whether the file is an archive, which may have assets.
        is_legacy: Whether the file is HDF5 in the layout of Keras 2.
    """

    datasets: Mapping[str, Dataset]
    weights: tuple[int, int]
    is_archive: bool
    is_legacy: bool


def read_verified(folder: Folder, name: str, record: CheckpointRecord | None) -> KerasFile:
    """Reads the layout of a file after every byte was compared with its digest.

    Without a record, the checksums of an archive are compared. An HDF5 file alone has none. Arguments and errors are
    those of `read_layout`.
    """
    fill(folder, (), record.files if record else ())
    return read_layout(folder, name, verify=record is None)


def read_layout(folder: Folder, name: str, verify: bool) -> KerasFile:
    """Reads the layout of a file, which may be damaged.

    Args:
        folder: Where the file is.
        name: The name of the file.
        verify: Whether to compare the checksums of an archive with every byte.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: The file is damaged, or no file of Keras.
    """
    with folder.reading(name) as file:
        whole = _Window(file, 0, file.size)
        is_archive = _is_archive(whole)
        weights = _weights_in(whole, verify) if is_archive else (0, file.size)
        window = _Window(file, *weights)
        with h5py.File(window, "r") as opened:
            is_legacy = not is_archive and ("layer_names" in opened.attrs or "model_config" in opened.attrs)
            return KerasFile(_datasets(opened, window), weights, is_archive, is_legacy)


def _weights_in(whole: _Window, verify: bool) -> tuple[int, int]:
    """The offset and the size of the HDF5 data in an archive."""
    with zipfile.ZipFile(whole) as archive:
        _refuse_unsafe(archive, whole.size)
        if verify and (bad := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {bad!r:.200} does not match")
        member = archive.getinfo(_WEIGHTS)
        return _begin(archive, member), member.file_size


def read_names(folder: Folder, name: str, layout: KerasFile) -> dict[str, str]:
    """Reads the names of objects in a verified file, by the paths of their values' groups.

    HDF5 never returns from the read of a text if some of its bytes are damaged.
    """
    groups = {path.rpartition("/")[0] for path in layout.datasets}
    with folder.reading(name) as file, h5py.File(_Window(file, *layout.weights), "r") as opened:
        return {path: _name_of(opened, path) for path in groups if path}


def read_assets(folder: Folder, name: str) -> dict[str, bytes]:
    """Reads the files that objects saved in an archive, by path."""
    with folder.reading(name) as file, zipfile.ZipFile(_Window(file, 0, file.size)) as archive:
        _refuse_unsafe(archive, file.size)
        return {
            each.filename.removeprefix(_ASSETS): archive.read(each)
            for each in archive.infolist()
            if each.filename.startswith(_ASSETS) and not each.is_dir()
        }


def read_config(folder: Folder, name: str) -> Config | None:
    """Reads the config of the model in a file, `None` if the file has weights alone or is HDF5 in a legacy layout.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: The file is damaged, or no file of Keras.
    """
    with folder.reading(name) as file:
        whole = _Window(file, 0, file.size)
        if not _is_archive(whole):
            if _Window(file, 0, file.size).read(len(_HDF5)) != _HDF5:
                raise ValueError("it is neither an archive nor HDF5")
            return None
        with zipfile.ZipFile(whole) as archive:
            _refuse_unsafe(archive, file.size)
            if archive.getinfo(_CONFIG).file_size > config.LIMIT:
                raise ValueError(f"{_CONFIG} has more than {config.LIMIT} bytes")
            found = msgspec.json.decode(archive.read(_CONFIG), type=dict[str, Any])
            version = msgspec.json.decode(archive.read(_METADATA), type=dict[str, Any]).get("keras_version", "")
    return Config(found, keras=str(version))


def _refuse_unsafe(archive: zipfile.ZipFile, size: int) -> None:
    """Refuses compressed members, members that overlap, and names that lead out of a folder."""
    members = archive.infolist()
    for each in members:
        if each.compress_type != zipfile.ZIP_STORED or each.file_size != each.compress_size:
            raise ValueError(f"{each.filename!r:.200} is compressed")
        if any(part in ("", ".", "..") for part in each.filename.removesuffix("/").split("/")):
            raise ValueError(f"{each.filename!r:.200} is an unsafe name")
    if sum(each.file_size for each in members) > size:
        raise ValueError("its members overlap")
    if len({each.filename for each in members}) != len(members):
        raise ValueError("it has two members of one name")


def _begin(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
    """The offset of a member's bytes."""
    archive.open(member).close()  # checks the header
    file: Any = archive.fp
    file.seek(member.header_offset)
    name, extra = struct.unpack("<26xHH", file.read(_HEADER))
    return int(member.header_offset + _HEADER + name + extra)


def _datasets(opened: h5py.File, window: _Window) -> dict[str, Dataset]:
    """The places of the values in an HDF5 file, as offsets in the file around it."""
    datasets = datasets_in(opened)
    if sum(each.size for each in datasets.values()) > window.size:
        raise ValueError("its values overlap")
    for path, each in datasets.items():
        if each.offset + each.size > window.size:
            raise ValueError(f"the dataset {path!r:.200} ends after the file")
    return {path: each._replace(offset=each.offset + window.start) for path, each in datasets.items()}


def _name_of(file: h5py.File, path: str) -> str:
    """The name that is an attribute of a group, `""` without a name."""
    # The low level of h5py takes a fifth of the time.
    group = h5py.h5o.open(file.id, path.encode())
    if not h5py.h5a.exists(group, b"name"):
        return ""
    attribute = h5py.h5a.open(group, b"name")
    value = np.empty(attribute.shape, attribute.dtype)
    attribute.read(value)
    return value.item().decode() if isinstance(value.item(), bytes) else ""


def _is_archive(whole: _Window) -> bool:
    return whole.read(len(_ARCHIVE)) == _ARCHIVE


class _Window(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, file: OpenFile, start: int, size: int) -> None:
        self.start = start
        self.size = size
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        memory = memoryview(buffer).cast("B")
        count = max(0, min(len(memory), self.size - self._at))
        self._file.read_into([memory[:count]] if count else [], self.start + self._at)
        self._at += count
        return count
