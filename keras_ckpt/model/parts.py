"""The parts of a model that hold state: layers, optimizers, losses, metrics, and what no part tracks.

Keras tracks layers, and TensorFlow what an attribute holds. Optimizers in a list or a dict, and losses, are tracked by
neither, so attributes are searched for them. The search also finds variables that neither tracks, for a warning.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import types
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_ckpt.model import tensorflow as backend
from keras_ckpt.model.keras_internals import layers_of, metrics_given

_VARIABLES = keras.Variable | backend.Variable
_CONTAINERS = (list, tuple, dict, collections.deque)
_MOST = 100_000
"""A search looks at so many values at most."""
_HASHED = 1 << 26
"""A larger array is not searched for changes."""
_LONG = 1000
"""A list of more numbers or strings than this is not searched."""
_FRAMEWORKS = {"builtins", "keras", "tensorflow", "numpy", "collections", "functools", "threading", "weakref"}


def is_built(model: keras.Model) -> bool:
    """Whether a model has all its weights.

    A model of built networks that is never called as a whole, such as a GAN, has them too.
    """
    top, *layers = layers_of(model)
    calls_nothing = bool(layers) and type(model).build is keras.Model.build and all(layer.built for layer in layers)
    return bool(top.built) or calls_nothing


def states_of(layers: Iterable[Any]) -> list[Any]:
    """The states of stateful recurrent layers, which Keras does not count among their variables."""
    stateful = [layer for layer in layers if getattr(layer, "stateful", False)]
    found = [each for layer in stateful for each in keras.tree.flatten(getattr(layer, "states", None) or ())]
    return list({id(each): each for each in found}.values())  # a layer and the one that runs it have the same


def lora_scales(model: keras.Model, names: Mapping[int, str]) -> dict[str, float]:
    """The factors of low-rank updates of kernels (LoRA), by the names of the first variables of these.

    Args:
        model: The model.
        names: The names of its variables, by their identities.
    """
    updated = [layer for layer in layers_of(model) if getattr(layer, "lora_enabled", False)]
    firsts = [layer.lora_kernel_a if hasattr(layer, "lora_kernel_a") else layer.lora_embeddings_a for layer in updated]
    pairs = zip(firsts, updated, strict=True)
    return {names[id(first)]: float(layer.lora_alpha / layer.lora_rank) for first, layer in pairs}


def tracked(root: Any) -> dict[str, Any]:
    """The objects that TensorFlow tracks below another, except below optimizers, by the shortest path of attributes."""
    found: dict[str, Any] = {}
    queue: collections.deque[tuple[str, Any]] = collections.deque([("", root)])
    seen = {id(root)}
    while queue:
        path, parent = queue.popleft()
        for name, child in backend.children(parent).items():
            if id(child) not in seen:
                seen.add(id(child))
                found[f"{path}{name}"] = child
                if not isinstance(child, keras.optimizers.Optimizer | backend.Variable):
                    queue.append((f"{path}{name}/", child))
    return found


def optimizers_of(model: keras.Model, below: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The optimizers of a model by the prefix of their variables' names.

    The prefix of the optimizer of `compile` is `optimizer`. The prefix of another, such as one of the two of a GAN, has
    the path of its attribute, and of its place in a list or a dict: `optimizer/d_optimizer`, `optimizer/optimizers/d`.

    Args:
        model: The model.
        below: What `tracked` gives for it, if the caller has it.
    """
    main = getattr(model, "optimizer", None)
    found = {} if main is None else {"optimizer": main}
    known = {id(each) for each in (main, *inner_optimizers(main))}
    below = tracked(model) if below is None else below
    for path, each in (*below.items(), *_held(layers_of(model), below)):
        if isinstance(each, keras.optimizers.Optimizer) and id(each) not in known:
            found[f"optimizer/{path}"] = each
            known |= {id(each) for each in (each, *inner_optimizers(each))}
    for prefix, optimizer in list(found.items()):
        for path, each in _held_optimizers(optimizer):
            if id(each) not in known:
                found[f"{prefix}/{path}"] = each
                known.add(id(each))
    return found


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The optimizers whose variables are among those of an optimizer, such as of one that scales the loss."""
    inner = getattr(optimizer, "inner_optimizer", None)
    found = [*([] if inner is None else [inner]), *getattr(optimizer, "optimizers", ())]
    own = {id(each) for each in getattr(optimizer, "variables", ())}
    found += [each for _, each in _held_optimizers(optimizer) if own.issuperset(map(id, each.variables))]
    return list({id(each): each for each in found}.values())


def _held_optimizers(optimizer: Any) -> list[tuple[str, Any]]:
    """The optimizers that attributes of an optimizer of a user's class hold, by path."""
    if optimizer is None or type(optimizer).__module__.startswith("keras."):
        return []
    inside = _search(vars(optimizer).items(), lambda each: False)
    return [(path, each) for path, each in inside if isinstance(each, keras.optimizers.Optimizer)]


