"""The arena: the memory that receives each snapshot of a model, and so detects the values that changed.

The arena lives from save to save, because new memory costs several times the copy.
"""

from __future__ import annotations

import collections
import ctypes
import io
import mmap
import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from keras_ckpt.formats.bundle_index import Entry
from keras_ckpt.formats.bundle_writer import Place, Value
from keras_ckpt.formats.dtypes import STRING
from keras_ckpt.store.reading import Stamp
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.streams import pages

LARGE = 1 << 18
"""Values of at least this many bytes start at a page, and several threads copy them."""

_compare = ctypes.CDLL(None).memcmp
_compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Packed(NamedTuple):
    """The key, kind and place of a value that is packed with others in one piece of memory."""

    key: bytes
    dtype: int
    shape: tuple[int, ...]
    begin: int
    size: int


class _Room(NamedTuple):
    """Memory for one value: the array, its address, and its place in the block."""

    data: np.ndarray
    address: int
    place: Place

    def holds(self, data: np.ndarray) -> bool:
        size = len(data)
        return len(self.data) == size and _compare(self.address, _address(data), size) == 0


class Saved(NamedTuple):
    """A checkpoint on disk, and the entries whose values an arena has.

    Attributes:
        record: The record of the checkpoint.
        stamps: The stamps of its files that were known to be whole, by name.
        variables: The keys of all its values.
        entries: The entries of its index whose bytes are the same in the arena, by key.
    """

    record: CheckpointRecord
    stamps: Mapping[str, Stamp]
    variables: frozenset[bytes]
    entries: dict[bytes, Entry]


class Arena:
    """The memory that receives the snapshots of a model.

    Example:

    ```python
    arena = Arena()
    arena.make_room({b"weight": len(value.data)})
    copy = arena.take(b"weight", value)
    ```

    Attributes:
        saved: The checkpoints that hold values of the arena, by directory, the latest last.
        spare: Unused memory for the packed values of the next snapshot, if there is any.
    """

    def __init__(self) -> None:
        self.spare: collections.deque[io.BytesIO] = collections.deque(maxlen=1)
        self.saved: dict[str, Saved] = {}
        self._rooms: dict[bytes, _Room] = {}
        self._filled: set[bytes] = set()
        self._making_room = threading.Lock()

    def make_room(self, sizes: Mapping[bytes, int]) -> None:
        """Allocates one block for the values without memory of their size, in the given order.

        Large values start at a page, so that their pages can be written separately.
        """
        with self._making_room:
            places, end = {}, 0
            for key, size in sizes.items():
                if key not in self._rooms or len(self._rooms[key].data) != size:
                    begin = _whole_pages(end) if size >= LARGE else end
                    end = begin + size
                    places[key] = begin, end
            if not places:
                return
            block = np.frombuffer(pages(_whole_pages(end)), np.uint8)
            block[:: mmap.PAGESIZE] = 0  # the kernel allocates a page at its first write, the slowest part
            address = _address(block)
            for key, (begin, end) in places.items():
                self._forget(key)
                self._filled.discard(key)
                self._rooms[key] = _Room(block[begin:end], address + begin, Place(block, begin))

    def take(self, key: bytes, value: Value, change: bool = True) -> Value:
        """Copies a value into the arena. A value that differs is no longer known to be on disk.

        Args:
            key: The key, for which `make_room` was called.
            value: The value to copy. Strings are returned uncopied, because nothing else refers to their bytes.
            change: Whether the value in the arena may be overwritten. If not, because it is not written yet, a value
                that differs is copied to new memory.
        """
        if value.dtype == STRING:
            return value
        room = self._rooms.get(key)
        if room is None or key not in self._filled or not room.holds(value.data):
            # An unfilled room is not free either: its first bytes may be in a page that is being written.
            if room is None or not change:
                return value._replace(data=value.data.copy())
            self._change(key, value, room.data)
        return Value(value.dtype, value.shape, room.data, place=room.place)

    def take_packed(self, values: Iterable[Packed], data: np.ndarray) -> dict[bytes, Value]:
        """Copies many small packed numbers as `take` does, at a fraction of the cost.

        Args:
            values: The values and their places in the data. `make_room` was called for all.
            data: The bytes of all values.
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
        """Whether a taken value is the value that the arena now has under its key."""
        return key in self._rooms and self._rooms[key].data is value.data

    def remember(self, saved: Saved) -> None:
        """Records that a checkpoint on disk holds values of the arena."""
        self.saved.pop(saved.record.directory, None)
        self.saved[saved.record.directory] = saved

    def _change(self, key: bytes, value: Value, room: np.ndarray) -> None:
        self._forget(key)  # before the copy, because an interrupt may come at any time
        np.copyto(room, value.data)
        self._filled.add(key)

    def _forget(self, *keys: bytes) -> None:
        for saved in self.saved.values():
            for key in keys:
                saved.entries.pop(key, None)


def same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of bytes are equal, without memory for the result of each byte."""
    return len(one) == len(other) and _compare(_address(one), _address(other), len(one)) == 0


def _whole_pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
