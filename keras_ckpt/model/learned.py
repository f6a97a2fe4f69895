"""Keras's saving protocol: what objects learned beyond variables, taken from a model and given to another.

By `save_own_variables` and `save_assets` an object writes what a `.keras` file has of it, by `load_own_variables`,
`load_assets` and `finalize_state` it reads that. Variables are saved by other means; the rest is saved as arrays and
as files. Some layers of Keras learn what is in their config alone, so the config of a layer that adapts is saved too.
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import msgspec
import numpy as np
from blake3 import blake3

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats.arrays import number_of
from keras_ckpt.formats.description import ASSET_LIMIT, Asset, Description, Learned
from keras_ckpt.model import tensorflow as backend
from keras_ckpt.model.keras_internals import unlock
from keras_ckpt.model.matching import same_end, unsure
from keras_ckpt.model.naming import named_objects
from keras_ckpt.store.files import files_below, temporary_directory, write_below

_METHODS = (
    "save_own_variables",
    "load_own_variables",
    "save_assets",
    "load_assets",
    "finalize_state",
    "get_build_config",
    "build_from_config",
    "adapt",
)
_VARIABLES = keras.Variable | backend.Variable
_LOOKUPS = keras.layers.StringLookup | keras.layers.IntegerLookup | keras.layers.TextVectorization
_STEADY = (
    keras.layers.Normalization,
    keras.layers.Discretization,
    keras.layers.StringLookup,
    keras.layers.IntegerLookup,
    keras.layers.TextVectorization,
)
"""Of these, what they learned is another as soon as an attribute is another object."""
_GIVEN = {"name", "trainable", "dtype", "encoding", "epsilon", "vocabulary_size"}
"""What the config of a layer of Keras says that decides nothing, or follows from the rest."""
_LONG, _MOST = 1000, 100_000
"""A list of more items is not searched for lists, and so many containers are at most."""
_VOCABULARY, _UTF_8 = "vocabulary.json", "utf-8"
_TEXT = "vocabulary.txt"
"""The vocabulary as Keras writes it, which is in older checkpoints."""
_ADAPTED = {"bin_boundaries", "vocabulary", "idf_weights", "mean", "variance"}
"""What such a layer learned, or was given in its place."""


class Taken(NamedTuple):
    """What the objects of a model learned, at one moment.

    Attributes:
        objects: Their descriptions, by name.
        arrays: The arrays by the indexes in these.
        assets: The bytes of files by the indexes in these.
        failed: What could not be taken, each with the reason.
    """

    objects: Mapping[str, Learned]
    arrays: Sequence[np.ndarray]
    assets: Sequence[bytes]
    failed: Sequence[str]


class Learners:
    """The objects of a model that take part in Keras's saving protocol.

    Args:
        model: A built model.
        names: The names of its variables by their identities.
        weights_only: Whether to leave out optimizers, losses and metrics.
    """

    def __init__(self, model: keras.Model, names: Mapping[int, str], weights_only: bool = False) -> None:
        self._objects = learners(named_objects(model), weights_only)
        self._names = names
        self._steady: dict[str, tuple[list[Any], _One]] = {}
        self._last: tuple[list[_One], Taken] | None = None

    def __len__(self) -> int:
        return len(self._objects)

    def identities(self) -> set[int]:
        """Theirs."""
        return set(map(id, self._objects.values()))

    def take(self) -> Taken:
        """What they learned by now. The same object is returned until one of them changes."""
        ones = [self._take(name, each) for name, each in self._objects.items()]
        if self._last is None or list(map(id, ones)) != list(map(id, self._last[0])):
            self._last = ones, self._taken(ones)
        return self._last[1]

    def _taken(self, ones: Sequence[_One]) -> Taken:
        objects: dict[str, Learned] = {}
        arrays: list[np.ndarray] = []
        assets: dict[str, tuple[int, bytes]] = {}
        failed: list[str] = []
        for (name, each), one in zip(self._objects.items(), ones, strict=True):
            failed += one.failed
            files = {}
            for path, data in one.files.items():
                digest = f"blake3:{blake3(data).hexdigest()}"
                index, _ = assets.setdefault(digest, (len(assets), data))
                files[path] = Asset(index, len(data), digest)
            values = {key: len(arrays) + place for place, key in enumerate(one.arrays)}
            arrays += one.arrays.values()
            objects[name] = Learned(type(each).__name__, one.variables, one.own, values, files, one.config, one.build)
        return Taken(objects, arrays, [data for _, data in assets.values()], failed)

    def _take(self, name: str, each: Any) -> _One:
        if type(each) not in _STEADY:
            return _take(name, each, self._names)
        # Those of before are held, so that no other object gets the identity of one of them.
        attributes = [*vars(each).values(), *vars(getattr(each, "_lookup_layer", None) or object).values()]
        before, one = self._steady.get(name, ([], None))
        if one is None or list(map(id, before)) != list(map(id, attributes)):
            one = _take(name, each, self._names)
            self._steady[name] = attributes, one
        return one


class _One(NamedTuple):
    """What one object learned."""

    variables: dict[str, str]
    own: list[str]
    arrays: dict[str, np.ndarray]
    files: dict[str, bytes]
    config: str | None
    build: str | None
    failed: list[str]


def learners(objects: Mapping[str, Any], weights_only: bool = False) -> dict[str, Any]:
    """The objects whose class has methods of its own in Keras's saving protocol, by name.

    Args:
        objects: The objects of a model by name.
        weights_only: Whether to leave out those beside the model's layers.
    """
    return {
        name: each
        for name, each in objects.items()
        if any(_has_own(each, method) for method in _METHODS)
        and not (weights_only and name.partition("/")[0] != "model")
    }


def _has_own(each: Any, method: str) -> bool:
    """Whether the class of an object has a method of its own, beside those of which variables are all there is."""
    function = getattr(type(each), method, None)
    return callable(function) and function not in _plain_methods()


@functools.cache
def _plain_methods() -> frozenset[Any]:
    layers = keras.layers
    plain = (
        keras.Layer, keras.Model, keras.Sequential, keras.optimizers.Optimizer, keras.utils.FeatureSpace,
        layers.Dense, layers.EinsumDense, layers.Embedding, layers.ReversibleEmbedding, layers.Conv1D,
    )  # fmt: skip
    return frozenset(getattr(kind, method) for kind in plain for method in _METHODS if hasattr(kind, method))


def _take(name: str, each: Any, names: Mapping[int, str]) -> _One:
    failed: list[str] = []

    def asked(method: str, ask: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return ask(*arguments)
        except Exception as error:  # noqa: BLE001 - it is the user's, and no reason to end a training
            failed.append(f"{name}.{method}(), which raised {error!r:.200}")
            return None

    store: dict[str, Any] = {}
    if _has_own(each, "save_own_variables") or _has_own(each, "load_own_variables"):
        asked("save_own_variables", each.save_own_variables, store)
    variables = {str(key): names[id(value)] for key, value in store.items() if id(value) in names}
    arrays = {}
    for key, value in store.items():
        array = None if id(value) in names else asked("save_own_variables", _as_array, value)
        if array is not None:
            arrays[str(key)] = array
    write = _vocabulary_of if isinstance(each, _LOOKUPS) else _files_of
    files = asked("save_assets", write, each) if _has_own(each, "save_assets") else None
    config = asked("get_config", lambda: _as_json(each.get_config())) if hasattr(each, "adapt") else None
    own_build = _has_own(each, "build_from_config") or _has_own(each, "get_build_config")
    build = asked("get_build_config", lambda: _as_json(each.get_build_config())) if own_build else None
    own = [names[id(value)] for value in vars(each).values() if isinstance(value, _VARIABLES) and id(value) in names]
    return _One(variables, own, arrays, files or {}, config, build, failed)


def _as_array(value: Any) -> np.ndarray:
    array = np.asarray(keras.ops.convert_to_numpy(value) if not isinstance(value, np.ndarray) else value)
    if array.dtype.kind in "OU":
        raise TypeError(f"a value of type {type(value).__name__} is no array of numbers")
    number_of(array.dtype)
    return array


def _as_json(config: Any) -> str:
    return json.dumps(keras.saving.serialize_keras_object(config), sort_keys=True)


def _files_of(each: Any) -> dict[str, bytes]:
    with temporary_directory() as path:
        each.save_assets(path)
        return files_below(path, ASSET_LIMIT)


def _vocabulary_of(each: Any) -> dict[str, bytes]:
    """The vocabulary of a lookup as JSON. The text that Keras writes cannot have words with ends of lines in them."""
    if each.get_config()["vocabulary"] is not None:
        return {}  # it is in the config
    # A word of another encoding is given back as bytes, beside which Keras does not know its own words.
    words = each.get_vocabulary(include_special_tokens=_encoding_of(each) == _UTF_8)
    words = [str(word) if isinstance(word, str) else int(word) for word in words]
    return {_VOCABULARY: json.dumps(words).encode()}


class Pairing(NamedTuple):
    """Which objects of a model get what of a checkpoint.

    Attributes:
        given: The objects that get something, by name, each with what that is.
        alone: The objects, by name, of which the checkpoint has variables alone.
        unknown: The names of objects that learned more than the checkpoint tells.
        matched: In names for a report, what the given objects get beyond variables.
        missing: The objects that the checkpoint does not have.
        unexpected: What the checkpoint has of objects that the model does not have.
        mismatched: The objects that are others in the checkpoint; each with the reason.
    """

    given: Mapping[str, tuple[Any, Learned]]
    alone: Mapping[str, Any]
    unknown: Sequence[str]
    matched: Sequence[str]
    missing: Sequence[str]
    unexpected: Sequence[str]
    mismatched: Mapping[str, str]

    def read_by_themselves(self, names: Mapping[int, str]) -> set[str]:
        """The variables that the given objects read by themselves, of those on disk and those in the model."""
        given = [(each, learned) for each, learned in self.given.values() if _has_own(each, "load_own_variables")]
        here = (value for each, _ in given for value in vars(each).values() if isinstance(value, _VARIABLES))
        there = {name for _, learned in given for name in learned.own}
        return there | {names[id(value)] for value in here if id(value) in names}


def pair(
    objects: Mapping[str, Any],
    description: Description | None,
    names: Mapping[int, str],
    assets: Sequence[bytes],
    automatic: Collection[str] | None,
) -> Pairing:
    """Pairs the objects of a model with what a checkpoint says of objects.

    Args:
        objects: The objects by name.
        description: What it says, `None` if it is of an older version, or not of this package.
        names: The names of the model's variables by their identities.
        assets: The assets of the checkpoint.
        automatic: For a partial restore, the names that Keras gave to layers by itself, with `{}` in the places of
            their numbers.
    """
    if description is None:
        unknown = [name for name, each in objects.items() if _learned_more(_take(name, each, names))]
        return Pairing({}, objects, [name.removeprefix("model/") for name in unknown], (), (), (), {})
    there = _moved(description.objects, objects)
    mismatched = {name: difference(objects[name], there[name], assets) for name in objects if name in there}
    if automatic is not None:
        why = "an automatic name, of another number of layers in the checkpoint: give them names"
        mismatched |= dict.fromkeys(unsure(mismatched, there, automatic), why)
    reasons = {name: reason for name, reason in mismatched.items() if reason is not None}
    given = {name: (objects[name], there[name]) for name in mismatched if name not in reasons}
    return Pairing(
        given,
        {},
        (),
        matched=[item for name, (each, learned) in given.items() for item in _items(name, learned, each)],
        missing=[_shown(name) for name in objects if name not in there],
        unexpected=[item for name in there if name not in objects for item in _items(name, there[name])],
        mismatched={_shown(name): reason for name, reason in reasons.items()},
    )


def _moved(there: Mapping[str, Learned], here: Mapping[str, Any]) -> dict[str, Learned]:
    """The objects of a checkpoint by the names that they have in the model.

    An object that was built before it was in the model is called by a shorter path.
    """
    found = dict(there)
    waiting = [name for name in here if name not in there]
    for name in [name for name in there if name not in here]:
        ends = [other for other in waiting if same_end(name, other, least=1)]
        if len(ends) == 1 and type(here[ends[0]]).__name__ == there[name].kind:
            found[ends[0]] = found.pop(name)
    return found


def _shown(name: str) -> str:
    return f"learned/{name.removeprefix('model/')}"


def _items(name: str, learned: Learned, each: Any = None) -> list[str]:
    """What an object learned beyond variables, in names for a report; `each` is the one that is to have it."""
    config = json.loads(learned.config) if learned.config else {}
    in_config = [*_other_settings(each, config)] if each is not None else []
    if config.get("bin_boundaries") is not None and config.get("num_bins"):
        in_config = ["bin_boundaries"]
    return [f"{_shown(name)}/{item}" for item in (*learned.assets, *learned.values, *in_config)]


def _other_settings(each: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """What an adapted layer of a user's learned into its config, by the attributes that are to have it.

    What differs is learned if it is missing in the layer, or a fraction or a collection. Anything else is the program's
    choice.
    """
    if type(each) in _STEADY or not hasattr(each, "adapt"):
        return {}
    here = json.loads(_as_json(each.get_config()))
    other = {name: value for name, value in config.items() if value is not None and here.get(name, value) != value}
    return {
        name: keras.saving.deserialize_keras_object(value)
        for name, value in other.items()
        if name in vars(each) and name not in _GIVEN and (here[name] is None or isinstance(value, float | list | dict))
    }


def _learned_more(one: _One) -> bool:
    """Whether variables are not all that an object learned."""
    config = json.loads(one.config) if one.config else {}
    return bool(one.failed or one.arrays or one.files or config.get("bin_boundaries") is not None)


def build_otherwise(each: Any, learned: Learned) -> None:
    """Builds an object that has its variables as it was built in the checkpoint, if that is another way.

    An object that makes variables again by that is left as it was.
    """
    if learned.build is None or _as_json(each.get_build_config()) == learned.build:
        return
    undo, before = Undo([each]), list(map(id, each.variables))
    build(each, learned)
    if list(map(id, each.variables)) != before:
        undo.undo()


def build(each: Any, learned: Learned) -> None:
    """Builds an object that lacks variables as it was built in the checkpoint, if its class has a way of its own."""
    if learned.build is None or not _has_own(each, "build_from_config"):
        return
    # Keras locks a layer that is built. Here it gets variables that its first build could not know of.
    unlock(each)
    each.build_from_config(keras.saving.deserialize_keras_object(json.loads(learned.build)))


def difference(each: Any, learned: Learned, assets: Sequence[bytes]) -> str | None:
    """Why an object cannot have what another learned, `None` if it can."""
    kind = type(each).__name__
    if kind != learned.kind:
        return f"of class {kind} in the model, {learned.kind} in the checkpoint"
    if type(each) not in _STEADY or learned.config is None:
        return None
    here, there = json.loads(_as_json(each.get_config())), json.loads(learned.config)
    for name in sorted(here.keys() & there.keys() - _GIVEN - _ADAPTED):
        if here[name] != there[name]:
            return f"{name}={here[name]!r:.100} in the model, {there[name]!r:.100} in the checkpoint"
    if isinstance(each, _LOOKUPS):
        given = here["vocabulary"]
        files = {path: assets[asset.index] for path, asset in learned.assets.items()}
        other = given is not None and given != there["vocabulary"]
        if other and _words(each) != [str(word) for word in _words_in(each, files)]:
            return "another vocabulary was given in the model than the checkpoint has"
    elif any(here.get(name) is not None and here[name] != there.get(name) for name in ("mean", "variance")):
        return "another mean or variance was given in the model than the checkpoint has"
    return None


def give(each: Any, learned: Learned, store: Mapping[str, np.ndarray], files: Mapping[str, bytes]) -> None:
    """Gives an object what another learned.

    Args:
        each: The object.
        learned: The description.
        store: What the other stored with `save_own_variables`.
        files: What it wrote with `save_assets`.

    Raises:
        DamagedCheckpointError: The path of a file leads out of its directory.
        Exception: What the object raises.
    """
    config = json.loads(learned.config) if learned.config else {}
    if isinstance(each, _LOOKUPS):
        _give_vocabulary(each, config, store, files)
        return
    if _has_own(each, "load_own_variables") or _has_own(each, "save_own_variables"):
        each.load_own_variables(dict(store))
    if files and _has_own(each, "load_assets"):
        with temporary_directory() as path:
            try:
                write_below(path, files)
            except ValueError as error:
                raise DamagedCheckpointError(f"an asset of {learned.kind} is not its own: {error}") from error
            each.load_assets(path)
    _give_config(each, config)
    finalize(each)


def _give_vocabulary(
    each: Any, config: Mapping[str, Any], store: Mapping[str, np.ndarray], files: Mapping[str, bytes]
) -> None:
    """Gives a lookup its vocabulary. What Keras's own `load_assets` does fails with padded weights of terms."""
    weights = store.get("idf_weights")
    words: list[Any] | None = config.get("vocabulary")
    if words is not None and each.get_config()["vocabulary"] is not None:
        return  # both were given the same
    if words is None:
        words = _words_in(each, files)
    if words:
        lookup = getattr(each, "_lookup_layer", each)
        if (encoding := _encoding_of(each)) != _UTF_8:
            # TensorFlow would encode a string as UTF-8.
            words = [word.encode(encoding) if isinstance(word, str) else word for word in words]
        if weights is not None:
            vars(lookup).pop("idf_weights", None)  # which has a length of its own
            weights = weights[: len(words)]
        each.set_vocabulary(words, weights)


