"""`BackupAndRestore`: Keras's, so that the same script, run again after a crash, goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any, Self

import keras

from keras_ckpt.errors import CheckpointError, DirectoryNotEmptyError, PlanError
from keras_ckpt.model.keras_internals import callbacks_of_fit
from keras_ckpt.model.parts import is_built
from keras_ckpt.resume.backed_up_fit import INITIAL_EPOCH, Training
from keras_ckpt.resume.callback_states import CallbackStates, keep_csv_logs
from keras_ckpt.resume.resumable_dataset import ResumableDataset
from keras_ckpt.store import files
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.notices import warn
from keras_ckpt.store.policies import LatestN
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.writer import Writer
from keras_ckpt.training.schedule import SaveFreq, SaveSchedule
from keras_ckpt.training.session import OnFullDisk, Session, checked_on_full_disk

Logs = Mapping[str, Any] | None


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Backs a training up, so that the same script, run again after a crash, ends as if there had been none.

    A backup holds all that decides the rest of the run: the model with its optimizer, seeds and metrics, the history,
    the states of the other callbacks, the global generators of random numbers, and the place in the data. At the
    beginning of `fit` it is put back, if there is one. After `fit` it is removed; nothing else in the directory is.

    The place in the data is known if they are a `ResumableDataset`, given here and to `fit`. Without it the epoch that
    was under way begins again at its first batch, on the newest weights.

    Where the process is asked to end, by SIGTERM, SIGUSR1 or Ctrl-C, the batch under way is finished and backed up
    before. In a `with` statement that is so for an error too.

    Example:

    ```python
    data = keras_ckpt.ResumableDataset(x, y, batch_size=64, shuffle=True)
    with keras_ckpt.BackupAndRestore("runs/digits/backup", save_freq=50, data=data) as backup:
        model.fit(data, epochs=30, shuffle=False, callbacks=[backup])
    ```

    Other callbacks may have `get_state()` and `set_state(state)`, of plain values and NumPy arrays. Of one that has
    not, those of its attributes are saved that changed since `fit` was called and are such values, generators of random
    numbers, variables or metrics; what cannot be saved is named once.

    Not put back are a validation by a Python generator, and a batch in the middle of which an error came up.

    Args:
        backup_dir: The directory of the backup, one for each `fit`.
        save_freq: As in `ModelCheckpoint`.
        double_checkpoint: Whether to keep the two last backups instead of one.
        delete_checkpoint: Whether to remove the backup at the end of `fit`. If not, the same script run once more
            trains nothing.
        data: The `ResumableDataset` that `fit` trains on.
        on_full_disk: As in `ModelCheckpoint`.
        save_on_background: As in `ModelCheckpoint`. A backup that a signal or an error asks for is waited for.
        exit_code: With what the process ends when a signal asked it to; `None` leaves that to what had the signal
            before, so that it is as usual.

    Raises:
        ValueError, TypeError: A wrong argument, or a model that is not built.
        MismatchError: The backup does not fit the model, or the data.
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
        data: ResumableDataset | None = None,
        on_full_disk: OnFullDisk = "warn",
        save_on_background: bool = True,
        exit_code: int | None = None,
    ) -> None:
        keras.callbacks.Callback.__init__(self)
        if data is not None and not isinstance(data, ResumableDataset):
            raise TypeError(
                f"BackupAndRestore expected a ResumableDataset. Received: data={data!r:.200}. Wrap the data, and give "
                "the ResumableDataset to fit() as well."
            )
        self.directory = CheckpointDirectory(backup_dir)
        self.backup_dir = self.directory.path
        self.save_freq = save_freq
        self.double_checkpoint = double_checkpoint
        self.delete_checkpoint = delete_checkpoint
        self.data = data
        self.on_full_disk = checked_on_full_disk(on_full_disk)
        self.save_on_background = save_on_background
        self.exit_code = exit_code
        self._schedule = SaveSchedule(save_freq)
        self._callbacks: keras.callbacks.CallbackList | None = None
        self._training: Training | None = None
        self._kept_logs: list[keras.callbacks.CSVLogger] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        training, self._training = self._training, None
        if training is not None:  # no on_train_end came
            training.end_by_error()

    def set_params(self, params: Any) -> None:
        super().set_params(params)
        self._callbacks = callbacks_of_fit(self)
        if self._callbacks is not None:
            # To be the last, and see what the others have done. The loop that is under way has the old list.
            others = [each for each in self._callbacks.callbacks if each is not self]
            self._callbacks.callbacks = [*others, self]
            with contextlib.suppress(CheckpointError):  # on_train_begin raises it, if it comes to that
                self._recover()
            if self.directory.listing():
                self._kept_logs = keep_csv_logs(others)

    def on_train_begin(self, logs: Logs = None) -> None:
        if not is_built(self.model):
            raise ValueError(
                f"BackupAndRestore needs a built model, or it could not restore {self.model.name!r} after a crash. "
                "Build it before fit(): call it on a batch of data, or, if it has a build() of its own, "
                "model.build(input_shape)."
            )
        self._recover()
        if self._training is not None:
            self._training.leave()  # an error ended it
        for logger in self._kept_logs:
            logger.append = False
        self._kept_logs = []
        self._schedule.start()
        # Here, for what a callback sets when training begins belongs to the process, and not to the run.
        others = self._callbacks.callbacks if self._callbacks is not None else []
        states = CallbackStates(each for each in others if not isinstance(each, keras.callbacks.BackupAndRestore))
        self._training = Training(
            self, self._callbacks, states, self.directory, self.data, self._open_session, self.exit_code
        )

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._current().epoch_begin(epoch)

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        self._current().batch_begin()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        training = self._current()
        with training.unlocking():
            training.batch_end(batch, logs)

    def on_test_begin(self, logs: Logs = None) -> None:
        if self._training is not None:
            self._training.validation_begin()

    def on_test_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self._training is not None:
            self._training.answer()

    def on_predict_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self._training is not None:
            self._training.answer()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        training = self._current()
        with training.unlocking():
            training.epoch_end(epoch, logs, keep=not self.delete_checkpoint)

    def on_train_end(self, logs: Logs = None) -> None:
        training, self._training = self._current(), None
        with training.ending() as well:
            if not well:
                there = (
                    f"The earlier backup stays in {self.backup_dir}: the same script resumes from it, and "
                    "CheckpointDirectory.clear() removes it."
                )
                warn(
                    "Training was stopped because its loss is not a finite number. "
                    + (there if len(self.directory) else "There is no earlier backup.")
                )
            elif training.is_cut_short and self.delete_checkpoint:
                training.note_the_end()
                print(
                    f"\nA callback has stopped the training before its last epoch. The backup stays in "
                    f"{self.backup_dir}: the same script continues from it, and CheckpointDirectory.clear() removes it."
                )
            elif self.delete_checkpoint:
                training.forget()
                try:
                    self.directory.clear()
                    files.remove_unused(self.backup_dir)
                except PlanError as error:
                    warn(f"The backup stays: {error}")
            else:
                training.note_the_end()
                files.remove_unused(self.backup_dir)  # if no batch was trained

    def _current(self) -> Training:
        if self._training is None:
            raise RuntimeError("BackupAndRestore was not told that training begins: on_train_begin() comes first.")
        return self._training

    def _recover(self) -> None:
        """Finishes what a process that died had begun: a backup that was complete by then is one."""
        _refuse_what_is_no_backup(self.directory)
        if os.path.isdir(self.backup_dir):
            Writer(self.directory).open()

    def _open_session(self) -> Session:
        writer = Writer(self.directory, LatestN(2 if self.double_checkpoint else 1))
        return Session(self, writer, self._schedule, self.on_full_disk, self.save_on_background, backs_up=True)


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
    epoch = record.metadata.get(INITIAL_EPOCH)
    return isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0
