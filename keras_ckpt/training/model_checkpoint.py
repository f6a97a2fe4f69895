"""`ModelCheckpoint`: Keras's callback, which saves into a checkpoint directory, or files in Keras's formats."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Literal

import keras

from keras_ckpt.model.keras_internals import FitInProgress, fit_in_progress, model_of
from keras_ckpt.model.model_state import versions
from keras_ckpt.model.position import position_of, take_restored_epochs
from keras_ckpt.store import journal, tables
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.notices import log, warn
from keras_ckpt.store.policies import BestN, PreservationPolicy, as_policy
from keras_ckpt.store.quantities import as_bytes
from keras_ckpt.store.record import Mode, as_metric, encodable_metadata
from keras_ckpt.store.writer import SaveRequest, Writer
from keras_ckpt.training.best import load_best, refuse_no_best
from keras_ckpt.training.bundle_form import Bundles
from keras_ckpt.training.file_form import KerasFiles
from keras_ckpt.training.hooks import Hook, Hooks
from keras_ckpt.training.improvement import Improvements, checked_min_delta, improves
from keras_ckpt.training.lines import Handler, Lines, Metric, Save, Silent, say
from keras_ckpt.training.monitor import metrics_in, missing_metric_warning, mode_of, modes_of
from keras_ckpt.training.new_run import NewRun, checked_new_run, opened_in_subdirectory
from keras_ckpt.training.rollback import Recovery, Rollback, checked_on_nan
from keras_ckpt.training.schedule import SaveFreq, checked_start_from_epoch
from keras_ckpt.training.score import NAME as SCORE
from keras_ckpt.training.score import Score, ScoreFunction
from keras_ckpt.training.session import OnFullDisk, Outcome, Session, checked_on_full_disk
from keras_ckpt.training.targets import target

Logs = Mapping[str, Any] | None
Metadata = Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]]
_NOT_KEPT = "not saved, it would not be kept"
_SKIPPED = "skipped, because an earlier save is still being written"
_WAITS = "waits for the epoch's end"


class ModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Saves checkpoints during `fit` into a directory or into files of Keras, and prunes them by a policy.

    Each save has a sidecar, a JSON file with its metrics and metadata. The best checkpoint and the checkpoints to
    remove are read from the disk, so a restart changes nothing. In a directory each save is a plain TensorFlow
    checkpoint. A filepath that ends in `.keras`, `.weights.h5` or `.h5` names files in these formats, as in Keras.

    Example:

    ```python
    checkpoint = keras_ckpt.ModelCheckpoint("runs/digits", monitor="val_accuracy", mode="max",
                                            keep=keras_ckpt.BestN(3) | keras_ckpt.LatestN(2))
    model.fit(x, y, validation_data=valid, epochs=30, callbacks=[checkpoint])
    ```

    Args:
        filepath: The directory of the run, or a file, such as `"best.keras"`, that each save replaces. It may be a
            template of files too, such as `"{epoch:02d}-{val_loss:.2f}.keras"`, whose fields are the epoch, the batch
            and metrics. Keras 3.15 cannot load a model with the loss `"mse"` from a legacy `.h5` file, except with
            `compile=False`.
        monitor: The metric by which checkpoints are ranked, where something ranks them. Defaults to `"val_loss"`, or
            to `"score"` with `score`.
        verbose: 1 prints the directory when a fit begins, and a line when a save is due: the metric, and whether it
            improved, from which value. Then the outcome and the removed checkpoints follow. The outcome of a background
            save precedes the line of the next save, or comes at the end. For files the lines are Keras's, and the
            directory is printed if `new_run` has moved the fit below `filepath`. 0 prints nothing.
        save_best_only: Whether to save only a model that is better than every checkpoint on disk and than
            `initial_value_threshold`. In a directory only the best checkpoint stays, as Keras's single file would,
            unless `keep` says otherwise.
        save_weights_only: In a directory, whether to omit the optimizer: training cannot resume exactly from such a
            checkpoint. For files, whether they are in the format `.weights.h5`, which has the optimizer, as in Keras.
        mode: `"min"` if less of the monitored metric is better, `"max"` if more is, `"auto"` to ask Keras. A
            score is better if it is more, unless `mode` is `"min"`.
        save_freq: `"epoch"`, a number of batches, a `datetime.timedelta`, or a list of these, any of which makes a save
            due. A save in the middle of an epoch that cannot be ranked there is ranked at the epoch's end. In a
            directory batches count from the beginning of the run, for files from the callback's last save, as in Keras.
        initial_value_threshold: The value that the monitored metric must beat, with `save_best_only`.
        start_from_epoch: The number of epochs in which nothing is saved, as in `EarlyStopping`, whatever `save_freq`
            is. The epochs count as `fit` counts them: those before `initial_epoch` are included.
        min_delta: With `save_best_only`, the minimum by which a value must beat the best value on disk, as in
            `EarlyStopping`. A difference of exactly `min_delta` is not enough.
        score: A function of the logs of an epoch's end, which returns one number: several metrics in one. The number is
            the metric `"score"`. An error of the function in the first epoch of a `fit` ends the training after the
            epoch's save. Later it is a warning.
        load_best_at_end: Whether the model has the best checkpoint on disk when `fit` ends, by the monitored metric:
            weights, optimizer and place in the run. A next `fit` continues there. Any end of `fit` counts, such as a
            stop by another callback or a NaN, but no error and no Ctrl-C: Keras calls no callback then.
        on_nan: The answer to a loss that is NaN or infinite after a batch or an epoch. `None`: none. `"rollback"`, or
            a `Rollback`: the newest checkpoint of the run with a finite loss and finite weights is restored, and the
            training continues with the next batch. Each rollback is a warning. No model with weights that are not
            finite is saved. The other callbacks keep their state.
        keep: Which checkpoints to keep: a policy, or an int `n` for the newest `n`. `None` keeps all, or the best with
            `save_best_only` in a directory. A save that the policy would remove at once is not written. The files of
            an earlier run are replaced if they have the same names; otherwise they stay, and are not ranked.
        metadata: A dict to put into each sidecar, or a function of `logs` that returns a dict.
        on_full_disk: Whether a full disk is a warning and training continues (`"warn"`), or an error (`"raise"`).
        min_free: The bytes of the disk to leave free: a number, or a text such as `"10 GB"`. A save that would leave
            less removes checkpoints before it, those that `keep` removes after it in any case. If they are too few, it
            removes more by the order of `MaxBytes`, with a warning, but never the newest. If these are too few, it
            removes none, and the disk counts as full. `None` leaves nothing free.
        save_on_background: Whether training continues while a save is written. `"auto"` does, except for files when a
            subclass, a later callback of the user's own or a later `LambdaCallback` could read a file in the same
            epoch. `wait()` waits for all saves. The next save waits if more than 64 MB would be queued. A save by
            batches or time in the middle of an epoch is skipped instead, unless it is ranked. The first skip is a
            warning. An error is raised at the next batch. `fit` ends when all is written.
        new_run: The answer to a fit that does not continue the run in the directory. `"refuse"`: it raises an error
            before its first batch; files of Keras are replaced by their names, as in Keras, with one warning.
            `"subdirectory"`: it saves into the first of the directory and its sub-directories `2`, `3` and so on that
            has no run, as in `runs/2/best.keras`. A fit that continues one of these runs saves where the run is.
            `"replace"`: it removes the other run, except pinned checkpoints, once its first checkpoint is on disk.
        on_saved: A function of a `CheckpointRecord`, called in the training thread at the next batch or at the end of
            `fit`, after the checkpoint is on disk. It is called again if metrics of the epoch's end are added. An
            error in it is a warning.
        on_removed: The same for each checkpoint that was removed.

    Attributes:
        directory: The `CheckpointDirectory` of the last `fit`. Its `path` tells where the run is saved:
            `new_run="subdirectory"` may put the run below `filepath`.

    Raises:
        ValueError, TypeError: A wrong argument; at the latest before the first batch. After the first batch: Keras
            cannot save the model as a whole.
        DirectoryNotEmptyError: Before the first batch: the directory holds a run other than the model's, and `new_run`
            is `"refuse"`. Or it holds checkpoints that this package did not write. Or `filepath` is one file, which is
            pinned and not of the model's run.
        DirectoryInUseError: Before the first batch: another process trains into the directory.
        SaveError: A checkpoint could not be saved. The others are untouched.
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str | None = None,
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: Mode | Literal["auto"] = "auto",
        save_freq: SaveFreq | list[SaveFreq] = "epoch",
        initial_value_threshold: float | None = None,
        *,
        start_from_epoch: int = 0,
        min_delta: float = 0.0,
        score: ScoreFunction | None = None,
        load_best_at_end: bool = False,
        on_nan: Rollback | Literal["rollback"] | None = None,
        keep: PreservationPolicy | int | None = None,
        metadata: Metadata | None = None,
        on_full_disk: OnFullDisk = "warn",
        min_free: str | float | None = None,
        save_on_background: bool | Literal["auto"] = "auto",
        new_run: NewRun = "refuse",
        on_saved: Hook | None = None,
        on_removed: Hook | None = None,
    ) -> None:
        # Keras's own __init__ accepts only a template of file names.
        keras.callbacks.Callback.__init__(self)
        if mode not in ("auto", "min", "max"):
            warn(f"ModelCheckpoint mode {mode!r} is unknown, fallback to auto mode.")
            mode = "auto"
        monitor = monitor if monitor is not None else SCORE if score else "val_loss"
        if not isinstance(monitor, str) or not monitor:
            raise TypeError(f"ModelCheckpoint expected a metric's name as monitor. Received: monitor={monitor!r}")
        if not isinstance(verbose, int):
            raise TypeError(f"ModelCheckpoint expected verbose 0 or 1. Received: verbose={verbose!r}")
        if initial_value_threshold is not None:
            initial_value_threshold = as_metric("initial_value_threshold", initial_value_threshold)
        policy = as_policy(keep)
        self._target = target(filepath, save_weights_only, policy)
        self.directory = self._target.directory
        self.filepath = os.fspath(filepath) if self.directory.series.template else self.directory.path
        self.monitor = monitor
        self.verbose = verbose
        self.save_best_only = save_best_only
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.save_freq = save_freq
        self.initial_value_threshold = initial_value_threshold
        self.start_from_epoch = checked_start_from_epoch(start_from_epoch)
        self.min_delta = checked_min_delta(min_delta, save_best_only)
        self.keep = self._target.keep(policy, save_best_only)
        self.metadata = metadata if callable(metadata) else encodable_metadata(metadata or {})
        self.on_full_disk = checked_on_full_disk(on_full_disk)
        self.min_free = 0 if min_free is None else as_bytes(min_free, "min_free")
        self.save_on_background = save_on_background
        self.new_run = checked_new_run(new_run)
        self._score = Score(score)
        self.on_nan = checked_on_nan(on_nan)
        self._recovery = Recovery(self.on_nan)
        self.load_best_at_end = load_best_at_end
        if load_best_at_end or self.on_nan:
            self._target.refuse_unreadable(bool(self.on_nan))
        if load_best_at_end:
            best = BestN(1, self.monitor, None if mode == "auto" else mode)
            series = self.directory.series
            refuse_no_best(self.keep, best, save_best_only, bool(series.template) and series.is_one_name)
        self._hooks = Hooks(self.directory, on_saved, on_removed)
        self._schedule = self._target.schedule(save_freq)
        self._lines: Lines = self._target.lines(save_best_only) if verbose else Silent()
        self._ranking = _Ranking()
        self._form: Bundles | KerasFiles
        self._session: Session[Any] | None = None
        self._pending: str | None = None
        self._reason = ""
        self._current_epoch = 0
        self._due = 0
        self._epochs = 0
        self._seen: set[str] = set()
        self._modes: dict[str, Mode | None] = {}
        self._warned = False
        self._last: dict[str, Any] = {}
        self._owed: dict[str, Any] = {}

    @property
    def best(self) -> float | None:
        """The best value of the monitored metric on disk, or the threshold; `None` if there is no value yet."""
        mode = self._ranking.mode or self.mode
        records = list(self.directory)
        newest = records[-1].run_id if records else ""
        run_id = self._session.progress.position.run_id if self._session else newest
        values = [record.finite(self.monitor) for record in records if record.run_id == run_id]
        known = [value for value in (*values, self.initial_value_threshold) if value is not None]
        if not known or mode == "auto":
            return None
        return min(known) if mode == "min" else max(known)

    @best.setter
    def best(self, value: float | None) -> None:
        """Sets the value that the monitored metric must beat, as code for Keras's own callback does."""
        self.initial_value_threshold = None if value is None else as_metric("best", value)

    @property
    def monitor_op(self) -> Callable[[Any, Any], Any] | None:
        """The comparison that is true for a better value of the monitored metric, `None` before its mode is known."""
        compare: dict[Mode | None, Callable[[Any, Any], Any]] = {"min": keras.ops.less, "max": keras.ops.greater}
        return compare.get(self._ranking.mode)

    def wait(self) -> None:
        """Waits until all saves are on disk.

        Raises:
            SaveError: A save failed.
        """
        if self._session is not None:
            self._session.settle(wait=True)
            self._lines.tell()
            self._hooks.call()

    def adopt_run(self) -> None:
        """Lets a model that Keras has loaded from a file of this callback continue the run of the file."""
        self._target.adopt(self.model, self._places())

    def get_state(self) -> dict[str, Any]:
        """The state that this callback needs to resume in another process, beside the files on disk."""
        return {
            "pending": self._pending,
            "due": self._due,
            "epochs": self._epochs,
            "elapsed": self._schedule.elapsed(),
            "last": self._last,
            "recovery": self._recovery.get_state(),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Sets the state that `get_state` returned in another process."""
        self._pending = state["pending"]
        self._due = state["due"]
        self._epochs = state["epochs"]
        self._schedule.resume(state["elapsed"])
        self._last = self._owed = state.get("last", {})
        if "recovery" in state:
            self._recovery.set_state(state["recovery"])

    def resume_within(self, batch: int) -> None:
        """Resumes in the middle of an epoch that another process began.

        Args:
            batch: The number of completed batches of the epoch.
        """
        self._current().progress.resume(batch)

    def save_owed(self) -> None:
        """Saves the checkpoint that the killed process had not written yet, if the model has that state.

        A backup of the same step may be on disk before the checkpoint.
        """
        owed, self._owed = self._owed, {}
        position = self._current().progress.position
        if not owed or (owed["step"], owed["batch"]) != (position.step, position.batch):
            return
        if not self._current().has_reached(position.step):
            request = self._request(**owed["facts"], began=time.perf_counter())
            handler = self._noted(self._current_epoch, request.name, request.metrics, _NOT_KEPT)
            self._write(request, handler)
            self._lines.tell()

    def on_train_begin(self, logs: Logs = None) -> None:
        self._session = None
        self._pending = None
        self._due = 0
        self._epochs = 0
        self._seen = set()
        self._modes = {}
        self._warned = False
        self._last = self._owed = {}
        self._schedule.start()
        self._score.begin()
        self._recovery.begin()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._current_epoch = epoch
        begins = self._session is None
        self._current()
        if begins:
            self._tell_of_the_epochs(epoch)
            self._warn_of_no_epochs()

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        self._recovery.batch_begin(model_of(self))

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        due = self._should_save_on_batch(batch)
        if self._is_sound(logs, due) and due and not self._warms_up():
            self._save_within(batch, logs)
        self._hooks.call()

    def _is_sound(self, logs: Logs, due: bool) -> bool:
        """Whether the model may be saved. With `on_nan`, a loss that is not finite is followed by a rollback here."""
        return self._recovery.is_sound(self._current(), self.directory, logs, due, self._note)

    def _warms_up(self) -> bool:
        """Whether a save that is due is skipped, because its epoch comes too early."""
        early = self._current_epoch < self.start_from_epoch
        if early:
            self._current().note("skipped", why=f"start_from_epoch={self.start_from_epoch}")
        return early

    def _save_within(self, batch: int, logs: Logs) -> None:
        """Saves within an epoch, or lets the save wait for the epoch's end."""
        monitors = self._ranking.monitors
        ranked = monitors <= metrics_in(logs).keys()
        if (ranked and monitors) or not self._current().skips():
            self._save_model(self._current_epoch, batch, logs)
        else:
            name = self._name_of(self._get_file_path(self._current_epoch, batch, logs))
            self._noted(self._current_epoch, name, metrics_in(logs), _SKIPPED)(Outcome(None))
            self._lines.tell()
        if not ranked:
            self._pending = self._reason

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        reasons = [reason for reason in (self._current().epoch_end(), self._pending) if reason is not None]
        self._pending = None
        self._epochs += 1
        with self._score.added_to(logs or {}) as scored:
            self._check_metrics(scored)
            self._current().note("epoch", metrics=metrics_in(scored))
            if self._is_sound(logs, bool(reasons)) and reasons and not self._warms_up():
                self._reason = ", ".join(reasons)
                self._save_model(epoch, None, scored)
        self._hooks.call()

    def on_train_end(self, logs: Logs = None) -> None:
        session, self._session = self._session, None
        if session is not None:
            try:
                session.close()
            finally:
                session.note("ended")
                self._lines.tell()
                self._hooks.call()
            self._warn_of_nothing(session)
        if self.load_best_at_end:
            # If nothing was left to train, no session has begun.
            self._load_best(self._ranking if session else self._resolve())

    def _load_best(self, ranking: _Ranking) -> None:
        """Restores the best checkpoint, and says so in one line."""
        best = ranking.best and load_best(self.model, self._places(), ranking.best)
        if best and self.verbose:
            value = tables.metric(best.metrics[self.monitor])
            say(f"Restored the best checkpoint: {tables.relative(best.prefix)}, {self.monitor} {value}")

    def _places(self) -> Iterable[CheckpointDirectory]:
        """The directories in which the run of the model may be."""
        base = self._target.directory
        return base.places() if self.new_run == "subdirectory" else [base]

    def _current(self) -> Session[Any]:
        """The session of the fit in progress, opened at the first epoch.

        Not in `on_train_begin`: another callback may still restore there.
        """
        if self._session is None:
            self._ranking = self._resolve()
            self.adopt_run()
            fit = fit_in_progress(self)
            self._recovery.check(self.model, _answers(fit))
            on_background = self.save_on_background
            if on_background == "auto":
                on_background = not self._target.is_read_by(self, fit.callbacks)
            with contextlib.ExitStack() as failed:
                writer = self._writer()
                failed.callback(writer.close)
                self._form = self._target.form(self.model, writer)
                session = Session(self, writer, self._schedule, self.on_full_disk, on_background, self._form, fit=fit)
                session.open(replaces=self.new_run == "replace")
                failed.pop_all()
            self._session, self.directory = session, writer.directory
            self._note("restored" if session.progress.position.step else "run")
            best = self.best if self.verbose else None
            self._lines.begin(self.directory.path, Metric(self.monitor, self._ranking.mode, best, self.min_delta))
        return self._session

    def _note(self, kind: Literal["run", "restored"], **facts: Any) -> None:
        """Notes in the journal that the training begins a run, or continues from a step of a run."""
        self._current().note(
            kind,
            monitor=self.monitor,
            mode=self._ranking.mode,
            policy=journal.written(self._ranking.keep),
            versions=versions(),
            **facts,
        )

    def _writer(self) -> Writer:
        """The writer of this fit, in the directory that `new_run` asks for."""
        base = self._target.directory
        make = functools.partial(Writer, keep=self._ranking.keep, only=self._ranking.only, min_free=self.min_free)
        if self.new_run != "subdirectory":
            return make(base)
        position = position_of(self.model)
        return opened_in_subdirectory(base, position.run_id if position else None, self.params, make)

    def _tell_of_the_epochs(self, epoch: int) -> None:
        """Says once where `fit` counts its epochs from, if it does not continue the count of a restored model."""
        done = take_restored_epochs(self.model)
        if epoch or not done:
            return
        text = (
            f"fit counts its epochs from 1, and the restored run has {done}. To continue its count, after "
            "keras_ckpt.restore or keras_ckpt.load_model: fit(initial_epoch=keras_ckpt.initial_epoch(model), "
            "epochs=...), where epochs is the last of the run."
        )
        log.info("%s", text)
        if (self.params or {}).get("verbose"):
            print(text)

    def _warn_of_no_epochs(self) -> None:
        """Warns before the first batch if `fit` ends before the first epoch that is saved."""
        epochs = (self.params or {}).get("epochs")
        if epochs is not None and epochs <= self.start_from_epoch:
            warn(
                f"Nothing will be saved into {self.filepath}: fit ends after epoch {epochs}, and "
                f"start_from_epoch={self.start_from_epoch} begins to save in epoch {self.start_from_epoch + 1}."
            )

    def _warn_of_nothing(self, session: Session[Any]) -> None:
        """Warns if the fit that has ended saved nothing, and its run has no checkpoint."""
        run_id, ranks = session.progress.position.run_id, self._ranking.keep or self._ranking.only
        stopped = self._current_epoch < self.start_from_epoch < ((self.params or {}).get("epochs") or 0)
        if session.missed or not (stopped or (self._due and ranks)):
            return
        if any(record.run_id == run_id for record in self.directory):
            return
        why = (
            f"{self._due} saves were due, and {self._ranking} would keep none. Was {self.monitor!r} ever a finite "
            f"number, and better than initial_value_threshold={self.initial_value_threshold}? Join the policy with "
            "keras_ckpt.LatestN(1) to always have the newest."
        )
        if stopped:
            why = f"fit has ended in epoch {self._current_epoch + 1}, and start_from_epoch={self.start_from_epoch}."
        warn(f"Nothing was saved into {self.filepath}: {why}")

    def _resolve(self) -> _Ranking:
        """The ranking of this fit's checkpoints, with the arguments' defaults filled in from the model."""

        def mode(monitor: str) -> Mode:
            if monitor == self.monitor and self.mode != "auto":
                return self.mode
            return "max" if monitor in self._score.names else mode_of(self.model, monitor)

        keep = self.keep and self.keep.resolve(self.monitor, mode)
        only = Improvements(self.monitor, mode(self.monitor), self.min_delta or None) if self.save_best_only else None
        best = BestN(1, self.monitor, mode(self.monitor)) if self.load_best_at_end else None
        ranking = _Ranking(keep, only, best)
        modes = {monitor: mode(monitor) for monitor in {*ranking.monitors, *self._score.names}}
        with contextlib.suppress(ValueError):  # if nothing ranks by the monitor, its mode may be unknown
            modes[self.monitor] = mode(self.monitor)
        return dataclasses.replace(ranking, mode=modes.pop(self.monitor, None), modes=modes)

    def _should_save_on_batch(self, batch: int) -> bool:
        """Counts the batches that ran, and decides whether a save is due. Keras's name, which subclasses use."""
        session = self._current()
        session.settle()
        reason = session.batch_end(batch)
        self._reason = reason or ""
        return reason is not None

    def _get_file_path(self, epoch: int, batch: int | None, logs: Logs) -> str:
        """The path of the checkpoint to save. Keras's name, which subclasses use.

        Args:
            epoch: The index of the epoch in this `fit`.
            batch: The index of the batch in the epoch, `None` at an epoch's end.
            logs: The logs, as the callback was given them.
        """
        return os.path.join(self.directory.path, self._target.name(_fields(epoch, batch, logs)))

    def _should_save_model(self, epoch: int, batch: int | None, logs: Logs, filepath: str) -> bool:
        """Whether to save at all, before the policies decide. Keras's name, which subclasses use."""
        return self._beats_threshold(metrics_in(logs).get(self.monitor))

    def _save_model(self, epoch: int, batch: int | None, logs: Logs) -> None:
        """Saves the model as it is now. Keras's name, which subclasses use; arguments as in `_get_file_path`."""
        began = time.perf_counter()
        self._due += 1
        metrics = metrics_in(logs)
        filepath = self._get_file_path(epoch, batch, logs)
        name = self._name_of(filepath)
        otherwise = _NOT_KEPT if self._ranking.monitors <= metrics.keys() else _WAITS
        handler = self._noted(epoch, name, metrics, otherwise)
        if self._should_save_model(epoch, batch, logs, filepath):
            metadata = encodable_metadata(self.metadata(logs or {}) if callable(self.metadata) else self.metadata)
            facts: dict[str, Any] = {"name": name, "reason": self._reason, "metrics": metrics, "metadata": metadata}
            request = self._request(**facts, began=began)
            self._last = {"step": request.step, "batch": request.batch, "facts": facts}

            def saved(outcome: Outcome) -> None:
                if outcome.record is not None:  # a save that waits for the epoch's end has its name only then
                    self._target.warn_of_missing(_fields(epoch, batch, logs))
                handler(outcome)

            self._write(request, saved)
        else:
            why = f"initial_value_threshold={self.initial_value_threshold} is not beaten"
            if self._beats_threshold(metrics.get(self.monitor)):  # a subclass decides
                why = "_should_save_model() refused it"
            self._current().note("skipped", metrics=metrics, why=why)
            handler(Outcome(None))
        self._lines.tell()

    def _name_of(self, filepath: str) -> str:
        """The name of the checkpoint at a path that `_get_file_path` returned, `""` for the default name."""
        series = self.directory.series
        name = os.path.relpath(filepath, self.directory.path)
        if series.template and not series.checkpoints([name]):
            raise ValueError(
                f"_get_file_path() returned {filepath!r}, which is not of the template {self.filepath!r}. Give the "
                "callback a template that has all names."
            )
        return name if series.template else ""

    def _request(
        self, name: str, reason: str, metrics: Mapping[str, float], metadata: Mapping[str, Any], began: float
    ) -> SaveRequest:
        """The request of a save at the current step."""
        position = self._current().progress.position
        return SaveRequest(
            step=position.step,
            name=name,
            run_id=position.run_id,
            epoch=position.epoch,
            batch=position.batch,
            metrics=metrics,
            monitor=self.monitor,
            mode=self._ranking.mode,
            modes=self._modes_of(metrics),
            reason=reason,
            metadata=metadata,
            began=began,
        )

    def _modes_of(self, metrics: Mapping[str, float]) -> dict[str, Mode]:
        """The known modes of the metrics other than the monitor."""
        if new := metrics.keys() - self._modes.keys():
            known = {**modes_of(model_of(self), new), **self._ranking.modes}
            self._modes.update({name: known.get(name) for name in new})
        return {name: mode for name in metrics if name != self.monitor and (mode := self._modes[name])}

    def _write(self, request: SaveRequest, handler: Handler) -> None:
        session = self._current()
        session.save(request, self._form.snapshot(request.step), handler, amends=request.batch == 0)

    def _noted(self, epoch: int, name: str, metrics: Mapping[str, float], otherwise: str) -> Handler:
        """Notes a save for the lines, after the outcomes of earlier saves. Returns the handler of its outcome."""
        session = self._current()
        session.settle()
        return self._lines.save(Save(epoch + 1, session.progress.position, name, metrics.get(self.monitor), otherwise))

    def _beats_threshold(self, value: float | None) -> bool:
        threshold = self.initial_value_threshold
        if not self.save_best_only or threshold is None or value is None:
            return True
        return improves(value, threshold, self._ranking.mode, self.min_delta)

    def _check_metrics(self, logs: Mapping[str, Any]) -> None:
        """Keeps everything while the logs of this fit lack a metric to rank by, and warns once."""
        metrics = metrics_in(logs)
        self._seen |= metrics.keys()
        absent = sorted(self._ranking.monitors - self._seen)
        missing = [monitor for monitor in absent if any(map(_same_phase_as(monitor), metrics))]
        missing += [monitor for monitor in sorted(self._ranking.monitors) if monitor in logs and monitor not in metrics]
        self._current().rank(not missing)
        if self._warned:
            return
        if missing:
            self._warned = True
            keras_words = f"Can save best model only with {missing[0]} available. " if self.save_best_only else ""
            warn(keras_words + missing_metric_warning(missing[0], logs))
        elif absent and self._epochs == 2:
            self._warned = True
            warn(
                f"Two epochs have ended without {absent[0]!r}. Nothing can be ranked by it until it is there. Until "
                "then every checkpoint of an epoch's end stays. Does fit() have validation data?"
            )


def _answers(fit: FitInProgress) -> list[Rollback | None]:
    """The answers of all callbacks of a fit to a loss that is not finite."""
    callbacks = fit.callbacks.callbacks if fit.callbacks else []
    return [each.on_nan for each in callbacks if isinstance(each, ModelCheckpoint)]


def _fields(epoch: int, batch: int | None, logs: Logs) -> dict[str, Any]:
    """The values of the fields of a template, with arguments as in `ModelCheckpoint._get_file_path`."""
    return {"epoch": epoch + 1, **({} if batch is None else {"batch": batch + 1}), **(logs or {})}


def _same_phase_as(monitor: str) -> Callable[[str], bool]:
    """Returns a test whether a metric is measured where the monitor is: in training, or in validation."""
    return lambda name: name.startswith("val_") == monitor.startswith("val_")


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """The policies of one fit and the modes of their metrics.

    Attributes:
        keep: Which checkpoints stay.
        only: Which checkpoints are written at all.
        best: Which checkpoint is restored at the end.
        mode: The mode of the monitored metric.
        modes: The modes of the other metrics that a policy ranks by.
    """

    keep: PreservationPolicy | None = None
    only: PreservationPolicy | None = None
    best: BestN | None = None
    mode: Mode | None = None
    modes: Mapping[str, Mode] = dataclasses.field(default_factory=dict)

    @property
    def monitors(self) -> Set[str]:
        """The metrics that the policies rank by."""
        return frozenset().union(*(policy.monitors for policy in (self.keep, self.only, self.best) if policy))

    def __str__(self) -> str:
        return " and ".join(repr(policy) for policy in (self.keep, self.only) if policy)
