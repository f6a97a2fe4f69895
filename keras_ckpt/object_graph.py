"""TensorFlow's object graph of a checkpoint: written beside the names, and searched for a model.

The graph says which object held which, by the names of attributes. `tf.train.Checkpoint` restores by it alone.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import keras
import tensorflow as tf

# The one module of TensorFlow outside its public names that is needed: the format of the object graph, which is
# as stable as the checkpoints on everybody's disk.
from tensorflow.core.protobuf import trackable_object_graph_pb2

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.naming import named_variables, trained_by
from keras_ckpt.parts import optimizers_of

KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
_VALUE = "VARIABLE_VALUE"


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


def written(root: tf.train.Checkpoint, keys: Mapping[int, str]) -> bytes:
    """The graph of a checkpoint.

    Args:
        root: The root of the graph.
        keys: The keys of variables in the checkpoint, by their identities.
    """
    view = tf.train.TrackableView(root)
    objects = view.descendants()
    numbers = {id(each): number for number, each in enumerate(objects)}
    graph = trackable_object_graph_pb2.TrackableObjectGraph()
    for each in objects:
        node = graph.nodes.add()
        for name, child in view.children(each).items():
            node.children.add(node_id=numbers[id(child)], local_name=name)
        if id(each) in keys:
            node.attributes.add(name=_VALUE, checkpoint_key=keys[id(each)], full_name=each.name)
    return bytes(graph.SerializeToString())


class ObjectGraph:
    """The object graph of a checkpoint.

    Args:
        data: Its bytes.

    Raises:
        DamagedCheckpointError: It is none, or it is not whole.
    """

    def __init__(self, data: bytes) -> None:
        graph = trackable_object_graph_pb2.TrackableObjectGraph()
        graph.ParseFromString(data)
        self._children = [{child.local_name: child.node_id for child in node.children} for node in graph.nodes]
        attributes = [[each for each in node.attributes if each.name == _VALUE] for node in graph.nodes]
        self._keys = {number: found[0].checkpoint_key for number, found in enumerate(attributes) if found}
        slots = [slot for node in graph.nodes for slot in node.slot_variables]
        numbers = [number for children in self._children for number in children.values()]
        numbers += [number for slot in slots for number in (slot.original_variable_node_id, slot.slot_variable_node_id)]
        # TensorFlow takes a number below zero for one from the end, and would restore another thing.
        if not all(0 <= number < len(graph.nodes) for number in (0, *numbers)):
            raise DamagedCheckpointError("its object graph is not whole: it names an object that it does not have")

    def find(self, model: keras.Model) -> Found:
        """Finds a model, whatever it is called, and its optimizers, which are built as they were built there."""
        objects = _Objects()
        weights = set(map(id, named_variables(model, weights_only=True).values()))
        best: dict[int, Any] = {}
        most = 0
        for node in self._candidates(objects.children(model)):
            pairs = self._pair(node, model, objects)
            count = sum(id(each) in weights for number, each in pairs.items() if number in self._keys)
            if count > most:
                best, most = pairs, count
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

    def _candidates(self, children: Mapping[str, Any]) -> Iterator[int]:
        """The nodes that may be a model with these children, the nearest to the root first."""
        seen, queue = {0}, collections.deque([0])
        while queue:
            node = queue.popleft()
            if self._children[node].keys() & children.keys():
                yield node
            for child in self._children[node].values():
                if child not in seen:
                    seen.add(child)
                    queue.append(child)

    def _pair(self, node: int, root: Any, objects: _Objects) -> dict[int, Any]:
        """The objects below another, except below an optimizer, by the nodes that have the same attributes."""
        pairs, queue = {node: root}, collections.deque([node])
        while queue:
            node = queue.popleft()
            if pairs[node] is not root and isinstance(pairs[node], keras.optimizers.Optimizer):
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
        found = self._pair(node, optimizer, _Objects())
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


def _place(key: str) -> str:
    """A name for the variable of a key, below the model."""
    return f"model/{key.partition('/')[2].partition('/.ATTRIBUTES')[0]}"


class _Objects:
    """The children of objects, as TensorFlow tracks them; asked once for each, because the answer takes long."""

    def __init__(self) -> None:
        self._children: dict[int, tuple[Any, Mapping[str, Any]]] = {}

    def children(self, each: Any) -> Mapping[str, Any]:
        if id(each) not in self._children:
            self._children[id(each)] = each, tf.train.TrackableView.children(each)
        return self._children[id(each)][1]
