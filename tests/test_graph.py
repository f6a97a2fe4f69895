"""The object graph of a checkpoint, encoded and decoded without TensorFlow, compared with TensorFlow's own."""

import keras
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import trackable_object_graph_pb2

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats import graph
from keras_ckpt.model import object_graph
from support.models import dense_model


def graph_by_tensorflow(model: keras.Model, path) -> bytes:
    prefix = tf.train.Checkpoint(model=model).save(str(path / "plain"))
    return tf.train.load_checkpoint(prefix).get_tensor(graph.KEY)


def test_the_graph_of_a_model_has_the_objects_of_tensorflows_graph_in_the_same_order(tmp_path) -> None:
    model = dense_model()
    keys = {id(each): each.path for each in model.variables}

    theirs = graph.decode(graph_by_tensorflow(model, tmp_path))
    ours = graph.decode(object_graph.encoded(model, keys))

    assert [node.children for node in ours] == [node.children for node in theirs]
    expected = {each.path for each in model.trainable_variables}
    assert {node.key for node in ours} >= {"save_counter/.ATTRIBUTES/VARIABLE_VALUE", *expected}


def test_decode_finds_the_keys_and_names_of_variables_that_tensorflow_writes(tmp_path) -> None:
    model = dense_model()
    nodes = graph.decode(graph_by_tensorflow(model, tmp_path))

    keys = {key for key, _ in tf.train.list_variables(str(tmp_path / "plain-1"))}
    assert {node.key for node in nodes if node.key} == keys - {graph.KEY}
    assert {each.path for each in model.trainable_variables} <= {node.name for node in nodes}


def test_tensorflows_parser_reads_an_encoded_graph_as_it_was_meant() -> None:
    nodes = [graph.Node({"a" * 200: 1, "b": 2}), graph.Node({}, "key", "name"), graph.Node({"up": 0})]

    theirs = trackable_object_graph_pb2.TrackableObjectGraph.FromString(graph.encode(nodes))

    assert [{each.local_name: each.node_id for each in node.children} for node in theirs.nodes] == [
        node.children for node in nodes
    ]
    (value,) = theirs.nodes[1].attributes
    assert (value.name, value.full_name, value.checkpoint_key) == ("VARIABLE_VALUE", "name", "key")
    assert graph.decode(theirs.SerializeToString()) == nodes


def test_decode_lists_the_objects_that_slot_variables_name() -> None:
    theirs = trackable_object_graph_pb2.TrackableObjectGraph()
    for _ in range(3):
        node = theirs.nodes.add()
    node.slot_variables.add(original_variable_node_id=1, slot_name="m", slot_variable_node_id=2)

    assert graph.decode(theirs.SerializeToString())[2].slots == (1, 2)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x05", "not a valid Protocol Buffers message"),
        (graph.encode([graph.Node({"a": 1})]), "an object that it does not have"),
        (graph.encode([graph.Node({}, "key", "name")]).replace(b"key", b"k\xffy"), "a name that is no text"),
        (b"", "an object that it does not have"),
    ],
)
def test_a_graph_that_is_not_whole_is_refused(data, message) -> None:
    with pytest.raises(DamagedCheckpointError, match=message):
        graph.decode(data)
