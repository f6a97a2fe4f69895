"""Counters and seeds are int64 in a checkpoint, and come back in the type of each backend."""

import keras
import numpy as np
import pytest

from keras_ckpt.errors import MismatchError
from keras_ckpt.formats.arena import Arena
from keras_ckpt.formats.arrays import number_of
from keras_ckpt.model.backends import backend
from keras_ckpt.model.integers import Reader, converted
from keras_ckpt.model.snapshot import Snapshot

KEY = "model/dropout/seed_generator_state/.ATTRIBUTES/VARIABLE_VALUE"
OTHER = "model/own/table/.ATTRIBUTES/VARIABLE_VALUE"


def test_a_seed_is_saved_as_int64_and_another_integer_in_its_own_type() -> None:
    seed = keras.Variable([7, 2**30], dtype="int", trainable=False)  # another type on each backend
    table = keras.Variable([1, 2], dtype="int32", trainable=False)
    half = keras.Variable([0.5], dtype="float32")

    values = Snapshot(Reader(None, {KEY: seed, "x": half, OTHER: table}), {}).move(Arena())

    found = {
        key.decode(): np.frombuffer(value.data, "i8" if key == KEY.encode() else "i4") for key, value in values.items()
    }
    assert found[KEY].tolist() == [7, 2**30]
    assert found[OTHER].tolist() == [1, 2]
    assert values[KEY.encode()].dtype == 9
    assert np.frombuffer(values[b"x"].data, "f4").tolist() == [0.5]


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")  # JAX has int32 for int64
@pytest.mark.parametrize("dtype", ["int8", "uint16", "int32", "uint32", "int64"])
def test_an_integer_is_saved_in_the_type_that_it_was_made_with(dtype) -> None:
    """JAX and PyTorch have values of another type for some. The values beside them stay."""
    before, half = (keras.Variable(each, dtype="float32") for each in ([0.25], [0.5]))
    table = keras.Variable(np.ones(2, dtype), dtype=dtype, trainable=False)

    values = Snapshot(Reader(None, {"before": before, OTHER: table, "half": half}), {}).move(Arena())

    assert values[OTHER.encode()].dtype == number_of(np.dtype(dtype))
    assert values[OTHER.encode()].data.tobytes() == np.ones(2, dtype).tobytes()
    assert [values[key].data.tobytes() for key in (b"before", b"half")] == [
        np.float32(each).tobytes() for each in (0.25, 0.5)
    ]


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64"])
def test_a_counter_is_converted_by_value(dtype) -> None:
    found = backend.array_of(converted("iteration", backend.tensor_of(np.array(5, np.int64)), dtype))

    assert found.dtype == dtype
    assert found == 5


@pytest.mark.parametrize(("value", "dtype"), [(2**31, "int32"), (-1, "uint32"), (2**33, "uint32")])
def test_a_seed_that_the_type_cannot_hold_is_a_mismatch(value, dtype) -> None:
    with pytest.raises(MismatchError, match=rf"seed_generator_state is \[{value}, 0\].*which {dtype} cannot hold"):
        converted("seed_generator_state", backend.tensor_of(np.array([value, 0])), dtype)
