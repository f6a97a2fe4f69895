"""The parts of a model that hold state: layers, optimizers, losses, metrics, and untracked objects.

Keras tracks layers. TensorFlow tracks the objects in attributes. Neither tracks losses, or optimizers in a list or a
dict, so attributes are searched for them. The search also finds untracked variables, for a warning.
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

from keras_ckpt.model.backends import backend
from keras_ckpt.model.keras_internals import layers_of, metrics_given

_VARIABLES = keras.Variable | backend.Variable
_CONTAINERS = (list, tuple, dict, collections.deque)
_SEARCH_LIMIT = 100_000
"""The most values that a search looks at."""
_FINGERPRINT_LIMIT = 1 << 26
"""The most bytes of an array that is fingerprinted."""
_LONG_CONTAINER = 1000
"""The most items of a list of numbers or strings that is searched."""
_FRAMEWORKS = {"builtins", "keras", "tensorflow", "numpy", "collections", "functools", "threading", "weakref"}


def is_built(model: keras.Model) -> bool:
    """Whether a model has all its weights.

    A GAN, whose networks are built and which is never called as a whole, has them too.
    """
    top, *layers = layers_of(model)
    calls_nothing = bool(layers) and type(model).build is keras.Model.build and all(layer.built for layer in layers)
    return bool(top.built) or calls_nothing


def states_of(layers: Iterable[Any]) -> list[Any]:
    """The states of stateful recurrent layers. Keras does not list them as variables."""
    stateful = [layer for layer in layers if getattr(layer, "stateful", False)]
    found = [each for layer in stateful for each in keras.tree.flatten(getattr(layer, "states", None) or ())]
    return list({id(each): each for each in found}.values())  # a wrapper and its layer have the same states


def lora_scales(model: keras.Model, names: Mapping[int, str]) -> dict[str, float]:
    """The scale of each low-rank update (LoRA) of a kernel, by the name of the update's first variable.

    Args:
        model: The model.
        names: The names of the model's variables by identity.
    """
    updated = _updated_by_lora(model, names)
    return {name: float(layer.lora_alpha / layer.lora_rank) for name, layer in updated.items()}


def set_lora_scales(model: keras.Model, names: Mapping[int, str], scales: Mapping[str, float]) -> None:
    """Sets the scales of low-rank updates (LoRA). A dense layer that Keras builds from its config loses its scale."""
    for name, layer in _updated_by_lora(model, names).items():
        if name in scales:
            layer.lora_alpha = round(scales[name] * layer.lora_rank, 9)


def _updated_by_lora(model: keras.Model, names: Mapping[int, str]) -> dict[str, Any]:
    """The layers with low-rank updates of their kernels, by the name of the update's first variable."""
    updated = [layer for layer in layers_of(model) if getattr(layer, "lora_enabled", False)]
    firsts = [layer.lora_kernel_a if hasattr(layer, "lora_kernel_a") else layer.lora_embeddings_a for layer in updated]
    return {names[id(first)]: layer for first, layer in zip(firsts, updated, strict=True)}


def tracked(root: Any) -> dict[str, Any]:
    """The objects that TensorFlow tracks below a root, by the shortest path of attributes.

    The search does not enter optimizers.
    """
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

    The prefix of the optimizer of `compile` is `optimizer`. The prefix of another one has the path of its
    attribute, and its place in a list or a dict. A GAN has `optimizer/d_optimizer`, or `optimizer/optimizers/d`.

    Args:
        model: The model.
        below: The result of `tracked(model)`, if the caller has it.
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
    """The optimizers inside an optimizer, whose variables it lists as its own, as a `LossScaleOptimizer` does."""
    inner = getattr(optimizer, "inner_optimizer", None)
    found = [*([] if inner is None else [inner]), *getattr(optimizer, "optimizers", ())]
    own = {id(each) for each in getattr(optimizer, "variables", ())}
    found += [each for _, each in _held_optimizers(optimizer) if own.issuperset(map(id, each.variables))]
    return list({id(each): each for each in found}.values())


def _held_optimizers(optimizer: Any) -> list[tuple[str, Any]]:
    """The optimizers in attributes of an optimizer of a user's class, with their paths."""
    if optimizer is None or type(optimizer).__module__.startswith("keras."):
        return []
    inside = _search(vars(optimizer).items(), lambda each: False)
    return [(path, each) for path, each in inside if isinstance(each, keras.optimizers.Optimizer)]


