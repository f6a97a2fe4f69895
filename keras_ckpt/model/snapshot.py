"""The values of variables at one moment, held while training goes on, and written later."""

from __future__ import annotations

import collections
import io
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

# No public operation reads many variables in one call, and the calls are what a snapshot costs.
from tensorflow.python.eager import context, execute

from keras_ckpt.formats.arena import GREAT, Arena, Packed
from keras_ckpt.formats.bundle_writer import STRING, Value, number_value, string_value, write_bundle
from keras_ckpt.formats.threads import share_out
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile

_NO_NUMBERS = (tf.string, tf.resource, tf.variant)
_LITTLE, _ASIDE = 1 << 16, 16 << 20
"""Values of fewer bytes may be put aside, and so many bytes of them."""


class Reader:
    """Reads variables, those of a device in one call, again and again.

    Args:
        variables: By key.

    Attributes:
        variables: In the order in which they were given.
        little: Where the values of the little ones are when they are put aside, one after another.
    """

    def __init__(self, variables: Mapping[str, tf.Variable]) -> None:
        self.variables = [*variables.values()]
        devices: dict[str, dict[str, tf.Variable]] = collections.defaultdict(dict)
        self._distributed: dict[str, tf.Variable] = {}
        for key, variable in variables.items():
            if isinstance(variable, tf.distribute.DistributedValues):
                self._distributed[key] = variable
            else:
                devices[variable.device][key] = variable
        self._calls = [_Call(group) for group in devices.values()]
        self.little = _little(variables)

    def read(self) -> dict[str, tf.Tensor]:
        """The values that they have now."""
        values: dict[str, tf.Tensor] = {}
        for call in self._calls:
            values.update(zip(call.keys, call.run(), strict=True))
        return values | {key: variable.read_value() for key, variable in self._distributed.items()}


class _Call:
    """One operation that reads many variables of a device."""

    def __init__(self, variables: Mapping[str, tf.Variable]) -> None:
        self.keys = tuple(variables)
        self._handles = [each.handle for each in variables.values()]
        types = [each.dtype.as_datatype_enum for each in variables.values()]
        self._attributes = ("N", len(types), "dtypes", types)

    def run(self) -> Sequence[tf.Tensor]:
        found: Sequence[tf.Tensor] = execute.execute(
            b"_ReadVariablesOp", len(self.keys), self._handles, self._attributes, context.context()
        )
        return found


def _little(variables: Mapping[str, tf.Variable]) -> Mapping[str, Packed]:
    """The variables with little values, as many as may be put aside."""
    found, end = {}, 0
    for key, variable in variables.items():
        dtype, shape = variable.dtype, variable.shape
        if dtype in _NO_NUMBERS or not shape.is_fully_defined():
            continue
        size = shape.num_elements() * dtype.size
        if size < _LITTLE and end + size <= _ASIDE:
            found[key] = Packed(key.encode(), dtype.as_datatype_enum, tuple(shape), end, size)
            end += size
    return found