def _encoding_of(lookup: Any) -> str:
    return getattr(getattr(lookup, "_lookup_layer", lookup), "encoding", None) or _UTF_8


def has(each: Any, learned: Learned, store: Mapping[str, np.ndarray], files: Mapping[str, bytes]) -> bool:
    """Whether an object has what another learned, beyond variables."""
    one = _take("", each, {})
    mine = {key: one.arrays.get(key) for key in learned.values}
    same = all(each is not None and np.array_equal(each, store[key]) for key, each in mine.items())
    return same and one.files == files and one.config == learned.config


def finalize(each: Any) -> None:
    """Has an object finalize its state, if it does not do so by itself when it reads its variables."""
    if _has_own(each, "finalize_state") and not _has_own(each, "load_own_variables"):
        each.finalize_state()


def give_variables(each: Any, names: Mapping[int, str], values: Mapping[str, Any]) -> None:
    """Has an object read its variables by itself, of a checkpoint that tells nothing else of it.

    Args:
        each: The object.
        names: The names of the model's variables by their identities.
        values: The values that were restored, by name.
    """
    one = _take("", each, names)
    if not one.failed and not one.arrays and set(one.variables.values()) <= values.keys():
        store = {key: values[name] for key, name in one.variables.items()}
        give(each, Learned(type(each).__name__), store, {})


