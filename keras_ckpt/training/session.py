"""One `fit` that saves into one directory: it counts, says when a save is due, and saves."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

import keras
import msgspec

from keras_ckpt.errors import DirectoryNotEmptyError, DiskFullError
from keras_ckpt.formats.arena import arena_of
from keras_ckpt.formats.sharing import SharingWrite
from keras_ckpt.formats.variables import SUFFIX
from keras_ckpt.model import model_state
from keras_ckpt.model.keras_internals import FitInProgress, fit_in_progress
from keras_ckpt.model.position import Position, Progress
from keras_ckpt.model.snapshot import Late, Snapshot
from keras_ckpt.store import background
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.notices import warn
from keras_ckpt.store.policies import is_known, kept_in_training
from keras_ckpt.store.record import CheckpointRecord, step_in
from keras_ckpt.store.tables import counted
from keras_ckpt.store.writer import SaveRequest, Writer, milliseconds
from keras_ckpt.training.backlog import MOST, Backlog
from keras_ckpt.training.schedule import SaveSchedule

OnFullDisk = Literal["warn", "raise"]

_firsts: weakref.WeakKeyDictionary[keras.Model, tuple[object, Callable[[], Any]]] = weakref.WeakKeyDictionary()
"""What is to be saved of a model before anything else, with the fit for which that is so."""
# By model, the epochs in which its unsaved state was looked for, and the places that were named.
_looked: weakref.WeakKeyDictionary[keras.Model, tuple[set[int], set[str]]] = weakref.WeakKeyDictionary()
_LOOKS = 2
"""The models of which was said what no checkpoint has."""


class Outcome(NamedTuple):
    """What became of a save.

    Attributes:
        record: What was saved, `None` if nothing was.
        error: Why it failed, if it did.
        replaced: Whether a newer save came before it had begun, beside which the policy does not keep it.
        changed: Whether an array was found to be changed that was assumed to be unchanged, so nothing was saved.
    """

    record: CheckpointRecord | None
    error: Exception | None = None
    replaced: bool = False
    changed: bool = False


class _Save(NamedTuple):
    """A save that was begun, and who is to be told of its end.

    Attributes:
        job: What saves.
        then: Told of the outcome.
        number: Its number in the backlog, 0 if it is no save.
        candidate: What a policy would see of it.
    """

    job: background.Job[Outcome]
    then: Callable[[Outcome], object] = lambda outcome: None
    number: int = 0
    candidate: CheckpointRecord | None = None


class Session:
    """One `fit` that saves into one directory.

    A save is a snapshot, which training waits for, and its writing, for which it does not, unless it is told to. The
    next save waits until it is written, if both would hold too much: of great models there is one snapshot at a time,
    however many callbacks share it. Training waits too where it would be too far ahead of the disk. A save that waits,
    and that the policy would remove beside a newer one, is replaced by that.

    Args:
        callback: The callback that saves.
        writer: What it saves with.
        schedule: When.
        on_full_disk: Whether a save that finds no room is a warning, and training goes on, or an error.
        on_background: Whether training goes on while a save is written.
        weights_only: Whether to leave the optimizer out.
        backs_up: Whether it goes before saves of the same moment that only select.
        fit: The `fit` in progress; defaults to the one that calls.

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
        backs_up: bool = False,
        fit: FitInProgress | None = None,
    ) -> None:
        self.missed = 0
        self._on_background = on_background
        self._saves: collections.deque[_Save] = collections.deque()
        self._backlog = Backlog()
        self._backs_up = backs_up
        self._skipped = self._ready = False
        self._snapshot_size = 0
        self._on_full_disk = on_full_disk
        self.progress = Progress(callback.model, (callback.params or {}).get("steps"), fit or fit_in_progress())
        self._state = model_state.ModelState(callback.model, weights_only)
        self._arena = arena_of(callback.model)
        self._copies_at_once = bool(callback.model.jit_compile)
        self._attributes = self._state.attributes()
        self._began_at = self.progress.position.step
        self._writer = writer
        self._policies = writer.keep, writer.only
        self._schedule = schedule
        self._fit = callback.params

    def open(self, listing: Listing | None = None) -> None:
        """Becomes the only session that saves into the directory. Everything else comes after.

        Args:
            listing: What the directory holds, if the writer was open when it was read.

        Raises:
            DirectoryInUseError: Another process saves into the directory.
            DirectoryNotEmptyError: The directory is one of another run, or of another callback of this fit.
            SaveError: The directory cannot be written.
        """
        background.tell()
        self._writer.open(session=self._fit)
        try:
            listing = self._writer.directory.listing() if listing is None else listing
            refuse_other_run(listing, self.progress.position)
        except Exception:
            # A notebook keeps the error, and with it whatever has a reference here.
            self._writer.close()
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
        """Counts an epoch, and says what made a save due if one is; none while no batch of the fit has ended."""
        before = self.progress.position
        after = self.progress.epoch_end()
        if after.step == self._began_at and not before.batch:
            return None
        return self._schedule.after_epoch()

    def snapshot(self, others: Mapping[str, Any] = {}, later: Late | None = None) -> Snapshot:
        """The model as it is now, with more to write beside it."""
        # Whoever goes on with TensorFlow's own manager numbers on from here.
        self._state.save_counter.assign(self.progress.position.step)
        return self._state.snapshot(others, later)

    def copy(self, snapshot: Snapshot) -> None:
        """Copies the values of a snapshot at once, so that training need not copy what it changes."""
        with self._writer.explaining(self.progress.position.step):
            snapshot.detach(self._arena, background.is_idle())

    def hold_first(self, save: Callable[[], object]) -> None:
        """Has something saved before any other save of the model in this fit. The method is not kept alive."""
        _firsts[self.progress.model] = self._fit, weakref.WeakMethod(save)

    def save_first(self) -> None:
        """Saves what is to be saved first, if it was not yet."""
        fit, save = _firsts.pop(self.progress.model, (None, lambda: None))
        method = save() if fit is self._fit else None
        if method is not None:
            method()

    def rank(self, ranks: bool) -> None:
        """Has the policies decide, or keeps everything for as long as there is nothing to rank by."""
        self._writer.keep, self._writer.only = self._policies if ranks else (None, None)

    def skips(self) -> bool:
        """Whether a save of now would have to wait for one of an earlier step, so that it is better left out.

        That is for saves by batches and time that training does not wait for anyway; in the last batch of an epoch, it
        is never so.
        """
        position = self.progress.position
        waits = not self._on_background or position.batch == self.progress.steps
        if waits or not background.is_full(self._moment(), self._snapshot_size) or self._backlog.is_too_long(more=1):
            return False
        self._backlog.due()
        if not self._skipped:
            self._skipped = True
            warn(
                f"The save of step {position.step} into {self._writer.directory.path} is left out, and so are later "
                "ones that come while an earlier one is still being written. Save less often, or give "
                "save_on_background=False to have training wait."
            )
        return True

    def save(
        self, request: SaveRequest, snapshot: Snapshot, then: Callable[[Outcome], object], amends: bool = False
    ) -> None:
        """Saves the model, unless the policy would not keep the checkpoint, or there is no room for it.

        Args:
            request: What to save, but for the versions.
            snapshot: The values.
            then: A handler of the outcome, called at once or at a later call in this thread.
            amends: Whether a checkpoint of this step with the same values is described again instead.

        Raises:
            SaveError: This save, or an earlier one, failed.
        """
        self.save_first()
        self._warn_of_unsaved()
        self._snapshot_size = self._state.size + snapshot.others_size
        moment = self.progress.position.run_id, request.step
        number = self._backlog.due()
        candidate = request.record(number)
        self._replace_waiting(candidate)
        if not snapshot.is_copied and background.is_full(moment, self._snapshot_size):
            background.wait()
        self.settle()
        if self._copies_at_once:
            self.copy(snapshot)
        if self._on_background:
            request = msgspec.structs.replace(request, blocked_ms=milliseconds(request.began, time.perf_counter()))
        write = functools.partial(self._write, request, snapshot, amends)
        job = background.Job(write, moment, self._snapshot_size, first=self._backs_up)
        self._saves.append(_Save(job, then, number, candidate))
        self.settle(wait=not self._on_background)

    def _write(self, request: SaveRequest, snapshot: Snapshot, amends: bool) -> Outcome:
        """Writes a snapshot; in the background, unless training waits for it."""
        if not snapshot.is_true:
            return Outcome(None, changed=True)
        with self._writer.explaining(request.step):
            values = snapshot.move(self._arena)
        sharing = SharingWrite(values, self._arena, self._writer.directory)
        newest = self._writer.latest() if amends else None
        if newest and newest.step == request.step and sharing.is_in(newest, _is_of_model):
            # The epoch's last batch is saved already. Only the metrics of the epoch's end are new.
            amended = self._writer.amend(newest, request.amended)
            if amended is not None:
                return Outcome(amended)
        # The payload looks for the room itself: it may link most of its files.
        request = msgspec.structs.replace(request, size=0, versions=model_state.versions())
        record = self._writer.save(request, sharing)
        if record is not None:
            sharing.remember(record)
        return Outcome(record)

    def _replace_waiting(self, candidate: CheckpointRecord) -> None:
        """Gives up saves that have not begun, and that the policy would not keep beside a newer one."""
        waiting = [save for save in self._saves if save.candidate is not None]
        others = [save.candidate for save in waiting if save.candidate and save.candidate.step != candidate.step]
        kept = {record.step for record in others}
        if self._writer.keep is not None and is_known(self._writer.keep):
            kept = kept_in_training(self._writer.keep, [*others, candidate])
        again = [save for save in waiting if save.candidate and save.candidate.step == candidate.step]
        older = [save for save in waiting if save.candidate and save.candidate.step not in kept and save not in again]
        older = [save for save in older if not save.job.has_begun()]
        # The oldest keeps its place in the queue, if there is memory for it. Saves that always give way to a newer one,
        # which is the last in the queue, would never be written.
        for save in [*again, *older[1:]]:
            self._give_up(save)
        if older and background.is_full((candidate.run_id, candidate.step), self._snapshot_size):
            self._give_up(older[0])

    def _give_up(self, save: _Save) -> None:
        """Gives up a save, unless it has begun."""
        if save.job.drop():
            self._saves.remove(save)
            save.then(Outcome(None, replaced=True))

    def _warn_of_unsaved(self) -> None:
        """Warns of state that no checkpoint of this model has, with the first saves of two epochs.

        Some state changes first when an epoch ends, after a save.
        """
        model, position = self.progress.model, self.progress.position
        epochs, named = _looked.setdefault(model, (set(), set()))
        if position.step == self._began_at or position.epoch in epochs or len(epochs) == _LOOKS:
            return
        epochs.add(position.epoch)
        unsaved = [each for each in self._state.unsaved(self._attributes) if each not in named]
        if unsaved:
            named.update(unsaved)
            warn(
                f"Checkpoints of {model.name!r} do not have this state of it: {', '.join(unsaved[:20])}. A restored "
                "model has what the program makes of it. Use keras.Variable, and hold variables, layers and optimizers "
                "in attributes of a layer, or in lists and dicts there; what is no variable belongs into its "
                "save_own_variables() or save_assets()."
            )

    def settle(self, wait: bool = False) -> None:
        """Tells of the saves that have ended, and waits where training would be too far ahead of the disk.

        Args:
            wait: Whether to wait for all that have not.

        Raises:
            SaveError: One failed.
        """
        while self._saves and (wait or self._saves[0].job.done() or self._is_too_far()):
            # Whoever interrupts the waiting finds the save still there.
            self._saves[0].job.wait()
            save = self._saves.popleft()
            self._backlog.done(save.number)
            try:
                outcome = save.job.result()
            except Exception as error:
                save.then(Outcome(None, error))
                if not isinstance(error, DiskFullError) or self._on_full_disk == "raise":
                    raise
                self.missed += 1
                warn(f"{error} Training goes on.")
            else:
                save.then(outcome)

    def _is_too_far(self) -> bool:
        return len(self._saves) > MOST or self._backlog.is_too_long()

    def close(self) -> None:
        """Waits for what is under way, and lets another session write here.

        Raises:
            SaveError: A save failed.
        """
        try:
            self.settle(wait=True)
        finally:
            self.unlock()

    def unlock(self) -> None:
        """Lets another session write here, until the next save."""
        self._writer.close()

    def _make_ready(self) -> None:
        """Gets the memory for copies before there is something to copy, with that of slots, made in the first batch."""
        self._ready = True
        sizes = self._state.sizes()

        def make_room() -> Outcome:
            with contextlib.suppress(OSError):  # the save that needs it says so
                self._arena.make_room(sizes)
            return Outcome(None)

        self._saves.append(_Save(background.Job(make_room, self._moment(), 0)))

    def _moment(self) -> tuple[str, int]:
        return self.progress.position.run_id, self.progress.position.step


