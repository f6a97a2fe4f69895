"""Trainings of many kinds: models, custom training steps, optimizers and data sources. All are small and eager."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import keras_ckpt as kc

generator = np.random.default_rng(0)
X = generator.normal(size=(24, 4)).astype("float32")
Y = (X @ generator.normal(size=(4, 2))).astype("float32")
BATCH, STEPS, EPOCHS = 6, 4, 2
dense = keras.layers.Dense


class Diffusion(keras.Model):
    """Trains a network, and updates a moving average of it, as keras.io's DDIM does."""

    def __init__(self) -> None:
        super().__init__()
        self.network = keras.Sequential([keras.Input((4,)), dense(3), keras.layers.Dropout(0.2), dense(2)], name="net")
        self.ema_network = keras.models.clone_model(self.network)
        self.noise_loss_tracker = keras.metrics.Mean(name="n_loss")

    def call(self, x, training=None):
        return self.ema_network(x, training=training)

    @property
    def metrics(self):
        return [self.noise_loss_tracker]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self.network(x + tf.random.normal(tf.shape(x)), training=True) - y) ** 2)
        weights = self.network.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        for weight, average in zip(self.network.weights, self.ema_network.weights, strict=True):
            average.assign(0.9 * average + 0.1 * weight)
        self.noise_loss_tracker.update_state(loss)
        return {"n_loss": self.noise_loss_tracker.result()}


class Adversarial(keras.Model):
    """Two networks with an optimizer each.

    Args:
        place: How the model holds its optimizers.
    """

    def __init__(self, place: str = "attributes") -> None:
        super().__init__()
        self.generator = keras.Sequential([keras.Input((2,)), dense(4)], name="generator")
        self.discriminator = keras.Sequential([keras.Input((4,)), dense(3, "relu"), dense(1)], name="discriminator")
        self.seeds = keras.random.SeedGenerator(5)
        self.place = place

    def compile(self, **options) -> None:
        super().compile(**options)
        first, second = keras.optimizers.Adam(0.01), keras.optimizers.RMSprop(0.01)
        if self.place == "attributes":
            self.d_optimizer, self.g_optimizer = first, second
        elif self.place == "dict":
            self.optimizers = {"discriminator": first, "generator": second}
        elif self.place == "nested":
            self.optimizers = {"all": [{"one": first}, (second,)]}
        elif self.place == "deque":
            self.optimizers = collections.deque([first, second])
        else:
            self.optimizers = [first, second]

    def pair(self) -> tuple[Any, Any]:
        if self.place == "attributes":
            return self.d_optimizer, self.g_optimizer
        if self.place == "dict":
            return self.optimizers["discriminator"], self.optimizers["generator"]
        if self.place == "nested":
            return self.optimizers["all"][0]["one"], self.optimizers["all"][1][0]
        return tuple(self.optimizers)

    def call(self, x):
        return self.discriminator(x)

    def train_step(self, data):
        x, _ = data
        d_optimizer, g_optimizer = self.pair()
        noise = keras.random.normal((keras.ops.shape(x)[0], 2), seed=self.seeds)
        with tf.GradientTape() as tape:
            fake = self.discriminator(self.generator(noise))
            loss = keras.ops.mean(fake) - keras.ops.mean(self.discriminator(x))
        weights = self.discriminator.trainable_weights
        d_optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        with tf.GradientTape() as tape:
            g_loss = -keras.ops.mean(self.discriminator(self.generator(noise)))
        weights = self.generator.trainable_weights
        g_optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights, strict=True))
        return {"loss": loss, "g_loss": g_loss}


class Distiller(keras.Model):
    """Trains a student network to follow an untrained teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = keras.Sequential([keras.Input((4,)), dense(5, "relu"), dense(2)], name="teacher")
        self.student = keras.Sequential([keras.Input((4,)), dense(2)], name="student")

    def call(self, x):
        return self.student(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean((self.teacher(x, training=False) - y_pred) ** 2) + keras.ops.mean((y - y_pred) ** 2)


class Momentum(keras.Model):
    """Contrasts an encoder with its momentum encoder, over a queue of earlier keys."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = keras.Sequential([keras.Input((4,)), dense(3)], name="encoder")
        self.m_encoder = keras.models.clone_model(self.encoder)
        self.m_encoder.trainable = False
        self.m_encoder.set_weights(self.encoder.get_weights())
        self.queue = self.add_weight(shape=(8, 3), initializer="random_normal", trainable=False, name="queue")

    def call(self, x):
        return self.encoder(x)

    def train_step(self, data):
        x, _ = data
        keys = self.m_encoder(x)
        with tf.GradientTape() as tape:
            query = self.encoder(x)
            loss = keras.ops.mean((query - keys) ** 2) + keras.ops.mean(
                keras.ops.matmul(query, tf.transpose(self.queue)) ** 2
            )
        self.optimizer.apply(tape.gradient(loss, self.encoder.trainable_weights), self.encoder.trainable_weights)
        for mine, other in zip(self.encoder.weights, self.m_encoder.weights, strict=True):
            other.assign(0.99 * other + 0.01 * mine)
        self.queue.assign(keras.ops.concatenate([self.queue[BATCH:], keys], axis=0))
        return {"loss": loss}


