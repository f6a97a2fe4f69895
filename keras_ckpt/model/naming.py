"""The variables of a model's training state, under names that do not depend on the process.

A name is the variable's path: `model/conv/kernel`, `optimizer/conv/kernel/momentum`, `metrics/loss/total`.
Keras numbers its automatic names per process, so `dense_7`, in a notebook's third try, is counted anew among the
layers beside it, in the model's order; the top model's and the optimizer's own names are left out; a slot carries
its variable's name; a path that is there already gets `~2`.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from typing import Any

import keras

from keras_ckpt.model import tensorflow as backend
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

_OF_FEATURE_SPACE = re.compile(r"((?:float|integer|string)(?:_[a-z]+)?)(?:_\d+)?(_preprocessor)")
"""The names that `FeatureSpace` gives to the layers of its features."""


def named_variables(model: keras.Model, weights_only: bool = False) -> dict[str, Any]:
    """The variables of a model's training state by name, in the model's order.

    Args:
        model: A built model.
        weights_only: Whether to leave out the optimizers, the losses and the metrics.

    Returns:
        `keras.Variable`s, and `tf.Variable`s that a layer holds beside them.
    """
    weights, layers, below = model.variables, layers_of(model), tracked(model)
    own = _within(model, layers, map(_segments, weights))
    paths = _numbered(own, _automatic_names(layers))
    found = [(f"model/{path}", variable) for path, variable in zip(paths, weights, strict=True)]
    found += [(f"model/{path}", each) for path, each in below.items() if isinstance(each, backend.Variable)]
    if not weights_only:
        states = states_of(layers)
        paths_of_states = _numbered([_segments(variable)[-2:] for variable in states], _automatic_names(layers))
        found += [(f"states/{path}", variable) for path, variable in zip(paths_of_states, states, strict=True)]
        names = dict(zip(map(id, weights), paths, strict=True))
        for prefix, optimizer in optimizers_of(model, below).items():
            found += _optimizer_variables(prefix, optimizer, weights, names)
        found += _loss_variables(losses_of(model, below), {id(variable) for _, variable in found})
        found += _metric_variables(model)
    unique = _unique([name for name, _ in found])
    return dict(zip(unique, (variable for _, variable in found), strict=True))


def build_optimizers(
    model: keras.Model,
    wanted: Mapping[str, Any],
    names_on_disk: Collection[str],
    built: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Builds each optimizer that was built in a checkpoint, for the variables that it was built for there.

    Args:
        model: The model.
        wanted: Its variables by name.
        names_on_disk: The names of the variables in the checkpoint.
        built: For each optimizer that was built there, by prefix, the names of the variables that it trained, in its
            order. `None` if the checkpoint does not tell; then the slots on disk do.
    """
    waiting = {prefix: each for prefix, each in optimizers_of(model).items() if not each.built}
    weights = {name: variable for name, variable in wanted.items() if name.startswith("model/")}
    unknown = [name for name in names_on_disk if name not in wanted]
    for prefix, optimizer in waiting.items():
        if built is not None:
            variables = [weights.get(name) for name in built.get(prefix, ())]
            complete = variables and all(variable is not None for variable in variables)
            if complete and not optimizer.built:  # by one that runs it
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
    """The names that Keras gave to layers of the model by itself, with `{}` in the places of their numbers."""
    return frozenset(_automatic_names(layers_of(model)).values())


def named_objects(model: keras.Model) -> dict[str, Any]:
    """The objects of a model that may hold more than variables, by name: layers, losses, metrics and optimizers."""
    (top, *layers), below = layers_of(model), tracked(model)
    own = _within(model, [top, *layers], (tuple((layer.path or layer.name).split("/")) for layer in layers))
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


