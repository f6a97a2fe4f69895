"""Checkpoints of `tf.train.Checkpoint` in the patterns that programs use, restored into a model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc

layers = keras.layers


class Block(layers.Layer):
    """A layer with layers in attributes."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.norm, self.first, self.second = layers.BatchNormalization(), layers.Dense(3), layers.Dense(3)

    def build(self, shape) -> None:
        for layer in (self.norm, self.first, self.second):
            layer.build((None, 3))

    def call(self, x, training=None):
        return self.second(self.first(self.norm(x, training=training)))


class Subclassed(keras.Model):
    """A model that is built by a call."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.first, self.norm, self.head = layers.Dense(3), layers.BatchNormalization(), layers.Dense(2)

    def call(self, x, training=None):
        return self.head(self.norm(self.first(x), training=training))


def sequential(*between: layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((4,)), layers.Dense(3), *between, layers.Dense(2)])


def functional() -> keras.Model:
    inputs = keras.Input((4,))
    hidden = layers.LayerNormalization()(layers.Dense(3)(inputs))
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.BatchNormalization()], name="inner")
    return keras.Model(inputs, layers.Dense(2)(inner(hidden)))


def subclassed() -> keras.Model:
    model = Subclassed()
    model(np.zeros((1, 4), "float32"))
    return model


MODELS = {
    "plain": sequential,
    "batch normalization": lambda: sequential(layers.BatchNormalization()),
    "group normalization": lambda: sequential(layers.Dense(4), layers.GroupNormalization(2)),
    "a layer of layers": lambda: sequential(Block()),
    "functional": functional,
    "subclassed": subclassed,
    "embedding": lambda: keras.Sequential([keras.Input((3,)), layers.Embedding(9, 4), layers.LSTM(3), layers.Dense(2)]),
}


class Module(tf.Module):
    """A user's module that holds a model."""

    def __init__(self, model) -> None:
        super().__init__()
        self.inside = {"model": [model]}


ROOTS = {
    "model": lambda model, optimizer, step: {"model": model},
    "net": lambda model, optimizer, step: {"net": model},
    "the root itself": lambda model, optimizer, step: {"root": model},
    "beside optimizer and step": lambda model, optimizer, step: {"model": model, "optimizer": optimizer, "step": step},
    "beside the optimizer": lambda model, optimizer, step: {"optimizer": optimizer, "net": model},
    "beside an iterator": lambda model, optimizer, step: {"step": step, "net": model, "iterator": iterator()},
    "beside another model": lambda model, optimizer, step: {"teacher": other(), "student": model},
    "beside a larger model": lambda model, optimizer, step: {"a": other(layers.Dense(2)), "b": model},
    "beside its average": lambda model, optimizer, step: {"average": keras.models.clone_model(model), "model": model},
    "in a checkpoint": lambda model, optimizer, step: {"models": tf.train.Checkpoint(a=model), "step": step},
    "in a module": lambda model, optimizer, step: {"module": Module(model)},
}


def iterator():
    return iter(tf.data.Dataset.range(9))


def other(*more: layers.Layer) -> keras.Model:
    return keras.Sequential([keras.Input((7,)), layers.Dense(5), *more])


def compiled(model: keras.Model, is_compiled: bool) -> keras.Model:
    if is_compiled:
        model.compile("adam", "mse")
    return model


def filled(model: keras.Model, optimizer) -> None:
    """Gives all variables distinct values."""
    optimizer.build(model.trainable_variables)
    for number, variable in enumerate([*model.weights, *optimizer.variables]):
        if variable.dtype != "uint32":
            variable.assign(keras.ops.full(variable.shape, number + 1, variable.dtype))


def weights(model: keras.Model) -> list[np.ndarray]:
    """The weights of a model, without the states of random generators."""
    return [each.numpy() for each in model.weights if "seed" not in each.path]


@pytest.mark.sample(50)
@pytest.mark.parametrize("is_compiled", [True, False], ids=["compiled", "not compiled"])
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("name", MODELS)
def test_restore_finds_the_model_at_any_place(tmp_path, name, root, is_compiled) -> None:
    """All weights are restored. The rest of the checkpoint is not a difference."""
    saved, optimizer = MODELS[name](), keras.optimizers.Adam()
    filled(saved, optimizer)
    parts = ROOTS[root](saved, optimizer, tf.Variable(1))
    prefix = tf.train.Checkpoint(**parts).save(str(tmp_path / "ckpt"))
    model = compiled(MODELS[name](), is_compiled)

    report = kc.restore(model, prefix)

    np.testing.assert_equal(weights(model), weights(saved))
    assert report.mismatched == {}
    assert not [each for each in report.missing if each.startswith("model/") and "seed" not in each]
    if is_compiled and "optimizer" in parts:
        np.testing.assert_equal(
            [each.numpy() for each in model.optimizer.variables], [each.numpy() for each in optimizer.variables]
        )


