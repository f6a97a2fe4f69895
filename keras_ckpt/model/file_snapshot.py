"""Keras's own files, `.keras`, `.weights.h5` and `.h5`: the state of a model at one moment, written later.

Keras's own writer makes a file of each layout of a model once. The file shows the place of each value. Saved files are
the same bytes with the values of a snapshot in these places, so training waits for the snapshot alone.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import h5py
import keras
import numpy as np
from blake3 import blake3

from keras_ckpt.formats.arena import Arena, same_bytes
from keras_ckpt.formats.keras_writer import (
    Member,
    Skeleton,
    Tail,
    archive,
    dataset_of,
    datasets_in,
    members_of,
    write_archive,
    write_hdf5,
)
from keras_ckpt.formats.threads import begin
from keras_ckpt.formats.variables import SUFFIX
from keras_ckpt.model import naming, parts
from keras_ckpt.model.backends import backend
from keras_ckpt.model.building import is_pickled
from keras_ckpt.model.companions import companion
from keras_ckpt.model.keras_internals import config_of, layers_of, places_in_files, written_by_keras
from keras_ckpt.model.learned import Steady, files_of, saved_by
from keras_ckpt.model.snapshot import Snapshot, arena_of
from keras_ckpt.model.structure import Structure
from keras_ckpt.store.files import Folder
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointFile

Kind = Literal["keras", "weights", "legacy"]
"""The kind of a file: `.keras`, `.weights.h5`, or the legacy `.h5` of a whole model."""
Source: TypeAlias = str | np.ndarray
"""The source of a dataset's value: the key of a variable in a snapshot, or the value itself."""

_WEIGHTS, _CONFIG, _METADATA, _ASSETS = "model.weights.h5", "config.json", "metadata.json", "assets"
"""The members of a `.keras` file, and the folder of the other members."""


class FileState:
    """The state of a model, as one of Keras's own files has it.

    The first snapshot of a model takes longer than Keras's own save. So does the first snapshot after a change that
    adds or renames variables or objects. Each snapshot for a legacy `.h5` file takes as long as Keras's own save.

    Example:

    ```python
    file = FileState(model, "keras").snapshot().write(folder, "best.keras", lambda size, digest: b"")
    ```

    Args:
        model: A built model.
        kind: The kind of the file.
    """

    def __init__(self, model: keras.Model, kind: Kind) -> None:
        self._model = model
        self._kind: Kind = kind
        self._arena = arena_of(model)
        self._structure: Structure | None = None
        self._plan: _Plan | None = None
        self._has_warned = False

    def snapshot(self) -> FileSnapshot:
        """Takes a snapshot of the present state. Call it in the thread that trains.

        Raises:
            Exception: Any error that Keras or the model raises while Keras saves the model.
        """
        if self._structure is not None:
            # Other threads may run Python while TensorFlow reads.
            holds = begin(self._structure.holds)
            snapshot = self._by_plan(self._structure)
            if holds():
                return snapshot or self._of(self._image())
        return self._of(self._image()) if self._kind == "legacy" else self._replanned()

    def _replanned(self) -> FileSnapshot:
        """A snapshot by a new plan, or by Keras's own writer if no plan fits the model."""
        model = self._model
        backend.synchronize(model)
        variables, below = naming.named_variables(model), parts.tracked(model)
        owners = [*parts.optimizers_of(model, below).values(), *parts.losses_of(model, below).values()]
        self._structure, self._plan = Structure(model, owners, [*variables.values()]), None
        image = functools.cache(self._image)
        try:
            self._plan = _Plan(model, self._kind, variables, image)
        except Exception as error:  # noqa: BLE001 - if it is the model's error, Keras's own writer raises it too
            image()
            self._refuse(error)
        return self._by_plan(self._structure) or self._of(image())

    def _by_plan(self, structure: Structure) -> FileSnapshot | None:
        """A snapshot by the plan for a structure, `None` without a plan that fits the model."""
        if self._plan is None:
            return None
        try:
            moment = self._plan.moment()
        except Exception as error:  # noqa: BLE001 - if it is the model's error, Keras's own writer raises it too
            if structure.holds():
                self._refuse(error)
            return None
        content = functools.partial(self._plan.content, moment)
        return FileSnapshot(self._kind, self._plan.size, content, self._arena, moment.values)

    def _image(self) -> bytes:
        """A file of the present state that Keras's own writer makes."""
        backend.synchronize(self._model)
        return written_by_keras(self._model, self._kind)

    def _of(self, image: bytes) -> FileSnapshot:
        """A snapshot that writes a file of the present state as it is."""
        seeds = naming.seeds_in(naming.named_variables(self._model))
        states = _listed(backend.Reader(self._model, seeds).read())
        content = Content([memoryview(image)], fingerprint(self._model), states)
        return FileSnapshot(self._kind, len(image), lambda arena: content, self._arena)

    def _refuse(self, error: Exception) -> None:
        """Drops the plan: Keras's own writer makes the files of this structure."""
        self._plan = None
        if not self._has_warned:
            self._has_warned = True
            warn(
                f"Keras's own writer makes the files of {self._model.name!r}, and training waits for it. The faster "
                f"writer of keras_ckpt does not fit this model: {error!r:.300}"
            )


