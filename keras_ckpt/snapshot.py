"""The values of variables at one moment, held while training goes on, and written later."""

from __future__ import annotations

import collections
import contextlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# No public operation reads many variables in one call, and the calls are what a snapshot costs.
from tensorflow.python.eager import context, execute

from keras_ckpt.bundle import Entry, read_index
from keras_ckpt.bundle_writer import STRING, Value, number_value, string_value, write_bundle
from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.files import Folder
from keras_ckpt.record import CheckpointFile


class Snapshot:
    """The values that variables have now. They cost memory only where a variable changes while this is held.

    TensorFlow gives no copy of a variable's value but the value itself, and copies it before it changes a variable
    whose value somebody holds.

    Example:

    ```python
    snapshot = Snapshot({"weight": variable})
    snapshot(folder, "ckpt-10")
    ```

    Args:
        variables: By key, `tf.Variable`s.
        others: More to write, by key: what TensorFlow has a tensor for.
    """

    def __init__(self, variables: Mapping[str, tf.Variable], others: Mapping[str, Any]) -> None:
        values = dict(zip(variables, read(list(variables.values())), strict=True))
        self.values: dict[str, tf.Tensor] = values | {key: tf.convert_to_tensor(each) for key, each in others.items()}
        self._drained: dict[bytes, Value] = {}

    def __call__(self, folder: Folder, name: str) -> tuple[CheckpointFile, ...]:
        """Writes them as a TensorFlow checkpoint of that name, durably."""
        return write_bundle(folder, name, [self.encoded()])[0]

    def encoded(self) -> dict[bytes, Value]:
        """The values as they are written, by key."""
        return self._drained | {key.encode(): _value(tensor) for key, tensor in self.values.items()}

    def drain(self) -> None:
        """Copies the values, and lets go of TensorFlow's: training would have to copy those, into memory that is cold.

        The memory of the copies is that of the next that is drained too, so one is written before the next is drained.
        """
        room = _room(sum(each.shape.num_elements() * each.dtype.size for each in self.values.values()))
        at = 0
        for key in list(self.values):
            value = _value(self.values.pop(key))
            if value.dtype != STRING:
                data = room[at : at + len(value.data)]
                at += len(data)
                np.copyto(data, value.data)
                value = value._replace(data=data)
            self._drained[key.encode()] = value

    def is_in(self, folder: Folder, name: str, counts: Callable[[str], bool]) -> bool:
        """Whether a checkpoint holds the same, to the bit.

        Args:
            folder: Its directory.
            name: Its name.
            counts: Says of a key whether it is looked at.
        """
        try:
            index = read_index(folder, name)
            there = {key.encode() for key in index.variables if counts(key)}
            here = {key: value for key, value in self.encoded().items() if counts(key.decode())}
            return here.keys() == there and all(
                _is_at(folder, index.files, index.entries[key], value) for key, value in here.items()
            )
        except (DamagedCheckpointError, OSError):
            return False


def _is_at(folder: Folder, files: Mapping[int, str], entry: Entry, value: Value) -> bool:
    kind = (entry.dtype, entry.shape, entry.size, entry.slices)
    return kind == (value.dtype, value.shape, len(value.data), ()) and folder.holds(
        files[entry.shard], entry.offset, value.data.data
    )


_memory: list[np.ndarray] = []


def _room(size: int) -> np.ndarray:
    """So many bytes of the memory that is kept for copies; it grows to what the greatest has needed."""
    for room in _memory:
        if len(room) >= size:
            return room
    pages = mmap.mmap(-1, max(size, 1))
    with contextlib.suppress(AttributeError, OSError):  # great pages are an offer of some kernels
        pages.madvise(mmap.MADV_HUGEPAGE)
    room = np.frombuffer(pages, np.uint8)
    _memory[:] = [room]
    return room


def free_memory() -> None:
    """Gives the memory for copies back."""
    _memory.clear()


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
    # No copy, where the tensor is in the memory of the processor. NumPy has no scalars of types that are not its own.
    array = np.asarray(tensor if tensor.shape.rank else tf.reshape(tensor, [1]))
    shape = tuple(tensor.shape)
    if tensor.dtype == tf.string:
        return string_value(array.reshape(-1).tolist(), shape)
    return number_value(tensor.dtype.as_datatype_enum, shape, array)
