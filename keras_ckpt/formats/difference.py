"""The difference between the values of two checkpoints: what changed in each layer, and by how much."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from keras_ckpt.formats import arrays
from keras_ckpt.formats.damage import damage_of
from keras_ckpt.formats.variables import Kind, Values, is_of_optimizer, values_in_bundle, values_in_file
from keras_ckpt.store.files import Folder
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.tables import Column, Shown, Table, counted, few, printable, relative

_ROWS = 40
"""The most rows of a table."""
_PIECE = 1 << 16
"""The elements that are compared at once: their copies stay in the processor's caches."""
_TINY = 1e-24
"""A smaller sum of squares may have lost elements whose squares are too small for their type."""


@dataclasses.dataclass(frozen=True)
class LayerDifference:
    """The difference of one layer between two checkpoints `a` and `b`.

    Example:

    ```python
    for layer in keras_ckpt.diff(runs[40], runs[120]).layers:
        print(layer.name, layer.change, layer.frozen)
    ```

    Attributes:
        name: The name of the layer.
        change: The norm of `b - a` in relation to the norm of `a`, over all elements of the layer that are finite in
            both; infinite if `a` is zero. `None` for a layer of integers, booleans or strings.
        largest: The largest absolute change of one element, `None` as for `change`. A complex number counts as its two
            parts.
        changed: The fraction of the elements that differ.
        not_finite: The number of elements that are NaN or infinite in `a` or `b`. `None` if the layer was not read,
            because both checkpoints share its file.
        frozen: Whether all elements are equal to the bit.
    """

    name: str
    change: float | None
    largest: float | None
    changed: float
    not_finite: int | None
    frozen: bool


@dataclasses.dataclass(frozen=True, repr=False)
class Difference(Shown):
    """The result of `diff`: a table in a terminal and in a notebook.

    Example:

    ```python
    found = keras_ckpt.diff(runs[40], runs[120])
    print(found)
    frozen = [layer.name for layer in found.layers if layer.frozen]
    ```

    Attributes:
        a: The path of the first checkpoint, or the name of the model.
        b: The same of the second.
        layers: The layers with variables in both, the largest change first.
        only_in_a: The names of variables that only the first has.
        only_in_b: The names of variables that only the second has.
        mismatched: The variables whose shape or type differs, each with both. They are not compared.
    """

    a: str
    b: str
    layers: tuple[LayerDifference, ...]
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    mismatched: Mapping[str, str]

    @property
    def identical(self) -> bool:
        """Whether both have the same variables with the same values, to the bit."""
        return not (self.only_in_a or self.only_in_b or self.mismatched) and all(each.frozen for each in self.layers)

    def _table(self) -> Table:
        rows = self.layers[:_ROWS]
        columns = (
            Column("layer", tuple(printable(each.name) for each in rows), words=True),
            Column("|b-a|/|a|", tuple("" if each.frozen else _number(each.change) for each in rows)),
            Column("largest", tuple("" if each.frozen else _number(each.largest) for each in rows), rank=2),
            Column("changed", tuple("frozen" if each.frozen else _percent(each.changed) for each in rows), rank=1),
            Column("NaN or inf", tuple(str(each.not_finite or "") for each in rows), rank=1),
        )
        colors = tuple("red" if each.not_finite else "" for each in rows)
        used = tuple(column for column in columns if any(column.cells))
        return Table(printable(f"a: {self.a}, b: {self.b}"), used, tuple(self._notes()), colors)

    def _notes(self) -> Iterable[str]:
        frozen = sum(each.frozen for each in self.layers)
        hidden = f", {len(self.layers) - _ROWS} of them not shown" if len(self.layers) > _ROWS else ""
        equal = ": the weights are identical" if self.identical else ""
        yield f"{counted(len(self.layers), 'layer')}, {frozen} frozen{hidden}{equal}"
        if self.only_in_a:
            yield f"only in a: {few(self.only_in_a)}"
        if self.only_in_b:
            yield f"only in b: {few(self.only_in_b)}"
        for name, kinds in self.mismatched.items():
            yield printable(f"not compared: {name} is {kinds}")