def _give_config(each: Any, config: Mapping[str, Any]) -> None:
    """Gives an object what it learned into its config alone."""
    if isinstance(each, keras.layers.Discretization):
        each.bin_boundaries = config.get("bin_boundaries", each.bin_boundaries)
    else:
        for name, value in _other_settings(each, config).items():
            setattr(each, name, value)


def _words(each: Any) -> list[str]:
    return [str(word) for word in each.get_vocabulary()]


def _words_in(each: Any, files: Mapping[str, bytes]) -> list[Any]:
    """The vocabulary in the files of a lookup; none if it could not be saved.

    Raises:
        DamagedCheckpointError: The files have none.
    """
    kind: Any = int if isinstance(each, keras.layers.IntegerLookup) else str
    try:
        if (text := files.get(_TEXT)) is not None:
            return [kind(line) for line in text.decode().rstrip("\n").splitlines()]
        words: list[Any] = msgspec.json.decode(files[_VOCABULARY], type=list[kind]) if files else []
    except (KeyError, ValueError) as error:
        raise DamagedCheckpointError(f"the vocabulary of {each.name} cannot be read: {error!r}") from error
    return words


class Undo:
    """Objects as they are now, for the case that one refuses what a checkpoint has for it.

    Args:
        objects: The objects.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._before = [(each, dict(vars(each)), _contents(vars(each))) for each in objects]

    def undo(self) -> None:
        """Makes them as they were: their attributes, and what is in the containers and arrays of these."""
        for each, attributes, contents in self._before:
            vars(each).clear()
            vars(each).update(attributes)
            for container, content in contents:
                _fill(container, content)


def _contents(attributes: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    kinds = (list, dict, set, collections.deque, np.ndarray)
    found: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    waiting = [each for each in attributes.values() if isinstance(each, kinds)]
    while waiting and len(found) < _MOST:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            found.append((each, each.copy()))
            if not isinstance(each, np.ndarray) and len(each) <= _LONG:
                inside = each.values() if isinstance(each, dict) else each
                waiting += [other for other in inside if isinstance(other, kinds)]
    return found


def _fill(container: Any, content: Any) -> None:
    """Fills a container, past those methods of Keras's containers that track what is put in."""
    if isinstance(container, np.ndarray):
        container[...] = content
    elif isinstance(container, collections.deque):
        container.clear()
        container.extend(content)
    elif isinstance(container, list):
        list.clear(container)
        list.extend(container, content)
    elif isinstance(container, dict):
        dict.clear(container)
        dict.update(container, content)
    else:
        set.clear(container)
        set.update(container, content)
