"""The directory of one run's checkpoints: the only ledger, read from disk on each call."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from keras_ckpt.errors import CheckpointError, CheckpointNotFoundError, DamagedCheckpointError, PlanError
from keras_ckpt.store import background, commit, drawing, layout, overview, tables
from keras_ckpt.store.checks import check
from keras_ckpt.store.files import PRIVATE, Folder
from keras_ckpt.store.history import Fate, History, Past
from keras_ckpt.store.journal import Event, Journal, of_record, of_save, user
from keras_ckpt.store.listing import (
    PIN_LIMIT,
    Listing,
    amend,
    examine,
    meaning_of,
    scan,
    series_in,
    taken,
    verify,
)
from keras_ckpt.store.notices import log, warn
from keras_ckpt.store.plan import PrunePlan, decide, rank, resolved
from keras_ckpt.store.policies import BestN, PreservationPolicy, as_policy
from keras_ckpt.store.record import CheckpointRecord, Mode, as_metric
from keras_ckpt.store.report import ROWS, Seen, View, page, write
from keras_ckpt.store.watching import Watch

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Change(NamedTuple):
    """A checkpoint that was saved or removed, or a save that was skipped.

    A checkpoint that gets the metrics of the epoch's end is saved again.

    Example:

    ```python
    checkpoint = keras_ckpt.ModelCheckpoint("runs/digits")
    checkpoint.directory.subscribe(lambda change: print(change.kind, change.record.step))
    ```

    Attributes:
        kind: `"saved"`, `"removed"` or `"skipped"`: a save that the policy does not want.
        record: The checkpoint.
        why: The reason why it was removed or skipped.
    """

    kind: Literal["saved", "removed", "skipped"]
    record: CheckpointRecord
    why: str = ""


@dataclasses.dataclass(frozen=True, repr=False)
class Verification(tables.Shown):
    """The result of `CheckpointDirectory.verify`.

    Example:

    ```python
    found = keras_ckpt.CheckpointDirectory("runs/digits").verify()
    print(found.ok, dict(found.listing.damaged))
    ```

    Attributes:
        listing: The directory: `records` has the whole checkpoints, `damaged` the damaged ones with their errors.
    """

    listing: Listing

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.listing.damaged

    def _table(self) -> tables.Table:
        return overview.of_verification(self.listing.title, self.listing)


class CheckpointDirectory(tables.Shown):
    """The checkpoints of one run.

    Iterating yields the records, oldest first; `directory[120]` is the record of step 120. Every argument `step` takes
    a record too. Each call reads the disk again. Iterating and `len` trust the sidecars; the other methods compare the
    sizes of the files too. Nothing here needs TensorFlow. In a process that trains, each call waits for background
    saves.

    Example:

    ```python
    runs = keras_ckpt.CheckpointDirectory("runs/digits")
    print(runs)
    best = runs.best("val_accuracy", mode="max")
    runs.pin(best, "the one in production")
    ```

    Args:
        path: The directory. It need not exist yet. For the files of a template, such as `"runs/{epoch:02d}.keras"`,
            the path that `ModelCheckpoint` was given. The path of one file, such as `"runs/07.keras"`, means this file
            alone, and nothing can be chosen from it.
        series: The series of the checkpoints. Defaults to the series of the path. In a directory that has files of
            Keras of one template and no TensorFlow checkpoints, it defaults to these files.

    Raises:
        ValueError: The path is a URL, or empty.
    """

    def __init__(self, path: str | os.PathLike[str], series: layout.Series | None = None) -> None:
        path = os.fspath(path)
        if not isinstance(path, str) or not path:
            raise ValueError(f"A checkpoint directory must be a path. Received: {path!r}")
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
            raise ValueError(f"Checkpoint directories must be local. Received: {path!r}. Copy it, or mount it.")
        # A program may change its working directory between two saves.
        path = os.path.abspath(path)
        self._is_given = series is not None
        is_directory = self._is_given or os.path.isdir(path)
        self.path, self.series = (path, series or layout.TENSORFLOW) if is_directory else meaning_of(path)
        self._listeners: list[Callable[[Change], object]] = []

    def open(self, *, create: bool = False) -> Folder:
        """Opens the directory. The caller closes it.

        A directory is opened as the series that its path means.

        Args:
            create: Whether to create the directory and its parents where missing.

        Raises:
            ValueError: The directory has files of Keras of several templates.
        """
        folder = Folder(self.path, self.series, create=create)
        if create or self._is_given or self.series.template:
            return folder
        with contextlib.ExitStack() as failed:
            failed.callback(folder.close)
            folder.series = self._meant(folder)
            failed.pop_all()
        return folder

    def _meant(self, folder: Folder) -> layout.Series:
        """The series that the path of a directory means.

        Raises:
            ValueError: The path means several series. The error has the path of each.
        """
        if folder.exists(layout.STATE_FILE):
            return layout.TENSORFLOW  # the names of ten thousand checkpoints are not read twice
        meant, _ = series_in(folder)
        if len(meant) < 2:
            return meant[0] if meant else self.series
        paths = [repr(tables.relative(os.path.join(self.path, series.template))) for series in meant[:5]]
        raise ValueError(
            f"{tables.relative(self.path)} has files of several templates. Name a template instead of the directory: "
            f"{' or '.join(paths)}."
        )

    def refuse_one_file(self) -> None:
        """Refuses the path of one file of a template, from which nothing can be chosen.

        Raises:
            ValueError: The path is one file of a template. The error has the path of all files.
        """
        if self.series.only:
            names = self.series.only, self.series.template
            file, template = (tables.relative(os.path.join(self.path, name)) for name in names)
            raise ValueError(f"{file} is one file of a template. To name all files of it, type {template!r}.")

    def each_series(self) -> list[CheckpointDirectory]:
        """The directory of each series here: of the TensorFlow checkpoints, and of the files of each template."""
        if self._is_given or self.series.template or not os.path.isdir(self.path):
            return [self]
        with _naming(self.path), Folder(self.path) as folder:
            meant, others = series_in(folder)
        return [CheckpointDirectory(self.path, series) for series in meant + others] or [self]

    def subdirectory(self, name: str) -> CheckpointDirectory:
        """The checkpoint directory in a sub-directory. Its listeners are those of this object."""
        series = self.series if self._is_given or self.series.template else None
        found = CheckpointDirectory(os.path.join(self.path, name), series)
        found._listeners = self._listeners
        return found

    def places(self) -> Iterator[CheckpointDirectory]:
        """This directory and its numbered sub-directories: the places that `new_run="subdirectory"` saves into."""
        yield self
        if os.path.isdir(self.path):
            with Folder(self.path) as folder:
                numbers = sorted(int(name) for name in folder.names() if name.isascii() and name.isdecimal())
            places = (self.subdirectory(str(number)) for number in numbers)
            yield from (place for place in places if os.path.isdir(place.path))

    def subscribe(self, listener: Callable[[Change], object]) -> None:
        """Calls a function after each save, removal or skipped save through this object; `Change` has an example.

        Args:
            listener: Receives a `Change`, in the thread that saves or removes. Its errors become warnings.
        """
        self._listeners.append(listener)

    def notify(self, changes: Iterable[Change]) -> None:
        """Notes changes in the journal, and calls the listeners. The caller is a writer that holds no lock."""
        changes = list(changes)
        self.note(*map(_event, changes))
        self._tell(changes)

    def note(self, *events: Event) -> None:
        """Notes events in the journal, as far as possible."""
        if events:
            with contextlib.suppress(OSError, ValueError), self.open() as folder:
                Journal(folder).append(*events)

    def _tell(self, changes: Iterable[Change]) -> None:
        """Logs changes, and calls the listeners."""
        for change in changes:
            log.info("%s %s", change.kind, change.record.prefix)
            for listener in self._listeners:
                try:
                    listener(change)
                except Exception as error:  # noqa: BLE001 - the save is done, whatever a listener raises
                    warn(f"A listener of {self.path} failed: {change.record.prefix} was {change.kind}, and {error!r}")

    def listing(self) -> Listing:
        """Reads the directory: whole, damaged and unmanaged checkpoints.

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

    def events(self) -> list[Event]:
        """The events in the journal, oldest first. A line that cannot be read is skipped; without a journal, none.

        Example:

        ```python
        skipped = [event for event in runs.events() if event.kind == "skipped"]
        ```
        """
        return self._past()[0]

    def history(self, name: str | None = None) -> History:
        """The curve of a metric over the run, from the journal and the sidecars.

        Without a journal, the curve has the checkpoints that are there.

        Example:

        ```python
        values = [point.value for point in runs.history("val_accuracy")]
        ```

        Args:
            name: The metric. Defaults to the metric that training monitored.

        Raises:
            MonitorError: No metric was monitored, or no step has the metric. The error names the metrics.
            ValueError: The path is one file of a template.
        """
        return Past(*self._past()).history(name)

    def fates(self) -> tuple[Fate, ...]:
        """The fate of each save: of a checkpoint that is there, of a checkpoint that went, of a skipped save.

        Example:

        ```python
        removed = {fate.facts.step: fate.why for fate in runs.fates() if fate.state == "removed"}
        ```

        Raises:
            ValueError: The path is one file of a template.
        """
        return Past(*self._past()).fates()

    def why(self, step: int | CheckpointRecord) -> str:
        """One sentence that tells why the checkpoint of a step is kept, was removed, or was never saved.

        Example:

        ```python
        print(runs.why(120))
        ```

        Args:
            step: The step, or a record of a checkpoint that may be gone.

        Raises:
            ValueError: The path is one file of a template.
        """
        if not isinstance(step, int | CheckpointRecord):
            raise TypeError(f"why() expected a step or a record. Received: {step!r}")
        return Past(*self._past()).why(step)

    def latest(self) -> CheckpointRecord | None:
        """The newest checkpoint in the order of saving, or `None` without checkpoints.

        Raises:
            ValueError: The path is one file of a template.
        """
        self.refuse_one_file()
        records = self.listing().records
        return records[-1] if records else None

    def best(self, monitor: str | None = None, mode: Mode | None = None) -> CheckpointRecord | None:
        """The checkpoint with the best value of a metric, or `None` without checkpoints.

        With equal values, the earlier checkpoint is better.

        Args:
            monitor: The metric. Defaults to the metric that training monitored.
            mode: `"min"` or `"max"`. Defaults to the metric's mode in the sidecars.

        Raises:
            CheckpointNotFoundError: No checkpoint has a finite value of the metric. The error names the metrics.
            MonitorError: Neither the arguments nor the sidecars give the metric, or its mode.
            ValueError: The path is one file of a template.
        """
        self.refuse_one_file()
        listing = self.listing()
        if not listing.records:
            return None
        policy = resolved(BestN(1, monitor, mode), listing, CheckpointNotFoundError)
        steps = policy.select(listing.records)
        if not steps:
            raise CheckpointNotFoundError(f"No checkpoint in {self.path} is best: {policy!r} found no finite value.")
        return listing.find(steps.pop())

    def plan(self, keep: PreservationPolicy | int) -> PrunePlan:
        """Plans which checkpoints a policy would keep and remove, and why. Removes nothing.

        Args:
            keep: A policy; an int `n` means `LatestN(n)`.

        Raises:
            PlanError: The plan would keep nothing, or the policy ranks by a metric that no checkpoint has.
            FormatVersionError: A newer version of this package wrote here.
            ValueError: The path is one file of a template.
        """
        self.refuse_one_file()
        policy = given_policy(keep)
        listing = self.listing()
        listing.refuse_newer()
        policy = resolved(policy, listing, PlanError) if listing.records else policy
        with _naming(self.path):
            decisions = tuple(decide(policy, listing.records)) if listing.records else ()
        if listing.records and not any(decision.kept for decision in decisions):
            raise PlanError(
                f"{policy!r} would keep none of the {len(decisions)} checkpoints in {self.path}. "
                "To remove all of them, use clear()."
            )
        return PrunePlan(policy, decisions, listing)

    def prune(self, plan: PrunePlan | PreservationPolicy) -> list[int]:
        """Removes the checkpoints that a plan removes, except those pinned, saved again or removed meanwhile.

        The method first reads every byte of the checkpoints that the plan keeps: a damaged checkpoint must not replace
        the others.

        Args:
            plan: A plan of this directory, or a policy to plan with.

        Returns:
            The removed steps.

        Raises:
            PlanError: A checkpoint that the plan keeps is damaged; nothing was removed.
            ValueError: The path is one file of a template.
        """
        self.refuse_one_file()
        if isinstance(plan, PreservationPolicy):
            plan = self.plan(plan)
        if not isinstance(plan, PrunePlan):
            # A user might mean a number as a step.
            raise TypeError(f"prune() takes a plan, or a policy such as keras_ckpt.LatestN(2). Received: {plan!r}")
        if not plan.removed:
            return []
        if elsewhere := {record.directory for record in plan.removed} - {self.path}:
            raise ValueError(f"The plan is for {elsewhere.pop()}, not for {self.path}.")
        refuse_damaged(plan)
        return self.carry_out(plan)

    def carry_out(self, plan: PrunePlan) -> list[int]:
        """Removes what a plan removes, as `prune` does. The caller has called `refuse_damaged`."""
        planned = {record.identity for record in plan.removed}
        with self._change() as (folder, listing):
            listing.refuse_newer()
            doomed = [each for each in listing.records if each.identity in planned and not each.pinned]
            if doomed and len(doomed) == len(listing.records):
                raise PlanError(
                    f"Nothing was removed: the checkpoints that the plan keeps are no longer in {self.path}, so none "
                    f"of the {len(doomed)} checkpoints would be left. Plan again."
                )
            commit.remove(folder, listing, doomed)
        reasons = {each.record.identity: each.reason for each in plan.decisions}
        changes = [Change("removed", record, reasons[record.identity]) for record in doomed]
        self.note(*(msgspec.structs.replace(_event(change), by=user()) for change in changes))
        self._tell(changes)
        return [record.step for record in doomed]

    def verify(self, progress: Callable[[int, int], object] = lambda done, total: None) -> Verification:
        """Reads every byte of every checkpoint, and compares sizes and digests with the sidecars. Changes nothing.

        Example:

        ```python
        found = runs.verify()
        assert found.ok, found
        ```

        Args:
            progress: Called after each piece with the bytes read so far and the bytes in total.

        Returns:
            The whole and the damaged checkpoints, without those that another process removed or saved again meanwhile.
        """
        return Verification(self._read(lambda folder: verify(folder, progress)))

    def pin(self, step: int | CheckpointRecord | None, reason: str = "") -> None:
        """Protects a checkpoint from every policy until `unpin`. The same as `touch ckpt-120.keep` in a shell.

        Args:
            step: The checkpoint's step or record.
            reason: The reason, which the table shows.

        Raises:
            CheckpointNotFoundError: The checkpoint does not exist, or was saved again after its record was read.
        """
        if not isinstance(reason, str) or len(reason.encode()) > PIN_LIMIT:
            raise ValueError(f"A pin's reason must be a string of at most {PIN_LIMIT} bytes. Received: {reason!r:.100}")
        with self._change() as (folder, listing):
            record = self._find(listing, step)
            folder.replace(layout.pin(record.name), reason.encode())
        self.note(of_record("pinned", record, reason=reason, by=user()))

    def unpin(self, step: int | CheckpointRecord | None) -> None:
        """Removes the pin of a checkpoint, if any: policies may remove the checkpoint again."""
        with self._change() as (folder, listing):
            record = self._find(listing, step)
            folder.remove(layout.pin(record.name))
            folder.sync()
        self.note(of_record("unpinned", record, by=user()))

    def add_metrics(
        self,
        step: int | CheckpointRecord | None,
        metrics: Mapping[str, float] = {},
        modes: Mapping[str, Mode] = {},
        /,
        **named: float,
    ) -> None:
        """Adds metrics of a checkpoint to its sidecar. Replaces metrics of the same name.

        Example:

        ```python
        loss, accuracy = model.evaluate(x_test, y_test)
        runs.add_metrics(120, test_accuracy=accuracy)
        ```

        Args:
            step: The checkpoint's step or record.
            metrics: Values by name, for names that are not Python identifiers.
            modes: The modes by name: `"min"` if smaller is better, `"max"` if larger is better. `best` and policies
                then need no mode.
            **named: Values by name.

        Raises:
            CheckpointNotFoundError: The checkpoint does not exist, or was saved again after its record was read.
            ValueError: A mode is neither `"min"` nor `"max"`.
            TypeError: A value is not a number.
        """
        added = {name: as_metric(name, value) for name, value in {**metrics, **named}.items()}
        if wrong := {name: mode for name, mode in modes.items() if mode not in ("min", "max")}:
            raise ValueError(f"add_metrics() expected mode 'min' or 'max' for each metric. Received: modes={wrong!r}")
        with self._change() as (folder, listing):
            record = self._find(listing, step)
            described = {"metrics": {**record.metrics, **added}, "modes": {**record.modes, **modes}}
            amend(folder, msgspec.structs.replace(record, **described))
        self.note(of_record("metrics", record, metrics=added, by=user()))

    def evaluate(self, model: Any, data: Any, prefix: str = "test_", **options: Any) -> dict[int, dict[str, float]]:
        """Evaluates each checkpoint on data, and adds the metrics to its sidecar.

        The same as `keras_ckpt.evaluate(model, directory, data)`, which describes the arguments and errors.

        Example:

        ```python
        runs.evaluate(model, (x_test, y_test))
        print(runs.best("test_accuracy"))
        ```

        Args:
            model: A compiled and built model that the checkpoints fit. Afterwards it is as it was.
            data: The data, in a form of `validation_data` of `fit`.
            prefix: The prefix of the names of the metrics.
            **options: Arguments of `model.evaluate`.

        Returns:
            The metrics with the prefix of each evaluated checkpoint, by step, also of those that had them already.
        """
        import keras_ckpt  # a model needs TensorFlow, which nothing else here needs

        return keras_ckpt.evaluate(model, self, data, prefix, **options)

    def clear(self, *, pinned: bool = False) -> list[int]:
        """Removes all checkpoints of the directory, so that another run can begin in it.

        Args:
            pinned: Whether to remove pinned checkpoints too.

        Returns:
            The removed steps.

        Raises:
            PlanError: Some checkpoints are pinned, and `pinned` is false; nothing was removed.
            DirectoryInUseError: Another process trains into this directory.
            FormatVersionError: A newer version of this package wrote here.
            ValueError: The path is one file of a template.
        """
        self.refuse_one_file()
        if not os.path.lexists(self.path):
            return []
        with self._change() as (folder, before):
            lock = folder.lock()
            before.refuse_newer()
            # Without recovery, the next writer would publish a complete stage of a process that died.
            commit.recover(folder)
            listing = examine(folder)
            if not pinned and (steps := [record.step for record in listing.records if record.pinned]):
                raise PlanError(
                    f"{self.path} has pinned checkpoints: {steps}. Nothing was removed. To remove them too, use "
                    "clear(pinned=True)."
                )
            if listing.records:
                commit.remove(folder, listing, listing.records)
            for record in listing.records:
                folder.remove(layout.pin(record.name))
            Journal(folder).remove()
            del lock
        self._tell(Change("removed", record, "the directory was cleared") for record in listing.records)
        return [record.step for record in listing.records]

    def _find(self, listing: Listing, step: int | CheckpointRecord | None) -> CheckpointRecord:
        """The current record of a step or an older record."""
        if step is None:
            raise TypeError(
                "Expected a step or a record. Received: None, which latest() and best() return for an empty directory."
            )
        if not isinstance(step, CheckpointRecord):
            return listing.find(step)
        if os.path.realpath(step.directory) != os.path.realpath(self.path):
            raise ValueError(f"The record belongs to {step.directory}, not to {self.path}.")
        found = listing.named(step.name) if step.template else listing.find(step.step)
        if not found.same_save(step):
            raise CheckpointNotFoundError(
                f"{step.prefix} was saved again after this record was read. Look it up again."
            )
        return found

    def plot(self, monitor: str | None = None, ax: Axes | None = None) -> Axes:
        """Plots a metric over the run with matplotlib: its curve, and a mark for each checkpoint.

        The axis of the values is logarithmic if they span more than a factor of 100.

        Example:

        ```python
        axes = keras_ckpt.CheckpointDirectory("runs/digits").plot("val_accuracy")
        axes.figure.savefig("accuracy.svg")
        ```

        Args:
            monitor: The metric. Defaults to the metric that training monitored.
            ax: The axes to draw on. Defaults to those of a new figure.

        Returns:
            The axes.

        Raises:
            MonitorError: No step has the metric. The error names the metrics.
            CheckpointNotFoundError: No step has a metric with a finite value.
            ValueError: The path is one file of a template.
            ImportError: matplotlib is not installed.
        """
        self.refuse_one_file()
        picture = self.seen(monitor).picture
        if not picture.values:
            raise CheckpointNotFoundError(f"There is nothing to plot: {self.path} has no metric with a finite value.")
        return drawing.plot(picture, ax)

    def report(self, file: str | os.PathLike[str]) -> None:
        """Writes a report of the run: one page of HTML with the facts, the plot and the table of the checkpoints.

        The page has no script, loads nothing, and is light or dark as the reader's system.

        Example:

        ```python
        keras_ckpt.CheckpointDirectory("runs/digits").report("report.html")
        ```

        Args:
            file: The path of the page. An existing file is replaced.

        Raises:
            CheckpointNotFoundError: The directory does not exist.
        """
        if not os.path.isdir(self.path):
            raise CheckpointNotFoundError(f"There is no directory {self.path}.")
        write(file, page(self.look(ROWS)))

    def watch(self, rows: int = 10) -> Watch:
        """Shows the table and the plot of the run in a notebook, and again after each change.

        A thread asks once a second whether the directory has changed, and reads it only then. It ends with the
        training that begins after this call, with `stop()`, or with the kernel.

        Example:

        ```python
        watch = keras_ckpt.CheckpointDirectory("runs/digits").watch()
        model.fit(x, y, callbacks=[keras_ckpt.ModelCheckpoint("runs/digits")])
        watch.stop()
        ```

        Args:
            rows: The largest number of rows of a complete table. A longer table has the newest and the best.

        Returns:
            The watch, whose `stop()` ends it.

        Raises:
            ImportError: IPython is not installed. `keras-ckpt watch` is for terminals.
        """
        return Watch(self, rows)

    def _table(self) -> tables.Table:
        try:
            return self.look().table()
        except (CheckpointError, OSError) as error:  # a repr never raises
            return tables.Table(tables.printable(tables.relative(self.path)), notes=(tables.printable(str(error)),))

    def look(self, rows: int = overview.ROWS) -> View:
        """Reads everything that a table or a report shows.

        Args:
            rows: The largest number of rows of a complete table.
        """
        with _naming(self.path):
            series = [each.seen() for each in self.each_series()]
            title = series[0].picture.title if len(series) == 1 else tables.relative(self.path)
            disk = taken([record for each in series for record in each.listing.all_runs])
            further = self._further_runs(any(each.listing for each in series))
            return View(title, series, disk, further, rows)

    def seen(self, monitor: str | None = None) -> Seen:
        """Reads a series with its best checkpoint and its picture."""
        events, listing = self._known()
        past, ranking = Past(events, listing), rank(listing, BestN(1, monitor))
        return Seen(listing, past, ranking, drawing.of_past(listing.title, past, listing, ranking, monitor))

    def _further_runs(self, holds_a_run: bool) -> list[str]:
        """The sub-directories that hold a run: the numbered ones, or those of any name if this directory holds none.

        The path of one file means this file alone.
        """
        if self.series.only or not os.path.isdir(self.path):
            return []
        places = itertools.islice(self.places(), 1, None) if holds_a_run else self._subdirectories()
        return [place.path for place in places if _holds_a_run(place)]

    def _subdirectories(self) -> Iterator[CheckpointDirectory]:
        with Folder(self.path) as folder:
            names = folder.names()
        return map(self.subdirectory, sorted(set(names) - {PRIVATE}, key=lambda name: (len(name), name)))

    @contextlib.contextmanager
    def _change(self) -> Iterator[tuple[Folder, Listing]]:
        """Opens and lists the directory under the mutex, which keeps others from changing the set of checkpoints."""
        background.wait()
        with _naming(self.path), self.open() as folder, folder.mutex():
            yield folder, examine(folder)

    def _past(self) -> tuple[list[Event], Listing]:
        """The journal, and then the contents of the directory, of all checkpoints of a series."""
        self.refuse_one_file()
        return self._known()

    def _known(self) -> tuple[list[Event], Listing]:
        """The journal, and then the contents of the directory. The path of one file means this file alone."""
        events: list[Event] = []

        def read(folder: Folder) -> Listing:
            events.extend([] if folder.series.only else Journal(folder).read())
            return examine(folder)

        return events, self._read(read)

    def _read(self, reader: Callable[[Folder], Listing]) -> Listing:
        background.wait()
        try:
            with _naming(self.path), self.open() as folder:
                return reader(folder)
        except FileNotFoundError:
            return Listing(self.path, series=self.series)


