"""What the other callbacks of a `fit` know: taken while they run, put back into those of another process."""

from __future__ import annotations

import collections
import copy
import datetime
import enum
import os
import pathlib
import types
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from blake3 import blake3

from keras_ckpt import files
from keras_ckpt.document import UnplainError, encode

_NOT_STATE = {"params", "_model", "model", "monitor_op", "min_delta"}
"""What Keras's callbacks set in each process anew; of a stored `min_delta` they would turn the sign once more."""
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
    tf.DType,
    tf.Tensor,
    tf.data.Dataset,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
)
"""Of these an object stays what it is, so that one that is still there has not changed."""


class CallbackStates:
    """The states of callbacks.

    A callback that has `get_state()` and `set_state(state)` is asked. Of any other the attributes are looked at: those
    that changed since this object was made are its state, as far as they are plain values, variables or metrics; also
    those that changed back, for in another process they may have changed by the time when they are put back.

    Args:
        callbacks: The callbacks, before their `on_train_begin`.

    Attributes:
        unsaved: Names of what cannot be saved, such as `"Tracker.client"`.
    """

    def __init__(self, callbacks: Iterable[keras.callbacks.Callback]) -> None:
        self._callbacks = _named(callbacks)
        self._begun = {
            name: {attribute: _mark(value) for attribute, value in _attributes(callback).items()}
            for name, callback in self._callbacks.items()
            if not _has_own_state(callback)
        }
        self._moved: dict[str, set[str]] = {name: set() for name in self._begun}
        self.unsaved: list[str] = []

    def look(self) -> None:
        """Notes what has changed by now."""
        for name, moved in self._moved.items():
            for attribute, value in _attributes(self._callbacks[name]).items():
                if attribute not in moved and self._is_another(name, attribute, _mark(value)):
                    moved.add(attribute)

    def take(self) -> dict[str, Any]:
        """The states as they are now, by the names of the callbacks that have one."""
        self.unsaved = []
        states = {name: self._state(name, callback) for name, callback in self._callbacks.items()}
        return {name: state for name, state in states.items() if state is not None}

    def put_back(self, states: Mapping[str, Any]) -> list[str]:
        """Puts states back that `take` gave, in this process or in another.

        Returns:
            The names of those that got theirs.
        """
        known = [name for name in self._callbacks if name in states]
        for name in known:
            # A copy: the callback goes on to change it, and it may be put back once more.
            callback, state = self._callbacks[name], copy.deepcopy(states[name])
            if _has_own_state(callback):
                callback.set_state(state)
                continue
            self._moved[name].update(state)
            for attribute, value in state.items():
                if not _fill(getattr(callback, attribute, None), value):
                    setattr(callback, attribute, value)
        return known

    def strangers(self, states: Mapping[str, Any]) -> list[str]:
        """The names in the states that no callback here has."""
        return [name for name in states if name not in self._callbacks]

    def _state(self, name: str, callback: Any) -> Any:
        if _has_own_state(callback):
            return self._own_state(name, callback)
        return self._changed(name, callback) or None

    def _changed(self, name: str, callback: Any) -> dict[str, Any]:
        begun, moved = self._begun[name], self._moved[name]
        changed = {}
        for attribute, value in _attributes(callback).items():
            mark = _mark(value)
            if isinstance(mark, _Digest):
                if attribute in moved or self._is_another(name, attribute, mark):
                    moved.add(attribute)
                    changed[attribute] = _plain(value)
            elif not _is_kerass(callback) and not (isinstance(value, _FIXED) and begun.get(attribute) is value):
                self.unsaved.append(f"{name}.{attribute}")
        return changed

    def _is_another(self, name: str, attribute: str, mark: Any) -> bool:
        """Whether a plain value is another than at the beginning."""
        before = self._begun[name].get(attribute)
        return isinstance(mark, _Digest) and not (isinstance(before, _Digest) and before == mark)

    def _own_state(self, name: str, callback: Any) -> Any:
        try:
            state = callback.get_state()
            encode(state)
        except UnplainError as error:
            self.unsaved.append(f"{name}.get_state(){error}")
            return None
        except Exception as error:  # noqa: BLE001 - it is somebody else's, and no reason to end a training
            self.unsaved.append(f"{name}.get_state(), which raised {error!r}")
            return None
        return state


