"""A checkpoint on disk as a source of variables: their keys by the model's names, their kinds, their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_ckpt import state


class Source:
    """An open checkpoint.

    Opening it builds the optimizers of the model that have slots in it.

    Args:
        path: The checkpoint's prefix, as TensorFlow takes it.
        model: The model that is to be restored.

    Attributes:
        foreign: Whether TensorFlow named the variables, by its object graph.
        keys: The key of each variable by its name in the model, or on disk where the model has none of it.

    Raises:
        Exception: Of any kind: TensorFlow's readers raise almost anything when a file is not what they expect.
    """

    def __init__(self, path: str, model: keras.Model) -> None:
        self._path = path
        reader = tf.train.load_checkpoint(path)
        self._shapes: dict[str, list[int]] = reader.get_variable_to_shape_map()
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
            self.keys = _keys_by_graph(path, reader, model, named)
        else:
            state.build_optimizers(model, named)

    def kind(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape and the type of a variable."""
        key = self.keys[name]
        return tuple(self._shapes[key]), self._dtypes[key].name

    def read(self, names: Sequence[str]) -> dict[str, tf.Tensor]:
        """Reads variables, all before any is used; TensorFlow checks each one's checksum."""
        if not names:
            return {}
        keys = [self.keys[name] for name in names]
        tensors = tf.raw_ops.RestoreV2(
            prefix=self._path,
            tensor_names=keys,
            shape_and_slices=[""] * len(keys),
            dtypes=[self._dtypes[key] for key in keys],
        )
        return dict(zip(names, tensors, strict=True))


def _keys_by_graph(path: str, reader: Any, model: keras.Model, named: Mapping[str, str]) -> dict[str, str]:
    """The keys of a checkpoint that TensorFlow named by its object graph; what is the model's, by the model's names."""
    graph = state.object_graph(reader)
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
