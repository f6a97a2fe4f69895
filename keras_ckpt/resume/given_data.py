"""The source for the data that a user gives to a `ResumableDataset`, and the function that gives each epoch's data."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

from keras_ckpt.resume.data_sources import (
    Arrays,
    Epoch,
    FromPyDataset,
    Indexed,
    Source,
    as_batch,
    repeated_checksum,
    seeded,
)


def source_of(x: Any, y: Any, sample_weight: Any, batch_size: int | None, shuffle: bool) -> Source:
    """The source for the arguments of a `ResumableDataset`."""
    if _is_stream(x):
        raise TypeError(
            "ResumableDataset cannot resume a DataLoader of an IterableDataset, which a restart can enter at its begin "
            f"alone. Received: {x.dataset!r:.200}. Give the DataLoader a map-style dataset, or give ResumableDataset a "
            "function that takes the number of an epoch and returns the DataLoader of this epoch."
        )
    source = _Function(x) if callable(x) else _dataset(x, shuffle)
    if source is None:
        return Arrays(keras.utils.pack_x_y_sample_weight(x, y, sample_weight), batch_size, shuffle)
    others = {"y": y, "sample_weight": sample_weight, "batch_size": batch_size}
    given = [name for name, value in others.items() if value is not None]
    given += ["shuffle"] * (shuffle and not isinstance(source, Indexed))
    if given:
        raise ValueError(
            f"{', '.join(given)}: for arrays only. Received with x={x!r:.200}. Let x yield whole batches of (x, y) or "
            "(x, y, sample_weight), in the order for the training."
        )
    return source


def _dataset(x: Any, shuffle: bool = False) -> Source | None:
    """The source for a dataset of batches, `None` if `x` is none."""
    # Only a program that has imported a framework can give an object of it.
    if (tensorflow := sys.modules.get("tensorflow")) and isinstance(x, tensorflow.data.Dataset):
        from keras_ckpt.resume.pipelines import Pipeline

        return Pipeline(x)
    if _is_loader(x) and not _is_stream(x):
        from keras_ckpt.resume.data_loaders import Loader

        return Loader(x)
    if isinstance(x, keras.utils.PyDataset):
        return FromPyDataset(x, shuffle)
    if any(each.__name__ == "MapDataset" and each.__module__.startswith("grain") for each in type(x).__mro__):
        count, endless = len(x), x.repeat()
        return Indexed("Grain dataset", lambda epoch, index: endless[epoch.number * count + index], count, shuffle)
    return None


def _is_loader(x: Any) -> bool:
    """Whether an object is a PyTorch `DataLoader`."""
    torch = sys.modules.get("torch.utils.data")
    return torch is not None and isinstance(x, torch.DataLoader)


def _is_stream(x: Any) -> bool:
    """Whether an object is a `DataLoader` of an iterable dataset."""
    return _is_loader(x) and isinstance(x.dataset, sys.modules["torch.utils.data"].IterableDataset)


class _Function(Source):
    """A function that makes the data of each epoch."""

    kind = "function"

    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function
        self._first = self._made(0)
        self.count = self._first.count
        self.ahead = self._first.ahead

    def look(self) -> tuple[list[Any], int | ValueError]:
        return self._first.look()

    def batches(self, epoch: Epoch) -> Iterator[Any]:
        yield from self.of_epoch(epoch.number).batches(epoch)

    def of_epoch(self, number: int) -> Source:
        made = self._made(number)
        if made.count != self.count:
            raise ValueError(
                f"Each epoch expected {self.count} batches, as the first has. Received: {made.count} in epoch {number}"
            )
        return made

    def _made(self, number: int) -> Source:
        made = self._function(number)
        source = _dataset(made)
        if source is None and isinstance(made, Iterable) and not isinstance(made, tuple | dict | str):
            source = _Iterable(made)
        if source is None:
            raise TypeError(
                "ResumableDataset expected a function that takes the number of an epoch and returns a tf.data.Dataset, "
                f"or another iterable of batches. It returned: {made!r:.200}"
            )
        return source


class _Iterable(Source):
    """An iterable of the batches of one epoch. Its draws from the global generators are a function of the batch."""

    kind = "iterable"
    ahead = False

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable
        try:
            self.count = len(iterable)  # type: ignore[arg-type]
        except TypeError as error:
            raise ValueError(
                "ResumableDataset expected a function that returns data with a known number of batches. Received: "
                f"{iterable!r:.200}, which has no len(). Give it a __len__(), or return a list."
            ) from error

    def look(self) -> tuple[list[Any], int | ValueError]:
        first, again = (list(itertools.islice(self.batches(Epoch(0, 0)), 2)) for _ in range(2))
        return first, repeated_checksum(self.kind, first, again)

    def batches(self, epoch: Epoch) -> Iterator[Any]:
        with seeded(epoch.seed, epoch.number, -1):
            batches = iter(self._iterable)
        for index in range(self.count or 0):
            with seeded(epoch.seed, epoch.number, index):
                batch = next(batches)
            if index >= epoch.start:
                yield as_batch(batch)
