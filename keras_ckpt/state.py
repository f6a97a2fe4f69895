"""The training state of a model: all of its variables, under names that do not depend on the process.

A name is the variable's path: `model/conv/kernel`, `optimizer/conv/kernel/momentum`, `metrics/loss/total`.
Keras numbers its automatic names per process, so `dense_7`, in a notebook's third try, is counted anew among the
layers beside it, in the model's order; the top model's and the optimizer's own names are left out; a slot carries
its variable's name; a path that is there already gets `~2`.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import functools
import math
import operator
import os
import platform
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

# The one module of TensorFlow outside its public names that is needed: the format of the object graph, which is
# as stable as the checkpoints on everybody's disk.
from tensorflow.core.protobuf import trackable_object_graph_pb2

from keras_ckpt import __version__
from keras_ckpt.bundle_writer import Value, string_value
from keras_ckpt.files import Folder
from keras_ckpt.snapshot import Reader, Snapshot, begin

SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
"""What TensorFlow appends to a variable's name in a checkpoint."""
GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
NAMES_KEY = "_KERAS_CKPT_NAMES"
"""The key of a string that marks a checkpoint whose names are those of this module."""
TRAINING_KEY = "_KERAS_CKPT_TRAINING"
"""The key of what a backup holds beside the model: a string of JSON, and with `/0`, `/1` and so on the arrays in it."""


class ModelState(tf.train.Checkpoint):
    """A model's training state as a `tf.train.Checkpoint` whose files read like the model.

    What it writes is a plain TensorFlow checkpoint: `tf.train.Checkpoint(model=model).restore(prefix)` restores every
    weight and slot from it.

    Example:

    ```python
    prefix = ModelState(model).write("runs/state")
    tf.train.list_variables(prefix)
    ```

    Args:
        model: A built model.
        weights_only: Whether to leave out the optimizer and the metrics.

    Raises:
        ValueError: Keras runs on another backend than TensorFlow.
    """

    def __init__(self, model: keras.Model, weights_only: bool = False) -> None:
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                f"keras_ckpt saves models of Keras's TensorFlow backend. Received: {keras.backend.backend()}. "
                "Set KERAS_BACKEND=tensorflow before Keras is imported."
            )
        super().__init__(model=model)
        self._weights_only = weights_only
        self._plan: _Plan | None = None

    def names(self) -> dict[str, Any]:
        """The variables that it writes, by name."""
        return names(self.model, self._weights_only)

    @property
    def size(self) -> int:
        """The bytes of the variables, when they were looked at last; 0 before the first time."""
        return sum(self._plan.sizes.values()) if self._plan else 0

    def sizes(self) -> Mapping[bytes, int]:
        """The bytes of each variable, by its key in a snapshot."""
        return self._current_plan().sizes

    def write(self, file_prefix: str | os.PathLike[str], options: Any = None) -> str:
        """Writes the files of a checkpoint, durably, where there are none of that prefix.

        Raises:
            OSError: They cannot be written.
        """
        prefix = os.fspath(file_prefix)
        path, name = os.path.split(prefix)
        with Folder(path or ".") as folder:
            self.snapshot()(folder, name)
        return prefix

    def snapshot(self, others: Mapping[str, Any] = {}) -> Snapshot:
        """The values that the variables have now.

        Args:
            others: More to write, by key; values that TensorFlow has a tensor for.
        """
        if (plan := self._plan) is not None:
            # While TensorFlow reads, other threads may run Python: one sees whether these are the right things to read.
            holds = begin(functools.partial(plan.holds, self.model))
            snapshot = Snapshot(plan.reader, others, plan.constants)
            if holds():
                return snapshot
        self._plan = plan = self._new_plan()
        return Snapshot(plan.reader, others, plan.constants)

    def _current_plan(self) -> _Plan:
        if self._plan is None or not self._plan.holds(self.model):
            self._plan = self._new_plan()
        return self._plan

    def _new_plan(self) -> _Plan:
        kept = list(optimizers(self.model).values())
        made_of = _made_of(self.model, kept)
        variables = {f"{name}{SUFFIX}": variable for name, variable in self.names().items()}
        variables[f"save_counter{SUFFIX}"] = self.save_counter
        graph = _object_graph(self, {id(variable): key for key, variable in variables.items()})
        texts = {GRAPH_KEY: graph.SerializeToString(), NAMES_KEY: b"1"}
        constants = {key.encode(): string_value([text], ()) for key, text in texts.items()}
        sizes = {key.encode(): math.prod(each.shape) * tf.as_dtype(each.dtype).size for key, each in variables.items()}
        reader = Reader({key: value_of(variable) for key, variable in variables.items()})
        return _Plan([*variables.values()], reader, constants, sizes, kept, made_of, list(map(id, made_of)))


