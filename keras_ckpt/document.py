"""Plain Python values as JSON and arrays, to the bit and without pickle."""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

_PLAIN = (type(None), bool, int, float, str)


class UnplainError(TypeError):
    """A value has no plain form."""


def encode(value: Any) -> tuple[str, list[np.ndarray]]:
    """A value as JSON, and the arrays in it.

    Args:
        value: None, booleans, numbers, strings, NumPy's arrays and scalars, generators of random numbers, and lists,
            tuples, sets, deques and dicts of these.

    Raises:
        UnplainError: There is something else in it; the place is named.
    """
    arrays: list[np.ndarray] = []
    try:
        return json.dumps(_encoded(value, "", arrays)), arrays
    except RecursionError as error:
        raise UnplainError(" is too deep, or in itself") from error


def decode(text: str, arrays: Mapping[int, Any]) -> Any:
    """The value of which `encode` made the text and the arrays."""
    return _decoded(json.loads(text), arrays)


def _encoded(value: Any, where: str, arrays: list[np.ndarray]) -> Any:
    # Of the very type: a subclass may hold more than its base shows.
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        return [_encoded(each, f"{where}[{index}]", arrays) for index, each in enumerate(value)]
    if kind in _BUILDERS:
        more = [value.maxlen] if kind is collections.deque else []
        return {kind.__name__: _parts(value, where, arrays), "more": more}
    if kind in _GENERATORS:
        read, _ = _GENERATORS[kind]
        return {kind.__name__: _encoded(read(value), where, arrays), "more": []}
    if kind is np.ndarray or isinstance(value, np.generic):
        try:
            tf.as_dtype(value.dtype)
        except TypeError:
            pass
        else:
            if value.dtype.kind not in "OSU":
                arrays.append(np.asarray(value))
                return {"ndarray" if kind is np.ndarray else "scalar": len(arrays) - 1, "more": []}
    raise UnplainError(f"{where} is of type {kind.__module__}.{kind.__qualname__}")


def _parts(value: Any, where: str, arrays: list[np.ndarray]) -> list[Any]:
    """The items of a collection; of a dict, pairs."""
    if not isinstance(value, dict):
        return [_encoded(each, where, arrays) for each in value]
    return [[_encoded(key, where, arrays), _encoded(item, f"{where}[{key!r}]", arrays)] for key, item in value.items()]


def _decoded(value: Any, arrays: Mapping[int, Any]) -> Any:
    if isinstance(value, list):
        return [_decoded(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    (kind, content), (_, more) = value.items()
    if kind in ("ndarray", "scalar"):
        # A copy, because what a callback holds, it may change.
        array = np.array(arrays[content])
        return array if kind == "ndarray" else array[()]
    return _NAMED[kind](_decoded(content, arrays), *more)


def _python_generator(state: Any) -> random.Random:
    generator = random.Random()  # noqa: S311
    generator.setstate(state)
    return generator


def _numpy_generator(state: Any) -> np.random.Generator:
    kind = getattr(np.random, state["bit_generator"])
    if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):  # a file must not choose what runs
        raise TypeError(f"{kind!r} is no generator of NumPy's")
    generator = np.random.Generator(kind())
    generator.bit_generator.state = state
    return generator


def _old_numpy_generator(state: Any) -> np.random.RandomState:
    generator = np.random.RandomState()
    generator.set_state(state)
    return generator


_BUILDERS: dict[type, Callable[..., Any]] = {
    tuple: tuple,
    set: set,
    dict: dict,
    collections.deque: collections.deque,
    collections.OrderedDict: collections.OrderedDict,
    collections.Counter: lambda pairs: collections.Counter(dict(pairs)),
    collections.defaultdict: dict,  # what makes its missing values is the script's
}
_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    random.Random: (lambda generator: generator.getstate(), _python_generator),
    np.random.Generator: (lambda generator: generator.bit_generator.state, _numpy_generator),
    np.random.RandomState: (lambda generator: generator.get_state(legacy=False), _old_numpy_generator),
}
_NAMED = {kind.__name__: build for kind, build in _BUILDERS.items()}
_NAMED |= {kind.__name__: build for kind, (_, build) in _GENERATORS.items()}
