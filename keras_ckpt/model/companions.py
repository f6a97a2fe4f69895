"""The state that this process keeps with a model or an optimizer. It ends with its owner, and is never saved."""

from __future__ import annotations

import weakref
from typing import Any, TypeVar

Kind = TypeVar("Kind")

_companions: weakref.WeakKeyDictionary[Any, dict[type, Any]] = weakref.WeakKeyDictionary()


def companion(owner: object, kind: type[Kind]) -> Kind:
    """The object of a class that accompanies a model or an optimizer; the first call creates it.

    Args:
        owner: The model or optimizer. The object must hold no reference to it, or neither is ever freed.
        kind: The class, which takes no arguments.
    """
    found = _companions.setdefault(owner, {})
    if kind not in found:
        found[kind] = kind()
    return found[kind]  # type: ignore[no-any-return]
