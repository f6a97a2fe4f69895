"""Plain Python values as JSON and arrays, exact to the bit and without pickle."""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from keras_ckpt.formats.arrays import is_number, named

_PLAIN = (type(None), bool, int, float, str)
LONG = 1000
"""A collection with more items may have them in one array on disk."""

Wrap = Callable[[Any], Any]
"""Returns a placeholder for an array or for `Items`; `None` has each item encoded separately."""


class UnplainError(TypeError):
    """A value that has no plain form."""


class Items(NamedTuple):
    """The items of a long collection.

    Attributes:
        owner: The collection.
        items: The items of the collection, or the keys or the values of a dict.
    """

    owner: Any
    items: list[Any]


def structure_of(value: Any, wrap: Wrap) -> Any:
    """A value as `json` writes it, with placeholders for arrays.

    Args:
        value: None, booleans, numbers, strings, NumPy's arrays and scalars, generators of random numbers, and lists,
            tuples, sets, deques and dicts of these.
        wrap: Called with each array, and with the items of each long collection whose first item is flat. Returns a
            placeholder; `None` has each item encoded separately.

    Raises:
        UnplainError: The value contains another type. The error names the place.
    """
    try:
        return _encoded(value, "", wrap)
    except RecursionError as error:
        raise UnplainError(" is nested too deeply, or contains itself") from error


def dict_of(structures: Mapping[str, Any]) -> Any:
    """The structure of a dict whose values have these structures."""
    return {"dict": [[key, structure] for key, structure in structures.items()], "more": []}


def dumped(structure: Any) -> tuple[str, list[Any]]:
    """A structure as JSON, and its placeholders, in the order of their numbers in the JSON text."""
    leaves: list[Any] = []

    def number(leaf: Any) -> int:
        leaves.append(leaf)
        return len(leaves) - 1

    return json.dumps(structure, default=number), leaves


def decode(text: str, arrays: Mapping[int, Any]) -> Any:
    """The value of a JSON text that `dumped` made.

    Args:
        text: The text.
        arrays: The arrays by their numbers in the text.
    """
    return _decoded(json.loads(text), arrays)


def _encoded(value: Any, where: str, wrap: Wrap) -> Any:
    # Only the exact type is plain, because a subclass may hold more than its base class.
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
    if (kind is np.ndarray or isinstance(value, np.generic)) and is_number(value.dtype):
        if kind is np.ndarray:
            return {"ndarray": wrap(value), "more": []}
        return {"number": [value.dtype.name, value.tobytes().hex()], "more": []}
    raise UnplainError(f"{where} is of type {kind.__module__}.{kind.__qualname__}")


def _items(collection: Items, where: str, wrap: Wrap) -> Any:
    """The items of a collection, in one placeholder if they are many and flat."""
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
    """The arguments of a collection's constructor besides its items."""
    if isinstance(value, collections.deque):
        return [value.maxlen]
    if not isinstance(value, collections.defaultdict):
        return []
    known = [name for name, factory in _FACTORIES.items() if factory is value.default_factory]
    if where and not known:  # where it is a callback's attribute, the next process's dict keeps its factory
        factory = value.default_factory
        raise UnplainError(f"{where} is a defaultdict of {factory!r:.100}, which is not one of {', '.join(_FACTORIES)}")
    return known


def is_fixed(value: Any) -> bool:
    """Whether a value is plain and immutable: None, a number, a string, or a tuple of these."""
    if type(value) is tuple:
        return all(map(is_fixed, value))
    return type(value) in _PLAIN or isinstance(value, np.generic)


def is_flat(value: Any) -> bool:
    """Whether a value is fixed, or is a list or a dict of fixed items."""
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
        return np.frombuffer(bytes.fromhex(data), named(name))[0]
    if kind in ("ndarray", "scalar"):  # older checkpoints have scalars as arrays
        # A copy, because a callback may change its array.
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
    if not (isinstance(kind, type) and issubclass(kind, np.random.BitGenerator)):  # a file must not choose code to run
        raise TypeError(f"{kind!r} is not a bit generator of NumPy")
    generator = np.random.Generator(kind())
    generator.bit_generator.state = state
    return generator


def _legacy_numpy_generator(state: Any) -> np.random.RandomState:
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
    np.random.RandomState: (lambda generator: generator.get_state(legacy=False), _legacy_numpy_generator),
}
_NAMED = {kind.__name__: build for kind, build in _BUILDERS.items()}
_NAMED |= {kind.__name__: build for kind, (_, build) in _GENERATORS.items()}