class Part(keras.Model):
    """Trains one of two layers, and builds the optimizer for this layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.target = dense(2), dense(2)

    def build(self, shape) -> None:
        self.net.build(shape)
        self.target.build(shape)

    def call(self, x):
        return self.net(x) + self.target(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self(x) - y) ** 2)
        weights = self.net.trainable_variables
        if not self.optimizer.built:
            self.optimizer.build(weights)
        self.optimizer.apply(tape.gradient(loss, weights))
        return {"loss": loss}


class Lookahead(keras.optimizers.Optimizer):
    """An optimizer that runs another optimizer, which it holds in an attribute."""

    def __init__(self, base: Any, **options: Any) -> None:
        super().__init__(learning_rate=0.1, **options)
        self.base = base

    def build(self, variables) -> None:
        super().build(variables)
        self.base.build(variables)

    def apply(self, gradients, variables=None) -> None:
        if not self.built:
            self.build(variables)
        self.iterations.assign_add(1)
        self.base.apply(gradients, variables)

    def get_config(self):
        return {**super().get_config(), "base": keras.saving.serialize_keras_object(self.base)}


class Alternating(keras.Model):
    """Trains one layer in even steps and another layer in odd steps, each with an optimizer from the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = dense(3), dense(2)
        self.turns = [keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.Adam(0.01)]
        self.turn = self.add_weight(shape=(), dtype="int64", initializer="zeros", trainable=False, name="turn")

    def build(self, shape) -> None:
        self.first.build(shape)
        self.second.build((None, 3))

    def call(self, x):
        return self.second(self.first(x))

    def train_step(self, data):
        x, y = data
        number = int(self.turn) % 2
        weights = (self.first, self.second)[number].trainable_variables
        with tf.GradientTape() as tape:
            loss = keras.ops.mean((self(x) - y) ** 2)
        self.turns[number].apply(tape.gradient(loss, weights), weights)
        self.turn.assign_add(1)
        return {"loss": loss}


class OwnLoss(keras.losses.Loss):
    """A loss that is divided by a moving average of its earlier values."""

    def __init__(self) -> None:
        super().__init__(name="own")
        self.seen = keras.Variable(1.0, trainable=False, name="seen")

    def call(self, y_true, y_pred):
        loss = keras.ops.mean((y_true - y_pred) ** 2, axis=-1)
        self.seen.assign(0.9 * self.seen + 0.1 * keras.ops.mean(loss))
        return loss / self.seen


class Penalty(keras.layers.Layer):
    """A layer that adds a loss, counts its calls, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = keras.random.SeedGenerator(7)
        self.count = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="count")

    def call(self, x, training=False):
        self.add_loss(0.01 * keras.ops.mean(x**2))
        if training:
            self.count.assign_add(1)
            x = x + 0.1 * keras.random.normal(keras.ops.shape(x), seed=self.seeds)
        return x


def network(*between: keras.layers.Layer) -> keras.Model:
    """Two dense layers with other layers between them."""
    return keras.Sequential([keras.Input((4,)), dense(6, "relu", name="first"), *between, dense(2, name="head")])


def compiled(model: keras.Model, optimizer: Any = "adam", loss: Any = "mse", **options: Any) -> keras.Model:
    model.compile(optimizer=optimizer, loss=loss, run_eagerly=True, **options)
    return model


def adversarial(place: str) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        model = Adversarial(place)
        model.compile(run_eagerly=True)
        return model

    return make


def called(model: keras.Model) -> keras.Model:
    model(X[:1])
    return model


def frozen() -> keras.Model:
    model = network()
    model.get_layer("first").trainable = False
    return compiled(model)


def lora() -> keras.Model:
    model = network()
    model.get_layer("first").enable_lora(2)
    return compiled(model)


def mixed(optimizer: Any) -> keras.Model:
    inputs = keras.Input((4,))
    hidden = dense(6, "relu", dtype="mixed_float16")(inputs)
    return compiled(keras.Model(inputs, dense(2, dtype="float32")(hidden)), optimizer)


def rate_schedule() -> Any:
    return keras.optimizers.schedules.CosineDecay(0.1, 10)


MODELS: dict[str, Callable[[], keras.Model]] = {
    "dropout and batch normalization": lambda: compiled(
        network(keras.layers.BatchNormalization(), keras.layers.Dropout(0.5), keras.layers.GaussianNoise(0.1))
    ),
    "a frozen layer": frozen,
    "lora": lora,
    "mixed precision": lambda: mixed(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(), initial_scale=16)),
    "a loss with state": lambda: compiled(network(), loss=OwnLoss()),
    "a layer that adds a loss": lambda: compiled(network(Penalty())),
    "metrics": lambda: compiled(network(), metrics=["mae", keras.metrics.R2Score()], weighted_metrics=["mse"]),
    "spectral normalization": lambda: compiled(network(keras.layers.SpectralNormalization(dense(3)))),
    "an average of the weights": lambda: compiled(
        network(), keras.optimizers.AdamW(0.05, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2)
    ),
    "accumulated gradients": lambda: compiled(network(), keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)),
    "a schedule": lambda: compiled(network(), keras.optimizers.Adam(rate_schedule(), clipnorm=1.0)),
    "diffusion": lambda: compiled(called(Diffusion())),
    "a model that was never called as a whole": lambda: compiled(Diffusion()),
    "distillation": lambda: compiled(called(Distiller())),
    "a momentum encoder": lambda: compiled(called(Momentum()), keras.optimizers.SGD(0.1, momentum=0.9)),
    "a momentum encoder, average of the weights": lambda: compiled(
        called(Momentum()), keras.optimizers.Adam(0.1, use_ema=True)
    ),
    "a part by apply(grads)": lambda: compiled(called(Part())),
    "alternating optimizers": lambda: compiled(called(Alternating()), "sgd"),
    "an optimizer that runs another": lambda: compiled(network(), Lookahead(keras.optimizers.Adam(0.1))),
    "adversarial": adversarial("attributes"),
    "adversarial, a deque of optimizers": adversarial("deque"),
    "adversarial, a dict of optimizers": adversarial("dict"),
    "adversarial, a list of optimizers": adversarial("list"),
    "adversarial, nested optimizers": adversarial("nested"),
}  # fmt: skip


class Batches(keras.utils.PyDataset):
    """A PyDataset that shuffles its batches after each epoch with its own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.order = np.arange(STEPS)
        self.generator = np.random.default_rng(3)

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index):
        rows = slice(self.order[index] * BATCH, (self.order[index] + 1) * BATCH)
        return X[rows], Y[rows]

    def on_epoch_end(self) -> None:
        self.generator.shuffle(self.order)


