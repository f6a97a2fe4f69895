"""Names of variables on disk: they read like the model, and are the same in every process."""

import keras
import numpy as np
import pytest

from keras_ckpt.formats import config, description, graph
from keras_ckpt.model.model_state import NAMES_KEY, SUFFIX
from keras_ckpt.model.naming import named_variables
from support.frameworks import needs_tensorflow, tf
from support.models import X, dense_model, fit, save


def convolutional() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(2, 3),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(4),
            keras.layers.Dense(4),
        ]
    )
    model.compile("adam", "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)
    return model


def functional() -> keras.Model:
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(4)(inputs)
    hidden = keras.Sequential([keras.layers.Dense(4), keras.layers.Dense(4)])(hidden)
    hidden = keras.layers.Dropout(0.5)(hidden)
    outputs = keras.layers.Dense(4)(hidden)
    return keras.Model(inputs, outputs)


class Block(keras.layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.first = keras.layers.Dense(4)
        self.second = keras.layers.Dense(4)

    def build(self, shape) -> None:
        self.first.build(shape)
        self.second.build(shape)

    def call(self, x):
        return self.second(self.first(x))


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.first = Block()
        self.second = Block()
        self.scale = keras.Variable(1.0)
        self.steps = tf.Variable(0.0)
        self.both = keras.layers.Bidirectional(keras.layers.LSTM(2))

    def call(self, x):
        x = self.second(self.first(x))
        return x * self.scale + keras.ops.sum(self.both(x[:, :, None]))


def subclassed() -> keras.Model:
    model = Subclassed()
    model(X[:1])
    return model


def named() -> keras.Model:
    """A model with a user's names, which stay unchanged."""
    inputs = keras.Input((4,), name="image")
    hidden = keras.layers.Dense(4, name="encoder")(inputs)
    return keras.Model(inputs, keras.layers.Dense(4, name="head")(hidden), name="net")


def two_of_one_path() -> keras.Model:
    """Two inner models whose layers have the same name."""
    inputs = keras.Input((4,))
    inner = []
    for _ in range(2):
        values = keras.Input((4,))
        inner.append(keras.Model(values, keras.layers.Dense(4, name="same")(values)))
    model = keras.Model(inputs, inner[1](inner[0](inputs)))
    model.compile(keras.optimizers.SGD(momentum=0.9), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def towers(frozen: int) -> keras.Model:
    """Two inner models whose layers have the same name; one model is frozen."""
    inputs = values = keras.Input((4,))
    for number in range(2):
        inner = keras.Input((4,))
        tower = keras.Model(inner, keras.layers.Dense(4, name="same")(inner), name=f"tower{number}")
        tower.trainable = number != frozen
        values = tower(values)
    model = keras.Model(inputs, values)
    model.compile(keras.optimizers.SGD(momentum=0.9), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def mixed() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), keras.layers.Dense(2)])
    model.layers[0].trainable = False
    # Keras 3.14 names it "adamw" itself.
    inner = keras.optimizers.AdamW(use_ema=True, gradient_accumulation_steps=2, name="adam_w")
    model.compile(keras.optimizers.LossScaleOptimizer(inner), "mse")
    model.optimizer.build(model.trainable_variables)
    return model


MODELS = {
    convolutional: """
        model/conv2d/kernel model/conv2d/bias model/batch_normalization/gamma model/batch_normalization/beta
        model/batch_normalization/moving_mean model/batch_normalization/moving_variance
        model/seed_generator/seed_generator_state
        model/dense/kernel model/dense/bias model/dense_1/kernel model/dense_1/bias
        optimizer/iteration optimizer/learning_rate
        optimizer/conv2d/kernel/momentum optimizer/conv2d/kernel/velocity
        optimizer/conv2d/bias/momentum optimizer/conv2d/bias/velocity
        optimizer/batch_normalization/gamma/momentum optimizer/batch_normalization/gamma/velocity
        optimizer/batch_normalization/beta/momentum optimizer/batch_normalization/beta/velocity
        optimizer/dense/kernel/momentum optimizer/dense/kernel/velocity
        optimizer/dense/bias/momentum optimizer/dense/bias/velocity
        optimizer/dense_1/kernel/momentum optimizer/dense_1/kernel/velocity
        optimizer/dense_1/bias/momentum optimizer/dense_1/bias/velocity
        metrics/loss/total metrics/loss/count""",
    functional: """
        model/dense/kernel model/dense/bias model/sequential/dense/kernel model/sequential/dense/bias
        model/sequential/dense_1/kernel model/sequential/dense_1/bias
        model/dense_1/kernel model/dense_1/bias model/seed_generator/seed_generator_state""",
    subclassed: """
        model/variable
        model/block/dense/kernel model/block/dense/bias model/block/dense_1/kernel model/block/dense_1/bias
        model/block_1/dense/kernel model/block_1/dense/bias model/block_1/dense_1/kernel model/block_1/dense_1/bias
        model/bidirectional/forward_lstm/lstm_cell/kernel model/bidirectional/forward_lstm/lstm_cell/recurrent_kernel
        model/bidirectional/forward_lstm/lstm_cell/bias
        model/bidirectional/backward_lstm/lstm_cell/kernel model/bidirectional/backward_lstm/lstm_cell/recurrent_kernel
        model/bidirectional/backward_lstm/lstm_cell/bias
        model/seed_generator/seed_generator_state model/seed_generator_1/seed_generator_state
        model/steps""",
    named: "model/encoder/kernel model/encoder/bias model/head/kernel model/head/bias",
    two_of_one_path: """
        model/same/kernel model/same/bias model/same/kernel~2 model/same/bias~2
        optimizer/iteration optimizer/learning_rate
        optimizer/same/kernel/momentum optimizer/same/bias/momentum
        optimizer/same/kernel~2/momentum optimizer/same/bias~2/momentum
        metrics/loss/total metrics/loss/count""",
    mixed: """
        model/dense/kernel model/dense/bias model/dense_1/kernel model/dense_1/bias
        optimizer/iteration optimizer/learning_rate optimizer/step_counter optimizer/dynamic_scale
        optimizer/adam_w/iteration optimizer/adam_w/learning_rate
        optimizer/adam_w/dense_1/kernel/average optimizer/adam_w/dense_1/bias/average
        optimizer/adam_w/dense_1/kernel/gradient_accumulator optimizer/adam_w/dense_1/bias/gradient_accumulator
        optimizer/adam_w/dense_1/kernel/momentum optimizer/adam_w/dense_1/kernel/velocity
        optimizer/adam_w/dense_1/bias/momentum optimizer/adam_w/dense_1/bias/velocity
        metrics/loss/total metrics/loss/count""",
}


@pytest.mark.parametrize("build", MODELS)
def test_names_read_like_the_model(build) -> None:
    """Names omit the model's and the optimizer's own names. A slot's name follows its variable's."""
    keras.backend.clear_session()

    assert sorted(named_variables(build())) == sorted(MODELS[build].split())


@pytest.mark.parametrize("build", MODELS)
def test_names_are_the_same_in_a_notebooks_third_try(build) -> None:
    """Keras's counters do not matter: nine more layers take the numbers from one digit to two."""
    keras.backend.clear_session()
    first = {name: variable.shape for name, variable in named_variables(build()).items()}
    for _ in range(9):
        keras.layers.Dense(1), keras.layers.Dropout(0.1), keras.optimizers.AdamW()

    assert {name: variable.shape for name, variable in named_variables(build()).items()} == first


def test_names_do_not_depend_on_the_order_in_which_layers_were_made() -> None:
    """The model's order decides: a layer that a notebook cell made again keeps its place."""

    def build(backbone, head) -> keras.Model:
        inputs = keras.Input((4,))
        return keras.Model(inputs, head(backbone(inputs)))

    backbone, head = keras.layers.Dense(4), keras.layers.Dense(4)
    model = build(backbone, head)
    again = keras.layers.Dense(4)
    remade = build(again, keras.layers.Dense.from_config(head.get_config()))

    for one, layers in ((model, (backbone, head)), (remade, (again, remade.layers[-1]))):
        of = named_variables(one)
        assert of["model/dense/kernel"] is layers[0].kernel
        assert of["model/dense_1/kernel"] is layers[1].kernel


def test_names_do_not_depend_on_how_a_model_was_built() -> None:
    """Models are built at once, by shape, by a call, by a fit, as a copy, or from JSON."""

    def layers() -> list[keras.layers.Layer]:
        return [keras.layers.Dense(3), keras.layers.Dropout(0.5), keras.layers.Dense(1)]

    at_once = keras.Sequential([keras.Input((4,)), *layers()])
    by_shape, by_call, by_fit = (keras.Sequential(layers()) for _ in range(3))
    by_shape.build((None, 4))
    by_call(X[:1])
    by_fit.compile("sgd", "mse", run_eagerly=True)
    fit(by_fit)
    copy, from_json = keras.models.clone_model(at_once), keras.models.model_from_json(at_once.to_json())

    expected = set(named_variables(at_once))
    for model in (by_shape, by_call, by_fit, copy, from_json):
        assert set(named_variables(model, weights_only=True)) == expected


@pytest.mark.parametrize(("frozen", "trained"), [(0, "same/kernel~2"), (1, "same/kernel")])
def test_a_slot_has_the_name_of_its_own_variable(frozen, trained) -> None:
    """If two variables share a path, the slot has the name of the trained one."""
    model = towers(frozen)
    named = named_variables(model)
    kernel, slot = model.trainable_variables[0], model.optimizer.variables[2]

    assert kernel is named[f"model/{trained}"]
    assert slot is named[f"optimizer/{trained}/momentum"]


def test_a_name_that_ends_in_a_number_of_duplicates_stays_unique() -> None:
    """No variable is lost if a user's name is `weight~2`."""

    class Marked(keras.layers.Layer):
        def build(self, shape) -> None:
            self.weights_of_it = [self.add_weight(name=name) for name in ("weight", "weight~2")]

        def call(self, x):
            return x * sum(self.weights_of_it)

    inputs = values = keras.Input((4,))
    for _ in range(2):
        inner = keras.Input((4,))
        values = keras.Model(inner, Marked(name="same")(inner))(values)

    assert len(named_variables(keras.Model(inputs, values))) == 4


@needs_tensorflow
def test_names_do_not_depend_on_an_earlier_error() -> None:
    """A call that TensorFlow refuses leaves its scope open in Keras, which prefixes every later path."""
    models = [dense_model()]
    fit(models[0])
    broken = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="a space")])
    broken.compile("sgd", "mse")
    try:
        with pytest.raises(ValueError, match="a space"):
            fit(broken)
        models.append(dense_model())
        fit(models[1])

        path = models[1].variables[0].path
        assert path.startswith(f"{broken.name}/{models[1].name}/")
        assert set(named_variables(models[1])) == set(named_variables(models[0]))
    finally:
        keras.backend.clear_session()


