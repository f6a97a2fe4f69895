"""What saving costs a training: how long it stands still for a save, and what a whole `fit` loses for each.

Run it from the top of the repository: `python benchmarks/training.py`. Each saves every 20 batches of a `fit` of 70,
between two that save nothing, so that the last save has time to end. What others write is not synced. A line of
JSON a model is added to `benchmarks/training.jsonl`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from saving import SHAPES, build

import keras_ckpt as kc
from keras_ckpt.position import set_position

ROUNDS = 7
BATCHES, EVERY = 70, 20
SAVES = BATCHES // EVERY
ROWS = 32


class Manager(keras.callbacks.Callback):
    """`tf.train.CheckpointManager`, as a callback."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.path = path

    def on_train_begin(self, logs=None) -> None:
        self.manager = tf.train.CheckpointManager(tf.train.Checkpoint(model=self.model), self.path, max_to_keep=1)

    def on_train_batch_end(self, batch, logs=None) -> None:
        if (batch + 1) % EVERY == 0:
            self.manager.save(batch + 1)


Saver = Callable[[pathlib.Path], keras.callbacks.Callback]
SAVERS: dict[str, Saver] = {
    "this": lambda path: kc.ModelCheckpoint(path, save_freq=EVERY, keep=1),
    "this, save_on_background=False": lambda path: kc.ModelCheckpoint(
        path, save_freq=EVERY, keep=1, save_on_background=False
    ),
    "this, BackupAndRestore": lambda path: kc.BackupAndRestore(path, save_freq=EVERY),
    "keras.callbacks.OrbaxCheckpoint": lambda path: keras.callbacks.OrbaxCheckpoint(
        path, save_freq=EVERY, max_to_keep=1
    ),
    "keras.callbacks.ModelCheckpoint, .weights.h5": lambda path: keras.callbacks.ModelCheckpoint(
        path / "model.weights.h5", save_freq=EVERY, save_weights_only=True
    ),
    "keras.callbacks.ModelCheckpoint, .keras": lambda path: keras.callbacks.ModelCheckpoint(
        path / "model.keras", save_freq=EVERY
    ),
    "keras.callbacks.BackupAndRestore": lambda path: keras.callbacks.BackupAndRestore(path, save_freq=EVERY),
    "tf.train.CheckpointManager": Manager,
}


def train(model: keras.Model, callback: keras.callbacks.Callback) -> tuple[float, list[float]]:
    """The milliseconds of a `fit`, and those for which it stood still for each save."""
    width = model.input_shape[1]
    x = np.random.default_rng(0).random((ROWS * BATCHES, width), "float32")
    batch_end, blocked = callback.on_train_batch_end, []

    def measured(batch: int, logs: object = None) -> None:
        began = time.perf_counter()
        batch_end(batch, logs)
        if (batch + 1) % EVERY == 0:
            blocked.append((time.perf_counter() - began) * 1000)

    callback.on_train_batch_end = measured
    set_position(model, None)  # the batches of a run are counted through all its fits
    began = time.perf_counter()
    model.fit(x, x, batch_size=ROWS, shuffle=False, verbose=0, callbacks=[callback])
    return (time.perf_counter() - began) * 1000, blocked


def copy(model: keras.Model) -> Callable[[], float]:
    """The milliseconds of a copy of all variables into memory that is there already: the least that a copy takes."""
    arrays = [np.asarray(each.value) for each in (*model.variables, *model.optimizer.variables)]
    places = [np.empty_like(each) for each in arrays]

    def measure() -> float:
        at = time.perf_counter()
        for place, array in zip(places, arrays, strict=True):
            np.copyto(place, array)
        return (time.perf_counter() - at) * 1000

    measure()
    return measure


def figures(shape: str, jit_compile: bool, savers: dict[str, Saver], path: pathlib.Path) -> dict[str, object]:
    model = build(*SHAPES[shape])
    model.compile(model.optimizer, "mse", jit_compile=jit_compile)
    model.optimizer.learning_rate = 1e-4
    train(model, keras.callbacks.Callback())
    blocked: dict[str, list[float]] = {name: [] for name in savers}
    lost: dict[str, list[float]] = {name: [] for name in savers}
    for _ in range(ROUNDS):
        before, _ = train(model, keras.callbacks.Callback())
        for name, saver in savers.items():
            place = path / "run"
            place.mkdir()
            whole, waited = train(model, saver(place))
            shutil.rmtree(place, ignore_errors=True)
            os.sync()
            after, _ = train(model, keras.callbacks.Callback())
            blocked[name] += waited
            lost[name].append((whole - (before + after) / 2) / SAVES)
            before = after
    measure = copy(model)
    memory = statistics.median(measure() for _ in range(ROUNDS))
    print(f"\n{shape}, jit_compile={jit_compile}; a warm copy takes {memory:.1f} ms")
    print(f"{'milliseconds a save':46}{'stands still':>14}{'p95':>10}{'lost':>10}")
    found = {}
    for name in savers:
        still, late = statistics.median(blocked[name]), statistics.quantiles(blocked[name], n=20)[-1]
        found[name] = {"blocked": still, "blocked_p95": late, "lost": statistics.median(lost[name])}
        print(f"{name:46}{still:14.1f}{late:10.1f}{found[name]['lost']:10.1f}")
    return {"model": shape, "jit_compile": jit_compile, "warm copy": memory, "savers": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["10 MB, 20 variables", "100 MB, 20 variables"], choices=SHAPES)
    parser.add_argument("--jit", action="store_true", help="also with jit_compile")
    parser.add_argument("--log", default=str(pathlib.Path(__file__).with_name("training.jsonl")))
    arguments = parser.parse_args()
    for shape in arguments.models:
        for jit_compile in (False, True) if arguments.jit else (False,):
            with tempfile.TemporaryDirectory(dir=os.getcwd()) as scratch:
                line = figures(shape, jit_compile, SAVERS, pathlib.Path(scratch))
            machine = {"processors": os.cpu_count(), "system": platform.platform(), "tensorflow": tf.__version__}
            with open(arguments.log, "a") as log:
                log.write(json.dumps({"date": f"{datetime.datetime.now():%Y-%m-%d}", **machine, **line}) + "\n")


if __name__ == "__main__":
    main()