def batches():
    for number in itertools.count():
        rows = slice(number % STEPS * BATCH, (number % STEPS + 1) * BATCH)
        yield X[rows] + number, Y[rows]


def tensors() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, Y))


SOURCES: dict[str, Callable[[], dict[str, Any]]] = {
    "arrays": lambda: {"x": X, "y": Y, "batch_size": BATCH},
    "arrays in order": lambda: {"x": X, "y": Y, "batch_size": BATCH, "shuffle": False},
    "arrays with validation": lambda: {"x": X, "y": Y, "batch_size": BATCH, "validation_split": 0.25},
    "arrays with weights": lambda: {"x": X, "y": Y, "batch_size": BATCH, "sample_weight": np.linspace(0, 1, 24)},
    "a pipeline": lambda: {"x": tensors().batch(BATCH)},
    "a pipeline that shuffles": lambda: {"x": tensors().shuffle(24).batch(BATCH)},
    "a pipeline that shuffles by a seed": lambda: {"x": tensors().shuffle(24, seed=3).batch(BATCH)},
    "a pipeline that shuffles once": lambda: {"x": tensors().shuffle(24, reshuffle_each_iteration=False).batch(BATCH)},
    "a cached pipeline": lambda: {"x": tensors().shuffle(24).cache().shuffle(24).batch(BATCH).prefetch(2)},
    "a random pipeline": lambda: {"x": tensors().map(lambda x, y: (x + tf.random.normal((4,)), y)).batch(BATCH)},
    "a repeated pipeline": lambda: {"x": tensors().shuffle(24).repeat().batch(BATCH), "steps_per_epoch": 3},
    "a generator": lambda: {"x": batches(), "steps_per_epoch": STEPS},
    "a PyDataset": lambda: {"x": Batches()},
    "a PyDataset, shuffled": lambda: {"x": Batches(), "shuffle": True},
}


def wrapped() -> dict[str, Any]:
    """Data that resumes in the middle of an epoch."""
    return {"x": kc.ResumableDataset(X, Y, batch_size=BATCH, shuffle=True, seed=1)}


def optimizer_options() -> dict[str, Callable[[], Any]]:
    """Optimizers with settings that change a step, by the name of the setting."""
    kinds = keras.optimizers
    return {
        "clipvalue": lambda: kinds.SGD(0.1, clipvalue=0.01),
        "global_clipnorm": lambda: kinds.SGD(0.1, global_clipnorm=0.01),
        "weight_decay": lambda: kinds.SGD(0.1, weight_decay=0.1),
        "use_ema": lambda: kinds.SGD(0.1, use_ema=True),
        "ema_overwrite_frequency": lambda: kinds.SGD(0.1, use_ema=True, ema_overwrite_frequency=1),
        "gradient_accumulation_steps": lambda: kinds.Adam(0.1, gradient_accumulation_steps=5),
        "loss_scale_factor": lambda: kinds.Adam(0.1, loss_scale_factor=4.0),
        "amsgrad": lambda: kinds.Adam(0.1, amsgrad=True),
    }