def test_names_do_not_depend_on_how_the_optimizer_was_built() -> None:
    """A fit or the user builds the optimizer, in the scope of another optimizer or not."""
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        models = [dense_model(name=name, optimizer=keras.optimizers.Adam()) for name in ("a", "b")]
        fit(models[0])
        models[1].optimizer.build(models[1].trainable_variables)
    finally:
        keras.mixed_precision.set_dtype_policy("float32")

    first, second = (set(named_variables(model)) for model in models)
    assert first == second
    assert "optimizer/adam/dense/kernel/momentum" in first


@pytest.mark.parametrize(
    "optimizer", ["SGD", "RMSprop", "Adagrad", "Adadelta", "Adafactor", "Nadam", "Ftrl", "Lion", "Lamb", "Muon"]
)
def test_every_variable_has_a_unique_name(optimizer) -> None:
    """Slots of every kind of optimizer have names too."""
    model = dense_model(optimizer=getattr(keras.optimizers, optimizer)())
    fit(model)

    variables = named_variables(model).values()

    everything = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    assert {id(variable) for variable in variables} == {id(variable) for variable in everything}


@pytest.mark.parametrize("optimizer", ["Nadam", "Adafactor", "Muon"])
def test_unnamed_variables_of_an_optimizer_have_the_same_names_in_each_process(optimizer) -> None:
    """Keras numbers unnamed variables across the whole process."""
    first, second = (dense_model(optimizer=getattr(keras.optimizers, optimizer)()) for _ in range(2))
    for model in (first, second):
        fit(model)

    assert set(named_variables(first)) == set(named_variables(second))


