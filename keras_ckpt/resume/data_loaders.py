"""PyTorch: a `DataLoader` as a source of batches, and batches as tensors. Only this module imports PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from keras_ckpt.resume.data_sources import Epoch, Source, as_batch, repeated_checksum, seeded


class Loader(Source):
    """A `DataLoader` of a map-style dataset, read by a loader of our own.

    Its samplers give the order of each epoch. A worker gets the samples of a batch and the seed of its draws. So a
    batch does not depend on the number of workers, nor on the batches before it.
    """

    kind = "DataLoader"
    ahead = False

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        samplers = (loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None), loader.sampler)
        self._samplers = [each for each in samplers if each is not None]
        try:
            self.count = len(loader)
        except TypeError as error:
            raise ValueError(
                "ResumableDataset expected a DataLoader with a known number of batches. Received one whose sampler has "
                f"no len(): {self._samplers[-1]!r:.200}. Give the sampler a __len__()."
            ) from error
        if not self.count:
            raise ValueError(f"ResumableDataset expected a DataLoader with batches. Received: {loader!r:.200} with 0")
        self.batch_size = loader.batch_size
        if loader.generator is not None:
            self.seed = loader.generator.initial_seed() % 2**63
        self._tasks = _Tasks()
        self._batches = _Batches(loader)
        self._reader: DataLoader[Any] = DataLoader(
            self._batches,
            batch_size=None,
            sampler=self._tasks,
            collate_fn=_unchanged,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=torch.Generator(),  # or the global generator would be drawn from
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=loader.persistent_workers,
        )

    def look(self) -> tuple[list[Any], int | ValueError]:
        # Not by the workers, which take their time to begin.
        tasks = list(itertools.islice(self._order(Epoch(0, 0)), 2))
        first = [as_batch(self._batches[task]) for task in tasks]
        return first, repeated_checksum(self.kind, first[0], as_batch(self._batches[tasks[0]]))

    def batches(self, epoch: Epoch) -> Iterator[Any]:
        tasks = list(self._order(epoch))
        if len(tasks) != self.count:
            raise ValueError(
                f"Each epoch expected {self.count} batches, as the DataLoader's len() says. Received: {len(tasks)} "
                f"from its sampler in epoch {epoch.number}"
            )
        self._tasks.all = tasks[epoch.start :]
        yield from map(as_batch, self._reader)

    def _order(self, epoch: Epoch) -> Iterator[Any]:
        """The task of each batch of an epoch."""
        with seeded(epoch.seed, epoch.number, -1):
            for each in self._samplers:
                if hasattr(each, "set_epoch"):
                    each.set_epoch(epoch.number)
                if isinstance(generator := getattr(each, "generator", None), torch.Generator):
                    generator.manual_seed(int(torch.randint(2**62, ())))
            rows = list(self._samplers[0])
        return (((epoch.seed, epoch.number, index), each) for index, each in enumerate(rows))


class _Tasks:
    """A sampler of the tasks of an epoch."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.all)


class _Batches(Dataset[Any]):
    """The batches of a loader by task: the numbers that seed its draws, and what the sampler gave."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._dataset = loader.dataset
        self._collate = loader.collate_fn
        self._is_batched = loader.batch_sampler is not None

    def __getitem__(self, task: tuple[tuple[int, int, int], Any]) -> Any:
        seeds, rows = task
        with seeded(*seeds):
            if not self._is_batched:
                samples = self._dataset[rows]
            elif getattr(self._dataset, "__getitems__", None):
                samples = self._dataset.__getitems__(rows)
            else:
                samples = [self._dataset[each] for each in rows]
            return self._collate(samples)


def _unchanged(batch: Any) -> Any:
    return batch


def as_tensors(batch: Any) -> Any:
    """A batch as tensors in the memory of its arrays. Arrays of other things than numbers stay as they are."""
    return keras.tree.map_structure(_as_tensor, batch)


def _as_tensor(array: np.ndarray) -> Any:
    if array.dtype.kind not in "biufc":
        return array
    return torch.from_numpy(array if array.flags.writeable else array.copy())
