"""A checkpoint on disk as a source of variables: their keys by the model's names, their kinds, their values."""

from __future__ import annotations

import concurrent.futures
import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_ckpt import state
from keras_ckpt.bundle import read_index
from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.files import Folder

_LITTLE = 16 << 20
"""So many bytes are read before another thread would have begun."""
_THREADS = min(os.cpu_count() or 1, 8)


class Source:
    """An open checkpoint.

    Opening it builds the optimizers of the model that have slots in it.

    Args:
        folder: The directory of the checkpoint, open for as long as this is read from.
        name: The checkpoint's name.
        model: The model that is to be restored.

    Attributes:
        foreign: Whether TensorFlow named the variables, by its object graph.
        keys: The key of each variable by its name in the model, or on disk where the model has none of it.

    Raises:
        Exception: Of any kind: TensorFlow's readers raise almost anything when a file is not what they expect.
    """

    def __init__(self, folder: Folder, name: str, model: keras.Model) -> None:
        listed = read_index(folder, name).variables
        self._path = folder.tensorflow_path(name)
        reader = tf.train.load_checkpoint(self._path)
        self._shapes: dict[str, list[int]] = reader.get_variable_to_shape_map()
        if unread := listed ^ self._shapes.keys():  # TensorFlow ends its list, without a word, at a bad block
            raise DamagedCheckpointError(f"{len(unread)} entries are in a block of its index with a bad checksum")
        self._dtypes: dict[str, tf.DType] = reader.get_variable_to_dtype_map()
        self.foreign = state.NAMES_KEY not in self._shapes
        counter = f"save_counter{state.SUFFIX}"  # TensorFlow's own, no part of a model
        keys = [key for key in self._shapes if key.endswith(state.SUFFIX) and key != counter]
        named = {key.removesuffix(state.SUFFIX): key for key in keys}
        self.keys: Mapping[str, str] = named
        if self.foreign:
            for optimizer in state.optimizers(model).values():
                if not optimizer.built:
                    optimizer.build(model.trainable_variables)
            self.keys = _keys_by_graph(self._path, reader, model, named)
            if unknown := sorted(set(self.keys.values()) - listed):
                raise DamagedCheckpointError(f"its object graph names {unknown[0]!r:.200}, which its index does not")
        else:
            state.build_optimizers(model, named)

    def kind(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape and the type of a variable."""
        key = self.keys[name]
        return tuple(self._shapes[key]), self._dtypes[key].name

    def read(self, names: Sequence[str]) -> dict[str, tf.Tensor]:
        """Reads variables, all before any is used; TensorFlow checks each one's checksum."""
        groups = _of_equal_size({name: self._size(name) for name in names}, _THREADS)
        if not groups:
            return {}
        with concurrent.futures.ThreadPoolExecutor(len(groups), "keras_ckpt-read") as threads:
            found = dict(itertools.chain.from_iterable(threads.map(self._read_together, groups)))
        return {name: found[name] for name in names}

    def _size(self, name: str) -> int:
        """The bytes of a variable; of one of strings, something like it."""
        key = self.keys[name]
        return math.prod(self._shapes[key]) * int(self._dtypes[key].size)

    def _read_together(self, names: Sequence[str]) -> Iterable[tuple[str, tf.Tensor]]:
        """TensorFlow reads those of one call one after another."""
        keys = [self.keys[name] for name in names]
        tensors = tf.raw_ops.RestoreV2(
            prefix=self._path,
            tensor_names=keys,
            shape_and_slices=[""] * len(keys),
            dtypes=[self._dtypes[key] for key in keys],
        )
        return zip(names, tensors, strict=True)


def _of_equal_size(sizes: Mapping[str, int], number: int) -> list[list[str]]:
    """At most so many groups, as equal as the greatest of them lets them be; one if there is little in all."""
    if sum(sizes.values()) < _LITTLE:
        number = 1
    groups: list[list[str]] = [[] for _ in range(number)]
    filled = [0] * number
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        least = filled.index(min(filled))
        groups[least].append(name)
        filled[least] += sizes[name]
    return [group for group in groups if group]


def _keys_by_graph(path: str, reader: Any, model: keras.Model, named: Mapping[str, str]) -> dict[str, str]:
    """The keys of a checkpoint that TensorFlow named by its object graph; what is the model's, by the model's names."""
    graph = state.object_graph(reader)
    _check_graph(graph)
    variables = {id(variable): name for name, variable in state.names(model).items()}
    view = tf.train.CheckpointView(path)
    # What the model is called there is up to the one who wrote it; or it is the root itself.
    children = {child.local_name for child in graph.nodes[0].children} - {"save_counter"}
    roots = [(called, tf.train.Checkpoint(**{called: model})) for called in sorted(children)]
    best: tuple[dict[str, str], str] = ({}, "")
    for called, root in [*roots, ("", model)]:
        found = {
            variables[id(trackable)]: attribute.checkpoint_key
            for node, trackable in view.match(root).items()
            if id(trackable) in variables
            for attribute in graph.nodes[node].attributes
        }
        best = max(best, (found, f"{called}/" if called else ""), key=lambda each: len(each[0]))
    names, called = best
    used = set(names.values())
    for name, key in named.items():
        if key not in used and name.startswith(called):
            own = name.removeprefix(called)
            names[own if own.startswith("optimizer/") else f"model/{own}"] = key
    return names


def _check_graph(graph: Any) -> None:
    """TensorFlow takes a number below zero for one from the end, and would restore nothing, or another thing."""
    children = [child.node_id for node in graph.nodes for child in node.children]
    slots = [slot for node in graph.nodes for slot in node.slot_variables]
    children += [number for slot in slots for number in (slot.original_variable_node_id, slot.slot_variable_node_id)]
    if not all(0 <= number < len(graph.nodes) for number in (0, *children)):
        raise DamagedCheckpointError("its object graph is not whole: it names an object that it does not have")
