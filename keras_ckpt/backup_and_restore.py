"""`BackupAndRestore`: Keras's, so that the same script, run again after a crash, goes on."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from typing import Any

import keras

from keras_ckpt import files
from keras_ckpt.directory import CheckpointDirectory
from keras_ckpt.errors import DirectoryNotEmptyError, PlanError
from keras_ckpt.policies import LatestN
from keras_ckpt.record import CheckpointRecord
from keras_ckpt.restoring import restore
from keras_ckpt.schedule import SaveFreq, SaveSchedule
from keras_ckpt.session import OnFullDisk, Session, checked_on_full_disk
from keras_ckpt.writer import Writer

Logs = Mapping[str, Any] | None

_INITIAL_EPOCH = "initial_epoch"
"""In the metadata of a backup: the epoch of `fit` to begin with."""


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Backs a training up, so that the same script, run again after a crash, goes on where it was.

    At the beginning of `fit` the model is restored from the backup, if there is one, and training begins with the
    epoch that was under way. After `fit` the backup is removed; nothing else in the directory is.

    Example:

    ```python
    backup = keras_ckpt.BackupAndRestore("runs/digits/backup", save_freq=50)
    model.fit(x, y, epochs=30, callbacks=[backup])
    ```

    Args:
        backup_dir: The directory of the backup.
        save_freq: As in `ModelCheckpoint`.
        double_checkpoint: Whether to keep the two last backups instead of one.
        delete_checkpoint: Whether to remove the backup at the end of `fit`.
        on_full_disk: As in `ModelCheckpoint`.

    Raises:
        ValueError, TypeError: A wrong argument, or a model that is not built.
        MismatchError: The backup does not fit the model.
        DirectoryInUseError: Before the first batch: another process trains with this backup.
        SaveError: The backup could not be saved. The one before is untouched.
    """

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: SaveFreq | list[SaveFreq] = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        *,
        on_full_disk: OnFullDisk = "warn",
    ) -> None:
        keras.callbacks.Callback.__init__(self)
        self.directory = CheckpointDirectory(backup_dir)
        self.backup_dir = self.directory.path
        self.save_freq = save_freq
        self.double_checkpoint = double_checkpoint
        self.delete_checkpoint = delete_checkpoint
        self.on_full_disk = checked_on_full_disk(on_full_disk)
        self._schedule = SaveSchedule(save_freq)
        self._session: Session | None = None
        self._epoch = 0

    def on_train_begin(self, logs: Logs = None) -> None:
        self._session = None
        if not self.model.built:
            raise ValueError(
                f"BackupAndRestore needs a built model, or it could not restore {self.model.name!r} after a crash. "
                "Build it before fit(): model.build(input_shape), or call it on a batch of data."
            )
        _refuse_what_is_no_backup(self.directory)
        if os.path.isdir(self.backup_dir):
            # A backup that was complete when its process died is one.
            Writer(self.directory).open()
        if self.directory.listing():
            step = restore(self.model, self.directory).step
            _begin_with(self.model, self.directory[step].metadata[_INITIAL_EPOCH] if step is not None else None)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        # fit has read it; left there, it would hold for the next fit too.
        _begin_with(self.model, None)
        self._epoch = epoch
        if self._session is None and not len(self.directory):
            # A crash before the first save is due must not leave another callback's checkpoints without their run.
            optimizer = self.model.optimizer
            if optimizer is not None and not optimizer.built:
                optimizer.build(self.model.trainable_variables)
            self._save("begin", time.perf_counter(), epoch)
        self._current()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        began = time.perf_counter()
        if reason := self._current().batch_end(batch):
            self._save(reason, began, self._epoch)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        began = time.perf_counter()
        if reason := self._current().epoch_end():
            self._save(reason, began, epoch + 1)

    def on_train_end(self, logs: Logs = None) -> None:
        _begin_with(self.model, None)
        if self._session is not None:
            self._session.close()
            self._session = None
        if self.delete_checkpoint:
            try:
                self.directory.clear()
                files.remove_unused(self.backup_dir)
            except PlanError as error:
                warnings.warn(f"The backup stays: {error}", stacklevel=2)

    def _save(self, reason: str, began: float, initial_epoch: int) -> None:
        self._current().save(began, reason=reason, metadata={_INITIAL_EPOCH: initial_epoch})

    def _current(self) -> Session:
        if self._session is None:
            writer = Writer(self.directory, LatestN(2 if self.double_checkpoint else 1))
            self._session = Session(self, writer, self._schedule, self.on_full_disk)
        return self._session


def _begin_with(model: keras.Model, epoch: int | None) -> None:
    """Tells `fit` with which epoch to begin, between its `on_train_begin` and its first epoch."""
    # Keras's own BackupAndRestore has no other way.
    model._initial_epoch = epoch  # noqa: SLF001


def _refuse_what_is_no_backup(directory: CheckpointDirectory) -> None:
    """Refuses a directory whose checkpoints the end of a training must not remove."""
    listing = directory.listing()
    listing.refuse_newer()
    others = [record.name for record in listing.records if record.pinned or not _is_backup(record)]
    if others or listing.unmanaged:
        raise DirectoryNotEmptyError(
            f"{directory.path} holds checkpoints that are no backup: {', '.join([*others, *listing.unmanaged][:10])}. "
            "A backup needs a directory of its own, because it is removed when training has ended."
        )
    if os.path.exists(os.path.join(directory.path, "latest.weights.h5")):
        raise DirectoryNotEmptyError(
            f"{directory.path} holds a backup of keras.callbacks.BackupAndRestore, which this one cannot read. Finish "
            "that training with it, or give another directory."
        )


def _is_backup(record: CheckpointRecord) -> bool:
    epoch = record.metadata.get(_INITIAL_EPOCH)
    return isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0