def losses_of(model: keras.Model, below: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The `Loss` objects of a model by path: first the losses of `compile`, then the losses in attributes.

    Args:
        model: The model.
        below: The result of `tracked(model)`, if the caller has it.
    """
    below = tracked(model) if below is None else below
    given = getattr(model, "loss", None)
    # Without a loss, `model.loss` is a deprecated method.
    places = [] if isinstance(given, types.MethodType) else [("", given)]
    found: dict[int, tuple[str, Any]] = {}
    for path, each in (*_search(places, lambda each: False), *_held(layers_of(model), below)):
        if isinstance(each, keras.losses.Loss):
            found.setdefault(id(each), (path.strip("/"), each))
    return dict(found.values())


def metrics_of(model: keras.Model) -> list[Any]:
    """The metrics of a model, the metrics inside them, and the metrics of `compile` that Keras has not built yet."""
    metrics = [each for metric in model.metrics for each in _with_inner(metric)]
    given = [each for metric in metrics for each in metrics_given(metric)]
    metrics += [each for each in given if isinstance(each, keras.metrics.Metric)]
    return list({id(each): each for each in metrics}.values())


def _with_inner(metric: Any) -> list[Any]:
    """A metric and the metrics inside it."""
    inside = _search(vars(metric).items(), lambda each: isinstance(each, keras.metrics.Metric))
    inner = [each for _, each in inside if isinstance(each, keras.metrics.Metric)]
    return list({id(each): each for each in (metric, *getattr(metric, "metrics", ()), *inner)}.values())


def variables_in(loss: Any) -> list[tuple[str, Any]]:
    """The variables in attributes of a loss, also in layers, lists and dicts, with their paths."""
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
    """The paths of untracked variables, seeds, tables, layers and optimizers.

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
        if isinstance(each, backend.Table) and _is_user_table(path, below, model)
    ]
    attributes = [*_attributes(layers, below), *_user_objects(layers, below)]
    held = [(f"{place}/{name}", each) for place, owner in owners.items() for name, each in vars(owner).items()]
    attributes += [
        (path, each) for path, each in held if "/_self_" not in path
    ]  # TensorFlow's lists of other attributes
    for path, each in (*tables, *_search(attributes, _is_user_object)):
        is_state = isinstance(each, _VARIABLES | keras.optimizers.Optimizer | backend.Table) or (
            isinstance(each, keras.Layer) and bool(each.variables)
        )
        state = each.state if isinstance(each, keras.random.SeedGenerator) else each
        if (is_state or state is not each) and id(state) not in seen:
            seen.add(id(state))
            found.append(path)
    return found


def plain_attributes(model: keras.Model, excluded: Container[int]) -> dict[str, Any]:
    """The plain values in a user's attributes of layers, optimizers, losses and metrics, by path.

    Plain values are numbers, strings, fingerprints of arrays and lengths of containers. Objects of a user's classes are
    searched too.

    Args:
        model: The model.
        excluded: The identities of objects to skip.
    """
    layers, below = layers_of(model), tracked(model)
    attributes = [*_attributes(layers, below, excluded), *_user_objects(layers, below, excluded)]
    for place, each in owners_of(model, below).items():
        if id(each) not in excluded:
            own = _own_attributes(each).items() if _is_open(each) else vars(each).items()
            named = ((name, value) for name, value in own if name not in _attributes_of_keras())
            attributes += [
                (f"{place}/{name}", value) for name, value in named if _is_open(each) or _is_user_value(value)
            ]
    found: dict[str, Any] = {}
    for path, value in attributes:
        if isinstance(value, (*_CONTAINERS, set)):
            found[f"{path}/"] = len(value)
    for path, value in _search(attributes, _is_user_object):
        if value is None or isinstance(value, str | int | float):
            found[path] = value
        elif isinstance(value, np.ndarray | np.generic) and value.nbytes <= _FINGERPRINT_LIMIT:
            found[path] = zlib.crc32(value.tobytes())
    return found