def losses_of(model: keras.Model, below: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `Loss` objects of a model by path: those that `compile` was given, then those in attributes.

    Args:
        model: The model.
        below: What `tracked` gives for it, if the caller has it.
    """
    below = tracked(model) if below is None else below
    given = getattr(model, "loss", None)
    # A model that was given none has a deprecated method of this name.
    places = [] if isinstance(given, types.MethodType) else [("", given)]
    found: dict[int, tuple[str, Any]] = {}
    for path, each in (*_search(places, lambda each: False), *_held(layers_of(model), below)):
        if isinstance(each, keras.losses.Loss):
            found.setdefault(id(each), (path.strip("/"), each))
    return dict(found.values())


def metrics_of(model: keras.Model) -> list[Any]:
    """The metrics of a model and those inside them, with those of `compile` before Keras builds them."""
    metrics = [each for metric in model.metrics for each in _with_inner(metric)]
    given = [each for metric in metrics for each in metrics_given(metric)]
    metrics += [each for each in given if isinstance(each, keras.metrics.Metric)]
    return list({id(each): each for each in metrics}.values())


def _with_inner(metric: Any) -> list[Any]:
    """A metric and those that it holds."""
    inside = _search(vars(metric).items(), lambda each: isinstance(each, keras.metrics.Metric))
    inner = [each for _, each in inside if isinstance(each, keras.metrics.Metric)]
    return list({id(each): each for each in (metric, *getattr(metric, "metrics", ()), *inner)}.values())


def variables_in(loss: Any) -> list[tuple[str, Any]]:
    """The variables that the attributes of a loss hold, also in layers, lists and dicts, each with its path."""
    found: dict[int, tuple[str, Any]] = {}
    inside = _search(vars(loss).items(), lambda each: isinstance(each, keras.losses.Loss | keras.random.SeedGenerator))
    for path, each in inside:
        if isinstance(each, _VARIABLES):
            found.setdefault(id(each), (path, each))
        elif isinstance(each, keras.Layer):
            for variable in each.variables:
                found.setdefault(id(variable), (f"{path}/{variable.name}", variable))
    return list(found.values())


def untracked(model: keras.Model, known: Iterable[Any], owners: Mapping[str, Any]) -> list[str]:
    """The paths of variables, seeds, tables, layers and optimizers that are held where nothing tracks them.

    Args:
        model: The model.
        known: All variables and optimizers that a checkpoint of the model has.
        owners: The optimizers, losses and metrics whose attributes are searched, by place.
    """
    layers, below = layers_of(model), tracked(model)
    inner = (each for owner in owners.values() for each in inner_optimizers(owner))
    seen = {id(each) for each in (*known, *layers, *inner)}
    found = []
    tables = [
        (path, each)
        for path, each in below.items()
        if isinstance(each, backend.Table) and _is_users_table(path, below, model)
    ]
    attributes = [*_attributes(layers, below), *_users_objects(layers, below)]
    held = [(f"{place}/{name}", each) for place, owner in owners.items() for name, each in vars(owner).items()]
    attributes += [(path, each) for path, each in held if "/_self_" not in path]  # TensorFlow's own lists of the others
    for path, each in (*tables, *_search(attributes, _is_users_object)):
        is_state = isinstance(each, _VARIABLES | keras.optimizers.Optimizer | backend.Table) or (
            isinstance(each, keras.Layer) and bool(each.variables)
        )
        state = each.state if isinstance(each, keras.random.SeedGenerator) else each
        if (is_state or state is not each) and id(state) not in seen:
            seen.add(id(state))
            found.append(path)
    return found


def plain_attributes(model: keras.Model, but: Container[int]) -> dict[str, Any]:
    """The plain state in attributes that a user gave to layers, optimizers, losses and metrics, by path.

    That are numbers, strings, fingerprints of arrays and lengths of containers, in objects of a user's own too.

    Args:
        model: The model.
        but: The identities of objects that are left out.
    """
    layers, below = layers_of(model), tracked(model)
    attributes = [*_attributes(layers, below, but), *_users_objects(layers, below, but)]
    for place, each in owners_of(model, below).items():
        if id(each) not in but:
            own = _own_attributes(each).items() if _is_open(each) else vars(each).items()
            named = ((name, value) for name, value in own if name not in _attributes_of_keras())
            attributes += [(f"{place}/{name}", value) for name, value in named if _is_open(each) or _is_users(value)]
    found: dict[str, Any] = {}
    for path, value in attributes:
        if isinstance(value, (*_CONTAINERS, set)):
            found[f"{path}/"] = len(value)
    for path, value in _search(attributes, _is_users_object):
        if value is None or isinstance(value, str | int | float):
            found[path] = value
        elif isinstance(value, np.ndarray | np.generic) and value.nbytes <= _HASHED:
            found[path] = zlib.crc32(value.tobytes())
    return found


def owners_of(model: keras.Model, below: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizers, losses and metrics of a model by place.

    Args:
        model: The model.
        below: What `tracked` gives for it.
    """
    losses = {f"losses/{path}".strip("/"): each for path, each in losses_of(model, below).items()}
    return {
        **optimizers_of(model, below),
        **losses,
        **{f"metrics/{metric.name}": metric for metric in metrics_of(model)},
    }


def contents_of(layers: Iterable[Any]) -> list[Any]:
    """The lists, tuples and dicts in attributes that a user gave to layers, and what short ones hold."""
    found = [
        value
        for layer in filter(_is_open, layers)
        for name, value in vars(layer).items()
        if isinstance(value, _CONTAINERS) and name not in _attributes_of_keras()
    ]
    for container in found:  # which grows by those inside
        if isinstance(container, _CONTAINERS) and len(container) <= _LONG and len(found) <= _MOST:
            found.extend(container.values() if isinstance(container, dict) else container)
    return found


def _held(
    layers: Sequence[Any], below: Mapping[str, Any], enter: Callable[[Any], bool] = lambda each: False
) -> Iterator[tuple[str, Any]]:
    """What attributes hold that a user gave to layers, by path.

    Args:
        layers: The layers, the model first.
        below: What TensorFlow tracks below the model, by path.
        enter: Says of an object whether its attributes are searched too.
    """
    return _search(_attributes(layers, below), enter)


def _attributes(layers: Sequence[Any], below: Mapping[str, Any], but: Container[int] = ()) -> Iterator[tuple[str, Any]]:
    """The attributes that a user gave to layers, without those of some layers."""
    for place, layer in _places(layers, below, but):
        if _is_open(layer):
            for name, value in _own_attributes(layer).items():
                if name not in _attributes_of_keras():
                    yield f"{place}{name}", value


def _users_objects(
    layers: Sequence[Any], below: Mapping[str, Any], but: Container[int] = ()
) -> Iterator[tuple[str, Any]]:
    """The objects and functions of a user's own that layers of Keras were given, such as a regularizer."""
    for place, layer in _places(layers, below, but):
        if not _is_open(layer):
            yield from ((f"{place}{name}", value) for name, value in vars(layer).items() if _is_users(value))


def _places(layers: Sequence[Any], below: Mapping[str, Any], but: Container[int]) -> Iterator[tuple[str, Any]]:
    """Layers, each with the beginning of the paths of what it holds; the model comes first."""
    # A path through Keras's own attributes tells a reader less than the layer's name.
    places = {id(each): f"{path}/" for path, each in below.items() if not path.startswith("_")}
    for index, layer in enumerate(layers):
        if id(layer) not in but:
            yield places.get(id(layer), f"{layer.name}/" if index else ""), layer


def _own_attributes(each: Any) -> dict[str, Any]:
    """The attributes of an object, with the numbers and strings that its class has in their place before."""
    kinds = [kind for kind in type(each).__mro__ if kind.__module__.partition(".")[0] not in _FRAMEWORKS]
    given = ((name, value) for kind in reversed(kinds) for name, value in vars(kind).items())
    plain = {name: value for name, value in given if isinstance(value, int | float | str) and not name.startswith("__")}
    own: dict[str, Any] = vars(each)
    return plain | own


def _search(start: Iterable[tuple[str, Any]], enter: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """Values by path, those in containers too, and those in attributes of the objects that are entered."""
    stack = [*reversed(list(start))]
    entered: set[int] = set()
    for _ in range(_MOST):
        if not stack:
            return
        path, value = stack.pop()
        inside = _inside(value)
        if inside is None:
            yield path, value
            inside = vars(value).items() if enter(value) else ()
        if inside and id(value) not in entered:
            entered.add(id(value))
            if not _is_data(value):
                stack += reversed([(f"{path}/{_segment(key)}", each) for key, each in inside])


def _segment(key: Any) -> str:
    """A key as a segment of a path."""
    return str(key).replace("/", "|")


def _inside(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """What a container holds, or a function of a user's own; `None` of any other value."""
    if isinstance(value, dict | types.MappingProxyType):
        return value.items()
    if isinstance(value, list | tuple | set | frozenset | collections.deque):
        return enumerate(value)
    if isinstance(value, np.ndarray) and value.dtype == object:
        return enumerate(value.flat)
    if isinstance(value, functools.partial):
        return [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    if _is_users_function(value):
        return [(name, each) for name, each in _variables_of(value) if each is not value]
    return None


def _is_users_function(value: Any) -> bool:
    """Whether a value is a function of a user's own that remembers something."""
    return isinstance(value, types.FunctionType) and bool(value.__closure__) and not _is_of_framework(value)


def _variables_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # it has no value yet
            yield name, cell.cell_contents


def _is_users(value: Any) -> bool:
    """Whether a value is an object or a function of a user's own."""
    return _is_users_function(value) or isinstance(value, functools.partial) or _is_users_object(value)


def _is_of_framework(value: Any) -> bool:
    return (value.__module__ or "").partition(".")[0] in _FRAMEWORKS


def _is_data(container: Any) -> bool:
    """Whether a container is long and begins with a number or a string, so that a search is not worth its time."""
    if not isinstance(container, (*_CONTAINERS, set, frozenset)) or len(container) <= _LONG:
        return False
    first = next(iter(container.values() if isinstance(container, dict) else container))
    return isinstance(first, str | bytes | int | float)


def _is_open(layer: Any) -> bool:
    """Whether a user may have given attributes to a layer, since it is a model or of a class that is not Keras's."""
    return isinstance(layer, keras.Model) or not type(layer).__module__.startswith("keras.")


@functools.cache
def _attributes_of_keras() -> frozenset[str]:
    """The attributes that Keras gives to models, layers, optimizers, losses and metrics."""
    # Names of their own, so that the automatic names of the user's layers stay as they are.
    first = keras.Input((1,), name="keras_ckpt_input")
    examples = [
        keras.Model(name="keras_ckpt_model"),
        keras.Sequential(name="keras_ckpt_sequential"),
        keras.Model(first, first, name="keras_ckpt_functional"),
        keras.Layer(name="keras_ckpt_layer"),
    ]
    examples[0].compile(optimizer=None)
    others = [
        keras.optimizers.SGD(name="keras_ckpt_optimizer"),
        keras.losses.MeanSquaredError(name="keras_ckpt_loss"),
        keras.metrics.MeanSquaredError(name="keras_ckpt_metric"),
    ]
    others[0].build([])
    names = {name for each in (*examples, *others) for name in vars(each)}
    return frozenset(names | {"history", "_eval_epoch_iterator"})


def _is_users_table(path: str, below: Mapping[str, Any], model: keras.Model) -> bool:
    """Whether a table is not one of a layer of Keras, which knows how to save it."""
    return not type(below.get(path.rpartition("/")[0], model)).__module__.startswith("keras.")


def _is_users_object(value: Any) -> bool:
    """Whether the attributes of an object are a user's: its class is neither Python's nor a framework's."""
    if isinstance(value, backend.Module):
        return True  # TensorFlow tracks what it holds, but not in a list or a dict of Keras
    if _is_of_framework(type(value)) or not hasattr(value, "__dict__"):
        return False
    known = _VARIABLES | keras.Layer | keras.metrics.Metric | keras.optimizers.Optimizer | keras.losses.Loss
    return not isinstance(value, known | type | types.ModuleType | types.FunctionType | types.MethodType)
