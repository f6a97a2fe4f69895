"""The reader of checkpoints: it reads the values that TensorFlow reads, and refuses changed bytes."""

from __future__ import annotations

import gc
import os
import pathlib
import threading

import numpy as np
import pytest
import tensorflow as tf

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats import targets
from keras_ckpt.formats.bundle_index import read_index
from keras_ckpt.formats.bundle_reader import read_values
from keras_ckpt.model.backends.tensorflow import allocate, tensor_of
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile
from keras_ckpt.store.streams import PORTION
from support.bundles import NUMBERS, content, native, write, write_pages

RNG = np.random.default_rng(0)
SIZES = (0, 1, 100, 1 << 20, PORTION - 1, PORTION, 2 * PORTION + 3, 17)


@pytest.fixture
def tensors() -> dict[str, tf.Tensor]:
    """Values of many sizes, and strings."""
    found = {f"{number}": tf.constant(RNG.integers(0, 256, size, np.uint8)) for number, size in enumerate(SIZES)}
    return {"first": tf.constant(["some", "words"]), **found, "scalar": tf.constant(2.5, tf.bfloat16)}


def read(path: pathlib.Path, names: list[str], digested: list[str] = (), name: str = "ckpt-1") -> dict[str, tf.Tensor]:
    """Reads values, and compares the current digests of some files."""
    with Folder(path) as folder:
        files = [CheckpointFile(file, *folder.digest(file)) for file in digested]
        found = read_values(folder, read_index(folder, name), [each.encode() for each in names], allocate, files)
    return {key.decode(): tensor_of(value) for key, value in found.items()}


def same(found: dict[str, tf.Tensor], expected: dict[str, tf.Tensor]) -> bool:
    kinds = {name: (tensor.dtype, tensor.shape, content(tensor)) for name, tensor in found.items()}
    return kinds == {name: (tensor.dtype, tensor.shape, content(tensor)) for name, tensor in expected.items()}


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0, 3), (3, 4, 5)], ids=str)
def test_numbers_that_tensorflow_writes_are_read_to_the_bit(tmp_path, dtype, shape) -> None:
    """For every type and several shapes."""
    raw = RNG.integers(0, 2 if dtype == tf.bool else 8, int(np.prod(shape)), np.uint8)
    between = tf.int8 if dtype.name.endswith("int4") else tf.float32
    tensors = {"x": tf.cast(tf.cast(tf.reshape(tf.constant(raw), shape), between), dtype)}
    native(tmp_path, tensors)

    assert same(read(tmp_path, ["x"], name="native-1"), tensors)


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 0), (2, 2)], ids=str)
def test_strings_that_tensorflow_writes_are_read_unchanged(tmp_path, shape) -> None:
    """Empty and long strings, and bytes that are not UTF-8."""
    words = np.array([b"", b"x" * 70_000, b"\0\xff\0", "ü".encode()][: int(np.prod(shape))], object)
    tensors = {"x": tf.constant(words.reshape(shape))} if words.size else {"x": tf.zeros(shape, tf.string)}
    native(tmp_path, tensors)

    assert same(read(tmp_path, ["x"], name="native-1"), tensors)


def test_strings_in_parts_are_read_whole(tmp_path) -> None:
    whole = np.array([[b"a", b"bb"], [b"", b"dddd"]], object)
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "ckpt-1"),
        tensor_names=["x", "x"],
        shape_and_slices=["2 2 -:0,1", "2 2 -:1,1"],
        tensors=np.split(whole, 2, 1),
    )

    assert same(read(tmp_path, ["x"]), {"x": tf.constant(whole)})


@pytest.mark.parametrize("place", [0, 2, 8, -1])
def test_a_changed_string_is_refused(tmp_path, place) -> None:
    """A changed length, checksum of the lengths, or byte of a string."""
    data, _ = write(tmp_path, {"x": tf.constant(["some", "words"])})
    with Folder(tmp_path) as folder:
        index = read_index(folder, "ckpt-1")
    whole = bytearray((tmp_path / data).read_bytes())
    whole[place] ^= 1
    (tmp_path / data).write_bytes(whole)

    with Folder(tmp_path) as folder, pytest.raises(DamagedCheckpointError, match="checksum of its strings"):
        read_values(folder, index, [b"x"], allocate)


@pytest.mark.parametrize("writes", [write, write_pages])
@pytest.mark.parametrize("checked", ["by digests", "by checksums"])
def test_values_of_all_sizes_are_read_in_any_order(tmp_path, tensors, writes, checked) -> None:
    """All values, and a part of them."""
    data, _ = writes(tmp_path, tensors)
    digested = [data] if checked == "by digests" else []

    assert same(read(tmp_path, list(tensors), digested), tensors)
    assert same(read(tmp_path, list(reversed(tensors)), digested), tensors)
    assert same(read(tmp_path, ["3", "first"], digested), {name: tensors[name] for name in ("3", "first")})
    assert read(tmp_path, [], digested) == {}


def test_many_small_values_are_read(tmp_path) -> None:
    """More than the kernel reads in one call."""
    tensors = {f"{number}": tf.constant(number) for number in range(3000)}
    data, _ = write(tmp_path, tensors)

    for digested in ([data], []):
        assert same(read(tmp_path, list(tensors), digested), tensors)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rest", ["-", "0,6"])
