"""How long a backup blocks training beside callbacks that hold much, against a backup beside none.

Run it from the top of the repository: `python benchmarks/callbacks.py`. The model has 100 MB of state. All figures come
from one run, in turns. An epoch begins when the backup of the epoch before is on disk, so that no figure has a wait for
the disk in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import keras
import models
import numpy as np
import savers
from savers import now

import keras_ckpt as kc
from keras_ckpt.model.position import set_position
from keras_ckpt.store import background

ROUNDS, EPOCHS, BATCHES = 5, 8, 4
ARRAY = 50_000_000
"""Floats: 200 MB."""
ITEMS = 1_000_000


class BestWeights(keras.callbacks.EarlyStopping):
    """Keras's own, told of a score that improves every so many epochs."""

    def __init__(self, every: int) -> None:
        super().__init__("score", mode="max", patience=EPOCHS, restore_best_weights=True)
        self._every = every

    def on_epoch_end(self, epoch, logs=None) -> None:
        super().on_epoch_end(epoch, {"score": epoch // self._every})


class Arrays(keras.callbacks.Callback):
    """Holds the arrays of a validation, and the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.scores = np.ones(ARRAY, "float32"), []

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.scores.append(float(epoch))


class ChangedArrays(Arrays):
    """Changes the arrays in their place."""

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.x += 1


class Losses(keras.callbacks.Callback):
    """Has the loss of each batch, of so many batches."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = [float(index) for index in range(ITEMS)]

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.losses.append(logs["loss"])


OTHERS: dict[str, tuple[Callable[[], keras.callbacks.Callback], int]] = {
    "none": (keras.callbacks.Callback, 0),
    "EarlyStopping's best weights, not improved": (lambda: BestWeights(EPOCHS), 0),
    "EarlyStopping's best weights, improved": (lambda: BestWeights(1), 33_300_000),
    "arrays of 200 MB, not changed": (Arrays, 0),
    "arrays of 200 MB, changed in their place": (ChangedArrays, 4 * ARRAY),
    "a list of a million floats that grows": (Losses, 8 * ITEMS),
}
"""By name: what makes the callback, and the bytes that change."""


class WaitsForTheDisk(keras.callbacks.Callback):
    """Begins an epoch with no save in progress."""

    def on_epoch_begin(self, epoch, logs=None) -> None:
        background.wait()


class Blocked(kc.BackupAndRestore):
    """Notes how long each epoch waits for its backup."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.times: list[float] = []
        self._sum = 0.0

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self._timed(super().on_epoch_begin, epoch, logs)
        self.times.append(self._sum)
        self._sum = 0.0

    def on_train_batch_begin(self, batch, logs=None) -> None:
        self._timed(super().on_train_batch_begin, batch, logs)

    def on_train_batch_end(self, batch, logs=None) -> None:
        self._timed(super().on_train_batch_end, batch, logs)

    def on_epoch_end(self, epoch, logs=None) -> None:
        self._timed(super().on_epoch_end, epoch, logs)

    def _timed(self, method: Callable[..., None], *arguments: object) -> None:
        began = now()
        method(*arguments)
        self._sum += now() - began


def main() -> None:
    model = models.dense("100 MB, 20 variables")
    x = np.random.default_rng(0).random((models.ROWS * BATCHES, *model.inputs[0].shape[1:]), "float32")
    y = np.zeros((len(x), *model.outputs[0].shape[1:]), "float32")
    times: dict[str, list[float]] = {name: [] for name in OTHERS}
    firsts: dict[str, list[float]] = {name: [] for name in OTHERS}
    for _ in range(ROUNDS):
        for name, (make, _) in OTHERS.items():
            set_position(model, None)
            with savers.scratch() as path:
                backup = Blocked(str(path))
                callbacks = [WaitsForTheDisk(), make(), backup]
                model.fit(x, y, batch_size=models.ROWS, shuffle=False, verbose=0, epochs=EPOCHS, callbacks=callbacks)
            firsts[name].append(backup.times[1])
            times[name] += backup.times[2:]
    base = statistics.median(times["none"])
    print(f"{ROUNDS} rounds of {EPOCHS} epochs in turns; milliseconds that an epoch waits for its backup\n")
    print(f"{'beside':46}{'median':>8}{'worst':>8}{'first':>8}{'ratio':>8}{'warm copy':>11}{'ratio beyond it':>17}")
    for name, (_, size) in OTHERS.items():
        median, copy = statistics.median(times[name]), memcpy(size)
        figures = f"{median:8.1f}{max(times[name]):8.1f}{statistics.median(firsts[name]):8.1f}{median / base:8.2f}"
        print(f"{name:46}{figures}{copy:11.1f}{(median - copy) / base:17.2f}")


def memcpy(size: int) -> float:
    """Milliseconds of a copy of so many bytes into memory that is there already."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    found = []
    for _ in range(7):
        began = now()
        np.copyto(target, source)
        found.append(now() - began)
    return statistics.median(found)


if __name__ == "__main__":
    main()
