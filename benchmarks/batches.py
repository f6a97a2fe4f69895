"""What a batch costs through `ResumableDataset`, against Keras's own adapters for the same data.

Run it from the top of the repository: `python benchmarks/batches.py`. All figures come from one run, in turns.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable

import keras
import numpy as np
import tensorflow as tf

# What fit() makes of its data has no public name.
from keras.src.trainers.data_adapters import get_data_adapter

import keras_ckpt as kc

ROUNDS = 15
SAMPLES, WIDTH, BATCH = 60_000, 784, 128


class Batches(keras.utils.PyDataset):
    """The arrays by batches, without any work of its own."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        super().__init__()
        self._x, self._y = x, y

    def __len__(self) -> int:
        return math.ceil(len(self._x) / BATCH)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return self._x[rows], self._y[rows]


def main() -> None:
    x = np.random.default_rng(0).random((SAMPLES, WIDTH), "float32")
    y = np.arange(SAMPLES) % 10
    pipeline = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(1000, seed=1).batch(BATCH).prefetch(2)
    pairs = {
        "arrays": (
            get_data_adapter(x, y, batch_size=BATCH).get_tf_dataset(),
            kc.ResumableDataset(x, y, batch_size=BATCH),
        ),
        "arrays, shuffled": (
            get_data_adapter(x, y, batch_size=BATCH, shuffle=True).get_tf_dataset(),
            kc.ResumableDataset(x, y, batch_size=BATCH, shuffle=True),
        ),
        "tf.data": (pipeline, kc.ResumableDataset(pipeline)),
        "a function of the pass": (pipeline, kc.ResumableDataset(lambda number: pipeline)),
        "PyDataset": (get_data_adapter(Batches(x, y)), kc.ResumableDataset(Batches(x, y))),
    }
    print(f"{SAMPLES} samples of {WIDTH} floats by {BATCH}, {ROUNDS} rounds in turns\n")
    print(f"{'µs a batch, medians':24}{'Keras':>10}{'ResumableDataset':>18}{'ratio':>8}")
    for name, (theirs, ours) in pairs.items():
        times = [(measured(theirs), measured(ours)) for _ in range(ROUNDS)]
        ratio = statistics.median(mine / other for other, mine in times)
        other, mine = (statistics.median(each) for each in zip(*times, strict=True))
        print(f"{name:24}{other:10.0f}{mine:18.0f}{ratio:8.2f}")


def measured(data: Iterable[object]) -> float:
    """Microseconds a batch of one pass."""
    if not isinstance(data, tf.data.Dataset):  # an adapter that is told of the beginning and end of an epoch
        data.on_epoch_begin()
        found = measured(data.get_tf_dataset())
        data.on_epoch_end()
        return found
    begin = time.perf_counter()
    count = sum(1 for _ in data)
    return (time.perf_counter() - begin) / count * 1e6


if __name__ == "__main__":
    main()
