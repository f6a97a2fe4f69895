"""The global generators of random numbers: of Python, NumPy, TensorFlow and Keras."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

# Unseeded functions of keras.random draw from a generator that has no public name.
from keras.src.random.seed_generator import global_seed_generator


def get_state() -> dict[str, Any]:
    """Where each generator is, as plain values.

    Those inside of TensorFlow's own operations, such as an unseeded `tf.random.uniform`, show theirs to nobody.
    """
    # Python's last: where Keras's is made only now, it is made of a number that is drawn from Python's.
    return {
        "keras": np.asarray(global_seed_generator().state),
        "tensorflow": None if (generator := _tensorflows()) is None else generator.state.numpy(),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }


def set_state(state: Mapping[str, Any]) -> None:
    """Puts each generator where `get_state` found it."""
    global_seed_generator().state.assign(state["keras"])
    if (generator := _tensorflows()) is not None and state["tensorflow"] is not None:
        generator.state.assign(state["tensorflow"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def _tensorflows() -> tf.random.Generator | None:
    try:
        return tf.random.get_global_generator()
    except RuntimeError:
        return None  # operations are to be deterministic, and the script has not set one
