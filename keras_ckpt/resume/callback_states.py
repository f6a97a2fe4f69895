"""The states of the other callbacks of a `fit`: taken while they run, and restored in another process."""

from __future__ import annotations

import collections
import copy
import datetime
import enum
import os
import pathlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_ckpt.model.backends import backend
from keras_ckpt.model.keras_internals import layers_of
from keras_ckpt.model.parts import owners_of, tracked
from keras_ckpt.resume import callback_places
from keras_ckpt.resume.capture import Captures, Leaf, Look
from keras_ckpt.resume.plain_values import UnplainError, dict_of
from keras_ckpt.store import files
from keras_ckpt.store.tables import relative

_FIXED = (
    type,
    BaseException,
    enum.Enum,
    bytes,
    range,
    pathlib.PurePath,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    np.dtype,
    *backend.FIXED,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
)
"""An object of these classes never changes. If an attribute still refers to the object, the attribute is unchanged."""
_MODULES_OF_THE_PROCESS = {
    "_io", "io", "logging", "threading", "_thread", "queue", "_queue", "subprocess", "socket", "_socket", "concurrent",
}  # fmt: skip
"""Objects whose classes derive from classes of these modules belong to a process, and cannot be saved for another."""
_OF_A_FIT = (
    keras.Layer,
    keras.optimizers.Optimizer,
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.callbacks.Callback,
)
"""Parts of a model, and callbacks, have these classes."""


class Taken(NamedTuple):
    """The states of callbacks at one moment.

    Attributes:
        structure: The states by the names of the callbacks, as `plain_values` writes them.
        assumed: The arrays that are not part of a state, because they are assumed to be unchanged.
    """

    structure: Any
    assumed: list[Leaf]


class CallbackStates:
    """The states of callbacks.

    A callback with `get_state()` and `set_state(state)` has the state that `get_state()` returns. The state of any
    other callback holds its attributes that have changed since this object was made. The values of these attributes are
    plain values, variables or metrics. An attribute that changed back stays part of the state, because in another
    process it may differ. Each key of a dict is a separate place; `callback_places` names the places.

    Args:
        callbacks: The callbacks, after their `on_train_begin`.
        model: The model that is trained.

    Attributes:
        unsaved: The names of attributes that cannot be saved, such as `"Tracker.client"`.
    """

    def __init__(self, callbacks: Iterable[keras.callbacks.Callback], model: keras.Model | None = None) -> None:
        self._callbacks = _named(callbacks)
        self._model = model
        self._captures = Captures()
        self._initial = {
            name: self._looks(name, callback, first=True)
            for name, callback in self._callbacks.items()
            if not _has_own_state(callback)
        }
        self._changed: dict[str, set[str]] = {name: set() for name in self._initial}
        self._known: list[Any] = []
        self.unsaved: list[str] = []

    def look(self) -> None:
        """Notes which attributes have changed by now."""
        for name in self._initial:
            self._note_changed(name, self._looks(name, self._callbacks[name], without=self._changed[name]))

    def take(self) -> Taken:
        """Takes the states as they are now, by the names of the callbacks."""
        self.unsaved = []
        states: dict[str, Any] = {}
        assumed: list[Leaf] = []
        for name, callback in self._callbacks.items():
            if _has_own_state(callback):
                states[name] = self._own_state(name, callback)
                continue
            looks = self._looks(name, callback)
            self._note_changed(name, looks)
            self._note_unsaved(name, looks)
            plain = {place: look for place, look in looks.items() if isinstance(look, Look)}
            changed = {place: look.structure for place, look in plain.items() if place in self._changed[name]}
            states[name] = dict_of(changed) if changed else None
            assumed += [leaf for place in plain.keys() - changed.keys() for leaf in plain[place].leaves]
        return Taken(dict_of({name: state for name, state in states.items() if state is not None}), assumed)

    def restore(self, states: Mapping[str, Any]) -> list[str]:
        """Restores states that `take` gave, in this process or in another.

        Returns:
            The callbacks whose state was restored, for the user: a callback that saves files by their path.
        """
        known = [name for name in self._callbacks if name in states]
        for name in known:
            # A copy: the callback changes its state, and the state may be restored again.
            callback, state = self._callbacks[name], copy.deepcopy(states[name])
            if _has_own_state(callback):
                callback.set_state(state)
                continue
            for place, value in state.items():
                self._changed[name].update([place, *callback_places.keyed(place, value)])
                callback_places.restore(callback, place, value)
        return [_shown(name, self._callbacks[name]) for name in known]

    def strangers(self, states: Mapping[str, Any]) -> list[str]:
        """The names of states whose callback is not here."""
        return [name for name in states if name not in self._callbacks]

    def _looks(self, name: str, callback: Any, first: bool = False, without: Iterable[str] = ()) -> dict[str, Any]:
        """The places of a callback: a look at each plain value, or the value itself."""
        looks: dict[str, Any] = {}
        for place, value in callback_places.values(callback, [] if first else self._initial[name]).items():
            if place not in without:
                try:
                    looks[place] = self._look(value, f"{name}.{place}", first)
                except UnplainError:
                    looks[place] = value
        return looks

    def _look(self, value: Any, name: str, first: bool) -> Look:
        if isinstance(value, keras.Variable | backend.Variable):
            return self._captures.look_at_memory(*self._memory([value]))
        if isinstance(value, keras.metrics.Metric):
            return self._captures.look_at_memory(self._memory(value.variables))
        return self._captures.look(value, name, fingerprints=first)

    def _memory(self, variables: Sequence[Any]) -> list[np.ndarray]:
        """The memory of variables. It may change with the next batch."""
        values = backend.Reader(self._model, {str(place): each for place, each in enumerate(variables)}).read()
        return [backend.array_of(each) for each in values.values()]

    def _note_changed(self, name: str, looks: Mapping[str, Any]) -> None:
        initial, changed = self._initial[name], self._changed[name]
        for place, look in looks.items():
            before = initial.get(place)
            if isinstance(look, Look) and not (isinstance(before, Look) and before.mark == look.mark):
                changed.add(place)

    def _note_unsaved(self, name: str, looks: Mapping[str, Any]) -> None:
        if not _is_of_keras(self._callbacks[name]):
            initial = self._initial[name]
            unplain = {place: value for place, value in looks.items() if not isinstance(value, Look)}
            for place, value in unplain.items():
                same = initial.get(place) is value
                fixed = same and (isinstance(value, _FIXED) or callback_places.is_of_class(place))
                if not fixed and not _is_of_the_process(value) and not self._is_known(value):
                    self.unsaved.append(f"{name}.{place}")

    def _is_known(self, value: Any) -> bool:
        """Whether a value is part of the model or a callback of this fit, which the backup holds already."""
        if not isinstance(value, _OF_A_FIT):
            return False
        if not any(value is each for each in self._known):  # a search of the model is slow
            self._known += [each for each in self._parts_of_fit() if each is value][:1]
        return any(value is each for each in self._known)

    def _parts_of_fit(self) -> list[Any]:
        found = [*self._callbacks.values()]
        if self._model is not None:
            found += [*layers_of(self._model), *owners_of(self._model, tracked(self._model)).values()]
        return found

    def _own_state(self, name: str, callback: Any) -> Any:
        try:
            return self._captures.look(callback.get_state(), f"{name}.get_state()").structure
        except UnplainError as error:
            self.unsaved.append(f"{name}.get_state(){error}")
        except Exception as error:  # noqa: BLE001 - an error of a user's method does not end the training
            self.unsaved.append(f"{name}.get_state(), which raised {error!r}")
        return None


