"""Names of the variables of a model's training state that do not depend on the process.

A name is the variable's path: `model/conv/kernel`, `optimizer/conv/kernel/momentum`, `metrics/loss/total`.
Keras numbers its automatic names per process: a notebook's third try makes `dense_7`. So automatic names are
renumbered among siblings, in the model's order. The names of the top model and of the optimizer are dropped.
A slot has its variable's name. A duplicate path gets `~2`.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Any

import keras

from keras_ckpt.model.backends import backend
from keras_ckpt.model.keras_internals import layers_of, trained_by
from keras_ckpt.model.parts import (
    inner_optimizers,
    losses_of,
    metrics_of,
    optimizers_of,
    states_of,
    tracked,
    variables_in,
)

SEED = "/seed_generator_state"
"""The end of the name of the state of a seed generator."""
_FEATURE_SPACE_NAME = re.compile(r"((?:float|integer|string)(?:_[a-z]+)?)(?:_\d+)?(_preprocessor)")
"""The automatic names of the layers in a `FeatureSpace`."""


def named_variables(model: keras.Model, weights_only: bool = False) -> dict[str, Any]:
    """The variables of a model's training state by name, in the model's order.

    Args:
        model: A built model.
        weights_only: Whether to skip the optimizers, the losses and the metrics.

    Returns:
        The `keras.Variable`s, the `tf.Variable`s that layers hold, and the buffers of modules of PyTorch.
    """
    variables, layers, below = model.variables, layers_of(model), tracked(model)
    in_modules = _segments_in_modules(layers)
    buffers = [each for each, _ in in_modules.values() if not isinstance(each, keras.Variable)]
    weights = [*variables, *buffers]
    segments = [in_modules[id(each)][1] if id(each) in in_modules else _segments(each) for each in weights]
    own = _relative_paths(model, layers, segments)
    paths = _numbered(own, _automatic_names(layers))
    found = [(f"model/{path}", variable) for path, variable in zip(paths, weights, strict=True)]
    found += [(f"model/{path}", each) for path, each in below.items() if isinstance(each, backend.Variable)]
    if not weights_only:
        states = states_of(layers)
        paths_of_states = _numbered([_segments(variable)[-2:] for variable in states], _automatic_names(layers))
        found += [(f"states/{path}", variable) for path, variable in zip(paths_of_states, states, strict=True)]
        names = dict(zip(map(id, weights), paths, strict=True))
        for prefix, optimizer in optimizers_of(model, below).items():
            found += _optimizer_variables(prefix, optimizer, variables, names)
        found += _loss_variables(losses_of(model, below), {id(variable) for _, variable in found})
        found += _metric_variables(model)
    unique = _unique([name for name, _ in found])
    return dict(zip(unique, (variable for _, variable in found), strict=True))


def seeds_in(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The states of seed generators among named variables."""
    return {name: variable for name, variable in variables.items() if name.endswith(SEED)}


