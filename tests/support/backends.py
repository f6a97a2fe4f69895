"""Small models that each backend of Keras trains and saves, and each restores.

As a program it makes the archive of checkpoints that the tests restore on every backend, or tries all pairs of
backends. `docs/development.md` has both commands.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

import keras_ckpt as kc

layers, optimizers = keras.layers, keras.optimizers
HERE = pathlib.Path(__file__).parents[1]
ROWS = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
IMAGES = np.random.default_rng(1).normal(size=(8, 6, 6, 2)).astype("float32")
WORDS = np.random.default_rng(2).integers(1, 9, (8, 5))
TARGETS = np.random.default_rng(3).random((8, 1)).astype("float32")


class Trained(NamedTuple):
    """A model that is built and compiled, and its data."""

    model: keras.Model
    x: np.ndarray


class Counted(layers.Layer):
    """A layer with a generator, and with variables of types that some backends hold in another type."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seed = keras.random.SeedGenerator(2**31 - 2)
        self.parts = [layers.Dense(3, name="first"), {"second": layers.Dense(2, name="second")}]

    def build(self, shape: Any) -> None:
        self.parts[0].build(shape)
        self.parts[1]["second"].build((None, 3))
        for dtype in ("int64", "int32", "uint32", "uint8", "bool"):
            self.add_weight((2,), dtype=dtype, initializer="ones", trainable=False, name=f"of_{dtype}")
        self.calls = self.add_weight((), dtype="int64", initializer="zeros", trainable=False, name="calls")

    def call(self, x: Any, training: bool = False) -> Any:
        x = self.parts[1]["second"](self.parts[0](x))
        if not training:
            return x
        self.calls.assign_add(1)
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seed)


class Own(keras.Model):
    """A subclass with layers in attributes, lists and dicts."""

    def __init__(self) -> None:
        super().__init__(name="own")
        self.counted = Counted(name="counted")
        self.head = layers.Dense(1, name="head")

    def build(self, shape: Any) -> None:
        self.counted.build(shape)
        self.head.build((None, 2))
        super().build(shape)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.head(self.counted(x, training=training))


def dense() -> Trained:
    """Dense layers after adapted normalization; averages of the weights."""
    normalization = layers.Normalization(name="normalization")
    normalization.adapt(ROWS)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            normalization,
            layers.Dense(5, "relu", name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.4, name="drop"),
            layers.Dense(1, name="head"),
        ]
    )
    model.compile(optimizers.AdamW(0.1, use_ema=True), "mse", metrics=["mae", keras.metrics.AUC(num_thresholds=5)])
    return Trained(model, ROWS)


def conv() -> Trained:
    """Convolutions of a functional model with two branches, and random images."""
    images = keras.Input((6, 6, 2))
    x = layers.RandomFlip(name="flip")(images)
    first = layers.Conv2D(3, 3, name="conv")(x)
    second = layers.SeparableConv2D(3, 3, name="separable")(x)
    x = layers.SpatialDropout2D(0.3, name="drop")(layers.Add()([first, second]))
    x = layers.GroupNormalization(3, name="groups")(layers.BatchNormalization(name="norm")(x))
    model = keras.Model(images, layers.Dense(1, name="head")(layers.GlobalAveragePooling2D()(x)))
    model.compile(optimizers.SGD(0.1, momentum=0.9, nesterov=True), "mse")
    return Trained(model, IMAGES)


def text() -> Trained:
    """Words that are embedded, read in both directions, and attended to; a schedule of the learning rate."""
    words = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 4, name="words")(words)
    x = layers.Bidirectional(layers.GRU(2, dropout=0.2, return_sequences=True), name="both")(x)
    x = layers.LayerNormalization(name="norm")(layers.MultiHeadAttention(2, 2, dropout=0.1, name="attention")(x, x))
    model = keras.Model(words, layers.Dense(1, name="head")(layers.LSTM(2, name="last")(x)))
    model.compile(optimizers.Adam(optimizers.schedules.ExponentialDecay(0.1, 2, 0.5), amsgrad=True), "mse")
    return Trained(model, WORDS)


def subclass() -> Trained:
    """A subclass; gradients of two batches for each step."""
    model = Own()
    model.compile(optimizers.Adagrad(0.1, gradient_accumulation_steps=2), "mse", metrics=["mae"])
    return Trained(model, ROWS)


def mixed() -> Trained:
    """Mixed precision: computed in float16, with a scaled loss."""
    options = {"dtype": "mixed_float16"}
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, name="hidden", **options),
            layers.BatchNormalization(name="norm", **options),
            layers.Dense(1, name="head", dtype="float32"),
        ]
    )
    model.compile(optimizers.LossScaleOptimizer(optimizers.Adam(0.1), dynamic_growth_steps=2), "mse", metrics=["mae"])
    return Trained(model, ROWS)


def bfloat16() -> Trained:
    """All weights, and the slots of the optimizer, in bfloat16."""
    options = {"dtype": "bfloat16"}
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, name="hidden", **options), layers.Dense(1, name="head", **options)]
    )
    model.compile(optimizers.RMSprop(0.1, momentum=0.5, centered=True), "mse")
    return Trained(model, ROWS)


