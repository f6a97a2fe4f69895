"""The global generators of random numbers: of Python, NumPy, TensorFlow and Keras."""

from __future__ import annotations

import numbers
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

# These have no public name: the generator of unseeded functions of keras.random, a look whether it is there, and the
# generator that seeds TensorFlow's functions where they are called eagerly.
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator
from tensorflow.python.eager import context


def get_state() -> dict[str, Any]:
    """Where each generator is, as plain values.

    Those inside of TensorFlow's own operations, such as an unseeded `tf.random.uniform` in a graph, show theirs to
    nobody. What is called eagerly is seeded by a generator, if the script has called `tf.random.set_seed`.
    """
    # A look makes no generator: Keras would draw the seed of a new one from Python's.
    generator = get_global_attribute(GLOBAL_SEED_GENERATOR)
    return {
        "keras": None if generator is None else np.asarray(generator.state),
        "tensorflow": None if (random_generator := _tensorflows()) is None else random_generator.state.numpy(),
        "operations": _of_operations(),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def set_state(state: Mapping[str, Any]) -> None:
    """Puts each generator where `get_state` found it."""
    if state["keras"] is None:
        set_global_attribute(GLOBAL_SEED_GENERATOR, None)
    else:
        global_seed_generator().state.assign(state["keras"])
    if (generator := _tensorflows()) is not None and state["tensorflow"] is not None:
        generator.state.assign(state["tensorflow"])
    if (operations := state.get("operations")) is not None:
        tf.random.set_seed(operations["seed"])
        _eager().setstate(operations["generator"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _of_operations() -> dict[str, Any] | None:
    seed = context.global_seed()
    if not isinstance(seed, numbers.Integral):
        return None
    return {"seed": int(seed), "generator": _eager().getstate()}


def _eager() -> random.Random:
    """It is there once `tf.random.set_seed` was called."""
    generator: random.Random = context.context()._rng  # noqa: SLF001
    return generator


def _tensorflows() -> tf.random.Generator | None:
    try:
        return tf.random.get_global_generator()
    except RuntimeError:
        return None  # operations are to be deterministic, and the script has not set one
