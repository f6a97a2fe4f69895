"""The config of a model: made when a model is saved, and built into a model without its code.

Keras builds in safe mode. Before, every class and function in the config is looked up, so that the errors are plain. No
code on disk runs, and no module is imported but Keras's own. The variables may not exceed a limit of memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras

from keras_ckpt.errors import CannotBuildError
from keras_ckpt.formats.config import Config, portable, uncompiled
from keras_ckpt.model import keras_internals
from keras_ckpt.model.backends import backend
from keras_ckpt.model.keras_internals import layers_of
from keras_ckpt.model.naming import SEED
from keras_ckpt.model.parts import is_built

_LAMBDA = "__lambda__"
_FUNCTION = "function"
_OWN = "keras", "keras_hub", "keras_cv", "keras_nlp"
"""The packages whose classes Keras finds by itself."""
_FUNCTIONS = "activations", "constraints", "initializers", "losses", "metrics", "optimizers", "regularizers"
"""The modules in which Keras looks for a function by its name alone."""


def config_of(model: keras.Model) -> Config:
    """The config of a model, or the reason why it has none. Call it in any thread; it raises no error of a model."""
    if any(map(is_pickled, layers_of(model))):
        return Config(
            reason="it has a torch.nn.Module, which Keras pickles, and load_model() runs no code from a checkpoint"
        )
    try:
        text, _ = keras_internals.config_of(model, ())
        config = json.loads(text)
        paths = [each.path or "" for each in _parts(model)]
    except Exception as error:  # noqa: BLE001 - an error in a user's method must not end training
        return Config(reason=_reason(model, error))
    if any(each["class_name"] == _LAMBDA for each in _objects(config)):
        return Config(reason="it contains a lambda, and load_model() runs no code from a checkpoint")
    return Config(config, paths, keras=keras.__version__)


def is_pickled(layer: Any) -> bool:
    """Whether the config of a layer has a pickled module of PyTorch, with all its values."""
    kind = keras.layers.TorchModuleWrapper
    return isinstance(layer, kind) and type(layer).get_config is kind.get_config


def obstacle(model: keras.Model) -> str:
    """The reason why Keras cannot save a model as a whole, `""` if it can."""
    backend.synchronize(model)
    try:
        keras_internals.config_of(model, ())
    except Exception as error:  # noqa: BLE001 - any error of a user's method is a reason
        return _reason(model, error)
    return ""


def build(
    config: Config, custom_objects: Mapping[str, Any] | None, compiles: bool, limit: int, is_of_other_backend: bool
) -> keras.Model:
    """Builds a model from its config.

    Args:
        config: The config.
        custom_objects: The classes and functions by the names in the config, besides the registered ones.
        compiles: Whether to compile the model as it was.
        limit: The most bytes of all variables that are made.
        is_of_other_backend: Whether another backend made the config. Its choice of `jit_compile` does not count here.

    Raises:
        CannotBuildError: The model cannot be built.
    """
    if config.config is None:
        raise CannotBuildError(f"has a model that cannot be built without its code, because {config.reason}.")
    saved = portable(config.config)
    known = _known(saved, custom_objects or {})
    memory = backend.VariableLimit(limit)
    try:
        with memory.scope():
            plain = {**saved, "compile_config": None} if compiles else uncompiled(saved)
            model = keras_internals.built_from(plain, known)
            # The optimizer names its slots by the paths.
            if _set_paths(model, config.paths):
                _compile_inner_again(model, known)
            if compiles and (settings := saved.get("compile_config")):
                own = {"jit_compile": "auto"} if is_of_other_backend else {}
                keras_internals.compile_from(model, settings | own, known)
    except Exception as error:
        raise _refusal(memory, config, error) from error
    if memory.is_exceeded:
        raise _refusal(memory, config, None)
    if not isinstance(model, keras.Model):
        raise CannotBuildError(f"has a {type(model).__name__} instead of a model in its config.")
    if not is_built(model):
        raise CannotBuildError(
            f"has a model whose class {type(model).__name__} does not build itself from its config. Define "
            "build(input_shape) in it."
        )
    return model


def _reason(model: keras.Model, error: Exception) -> str:
    """The reason why a model has no config: the innermost layer that has none, and its error."""
    for layer in reversed(layers_of(model)):
        try:
            json.dumps(keras_internals.serialized(layer))
        except NotImplementedError:
            return f"{type(layer).__name__} has no get_config()"
        except Exception as inner:  # noqa: BLE001 - as above
            return f"the config of {type(layer).__name__} cannot be saved: {_line(inner)}"
    return f"its config cannot be saved: {_line(error)}"


def _parts(model: Any) -> list[Any]:
    return [*layers_of(model), *model.variables] if isinstance(model, keras.Model) else []


def _set_paths(model: Any, paths: Sequence[str]) -> bool:
    """Gives the layers and variables of a model the paths that they had when it was saved, for their names on disk.

    Keras builds the layers of a config one by one, not in the scope of the layers around them.

    Returns:
        Whether the paths fit the model. The layers of another model keep their own paths.
    """
    parts = _parts(model)
    if len(parts) != len(paths):
        return False
    pairs = [*zip(parts, paths, strict=True)]
    # A subclassed model names its layers itself, and builds them in its own scope, as when it was saved.
    fits = all(_end(each, each.path or "") == _end(each, path) for each, path in pairs)
    for each, path in pairs if fits else ():
        keras_internals.set_path(each, path)
    return fits


def _compile_inner_again(model: keras.Model, known: Mapping[str, Any]) -> None:
    """Compiles the compiled models in a model again: their optimizers named the slots by the paths of before."""
    for each in layers_of(model)[1:]:
        if isinstance(each, keras.Model) and each.compiled and (settings := each.get_compile_config()):
            keras_internals.compile_from(each, settings, known)


def _end(each: Any, path: str) -> str:
    """The end of a path: the name of a layer, or of a variable and its layer."""
    if path.endswith(SEED):
        return SEED  # Keras numbers seed generators per process
    return "/".join(path.split("/")[-2 if isinstance(each, keras.Variable) else -1 :])


def _known(config: Any, custom_objects: Mapping[str, Any]) -> dict[str, Any]:
    """The custom objects under all names that the config has for them.

    Raises:
        CannotBuildError: The config has code, or names a class or a function that this program does not have.
    """
    known = dict(custom_objects)
    unknown: dict[str, None] = {}
    for each in _objects(config):
        kind, name, module = each["class_name"], each["class_name"], each.get("module")
        if kind == _LAMBDA:
            raise CannotBuildError("has a model that contains a lambda. load_model() runs no code from a checkpoint.")
        registered = each.get("registered_name")
        if kind == _FUNCTION:
            name = registered = each["config"]
        elif str(kind).startswith("__") or "module" not in each:
            continue  # a value such as an array, or an object that a layer of Keras reads itself
        if not isinstance(name, str) or not isinstance(registered or "", str):
            raise CannotBuildError("has a config of its model that is malformed.")
        # A class that was registered when it was saved may be given under its own name.
        if registered not in known and name.rpartition(">")[2] in known:
            known[registered or name] = known[name.rpartition(">")[2]]
        if keras.saving.get_registered_object(registered or name, known) is None and not _is_own(kind, name, module):
            unknown[name.rpartition(">")[2]] = None
    if unknown:
        first = next(iter(unknown))
        raise CannotBuildError(
            f"has a model that needs {', '.join(unknown):.300}, which this program does not have. In Python, import "
            f"the module that registers it, or pass custom_objects={{{first!r:.100}: {first:.100}}} to "
            "keras_ckpt.load_model or keras_ckpt.export."
        )
    return known


def _is_own(kind: Any, name: str, module: Any) -> bool:
    """Whether Keras itself has a class or a function, or will refuse it."""
    if str(module or "").partition(".")[0] in _OWN:
        return True
    return kind == _FUNCTION and any(hasattr(getattr(keras, place), name) for place in _FUNCTIONS)


def _objects(config: Any) -> Iterator[dict[str, Any]]:
    """The objects in a config, from the outside inwards."""
    waiting = [config]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            if "class_name" in each and "config" in each:
                yield each
            waiting += reversed([*each.values()])
        elif isinstance(each, list):
            waiting += reversed(each)


def _refusal(memory: backend.VariableLimit, config: Config, error: Exception | None) -> CannotBuildError:
    if memory.is_exceeded:
        return CannotBuildError(
            f"has a config whose model needs more than {memory.limit:,} bytes, far more than the checkpoint has. "
            "Nothing was built."
        )
    newer = f" Keras {config.keras} saved it, this is Keras {keras.__version__}." * (config.keras != keras.__version__)
    return CannotBuildError(f"has a model that Keras cannot build from its config: {_line(error)}{newer}")


def _line(error: object) -> str:
    """An error in one line: Keras's errors may have pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' * (len(text) > 200)}"
