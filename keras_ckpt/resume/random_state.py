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
    """The state of each generator, as plain values.

    Generators inside TensorFlow's operations, such as an unseeded `tf.random.uniform` in a graph, have no readable
    state. A Python generator seeds operations that run eagerly, if the script has called `tf.random.set_seed`.
    """
    return {
        "keras": None if (seed := seed_of_random()) is None else np.asarray(seed),
        "tensorflow": None if (random_generator := _tensorflow_generator()) is None else random_generator.state.numpy(),
        "operations": _operations_state(),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def set_state(state: Mapping[str, Any]) -> None:
    """Sets each generator to the state that `get_state` returned."""
    set_seed_of_random(state["keras"])
    if (generator := _tensorflow_generator()) is not None and state["tensorflow"] is not None:
        generator.state.assign(state["tensorflow"])
    if (operations := state.get("operations")) is not None:
        tf.random.set_seed(operations["seed"])
        _eager_generator().setstate(operations["generator"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _operations_state() -> dict[str, Any] | None:
    """The global seed and the generator that seed TensorFlow's eager operations, `None` without a global seed."""
    seed = context.global_seed()
    if not isinstance(seed, numbers.Integral):
        return None
    return {"seed": int(seed), "generator": _eager_generator().getstate()}


def _eager_generator() -> random.Random:
    """The generator that seeds eager operations. It exists once `tf.random.set_seed` was called."""
    generator: random.Random = context.context()._rng  # noqa: SLF001
    return generator


def _tensorflow_generator() -> tf.random.Generator | None:
    """TensorFlow's global generator, `None` if operations are deterministic and the script has not set one."""
    try:
        return tf.random.get_global_generator()
    except RuntimeError:
        return None
