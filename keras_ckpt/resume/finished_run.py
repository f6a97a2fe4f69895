"""The end of a run whose backup is removed: noted in its last checkpoint, so that the same script trains nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import keras
import msgspec

from keras_ckpt.errors import CheckpointError, MismatchError
from keras_ckpt.formats.variables import load_variables
from keras_ckpt.model.naming import named_variables
from keras_ckpt.model.position import Position, position_of
from keras_ckpt.model.restoring import restore
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.writer import Writer
from keras_ckpt.training.model_checkpoint import ModelCheckpoint


def note_end(model: keras.Model, checkpoints: Iterable[ModelCheckpoint], epochs: int) -> None:
    """Notes the end of a run in the newest checkpoint of each directory, if the checkpoint has the model as it is.

    Args:
        model: The model at the end of `fit`.
        checkpoints: The callbacks that have saved the run.
        epochs: The number of epochs that `fit` was asked for.
    """

    def finished(record: CheckpointRecord) -> CheckpointRecord:
        return msgspec.structs.replace(record, finished=epochs)

    for each in checkpoints:
        try:
            newest = each.directory.latest()
            if newest is not None and _is_at(newest, position_of(model)) and _has(newest, model):
                Writer(CheckpointDirectory(newest.directory)).amend(newest, finished)
        except CheckpointError as error:
            warn(f"The end of the run is not noted in {each.directory.path}: {error}")


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
    for each in checkpoints:
        newest = each.directory.latest() if each.new_run == "refuse" else None
        if newest is not None and newest.finished is not None and newest.finished >= epochs:
            # The callback refuses another model, and names the ways out.
            with contextlib.suppress(MismatchError):
                restore(model, newest)
                return newest
    return None


def _is_at(record: CheckpointRecord, position: Position | None) -> bool:
    return position is not None and (record.run_id, record.step) == (position.run_id, position.step)


def _has(record: CheckpointRecord, model: keras.Model) -> bool:
    """Whether a checkpoint has the weights of a model. EarlyStopping, for one, may have changed them since."""
    saved = load_variables(record)
    variables = named_variables(model, weights_only=True)
    return all(name in saved and saved[name].tobytes() == each.numpy().tobytes() for name, each in variables.items())
