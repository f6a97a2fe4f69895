"""TensorFlow's object graph of a checkpoint, searched for a model.

The graph records the attributes that hold each object. `tf.train.Checkpoint` restores by the graph alone.
"""

from __future__ import annotations

import collections
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

import keras

from keras_ckpt.errors import MismatchError
from keras_ckpt.formats import graph
from keras_ckpt.formats.variables import COUNTER
from keras_ckpt.model.backends import backend
from keras_ckpt.model.keras_internals import layers_of, trained_by
from keras_ckpt.model.naming import named_variables
from keras_ckpt.model.parts import optimizers_of


class Found(NamedTuple):
    """The variables of a model in a graph.

    Attributes:
        keys: The keys of the model's variables, by name.
        unexpected: The keys of other variables below the model, by a name that tells their place.
        unfit_optimizers: Descriptions of the optimizers in the graph that do not fit the model's.
    """

    keys: Mapping[str, str]
    unexpected: Mapping[str, str]
    unfit_optimizers: list[str]


class Comparison(NamedTuple):
    """The objects that a restore of a graph skips.

    Attributes:
        unbuilt: Layers with variables in the graph, whose parts Keras makes where TensorFlow cannot restore them.
        unused: The places in the graph that no object takes, each with the number of variables below.
        missing: The places of variables that the graph does not have.
    """

    unbuilt: list[keras.Layer]
    unused: Mapping[str, int]
    missing: list[str]


def encoded(model: keras.Model, keys: Mapping[int, str]) -> bytes:
    """The object graph of `tf.train.Checkpoint(model=model)`, for the checkpoint of a model.

    Args:
        model: The model.
        keys: The keys of its variables in the checkpoint, by identity.
    """
    objects = _Objects()
    _, *below = [each for _, each in objects.places(model).values()]
    # TensorFlow's order: the root, its attributes, and everything below.
    numbers = {id(model): 1} | {id(each): number for number, each in enumerate(below, 3)}

    def node(each: Any) -> graph.Node:
        children = {name: numbers[id(child)] for name, child in objects.children(each).items()}
        return graph.Node(children, keys.get(id(each)), each.name if id(each) in keys else "")

    counter = COUNTER.partition("/")[0]
    root = graph.Node({"model": 1, counter: 2})
    return graph.encode([root, node(model), graph.Node({}, COUNTER, counter), *map(node, below)])


def hidden(root: Any) -> list[str]:
    """The places of weights of layers that TensorFlow does not track: layers in Keras's lists and dicts.

    An unbuilt layer is listed for the weights that it will have.
    """
    objects = _Objects().places(root)
    layers = [(place, each) for place, each in objects.values() if isinstance(each, keras.Layer)]
    found = {id(weight): f"{place}: {weight.path}" for place, layer in layers for weight in layer.weights}
    inner = [(place, each) for place, layer in layers for each in layers_of(layer)]
    found |= {id(each): f"{place}: {each.name} (not built)" for place, each in inner if _will_have_weights(each)}
    # TensorFlow tracks the layers of a Sequential once it is built.
    waiting = [layer for _, layer in layers if isinstance(layer, keras.Sequential) and not layer.built]
    seen = {*objects, *(id(each) for layer in waiting for each in layers_of(layer))}
    return [place for number, place in found.items() if number not in seen]


