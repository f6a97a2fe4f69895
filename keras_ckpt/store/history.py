"""The past of a directory, from its journal and its records: the curve of a metric, the fate of each checkpoint.

Without a journal, the records on disk are all that is known. Where both differ, the records hold.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import heapq
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from keras_ckpt.errors import MonitorError
from keras_ckpt.store import overview, tables
from keras_ckpt.store.journal import TRAINING, Event, of_save, policy_of
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.plan import decide, rank
from keras_ckpt.store.policies import BestN
from keras_ckpt.store.record import CheckpointRecord, local_time, step_in

State = Literal["kept", "damaged", "removed", "lost", "skipped", "failed"]
_MOVES = ("run", "restored", "epoch", "saved", "ended")
"""The kinds of the events that only a training writes."""


class Point(NamedTuple):
    """The value of a metric at a step.

    Example:

    ```python
    history = keras_ckpt.CheckpointDirectory("runs/digits").history("val_accuracy")
    branches = {point.branch for point in history.points}
    ```

    Attributes:
        step: Training batches completed since the run began.
        epoch: Epochs completed since the run began; `None` if not known.
        value: The value, which may be NaN or infinite.
        branch: 0 on the line that the run took to where it is now. The steps after a step that the run went back to
            are a branch, numbered from 1, oldest first.
    """

    step: int
    epoch: int | None
    value: float
    branch: int


@dataclasses.dataclass(frozen=True, repr=False)
class History(tables.Shown):
    """The curve of a metric over a run. Iterating yields the points of the line that the run took to where it is now.

    Example:

    ```python
    history = keras_ckpt.CheckpointDirectory("runs/digits").history("val_accuracy")
    for point in history:
        print(point.step, point.epoch, point.value)
    ```

    Attributes:
        path: The directory.
        name: The metric.
        points: All points, branch by branch, each in the order of the steps.
    """

    path: str
    name: str
    points: tuple[Point, ...] = ()

    def __iter__(self) -> Iterator[Point]:
        return (point for point in self.points if point.branch == 0)

    def __len__(self) -> int:
        return sum(point.branch == 0 for point in self.points)

    def to_pandas(self) -> Any:
        """All points as a `pandas.DataFrame` with the columns `step`, `epoch`, `value` and `branch`.

        Raises:
            ImportError: pandas is not installed.
        """
        return tables.pandas().DataFrame(self.points, columns=list(Point._fields))

    def _table(self) -> tables.Table:
        points = list(self)
        columns = (
            tables.Column("step", tuple(str(point.step) for point in points)),
            tables.Column("epoch", tuple("" if point.epoch is None else str(point.epoch) for point in points)),
            tables.Column(tables.printable(self.name), tuple(tables.metric(point.value) for point in points)),
        )
        earlier = len(self.points) - len(points)
        notes = [tables.counted(len(points), "point")]
        notes += [f"{tables.counted(earlier, 'point')} of earlier branches"] if earlier else []
        return tables.Table(tables.printable(tables.relative(self.path)), columns if points else (), tuple(notes))


@dataclasses.dataclass(frozen=True)
class Fate:
    """The fate of a save: its facts, whether its checkpoint is there, and why it went.

    Example:

    ```python
    for fate in keras_ckpt.CheckpointDirectory("runs/digits").fates():
        print(fate.facts.step, fate.facts.metrics, fate.state, fate.why)
    ```

    Attributes:
        facts: The save: its step, epoch, name, size and all metrics that are known of it.
        state: `"kept"`: the checkpoint is there. `"damaged"`: it is there, and cannot be trusted. `"removed"`: it was
            removed. `"lost"`: it is gone, and the journal does not tell why. `"skipped"`: the save was due, or
            the loss was not finite, and no save was made. `"failed"`: the save failed.
        why: The reason of the state, `""` if it is not known. For a kept checkpoint, the parts of the policy that
            keep it, and its pin.
        by: Who removed the checkpoint: `"callback"` for the training, a user and a host otherwise.
        at: When the checkpoint was removed, or when the save was skipped or failed; otherwise when it was saved. In
            seconds since 1970.
        record: The record of a checkpoint that is there, else `None`.
        branch: The branch of its step, as in `Point`.
    """

    facts: Event
    state: State
    why: str = ""
    by: str = TRAINING
    at: float = 0.0
    record: CheckpointRecord | None = None
    branch: int = 0


@dataclasses.dataclass
class _Place:
    """A step of a run: its metrics, its branch, and the reason if its branch ends there."""

    step: int
    epoch: int | None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    branch: int = 0
    end: str = ""

    def measure(self, event: Event) -> None:
        self.metrics.update(event.metrics)
        # The save of an epoch's last batch, which counts the epochs before, may be told after the epoch's end.
        self.epoch = max((each for each in (self.epoch, event.epoch) if each is not None), default=None)


class _Run:
    """The lines of a run: one for each time that it went back to a step. The last is the current line."""

    def __init__(self) -> None:
        self._lines: list[dict[int, _Place]] = [{}]

    def go_back(self, step: int, why: str) -> None:
        """Continues from a step, of the newest line that has it. The line until now may end for a reason."""
        line = next((line for line in reversed(self._lines) if step in line), self._lines[-1])
        kept = {each: place for each, place in line.items() if each <= step}
        if len(kept) < len(self._lines[-1]) or line is not self._lines[-1]:
            last = self._lines[-1][max(self._lines[-1])]
            last.end = f"the run went back: {why}" if why else "the run went back"
            self._lines.append(kept)

    def measure(self, event: Event) -> _Place:
        """Notes the metrics of a step. A save in the background may be told after a later step."""
        place = self._lines[-1].setdefault(event.step, _Place(event.step, event.epoch))
        place.measure(event)
        return place

    def places(self) -> Iterator[_Place]:
        """All steps, the current line first, each with its branch."""
        told: set[int] = set()
        for branch, line in enumerate([self._lines[-1], *self._lines[:-1]]):
            for step in sorted(line):
                place = line[step]
                if id(place) not in told:
                    told.add(id(place))
                    place.branch = branch
                    yield place


class Past(tables.Shown):
    """Everything that is known of the checkpoints of a series.

    Args:
        events: The events of its journal.
        listing: Its contents, read after the journal.

    Attributes:
        last: The last event of a training that the journal tells; `None` without a journal.
    """

    def __init__(self, events: Sequence[Event], listing: Listing) -> None:
        self._listing = listing
        self._records = {record.identity: record for record in listing.all_runs}
        self._begun = {event.run_id: event for event in events if event.kind in ("run", "restored")}
        self._runs: dict[str, _Run] = collections.defaultdict(_Run)
        self._fates: dict[tuple[str, int, int], Fate] = {}
        self._places: dict[tuple[str, int, int], _Place] = {}
        self._moves: list[Event] = []
        self.last = next((event for event in reversed(events) if event.kind in _MOVES), None)
        for event in heapq.merge(_untold(events, listing.all_runs), events, key=operator.attrgetter("at")):
            self._take(event)
        for save, record in self._records.items():
            self._places[save].metrics.update(record.metrics)
        self._points = {run_id: list(run.places()) for run_id, run in self._runs.items()}

    def _take(self, event: Event) -> None:
        if not event.run_id:  # a save may fail before its run is known
            event = msgspec.structs.replace(event, run_id=self._newest)
        run, save, unsaved = self._runs[event.run_id], event.identity, (event.run_id, 0, event.step)
        if event.kind in _MOVES:
            self._moves.append(event)
        match event.kind:
            case "restored":
                run.go_back(event.step, event.why)
            case "epoch":
                run.measure(event)
            case "saved":
                self._fates.pop(unsaved, None)
                self._fates[save] = Fate(event, "kept", at=event.at)
                self._places[save] = run.measure(event)
            case "skipped" | "failed":
                self._fates[unsaved] = Fate(event, event.kind, event.why or event.error, at=event.at)
                self._places[unsaved] = run.measure(event)
            case "removed":
                facts = self._fates[save].facts if save in self._fates else event
                self._fates[save] = Fate(facts, "removed", event.why, event.by, event.at)
            case "metrics" if save in self._fates:
                fate = self._fates[save]
                facts = msgspec.structs.replace(fate.facts, metrics={**fate.facts.metrics, **event.metrics})
                self._fates[save] = dataclasses.replace(fate, facts=facts)
                self._places[save].measure(event)

    def _table(self) -> tables.Table:
        return overview.of_fates(self._listing.title, self.fates(), self._listing, rank(self._listing, BestN(1)))

    def history(self, name: str | None = None) -> History:
        """The curve of a metric over the newest run; by default of the monitored metric.

        Raises:
            MonitorError: No metric was monitored, or no step has the metric. The error names the metrics.
        """
        places = self._points.get(self._newest, [])
        known = sorted({each for place in places for each in place.metrics})
        name = name or self._monitor()
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            wanted = f"No step has the metric {name!r}." if name else "No metric was monitored, so name a metric."
            raise MonitorError(f"{wanted} Recorded metrics: {', '.join(known)}.{hint}")
        found = (
            Point(each.step, each.epoch, each.metrics[name], each.branch) for each in places if name in each.metrics
        )
        return History(self._listing.path, name, tuple(found))

    def ends(self) -> list[tuple[int, Mapping[str, float], str]]:
        """The end of each branch of the newest run: its step, its metrics, and why the run went back."""
        places = self._points.get(self._newest, [])
        return [(place.step, place.metrics, place.end) for place in places if place.branch and place.end]

    def fates(self) -> tuple[Fate, ...]:
        """The fate of each save, in the order in which the saves were told."""
        reasons = self._reasons()
        found = [self._now(save, fate, reasons) for save, fate in self._fates.items()]
        told = {fate.facts.name for fate in found if fate.state == "damaged"}
        damaged = {name: step_in(name) for name in self._listing.damaged if name not in told}
        for name, step in damaged.items():
            if step is not None:
                facts = Event(kind="saved", step=step, name=name)
                found.append(Fate(facts, "damaged", str(self._listing.damaged[name])))
        return tuple(found)

    def _now(self, save: tuple[str, int, int], fate: Fate, reasons: Mapping[CheckpointRecord, str]) -> Fate:
        """The fate of a save, as the directory shows it."""
        branch = self._places[save].branch if save in self._places else 0
        if record := self._records.get(save):
            facts = msgspec.structs.replace(fate.facts, metrics={**fate.facts.metrics, **record.metrics})
            return Fate(facts, "kept", reasons.get(record, ""), at=record.time, record=record, branch=branch)
        if fate.state == "kept":
            error = self._listing.damaged.get(fate.facts.name)
            fate = dataclasses.replace(fate, state="damaged" if error else "lost", why=str(error or ""))
        return dataclasses.replace(fate, branch=branch)

    def _reasons(self) -> dict[CheckpointRecord, str]:
        """The reasons why checkpoints stay: the parts of the policy of the newest run, and pins."""
        records = self._listing.records
        reasons = {each: f"pinned: {each.pin}" if each.pin else "pinned" for each in records if each.pinned}
        begun = self._begun.get(self._newest)
        if begun and (policy := policy_of(begun)):
            with contextlib.suppress(MonitorError):
                reasons |= {each.record: each.reason for each in decide(policy, records) if each.kept}
        return reasons

    def why(self, step: int | CheckpointRecord) -> str:
        """One sentence that tells what became of the save of a step."""
        if isinstance(step, CheckpointRecord):
            fates = [fate for fate in self.fates() if fate.facts.identity == step.identity]
            step = step.step
        else:
            fates = [fate for fate in self.fates() if fate.facts.step == step]
        fates.sort(key=lambda fate: (fate.record is not None, fate.facts.run_id == self._newest, fate.at))
        return tables.printable(_sentence(fates[-1]) if fates else self._absence(step))

    def _absence(self, step: int) -> str:
        """The sentence for a step of which no save is known."""
        own = [event.step for event in self._moves if event.run_id == self._newest]
        own += [place.step for place in self._points.get(self._newest, [])]
        if not self._begun or step < min(own):
            return f"Step {step} has no checkpoint, and the journal does not tell of it."
        if step > max(own):
            return f"Step {step} was not reached: the newest known step is {max(own)}."
        return f"Step {step} was never saved: no save was due."

    @property
    def _newest(self) -> str:
        """The run that was trained last."""
        return self._moves[-1].run_id if self._moves else ""

    def _monitor(self) -> str:
        """The metric that training monitored, `""` if it is not known."""
        records = [record.monitor for record in self._listing.records[-1:]]
        begun = self._begun.get(self._newest)
        return next(filter(None, [*records, begun.monitor if begun else ""]), "")


def _untold(events: Iterable[Event], records: Iterable[CheckpointRecord]) -> Iterator[Event]:
    """The events of records that the journal does not tell. A smaller step than before tells that a run went back."""
    told = {event.identity for event in events if event.kind == "saved"}
    last: dict[str, int] = {}
    for record in records:
        if record.identity not in told:
            if record.step <= last.get(record.run_id, -1):
                yield Event(kind="restored", at=record.time, run_id=record.run_id, step=record.step - 1)
            last[record.run_id] = record.step
            yield of_save(record, at=record.time)


def _sentence(fate: Fate) -> str:
    """The fate of a save as a sentence."""
    step, why = f"Step {fate.facts.step}", fate.why.partition("\n")[0].rstrip(". ")
    when = f"{local_time(fate.at):%Y-%m-%d %H:%M:%S}"
    match fate.state:
        case "kept":
            return f"{step} is kept: {why or 'nothing has removed it'}."
        case "damaged":
            return f"{step} is there, and is damaged: {why}."
        case "removed":
            by = "the training" if fate.by == TRAINING else fate.by
            return f"{step} was removed on {when} by {by}: {why or 'the journal does not tell why'}."
        case "lost":
            return f"{step} was saved on {when} and is gone: the journal does not tell why."
        case "skipped":
            return f"{step} was not saved: {why}."
    return f"{step} was not saved, because the save failed: {why}."
