"""The global generators of random numbers: of Python, NumPy, TensorFlow and Keras."""

from __future__ import annotations

import numbers
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

# The generator that seeds TensorFlow's functions where they are called eagerly has no public name.
from tensorflow.python.eager import context

from keras_ckpt.model.keras_internals import seed_of_random, set_seed_of_random


def get_state() -> dict[str, Any]:
    """Where each generator is, as plain values.

    Those inside of TensorFlow's own operations, such as an unseeded `tf.random.uniform` in a graph, show theirs to
    nobody. What is called eagerly is seeded by a generator, if the script has called `tf.random.set_seed`.
    """
    return {
        "keras": None if (seed := seed_of_random()) is None else np.asarray(seed),
        "tensorflow": None if (random_generator := _tensorflows()) is None else random_generator.state.numpy(),
        "operations": _of_operations(),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def set_state(state: Mapping[str, Any]) -> None:
    """Puts each generator where `get_state` found it."""
    set_seed_of_random(state["keras"])
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