def owners_of(model: keras.Model, below: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizers, losses and metrics of a model by place.

    Args:
        model: The model.
        below: The result of `tracked(model)`.
    """
    losses = {f"losses/{path}".strip("/"): each for path, each in losses_of(model, below).items()}
    return {
        **optimizers_of(model, below),
        **losses,
        **{f"metrics/{metric.name}": metric for metric in metrics_of(model)},
    }


def contents_of(layers: Iterable[Any]) -> list[Any]:
    """The lists, tuples and dicts in a user's attributes of layers, and the items of short ones."""
    found = [
        value
        for layer in filter(_is_open, layers)
        for name, value in vars(layer).items()
        if isinstance(value, _CONTAINERS) and name not in _attributes_of_keras()
    ]
    for container in found:  # grows in the loop
        if isinstance(container, _CONTAINERS) and len(container) <= _LONG_CONTAINER and len(found) <= _SEARCH_LIMIT:
            found.extend(container.values() if isinstance(container, dict) else container)
    return found


def _held(layers: Sequence[Any], below: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The values in a user's attributes of layers, with their paths.

    Args:
        layers: The layers, the model first.
        below: The objects that TensorFlow tracks below the model, by path.
    """
    return _search(_attributes(layers, below), lambda each: False)


def _attributes(
    layers: Sequence[Any], below: Mapping[str, Any], excluded: Container[int] = ()
) -> Iterator[tuple[str, Any]]:
    """The attributes that a user gave to layers, except to the excluded layers."""
    for place, layer in _places(layers, below, excluded):
        if _is_open(layer):
            for name, value in _own_attributes(layer).items():
                if name not in _attributes_of_keras():
                    yield f"{place}{name}", value


def _user_objects(
    layers: Sequence[Any], below: Mapping[str, Any], excluded: Container[int] = ()
) -> Iterator[tuple[str, Any]]:
    """The user's objects and functions that layers of Keras hold, such as a regularizer."""
    for place, layer in _places(layers, below, excluded):
        if not _is_open(layer):
            yield from ((f"{place}{name}", value) for name, value in vars(layer).items() if _is_user_value(value))


def _places(layers: Sequence[Any], below: Mapping[str, Any], excluded: Container[int]) -> Iterator[tuple[str, Any]]:
    """The layers, each with the prefix of the paths of its attributes. The model comes first."""
    # A layer's name tells a reader more than a path through Keras's own attributes.
    places = {id(each): f"{path}/" for path, each in below.items() if not path.startswith("_")}
    for index, layer in enumerate(layers):
        if id(layer) not in excluded:
            yield places.get(id(layer), f"{layer.name}/" if index else ""), layer


def _own_attributes(each: Any) -> dict[str, Any]:
    """The attributes of an object, and the numbers and strings of its class that they may replace."""
    kinds = [kind for kind in type(each).__mro__ if kind.__module__.partition(".")[0] not in _FRAMEWORKS]
    given = ((name, value) for kind in reversed(kinds) for name, value in vars(kind).items())
    plain = {name: value for name, value in given if isinstance(value, int | float | str) and not name.startswith("__")}
    own: dict[str, Any] = vars(each)
    return plain | own


def _search(start: Iterable[tuple[str, Any]], enter: Callable[[Any], bool]) -> Iterator[tuple[str, Any]]:
    """The values below a start, with their paths: in containers, and in attributes of entered objects."""
    stack = [*reversed(list(start))]
    entered: set[int] = set()
    for _ in range(_SEARCH_LIMIT):
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
    """The items of a container or of a user's function, `None` for any other value."""
    if isinstance(value, dict | types.MappingProxyType):
        return value.items()
    if isinstance(value, list | tuple | set | frozenset | collections.deque):
        return enumerate(value)
    if isinstance(value, np.ndarray) and value.dtype == object:
        return enumerate(value.flat)
    if isinstance(value, functools.partial):
        return [("func", value.func), *enumerate(value.args), *value.keywords.items()]
    if _is_user_function(value):
        return [(name, each) for name, each in _variables_of(value) if each is not value]
    return None


def _is_user_function(value: Any) -> bool:
    """Whether a value is a user's function with a closure."""
    return isinstance(value, types.FunctionType) and bool(value.__closure__) and not _is_framework_code(value)


def _variables_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # the cell is empty yet
            yield name, cell.cell_contents


def _is_user_value(value: Any) -> bool:
    """Whether a value is a user's object or function."""
    return _is_user_function(value) or isinstance(value, functools.partial) or _is_user_object(value)


def _is_framework_code(value: Any) -> bool:
    return (value.__module__ or "").partition(".")[0] in _FRAMEWORKS


def _is_data(container: Any) -> bool:
    """Whether a container is long and begins with a number or a string: too slow to search."""
    if not isinstance(container, (*_CONTAINERS, set, frozenset)) or len(container) <= _LONG_CONTAINER:
        return False
    first = next(iter(container.values() if isinstance(container, dict) else container))
    return isinstance(first, str | bytes | int | float)


def _is_open(layer: Any) -> bool:
    """Whether a layer may have a user's attributes: a model, or a layer of a class that is not Keras's."""
    return isinstance(layer, keras.Model) or not type(layer).__module__.startswith("keras.")


@functools.cache
def _attributes_of_keras() -> frozenset[str]:
    """The attributes that Keras gives to models, layers, optimizers, losses and metrics."""
    # Explicit names keep the automatic numbers of the user's layers unchanged.
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
    return frozenset(names | {"history", "_eval_epoch_iterator", "_jax_state", "_jax_state_synced"})


def _is_user_table(path: str, below: Mapping[str, Any], model: keras.Model) -> bool:
    """Whether a table is a user's. A layer of Keras saves its own tables."""
    return not type(below.get(path.rpartition("/")[0], model)).__module__.startswith("keras.")


def _is_user_object(value: Any) -> bool:
    """Whether an object is a user's: its class is neither Python's nor a framework's."""
    if isinstance(value, backend.Module):
        return True  # TensorFlow tracks its attributes, but not from a list or a dict of Keras
    if _is_framework_code(type(value)) or not hasattr(value, "__dict__"):
        return False
    known = _VARIABLES | keras.Layer | keras.metrics.Metric | keras.optimizers.Optimizer | keras.losses.Loss
    return not isinstance(value, known | type | types.ModuleType | types.FunctionType | types.MethodType)
