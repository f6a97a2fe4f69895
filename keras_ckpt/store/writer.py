"""Saving checkpoints of one run into a directory: selected, staged, committed, pruned.

A save has two halves. `stage` writes the files of a checkpoint durably into a private folder. `commit` puts them in
their place. The payload is the caller's: a function that writes files into a folder.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import time as clock
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, NamedTuple

import msgspec

from keras_ckpt.errors import CheckpointError, DirectoryNotEmptyError, DiskFullError, SaveError
from keras_ckpt.store import commit, layout, tables
from keras_ckpt.store import record as sidecars
from keras_ckpt.store.bounds import droppable, excess
from keras_ckpt.store.directory import Change, CheckpointDirectory
from keras_ckpt.store.files import Folder, UnfinishedError
from keras_ckpt.store.journal import Event, of_record
from keras_ckpt.store.listing import Known, Listing, amend, examine, freed
from keras_ckpt.store.locks import WriterLock
from keras_ckpt.store.notices import warn
from keras_ckpt.store.policies import PreservationPolicy, kept_in_training
from keras_ckpt.store.record import REASON_LIMIT, CheckpointFile, CheckpointRecord, Mode, superseded

Write = Callable[[Folder, CheckpointRecord], Sequence[CheckpointFile]]
"""Writes the files of a checkpoint into a folder, durably, and returns their sizes and digests."""

_FULL = {
    errno.ENOSPC: "Free some space, or keep fewer checkpoints.",
    errno.EDQUOT: "Free some of the quota, or keep fewer checkpoints.",
}
_OTHER_RUN = "a new run has replaced its run"
_MENDS = _FULL | {
    errno.EACCES: "Make the directory writable for this user, or choose another.",
    errno.EROFS: "The file system is mounted read-only: choose another directory.",
    errno.ENOMEM: "A save needs memory for a copy of all that it saves: free some.",
}


def _now() -> float:
    return clock.time()


class SaveRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint to save: everything that its caller knows for the sidecar.

    Example:

    ```python
    writer.save(SaveRequest(step=120, reason="epoch", metrics={"loss": 0.5}), write)
    ```

    Attributes:
        step: Training batches completed since the run began.
        name: The checkpoint's name in the directory; defaults to `ckpt-<step>`. All of its files begin with it.
        run_id: The run of the checkpoint; defaults to the run of the directory's newest checkpoint.
        epoch: Epochs completed, `None` if unknown.
        batch: Batches completed in the epoch in progress, 0 at an epoch's end, `None` if unknown.
        metrics: The metrics of these weights, by name.
        monitor: The metric that training watches.
        mode: Whether a smaller (`"min"`) or a larger (`"max"`) value of the monitor is better.
        modes: The modes of other metrics, by name.
        reason: Why the save is due. A long reason is cut.
        metadata: The user's JSON-able values.
        versions: Versions of the packages that save.
        weights: The digest of the model's weights, for a file of Keras.
        seeds: The states of the model's seed generators by name, for a file of Keras.
        time: When the save began, in seconds since 1970.
        began: When training began to wait, by `time.perf_counter`.
        blocked_ms: How long training waited; defaults to the time until all data is durable.
        size: Bytes of disk that the files need; defaults to the size of the newest checkpoint.
    """

    step: int
    name: str = ""
    run_id: str | None = None
    epoch: int | None = None
    batch: int | None = None
    metrics: Mapping[str, float] = {}
    monitor: str | None = None
    mode: Mode | None = None
    modes: Mapping[str, Mode] = {}
    reason: str = ""
    metadata: Mapping[str, Any] = {}
    versions: Mapping[str, str] = {}
    weights: str | None = None
    seeds: Mapping[str, list[int]] = {}
    time: float = msgspec.field(default_factory=_now)
    began: float = msgspec.field(default_factory=clock.perf_counter)
    blocked_ms: float | None = None
    size: int | None = None

    def record(self, sequence: int, run_id: str = "", directory: str = "", template: str = "") -> CheckpointRecord:
        """The record of this save, before its files are written.

        Args:
            sequence: Its place in the order of saving.
            run_id: The run, where the request names none.
            directory: Where the checkpoint will be.
            template: The template of its series, for a file of Keras.
        """
        return CheckpointRecord(
            sequence=sequence,
            step=self.step,
            name=self.name or layout.numbered(self.step),
            directory=directory,
            run_id=run_id if self.run_id is None else self.run_id,
            template=template,
            weights=self.weights,
            seeds=dict(self.seeds),
            time=self.time,
            versions=dict(self.versions),
            **self._description(),
        )

    def amended(self, record: CheckpointRecord) -> CheckpointRecord:
        """A record of a checkpoint with the same values, described by this request."""
        return msgspec.structs.replace(record, **self._description())

    def _description(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "batch": self.batch,
            "metrics": dict(self.metrics),
            "monitor": self.monitor,
            "mode": self.mode,
            "modes": dict(self.modes),
            "reason": self.reason[:REASON_LIMIT],
            "metadata": dict(self.metadata),
        }


