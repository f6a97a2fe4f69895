"""The bytes of Keras's own files: places of values in HDF5, zip archives, and tails."""

from __future__ import annotations

import io
import pathlib
import zipfile

import h5py
import ml_dtypes
import numpy as np
import pytest

from keras_ckpt.formats.keras_writer import (
    Member,
    Skeleton,
    archive,
    datasets_in,
    members_of,
    new_skeleton,
    write_archive,
    write_hdf5,
)
from keras_ckpt.store.files import Folder
from keras_ckpt.store.streams import PORTION
from support.keras_files import hdf5

COMMENT = b"the record"


def image(fill) -> bytes:
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        fill(file)
    return memory.getvalue()


def places_in(image: bytes) -> dict[str, slice]:
    with h5py.File(io.BytesIO(image)) as file:
        return {path: slice(each.offset, each.offset + each.size) for path, each in datasets_in(file).items()}


def written(path: pathlib.Path, write, pieces) -> bytes:
    with Folder(path) as folder:
        file = write(folder, "file", pieces, lambda size, digest: COMMENT)
        assert (file.size, file.digest) == folder.digest("file")
    return (path / "file").read_bytes()


@pytest.mark.parametrize("sizes", [[0], [1], [PORTION - 1, 1], [PORTION], [PORTION + 1], [3] * 5000, [7 * PORTION, 5]])
def test_pieces_of_all_sizes_are_written_in_order(tmp_path, sizes) -> None:
    """Some fill the memory of a write exactly, and some fill all memory of the writes several times."""
    pieces = [np.random.default_rng(0).bytes(size) for size in sizes]

    got = written(tmp_path, write_hdf5, map(memoryview, pieces))

    assert got == b"".join(pieces) + COMMENT


@pytest.mark.parametrize("over", [-1, 0, 1, 2])
def test_the_end_of_an_archive_may_fall_between_two_writes(tmp_path, over) -> None:
    """The end has the size of the comment."""
    overhead = sum(map(len, archive([Member("large", 0, [])])))
    data = np.random.default_rng(0).bytes(PORTION - overhead + over)

    written(tmp_path, write_archive, archive([Member("large", len(data), [memoryview(data)])]))

    with zipfile.ZipFile(tmp_path / "file") as file:
        assert file.comment == COMMENT
        assert file.read("large") == data


@pytest.mark.parametrize("size", [6, 3 << 30])
def test_an_archive_has_its_members(size) -> None:
    """The header of a member of more than 2 GiB is longer."""
    pieces = [memoryview(b"abc"), memoryview(b""), memoryview(b"def")]

    data = b"".join(archive([Member("empty", 0, []), Member("in/folder", size, pieces)]))

    assert members_of(data) == {"empty": b"", "in/folder": b"abcdef"}


def test_a_skeleton_is_filled_with_other_values() -> None:
    """All bytes but the values are the same."""

    def fill(file: h5py.File, factor: int = 1) -> None:
        group = file.create_group("a/vars")
        group.attrs["name"] = "layer"
        group["0"] = np.arange(6.0).reshape(2, 3) * factor
        group["1"] = np.int8(3 * factor)
        group["empty"] = np.zeros((0, 3))
        file["b"] = np.arange(5) % 2 * factor == 0

    first, second = image(fill), image(lambda file: fill(file, 2))
    places = places_in(first)
    with h5py.File(io.BytesIO(first)) as file:
        skeleton = Skeleton(first, datasets_in(file))
    assert places.keys() == {"a/vars/0", "a/vars/1", "a/vars/empty", "b"}
    values = {name: memoryview(second)[place] for name, place in places.items()}

    filled = skeleton.filled(values.__getitem__)

    assert b"".join(filled) == second


def test_a_new_skeleton_makes_the_file_that_h5py_makes() -> None:
    """It has groups with names, arrays, scalars, empty arrays, and bfloat16 as Keras marks it."""
    values = {
        "a/vars/0": np.arange(6.0).reshape(2, 3),
        "a/vars/1": np.array(7),
        "a/vars/2": np.zeros((0, 3), "float32"),
        "b/vars/flag": np.array([True, False]),
        "b/vars/half": np.ones(3, ml_dtypes.bfloat16),
    }

    def fill(file: h5py.File) -> None:
        file.create_group("a/vars").attrs["name"] = "layer"
        for path, value in values.items():
            file[path] = value
        file["b/vars/half"].attrs["dtype"] = "bfloat16"

    skeleton = new_skeleton({"a/vars": "layer"}, {path: (each.dtype, each.shape) for path, each in values.items()})
    made = b"".join(skeleton.filled(lambda path: values[path].reshape(-1).view(np.uint8).data))

    assert hdf5(io.BytesIO(made)) == hdf5(io.BytesIO(image(fill)))
    assert len(made) == skeleton.size


def test_a_new_skeleton_takes_no_memory_for_the_values() -> None:
    """A process of this size could not hold the array."""
    skeleton = new_skeleton({}, {"x": (np.dtype("float32"), (1 << 38,))})

    before, after = list(skeleton.filled(lambda path: memoryview(b"")))[0::2]

    assert len(before) + len(after) < 1 << 20
    assert skeleton.size > 1 << 40


def _chunked(file: h5py.File) -> None:
    file.create_dataset("values", data=np.zeros(1000), chunks=(10,))


def _compressed(file: h5py.File) -> None:
    file.create_dataset("values", data=np.zeros(1000), compression="gzip")


def _texts(file: h5py.File) -> None:
    file["values"] = ["a", "bc"]


@pytest.mark.parametrize("fill", [_chunked, _compressed, _texts])
def test_places_of_values_that_are_not_plain_bytes_are_refused(fill) -> None:
    with pytest.raises(ValueError, match=r"the dataset values of .* is not plain bytes in one place"):
        places_in(image(fill))
