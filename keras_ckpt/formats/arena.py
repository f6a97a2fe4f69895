"""The memory that the snapshots of a model are copied into, one after another; so it tells what has changed since.

It is kept from save to save, for memory that is new costs several times what a copy does.
"""

from __future__ import annotations

import collections
import ctypes
import io
import mmap
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from keras_ckpt.formats.bundle_index import Entry
from keras_ckpt.formats.bundle_writer import Place, Value
from keras_ckpt.formats.dtypes import STRING
from keras_ckpt.store.reading import Stamp
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.streams import pages

GREAT = 1 << 18
"""Values of so many bytes have pages of their own, and are copied by several threads."""

_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Packed(NamedTuple):
    """What a value is that lies among others in a piece of memory, and where."""

    key: bytes
    dtype: int
    shape: tuple[int, ...]
    begin: int
    size: int


class _Room(NamedTuple):
    """Memory for a value: an array, where it begins, and where that is in its block."""

    data: np.ndarray
    address: int
    place: Place

    def holds(self, data: np.ndarray) -> bool:
        size = len(data)
        return len(self.data) == size and _compare(self.address, _address(data), size) == 0


class Saved(NamedTuple):
    """A checkpoint on disk, and what of it an arena has.

    Attributes:
        record: What it is.
        stamps: Of those of its files that were known to be whole, by name.
        variables: The keys of all that it holds.
        entries: Those of its index whose bytes are the same in the arena, by key.
    """

    record: CheckpointRecord
    stamps: Mapping[str, Stamp]
    variables: frozenset[bytes]
    entries: dict[bytes, Entry]


class Arena:
    """The memory that the snapshots of a model are copied into.

    Example:

    ```python
    arena = Arena()
    arena.make_room({b"weight": len(value.data)})
    copy = arena.take(b"weight", value)
    ```

    Attributes:
        saved: The checkpoints that have something of it, by directory, the latest last.
        aside: Memory for what is yet to be taken, if there is some that nobody uses now.
    """

    def __init__(self) -> None:
        self.aside: collections.deque[io.BytesIO] = collections.deque(maxlen=1)
        self.saved: dict[str, Saved] = {}
        self._rooms: dict[bytes, _Room] = {}
        self._filled: set[bytes] = set()
        self._making_room = threading.Lock()

    def make_room(self, sizes: Mapping[bytes, int]) -> None:
        """Gets memory for what has none of its size yet, in one block and in this order.

        Great values begin with a page, so that their pages can be written without the others.
        """
        with self._making_room:
            self._make_room(sizes)

    def _make_room(self, sizes: Mapping[bytes, int]) -> None:
        places, end = {}, 0
        for key, size in sizes.items():
            if key not in self._rooms or len(self._rooms[key].data) != size:
                begin = _whole_pages(end) if size >= GREAT else end
                end = begin + size
                places[key] = begin, end
        if places:
            block = np.frombuffer(pages(_whole_pages(end)), np.uint8)
            block[:: mmap.PAGESIZE] = 0  # the kernel gives a page when it is written to, which takes longest
            address = _address(block)
            for key, (begin, end) in places.items():
                self._forget(key)
                self._filled.discard(key)
                self._rooms[key] = _Room(block[begin:end], address + begin, Place(block, begin))

    def take(self, key: bytes, value: Value, change: bool = True) -> Value:
        """Copies a value. A value that differs is no longer known to be on disk.

        Args:
            key: Its key, for which there is room.
            value: What to copy. Strings, which are nobody else's, are left as they are.
            change: Whether what is there may be changed. If not, because it is yet to be written, a value that differs
                is copied to another place, and needs no room.
        """
        if value.dtype == STRING:
            return value
        room = self._rooms.get(key)
        if room is None or key not in self._filled or not room.holds(value.data):
            # A room that is not filled is not free either: its first bytes may be in a page that is being written.
            if room is None or not change:
                return value._replace(data=value.data.copy())
            self._change(key, value, room.data)
        return Value(value.dtype, value.shape, room.data, place=room.place)

    def take_packed(self, values: Iterable[Packed], data: np.ndarray) -> dict[bytes, Value]:
        """Copies numbers as `take` does, but many little ones that are together: each costs a fraction.

        Args:
            values: What they are, and where in the data; there is room for all.
            data: The bytes of all.
        """
        base, taken, changed = _address(data), {}, {}
        for key, dtype, shape, begin, size in values:
            room = self._rooms[key]
            if key not in self._filled or _compare(room.address, base + begin, size):
                changed[key] = room.address, base + begin, size
            taken[key] = Value(dtype, shape, room.data, place=room.place)
        self._forget(*changed)
        for copy in changed.values():
            ctypes.memmove(*copy)
        self._filled.update(changed)
        return taken

    def has(self, key: bytes, value: Value) -> bool:
        """Whether a value that was taken is the one that is there."""
        return key in self._rooms and self._rooms[key].data is value.data

    def remember(self, saved: Saved) -> None:
        """Notes that a checkpoint has something of what is there."""
        self.saved.pop(saved.record.directory, None)
        self.saved[saved.record.directory] = saved

    def _change(self, key: bytes, value: Value, room: np.ndarray) -> None:
        self._forget(key)  # first, because an interrupt may come at any time
        np.copyto(room, value.data)
        self._filled.add(key)

    def _forget(self, *keys: bytes) -> None:
        for saved in self.saved.values():
            for key in keys:
                saved.entries.pop(key, None)


def arena_of(model: object) -> Arena:
    """The arena of a model, which is there for as long as somebody has it."""
    return _arenas.setdefault(id(model), Arena())


_arenas: weakref.WeakValueDictionary[int, Arena] = weakref.WeakValueDictionary()


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