def test_values_in_parts_are_read_whole(tmp_path, axis, rest) -> None:
    """Parts along either axis, as version 0.1.0 wrote them too."""
    whole = RNG.random((6, 6), np.float32)
    places = ["0,2", "2,4"]
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "ckpt-1"),
        tensor_names=["x", "x"],
        shape_and_slices=[f"6 6 {place}:{rest}" if axis == 0 else f"6 6 {rest}:{place}" for place in places],
        tensors=np.split(whole, [2], axis),
    )

    assert same(read(tmp_path, ["x"]), {"x": tf.constant(whole)})


def test_parts_that_overlap_are_refused(tmp_path) -> None:
    """They have as many elements as the value, so some rows are missing."""
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "ckpt-1"),
        tensor_names=["x", "x"],
        shape_and_slices=["4 2 0,2:-", "4 2 1,2:-"],
        tensors=[tf.ones((2, 2)), tf.ones((2, 2))],
    )

    with pytest.raises(DamagedCheckpointError, match="parts that overlap"):
        read(tmp_path, ["x"])


def test_a_read_tensor_does_not_share_its_memory(tmp_path) -> None:
    """A variable that gets the tensor can be changed in place."""
    write(tmp_path, {"x": tf.ones(1000)})
    first, second = (read(tmp_path, ["x"])["x"] for _ in range(2))
    variable, other = tf.Variable(tf.zeros(1000)), tf.Variable(tf.zeros(1000))
    for each, tensor in ((variable, first), (other, second)):
        tf.raw_ops.AssignVariableOp(resource=each.handle, value=tensor)

    variable.assign_add(tf.ones(1000))

    assert set(variable.numpy()) == {2}
    assert set(first.numpy()) == set(second.numpy()) == set(other.numpy()) == {1}


class TestDamage:
    """The reader finds each change of the data before it returns a value."""

    @pytest.mark.parametrize("place", range(0, sum(SIZES), PORTION // 3))
    @pytest.mark.parametrize("checked", ["by digests", "by checksums"])
    def test_a_changed_bit_is_an_error(self, tmp_path, tensors, place, checked) -> None:
        """At many offsets."""
        del tensors["first"]
        data, _ = write(tmp_path, tensors)
        with Folder(tmp_path) as folder:
            index = read_index(folder, "ckpt-1")
            digested = [CheckpointFile(data, *folder.digest(data))] if checked == "by digests" else []
        with open(tmp_path / data, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0] ^ 16
            file.seek(place)
            file.write(bytes([byte]))

        with Folder(tmp_path) as folder, pytest.raises(DamagedCheckpointError, match="was changed after it was"):
            read_values(folder, index, [name.encode() for name in tensors], allocate, digested)

    def test_a_changed_bit_between_the_values_is_an_error_with_digests(self, tmp_path) -> None:
        """The digest covers all bytes, also bytes that no value uses."""
        data, _ = write_pages(tmp_path, {"a": tf.zeros(PORTION + 5, tf.uint8), "b": tf.zeros(PORTION, tf.uint8)})
        with Folder(tmp_path) as folder:
            index, file = read_index(folder, "ckpt-1"), CheckpointFile(data, *folder.digest(data))
        whole = bytearray((tmp_path / data).read_bytes())
        whole[PORTION + 100] = 1
        (tmp_path / data).write_bytes(whole)

        assert read(tmp_path, ["a", "b"])
        with Folder(tmp_path) as folder, pytest.raises(DamagedCheckpointError, match="its digest does not match"):
            read_values(folder, index, [b"a"], allocate, [file])

    @pytest.mark.parametrize("checked", ["by digests", "by checksums"])
    def test_a_file_that_was_truncated_after_its_index_was_read_is_an_error(self, tmp_path, tensors, checked) -> None:
        """No thread and no file descriptor leaks."""
        data, _ = write(tmp_path, tensors)
        with Folder(tmp_path) as folder:
            index = read_index(folder, "ckpt-1")
            digested = [CheckpointFile(data, *folder.digest(data))] if checked == "by digests" else []
        os.truncate(tmp_path / data, PORTION)
        gc.collect()  # close the files of other tests before the count
        opened, threads = len(os.listdir("/proc/self/fd")), threading.active_count()

        with (
            Folder(tmp_path) as folder,
            pytest.raises((DamagedCheckpointError, OSError), match=r"has [0-9]+ bytes, .*|the file ends at [0-9]+"),
        ):
            read_values(folder, index, [name.encode() for name in tensors], allocate, digested)

        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (opened, threads)


def test_short_reads_are_continued(tmp_path, monkeypatch, tensors) -> None:
    """A signal may cut a read short."""
    data, _ = write(tmp_path, tensors)

    class Cuts:
        def __getattr__(self, name: str):
            return getattr(os, name)

        def preadv(self, descriptor: int, memory: list[memoryview], offset: int) -> int:
            return os.preadv(descriptor, [memory[0][: max(1, len(memory[0]) * 2 // 3)]], offset)

    monkeypatch.setattr("keras_ckpt.store.streams.os", Cuts())

    for digested in ([data], []):
        assert same(read(tmp_path, list(tensors), digested), tensors)


def test_threads_get_groups_of_about_equal_bytes(monkeypatch) -> None:
    """One thread reads a small checkpoint."""
    monkeypatch.setattr(targets, "_THREADS", 3)

    def groups(*sizes: int) -> list[int]:
        wanted = [targets.Target(b"", "file", 0, memoryview(bytes(size)), 0) for size in sizes]
        return sorted(sum(len(each.memory) for each in group) for group in targets._of_equal_size(wanted))

    assert groups(10, 20, 30) == [60]
    assert groups(9 << 20) == [9 << 20]
    assert groups(9 << 20, 5 << 20, 4 << 20, 2 << 20) == [5 << 20, 6 << 20, 9 << 20]