class _Plan(NamedTuple):
    """What is written of a model, which takes longer to find out than to read, and seldom changes.

    Attributes:
        variables: The model's, in the order of the reader's.
        reader: Reads their values.
        constants: The object graph, and the mark of these names, as they are written.
        sizes: The bytes of the variables, by their keys.
        optimizers: The model's.
        made_of: What the model was made of. It is held, so that no other thing gets the identity of one of them.
        identities: Theirs.
    """

    variables: Sequence[Any]
    reader: Reader
    constants: Mapping[bytes, Value]
    sizes: Mapping[bytes, int]
    optimizers: Sequence[Any]
    made_of: Sequence[Any]
    identities: Sequence[int]

    def holds(self, model: keras.Model) -> bool:
        """Whether the model is made of the same things still, and the reader reads their values."""
        same = list(map(id, _made_of(model, self.optimizers))) == self.identities
        return same and all(map(operator.is_, map(value_of, self.variables), self.reader.variables))


def _made_of(model: keras.Model, known: Iterable[Any]) -> list[Any]:
    """The variables of a model and of its known optimizers, and what would show that there are more."""
    layers = _layers(model)
    attributes = [each for layer in layers for each in vars(layer).values()]
    # Asked once for each class, because TensorFlow's answer takes long.
    kinds = {kind for kind in set(map(type, attributes)) if issubclass(kind, tf.Variable | keras.optimizers.Optimizer)}
    found = [each for each in attributes if type(each) in kinds]
    slots = [variable for optimizer in known for variable in optimizer.variables]
    return [*layers, *found, *model.variables, *_states(layers), *slots, *model.metrics_variables]


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Makes of TensorFlow's word for a full disk the `OSError` that it was."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number)) from error
        raise


def names(model: keras.Model, weights_only: bool = False) -> dict[str, Any]:
    """The variables of a model's training state by name, in the model's order.

    Args:
        model: A built model.
        weights_only: Whether to leave out the optimizer and the metrics.

    Returns:
        `keras.Variable`s, and `tf.Variable`s that a layer holds beside them.
    """
    weights, layers = model.variables, _layers(model)
    paths = _numbered(_paths_in(model, layers), _automatic_names(layers))
    found = [(f"model/{path}", variable) for path, variable in zip(paths, weights, strict=True)]
    tracked = _tracked(model)
    found += [(f"model/{path}", each) for path, each in tracked.items() if isinstance(each, tf.Variable)]
    if not weights_only:
        states = _states(layers)
        paths_of_states = _numbered([_segments(variable)[-2:] for variable in states], _automatic_names(layers))
        found += [(f"states/{path}", variable) for path, variable in zip(paths_of_states, states, strict=True)]
        references = _references(weights, paths)
        for prefix, optimizer in _optimizers(model, tracked).items():
            found += _optimizer_variables(prefix, optimizer, references)
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
    return _optimizers(model, _tracked(model))


def _optimizers(model: keras.Model, tracked: Mapping[str, Any]) -> dict[str, Any]:
    main = getattr(model, "optimizer", None)
    found = {} if main is None else {"optimizer": main}
    inner = {id(each) for each in _inner_optimizers(main)}
    for path, each in tracked.items():
        if isinstance(each, keras.optimizers.Optimizer) and each is not main and id(each) not in inner:
            found[f"optimizer/{path}"] = each
            inner |= {id(each) for each in _inner_optimizers(each)}
    return found


def build_optimizers(model: keras.Model, names_on_disk: Collection[str]) -> None:
    """Builds the optimizers that have slots on disk, as they are built by their first step."""
    present = optimizers(model)
    if all(optimizer.built for optimizer in present.values()):
        return
    wanted = names(model)
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