def _named(callbacks: Iterable[keras.callbacks.Callback]) -> dict[str, Any]:
    """The callbacks by their classes and what they monitor; not by their places, which a new one would shift."""
    counts: collections.Counter[str] = collections.Counter()
    named = {}
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.ProgbarLogger):
            continue
        monitor = getattr(callback, "monitor", None)
        kind = type(callback).__name__ + (f"({monitor})" if isinstance(monitor, str) else "")
        counts[kind] += 1
        name = kind if counts[kind] == 1 else f"{kind} {counts[kind]}"
        named[name] = _CsvLog(callback) if type(callback) is keras.callbacks.CSVLogger else callback
    return named


class _CsvLog:
    """The state of a `CSVLogger`: what it has written."""

    def __init__(self, logger: keras.callbacks.CSVLogger) -> None:
        self._logger = logger

    def get_state(self) -> dict[str, Any]:
        return {"keys": self._logger.keys, "size": self._size()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        # Lines of epochs that will come again.
        files.cut(self._logger.filename, state["size"])
        self._logger.keys = state["keys"]
        self._logger.append_header = not self._size()

    def _size(self) -> int:
        path = self._logger.filename
        return os.path.getsize(path) if os.path.exists(path) else 0


def keep_csv_logs(callbacks: Iterable[keras.callbacks.Callback]) -> list[keras.callbacks.CSVLogger]:
    """Keeps each `CSVLogger` from emptying its file at the beginning of a training that is gone on with.

    Returns:
        Those whose `append` was set for it.
    """
    loggers = [each for each in callbacks if isinstance(each, keras.callbacks.CSVLogger) and not each.append]
    for logger in loggers:
        logger.append = True
    return loggers


def _has_own_state(callback: Any) -> bool:
    return callable(getattr(callback, "get_state", None)) and callable(getattr(callback, "set_state", None))


def _is_kerass(callback: Any) -> bool:
    return type(callback).__module__.startswith("keras.")


def _attributes(callback: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(callback).items() if name not in _NOT_STATE}


def _plain(value: Any) -> Any:
    """What is saved of an attribute."""
    if isinstance(value, keras.Variable | tf.Variable):
        return value.numpy()
    if isinstance(value, keras.metrics.Metric):
        return [each.numpy() for each in value.variables]
    return value


def _fill(target: Any, value: Any) -> bool:
    """Changes an object that is there into what was saved of it, because the script may hold it too.

    Returns:
        Whether it is one that can be changed.
    """
    if isinstance(target, keras.Variable | tf.Variable):
        target.assign(value)
    elif isinstance(target, keras.metrics.Metric):
        for variable, each in zip(target.variables, value, strict=True):
            variable.assign(each)
    elif isinstance(target, dict | set) and isinstance(value, dict | set):
        target.clear()
        target.update(value)
    elif isinstance(target, list | collections.deque) and isinstance(value, list | collections.deque):
        target.clear()
        target.extend(value)
    else:
        return False
    return True


def _mark(value: Any) -> Any:
    """Something by which a value is known again after it was changed in its place; itself if it is not plain."""
    try:
        text, arrays = encode(_plain(value))
    except UnplainError:
        return value
    hasher = blake3(text.encode())
    for array in arrays:
        hasher.update(f"{array.dtype} {array.shape}".encode())
        hasher.update(array.tobytes())
    return _Digest(hasher.digest())


class _Digest(bytes):
    """That of a plain value; bytes of a callback's own are none."""
