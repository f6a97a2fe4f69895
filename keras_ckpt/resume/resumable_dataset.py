"""`ResumableDataset`: training data that resumes at any batch of any epoch."""

from __future__ import annotations

import functools
import itertools
import numbers
import random
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_ckpt.errors import MismatchError
from keras_ckpt.model.keras_internals import DataAdapter, builds_a_model, fit_in_progress
from keras_ckpt.resume.class_weights import ClassWeights
from keras_ckpt.resume.data_sources import Epoch
from keras_ckpt.resume.given_data import source_of
from keras_ckpt.store.notices import warn


class _Batches(DataAdapter):
    """Batches that `fit` reads through the method of its backend, and a loop by iteration."""

    def __iter__(self) -> Iterator[Any]:
        readers = {"tensorflow": self.get_tf_dataset, "torch": self.get_torch_dataloader}
        batches: Iterator[Any] = iter(readers.get(keras.backend.backend(), self.get_numpy_iterator)())
        return batches

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"A ResumableDataset has no {name!r}. It is no tf.data.Dataset, and has no steps such as map() or batch(). "
            "Give the steps to the pipeline inside it, ResumableDataset(pipeline.map(...)), or give it a function that "
            "takes the number of an epoch and returns the pipeline of the epoch."
        )

    def get_jax_iterator(self) -> Iterator[Any]:
        batches: Iterator[Any] = self.get_numpy_iterator()
        return batches

    def on_epoch_begin(self) -> None:
        fit = fit_in_progress()
        if fit.adapter is self and fit.beside:
            raise ValueError(
                f"fit() ignores {', '.join(fit.beside)} beside a ResumableDataset. Give them to the ResumableDataset: "
                f"ResumableDataset(x, {', '.join(f'{name}={name}' for name in fit.beside)})."
            )


