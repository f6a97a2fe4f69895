"""The sources of a `ResumableDataset`'s batches: arrays, pipelines, functions, and datasets that are read by index."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import contextlib
import itertools
import math
import numbers
import random
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import keras
import numpy as np
import tensorflow as tf

from keras_ckpt.resume.pipelines import keeps_a_shuffled_epoch
from keras_ckpt.store.notices import warn

F = TypeVar("F", bound=Callable[..., Any])


def untranslated(function: F) -> F:
    """Keeps TensorFlow from reading the source of a function that needs no translation."""
    return cast(F, tf.autograph.experimental.do_not_convert(function))


class Source(abc.ABC):
    """A source of batches.

    Attributes:
        kind: The name of the kind of source.
        count: The number of batches in an epoch, `None` if it is endless.
        batch_size: The samples in a batch, `None` if the number is not known.
        repeatable: Whether the source can rewind to an earlier epoch.
        ahead: Whether batches may be read while the model trains.
    """

    kind: str
    count: int | None
    batch_size: int | None = None
    repeatable = True
    ahead = True

    @abc.abstractmethod
    def batches(self, number: tf.Tensor, start: tf.Tensor) -> tf.data.Dataset:
        """The batches of the epoch with this number, from batch `start` on, or the input of `loaded`."""

    def loaded(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        """The batches that belong to the results of `batches`."""
        return batches

    def seek(self, now: int, number: int) -> None:  # noqa: B027 - most sources have nothing to do
        """Prepares the epoch with this number, where the next epoch would be `now`."""

    @abc.abstractmethod
    def fingerprint(self) -> int | ValueError:
        """A checksum that identifies the data, or the error that tells why there is none."""


def source_of(x: Any, y: Any, sample_weight: Any, batch_size: int | None, shuffle: bool, seed: tf.Variable) -> Source:
    """The source for the arguments of a `ResumableDataset`."""
    others = {"y": y, "sample_weight": sample_weight, "batch_size": batch_size}
    given = [name for name, value in others.items() if value is not None]
    if isinstance(x, tf.data.Dataset) or callable(x):
        given += ["shuffle"] * shuffle
    elif not isinstance(x, keras.utils.PyDataset) and not _is_grain(x):
        return _Arrays(keras.utils.pack_x_y_sample_weight(x, y, sample_weight), batch_size, shuffle, seed)
    if given:
        raise ValueError(
            f"{', '.join(given)}: for arrays only. Received with x={x!r:.200}. Let x yield whole batches of (x, y) or "
            "(x, y, sample_weight), in the order for the training."
        )
    if isinstance(x, tf.data.Dataset):
        return _Pipeline(x)
    if isinstance(x, keras.utils.PyDataset):
        return _PyDataset(x, shuffle, seed)
    if callable(x):
        return _Function(x)
    count, endless = len(x), x.repeat()
    return _Indexed("Grain dataset", lambda number, index: endless[number * count + index], count, shuffle, seed)


class _Arrays(Source):
    """Arrays with samples along the first axis."""

    kind = "arrays"

    def __init__(self, arrays: Any, batch_size: Any, shuffle: bool, seed: tf.Variable) -> None:
        self._arrays = keras.tree.map_structure(_as_tensor, keras.tree.lists_to_tuples(arrays))
        sizes = {each.shape[0] for each in keras.tree.flatten(self._arrays)}
        if len(sizes) != 1:
            raise ValueError(
                f"ResumableDataset expected arrays with the same number of samples. Received: {sorted(sizes)}"
            )
        self._samples = sizes.pop()
        batch_size = 32 if batch_size is None else batch_size
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise ValueError(f"ResumableDataset expected a batch_size of at least 1. Received: {batch_size!r}")
        self.batch_size = int(batch_size)
        if not self._samples:
            raise ValueError("ResumableDataset expected samples. Received: arrays of length 0")
        self.count = math.ceil(self._samples / self.batch_size)
        self._shuffle = shuffle
        self._seed = seed

    def batches(self, number: tf.Tensor, start: tf.Tensor) -> tf.data.Dataset:
        order = tf.range(self._samples, dtype=tf.int64)
        if self._shuffle:
            seed = tf.stack([self._seed.read_value(), number])
            order = tf.random.experimental.stateless_shuffle(order, seed, alg="philox")
        # TensorFlow reads the rows of a matrix faster than slices of a vector. The last batch may not fill a row.
        full = self._samples // self.batch_size
        rows = tf.reshape(order[: full * self.batch_size], [full, self.batch_size])
        batches = tf.data.Dataset.from_tensor_slices(rows[start:])
        if full < self.count:
            batches = batches.concatenate(tf.data.Dataset.from_tensors(order[full * self.batch_size :]))
        return batches

    def loaded(self, batches: tf.data.Dataset) -> tf.data.Dataset:
        @untranslated
        def load(rows: tf.Tensor) -> Any:
            return keras.tree.map_structure(lambda each: tf.gather(each, rows), self._arrays)

        return batches.map(load, num_parallel_calls=tf.data.AUTOTUNE)

    def fingerprint(self) -> int:
        # The first samples, not the first batch, which depends on the seed.
        return _checksum((keras.tree.map_structure(lambda each: each[: self.batch_size], self._arrays), self._samples))


class _Pipeline(Source):
    """A `tf.data.Dataset`. Each new iterator reads the next epoch."""

    kind = "tf.data.Dataset"
    repeatable = False

    def __init__(self, dataset: tf.data.Dataset) -> None:
        self._dataset = dataset
        self.count = _known_length(dataset)
        if step := keeps_a_shuffled_epoch(dataset):
            warn(
                f"The pipeline has shuffle() before {step}(). The order of an epoch depends on how much of earlier "
                f"epochs was read, so a restart reads another order. Put {step}() before a single shuffle(), or give "
                "ResumableDataset a function that takes the number of an epoch and returns the pipeline."
            )

    def batches(self, number: tf.Tensor, start: tf.Tensor) -> tf.data.Dataset:
        return self._dataset.skip(start)

    def fingerprint(self) -> int:
        return _checksum(next(iter(self._dataset)))

    def seek(self, now: int, number: int) -> None:
        if number < now:
            raise ValueError(
                f"A tf.data.Dataset cannot rewind from epoch {now} to epoch {number}. Make a new ResumableDataset "
                "before this fit, or give it a function that takes the number of an epoch and returns the pipeline."
            )
        for _ in range(now, number):
            iter(self._dataset)


class _Function(Source):
    """A function that makes the pipeline of each epoch."""

    kind = "function"

    def __init__(self, function: Callable[[int], tf.data.Dataset]) -> None:
        self._function = function
        self._first = self._made(0)
        self.count = _known_length(self._first)
        self._spec = self._first.element_spec
        # Python must not collect a pipeline while TensorFlow reads from it.
        self._recent: collections.deque[tf.data.Dataset] = collections.deque(maxlen=4)

    def batches(self, number: tf.Tensor, start: tf.Tensor) -> tf.data.Dataset:
        def make(number: tf.Tensor) -> tf.Tensor:
            made = self._made(int(number))
            if _known_length(made) != self.count:
                raise ValueError(
                    f"Each epoch expected {self.count} batches, as the first has. Received: {_known_length(made)} in "
                    f"epoch {int(number)}"
                )
            self._recent.append(made)
            return tf.data.experimental.to_variant(made)

        variant = tf.py_function(make, [number], tf.variant)
        variant.set_shape(())
        return tf.data.experimental.from_variant(variant, self._spec).skip(start)

    def fingerprint(self) -> int:
        return _checksum(next(iter(self._first)))

    def _made(self, number: int) -> tf.data.Dataset:
        made = self._function(number)
        if not isinstance(made, tf.data.Dataset):
            raise TypeError(
                "ResumableDataset expected a function that takes the number of an epoch and returns a tf.data.Dataset. "
                f"It returned: {made!r:.200}"
            )
        return made


class _Indexed(Source):
    """Batches that Python fetches by index."""

    def __init__(
        self, kind: str, fetch: Callable[[int, int], Any], count: int | None, shuffle: bool, seed: tf.Variable
    ) -> None:
        self.kind = kind
        self.count = count
        self._fetch = fetch
        self._shuffle = shuffle
        self._seed = seed
        # As in Keras: where the first two batches differ in size, the spec allows any size.
        first, second = (self._batch(0, index) for index in (0, 0 if count == 1 else 1))
        self._spec = keras.tree.map_structure(_spec, first, second)

    @untranslated
    def batches(self, number: tf.Tensor, start: tf.Tensor) -> tf.data.Dataset:
        return tf.data.Dataset.from_generator(self._epoch, args=(number, start), output_signature=self._spec)

    def fingerprint(self) -> int | ValueError:
        first = _checksum(self._sample())
        if first != _checksum(self._sample()):
            return ValueError(
                f"A batch of this {self.kind} differs each time that it is read, so no epoch can be resumed. Draw its "
                "random numbers from a generator that is seeded with the number of the batch."
            )
        return first

    def _epoch(self, number: int, start: int) -> Iterator[Any]:
        yield from (self._batch(int(number), index) for index in self._order(number, int(start)))

    def _order(self, number: int, start: int) -> Iterable[int]:
        """The indices of the batches of an epoch, in their order, from batch `start` on."""
        if self.count is None:
            return itertools.count(start)
        if not self._shuffle:
            return range(start, self.count)
        # NumPy guarantees the raw stream in all versions.
        raw = np.random.Philox(key=[int(self._seed), int(number)]).random_raw(self.count)
        return list(map(int, np.argsort(raw, kind="stable")))[start:]

    def _sample(self) -> Any:
        """The batch with index 0, which does not depend on the seed."""
        return self._batch(0, 0)

    def _batch(self, number: int, index: int) -> Any:
        return keras.tree.map_structure(_as_array, keras.tree.lists_to_tuples(self._fetch(number, index)))


class _PyDataset(_Indexed):
    """A `PyDataset`. Its draws from the global generators are a function of the seed, the epoch and the batch."""

    def __init__(self, dataset: keras.utils.PyDataset, shuffle: bool, seed: tf.Variable) -> None:
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
        super().__init__("PyDataset", self._item, count, shuffle, seed)

    def seek(self, now: int, number: int) -> None:
        if number < self._begun and not self.repeatable:
            raise ValueError(
                f"This PyDataset cannot rewind to epoch {number}, because its on_epoch_end() may have changed it. Make "
                "a new PyDataset before this fit."
            )

    def _sample(self) -> Any:
        with _seeded(0, 0, 0):
            return keras.tree.map_structure(_as_array, keras.tree.lists_to_tuples(self._dataset[0]))

    def _item(self, number: int, index: int) -> Any:
        if not self._draws:
            return self._dataset[index]
        with _seeded(int(self._seed), number, index):
            return self._dataset[index]

    def _epoch(self, number: int, start: int) -> Iterator[Any]:
        self._begin(int(number))
        order = self._order(number, int(start))
        pool = self._pool()
        if pool is None:
            yield from (self._batch(int(number), index) for index in order)
            return
        fetch = _fetch_adopted if self._dataset.use_multiprocessing else self._batch
        with pool:
            yield from _ahead(lambda index: pool.submit(fetch, int(number), index), order, self._dataset.max_queue_size)

    def _pool(self) -> concurrent.futures.Executor | None:
        """A pool of the dataset's workers, `None` if it has none."""
        workers = self._dataset.workers
        if self._dataset.use_multiprocessing and workers > 0:
            return concurrent.futures.ProcessPoolExecutor(workers, initializer=_adopt, initargs=(self._batch,))
        return concurrent.futures.ThreadPoolExecutor(workers) if workers > 1 else None

    def _begin(self, number: int) -> None:
        """Calls the dataset's epoch methods up to the start of an epoch, so that its own shuffling is repeated."""
        for each in range(self._begun, number):
            if each >= 0:
                with _seeded(int(self._seed), each, -2):
                    self._dataset.on_epoch_end()
            with _seeded(int(self._seed), each + 1, -1):
                self._dataset.on_epoch_begin()
        self._begun = max(self._begun, number)


