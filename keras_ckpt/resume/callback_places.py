"""The places of a callback's state: attributes, keys of dicts in attributes, attributes of its class, and slots."""

from __future__ import annotations

import collections
import random
from collections.abc import Collection
from typing import Any

import keras
import numpy as np

from keras_ckpt.model.backends import backend

_SET_BY_KERAS = {"params", "_model", "model"}
"""The attributes that Keras sets in each callback."""
_SET_AGAIN = {
    keras.callbacks.EarlyStopping: {"monitor_op", "min_delta"},
    keras.callbacks.ReduceLROnPlateau: {"monitor_op", "min_delta"},
    keras.callbacks.ModelCheckpoint: {"monitor_op"},
    keras.callbacks.CSVLogger: {"csv_file", "writer", "keys", "append", "append_header"},
}
"""The attributes that Keras sets again in each process. It would flip the sign of a restored `min_delta`."""
_KEYS = 100
"""A dict with more keys is one place."""
_CLASS, _REMOVED = "class ", "del "


def values(callback: Any, before: Collection[str]) -> dict[str, Any]:
    """The values of a callback that may be state, by place.

    A place is an attribute (`losses`), a key in dicts (`stats[best][loss]`), or an attribute of a class (`class
    Tracker.seen`). The value at `del stats` lists the places of keys that were removed from `stats`.

    Args:
        callback: The callback.
        before: The places of the callback when the training began.
    """
    again = {name for kind, names in _SET_AGAIN.items() if isinstance(callback, kind) for name in names}
    found: dict[str, Any] = {}
    for attribute, value in _attributes(callback).items():
        if attribute not in _SET_BY_KERAS | again:
            places = keyed(attribute, value, before)
            found |= places or {attribute: value}
            if removed := _removed(attribute, value, before):
                found[f"{_REMOVED}{attribute}"] = removed
    return found


def keyed(place: str, value: Any, before: Collection[str] = ()) -> dict[str, Any]:
    """The values in a dict and its inner dicts, by place.

    Returns no places if the dict is empty or large, has other keys than strings, or is in another order.
    """
    if not _has_places(value) or _is_reordered(place, value, before):
        return {}
    found: dict[str, Any] = {}
    for key, each in value.items():
        found |= keyed(f"{place}[{key}]", each, before) or {f"{place}[{key}]": each}
    return found


def restore(callback: Any, place: str, value: Any) -> None:
    """Restores the value of a place."""
    if place.startswith(_REMOVED):
        for each in value:
            _remove(callback, each)
        return
    holder, attribute, keys = callback, place, []
    if place.startswith(_CLASS):
        name, _, attribute = place.removeprefix(_CLASS).rpartition(".")
        holder = next((kind for kind in type(callback).__mro__ if kind.__qualname__ == name), type(callback))
    else:
        attribute, *keys = _parsed(place)
    if keys:
        _restore_key(callback, attribute, keys, value)
    elif not _fill(getattr(holder, attribute, None), value):
        setattr(holder, attribute, value)


def _restore_key(callback: Any, attribute: str, keys: list[str], value: Any) -> None:
    if not isinstance(getattr(callback, attribute, None), dict):
        setattr(callback, attribute, {})
    inner = getattr(callback, attribute)
    for key in keys[:-1]:
        if not isinstance(inner.get(key), dict):
            inner[key] = {}
        inner = inner[key]
    if not _fill(inner.get(keys[-1]), value):
        inner[keys[-1]] = value


def is_of_class(place: str) -> bool:
    """Whether a place is an attribute of a class."""
    return place.startswith(_CLASS)


def _attributes(callback: Any) -> dict[str, Any]:
    """The attributes of a callback, of its slots and of its class."""
    kinds = [kind for kind in type(callback).__mro__ if not kind.__module__.startswith(("keras.", "builtins"))]
    slots = {slot for kind in kinds for slot in _slots(kind) if hasattr(callback, slot)}
    of_kinds = {
        f"{_CLASS}{kind.__qualname__}.{name}": value
        for kind in kinds
        for name, value in vars(kind).items()
        if not name.startswith("__") and not hasattr(value, "__get__")  # neither methods nor properties
    }
    return {**vars(callback), **{slot: getattr(callback, slot) for slot in slots}, **of_kinds}


def _slots(kind: type) -> list[str]:
    """The names of the slots of a class, with private names mangled."""
    slots = vars(kind).get("__slots__", ())
    names = [slots] if isinstance(slots, str) else [*slots]
    own = kind.__name__.lstrip("_")
    return [f"_{own}{name}" if name.startswith("__") and not name.endswith("__") else name for name in names]


def _has_places(value: Any) -> bool:
    return type(value) is dict and 0 < len(value) <= _KEYS and all(_is_key(key) for key in value)


def _is_key(key: Any) -> bool:
    return type(key) is str and not {*"[]"} & {*key}


def _is_reordered(place: str, value: dict[str, Any], before: Collection[str]) -> bool:
    """Whether the earlier keys of a dict have another order now."""
    depth = len(_parsed(place))
    old = dict.fromkeys(_parsed(each)[depth] for each in before if each.startswith(f"{place}["))
    return [key for key in old if key in value] != [key for key in value if key in old]


def _removed(attribute: str, value: Any, before: Collection[str]) -> list[str]:
    """The places of keys that were removed from a dict."""
    found = []
    for place in before:
        if place.startswith(f"{attribute}["):
            inner = value
            for key in _parsed(place)[1:]:
                if type(inner) is not dict:
                    break  # another object replaced the dict, and is saved whole
                if key not in inner:
                    found.append(place)
                    break
                inner = inner[key]
    return found


def _remove(callback: Any, place: str) -> None:
    attribute, *keys = _parsed(place)
    inner = getattr(callback, attribute, None)
    for key in keys[:-1]:
        inner = inner.get(key) if isinstance(inner, dict) else None
    if isinstance(inner, dict):
        inner.pop(keys[-1], None)


def _parsed(place: str) -> list[str]:
    """The attribute of a place, and the keys inside the attribute."""
    return place.replace("]", "").split("[")


def _fill(target: Any, value: Any) -> bool:
    """Changes an existing object to the saved value in place, because the script may hold the object too.

    Returns:
        Whether the object could be changed.
    """
    if isinstance(target, keras.Variable):
        target.assign(value)
        return True
    if isinstance(target, backend.Variable):
        backend.assign(target, backend.tensor_of(value))
        return True
    if isinstance(target, keras.metrics.Metric):
        for variable, each in zip(target.variables, value, strict=True):
            variable.assign(each)
        return True
    # A default dict whose factory has no name is saved as a dict. The existing default dict has the factory.
    same = type(target) is type(value) or (type(target) is collections.defaultdict and type(value) is dict)
    return same and (_fill_container(target, value) or _fill_generator(target, value))


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
    """Whether an array can be assigned the values of another array."""
    return target.flags.writeable and (target.shape, target.dtype) == (value.shape, value.dtype)
