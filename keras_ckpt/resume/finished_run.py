"""The end of a run: noted in its last checkpoint, or in its backup, so that the same script trains nothing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterable

import keras
import msgspec

from keras_ckpt.errors import CheckpointError, CheckpointNotFoundError, MismatchError
from keras_ckpt.formats.variables import load_variables
from keras_ckpt.model.naming import named_variables
from keras_ckpt.model.position import position_of
from keras_ckpt.model.restoring import restore
from keras_ckpt.resume.backed_up_fit import errors_as_warnings
from keras_ckpt.resume.fit_state import ENDED
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord, RunEnd
from keras_ckpt.store.writer import Writer
from keras_ckpt.training.model_checkpoint import ModelCheckpoint


def note_end(model: keras.Model, checkpoints: Iterable[ModelCheckpoint], epochs: int) -> bool:
    """Notes the end of a run in the newest checkpoint of each directory that has the weights of the model.

    Args:
        model: The model at the end of `fit`.
        checkpoints: The callbacks that have saved the run.
        epochs: The number of epochs that `fit` was asked for.

    Returns:
        Whether a directory has the end.
    """
    position = position_of(model)
    run_id = position.run_id if position else None
    is_noted = False
    for directory in _directories(checkpoints):
        try:
            records = [record for record in directory.listing().records if record.run_id == run_id]
            ends = (record for record in reversed(records) if _has(record, model))
            if (end := next(ends, None)) is not None:
                noted = functools.partial(_ended, epochs, end.step)
                is_noted = Writer(directory).amend(records[-1], noted) is not None or is_noted
        except CheckpointError as error:
            warn(f"The end of the run is not noted in {directory.path}: {error}")
    return is_noted


def note_end_in_backup(backup: CheckpointDirectory, checkpoints: Iterable[ModelCheckpoint], epochs: int) -> bool:
    """Notes the end of a run in its backup, if a callback has checkpoints of the run.

    Args:
        backup: The directory of the backup, which has the end of the run.
        checkpoints: The callbacks that have saved the run.
        epochs: The number of epochs that `fit` was asked for.

    Returns:
        Whether a callback has, so that the backup must stay.
    """
    newest = backup.latest()
    if newest is None or not _have_saved(checkpoints, newest.run_id):
        return False
    with errors_as_warnings():  # without the note, the next start has nothing to train either, and notes the end
        Writer(backup).amend(newest, functools.partial(_ended, epochs, newest.step))
    return True


def is_of_another_run(
    backup: CheckpointRecord, model: keras.Model, checkpoints: Collection[ModelCheckpoint], ended: int
) -> bool:
    """Whether the backup of a finished run is not for this `fit`, which trains another run.

    It is of another fit of the script, the model is in a run already, a new run is asked for, or the checkpoints of the
    finished run are gone.

    Args:
        backup: The backup with the end of the run.
        model: The model when `fit` begins.
        checkpoints: The callbacks that would save the fit.
        ended: The number of fits with this backup that have ended in the process.
    """
    if backup.metadata[ENDED] != ended:
        return True
    for each in checkpoints:
        each.adopt_run()
    return _is_in_run(model) or not _have_saved(checkpoints, backup.run_id)


def restore_end(model: keras.Model, checkpoints: Iterable[ModelCheckpoint], epochs: int) -> CheckpointRecord | None:
    """Restores the end of a finished run into a new model, if `fit` is asked for no more epochs than that run.

    Args:
        model: The model when `fit` begins.
        checkpoints: The callbacks that would save the fit.
        epochs: The number of epochs that `fit` is asked for.

    Returns:
        The record of the restored checkpoint, `None` if there is something to train.
    """
    if _is_in_run(model):
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


def _ended(epochs: int, step: int, record: CheckpointRecord) -> CheckpointRecord:
    return msgspec.structs.replace(record, end=RunEnd(epochs, step))


def _is_in_run(model: keras.Model) -> bool:
    """Whether a model has steps of a run, trained in this process or restored."""
    position = position_of(model)
    return position is not None and position.step > 0


def _have_saved(checkpoints: Iterable[ModelCheckpoint], run_id: str) -> bool:
    """Whether a callback that begins no further run has a checkpoint of a run on disk."""
    listings = (each.directory.listing() for each in checkpoints if each.new_run == "refuse")
    return any(record.run_id == run_id for listing in listings for record in listing.all_runs)


def _directories(checkpoints: Iterable[ModelCheckpoint]) -> list[CheckpointDirectory]:
    """The directories of checkpoints. A file of Keras rarely has the end, so the backup has it."""
    found = [each.directory for each in checkpoints if not each.directory.series.template]
    return [CheckpointDirectory(each.path, each.series) for each in found]


def _has(record: CheckpointRecord, model: keras.Model) -> bool:
    """Whether a checkpoint has the weights of a model. Seeds do not count: EarlyStopping restores weights alone."""
    saved = load_variables(record)
    seeds = {id(variable) for variable in model.variables} - {id(variable) for variable in model.weights}
    weights = {name: each for name, each in named_variables(model, weights_only=True).items() if id(each) not in seeds}
    return all(name in saved and saved[name].tobytes() == each.numpy().tobytes() for name, each in weights.items())
