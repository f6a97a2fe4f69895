"""The steps of a `tf.data` pipeline. TensorFlow has no public names for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

_KEEPING = {"map", "parallelmap", "prefetch", "repeat", "options", "take", "assertcardinality"}
"""The steps that give a batch for each batch that they read, in the same order."""
_DRAWING = {"Multinomial", "TruncatedNormal", "ParameterizedTruncatedNormal"}
"""The operations of TensorFlow that draw random numbers, with names that begin neither with `Random` nor `Stateful`."""


def steps_between(dataset: Any, source: tf.data.Dataset) -> list[tf.data.Dataset]:
    """The steps through which a dataset reads a source, from the dataset on; none if it does not read the source."""
    if dataset is source or not isinstance(dataset, tf.data.Dataset):
        return []
    for each in _inputs(dataset):
        inner = steps_between(each, source)
        if each is source or inner:
            return [dataset, *inner]
    return []


def name_of(step: tf.data.Dataset) -> str:
    """The name of a step, such as `shuffle`."""
    return type(step).__name__.strip("_").removesuffix("Dataset").lower()


def keeps_batches(step: tf.data.Dataset) -> bool:
    """Whether a step gives a batch for each batch that it reads, in the same order."""
    return name_of(step) in _KEEPING


def draws(step: tf.data.Dataset) -> bool:
    """Whether the functions of a step draw stateful random numbers, or change variables."""
    operations = {*_operations(step)}
    return any(name.startswith(("Random", "Stateful", "Assign")) or name in _DRAWING for name in operations)


def keeps_a_shuffled_epoch(dataset: tf.data.Dataset, after: str | None = None) -> str | None:
    """The name of the step, `cache` or `shuffle`, that reads a `shuffle` with another order in each epoch.

    Args:
        dataset: The pipeline.
        after: The name of a `cache` or `shuffle` that reads the pipeline.
    """
    step = name_of(dataset)
    if step == "shuffle" and after and _reshuffles(dataset):
        return after
    after = step if step in ("shuffle", "cache") else after
    return next(filter(None, (keeps_a_shuffled_epoch(each, after) for each in _inputs(dataset))), None)


def _inputs(dataset: Any) -> list[tf.data.Dataset]:
    inputs: list[tf.data.Dataset] = dataset._inputs()  # noqa: SLF001
    return inputs


def _reshuffles(dataset: Any) -> bool:
    return bool(dataset._reshuffle_each_iteration)  # noqa: SLF001


def _operations(dataset: Any) -> Iterator[str]:
    """The names of the operations in the functions of a step."""
    for function in dataset._functions():  # noqa: SLF001
        graph = function.function.graph.as_graph_def()
        for body in (graph.node, *(inner.node_def for inner in graph.library.function)):
            yield from (node.op for node in body)
