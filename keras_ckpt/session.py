"""One `fit` that saves into one directory: it counts, says when a save is due, and saves."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import keras

from keras_ckpt import state
from keras_ckpt.directory import CheckpointDirectory
from keras_ckpt.errors import DirectoryNotEmptyError, DiskFullError
from keras_ckpt.position import Position, Progress
from keras_ckpt.record import CheckpointRecord, step_in
from keras_ckpt.restoring import same_values
from keras_ckpt.schedule import SaveSchedule
from keras_ckpt.tables import counted
from keras_ckpt.writer import Write, Writer

OnFullDisk = Literal["warn", "raise"]


class Session:
    """One `fit` that saves into one directory.

    Args:
        callback: The callback that saves.
        writer: What it saves with.
        schedule: When.
        on_full_disk: Whether a save that finds no room is a warning, and training goes on, or an error.
        weights_only: Whether to leave the optimizer out.

    Attributes:
        progress: Where the training is.
        missed: How many saves found no room.
    """

    def __init__(
        self,
        callback: keras.callbacks.Callback,
        writer: Writer,
        schedule: SaveSchedule,
        on_full_disk: OnFullDisk,
        weights_only: bool = False,
    ) -> None:
        self.missed = 0
        self._on_full_disk = on_full_disk
        self.progress = Progress(callback.model, (callback.params or {}).get("steps"))
        self._state = state.ModelState(callback.model, weights_only)
        self._writer = writer
        self._schedule = schedule
        writer.open(session=callback.params)
        try:
            refuse_other_run(writer.directory, self.progress.position)
        except Exception:
            # A notebook keeps the error, and with it whatever has a reference here.
            writer.close()
            raise

    def batch_end(self, batch: int) -> str | None:
        """Counts what ran, and says what made a save due if one is."""
        before = self.progress.position.step
        return self._schedule.after_batches(before, self.progress.batch_end(batch).step)

    def epoch_end(self) -> str | None:
        """Counts an epoch, and says what made a save due if one is."""
        self.progress.epoch_end()
        return self._schedule.after_epoch()

    def snapshot(self, others: Mapping[str, Any]) -> Write:
        """The model as it is now, with more to write beside it: a function for `save`."""
        self._state.save_counter.assign(self.progress.position.step)
        return self._state.snapshot(others)

    def save(self, began: float, write: Write | None = None, **facts: Any) -> CheckpointRecord | None:
        """Saves the model, unless that would not be kept, or there is no room for it.

        Args:
            began: When training began to wait for it, by `time.perf_counter`.
            write: What to write, a snapshot; defaults to the model as it is now.
            **facts: More fields of the record.
        """
        try:
            return self._save(began, write, **facts)
        except DiskFullError as error:
            if self._on_full_disk == "raise":
                raise
            self.missed += 1
            warnings.warn(f"{error} Training goes on.", stacklevel=2)
            return None

    def close(self) -> None:
        self._writer.close()

    def _save(self, began: float, write: Write | None, **facts: Any) -> CheckpointRecord | None:
        position = self.progress.position
        facts |= {"run_id": position.run_id, "epoch": position.epoch, "batch": position.batch}
        newest = self._writer.directory.latest() if position.batch == 0 and write is None else None
        if newest and newest.step == position.step and same_values(self._state, newest):
            # The epoch's last batch was saved already; what is new is what was measured since.
            return self._writer.amend(newest, **facts)
        facts |= {"time": time.time(), "versions": state.versions()}
        # Whoever goes on with TensorFlow's own manager numbers on from here.
        self._state.save_counter.assign(position.step)
        write = write or self._state.snapshot()
        return self._writer.save(write, step=position.step, size=self._state.size(), began=began, **facts)


def checked_on_full_disk(value: object) -> OnFullDisk:
    """A callback's argument, or an error that says what it may be."""
    if value not in get_args(OnFullDisk):
        raise ValueError(f"on_full_disk expected 'warn' or 'raise'. Received: {value!r}")
    return cast(OnFullDisk, value)


def refuse_other_run(directory: CheckpointDirectory, position: Position) -> None:
    """Refuses a fit that does not continue what the directory holds."""
    listing = directory.listing()
    listing.refuse_newer()
    newest = listing.records[-1] if listing.records else None
    if newest and newest.run_id != position.run_id:
        raise DirectoryNotEmptyError(
            f"{directory.path} holds {counted(len(listing.records), 'checkpoint')} of another run, the newest of step "
            f"{newest.step}; this model does not continue it.\n"
            "To go on with that run, compile the model and restore it: "
            f"keras_ckpt.restore(model, {directory.path!r}).\n"
            "To begin another, train into another directory, or remove these: "
            f"keras_ckpt.CheckpointDirectory({directory.path!r}).clear()."
        )
    unmanaged = [name for name in listing.unmanaged if newest is None or (step_in(name) or 0) > position.step]
    if unmanaged or (listing.damaged and newest is None):
        names = ", ".join([*unmanaged, *listing.damaged][:10])
        raise DirectoryNotEmptyError(
            f"{directory.path} holds checkpoints without a sidecar, or with a damaged one: {names}. No run can go on "
            "from them, and they are left alone: move them away, or train into another directory. "
            "keras_ckpt.restore(model, path) restores one that TensorFlow wrote."
        )