class FileSnapshot:
    """The state of a model at one moment, to be written into one file.

    Example:

    ```python
    snapshot = FileState(model, "weights").snapshot()
    file = snapshot.write(folder, "best.weights.h5", lambda size, digest: b"")
    ```

    Args:
        kind: The kind of the file.
        size: The approximate bytes of the file.
        content: Makes the content of the file. It may copy values into an arena.
        arena: The arena of the model.
        values: The values that the bytes will have, if training has to copy them before it changes them.

    Attributes:
        size: The approximate bytes of the file.
    """

    def __init__(
        self,
        kind: Kind,
        size: int,
        content: Callable[[Arena], Content],
        arena: Arena,
        values: Snapshot | None = None,
    ) -> None:
        self.size = size
        self._kind = kind
        self._content = content
        self._arena = arena
        self._values = values

    @property
    def is_copied(self) -> bool:
        """Whether the values are copies, which training cannot affect."""
        return self._values is None or self._values.is_copied

    @functools.cached_property
    def content(self) -> Content:
        """The content of the file, which copies the values. Ask for it once the values may be copied, in any thread."""
        return self._content(self._arena)

    def detach(self, change: bool) -> None:
        """Copies the values at once: training with XLA would have to copy held values before its next batch.

        Args:
            change: Whether the arena of the model may be changed now.
        """
        if self._values is not None:
            self._values.detach(self._arena, change)

    def write(self, folder: Folder, name: str, tail: Tail) -> CheckpointFile:
        """Writes the file with a tail, and makes it durable. Call it once, in any thread.

        Args:
            folder: Where to write.
            name: The name of the file. An existing file of that name is an error.
            tail: Makes the tail, from the size and the digest of all bytes before it. In a `.keras` file the tail has
                at most 65,535 bytes, and its size must not depend on the digest.

        Returns:
            The file, with the size and the digest of all its bytes.
        """
        write = write_archive if self._kind == "keras" else write_hdf5
        return write(folder, name, self.content.pieces, tail)


class Content(NamedTuple):
    """The content of a file.

    Attributes:
        pieces: The bytes of the file in order. They do not change before the arena is changed next.
        weights: The fingerprint of the model's weights, `None` if the file has other values, such as merged kernels.
        seeds: The states of the model's seed generators by name, which the file lacks.
    """

    pieces: Iterable[memoryview]
    weights: str | None
    seeds: Mapping[str, list[int]]


def fingerprint(model: keras.Model) -> str:
    """The digest of the weights of a model. A model that Keras loads from a file has the same fingerprint."""
    weights = {str(place): weight for place, weight in enumerate(model.weights)}
    values = backend.Reader(model, weights).read()
    return _digest([_flat(np.ascontiguousarray(backend.array_of(values[key]))) for key in weights])


class _Moment(NamedTuple):
    """The state of a model at one moment.

    Attributes:
        values: The values of variables.
        answers: The sources of the values of objects that are asked, by dataset.
        others: Makes the members of a `.keras` file other than the weights.
        seeds: The states of seed generators by name.
    """

    values: Snapshot
    answers: Mapping[str, Source]
    others: Callable[[], Mapping[str, bytes]]
    seeds: Mapping[str, Any]


class _Proof(NamedTuple):
    """A proof that a plan makes the files that Keras's own writer makes.

    Attributes:
        layout: The layout of the files: the objects and the datasets in them.
        skeleton: The skeleton of their weights.
        size: The bytes of the file that was compared.
    """

    layout: object
    skeleton: Skeleton
    size: int


class _Proofs(dict[Kind, _Proof]):
    """The proofs that accompany a model, by the kind of file: another `fit` or callback needs no proof again."""


