"""A warning names the state of a model that no checkpoint has, once, at the first save after a batch."""

from __future__ import annotations

import functools
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
from support import models
from support.models import dense_model, fit


class Passes(keras.layers.Layer):
    """Passes its input through, and holds state."""

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
    """TensorFlow tracks the tuple."""

    def hold(self) -> None:
        self.state = (tf.Variable(0.0), 1)


class Holder:
    """An object of a user's class."""

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


class ATableInAList(Passes):
    def hold(self) -> None:
        self.state = [tf.lookup.experimental.DenseHashTable(tf.int64, tf.float32, 0.0, 0, -1)]


class ASeedInAnObject(Passes):
    def hold(self) -> None:
        holder = Holder()
        holder.value = keras.random.SeedGenerator(1)
        self.state = holder


class InAnArray(Passes):
    def hold(self) -> None:
        self.state = np.array([tf.Variable(0.0), None], object)


class InAMapping(Passes):
    def hold(self) -> None:
        self.state = types.MappingProxyType({"a": tf.Variable(0.0)})


class InAPartial(Passes):
    def hold(self) -> None:
        self.state = functools.partial(print, tf.Variable(0.0))


class InAFunction(Passes):
    def hold(self) -> None:
        variable = tf.Variable(0.0)
        self.state = lambda: variable


class ANumberInAFunction(Passes):
    def hold(self) -> None:
        count = 0

        def state() -> None:
            nonlocal count
            count += 1

        self.state = state

    def work(self) -> None:
        self.state()


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
    """A counting object of a user's class."""

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
    """Keras tracks the list and the dict."""

    def hold(self) -> None:
        self.state = [keras.Variable(0.0), keras.layers.Dense(1)]
        self.table = {"a": keras.layers.Dense(1)}

    def build(self, shape) -> None:
        self.state[1].build(shape)
        self.table["a"].build(shape)

    def call(self, x):
        return x + self.state[1](x) * self.state[0] + self.table["a"](x)


class Constants(Passes):
    """Values from the constructor of a layer, which training does not change."""

    def hold(self) -> None:
        self.state, self.names, self.table = np.arange(3), ["a", "b"], {"rate": 0.5}
        self.function = len


def model_of(layer: keras.layers.Layer) -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    return model


@pytest.mark.sample(12)
@pytest.mark.parametrize("callback", [kc.ModelCheckpoint, kc.BackupAndRestore])
@pytest.mark.parametrize(
    "make",
    [
        InAList, InADict, InAnObject, InAModule, InAnArray, InAMapping, InAPartial, InAFunction, ATable, ATableInAList,
        ASeedInAnObject, ANumber, AnArray, ANumberInAnObject, ANumberInAFunction, ALargeArray, NumbersInAList,
    ],
)  # fmt: skip
def test_state_that_no_checkpoint_has_is_named_once(tmp_path, make, callback) -> None:
    """The warning has the path of the attribute, and the user's line that calls `fit`."""
    model = model_of(make())

    with pytest.warns(UserWarning, match=r"do not have this state of it: [^ ]*/state") as caught:
        fit(model, callback(tmp_path / "1"), epochs=2)

    assert [each.filename for each in caught] == [models.__file__]
    fit(model, callback(tmp_path / "2"), epochs=2)


@pytest.mark.parametrize("make", [InATuple, KerassInAList, Constants, lambda: keras.layers.LSTM(3, name="passes")])
def test_a_model_whose_checkpoints_are_complete_gives_no_warning(tmp_path, make, recwarn) -> None:
    """Keras or TensorFlow tracks the state, or training does not change it."""
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
def test_plain_state_of_the_arguments_of_compile_is_named(tmp_path, options, place) -> None:
    """An optimizer, a loss or a metric of a user's class counts its calls."""
    made = {name: [make()] if name == "metrics" else make() for name, make in options.items()}
    for each in keras.tree.flatten(made):
        each.calls = 0
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(**{"optimizer": "sgd", "loss": "mse", **made}, run_eagerly=True)

    with pytest.warns(UserWarning, match=f"do not have this state of it: {place}"):
        fit(model, kc.ModelCheckpoint(tmp_path))


class WithVariable:
    """Counts its calls in a variable."""

    def note(self) -> None:
        if not hasattr(self, "seen"):
            self.seen = tf.Variable(0.0)
        self.seen.assign_add(1.0)


class AnOptimizer(WithVariable, keras.optimizers.SGD):
    def apply(self, *arguments, **named):
        self.note()
        return super().apply(*arguments, **named)


class AMetric(WithVariable, keras.metrics.Mean):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.note()
        return super().update_state(y_pred)


class ASchedule(WithVariable, keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        self.note()
        return 0.1


class ARegularizer(WithVariable, keras.Regularizer):
    def __call__(self, x):
        self.note()
        return 0.0 * keras.ops.sum(x)


class AConstraint(WithVariable, keras.constraints.Constraint):
    def __call__(self, x):
        self.note()
        return x


class AnActivation(WithVariable):
    def __call__(self, x):
        self.note()
        return x


def in_a_function():
    variable = tf.Variable(0.0)
    return lambda x: x + variable


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"optimizer": AnOptimizer()}, "optimizer/seen"),
        ({"optimizer": lambda: keras.optimizers.SGD(ASchedule())}, "optimizer/_learning_rate/seen"),
        ({"metrics": [AMetric(name="own")]}, "metrics/own/seen"),
        ({"kernel_regularizer": ARegularizer()}, "own/kernel_regularizer/seen"),
        ({"kernel_constraint": AConstraint()}, "own/kernel_constraint/seen"),
        ({"activation": AnActivation()}, "own/activation/seen"),
        ({"activation": in_a_function()}, "own/activation/variable"),
    ],
    ids=["optimizer", "schedule", "metric", "regularizer", "constraint", "activation", "function"],
)
@pytest.mark.filterwarnings("ignore:keras_ckpt.load_model", "ignore:The object being serialized includes a `lambda`")
def test_variables_in_a_users_objects_are_named(tmp_path, options, place) -> None:
    """Keras tracks no variable in an object that an optimizer, a metric or a layer holds."""
    given = {name: each() if callable(each) and name == "optimizer" else each for name, each in options.items()}
    of_compile = {"optimizer": "sgd", "loss": "mse", "run_eagerly": True}
    of_compile |= {name: given.pop(name) for name in ("optimizer", "metrics") if name in given}
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="own", **given)])
    model.compile(**of_compile)

    with pytest.warns(UserWarning, match=f"do not have this state of it: [^ ]*{place}"):
        fit(model, kc.ModelCheckpoint(tmp_path))


def test_an_attribute_that_changes_when_an_epoch_ends_is_named(tmp_path) -> None:
    """The first save of the second epoch, after the change, warns."""
    model = dense_model()
    model.counter = 0

    class Counts(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            self.model.counter += 1

    with pytest.warns(UserWarning, match="do not have this state of it: counter"):
        fit(model, kc.ModelCheckpoint(tmp_path), Counts(), epochs=3)


class Trains(keras.Model):
    """Has an optimizer in an untracked object."""

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
