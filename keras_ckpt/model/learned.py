"""Keras's saving protocol: the learned state of objects beyond variables, collected from a model and restored.

An object writes its state to a `.keras` file with `save_own_variables` and `save_assets`. It reads the state with
`load_own_variables`, `load_assets` and `finalize_state`. Variables are saved elsewhere. The rest is saved here as
arrays and files. Some layers of Keras learn into their config alone, so the config of an adaptable layer is saved too.
"""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import keras
import msgspec
import numpy as np
from blake3 import blake3

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats import description as descriptions
from keras_ckpt.formats.arrays import number_of
from keras_ckpt.formats.bundle_writer import Value, string_value
from keras_ckpt.formats.description import ASSET_LIMIT, Asset, Description, Learned
from keras_ckpt.model.backends import backend
from keras_ckpt.model.keras_internals import answers_of, get_config_of, serialized, unlock
from keras_ckpt.model.matching import ambiguous, same_end
from keras_ckpt.model.naming import named_objects
from keras_ckpt.store.files import files_below, temporary_directory, write_below

Result = TypeVar("Result")

_PROTOCOL = (
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
_STEADY_LAYERS = (
    keras.layers.Normalization,
    keras.layers.Discretization,
    keras.layers.StringLookup,
    keras.layers.IntegerLookup,
    keras.layers.TextVectorization,
)
"""Layers whose learned state changes only when an attribute becomes another object."""
_IGNORED_SETTINGS = {"name", "trainable", "dtype", "encoding", "epsilon", "vocabulary_size"}
"""Settings in the config of a layer of Keras that decide nothing, or follow from other settings."""
_LONG_CONTAINER, _SEARCH_LIMIT = 1000, 100_000
"""The most items of a container that is searched for containers, and the most containers found."""
_VOCABULARY, _UTF_8 = "vocabulary.json", "utf-8"
_OLD_VOCABULARY = "vocabulary.txt"
"""The file in older checkpoints: the vocabulary as Keras writes it."""
_ADAPTED_SETTINGS = {"bin_boundaries", "vocabulary", "idf_weights", "mean", "variance"}
"""Settings that such a layer learned, or was given instead."""


class LearnedState(NamedTuple):
    """The learned state of the objects of a model, at one moment.

    Attributes:
        constants: The encoded description of the model with its objects, and the bytes of files, by key.
        arrays: The arrays, by their indexes in the descriptions.
        failed: The calls that failed, each with the reason.
    """

    constants: Mapping[bytes, Value]
    arrays: Sequence[np.ndarray]
    failed: Sequence[str]


class Learners:
    """The objects of a model that take part in Keras's saving protocol.

    Args:
        model: A built model.
        names: The names of the model's variables by identity.
        described: The description of the model, without the learned state of its objects.
        weights_only: Whether to skip optimizers, losses and metrics.
    """

    def __init__(
        self, model: keras.Model, names: Mapping[int, str], described: Description, weights_only: bool = False
    ) -> None:
        self._model = model
        self._objects = learners(named_objects(model), weights_only)
        self._names = names
        self._described = described
        self._states = Steady()
        self._latest: tuple[list[_ObjectState], LearnedState] | None = None

    def names(self) -> dict[int, str]:
        """The names of the objects by identity."""
        return {id(each): name for name, each in self._objects.items()}

    def collect(self) -> LearnedState:
        """The learned state now. Returns the same `LearnedState` until an object changes."""
        if self._objects:
            backend.synchronize(self._model)
        states = [
            self._states.get(each, functools.partial(_collect, name, each, self._names))
            for name, each in self._objects.items()
        ]
        if self._latest is None or list(map(id, states)) != list(map(id, self._latest[0])):
            self._latest = states, self._combine(states)
        return self._latest[1]

    def _combine(self, states: Sequence[_ObjectState]) -> LearnedState:
        objects: dict[str, Learned] = {}
        arrays: list[np.ndarray] = []
        assets: dict[str, tuple[int, bytes]] = {}
        failed: list[str] = []
        for name, state in zip(self._objects, states, strict=True):
            failed += state.failed
            files = {}
            for path, data in state.files.items():
                digest = f"blake3:{blake3(data).hexdigest()}"
                index, _ = assets.setdefault(digest, (len(assets), data))
                files[path] = Asset(index, len(data), digest)
            values = {key: len(arrays) + place for place, key in enumerate(state.arrays)}
            arrays += state.arrays.values()
            objects[name] = msgspec.structs.replace(state.learned, values=values, assets=files)
        whole = msgspec.structs.replace(self._described, objects=objects)
        texts = {descriptions.KEY: descriptions.encode(whole)}
        texts |= {descriptions.asset_key(index): data for index, data in assets.values()}
        constants = {key.encode(): string_value([text], ()) for key, text in texts.items()}
        return LearnedState(constants, arrays, failed)


class Steady:
    """Results about objects. For some layers of Keras a result is computed again only after the layer has changed.

    Example:

    ```python
    results = Steady()
    files = results.get(lookup, lambda: files_of(lookup))
    ```
    """

    def __init__(self) -> None:
        self._latest: dict[int, tuple[Sequence[Any], Any]] = {}

    def get(self, each: Any, compute: Callable[[], Result]) -> Result:
        """The result about an object. Always computes the result of the same function."""
        if type(each) not in _STEADY_LAYERS:
            return compute()
        # The old attributes are held, so that no new object gets the identity of an old one.
        attributes = [each, *vars(each).values(), *vars(getattr(each, "_lookup_layer", None) or object).values()]
        before, result = self._latest.get(id(each), ((), None))
        if list(map(id, before)) != list(map(id, attributes)):
            result = compute()
            self._latest[id(each)] = attributes, result
        return result  # type: ignore[no-any-return]


class _ObjectState(NamedTuple):
    """The learned state of one object; the description lacks the arrays and the files."""

    learned: Learned
    arrays: dict[str, np.ndarray]
    files: dict[str, bytes]
    failed: list[str]


def learners(objects: Mapping[str, Any], weights_only: bool = False) -> dict[str, Any]:
    """The objects whose class overrides methods of Keras's saving protocol, and modules with extra state, by name.

    Args:
        objects: The objects of a model by name.
        weights_only: Whether to skip objects other than the model's layers.
    """
    return {
        name: each
        for name, each in objects.items()
        if (any(_has_own(each, method) for method in _PROTOCOL) or backend.has_extra_state(each))
        and not (weights_only and name.partition("/")[0] != "model")
    }


def _has_own(each: Any, method: str) -> bool:
    """Whether the class of an object overrides a method, other than the methods that save variables alone."""
    function = getattr(type(each), method, None)
    return callable(function) and function not in _plain_methods()


def saves_variables(each: Any) -> bool:
    """Whether the class of an object decides which values of it are saved."""
    own = _has_own(each, "save_own_variables") or _has_own(each, "load_own_variables")
    return own or backend.has_extra_state(each)


def saved_by(each: Any) -> dict[str, Any]:
    """The values that an object saves into a file of Keras, by key. Most are variables, or buffers of a module."""
    answers = answers_of(each)
    known = backend.module_state(each) if isinstance(each, keras.layers.TorchModuleWrapper) else {}
    return {key: known.get(key, value) for key, value in answers.items()}


@functools.cache
def _plain_methods() -> frozenset[Any]:
    layers = keras.layers
    plain = (
        keras.Layer, keras.Model, keras.Sequential, keras.optimizers.Optimizer, keras.utils.FeatureSpace,
        layers.Dense, layers.EinsumDense, layers.Embedding, layers.ReversibleEmbedding, layers.Conv1D,
        layers.TorchModuleWrapper,
    )  # fmt: skip
    return frozenset(getattr(kind, method) for kind in plain for method in _PROTOCOL if hasattr(kind, method))


def _collect(name: str, each: Any, names: Mapping[int, str]) -> _ObjectState:
    failed: list[str] = []

    def call(method: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # noqa: BLE001 - an error in a user's method must not end training
            failed.append(f"{name}.{method}(), which raised {error!r:.200}")
            return None

    store: dict[str, Any] = {}
    if saves_variables(each):
        call("save_own_variables", each.save_own_variables, store)
    variables = {str(key): names[id(value)] for key, value in store.items() if id(value) in names}
    arrays = {}
    for key, value in store.items():
        array = None if id(value) in names else call("save_own_variables", _as_array, value)
        if array is not None:
            arrays[str(key)] = array
    write = _vocabulary_of if isinstance(each, _LOOKUPS) else files_of
    files = call("save_assets", write, each) if _has_own(each, "save_assets") else None
    config = call("get_config", lambda: _as_json(get_config_of(each))) if hasattr(each, "adapt") else None
    own_build = _has_own(each, "build_from_config") or _has_own(each, "get_build_config")
    build = call("get_build_config", lambda: _as_json(each.get_build_config())) if own_build else None
    own = [names[id(value)] for value in vars(each).values() if isinstance(value, _VARIABLES) and id(value) in names]
    learned = Learned(type(each).__name__, variables, own, config=config, build=build)
    return _ObjectState(learned, arrays, files or {}, failed)


def _as_array(value: Any) -> np.ndarray:
    array = np.asarray(keras.ops.convert_to_numpy(value) if not isinstance(value, np.ndarray) else value)
    if array.dtype.kind in "OU":
        raise TypeError(f"a value of type {type(value).__name__} is not an array of numbers")
    number_of(array.dtype)
    return array


def _as_json(config: Any) -> str:
    return json.dumps(serialized(config), sort_keys=True)


def files_of(each: Any) -> dict[str, bytes]:
    """The files that an object saves, by relative path."""
    with temporary_directory() as path:
        each.save_assets(path)
        return files_below(path, ASSET_LIMIT)


def _vocabulary_of(each: Any) -> dict[str, bytes]:
    """The vocabulary of a lookup as JSON. Keras's own text file cannot hold words with line breaks."""
    if each.get_config()["vocabulary"] is not None:
        return {}  # the config has it
    # In another encoding Keras returns words as bytes, and then does not recognize its special tokens.
    words = each.get_vocabulary(include_special_tokens=_encoding_of(each) == _UTF_8)
    words = [str(word) if isinstance(word, str) else int(word) for word in words]
    return {_VOCABULARY: json.dumps(words).encode()}


class Pairing(NamedTuple):
    """The objects of a model, paired with the learned state in a checkpoint.

    Attributes:
        paired: The objects to restore by name, each with its description in the checkpoint.
        variables_only: By name, the objects of a checkpoint that describes no objects: it has variables alone.
        unknown: The names of objects whose learned state beyond variables the checkpoint does not have.
        matched: Report names of the state beyond variables that is restored.
        missing: Report names of the objects that the checkpoint does not have.
        unexpected: Report names of state in the checkpoint whose objects the model does not have.
        mismatched: The reasons why objects in both differ, by report name.
    """

    paired: Mapping[str, tuple[Any, Learned]]
    variables_only: Mapping[str, Any]
    unknown: Sequence[str]
    matched: Sequence[str]
    missing: Sequence[str]
    unexpected: Sequence[str]
    mismatched: Mapping[str, str]

    def self_read_variables(self, names: Mapping[int, str]) -> set[str]:
        """The names, on disk and in the model, of the variables that paired objects read themselves."""
        given = [(each, learned) for each, learned in self.paired.values() if _has_own(each, "load_own_variables")]
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
    """Pairs the objects of a model with the objects that a checkpoint describes.

    Args:
        objects: The objects by name.
        description: The checkpoint's description, `None` if an older version or another program wrote it.
        names: The names of the model's variables by identity.
        assets: The assets of the checkpoint.
        automatic: For a partial restore, the automatic names of layers, with `{}` for their numbers.
    """
    if description is None:
        unknown = [name for name, each in objects.items() if _learned_more(_collect(name, each, names))]
        return Pairing({}, objects, [name.removeprefix("model/") for name in unknown], (), (), (), {})
    there = _moved(description.objects, objects)
    mismatched = {name: difference(objects[name], there[name], assets) for name in objects if name in there}
    if automatic is not None:
        why = "an automatic name, and the checkpoint has another number of these layers: give them names"
        mismatched |= dict.fromkeys(ambiguous(mismatched, there, automatic), why)
    reasons = {name: reason for name, reason in mismatched.items() if reason is not None}
    given = {name: (objects[name], there[name]) for name in mismatched if name not in reasons}
    return Pairing(
        given,
        {},
        (),
        matched=[item for name, (each, learned) in given.items() for item in _report_items(name, learned, each)],
        missing=[_report_name(name) for name in objects if name not in there],
        unexpected=[item for name in there if name not in objects for item in _report_items(name, there[name])],
        mismatched={_report_name(name): reason for name, reason in reasons.items()},
    )


def _moved(there: Mapping[str, Learned], here: Mapping[str, Any]) -> dict[str, Learned]:
    """The objects of a checkpoint by their names in the model.

    An object that was built before the model held it has a shorter path.
    """
    found = dict(there)
    waiting = [name for name in here if name not in there]
    for name in [name for name in there if name not in here]:
        ends = [other for other in waiting if same_end(name, other, least=1)]
        if len(ends) == 1 and type(here[ends[0]]).__name__ == there[name].kind:
            found[ends[0]] = found.pop(name)
    return found


def _report_name(name: str) -> str:
    return f"learned/{name.removeprefix('model/')}"


def _report_items(name: str, learned: Learned, each: Any = None) -> list[str]:
    """The report names of the learned state of an object beyond variables; `each` is the object in the model."""
    config = json.loads(learned.config) if learned.config else {}
    in_config = [*_learned_settings(each, config)] if each is not None else []
    if config.get("bin_boundaries") is not None and config.get("num_bins"):
        in_config = ["bin_boundaries"]
    return [f"{_report_name(name)}/{item}" for item in (*learned.assets, *learned.values, *in_config)]


def _learned_settings(each: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a user's layer learned into its config, by the attribute to set.

    A setting that differs counts as learned if the layer lacks it, or for a float, list or dict. Any other
    setting is the program's choice.
    """
    if type(each) in _STEADY_LAYERS or not hasattr(each, "adapt"):
        return {}
    here = json.loads(_as_json(get_config_of(each)))
    other = {name: value for name, value in config.items() if value is not None and here.get(name, value) != value}
    return {
        name: keras.saving.deserialize_keras_object(value)
        for name, value in other.items()
        if name in vars(each)
        and name not in _IGNORED_SETTINGS
        and (here[name] is None or isinstance(value, float | list | dict))
    }


def _learned_more(state: _ObjectState) -> bool:
    """Whether an object learned more than variables."""
    config = json.loads(state.learned.config) if state.learned.config else {}
    return bool(state.failed or state.arrays or state.files or config.get("bin_boundaries") is not None)


def learns_elsewhere(each: Any, with_assets: bool) -> bool:
    """Whether an object has learned state that no file of Keras gives back: in its config, or in its assets.

    Args:
        each: The object.
        with_assets: Whether the file has the assets of objects.
    """
    if isinstance(each, keras.layers.Discretization):
        return each.num_bins is not None and each.bin_boundaries is not None
    return not with_assets and _has_own(each, "save_assets") and bool(files_of(each))


def rebuild(each: Any, learned: Learned) -> None:
    """Builds a built object again as in the checkpoint, if its build config differs.

    An object that would make its variables again is left as it was.
    """
    if learned.build is None or _as_json(each.get_build_config()) == learned.build:
        return
    undo, before = Undo([each]), list(map(id, each.variables))
    build(each, learned)
    if list(map(id, each.variables)) != before:
        undo.undo()


def build(each: Any, learned: Learned) -> None:
    """Builds an object that lacks variables as in the checkpoint, if its class overrides `build_from_config`."""
    if learned.build is None or not _has_own(each, "build_from_config"):
        return
    # Keras locks a built layer. Here the layer gets variables that its first build did not make.
    unlock(each)
    each.build_from_config(keras.saving.deserialize_keras_object(json.loads(learned.build)))


def difference(each: Any, learned: Learned, assets: Sequence[bytes]) -> str | None:
    """Why an object cannot take the learned state of a described object, `None` if it can."""
    kind = type(each).__name__
    if kind != learned.kind:
        return f"of class {kind} in the model, {learned.kind} in the checkpoint"
    if type(each) not in _STEADY_LAYERS or learned.config is None:
        return None
    here, there = json.loads(_as_json(get_config_of(each))), json.loads(learned.config)
    for name in sorted(here.keys() & there.keys() - _IGNORED_SETTINGS - _ADAPTED_SETTINGS):
        if here[name] != there[name]:
            return f"{name}={here[name]!r:.100} in the model, {there[name]!r:.100} in the checkpoint"
    if isinstance(each, _LOOKUPS):
        given = here["vocabulary"]
        files = {path: assets[asset.index] for path, asset in learned.assets.items()}
        other = given is not None and given != there["vocabulary"]
        if other and _words(each) != [str(word) for word in _words_in(each, files)]:
            return "the model was given another vocabulary than the checkpoint has"
    elif any(here.get(name) is not None and here[name] != there.get(name) for name in ("mean", "variance")):
        return "the model was given another mean or variance than the checkpoint has"
    return None


def restore_state(each: Any, learned: Learned, store: Mapping[str, np.ndarray], files: Mapping[str, bytes]) -> None:
    """Restores the learned state of an object.

    Args:
        each: The object.
        learned: The object's description in the checkpoint.
        store: The values that `save_own_variables` stored.
        files: The files that `save_assets` wrote.

    Raises:
        DamagedCheckpointError: The path of a file leads out of its directory.
        Exception: Any error that the object raises.
    """
    config = json.loads(learned.config) if learned.config else {}
    if isinstance(each, _LOOKUPS):
        _restore_vocabulary(each, config, store, files)
        return
    if saves_variables(each):
        each.load_own_variables(dict(store))
    if files and _has_own(each, "load_assets"):
        with temporary_directory() as path:
            try:
                write_below(path, files)
            except ValueError as error:
                raise DamagedCheckpointError(f"an asset of {learned.kind} leads elsewhere: {error}") from error
            each.load_assets(path)
    _restore_config(each, config)
    finalize(each)


def _restore_vocabulary(
    each: Any, config: Mapping[str, Any], store: Mapping[str, np.ndarray], files: Mapping[str, bytes]
) -> None:
    """Restores the vocabulary of a lookup. Keras's own `load_assets` fails with padded term weights."""
    weights = store.get("idf_weights")
    words: list[Any] | None = config.get("vocabulary")
    if words is not None and each.get_config()["vocabulary"] is not None:
        return  # the program gave both the same vocabulary
    if words is None:
        words = _words_in(each, files)
    if words:
        lookup = getattr(each, "_lookup_layer", each)
        if (encoding := _encoding_of(each)) != _UTF_8:
            # TensorFlow would encode strings as UTF-8.
            words = [word.encode(encoding) if isinstance(word, str) else word for word in words]
        if weights is not None:
            vars(lookup).pop("idf_weights", None)  # its length may differ
            weights = weights[: len(words)]
        each.set_vocabulary(words, weights)


def _encoding_of(lookup: Any) -> str:
    return getattr(getattr(lookup, "_lookup_layer", lookup), "encoding", None) or _UTF_8


def has_state(each: Any, learned: Learned, store: Mapping[str, np.ndarray], files: Mapping[str, bytes]) -> bool:
    """Whether an object has the learned state of a described object, beyond variables."""
    state = _collect("", each, {})
    mine = {key: state.arrays.get(key) for key in learned.values}
    same = all(each is not None and np.array_equal(each, store[key]) for key, each in mine.items())
    return same and state.files == files and state.learned.config == learned.config


def finalize(each: Any) -> None:
    """Calls an object's `finalize_state`, unless its own `load_own_variables` does."""
    if _has_own(each, "finalize_state") and not _has_own(each, "load_own_variables"):
        each.finalize_state()


def restore_variables(each: Any, names: Mapping[int, str], values: Mapping[str, Any]) -> None:
    """Calls an object's own load methods with its variables alone, for a checkpoint that describes no objects.

    Args:
        each: The object.
        names: The names of the model's variables by identity.
        values: The restored values by name.
    """
    state = _collect("", each, names)
    variables = state.learned.variables
    if not state.failed and not state.arrays and set(variables.values()) <= values.keys():
        store = {key: values[name] for key, name in variables.items()}
        restore_state(each, Learned(type(each).__name__), store, {})


def _restore_config(each: Any, config: Mapping[str, Any]) -> None:
    """Restores the values that an object learned into its config alone."""
    if isinstance(each, keras.layers.Discretization):
        each.bin_boundaries = config.get("bin_boundaries", each.bin_boundaries)
    else:
        for name, value in _learned_settings(each, config).items():
            setattr(each, name, value)


def _words(each: Any) -> list[str]:
    return [str(word) for word in each.get_vocabulary()]


def _words_in(each: Any, files: Mapping[str, bytes]) -> list[Any]:
    """The vocabulary in the files of a lookup, empty if there are no files because saving failed.

    Raises:
        DamagedCheckpointError: The files have no readable vocabulary.
    """
    kind: Any = int if isinstance(each, keras.layers.IntegerLookup) else str
    try:
        if (text := files.get(_OLD_VOCABULARY)) is not None:
            return [kind(line) for line in text.decode().rstrip("\n").splitlines()]
        words: list[Any] = msgspec.json.decode(files[_VOCABULARY], type=list[kind]) if files else []
    except (KeyError, ValueError, msgspec.DecodeError) as error:  # it became a ValueError later
        raise DamagedCheckpointError(f"the vocabulary of {each.name} cannot be read: {error!r}") from error
    return words


class Undo:
    """Remembers the attributes of objects, to undo a restore that an object refuses.

    Args:
        objects: The objects.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._before = [(each, dict(vars(each)), _contents(vars(each))) for each in objects]

    def undo(self) -> None:
        """Resets the attributes of the objects, and the contents of containers and arrays in them."""
        for each, attributes, contents in self._before:
            vars(each).clear()
            vars(each).update(attributes)
            for container, content in contents:
                _fill(container, content)


_FILLS: dict[Any, Callable[[Any, Any], None]] = {
    list: list.extend,
    dict: dict.update,
    set: set.update,
    collections.deque: collections.deque.extend,
}
"""The containers whose contents are remembered, each with the method that adds items."""


def _contents(attributes: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    kinds = (*_FILLS, np.ndarray)
    found: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    waiting = [each for each in attributes.values() if isinstance(each, kinds)]
    while waiting and len(found) < _SEARCH_LIMIT:
        each = waiting.pop()
        if id(each) not in seen:
            seen.add(id(each))
            found.append((each, each.copy()))
            if not isinstance(each, np.ndarray) and len(each) <= _LONG_CONTAINER:
                inside = each.values() if isinstance(each, dict) else each
                waiting += [other for other in inside if isinstance(other, kinds)]
    return found


def _fill(container: Any, content: Any) -> None:
    """Replaces the contents of a container, without the tracking methods of Keras's containers."""
    if isinstance(container, np.ndarray):
        container[...] = content
        return
    kind = next(each for each in _FILLS if isinstance(container, each))
    kind.clear(container)
    _FILLS[kind](container, content)
