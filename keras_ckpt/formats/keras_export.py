"""A checkpoint as one of Keras's own files, `.keras` or `.weights.h5`, without Keras: the model is not built.

The content is that of the file which Keras would have written when the checkpoint was saved.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats.bundle_index import read_index
from keras_ckpt.formats.bundle_parts import BundleParts
from keras_ckpt.formats.config import Config, Place, portable, uncompiled
from keras_ckpt.formats.damage import damage_of, errors_as_damage
from keras_ckpt.formats.description import Learned
from keras_ckpt.formats.keras_reader import read_assets, read_config, read_names, read_verified
from keras_ckpt.formats.keras_writer import Member, archive, dataset_of, new_skeleton
from keras_ckpt.formats.variables import Kind, is_of_optimizer, values_at, values_of
from keras_ckpt.store.files import Folder
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord

_LOOKUPS = "StringLookup", "IntegerLookup", "TextVectorization"
_VOCABULARY, _VOCABULARY_OF_KERAS = "vocabulary.json", "vocabulary.txt"


class KerasContent(NamedTuple):
    """The content of one of Keras's own files.

    Attributes:
        prefix: The path of the checkpoint, for messages.
        config: The config of the model, or the reason why it has none; `None` if the checkpoint does not tell.
        names: The names of objects by the path of the group of their values.
        kinds: The types and shapes of the values by path.
        read: Reads a value by its path, while the checkpoint is open.
        assets: The files that objects saved, by path.
    """

    prefix: str
    config: Config | None
    names: Mapping[str, str]
    kinds: Mapping[str, Kind]
    read: Callable[[str], np.ndarray]
    assets: Mapping[str, bytes]

    def without_optimizer(self) -> KerasContent:
        """The content without the values of optimizers."""
        names = {path: name for path, name in self.names.items() if not is_of_optimizer(path)}
        return self._replace(
            names=names, kinds={path: kind for path, kind in self.kinds.items() if not is_of_optimizer(path)}
        )


def keras_content(files: Folder, name: str, record: CheckpointRecord | None) -> KerasContent:
    """The content for a checkpoint, readable as long as the files of the checkpoint are open.

    Raises:
        DamagedCheckpointError: The checkpoint cannot be read.
        ValueError: The checkpoint lacks a part of such a file.
    """
    prefix = os.path.join(files.path, name)
    return (_in_file if files.series.template else _in_bundle)(prefix, files, name, record)


def archive_of(content: KerasContent) -> Iterator[memoryview]:
    """The bytes of a `.keras` file. A model without the values of its optimizer is not compiled.

    Raises:
        ValueError: The checkpoint has no config of its model.
    """
    if content.config is None or content.config.config is None:
        reason = content.config.reason if content.config else "it is a file of weights, or another program wrote it"
        raise ValueError(f"{content.prefix} has no config of its model, because {reason}. Export to .weights.h5.")
    is_trained = any(map(is_of_optimizer, content.kinds))
    config = portable(content.config.config) if is_trained else uncompiled(content.config.config)
    date = f"{datetime.datetime.now():%Y-%m-%d@%H:%M:%S}"
    texts = {
        "metadata.json": msgspec.json.encode({"keras_version": content.config.keras, "date_saved": date}),
        "config.json": msgspec.json.encode(config),
        **{f"assets/{path}": data for path, data in content.assets.items()},
    }
    members = [Member(path, len(data), [memoryview(data)]) for path, data in texts.items()]
    return archive([*members, Member("model.weights.h5", *_weights(content))])


def weights_of(content: KerasContent) -> Iterator[memoryview]:
    """The bytes of a `.weights.h5` file, which has no assets: Keras saves none in it either."""
    if content.assets:
        warn(
            f"The .weights.h5 file of {content.prefix} lacks the files of layers, such as a vocabulary: "
            f"{', '.join(content.assets):.300}. A .keras file has them."
        )
    return _weights(content)[1]


def _weights(content: KerasContent) -> tuple[int, Iterator[memoryview]]:
    """The size and the bytes of an HDF5 file with the values."""
    for path, kind in content.kinds.items():
        if kind.dtype.isbuiltin != 1 and kind.dtype.name != "bfloat16":
            raise ValueError(f"a file of Keras cannot hold {path}, which is of {kind.dtype}.")
    skeleton = new_skeleton(content.names, content.kinds)
    return skeleton.size, skeleton.filled(lambda path: content.read(path).reshape(-1).view(np.uint8).data)


def _in_file(prefix: str, files: Folder, name: str, record: CheckpointRecord | None) -> KerasContent:
    with errors_as_damage():
        file = read_verified(files, name, record)
        config = read_config(files, name)
        names = read_names(files, name, file) if record or file.is_archive else {}
        assets = read_assets(files, name) if file.is_archive else {}
    if file.is_legacy:
        raise ValueError(
            f"{prefix} is a file of Keras's legacy format. Load the model and save it: "
            f"keras.models.load_model({prefix!r}).save('model.keras')."
        )
    values = values_at(name, file.datasets)
    names = {path: name for path, name in names.items() if name}
    return KerasContent(prefix, config, names, values.kinds, lambda path: values.read(files, path), assets)


def _in_bundle(prefix: str, files: Folder, name: str, record: CheckpointRecord | None) -> KerasContent:
    index = read_index(files, name, record.files if record else ())
    parts, variables = BundleParts(files, index), values_of(index)
    config = parts.config()
    if config is None or not config.places:
        raise ValueError(
            f"{prefix} does not tell the places of its values in a file of Keras: TensorFlow or an older version of "
            "keras_ckpt wrote it, or a layer could not be asked. "
            f"{_advice(prefix)}"
        )
    sources: dict[str, str | np.ndarray] = {}
    assets: dict[str, bytes] = {}
    for path, place in config.places.items():
        learned = _learned(prefix, path, place, parts)
        found = place.variables | (learned.variables if learned else {})
        sources |= {dataset_of(path, key): variable for key, variable in found.items()}
        if learned:
            _check_settings(prefix, path, learned, config)
            sources |= {dataset_of(path, key): parts.arrays[number] for key, number in learned.values.items()}
            files_of = {file: parts.assets[asset.index] for file, asset in learned.assets.items()}
            texts = _as_keras_saves(prefix, path, learned, files_of)
            assets |= {f"{path}/{file}".lstrip("/"): data for file, data in texts.items()}
    _check_variables(prefix, sources, variables.kinds)
    if unsafe := [path for path in assets if not {"", ".", ".."}.isdisjoint(path.split("/"))]:
        raise DamagedCheckpointError(f"{prefix} has an asset with an unsafe path: {unsafe[0]!r:.200}")

    def read(path: str) -> np.ndarray:
        source = sources[path]
        with damage_of(prefix):
            return variables.read(files, source) if isinstance(source, str) else source

    kinds = {
        path: variables.kinds[each] if isinstance(each, str) else Kind(each.dtype, each.shape)
        for path, each in sources.items()
    }
    names = {dataset_of(path, "").rstrip("/"): each.name for path, each in config.places.items() if each.name}
    return KerasContent(prefix, config, names, kinds, read, assets)


def _learned(prefix: str, path: str, place: Place, parts: BundleParts) -> Learned | None:
    """The learned state of an object, `None` if the object has variables alone."""
    if not place.learned:
        return None
    found = parts.description.objects.get(place.learned) if parts.description else None
    if found is None:
        raise DamagedCheckpointError(f"{prefix} has no state of {path}, which its config names")
    return found


def _check_variables(prefix: str, sources: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Refuses values that a layer computes, and names that the checkpoint does not have."""
    for path, source in sources.items():
        if isinstance(source, str) and source not in kinds:
            if source:
                raise DamagedCheckpointError(f"{prefix} does not have {source}, which its config names")
            raise ValueError(
                f"{prefix} does not have {path}, which its layer computes when Keras saves it, such as a kernel with a "
                f"merged low-rank update (LoRA). {_advice(prefix)}"
            )


