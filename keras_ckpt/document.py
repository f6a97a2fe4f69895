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
LONG = 1000
"""A list of more numbers than this may be an array on disk."""

Wrap = Callable[[Any], Any]
"""Makes of an array, or of a long list, what stands for it in a structure; `None` leaves a list as it is."""


class UnplainError(TypeError):
    """A value has no plain form."""


def structure_of(value: Any, wrap: Wrap) -> Any:
    """A value as `json` writes it, but for what stands for arrays.

    Args:
        value: None, booleans, numbers, strings, NumPy's arrays and scalars, generators of random numbers, and lists,
            tuples, sets, deques and dicts of these.
        wrap: Called with each array, and with each list that is long and begins with a number. Returns what stands for
            it; `None` leaves a list as it is.

    Raises:
        UnplainError: There is something else in it; the place is named.
    """
    try:
        return _encoded(value, "", wrap)
    except RecursionError as error:
        raise UnplainError(" is too deep, or in itself") from error


def dict_of(structures: Mapping[str, Any]) -> Any:
    """The structure of a dict whose values have these structures."""
    return {"dict": [[key, structure] for key, structure in structures.items()], "more": []}


def dumped(structure: Any) -> tuple[str, list[Any]]:
    """A structure as JSON, and what stands for arrays in it, by the numbers that the text has for them."""
    leaves: list[Any] = []

    def number(leaf: Any) -> int:
        leaves.append(leaf)
        return len(leaves) - 1

    return json.dumps(structure, default=number), leaves


def decode(text: str, arrays: Mapping[int, Any]) -> Any:
    """The value of a text that `dumped` made.

    Args:
        text: The text.
        arrays: The arrays by the numbers that the text has for them.
    """
    return _decoded(json.loads(text), arrays)


def _encoded(value: Any, where: str, wrap: Wrap) -> Any:
    # Of the very type: a subclass may hold more than its base shows.
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is list:
        if len(value) > LONG and type(value[0]) in (int, float) and (leaf := wrap(value)) is not None:
            return {"list": leaf, "more": []}
        return [_encoded(each, f"{where}[{index}]", wrap) for index, each in enumerate(value)]
    if kind in _BUILDERS:
        more = [value.maxlen] if kind is collections.deque else []
        return {kind.__name__: _parts(value, where, wrap), "more": more}
    if kind in _GENERATORS:
        read, _ = _GENERATORS[kind]
        return {kind.__name__: _encoded(read(value), where, wrap), "more": []}
    if kind is np.ndarray or isinstance(value, np.generic):
        try:
            tf.as_dtype(value.dtype)
        except TypeError:
            pass
        else:
            if value.dtype.kind not in "OSU":
                return {"ndarray" if kind is np.ndarray else "scalar": wrap(np.asarray(value)), "more": []}
    raise UnplainError(f"{where} is of type {kind.__module__}.{kind.__qualname__}")


def _parts(value: Any, where: str, wrap: Wrap) -> list[Any]:
    """The items of a collection; of a dict, pairs."""
    if not isinstance(value, dict):
        return [_encoded(each, where, wrap) for each in value]
    return [[_encoded(key, where, wrap), _encoded(item, f"{where}[{key!r}]", wrap)] for key, item in value.items()]


def _decoded(value: Any, arrays: Mapping[int, Any]) -> Any:
    if isinstance(value, list):
        return [_decoded(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    (kind, content), (_, more) = value.items()
    if kind == "list":
        return np.asarray(arrays[content]).tolist()
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
