"""Private names of TensorFlow: each test names the function that a change in TensorFlow breaks."""

import gc

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_ckpt.formats.arrays import number_of
from keras_ckpt.model.backends import tensorflow as backend
from keras_ckpt.model.matching import Kind


def test_reader_reads_several_variables_in_one_operation() -> None:
    """The private names are `execute.execute`, `context.context` and the operation `_ReadVariablesOp`."""
    variables = {"numbers": tf.Variable([1.0, 2.0]), "text": tf.Variable("word"), "large": tf.Variable(tf.zeros(100))}

    values = backend.Reader(None, variables).read()

    assert values.keys() == variables.keys()
    assert all(np.array_equal(values[key].numpy(), variable.numpy()) for key, variable in variables.items())


def test_a_value_that_was_read_does_not_change_with_its_variable() -> None:
    variable = tf.Variable(np.zeros(1000, np.float32))
    value = backend.Reader(None, {"x": variable}).read()["x"]

    variable.assign_add(tf.ones(1000))

    assert not value.numpy().any()


def test_tracked_is_the_class_of_all_objects_that_tensorflow_tracks() -> None:
    """`Tracked` is the base class of `tf.Module` below `object`, which has no public name."""
    tracked = (keras.layers.Dense(2), tf.Module(), tf.train.Checkpoint(), tf.Variable(1.0))

    assert all(isinstance(each, backend.Tracked) for each in tracked)
    assert not any(isinstance(each, backend.Tracked) for each in ([1], object(), np.ones(1)))


@pytest.mark.parametrize("dtype", [tf.float32, tf.bfloat16, tf.bool, tf.dtypes.experimental.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_a_variable_takes_over_allocated_memory(dtype, shape) -> None:
    """`allocate` returns a tensor and its memory. A dtype without a buffer is copied."""
    value, memory = backend.allocate(dtype.as_datatype_enum, shape)
    memory[:] = bytes(len(memory))
    variable = tf.Variable(tf.cast(tf.ones(shape), dtype))

    backend.assign(variable, backend.tensor_of(value))
    del value
    gc.collect()

    assert not tf.cast(variable, tf.float32).numpy().any()


@pytest.mark.parametrize("initializer", ["zeros", "glorot_uniform", "orthogonal"])
def test_a_variable_above_the_limit_is_refused_before_it_takes_memory(initializer) -> None:
    """The variables of a scope count together, also variables of TensorFlow."""
    memory = backend.VariableLimit(1 << 20)
    with memory.scope():
        keras.layers.Dense(1000, kernel_initializer=initializer).build((None, 200))
        assert not memory.is_exceeded
        with pytest.raises(MemoryError, match="1048576"):
            keras.layers.Dense(10**12, kernel_initializer=initializer).build((None, 200))
        assert memory.is_exceeded
    keras.layers.Dense(2000, kernel_initializer="zeros").build((None, 200))


def test_kind_and_size_of_a_variable() -> None:
    assert backend.kind_of(tf.Variable([1, 2])) == Kind((2,), "int32")
    assert backend.kind_of(keras.Variable([1.0, 2.0])) == Kind((2,), "float32")
    ragged = tf.Variable([[1.0], [2.0]], shape=tf.TensorShape((None, 1)))
    assert backend.kind_of(ragged) == Kind((None, 1), "float32")
    assert backend.kind_of(tf.Variable(1.0, shape=tf.TensorShape(None))).shape is None
    assert (backend.size_of(ragged), backend.size_of(tf.Variable(1.0))) == (8, 4)


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float64, tf.int64, tf.complex64, tf.uint8, tf.string])
def test_numbers_of_dtypes_are_tensorflows(dtype) -> None:
    assert number_of(np.dtype(dtype.as_numpy_dtype)) == dtype.as_datatype_enum