def _named(callbacks: Iterable[keras.callbacks.Callback]) -> dict[str, Any]:
    """The callbacks by class and monitor; a place in the list would shift with a new callback."""
    counts: collections.Counter[str] = collections.Counter()
    named = {}
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.ProgbarLogger):
            continue
        monitor = getattr(callback, "monitor", None)
        kind = type(callback).__name__ + (f"({monitor})" if isinstance(monitor, str) else "")
        counts[kind] += 1
        name = kind if counts[kind] == 1 else f"{kind} {counts[kind]}"
        named[name] = callback
        if isinstance(callback, keras.callbacks.CSVLogger):
            # A subclass has other attributes too.
            own = "" if type(callback) is keras.callbacks.CSVLogger else ", its file"
            named[f"{name}{own}"] = _CsvLog(callback)
    return named


def _shown(name: str, callback: Any) -> str:
    path = getattr(callback, "filepath", None)
    return f"{type(callback).__name__}({relative(path)})" if isinstance(path, str) else name


class _CsvLog:
    """The state of a `CSVLogger`: the size and the columns of its file."""

    def __init__(self, logger: keras.callbacks.CSVLogger) -> None:
        self._logger = logger

    def get_state(self) -> dict[str, Any]:
        return {"keys": self._logger.keys, "size": self._size()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        # The later lines belong to epochs that will be trained again.
        files.cut(self._logger.filename, state["size"])
        self._logger.keys = state["keys"]
        self._logger.append_header = not self._size()

    def _size(self) -> int:
        path = self._logger.filename
        return os.path.getsize(path) if os.path.exists(path) else 0


def empty_csv_file(logger: keras.callbacks.CSVLogger) -> None:
    """Empties the file of a `CSVLogger`, as the logger does when training begins."""
    files.cut(logger.filename, 0)
    logger.append_header = True


def _has_own_state(callback: Any) -> bool:
    return callable(getattr(callback, "get_state", None)) and callable(getattr(callback, "set_state", None))


def _is_of_the_process(value: Any) -> bool:
    """Whether a value is a file, a lock, a thread, a process or a writer of summaries."""
    modules = {kind.__module__.partition(".")[0] for kind in type(value).__mro__}
    return isinstance(value, backend.OF_THE_PROCESS) or not modules.isdisjoint(_MODULES_OF_THE_PROCESS)


def _is_of_keras(callback: Any) -> bool:
    return type(callback).__module__.startswith("keras.")
