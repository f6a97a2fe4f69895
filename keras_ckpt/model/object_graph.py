"""TensorFlow's object graph of a checkpoint, searched for a model.

The graph says which object held which, by the names of attributes. `tf.train.Checkpoint` restores by it alone.
"""

from __future__ import annotations

import collections
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import keras

from keras_ckpt.errors import DamagedCheckpointError, MismatchError
from keras_ckpt.model import tensorflow as backend
from keras_ckpt.model.keras_internals import layers_of, trained_by
from keras_ckpt.model.naming import named_variables
from keras_ckpt.model.parts import optimizers_of

KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"


class Found(NamedTuple):
    """Where a graph has a model.

    Attributes:
        keys: The keys of the model's variables, by name.
        unexpected: The keys of other variables below the model, by a name that tells their place.
        strangers: What is said of optimizers in the graph that are not like the model's.
    """

    keys: Mapping[str, str]
    unexpected: Mapping[str, str]
    strangers: list[str]


class Comparison(NamedTuple):
    """What a restore of a graph into objects leaves out.

    Attributes:
        unbuilt: Layers that the graph has variables of, and whose parts Keras makes where TensorFlow cannot restore.
        unused: The places in the graph of variables that no object takes, each with the number of variables below.
        missing: The places of variables that the graph does not have.
    """

    unbuilt: list[keras.Layer]
    unused: Mapping[str, int]
    missing: list[str]


def hidden(root: Any) -> list[str]:
    """The places of weights of layers that TensorFlow does not see, as it does not see Keras's lists and dicts.

    A layer that is not built stands for the weights that it will have.
    """
    objects = _Objects().places(root)
    layers = [(place, each) for place, each in objects.values() if isinstance(each, keras.Layer)]
    found = {id(weight): f"{place}: {weight.path}" for place, layer in layers for weight in layer.weights}
    inner = [(place, each) for place, layer in layers for each in layers_of(layer)]
    found |= {id(each): f"{place}: {each.name} (not built)" for place, each in inner if _will_have_weights(each)}
    # A Sequential holds its layers where TensorFlow sees them as soon as it is built.
    waiting = [layer for _, layer in layers if isinstance(layer, keras.Sequential) and not layer.built]
    seen = {*objects, *(id(each) for layer in waiting for each in layers_of(layer))}
    return [place for number, place in found.items() if number not in seen]