def _check_settings(prefix: str, path: str, learned: Learned, config: Config) -> None:
    """Refuses a layer that learned into its config after the config of the model was made."""
    now = _plain(json.loads(learned.config or "{}"))
    # A layer that another layer makes is not in the config.
    made = [each for each in _settings(config.config, learned.kind) if each.get("name") == now.get("name")]
    if learned.config and made and now not in made:
        raise ValueError(
            f"{prefix} has another config of {path} than of its model, because the layer was adapted after the "
            f"first save. {_advice(prefix)}"
        )


def _settings(config: Any, kind: str) -> Iterator[dict[str, Any]]:
    """The configs of all objects of a class in a config."""
    if isinstance(config, dict):
        if config.get("class_name") == kind and isinstance(config.get("config"), dict):
            yield _plain(config["config"])
        config = [*config.values()]
    for each in config if isinstance(config, list) else ():
        yield from _settings(each, kind)


def _plain(config: Any) -> Any:
    """A config without the numbers by which Keras shares objects in the config of a whole model."""
    if isinstance(config, dict):
        return {name: _plain(each) for name, each in config.items() if name != "shared_object_id"}
    return [*map(_plain, config)] if isinstance(config, list) else config


def _as_keras_saves(prefix: str, path: str, learned: Learned, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The assets of an object, with a vocabulary in a text file, as Keras writes it.

    Raises:
        ValueError: The text file of Keras cannot hold the vocabulary.
    """
    if learned.kind not in _LOOKUPS or _VOCABULARY not in files:
        return files
    words = [str(word) for word in msgspec.json.decode(files[_VOCABULARY])]
    text = "\n".join(words)
    encoding = json.loads(learned.config or "{}").get("encoding") or "utf-8"
    if text.splitlines() != words or encoding != "utf-8":
        raise ValueError(
            f"a file of Keras cannot hold the vocabulary of {path} in {prefix}: a word has a line break, or the "
            f"encoding is {encoding!r:.50}, not 'utf-8'."
        )
    return {_VOCABULARY_OF_KERAS: text.encode()}


def _advice(prefix: str) -> str:
    return f"Load the model and save it: keras_ckpt.load_model({prefix!r}).save('model.keras')."
