"""The checkpoints of one run on disk: the only ledger, read again each time."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from keras_ckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    MonitorError,
    PlanError,
)
from keras_ckpt.store import background, commit, layout, tables
from keras_ckpt.store.files import Folder
from keras_ckpt.store.listing import PIN_LIMIT, Listing, amend, check, examine, freed, scan, taken, verify
from keras_ckpt.store.notices import log, warn
from keras_ckpt.store.policies import BestN, PreservationPolicy, as_policy, selection
from keras_ckpt.store.record import CheckpointRecord, Mode, as_metric


class Change(NamedTuple):
    """A checkpoint that was saved or removed.

    Example:

    ```python
    checkpoint = keras_ckpt.ModelCheckpoint("runs/digits")
    checkpoint.directory.subscribe(lambda change: print(change.kind, change.record.step))
    ```

    Attributes:
        kind: `"saved"` or `"removed"`.
        record: The checkpoint.
    """

    kind: Literal["saved", "removed"]
    record: CheckpointRecord


class Decision(NamedTuple):
    """What a plan means for one checkpoint, and why.

    Example:

    ```python
    plan = keras_ckpt.CheckpointDirectory("runs/digits").plan(keras_ckpt.LatestN(1))
    for decision in plan.decisions:
        print(decision.record.step, decision.kept, decision.reason)
    ```

    Attributes:
        record: The checkpoint.
        kept: Whether it stays.
        reason: Why.
        size: Its bytes; of one that is removed, those that this frees after the ones before it are removed, because
            what it shares with one that stays is not freed.
    """

    record: CheckpointRecord
    kept: bool
    reason: str
    size: int


@dataclasses.dataclass(frozen=True, repr=False)
class PrunePlan(tables.Shown):
    """What a policy would keep and remove, and why; nothing is removed before `CheckpointDirectory.prune(plan)`.

    Example:

    ```python
    runs = keras_ckpt.CheckpointDirectory("runs/digits")
    plan = runs.plan(keras_ckpt.LatestN(1) | keras_ckpt.BestN(1, "val_loss", "min"))
    print(plan)
    runs.prune(plan)
    ```

    Attributes:
        policy: The policy, as it was written.
        decisions: One for each checkpoint, oldest first.
        listing: What the directory held when the plan was made.
    """

    policy: str
    decisions: tuple[Decision, ...]
    listing: Listing

    @property
    def kept(self) -> tuple[CheckpointRecord, ...]:
        return tuple(decision.record for decision in self.decisions if decision.kept)

    @property
    def removed(self) -> tuple[CheckpointRecord, ...]:
        return tuple(decision.record for decision in self.decisions if not decision.kept)

    def _table(self) -> tables.Table:
        return tables.of_plan(self.policy, self.decisions, self.listing)


@dataclasses.dataclass(frozen=True, repr=False)
class Verification(tables.Shown):
    """What `CheckpointDirectory.verify` found.

    Example:

    ```python
    found = keras_ckpt.CheckpointDirectory("runs/digits").verify()
    print(found.ok, dict(found.listing.damaged))
    ```

    Attributes:
        listing: The directory: in `records` what is whole, in `damaged` what is not, by name with the reason.
    """

    listing: Listing

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.listing.damaged

    def _table(self) -> tables.Table:
        return tables.of_verification(_shown(self.listing.path), self.listing)


class CheckpointDirectory(tables.Shown):
    """The checkpoints of one run.

    Iterating gives the records, oldest first; `directory[120]` is that of step 120. A record does as well wherever a
    step is asked for. What is there is read from disk each time. Iterating and `len` take the sidecars' word; whatever
    shows, chooses or removes looks at the sizes of the files too. TensorFlow is not needed for any of it. In a process
    that trains, it waits for what is being written.

    Example:

    ```python
    runs = keras_ckpt.CheckpointDirectory("runs/digits")
    print(runs)
    best = runs.best("val_accuracy", mode="max")
    runs.pin(best, "the one in production")
    ```

    Args:
        path: The directory. It need not be there yet.

    Raises:
        ValueError: The path is a URL, or empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = os.fspath(path)
        if not isinstance(path, str) or not path:
            raise ValueError(f"A checkpoint directory is a path. Received: {path!r}")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
            raise ValueError(f"Checkpoint directories are local. Received: {path!r}. Copy it, or mount it.")
        # A program may change its working directory between two saves.
        self.path = os.path.abspath(path)
        self._listeners: list[Callable[[Change], object]] = []

    def subscribe(self, listener: Callable[[Change], object]) -> None:
        """Calls a function after each checkpoint that is saved or removed through this object.

        Example:

        ```python
        checkpoint = keras_ckpt.ModelCheckpoint("runs/digits")
        checkpoint.directory.subscribe(lambda change: print(change.kind, change.record.step))
        ```

        Args:
            listener: Receives a `Change`, in the thread that saves or removes. An error that it raises is a warning.
        """
        self._listeners.append(listener)

    def tell(self, changes: Iterable[Change]) -> None:
        """Calls the listeners. The caller is the writer of this directory, and holds no lock."""
        for change in changes:
            log.info("%s %s", change.kind, change.record.prefix)
            for listener in self._listeners:
                try:
                    listener(change)
                except Exception as error:  # noqa: BLE001 - the save is done, whatever a listener makes of it
                    warn(f"A listener of {self.path} failed: {change.record.prefix} was {change.kind}, and {error!r}")

    def listing(self) -> Listing:
        """Reads the directory: the good, the damaged and what others wrote.

        Raises:
            NotADirectoryError: The path is a file.
        """
        return self._read(examine)

    def __iter__(self) -> Iterator[CheckpointRecord]:
        return iter(self._read(scan).records)

    def __len__(self) -> int:
        return len(self._read(scan).records)

    def __contains__(self, item: object) -> bool:
        return any(item in (record.step, record) for record in self)

    def __getitem__(self, step: int | CheckpointRecord | None) -> CheckpointRecord:
        return self._find(self.listing(), step)

    def latest(self) -> CheckpointRecord | None:
        """The checkpoint that was saved last, or `None` if there is none."""
        records = self.listing().records
        return records[-1] if records else None

    def best(self, monitor: str | None = None, mode: Mode | None = None) -> CheckpointRecord | None:
        """The checkpoint with the best value of a metric, or `None` if there is no checkpoint.

        Of equal values the earlier is better.

        Args:
            monitor: The metric. Defaults to the one that training watched.
            mode: `"min"` or `"max"`. Defaults to what the sidecars say of that metric.

        Raises:
            CheckpointNotFoundError: No checkpoint has a finite value of the metric. The error names the metrics.
            MonitorError: Nothing says which metric, or which direction of it, is meant.
        """
        listing = self.listing()
        if not listing.records:
            return None
        policy = _resolved(BestN(1, monitor, mode), listing, CheckpointNotFoundError)
        steps = policy.select(listing.records)
        if not steps:
            raise CheckpointNotFoundError(f"No checkpoint in {self.path} is best: {policy!r} found no finite value.")
        return listing.find(steps.pop())

    def plan(self, keep: PreservationPolicy | int) -> PrunePlan:
        """What a policy would keep and remove here, and why. Removes nothing.

        Args:
            keep: A policy; an int `n` means `LatestN(n)`.

        Raises:
            PlanError: The plan would keep nothing, or the policy ranks by a metric that no checkpoint has.
            FormatVersionError: A newer version of this package wrote here.
        """
        policy = as_policy(keep)
        if policy is None:
            raise TypeError("plan() needs a policy, such as keras_ckpt.LatestN(2). Received: None")
        listing = self.listing()
        listing.refuse_newer()
        policy = _resolved(policy, listing, PlanError) if listing.records else policy
        with _naming(self.path):
            decisions = tuple(_decide(policy, listing.records))
        if listing.records and not any(decision.kept for decision in decisions):
            raise PlanError(
                f"{policy!r} would keep none of the {len(decisions)} checkpoints in {self.path}. "
                "To remove all of them, use clear()."
            )
        return PrunePlan(repr(policy), decisions, listing)

    def prune(self, plan: PrunePlan | PreservationPolicy) -> list[int]:
        """Removes what a plan says, but for what was pinned, saved anew or removed since it was made.

        What the plan keeps is read first, every byte of it: what is damaged is no reason to remove the others.

        Args:
            plan: A plan of this directory, or a policy to make one with.

        Returns:
            The steps that were removed.

        Raises:
            PlanError: A checkpoint that the plan keeps is damaged; nothing was removed.
        """
        if isinstance(plan, PreservationPolicy):
            plan = self.plan(plan)
        if not isinstance(plan, PrunePlan):
            # A number might be meant as a step.
            raise TypeError(f"prune() takes a plan, or a policy such as keras_ckpt.LatestN(2). Received: {plan!r}")
        if not plan.removed:
            return []
        if elsewhere := {record.directory for record in plan.removed} - {self.path}:
            raise ValueError(f"The plan is one of {elsewhere.pop()}, not of {self.path}.")
        _refuse_damaged(plan)
        planned = {(record.run_id, record.sequence, record.step) for record in plan.removed}
        with self._change() as (folder, listing):
            listing.refuse_newer()
            doomed = [
                record
                for record in listing.records
                if (record.run_id, record.sequence, record.step) in planned and not record.pinned
            ]
            if doomed and len(doomed) == len(listing.records):
                raise PlanError(
                    f"Nothing was removed: what the plan keeps is not in {self.path} any more, so that none of the "
                    f"{len(doomed)} checkpoints would be left. Plan again."
                )
            remove(folder, listing, doomed)
        self.tell(Change("removed", record) for record in doomed)
        return [record.step for record in doomed]

    def verify(self, progress: Callable[[int, int], object] = lambda done, total: None) -> Verification:
        """Reads every byte of every checkpoint and compares it with what was written. Changes nothing.

        Example:

        ```python
        found = runs.verify()
        assert found.ok, found
        ```

        Args:
            progress: Called with the bytes that were read and those there are, again and again.

        Returns:
            What is whole and what is damaged. What another process removed or saved anew meanwhile is in neither.
        """
        return Verification(self._read(lambda folder: verify(folder, progress)))

    def pin(self, step: int | CheckpointRecord | None, reason: str = "") -> None:
        """Keeps a checkpoint whatever a policy says, until `unpin`. The same as `touch ckpt-120.keep` in a shell.

        Args:
            step: Its step, or a record of it.
            reason: Why, for those who read the table later.

        Raises:
            CheckpointNotFoundError: It is not there, or was saved again since its record was read.
        """
        if not isinstance(reason, str) or len(reason.encode()) > PIN_LIMIT:
            raise ValueError(f"A pin's reason is a string of at most {PIN_LIMIT} bytes. Received: {reason!r:.100}")
        with self._change() as (folder, listing):
            folder.replace(layout.pin(self._find(listing, step).name), reason.encode())

    def unpin(self, step: int | CheckpointRecord | None) -> None:
        """Gives a checkpoint back to the policies. One that is not pinned stays as it is."""
        with self._change() as (folder, listing):
            folder.remove(layout.pin(self._find(listing, step).name))
            folder.sync()

    def add_metrics(
        self, step: int | CheckpointRecord | None, metrics: Mapping[str, float] = {}, /, **named: float
    ) -> None:
        """Adds what was measured on a checkpoint elsewhere to its sidecar; a metric of the same name is replaced.

        Example:

        ```python
        loss, accuracy = model.evaluate(x_test, y_test)
        runs.add_metrics(120, test_accuracy=accuracy)
        ```

        Args:
            step: Its step, or a record of it.
            metrics: Values by name, for names that are no Python identifiers.
            **named: Values by name.
        """
        added = {name: as_metric(name, value) for name, value in {**metrics, **named}.items()}
        with self._change() as (folder, listing):
            record = self._find(listing, step)
            amend(folder, msgspec.structs.replace(record, metrics={**record.metrics, **added}))

    def clear(self, *, pinned: bool = False) -> list[int]:
        """Removes all checkpoints of the directory, so that another run can begin in it.

        Args:
            pinned: Whether to remove those too that are pinned.

        Returns:
            The steps that were removed.

        Raises:
            PlanError: Some are pinned, and `pinned` is false; nothing was removed.
            DirectoryInUseError: A training in another process writes here.
            FormatVersionError: A newer version of this package wrote here.
        """
        if not os.path.lexists(self.path):
            return []
        with self._change() as (folder, before):
            lock = folder.lock()
            before.refuse_newer()
            # What a process that died had complete would come back with the next writer.
            commit.recover(folder)
            listing = examine(folder)
            if not pinned and (steps := [record.step for record in listing.records if record.pinned]):
                raise PlanError(
                    f"{self.path} has pinned checkpoints: {steps}. Nothing was removed. To remove these too, use "
                    "clear(pinned=True)."
                )
            if listing.records:
                remove(folder, listing, listing.records)
            for record in listing.records:
                folder.remove(layout.pin(record.name))
            del lock
        self.tell(Change("removed", record) for record in listing.records)
        return [record.step for record in listing.records]

    def _find(self, listing: Listing, step: int | CheckpointRecord | None) -> CheckpointRecord:
        """The current record of a step, or of a record."""
        if step is None:
            raise TypeError(
                "A step or a record was expected. Received: None, which latest() and best() return for an empty "
                "directory."
            )
        if not isinstance(step, CheckpointRecord):
            return listing.find(step)
        if os.path.realpath(step.directory) != os.path.realpath(self.path):
            raise ValueError(f"The record is one of {step.directory}, not of {self.path}.")
        found = listing.find(step.step)
        if not found.same_save(step):
            raise CheckpointNotFoundError(
                f"{step.prefix} was saved again since this record of it was read. Look it up again."
            )
        return found

    def _table(self) -> tables.Table:
        listing = self.listing()
        with _naming(self.path):
            return tables.of_directory(_shown(self.path), listing, taken(listing.records))

    @contextlib.contextmanager
    def _change(self) -> Iterator[tuple[Folder, Listing]]:
        """The open directory and what it holds, while nobody else changes it."""
        background.wait()
        with _naming(self.path), Folder(self.path) as folder, folder.mutex():
            yield folder, examine(folder)

    def _read(self, reader: Callable[[Folder], Listing]) -> Listing:
        background.wait()
        try:
            with _naming(self.path), Folder(self.path) as folder:
                return reader(folder)
        except FileNotFoundError:
            return Listing(self.path)


