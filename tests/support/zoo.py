"""Every stateful layer of Keras, every optimizer and every metric, each in a small model."""

from __future__ import annotations

import inspect
import pathlib
import pickle
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

import keras_ckpt as kc
from support.frameworks import tf

layers = keras.layers
WORDS = np.array([["a b"], ["b c d"], ["a a e"], ["c d e f"]])
LETTERS = np.array([["a"], ["b"], ["c"], ["a"]])
NUMBERS = np.array([[3], [5], [3], [9]])
VECTORS = np.random.default_rng(0).normal(5, 3, (4, 6)).astype("float32")
SERIES = np.random.default_rng(0).normal(size=(4, 8, 6)).astype("float32")
IMAGES = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 3)).astype("float32")
VOLUMES = np.random.default_rng(0).normal(size=(4, 4, 4, 4, 3)).astype("float32")
FRAMES = np.random.default_rng(0).normal(size=(4, 3, 5, 5, 2)).astype("float32")
ROWS = np.random.default_rng(0).normal(size=(4, 3, 5, 2)).astype("float32")
CUBES = np.random.default_rng(0).normal(size=(4, 2, 3, 3, 3, 2)).astype("float32")


class Specimen(NamedTuple):
    """A layer, the data of its call, and the data to adapt it to."""

    make: Callable[[], Any]
    x: np.ndarray
    calls: Callable[[Any, Any], Any] = lambda layer, x: layer(x)