@pytest.mark.parametrize("inner", [keras.optimizers.Adam, lambda: keras.optimizers.SGD(momentum=0.9)])
@pytest.mark.parametrize("root", ["model", "beside"])
def test_restore_finds_a_loss_scale_optimizer_and_its_inner_optimizer(tmp_path, inner, root) -> None:
    """`compile` makes a `LossScaleOptimizer` for mixed precision."""
    models = [sequential(), sequential()]
    for model in models:
        model.compile(keras.optimizers.LossScaleOptimizer(inner()), "mse")
    saved, restored = models
    saved.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=2, verbose=0)
    parts = {"model": saved} | ({"optimizer": saved.optimizer} if root == "beside" else {})
    prefix = tf.train.Checkpoint(**parts).save(str(tmp_path / "ckpt"))

    report = kc.restore(restored, prefix)

    assert report.mismatched == {}
    for one, other in zip(saved.optimizer.variables, restored.optimizer.variables, strict=True):
        np.testing.assert_array_equal(other, one)


@pytest.mark.parametrize("name", MODELS)
def test_restore_finds_the_model_in_a_checkpoint_of_a_manager(tmp_path, name) -> None:
    """The checkpoint has the form that TensorFlow's documentation saves."""
    saved, optimizer = MODELS[name](), keras.optimizers.Adam()
    filled(saved, optimizer)
    root = tf.train.Checkpoint(step=tf.Variable(1), optimizer=optimizer, net=saved, iterator=iterator())
    kc.CheckpointManager(root, tmp_path, max_to_keep=3).save(metrics={"loss": 1.0})
    model = compiled(MODELS[name](), True)

    kc.restore(model, tmp_path)

    np.testing.assert_equal(weights(model), weights(saved))
    assert model.optimizer.built


@pytest.mark.parametrize("root", ROOTS)
def test_restore_without_strict_finds_a_part_of_the_model_at_any_place(tmp_path, root) -> None:
    """The model has a layer more than the checkpoint: all others are restored, and the warning names the layer."""
    saved, optimizer = sequential(layers.BatchNormalization()), keras.optimizers.Adam()
    filled(saved, optimizer)
    prefix = tf.train.Checkpoint(**ROOTS[root](saved, optimizer, tf.Variable(1))).save(str(tmp_path / "ckpt"))

    def larger() -> keras.Model:
        inputs = keras.Input((4,))
        outputs = saved_like(inputs)
        return keras.Model(inputs, layers.Dense(5, name="new")(outputs))

    def saved_like(x):
        for layer in (layers.Dense(3), layers.BatchNormalization(), layers.Dense(2)):
            x = layer(x)
        return x

    ours = larger()
    with pytest.warns(UserWarning, match=r"Left as they were: .*new"):
        kc.restore(ours, prefix, strict=False)

    for mine, original in zip(ours.weights[:8], saved.weights, strict=True):
        np.testing.assert_array_equal(mine, original)


@pytest.mark.parametrize(
    "make", [lambda: keras.Sequential([keras.Input((7,)), layers.Dense(5)]), lambda: sequential(layers.Dense(9))]
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, make) -> None:
    """Nothing is restored."""
    prefix = tf.train.Checkpoint(model=sequential()).save(str(tmp_path / "ckpt"))
    model = make()
    before = weights(model)

    with pytest.raises(kc.MismatchError):
        kc.restore(model, prefix)
    np.testing.assert_equal(weights(model), before)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_with_several_models_that_fit_is_refused(tmp_path, strict) -> None:
    """A generator and its average have the same layers. The error names both, and its advice works."""
    first, second = sequential(), sequential()
    filled(second, keras.optimizers.SGD())
    prefix = tf.train.Checkpoint(generator=first, average=second).save(str(tmp_path / "ckpt"))
    model = sequential()
    before = weights(model)

    with pytest.raises(kc.MismatchError, match=r"fits several objects .*: average, generator\. .*Checkpoint\(average="):
        kc.restore(model, prefix, strict=strict)

    np.testing.assert_equal(weights(model), before)
    tf.train.Checkpoint(average=model).restore(prefix).expect_partial()
    np.testing.assert_equal(weights(model), weights(second))