def _event(change: Change) -> Event:
    """The event of a change that a training made."""
    if change.kind == "removed":
        return of_record("removed", change.record, why=change.why)
    return of_save(change.record, kind=change.kind, why=change.why)


def _holds_a_run(place: CheckpointDirectory) -> bool:
    """Whether a directory has files of checkpoints, by their names: a listing of many runs takes long."""
    with contextlib.suppress(OSError), Folder(place.path) as folder:
        names = folder.names()
        return bool(layout.of_indexes(names) or folder.templates() or any(map(layout.is_keras_file, names)))
    return False


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Adds the directory to the file name of each file system error."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        error.filename = os.path.join(path, error.filename) if isinstance(error.filename, str) else path
        raise


def given_policy(keep: PreservationPolicy | int) -> PreservationPolicy:
    """The policy of a plan, which needs one."""
    policy = as_policy(keep)
    if policy is None:
        raise TypeError("plan() needs a policy, such as keras_ckpt.LatestN(2). Received: None")
    return policy


def refuse_damaged(plan: PrunePlan) -> None:
    """Refuses a plan that keeps a damaged checkpoint, by reading every byte of the checkpoints that it keeps.

    Raises:
        PlanError: A checkpoint that the plan keeps is damaged.
    """
    with _naming(plan.listing.path), Folder(plan.listing.path, plan.listing.series) as folder:
        for record in plan.kept:
            try:
                check(folder, record)
            except DamagedCheckpointError as error:
                raise PlanError(
                    f"Nothing was removed: the plan keeps {record.prefix}, which is damaged: {error}. Move its files "
                    "away, and plan again."
                ) from error
            except FileNotFoundError:
                continue
