"""What a batch costs through `ResumableDataset`, against Keras's own adapters for the same data.

Run it from the top of the repository, on any backend of Keras: `python benchmarks/batches.py`. All figures come from
one run, in turns.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

# What fit() makes of its data has no public name.
from keras.src.trainers.data_adapters import get_data_adapter

import keras_ckpt as kc

ROUNDS = 15
SAMPLES, WIDTH, BATCH = 60_000, 784, 128
READERS = {"tensorflow": "get_tf_dataset", "jax": "get_jax_iterator", "torch": "get_torch_dataloader"}
READER = READERS[keras.backend.backend()]


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


def rows() -> Iterator[tuple[str, Any, Any]]:
    """The names of the data, their adapters of Keras, and ours."""
    x = np.random.default_rng(0).random((SAMPLES, WIDTH), "float32")
    y = np.arange(SAMPLES) % 10
    yield "arrays", get_data_adapter(x, y, batch_size=BATCH), kc.ResumableDataset(x, y, batch_size=BATCH)
    yield (
        "arrays, shuffled",
        get_data_adapter(x, y, batch_size=BATCH, shuffle=True),
        kc.ResumableDataset(x, y, batch_size=BATCH, shuffle=True),
    )
    yield "PyDataset", get_data_adapter(Batches(x, y)), kc.ResumableDataset(Batches(x, y))
    if READER == "get_tf_dataset":
        import tensorflow as tf

        pipeline = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(1000, seed=1).batch(BATCH).prefetch(2)
        yield "tf.data", get_data_adapter(pipeline), kc.ResumableDataset(pipeline)
        yield "a function of the epoch", get_data_adapter(pipeline), kc.ResumableDataset(lambda number: pipeline)
    if READER == "get_torch_dataloader":
        import torch
        from torch.utils.data import DataLoader, TensorDataset

        samples = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        for workers in (0, 2):
            loader = DataLoader(samples, batch_size=BATCH, shuffle=True, num_workers=workers)
            yield f"DataLoader, {workers} workers", get_data_adapter(loader), kc.ResumableDataset(loader)


def main() -> None:
    print(f"{keras.backend.backend()}: {SAMPLES} samples of {WIDTH} floats by {BATCH}, {ROUNDS} rounds in turns\n")
    print(f"{'µs a batch, medians':24}{'Keras':>10}{'ResumableDataset':>18}{'ratio':>8}")
    for name, *adapters in rows():
        theirs, ours = (reader_of(each) for each in adapters)
        times = [(measured(theirs), measured(ours)) for _ in range(ROUNDS)]
        ratio = statistics.median(mine / other for other, mine in times)
        other, mine = (statistics.median(each) for each in zip(*times, strict=True))
        print(f"{name:24}{other:10.0f}{mine:18.0f}{ratio:8.2f}")


def reader_of(adapter: Any) -> Callable[[], Iterable[object]]:
    """The function that begins an epoch as `fit` does, which makes a dataset of TensorFlow once."""
    if READER == "get_tf_dataset" and type(adapter).__name__ != "PyDatasetAdapter":
        dataset = adapter.get_tf_dataset()
        return lambda: dataset

    def begin() -> Iterator[object]:
        adapter.on_epoch_begin()
        yield from getattr(adapter, READER)()
        adapter.on_epoch_end()

    return begin


def measured(begin: Callable[[], Iterable[object]]) -> float:
    """Microseconds a batch of one epoch."""
    began = time.perf_counter()
    count = sum(1 for _ in begin())
    return (time.perf_counter() - began) / count * 1e6


if __name__ == "__main__":
    main()
