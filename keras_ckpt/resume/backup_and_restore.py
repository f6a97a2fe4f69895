"""`BackupAndRestore`: the same script, run again after a crash, resumes and ends as if there had been none."""

from __future__ import annotations

import collections
import contextlib
import os
import shlex
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Self

import keras
import msgspec

from keras_ckpt.errors import DirectoryNotEmptyError, PlanError
from keras_ckpt.model.keras_internals import FitInProgress, fit_in_progress, is_running
from keras_ckpt.model.parts import is_built
from keras_ckpt.model.position import RolledBack, rollback_of
from keras_ckpt.resume.backed_up_fit import BackedUpFit, errors_as_warnings
from keras_ckpt.resume.callback_states import empty_csv_file
from keras_ckpt.resume.finished_run import is_of_another_run, note_end, note_end_in_backup, restore_end
from keras_ckpt.resume.fit_state import ENDED, ROLLBACK, STOPPED, FitState
from keras_ckpt.resume.patches import Patches
from keras_ckpt.resume.restart import Restart
from keras_ckpt.resume.resumable_dataset import ResumableDataset
from keras_ckpt.resume.signals import SignalWatch
from keras_ckpt.store import files, layout
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.journal import Event
from keras_ckpt.store.layout import TENSORFLOW
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.notices import log, warn
from keras_ckpt.store.policies import LatestN
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.tables import relative
from keras_ckpt.store.writer import Writer
from keras_ckpt.training.bundle_form import Bundles
from keras_ckpt.training.model_checkpoint import ModelCheckpoint
from keras_ckpt.training.schedule import SaveFreq, SaveSchedule
from keras_ckpt.training.session import OnFullDisk, Session, checked_on_full_disk

Logs = Mapping[str, Any] | None

_ended: collections.Counter[str] = collections.Counter()
"""By directory, the number of fits of this process that have come to their end with `delete_checkpoint=True`."""