def test_the_file_is_a_plain_tensorflow_checkpoint_with_these_names(tmp_path) -> None:
    """`tf.train.list_variables` shows the names, and the values are the model's."""
    model = convolutional()

    prefix = save(model, tmp_path).prefix

    on_disk = dict(tf.train.list_variables(prefix))
    extra = {graph.KEY, config.KEY, description.KEY, NAMES_KEY, f"save_counter{SUFFIX}"}
    assert on_disk.keys() - extra == {f"{name}{SUFFIX}" for name in named_variables(model)}
    for name, variable in named_variables(model).items():
        assert np.array_equal(tf.train.load_variable(prefix, name + SUFFIX), variable.numpy())


@pytest.mark.parametrize("build", [convolutional, functional, subclassed, named, two_of_one_path, mixed])
@pytest.mark.parametrize("method", ["read", "restore"])
def test_tensorflow_restores_every_weight_and_slot(tmp_path, build, method) -> None:
    """`tf.train.Checkpoint` restores them by its object graph, into a model that was built again."""
    model, other = build(), build()
    for index, variable in enumerate(model.weights):
        variable.assign(keras.ops.full(variable.shape, index + 1))
    prefix = save(model, tmp_path).prefix

    status = getattr(tf.train.Checkpoint(model=other), method)(prefix)

    status.assert_existing_objects_matched()
    for mine, theirs in zip(model.weights, other.weights, strict=True):
        assert np.array_equal(mine.numpy(), theirs.numpy())
    if model.compiled:
        for mine, theirs in zip(model.optimizer.variables, other.optimizer.variables, strict=True):
            assert np.array_equal(mine.numpy(), theirs.numpy())


