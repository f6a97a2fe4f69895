"""The parts that the backends without tensors in files share: their values are NumPy arrays.

The module of such a backend takes these names over, and adds the reading and the assignment of variables.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import keras
import numpy as np

from keras_ckpt.formats import arrays
from keras_ckpt.formats.arena import Packed
from keras_ckpt.model import keras_internals
from keras_ckpt.model.matching import Kind

Tensor: TypeAlias = np.ndarray
OutOfMemory = MemoryError
Tracked = (keras.Layer, keras.Variable, keras.optimizers.Optimizer)
"""The classes of all that an object graph can have, but for lists and dicts."""
_ALIGNMENT = 64
_SMALL, _MOST_PACKED = 1 << 16, 16 << 20
"""Values of fewer bytes are packed, up to so many bytes in all."""
OF_THE_PROCESS: tuple[type, ...] = ()
"""The classes of objects that belong to a process."""


class Absent:
    """A kind of object that the backend does not have: no object is an instance."""


Variable = Table = Module = Absent


def bytes_of(kind: Kind) -> int:
    """The bytes of a value."""
    return math.prod(_shape(kind)) * arrays.named(kind.dtype).itemsize


def _shape(kind: Kind) -> tuple[int, ...]:
    shape: Any = kind.shape  # the variables of these backends have no unknown sizes
    return shape  # type: ignore[no-any-return]


def small(kinds: Mapping[str, Kind]) -> Mapping[str, Packed]:
    """The small values that are packed, and their places."""
    found, end = {}, 0
    for key, kind in kinds.items():
        size = bytes_of(kind)
        if size < _SMALL and end + size <= _MOST_PACKED:
            found[key] = Packed(key.encode(), arrays.number_of(arrays.named(kind.dtype)), _shape(kind), end, size)
            end += size
    return found


def array_of(value: Any) -> np.ndarray:
    """A value as an array, without a copy where it has none in other memory."""
    return np.asarray(value)


def tensor_of(value: Any) -> np.ndarray:
    """An array of a value."""
    return np.asarray(value)


def allocate(dtype: int, shape: tuple[int, ...]) -> tuple[Any, memoryview]:
    """Allocates an array to be filled, at an address at which a backend can take its memory over.

    Args:
        dtype: The number of its type.
        shape: Its shape.

    Returns:
        The array, and its memory.
    """
    kind = arrays.dtype_of(dtype)
    size = math.prod(shape) * kind.itemsize
    block = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -block.ctypes.data % _ALIGNMENT
    memory = block[begin : begin + size]
    return memory.view(kind).reshape(shape), memory.data


def storage_of(variable: Any) -> Any:
    """The object that holds the values of a variable for its whole life."""
    return variable


def scope(model: Any) -> contextlib.AbstractContextManager[Any]:
    """The scope in which the variables of a model are made: there is none."""
    return contextlib.nullcontext()


class VariableLimit:
    """A limit of the memory of new variables. A variable above it is refused before it takes memory.

    Args:
        limit: The most bytes of all variables.

    Attributes:
        is_exceeded: Whether a variable was refused.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.is_exceeded = False
        self._size = 0

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """A scope in which the limit holds."""

        def check(shape: tuple[int, ...], dtype: str) -> None:
            self._size += math.prod(shape) * arrays.named(dtype).itemsize
            if self._size > self.limit:
                self.is_exceeded = True
                raise MemoryError(f"the variables have more than {self.limit} bytes")

        with keras_internals.new_variables_checked(check):
            yield


def is_floating(value: np.ndarray) -> bool:
    """Whether the elements of an array are fractions."""
    return arrays.is_floating(value.dtype)


def is_finite(value: Any) -> bool:
    """Whether there is neither NaN nor infinity in an array."""
    value = np.asarray(value)
    if not is_floating(value):
        return True
    if value.dtype.kind != "f":
        value = value.astype(np.float32)
    return bool(np.isfinite(value).all())


def merged(kernel: np.ndarray, first: np.ndarray, second: np.ndarray, scale: float) -> np.ndarray:
    """A kernel with a low-rank update of it, the product of two factors."""
    update = np.matmul(first.astype(np.float32), second.astype(np.float32)) * scale
    found: np.ndarray = (kernel + update.astype(kernel.dtype)).astype(kernel.dtype)
    return found


def zeros(kind: Kind) -> np.ndarray:
    """Zeros of a shape and a type."""
    return np.zeros(_shape(kind), arrays.named(kind.dtype))


def children_in(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The objects in attributes that TensorFlow would track, by the names of the attributes."""
    return {name: value for name, value in attributes.items() if _is_tracked(value)}


def attributes_of(each: Any) -> Mapping[str, Any]:
    """The attributes of an object, or the items of a list or a dict by their places."""
    if isinstance(each, list | tuple):
        return {str(place): value for place, value in enumerate(each)}
    if isinstance(each, dict):
        return {name: value for name, value in each.items() if isinstance(name, str)}
    return vars(each) if isinstance(each, (keras.Layer, keras.optimizers.Optimizer)) else {}


def _is_tracked(value: Any) -> bool:
    if isinstance(value, list | tuple | dict):
        items: Iterable[Any] = value.values() if isinstance(value, dict) else value
        return any(isinstance(item, (*Tracked, list, tuple, dict)) and _is_tracked(item) for item in items)
    return isinstance(value, Tracked)


def build_metrics(model: keras.Model, element_spec: Any) -> None:
    """Does nothing: Keras builds the metrics before the first batch of these backends."""
