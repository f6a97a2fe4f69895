"""The session of one `fit` that saves into one directory: counts progress, schedules saves, and writes them."""

from __future__ import annotations

import collections
import dataclasses
import errno
import functools
import time
import weakref
from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, cast, get_args

import keras
import msgspec

from keras_ckpt.errors import DiskFullError, SaveError
from keras_ckpt.model.backends import backend
from keras_ckpt.model.companions import companion
from keras_ckpt.model.keras_internals import FitInProgress, fit_in_progress
from keras_ckpt.model.position import Progress
from keras_ckpt.store import background
from keras_ckpt.store.directory import Change
from keras_ckpt.store.journal import Event, EventKind
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.notices import warn
from keras_ckpt.store.policies import is_final, kept_in_training
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.writer import SaveRequest, Writer, milliseconds
from keras_ckpt.training.backlog import MAX_WAITING, Backlog
from keras_ckpt.training.new_run import answer_pin, runs_to_replace
from keras_ckpt.training.schedule import SaveSchedule

OnFullDisk = Literal["warn", "raise"]

_CHECKS = 2
"""The number of epochs in which the unsaved state of a model is searched."""


@dataclasses.dataclass
class _FirstSave:
    """The fit, and the object with the method that must save a model before any other save of that fit."""

    fit: object = None
    owner: Callable[[], Any] = lambda: None
    save: Callable[[Any], object] = lambda owner: None


@dataclasses.dataclass
class _Warned:
    """The epochs in which the unsaved state of a model was searched, and whatever warnings named of the model."""

    epochs: set[int] = dataclasses.field(default_factory=set)
    named: set[str] = dataclasses.field(default_factory=set)


class Snapshot(Protocol):
    """The values of a model at one moment, as a session sees them."""

    @property
    def size(self) -> int:
        """The bytes of the values."""

    @property
    def is_copied(self) -> bool:
        """Whether the values are copies, which training cannot affect."""


Owner = TypeVar("Owner")
Held = TypeVar("Held", bound=Snapshot, contravariant=True)  # noqa: PLC0105


class Form(Protocol[Held]):
    """The form in which a model is saved: as TensorFlow checkpoints, or as files of Keras."""

    def holds(self, snapshot: Held) -> bool:
        """Whether all assumptions about the values of a snapshot hold. This may take time."""

    def copy(self, snapshot: Held) -> None:
        """Copies the values of a snapshot now, so that training need not copy values before it changes them."""

    def preparation(self) -> Callable[[], str]:
        """A function that prepares the first save, for a thread.

        It returns the reason why no model can be built from the checkpoints without its code, `""` if one can.
        """

    def unsaved(self) -> list[str]:
        """The places of state that a checkpoint of the model does not have."""

    def write(self, request: SaveRequest, snapshot: Held, amends: bool) -> CheckpointRecord | None:
        """Writes a snapshot, in any thread.

        Args:
            request: The request, without versions.
            snapshot: The values.
            amends: Whether a checkpoint of this step with the same values only gets a new sidecar.

        Returns:
            The record, `None` if the policy would not keep the checkpoint.
        """


class Outcome(NamedTuple):
    """The outcome of a save.

    Attributes:
        record: The record of the checkpoint, `None` if nothing was saved.
        error: The error of a failed save.
        replaced: Whether a newer save replaced this save before it began, because the policy keeps only the newer.
        changed: Whether nothing was saved, because an array changed that was assumed to be unchanged.
    """

    record: CheckpointRecord | None
    error: Exception | None = None
    replaced: bool = False
    changed: bool = False


class _Save(NamedTuple):
    """A submitted save and the handler of its outcome.

    Attributes:
        job: The job that saves.
        handler: The handler of the outcome.
        number: The number in the backlog, 0 for a job that saves nothing.
        candidate: The record that a policy would see.
    """

    job: background.Job[Outcome]
    handler: Callable[[Outcome], object] = lambda outcome: None
    number: int = 0
    candidate: CheckpointRecord | None = None


