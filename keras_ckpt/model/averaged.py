"""The mean of checkpoints as the source of a restore, and the statistics of batch normalization counted again."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_ckpt.formats import arrays
from keras_ckpt.formats.averaging import Mean, refuse_other_weights, title_of
from keras_ckpt.formats.damage import damage_of
from keras_ckpt.model import learned, naming
from keras_ckpt.model.backends import backend
from keras_ckpt.model.comparison import RestoreRequest
from keras_ckpt.model.keras_internals import layers_of
from keras_ckpt.model.matching import Kind
from keras_ckpt.model.parts import is_built
from keras_ckpt.model.position import set_position
from keras_ckpt.model.report import RestoreReport
from keras_ckpt.model.source import Source
from keras_ckpt.model.transfer import UndoAssignment, open_source, transfer_from
from keras_ckpt.store.files import Folder
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.record import CheckpointRecord

Opened = Callable[[Mapping[str, Any]], Source]
"""Opens the source of a checkpoint, given the objects of the model by name."""


def average_in(model: keras.Model, checkpoints: Sequence[Any], data: Any) -> RestoreReport:
    """Assigns the mean of checkpoints to a model, or leaves the model as it was.

    Args:
        model: A built model.
        checkpoints: The checkpoints, the newest last.
        data: Batches of inputs to count the statistics of batch normalization, `None` to average them.

    Raises:
        MismatchError: The checkpoints differ in their weights, or do not fit the model.
        DamagedCheckpointError, CheckpointNotFoundError: A checkpoint cannot be read.
        TypeError, ValueError: The target is no built model, or the data does not fit it.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"average(into=...) expected a Keras model or a path. Received: {model!r:.200}")
    if not is_built(model):
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no weights. Call it on a batch of data first."
        )
    weights = UndoAssignment(model, naming.named_variables(model, weights_only=True))
    layers = learned.Undo(learned.learners(naming.named_objects(model), True).values())
    request = RestoreRequest(weights_only=True)
    with contextlib.ExitStack() as keep_open:
        openers = [read_checkpoint(each, functools.partial(_opener, model), keep_open) for each in checkpoints]
        fit = transfer_from(model, lambda objects: Averaged([each(objects) for each in openers]), None, request)
    try:
        if data is not None:
            count_statistics(model, data)
    except BaseException:
        weights.undo()
        layers.undo()
        raise
    set_position(model, None)
    return fit.report


def _opener(model: keras.Model, files: Folder, name: str, record: CheckpointRecord | None) -> Opened:
    """A function that opens a checkpoint: the objects of the model are known later."""

    def opened(objects: Mapping[str, Any]) -> Source:
        with damage_of(os.path.join(files.path, name)):
            return open_source(model, objects, files, name, record, check_digests=True)

    return opened


class Averaged:
    """The mean of open checkpoints, as the protocol `Source` describes it. All but floats are of the newest.

    Args:
        sources: The checkpoints, the newest last.

    Raises:
        MismatchError: The weights of a checkpoint have other names, shapes or types than the newest's.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._newest = newest = sources[-1]
        self.prefix = title_of([each.prefix for each in sources])
        self.description, self.arrays, self.assets = newest.description, newest.arrays, newest.assets
        self.unfit, self.lacking = newest.unfit, newest.lacking
        refuse_other_weights({each.prefix: _without_seeds(_weights(each.kinds())) for each in sources})

    @property
    def origin(self) -> str:
        return self._newest.origin

    @property
    def lacks_seeds(self) -> bool:
        return self._newest.lacks_seeds

    def kinds(self) -> Mapping[str, Kind]:
        return self._newest.kinds()

    def build_optimizers(self, model: keras.Model, wanted: Mapping[str, Any]) -> None:
        self._newest.build_optimizers(model, wanted)

    def read(self, names: Sequence[str]) -> dict[str, backend.Tensor]:
        """Reads the checkpoints one after another: the memory has the sums and the values of one."""
        weights = [*_weights(dict.fromkeys(names))]
        means: dict[str, Mean] = {}
        values: dict[str, backend.Tensor] = {}
        for source in self._sources:
            with damage_of(source.prefix):
                values = source.read(names if source is self._newest else weights)
            for name in weights:
                array = backend.array_of(values[name])
                if name in means:
                    means[name].add(array)
                elif arrays.is_floating(array.dtype):
                    means[name] = Mean(array)
        return values | {name: backend.tensor_of(mean.value()) for name, mean in means.items()}


def _weights(names: Mapping[str, Any]) -> dict[str, Any]:
    """The items whose names are those of a model's own variables."""
    return {name: each for name, each in names.items() if name.startswith("model/")}


def _without_seeds(names: Mapping[str, Any]) -> dict[str, Any]:
    """The items that are no seeds, which a checkpoint of TensorFlow lacks."""
    return {name: each for name, each in names.items() if not name.endswith(naming.SEED)}


def count_statistics(model: keras.Model, data: Any) -> None:
    """Counts the statistics of each batch normalization that trains again, as means over batches.

    Nothing else changes, not even the seeds that a call in training draws from. A layer that the model calls in
    inference keeps its statistics.

    Args:
        model: A built model.
        data: Batches of inputs, as `model.evaluate` takes them.

    Raises:
        ValueError: The data has no batch, or does not fit the model.
    """
    layers = [each for each in layers_of(model) if isinstance(each, keras.layers.BatchNormalization) and each.trainable]
    if not layers:
        return
    weights = UndoAssignment(model, naming.named_variables(model, weights_only=True))
    momenta, counter = [each.momentum for each in layers], _Counter(layers)
    try:
        for layer in layers:
            # A NaN would survive a momentum of 0. A variance that stays negative tells that no batch reached its layer.
            layer.moving_mean.assign(keras.ops.zeros(layer.moving_mean.shape))
            layer.moving_variance.assign(-keras.ops.ones(layer.moving_variance.shape))
        _InTraining(model).evaluate(data, verbose=0, callbacks=[counter], return_dict=True)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    if not counter.batches:
        raise ValueError("average(data=...) expected at least one batch. Received none.")
    counted = [layer for layer in layers if not keras.ops.any(layer.moving_variance < 0)]
    weights.undo(but=[each for layer in counted for each in (layer.moving_mean, layer.moving_variance)])


class _Counter(keras.callbacks.Callback):
    """Gives each batch the same weight in the statistics: the momentum of batch k is 1 - 1/k."""

    def __init__(self, layers: Sequence[keras.layers.BatchNormalization]) -> None:
        super().__init__()
        self._layers = layers
        self.batches = 0

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        for layer in self._layers:
            layer.momentum = 1 - 1 / (self.batches + 1)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1


class _InTraining(keras.Model):
    """A model that calls another as in training, for `evaluate`, which takes data of every kind."""

    def __init__(self, model: keras.Model) -> None:
        super().__init__()
        self._in_training = functools.partial(model, training=True)
        self.built = True
        self.compile(run_eagerly=True)  # a traced function would keep the first momentum

    def test_step(self, *arguments: Any) -> Any:
        *state, data = arguments  # the state of a model, which has no variables, is given and returned on JAX alone
        self._in_training(keras.utils.unpack_x_y_sample_weight(data)[0])
        logs = {"loss": keras.ops.zeros(())}  # evaluate expects a metric
        return (logs, *state) if state else logs
