"""Plain values are encoded as JSON and arrays, and decode to equal values."""

import collections
import math
import random

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_ckpt.resume.plain_values import UnplainError, decode, dumped, structure_of

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.tuples(st.integers())
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner)
        | st.lists(inner).map(lambda items: collections.deque(items, 5))
    ),
    max_leaves=20,
)


def encode(value):
    """The text and the arrays of a value."""
    return dumped(structure_of(value, lambda each: each if isinstance(each, np.ndarray) else None))


def round_trip(value):
    text, arrays = encode(value)
    return decode(text, dict(enumerate(arrays)))


@given(values)
def test_plain_values_decode_to_equal_values(value) -> None:
    """Types, the order of items, and NaN are kept."""
    assert repr(round_trip(value)) == repr(value)


def test_a_set_decodes_to_an_equal_set() -> None:
    """The order of the items may differ."""
    assert round_trip({3, 19, "a"}) == {3, 19, "a"}


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "uint32", "bool", "complex64", ml_dtypes.bfloat16])
def test_arrays_decode_to_the_same_bits(kind) -> None:
    """An array has any type that a variable may have. The decoded array can be changed."""
    array = np.arange(6).reshape(2, 3).astype(kind)

    (back,) = round_trip([array])

    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())
    back[0] = 1


def test_scalars_of_numpy_keep_their_type() -> None:
    """A best value of type float32 is compared as float32 after a restart."""
    back = round_trip({"best": np.float32(0.1), "none": np.float64(math.nan)})

    assert type(back["best"]) is np.float32
    assert back["best"] == np.float32(0.1)
    assert math.isnan(back["none"])


@pytest.mark.parametrize("kind", ["float32", "float16", "int8", "uint64", "bool", "complex64", ml_dtypes.bfloat16])
def test_scalars_of_numpy_have_no_arrays(kind) -> None:
    """A list of many scalars costs no entry in the file for each scalar."""
    value = np.asarray(3).astype(kind)[()]
    text, arrays = encode([value])

    (back,) = decode(text, {})

    assert arrays == []
    assert type(back) is type(value)
    assert back.tobytes() == value.tobytes()


def test_scalars_of_older_checkpoints_are_read() -> None:
    """Older versions saved a scalar as an array."""
    assert decode('{"scalar": 0, "more": []}', {0: np.asarray(2.5)}) == 2.5


@pytest.mark.parametrize("factory", [None, int, float, list, dict, set, str, bool])
def test_a_default_dict_keeps_its_factory(factory) -> None:
    """A missing key is no error after a restart."""
    (back,) = round_trip([collections.defaultdict(factory, {"a": 1})])

    assert back == {"a": 1}
    assert back.default_factory is factory


def test_a_default_dict_inside_a_value_with_an_unknown_factory_is_refused() -> None:
    """A plain dict instead of it would raise an error for a missing key. The error names the place."""
    with pytest.raises(UnplainError, match=r"\[1\] is a defaultdict of <function .*not one of None, int, float"):
        encode([0, collections.defaultdict(lambda: 3)])


def test_a_list_that_contains_itself_is_refused() -> None:
    """Its JSON text would be endless."""
    value = []
    value.append(value)

    with pytest.raises(UnplainError, match="contains itself"):
        encode(value)


def test_a_file_cannot_choose_the_code_that_runs() -> None:
    """A name in the file is the name of a bit generator, or it is refused."""
    text, arrays = encode(np.random.default_rng(1))

    with pytest.raises(TypeError, match="is not a bit generator"):
        decode(text.replace('"PCG64"', '"seed"'), dict(enumerate(arrays)))


@pytest.mark.parametrize("make", [np.random.default_rng, np.random.RandomState, random.Random])
def test_a_generator_of_random_numbers_keeps_its_state(make) -> None:
    """The decoded generator draws the same numbers as the original."""
    generator = make(1)
    generator.random()
    back = round_trip(generator)

    assert [back.random() for _ in range(3)] == [generator.random() for _ in range(3)]


class Sub(dict):
    """A subclass of dict, which may hold more than a dict."""


@pytest.mark.parametrize("value", [object(), print, Sub(), np.array(["a"]), np.array([object()]), b"bytes"])
def test_a_value_that_is_not_plain_is_refused(value) -> None:
    """The error names its place and its type."""
    with pytest.raises(UnplainError, match=r"\[1\] is of type"):
        encode([0, value])
