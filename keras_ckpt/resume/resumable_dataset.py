"""`ResumableDataset`: training data that resumes at any batch of any epoch."""

from __future__ import annotations

import numbers
import random
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from keras_ckpt.errors import MismatchError
from keras_ckpt.resume.data_sources import source_of, untranslated
from keras_ckpt.store.notices import warn


class ResumableDataset(tf.data.Dataset):
    """Training data that resumes after a restart at the same batch, in the same order.

    It is a `tf.data.Dataset` of batches. The order of an epoch is a function of the seed and the number of the epoch.
    An epoch here is a whole reading of the data. Give the dataset both to `fit` and to `BackupAndRestore`.

    Sources that are read by index (arrays, a `PyDataset`, a Grain `MapDataset`) resume within an epoch at once. A
    `tf.data.Dataset` reads the earlier batches again, and does not train on them. The order of its epochs must not
    depend on the reading of earlier epochs, as after `shuffle().cache()` or `shuffle().shuffle()`. A function that
    returns the pipeline of an epoch does not have this limit.

    Example:

    ```python
    data = keras_ckpt.ResumableDataset(x, y, batch_size=64, shuffle=True, seed=1)
    backup = keras_ckpt.BackupAndRestore("runs/digits/backup", save_freq=50, data=data)
    model.fit(data, epochs=30, shuffle=False, callbacks=[backup])
    ```

    With `steps_per_epoch`, an epoch of `fit` ends in the middle of the data, so the data must be endless. Give
    `BackupAndRestore` the dataset, and `fit(data.repeat(), steps_per_epoch=100)` the repeated dataset.

    Args:
        x: The data. Its first batch is read at once, as a fingerprint. It is one of these:

            - Arrays: NumPy arrays or tensors with samples along the first axis, or a dict, list or tuple of them.
            - A `tf.data.Dataset` of batches with seeded shuffles. The number of its batches is known or infinite.
            - A `keras.utils.PyDataset`. Its draws from the global generators of Python and NumPy become a function of
              the seed, the epoch and the batch. Training waits while it is read, unless its workers are processes.
            - A Grain `MapDataset` of batches.
            - A function that takes the number of an epoch, from 0, and returns a `tf.data.Dataset` of batches.
        y: The targets, if `x` is arrays.
        sample_weight: A weight for each sample, if `x` is arrays.
        class_weight: A dict of weights by the number of the class, as in `fit`. It gives samples a weight, and leaves
            the targets unchanged.
        batch_size: The samples in a batch, if `x` is arrays. Defaults to 32.
        shuffle: Whether each epoch has another order: of the samples of arrays, of the batches of a `PyDataset`.
        seed: An int that determines the order. Without a seed, Python's `random` draws it, and the backup holds it.

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
        if isinstance(x, ResumableDataset):
            raise TypeError("ResumableDataset expected data to wrap. Received: a ResumableDataset")
        self._own_seed = seed is None
        self._seed = tf.Variable(random.getrandbits(31) if seed is None else seed, dtype=tf.int64, trainable=False)
        self._next = tf.Variable([0, 0], dtype=tf.int64, trainable=False)
        self._shuffle = shuffle
        self._source = source_of(x, y, sample_weight, batch_size, shuffle, self._seed)
        weigh = _weigher(class_weight) if class_weight else None
        self._weights = _shown(class_weight) if class_weight else None

        @untranslated
        def epoch(_: tf.Tensor) -> tf.data.Dataset:
            number, start = tf.unstack(self._next.read_value())
            with tf.control_dependencies([self._next.assign([number + 1, 0])]):
                return self._source.batches(tf.identity(number), tf.identity(start))

        epochs = self._source.loaded(tf.data.Dataset.range(1).flat_map(epoch))
        if weigh is not None:
            epochs = epochs.map(weigh, num_parallel_calls=tf.data.AUTOTUNE)
        epochs = epochs.with_options(_options())
        epochs = epochs.prefetch(tf.data.AUTOTUNE) if self._source.ahead else epochs
        self._epochs = _of_known_length(epochs, self._source.count)
        super().__init__(tf.data.experimental.to_variant(self._epochs))
        # Computed here, because it begins the first epoch of a source that cannot rewind, with a backup or without.
        self._fingerprint = self._source.fingerprint()
        if not self._source.repeatable:
            self._next.assign([1, 0])

    @property
    def element_spec(self) -> Any:
        """The types and shapes of a batch."""
        return self._epochs.element_spec

    @property
    def batches(self) -> int | None:
        """The number of batches in an epoch, `None` if it is endless."""
        return self._source.count

    @property
    def passes(self) -> int:
        """The number of epochs that have begun, which is the number of the next epoch."""
        return int(self._next[0])

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
            "seed": int(self._seed),
            "shuffle": self._shuffle,
            "class_weight": self._weights,
            "pass": self.passes,
        }

    def set_state(self, state: Mapping[str, Any], batch: int = 0) -> None:
        """Resumes from the state of another process.

        Args:
            state: The result of `get_state` in the other process.
            batch: The batch with which the next epoch begins.

        Raises:
            MismatchError: The data differs, or its order does.
        """
        if self._own_seed:
            self._seed.assign(state["seed"])
        mine = self.get_state()
        for name, mend in _MENDS.items():
            if state.get(name, mine[name]) != mine[name]:  # older backups do not have every value
                raise MismatchError(
                    f"The data differs from the data of the backup: {name.replace('_', ' ')} {mine[name]!r} here, "
                    f"{state[name]!r} there. {mend}"
                )
        if state.get("class_weight", self._weights) != self._weights:
            warn(
                f"The samples are weighted by class_weight {self._weights} as in the program, not "
                f"{state['class_weight']} as saved."
            )
        self.seek(state["pass"], batch)

    def seek(self, number: int, batch: int) -> None:
        """Sets the number of the next epoch, and the batch with which it begins."""
        self._source.seek(self.passes, number)
        self._next.assign([number, batch])

    def _inputs(self) -> list[tf.data.Dataset]:
        return [self._epochs]


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


def _of_known_length(epochs: tf.data.Dataset, count: int | None) -> tf.data.Dataset:
    """The same dataset with a number of batches that TensorFlow knows, though a resumed epoch may be shorter.

    `assert_cardinality` would raise at the end of a shorter epoch. TensorFlow takes the empty dataset that follows here
    for an endless dataset.
    """
    endless = epochs.concatenate(epochs.take(0).repeat())
    return endless if count is None else endless.take(count)


def _options() -> tf.data.Options:
    options = tf.data.Options()
    # As in Keras's own pipelines: the optimizer of the graph costs more time than it saves.
    options.experimental_optimization.apply_default_optimizations = False
    return options


def _shown(class_weight: Mapping[int, float]) -> str:
    return str({int(number): float(weight) for number, weight in sorted(class_weight.items())})


def _weigher(class_weight: Mapping[int, float]) -> Callable[..., Any]:
    """A function that gives the samples of a batch the weights of their classes, as `fit` does."""
    if not all(isinstance(each, numbers.Integral) for each in class_weight):
        raise ValueError(f"class_weight expected a dict by the numbers of classes. Received: {class_weight!r}")
    numbers_of_classes = tf.constant(sorted(map(int, class_weight)), tf.int64)
    weights = tf.constant([class_weight[each] for each in sorted(class_weight)], keras.config.floatx())

    @untranslated
    def weigh(*batch: Any) -> Any:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        if sample_weight is not None or not isinstance(y, tf.Tensor):
            raise ValueError(
                "class_weight expected batches of (x, y) without sample_weight, where y is one tensor of classes. "
                f"Received: {keras.tree.map_structure(lambda each: each.shape, batch)}"
            )
        classes = _classes(y)
        place = tf.searchsorted(numbers_of_classes, tf.reshape(classes, [-1]))
        place = tf.reshape(tf.minimum(place, len(weights) - 1), tf.shape(classes))
        # A class without a weight has the weight 1.
        known = tf.gather(numbers_of_classes, place) == tf.cast(classes, tf.int64)
        return x, y, tf.where(known, tf.gather(weights, place), 1.0)

    return weigh


def _classes(y: tf.Tensor) -> tf.Tensor:
    """The class numbers of targets, which are numbers, numbers with an axis of length 1, or probability vectors."""
    if y.shape.rank is None:
        raise ValueError(f"class_weight expected targets with a known number of axes. Received: {y}")
    if y.shape.rank < 2:
        numbered = y
    elif y.shape[-1] is None:
        several = tf.shape(y)[-1] > 1
        numbered = tf.cond(several, lambda: tf.cast(tf.argmax(y, axis=-1), y.dtype), lambda: tf.squeeze(y, axis=-1))
    else:
        numbered = tf.squeeze(y, axis=-1) if y.shape[-1] == 1 else tf.argmax(y, axis=-1)
    return tf.cast(tf.round(numbered) if numbered.dtype.is_floating else numbered, tf.int64)
