"""The runs below a directory: compared in one table, ranked together, and pruned by one policy."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from keras_ckpt.errors import CheckpointError, CheckpointNotFoundError, MonitorError, PlanError
from keras_ckpt.store import background, drawing, layout, overview, report, tables
from keras_ckpt.store.directory import CheckpointDirectory, given_policy, refuse_damaged
from keras_ckpt.store.files import PRIVATE, Folder, folders_below
from keras_ckpt.store.listing import Listing, examine, scan
from keras_ckpt.store.notices import warn
from keras_ckpt.store.plan import PrunePlan, resolved
from keras_ckpt.store.policies import BestN, PreservationPolicy
from keras_ckpt.store.record import CheckpointRecord, Mode

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_PICTURES = 24
"""The largest number of plots beside each other."""


class RunSummary(NamedTuple):
    """A run by its sidecars, as a row of the table of several runs.

    Attributes:
        name: The path of the run below the directory of all runs, `"."` for the directory itself.
        listing: The checkpoints of the run.
        best: The best checkpoint, `None` if no checkpoint has a finite value of the metric.
    """

    name: str
    listing: Listing
    best: CheckpointRecord | None

    @property
    def told(self) -> CheckpointRecord | None:
        """The checkpoint that stands for the run: the best, or else the newest."""
        return self.best or self.newest

    @property
    def newest(self) -> CheckpointRecord | None:
        return self.listing.records[-1] if self.listing.records else None

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.told.metadata if self.told else {}

    @property
    def step(self) -> int | None:
        """The largest step."""
        return max((record.step for record in self.listing.records), default=None)

    @property
    def epoch(self) -> int | None:
        """The largest epoch, `None` if not known."""
        return max((record.epoch for record in self.listing.records if record.epoch is not None), default=None)

    @property
    def size(self) -> int:
        """The bytes of the files by their sidecars. Files with one digest are hard links, and count once."""
        return sum({file.digest: file.size for record in self.listing.records for file in record.files}.values())

    @property
    def saved_at(self) -> datetime | None:
        """The time of the newest checkpoint."""
        return self.newest.saved_at if self.newest else None

    def facts(self) -> dict[str, Any]:
        """The facts of the run; `Runs.facts` tells their meaning."""
        return {
            "run": self.name,
            "path": self.listing.path,
            "metadata": dict(self.metadata),
            "metrics": dict(self.told.metrics) if self.told else {},
            "best_step": self.best.step if self.best else None,
            "step": self.step,
            "epoch": self.epoch,
            "checkpoints": len(self.listing.records),
            "size": self.size,
            "saved_at": self.saved_at,
        }


@dataclasses.dataclass(frozen=True, repr=False)
class RunsPlan(tables.Shown):
    """The checkpoints that a policy would keep and remove in each of several runs. Only `Runs.prune(plan)` removes.

    Example:

    ```python
    plan = keras_ckpt.Runs("runs").plan(keras_ckpt.BestN(1))
    print(plan)
    ```

    Attributes:
        path: The directory of all runs.
        policy: The policy. Each run fills in its own monitor and mode.
        plans: The plan of each run.
    """

    path: str
    policy: PreservationPolicy
    plans: tuple[PrunePlan, ...]

    @property
    def kept(self) -> tuple[CheckpointRecord, ...]:
        return tuple(record for plan in self.plans for record in plan.kept)

    @property
    def removed(self) -> tuple[CheckpointRecord, ...]:
        return tuple(record for plan in self.plans for record in plan.removed)

    def _table(self) -> tables.Table:
        return overview.of_plans(self.policy, [(_name(self.path, plan.listing), plan) for plan in self.plans])


class Runs(tables.Shown):
    """The runs below a directory.

    A run is a directory with sidecars, at any depth; the directory itself is a run too, if it has sidecars. Each series
    of Keras's files is a run. Backups of `BackupAndRestore` are no runs. Links and hidden folders are not searched.

    Iterating yields the `CheckpointDirectory` of each run. Each call reads the disk again. The table and `facts` trust
    the sidecars; `best`, `plan` and `prune` compare the sizes of the files too. Nothing here needs TensorFlow.

    Example:

    ```python
    runs = keras_ckpt.Runs("runs")
    print(runs)
    best = runs.best("val_accuracy")
    for run in runs:
        print(run.path, len(run))
    ```

    Args:
        path: The directory. It need not exist yet.

    Raises:
        ValueError: The path is a URL, or empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = CheckpointDirectory(path, layout.TENSORFLOW).path

    def __iter__(self) -> Iterator[CheckpointDirectory]:
        return map(_directory, self._listings(scan))

    def __len__(self) -> int:
        return len(self._listings(scan))

    def best(self, monitor: str | None = None, mode: Mode | None = None) -> CheckpointRecord | None:
        """The checkpoint with the best value of a metric in all runs, or `None` without checkpoints.

        With equal values, the earlier checkpoint is better.

        Args:
            monitor: The metric. Defaults to the metric that most runs monitor.
            mode: `"min"` or `"max"`. Defaults to the metric's mode in the sidecars.

        Raises:
            CheckpointNotFoundError: No checkpoint has a finite value of the metric. The error names the metrics.
            MonitorError: Neither the arguments nor the sidecars give the metric, or its mode.
        """
        listings = self._listings(examine)
        ranking = self._ranking(listings, monitor, mode)
        if ranking is None:
            return None
        found = [best for listing in listings if (best := _best(listing, ranking))]
        if not found:
            raise CheckpointNotFoundError(
                f"No checkpoint below {self.path} is best: {ranking!r} found no finite value."
            )
        return min(found, key=lambda best: _order(best, ranking))

    def facts(self) -> list[dict[str, Any]]:
        """The facts of each run as a dict, the best run first.

        `run` is the path below the directory, `path` the directory of the run. `metadata` and `metrics` are those of
        the best checkpoint, whose step is `best_step`, or else those of the newest checkpoint. `step` and `epoch` are
        the largest, `checkpoints` is the number that is kept, `size` their bytes, `saved_at` the time of the newest.
        """
        return [run.facts() for run in self._summaries(self._listings(scan))[0]]

    def to_pandas(self) -> pd.DataFrame:
        """The facts of each run as a row of a `pandas.DataFrame`, the best run first.

        Metadata and metrics have a column each, such as `metadata.rate` and `metrics.val_loss`.

        Raises:
            ImportError: pandas is not installed.
        """
        return tables.pandas().json_normalize(self.facts())

    def plot(self, monitor: str | None = None) -> list[Axes]:
        """Plots a metric over each run with matplotlib, on axes beside each other, the best run first.

        The axes have one scale of values. They show the best 24 runs that have the metric.

        Example:

        ```python
        first, *others = keras_ckpt.Runs("runs").plot("val_accuracy")
        first.figure.savefig("runs.svg")
        ```

        Args:
            monitor: The metric. Defaults to the metric that most runs monitor.

        Returns:
            The axes of each run.

        Raises:
            CheckpointNotFoundError: No run has the metric.
            ImportError: matplotlib is not installed.
        """
        pictures = self._pictures(monitor)
        if not pictures:
            raise CheckpointNotFoundError(f"There is nothing to plot: no run below {self.path} has the metric.")
        return drawing.plots(pictures)

    def report(self, file: str | os.PathLike[str]) -> None:
        """Writes a report: one page of HTML with the table of the runs, and a small plot of each.

        Args:
            file: The path of the page. An existing file is replaced.
        """
        report.write(file, report.page_of_runs(self._table(), self._pictures()))

    def plan(self, keep: PreservationPolicy | int) -> RunsPlan:
        """Plans which checkpoints a policy would keep and remove in each run by itself. Removes nothing.

        Args:
            keep: A policy; an int `n` means `LatestN(n)`.

        Raises:
            PlanError: The plan of a run would keep nothing, or the policy ranks by a metric that no checkpoint of the
                run has.
            FormatVersionError: A newer version of this package wrote into a run.
        """
        policy = given_policy(keep)
        plans = []
        for run in self:
            with _naming(run), contextlib.suppress(FileNotFoundError):  # removed meanwhile
                plans.append(run.plan(policy))
        return RunsPlan(self.path, policy, tuple(plans))

    def prune(self, plan: RunsPlan | PreservationPolicy) -> list[CheckpointRecord]:
        """Removes the checkpoints that a plan removes, except those pinned, saved again or removed meanwhile.

        The method first reads every byte of the checkpoints that the plan keeps in all runs. So nothing is removed in
        any run if one of them is damaged.

        Args:
            plan: A plan of these runs, or a policy to plan with.

        Returns:
            The removed checkpoints.

        Raises:
            PlanError: A checkpoint that the plan keeps is damaged; nothing was removed.
        """
        if isinstance(plan, PreservationPolicy):
            plan = self.plan(plan)
        if not isinstance(plan, RunsPlan):
            raise TypeError(f"prune() takes a plan, or a policy such as keras_ckpt.LatestN(2). Received: {plan!r}")
        if plan.path != self.path:
            raise ValueError(f"The plan is for {plan.path}, not for {self.path}.")
        due = [each for each in plan.plans if each.removed]
        for each in due:
            refuse_damaged(each)
        removed: list[CheckpointRecord] = []
        for each in due:
            with _telling(removed):
                steps = _directory(each.listing).carry_out(each)
            removed += [record for record in each.removed if record.step in steps]
        return removed

    def _listings(self, reader: Callable[[Folder], Listing]) -> list[Listing]:
        """The listing of each run. A warning names each folder that cannot be read."""
        listings, errors = self._read(reader)
        for path, error in errors.items():
            warn(f"{path} is skipped, because it cannot be read: {error}")
        return listings

    def _read(self, reader: Callable[[Folder], Listing]) -> tuple[list[Listing], dict[str, OSError]]:
        """The listing of each run, and the error of each folder that cannot be read.

        Raises:
            OSError: The directory itself cannot be read.
        """
        background.wait()
        errors: dict[str, OSError] = {}
        listings = list(_found(self.path, reader, errors))
        if self.path in errors:
            raise errors[self.path]
        return listings, errors

    def _ranking(self, listings: Sequence[Listing], monitor: str | None, mode: Mode | None) -> BestN | None:
        """The policy that finds the best checkpoint of each run, by one metric; `None` without checkpoints."""
        used = sorted((each for each in listings if each.records), key=lambda each: each.records[-1].time)
        if not used:
            return None
        monitors = collections.Counter(each.records[-1].monitor for each in used)
        del monitors[None]
        if monitor is None and monitors:
            [(monitor, _)] = monitors.most_common(1)
        together = Listing(self.path, tuple(record for each in used for record in each.records))
        return cast(BestN, resolved(BestN(1, monitor, mode), together, CheckpointNotFoundError))

    def _summaries(self, listings: Sequence[Listing]) -> tuple[list[RunSummary], str | None]:
        """The runs, the best first, and the metric that ranks them, `None` if not known."""
        ranking = None
        with contextlib.suppress(MonitorError, CheckpointNotFoundError):
            ranking = self._ranking(listings, None, None)
        if ranking is None:
            return [RunSummary(_name(self.path, each), each, None) for each in listings], None
        runs = [RunSummary(_name(self.path, each), each, _best(each, ranking)) for each in listings]
        return sorted(runs, key=lambda run: _order(run.best, ranking)), ranking.monitor

    def _pictures(self, monitor: str | None = None) -> list[drawing.Picture]:
        """The pictures of the best runs that have a metric, the best first."""
        runs, ranked = self._summaries(self._listings(scan))
        pictures = []
        for run in runs:
            with contextlib.suppress(MonitorError, OSError):
                picture = _directory(run.listing).seen(monitor or ranked).picture
                pictures += [dataclasses.replace(picture, title=run.name)] if picture.values else []
            if len(pictures) == _PICTURES:
                break
        return pictures

    def _table(self) -> tables.Table:
        title = tables.relative(self.path)
        try:
            listings, errors = self._read(scan)
        except OSError as error:  # a repr never raises
            return tables.Table(tables.printable(title), notes=(tables.printable(str(error)),))
        return overview.of_runs(title, *self._summaries(listings), errors)