def quantized(mode: str = "int8") -> Trained:
    """Kernels in integers."""
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(9, 4, name="words"),
            layers.Flatten(),
            layers.Dense(3, name="hidden"),
            layers.Dense(1, name="head"),
        ]
    )
    for each in (model.layers[0], *model.layers[2:]):
        each.quantize(mode)
    model.compile(optimizers.Adam(0.1), "mse")
    return Trained(model, WORDS)


def lora() -> Trained:
    """Low-rank updates of frozen kernels."""
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(9, 4, name="words"),
            layers.Flatten(),
            layers.Dense(1, name="head"),
        ]
    )
    model.layers[0].enable_lora(2)
    model.layers[-1].enable_lora(2, lora_alpha=4)
    model.compile(optimizers.Lion(0.1), "mse")
    return Trained(model, WORDS)


MODELS: dict[str, Callable[[], Trained]] = {
    "dense": dense,
    "conv": conv,
    "text": text,
    "subclass": subclass,
    "mixed": mixed,
    "bfloat16": bfloat16,
    "quantized": quantized,
    "quantized to four bits": lambda: quantized("int4"),
    "lora": lora,
}


def built(name: str) -> Trained:
    """A model that was never trained, with all its variables."""
    keras.utils.set_random_seed(8)
    found = MODELS[name]()
    found.model.compute_metrics(found.x, TARGETS, found.model(found.x))
    found.model.optimizer.build(found.model.trainable_variables)
    return found


def fit(trained: Trained, *callbacks: keras.callbacks.Callback, epochs: int = 1) -> dict[str, list[float]]:
    """Trains a model for epochs of three batches."""
    options = {"batch_size": 3, "epochs": epochs, "shuffle": False, "verbose": 0}
    return trained.model.fit(trained.x, TARGETS, callbacks=list(callbacks), **options).history


def state(model: keras.Model) -> dict[str, np.ndarray]:
    """The values of the weights and the optimizer, and those of seeds and metrics, in Keras's order.

    All are float64, which holds each value of the models' types exactly.
    """
    weights = {id(each): each for each in (*model.weights, *model.optimizer.variables)}
    others = {id(each): each for each in (*model.variables, *model.metrics_variables) if id(each) not in weights}

    def flat(variables: Iterable[Any]) -> np.ndarray:
        arrays = [keras.ops.convert_to_numpy(each).astype("float64") for each in variables]
        return np.concatenate([array.ravel() for array in arrays])

    return {"weights": flat(weights.values()), "seeds and metrics": flat(others.values())}


def predicted(trained: Trained) -> np.ndarray:
    """The predictions of a model."""
    return keras.ops.convert_to_numpy(trained.model(trained.x)).astype("float32")


class Noted(keras.callbacks.Callback):
    """Writes the values and the predictions of a model after an epoch. At its end a fit may average the weights."""

    def __init__(self, trained: Trained, path: pathlib.Path) -> None:
        super().__init__()
        self.trained = trained
        self.path = path

    def on_epoch_end(self, epoch, logs=None) -> None:
        np.savez(self.path, **state(self.model), predictions=predicted(self.trained))


def save(archive: pathlib.Path) -> None:
    """Trains each model in a real fit that saves, and writes the values and the predictions beside the checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            trained, path = built(name), pathlib.Path(folder, name)
            fit(trained, kc.ModelCheckpoint(path), Noted(trained, path / "values.npz"))
        shutil.make_archive(str(archive.with_suffix("")), "zip", folder)


def check(trained: Trained, path: pathlib.Path, parts: Sequence[str] = ("weights", "seeds and metrics")) -> None:
    """Compares parts of the state of a model, and its predictions, with those of the model that was saved.

    The predictions are nearly equal: backends sum in other orders, and round to few bits in between.
    """
    few_bits = any(each.dtype_policy.name != "float32" for each in trained.model.layers)
    with np.load(path / "values.npz") as saved:
        for part in parts:
            np.testing.assert_array_equal(state(trained.model)[part], saved[part], strict=True)
        np.testing.assert_allclose(predicted(trained), saved["predictions"], atol=0.05 if few_bits else 1e-5)


def restore_all(folder: pathlib.Path) -> None:
    """Restores the checkpoints in all archives of a folder, compares them, and trains on."""
    places = {archive.stem: archive.with_suffix("") for archive in folder.glob("*.zip")}
    for path in places.values():
        shutil.unpack_archive(f"{path}.zip", path)
    for name in MODELS:
        trained = built(name)
        for there, path in places.items():
            report = kc.restore(trained.model, path / name)
            assert (report.missing, report.unexpected, dict(report.mismatched)) == ((), (), {})
            check(trained, path / name)
            assert np.isfinite(fit(trained)["loss"]).all()
            sys.stdout.write(f"{there} to {keras.backend.backend()}: {name}\n")


def matrix(pythons: dict[str, str]) -> None:
    """Saves all models on each backend, and restores them on each."""
    with tempfile.TemporaryDirectory() as folder:
        for command in ("save", "restore"):
            for backend, python in pythons.items():
                path = os.path.join(folder, f"{backend}.zip") if command == "save" else folder
                environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": f"{HERE.parent}:{HERE}"}
                subprocess.run([python, __file__, command, path], env=environment, check=True)


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "matrix":
        matrix(dict(argument.split("=", 1) for argument in arguments))
    else:
        {"save": save, "restore": restore_all}[command](pathlib.Path(*arguments))