class Session(Generic[Held]):
    """The session of one `fit` that saves into one directory.

    Training waits for the snapshot of a save. Training does not wait for the write, unless `on_background` is false.
    The next save waits for the write if both would hold too much memory. A large model has one snapshot at a time,
    however many callbacks share it. Training also waits when it is too far ahead of the disk. A newer save replaces a
    waiting save that the policy would then remove.

    Args:
        callback: The callback that saves.
        writer: The writer of the directory.
        schedule: The schedule of the saves.
        on_full_disk: Whether a full disk is a warning (`"warn"`) or an error (`"raise"`).
        on_background: Whether training continues while a save is written.
        form: The form in which the model is saved.
        backs_up: Whether its saves precede other saves of the same step.
        fit: The `fit` in progress; defaults to the calling `fit`.

    Attributes:
        progress: The progress of the training.
        missed: The number of saves that found the disk or the memory full.
    """

    def __init__(
        self,
        callback: keras.callbacks.Callback,
        writer: Writer,
        schedule: SaveSchedule,
        on_full_disk: OnFullDisk,
        on_background: bool,
        form: Form[Held],
        *,
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
        self._form = form
        self._copies_at_once = backend.COPIES_AT_ONCE or bool(callback.model.jit_compile)
        self._began_at = self.progress.position.step
        self._writer = writer
        self._policies = writer.keep, writer.only
        self._schedule = schedule
        self._fit = callback.params

    def open(self, listing: Listing | None = None, replaces: bool = False) -> None:
        """Locks the directory for this session. Call it before every other method.

        Args:
            listing: The listing of the directory, if it was read under the writer's lock.
            replaces: Whether the first save of this session removes the other runs in the directory.

        Raises:
            DirectoryInUseError: Another process saves into the directory.
            DirectoryNotEmptyError: The directory belongs to another run or to another callback of this fit, or its only
                file is pinned and not of this run.
            SaveError: The directory cannot be written.
        """
        background.report()
        self._writer.open(session=self._fit)
        try:
            listing = self._writer.listing() if listing is None else listing
            self._writer.known_pins = answer_pin(listing, self.progress.position)
            self._writer.replaced = runs_to_replace(listing, self.progress.position, replaces)
        except Exception:
            # A notebook keeps the error, and the error's frames keep the writer alive.
            self._writer.close()
            raise

    def has_reached(self, step: int) -> bool:
        """Whether the newest checkpoint of the run is of a step or of a later step.

        Saves reach the disk in their order. So the step was saved, and its policy may have pruned it since.
        """
        run_id = self.progress.position.run_id
        steps = [record.step for record in self._writer.listing().records if record.run_id == run_id]
        return bool(steps) and steps[-1] >= step

    @property
    def is_saving(self) -> bool:
        """Whether a save has an outcome that no handler received yet."""
        return bool(self._saves)

    def batch_end(self, batch: int) -> str | None:
        """Counts the batches that ran. Returns the reason of a save that is due, else `None`."""
        if not self._ready:
            self._make_ready()
        before = self.progress.position.step
        return self._schedule.after_batches(before, self.progress.batch_end(batch).step)

    def epoch_end(self) -> str | None:
        """Counts an epoch. Returns the reason of a save that is due, else `None`.

        No save is due before a batch of the fit has ended.
        """
        before = self.progress.position
        after = self.progress.epoch_end()
        if after.step == self._began_at and not before.batch:
            return None
        return self._schedule.after_epoch()

    def note(self, kind: EventKind, **facts: Any) -> None:
        """Notes an event in the journal, of the current step by default."""
        self._writer.directory.note(Event(kind=kind, **{**dataclasses.asdict(self.progress.position), **facts}))

    def copy(self, snapshot: Held) -> SaveError | None:
        """Copies the values of a snapshot now, so that training need not copy values before it changes them.

        Returns:
            The error of a copy that found no memory, after a warning.
        """
        try:
            with self._writer.explaining(self.progress.position.step):
                self._form.copy(snapshot)
        except SaveError as error:
            self._answer(error)
            return error
        return None

    def hold_first(self, owner: Owner, save: Callable[[Owner], object]) -> None:
        """Registers a method that saves before any other save of the model in this fit. Holds its object weakly.

        A `weakref.WeakMethod` would print an error at the exit of a process that a signal ends.
        """
        first = companion(self.progress.model, _FirstSave)
        first.fit, first.owner, first.save = self._fit, weakref.ref(owner), save

    def save_first(self) -> None:
        """Calls the method that `hold_first` registered, once."""
        first = companion(self.progress.model, _FirstSave)
        fit, first.fit = first.fit, None
        owner = first.owner() if fit is self._fit else None
        if owner is not None:
            first.save(owner)

    def rank(self, ranks: bool) -> None:
        """Applies the policies, or keeps everything within their bounds while the metric to rank by is missing."""
        keep, only = self._policies
        self._writer.keep, self._writer.only = (keep, only) if ranks else (keep and keep.unranked, None)

    def skips(self) -> bool:
        """Whether to skip a save now, because it would wait for a save of an earlier step.

        Only saves by batches and time in the background are skipped. A save at an epoch's last batch never is.
        """
        position = self.progress.position
        waits = not self._on_background or position.batch == self.progress.steps
        if waits or not background.is_full(self._moment(), self._snapshot_size) or self._backlog.is_too_long(more=1):
            return False
        self._backlog.due()
        if not self._skipped:
            self._skipped = True
            warn(
                f"The save of step {position.step} into {self._writer.directory.path} is skipped, because an earlier "
                "save is still being written. Later saves are skipped in the same way. Save less often, or pass "
                "save_on_background=False to make training wait."
            )
        self.note("skipped", why="an earlier save is still being written")
        return True

    def save(
        self, request: SaveRequest, snapshot: Held, handler: Callable[[Outcome], object], amends: bool = False
    ) -> None:
        """Saves the model, unless the policy would not keep the checkpoint, or the disk or the memory is full.

        Args:
            request: The request, without versions.
            snapshot: The values.
            handler: The handler of the outcome, called at once or at a later call in this thread.
            amends: Whether a checkpoint of this step with the same values only gets a new sidecar.

        Raises:
            SaveError: This save, or an earlier one, failed.
        """
        self.save_first()
        self._warn_of_unsaved()
        self._snapshot_size = snapshot.size
        moment = self.progress.position.run_id, request.step
        number = self._backlog.due()
        candidate = request.record(number)
        self._replace_waiting(candidate)
        if not snapshot.is_copied and background.is_full(moment, self._snapshot_size):
            background.wait()
        self.settle()
        if self._copies_at_once and (error := self.copy(snapshot)):
            self._backlog.done(number)
            handler(Outcome(None, error))
            return
        if self._on_background:
            request = msgspec.structs.replace(request, blocked_ms=milliseconds(request.began, time.perf_counter()))
        write = functools.partial(self._write, request, snapshot, amends)
        job = background.Job(write, moment, self._snapshot_size, first=self._backs_up)
        self._saves.append(_Save(job, handler, number, candidate))
        self.settle(wait=not self._on_background)

    def _write(self, request: SaveRequest, snapshot: Held, amends: bool) -> Outcome:
        """Writes a snapshot, in a background thread or in this one."""
        if not self._form.holds(snapshot):
            return Outcome(None, changed=True)
        return Outcome(self._form.write(request, snapshot, amends))

    def _replace_waiting(self, candidate: CheckpointRecord) -> None:
        """Drops the saves that have not begun and that the policy would not keep beside a newer save."""
        waiting = [save for save in self._saves if save.candidate is not None]
        others = [save.candidate for save in waiting if save.candidate and save.candidate.step != candidate.step]
        kept = {record.step for record in others}
        if self._writer.keep is not None and is_final(self._writer.keep):
            kept = kept_in_training(self._writer.keep, [*others, candidate])
        again = [save for save in waiting if save.candidate and save.candidate.step == candidate.step]
        older = [save for save in waiting if save.candidate and save.candidate.step not in kept and save not in again]
        older = [save for save in older if not save.job.has_begun()]
        # The oldest save keeps its place in the queue, if memory allows. A newer save joins the end of the queue, so
        # if every save were replaced, none would ever be written.
        for save in [*again, *older[1:]]:
            self._drop(save)
        if older and background.is_full((candidate.run_id, candidate.step), self._snapshot_size):
            self._drop(older[0])

    def _drop(self, save: _Save) -> None:
        """Drops a save, unless it has begun."""
        if save.job.drop():
            self._saves.remove(save)
            why = "a newer save took its place before it was written"
            self._writer.directory.notify([Change("skipped", save.candidate, why)] if save.candidate else [])
            save.handler(Outcome(None, replaced=True))

    def _warn_of_unsaved(self) -> None:
        """Warns of state that no checkpoint of this model has, at the first saves of two epochs.

        Two, because some state first changes when an epoch ends, after a save.
        """
        model, position = self.progress.model, self.progress.position
        searched = companion(model, _Warned)
        if position.step == self._began_at or position.epoch in searched.epochs or len(searched.epochs) == _CHECKS:
            return
        searched.epochs.add(position.epoch)
        unsaved = [place for place in self._form.unsaved() if place not in searched.named]
        if unsaved:
            searched.named.update(unsaved)
            warn(
                f"Checkpoints of {model.name!r} do not have this state of it: {', '.join(unsaved[:20])}. In a restored "
                "model it has the program's initial values. Use keras.Variable. Hold variables, layers and optimizers "
                "in attributes of a layer, or in lists and dicts there. Save other state in the layer's "
                "save_own_variables() or save_assets()."
            )

    def settle(self, wait: bool = False) -> None:
        """Calls the handlers of finished saves, and waits while training is too far ahead of the disk.

        Args:
            wait: Whether to wait for all saves.

        Raises:
            SaveError: A save failed.
        """
        while self._saves and (wait or self._saves[0].job.done() or self._is_too_far_ahead()):
            # Wait before the popleft: an interrupt must not lose the save.
            self._saves[0].job.wait()
            save = self._saves.popleft()
            self._backlog.done(save.number)
            try:
                outcome = save.job.result()
            except Exception as error:  # noqa: BLE001 - the answer raises it
                save.handler(Outcome(None, error))
                self._answer(error)
            else:
                save.handler(outcome)

    def _answer(self, error: Exception) -> None:
        """Warns of a save that found no room on the disk or in the memory, and raises any other error."""
        is_passing = isinstance(error, DiskFullError) and self._on_full_disk == "warn"
        if not is_passing and not _is_out_of_memory(error.__cause__):
            raise error
        self.missed += 1
        warn(f"{error} Training continues.")

    def _is_too_far_ahead(self) -> bool:
        return len(self._saves) > MAX_WAITING or self._backlog.is_too_long()

    def close(self) -> None:
        """Waits for all saves in progress, and unlocks the directory.

        Raises:
            SaveError: A save failed.
        """
        try:
            self.settle(wait=True)
        finally:
            self.unlock()

    def unlock(self) -> None:
        """Unlocks the directory for other sessions, until the next save."""
        self._writer.close()

    def _make_ready(self) -> None:
        """Prepares the first save in the background, after the first batch has built the slots."""
        self._ready = True
        prepare = self._form.preparation()
        reasons = []

        def work() -> Outcome:
            reasons.append(prepare())
            return Outcome(None)

        job = background.Job(work, self._moment(), 0)
        self._saves.append(_Save(job, lambda outcome: self._warn_of_config(*reasons)))

    def _warn_of_config(self, reason: str = "") -> None:
        """Warns once that `load_model` cannot build the model. A backup is restored by the program that saved it."""
        model = self.progress.model
        named = companion(model, _Warned).named
        if reason and reason not in named and not self._backs_up:
            named.add(reason)
            warn(
                f"keras_ckpt.load_model() cannot build {model.name!r} from its checkpoints, because {reason}; "
                "keras_ckpt.restore() needs a model that the program builds."
            )

    def _moment(self) -> tuple[str, int]:
        return self.progress.position.run_id, self.progress.position.step


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is a lack of memory, for instance for the copies of a save."""
    is_refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return is_refused or isinstance(error, (MemoryError, backend.OutOfMemory))


def checked_on_full_disk(value: object) -> OnFullDisk:
    """Checks the argument `on_full_disk` of a callback."""
    if value not in get_args(OnFullDisk):
        raise ValueError(f"on_full_disk expected 'warn' or 'raise'. Received: {value!r}")
    return cast(OnFullDisk, value)