class _BackupDirectory(CheckpointDirectory):
    """The directory of a backup. It has no journal, because it is removed when the training has ended."""

    def note(self, *events: Event) -> None:
        return


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """Callback that backs up a training, so that the same script, run again after a crash, resumes exactly.

    A backup holds all that decides the rest of the run. This is the model with its optimizer, seeds and metrics, the
    history, the states of the other callbacks, the global random generators, and the place in the data. `fit` restores
    the backup when it begins. It removes the backup when it ends, unless only the backup has the end of a run that a
    `ModelCheckpoint` saves. It removes nothing else in the directory.

    The place in the data is known if the data is a `ResumableDataset`, given to this callback and to `fit`. Otherwise
    the epoch in progress begins again at its first batch, on the newest weights.

    SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 end the process after the batch in progress and a backup. In a `with`
    statement an error outside a batch is followed by a backup too.

    Example:

    ```python
    data = keras_ckpt.ResumableDataset(x, y, batch_size=64, shuffle=True)
    with keras_ckpt.BackupAndRestore("runs/digits/backup", save_freq=50, data=data) as backup:
        model.fit(data, epochs=30, callbacks=[backup])
    ```

    Another callback may have `get_state()` and `set_state(state)`, of plain values and NumPy arrays. Without them, the
    backup holds each attribute of the callback that has changed since `fit` was called. Its value is plain, or a random
    generator, a variable or a metric. A warning names each attribute that cannot be saved.

    A restart does not resume within a validation by a Python generator, or within a batch that raised an error.

    Args:
        backup_dir: Path of the directory of the backup. Each `fit` needs a directory of its own.
        save_freq: When to save, as in `ModelCheckpoint`.
        double_checkpoint: Whether to keep the last two backups instead of the last one.
        delete_checkpoint: Whether to remove the backup at the end of `fit`. If it stays, the same script trains nothing
            when it is run again, and continues with more epochs. If it is removed, the script trains nothing beside a
            `ModelCheckpoint` whose directory has the weights that `fit` left. Beside a `ModelCheckpoint` without these
            weights, such as a file `"best.keras"`, the backup stays even so, unless a `new_run` is asked for.
        data: The `ResumableDataset` that `fit` trains on.
        on_full_disk: `"warn"` or `"raise"`, as in `ModelCheckpoint`.
        save_on_background: Whether training continues while a backup is written. After a signal or an error, the
            process waits for the backup.
        exit_code: Exit code of the process after a signal. `None` keeps the usual effect of the signal.
        verbose: 1 prints what a restart has restored, and why a backup stays. 0 writes both into the log `keras_ckpt`.

    Raises:
        ValueError, TypeError: An argument is wrong, or the model is not built.
        MismatchError: The backup does not fit the model or the data.
        DirectoryInUseError: Another process trains with this backup. Raised before the first batch.
        SaveError: The backup could not be saved. The backup before is untouched.
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
        verbose: int = 1,
    ) -> None:
        keras.callbacks.Callback.__init__(self)
        if data is not None and not isinstance(data, ResumableDataset):
            raise TypeError(
                f"BackupAndRestore expected a ResumableDataset. Received: data={data!r:.200}. Wrap the data, and give "
                "the ResumableDataset to fit() as well."
            )
        if not backup_dir:
            raise ValueError(f"Empty `backup_dir` argument passed. Received: backup_dir={backup_dir!r}")
        self.directory: CheckpointDirectory = _BackupDirectory(backup_dir, TENSORFLOW)
        self.backup_dir = self.directory.path
        self.save_freq = save_freq
        self.double_checkpoint = double_checkpoint
        self.delete_checkpoint = delete_checkpoint
        self.data = data
        self.on_full_disk = checked_on_full_disk(on_full_disk)
        self.save_on_background = save_on_background
        self.exit_code = exit_code
        self.verbose = verbose
        self._schedule = SaveSchedule(save_freq)
        self._patches = Patches()
        self._csv_loggers: list[keras.callbacks.CSVLogger] = []
        self._fit = FitInProgress()
        self._watch: SignalWatch | None = None
        self._restart: Restart | None = None
        self._backed_up: BackedUpFit | None = None
        self._is_finished = False
        self._current_epoch = 0  # these two are Keras's names, for code that reads them
        self._last_batch_seen = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        backed_up, self._backed_up = self._backed_up, None
        if backed_up is None:
            return
        # An error has ended the training, so on_train_end was not called.
        self._leave_keras()
        with contextlib.ExitStack() as last:
            last.callback(self._end_watch)
            last.callback(backed_up.close)
            with errors_as_warnings():
                backed_up.save_last("error")

    def set_params(self, params: Any) -> None:
        super().set_params(params)
        self._patches.remove()
        self._fit = fit_in_progress(self)
        self._csv_loggers = []
        if (callbacks := self._fit.callbacks) is not None:
            # As the last callback, this one sees the effects of the others. Keras goes through the list of before.
            callbacks.callbacks = [*(each for each in callbacks.callbacks if each is not self), self]
            self._csv_loggers = self._patches.keep_csv_files(callbacks)

    def on_train_begin(self, logs: Logs = None) -> None:
        self._leave_keras()
        self._end_watch()  # an error may have ended the training before
        self._backed_up = None
        self._is_finished = False
        if not is_built(self.model):
            raise ValueError(
                f"BackupAndRestore needs a built model, or it could not restore {self.model.name!r} after a crash. "
                "Build it before fit(): call it on a batch of data, or, if it has a build() of its own, "
                "model.build(input_shape)."
            )
        if not self._fit.is_known:  # the user has made the list of callbacks before fit
            self._fit = fit_in_progress(self)
        self._schedule.start()
        writer = Writer(self.directory, LatestN(2 if self.double_checkpoint else 1))
        with contextlib.ExitStack() as failed:
            failed.callback(self._leave_keras)
            failed.callback(writer.close)
            self._begin(writer)
            failed.pop_all()
        self._watch = SignalWatch(self._is_in_progress, self.exit_code)
        self._watch.start()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._current_epoch = epoch
        backed_up, restart, callbacks = self._current(), self._restart, self._fit.callbacks
        backed_up.epoch_begin(epoch)
        self._restart = None
        if restart is not None and restart.start.batch and callbacks is not None:
            with contextlib.closing(restart):
                restart.resume_within()
            done, steps, document = restart.start.batch, restart.document["steps"], restart.document
            backed_up.resume(done, document)
            is_trained = done == steps or document["stopped"]
            self._patches.resume_within(callbacks, done, steps, document["logs"] if is_trained else None)

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        self._current().batch_begin()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        with self._answering() as backed_up:
            backed_up.batch_end(batch, logs)
        self._last_batch_seen = batch
        if batch + 1 == (self.params or {}).get("steps"):
            self._current_epoch += 1  # another callback may raise before this callback is told of the epoch's end

    def on_test_begin(self, logs: Logs = None) -> None:
        if self._backed_up is not None:
            self._backed_up.validation_begin()

    # With a method for the end of these batches, Keras would wait for the end of each before it begins the next.
    def on_test_batch_begin(self, batch: int, logs: Logs = None) -> None:
        self._answer()

    def on_predict_batch_begin(self, batch: int, logs: Logs = None) -> None:
        self._answer()

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        with self._answering() as backed_up:
            backed_up.epoch_end(epoch, logs, keep=not self.delete_checkpoint or bool(self._checkpoints()))
        self._current_epoch, self._last_batch_seen = epoch + 1, 0

    def on_train_end(self, logs: Logs = None) -> None:
        self._leave_keras()
        if self._is_finished:
            self._end_watch()
            return
        backed_up, self._backed_up = self._current(), None
        try:
            backed_up.close()
            self._end(backed_up)
        except BaseException:
            if self._watch is not None:
                self._watch.stop()  # the effect of a signal might hide the error
            raise
        self._end_watch()

    @property
    def _weights_path(self) -> str | None:
        """The file with the values of the newest backup, as Keras's callback names it."""
        return self._path_of(1, weights=True)

    @property
    def _training_metadata_path(self) -> str | None:
        return self._path_of(1, weights=False)

    @property
    def _prev_weights_path(self) -> str | None:
        return self._path_of(2, weights=True)

    @property
    def _prev_training_metadata_path(self) -> str | None:
        return self._path_of(2, weights=False)

    def _path_of(self, age: int, *, weights: bool) -> str | None:
        """A file of the newest backup (1) or the backup before (2), `None` without the backup."""
        records = list(self.directory)
        if len(records) < age:
            return None
        record = records[-age]
        names = [file.name for file in record.files if layout.is_data(file.name)]
        return os.path.join(record.directory, names[0] if weights else layout.sidecar(record.name))

    def _begin(self, writer: Writer) -> None:
        """Restores the backup, if there is one, and opens what saves the next."""
        listing = self._claim(writer)
        ended = _ended[self.directory.path]
        rollback = rollback_of(self.model)
        noted = {ENDED: ended, **({ROLLBACK: [rollback.position.step, rollback.number]} if rollback else {})}
        end = listing.records[-1] if listing.records and listing.records[-1].end else None
        replaces = end is not None and is_of_another_run(end, self.model, self._checkpoints(), ended)
        if rollback is not None and listing.records and listing.records[-1].metadata.get(ROLLBACK) != noted[ROLLBACK]:
            self._replace_for(rollback, listing.records[-1])
            replaces = True
        if (replaces or not listing) and self._trains_nothing():
            writer.close()
            return
        state = FitState(self.model, self._fit, self.params or {}, self.data)
        restart = Restart(state, listing, ended, self._say) if listing and not replaces else None
        with contextlib.ExitStack() as failed:
            if restart is not None:
                failed.callback(restart.close)
                restart.begin()
                self._patches.begin_with(self.model, self._fit.callbacks, restart.start.epoch)
                if end is not None and restart.start.done:
                    writer.close()
                    self._is_finished = True
                    return
            bundles = Bundles(self.model, writer)
            session = Session(
                self,
                writer,
                self._schedule,
                self.on_full_disk,
                self.save_on_background,
                bundles,
                backs_up=True,
                fit=self._fit,
            )
            session.open(listing, replaces)
            epoch = restart.start.epoch if restart else None
            backed_up = BackedUpFit(self.model, session, bundles, state, noted, epoch or 0)
            if restart is None:
                for logger in self._csv_loggers:
                    empty_csv_file(logger)
                backed_up.begin()
            failed.pop_all()
        self._restart, self._backed_up = restart, backed_up
        self._patches.before_averages(self.model, backed_up.hold_before_averages)

    def _replace_for(self, rollback: RolledBack, backup: CheckpointRecord) -> None:
        """Says that the fit replaces a backup of before a rollback, which would undo the rollback.

        Raises:
            DirectoryNotEmptyError: The backup is of another run, which may still need it.
        """
        step = rollback.position.step
        if backup.run_id != rollback.position.run_id:
            raise DirectoryNotEmptyError(
                f"The model was rolled back to step {step} of a run, and {backup.prefix} is the backup of another run. "
                "Give BackupAndRestore another directory. To remove the backup, type "
                f"keras_ckpt.CheckpointDirectory({relative(self.backup_dir)!r}).clear()."
            )
        self._say(
            f"The model was rolled back to step {step}, so the fit begins there. Its first backup replaces "
            f"{backup.prefix}, which is of before."
        )

    def _trains_nothing(self) -> bool:
        """Restores the end of a finished run, if `fit` begins this run again, and says so."""
        epochs = (self.params or {}).get("epochs")
        record = restore_end(self.model, self._checkpoints(), epochs) if self._fit.is_known and epochs else None
        if record is None:
            return False
        self._say(
            f"Found a finished run in {record.directory}; nothing is left to train; restored: model, as the run left "
            f"it, from step {record.step}. To train another run, give ModelCheckpoint new_run='subdirectory' or "
            "new_run='replace'."
        )
        self._patches.begin_with(self.model, self._fit.callbacks, epochs)
        self._is_finished = True
        return True

    def _checkpoints(self) -> list[ModelCheckpoint]:
        callbacks = [] if self._fit.callbacks is None else self._fit.callbacks.callbacks
        return [each for each in callbacks if isinstance(each, ModelCheckpoint)]

    def _claim(self, writer: Writer) -> Listing:
        """Becomes the only process that writes here, recovers the save of a dead process, and lists the backups."""
        listing = self.directory.listing()
        _refuse_other_checkpoints(listing)
        if not os.path.isdir(self.backup_dir):
            return listing
        writer.open()
        listing = self.directory.listing()
        _refuse_other_checkpoints(listing)
        return listing

    def _end(self, backed_up: BackedUpFit) -> None:
        """Removes the backup of a fit that has ended well, and says why a backup stays."""
        if backed_up.is_broken:
            there = (
                f"The earlier backup stays in {self.backup_dir}: the same script resumes from it, and "
                "CheckpointDirectory.clear() removes it."
            )
            warn(
                "Training was stopped because its loss is not a finite number. "
                + (there if len(self.directory) else "There is no earlier backup.")
            )
        elif backed_up.is_cut_short and self.delete_checkpoint:
            self._note_the_end()
            self._say(
                f"\nA callback has stopped the training before its last epoch. The backup stays in "
                f"{self.backup_dir}: the same script continues from it, and CheckpointDirectory.clear() removes it."
            )
        elif self.delete_checkpoint:
            stays = backed_up.is_whole_run and self._note_end(backed_up)
            _ended[self.directory.path] += 1
            if stays:
                path = relative(self.backup_dir)
                self._say(
                    f"\nThe backup stays in {path}: with it the same script trains nothing when it is run again. In a "
                    f"shell, keras-ckpt clear {shlex.quote(path)} removes it."
                )
                return
            try:
                self.directory.clear()
                files.remove_unused(self.backup_dir)
            except PlanError as error:
                warn(f"The backup stays: {error}")
        else:
            self._note_the_end()
            files.remove_unused(self.backup_dir)  # if no batch was trained

    def _note_end(self, backed_up: BackedUpFit) -> bool:
        """Notes the end of the run. Returns whether the backup alone has it, and no directory of checkpoints."""
        checkpoints, epochs = self._checkpoints(), self.params["epochs"]
        is_elsewhere = note_end(self.model, checkpoints, epochs)
        return not is_elsewhere and backed_up.is_saved and note_end_in_backup(self.directory, checkpoints, epochs)

    def _note_the_end(self) -> None:
        """Notes in the backup of a stopped fit that the fit came to its end, and was not killed."""
        newest = self.directory.latest()
        if newest is not None and self.model.stop_training:
            Writer(self.directory).amend(newest, _stopped)

    def _current(self) -> BackedUpFit:
        if self._backed_up is None:
            raise RuntimeError("BackupAndRestore was not told that training begins: on_train_begin() comes first.")
        return self._backed_up

    @contextlib.contextmanager
    def _answering(self) -> Iterator[BackedUpFit]:
        """Answers a signal after the end of a batch or an epoch, before other callbacks change the state."""
        backed_up = self._current()
        with backed_up.unlocking():
            yield backed_up
            self._answer()
            backed_up.hold()

    def _answer(self) -> None:
        """Saves and answers a signal that came, if a state is whole. Otherwise the next batch or epoch answers it."""
        backed_up, watch = self._backed_up, self._watch
        if backed_up is None or watch is None or watch.caught is None or not backed_up.is_safe:
            return
        backed_up.save_last(watch.caught.name)
        if newest := self.directory.latest():
            with contextlib.suppress(Exception):  # the reader of the output may have got the same signal
                self._say(f"\n{watch.caught.name}: backed up at step {newest.step} in {self.directory.path}")
        watch.answer()

    def _say(self, text: str) -> None:
        if self.verbose > 0:
            print(text)
        else:
            log.info("%s", text.strip())

    def _leave_keras(self) -> None:
        """Restores all that is replaced in Keras, and closes the backup that was read."""
        self._patches.remove()
        restart, self._restart = self._restart, None
        if restart is not None:
            restart.close()

    def _end_watch(self) -> None:
        """Lets a signal of the last moment have its effect, and ends the watch."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.answer()
            watch.stop()

    def _is_in_progress(self, frame: FrameType | None) -> bool:
        callbacks = self._fit.callbacks
        return callbacks is None or is_running(callbacks, frame)


def _refuse_other_checkpoints(listing: Listing) -> None:
    """Refuses a directory with checkpoints that the end of a training must not remove."""
    listing.refuse_newer()
    others = [record.name for record in listing.records if record.pinned or not record.is_backup]
    if others or listing.unmanaged:
        raise DirectoryNotEmptyError(
            f"{listing.path} holds checkpoints that are no backup: {', '.join([*others, *listing.unmanaged][:10])}. "
            "A backup needs a directory of its own, because it is removed when training has ended."
        )
    if os.path.exists(os.path.join(listing.path, "latest.weights.h5")):
        raise DirectoryNotEmptyError(
            f"{listing.path} holds a backup of keras.callbacks.BackupAndRestore, which this one cannot read. Finish "
            "that training with it, or give another directory."
        )


def _stopped(record: CheckpointRecord) -> CheckpointRecord:
    return msgspec.structs.replace(record, metadata={**record.metadata, STOPPED: True})
