"""TensorFlow's own savers, to be measured beside this package."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import keras
import tensorflow as tf
from savers import Every, Saver, sync

from keras_ckpt.model.keras_internals import value_of
from keras_ckpt.model.model_state import ModelState

VERSION = tf.__version__


class Manager(Every):
    """`tf.train.CheckpointManager`."""

    def on_train_begin(self, logs=None) -> None:
        self.manager = tf.train.CheckpointManager(tf.train.Checkpoint(model=self.model), self.path, self.keep)

    def save(self, number: int) -> None:
        self.manager.save(number)


class SaveV2(Every):
    """TensorFlow's operation alone, and a sync."""

    def on_train_begin(self, logs=None) -> None:
        self.names = ModelState(self.model).names()

    def save(self, number: int) -> None:
        names = self.names
        tf.raw_ops.SaveV2(
            prefix=str(self.path / f"ckpt-{number}"),
            tensor_names=list(names),
            shape_and_slices=[""] * len(names),
            tensors=[value_of(each) for each in names.values()],
        )
        sync(self.path)
        for file in self.path.glob(f"ckpt-{number - self.keep * self.every}.*"):
            file.unlink()


SAVERS = {
    "tf.train.CheckpointManager": Saver(Manager),
    "SaveV2, sync": Saver(SaveV2, syncs=True),
}


def restores(model: keras.Model, other: keras.Model, path: pathlib.Path) -> dict[str, Callable[[], object]]:
    """Saves a model, and returns the ways to restore it into another."""
    prefix = tf.train.Checkpoint(model=model).save(str(path / "tensorflow"))
    return {"tf.train.Checkpoint.restore": lambda: tf.train.Checkpoint(model=other).restore(prefix)}


def tensorflow_in_the_background(model: keras.Model, path: pathlib.Path) -> str:
    """What comes of TensorFlow's own way to save in the background, as a sentence."""
    checkpoint = tf.train.Checkpoint(model=model)
    options = tf.train.CheckpointOptions(enable_async=True)
    for number in (1, 2, 3):
        try:
            checkpoint.save(str(path / "ckpt"), options)
            checkpoint.sync()
        except (ValueError, tf.errors.OpError) as error:
            return f"fails at save {number}: {str(error).strip().splitlines()[-1].strip():.200}"
    return "works"
