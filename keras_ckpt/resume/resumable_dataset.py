"""`ResumableDataset`: training data that can be entered at any batch of any pass."""

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
    """Dataset for training that resumes after a restart at the next batch, in the same order.

    It is a `tf.data.Dataset` of batches. Each pass over it has an order of its own, a function of the seed and the
    number of the pass. Give it to `fit` and to `BackupAndRestore`.

    A restart enters arrays, a `PyDataset` or a Grain `MapDataset` at once at any batch, because they are read by index.
    It reads the earlier batches of a `tf.data.Dataset` again, without training on them. The order of a pass over a
    `tf.data.Dataset` must not depend on earlier passes, as it does after `shuffle().cache()` or `shuffle().shuffle()`.
    A function that returns the pipeline of a pass has no such limits.

    Example:

    ```python
    data = keras_ckpt.ResumableDataset(x, y, batch_size=64, shuffle=True, seed=1)
    backup = keras_ckpt.BackupAndRestore("runs/digits/backup", save_freq=50, data=data)
    model.fit(data, epochs=30, shuffle=False, callbacks=[backup])
    ```

    With `steps_per_epoch`, an epoch ends within the data. Then the data has to be endless: give
    `BackupAndRestore` the dataset, and `fit(data.repeat(), steps_per_epoch=100)` the dataset repeated.

    Args:
        x: One of these:
            arrays: NumPy arrays or tensors with samples along the first axis, or a dict, list or tuple of them;
            a `tf.data.Dataset` of batches, with a seed for each shuffle, endless or with a known number of batches;
            a `keras.utils.PyDataset`. Its draws from the global generators of Python and NumPy become a function of
            the seed, the pass and the batch. Training waits while it is read, unless its workers are processes;
            a Grain `MapDataset` of batches;
            a function of the number of a pass, from 0, that returns a `tf.data.Dataset` of batches.
            The first batch is read at once, to recognize the data after a restart.
        y: The targets, if `x` is arrays.
        sample_weight: A weight for each sample, if `x` is arrays.
        class_weight: A dict from the index of a class to a weight, as in `fit`. It gives each sample a weight, and
            does not change the targets.
        batch_size: Number of samples of a batch, if `x` is arrays; defaults to 32.
        shuffle: Whether each pass has another order: of the samples of arrays, of the batches of a `PyDataset`.
        seed: Seed of the order, an int. By default it is drawn from Python's `random`, and kept in the backup.

    Raises:
        ValueError, TypeError: A wrong argument.
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
            raise TypeError("ResumableDataset expected what is to be wrapped. Received: a ResumableDataset")
        self._own_seed = seed is None
        self._seed = tf.Variable(random.getrandbits(31) if seed is None else seed, dtype=tf.int64, trainable=False)
        self._next = tf.Variable([0, 0], dtype=tf.int64, trainable=False)
        self._shuffle = shuffle
        self._source = source_of(x, y, sample_weight, batch_size, shuffle, self._seed)
        weigh = _weigher(class_weight) if class_weight else None
        self._weights = _shown(class_weight) if class_weight else None

        @untranslated
        def one_pass(_: tf.Tensor) -> tf.data.Dataset:
            number, start = tf.unstack(self._next.read_value())
            with tf.control_dependencies([self._next.assign([number + 1, 0])]):
                return self._source.batches(tf.identity(number), tf.identity(start))

        passes = self._source.loaded(tf.data.Dataset.range(1).flat_map(one_pass))
        if weigh is not None:
            passes = passes.map(weigh, num_parallel_calls=tf.data.AUTOTUNE)
        passes = passes.with_options(_options())
        passes = passes.prefetch(tf.data.AUTOTUNE) if self._source.ahead else passes
        self._passes = _of_known_length(passes, self._source.count)
        super().__init__(tf.data.experimental.to_variant(self._passes))
        # Here, not when it is asked for: of what cannot go back it takes the first pass, with a backup or without.
        self._fingerprint = self._source.fingerprint()
        if not self._source.repeatable:
            self._next.assign([1, 0])

    @property
    def element_spec(self) -> Any:
        """The types of a batch."""
        return self._passes.element_spec

    @property
    def batches(self) -> int | None:
        """The number of batches of a pass, `None` if it has no end."""
        return self._source.count

    @property
    def passes(self) -> int:
        """The number of passes that were begun, which is the number of the next pass."""
        return int(self._next[0])

    def get_state(self) -> dict[str, Any]:
        """The state for a process that resumes: plain numbers and strings.

        Raises:
            ValueError: The data differs each time that it is read.
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
        """Resumes at the place of another process.

        Args:
            state: The result of `get_state` in the other process.
            batch: The index of the batch that the next pass begins with.

        Raises:
            MismatchError: The data differs, or its order does.
        """
        if self._own_seed:
            self._seed.assign(state["seed"])
        mine = self.get_state()
        for name, mend in _MENDS.items():
            if state.get(name, mine[name]) != mine[name]:  # an older backup does not have each
                raise MismatchError(
                    f"The data are not those of the backup: {name.replace('_', ' ')} {mine[name]!r} here, "
                    f"{state[name]!r} there. {mend}"
                )
        if state.get("class_weight", self._weights) != self._weights:
            warn(
                f"The samples are weighed by class_weight {self._weights} as in the program, not "
                f"{state['class_weight']} as saved."
            )
        self.seek(state["pass"], batch)

    def seek(self, number: int, batch: int) -> None:
        """Sets the number of the next pass, and the index of the batch that it begins with."""
        self._source.go_to(self.passes, number)
        self._next.assign([number, batch])

    def _inputs(self) -> list[tf.data.Dataset]:
        return [self._passes]


_SAME = "Give the same data as before, or remove the backup to begin again."
_MENDS = {
    "kind": _SAME,
    "batches": _SAME,
    "batch_size": _SAME,
    "shuffle": _SAME,
    "seed": "Give the same seed, or none: the backup holds it.",
    "first_batch": "If the data are the same, they do not come in the same order each time: give each shuffle() of a "
    "pipeline a seed, and the program the same tf.random.set_seed(); random numbers in a map() need seeds too. "
    "A function of the number of the pass that returns the pipeline is the surest form.",
}


def _of_known_length(passes: tf.data.Dataset, count: int | None) -> tf.data.Dataset:
    """The same dataset, of which TensorFlow knows the number of batches, though the first pass may be shorter.

    `assert_cardinality` would raise at the end of a shorter one. The nothing that follows here has no end, for all that
    TensorFlow knows.
    """
    endless = passes.concatenate(passes.take(0).repeat())
    return endless if count is None else endless.take(count)


def _options() -> tf.data.Options:
    options = tf.data.Options()
    # As Keras's own pipelines: writing the graph out to improve it costs more than it gains.
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
                "class_weight needs batches of (x, y), y one tensor of classes, without sample_weight. "
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
    """The numbers of the classes in targets: given as such, with an axis of one, or as vectors of probabilities."""
    if y.shape.rank is None:
        raise ValueError(f"class_weight needs targets whose number of axes is known. Received: {y}")
    if y.shape.rank < 2:
        numbered = y
    elif y.shape[-1] is None:
        several = tf.shape(y)[-1] > 1
        numbered = tf.cond(several, lambda: tf.cast(tf.argmax(y, axis=-1), y.dtype), lambda: tf.squeeze(y, axis=-1))
    else:
        numbered = tf.squeeze(y, axis=-1) if y.shape[-1] == 1 else tf.argmax(y, axis=-1)
    return tf.cast(tf.round(numbered) if numbered.dtype.is_floating else numbered, tf.int64)