class Side(NamedTuple):
    """One of two sets of values to compare.

    Attributes:
        title: The path of the checkpoint, or the name of the model.
        is_file: Whether the names are those of a file of Keras.
        kinds: The types and shapes of the values by name.
        weights: The names of the model's own.
        read: Reads a value.
        places: The places of values in files, as `Values` has them.
        as_file: The same values by the names of a file of Keras.
    """

    title: str
    is_file: bool
    kinds: Mapping[str, Kind]
    weights: Collection[str]
    read: Callable[[str], np.ndarray]
    places: Mapping[str, tuple[str, int]]
    as_file: Callable[[], Side]

    def names(self, optimizer: bool) -> list[str]:
        """The names of the values to compare."""
        own = frozenset(self.weights)
        return [name for name in self.kinds if name in own or (optimizer and is_of_optimizer(name))]


def open_side(checkpoint: object, keep_open: contextlib.ExitStack) -> Side:
    """The values of a checkpoint, readable until `keep_open` is closed, even if the checkpoint is removed meanwhile.

    Raises:
        DamagedCheckpointError: The checkpoint cannot be trusted.
        CheckpointNotFoundError: There is no such checkpoint.
    """

    def read(files: Folder, name: str, record: CheckpointRecord | None) -> Side:
        prefix = relative(os.path.join(files.path, name))
        is_file = bool(files.series.template)
        values = (values_in_file if is_file else values_in_bundle)(files, name, record)

        def as_file() -> Side:
            from keras_ckpt.formats.keras_export import keras_content  # others need no h5py

            content = keras_content(files, name, record)
            weights = [path for path in content.kinds if not is_of_optimizer(path)]
            return Side(prefix, True, content.kinds, weights, content.read, {}, as_file)

        read_value = functools.partial(_read, prefix, values, files)
        return Side(prefix, is_file, values.kinds, values.own, read_value, values.places, as_file)

    return read_checkpoint(checkpoint, read, keep_open)


def _read(prefix: str, values: Values, files: Folder, name: str) -> np.ndarray:
    with damage_of(prefix):
        return values.read(files, name)


def difference(a: Side, b: Side, optimizer: bool) -> Difference:
    """Compares two sets of values by name.

    Args:
        a: The first.
        b: The second.
        optimizer: Whether to compare the values of optimizers too.

    Raises:
        DamagedCheckpointError: A value cannot be read.
        ValueError: One has the names of a file of Keras, and the other cannot give these names.
    """
    if a.is_file != b.is_file:
        a, b = a if a.is_file else a.as_file(), b if b.is_file else b.as_file()
    here, there = a.names(optimizer), b.names(optimizer)
    common = sorted({*here} & {*there})
    mismatched = {
        name: f"{_kind(a, name)} in a, {_kind(b, name)} in b"
        for name in common
        if not _are_comparable(a.kinds[name], b.kinds[name])
    }
    layers: dict[str, list[str]] = collections.defaultdict(list)
    for name in common:
        if name not in mismatched:
            layers[_layer(name)].append(name)
    found = [_of_layer(layer, names, a, b) for layer, names in layers.items()]
    return Difference(
        a.title,
        b.title,
        tuple(sorted(found, key=lambda each: (each.frozen, -(each.change or 0), -each.changed))),
        tuple(name for name in here if name not in b.kinds),
        tuple(name for name in there if name not in a.kinds),
        mismatched,
    )


def _are_comparable(a: Kind, b: Kind) -> bool:
    """Whether two values have one type and one shape. Integers may differ in type, because backends count in others."""
    return a == b or (a.shape == b.shape and a.dtype.kind in "iu" and b.dtype.kind in "iu")


def _kind(side: Side, name: str) -> str:
    kind = side.kinds[name]
    return f"{kind.dtype} {kind.shape}"


def _layer(name: str) -> str:
    """The layer of a variable: the name without its last part, and without the words that all names have."""
    place = f"/{name}".rpartition("/vars/")[0] or name.rpartition("/")[0]
    return place.lstrip("/").removeprefix("model/") or name


