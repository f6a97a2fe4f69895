"""A checkpoint on disk as a source of variables: their keys by the model's names, their kinds, their values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_ckpt import naming, state
from keras_ckpt.bundle import read_index
from keras_ckpt.bundle_reader import read_values
from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.files import Folder
from keras_ckpt.listing import refuse_changed, unreadable
from keras_ckpt.record import CheckpointFile


class Source:
    """An open checkpoint.

    Opening it builds the optimizers of the model that have slots in it; what they raise is no damage.

    Args:
        folder: The directory of the checkpoint, open for as long as this is read from.
        name: The checkpoint's name.
        model: The model that is to be restored.
        digested: The files of which every byte is to be compared with what was written; the index at once, the others
            when they are read.

    Attributes:
        foreign: Whether TensorFlow named the variables, by its object graph.
        keys: The key of each variable by its name in the model, or on disk where the model has none of it.

    Raises:
        DamagedCheckpointError: It cannot be read.
    """

    def __init__(self, folder: Folder, name: str, model: keras.Model, digested: Sequence[CheckpointFile] = ()) -> None:
        self._folder = folder
        self._name = name
        self._digested = [file for file in digested if file.name != f"{name}.index"]
        with what_fails_is_damaged():
            for file in digested:
                if file.name == f"{name}.index":
                    refuse_changed(file, *folder.digest(file.name))
            self._index = read_index(folder, name)
        listed = self._index.variables
        self.foreign = state.NAMES_KEY not in listed
        counter = f"save_counter{state.SUFFIX}"  # TensorFlow's own, no part of a model
        keys = [key for key in listed if key.endswith(state.SUFFIX) and key != counter]
        named = {key.removesuffix(state.SUFFIX): key for key in keys}
        self.keys: Mapping[str, str] = named
        with model.distribute_strategy.scope():
            if not self.foreign:
                naming.build_optimizers(model, named)
                return
            for optimizer in naming.optimizers(model).values():
                if not optimizer.built:
                    optimizer.build(model.trainable_variables)
        with what_fails_is_damaged():
            self.keys = _keys_by_graph(folder.tensorflow_path(name), model, named)
            if unknown := sorted(set(self.keys.values()) - listed):
                raise DamagedCheckpointError(f"its object graph names {unknown[0]!r:.200}, which its index does not")

    def kind(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape and the type of a variable."""
        entry = self._index.entries[self.keys[name].encode()]
        return entry.shape, tf.as_dtype(entry.dtype).name

    def read(self, names: Sequence[str]) -> dict[str, tf.Tensor]:
        """Reads variables, all before any is used, and checks what was to be checked."""
        keys = {name: self.keys[name].encode() for name in names}
        with what_fails_is_damaged():
            values = read_values(self._folder, self._name, self._index, list(set(keys.values())), self._digested)
        return {name: values[key] for name, key in keys.items()}


@contextlib.contextmanager
def what_fails_is_damaged() -> Iterator[None]:
    """Readers raise almost anything where a file is not what they expect. What the process lacks is no damage."""
    try:
        yield
    except (DamagedCheckpointError, MemoryError, tf.errors.ResourceExhaustedError):
        raise
    except OSError as error:
        raise unreadable(error) from error
    except Exception as error:
        raise DamagedCheckpointError(f"it cannot be read: {error}") from error


def _keys_by_graph(path: str, model: keras.Model, named: Mapping[str, str]) -> dict[str, str]:
    """The keys of a checkpoint that TensorFlow named by its object graph; what is the model's, by the model's names."""
    graph = state.object_graph(tf.train.load_checkpoint(path))
    _check_graph(graph)
    variables = {id(variable): name for name, variable in naming.named_variables(model).items()}
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
