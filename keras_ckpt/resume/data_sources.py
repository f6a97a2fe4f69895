"""The sources of a `ResumableDataset`'s batches that NumPy reads: arrays, and datasets that are read by index."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import contextlib
import itertools
import math
import numbers
import os
import random
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np


class Epoch(NamedTuple):
    """An epoch that is read from one of its batches on.

    Attributes:
        seed: The seed of the data.
        number: The number of the epoch.
        start: The first batch.
    """

    seed: int
    number: int
    start: int = 0


class Source(abc.ABC):
    """A source of batches, which are structures of NumPy arrays.

    Attributes:
        kind: The name of the kind of source.
        count: The number of batches in an epoch, `None` if it is endless.
        batch_size: The samples in a batch, `None` if the number is not known.
        partial: The samples in the last batch if it is smaller, `None` if the number is not known.
        seed: The seed for the data if the user gives none, `None` if the source has none either.
        repeatable: Whether the source can rewind to an earlier epoch.
        ahead: Whether batches may be read while the model trains.
    """

    kind: str
    count: int | None
    batch_size: int | None = None
    partial: int | None = None
    seed: int | None = None
    repeatable = True
    ahead = True

    @abc.abstractmethod
    def look(self) -> tuple[list[Any], int | ValueError]:
        """Reads one or two of the first batches.

        Returns:
            The batches, and a checksum that identifies the data, or the error that tells why there is none.
        """

    @abc.abstractmethod
    def batches(self, epoch: Epoch) -> Iterator[Any]:
        """The batches of an epoch."""

    def of_epoch(self, number: int) -> Source:
        """The source of the epoch with this number."""
        return self

    def seek(self, now: int, number: int) -> None:  # noqa: B027 - most sources have nothing to do
        """Prepares the epoch with this number, where the next epoch would be `now`."""


def order(epoch: Epoch, count: int, shuffle: bool) -> np.ndarray:
    """The numbers below `count` in their order in an epoch. It is the same on every machine and backend."""
    places = np.arange(count)
    if not shuffle:
        return places
    # NumPy guarantees the raw stream in all versions. The places in the low bits keep the keys different, and the sort
    # of such keys is several times as fast as `argsort`.
    bits = np.uint64(max(count - 1, 1).bit_length())
    keys = np.random.Philox(key=[epoch.seed, epoch.number]).random_raw(count)
    keys = keys >> bits << bits | places.view(np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).view(np.int64)


class Arrays(Source):
    """Arrays with samples along the first axis."""

    kind = "arrays"

    def __init__(self, arrays: Any, batch_size: Any, shuffle: bool) -> None:
        self.arrays = keras.tree.map_structure(_as_samples, keras.tree.lists_to_tuples(arrays))
        sizes = {len(each) for each in keras.tree.flatten(self.arrays)}
        if len(sizes) != 1:
            raise ValueError(
                f"ResumableDataset expected arrays with the same number of samples. Received: {sorted(sizes)}"
            )
        self.samples = sizes.pop()
        batch_size = 32 if batch_size is None else batch_size
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise ValueError(f"ResumableDataset expected a batch_size of at least 1. Received: {batch_size!r}")
        self.batch_size: int = int(batch_size)
        if not self.samples:
            raise ValueError("ResumableDataset expected samples. Received: arrays of length 0")
        self.count: int = math.ceil(self.samples / self.batch_size)
        self.partial = self.samples % self.batch_size
        self._shuffle = shuffle

    def look(self) -> tuple[list[Any], int]:
        # The first samples, not the first batch, which depends on the seed.
        first = self._rows(slice(self.batch_size))
        return [first], checksum((first, self.samples))

    def batches(self, epoch: Epoch) -> Iterator[Any]:
        places = self.order(epoch) if self._shuffle else None
        for begin in range(epoch.start * self.batch_size, self.samples, self.batch_size):
            rows = slice(begin, begin + self.batch_size)
            yield self._rows(rows if places is None else places[rows])

    def order(self, epoch: Epoch) -> np.ndarray:
        """The samples in their order in an epoch."""
        return order(epoch, self.samples, self._shuffle)

    def _rows(self, rows: slice | np.ndarray) -> Any:
        if isinstance(rows, slice):
            return keras.tree.map_structure(lambda each: each[rows], self.arrays)
        return keras.tree.map_structure(lambda each: each.take(rows, axis=0), self.arrays)


class Indexed(Source):
    """Batches that Python fetches by index."""

    def __init__(self, kind: str, fetch: Callable[[Epoch, int], Any], count: int | None, shuffle: bool) -> None:
        self.kind = kind
        self.count = count
        self._fetch = fetch
        self._shuffle = shuffle

    def look(self) -> tuple[list[Any], int | ValueError]:
        first, second = (self._sample(index) for index in (0, 0 if self.count == 1 else 1))
        return [first, second], repeated_checksum(self.kind, first, self._sample(0))

    def batches(self, epoch: Epoch) -> Iterator[Any]:
        yield from (self._batch(epoch, index) for index in self._order(epoch))

    def _order(self, epoch: Epoch) -> Iterable[int]:
        """The indices of the batches of an epoch, in their order."""
        if self.count is None:
            return itertools.count(epoch.start)
        return map(int, order(epoch, self.count, self._shuffle)[epoch.start :])

    def _sample(self, index: int) -> Any:
        """A batch, as it is with the seed 0."""
        return self._batch(Epoch(0, 0), index)

    def _batch(self, epoch: Epoch, index: int) -> Any:
        return as_batch(self._fetch(epoch, index))


class FromPyDataset(Indexed):
    """A `PyDataset`. Its draws from the global generators are a function of the seed, the epoch and the batch."""

    def __init__(self, dataset: keras.utils.PyDataset, shuffle: bool) -> None:
        count = dataset.num_batches
        if count is None and shuffle:
            raise ValueError(
                f"An endless PyDataset has no order to shuffle. Received: shuffle=True with {dataset!r:.200}. Let the "
                "dataset shuffle itself, by the number of the batch."
            )
        kind, base = type(dataset), keras.utils.PyDataset
        self.repeatable = (kind.on_epoch_begin, kind.on_epoch_end) == (base.on_epoch_begin, base.on_epoch_end)
        self._dataset = dataset
        self._begun = -1
        processes = dataset.use_multiprocessing and dataset.workers > 0
        self._draws = _draws_from_globals(dataset)
        if self._draws and not processes:
            if dataset.workers > 1:
                raise ValueError(
                    "This PyDataset draws from Python's or NumPy's global generator. Its workers are threads, which "
                    "share the generator, so its batches differ each time. Give it use_multiprocessing=True, or let it "
                    "draw from a generator that is seeded with the number of the batch."
                )
            # While a batch is read, other code must not draw from the global generators.
            self.ahead = False
        super().__init__("PyDataset", self._item, count, shuffle)

    def seek(self, now: int, number: int) -> None:
        if number < self._begun and not self.repeatable:
            raise ValueError(
                f"This PyDataset cannot rewind to epoch {number}, because its on_epoch_end() may have changed it. Make "
                "a new PyDataset before this fit."
            )

    def batches(self, epoch: Epoch) -> Iterator[Any]:
        self._begin(epoch)
        indices = self._order(epoch)
        pool = self._pool()
        if pool is None:
            yield from (self._batch(epoch, index) for index in indices)
            return
        fetch = _fetch_adopted if self._dataset.use_multiprocessing else self._batch
        with pool:
            yield from _ahead(lambda index: pool.submit(fetch, epoch, index), indices, self._dataset.max_queue_size)

    def _sample(self, index: int) -> Any:
        # Seeded even if the first batches drew nothing: another batch may draw, or this one in another process.
        with seeded(0, 0, index):
            return super()._sample(index)

    def _item(self, epoch: Epoch, index: int) -> Any:
        if not self._draws:
            return self._dataset[index]
        with seeded(epoch.seed, epoch.number, index):
            return self._dataset[index]

    def _pool(self) -> concurrent.futures.Executor | None:
        """A pool of the dataset's workers, `None` if it has none."""
        workers = self._dataset.workers
        if self._dataset.use_multiprocessing and workers > 0:
            return concurrent.futures.ProcessPoolExecutor(workers, initializer=_adopt, initargs=(self._batch,))
        return concurrent.futures.ThreadPoolExecutor(workers) if workers > 1 else None

    def _begin(self, epoch: Epoch) -> None:
        """Calls the dataset's epoch methods up to the start of an epoch, so that its own shuffling is repeated."""
        for each in range(self._begun, epoch.number):
            if each >= 0:
                with seeded(epoch.seed, each, -2):
                    self._dataset.on_epoch_end()
            with seeded(epoch.seed, each + 1, -1):
                self._dataset.on_epoch_begin()
        self._begun = max(self._begun, epoch.number)


