"""Small real models and data, and callbacks that report scripted metrics or interrupt a training."""

from __future__ import annotations

import os
import pathlib
import sys
import threading
import warnings
from collections.abc import Sequence

import keras
import numpy as np

import keras_ckpt as kc
from keras_ckpt.formats.arena import Arena
from keras_ckpt.formats.sharing import SharingWrite
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.store import background
from keras_ckpt.store.files import PRIVATE, Folder
from keras_ckpt.store.writer import SaveRequest, Writer

rng = np.random.default_rng(0)
X = rng.normal(size=(40, 4)).astype("float32")
Y = rng.normal(size=(40, 1)).astype("float32")


DROPOUT_SEED = 1 if keras.backend.backend() == "torch" else None
"""Keras's dropout without a seed draws from PyTorch's own generator there, which is no state of a model."""


def dense_model(name: str | None = None, *, compiled: bool = True, **options) -> keras.Model:
    """Two dense layers with dropout between them, trained by Adam. The model is eager, so that a fit begins at once."""
    dropout = keras.layers.Dropout(0.5, seed=DROPOUT_SEED)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), dropout, keras.layers.Dense(1)], name=name)
    if compiled:
        model.compile(**{"optimizer": "adam", "loss": "mse", "run_eagerly": True, **options})
    return model


def fit(model: keras.Model, *callbacks: keras.callbacks.Callback, epochs: int = 1, batches: int = 5, **options):
    """Trains on batches of one sample."""
    return model.fit(
        X[:batches],
        Y[:batches],
        **{"batch_size": 1, "epochs": epochs, "shuffle": False, "verbose": 0, "callbacks": list(callbacks), **options},
    )


def save(model: keras.Model, path: str | os.PathLike[str], step: int = 1, **facts: object) -> kc.CheckpointRecord:
    """Saves the training state of a model, as the callbacks do."""
    writer, arena = Writer(kc.CheckpointDirectory(path)), Arena()
    write = SharingWrite(ModelState(model).snapshot().move(arena), arena, writer)
    record = writer.save(SaveRequest(step=step, **facts), write)
    writer.close()
    return record


def values(model: keras.Model) -> list[np.ndarray]:
    """The values that a restore sets: weights, seeds and optimizer. PyTorch's variables change in place."""
    optimizer = model.optimizer.variables if model.compiled else []
    return [variable.numpy().copy() for variable in (*model.variables, *optimizer)]


def same(model: keras.Model, other: keras.Model) -> bool:
    """Whether two models have equal values to the bit."""
    pairs = zip(values(model), values(other), strict=True)
    return all(mine.tobytes() == theirs.tobytes() for mine, theirs in pairs)


def into_a_stage(path: pathlib.Path) -> None:
    """Moves the checkpoints of a directory to the stage, where complete checkpoints wait until they are published."""
    with Folder(path) as folder, folder.folder(PRIVATE) as private, private.folder("stage-0", create=True) as stage:
        for name in [name for name in folder.names() if name.startswith("ckpt-")]:
            folder.move(name, stage)


def warned(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """The texts of the caught `UserWarning`s. On PyTorch, Keras also warns, of NumPy's plans."""
    return [str(each.message) for each in caught if each.category is UserWarning]


class Reports(keras.callbacks.Callback):
    """Writes scripted metrics into the logs of each epoch, for the callbacks after it in the list."""

    def __init__(self, **metrics: Sequence[object]) -> None:
        super().__init__()
        self.metrics = metrics

    def on_epoch_end(self, epoch, logs=None) -> None:
        logs |= {name: values[epoch] for name, values in self.metrics.items() if values[epoch] is not None}


class Interrupts(keras.callbacks.Callback):
    """Raises an error after so many batches, by default that of Ctrl-C."""

    def __init__(self, batches: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.batches = batches
        self.error = error or KeyboardInterrupt()

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.batches -= 1
        if self.batches == 0:
            raise self.error


class WithFunction(keras.layers.Layer):
    """A layer that gets a function, and defines no config."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)


class HoldsSaves(keras.callbacks.Callback):
    """Lets no background save end before the next epoch begins, and prints the beginning of each epoch.

    It precedes the callback that saves, so that the end of the training does not wait for it.
    """

    def __init__(self, checkpoint: kc.ModelCheckpoint) -> None:
        super().__init__()
        self.released = threading.Event()
        if checkpoint.save_on_background:
            checkpoint.directory.subscribe(lambda change: self.released.wait(10))

    def on_epoch_begin(self, epoch, logs=None) -> None:
        sys.stdout.write(f"begin {epoch + 1}\n")
        self.released.set()
        background.wait()
        self.released.clear()

    def on_train_end(self, logs=None) -> None:
        self.released.set()
