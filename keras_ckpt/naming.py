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
import tensorflow as tf


def named_variables(model: keras.Model, weights_only: bool = False) -> dict[str, Any]:
    """The variables of a model's training state by name, in the model's order.

    Args:
        model: A built model.
        weights_only: Whether to leave out the optimizer and the metrics.

    Returns:
        `keras.Variable`s, and `tf.Variable`s that a layer holds beside them.
    """
    weights, layers = model.variables, layers_of(model)
    paths = _numbered(_paths_in(model, layers), _automatic_names(layers))
    found = [(f"model/{path}", variable) for path, variable in zip(paths, weights, strict=True)]
    below = tracked(model)
    found += [(f"model/{path}", each) for path, each in below.items() if isinstance(each, tf.Variable)]
    if not weights_only:
        states = states_of(layers)
        paths_of_states = _numbered([_segments(variable)[-2:] for variable in states], _automatic_names(layers))
        found += [(f"states/{path}", variable) for path, variable in zip(paths_of_states, states, strict=True)]
        names = dict(zip(map(id, weights), paths, strict=True))
        for prefix, optimizer in _optimizers(model, below).items():
            found += _optimizer_variables(prefix, optimizer, weights, names)
        measured = model.metrics_variables
        paths = _numbered([_owned(variable) for variable in measured], _automatic_names(_metrics(model)))
        found += [(f"metrics/{path}", variable) for path, variable in zip(paths, measured, strict=True)]
    unique = _unique([name for name, _ in found])
    return dict(zip(unique, (variable for _, variable in found), strict=True))


def optimizers(model: keras.Model) -> dict[str, Any]:
    """The optimizers of a model by the prefix of their variables' names.

    That of `compile` is `optimizer`. Others that a model holds, such as those of the two halves of a GAN, have the path
    of their attribute in it: `optimizer/d_optimizer`.
    """
    return _optimizers(model, tracked(model))


def _optimizers(model: keras.Model, below: Mapping[str, Any]) -> dict[str, Any]:
    main = getattr(model, "optimizer", None)
    found = {} if main is None else {"optimizer": main}
    inner = {id(each) for each in _inner_optimizers(main)}
    for path, each in below.items():
        if isinstance(each, keras.optimizers.Optimizer) and each is not main and id(each) not in inner:
            found[f"optimizer/{path}"] = each
            inner |= {id(each) for each in _inner_optimizers(each)}
    return found


def build_optimizers(model: keras.Model, names_on_disk: Collection[str]) -> None:
    """Builds the optimizers that have slots on disk, as they are built by their first step."""
    present = optimizers(model)
    if all(optimizer.built for optimizer in present.values()):
        return
    wanted = named_variables(model)
    weights = {name: variable for name, variable in wanted.items() if name.startswith("model/")}
    others = tuple(f"{prefix}/" for prefix in present if prefix != "optimizer")
    for prefix, optimizer in present.items():
        unknown = [name for name in names_on_disk if name.startswith(f"{prefix}/") and name not in wanted]
        if optimizer.built:
            continue
        if prefix == "optimizer":
            if any(not name.startswith(others) for name in unknown):
                optimizer.build(model.trainable_variables)
            continue
        slots = [name.removeprefix(f"{prefix}/") for name in unknown]
        trained = [
            variable
            for name, variable in weights.items()
            if any(slot.startswith(f"{name.removeprefix('model/')}/") for slot in slots)
        ]
        if trained:
            optimizer.build(trained)


def automatic_stems(model: keras.Model) -> frozenset[str]:
    """The names, without their numbers, that Keras gave to layers of the model by itself."""
    return frozenset(_automatic_names(layers_of(model)).values())


def _paths_in(model: keras.Model, layers: Sequence[Any]) -> list[tuple[str, ...]]:
    """The paths of a model's variables, from the outermost layer that belongs to it."""
    known = {layer.name for layer in layers}
    # The model's own name leads the paths of what is built in its scope; a layer of that name is another thing.
    own = model.name if all(layer.name != model.name for layer in layers[1:]) else None
    paths = []
    for variable in model.variables:
        path = _segments(variable)
        # An error while a layer is built leaves its scope open, and Keras puts it before everything that comes later.
        while len(path) > 1 and path[0] not in known and not _anonymous(path[0]):
            path = path[1:]
        paths.append(path[path[0] == own and len(path) > 1 :])
    return paths


def tracked(root: Any) -> dict[str, Any]:
    """What TensorFlow tracks below something, but not below optimizers, by the shortest path of attributes."""
    found: dict[str, Any] = {}
    queue: collections.deque[tuple[str, Any]] = collections.deque([("", root)])
    seen = {id(root)}
    while queue:
        path, parent = queue.popleft()
        for name, child in tf.train.TrackableView.children(parent).items():
            if id(child) not in seen:
                seen.add(id(child))
                found[f"{path}{name}"] = child
                if not isinstance(child, keras.optimizers.Optimizer):
                    queue.append((f"{path}{name}/", child))
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
    automatic = _automatic_names(_inner_optimizers(optimizer))
    owners = dict(zip(inner, _numbered([(each,) for each in inner], automatic), strict=True))
    references = _by_reference(weights, names)
    # No public name tells what an optimizer trains.
    trained = {
        each.name: _by_reference(each._trainable_variables, names)  # noqa: SLF001
        for each in (optimizer, *_inner_optimizers(optimizer))
        if each.built
    }
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


def layers_of(model: keras.Model) -> list[Any]:
    # No public name gives the layers inside of layers that are not models.
    return list(model._flatten_layers(include_self=True, recursive=True))  # noqa: SLF001


def states_of(layers: Iterable[Any]) -> list[Any]:
    """What stateful recurrent layers carry from batch to batch, which Keras does not count among their variables."""
    stateful = [layer for layer in layers if getattr(layer, "stateful", False)]
    found = [each for layer in stateful for each in keras.tree.flatten(getattr(layer, "states", None) or ())]
    return list({id(each): each for each in found}.values())  # a layer and the one that runs it have the same


def _inner_optimizers(optimizer: Any) -> list[Any]:
    inner = getattr(optimizer, "inner_optimizer", None)
    return [*([] if inner is None else [inner]), *getattr(optimizer, "optimizers", ())]


def _metrics(model: keras.Model) -> list[Any]:
    return [each for metric in model.metrics for each in (metric, *getattr(metric, "metrics", ()))]


def _automatic_names(named: Iterable[Any]) -> dict[str, str]:
    """The names that Keras made up, each without its number."""
    stems = {each.name: _stem(each.name, type(each).__name__) for each in named}
    return {name: stem for name, stem in stems.items() if stem is not None}


def _stem(name: str, kind: str) -> str | None:
    """The name without its number if Keras would give such a one to an object of that class, else `None`."""
    # Bidirectional puts a word before the automatic name of the layer that it runs.
    word = next((word for word in ("forward_", "backward_") if name.startswith(word)), "")
    rest = name.removeprefix(word)
    for stem in (re.sub(r"_\d+\Z", "", rest), rest):
        if stem.replace("_", "") == re.sub(r"\W|_", "", kind).lower():
            return word + stem
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
            canonical = (*canonical, known.setdefault(segment, f"{stem}{number}") if stem else segment)
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
    return match[1] if match else None
