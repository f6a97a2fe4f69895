"""NumPy arrays of the types that a checkpoint can hold."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

from keras_ckpt.formats.dtypes import ITEM_SIZES, NAMES, STRING, VARIANT


def empty(dtype: int, shape: tuple[int, ...]) -> tuple[np.ndarray, memoryview]:
    """Allocates an array of numbers.

    Args:
        dtype: The number of the type.
        shape: The shape.

    Returns:
        The array, and its memory to fill.
    """
    array = np.empty(shape, dtype_of(dtype))
    return array, array.reshape(-1).view(np.uint8).data


def number_of(dtype: np.dtype) -> int:
    """The number of a NumPy type in TensorFlow's `DataType`.

    Raises:
        TypeError: A checkpoint cannot hold the type.
    """
    number = STRING if dtype.kind in "OS" else _NUMBERS.get(dtype.newbyteorder("="))
    if number is None:
        raise TypeError(f"a checkpoint cannot hold arrays of {dtype}")
    return number


def is_number(dtype: np.dtype) -> bool:
    """Whether a checkpoint can hold numbers of a NumPy type."""
    return dtype.newbyteorder("=") in _NUMBERS


def is_floating(dtype: np.dtype) -> bool:
    """Whether a NumPy type has fractions. `ml_dtypes` gives most of its types no kind."""
    return dtype.kind in "fc" or "float" in dtype.name


@functools.cache
def dtype_of(number: int) -> np.dtype:
    """The NumPy type of a number in TensorFlow's `DataType`. A quantized integer becomes a plain integer."""
    if number in (STRING, VARIANT):
        return np.dtype(object)
    return named(NAMES[number].removeprefix("q").replace("quint", "uint"))


def named(name: str) -> np.dtype:
    """The NumPy type with a name, such as `bfloat16`."""
    return np.dtype(getattr(ml_dtypes, name, name))


_NUMBERS = {dtype_of(number): number for number, name in NAMES.items() if number in ITEM_SIZES and name[0] != "q"}