class ObjectGraph:
    """The object graph of a checkpoint.

    Args:
        data: The bytes of the graph.

    Raises:
        DamagedCheckpointError: The bytes are no graph, or the graph is incomplete.
    """

    def __init__(self, data: bytes) -> None:
        nodes = graph.decode(data)
        self._children = [node.children for node in nodes]
        self._keys = {number: node.key for number, node in enumerate(nodes) if node.key is not None}

    def find(self, model: keras.Model, shapes: Mapping[str, Any]) -> Found:
        """Finds a model under any name, and its optimizers, and builds the optimizers as in the checkpoint.

        Args:
            model: The model.
            shapes: The shapes of the variables in the checkpoint, by key.

        Raises:
            MismatchError: Several objects fit the model equally well.
        """
        best = self._best(model, shapes)
        inside = self._below(best)
        unfit: dict[str, str] = {}
        unfit_optimizers = []
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
                unfit_optimizers.append(f"an optimizer that does not fit the model's ({prefix})")
        names = {id(variable): name for name, variable in named_variables(model).items()}
        keys = {names[id(each)]: self._keys[n] for n, each in best.items() if n in self._keys and id(each) in names}
        known = {*keys.values(), *unfit.values()}
        others = [self._keys[node] for node in inside if node in self._keys and self._keys[node] not in known]
        return Found(keys, {_place(key): key for key in others} | unfit, unfit_optimizers)

    def _best(self, model: keras.Model, shapes: Mapping[str, Any]) -> dict[int, Any]:
        """The objects of a model by their nodes, below the node in the graph that fits the model best."""
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
        """Compares the graph with the objects to restore it into, as TensorFlow pairs them.

        A variable is not unused while its object may still make it: an unbuilt object, or an object without variables.
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
        """The number of variables below a node."""
        return len(self._reach(node, without) & self._keys.keys())

    def _reach(self, node: int, without: Container[int]) -> set[int]:
        """A node and the nodes below it, by paths that avoid the nodes in `without`."""
        seen, queue = {node}, collections.deque([node])
        while queue:
            for child in self._children[queue.popleft()].values():
                if child not in seen and child not in without:
                    seen.add(child)
                    queue.append(child)
        return seen

    def _candidates(self, children: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
        """The nodes that may be a model with these children, with their places; the nearest to the root come first."""
        places, queue = {0: ""}, collections.deque([0])
        while queue:
            node = queue.popleft()
            if self._children[node].keys() & children.keys():
                yield node, places[node]
            for name, child in self._children[node].items():
                if child not in places:
                    private = name.startswith(
                        "_"
                    )  # a private attribute of Keras: a Sequential holds a functional model
                    places[child] = places[node] if private else f"{places[node]}/{name}".strip("/")
                    queue.append(child)

    def _pair(self, node: int, root: Any, objects: _Objects, optimizers: bool = False) -> dict[int, Any]:
        """The objects below a root, by the nodes that are reached by the same attributes.

        Args:
            node: The node of the root.
            root: The root.
            objects: The children of objects.
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
        """The node of an optimizer: below the model, or elsewhere if it trained only variables of the model."""
        for node, each in pairs.items():
            if each is optimizer:
                return node
        for node in range(len(self._children)):
            trained = self._trained(node)
            if node not in pairs and trained and all(number in pairs for number in trained):
                return node
        return None

    def _trained(self, node: int) -> list[int]:
        """The nodes of the variables that an optimizer was built for, in its order; empty for another object."""
        children = self._children[node]
        if not {"_trainable_variables", "_iterations"} <= children.keys():
            return []
        return list(self._children[children["_trainable_variables"]].values())

    def _pair_optimizer(self, node: int, optimizer: Any, pairs: Mapping[int, Any]) -> dict[int, Any]:
        """Builds an optimizer if needed, and pairs its objects with their nodes; empty if it does not fit the node."""
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
        """The nodes of a model and the nodes below it, except below optimizers.

        The root may hold other objects too, so of its children only the model's nodes count.
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
    """A node that may be a model.

    Attributes:
        fits: The number of variables that fit.
        paired: The number of variables that are paired.
        fitting: The nodes of the variables that fit.
        place: The place of the node.
        pairs: The objects by node.
    """

    fits: int
    paired: int
    fitting: set[int]
    place: str
    pairs: dict[int, Any]


def _choice(places: list[str]) -> str:
    """The advice for a checkpoint with several objects that fit."""
    simple = [place for place in places if all(part.isidentifier() for part in place.split("/"))]
    if not simple:
        return "Restore the whole checkpoint with tf.train.Checkpoint into objects like the saved ones."
    way = "model"
    for part in reversed(simple[0].split("/")):
        way = f"tf.train.Checkpoint({part}={way})"
    return f"Choose one of them with TensorFlow, such as {simple[0]}: {way}.restore(prefix)."


_FIRST = ("", "model")
"""The places of the model in `tf.train.Checkpoint(model)` and `tf.train.Checkpoint(model=model)`."""


def _rank(candidate: _Candidate) -> tuple[int, bool, int]:
    return candidate.fits, candidate.place in _FIRST, candidate.paired


def _may_make_more(each: Any, objects: _Objects, root: Any) -> bool:
    """Whether an object may make variables later."""
    if isinstance(each, keras.Layer | keras.optimizers.Optimizer):
        return not each.built
    below = [other for _, other in objects.places(each).values() if other is not root.save_counter]
    return not any(isinstance(other, backend.Variable | keras.Variable) for other in below)


def _unbuilt_parts(each: Any) -> list[keras.Layer]:
    """The layers in an object that make variables of other layers in their first call."""
    layers = layers_of(each) if isinstance(each, keras.Layer) else []
    makers = [layer for layer in layers if not layer.built and not isinstance(layer, keras.Sequential)]
    return [layer for layer in makers if len(layers_of(layer)) > 1]


def _place(key: str) -> str:
    """A name below the model for the variable of a key."""
    return f"model/{key.partition('/')[2].partition('/.ATTRIBUTES')[0]}"


class _Objects:
    """The children of objects, as TensorFlow tracks them, cached because TensorFlow is slow to list them."""

    def __init__(self) -> None:
        self._children: dict[int, tuple[Any, Mapping[str, Any]]] = {}

    def children(self, each: Any) -> Mapping[str, Any]:
        if id(each) not in self._children:
            self._children[id(each)] = each, backend.children(each)
        return self._children[id(each)][1]

    def places(self, root: Any) -> dict[int, tuple[str, Any]]:
        """A root and the objects below it by identity, each with its place below the root."""
        places, queue = {id(root): ("", root)}, collections.deque([root])
        while queue:
            each = queue.popleft()
            for name, child in self.children(each).items():
                if id(child) not in places:
                    places[id(child)] = f"{places[id(each)][0]}/{name}".strip("/"), child
                    queue.append(child)
        return places
