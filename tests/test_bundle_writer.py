"""The writer of checkpoints: TensorFlow reads its files like its own."""

import concurrent.futures
import errno
import gc
import mmap
import os
import pathlib
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

from keras_ckpt.formats import bundle_writer
from keras_ckpt.formats.bundle_index import read_index
from keras_ckpt.formats.bundle_writer import array_value, write_bundle
from keras_ckpt.store import streams
from keras_ckpt.store.files import Folder
from keras_ckpt.store.streams import PORTION
from support.bundles import NUMBERS, content, native, write, write_pages


def read_together(path: pathlib.Path, tensors: dict[str, tf.Tensor], name: str = "ckpt-1") -> list[tf.Tensor]:
    """Reads values with TensorFlow in one operation, as a restore does."""
    return tf.raw_ops.RestoreV2(
        prefix=str(path / name),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        dtypes=[tensor.dtype for tensor in tensors.values()],
    )


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0, 3), (3, 4, 5)], ids=str)
def test_numbers_and_their_data_file_are_as_tensorflow_writes_them(tmp_path, dtype, shape) -> None:
    """To the bit, for every type and several shapes."""
    size = int(np.prod(shape))
    raw = np.random.default_rng(1).integers(0, 2 if dtype == tf.bool else 8, size, np.uint8)
    # Not every type can be cast to every other type.
    between = tf.int8 if dtype.name.endswith("int4") else tf.float32
    tensors = {"x": tf.cast(tf.cast(tf.reshape(tf.constant(raw), shape), between), dtype)}

    write(tmp_path, tensors)
    native(tmp_path, tensors)

    (read,) = read_together(tmp_path, tensors)
    assert (read.dtype, read.shape, content(read)) == (dtype, shape, content(tensors["x"]))
    assert (tmp_path / "ckpt-1.data-00000-of-00001").read_bytes() == (
        tmp_path / "native-1.data-00000-of-00001"
    ).read_bytes()


@pytest.mark.parametrize(
    "text",
    [b"", b"a", b"\0\xff", b"x" * 127, b"x" * 128, b"y" * 100_000, [], [b"", b"a"], [[b"1", b"22"], [b"", b"4" * 300]]],
    ids=lambda text: f"{np.shape(text)} {len(text)}",
)
def test_strings_and_their_data_file_are_as_tensorflow_writes_them(tmp_path, text) -> None:
    """Scalars and arrays, to the bit."""
    tensors = {"text": tf.constant(text, tf.string)}

    write(tmp_path, tensors)
    native(tmp_path, tensors)

    assert content(read_together(tmp_path, tensors)[0]) == content(tensors["text"])
    assert (tmp_path / "ckpt-1.data-00000-of-00001").read_bytes() == (
        tmp_path / "native-1.data-00000-of-00001"
    ).read_bytes()


def test_negative_zeros_and_nans_keep_their_bits(tmp_path) -> None:
    """Also the bits of an unusual NaN."""
    bits = np.array([0x80000000, 0x7FC00001, 0xFFC12345, 0x7F800000, 1], np.uint32)
    tensors = {"x": tf.constant(bits.view(np.float32))}

    write(tmp_path, tensors)

    assert content(read_together(tmp_path, tensors)[0]) == bits.tobytes()


def test_ten_thousand_variables_are_read(tmp_path) -> None:
    """The index then has many blocks."""
    tensors = {f"layer_{number}/weight/.ATTRIBUTES/VARIABLE_VALUE": tf.constant(number) for number in range(10_000)}

    write(tmp_path, tensors)

    assert [int(each) for each in read_together(tmp_path, tensors)] == list(range(10_000))
    assert len(tf.train.list_variables(str(tmp_path / "ckpt-1"))) == 10_000


@pytest.mark.parametrize("names", ["ä/ö", "x" * 4000, " ", "a\nb"])
def test_names_in_utf8_long_names_and_names_with_spaces_are_read(tmp_path, names) -> None:
    """Another name sorts before them."""
    tensors = {names: tf.constant(1.0), "A": tf.constant(2.0)}

    write(tmp_path, tensors)

    assert [float(each) for each in read_together(tmp_path, tensors)] == [1.0, 2.0]


def test_a_name_longer_than_the_reader_accepts_is_refused(tmp_path) -> None:
    """Otherwise the checkpoint could not be restored."""
    longest, longer = "a" * 4096, "a" * 4097
    write(tmp_path, {longest: tf.constant(1.0)})

    with Folder(tmp_path) as folder, pytest.raises(ValueError, match="has 4097 bytes, the limit is 4096"):
        write_bundle(folder, "ckpt-2", [{longer.encode(): array_value(np.ones(1))}])


