"""JAX has no savers of its own: Orbax is among the savers of each backend."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import jax
import keras
from savers import Saver

VERSION = jax.__version__
SAVERS: dict[str, Saver] = {}


def restores(model: keras.Model, other: keras.Model, path: pathlib.Path) -> dict[str, Callable[[], object]]:
    """There are none."""
    return {}