class ResumableDataset(_Batches):
    """Training data that resumes after a restart at the same batch, in the same order.

    The order of an epoch is a function of the seed and the number of the epoch. It is the same on every backend of
    Keras. An epoch here is a whole reading of the data. Give the dataset both to `fit` and to `BackupAndRestore`.

    Sources that are read by index (arrays, a `PyDataset`, a Grain `MapDataset`, a map-style `DataLoader`) resume within
    an epoch at once. A `tf.data.Dataset` reads the earlier batches again, and does not train on them. The order of its
    epochs must not depend on the reading of earlier epochs, as after `shuffle().cache()` or `shuffle().shuffle()`. A
    function that returns the data of an epoch does not have this limit.

    Example:

    ```python
    data = keras_ckpt.ResumableDataset(x, y, batch_size=64, shuffle=True, seed=1)
    backup = keras_ckpt.BackupAndRestore("runs/digits/backup", save_freq=50, data=data)
    model.fit(data, epochs=30, callbacks=[backup])
    ```

    With `steps_per_epoch`, an epoch of `fit` ends in the middle of the data, so the data must be endless. Give
    `BackupAndRestore` the dataset, and `fit(data.repeat(), steps_per_epoch=100)` the repeated dataset.

    Args:
        x: The data. Its first batches are read at once, as a fingerprint. It is one of these:

            - Arrays: NumPy arrays or tensors with samples along the first axis, or a dict, list or tuple of them.
            - A `keras.utils.PyDataset`. Its draws from the global generators of Python, NumPy and PyTorch become a
              function of the seed, the epoch and the batch. On TensorFlow, training waits while it is read, unless its
              workers are processes.
            - A PyTorch `DataLoader` of a map-style dataset, with any sampler, `collate_fn` and number of workers. Its
              order and its draws from the global generators become such a function too, with a `generator` or without.
            - A Grain `MapDataset` of batches.
            - A `tf.data.Dataset` of batches with seeded shuffles. The number of its batches is known or infinite.
            - A function that takes the number of an epoch, from 0, and returns its batches: a `tf.data.Dataset`, one of
              the other datasets, or an iterable with a length.
        y: The targets, if `x` is arrays.
        sample_weight: A weight for each sample, if `x` is arrays.
        class_weight: A dict of weights by the number of the class, as in `fit`. It gives samples a weight, and leaves
            the targets unchanged.
        batch_size: The samples in a batch, if `x` is arrays. Defaults to 32.
        shuffle: Whether each epoch has another order: of the samples of arrays, of the batches of a `PyDataset`.
        seed: An int that determines the order. Without a seed, the `generator` of a `DataLoader` gives it, or Python's
            `random` draws it. The backup holds it.

    Raises:
        ValueError, TypeError: An argument is wrong.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        class_weight: Mapping[int, float] | None = None,
        batch_size: int | None = None,
        shuffle: bool = False,
        seed: int | None = None,
    ) -> None:
        if not isinstance(shuffle, bool):
            raise TypeError(f"ResumableDataset expected shuffle True or False. Received: shuffle={shuffle!r}")
        if seed is not None and (not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**63):
            raise ValueError(f"ResumableDataset expected a seed of 0 or more. Received: seed={seed!r}")
        if isinstance(x, _Batches):
            raise TypeError("ResumableDataset expected data to wrap. Received: a ResumableDataset")
        self._weights = ClassWeights(class_weight) if class_weight else None
        self._shuffle = shuffle
        self._source = source_of(x, y, sample_weight, batch_size, shuffle)
        self._own_seed = seed is None
        given = self._source.seed if seed is None else int(seed)
        self._seed = random.getrandbits(31) if given is None else given
        # Read here, because it begins the first epoch of a source that cannot rewind, with a backup or without.
        first, self._fingerprint = self._source.look()
        self._like = keras.tree.map_structure(_without_values, self._weighed(first[0]))
        self._first = keras.tree.map_structure(_without_values, first)
        self._next = (0 if self._source.repeatable else 1, 0)
        self._skips_a_step = False

    def __len__(self) -> int:
        if self.num_batches is None:
            raise TypeError("The ResumableDataset is endless.")
        return self.num_batches

    @property
    def num_batches(self) -> int | None:
        """The number of batches in an epoch, `None` if it is endless."""
        return self._source.count

    @property
    def batch_size(self) -> int | None:
        """The samples in a batch, `None` if the number is not known."""
        return self._source.batch_size

    @property
    def has_partial_batch(self) -> bool | None:
        return None if self._source.partial is None else self._source.partial > 0

    @property
    def partial_batch_size(self) -> int | None:
        return self._source.partial or None

    @property
    def element_spec(self) -> Any:
        """The shapes and types of a batch, as the backend describes them."""
        return self.get_tf_dataset().element_spec if keras.backend.backend() == "tensorflow" else self._like

    @property
    def passes(self) -> int:
        """The number of epochs that have begun, which is the number of the next epoch."""
        return self._next[0]

    def repeat(self) -> DataAdapter:
        """The same batches as endless data, for `fit` with `steps_per_epoch`."""
        return _Repeated(self)

    def is_read_by(self, adapter: DataAdapter) -> bool:
        """Whether an adapter, through which `fit` reads its data, reads this dataset."""
        return adapter is self or (isinstance(adapter, _Repeated) and adapter.data is self)

    def get_tf_dataset(self) -> Any:
        return self._tf_dataset

    @functools.cached_property
    def _tf_dataset(self) -> Any:
        from keras_ckpt.resume.pipelines import dataset_of

        return dataset_of(self._source, self._begin, self._first, self._weights)

    def get_numpy_iterator(self) -> Iterator[Any]:
        return iter([self._like]) if builds_a_model() else self._read()

    def get_torch_dataloader(self) -> Iterator[Any]:
        return iter([self._like]) if builds_a_model() else self._read_as_tensors()

    def get_state(self) -> dict[str, Any]:
        """The state that another process needs to resume: plain numbers and strings.

        Raises:
            ValueError: Each reading of the data gives other values.
        """
        if isinstance(self._fingerprint, ValueError):
            raise self._fingerprint
        return {
            "kind": self._source.kind,
            "batches": self._source.count,
            "batch_size": self._source.batch_size,
            "first_batch": self._fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "class_weight": self._weights and str(self._weights),
            "pass": self.passes,
        }

    def set_state(self, state: Mapping[str, Any], batch: int = 0, skips_a_step: bool = False) -> None:
        """Resumes from the state of another process.

        Args:
            state: The result of `get_state` in the other process.
            batch: The batch with which the next epoch begins.
            skips_a_step: Whether `fit` begins with a step that trains nothing. On PyTorch, `fit` reads a batch for it.

        Raises:
            MismatchError: The data differs, or its order does.
        """
        if self._own_seed:
            self._seed = state["seed"]
        mine = self.get_state()
        for name, mend in _MENDS.items():
            if state.get(name, mine[name]) != mine[name]:  # older backups do not have every value
                raise MismatchError(
                    f"The data differs from the data of the backup: {name.replace('_', ' ')} {mine[name]!r} here, "
                    f"{state[name]!r} there. {mend}"
                )
        weights = mine["class_weight"]
        if state.get("class_weight", weights) != weights:
            warn(
                f"The samples are weighted by class_weight {weights} as in the program, not "
                f"{state['class_weight']} as saved."
            )
        self._source.seek(self.passes, state["pass"])
        self._next = (state["pass"], batch)
        self._skips_a_step = skips_a_step

    def _begin(self) -> Epoch:
        """Begins the next epoch, at its first read: Keras makes iterators that it does not read."""
        number, start = self._next
        self._next = (number + 1, 0)
        return Epoch(self._seed, number, start)

    def _read(self) -> Iterator[Any]:
        yield from map(self._weighed, self._source.batches(self._begin()))

    def _read_as_tensors(self) -> Iterator[Any]:
        from keras_ckpt.resume.data_loaders import as_tensors

        skips_a_step, self._skips_a_step = self._skips_a_step, False
        if skips_a_step:
            yield self._like
        yield from map(as_tensors, self._read())

    def _weighed(self, batch: Any) -> Any:
        return batch if self._weights is None else self._weights.weigh(batch)


class _Repeated(_Batches):
    """A `ResumableDataset` over and over."""

    num_batches = None
    has_partial_batch = None
    partial_batch_size = None

    def __init__(self, data: ResumableDataset) -> None:
        self.data = data

    @property
    def batch_size(self) -> int | None:
        return self.data.batch_size

    def get_tf_dataset(self) -> Any:
        return self.data.get_tf_dataset().repeat()

    def get_numpy_iterator(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(iter(self.data.get_numpy_iterator, None))

    def get_torch_dataloader(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(iter(self.data.get_torch_dataloader, None))


_SAME = "Give the same data as before, or remove the backup to start again."
_MENDS = {
    "kind": _SAME,
    "batches": _SAME,
    "batch_size": _SAME,
    "shuffle": _SAME,
    "seed": "Give the same seed, or none: the backup holds it.",
    "first_batch": "If the data is the same, its order differs between processes. Give each shuffle() of a pipeline a "
    "seed, and the program the same tf.random.set_seed(). Random numbers in a map() need seeds too. A function from "
    "the number of an epoch to its pipeline is the safest form.",
}


def _without_values(array: Any) -> Any:
    """An array of the same shape and type that takes no memory."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape) if isinstance(array, np.ndarray) else array
