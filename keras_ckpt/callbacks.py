"""`ModelCheckpoint` and `BackupAndRestore`: Keras's callbacks, feeding a checkpoint directory."""

from __future__ import annotations

import dataclasses
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Set
from typing import Any, Literal

import keras

from keras_ckpt import files, state, tables
from keras_ckpt.directory import CheckpointDirectory
from keras_ckpt.errors import DirectoryNotEmptyError
from keras_ckpt.monitor import metrics_in, mode_of, no_such_metric
from keras_ckpt.policies import BestN, LatestN, PreservationPolicy, as_policy, missing
from keras_ckpt.position import Position, Progress
from keras_ckpt.record import CheckpointRecord, Mode, encodable_metadata
from keras_ckpt.restoring import restore, same_values
from keras_ckpt.schedule import SaveFreq, SaveSchedule
from keras_ckpt.writer import Writer

Logs = Mapping[str, Any] | None
Metadata = Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]]


class ModelCheckpoint(keras.callbacks.ModelCheckpoint):
    """Saves checkpoints of a training into a directory, and keeps the right ones.

    Each save is a plain TensorFlow checkpoint with a sidecar file that says what is known about it. What is best, and
    what is to be removed, is read from the directory, so it holds after a restart too.

    Example:

    ```python
    checkpoint = keras_ckpt.ModelCheckpoint("runs/digits", monitor="val_accuracy", mode="max",
                                            keep=keras_ckpt.BestN(3) | keras_ckpt.LatestN(2))
    model.fit(x, y, validation_data=valid, epochs=30, callbacks=[checkpoint])
    ```

    Args:
        filepath: The directory of the run.
        monitor: The metric by which checkpoints are ranked, where something ranks them.
        verbose: 1 says what is saved and what is not, 0 nothing.
        save_best_only: Whether to save only what is better than everything on disk, and than
            `initial_value_threshold`. All that was saved stays, unless `keep` says otherwise.
        save_weights_only: Whether to leave the optimizer out. Training cannot go on exactly from such a checkpoint.
        mode: `"min"` if less of the monitored metric is better, `"max"` if more is, `"auto"` for what Keras knows.
        save_freq: `"epoch"`, a number of batches, a `datetime.timedelta`, or a list of these, any of which makes a save
            due. A save that is due in the middle of an epoch and cannot be ranked there is ranked at the epoch's end.
        initial_value_threshold: What the monitored metric must be better than, with `save_best_only`.
        keep: Which checkpoints stay: a policy, an int `n` for the newest `n`, or `None` for all. A save that would be
            removed at once is not written.
        metadata: A dict to put into each sidecar, or a function of `logs` that returns one.

    Raises:
        ValueError, TypeError: A wrong argument; at the latest before the first batch.
        DirectoryNotEmptyError: Before the first batch: the directory holds another run than the model's.
        DirectoryInUseError: Before the first batch: another process trains into the directory.
        SaveError: A checkpoint could not be saved. The others are untouched.
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: Literal["auto", "min", "max"] = "auto",
        save_freq: SaveFreq | list[SaveFreq] = "epoch",
        initial_value_threshold: float | None = None,
        *,
        keep: PreservationPolicy | int | None = None,
        metadata: Metadata | None = None,
    ) -> None:
        # Keras's own __init__ takes nothing but a template of file names.
        keras.callbacks.Callback.__init__(self)
        if mode not in ("auto", "min", "max"):
            raise ValueError(f"ModelCheckpoint expected mode 'auto', 'min' or 'max'. Received: mode={mode!r}")
        if not isinstance(monitor, str) or not monitor:
            raise TypeError(f"ModelCheckpoint expected the name of a metric. Received: monitor={monitor!r}")
        self.directory = CheckpointDirectory(_checked_path(filepath))
        self.filepath = self.directory.path
        self.monitor = monitor
        self.verbose = verbose
        self.save_best_only = save_best_only
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.save_freq = save_freq
        self.initial_value_threshold = initial_value_threshold
        self.keep = as_policy(keep)
        self.metadata = metadata if callable(metadata) else encodable_metadata(metadata or {})
        self._schedule = SaveSchedule(save_freq)
        self._ranking = _Ranking()
        self._fit: _Fit | None = None
        self._pending: str | None = None
        self._due = 0
        self._warned = False

    @property
    def best(self) -> float | None:
        """The best value of the monitored metric, on disk or the threshold; `None` if there is none yet."""
        mode = self._ranking.mode or self.mode
        values = [record.finite(self.monitor) for record in self.directory]
        known = [value for value in (*values, self.initial_value_threshold) if value is not None]
        if not known or mode == "auto":
            return None
        return min(known) if mode == "min" else max(known)

    def on_train_begin(self, logs: Logs = None) -> None:
        self._fit = None

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._current()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        began = time.perf_counter()
        reason = self._current().batch_end(batch)
        if reason is not None:
            self._save(reason, logs, began)
            if not self._ranking.monitors <= (logs or {}).keys():
                self._pending = reason

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        began = time.perf_counter()
        reasons = [reason for reason in (self._current().epoch_end(), self._pending) if reason is not None]
        self._pending = None
        if reasons:
            self._save(", ".join(reasons), logs, began)
        self._warn_of_no_such_metric(logs or {})

    def on_train_end(self, logs: Logs = None) -> None:
        if self._fit is None:
            return
        self._fit.close()
        self._fit = None
        if self._due and not len(self.directory):
            warnings.warn(
                f"Nothing was saved into {self.filepath}: {self._due} saves were due, and none was to be kept by "
                f"{self._ranking}. Was {self.monitor!r} ever a finite number, and better than "
                f"initial_value_threshold={self.initial_value_threshold}? Join the policy with "
                "keras_ckpt.LatestN(1) to have the newest in any case.",
                stacklevel=2,
            )

    def _current(self) -> _Fit:
        """The fit under way, begun with its first epoch: in `on_train_begin` another callback may yet restore."""
        if self._fit is None:
            self._ranking = self._resolve()
            self._pending = None
            self._due = 0
            writer = Writer(self.directory, self._ranking.keep, self._ranking.only)
            self._fit = _Fit(self, writer, self._schedule, self.save_weights_only)
        return self._fit

    def _resolve(self) -> _Ranking:
        """What ranks the checkpoints of this fit, with what the arguments left open."""

        def mode(monitor: str) -> Mode:
            if monitor == self.monitor and self.mode != "auto":
                return self.mode
            return mode_of(self.model, monitor)

        keep = self.keep and self.keep.resolve(self.monitor, mode)
        only = BestN(1, self.monitor, mode(self.monitor)) if self.save_best_only else None
        try:
            return _Ranking(keep, only, mode(self.monitor))
        except ValueError:
            return _Ranking(keep, only)  # nothing ranks by it

    def _save(self, reason: str, logs: Logs, began: float) -> None:
        fit = self._current()
        self._due += 1
        metrics = metrics_in(logs, self._ranking.monitors)
        record = None
        if self._beats_threshold(metrics.get(self.monitor)):
            record = fit.save(
                began,
                reason=reason,
                metrics=metrics,
                monitor=self.monitor,
                mode=self._ranking.mode,
                metadata=encodable_metadata(self.metadata(logs or {}) if callable(self.metadata) else self.metadata),
            )
        if self.verbose > 0:
            position = fit.progress.position
            value = tables.metric(metrics.get(self.monitor)) or "not known"
            outcome = f"saved {record.prefix}" if record else "not saved, it would not be kept"
            print(f"\nStep {position.step}, epoch {position.epoch}: {self.monitor} {value}, {outcome}")

    def _beats_threshold(self, value: float | None) -> bool:
        threshold = self.initial_value_threshold
        if not self.save_best_only or threshold is None or value is None:
            return True
        return value < threshold if self._ranking.mode == "min" else value > threshold

    def _warn_of_no_such_metric(self, logs: Mapping[str, Any]) -> None:
        now = CheckpointRecord(sequence=1, step=0, metrics=metrics_in(logs, ()))
        for monitor in sorted(self._ranking.monitors - logs.keys()):
            if not self._warned and missing(monitor, [*self.directory, now]):
                warnings.warn(no_such_metric(monitor, logs), stacklevel=2)
                self._warned = True


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
    ) -> None:
        keras.callbacks.Callback.__init__(self)
        self.directory = CheckpointDirectory(backup_dir)
        self.backup_dir = self.directory.path
        self.save_freq = save_freq
        self.double_checkpoint = double_checkpoint
        self.delete_checkpoint = delete_checkpoint
        self._schedule = SaveSchedule(save_freq)
        self._fit: _Fit | None = None
        self._epoch = 0

    def on_train_begin(self, logs: Logs = None) -> None:
        self._fit = None
        if not self.model.built:
            raise ValueError(
                f"BackupAndRestore needs a built model, or it could not restore {self.model.name!r} after a crash. "
                "Build it before fit(): model.build(input_shape), or call it on a batch of data."
            )
        if self.directory.listing():
            restore(self.model, self.directory)
            record = self.directory.latest()
            _begin_with(self.model, record.metadata.get("initial_epoch") if record else None)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        # fit has read it; left there, it would hold for the next fit too.
        _begin_with(self.model, None)
        self._epoch = epoch
        self._current()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        began = time.perf_counter()
        if reason := self._current().batch_end(batch):
            self._current().save(began, reason=reason, metadata={"initial_epoch": self._epoch})

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        began = time.perf_counter()
        if reason := self._current().epoch_end():
            self._current().save(began, reason=reason, metadata={"initial_epoch": epoch + 1})

    def on_train_end(self, logs: Logs = None) -> None:
        _begin_with(self.model, None)
        if self._fit is not None:
            self._fit.close()
            self._fit = None
        if self.delete_checkpoint:
            self.directory.clear()
            files.remove_unused(self.backup_dir)

    def _current(self) -> _Fit:
        if self._fit is None:
            writer = Writer(self.directory, LatestN(2 if self.double_checkpoint else 1))
            self._fit = _Fit(self, writer, self._schedule)
        return self._fit


@dataclasses.dataclass(frozen=True)
class _Ranking:
    """What decides in one fit: `keep` what stays, `only` what is written at all, `mode` the monitored direction."""

    keep: PreservationPolicy | None = None
    only: PreservationPolicy | None = None
    mode: Mode | None = None

    @property
    def monitors(self) -> Set[str]:
        """The metrics by which something is ranked."""
        return frozenset().union(*(policy.monitors for policy in (self.keep, self.only) if policy))

    def __str__(self) -> str:
        return " and ".join(repr(policy) for policy in (self.keep, self.only) if policy)


class _Fit:
    """One `fit` that saves into one directory."""

    def __init__(
        self, callback: keras.callbacks.Callback, writer: Writer, schedule: SaveSchedule, weights_only: bool = False
    ) -> None:
        self.progress = Progress(callback.model, (callback.params or {}).get("steps"))
        self._state = state.ModelState(callback.model, weights_only)
        self._writer = writer
        self._schedule = schedule
        writer.open(session=callback.params)
        try:
            _refuse_other_run(writer.directory, self.progress.position)
        except Exception:
            # A notebook keeps the error, and with it whatever has a reference here.
            writer.close()
            raise
        schedule.start()

    def batch_end(self, batch: int) -> str | None:
        """Counts what ran, and says what made a save due if one is."""
        before = self.progress.position.step
        return self._schedule.after_batches(before, self.progress.batch_end(batch).step)

    def epoch_end(self) -> str | None:
        """Counts an epoch, and says what made a save due if one is."""
        self.progress.epoch_end()
        return self._schedule.after_epoch()

    def save(self, began: float, **facts: Any) -> CheckpointRecord | None:
        """Saves the model where it is now, unless that would not be kept."""
        position = self.progress.position
        facts |= {"run_id": position.run_id, "epoch": position.epoch, "batch": position.batch}
        newest = self._writer.directory.latest() if position.batch == 0 else None
        if newest and newest.step == position.step and same_values(self._state, newest):
            # The epoch's last batch was saved already; what is new is what was measured since.
            return self._writer.amend(newest, **facts)
        facts |= {"time": time.time(), "versions": state.versions()}
        # Whoever goes on with TensorFlow's own manager numbers on from here.
        self._state.save_counter.assign(position.step)
        return self._writer.save(self._state.write, step=position.step, began=began, **facts)

    def close(self) -> None:
        self._writer.close()


def _begin_with(model: keras.Model, epoch: int | None) -> None:
    """Tells `fit` with which epoch to begin, between its `on_train_begin` and its first epoch."""
    # Keras's own BackupAndRestore has no other way.
    model._initial_epoch = epoch  # noqa: SLF001


def _refuse_other_run(directory: CheckpointDirectory, position: Position) -> None:
    listing = directory.listing()
    if listing.newer:
        listing.refuse_newer()
    if not listing or (listing.records and listing.records[-1].run_id == position.run_id):
        return
    newest = f", the newest of step {listing.records[-1].step}" if listing.records else ""
    count = len(listing.records) + len(listing.damaged) + len(listing.unmanaged)
    raise DirectoryNotEmptyError(
        f"{directory.path} holds {count} checkpoints of another run{newest}; this model does not continue it.\n"
        f"To go on with that run, compile the model and restore it: keras_ckpt.restore(model, {directory.path!r}).\n"
        "To begin another, train into another directory, or remove these: "
        f"keras_ckpt.CheckpointDirectory({directory.path!r}).clear()."
    )


def _checked_path(filepath: str | os.PathLike[str]) -> str:
    path = os.fspath(filepath)
    if isinstance(path, str) and path.endswith((".keras", ".h5")):
        raise ValueError(
            f"ModelCheckpoint saves into a directory; files of Keras's own formats are not supported yet. Received: "
            f"filepath={path!r}. Give a directory, such as {re.sub(r'(.weights)?.(keras|h5)$', '', path)!r}."
        )
    if isinstance(path, str) and re.search(r"\{.*\}", path):
        raise ValueError(
            "ModelCheckpoint names checkpoints by their step, and metrics are in the sidecars, so the directory is no "
            f"template. Received: filepath={path!r}. Give a name without braces."
        )
    return path
