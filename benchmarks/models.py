"""Models with states of several sizes, whose training changes every value, or a tenth of them."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
ROWS = 32
"""The rows of a batch."""
STATES = {
    "10 MB, 20 variables": (5, 400),
    "10 MB, 640 variables": (105, 88),
    "100 MB, 20 variables": (5, 1290),
    "100 MB, 640 variables": (105, 280),
    "1 GB, 20 variables": (5, 4080),
    "1 GB, 640 variables": (105, 890),
}
"""The number and the width of the layers; a layer has two weights and four slots."""


def dense(state: str, jit_compile: bool = False) -> keras.Model:
    """Dense layers, trained by Adam so slowly that they stay finite."""
    layers, width = STATES[state]
    model = keras.Sequential([keras.Input((width,)), *(keras.layers.Dense(width) for _ in range(layers))])
    model.compile(keras.optimizers.Adam(1e-5), "mse", jit_compile=jit_compile if ON_TENSORFLOW else "auto")
    return model


def frozen() -> keras.Model:
    """100 MB, of which nine tenths are layers that are not trained."""
    backbone = [keras.layers.Dense(1580, trainable=False) for _ in range(9)]
    model = keras.Sequential([keras.Input((1580,)), *backbone, keras.layers.Dense(528)])
    model.compile(keras.optimizers.Adam(1e-5), "mse", jit_compile=False)
    return model


def small() -> keras.Model:
    """500 KB: a network of 41,000 weights for small pictures, trained by Adam."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(30, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-4), "mse", jit_compile=False)
    return model


WORKLOADS: dict[str, Callable[[], keras.Model]] = {
    "all values change": lambda: dense("100 MB, 20 variables"),
    "nine tenths are frozen": frozen,
}


def train(model: keras.Model, batches: int, *callbacks: keras.callbacks.Callback) -> None:
    """One `fit` on random numbers."""
    generator = np.random.default_rng(0)
    inputs, outputs = model.inputs[0], model.outputs[0]
    shape = (ROWS * batches, *inputs.shape[1:])
    x = generator.random(shape, "float32")
    y = generator.random((len(x), *outputs.shape[1:]), "float32")
    model.fit(x, y, batch_size=ROWS, shuffle=False, verbose=0, callbacks=list(callbacks))


def arrays(model: keras.Model) -> list[np.ndarray]:
    """Copies of all values of a model, its optimizer's too."""
    return [each.numpy() for each in (*model.variables, *model.optimizer.variables)]
