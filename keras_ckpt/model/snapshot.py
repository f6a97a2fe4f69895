"""The values of variables at one moment, held while training goes on, and written later."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from keras_ckpt.formats.arena import LARGE, Arena
from keras_ckpt.formats.bundle_writer import Value, array_value, string_value
from keras_ckpt.formats.dtypes import STRING
from keras_ckpt.formats.threads import share_out
from keras_ckpt.model import tensorflow as backend


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
    """The present values of variables. They cost memory only where a variable changes while this is held.

    The backend gives no copy of a variable's value but the value itself, and copies the value before it changes a
    variable whose value somebody holds.

    Example:

    ```python
    snapshot = Snapshot(Reader({"weight": variable}), {})
    values = snapshot.move(arena)
    ```

    Args:
        reader: Reads the variables.
        others: More to write, by key: arrays and texts.
        constants: More, by key: values that are encoded already.
        later: More, by key: arrays that are known when the snapshot is moved.

    Attributes:
        values: The tensors by key.
        others_size: The bytes of the others.
    """

    def __init__(
        self,
        reader: backend.Reader,
        others: Mapping[str, np.ndarray | str],
        constants: Mapping[bytes, Value] = MappingProxyType({}),
        later: Late | None = None,
    ) -> None:
        self.values = reader.read()
        added = {key.encode(): _value(each) for key, each in others.items()}
        self._constants = {**added, **constants}
        self._later = later
        self.others_size = sum(len(value.data) for value in added.values()) + (later.size if later else 0)
        self._names = [*self.values]
        self._small = reader.small
        self._is_moved = False
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
        if self._is_moved:
            raise RuntimeError("A snapshot is saved once: another snapshot may use the memory of its copies by now.")
        self._is_moved = True
        aside = self._aside or self._put_aside(arena)
        late = self._late()
        values = {**self._encoded(), **late, **self._constants}
        self.values.clear()
        _copy(values, arena)
        values |= self._copies | self._bring_back(arena, aside)
        # In the order of the arena, whatever was copied first.
        order = [*(name.encode() for name in self._names), *late, *self._constants]
        self._copies = {}
        return {key: values[key] for key in order}

    def _put_aside(self, arena: Arena) -> io.BytesIO:
        """Copies the little values in one call, for by itself each costs more than its bytes do."""
        aside = arena.aside.pop() if arena.aside else io.BytesIO()
        aside.seek(0)
        aside.writelines([self.values.pop(key) for key in self._small])
        return aside

    def _bring_back(self, arena: Arena, aside: io.BytesIO) -> dict[bytes, Value]:
        """Copies what was put aside to its places."""
        arena.make_room({packed.key: packed.size for packed in self._small.values()})
        values = arena.take_packed(self._small.values(), np.frombuffer(aside.getbuffer(), np.uint8))
        arena.aside.append(aside)
        return values

    def _late(self) -> dict[bytes, Value]:
        arrays = self._later.arrays.items() if self._later else ()
        return {key.encode(): array_value(each) for key, each in arrays}

    def _encoded(self) -> dict[bytes, Value]:
        return {key.encode(): array_value(backend.array_of(tensor)) for key, tensor in self.values.items()}


def _value(content: np.ndarray | str) -> Value:
    """An encoded copy, because the owner of an array may change it."""
    return string_value([content.encode()], ()) if isinstance(content, str) else array_value(content.copy())


def _copy(values: dict[bytes, Value], arena: Arena, change: bool = True) -> None:
    """Copies values into an arena, and lets go of each as soon as it is copied."""
    if change:
        arena.make_room({key: len(value.data) for key, value in values.items() if value.dtype != STRING})

    def copy(keys: Iterable[bytes]) -> None:
        for key in keys:
            values[key] = arena.take(key, values[key], change)

    # Training changes the last ones first.
    keys = [*reversed(values)]
    large = [key for key in keys if len(values[key].data) >= LARGE]
    share_out(copy, sorted(large, key=lambda key: -len(values[key].data)))
    # Of little ones, threads would rather wait for each other than copy.
    copy(key for key in keys if len(values[key].data) < LARGE)
