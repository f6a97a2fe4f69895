"""The demo: train on real data, keep checkpoints by a policy, restore the best checkpoint, prune."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Mapping

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_ckpt
from keras_ckpt.store import layout
from keras_ckpt.store.tables import text

_EPOCHS = 12
_DIGITS = 200
"""The number of digits to train on. They are few, so the network overfits: its best epochs are in the middle."""


def run(path: str) -> None:
    """Runs the demo in a new directory of one run, and prints each step."""
    keras.utils.set_random_seed(1)
    path = _free(path)
    keep = keras_ckpt.BestN(3) | keras_ckpt.LatestN(2)
    training, validation = _digits()
    print(
        f"A small network trains on {_DIGITS} handwritten digits for {_EPOCHS} epochs, with\n\n"
        f'    ModelCheckpoint("{path}", monitor="val_loss",\n'
        "                    keep=BestN(3) | LatestN(2))\n\n"
        "The 3 best and the 2 newest checkpoints stay on disk:\n\n"
        "epoch  val_loss  epochs on disk"
    )
    runs = keras_ckpt.CheckpointDirectory(path)
    checkpoint = keras_ckpt.ModelCheckpoint(
        path, monitor="val_loss", keep=keep, metadata={"dataset": "scikit-learn digits"}
    )
    _network().fit(
        *training,
        epochs=_EPOCHS,
        validation_data=validation,
        callbacks=[checkpoint, keras.callbacks.LambdaCallback(on_epoch_end=functools.partial(_print_epoch, runs))],
        verbose=0,
    )
    print(f"\nThe reason for each checkpoint:\n\n{text(runs.plan(keep), color=True)}\n")

    if (best := runs.best()) is None:
        raise SystemExit("Nothing was saved: the disk may be full.")
    print(f"The best epoch is {best.epoch}. A new network with random weights restores it:\n")
    fresh = _network()
    print(f"{text(keras_ckpt.restore(fresh, best))}\n")
    loss, accuracy = fresh.evaluate(*validation, verbose=0)
    recorded = best.metrics["val_loss"], best.metrics["val_accuracy"]
    sidecar = layout.sidecar(os.path.relpath(best.prefix))
    print(f"val_loss {recorded[0]:.6f}, val_accuracy {recorded[1]:.6f}: {sidecar}")
    print(f"val_loss {loss:.6f}, val_accuracy {accuracy:.6f}: the new network, evaluated now")
    np.testing.assert_allclose((loss, accuracy), recorded, rtol=1e-5)
    print("Both agree.\n\nLater you may want to keep less. This plan keeps only the best checkpoint:\n")
    plan = runs.plan(keras_ckpt.BestN(1))
    print(text(plan, color=True))
    runs.prune(plan)
    print(f"\nDone: {path} now has {len(runs)} checkpoint. Look at it with\n\n    keras-ckpt ls {path}\n")


def _free(path: str) -> str:
    """The directory, or a new folder in it if it holds a run: a directory holds one run."""
    if not keras_ckpt.CheckpointDirectory(path).listing():
        return path
    new = next(place for number in itertools.count(2) if not os.path.lexists(place := os.path.join(path, str(number))))
    print(f"{path} holds the checkpoints of an earlier run, which stay.")
    print(f"This run has a directory of its own: {new}\n")
    return new


def _print_epoch(runs: keras_ckpt.CheckpointDirectory, epoch: int, logs: Mapping[str, float]) -> None:
    print(f"{epoch + 1:5}  {logs['val_loss']:8.4f}  {' '.join(str(record.epoch) for record in runs)}")


def _digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images of 8 by 8 pixels from 0 to 1 with their digits, for training and for validation."""
    images, digits = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    return (images[:_DIGITS], digits[:_DIGITS]), (images[1400:], digits[1400:])


def _network() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
