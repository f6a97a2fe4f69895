"""One `fit` that saves into one directory: it counts, says when a save is due, and saves."""

from __future__ import annotations

import collections
import contextlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

import keras

from keras_ckpt import background, state
from keras_ckpt.arena import arena_of
from keras_ckpt.directory import CheckpointDirectory
from keras_ckpt.errors import DirectoryNotEmptyError, DiskFullError
from keras_ckpt.position import Position, Progress
from keras_ckpt.record import REASON_LIMIT, CheckpointRecord, step_in
from keras_ckpt.schedule import SaveSchedule
from keras_ckpt.sharing import SharingWrite
from keras_ckpt.snapshot import Snapshot
from keras_ckpt.tables import counted
from keras_ckpt.writer import Writer

OnFullDisk = Literal["warn", "raise"]


class Outcome(NamedTuple):
    """What became of a save.

    Attributes:
        record: What was saved, `None` if nothing was.
        error: Why it failed, if it did.
    """

    record: CheckpointRecord | None
    error: Exception | None = None


class _Save(NamedTuple):
    """A save that was begun, and who is to be told of its end."""

    job: background.Job[CheckpointRecord | None]
    then: Callable[[Outcome], object]


class Session:
    """One `fit` that saves into one directory.

    A save is a snapshot, which training waits for, and its writing, for which it does not, unless it is told to. The
    next save waits until it is written, if both would hold too much: of great models there is one snapshot at a time,
    however many callbacks share it.

    Args:
        callback: The callback that saves.
        writer: What it saves with.
        schedule: When.
        on_full_disk: Whether a save that finds no room is a warning, and training goes on, or an error.
        on_background: Whether training goes on while a save is written.
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
        on_background: bool,
        weights_only: bool = False,
    ) -> None:
        background.tell()
        self.missed = 0
        self._on_background = on_background
        self._saves: collections.deque[_Save] = collections.deque()
        self._skipped = self._ready = False
        self._snapshot_size = 0
        self._on_full_disk = on_full_disk
        self.progress = Progress(callback.model, (callback.params or {}).get("steps"))
        self._state = state.ModelState(callback.model, weights_only)
        self._arena = arena_of(callback.model)
        self._copies_at_once = bool(callback.model.jit_compile)
        self._writer = writer
        self._schedule = schedule
        writer.open(session=callback.params)
        try:
            refuse_other_run(writer.directory, self.progress.position)
        except Exception:
            # A notebook keeps the error, and with it whatever has a reference here.
            writer.close()
            raise

    @property
    def is_saving(self) -> bool:
        """Whether there is a save of whose end nobody was told yet."""
        return bool(self._saves)

    def batch_end(self, batch: int) -> str | None:
        """Counts what ran, and says what made a save due if one is."""
        if not self._ready:
            self._make_ready()
        before = self.progress.position.step
        return self._schedule.after_batches(before, self.progress.batch_end(batch).step)

    def epoch_end(self) -> str | None:
        """Counts an epoch, and says what made a save due if one is."""
        self.progress.epoch_end()
        return self._schedule.after_epoch()

    def snapshot(self, others: Mapping[str, Any] = {}) -> Snapshot:
        """The model as it is now, with more to write beside it."""
        # Whoever goes on with TensorFlow's own manager numbers on from here.
        self._state.save_counter.assign(self.progress.position.step)
        return self._state.snapshot(others)

    def skips(self) -> bool:
        """Whether a save of now would have to wait for one of an earlier step, so that it is better left out.

        That is for saves by batches and time that training does not wait for anyway; in the last batch of an epoch, it
        is never so.
        """
        position = self.progress.position
        waits = not self._on_background or position.batch == self.progress.steps
        if waits or not background.is_full(self._moment(), self._snapshot_size):
            return False
        if not self._skipped:
            self._skipped = True
            warnings.warn(
                f"The save of step {position.step} into {self._writer.directory.path} is left out, and so are later "
                "ones that come while an earlier one is still being written. Save less often, or give "
                "save_on_background=False to have training wait.",
                stacklevel=2,
            )
        return True

    def save(
        self,
        began: float,
        snapshot: Snapshot,
        *,
        amends: bool = False,
        then: Callable[[Outcome], object] = lambda outcome: None,
        **facts: Any,
    ) -> None:
        """Saves the model, unless that would not be kept, or there is no room for it.

        Args:
            began: When training began to wait for it, by `time.perf_counter`.
            snapshot: What to write.
            amends: Whether the facts may be added to a checkpoint of this step, if it has the same values.
            then: Told of the outcome, at once or at a later call in this thread.
            **facts: More fields of the record.

        Raises:
            SaveError: This save, or an earlier one, failed.
        """
        self._snapshot_size = self._state.size + snapshot.others_size
        if background.is_full(self._moment(), self._snapshot_size):
            background.wait()
        self.settle()
        position, now = self.progress.position, time.time()
        facts |= {"run_id": position.run_id, "epoch": position.epoch, "batch": position.batch}
        facts["reason"] = facts["reason"][:REASON_LIMIT]
        if self._copies_at_once:
            with self._writer.explaining(position.step):
                snapshot.detach(self._arena, background.is_idle())
        went_on = time.perf_counter() if self._on_background else None

        def write() -> CheckpointRecord | None:
            with self._writer.explaining(position.step):
                values = snapshot.move(self._arena)
            sharing = SharingWrite(values, self._arena, self._writer.directory)
            newest = self._writer.directory.latest() if amends else None
            if newest and newest.step == position.step and sharing.is_in(newest, _is_of_model):
                # The epoch's last batch was saved already; what is new is what was measured since.
                amended = self._writer.amend(newest, **facts)
                if amended is not None:
                    return amended
            facts.update(step=position.step, size=0, time=now, versions=state.versions())
            record = self._writer.save(sharing, began=began, went_on=went_on, **facts)
            if record is not None:
                sharing.remember(record)
            return record

        self._saves.append(_Save(background.Job(write, self._moment(), self._snapshot_size), then))
        self.settle(wait=not self._on_background)

    def settle(self, wait: bool = False) -> None:
        """Tells of the saves that have ended.

        Args:
            wait: Whether to wait for those that have not.

        Raises:
            SaveError: One failed.
        """
        while self._saves and (wait or self._saves[0].job.done()):
            # Whoever interrupts the waiting finds the save still there.
            self._saves[0].job.wait()
            job, then = self._saves.popleft()
            try:
                outcome = Outcome(job.result())
            except Exception as error:
                then(Outcome(None, error))
                if not isinstance(error, DiskFullError) or self._on_full_disk == "raise":
                    raise
                self.missed += 1
                warnings.warn(f"{error} Training goes on.", stacklevel=2)
            else:
                then(outcome)

    def close(self) -> None:
        """Waits for what is under way, and lets another session write here.

        Raises:
            SaveError: A save failed.
        """
        try:
            self.settle(wait=True)
        finally:
            self._writer.close()

    def _make_ready(self) -> None:
        """Gets the memory for copies before there is something to copy, with that of slots, made in the first batch."""
        self._ready = True
        sizes = self._state.sizes()

        def make_room() -> None:
            with contextlib.suppress(OSError):  # the save that needs it says so
                self._arena.make_room(sizes)

        self._saves.append(_Save(background.Job(make_room, self._moment(), 0), lambda outcome: None))

    def _moment(self) -> tuple[str, int]:
        return self.progress.position.run_id, self.progress.position.step


def _is_of_model(key: bytes) -> bool:
    """Whether the key is a variable's; what the model's metrics have counted aside."""
    return key.endswith(state.SUFFIX.encode()) and not key.startswith(b"metrics/")


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