def remove(folder: Folder, listing: Listing, doomed: Sequence[CheckpointRecord]) -> None:
    """Removes checkpoints; TensorFlow's state file forgets them first. The caller holds the mutex."""
    steps = {record.step for record in doomed}
    remaining = [record for record in listing.records if record.step not in steps]
    try:
        commit.write_state(folder, remaining)
    except OSError as error:
        # A full disk is no reason not to free some of it.
        if not doomed or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        commit.withdraw(folder, doomed)
        commit.write_state(folder, remaining)
    else:
        commit.withdraw(folder, doomed)


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Says of an error of the file system in which directory it came up."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        error.filename = os.path.join(path, error.filename) if isinstance(error.filename, str) else path
        raise


def _shown(path: str) -> str:
    """A path for people: relative where it lies below the working directory."""
    with contextlib.suppress(OSError):
        relative = os.path.relpath(path)
        return path if relative.startswith("..") else relative
    return path


def _resolved(policy: PreservationPolicy, listing: Listing, unknown: type[CheckpointError]) -> PreservationPolicy:
    """The policy with what the sidecars say was monitored, and in which direction.

    Raises:
        CheckpointError: Of the type `unknown`: no checkpoint has a metric that the policy ranks by.
        MonitorError: Nothing says which metric, or which direction of it, is meant.
    """
    modes = {name: mode for record in listing.records for name, mode in record.modes.items()}
    modes |= {record.monitor: record.mode for record in listing.records if record.monitor and record.mode}
    known = sorted({name for record in listing.records for name in record.metrics})

    def mode_of(monitor: str) -> Mode:
        if monitor in modes:
            return modes[monitor]
        raise MonitorError(
            f"Nothing says whether a smaller or a larger {monitor!r} is better: give the mode, 'min' or 'max'."
        )

    # A metric that is not there is the greater mistake, so it is told of first.
    _refuse_unknown(policy, known, unknown)
    resolved = policy.resolve(listing.records[-1].monitor, mode_of)
    _refuse_unknown(resolved, known, unknown)
    return resolved


