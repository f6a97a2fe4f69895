"""TensorFlow's object graph in a checkpoint: the objects, the attributes that hold them, and the keys of variables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats import protobuf

KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
"""The key of the graph in a checkpoint."""
_VALUE = "VARIABLE_VALUE"


class Node(NamedTuple):
    """An object in a graph.

    Attributes:
        children: The numbers of the objects in its attributes, by name.
        key: The key of its value in the checkpoint, if it is a variable.
        name: The name of the variable.
        slots: The numbers of the objects that its slot variables name.
    """

    children: Mapping[str, int]
    key: str | None = None
    name: str = ""
    slots: Sequence[int] = ()


def encode(nodes: Iterable[Node]) -> bytes:
    """Encodes a `TrackableObjectGraph`. It has no slot variables: Keras's optimizers have none."""
    return b"".join(protobuf.message(1, _encoded(node)) for node in nodes)


def _encoded(node: Node) -> bytes:
    children = [
        protobuf.message(1, protobuf.numbered(1, number) + protobuf.message(2, name.encode()))
        for name, number in node.children.items()
    ]
    if node.key is not None:
        value = enumerate((_VALUE, node.name, node.key), 1)
        children.append(protobuf.message(2, b"".join(protobuf.message(field, each.encode()) for field, each in value)))
    return b"".join(children)


def decode(data: bytes) -> list[Node]:
    """Decodes a `TrackableObjectGraph`; the objects by their numbers.

    Raises:
        DamagedCheckpointError: The bytes are no graph, or the graph is incomplete.
    """
    try:
        nodes = [_decoded(each) for each in protobuf.messages(protobuf.decode(data), 1)]
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"its object graph {error}") from None
    named = [number for node in nodes for number in (*node.children.values(), *node.slots)]
    # TensorFlow counts a negative number from the end, and would restore another object.
    if not all(0 <= number < len(nodes) for number in (0, *named)):
        raise DamagedCheckpointError("its object graph is incomplete: it names an object that it does not have")
    return nodes


def _decoded(message: bytes) -> Node:
    fields = protobuf.decode(message)
    children = [protobuf.decode(each) for each in protobuf.messages(fields, 1)]
    values = [protobuf.decode(each) for each in protobuf.messages(fields, 2)]
    slots = [protobuf.decode(each) for each in protobuf.messages(fields, 3)]
    value = next((each for each in values if _text(each, 1) == _VALUE), None)
    return Node(
        {_text(each, 2): protobuf.number(each, 1) for each in children},
        _text(value, 3) if value else None,
        _text(value, 2) if value else "",
        tuple(protobuf.number(each, field) for each in slots for field in (1, 3)),
    )


def _text(fields: protobuf.Fields, field: int) -> str:
    try:
        return b"".join(protobuf.messages(fields, field)[-1:]).decode()
    except UnicodeDecodeError:
        raise DamagedCheckpointError("has a name that is no text") from None
