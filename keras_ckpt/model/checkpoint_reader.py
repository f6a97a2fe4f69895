"""A TensorFlow checkpoint as the source of a restore."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats import damage, graph
from keras_ckpt.formats.bundle_index import read_index
from keras_ckpt.formats.bundle_parts import BundleParts
from keras_ckpt.formats.bundle_reader import read_values
from keras_ckpt.formats.config import Config
from keras_ckpt.formats.dtypes import NAMES
from keras_ckpt.formats.variables import names_in
from keras_ckpt.model import model_state, naming, object_graph
from keras_ckpt.model.backends import backend
from keras_ckpt.model.matching import Kind
from keras_ckpt.store import layout
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile

errors_as_damage = functools.partial(damage.errors_as_damage, backend.OutOfMemory)
"""Turns errors of readers of a damaged file into `DamagedCheckpointError`, but for the backend's lack of memory."""


class BundleSource:
    """An open TensorFlow checkpoint, as the protocol `Source` describes it.

    Args:
        folder: The directory of the checkpoint, open as long as the source is read.
        name: The checkpoint's name.
        digested: The files whose every byte is compared with the digests: the index at once, the others when read.

    Attributes:
        foreign: Whether TensorFlow named the variables, by its object graph. Call `find` first.

    Raises:
        DamagedCheckpointError: The checkpoint cannot be read.
    """

    def __init__(self, folder: Folder, name: str, digested: Sequence[CheckpointFile] = ()) -> None:
        self.prefix = os.path.join(folder.path, name)
        self._folder = folder
        self._name = name
        self._digested = [file for file in digested if file.name != layout.index(name)]
        with errors_as_damage():
            self._index = read_index(folder, name, digested)
        listed = self._index.variables
        self.foreign = model_state.NAMES_KEY not in listed
        self._parts = BundleParts(folder, self._index)
        self.description = self._parts.description
        self.arrays, self.assets = self._parts.arrays, self._parts.assets
        self._keys = names_in(self._index)
        self._kinds: dict[str, Kind] = {}
        self.unfit: Sequence[str] = ()
        self.lacking: Sequence[str] = ()

    @property
    def origin(self) -> str:
        return f"was written by {'TensorFlow' if self.foreign else 'an older version of keras_ckpt'}"

    @property
    def lacks_seeds(self) -> bool:
        return self.foreign

    def kinds(self) -> Mapping[str, Kind]:
        if not self._kinds:
            self._kinds = {name: self._kind(key) for name, key in self._keys.items()}
        return self._kinds

    def build_optimizers(self, model: keras.Model, wanted: Mapping[str, Any]) -> None:
        if self.foreign:
            return  # `find` has built them
        built = None if self.description is None else self.description.optimizers
        with backend.scope(model):
            naming.build_optimizers(model, wanted, self._keys, built)

    def find(self, model: keras.Model) -> None:
        """Finds a model in the object graph of a foreign checkpoint, and builds its optimizers.

        Afterwards the variables have the names that they have in the model.
        """
        with errors_as_damage():
            objects = object_graph.ObjectGraph(self._parts.text(graph.KEY))
        with backend.scope(model):
            found = objects.find(model, {key.decode(): entry.shape for key, entry in self._index.entries.items()})
        self._keys, self._kinds = {**found.keys, **found.unexpected}, {}
        if unknown := sorted(set(self._keys.values()) - self._index.variables):
            raise DamagedCheckpointError(
                f"it cannot be read: its object graph names {unknown[0]!r:.200}, which its index does not"
            )
        self.unfit = found.unfit_optimizers

    def read(self, names: Sequence[str]) -> dict[str, backend.Tensor]:
        keys = {name: self._keys[name].encode() for name in names}
        with errors_as_damage():
            values = read_values(self._folder, self._index, set(keys.values()), backend.allocate, self._digested)
        tensors = {key: backend.tensor_of(value) for key, value in values.items()}
        return {name: tensors[key] for name, key in keys.items()}

    def config(self) -> Config | None:
        """The config of the model, `None` if TensorFlow or an older version wrote the checkpoint."""
        return self._parts.config()

    def size(self) -> int:
        """The bytes of the values."""
        return sum(entry.size for entry in self._index.entries.values())

    def _kind(self, key: str) -> Kind:
        entry = self._index.entries[key.encode()]
        return Kind(entry.shape, NAMES[entry.dtype])