def _draws_from_globals(dataset: keras.utils.PyDataset) -> bool:
    """Whether a batch of a dataset draws from Python's or NumPy's global generator."""
    with _seeded(0, 0, 0):
        before = random.getstate(), repr(np.random.get_state(legacy=False))
        _ = dataset[0], dataset[0 if dataset.num_batches == 1 else 1]
        return before != (random.getstate(), repr(np.random.get_state(legacy=False)))


_adopted: list[Callable[[int, int], Any]] = []


def _adopt(fetch: Callable[[int, int], Any]) -> None:
    """Stores the function that fetches a batch in a new worker process, which gets it once, not for each batch."""
    global _generators_lock  # noqa: PLW0603
    _generators_lock = threading.RLock()  # the parent may have held its lock when it forked this process
    _adopted[:] = [fetch]


def _fetch_adopted(number: int, index: int) -> Any:
    return _adopted[0](number, index)


def _ahead(fetch: Callable[[int], Any], order: Iterable[int], most: int) -> Iterator[Any]:
    """Yields the results of background fetches in order, with at most so many results waiting."""
    waiting: collections.deque[Any] = collections.deque()
    for index in order:
        waiting.append(fetch(index))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_generators_lock = threading.RLock()


@contextlib.contextmanager
def _seeded(seed: int, number: int, index: int) -> Iterator[None]:
    """Seeds Python's and NumPy's global generators with three numbers, and restores the generators afterwards."""
    with _generators_lock:
        before = random.getstate(), np.random.get_state()
        random.seed(f"{seed} {number} {index}")
        np.random.seed([seed % 2**32, seed >> 32, number % 2**32, index % 2**32])
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def _is_grain(x: Any) -> bool:
    return any(each.__name__ == "MapDataset" and each.__module__.startswith("grain") for each in type(x).__mro__)