def _refuse_damaged(plan: PrunePlan) -> None:
    """Refuses to remove anything in favour of a checkpoint that is not what was written."""
    with _naming(plan.listing.path), Folder(plan.listing.path) as folder:
        for record in plan.kept:
            try:
                check(folder, record)
            except DamagedCheckpointError as error:
                raise PlanError(
                    f"Nothing was removed: {record.prefix}, which the plan keeps, is damaged: {error}. Move its files "
                    "away, and plan again."
                ) from error
            except FileNotFoundError:
                continue


def _refuse_unknown(policy: PreservationPolicy, known: Sequence[str], error: type[CheckpointError]) -> None:
    for monitor in sorted(policy.monitors.difference(known)):
        close = difflib.get_close_matches(monitor, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise error(
            f"{policy!r} ranks by {monitor!r}, which no checkpoint has. "
            f"Recorded metrics: {', '.join(known) or 'none'}.{hint}"
        )


def _decide(policy: PreservationPolicy, records: Sequence[CheckpointRecord]) -> Iterator[Decision]:
    selected = [(repr(part), selection(part, records)) for part in policy.parts]
    reasons: dict[CheckpointRecord, list[str]] = {}
    for record in records:
        reasons[record] = [name for name, steps in selected if record.step in steps]
        if record.pin is not None:
            reasons[record].append(f"pinned: {record.pin}" if record.pin else "pinned")
    sizes = iter(freed([record for record in records if not reasons[record]]))
    for record, why in reasons.items():
        yield Decision(record, bool(why), ", ".join(why) or "no policy keeps it", record.size if why else next(sizes))
