"""The global generators of random numbers: of Python, NumPy, Keras and its backend."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_ckpt.model.backends import backend
from keras_ckpt.model.keras_internals import seed_of_random, set_seed_of_random


def get_state() -> dict[str, Any]:
    """The state of each generator, as plain values."""
    return {
        "keras": None if (seed := seed_of_random()) is None else np.asarray(seed),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
        **backend.generators(),
    }


def set_state(state: Mapping[str, Any]) -> None:
    """Sets each generator to the state that `get_state` returned."""
    set_seed_of_random(state["keras"])
    backend.set_generators(state)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
