"""Tensors of every type, written by this package and by TensorFlow."""

from __future__ import annotations

import pathlib

import numpy as np
import tensorflow as tf

from keras_ckpt.formats.arena import Arena
from keras_ckpt.formats.bundle_index import read_index
from keras_ckpt.formats.bundle_writer import array_value, write_bundle
from keras_ckpt.model.backends.tensorflow import Reader, array_of
from keras_ckpt.model.snapshot import Snapshot
from keras_ckpt.store.files import Folder

NUMBERS = [
    tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64, tf.complex128, tf.bool,
    tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64,
    tf.dtypes.experimental.float8_e4m3fn, tf.dtypes.experimental.float8_e5m2, tf.dtypes.experimental.int4,
    tf.dtypes.experimental.uint4,
]  # fmt: skip


def write(path: pathlib.Path, tensors: dict[str, tf.Tensor], name: str = "ckpt-1") -> list[str]:
    """Writes a checkpoint, and gives the names of its files."""
    encoded = {key.encode(): array_of(tensors[key]) for key in sorted(tensors)}
    with Folder(path) as folder:
        written, _ = write_bundle(folder, name, [{key: array_value(each) for key, each in encoded.items()}])
        assert all(folder.digest(file.name) == (file.size, file.digest) for file in written)
        assert read_index(folder, name).variables == tensors.keys()
    return [file.name for file in written]


def write_pages(path: pathlib.Path, tensors: dict[str, tf.Tensor], name: str = "ckpt-1") -> list[str]:
    """The same, from memory that can be written as it is."""
    arrays = {key: array_of(tensor) for key, tensor in tensors.items()}
    with Folder(path) as folder:
        written, _ = write_bundle(folder, name, [Snapshot(Reader(None, {}), arrays).move(Arena())])
        assert all(folder.digest(file.name) == (file.size, file.digest) for file in written)
        assert read_index(folder, name).variables == tensors.keys()
    return [file.name for file in written]


def content(tensor: tf.Tensor) -> bytes:
    """All bits of a tensor."""
    array = np.asarray(tf.reshape(tensor, [-1]))
    return repr(array.tolist()).encode() if tensor.dtype == tf.string else array.tobytes()


def native(path: pathlib.Path, tensors: dict[str, tf.Tensor]) -> None:
    """The reference."""
    tf.raw_ops.SaveV2(
        prefix=str(path / "native-1"),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=list(tensors.values()),
    )