def _is_of_model(key: bytes) -> bool:
    """Whether the key is a variable's; what the model's metrics have counted aside."""
    return key.endswith(SUFFIX.encode()) and not key.startswith(b"metrics/")


def checked_on_full_disk(value: object) -> OnFullDisk:
    """A callback's argument, or an error that says what it may be."""
    if value not in get_args(OnFullDisk):
        raise ValueError(f"on_full_disk expected 'warn' or 'raise'. Received: {value!r}")
    return cast(OnFullDisk, value)


def refuse_other_run(listing: Listing, position: Position) -> None:
    """Refuses a fit that does not continue what the directory holds."""
    listing.refuse_newer()
    newest = listing.records[-1] if listing.records else None
    if newest and newest.run_id != position.run_id:
        raise DirectoryNotEmptyError(
            f"{listing.path} holds {counted(len(listing.records), 'checkpoint')} of another run, the newest of step "
            f"{newest.step}; this model does not continue it.\n"
            "To continue that run, compile the model and restore it: "
            f"keras_ckpt.restore(model, {listing.path!r}). For a new phase with another optimizer, give "
            "weights_only=True as well.\n"
            "To begin another, train into another directory, or remove these: "
            f"keras_ckpt.CheckpointDirectory({listing.path!r}).clear()."
        )
    unmanaged = [name for name in listing.unmanaged if newest is None or (step_in(name) or 0) > position.step]
    if unmanaged or (listing.damaged and newest is None):
        names = ", ".join([*unmanaged, *listing.damaged][:10])
        raise DirectoryNotEmptyError(
            f"{listing.path} holds checkpoints without a sidecar, or with a damaged one: {names}. No run can go on "
            "from them, and they are left alone: move them away, or train into another directory. "
            "keras_ckpt.restore(model, path) restores one that TensorFlow wrote."
        )
