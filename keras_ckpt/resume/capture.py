"""The values of callbacks at one moment: a look captures them, and the background writes them later.

A look copies small arrays. It assumes that a large array is unchanged if it is the same object as before. The
background checks the assumption before it writes. A wrong assumption costs one save. After it, the array is copied if a
sample of its bytes has changed. After a second wrong assumption, it is copied for each save.
"""

from __future__ import annotations

import abc
import collections
import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
from blake3 import blake3

from keras_ckpt.formats.arena import same_bytes
from keras_ckpt.formats.threads import copy_together
from keras_ckpt.resume.plain_values import Items, dumped, is_flat, structure_of

_SMALL = 1 << 16
_COPIED = 1 << 20
"""A look copies arrays of fewer than `_SMALL` bytes, until it has copied `_COPIED` bytes."""
_SAMPLED = 1 << 20
_SAMPLES, _SAMPLE = 64, 64
"""An array of at least `_SAMPLED` bytes is sampled in `_SAMPLES` places, `_SAMPLE` bytes each."""
_PIECE = 1 << 14
_PAUSE = 1e-4
"""So many items of a list are converted at once, while other threads wait. A pause of so many seconds follows."""


class Leaf(abc.ABC):
    """An array, or the items of a long collection, inside a value.

    Attributes:
        mark: Two looks with equal marks have found the same content, as far as a look can tell.
        size: The bytes of the array.
    """

    mark: Any
    size: int

    @abc.abstractmethod
    def array(self) -> np.ndarray:
        """The content, if `keep` was called and the content is known."""

    def keep(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Prepares the content to be written. Returns the copies to make now, as pairs of target and source."""
        return ()

    def is_true(self) -> bool:
        """Whether the content at the moment of the look is known."""
        return True

    def doubt(self, doubts: bool) -> None:  # noqa: B027 - most looks assume nothing
        """Sets whether later looks assume nothing about the content."""


class Look:
    """A value as a look found it.

    Attributes:
        structure: The value as `json` writes it, with leaves in the places of arrays.
        leaves: The leaves.
        mark: Two looks with equal marks have found the same value, as far as a look can tell.
    """

    def __init__(self, structure: Any) -> None:
        self.structure = structure
        text, self.leaves = dumped(structure)
        self.mark = text, [leaf.mark for leaf in self.leaves]


class Captures:
    """Looks repeatedly at the values of one owner.

    Example:

    ```python
    captures = Captures()
    before = captures.look(callback.scores, "scores", fingerprints=True)
    now = captures.look(callback.scores, "scores")
    changed = now.mark != before.mark
    ```
    """

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, int], _Array] = {}
        self._collections: dict[tuple[str, int], _Collection] = {}
        self._memory = _Memory()

    def look(self, value: Any, name: str, fingerprints: bool = False) -> Look:
        """Looks at a value.

        Args:
            value: A plain value, as `plain_values.structure_of` takes it.
            name: A name for the value, the same at each look.
            fingerprints: Whether to fingerprint large arrays that are new to this object. Without a fingerprint, a
                change of the array is noticed only after a copy was kept.

        Raises:
            UnplainError: The value is not plain.
        """
        count = copied = 0

        def leaf(each: Any) -> Leaf | None:
            nonlocal count, copied
            count += 1
            if isinstance(each, Items):
                return self._items_leaf(each, (name, count))
            if each.nbytes < _SMALL and copied < _COPIED:
                copied += each.nbytes
                return Copy(each)
            return self._array_leaf(each, (name, count), fingerprints)

        return Look(structure_of(value, leaf))

    def look_at_memory(self, value: Any) -> Look:
        """Looks at arrays that are the memory of variables. The large arrays always count as changed."""
        return Look(
            structure_of(value, lambda each: Copy(each) if each.nbytes < _SMALL else _OfVariable(each, self._memory))
        )

    def _array_leaf(self, array: np.ndarray, place: tuple[str, int], fingerprints: bool) -> Leaf:
        known = self._arrays.get(place)
        if known is None or not known.is_of(array):
            known = self._arrays[place] = _Array(array, self._memory, fingerprints)
        return _ArrayLeaf(known, self._memory)

    def _items_leaf(self, items: Items, place: tuple[str, int]) -> Leaf | None:
        known = self._collections.get(place)
        if known is None or known.owner is not items.owner:
            known = self._collections[place] = _Collection(items)
        return None if known.form is None else _ItemsLeaf(known, items.items)


def copied(value: Any) -> Any:
    """The structure of a plain value, with copies of its arrays, which are small.

    Raises:
        UnplainError: The value is not plain.
    """
    return structure_of(value, lambda each: Copy(each) if isinstance(each, np.ndarray) else None)


class Later:
    """The arrays of one backup, whose content is known when the backup is written.

    Args:
        leaves: The leaves to write, by key.
        assumed: The leaves that are not written, because they are assumed to be unchanged.
    """

    def __init__(self, leaves: Mapping[str, Leaf], assumed: Iterable[Leaf] = ()) -> None:
        self._leaves = leaves
        self._all = [*leaves.values(), *assumed]
        copy_together([pair for leaf in leaves.values() for pair in leaf.keep()])

    @property
    def size(self) -> int:
        """The bytes of the arrays."""
        return sum(leaf.size for leaf in self._leaves.values())

    @property
    def is_true(self) -> bool:
        """Whether all content is known, and all assumptions were right."""
        # Every leaf is checked, because each leaf learns from a wrong assumption.
        wrong = [leaf for leaf in self._all if not leaf.is_true()]
        # After a wrong assumption nothing is assumed until a save succeeds. Otherwise arrays that change one after
        # another would void every save.
        for leaf in self._all:
            leaf.doubt(bool(wrong))
        return not wrong

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The content of the leaves to write, by key."""
        return {key: leaf.array() for key, leaf in self._leaves.items()}


class Copy(Leaf):
    """A small array that the look copies."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array.copy()
        self.size = array.nbytes
        self.mark = array.dtype.str, array.shape, array.tobytes()

    def array(self) -> np.ndarray:
        return self._array


class _Memory:
    """Memory for copies, which is reused after a copy is released. New memory costs several times a copy."""

    def __init__(self) -> None:
        self._free: collections.defaultdict[Any, list[np.ndarray]] = collections.defaultdict(list)

    def take(self, like: np.ndarray) -> np.ndarray:
        """An array whose memory is reused when the array is deleted, though views of it may remain."""
        free = self._free[like.shape, like.dtype]
        memory = free.pop() if free else np.empty(like.shape, like.dtype)
        array = memory[...]
        weakref.finalize(array, free.append, memory).atexit = False
        return array

    def prepare(self, like: np.ndarray) -> None:
        """Allocates memory for two copies: one that is being written, and the next."""
        self._free[like.shape, like.dtype] += [np.full(like.shape, 0, like.dtype) for _ in range(2)]


class _OfVariable(Leaf):
    """A large array that is the memory of a variable. It is copied, or is not needed, before the variable changes."""

    _copy: np.ndarray

    def __init__(self, array: np.ndarray, memory: _Memory) -> None:
        self._source: np.ndarray | None = array
        self._memory = memory
        self.size = array.nbytes
        self.mark = object()

    def keep(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        source, self._source = self._source, None
        if source is None:
            return []
        self._copy = self._memory.take(source)
        return [(self._copy, source)]

    def array(self) -> np.ndarray:
        return self._copy


class _Array:
    """A large array that is followed from look to look.

    Attributes:
        live: The array.
        copy: The last copy of its content.
        is_doubted: Whether the array is copied until a save succeeds.
        surprises: The number of wrong assumptions that the array was unchanged.
    """

    def __init__(self, array: np.ndarray, memory: _Memory, fingerprints: bool) -> None:
        self.live = array
        self.copy: np.ndarray | None = None
        self.is_doubted = False
        self._memory = memory
        self.surprises = 0
        self._interface = _interface(array)
        self._fingerprint = _fingerprint(array) if fingerprints else None

    def is_of(self, array: np.ndarray) -> bool:
        return self.live is array and self._interface == _interface(array)

    def may_be_changed(self) -> bool:
        """Whether the array may have changed since its last copy, as far as a look can tell."""
        if self.is_doubted or self.surprises > 1:
            return True
        return self.surprises > 0 and (self.copy is None or not _same_samples(self.live, self.copy))

    def is_unchanged(self) -> bool:
        """Whether the array equals its last copy, or its fingerprint if there is no copy."""
        if self.copy is not None:
            return _same(self.live, self.copy)
        return self._fingerprint is None or _fingerprint(self.live) == self._fingerprint

    def note_surprise(self) -> None:
        """Notes a wrong assumption. Allocates memory for later copies, because new memory takes long."""
        if not self.surprises:
            self._memory.prepare(self.live)
        self.surprises += 1


class _ArrayLeaf(Leaf):
    """A large array at one moment."""

    _copy: np.ndarray

    def __init__(self, owner: _Array, memory: _Memory) -> None:
        self._owner = owner
        self._memory = memory
        self._is_exact = False
        self._surprises = owner.surprises
        self._may_be_changed = owner.may_be_changed()
        self.size = owner.live.nbytes
        self.mark = object() if self._may_be_changed else owner

    def keep(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        owner = self._owner
        if owner.copy is not None and not self._may_be_changed:
            self._copy = owner.copy
            return []
        self._copy = owner.copy = self._memory.take(owner.live)
        self._is_exact = True
        return [(self._copy, owner.live)]

    def is_true(self) -> bool:
        if self._is_exact or self._owner.is_unchanged():
            return True
        if self._owner.surprises == self._surprises:  # otherwise an earlier look has noted the change
            self._owner.note_surprise()
        return False

    def doubt(self, doubts: bool) -> None:
        self._owner.is_doubted = doubts

    def array(self) -> np.ndarray:
        return self._copy


class _Collection:
    """A long collection that is followed from look to look.

    Attributes:
        owner: The collection.
        form: The form in which the items are written, as far as is known. `None` if they cannot be written together.
    """

    def __init__(self, items: Items) -> None:
        self.owner = items.owner
        self.form: type[_Items] | None = _Numbers if type(items.items[0]) in (int, float) else _Texts
        self._items: _Items | None = None

    def items(self, now: list[Any]) -> _Items:
        """A copy that begins with the current items. The same copy is returned while the collection only grows."""
        if self._items is None or type(self._items) is not self.form or not self._items.follow(now):
            self._items = cast(type[_Items], self.form)(now)
        return self._items

    def give_up(self) -> None:
        """Chooses another form, because the items do not have the current form."""
        is_text = self._items is not None and self.form is _Numbers and self._items.are_flat()
        self.form = _Texts if is_text else None


class _Items(abc.ABC):
    """A growing copy of the items of a collection."""

    is_text: bool

    def __init__(self, items: list[Any]) -> None:
        self._items: list[Any] = []
        self._count = 0
        self._take(items)

    def follow(self, items: list[Any]) -> bool:
        """Appends the items that were appended to a list. Returns whether the other items are unchanged."""
        self._take(items[len(self._items) :])
        try:
            return items == self._items  # fast, because Python compares identical objects by identity
        except ValueError:  # comparisons with NumPy's arrays have no truth value
            return False

    def are_flat(self) -> bool:
        """Whether each copied item holds only immutable values."""
        return all(map(is_flat, self._items))

    def _take(self, items: list[Any]) -> None:
        """Takes copies of items."""
        self._items += items

    @abc.abstractmethod
    def array(self, count: int) -> np.ndarray | None:
        """The first `count` items as an array, `None` if they do not have this form. Other threads run meanwhile."""


class _Numbers(_Items):
    """Numbers of one type."""

    is_text = False

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self._array: np.ndarray = np.empty(0)

    def array(self, count: int) -> np.ndarray | None:
        kind = type(self._items[0])
        if len(self._array) < count:
            array: np.ndarray = np.empty(2 * count, np.float64 if kind is float else np.int64)
            array[: self._count] = self._array[: self._count]
            self._array = array
        while self._count < count:
            end = min(self._count + _PIECE, count)
            piece = self._items[self._count : end]
            if set(map(type, piece)) != {kind}:
                return None
            try:
                self._array[self._count : end] = piece
            except OverflowError:
                return None
            self._count = end
            time.sleep(_PAUSE)
        return self._array[:count]


class _Texts(_Items):
    """Numbers, strings and tuples, or lists and dicts of these, as JSON."""

    is_text = True

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self._text = bytearray()
        self._ends = {0: 0}

    def _take(self, items: list[Any]) -> None:
        self._items += [each.copy() if type(each) in (list, dict) else each for each in items]

    def array(self, count: int) -> np.ndarray | None:
        if count < self._count and count not in self._ends:
            return _Texts(self._items[:count]).array(count)
        while self._count < count:
            end = min(self._count + _PIECE // 16, count)
            piece = self._items[self._count : end]
            if not all(map(is_flat, piece)):
                return None
            text, _ = dumped(structure_of(piece, lambda each: None))
            self._text += text[1:-1].encode() + b","
            self._count, self._ends[end] = end, len(self._text)
            time.sleep(_PAUSE)
        return np.frombuffer(b"[%b]" % bytes(self._text[: self._ends[count] - 1]), np.uint8)


class _ItemsLeaf(Leaf):
    """The items of a long collection at one moment.

    Attributes:
        is_text: Whether the items are written as JSON, not as an array of numbers.
    """

    def __init__(self, collection: _Collection, now: list[Any]) -> None:
        self._collection = collection
        self._items = collection.items(now)
        self._count = len(now)
        self.is_text = self._items.is_text
        self.size = 8 * self._count
        self.mark = self._items, self._count

    def is_true(self) -> bool:
        is_known = self._items.array(self._count) is not None
        if not is_known and type(self._items) is self._collection.form:
            self._collection.give_up()
        return is_known

    def array(self) -> np.ndarray:
        return cast(np.ndarray, self._items.array(self._count))


def _interface(array: np.ndarray) -> Any:
    return array.__array_interface__["data"], array.shape, array.strides, array.dtype


def _bytes_of(array: np.ndarray) -> np.ndarray:
    """The bytes of an array, without a copy if they are contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _same(array: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays have the same bytes. Other threads run meanwhile."""
    return same_bytes(_bytes_of(array), _bytes_of(other))


def _same_samples(array: np.ndarray, other: np.ndarray) -> bool:
    """Whether two large arrays have the same bytes in some places. `False` if the check would be slow."""
    if array.nbytes < _SAMPLED or not array.flags.c_contiguous:
        return False
    step = array.nbytes // _SAMPLES
    samples = [_bytes_of(each)[: step * _SAMPLES].reshape(_SAMPLES, step)[:, :_SAMPLE] for each in (array, other)]
    return bool((samples[0] == samples[1]).all())


def _fingerprint(array: np.ndarray) -> bytes:
    return blake3(_bytes_of(array).data, max_threads=blake3.AUTO).digest()