def _draws_from_globals(dataset: keras.utils.PyDataset) -> bool:
    """Whether a batch of a dataset draws from a global generator."""
    with seeded(0, 0, 0):
        before = repr(_generators())
        _ = dataset[0], dataset[0 if dataset.num_batches == 1 else 1]
        return before != repr(_generators())


_adopted: list[Callable[[Epoch, int], Any]] = []


def _adopt(fetch: Callable[[Epoch, int], Any]) -> None:
    """Stores the function that fetches a batch in a new worker process, which gets it once, not for each batch."""
    _adopted[:] = [fetch]


def _fetch_adopted(epoch: Epoch, index: int) -> Any:
    return _adopted[0](epoch, index)


def _ahead(fetch: Callable[[int], Any], indices: Iterable[int], most: int) -> Iterator[Any]:
    """Yields the results of background fetches in order, with at most so many results waiting."""
    waiting: collections.deque[Any] = collections.deque()
    for index in indices:
        waiting.append(fetch(index))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_generators_lock = threading.RLock()


def _renew_lock() -> None:
    global _generators_lock  # noqa: PLW0603
    _generators_lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)  # another thread of the parent may have held it


@contextlib.contextmanager
def seeded(seed: int, number: int, index: int) -> Iterator[None]:
    """Seeds the global generators of Python, NumPy and PyTorch with three numbers, and restores them afterwards.

    PyTorch counts if it is loaded.
    """
    with _generators_lock:
        torch = sys.modules.get("torch")
        before = _generators()
        random.seed(f"{seed} {number} {index}")
        np.random.seed([seed % 2**32, seed >> 32, number % 2**32, index % 2**32])
        if torch is not None:
            torch.default_generator.manual_seed(random.getrandbits(63))
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
            if torch is not None:
                torch.default_generator.set_state(before[2])