def _found(path: str, reader: Callable[[Folder], Listing], errors: dict[str, OSError]) -> Iterator[Listing]:
    """The listing of each run below a directory. Notes the error of each folder that cannot be read."""
    inner: set[str] = set()  # the folders in which a template above has its files
    for folder, folders, names in folders_below(path, lambda error: _note(errors, error.filename, error)):
        if folder in inner or not _may_hold_runs(folders, names):
            continue
        try:
            for each in CheckpointDirectory(folder).each_series():
                with Folder(each.path, each.series) as opened:
                    listing = reader(opened)
                if each.series.depth:
                    inner |= {os.path.join(folder, os.path.dirname(record.name)) for record in listing.all_runs}
                if _is_run(listing):
                    yield listing
        except OSError as error:
            _note(errors, folder, error)


def _note(errors: dict[str, OSError], path: str, error: OSError) -> None:
    """Notes an error. A folder that is missing was removed meanwhile."""
    if not isinstance(error, FileNotFoundError):
        errors[path] = error


def _may_hold_runs(folders: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a folder may hold checkpoints, by the names in it: a folder may have any number of other files."""
    has_sidecars = not layout.of_sidecars(names).isdisjoint(layout.of_indexes(names))
    return PRIVATE in folders or has_sidecars or any(map(layout.is_keras_file, names))


def _is_run(listing: Listing) -> bool:
    """Whether a series has checkpoints, at least damaged ones, and is no backup."""
    return bool(listing.damaged) or not all(record.is_backup for record in listing.records)


def _best(listing: Listing, ranking: BestN) -> CheckpointRecord | None:
    """The best checkpoint of a run."""
    steps = ranking.select(listing.records)
    return next((record for record in listing.records if record.step in steps), None)


def _order(best: CheckpointRecord | None, ranking: BestN) -> tuple[bool, float, float]:
    """The place of a best checkpoint among those of other runs. With equal values, the earlier is better."""
    if best is None:
        return True, 0, 0
    value = best.metrics[str(ranking.monitor)]
    return False, value if ranking.mode == "min" else -value, best.time


def _name(path: str, listing: Listing) -> str:
    """The path of a run below the directory of all runs."""
    return os.path.normpath(os.path.join(os.path.relpath(listing.path, path), listing.series.template))


def _directory(listing: Listing) -> CheckpointDirectory:
    return CheckpointDirectory(listing.path, listing.series)


@contextlib.contextmanager
def _naming(run: CheckpointDirectory) -> Iterator[None]:
    """Adds the run to an error of its plan."""
    try:
        yield
    except (PlanError, MonitorError) as error:
        place = tables.relative(os.path.join(run.path, run.series.template).rstrip("/"))
        raise type(error)(f"No plan for {place}: {error}") from error


@contextlib.contextmanager
def _telling(removed: Sequence[CheckpointRecord]) -> Iterator[None]:
    """Adds to an error how many checkpoints of other runs were removed before it."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        if not removed:
            raise
        count = tables.counted(len(removed), "checkpoint")
        raise PlanError(f"{error} Before, {count} of other runs were removed: plan again.") from error