class ObjectGraph:
    """The object graph of a checkpoint.

    Args:
        data: Its bytes.

    Raises:
        DamagedCheckpointError: It is none, or it is not whole.
    """

    def __init__(self, data: bytes) -> None:
        nodes = backend.nodes(data)
        self._children = [node.children for node in nodes]
        self._keys = {number: node.key for number, node in enumerate(nodes) if node.key is not None}
        named = [number for node in nodes for number in (*node.children.values(), *node.slots)]
        # TensorFlow takes a number below zero for one from the end, and would restore another thing.
        if not all(0 <= number < len(nodes) for number in (0, *named)):
            raise DamagedCheckpointError("its object graph is not whole: it names an object that it does not have")

    def find(self, model: keras.Model, shapes: Mapping[str, Any]) -> Found:
        """Finds a model, whatever it is called, and its optimizers, which are built as they were built there.

        Args:
            model: The model.
            shapes: The shapes of the variables in the checkpoint, by key.

        Raises:
            MismatchError: Several objects fit the model equally well.
        """
        best = self._best(model, shapes)
        inside = self._below(best)
        unfit: dict[str, str] = {}
        strangers = []
        for prefix, optimizer in optimizers_of(model).items():
            place = self._node_of(optimizer, best)
            if place is None:
                continue
            pairs = self._pair_optimizer(place, optimizer, best)
            best |= pairs
            if not pairs and place in inside:
                slots = self._slots(place).items()
                unfit |= {f"{prefix}/{name}": self._keys[number] for name, number in slots if number in self._keys}
            elif not pairs:
                strangers.append(f"an optimizer that is not like the model's ({prefix})")
        names = {id(variable): name for name, variable in named_variables(model).items()}
        keys = {names[id(each)]: self._keys[n] for n, each in best.items() if n in self._keys and id(each) in names}
        known = {*keys.values(), *unfit.values()}
        others = [self._keys[node] for node in inside if node in self._keys and self._keys[node] not in known]
        return Found(keys, {_place(key): key for key in others} | unfit, strangers)

    def _best(self, model: keras.Model, shapes: Mapping[str, Any]) -> dict[int, Any]:
        """The objects of a model by the nodes of the object in the graph that fits it best."""
        objects = _Objects()
        weights = {id(each): backend.kind_of(each) for each in named_variables(model, weights_only=True).values()}
        found = []
        for node, place in self._candidates(objects.children(model)):
            pairs = self._pair(node, model, objects)
            paired = {number for number, each in pairs.items() if number in self._keys and id(each) in weights}
            shaped = [(number, weights[id(pairs[number])], shapes.get(self._keys[number])) for number in paired]
            fitting = {number for number, kind, there in shaped if there is None or kind.fits(there)}
            found.append(_Candidate(len(fitting), len(paired), fitting, place, pairs))
        best = max(found, key=_rank, default=_Candidate(0, 0, set(), "", {}))
        others = {each.place for each in found if each.fits == best.fits > 0 and not each.fitting & best.fitting}
        if others and best.place not in _FIRST:
            places = sorted([best.place, *others])
            raise MismatchError(
                f"The model {model.name!r} fits several objects of the checkpoint: {', '.join(places)}. Nothing was "
                f"restored. {_choice(places)}"
            )
        return best.pairs

    def compare(self, root: Any) -> Comparison:
        """Compares the graph with the objects that it is to be restored into, as TensorFlow pairs them.

        A variable is not unused while its object may still make it: while that is not built, or has no variable yet.
        """
        objects = _Objects()
        places = objects.places(root)
        pairs = self._pair(0, root, objects, optimizers=True)
        waiting = [node for node, each in pairs.items() if _may_make_more(each, objects, root)]
        unbuilt = [part for node in waiting if self._variables(node, ()) for part in _unbuilt_parts(pairs[node])]
        taken = set(pairs)
        for node in waiting:
            taken |= self._reach(node, taken - {node})
        unused = {}
        for node, each in pairs.items():
            for name, child in self._children[node].items():
                if child not in taken and (count := self._variables(child, taken)):
                    unused[f"{places[id(each)][0]}/{name}".strip("/")] = count
                    taken |= self._reach(child, taken)
        found = {id(each) for node, each in pairs.items() if node in self._keys}
        missing = [
            place
            for number, (place, each) in places.items()
            if isinstance(each, backend.Variable | keras.Variable) and number not in found
        ]
        return Comparison(unbuilt, unused, [*missing, *hidden(root)])

    def _variables(self, node: int, without: Container[int]) -> int:
        """How many variables there are below a node."""
        return len(self._reach(node, without) & self._keys.keys())

    def _reach(self, node: int, without: Container[int]) -> set[int]:
        """A node and those below it, by ways that lead through no others."""
        seen, queue = {node}, collections.deque([node])
        while queue:
            for child in self._children[queue.popleft()].values():
                if child not in seen and child not in without:
                    seen.add(child)
                    queue.append(child)
        return seen

    def _candidates(self, children: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
        """The nodes that may be a model with these children, the nearest to the root first; each with its place."""
        places, queue = {0: ""}, collections.deque([0])
        while queue:
            node = queue.popleft()
            if self._children[node].keys() & children.keys():
                yield node, places[node]
            for name, child in self._children[node].items():
                if child not in places:
                    own = name.startswith("_")  # Keras's own, such as the functional model in a Sequential
                    places[child] = places[node] if own else f"{places[node]}/{name}".strip("/")
                    queue.append(child)

    def _pair(self, node: int, root: Any, objects: _Objects, optimizers: bool = False) -> dict[int, Any]:
        """The objects below another by the nodes that have the same attributes.

        Args:
            node: The node of the other.
            root: The other.
            objects: Its children.
            optimizers: Whether to look below optimizers too.
        """
        pairs, queue = {node: root}, collections.deque([node])
        while queue:
            node = queue.popleft()
            if not optimizers and pairs[node] is not root and isinstance(pairs[node], keras.optimizers.Optimizer):
                continue
            children = objects.children(pairs[node])
            for name, number in self._children[node].items():
                if name in children and number not in pairs:
                    pairs[number] = children[name]
                    queue.append(number)
        return pairs

    def _node_of(self, optimizer: Any, pairs: Mapping[int, Any]) -> int | None:
        """The node of an optimizer: below the model, or elsewhere one that trained variables of the model alone."""
        for node, each in pairs.items():
            if each is optimizer:
                return node
        for node in range(len(self._children)):
            trained = self._trained(node)
            if node not in pairs and trained and all(number in pairs for number in trained):
                return node
        return None

    def _trained(self, node: int) -> list[int]:
        """The nodes of the variables that an optimizer was built for, in its order; none of another object."""
        children = self._children[node]
        if not {"_trainable_variables", "_iterations"} <= children.keys():
            return []
        return list(self._children[children["_trainable_variables"]].values())

    def _pair_optimizer(self, node: int, optimizer: Any, pairs: Mapping[int, Any]) -> dict[int, Any]:
        """The objects of an optimizer by their nodes; none if it is not like the node's. It is built if it is not."""
        trained = self._trained(node)
        if not all(number in pairs for number in trained):
            return {}
        variables = [pairs[number] for number in trained]
        if variables and not optimizer.built:
            optimizer.build(variables)
        found = self._pair(node, optimizer, _Objects(), optimizers=True)
        there = {id(each) for number, each in found.items() if number in self._keys}
        same = list(map(id, trained_by(optimizer))) == list(map(id, variables))
        whole = all(id(each) in there for each in optimizer.variables)
        return found if same and whole and len(self._slots(node)) <= len(optimizer.variables) else {}

    def _slots(self, node: int) -> Mapping[str, int]:
        """The nodes of the variables of an optimizer."""
        return self._children[self._children[node]["_variables"]] if "_variables" in self._children[node] else {}

    def _below(self, pairs: Mapping[int, Any]) -> set[int]:
        """The nodes of a model, and those below it that are not those of an optimizer.

        Below the root there may be anything, so only its nodes that are the model's count.
        """
        seen = set(pairs)
        queue = collections.deque(node for node in pairs if node)
        while queue:
            node = queue.popleft()
            if "_trainable_variables" in self._children[node]:
                continue
            for child in self._children[node].values():
                if child not in seen:
                    seen.add(child)
                    queue.append(child)
        return seen


def _will_have_weights(layer: keras.Layer) -> bool:
    """Whether a layer makes weights when it is built."""
    return not layer.built and type(layer).build not in (keras.Layer.build, keras.Model.build)


class _Candidate(NamedTuple):
    """A node that may be a model: how many variables fit it, how many are paired, which fit, its place, the pairs."""

    fits: int
    paired: int
    fitting: set[int]
    place: str
    pairs: dict[int, Any]


def _choice(places: list[str]) -> str:
    """How to restore one of several objects."""
    simple = [place for place in places if all(part.isidentifier() for part in place.split("/"))]
    if not simple:
        return "Restore the whole checkpoint with tf.train.Checkpoint into the objects that it was saved of."
    way = "model"
    for part in reversed(simple[0].split("/")):
        way = f"tf.train.Checkpoint({part}={way})"
    return f"Choose one of them with TensorFlow, such as {simple[0]}: {way}.restore(prefix)."


_FIRST = ("", "model")
"""The places where `tf.train.Checkpoint(model)` and `tf.train.Checkpoint(model=model)` have a model."""


def _rank(candidate: _Candidate) -> tuple[int, bool, int]:
    return candidate.fits, candidate.place in _FIRST, candidate.paired


def _may_make_more(each: Any, objects: _Objects, root: Any) -> bool:
    """Whether an object may make variables later."""
    if isinstance(each, keras.Layer | keras.optimizers.Optimizer):
        return not each.built
    below = [other for _, other in objects.places(each).values() if other is not root.save_counter]
    return not any(isinstance(other, backend.Variable | keras.Variable) for other in below)


def _unbuilt_parts(each: Any) -> list[keras.Layer]:
    """The layers in an object that make other layers' variables when they are called first."""
    layers = layers_of(each) if isinstance(each, keras.Layer) else []
    makers = [layer for layer in layers if not layer.built and not isinstance(layer, keras.Sequential)]
    return [layer for layer in makers if len(layers_of(layer)) > 1]


def _place(key: str) -> str:
    """A name for the variable of a key, below the model."""
    return f"model/{key.partition('/')[2].partition('/.ATTRIBUTES')[0]}"


class _Objects:
    """The children of objects, as TensorFlow tracks them; asked once for each, because the answer takes long."""

    def __init__(self) -> None:
        self._children: dict[int, tuple[Any, Mapping[str, Any]]] = {}

    def children(self, each: Any) -> Mapping[str, Any]:
        if id(each) not in self._children:
            self._children[id(each)] = each, backend.children(each)
        return self._children[id(each)][1]

    def places(self, root: Any) -> dict[int, tuple[str, Any]]:
        """An object and those below it, by identity, each with its place below the first."""
        places, queue = {id(root): ("", root)}, collections.deque([root])
        while queue:
            each = queue.popleft()
            for name, child in self.children(each).items():
                if id(child) not in places:
                    places[id(child)] = f"{places[id(each)][0]}/{name}".strip("/"), child
                    queue.append(child)
        return places
