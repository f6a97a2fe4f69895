"""Models of many kinds, whose state Keras's own files have."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

layers = keras.layers
WORDS = np.array([["a b"], ["b c d"], ["a a e"], ["c d e f"]])
LETTERS = np.array([["a"], ["b"], ["c"], ["a"]])


@keras.saving.register_keras_serializable("keras_zoo")
class Subclassed(keras.Model):
    """Layers in a list, in a dict, and in a list of lists."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.blocks = [layers.Dense(3), layers.Dropout(0.5), layers.Dense(3)]
        self.heads = {"left": layers.Dense(2), "right": layers.Dense(2)}
        self.nested = [[layers.Dense(2)], [layers.BatchNormalization()]]

    def call(self, x, training=None):
        for block in self.blocks:
            x = block(x, training=training)
        x = self.heads["left"](x) + self.heads["right"](x)
        for (block,) in self.nested:
            x = block(x)
        return x


@keras.saving.register_keras_serializable("keras_zoo")
class OwnVariables(layers.Layer):
    """Saves a sum of its variables, a variable, and a number that is no variable."""

    def build(self, shape) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        self.shift = self.add_weight(shape=(shape[-1],), name="shift")
        self.count = 3

    def call(self, x):
        return x * self.scale + self.shift

    def save_own_variables(self, store) -> None:
        store["sum"] = keras.ops.convert_to_numpy(self.scale + self.shift)
        store["scale"] = self.scale
        store["count"] = np.array(self.count)

    def load_own_variables(self, store) -> None:
        self.scale.assign(store["scale"])
        self.shift.assign(store["sum"] - store["scale"])
        self.count = int(store["count"])


@keras.saving.register_keras_serializable("keras_zoo")
class OwnAssets(layers.Layer):
    """Saves a file in a folder."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.notes = "first"

    def call(self, x):
        return x

    def save_assets(self, path) -> None:
        folder = pathlib.Path(path) / "inner"
        folder.mkdir()
        (folder / "notes.txt").write_text(self.notes)

    def load_assets(self, path) -> None:
        self.notes = (pathlib.Path(path) / "inner" / "notes.txt").read_text()


def _sequence(*parts: Any, shape: tuple[int | None, ...] = (4,), dtype: str | None = None) -> keras.Model:
    return keras.Sequential([keras.Input(shape, dtype=dtype), *parts])


def _dense() -> keras.Model:
    return _sequence(layers.Dense(3, activation="relu"), layers.Dense(1))


def _convolution() -> keras.Model:
    parts = layers.Conv2D(3, 2), layers.BatchNormalization(), layers.Dropout(0.5), layers.Flatten(), layers.Dense(2)
    return _sequence(*parts, shape=(6, 6, 3))


def _shared() -> keras.Model:
    inputs, shared = keras.Input((4,)), layers.Dense(4, name="shared")
    return keras.Model(inputs, layers.Add()([shared(inputs), shared(shared(inputs))]))


def _nested() -> keras.Model:
    inputs = keras.Input((4,))
    inner = _sequence(layers.Dense(4), _sequence(layers.Dense(4), layers.BatchNormalization()))
    return keras.Model(inputs, layers.Dense(2)(inner(inputs)))


def _subclassed() -> keras.Model:
    model = Subclassed()
    model(np.zeros((1, 4), "float32"))
    return model


def _embedding() -> keras.Model:
    return _sequence(layers.Embedding(10, 3), layers.Flatten(), layers.Dense(1), shape=(2,), dtype="int32")


def _recurrent() -> keras.Model:
    parts = layers.Bidirectional(layers.LSTM(3, return_sequences=True)), layers.GRU(2)
    return _sequence(*parts, shape=(5, 4))


def _attention() -> keras.Model:
    inputs = keras.Input((5, 4))
    return keras.Model(inputs, layers.MultiHeadAttention(2, 3)(inputs, inputs))


def _low_rank() -> keras.Model:
    model = _sequence(layers.Embedding(10, 4), layers.Flatten(), layers.Dense(3), shape=(2,), dtype="int32")
    model.layers[0].enable_lora(2)
    model.layers[2].enable_lora(2, lora_alpha=3)
    return model


def _quantized() -> keras.Model:
    model = _sequence(layers.Dense(8), layers.Dense(4))
    for layer in model.layers:
        layer.quantize("int8")
    return model


def _mixed() -> keras.Model:
    return _sequence(layers.Dense(3, dtype="mixed_float16"), layers.Dense(1, dtype="float32"))


def _bfloat16() -> keras.Model:
    return _sequence(layers.Dense(3, dtype="bfloat16"), layers.Dense(1))


def _string_lookup() -> keras.Model:
    lookup = layers.StringLookup(output_mode="multi_hot")
    lookup.adapt(LETTERS)
    return _sequence(lookup, layers.Dense(2), shape=(1,), dtype="string")


def _text(mode: str) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        text = layers.TextVectorization(output_mode=mode)
        text.adapt(WORDS)
        return _sequence(text, layers.Dense(2), shape=(1,), dtype="string")

    return make


def _normalization() -> keras.Model:
    normalization = layers.Normalization()
    normalization.adapt(np.arange(12.0).reshape(3, 4))
    return _sequence(normalization, layers.Dense(2))


def _many() -> keras.Model:
    return _sequence(*(layers.Dense(4) for _ in range(106)), layers.Dense(4, use_bias=False))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "dense": _dense,
    "convolution": _convolution,
    "shared layers": _shared,
    "nested models": _nested,
    "subclassed": _subclassed,
    "embedding": _embedding,
    "recurrent": _recurrent,
    "attention": _attention,
    "low-rank": _low_rank,
    "quantized": _quantized,
    "mixed precision": _mixed,
    "bfloat16": _bfloat16,
    "StringLookup": _string_lookup,
    "TextVectorization": _text("multi_hot"),
    "TextVectorization weighed": _text("tf_idf"),
    "Normalization": _normalization,
    "own save_own_variables": lambda: _sequence(OwnVariables(), layers.Dense(1)),
    "own save_assets": lambda: _sequence(OwnAssets(), layers.Dense(1)),
    "641 variables": _many,
}

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "not compiled": lambda: None,
    "adam": lambda: keras.optimizers.Adam(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 10)),
    "average": lambda: keras.optimizers.AdamW(use_ema=True),
}


def made(name: str, optimizer: str = "adam") -> keras.Model:
    """A model with distinct values, compiled with a built optimizer."""
    model = MODELS[name]()
    if optimizer != "not compiled":
        model.compile(OPTIMIZERS[optimizer](), "mse", metrics=["mae"])
        model.optimizer.build(model.trainable_variables)
    change(model, 1)
    return model


def change(model: keras.Model, seed: int) -> None:
    """Changes all values of a model and its optimizer."""
    generator = np.random.default_rng(seed)
    optimizer = model.optimizer.variables if model.compiled else []
    for variable in {id(each): each for each in (*model.variables, *optimizer)}.values():
        variable.assign(generator.integers(1, 100, variable.shape))