class Twice(layers.Layer):
    """Calls a layer with its input as the query, the key and the value."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def call(self, x, training=None):
        return self.layer([x, x], training=training) if "query" not in _arguments(self.layer) else self.layer(x, x)


def _arguments(layer: Any) -> set[str]:
    return set(inspect.signature(type(layer).call).parameters)


LAYERS: dict[str, Specimen] = {
    "AdditiveAttention": Specimen(lambda: Twice(layers.AdditiveAttention(dropout=0.3)), SERIES),
    "AlphaDropout": Specimen(lambda: layers.AlphaDropout(0.4), VECTORS),
    "Attention": Specimen(lambda: Twice(layers.Attention(use_scale=True, dropout=0.3)), SERIES),
    "AugMix": Specimen(lambda: layers.AugMix((0, 255)), IMAGES),
    "BatchNormalization": Specimen(layers.BatchNormalization, IMAGES),
    "BatchNormalization renormalized": Specimen(lambda: layers.BatchNormalization(renorm=True), VECTORS),
    "Bidirectional": Specimen(lambda: layers.Bidirectional(layers.LSTM(3)), SERIES),
    "Conv1D": Specimen(lambda: layers.Conv1D(3, 2), SERIES),
    "Conv1DTranspose": Specimen(lambda: layers.Conv1DTranspose(3, 2), SERIES),
    "Conv2D": Specimen(lambda: layers.Conv2D(3, 2), IMAGES),
    "Conv2DTranspose": Specimen(lambda: layers.Conv2DTranspose(3, 2), IMAGES),
    "Conv3D": Specimen(lambda: layers.Conv3D(3, 2), VOLUMES),
    "Conv3DTranspose": Specimen(lambda: layers.Conv3DTranspose(3, 2), VOLUMES),
    "ConvLSTM1D": Specimen(lambda: layers.ConvLSTM1D(2, 2, dropout=0.2), ROWS),
    "ConvLSTM2D": Specimen(lambda: layers.ConvLSTM2D(2, 2), FRAMES),
    "ConvLSTM3D": Specimen(lambda: layers.ConvLSTM3D(2, 2), CUBES),
    "CutMix": Specimen(layers.CutMix, IMAGES, lambda layer, x: layer({"images": x, "labels": x[:, 0, 0]})["images"]),
    "Dense": Specimen(lambda: layers.Dense(3), VECTORS),
    "Dense low-rank": Specimen(lambda: layers.Dense(3, lora_rank=2), VECTORS),
    "DepthwiseConv1D": Specimen(lambda: layers.DepthwiseConv1D(2), SERIES),
    "DepthwiseConv2D": Specimen(lambda: layers.DepthwiseConv2D(2), IMAGES),
    "Discretization": Specimen(lambda: layers.Discretization(num_bins=4), VECTORS),
    "Discretization one-hot": Specimen(lambda: layers.Discretization(num_bins=4, output_mode="one_hot"), VECTORS),
    "Dropout": Specimen(lambda: layers.Dropout(0.4), VECTORS),
    "EinsumDense": Specimen(lambda: layers.EinsumDense("abc,cd->abd", (None, 3), bias_axes="d"), SERIES),
    "EinsumDense low-rank": Specimen(lambda: layers.EinsumDense("abc,cd->abd", (None, 3), lora_rank=2), SERIES),
    "Embedding": Specimen(lambda: layers.Embedding(10, 3), NUMBERS),
    "Embedding low-rank": Specimen(lambda: layers.Embedding(10, 3, lora_rank=2), NUMBERS),
    "GRU": Specimen(lambda: layers.GRU(3, dropout=0.2), SERIES),
    "GRUCell": Specimen(lambda: layers.RNN(layers.GRUCell(3)), SERIES),
    "GaussianDropout": Specimen(lambda: layers.GaussianDropout(0.4), VECTORS),
    "GaussianNoise": Specimen(lambda: layers.GaussianNoise(0.4), VECTORS),
    "GroupNormalization": Specimen(lambda: layers.GroupNormalization(3), IMAGES),
    "GroupedQueryAttention": Specimen(lambda: Twice(layers.GroupQueryAttention(2, 4, 2)), SERIES),
    "IntegerLookup": Specimen(layers.IntegerLookup, NUMBERS),
    "IntegerLookup weighed": Specimen(lambda: layers.IntegerLookup(output_mode="tf_idf"), NUMBERS),
    "LSTM": Specimen(lambda: layers.LSTM(3, recurrent_dropout=0.2), SERIES),
    "LSTM stateful": Specimen(lambda: layers.LSTM(3, stateful=True), SERIES),
    "LSTMCell": Specimen(lambda: layers.RNN(layers.LSTMCell(3)), SERIES),
    "LayerNormalization": Specimen(layers.LayerNormalization, VECTORS),
    "MixUp": Specimen(layers.MixUp, IMAGES, lambda layer, x: layer({"images": x, "labels": x[:, 0, 0]})["images"]),
    "MultiHeadAttention": Specimen(lambda: Twice(layers.MultiHeadAttention(2, 3, dropout=0.2)), SERIES),
    "Normalization": Specimen(layers.Normalization, VECTORS),
    "Normalization of all": Specimen(lambda: layers.Normalization(axis=None), VECTORS),
    "Normalization inverted": Specimen(lambda: layers.Normalization(invert=True), VECTORS),
    "PReLU": Specimen(layers.PReLU, VECTORS),
    "Pipeline": Specimen(lambda: layers.Pipeline([layers.RandomFlip(), layers.RandomContrast(0.5)]), IMAGES),
    "RMSNormalization": Specimen(layers.RMSNormalization, VECTORS),
    "RNN": Specimen(lambda: layers.RNN([layers.GRUCell(3), layers.SimpleRNNCell(2)]), SERIES),
    "RandAugment": Specimen(lambda: layers.RandAugment((0, 255)), IMAGES),
    "RandomBrightness": Specimen(lambda: layers.RandomBrightness(0.5), IMAGES),
    "RandomColorDegeneration": Specimen(lambda: layers.RandomColorDegeneration(0.5), IMAGES),
    "RandomColorJitter": Specimen(lambda: layers.RandomColorJitter((0, 255), 0.5, 0.5, 0.5, 0.5), IMAGES),
    "RandomContrast": Specimen(lambda: layers.RandomContrast(0.5), IMAGES),
    "RandomCrop": Specimen(lambda: layers.RandomCrop(4, 4), IMAGES),
    "RandomElasticTransform": Specimen(layers.RandomElasticTransform, IMAGES),
    "RandomErasing": Specimen(layers.RandomErasing, IMAGES),
    "RandomFlip": Specimen(layers.RandomFlip, IMAGES),
    "RandomGaussianBlur": Specimen(layers.RandomGaussianBlur, IMAGES),
    "RandomGrayscale": Specimen(lambda: layers.RandomGrayscale(0.5), IMAGES),
    "RandomHue": Specimen(lambda: layers.RandomHue(0.5, (0, 255)), IMAGES),
    "RandomInvert": Specimen(lambda: layers.RandomInvert(0.5, (0, 255)), IMAGES),
    "RandomPerspective": Specimen(layers.RandomPerspective, IMAGES),
    "RandomPosterization": Specimen(lambda: layers.RandomPosterization(4, (0, 255)), IMAGES),
    "RandomRotation": Specimen(lambda: layers.RandomRotation(0.5), IMAGES),
    "RandomSaturation": Specimen(lambda: layers.RandomSaturation(0.5, (0, 255)), IMAGES),
    "RandomSharpness": Specimen(lambda: layers.RandomSharpness(0.5, (0, 255)), IMAGES),
    "RandomShear": Specimen(lambda: layers.RandomShear(0.5), IMAGES),
    "RandomTranslation": Specimen(lambda: layers.RandomTranslation(0.3, 0.3), IMAGES),
    "RandomZoom": Specimen(lambda: layers.RandomZoom(0.5), IMAGES),
    "ReversibleEmbedding": Specimen(lambda: layers.ReversibleEmbedding(10, 3, tie_weights=False), NUMBERS),
    "SeparableConv1D": Specimen(lambda: layers.SeparableConv1D(3, 2), SERIES),
    "SeparableConv2D": Specimen(lambda: layers.SeparableConv2D(3, 2), IMAGES),
    "SimpleRNN": Specimen(lambda: layers.SimpleRNN(3), SERIES),
    "SimpleRNNCell": Specimen(lambda: layers.RNN(layers.SimpleRNNCell(3)), SERIES),
    "Solarization": Specimen(lambda: layers.Solarization(0.5, 0.5), IMAGES),
    "SpatialDropout1D": Specimen(lambda: layers.SpatialDropout1D(0.4), SERIES),
    "SpatialDropout2D": Specimen(lambda: layers.SpatialDropout2D(0.4), IMAGES),
    "SpatialDropout3D": Specimen(lambda: layers.SpatialDropout3D(0.4), VOLUMES),
    "SpectralNormalization": Specimen(lambda: layers.SpectralNormalization(layers.Dense(3)), VECTORS),
    "StackedRNNCells": Specimen(
        lambda: layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(2)])), SERIES
    ),
    "StringLookup": Specimen(layers.StringLookup, LETTERS),
    "StringLookup inverted": Specimen(lambda: layers.StringLookup(vocabulary=["b", "a"], invert=True), NUMBERS),
    "StringLookup weighed": Specimen(lambda: layers.StringLookup(output_mode="tf_idf"), LETTERS),
    "TextVectorization": Specimen(layers.TextVectorization, WORDS),
    "TextVectorization counting": Specimen(lambda: layers.TextVectorization(output_mode="count"), WORDS),
    "TextVectorization weighed": Specimen(lambda: layers.TextVectorization(output_mode="tf_idf"), WORDS),
    "TimeDistributed": Specimen(lambda: layers.TimeDistributed(layers.Dense(3)), SERIES),
}
"""Layers, by the name of their class in `keras.layers`, and a note on the variant."""

STATELESS = {
    "Activation", "ActivityRegularization", "AdaptiveAveragePooling1D", "AdaptiveAveragePooling2D",
    "AdaptiveAveragePooling3D", "AdaptiveMaxPooling1D", "AdaptiveMaxPooling2D", "AdaptiveMaxPooling3D", "Add",
    "AutoContrast", "Average", "AveragePooling1D", "AveragePooling2D", "AveragePooling3D", "CategoryEncoding",
    "CenterCrop", "Concatenate", "ContrastLimitedAdaptiveHistogramEqualization", "Cropping1D", "Cropping2D",
    "Cropping3D", "Dot", "ELU", "Equalization", "Flatten", "GlobalAveragePooling1D", "GlobalAveragePooling2D",
    "GlobalAveragePooling3D", "GlobalMaxPooling1D", "GlobalMaxPooling2D", "GlobalMaxPooling3D", "HashedCrossing",
    "Hashing", "Identity", "InputLayer", "Lambda", "LeakyReLU", "Masking", "MaxNumBoundingBoxes", "MaxPooling1D",
    "MaxPooling2D", "MaxPooling3D", "Maximum", "MelSpectrogram", "Minimum", "Multiply", "Permute", "ReLU",
    "RepeatVector", "Rescaling", "Reshape", "Resizing", "STFTSpectrogram", "Softmax", "Subtract", "UnitNormalization",
    "UpSampling1D", "UpSampling2D", "UpSampling3D", "ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D",
}  # fmt: skip
ABSTRACT = {"Layer", "Wrapper"}
OF_OTHER_FRAMEWORKS = {"FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"}

optimizers = keras.optimizers
OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "Adadelta": optimizers.Adadelta,
    "Adafactor": optimizers.Adafactor,
    "Adagrad": optimizers.Adagrad,
    "Adam": lambda: optimizers.Adam(amsgrad=True),
    "AdamW": lambda: optimizers.AdamW(use_ema=True, ema_momentum=0.9),
    "Adamax": optimizers.Adamax,
    "Ftrl": optimizers.Ftrl,
    "Lamb": optimizers.Lamb,
    "Lion": optimizers.Lion,
    "LossScaleOptimizer": lambda: optimizers.LossScaleOptimizer(optimizers.Adam()),
    "MultiOptimizer": lambda: optimizers.MultiOptimizer(
        optimizers.OptimizerMap(optimizers.SGD(momentum=0.9), {".*kernel": optimizers.Adam()})
    ),
    "Muon": lambda: optimizers.Muon(exclude_layers=["head"]),
    "Nadam": optimizers.Nadam,
    "RMSprop": lambda: optimizers.RMSprop(momentum=0.5, centered=True),
    "SGD": lambda: optimizers.SGD(momentum=0.9, nesterov=True),
    "SGD accumulating": lambda: optimizers.SGD(gradient_accumulation_steps=2),
    "ScheduleFreeAdamW": optimizers.ScheduleFreeAdamW,
    "Adam on a schedule": lambda: optimizers.Adam(optimizers.schedules.CosineDecay(0.1, 10)),
}
# Keras 3.14 has no MultiOptimizer.
OPTIMIZERS = {name: make for name, make in OPTIMIZERS.items() if hasattr(optimizers, name.split()[0])}

metrics = keras.metrics
THRESHOLDS = {"PrecisionAtRecall", "RecallAtPrecision", "SensitivityAtSpecificity", "SpecificityAtSensitivity"}
CLASSES = {"BinaryIoU", "IoU", "MeanIoU", "OneHotIoU", "OneHotMeanIoU"}


def metric_classes() -> dict[str, type]:
    """The metrics of Keras that `compile` takes."""
    found = _classes(metrics, metrics.Metric)
    return {name: kind for name, kind in found.items() if name not in ("Metric", "Mean", "Sum", "MeanMetricWrapper")}


def metric(name: str) -> Any:
    """A metric of Keras with an explicit name, because Keras numbers automatic names."""
    arguments: dict[str, Any] = {"name": "measured"}
    if name in THRESHOLDS:
        return metric_classes()[name](0.5, **arguments)
    if name in ("IoU", "OneHotIoU"):
        arguments |= {"num_classes": 2, "target_class_ids": [0]}
    if name in ("MeanIoU", "OneHotMeanIoU"):
        arguments |= {"num_classes": 2}
    return metric_classes()[name](**arguments)


def layer_classes() -> dict[str, type]:
    """The classes of `keras.layers`, each under one name."""
    return _classes(layers, keras.Layer)


def optimizer_classes() -> dict[str, type]:
    """The classes of `keras.optimizers`."""
    return _classes(optimizers, optimizers.Optimizer)


def _classes(module: Any, base: type) -> dict[str, type]:
    found = {each.__name__: each for _, each in inspect.getmembers(module, inspect.isclass) if issubclass(each, base)}
    return dict(sorted(found.items()))


def model_of(name: str) -> keras.Model:
    """A model of a layer, newly built and not adapted."""
    specimen = LAYERS[name]
    x = specimen.x
    inputs = keras.Input(batch_shape=x.shape, dtype="string" if x.dtype.kind == "U" else x.dtype.name)
    model = keras.Model(inputs, specimen.calls(specimen.make(), inputs))
    model.compile("sgd")
    return model


def outputs_of(name: str, model: keras.Model) -> list[np.ndarray]:
    """The outputs of a model: first of a prediction, then of training, which draws random numbers."""
    x = tf.constant(LAYERS[name].x)
    random.seed(1)  # AugMix draws from Python's generator too
    return [np.asarray(model(x, training=training)) for training in (False, True)]


def trained(name: str) -> keras.Model:
    """A model of a layer with distinct values, adapted if the layer is adaptable."""
    model = model_of(name)
    for layer in model.layers:
        if hasattr(layer, "adapt") and getattr(layer, "input_vocabulary", None) is None:
            layer.adapt(tf.constant(LAYERS[name].x))
    generator = np.random.default_rng(1)
    adapted = {id(each) for layer in model.layers if hasattr(layer, "adapt") for each in layer.variables}
    for variable in model.weights:
        if id(variable) not in adapted:
            variable.assign(abs(generator.normal(size=variable.shape)) + 0.1)
    outputs_of(name, model)  # changes the state that training changes
    return model


def small(optimizer: Any = "sgd", **compiled: Any) -> keras.Model:
    """A model of two dense layers, which trains eagerly."""
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, activation="sigmoid", name="hidden")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, activation="softmax", name="head")(hidden))
    model.compile(**{"optimizer": optimizer, "loss": "mse", "run_eagerly": True, **compiled})
    return model


X = np.random.default_rng(2).normal(size=(12, 4)).astype("float32")
Y = keras.utils.to_categorical(np.arange(12) % 2, 2)


def measured(name: str) -> keras.Model:
    """A model compiled with a metric."""
    sparse = {"loss": "sparse_categorical_crossentropy"} if name.startswith("Sparse") else {}
    return small(metrics=[metric(name)], **sparse)


def train(model: keras.Model, *callbacks: Any, epochs: int = 1) -> dict[str, list[float]]:
    """Trains a model for epochs of three batches."""
    y = Y.argmax(1) if model.loss == "sparse_categorical_crossentropy" else Y
    options = {"batch_size": 4, "epochs": epochs, "shuffle": False, "verbose": 0}
    return model.fit(X, y, callbacks=list(callbacks), **options).history


def results(model: keras.Model) -> Any:
    """The results of all metrics of a model."""
    return keras.tree.map_structure(np.asarray, dict(model.get_metrics_result()))


def save(model: keras.Model, path: pathlib.Path) -> None:
    """Saves an untrained model, as a user's training loop does."""
    checkpoint = kc.ModelCheckpoint(path)
    checkpoint.set_model(model)
    checkpoint.on_train_begin()
    checkpoint.on_epoch_end(0, {})
    checkpoint.on_train_end()


def main(path: pathlib.Path) -> None:
    """Makes, trains and saves each model in its own directory, and writes its outputs."""
    keras.utils.set_random_seed(1)
    found: dict[str, Any] = {}
    for name in LAYERS:
        model = trained(name)
        save(model, path / "layers" / name)
        found[f"layer {name}"] = outputs_of(name, model)
    for name, make in OPTIMIZERS.items():
        model = small(make())
        variables: list[list[np.ndarray]] = []
        look = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs, model=model, variables=variables: variables.append(
                [each.numpy() for each in model.optimizer.variables]
            )
        )
        losses = train(model, kc.ModelCheckpoint(path / "optimizers" / name), look, epochs=2)["loss"]
        found[f"optimizer {name}"] = variables[0], losses[1], model.predict(X, verbose=0)
    for name in metric_classes():
        model = measured(name)
        train(model, kc.ModelCheckpoint(path / "metrics" / name))
        found[f"metric {name}"] = results(model)
    with open(path / "found.pickle", "wb") as file:
        pickle.dump(found, file)
