"""The backup of a killed training, read by the process that continues it."""

from __future__ import annotations

from typing import Any

import keras

from keras_ckpt.formats import arrays
from keras_ckpt.formats.bundle_index import read_index
from keras_ckpt.formats.bundle_reader import read_values
from keras_ckpt.model.checkpoint_reader import what_fails_is_damaged
from keras_ckpt.model.model_state import TRAINING_KEY
from keras_ckpt.model.report import RestoreReport
from keras_ckpt.model.restoring import restore_and_read
from keras_ckpt.model.transfer import Request
from keras_ckpt.resume.plain_values import decode
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder


def restore_backup(
    model: keras.Model, directory: CheckpointDirectory, again: bool = False
) -> tuple[RestoreReport, Any]:
    """Restores a backup of `BackupAndRestore` into a model.

    Args:
        model: A built model.
        directory: The directory of the backup.
        again: Whether it was restored just before, so that all warnings were given.

    Returns:
        The report, and what the backup holds beside the model; `None` if it is of a version that held no more.
    """
    return restore_and_read(model, directory, Request(backup=directory.path, again=again), _document)


def _document(files: Folder, name: str) -> Any:
    with what_fails_is_damaged():
        index = read_index(files, name)
        text, prefix = TRAINING_KEY.encode(), f"{TRAINING_KEY}/".encode()
        if text not in index.entries:
            return None
        keys = [key for key in index.entries if key.startswith(prefix)]
        values = read_values(files, index, [text, *keys], arrays.empty)
        return decode(values[text].item().decode(), {int(key.removeprefix(prefix)): values[key] for key in keys})
