"""What the other callbacks of a `fit` know: taken while they run, put back into those of another process."""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import datetime
import enum
import io
import logging
import os
import pathlib
import random
import socket
import subprocess
import threading
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_ckpt import files
from keras_ckpt.capture import Captures, Leaf, Look
from keras_ckpt.document import UnplainError, dict_of

_OF_KERAS = {"params", "_model", "model"}
"""The attributes that Keras sets in each callback."""
_NOT_STATE = {*_OF_KERAS, "monitor_op", "min_delta"}
"""Keras's callbacks set these in each process again. They would turn the sign of a stored `min_delta` once more."""
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
_OF_THE_PROCESS = (
    io.IOBase,
    logging.Logger,
    threading.Thread,
    type(threading.Lock()),
    type(threading.RLock()),
    subprocess.Popen,
    socket.socket,
    concurrent.futures.Executor,
    tf.summary.SummaryWriter,
)
"""Objects of these classes belong to a process, and cannot be saved for another."""


class Taken(NamedTuple):
    """The states of callbacks at one moment.

    Attributes:
        structure: The states by the names of the callbacks, as `document` writes them.
        assumed: The arrays that are not part of a state, because they are assumed to be unchanged.
    """

    structure: Any
    assumed: list[Leaf]


class CallbackStates:
    """The states of callbacks.

    A callback that has `get_state()` and `set_state(state)` is asked. The state of any other callback is made of its
    attributes: of those that have changed since this object was made and are plain values, variables or metrics. An
    attribute that changed back stays part of the state, because in another process it may have changed by then.

    Args:
        callbacks: The callbacks, after their `on_train_begin`.

    Attributes:
        unsaved: Names of what cannot be saved, such as `"Tracker.client"`.
    """

    def __init__(self, callbacks: Iterable[keras.callbacks.Callback]) -> None:
        self._callbacks = _named(callbacks)
        self._captures = Captures()
        self._begun = {
            name: self._looks(name, callback, first=True)
            for name, callback in self._callbacks.items()
            if not _has_own_state(callback)
        }
        self._moved: dict[str, set[str]] = {name: set() for name in self._begun}
        self.unsaved: list[str] = []

    def look(self) -> None:
        """Notes what has changed by now."""
        for name in self._begun:
            self._note_moved(name, self._looks(name, self._callbacks[name], without=self._moved[name]))

    def take(self) -> Taken:
        """The states as they are now, by the names of the callbacks that have one."""
        self.unsaved = []
        states: dict[str, Any] = {}
        assumed: list[Leaf] = []
        for name, callback in self._callbacks.items():
            if _has_own_state(callback):
                states[name] = self._own_state(name, callback)
                continue
            looks = self._looks(name, callback)
            self._note_moved(name, looks)
            self._note_unsaved(name, looks)
            plain = {attribute: look for attribute, look in looks.items() if isinstance(look, Look)}
            moved = {attribute: look.structure for attribute, look in plain.items() if attribute in self._moved[name]}
            states[name] = dict_of(moved) if moved else None
            assumed += [leaf for attribute in plain.keys() - moved.keys() for leaf in plain[attribute].leaves]
        return Taken(dict_of({name: state for name, state in states.items() if state is not None}), assumed)

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

    def _looks(self, name: str, callback: Any, first: bool = False, without: Iterable[str] = ()) -> dict[str, Any]:
        """The attributes of a callback: a look at each that is plain, the value of each other."""
        looks: dict[str, Any] = {}
        for attribute, value in vars(callback).items():
            if attribute not in without and attribute not in (_NOT_STATE if _is_kerass(callback) else _OF_KERAS):
                try:
                    looks[attribute] = self._look(value, f"{name}.{attribute}", first)
                except UnplainError:
                    looks[attribute] = value
        return looks

    def _look(self, value: Any, name: str, first: bool) -> Look:
        if isinstance(value, keras.Variable | tf.Variable):
            return self._captures.look_at_copies(_value(value))
        if isinstance(value, keras.metrics.Metric):
            return self._captures.look_at_copies([_value(each) for each in value.variables])
        return self._captures.look(value, name, fingerprints=first)

    def _note_moved(self, name: str, looks: Mapping[str, Any]) -> None:
        begun, moved = self._begun[name], self._moved[name]
        for attribute, look in looks.items():
            before = begun.get(attribute)
            if isinstance(look, Look) and not (isinstance(before, Look) and before.mark == look.mark):
                moved.add(attribute)

    def _note_unsaved(self, name: str, looks: Mapping[str, Any]) -> None:
        if not _is_kerass(self._callbacks[name]):
            begun = self._begun[name]
            unplain = {attribute: value for attribute, value in looks.items() if not isinstance(value, Look)}
            for attribute, value in unplain.items():
                fixed = isinstance(value, _FIXED) and begun.get(attribute) is value
                if not fixed and not isinstance(value, _OF_THE_PROCESS):
                    self.unsaved.append(f"{name}.{attribute}")

    def _own_state(self, name: str, callback: Any) -> Any:
        try:
            return self._captures.look(callback.get_state(), f"{name}.get_state()").structure
        except UnplainError as error:
            self.unsaved.append(f"{name}.get_state(){error}")
        except Exception as error:  # noqa: BLE001 - it is somebody else's, and no reason to end a training
            self.unsaved.append(f"{name}.get_state(), which raised {error!r}")
        return None


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


def _value(variable: Any) -> np.ndarray:
    """The value of a variable. TensorFlow copies it before the variable changes, for as long as it is held."""
    return np.asarray(variable.value if isinstance(variable, keras.Variable) else variable.value())


def _fill(target: Any, value: Any) -> bool:
    """Changes an object that is there into what was saved of it, because the script may hold it too.

    Returns:
        Whether it is one that can be changed.
    """
    if isinstance(target, keras.Variable | tf.Variable):
        target.assign(value)
        return True
    if isinstance(target, keras.metrics.Metric):
        for variable, each in zip(target.variables, value, strict=True):
            variable.assign(each)
        return True
    return type(target) is type(value) and (_fill_container(target, value) or _fill_generator(target, value))


def _fill_container(target: Any, value: Any) -> bool:
    if isinstance(target, np.ndarray) and _can_hold(target, value):
        target[...] = value
    elif isinstance(target, dict | set):
        target.clear()
        target.update(value)
    elif isinstance(target, list) or (isinstance(target, collections.deque) and target.maxlen == value.maxlen):
        target.clear()
        target.extend(value)
    else:
        return False
    return True


def _fill_generator(target: Any, value: Any) -> bool:
    if isinstance(target, random.Random):
        target.setstate(value.getstate())
    elif isinstance(target, np.random.Generator) and type(target.bit_generator) is type(value.bit_generator):
        target.bit_generator.state = value.bit_generator.state
    else:
        return False
    return True


def _can_hold(target: np.ndarray, value: np.ndarray) -> bool:
    """Whether an array can have the values of another."""
    return target.flags.writeable and (target.shape, target.dtype) == (value.shape, value.dtype)
