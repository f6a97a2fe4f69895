"""Integers of one type in each directory checkpoint, whichever type a backend has for their values.

Plain TensorFlow restores the checkpoints of every backend. TensorFlow counts in int64, JAX and PyTorch in int32, and
JAX has seeds of uint32: a checkpoint has int64. Another variable is saved in the type that it was made with. Its values
may have another one: JAX has int32 for int64, and PyTorch has int64 for uint32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_ckpt.errors import MismatchError
from keras_ckpt.formats import arrays
from keras_ckpt.formats.arena import Packed
from keras_ckpt.formats.variables import SUFFIX
from keras_ckpt.model.backends import backend
from keras_ckpt.model.matching import COUNTERS

_COUNTED = re.compile(rf"(.*/)?(seed_generator_state|iteration|step_counter|count)(~\d+)?({re.escape(SUFFIX)})?")
_TYPES = keras.backend.standardize_dtype("int"), "uint32"
"""The types of counters and of seeds on this backend."""


class Reader:
    """Reads variables as a checkpoint has them, again and again.

    Args:
        model: The model.
        variables: The variables by key.

    Attributes:
        small: The places of small variables when their values are packed, one after another.
        transfers: Whether the values that are read are copies on the way from an accelerator.
    """

    def __init__(self, model: Any, variables: Mapping[str, Any]) -> None:
        self._reader = backend.Reader(model, variables)
        self.transfers = self._reader.transfers
        self._others = {}
        for key, variable in variables.items():
            dtype = backend.kind_of(variable).dtype
            if dtype in COUNTERS and (saved := _saved(key, dtype, variable)) != dtype:
                self._others[key] = np.dtype(saved)
        self.small: dict[str, Packed] = {}
        end = 0
        for key, packed in self._reader.small.items():
            place = _of_type(self._others[key], packed) if key in self._others else packed
            self.small[key] = place._replace(begin=end)
            end += place.size

    def read(self) -> dict[str, backend.Tensor]:
        """Reads the present values of the variables, as the reader of the backend does."""
        values = self._reader.read()
        for key, dtype in self._others.items():
            later = _Converted(values[key], dtype)
            values[key] = later if self.transfers else backend.tensor_of(np.asarray(later))
        return values


class _Converted:
    """A value in another type. NumPy asks for the array, once the value has arrived from an accelerator."""

    def __init__(self, value: backend.Tensor, dtype: np.dtype) -> None:
        self._value, self._dtype = value, dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return backend.array_of(self._value).astype(self._dtype)


def _saved(key: str, dtype: str, variable: Any) -> str:
    """The type of an integer in a checkpoint."""
    counted = dtype in _TYPES and _COUNTED.fullmatch(key)
    return "int64" if counted else keras.backend.standardize_dtype(variable.dtype)


def _of_type(dtype: np.dtype, packed: Packed) -> Packed:
    """The place of integers of another type."""
    return packed._replace(dtype=arrays.number_of(dtype), size=math.prod(packed.shape) * dtype.itemsize)


def converted(name: str, value: backend.Tensor, dtype: str) -> backend.Tensor:
    """An integer as a variable of another type holds it.

    Args:
        name: The name of the variable.
        value: The value in the checkpoint.
        dtype: The type of the variable.

    Raises:
        MismatchError: The value is too large for the type.
    """
    array = backend.array_of(value)
    found = array.astype(dtype)
    if not np.array_equal(found, array):
        raise MismatchError(
            f"{name} is {array.tolist()!s:.100} in the checkpoint, which {dtype} cannot hold. Its values are {dtype} "
            "on this backend. Nothing was restored. Restore on the backend that saved the checkpoint."
        )
    return backend.tensor_of(found)
