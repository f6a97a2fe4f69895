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
_HEADER = 30
"""The bytes of a member's header in a zip archive, without its name."""


class KerasFile(NamedTuple):
    """The layout of a file.

    Attributes:
        datasets: The values by path. The offsets are those in the file.
        names: The names of objects, by the paths of their values' groups. An unverified file has none.
        assets: The files that objects saved, by path. A file of weights has none.
        is_archive: Whether the file is an archive, which may have assets.
        is_legacy: Whether the file is HDF5 in the layout of Keras 2.
    """

    datasets: Mapping[str, Dataset]
    names: Mapping[str, str]
    assets: Mapping[str, bytes]
    is_archive: bool
    is_legacy: bool


def read_keras_file(
    folder: Folder, name: str, record: CheckpointRecord | None, check_digests: bool = True
) -> KerasFile:
    """Reads the layout of a file.

    Args:
        folder: Where the file is.
        name: The name of the file.
        record: The record of the file, `None` if it has none.
        check_digests: Whether to compare every byte with the digest in the record. Without a record, the checksums of
            an archive are compared. In an unverified file the names of objects are not read.

    Raises:
        DamagedCheckpointError: The file differs from its digest.
        ValueError, OSError, zipfile.BadZipFile: The file is damaged, or no file of Keras.
    """
    digested = record.files if record and check_digests else ()
    fill(folder, (), digested)
    verify, is_verified = check_digests and record is None, bool(digested)
    with folder.reading(name) as file:
        whole = _Window(file, 0, file.size)
        if whole.read(len(_ARCHIVE)) != _ARCHIVE:
            return KerasFile(*_read_hdf5(whole, is_verified), {}, is_archive=False, is_legacy=_is_legacy(whole))
        with zipfile.ZipFile(whole) as archive:
            _refuse_unsafe(archive, file.size)
            if verify and (bad := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {bad!r:.200} does not match")
            member = archive.getinfo(_WEIGHTS)
            weights = _Window(file, _begin(archive, member), member.file_size)
            assets = {
                each.filename.removeprefix(_ASSETS): archive.read(each)
                for each in archive.infolist()
                if each.filename.startswith(_ASSETS) and not each.is_dir()
            }
        return KerasFile(*_read_hdf5(weights, is_verified or verify), assets, is_archive=True, is_legacy=False)


def read_config(folder: Folder, name: str) -> Config | None:
    """Reads the config of the model in a file, `None` if the file has weights alone or is HDF5 in a legacy layout.

    Raises:
        ValueError, OSError, zipfile.BadZipFile: The file is damaged, or no file of Keras.
    """
    with folder.reading(name) as file:
        whole = _Window(file, 0, file.size)
        if whole.read(len(_ARCHIVE)) != _ARCHIVE:
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


def _read_hdf5(window: _Window, is_verified: bool) -> tuple[dict[str, Dataset], dict[str, str]]:
    with h5py.File(window, "r") as file:
        datasets = datasets_in(file)
        # HDF5 never returns from the read of a text if some of its bytes are damaged.
        groups = {path.rpartition("/")[0] for path in datasets if is_verified}
        names = {path: _name_of(file, path) for path in groups if path}
    if sum(each.size for each in datasets.values()) > window.size:
        raise ValueError("its values overlap")
    for path, each in datasets.items():
        if each.offset + each.size > window.size:
            raise ValueError(f"the dataset {path!r:.200} ends after the file")
    return {path: each._replace(offset=each.offset + window.start) for path, each in datasets.items()}, names


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


def _is_legacy(window: _Window) -> bool:
    with h5py.File(window, "r") as file:
        return "layer_names" in file.attrs or "model_config" in file.attrs


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
