"""`tf.data`: pipelines as sources of batches, and each source as a pipeline. Only this module imports TensorFlow."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import keras
import numpy as np
import tensorflow as tf

from keras_ckpt.resume.class_weights import ClassWeights
from keras_ckpt.resume.data_sources import Arrays, Epoch, Source, as_array, checksum
from keras_ckpt.store.notices import warn

F = TypeVar("F", bound=Callable[..., Any])


class Pipeline(Source):
    """A `tf.data.Dataset`. Each new iterator reads the next epoch."""

    kind = "tf.data.Dataset"
    repeatable = False

    def __init__(self, dataset: tf.data.Dataset) -> None:
        self.dataset = dataset
        self.count = _known_length(dataset)
        if step := _keeps_a_shuffled_epoch(dataset):
            warn(
                f"The pipeline has shuffle() before {step}(). The order of an epoch depends on how much of earlier "
                f"epochs was read, so a restart reads another order. Put {step}() before a single shuffle(), or give "
                "ResumableDataset a function that takes the number of an epoch and returns the pipeline."
            )

    def look(self) -> tuple[list[Any], int]:
        first = next(iter(self.dataset))
        return [_arrays_of(first)], checksum(tf.nest.flatten(first, expand_composites=True))

    def batches(self, epoch: Epoch) -> Iterator[Any]:
        yield from map(_arrays_of, self.dataset.skip(epoch.start))

    def seek(self, now: int, number: int) -> None:
        if number < now:
            raise ValueError(
                f"A tf.data.Dataset cannot rewind from epoch {now} to epoch {number}. Make a new ResumableDataset "
                "before this fit, or give it a function that takes the number of an epoch and returns the pipeline."
            )
        for _ in range(now, number):
            iter(self.dataset)


def dataset_of(
    source: Source, begin: Callable[[], Epoch], first: list[Any], weights: ClassWeights | None
) -> tf.data.Dataset:
    """A dataset of which each iterator reads the next epoch of a source.

    Args:
        source: The source.
        begin: Begins the next epoch.
        first: Arrays of the shapes and types of one or two of the first batches of the source.
        weights: The weights of the samples, if they have any.
    """

    read = _reader(source, first)

    @_untranslated
    def epoch(_: tf.Tensor) -> tf.data.Dataset:
        begun = tf.numpy_function(lambda: np.array(begin(), np.int64), [], tf.int64)
        begun.set_shape([3])
        return read(begun)

    epochs = tf.data.Dataset.range(1).flat_map(epoch)
    if isinstance(source, Arrays):
        epochs = _gathered(epochs, source)
    if weights is not None:
        epochs = epochs.map(_weigher(weights), num_parallel_calls=tf.data.AUTOTUNE)
    epochs = epochs.with_options(_options())
    epochs = epochs.prefetch(tf.data.AUTOTUNE) if source.ahead else epochs
    return _of_known_length(epochs, source.count)


def _reader(source: Source, first: list[Any]) -> Callable[[tf.Tensor], tf.data.Dataset]:
    """The function that returns the batches of an epoch; of arrays, their rows."""
    if isinstance(source, Arrays):
        return functools.partial(_rows, source)
    if isinstance(source, Pipeline):
        return lambda epoch: source.dataset.skip(epoch[2])
    if isinstance(pipeline := source.of_epoch(0), Pipeline):
        return functools.partial(_made, source, pipeline.dataset.element_spec)
    spec = keras.tree.map_structure(_spec, first[0], first[-1])

    def batches(epoch: np.ndarray) -> Iterator[Any]:
        yield from source.batches(Epoch(*map(int, epoch)))

    return lambda epoch: tf.data.Dataset.from_generator(batches, args=(epoch,), output_signature=spec)


def _rows(source: Arrays, epoch: tf.Tensor) -> tf.data.Dataset:
    """The places of the samples of each batch of an epoch."""
    order = tf.numpy_function(lambda epoch: source.order(Epoch(*map(int, epoch))), [epoch], tf.int64)
    order.set_shape([source.samples])
    # TensorFlow reads the rows of a matrix faster than slices of a vector. The last batch may not fill a row.
    full = source.samples // source.batch_size
    rows = tf.reshape(order[: full * source.batch_size], [full, source.batch_size])
    batches = tf.data.Dataset.from_tensor_slices(rows[epoch[2] :])
    if source.partial:
        batches = batches.concatenate(tf.data.Dataset.from_tensors(order[full * source.batch_size :]))
    return batches


def _gathered(rows: tf.data.Dataset, source: Arrays) -> tf.data.Dataset:
    tensors = keras.tree.map_structure(tf.convert_to_tensor, source.arrays)

    @_untranslated
    def gather(rows: tf.Tensor) -> Any:
        return keras.tree.map_structure(lambda each: tf.gather(each, rows), tensors)

    return rows.map(gather, num_parallel_calls=tf.data.AUTOTUNE)


def _made(source: Source, spec: Any, epoch: tf.Tensor) -> tf.data.Dataset:
    """The batches of a pipeline that is made for an epoch."""
    # Python must not collect a pipeline while TensorFlow reads from it.
    recent: collections.deque[tf.data.Dataset] = collections.deque(maxlen=4)

    def make(number: tf.Tensor) -> tf.Tensor:
        pipeline = cast(Pipeline, source.of_epoch(int(number)))
        recent.append(pipeline.dataset)
        return tf.data.experimental.to_variant(pipeline.dataset)

    variant = tf.py_function(make, [epoch[1]], tf.variant)
    variant.set_shape(())
    return tf.data.experimental.from_variant(variant, spec).skip(epoch[2])


def _weigher(weights: ClassWeights) -> Callable[..., Any]:
    @_untranslated
    def weigh(x: Any, y: tf.Tensor) -> Any:
        found = tf.numpy_function(weights.of, [y], keras.config.floatx())
        found.set_shape(y.shape if y.shape.rank in (0, 1, None) else y.shape[:-1])
        return x, y, found

    return weigh


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


def _untranslated(function: F) -> F:
    """Keeps TensorFlow from reading the source of a function that needs no translation."""
    return cast(F, tf.autograph.experimental.do_not_convert(function))


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
    """As in Keras: where two batches differ in size, the spec allows any size."""
    sizes = zip(first.shape[1:], second.shape[1:], strict=True)
    return tf.TensorSpec((None, *(one if one == other else None for one, other in sizes)), first.dtype)


def _arrays_of(batch: Any) -> Any:
    """A batch of tensors as arrays. Ragged and sparse tensors stay as they are."""
    return keras.tree.map_structure(lambda each: as_array(each) if isinstance(each, tf.Tensor) else each, batch)


def _keeps_a_shuffled_epoch(dataset: tf.data.Dataset, after: str | None = None) -> str | None:
    """The name of the step, `cache` or `shuffle`, that reads a `shuffle` with another order in each epoch.

    Args:
        dataset: The pipeline.
        after: The name of a `cache` or `shuffle` that reads the pipeline.
    """
    # TensorFlow has no public names for the steps of a pipeline.
    step = type(dataset).__name__.strip("_").removesuffix("Dataset").lower()
    if step == "shuffle" and after and dataset._reshuffle_each_iteration:  # noqa: SLF001
        return after
    after = step if step in ("shuffle", "cache") else after
    inputs = dataset._inputs()  # noqa: SLF001
    return next(filter(None, (_keeps_a_shuffled_epoch(each, after) for each in inputs)), None)
