"""The values of variables at one moment, held while training goes on, and written later."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import tensorflow as tf

# No public operation reads many variables in one call, and the calls are what a snapshot costs.
from tensorflow.python.eager import context, execute

from keras_ckpt.arena import Arena
from keras_ckpt.bundle_writer import STRING, Value, number_value, string_value, write_bundle
from keras_ckpt.files import Folder
from keras_ckpt.record import CheckpointFile


class Snapshot:
    """The values that variables have now. They cost memory only where a variable changes while this is held.

    TensorFlow gives no copy of a variable's value but the value itself, and copies it before it changes a variable
    whose value somebody holds.

    Example:

    ```python
    snapshot = Snapshot({"weight": variable}, {})
    values = snapshot.move(arena)
    ```

    Args:
        variables: By key, `tf.Variable`s.
        others: More to write, by key: what TensorFlow has a tensor for.
        constants: More, by key: what is encoded already.

    Attributes:
        values: The tensors by key.
    """

    def __init__(
        self,
        variables: Mapping[str, tf.Variable],
        others: Mapping[str, Any],
        constants: Mapping[bytes, Value] = MappingProxyType({}),
    ) -> None:
        values = dict(zip(variables, read(list(variables.values())), strict=True))
        self.values: dict[str, tf.Tensor] = values | {key: tf.convert_to_tensor(each) for key, each in others.items()}
        self._constants = constants

    def __call__(self, folder: Folder, name: str) -> tuple[CheckpointFile, ...]:
        """Writes them as a TensorFlow checkpoint of that name, durably."""
        values = self._encoded()
        return write_bundle(folder, name, [{key: values[key] for key in sorted(values)}])[0]

    def move(self, arena: Arena, change: bool = True) -> dict[bytes, Value]:
        """Copies the values, and lets go of TensorFlow's, which training would have to copy, into memory that is cold.

        Args:
            arena: Where to. Until it is changed the next time, the copies are there.
            change: Whether it may be changed now.

        Returns:
            The values as they are written, by key.
        """
        if not self.values:
            raise RuntimeError("A snapshot is saved once: what was copied of it may be another one's by now.")
        values = self._encoded()
        self.values.clear()
        if change:
            arena.make_room({key: len(value.data) for key, value in values.items() if value.dtype != STRING})
        for key in values:
            # One after another, so that each is let go of as soon as it is copied.
            values[key] = arena.take(key, values[key], change)
        return values

    def _encoded(self) -> dict[bytes, Value]:
        return {key.encode(): _value(tensor) for key, tensor in self.values.items()} | dict(self._constants)


def read(variables: Sequence[tf.Variable]) -> list[tf.Tensor]:
    """The values of variables, those of a device in one call."""
    found: dict[int, tf.Tensor] = {}
    devices: dict[str, list[int]] = collections.defaultdict(list)
    for number, variable in enumerate(variables):
        if isinstance(variable, tf.distribute.DistributedValues):
            found[number] = variable.read_value()
        else:
            devices[variable.device].append(number)
    for numbers in devices.values():
        found |= zip(numbers, _read_together([variables[number] for number in numbers]), strict=True)
    return [found[number] for number in range(len(variables))]


def _read_together(variables: Sequence[tf.Variable]) -> Sequence[tf.Tensor]:
    attributes = ("N", len(variables), "dtypes", [each.dtype.as_datatype_enum for each in variables])
    handles = [each.handle for each in variables]
    found: Sequence[tf.Tensor] = execute.execute(
        b"_ReadVariablesOp", len(handles), handles, attributes, context.context()
    )
    return found


def _value(tensor: tf.Tensor) -> Value:
    array = array_of(tensor)
    if array.dtype == object:
        return string_value(array.reshape(-1).tolist(), array.shape)
    return number_value(tensor.dtype.as_datatype_enum, array)


def array_of(tensor: tf.Tensor) -> np.ndarray:
    """The memory of a tensor; a copy of it, where that is not the memory of the processor."""
    try:
        return np.asarray(tensor)
    except ValueError:  # NumPy has no scalars of types that are not its own
        return np.asarray(tf.reshape(tensor, [1])).reshape([])