class Staged(NamedTuple):
    """A checkpoint that is complete and durable, but not in its place.

    Attributes:
        record: Its record.
        stage: The name of the private folder with its files.
    """

    record: CheckpointRecord
    stage: str


class Writer:
    """The writing side of a directory.

    Args:
        target: The directory.
        keep: The policy that retains checkpoints, asked before each save and after it; `None` keeps all.
        only: A policy that a new checkpoint must satisfy besides, or it is not written.
        min_free: The bytes of the disk that a save leaves free. If it would not, it removes checkpoints before it, as
            `make_room` says.

    Attributes:
        replaced: The runs whose checkpoints are pruned after a checkpoint of another run is saved. Policies see the run
            of the newest checkpoint alone, and leave the checkpoints of other runs as they are.
        known_pins: The names of pinned checkpoints that the user was warned of. No other warning names them.

    Raises:
        ValueError: The directory is `/`, or the user's home.
    """

    def __init__(
        self,
        target: CheckpointDirectory,
        keep: PreservationPolicy | None = None,
        only: PreservationPolicy | None = None,
        min_free: int = 0,
    ) -> None:
        if not target.series.template and os.path.realpath(target.path) in {
            "/",
            os.path.realpath(os.path.expanduser("~")),
        }:
            raise ValueError(f"{target.path} cannot hold one run: name a directory below it, such as runs/digits.")
        self.directory = target
        self.keep = keep
        self.only = only
        self._min_free = min_free
        self.replaced: Set[str] = frozenset()
        self.known_pins: set[str] = set()
        self._has_excess = False
        self._lock: WriterLock | None = None
        self._session: object = None
        self._known = Known()

    def open(self, session: object = None) -> None:
        """Locks the directory for writing, and recovers the unfinished save of a process that died.

        Args:
            session: The owner of the writing, such as one `fit`. A session has at most one writer in a directory. The
                writer may be opened again.

        Raises:
            DirectoryInUseError: Another process writes here.
            DirectoryNotEmptyError: Another writer of the same session writes here.
            SaveError: The directory cannot be written.
        """
        lock = self._claim()
        if session is not None and lock.session is session is not self._session:
            self._lock = None
            raise DirectoryNotEmptyError(
                f"Two callbacks of this training save into {self.directory.path}. Give each a directory of its own; "
                "two ModelCheckpoints may become one with keep=first | second."
            )
        lock.session = self._session = session

    def close(self) -> None:
        """Lets another process write here."""
        if self._lock is not None and self._lock.session is self._session:
            self._lock.session = None
            with contextlib.suppress(OSError), self.directory.open() as folder:
                folder.remove_stage(self._lock)
        self._lock = None

    def save(self, request: SaveRequest, write: Write) -> CheckpointRecord | None:
        """Saves a checkpoint and prunes, unless the policy would prune the checkpoint at once.

        After a crash the directory is as before or as after, never in between.

        Args:
            request: The checkpoint to save.
            write: Writes the checkpoint's files, whose names all begin with its own.

        Returns:
            The record; `None` if the checkpoint was not wanted.

        Raises:
            DiskFullError: There is no room. Earlier checkpoints are untouched.
            SaveError: The save failed, or another run was saved here meanwhile. Earlier checkpoints are untouched.
        """
        with self._writing() as (folder, lock):
            staged = self._stage(folder, lock, request, write)
            return staged and self._commit(folder, lock, staged)

    def stage(self, request: SaveRequest, write: Write) -> Staged | None:
        """Writes the files and the sidecar of a checkpoint into a private folder, durably.

        Arguments and errors are those of `save`. The next recovery commits a staged checkpoint that no writer has
        committed.

        Returns:
            The argument of `commit`; `None` if the checkpoint is not wanted.
        """
        with self._writing() as (folder, lock):
            return self._stage(folder, lock, request, write)

    def commit(self, staged: Staged) -> CheckpointRecord | None:
        """Puts a staged checkpoint in its place, and prunes.

        Args:
            staged: The result of `stage`, of this writer or of another, even of a process that died.

        Returns:
            The record; `None` if the policy would prune the checkpoint at once, or if a checkpoint of the same step or
            name was pinned meanwhile.

        Raises:
            SaveError: The commit failed. Earlier checkpoints are untouched.
        """
        with self._writing() as (folder, lock):
            return self._commit(folder, lock, staged)

    def _stage(self, folder: Folder, lock: WriterLock, request: SaveRequest, write: Write) -> Staged | None:
        with self.explaining(request.step):
            listing = examine(folder, self._known)
        series = folder.series
        if series.template and request.run_id is not None:
            listing = listing.of_run(request.run_id)
        newest = listing.records[-1] if listing.records else None
        run_id = newest.run_id if newest else uuid.uuid4().hex
        candidate = request.record(listing.sequence + 1, run_id, self.directory.path, series.template)
        candidate = self._with_free_name(candidate, listing)
        if self._session is not None:
            self._refuse_other_run(newest, candidate)
        # Refuses what no sidecar can hold before anything is written.
        sidecars.encode(candidate)
        if why := self._unwanted(candidate, listing, self.keep, self.only) or self._pinned(listing, candidate):
            self.directory.notify([Change("skipped", candidate, why)])
            return None
        name = lock.take_stage()
        with self.explaining(request.step), folder.stage(name) as stage:
            if size := newest.size if newest and request.size is None else request.size:
                self.make_room(candidate, size)
            return Staged(_sealed(stage, candidate, request, write), name)

    def _commit(self, folder: Folder, lock: WriterLock, staged: Staged) -> CheckpointRecord | None:
        record = staged.record
        changes: list[Change] = []
        try:
            with self.explaining(record.step), folder.stage(staged.stage) as stage, folder.mutex():
                committed = self._publish(folder, stage, record, changes)
                # The next start removes what cannot be removed now.
                with contextlib.suppress(OSError):
                    stage.empty()
                    lock.stage = staged.stage
        finally:
            # A checkpoint may be saved although the pruning after it failed.
            self.directory.notify(changes)
        return record if committed else None

    def _publish(self, folder: Folder, stage: Folder, record: CheckpointRecord, changes: list[Change]) -> bool:
        """Publishes a staged checkpoint, unless recovery has, and prunes. Returns whether it is committed."""
        listing = examine(folder, self._known)
        if record.template:
            listing = listing.of_run(record.run_id)
        if any(each.same_save(record) for each in listing.records):
            changes += self.retain(folder, listing)
            return True
        # The size is known now. A bound may drop an older checkpoint for it, without which the policy drops it too.
        unwanted = self._unwanted(record, listing, self.keep) if self.keep and self.keep.bounds else ""
        if why := unwanted or self._pinned(listing, record) or _pinned_without_record(folder, listing, record):
            changes.append(Change("skipped", record, why))
            return False
        _refuse_disorder(listing, stage, record)
        _warn_of_foreign(folder, listing, record)
        earlier, joined = superseded(record, listing.records), listing.joined_by(record)
        commit.publish(folder, stage, record, earlier)
        changes += [Change("saved", record), *(Change("removed", each, _succession(each, record)) for each in earlier)]
        replaced = [other for other in listing.other_runs if other.name == record.name]
        self.directory.note(*(of_record("removed", other, why=_succession(other, record)) for other in replaced))
        changes += self.retain(folder, joined)
        return True

    def make_room(self, record: CheckpointRecord, size: int) -> None:
        """Raises if the disk has no room for a save, before anything is written.

        If the disk would have less than `min_free` bytes after the save, checkpoints are removed first, only as many
        as needed. Those go first that the policy removes after the save in any case. Others follow by the order of a
        bound, with a warning. The newest checkpoint stays. If all of them are too few, none is removed.

        Args:
            record: The checkpoint to save, without its files.
            size: The bytes that the files need.
        """
        needed = size + self._min_free
        with self.directory.open() as folder:
            if self._min_free and folder.free() < needed:
                with folder.mutex():
                    gone = self._remove_early(folder, record, size)
                self.directory.notify(gone)
            if (free := folder.free()) < needed:
                least = f", of which {tables.size(self._min_free)} are to stay free" if self._min_free else ""
                raise OSError(errno.ENOSPC, f"{tables.size(size)} are needed, {tables.size(free)} are free{least}")

    def _remove_early(self, folder: Folder, record: CheckpointRecord, size: int) -> list[Change]:
        """Removes checkpoints before a save, as `make_room` says, and returns the changes."""
        listing = examine(folder, self._known)
        if record.template:
            listing = listing.of_run(record.run_id)
        pressed = f"less than {tables.size(self._min_free)} would be free when step {record.step} came"
        removals = self._removals_before(listing, record, size, pressed)
        missing = size + self._min_free - folder.free()
        totals = itertools.accumulate(freed([change.record for change in removals]), initial=0)
        enough = [total >= missing for total in totals]
        if not enough[-1]:
            return []
        removals = removals[: enough.index(True)]
        commit.remove(folder, listing, [change.record for change in removals])
        if dear := [str(change.record.step) for change in removals if change.why == pressed]:
            warn(
                f"The save of step {record.step} into {listing.path} needs {tables.size(size)}, and "
                f"{tables.size(self._min_free)} are to stay free. So it removes checkpoints that {self.keep!r} would "
                f"keep: {tables.few(dear)}."
            )
        return removals

    def _removals_before(self, listing: Listing, record: CheckpointRecord, size: int, pressed: str) -> list[Change]:
        """The removals that may precede a save: those that follow it in any case, then others for a reason."""
        if self.keep is None or listing.newer:
            return []
        joined = listing.joined_by(msgspec.structs.replace(record, files=(CheckpointFile(record.name, size, "new"),)))
        own = _of_newest_run(joined)
        others = droppable(self.keep, own, kept_in_training(self.keep, own))
        reasons = _reasons(self.keep, own)
        removals = [Change("removed", each, reasons.get(each, _OTHER_RUN)) for each in self.unkept(joined)]
        removals += [Change("removed", each, pressed) for each in others]
        stays = {record.sequence, *(newest.sequence for newest in listing.all_runs[-1:])}
        return [change for change in removals if change.record.sequence not in stays]

    def listing(self) -> Listing:
        """Reads the directory, as its own `listing` does. A sidecar that this writer has read is not read again."""
        with self._explaining("Cannot read"), self.directory.open() as folder:
            return examine(folder, self._known)

    def latest(self) -> CheckpointRecord | None:
        """The newest checkpoint."""
        records = self.listing().records
        return records[-1] if records else None

    def amend(
        self, record: CheckpointRecord, change: Callable[[CheckpointRecord], CheckpointRecord]
    ) -> CheckpointRecord | None:
        """Changes the sidecar of a saved checkpoint, and prunes by its new record.

        Args:
            record: The checkpoint.
            change: Returns the new record, given the record of now: others may have added metrics since.

        Returns:
            The new record, `None` if the checkpoint was pruned or saved again meanwhile.
        """
        what = f"Could not add to step {record.step} in"
        with self._explaining(what), self.directory.open() as folder, folder.mutex():
            listing = examine(folder, self._known)
            current = [each for each in listing.records if each.same_save(record)]
            if not current:
                return None
            changed = amend(folder, change(current[0]))
            gone = self.retain(folder, listing.joined_by(changed))
        self.directory.notify([Change("saved", changed), *gone])
        return changed

    def retain(self, folder: Folder, listing: Listing) -> list[Change]:
        """Removes checkpoints that the policy does not keep, and returns the changes.

        The caller holds the mutex, and listed the directory under it.
        """
        with self._explaining("The checkpoint is saved, but older ones could not be removed from"):
            doomed = [] if listing.newer else self.unkept(listing)
            reasons = _reasons(self.keep, _of_newest_run(listing)) if doomed and self.keep else {}
            commit.remove(folder, listing, doomed)
        self._warn_of_excess(listing, doomed)
        return [Change("removed", record, reasons.get(record, _OTHER_RUN)) for record in doomed]

    def unkept(self, listing: Listing) -> list[CheckpointRecord]:
        """The checkpoints to prune: those of a replaced run, and those that nothing keeps, oldest first."""
        own = _of_newest_run(listing)
        kept = {record.step for record in own} if self.keep is None else kept_in_training(self.keep, own)
        replaced = self.replaced - {record.run_id for record in own}
        doomed = [record for record in listing.all_runs if record.run_id in replaced]
        doomed += [record for record in own if record.step not in kept]
        return [record for record in doomed if not record.pinned]

    def _warn_of_excess(self, listing: Listing, doomed: Sequence[CheckpointRecord]) -> None:
        """Warns once that the checkpoints left exceed a bound of the policy."""
        if self.keep is None or self._has_excess:
            return
        gone = {record.step for record in doomed}
        text = excess(self.keep, (record for record in _of_newest_run(listing) if record.step not in gone))
        if text:
            self._has_excess = True
            warn(
                f"The checkpoints in {listing.path} have {text}: a bound leaves one checkpoint and the pinned. "
                "Unpin some, or allow more."
            )

    @contextlib.contextmanager
    def explaining(self, step: int) -> Iterator[None]:
        """Turns each error in the saving of a step into a `SaveError` that says how to mend it."""
        try:
            with self._explaining(f"Could not save step {step} into"):
                yield
        except Exception as error:
            self.directory.note(Event(kind="failed", step=step, error=str(error)))
            raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[tuple[Folder, WriterLock]]:
        """The open directory and its lock, while no other thread saves."""
        lock = self._claim()
        with lock.saving, self.directory.open(create=True) as folder:
            try:
                yield folder, lock
            except (KeyboardInterrupt, SystemExit, SaveError):
                # The next save or start recovers what is left; a complete stage goes forward.
                lock.recovered = False
                raise

    def _claim(self) -> WriterLock:
        # Locked on each call: the directory may have been replaced since, and its lock with it.
        with self._explaining("Cannot write into"), self.directory.open(create=True) as folder:
            self._lock = folder.lock()
            if self._lock.session is None:
                self._lock.session = self._session
            with self._lock.saving:
                if not self._lock.recovered:
                    with folder.mutex():
                        commit.recover(folder)
                    self._lock.recovered = True
        return self._lock

    @contextlib.contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Turns each error into a `SaveError` that says what failed and how to mend it."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # the caller's `write` may raise any error
            number = error.errno or 0 if isinstance(error, OSError) else 0
            number = errno.ENOMEM if isinstance(error, MemoryError) else number
            kind, mend = DiskFullError if number in _FULL else SaveError, _MENDS.get(number, "")
            text = _plain(str(error)) or type(error).__name__
            if isinstance(error, UnfinishedError):
                rest = "The checkpoint is there after the next save or the next start."
            else:
                rest = "Earlier checkpoints are untouched."
            sentences = (f"{what} {self.directory.path}: {text}.", mend, rest)
            raise kind(" ".join(filter(None, sentences))) from error

    def _refuse_other_run(self, newest: CheckpointRecord | None, candidate: CheckpointRecord) -> None:
        """Refuses to save where another training saves at the same time."""
        if newest is not None and newest.run_id not in {candidate.run_id, *self.replaced}:
            raise SaveError(
                f"Could not save step {candidate.step} into {self.directory.path}: by now it holds checkpoints of "
                f"another run, the newest of step {newest.step}, which another fit of this process has saved. Give "
                "each fit a directory of its own. Earlier checkpoints are untouched."
            )

    def _with_free_name(self, candidate: CheckpointRecord, listing: Listing) -> CheckpointRecord:
        """A new file of a template with a name that no other step has, if the policy would keep both."""
        series, names = listing.series, {record.name: record for record in listing.records}
        same = names.get(candidate.name)
        if (
            not series.template
            or series.is_one_name
            or self.keep is None
            or same is None
            or same.step == candidate.step
        ):
            return candidate
        kept = kept_in_training(self.keep, [*listing.records, candidate])
        if not kept >= {same.step, candidate.step}:
            return candidate
        return msgspec.structs.replace(candidate, name=series.next_to(candidate.name, names))

    def _unwanted(self, candidate: CheckpointRecord, listing: Listing, *policies: PreservationPolicy | None) -> str:
        """The reason why the policies would not keep a checkpoint, else `""`; "save" and "prune" are one question."""
        # A checkpoint of the same name counts too, or a worse one would replace it. Other runs do not count.
        own = [record for record in listing.records if record.run_id == candidate.run_id]
        records = [*(record for record in own if record.step != candidate.step), candidate]
        for policy in policies:
            if policy is not None and candidate.step not in kept_in_training(policy, records):
                return _reasons(policy, records)[candidate]
        return ""

    def _pinned(self, listing: Listing, record: CheckpointRecord) -> str:
        """The pinned checkpoint that the save of a record would supersede, else `""`; warns of each checkpoint once."""
        others = (each for each in listing.other_runs if each.name == record.name)
        pinned = [each for each in (*superseded(record, listing.records), *others) if each.pinned]
        for each in pinned:
            if each.name not in self.known_pins:
                self.known_pins.add(each.name)
                warn(
                    f"Step {record.step} is not saved into {listing.path}: {each.name} of step {each.step} is pinned. "
                    "Unpin it, or train into another directory."
                )
        return f"{pinned[0].name} of step {pinned[0].step} is pinned" if pinned else ""


