"""Plain Python values as JSON and arrays, to the bit and without pickle."""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

_PLAIN = (type(None), bool, int, float, str)
LONG = 1000
"""The items of a collection of more than this may be one array on disk."""

Wrap = Callable[[Any], Any]
"""Makes of an array, or of `Items`, what stands for it in a structure; `None` has each item encoded by itself."""


class UnplainError(TypeError):
    """A value has no plain form."""


class Items(NamedTuple):
    """The items of a long collection.

    Attributes:
        owner: The collection.
        items: Its items; of a dict, its keys, or its values.
    """

    owner: Any
    items: list[Any]


def structure_of(value: Any, wrap: Wrap) -> Any:
    """A value as `json` writes it, but for what stands for arrays.

    Args:
        value: None, booleans, numbers, strings, NumPy's arrays and scalars, generators of random numbers, and lists,
            tuples, sets, deques and dicts of these.
        wrap: Called with each array, and with the items of each collection that is long and begins with a flat item.
            Returns what stands for them; `None` has each item encoded by itself.

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
        return _items(Items(value, value), where, wrap)
    if kind in _BUILDERS:
        is_dict = isinstance(value, dict)
        parts = _pairs(value, where, wrap) if is_dict else _items(Items(value, [*value]), where, wrap)
        return {kind.__name__: parts, "more": _more(value, where)}
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
                if kind is np.ndarray:
                    return {"ndarray": wrap(value), "more": []}
                return {"number": [tf.as_dtype(value.dtype).name, value.tobytes().hex()], "more": []}
    raise UnplainError(f"{where} is of type {kind.__module__}.{kind.__qualname__}")


def _items(collection: Items, where: str, wrap: Wrap) -> Any:
    """The items of a collection; those of a long one together, if they are flat."""
    items = collection.items
    if len(items) > LONG and is_flat(items[0]) and (leaf := wrap(collection)) is not None:
        return {"texts" if leaf.is_text else "list": leaf, "more": []}
    return [_encoded(each, f"{where}[{index}]", wrap) for index, each in enumerate(items)]


def _pairs(value: Mapping[Any, Any], where: str, wrap: Wrap) -> Any:
    """The items of a dict."""
    if len(value) > LONG:
        parts = [_items(Items(value, [*each]), where, wrap) for each in (value.keys(), value.values())]
        return {"pairs": parts, "more": []}
    return [[_encoded(key, where, wrap), _encoded(item, f"{where}[{key!r}]", wrap)] for key, item in value.items()]


def _more(value: Any, where: str) -> list[Any]:
    """What makes a collection beside its items."""
    if isinstance(value, collections.deque):
        return [value.maxlen]
    if not isinstance(value, collections.defaultdict):
        return []
    known = [name for name, factory in _FACTORIES.items() if factory is value.default_factory]
    if where and not known:  # elsewhere the callback has a dict that keeps its own
        factory = value.default_factory
        raise UnplainError(f"{where} is a defaultdict of {factory!r:.100}, which is not one of {', '.join(_FACTORIES)}")
    return known


def is_fixed(value: Any) -> bool:
    """Whether a value is plain and immutable: a number, a string, or a tuple of these."""
    if type(value) is tuple:
        return all(map(is_fixed, value))
    return type(value) in _PLAIN or isinstance(value, np.generic)


def is_flat(value: Any) -> bool:
    """Whether a value is fixed, or a list or a dict whose items are."""
    if type(value) is dict:
        return all(map(is_fixed, value)) and all(map(is_fixed, value.values()))
    return all(map(is_fixed, value)) if type(value) is list else is_fixed(value)


def _decoded(value: Any, arrays: Mapping[int, Any]) -> Any:
    if isinstance(value, list):
        return [_decoded(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    (kind, content), (_, more) = value.items()
    if kind == "list":
        return np.asarray(arrays[content]).tolist()
    if kind == "texts":
        return decode(bytes(np.asarray(arrays[content])).decode(), {})
    if kind == "pairs":
        keys, values = _decoded(content, arrays)
        return [*zip(keys, values, strict=True)]
    if kind == "number":
        name, data = content
        return np.frombuffer(bytes.fromhex(data), tf.as_dtype(name).as_numpy_dtype)[0]
    if kind in ("ndarray", "scalar"):  # older checkpoints have scalars as arrays
        # A copy, because what a callback holds, it may change.
        array = np.array(arrays[content])
        return array if kind == "ndarray" else array[()]
    return _NAMED[kind](_decoded(content, arrays), *more)


def _default_dict(pairs: Any, factory: str | None = None) -> dict[Any, Any]:
    return dict(pairs) if factory is None else collections.defaultdict(_FACTORIES[factory], pairs)


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
    collections.defaultdict: _default_dict,
}
_FACTORIES: dict[str, Callable[[], Any] | None] = {
    "None": None,
    **{kind.__name__: kind for kind in (int, float, str, bool, list, dict, set)},
}
_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    random.Random: (lambda generator: generator.getstate(), _python_generator),
    np.random.Generator: (lambda generator: generator.bit_generator.state, _numpy_generator),
    np.random.RandomState: (lambda generator: generator.get_state(legacy=False), _old_numpy_generator),
}
_NAMED = {kind.__name__: build for kind, build in _BUILDERS.items()}
_NAMED |= {kind.__name__: build for kind, (_, build) in _GENERATORS.items()}
