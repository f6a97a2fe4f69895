"""The end of a run whose backup is removed: noted in its last checkpoint, so that the same script trains nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable

import keras
import msgspec

from keras_ckpt.errors import CheckpointError, CheckpointNotFoundError, MismatchError
from keras_ckpt.formats.variables import load_variables
from keras_ckpt.model.naming import named_variables
from keras_ckpt.model.position import position_of
from keras_ckpt.model.restoring import restore
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord, RunEnd
from keras_ckpt.store.writer import Writer
from keras_ckpt.training.model_checkpoint import ModelCheckpoint


def note_end(model: keras.Model, checkpoints: Iterable[ModelCheckpoint], epochs: int) -> None:
    """Notes the end of a run in the newest checkpoint of each directory that has the weights of the model.

    Args:
        model: The model at the end of `fit`.
        checkpoints: The callbacks that have saved the run.
        epochs: The number of epochs that `fit` was asked for.
    """
    position = position_of(model)
    run_id = position.run_id if position else None
    for directory in _directories(checkpoints):
        try:
            records = [record for record in directory.listing().records if record.run_id == run_id]
            ends = (record for record in reversed(records) if _has(record, model))
            if (end := next(ends, None)) is not None:
                noted = functools.partial(msgspec.structs.replace, end=RunEnd(epochs, end.step))
                Writer(directory).amend(records[-1], noted)
        except CheckpointError as error:
            warn(f"The end of the run is not noted in {directory.path}: {error}")


def restore_end(model: keras.Model, checkpoints: Iterable[ModelCheckpoint], epochs: int) -> CheckpointRecord | None:
    """Restores the end of a finished run into a new model, if `fit` is asked for no more epochs than that run.

    Args:
        model: The model when `fit` begins.
        checkpoints: The callbacks that would save the fit.
        epochs: The number of epochs that `fit` is asked for.

    Returns:
        The record of the restored checkpoint, `None` if there is something to train.
    """
    position = position_of(model)
    if position is not None and position.step:
        return None
    for directory in _directories(each for each in checkpoints if each.new_run == "refuse"):
        newest = directory.latest()
        if newest is not None and newest.end is not None and newest.end.epochs >= epochs:
            # The callback refuses a run whose end is pruned, or does not fit the model, and names the ways out.
            with contextlib.suppress(CheckpointNotFoundError, MismatchError):
                end = directory[newest.end.step]
                restore(model, end)
                return end
    return None


def _directories(checkpoints: Iterable[ModelCheckpoint]) -> list[CheckpointDirectory]:
    """The directories of checkpoints. A new run replaces files of Keras without a refusal, as in Keras."""
    found = [each.directory for each in checkpoints if not each.directory.series.template]
    return [CheckpointDirectory(each.path, each.series) for each in found]


def _has(record: CheckpointRecord, model: keras.Model) -> bool:
    """Whether a checkpoint has the weights of a model. Seeds do not count: EarlyStopping restores weights alone."""
    saved = load_variables(record)
    seeds = {id(variable) for variable in model.variables} - {id(variable) for variable in model.weights}
    weights = {name: each for name, each in named_variables(model, weights_only=True).items() if id(each) not in seeds}
    return all(name in saved and saved[name].tobytes() == each.numpy().tobytes() for name, each in weights.items())