class Late(Protocol):
    """Arrays that are known when a snapshot is moved."""

    @property
    def size(self) -> int:
        """Their bytes."""

    @property
    def is_true(self) -> bool:
        """Whether all that was assumed of them is so."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """The arrays by key."""


class Snapshot:
    """The values that variables have now. They cost memory only where a variable changes while this is held.

    TensorFlow gives no copy of a variable's value but the value itself, and copies it before it changes a variable
    whose value somebody holds.

    Example:

    ```python
    snapshot = Snapshot(Reader({"weight": variable}), {})
    values = snapshot.move(arena)
    ```

    Args:
        reader: Reads the variables.
        others: More to write, by key: what TensorFlow has a tensor for.
        constants: More, by key: what is encoded already.
        later: More, by key: arrays that are known when the snapshot is moved.

    Attributes:
        values: The tensors by key.
        others_size: The bytes of the others.
    """

    def __init__(
        self,
        reader: Reader,
        others: Mapping[str, Any],
        constants: Mapping[bytes, Value] = MappingProxyType({}),
        later: Late | None = None,
    ) -> None:
        added = {key: tf.convert_to_tensor(each) for key, each in others.items()}
        self.values = reader.read() | added
        self._constants = constants
        self._later = later
        sizes = [each.shape.num_elements() * each.dtype.size for each in added.values()]
        self.others_size = sum(sizes) + (later.size if later else 0)
        self._names = [*self.values]
        self._little = reader.little
        self._aside: io.BytesIO | None = None
        self._copies: dict[bytes, Value] = {}

    @property
    def is_true(self) -> bool:
        """Whether all that was assumed of the arrays that are known later is so. Reads them: it takes its time."""
        return self._later is None or self._later.is_true

    @property
    def is_copied(self) -> bool:
        """Whether the values are copies, which training does not change."""
        return self._aside is not None

    def __call__(self, folder: Folder, name: str) -> tuple[CheckpointFile, ...]:
        """Writes them as a TensorFlow checkpoint of that name, durably."""
        values = self._encoded() | self._late()
        return write_bundle(folder, name, [{key: values[key] for key in sorted(values)}])[0]

    def detach(self, arena: Arena, change: bool) -> None:
        """Copies the values at once, for training with XLA would have to copy before its next batch what is held.

        Args:
            arena: Where to.
            change: Whether it may be changed now.
        """
        if self.is_copied:
            return
        self._aside = self._put_aside(arena)
        self._copies = self._encoded()
        self.values.clear()
        _copy(self._copies, arena, change)

    def move(self, arena: Arena) -> dict[bytes, Value]:
        """Copies the values, and lets go of TensorFlow's, which training would have to copy, into memory that is cold.

        Args:
            arena: Where to. Until it is changed the next time, the copies are there.

        Returns:
            The values as they are written, by key.
        """
        if not self._names:
            raise RuntimeError("A snapshot is saved once: what was copied of it may be another one's by now.")
        aside = self._aside or self._put_aside(arena)
        late = self._late()
        values = self._encoded() | late
        self.values.clear()
        _copy(values, arena)
        values |= self._copies | self._bring_back(arena, aside)
        # In the order of the arena, whatever was copied first.
        order = [*(name.encode() for name in self._names), *late, *self._constants]
        self._names, self._copies = [], {}
        return {key: values[key] for key in order}

    def _put_aside(self, arena: Arena) -> io.BytesIO:
        """Copies the little values in one call, for by itself each costs more than its bytes do."""
        aside = arena.aside.pop() if arena.aside else io.BytesIO()
        aside.seek(0)
        aside.writelines([self.values.pop(key) for key in self._little])
        return aside

    def _bring_back(self, arena: Arena, aside: io.BytesIO) -> dict[bytes, Value]:
        """Copies what was put aside to its places."""
        arena.make_room({packed.key: packed.size for packed in self._little.values()})
        values = arena.take_packed(self._little.values(), np.frombuffer(aside.getbuffer(), np.uint8))
        arena.aside.append(aside)
        return values

    def _late(self) -> dict[bytes, Value]:
        arrays = self._later.arrays.items() if self._later else ()
        return {key.encode(): number_value(tf.as_dtype(each.dtype).as_datatype_enum, each) for key, each in arrays}

    def _encoded(self) -> dict[bytes, Value]:
        return {key.encode(): _value(tensor) for key, tensor in self.values.items()} | dict(self._constants)


def _copy(values: dict[bytes, Value], arena: Arena, change: bool = True) -> None:
    """Copies values into an arena, and lets go of each as soon as it is copied."""
    if change:
        arena.make_room({key: len(value.data) for key, value in values.items() if value.dtype != STRING})

    def copy(keys: Iterable[bytes]) -> None:
        for key in keys:
            values[key] = arena.take(key, values[key], change)

    # Training changes the last ones first.
    keys = [*reversed(values)]
    great = [key for key in keys if len(values[key].data) >= GREAT]
    share_out(copy, sorted(great, key=lambda key: -len(values[key].data)))
    # Of little ones, threads would rather wait for each other than copy.
    copy(key for key in keys if len(values[key].data) < GREAT)


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