def versions() -> dict[str, str]:
    """The versions of what a checkpoint is written with."""
    return {
        "keras_ckpt": __version__,
        "keras": keras.__version__,
        "tensorflow": tf.__version__,
        "python": platform.python_version(),
    }


def value_of(variable: Any) -> Any:
    """A variable's value as TensorFlow's functions take it."""
    # The public property looks for scopes first, which takes longer than to read the variable.
    return variable._value if isinstance(variable, keras.Variable) else variable  # noqa: SLF001


def automatic_stems(model: keras.Model) -> frozenset[str]:
    """The names, without their numbers, that Keras gave to layers of the model by itself."""
    return frozenset(_automatic_names(_layers(model)).values())


def object_graph(reader: Any) -> trackable_object_graph_pb2.TrackableObjectGraph:
    """The object graph of a TensorFlow checkpoint."""
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    graph.ParseFromString(reader.get_tensor(GRAPH_KEY))
    return graph


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


def _tracked(model: keras.Model) -> dict[str, Any]:
    """What TensorFlow tracks below a model, but not below its optimizer, by the shortest path of attributes."""
    found: dict[str, Any] = {}
    queue: collections.deque[tuple[str, Any]] = collections.deque([("", model)])
    seen = {id(model), id(getattr(model, "optimizer", None))}
    while queue:
        path, parent = queue.popleft()
        for name, child in tf.train.TrackableView.children(parent).items():
            if id(child) not in seen:
                seen.add(id(child))
                found[f"{path}{name}"] = child
                if not isinstance(child, keras.optimizers.Optimizer):
                    queue.append((f"{path}{name}/", child))
    return found


def _references(weights: Sequence[keras.Variable], paths: Sequence[str]) -> dict[str, list[str]]:
    """The names of the weights by what optimizers make of their paths; those that share a path in the model's order."""
    references: dict[str, list[str]] = collections.defaultdict(list)
    for variable, path in zip(weights, paths, strict=True):
        references[variable.path.replace("/", "_")].append(path)
    return references


def _optimizer_variables(
    prefix: str, optimizer: Any, references: Mapping[str, Sequence[str]]
) -> Iterable[tuple[str, keras.Variable]]:
    """The variables of an optimizer, a slot under the name of its weight."""
    owned = [("", *_owned(variable))[-2:] for variable in optimizer.variables]
    inner = list(dict.fromkeys(owner for owner, _ in owned if owner not in ("", optimizer.name)))
    automatic = _automatic_names(_inner_optimizers(optimizer))
    owners = dict(zip(inner, _numbered([(each,) for each in inner], automatic), strict=True))
    used: collections.Counter[tuple[str, str]] = collections.Counter()
    for (owner, name), variable in zip(owned, optimizer.variables, strict=True):
        place = f"{prefix}/{owners[owner]}" if owner in owners else prefix
        reference = _reference(name, references)
        if reference is None:
            yield f"{place}/{name}", variable
            continue
        # Variables that share a path have their slots in the same order.
        sharing = references[reference]
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


def _layers(model: keras.Model) -> list[Any]:
    # No public name gives the layers inside of layers that are not models.
    return list(model._flatten_layers(include_self=True, recursive=True))  # noqa: SLF001


def _states(layers: Iterable[Any]) -> list[Any]:
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
    unique = []
    for name in names:
        counts[name] += 1
        unique.append(name if counts[name] == 1 else f"{name}~{counts[name]}")
    return unique


def _anonymous(segment: str) -> str | None:
    """The stem of a variable or a seed generator that was given no name."""
    match = re.fullmatch(r"(variable|seed_generator)(_\d+)?", segment)
    return match[1] if match else None


def _object_graph(root: tf.train.Checkpoint, keys: dict[int, str]) -> trackable_object_graph_pb2.TrackableObjectGraph:
    """TensorFlow's object graph of a checkpoint, with the given key for each variable."""
    view = tf.train.TrackableView(root)
    objects = view.descendants()
    numbers = {id(each): number for number, each in enumerate(objects)}
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    for each in objects:
        node = graph.nodes.add()
        for name, child in view.children(each).items():
            node.children.add(node_id=numbers[id(child)], local_name=name)
        if id(each) in keys:
            node.attributes.add(name="VARIABLE_VALUE", checkpoint_key=keys[id(each)], full_name=each.name)
    return graph
