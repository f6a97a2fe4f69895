"""Snapshots: the values of variables at one moment, held while training continues, and written later."""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from keras_ckpt.formats.arena import LARGE, Arena, Packed
from keras_ckpt.formats.bundle_writer import Value, array_value, string_value
from keras_ckpt.formats.dtypes import STRING
from keras_ckpt.formats.threads import share_out
from keras_ckpt.model.backends import backend
from keras_ckpt.model.companions import companion


class Reader(Protocol):
    """Reads variables, again and again."""

    @property
    def small(self) -> Mapping[str, Packed]:
        """The places of small variables when their values are packed, one after another."""

    @property
    def transfers(self) -> bool:
        """Whether the values that are read are copies on the way from an accelerator, which training cannot affect."""

    def read(self) -> dict[str, backend.Tensor]:
        """Reads the present values by key."""


class Late(Protocol):
    """Arrays that are known when a snapshot is moved."""

    @property
    def size(self) -> int:
        """The bytes of the arrays."""

    @property
    def is_true(self) -> bool:
        """Whether all assumptions about the arrays hold."""

    @property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """The arrays by key."""


class Snapshot:
    """The present values of variables. A value costs memory only if its variable changes while the snapshot is held.

    The backend returns a variable's value itself, not a copy. TensorFlow copies a held value before it changes the
    variable. On JAX and PyTorch, call `detach` before the next step. Values on an accelerator are copied into memory of
    the host while training continues.

    Example:

    ```python
    snapshot = Snapshot(Reader({"weight": variable}), {})
    values = snapshot.move(arena)
    ```

    Args:
        reader: The reader of the variables.
        others: Arrays and texts to write too, by key.
        constants: Makes encoded values to write too, by key, when the snapshot is moved.
        later: Arrays to write too, which are known when the snapshot is moved.
        size: The bytes of the variables.

    Attributes:
        values: The tensors by key.
        size: The bytes of all values.
    """

    def __init__(
        self,
        reader: Reader,
        others: Mapping[str, np.ndarray | str],
        constants: Callable[[], Mapping[bytes, Value]] = dict,
        later: Late | None = None,
        size: int = 0,
    ) -> None:
        self.values = reader.read()
        self._others = {key.encode(): _value(each) for key, each in others.items()}
        self._constants = constants
        self._later = later
        self.size = size + sum(len(value.data) for value in self._others.values()) + (later.size if later else 0)
        self._names = [*self.values]
        self._small = reader.small
        self._transfers = reader.transfers
        self._is_moved = False
        self._packed: io.BytesIO | None = None
        self._copies: dict[bytes, Value] = {}

    @property
    def is_true(self) -> bool:
        """Whether all assumptions about the later arrays hold. This reads the arrays, which takes time."""
        return self._later is None or self._later.is_true

    @property
    def is_copied(self) -> bool:
        """Whether the values are copies, which training cannot affect."""
        return self._packed is not None

    def detach(self, arena: Arena, change: bool) -> None:
        """Copies the values at once: training with XLA would have to copy held values before its next batch.

        Args:
            arena: The memory for the copies.
            change: Whether the arena may be changed now.
        """
        if self.is_copied or self._transfers:
            return
        self._packed = self._copy_small(arena)
        self._copies = self._encoded()
        self.values.clear()
        _copy(self._copies, arena, change)

    def move(self, arena: Arena) -> dict[bytes, Value]:
        """Copies the values into an arena and releases TensorFlow's, which training would copy into cold memory.

        Args:
            arena: The memory for the copies, which are valid until the arena is changed next.

        Returns:
            The encoded values by key.
        """
        if self._is_moved:
            raise RuntimeError("A snapshot is saved once: another snapshot may use the memory of its copies by now.")
        self._is_moved = True
        packed = self._packed or self._copy_small(arena)
        rest = {**self._late(), **self._others, **self._constants()}
        values = {**self._encoded(), **rest}
        self.values.clear()
        _copy(values, arena)
        values |= self._copies | self._place_small(arena, packed)
        # The order of the arena, whichever value was copied first.
        order = [*(name.encode() for name in self._names), *rest]
        self._copies = {}
        return {key: values[key] for key in order}

    def _copy_small(self, arena: Arena) -> io.BytesIO:
        """Copies the small values in one call: a call for each would cost more than its bytes."""
        packed = arena.spare.pop() if arena.spare else io.BytesIO()
        packed.seek(0)
        small = [self.values.pop(key) for key in self._small]
        buffers: list[Any] = [backend.array_of(each) for each in small] if self._transfers else small
        packed.writelines(buffers)
        return packed

    def _place_small(self, arena: Arena, packed: io.BytesIO) -> dict[bytes, Value]:
        """Copies the small values to their places in the arena."""
        arena.make_room({each.key: each.size for each in self._small.values()})
        values = arena.take_packed(self._small.values(), np.frombuffer(packed.getbuffer(), np.uint8))
        arena.spare.append(packed)
        return values

    def _late(self) -> dict[bytes, Value]:
        arrays = self._later.arrays.items() if self._later else ()
        return {key.encode(): array_value(each) for key, each in arrays}

    def _encoded(self) -> dict[bytes, Value]:
        return {key.encode(): array_value(backend.array_of(tensor)) for key, tensor in self.values.items()}


class _ArenaOfModel:
    """A weak reference to the arena of a model, because an arena has the size of its model."""

    def __init__(self) -> None:
        self.find: Callable[[], Arena | None] = lambda: None


def arena_of(model: object) -> Arena:
    """The arena of a model. All callbacks of a `fit` share it, and it is freed with the last of them."""
    shared = companion(model, _ArenaOfModel)
    arena = shared.find() or Arena()
    shared.find = weakref.ref(arena)
    return arena


def _value(content: np.ndarray | str) -> Value:
    """An encoded copy. The owner of an array may change the original."""
    return string_value([content.encode()], ()) if isinstance(content, str) else array_value(content.copy())


def _copy(values: dict[bytes, Value], arena: Arena, change: bool = True) -> None:
    """Copies values into an arena, and releases each as soon as it is copied."""
    if change:
        arena.make_room({key: len(value.data) for key, value in values.items() if value.dtype != STRING})

    def copy(keys: Iterable[bytes]) -> None:
        for key in keys:
            values[key] = arena.take(key, values[key], change)

    # Training changes the last values first.
    keys = [*reversed(values)]
    large = [key for key in keys if len(values[key].data) >= LARGE]
    share_out(copy, sorted(large, key=lambda key: -len(values[key].data)))
    # With small values, threads would mostly wait for each other.
    copy(key for key in keys if len(values[key].data) < LARGE)