def _of_layer(layer: str, names: Sequence[str], a: Side, b: Side) -> LayerDifference:
    if all(name in a.places and a.places[name] == b.places.get(name) for name in names):
        numbers = any(arrays.is_floating(a.kinds[name].dtype) for name in names)
        return LayerDifference(layer, 0.0 if numbers else None, 0.0 if numbers else None, 0.0, None, True)
    total = _Sums()
    for name in names:
        total.add(a.read(name), b.read(name))
    return LayerDifference(
        layer,
        total.change,
        total.largest if total.has_floats else None,
        total.changed / total.size if total.size else 0.0,
        total.not_finite,
        not total.changed,
    )


class _Sums:
    """The sums over the elements of a layer.

    Attributes:
        size: The number of elements.
        changed: The number of elements whose bits differ.
        not_finite: The number of elements that are not finite in either.
        largest: The largest absolute difference of finite elements.
        has_floats: Whether there are elements with fractions.
    """

    def __init__(self) -> None:
        self.size = self.changed = self.not_finite = 0
        self.largest = self._before = self._moved = 0.0
        self.has_floats = False

    @property
    def change(self) -> float | None:
        """The norm of the difference in relation to the norm of the first, `None` without elements with fractions."""
        if not self.has_floats:
            return None
        if not self._before:
            return math.inf if self._moved else 0.0
        return math.sqrt(self._moved / self._before)

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Adds the elements of two arrays of one shape, and of one type or of two types of integers."""
        if a.dtype != b.dtype:
            a, b = a.astype(np.int64), b.astype(np.int64)
        floats = arrays.is_floating(a.dtype)
        self.has_floats |= floats
        a, b = _parts(a), _parts(b)
        self.size += len(a)
        # The memory of the copies is used again, because new memory costs as much as the comparison.
        room = np.empty((2, min(len(a), _PIECE)), np.result_type(a.dtype, np.float32) if floats else np.float32)
        with np.errstate(all="ignore"):
            for at in range(0, len(a), _PIECE):
                piece, other = a[at : at + _PIECE], b[at : at + _PIECE]
                changed = int(np.count_nonzero(_bits(piece) != _bits(other)))
                self.changed += changed
                if floats:
                    self._add_floats(piece, other, room[:, : len(piece)], changed)

    def _add_floats(self, a: np.ndarray, b: np.ndarray, room: np.ndarray, changed: int) -> None:
        wide, moves = room
        wide[:], moves[:] = a, b
        moves -= wide
        before, moved = _squares(wide), _squares(moves) if changed else 0.0
        if not math.isfinite(before + moved):
            a, b = a.astype(np.float64), b.astype(np.float64)
            finite = np.isfinite(a) & np.isfinite(b)
            self.not_finite += len(a) - int(np.count_nonzero(finite))
            moves = b[finite] - a[finite]
            before, moved = _squares(a[finite]), _squares(moves)
        self._before += before
        self._moved += moved
        if changed and len(moves):
            self.largest = max(self.largest, float(moves.max()), -float(moves.min()))


def _parts(array: np.ndarray) -> np.ndarray:
    """The elements in a row, complex numbers as their two parts."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat


def _bits(elements: np.ndarray) -> np.ndarray:
    """The bits of elements as whole numbers, which compare NaN too. Strings are compared as they are."""
    return elements if elements.dtype == object else elements.view(f"u{elements.dtype.itemsize}")


def _squares(elements: np.ndarray) -> float:
    """The sum of the squares of elements. Where the type is too small for the squares, a larger type has them."""
    found = float(np.dot(elements, elements))
    return found if _TINY < found < math.inf else float(np.square(elements, dtype=np.float64).sum())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _percent(fraction: float) -> str:
    """A fraction in percent. A small fraction is not shown as nothing, and no part as the whole."""
    shown = f"{fraction:.1%}".replace(".0%", "%")
    if shown == "0%":
        return "<0.1%"
    return ">99.9%" if shown == "100%" and fraction < 1 else shown