@pytest.mark.parametrize("writes", [write, write_pages])
@pytest.mark.parametrize("size", [PORTION - 1, PORTION, PORTION + 1, 2 * PORTION, 3 * PORTION + 4095, 5 * PORTION + 7])
def test_values_around_multiples_of_a_portion_are_written_whole(tmp_path, writes, size) -> None:
    """Past the page cache and through it."""
    raw = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    tensors = {"a": tf.constant("text"), "x": tf.constant(raw), "y": tf.constant(1.5)}

    data, _ = writes(tmp_path, tensors)

    assert [content(each) for each in read_together(tmp_path, tensors)] == [content(each) for each in tensors.values()]
    assert raw.tobytes() in (tmp_path / data).read_bytes()


@pytest.mark.parametrize("sizes", [[PORTION, 5, PORTION // 2, 7, PORTION], [100, PORTION, 100], [PORTION // 3] * 10])
def test_large_values_start_at_pages_and_small_values_waste_no_space(tmp_path, sizes) -> None:
    """So each large value can be written past the page cache."""
    rng = np.random.default_rng(1)
    tensors = {f"{number}": tf.constant(rng.integers(0, 256, size, np.uint8)) for number, size in enumerate(sizes)}

    data, _ = write_pages(tmp_path, tensors)

    assert [content(each) for each in read_together(tmp_path, tensors)] == [content(each) for each in tensors.values()]
    with Folder(tmp_path) as folder:
        entries = read_index(folder, "ckpt-1").entries.values()
    assert all(entry.offset % mmap.PAGESIZE == 0 for entry in entries if entry.size > PORTION // 4)
    assert (tmp_path / data).stat().st_size < sum(sizes) + mmap.PAGESIZE * len(sizes)


class Refuses:
    """The `os` of the writing module: some calls of `write` fail, others write a part."""

    def __init__(self, number: int, calls: set[int]) -> None:
        self.number = number
        self.calls = calls
        self.done = 0

    def __getattr__(self, name: str):
        return getattr(os, name)

    def write(self, descriptor: int, data: memoryview) -> int:
        self.done += 1
        if self.done in self.calls:
            raise OSError(self.number, os.strerror(self.number))
        return os.write(descriptor, data[: len(data) // 2] if self.done == 2 else data)


@pytest.mark.parametrize("calls", [{1}, {3}])
def test_without_direct_io_the_file_is_written_through_the_page_cache(tmp_path, monkeypatch, calls) -> None:
    """The file system refuses the first write, or a write after a partial write."""
    raw = np.random.default_rng(1).integers(0, 256, 3 * PORTION + 5, np.uint8)
    monkeypatch.setattr(streams, "os", Refuses(errno.EINVAL, calls))

    data, _ = write_pages(tmp_path, {"x": tf.constant(raw)})

    assert (tmp_path / data).read_bytes().startswith(raw.tobytes())


@pytest.mark.parametrize("call", range(1, 6))
def test_an_error_of_the_disk_is_raised_by_the_write(tmp_path, monkeypatch, call) -> None:
    """Whichever part fails. No thread and no file descriptor leaks."""
    monkeypatch.setattr(streams, "os", Refuses(errno.ENOSPC, {call}))
    gc.collect()  # close the files of other tests before the count
    opened, threads = len(os.listdir("/proc/self/fd")), threading.active_count()

    with pytest.raises(OSError, match="No space left"):
        write_pages(tmp_path, {"x": tf.zeros(3 * PORTION + 5, tf.uint8)})

    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == (opened, threads)


def test_tensorflow_finds_a_changed_bit(tmp_path) -> None:
    """The checksums are the checksums that TensorFlow compares."""
    tensors = {"x": tf.range(1000)}
    data, index = write(tmp_path, tensors)
    for name in (data, index):
        whole = bytearray((tmp_path / name).read_bytes())
        whole[len(whole) // 3] ^= 4
        (tmp_path / name).write_bytes(whole)

        with pytest.raises((tf.errors.DataLossError, tf.errors.NotFoundError)):
            read_together(tmp_path, tensors)

        whole[len(whole) // 3] ^= 4
        (tmp_path / name).write_bytes(whole)
    assert content(read_together(tmp_path, tensors)[0]) == content(tensors["x"])


def test_the_computation_of_a_checksum_releases_the_gil() -> None:
    """Training continues while a save computes checksums."""
    gate, ran = threading.Lock(), threading.Event()
    gate.acquire()
    data = np.zeros(64 << 20, np.uint8)
    before = sys.getswitchinterval()
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        threads.submit(lambda: (gate.acquire(), ran.set()))
        sys.setswitchinterval(1000)  # a thread runs only if another releases the GIL
        try:
            gate.release()
            assert any(bundle_writer.checksum_of(data) and ran.is_set() for _ in range(100))
        finally:
            sys.setswitchinterval(before)