def _known_length(dataset: tf.data.Dataset) -> int | None:
    """The number of batches of a pipeline, `None` if it is endless."""
    count = int(dataset.cardinality())
    if count == tf.data.INFINITE_CARDINALITY:
        return None
    if count <= 0:
        found = "is not known" if count == tf.data.UNKNOWN_CARDINALITY else "is 0"
        raise ValueError(
            f"ResumableDataset expected a pipeline with a known number of batches. Received one whose number {found}. "
            "End it with .take(n), or give the number with .apply(tf.data.experimental.assert_cardinality(n))."
        )
    return count


def _spec(first: np.ndarray, second: np.ndarray) -> tf.TensorSpec:
    sizes = zip(first.shape[1:], second.shape[1:], strict=True)
    return tf.TensorSpec((None, *(one if one == other else None for one, other in sizes)), first.dtype)


def _as_tensor(array: Any) -> tf.Tensor:
    try:
        tensor = tf.convert_to_tensor(array)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "ResumableDataset expected arrays, a tf.data.Dataset, a PyDataset, a Grain MapDataset, or a function that "
            f"takes the number of an epoch. Received: {array!r:.200}"
        ) from error
    if tensor.shape.rank in (0, None):
        raise ValueError(
            f"ResumableDataset expected arrays with samples along the first axis. Received: {array!r:.200}"
        )
    return tf.cast(tensor, keras.config.floatx()) if tensor.dtype.is_floating else tensor


def _as_array(array: Any) -> Any:
    array = np.asarray(array)
    return array.astype(keras.config.floatx(), copy=False) if array.dtype.kind == "f" else array


def _checksum(batch: Any) -> int:
    checksum = 0
    for each in tf.nest.flatten(batch, expand_composites=True):
        array = np.asarray(each)
        checksum = zlib.crc32(repr(array.tolist()).encode() if array.dtype == object else array.tobytes(), checksum)
    return checksum
