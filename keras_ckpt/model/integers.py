"""Counters and seeds: integers of one type in each directory checkpoint, whichever type a backend counts in.

TensorFlow counts in int64, JAX and PyTorch in int32, and JAX has seeds of uint32. A checkpoint has int64, so that plain
TensorFlow restores the checkpoints of every backend.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_ckpt.errors import MismatchError
from keras_ckpt.formats import arrays
from keras_ckpt.formats.arena import Packed
from keras_ckpt.formats.variables import SUFFIX
from keras_ckpt.model.backends import backend
from keras_ckpt.model.matching import COUNTERS

_COUNTED = re.compile(rf"(.*/)?(seed_generator_state|iteration|step_counter)(~\d+)?({re.escape(SUFFIX)})?")
_SAVED = "int64"


class Reader:
    """Reads variables as a checkpoint has them, again and again.

    Args:
        model: The model.
        variables: The variables by key.

    Attributes:
        small: The places of small variables when their values are packed, one after another.
    """

    def __init__(self, model: Any, variables: Mapping[str, Any]) -> None:
        self._reader = backend.Reader(model, variables)
        kinds = {key: backend.kind_of(each).dtype for key, each in variables.items() if _COUNTED.fullmatch(key)}
        self._others = [key for key, dtype in kinds.items() if dtype in COUNTERS and dtype != _SAVED]
        self.small: dict[str, Packed] = {}
        end = 0
        for key, packed in self._reader.small.items():
            self.small[key] = widened = (_widened(packed) if key in self._others else packed)._replace(begin=end)
            end += widened.size

    def read(self) -> dict[str, backend.Tensor]:
        """Reads the present values of the variables, as the reader of the backend does."""
        values = self._reader.read()
        for key in self._others:
            values[key] = backend.tensor_of(backend.array_of(values[key]).astype(_SAVED))
        return values


def _widened(packed: Packed) -> Packed:
    """The place of integers in the type of checkpoints."""
    dtype = np.dtype(_SAVED)
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
            f"{name} is {array.tolist()!s:.100} in the checkpoint, which {dtype} cannot hold. Keras counts in {dtype} "
            "on this backend. Nothing was restored. Restore on the backend that saved the checkpoint."
        )
    return backend.tensor_of(found)