class _Plan:
    """The source of each byte of the files of a model.

    Args:
        model: The model.
        kind: The kind of the file.
        variables: The variables of the model by name.
        image: Makes a file of the present state by Keras's own writer. It is called if the model has no proof.

    Attributes:
        size: The approximate bytes of a file.

    Raises:
        Exception: The plan would make another file, or Keras has changed.
    """

    def __init__(
        self, model: keras.Model, kind: Kind, variables: Mapping[str, Any], image: Callable[[], bytes]
    ) -> None:
        self._model = model
        self._kind: Kind = kind
        self._fixed: dict[str, Source] = {}
        self._asked: dict[str, Any] = {}
        self._savers: dict[str, Any] = {}
        self._files = Steady()
        objects = places_in_files(model)
        read = self._note_sources(objects, {id(variable): f"{name}{SUFFIX}" for name, variable in variables.items()})
        seeds = naming.seeds_in(variables)
        self._seeds = {f"{name}{SUFFIX}": name for name in seeds}
        read |= zip(self._seeds, seeds.values(), strict=True)
        self._keys = {id(variable): key for key, variable in read.items()}
        self._reader = backend.Reader(model, read)
        own = {key: variable for key, variable in read.items() if isinstance(variable, keras.Variable)}
        self._scalars = {key: variable for key, variable in own.items() if not tuple(variable.shape)}
        self._has_pickle = any(map(is_pickled, layers_of(model)))
        self._kinds = {dataset: _kind(source) for dataset, source in self._answers().items()}
        proofs, layout = companion(model, _Proofs), self._layout(objects, read)
        if kind not in proofs or proofs[kind].layout != layout:
            file = image()
            proofs[kind] = _Proof(layout, self._prove(file), len(file))
        self._skeleton, self.size = proofs[kind].skeleton, proofs[kind].size

    def _note_sources(self, objects: Mapping[str, Any], keys: Mapping[int, str]) -> dict[str, Any]:
        """Notes the source of each dataset. Returns the variables to read by key."""
        read = {}
        for path, owner in objects.items():
            variables = saved_by(owner)
            is_fixed = _is_fixed(owner, variables, keys)
            for name, value in variables.items():
                dataset = dataset_of(path, name)
                key = keys.get(id(value), f"file/{dataset}{SUFFIX}")
                if isinstance(value, keras.Variable) or id(value) in keys:
                    read[key] = value
                if is_fixed:
                    self._fixed[dataset] = key
            if not is_fixed:
                self._asked[path] = owner
            if self._kind == "keras" and hasattr(owner, "save_assets"):
                self._savers[f"{_ASSETS}/{path}".rstrip("/")] = owner
        return read

    def _layout(self, objects: Mapping[str, Any], read: Mapping[str, Any]) -> object:
        """A description that is equal for models whose files differ in values alone. It refers to no object of one."""
        named = [(path, type(owner), getattr(owner, "name", None)) for path, owner in objects.items()]
        kinds = {key: backend.kind_of(variable) for key, variable in read.items()}
        return named, kinds, self._fixed, self._kinds

    def moment(self) -> _Moment:
        """The present state of the model.

        Raises:
            ValueError: An object gives other values than before.
        """
        if self._asked:
            backend.synchronize(self._model)
        values = Snapshot(self._reader, {})
        answers = self._answers()
        for dataset in answers.keys() | self._kinds.keys():
            if dataset not in answers or _kind(answers[dataset]) != self._kinds.get(dataset):
                raise ValueError(f"{dataset} is {_kind(answers.get(dataset))}, it was {self._kinds.get(dataset)}")
        scalars = [(variable, values.values[key]) for key, variable in self._scalars.items()]
        seeds = {name: values.values[key] for key, name in self._seeds.items()}
        others = functools.cache(functools.partial(self._others, scalars, self._saved_assets()))
        if self._has_pickle and self._kind == "keras":
            others()  # the config has the values of a module of PyTorch, which the next step changes
        return _Moment(values, answers, others, seeds)

    def _answers(self) -> dict[str, Source]:
        """The sources of the values of objects that are asked, by dataset."""
        found: dict[str, Source] = {}
        for path, owner in self._asked.items():
            for name, value in saved_by(owner).items():
                found[dataset_of(path, name)] = self._keys.get(id(value)) or _copy(value)
        return found

    def _saved_assets(self) -> dict[str, bytes]:
        """The files that objects save, by member of the archive."""
        return {
            f"{place}/{name}": data
            for place, owner in self._savers.items()
            for name, data in self._files.get(owner, functools.partial(files_of, owner)).items()
        }

    def content(self, moment: _Moment, arena: Arena) -> Content:
        """The content of a file."""
        values = {key.decode(): value.data for key, value in moment.values.move(arena).items()}
        bytes_of = self._by_dataset(moment, values)
        weights = self._skeleton.filled(lambda name: bytes_of[name].data)
        known = [self._keys.get(id(weight), "") for weight in self._model.weights]
        found = _digest([values[key] for key in known]) if values.keys() >= {*known} else None
        seeds = _listed(moment.seeds)
        if self._kind == "weights":
            return Content(weights, found, seeds)
        return Content(archive(self._members(moment, weights)), found, seeds)

    def _members(self, moment: _Moment, weights: Iterable[memoryview]) -> Iterator[Member]:
        """The members of a `.keras` file. The config is made last, while the disk writes the weights."""
        yield Member(_WEIGHTS, self._skeleton.size, weights)
        for name, data in moment.others().items():
            yield Member(name, len(data), [memoryview(data)])

    def _by_dataset(self, moment: _Moment, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The bytes of each dataset, from the bytes of variables by key."""
        sources = {**self._fixed, **moment.answers}
        return {name: values[each] if isinstance(each, str) else _flat(each) for name, each in sources.items()}

    def _others(self, scalars: Sequence[tuple[keras.Variable, Any]], assets: Mapping[str, bytes]) -> dict[str, bytes]:
        """The members of a `.keras` file other than the weights.

        Args:
            scalars: The values of variables without dimensions, which a config may have.
            assets: The files that objects saved, by member of the archive.
        """
        config, metadata = config_of(self._model, scalars)
        return {_METADATA: metadata.encode(), _CONFIG: config.encode(), **assets}

    def _prove(self, image: bytes) -> Skeleton:
        """The skeleton of a file by Keras, after a proof that the plan makes the same file now."""
        theirs = members_of(image) if self._kind == "keras" else {_WEIGHTS: image}
        weights = theirs.pop(_WEIGHTS)
        with h5py.File(io.BytesIO(weights)) as file:
            datasets, moment = datasets_in(file), self.moment()
        values = {key: _flat(backend.array_of(each)) for key, each in moment.values.values.items()}
        ours, data = self._by_dataset(moment, values), np.frombuffer(weights, np.uint8)
        if differing := sorted(datasets.keys() ^ ours.keys()):
            raise ValueError(f"only one of both writers makes the dataset {differing[0]}")
        for path, each in datasets.items():
            if not same_bytes(ours[path], data[each.offset : each.offset + each.size]):
                raise ValueError(f"the values of {path} differ")
        others = moment.others() if self._kind == "keras" else {}
        for name in theirs.keys() | others.keys():
            if _undated(name, theirs.get(name)) != _undated(name, others.get(name)):
                raise ValueError(f"{name} differs")
        return Skeleton(weights, datasets)


def _is_fixed(owner: Any, answers: Mapping[str, Any], keys: Container[int]) -> bool:
    """Whether an object saves the same variables until the structure of the model changes."""
    of_keras = owner.save_own_variables.__module__.startswith("keras.")
    return of_keras and all(isinstance(value, keras.Variable) or id(value) in keys for value in answers.values())


def _kind(source: Source | None) -> object:
    """A description that is equal for values that fit into the same place."""
    return (source.dtype.str, source.shape) if isinstance(source, np.ndarray) else source


def _copy(value: Any) -> np.ndarray:
    """A copy of a value, as Keras would save it.

    Raises:
        TypeError: The value is not an array of numbers.
    """
    array = np.array(keras.ops.convert_to_numpy(value), order="C")
    if array.dtype.kind == "O":
        raise TypeError(f"a value of type {type(value).__name__} is not an array of numbers")
    return array


def _listed(states: Mapping[str, Any]) -> dict[str, list[int]]:
    """The states of seed generators as lists."""
    return {name: backend.array_of(state).tolist() for name, state in states.items()}


def _digest(arrays: Sequence[np.ndarray]) -> str:
    # One thread digests short arrays faster.
    several = sum(map(len, arrays)) > len(arrays) << 20
    hasher = blake3(max_threads=blake3.AUTO if several else 1)
    for array in arrays:
        hasher.update(array.data)
    return f"blake3:{hasher.hexdigest()}"


def _flat(array: np.ndarray) -> np.ndarray:
    """The bytes of an array."""
    return array.reshape(-1).view(np.uint8)


def _undated(name: str, data: bytes | None) -> object:
    """A member of a `.keras` file without its date."""
    if name != _METADATA or data is None:
        return data
    return {key: value for key, value in json.loads(data).items() if key != "date_saved"}