def _generators() -> tuple[Any, Any, Any]:
    """The states of the global generators of Python, NumPy and PyTorch."""
    torch = sys.modules.get("torch")
    state = None if torch is None else torch.default_generator.get_state()
    return random.getstate(), np.random.get_state(), state


def _as_samples(array: Any) -> np.ndarray:
    """An array with samples along the first axis."""
    try:
        found = as_array(array)
        if found.dtype == object and not isinstance(next(iter(found.flat), ""), str | bytes):
            raise TypeError("neither numbers nor text")
    except (TypeError, ValueError) as error:
        raise TypeError(
            "ResumableDataset expected arrays, a tf.data.Dataset, a PyDataset, a PyTorch DataLoader, a Grain "
            f"MapDataset, or a function that takes the number of an epoch. Received: {array!r:.200}"
        ) from error
    if not found.ndim:
        raise ValueError(
            f"ResumableDataset expected arrays with samples along the first axis. Received: {array!r:.200}"
        )
    return found


def as_batch(batch: Any) -> Any:
    """A batch as a structure of NumPy arrays."""
    return keras.tree.map_structure(as_array, keras.tree.lists_to_tuples(batch))


def as_array(array: Any) -> np.ndarray:
    """The array of a tensor of any framework, without a copy where its memory is that of the processor."""
    found: np.ndarray = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    return found.astype(keras.config.floatx(), copy=False) if found.dtype.kind == "f" else found


def repeated_checksum(kind: str, first: Any, again: Any) -> int | ValueError:
    """The checksum of a batch that was read twice, or the error that the readings differ."""
    found = checksum(first)
    if found == checksum(again):
        return found
    return ValueError(
        f"A batch of this {kind} differs each time that it is read, so no epoch can be resumed. Draw its random "
        "numbers from a generator that is seeded with the number of the batch."
    )


def checksum(batch: Any) -> int:
    """A checksum of the values of a batch."""
    found = 0
    for each in keras.tree.flatten(batch):
        array = np.asarray(each)
        found = zlib.crc32(repr(array.tolist()).encode() if array.dtype == object else array.tobytes(), found)
    return found
