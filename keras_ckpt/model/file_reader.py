"""One of Keras's own files as the source of a restore.

Keras names values by the path of attributes that leads to their object. A walk over the model, as Keras takes it when
it saves, tells which variable of the model each path means.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from blake3 import blake3

from keras_ckpt.formats import arrays
from keras_ckpt.formats.description import Asset, Description, Learned
from keras_ckpt.formats.keras_reader import read_assets, read_layout, read_names
from keras_ckpt.formats.keras_writer import dataset_of
from keras_ckpt.formats.targets import Target, fill
from keras_ckpt.model import naming
from keras_ckpt.model.backends import backend
from keras_ckpt.model.checkpoint_reader import errors_as_damage
from keras_ckpt.model.keras_internals import places_in_files
from keras_ckpt.model.learned import learners, learns_elsewhere, saved_by
from keras_ckpt.model.matching import Kind, is_lora
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord

_OPTIMIZER, _VALUES = "optimizer", "/vars/"


class FileSource:
    """An open file of Keras, as the protocol `Source` describes it.

    Args:
        model: The built model that is restored.
        objects: The objects of the model by name.
        folder: The directory of the file, open as long as the source is read.
        name: The name of the file.
        record: The record of the file, `None` if it has none.
        check_digests: Whether to compare every byte with the digest in the record. Without a record, the checksums of
            an archive are compared. In an unverified file the names of objects are not read, so layers that a user
            named, and optimizers of other classes, are told apart by their shapes alone.

    Raises:
        DamagedCheckpointError: The file cannot be read.
        ValueError: The file is a whole model in the legacy format.
    """

    def __init__(
        self,
        model: keras.Model,
        objects: Mapping[str, Any],
        folder: Folder,
        name: str,
        record: CheckpointRecord | None,
        check_digests: bool,
    ) -> None:
        self.prefix = os.path.join(folder.path, name)
        self.description: Description | None = None
        self.arrays: list[np.ndarray] = []
        self.unfit: Sequence[str] = ()
        self._folder = folder
        self._name = name
        self._objects = objects
        self._seeds = record.seeds if record else {}
        digested = record.files if record and check_digests else ()
        with errors_as_damage():
            self._file = read_layout(folder, name, verify=check_digests and record is None)
        if self._file.is_legacy:
            raise ValueError(
                f"{self.prefix} is a file of Keras's legacy format, which names no objects to restore. Load the whole "
                f"model: keras.models.load_model({self.prefix!r}). Save in the format of .keras to restore later."
            )
        with errors_as_damage():
            # The digest is of the bytes that are restored: they are read once.
            self._verified = self._read(self._holdable(), digested) if digested else {}
            is_verified = bool(digested) or (check_digests and self._file.is_archive)
            self._labels = read_names(folder, name, self._file) if is_verified else {}
            self._files = read_assets(folder, name) if self._file.is_archive else {}
        self._find(model)

    @property
    def origin(self) -> str:
        return f"is a file of {'Keras' if self._file.is_archive else 'weights'}"

    @property
    def lacks_seeds(self) -> bool:
        return not self._seeds

    def kinds(self) -> Mapping[str, Kind]:
        return self._kinds

    def build_optimizers(self, model: keras.Model, wanted: Mapping[str, Any]) -> None:
        optimizer = getattr(model, "optimizer", None)
        if optimizer is None or optimizer.built:
            return
        saved = [path for path in self._file.datasets if path.startswith(f"{self._places[id(optimizer)]}/")]
        if len(saved) > len(optimizer.variables):
            with backend.scope(model):
                optimizer.build(model.trainable_variables)
            self._find(model)

    def read(self, names: Sequence[str]) -> dict[str, backend.Tensor]:
        paths = {name: self._paths[name] for name in names if name in self._paths}
        with errors_as_damage():
            found = self._verified | self._read([path for path in paths.values() if path not in self._verified])
            seeds = {name: np.array(self._seeds[name], self._kinds[name].dtype) for name in names if name not in paths}
        values = {name: found[path] for name, path in paths.items()}
        return {name: backend.tensor_of(value) for name, value in (values | seeds).items()}

    def _holdable(self) -> list[str]:
        """The paths of the values that a tensor can hold."""
        return [path for path, each in self._file.datasets.items() if arrays.is_number(each.dtype)]

    def _read(self, paths: Iterable[str], digested: Sequence[CheckpointFile] = ()) -> dict[str, Any]:
        """Reads values by path."""
        values, targets = {}, []
        for path in paths:
            each = self._file.datasets[path]
            values[path], memory = backend.allocate(arrays.number_of(each.dtype), each.shape)
            targets.append(Target(path.encode(), self._name, each.offset, memory, None))
        fill(self._folder, targets, digested)
        return values

    def _find(self, model: keras.Model) -> None:
        """Gives the values of the file the names of the model's variables, and describes the model's objects."""
        variables = naming.named_variables(model)
        names = {id(variable): name for name, variable in variables.items()}
        places = places_in_files(model)
        self._places = {id(owner): path for path, owner in places.items()}
        asked = {path: owner for path, owner in places.items() if not path or self._is_of(path, owner)}
        known = {value: name for path, owner in asked.items() for value, name in self._known(path, owner, names)}
        found = {self._places[id(each)]: name for name, each in self._objects.items() if id(each) in self._places}
        named = {place: name for place, name in found.items() if place in asked}
        self._names = {path: known.get(path) or self._name_of_other(path, named) for path in self._file.datasets}
        self._paths = {name: path for path, name in self._names.items()}
        there = {name: self._file.datasets[path] for name, path in self._paths.items()}
        self._kinds = {name: Kind(each.shape, each.dtype.name) for name, each in there.items()}
        for name, state in self._seeds.items():
            dtype = backend.kind_of(variables[name]).dtype if name in variables else "int64"
            self._kinds[name] = Kind((len(state),), dtype)
        trained = [names[id(variable)] for variable in model.trainable_variables]
        optimizers = [name for name, each in self._objects.items() if isinstance(each, keras.optimizers.Optimizer)]
        built = {prefix: trained for prefix in optimizers if self._is_built(prefix, named, trained)}
        self.description = Description(optimizers=built, objects=self._learned(known))

    def _known(self, path: str, owner: Any, names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
        """The names of an object's variables by the paths of their values."""
        for key, value in _answers(owner).items():
            if id(value) in names:
                yield dataset_of(path, key), names[id(value)]
            elif getattr(owner, "lora_enabled", False):
                # Keras merges the low-rank update (LoRA) of a kernel when it saves the kernel.
                kernels = [
                    names[id(each)] for each in owner.variables if backend.kind_of(each) == backend.kind_of(value)
                ]
                yield from ((dataset_of(path, key), name) for name in kernels if not is_lora(name))

    def _is_of(self, path: str, owner: Any) -> bool:
        """Whether the values at a path are of an object: a name that a user gave tells objects apart."""
        saved = self._labels.get(f"{path}{_VALUES}".rstrip("/"))
        return not saved or naming.is_same_name(getattr(owner, "name", saved), saved, type(owner).__name__)

    def _name_of_other(self, path: str, objects: Mapping[str, str]) -> str:
        """The name of a value that no variable of the model has.

        Args:
            path: The path of the value.
            objects: The names of the model's objects by place.
        """
        place, key = _owner(path), path.rpartition("/")[2]
        if place in objects:
            return f"{objects[place]}/{key}"
        segments = [segment for segment in place.split("/") if segment != "layers"]
        # A model in the model may have an optimizer too.
        part = _OPTIMIZER if _OPTIMIZER in segments else "model"
        inner = [segment for segment in segments if segment != _OPTIMIZER]
        saved, own = self._labels.get(path.rpartition("/")[0]), "".join(inner[-1:])
        if saved and not naming.is_same_name(own, saved, own.rstrip("_0123456789")):
            inner[-1:] = [saved]  # a user's name
        return "/".join([part, *inner, key])

    def _is_built(self, prefix: str, named: Mapping[str, str], trained: Sequence[str]) -> bool:
        """Whether the file has slots of an optimizer, or the state of an optimizer of another name."""
        slots = tuple(f"/{name.removeprefix('model/')}/" for name in trained)
        own = [name for name in self._paths if name.startswith(f"{prefix}/")]
        return bool(own) and (prefix not in named.values() or any(slot in name for name in own for slot in slots))

    def _learned(self, known: Mapping[str, str]) -> dict[str, Learned]:
        """The learned state of the model's objects in the file, by name. Collects their assets.

        Args:
            known: The names of the model's variables by the paths of their values.
        """
        found = {name: each for name, each in learners(self._objects).items() if id(each) in self._places}
        self.assets: list[bytes] = []
        self.lacking: Sequence[str] = [
            name.removeprefix("model/")
            for name, each in found.items()
            if learns_elsewhere(each, with_assets=self._file.is_archive)
        ]
        described = {}
        for name, each in found.items():
            place = self._places[id(each)]
            start = f"{place}/" if place else "vars/"  # all objects are in the model, and have their own state
            inside = {path: other for path, other in self._names.items() if path.startswith(start)}
            variables = {path.rpartition("/")[2]: other for path, other in inside.items() if _owner(path) == place}
            own = [other for path, other in inside.items() if path not in known]
            described[name] = Learned(type(each).__name__, variables, own, assets=self._assets_at(place))
        return described

    def _assets_at(self, place: str) -> dict[str, Asset]:
        """The files of an object. The files of objects in it are their own."""
        start = f"{place}/".lstrip("/")
        inner = tuple(f"{path}/" for path in self._places.values() if path != place and path.startswith(start))
        found = {}
        for path, data in self._files.items():
            if path.startswith(start) and not path.startswith(inner):
                digest = f"blake3:{blake3(data).hexdigest()}"
                found[path.removeprefix(start)] = Asset(len(self.assets), len(data), digest)
                self.assets.append(data)
        return found


def _answers(owner: Any) -> dict[str, Any]:
    """The values that an object would save, none if it can save nothing yet, such as a layer that is not adapted."""
    try:
        return saved_by(owner)
    except Exception:  # noqa: BLE001 - a restore does not need the answer
        return {}


def _owner(path: str) -> str:
    """The place of the object that has a value."""
    return f"/{path}".rpartition(_VALUES)[0].removeprefix("/")