def build_optimizers(
    model: keras.Model,
    wanted: Mapping[str, Any],
    names_on_disk: Collection[str],
    built: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Builds the optimizers that were built in a checkpoint, for the same variables.

    Args:
        model: The model.
        wanted: The model's variables by name.
        names_on_disk: The names of the variables in the checkpoint.
        built: The names of the variables that each optimizer trained, in its order, by the optimizer's prefix.
            `None` if the checkpoint does not record them; then the slots on disk decide.
    """
    waiting = {prefix: each for prefix, each in optimizers_of(model).items() if not each.built}
    weights = {name: variable for name, variable in wanted.items() if name.startswith("model/")}
    unknown = [name for name in names_on_disk if name not in wanted]
    for prefix, optimizer in waiting.items():
        if built is not None:
            variables = [weights.get(name) for name in built.get(prefix, ())]
            complete = variables and all(variable is not None for variable in variables)
            if complete and not optimizer.built:  # building an outer optimizer builds its inner one
                optimizer.build(variables)
            continue
        inner = tuple(f"{other}/" for other in waiting if other.startswith(f"{prefix}/"))
        own = [name for name in unknown if name.startswith(f"{prefix}/") and not name.startswith(inner)]
        if own:
            places = {name.removeprefix(f"{prefix}/").rpartition("/")[0] for name in own}
            if inner_optimizers(optimizer):
                places = {place.partition("/")[2] for place in places}
            trained = [variable for name, variable in weights.items() if name.removeprefix("model/") in places]
            optimizer.build(trained or model.trainable_variables)


def automatic_stems(model: keras.Model) -> frozenset[str]:
    """The automatic names of the model's layers, with `{}` for their numbers."""
    return frozenset(_automatic_names(layers_of(model)).values())


def named_objects(model: keras.Model) -> dict[str, Any]:
    """The layers, losses, metrics and optimizers of a model by name: objects that may hold more than variables."""
    (top, *layers), below = layers_of(model), tracked(model)
    own = _relative_paths(model, [top, *layers], map(_segments_of_layer, layers))
    paths = _numbered(own, _automatic_names([top, *layers]))
    metrics = metrics_of(model)
    names = _numbered([(metric.name,) for metric in metrics], _automatic_names(metrics))
    return {
        "model": top,
        **{f"model/{path}": layer for path, layer in zip(paths, layers, strict=True)},
        **{f"losses/{path}" if path else "losses": loss for path, loss in losses_of(model, below).items()},
        **{f"metrics/{name}": metric for name, metric in zip(names, metrics, strict=True)},
        **optimizers_of(model, below),
    }


def _segments_in_modules(layers: Iterable[Any]) -> dict[int, tuple[Any, tuple[str, ...]]]:
    """The variables and buffers of modules of PyTorch, each with its path: of the layer, then of the `state_dict`."""
    found: dict[int, tuple[Any, tuple[str, ...]]] = {}
    for layer in layers:
        for name, each in backend.module_state(layer).items():
            found.setdefault(id(each), (each, (*_segments_of_layer(layer), name)))
    return found


def _segments_of_layer(layer: Any) -> tuple[str, ...]:
    return tuple((layer.path or layer.name).split("/"))


def _relative_paths(
    model: keras.Model, layers: Sequence[Any], paths: Iterable[tuple[str, ...]]
) -> list[tuple[str, ...]]:
    """The paths of variables or layers of a model, cut to begin at the outermost layer of the model."""
    known = {layer.name for layer in layers}
    # A path that was built in the model's scope begins with the model's name. A layer may have the same name.
    own = model.name if all(layer.name != model.name for layer in layers[1:]) else None
    found = []
    for path in paths:
        # An error in a layer's build leaves its scope open. Keras then prefixes all later paths with it.
        start = 0
        while start < len(path) - 1 and path[start] not in known and not _anonymous(path[start]):
            start += 1
        found.append(path[start + (path[start] == own and start < len(path) - 1) :])
    return found


def _by_reference(variables: Iterable[keras.Variable], names: Mapping[int, str]) -> dict[str, list[str]]:
    """The names of weights by the reference that an optimizer derives from a weight's path.

    Args:
        variables: The weights.
        names: The names of weights by identity.
    """
    found: dict[str, list[str]] = collections.defaultdict(list)
    for variable in variables:
        if id(variable) in names:
            found[variable.path.replace("/", "_")].append(names[id(variable)])
    return found


def _optimizer_variables(
    prefix: str, optimizer: Any, weights: Sequence[keras.Variable], names: Mapping[int, str]
) -> Iterable[tuple[str, keras.Variable]]:
    """The named variables of an optimizer. A slot's name contains the name of its weight."""
    owned = [("", *_owner_and_name(variable))[-2:] for variable in optimizer.variables]
    inner = list(dict.fromkeys(owner for owner, _ in owned if owner not in ("", optimizer.name)))
    automatic = _automatic_names(inner_optimizers(optimizer))
    owners = dict(zip(inner, _numbered([(each,) for each in inner], automatic), strict=True))
    references = _by_reference(weights, names)
    trained = {each.name: _by_reference(trained_by(each), names) for each in (optimizer, *inner_optimizers(optimizer))}
    used: collections.Counter[tuple[str, str]] = collections.Counter()
    anonymous = list(dict.fromkeys(name for _, name in owned if _anonymous(name)))
    numbered = dict(zip(anonymous, _numbered([(each,) for each in anonymous], {}), strict=True))
    for (owner, name), variable in zip(owned, optimizer.variables, strict=True):
        place = f"{prefix}/{owners[owner]}" if owner in owners else prefix
        reference = _reference(name, references)
        if reference is None:
            yield f"{place}/{numbered.get(name, name)}", variable
            continue
        # Several weights may share a path. The slots of the trained ones are in the optimizer's order.
        sharing = trained.get(owner, {}).get(reference) or references[reference]
        which = min(used[owner, name], len(sharing) - 1)
        used[owner, name] += 1
        yield f"{place}/{sharing[which]}/{name[len(reference) + 1 :]}", variable


def _reference(slot: str, references: Container[str]) -> str | None:
    """The longest reference that is a prefix of a slot's name."""
    reference = slot
    while "_" in reference:
        reference = reference.rpartition("_")[0]
        if reference in references:
            return reference
    return None


def _segments(variable: keras.Variable) -> tuple[str, ...]:
    return tuple(variable.path.split("/"))


def _owner_and_name(variable: keras.Variable) -> tuple[str, ...]:
    """The name of the optimizer or metric that owns a variable, if any, and the variable's name."""
    # The path has all scopes that the owner was built in. The last scope is the owner's.
    return _segments(variable)[-2:]


def _loss_variables(losses: Mapping[str, Any], known: Container[int]) -> Iterable[tuple[str, Any]]:
    """The named variables of losses, without variables that the model has too."""
    for path, loss in losses.items():
        place = f"losses/{path}" if path else "losses"
        yield from ((f"{place}/{name}", each) for name, each in variables_in(loss) if id(each) not in known)


def _metric_variables(model: keras.Model) -> Iterable[tuple[str, Any]]:
    """The named variables of metrics. Metrics of `compile` that Keras has not built yet come last."""
    metrics = metrics_of(model)
    found = [*model.metrics_variables, *(each for metric in metrics for each in metric.variables)]
    measured = list({id(each): each for each in found}.values())
    paths = _numbered([_owner_and_name(variable) for variable in measured], _automatic_names(metrics))
    return [(f"metrics/{path}", variable) for path, variable in zip(paths, measured, strict=True)]


def _automatic_names(named: Iterable[Any]) -> dict[str, str]:
    """The automatic names among the names of objects, each with its stem: `{}` stands for the number."""
    stems = {each.name: _stem(each.name, type(each).__name__) for each in named}
    return {name: stem for name, stem in stems.items() if stem is not None}


def is_same_name(name: str, other: str, kind: str) -> bool:
    """Whether two names of objects of a class are equal, but for the number of an automatic name."""
    return (_stem(name, kind) or name) == (_stem(other, kind) or other)


def _stem(name: str, kind: str) -> str | None:
    """The stem of a name, with `{}` for the number, if the name is an automatic name of that class."""
    if feature := _FEATURE_SPACE_NAME.fullmatch(name):
        return f"{feature[1]}{{}}{feature[2]}"
    # Bidirectional prefixes the automatic name of its inner layer with a word.
    word = next((word for word in ("forward_", "backward_") if name.startswith(word)), "")
    rest = name.removeprefix(word)
    for stem in (re.sub(r"_\d+\Z", "", rest), rest):
        if stem.replace("_", "") == re.sub(r"\W|_", "", kind).lower():
            return f"{word}{stem}{{}}"
    return None


def _numbered(paths: Sequence[tuple[str, ...]], automatic: dict[str, str]) -> list[str]:
    """Joins paths to names, and renumbers automatic names among siblings in the order of the paths."""
    siblings: dict[tuple[tuple[str, ...], str], dict[str, str]] = collections.defaultdict(dict)
    names = []
    for path in paths:
        canonical: tuple[str, ...] = ()
        for segment in path:
            stem = automatic.get(segment) or _anonymous(segment)
            known = siblings[canonical, stem or segment]
            number = f"_{len(known)}" if known else ""
            canonical = (*canonical, known.setdefault(segment, stem.format(number)) if stem else segment)
        names.append("/".join(canonical))
    return _unique(names)


def _unique(names: Iterable[str]) -> list[str]:
    """The names, with `~2`, `~3` and so on appended to duplicates."""
    counts: collections.Counter[str] = collections.Counter()
    unique: dict[str, None] = {}
    for name in names:
        counts[name] += 1
        new = name if counts[name] == 1 else f"{name}~{counts[name]}"
        while new in unique:  # a user's name may end in ~2 too
            counts[name] += 1
            new = f"{name}~{counts[name]}"
        unique[new] = None
    return list(unique)


def _anonymous(segment: str) -> str | None:
    """The stem of the name of an unnamed variable or seed generator, `None` for another name."""
    match = re.fullmatch(r"(variable|seed_generator)(_\d+)?", segment)
    return f"{match[1]}{{}}" if match else None