def _within(model: keras.Model, layers: Sequence[Any], paths: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Paths of what a model holds, from the outermost layer that belongs to it."""
    known = {layer.name for layer in layers}
    # The model's own name leads the paths of what is built in its scope; a layer of that name is another thing.
    own = model.name if all(layer.name != model.name for layer in layers[1:]) else None
    found = []
    for path in paths:
        # An error while a layer is built leaves its scope open, and Keras puts it before everything that comes later.
        start = 0
        while start < len(path) - 1 and path[start] not in known and not _anonymous(path[start]):
            start += 1
        found.append(path[start + (path[start] == own and start < len(path) - 1) :])
    return found


def _by_reference(variables: Iterable[keras.Variable], names: Mapping[int, str]) -> dict[str, list[str]]:
    """The names of weights, which are given by identity, by what optimizers make of their paths."""
    found: dict[str, list[str]] = collections.defaultdict(list)
    for variable in variables:
        if id(variable) in names:
            found[variable.path.replace("/", "_")].append(names[id(variable)])
    return found


def _optimizer_variables(
    prefix: str, optimizer: Any, weights: Sequence[keras.Variable], names: Mapping[int, str]
) -> Iterable[tuple[str, keras.Variable]]:
    """The variables of an optimizer, a slot under the name of its weight."""
    owned = [("", *_owned(variable))[-2:] for variable in optimizer.variables]
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
        # Of weights that share a path, those that are trained have their slots in the order of the optimizer.
        sharing = trained.get(owner, {}).get(reference) or references[reference]
        which = min(used[owner, name], len(sharing) - 1)
        used[owner, name] += 1
        yield f"{place}/{sharing[which]}/{name[len(reference) + 1 :]}", variable


def _reference(slot: str, references: Container[str]) -> str | None:
    """The longest of the references that the name of a slot begins with."""
    reference = slot
    while "_" in reference:
        reference = reference.rpartition("_")[0]
        if reference in references:
            return reference
    return None


def _segments(variable: keras.Variable) -> tuple[str, ...]:
    return tuple(variable.path.split("/"))


def _owned(variable: keras.Variable) -> tuple[str, ...]:
    """The name of the optimizer or metric that a variable belongs to, if it has one, and its own."""
    # The path has all the scopes that its owner happened to be built in; the last is the owner's.
    return _segments(variable)[-2:]


def _loss_variables(losses: Mapping[str, Any], known: Container[int]) -> Iterable[tuple[str, Any]]:
    """The variables of losses that are not the model's too."""
    for path, loss in losses.items():
        place = f"losses/{path}" if path else "losses"
        yield from ((f"{place}/{name}", each) for name, each in variables_in(loss) if id(each) not in known)


def _metric_variables(model: keras.Model) -> Iterable[tuple[str, Any]]:
    """The variables of metrics; those of `compile` that Keras has not built yet come last."""
    metrics = metrics_of(model)
    found = [*model.metrics_variables, *(each for metric in metrics for each in metric.variables)]
    measured = list({id(each): each for each in found}.values())
    paths = _numbered([_owned(variable) for variable in measured], _automatic_names(metrics))
    return [(f"metrics/{path}", variable) for path, variable in zip(paths, measured, strict=True)]


def _automatic_names(named: Iterable[Any]) -> dict[str, str]:
    """The names that Keras made up, each with `{}` in the place of its number."""
    stems = {each.name: _stem(each.name, type(each).__name__) for each in named}
    return {name: stem for name, stem in stems.items() if stem is not None}


def _stem(name: str, kind: str) -> str | None:
    """The name with `{}` in the place of its number, if Keras gives such names to objects of that class."""
    if feature := _OF_FEATURE_SPACE.fullmatch(name):
        return f"{feature[1]}{{}}{feature[2]}"
    # Bidirectional puts a word before the automatic name of the layer that it runs.
    word = next((word for word in ("forward_", "backward_") if name.startswith(word)), "")
    rest = name.removeprefix(word)
    for stem in (re.sub(r"_\d+\Z", "", rest), rest):
        if stem.replace("_", "") == re.sub(r"\W|_", "", kind).lower():
            return f"{word}{stem}{{}}"
    return None


def _numbered(paths: Sequence[tuple[str, ...]], automatic: dict[str, str]) -> list[str]:
    """Joins paths to names, with automatic numbers counted among siblings in the order of the paths."""
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
    """The names, those that were there already with `~2`, `~3` and so on."""
    counts: collections.Counter[str] = collections.Counter()
    unique: dict[str, None] = {}
    for name in names:
        counts[name] += 1
        new = name if counts[name] == 1 else f"{name}~{counts[name]}"
        while new in unique:  # somebody has called another so
            counts[name] += 1
            new = f"{name}~{counts[name]}"
        unique[new] = None
    return list(unique)


def _anonymous(segment: str) -> str | None:
    """The stem of a variable or a seed generator that was given no name."""
    match = re.fullmatch(r"(variable|seed_generator)(_\d+)?", segment)
    return f"{match[1]}{{}}" if match else None
