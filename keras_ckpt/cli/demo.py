"""The demo: train on real data, keep checkpoints by a policy, restore the best checkpoint, prune."""

from __future__ import annotations

import os
import time

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_ckpt
from keras_ckpt.store import layout

_BATCH = 64
_EPOCHS = 12


def run(path: str) -> None:
    """Runs the demo in a directory, and prints each step.

    Raises:
        DirectoryNotEmptyError: The directory already holds checkpoints. They stay unchanged.
    """
    keep = keras_ckpt.BestN(3) | keras_ckpt.LatestN(2)
    training, validation = _digits()
    print(
        f"Training a small network on {len(training[0])} handwritten digits for {_EPOCHS} epochs, with\n\n"
        f'    ModelCheckpoint("{path}", monitor="val_accuracy",\n'
        "                    keep=BestN(3) | LatestN(2))\n\n"
        "After each epoch the network is saved if it is among the 3 best or the 2 newest.\n"
    )
    began = time.perf_counter()
    model = _network()
    checkpoint = keras_ckpt.ModelCheckpoint(
        path, monitor="val_accuracy", keep=keep, metadata={"dataset": "scikit-learn digits"}
    )
    model.fit(
        *training,
        batch_size=_BATCH,
        epochs=_EPOCHS,
        validation_data=validation,
        validation_batch_size=_BATCH,
        callbacks=[checkpoint],
        verbose=0,
    )
    print(f"{_EPOCHS} epochs took {time.perf_counter() - began:.1f} s. The checkpoints on disk, and why:\n")
    runs = keras_ckpt.CheckpointDirectory(path)
    print(f"{runs.plan(keep)}\n")

    if (best := runs.best()) is None:
        raise SystemExit("Nothing was saved: the disk may be full.")
    print(f"The best checkpoint is step {best.step}. A new network with random weights restores it:\n")
    fresh = _network()
    print(f"{keras_ckpt.restore(fresh, best)}\n")
    recorded = best.metrics["val_accuracy"], best.metrics["val_loss"]
    loss, accuracy = fresh.evaluate(*validation, batch_size=_BATCH, verbose=0)
    sidecar = layout.sidecar(os.path.relpath(best.prefix))
    print(f"{sidecar} says: val_accuracy {recorded[0]:.6f}, val_loss {recorded[1]:.6f}")
    print(f"The new network, evaluated now: val_accuracy {accuracy:.6f}, val_loss {loss:.6f}")
    np.testing.assert_allclose((accuracy, loss), recorded, rtol=1e-5)
    print("They agree.\n\nLater you may want to keep less. This plan keeps only the best checkpoint:\n")
    plan = runs.plan(keras_ckpt.BestN(1))
    print(plan)
    runs.prune(plan)
    print(f"\nDone: {path} now has {len(runs)} checkpoint. Look at it with\n\n    keras-ckpt ls {path}\n")


def _digits() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images of 8 by 8 pixels from 0 to 1 with their digits, for training and for validation."""
    images, digits = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    return (images[:1400], digits[:1400]), (images[1400:], digits[1400:])


def _network() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
