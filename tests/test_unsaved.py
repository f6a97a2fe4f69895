"""State of a model that no checkpoint can have is named by a warning, once, with the first save after a batch."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
import models
from models import fit


class Passes(keras.layers.Layer):
    """Gives its input on, and holds something."""

    def __init__(self) -> None:
        super().__init__(name="passes")
        self.hold()

    def hold(self) -> None:
        """Holds the state."""

    def call(self, x):
        self.work()
        return x

    def work(self) -> None:
        """Changes the state."""


class InAList(Passes):
    def hold(self) -> None:
        self.state = [tf.Variable(0.0)]


class InADict(Passes):
    def hold(self) -> None:
        self.state = {"a": {"b": tf.Variable(0.0)}}


class InATuple(Passes):
    """TensorFlow tracks this."""

    def hold(self) -> None:
        self.state = (tf.Variable(0.0), 1)


class Holder:
    """An object of a program's own."""

    def __init__(self) -> None:
        self.value = tf.Variable(0.0)


class InAnObject(Passes):
    def hold(self) -> None:
        self.state = Holder()


class InAModule(Passes):
    def hold(self) -> None:
        module = tf.Module()
        module.value = tf.Variable(0.0)
        self.state = [module]


class ATable(Passes):
    def hold(self) -> None:
        self.state = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)


class ANumber(Passes):
    def hold(self) -> None:
        self.state = 0

    def work(self) -> None:
        self.state += 1


class AnArray(Passes):
    def hold(self) -> None:
        self.state = np.zeros(3)

    def work(self) -> None:
        self.state += 1


class Counter:
    """An object of a program's own that counts."""

    def __init__(self) -> None:
        self.count = 0


class ANumberInAnObject(Passes):
    def hold(self) -> None:
        self.state = [Counter()]

    def work(self) -> None:
        self.state[0].count += 1


class ALargeArray(Passes):
    def hold(self) -> None:
        self.state = np.zeros((300, 200))

    def work(self) -> None:
        self.state[7, 7] += 1


class NumbersInAList(Passes):
    def hold(self) -> None:
        self.state = []

    def work(self) -> None:
        self.state.append(1.0)


class KerassInAList(Passes):
    """Keras tracks these."""

    def hold(self) -> None:
        self.state = [keras.Variable(0.0), keras.layers.Dense(1)]
        self.table = {"a": keras.layers.Dense(1)}

    def build(self, shape) -> None:
        self.state[1].build(shape)
        self.table["a"].build(shape)

    def call(self, x):
        return x + self.state[1](x) * self.state[0] + self.table["a"](x)


class Constants(Passes):
    """A layer has these from its constructor, and training leaves them alone."""

    def hold(self) -> None:
        self.state, self.names, self.table = np.arange(3), ["a", "b"], {"rate": 0.5}
        self.function = len


def model_of(layer: keras.layers.Layer) -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    return model


@pytest.mark.parametrize("callback", [kc.ModelCheckpoint, kc.BackupAndRestore])
@pytest.mark.parametrize(
    "make",
    [InAList, InADict, InAnObject, InAModule, ATable, ANumber, AnArray, ANumberInAnObject, ALargeArray, NumbersInAList],
)
def test_state_that_no_checkpoint_has_is_named_once(tmp_path, make, callback) -> None:
    """By the path of its attribute, at the line of the user that calls `fit`."""
    model = model_of(make())

    with pytest.warns(UserWarning, match=r"do not have this state of it: [^ ]*/state") as caught:
        fit(model, callback(tmp_path / "1"), epochs=2)

    assert [each.filename for each in caught] == [models.__file__]
    fit(model, callback(tmp_path / "2"), epochs=2)


@pytest.mark.parametrize("make", [InATuple, KerassInAList, Constants, lambda: keras.layers.LSTM(3, name="passes")])
def test_nothing_is_said_of_other_models(tmp_path, make, recwarn) -> None:
    """Their checkpoints are complete."""
    layer = make()
    shape = (5, 4) if isinstance(layer, keras.layers.LSTM) else (4,)
    model = keras.Sequential([keras.Input(shape), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)

    model.fit(np.ones((4, *shape)), np.ones((4, 1)), verbose=0, callbacks=[kc.ModelCheckpoint(tmp_path)])

    assert [str(each.message) for each in recwarn if each.category is UserWarning] == []


class CountingOptimizer(keras.optimizers.SGD):
    calls = 0

    def apply(self, *arguments, **named):
        self.calls += 1
        return super().apply(*arguments, **named)


class CountingLoss(keras.losses.Loss):
    calls = 0

    def call(self, y_true, y_pred):
        self.calls += 1
        return keras.ops.mean((y_true - y_pred) ** 2)


class CountingMetric(keras.metrics.Mean):
    def __init__(self) -> None:
        super().__init__(name="counting")
        self.calls = 0

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.calls += 1
        return super().update_state(y_pred)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"optimizer": CountingOptimizer}, "optimizer/calls"),
        ({"loss": CountingLoss}, "losses/calls"),
        ({"metrics": CountingMetric}, "metrics/counting/calls"),
    ],
)
def test_state_of_what_compile_was_given_is_named(tmp_path, options, place) -> None:
    """A number that an optimizer, a loss or a metric of a program's own counts."""
    made = {name: [make()] if name == "metrics" else make() for name, make in options.items()}
    for each in keras.tree.flatten(made):
        each.calls = 0
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(**{"optimizer": "sgd", "loss": "mse", **made}, run_eagerly=True)

    with pytest.warns(UserWarning, match=f"do not have this state of it: {place}"):
        fit(model, kc.ModelCheckpoint(tmp_path))


class Trains(keras.Model):
    """Has an optimizer where nobody looks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = keras.layers.Dense(1)
        holder = Holder()
        holder.optimizer = keras.optimizers.Adam()
        self.holder = holder

    def call(self, x):
        return self.out(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self(x) - y) ** 2)
        weights = self.trainable_variables
        self.holder.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}


def test_an_optimizer_in_an_object_is_named(tmp_path) -> None:
    """Its slots are not saved."""
    model = Trains()
    model(np.ones((1, 4), "float32"))
    model.compile(run_eagerly=True)

    with pytest.warns(UserWarning, match=r"do not have this state of it: .*holder/optimizer"):
        fit(model, kc.ModelCheckpoint(tmp_path))
