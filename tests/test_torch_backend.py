"""PyTorch's side of the seam: memory that changes in place, and types that NumPy lacks."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("the backend of this process is another", allow_module_level=True)

import ml_dtypes
import torch

import keras_ckpt as kc
from keras_ckpt.model.backends import backend


def test_a_value_that_was_read_is_the_memory_of_its_variable() -> None:
    """So a snapshot copies it before the next step."""
    variable = keras.Variable(np.zeros(3, np.float32))
    value = backend.Reader(None, {"x": variable}).read()["x"]

    variable.assign_add(np.ones(3))

    assert value.tolist() == [1, 1, 1]
    assert backend.COPIES_AT_ONCE


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8", "int32", "bool"])
def test_a_variable_of_any_type_is_read_and_assigned_bit_by_bit(dtype) -> None:
    variable = keras.Variable(np.zeros((2, 3)), dtype=dtype, trainable=False)
    value = np.array([[0, 1, 1], [1, 0, 1]]).astype(getattr(ml_dtypes, dtype, dtype))

    backend.assign(variable, value)
    found = backend.Reader(None, {"x": variable}).read()["x"]

    assert found.dtype == value.dtype
    assert found.tobytes() == value.tobytes()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_tensor_of_eight_bits_is_read_bit_by_bit(dtype) -> None:
    """Keras makes no variables of these types with values on PyTorch, so the tensor is a variable's."""
    bits = torch.arange(16, dtype=torch.uint8)
    variable = keras.Variable(bits.view(getattr(torch, dtype)), dtype=dtype)

    found = backend.Reader(None, {"x": variable}).read()["x"]

    assert found.dtype == getattr(ml_dtypes, dtype)
    assert found.tobytes() == bytes(range(16))


def test_a_transposed_parameter_is_read_in_the_order_of_its_elements() -> None:
    variable = keras.Variable(torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t()))

    found = backend.Reader(None, {"x": variable}).read()["x"]

    assert found.flags.c_contiguous
    assert found.tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA, where the reading was never tried")
def test_a_model_on_a_gpu_is_saved_and_restored(tmp_path) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("adam", "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0, callbacks=[kc.ModelCheckpoint(tmp_path / "runs")])
    saved = [keras.ops.convert_to_numpy(each) for each in model.variables]
    model.set_weights([np.zeros_like(each) for each in model.get_weights()])

    kc.restore(model, tmp_path / "runs")

    assert all(map(np.array_equal, saved, map(keras.ops.convert_to_numpy, model.variables)))
    assert model.variables[0].value.is_cuda