def by_prefix(write: Callable[[str], object]) -> Write:
    """A `Write` from a function that takes a prefix, as TensorFlow's functions do."""

    def write_files(stage: Folder, record: CheckpointRecord) -> Sequence[CheckpointFile]:
        write(stage.tensorflow_path(record.name))
        names = sorted(stage.names())
        if not names:
            raise OSError(f"no files were written with the prefix {record.name}")
        files = [CheckpointFile(each, *stage.digest(each)) for each in names]
        for each in names:
            stage.sync_file(each)
        return files

    return write_files


def _sealed(stage: Folder, candidate: CheckpointRecord, request: SaveRequest, write: Write) -> CheckpointRecord:
    """Writes everything into the stage, durably, the sidecar last."""
    started = clock.perf_counter()
    files = write(stage, candidate)
    durable = clock.perf_counter()
    blocked = milliseconds(request.began, durable) if request.blocked_ms is None else request.blocked_ms
    timings = {"write_ms": milliseconds(started, durable), "blocked_ms": blocked}
    record = msgspec.structs.replace(candidate, files=tuple(files), timings=timings)
    stage.create(layout.sidecar(record.name), sidecars.encode(record))
    stage.sync()
    return record


def _of_newest_run(listing: Listing) -> list[CheckpointRecord]:
    """The records of the run of the newest checkpoint, which alone a policy sees."""
    return [record for record in listing.records if record.run_id == listing.records[-1].run_id]