def test_tensorflow_restores_layers_that_are_built_later(tmp_path) -> None:
    """TensorFlow's deferred restoration works."""
    model = dense_model()
    fit(model)
    prefix = save(model, tmp_path).prefix
    other = keras.Sequential([keras.layers.Dense(3), keras.layers.Dropout(0.5), keras.layers.Dense(1)])

    tf.train.Checkpoint(model=other).restore(prefix).expect_partial()
    other.build((None, 4))

    for mine, theirs in zip(model.weights, other.weights, strict=True):
        assert np.array_equal(mine.numpy(), theirs.numpy())


def test_layers_in_a_list_have_names_though_tensorflow_does_not_track_them() -> None:
    """TensorFlow's object graph lacks the layers that Keras 3 holds in a list."""

    class Listed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [keras.layers.Dense(4), keras.layers.Dense(4)]

        def call(self, x):
            return self.blocks[1](self.blocks[0](x))

    model = Listed()
    model(X[:1])

    assert sorted(named_variables(model)) == [
        "model/dense/bias",
        "model/dense/kernel",
        "model/dense_1/bias",
        "model/dense_1/kernel",
    ]
    assert not any("dense" in type(each).__name__.lower() for each in tf.train.TrackableView(model).descendants())


def test_keys_of_optimizers_may_have_slashes() -> None:
    """`{"x/y": ...}` is not `{"x": {"y": ...}}`."""
    model = dense_model()
    model.others = {"x/y": keras.optimizers.SGD(), "x": {"y": keras.optimizers.Adam()}}
    model.others["x/y"].build(model.trainable_variables)
    model.others["x"]["y"].build(model.trainable_variables)

    names = [*named_variables(model)]

    assert "optimizer/others/x|y/learning_rate" in names
    assert "optimizer/others/x/y/learning_rate" in names