def _reasons(policy: PreservationPolicy, records: Sequence[CheckpointRecord]) -> dict[CheckpointRecord, str]:
    """The policy's reason for each checkpoint."""
    try:
        verdicts = policy.explain(records)
        return {record: verdicts[record.step].reason for record in records}
    except Exception:  # noqa: BLE001 - a policy of the user's own that fails to explain itself must not fail a save
        return dict.fromkeys(records, repr(policy))


def _succession(record: CheckpointRecord, successor: CheckpointRecord) -> str:
    """The reason why a save has removed a checkpoint of the same step or of the same name."""
    if record.step == successor.step:
        return f"step {record.step} was saved again"
    return f"step {successor.step} was saved as {successor.name}"


def _refuse_disorder(listing: Listing, stage: Folder, record: CheckpointRecord) -> None:
    """Refuses to commit a checkpoint out of order, or one whose stage is gone."""
    if listing.sequence >= record.sequence:
        raise OSError(errno.EIO, "a sidecar could not be read, so the order of saving is not known")
    if not stage.exists(layout.sidecar(record.name)):
        raise FileNotFoundError(errno.ENOENT, "the staged checkpoint is gone", record.name)


def _pinned_without_record(folder: Folder, listing: Listing, record: CheckpointRecord) -> str:
    """The pinned file without a trusted record that the save of a record would replace, else `""`; warns of it."""
    if record.name in listing.unmanaged and folder.exists(layout.pin(record.name)):
        warn(
            f"{record.name} in {folder.path} is pinned and has no record, so step {record.step} does not replace it. "
            "Unpin it, or train into another directory."
        )
        return f"{record.name} is pinned and has no record"
    same = [name for name in listing.damaged if name == record.name or sidecars.step_in(name) == record.step]
    names = [name for name in same if folder.exists(layout.pin(name))]
    for name in names:
        warn(
            f"{name} in {folder.path} is pinned and damaged, so step {record.step} does not overwrite its remaining "
            f"files: {listing.damaged[name]}. Move its files away, or train into another directory."
        )
    return f"{names[0]} is pinned and damaged" if names else ""


def _warn_of_foreign(folder: Folder, listing: Listing, record: CheckpointRecord) -> None:
    """Warns that a save replaces a file of this package that its user wrote over. Keras replaces it silently."""
    if record.name in listing.unmanaged and folder.exists(layout.sidecar(record.name)):
        warn(f"Step {record.step} replaces {record.name} in {folder.path}, which another program has changed.")


def _plain(text: str) -> str:
    """The first line of an error, without TensorFlow's internals."""
    line = text.partition("\n")[0]
    return re.sub(r"\{\{.*?\}\} ?|/proc/self/fd/\d+/", "", line).rstrip(". ")


def milliseconds(start: float, end: float) -> float:
    """The time between two readings of `time.perf_counter`, in milliseconds."""
    return round((end - start) * 1000, 3)
