"""The tables of a directory, a plan and a verification: which facts they show, and which are the most important."""

from __future__ import annotations

import collections
import enum
import functools
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from keras_ckpt.store import layout
from keras_ckpt.store.bounds import excess
from keras_ckpt.store.journal import Event
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.policies import PreservationPolicy
from keras_ckpt.store.record import CheckpointRecord, local_time
from keras_ckpt.store.tables import Column, Table, counted, few, metric, printable, relative, size

if TYPE_CHECKING:
    from keras_ckpt.store.history import Fate
    from keras_ckpt.store.plan import Decision, PrunePlan
    from keras_ckpt.store.runs import RunSummary

ROWS = 40
"""The largest number of rows of a complete table."""
_LINES = 5
"""The largest number of lines on damage in a table of several runs."""

_COLORS = {"kept": "", "kept, best": "green", "damaged": "red", "failed": "red"}
"""The colors of the states of saves. All other saves are dimmed."""

_SETTING = 30
"""The largest width of a list of metadata, such as the paths of an average."""

_Row = TypeVar("_Row")
_Facts = TypeVar("_Facts", CheckpointRecord, Event)


class _Rank(enum.IntEnum):
    """The importance of a column. A narrow terminal drops the largest ranks."""

    ALWAYS, MARK, EPOCH, BATCH, VALIDATION, SIZE, SAVED, TRAINING, REASON = range(9)


class _RunRank(enum.IntEnum):
    """The importance of a column in a table of runs."""

    ALWAYS, SETTING, STEP, EPOCHS, SIZE, SAVED, STEPS, KEPT = range(8)


class Ranking(NamedTuple):
    """The metrics that decide which checkpoint is best, and the steps of the best checkpoints."""

    monitors: Set[str] = frozenset()
    best: Set[int] = frozenset()


class _Line(NamedTuple):
    """The row of a checkpoint in the table of a directory."""

    record: CheckpointRecord
    marks: Sequence[str]


def of_directory(
    path: str,
    listings: Sequence[Listing],
    rankings: Sequence[Ranking],
    taken: int,
    further: Sequence[str] = (),
    bars: str = "",
    most: int = ROWS,
) -> Table:
    """The table of a directory: its checkpoints, the bytes they take, and notes on all else.

    Args:
        path: The directory as a person names it.
        listings: The series of the directory.
        rankings: For each series the metric that decides, and the best checkpoint.
        taken: The bytes that the checkpoints take.
        further: The sub-directories that hold other runs.
        bars: The curve of the metric that decides.
        most: The largest number of rows of a complete table.
    """
    lines = [line for each in zip(listings, rankings, strict=True) for line in _lines(*each)]
    rows = shortened(lines, lambda line: line.record.pinned or "best" in line.marks, most)
    records = [line.record for line in lines]
    shown = [row if isinstance(row, int) else row.record for row in rows]
    columns = [
        *_facts(shown, records, frozenset().union(*(ranking.monitors for ranking in rankings))),
        _column("size", shown, lambda record: size(record.size), rank=_Rank.SIZE),
        _column("saved", shown, lambda record: f"{record.saved_at:%Y-%m-%d %H:%M}", rank=_Rank.SAVED),
        _column("reason", shown, lambda record: printable(record.reason), rank=_Rank.REASON, words=True),
        _column("mark", rows, lambda line: ", ".join([*line.marks, *_pin(line.record)]), _more, words=True),
    ]
    shared = sum(record.size for record in records) - taken
    count = f"{counted(len(records), 'checkpoint')}, {size(taken)}" if records else _absence(listings)
    count += f" on disk, for {size(shared)} of their sizes are shared" if shared > 0 else ""
    several = len(listings) > 1 and any("newest" in line.marks for line in lines)
    marked = ["best and newest are marked among the files of one template"] if several else []
    colors = _colors(rows, lambda line: "green" if "best" in line.marks else "")
    return Table(printable(path), _used(columns), (count, *marked, *_notes(listings), *_further(further)), colors, bars)


def _lines(listing: Listing, ranking: Ranking) -> Iterator[_Line]:
    """The rows of a series. No policy ranks or removes the files of an earlier run."""
    for record in listing.other_runs:
        yield _Line(record, ["earlier run"])
    for record in listing.records:
        yield _Line(record, _marks(record, listing, ranking))


def of_plan(policy: PreservationPolicy, decisions: Sequence[Decision], listing: Listing, ranking: Ranking) -> Table:
    """The table of a plan: each record, whether it stays, the reason and the bytes."""
    rows = shortened(decisions, lambda decision: decision.kept, ROWS)
    records = [row if isinstance(row, int) else row.record for row in rows]
    columns = [
        *_facts(records, listing.records, ranking.monitors),
        _column("size", rows, lambda decision: size(decision.size), rank=_Rank.SIZE),
        _column(
            "mark", records, lambda record: ", ".join(_marks(record, listing, ranking)), rank=_Rank.MARK, words=True
        ),
        _column("plan", rows, lambda decision: "keep" if decision.kept else "remove", words=True),
        _column("why", rows, lambda decision: printable(decision.reason), _more, words=True),
    ]
    removed = [decision.size for decision in decisions if not decision.kept]
    kept = len(decisions) - len(removed)
    summary = f"{kept} kept, {len(removed)} removed, which frees {size(sum(removed))}"
    colors = _colors(rows, lambda decision: "green" if decision.kept else "red")
    notes = [summary if decisions else _absence([listing])]
    if text := excess(policy, (decision.record for decision in decisions if decision.kept)):
        notes.append(f"a bound leaves one checkpoint and the pinned: {text}")
    if listing.other_runs:
        notes.append(f"of an earlier run, left alone: {few([record.name for record in listing.other_runs])}")
    return Table(f"keep {printable(repr(policy))}", _used(columns), (*notes, *_notes([listing])), colors)


def of_fates(path: str, fates: Sequence[Fate], listing: Listing, ranking: Ranking) -> Table:
    """The table of all saves: of the checkpoints that are there, of those that went, and of the saves not made."""
    rows = shortened(fates, lambda fate: fate.record is not None, ROWS)
    facts = [row if isinstance(row, int) else row.facts for row in rows]
    columns = [
        _column("run", rows, run_number(fates)),
        *_facts(facts, [fate.facts for fate in fates], ranking.monitors),
        _column("size", facts, lambda event: size(event.size) if event.size else "", rank=_Rank.SIZE),
        _column("saved", facts, lambda event: f"{local_time(event.at):%Y-%m-%d %H:%M}", rank=_Rank.SAVED),
        _column("state", rows, lambda fate: _state(fate, ranking), words=True),
        _column("why", rows, lambda fate: printable(fate.why), _more, words=True),
    ]
    counts = collections.Counter(fate.state for fate in fates)
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    colors = _colors(rows, lambda fate: _COLORS.get(_state(fate, ranking), "dim"))
    return Table(printable(path), _used(columns), (summary or _absence([listing]),), colors)


def run_number(fates: Iterable[Fate]) -> Callable[[Fate], str]:
    """The numbers of the runs of saves, the oldest run first. Empty where all saves are of one run."""
    runs = dict.fromkeys(fate.facts.run_id for fate in fates if fate.facts.run_id)
    numbers = {run: str(number) for number, run in enumerate(runs, 1)} if len(runs) > 1 else {}
    return lambda fate: numbers.get(fate.facts.run_id, "")


def _state(fate: Fate, ranking: Ranking) -> str:
    is_best = fate.record is not None and fate.record.step in ranking.best
    return f"{fate.state}, best" if is_best else fate.state


def of_verification(path: str, listing: Listing) -> Table:
    """The table of a verification: the damaged checkpoints."""
    names = tuple(map(printable, listing.damaged))
    errors = tuple(printable(str(error)) for error in listing.damaged.values())
    whole = [*listing.other_runs, *listing.records]
    notes = [
        f"{counted(len(whole), 'checkpoint')} whole, {size(sum(record.size for record in whole))}; {len(names)} damaged"
    ]
    if not whole and not names:
        notes = [_absence([listing])]
    if listing.unmanaged:
        notes.append(f"without a {_proof(listing)}, cannot be verified: {few(listing.unmanaged)}")
    columns = (Column("damaged", names, words=True), Column("why", errors, words=True))
    return Table(printable(path), columns, tuple(notes), ("red",) * len(names))


def of_runs(path: str, runs: Sequence[RunSummary], monitor: str | None, errors: Mapping[str, OSError]) -> Table:
    """The table of several runs: the metadata that differs, the best checkpoint of each, and what the run takes.

    Args:
        path: The directory of the runs as a person names it.
        runs: The runs, the best first.
        monitor: The metric that ranks them, `None` if not known.
        errors: The errors of folders that cannot be read, by path.
    """
    rows: list[RunSummary | int] = list(runs)
    if len(runs) > ROWS:
        rows[ROWS:] = [len(runs) - ROWS]
    columns = [
        *_settings(rows, runs),
        _column(f"best {printable(monitor or '')}", rows, functools.partial(_best_value, monitor)),
        _column("at step", rows, lambda run: str(run.best.step) if run.best else "", rank=_RunRank.STEP),
        _column("steps", rows, lambda run: _number(run.step), rank=_RunRank.STEPS),
        _column("epochs", rows, lambda run: _number(run.epoch), rank=_RunRank.EPOCHS),
        _column("kept", rows, lambda run: str(len(run.listing.records)), rank=_RunRank.KEPT),
        _column("size", rows, lambda run: size(run.size), rank=_RunRank.SIZE),
        _column(
            "saved", rows, lambda run: f"{run.saved_at:%Y-%m-%d %H:%M}" if run.saved_at else "", rank=_RunRank.SAVED
        ),
        _column("run", rows, lambda run: printable(run.name), _more, words=True),
    ]
    kept = sum(len(run.listing.records) for run in runs)
    count = f"{counted(len(runs), 'run')}, {counted(kept, 'checkpoint')}, {size(sum(run.size for run in runs))}"
    notes = [count if runs else f"no runs: {_emptiness(path)}"]
    notes += _damaged((run.name, run.listing) for run in runs)
    notes += _first("cannot be read: ", [f"{relative(folder)}: {error}" for folder, error in errors.items()])
    return Table(printable(path), _used(columns), tuple(notes), _colors(rows, lambda run: "green" * (run is runs[0])))


def of_plans(policy: PreservationPolicy, plans: Sequence[tuple[str, PrunePlan]]) -> Table:
    """The table of a plan for several runs: the checkpoints that stay and go in each run, and the bytes."""
    rows = shortened(plans, lambda named: bool(named[1].removed), ROWS)
    columns = [
        _column("keep", rows, lambda named: _steps(named[1].kept), rank=_RunRank.STEP, words=True),
        _column("remove", rows, lambda named: _steps(named[1].removed), words=True),
        _column("frees", rows, lambda named: size(_frees(named[1])) if named[1].removed else "", rank=_RunRank.SIZE),
        _column("run", rows, lambda named: printable(named[0]), _more, words=True),
    ]
    kept, removed = sum(len(plan.kept) for _, plan in plans), sum(len(plan.removed) for _, plan in plans)
    freed = size(sum(_frees(plan) for _, plan in plans))
    summary = f"{counted(len(plans), 'run')}: {kept} kept, {removed} removed, which frees {freed}"
    damaged = _damaged((name, plan.listing) for name, plan in plans)
    colors = _colors(rows, lambda named: "red" if named[1].removed else "green")
    return Table(f"keep {printable(repr(policy))} in each run", _used(columns), (summary, *damaged), colors)


def _frees(plan: PrunePlan) -> int:
    """The bytes that the removals of a plan free."""
    return sum(decision.size for decision in plan.decisions if not decision.kept)


def _steps(records: Sequence[CheckpointRecord]) -> str:
    return few([str(record.step) for record in records])


def _settings(rows: Sequence[RunSummary | int], runs: Sequence[RunSummary]) -> Iterator[Column]:
    """The metadata that differs between runs."""
    for name in dict.fromkeys(name for run in runs for name in run.metadata):
        values = [run.metadata.get(name) for run in runs]
        if len(set(map(_setting, values))) > 1:
            words = not all(value is None or isinstance(value, int | float) for value in values)
            fact = functools.partial(_setting_of, name)
            yield _column(printable(name), rows, fact, rank=_RunRank.SETTING, words=words)


def _setting_of(name: str, run: RunSummary) -> str:
    return _setting(run.metadata.get(name))


def _setting(value: Any) -> str:
    """A value of metadata in a cell."""
    match value:
        case None:
            return ""
        case str():
            return printable(value)
        case float():
            return metric(value)
    text = printable(msgspec.json.encode(value).decode())
    return text if len(text) <= _SETTING else f"{text[: _SETTING - 3]}..."


def _best_value(monitor: str | None, run: RunSummary) -> str:
    """The best value of a run, or the newest where none is finite."""
    return metric(run.told.metrics.get(monitor)) if run.told and monitor else ""


def _number(number: int | None) -> str:
    return "" if number is None else str(number)


def _damaged(listings: Iterable[tuple[str, Listing]]) -> list[str]:
    """Lines on the damaged checkpoints of several runs."""
    found = [
        f"{os.path.join(name, each)}: {error}" for name, listing in listings for each, error in listing.damaged.items()
    ]
    return _first("damaged, left alone: ", found)


def _first(what: str, lines: Sequence[str]) -> list[str]:
    """The first lines of many, and the number of the others."""
    more = [f"{what}{len(lines) - _LINES} more"] if len(lines) > _LINES else []
    return [what + printable(line) for line in lines[:_LINES]] + more


def _facts(rows: Sequence[_Facts | int], records: Sequence[_Facts], monitors: Set[str]) -> Iterator[Column]:
    """The file, the step, the place in training and the metrics of some rows. A metric that decides always stays."""
    if any(layout.is_keras_file(record.name) for record in records):
        yield _column("file", rows, lambda record: printable(record.name), words=True)
    yield _column("step", rows, lambda record: str(record.step), lambda skipped: "...")
    yield _column("epoch", rows, lambda record: "" if record.epoch is None else str(record.epoch), rank=_Rank.EPOCH)
    yield _column("batch", rows, lambda record: str(record.batch or ""), rank=_Rank.BATCH)
    names = metric_names(records, monitors)
    for name in names:
        rank = _Rank.VALIDATION if _is_validation(name) else _Rank.TRAINING
        decides = name in monitors or name == names[0]
        yield _column(printable(name), rows, functools.partial(_value, name), rank=_Rank.ALWAYS if decides else rank)


def _value(name: str, record: CheckpointRecord | Event) -> str:
    return metric(record.metrics.get(name))


def metric_names(records: Iterable[CheckpointRecord | Event], monitors: Set[str]) -> list[str]:
    """The names of all metrics: those that decide, validation, the others; each by the number of its records."""
    counts = collections.Counter(name for record in records for name in record.metrics)
    return sorted(counts, key=lambda name: (name not in monitors, not _is_validation(name), -counts[name], name))


def _is_validation(name: str) -> bool:
    return name.startswith("val_")


def shortened(rows: Sequence[_Row], matters: Callable[[_Row], bool], most: int) -> list[_Row | int]:
    """The rows of a table; in a long table, the first, the newest and those that matter. A number stands for a gap."""
    if len(rows) <= most:
        return list(rows)
    half = most // 2
    important = [place for place, row in enumerate(rows) if matters(row)][-half:]
    places = sorted({0, 1, *important, *range(len(rows) - half, len(rows))})
    shown: list[_Row | int] = []
    for last, place in zip([-1, *places], places, strict=False):
        shown += [place - last - 1, rows[place]] if place > last + 1 else [rows[place]]
    return shown


def _column(
    name: str,
    rows: Sequence[_Row | int],
    fact: Callable[[_Row], str],
    gap: Callable[[int], str] = lambda skipped: "",
    *,
    rank: int = _Rank.ALWAYS,
    words: bool = False,
) -> Column:
    """A column of one fact of each row."""
    cells = tuple(gap(row) if isinstance(row, int) else fact(row) for row in rows)
    return Column(name, cells, rank, words)


def _colors(rows: Sequence[_Row | int], color: Callable[[_Row], str]) -> tuple[str, ...]:
    return tuple("" if isinstance(row, int) else color(row) for row in rows)


def _more(skipped: int) -> str:
    return f"... {skipped} more"


def _used(columns: Iterable[Column]) -> tuple[Column, ...]:
    """The columns without the empty ones, which would waste the width."""
    return tuple(column for column in columns if any(column.cells))


def _marks(record: CheckpointRecord, listing: Listing, ranking: Ranking) -> list[str]:
    """The marks of a checkpoint within its series. A file that is shown alone has none."""
    if record.template and record.name in (record.template, listing.series.only):
        return []
    return ["best"] * (record.step in ranking.best) + ["newest"] * (record is listing.records[-1])


def _pin(record: CheckpointRecord) -> list[str]:
    return [] if record.pin is None else [printable(f"pinned: {record.pin}") if record.pin else "pinned"]


def _absence(listings: Sequence[Listing]) -> str:
    """The reason why a directory has no checkpoints."""
    if any(listings):
        return "no checkpoints that can be used"
    return f"no checkpoints: {_emptiness(listings[0].path)}"


def _emptiness(path: str) -> str:
    return "nothing was saved here yet" if os.path.lexists(path) else "the directory does not exist"


def _notes(listings: Iterable[Listing]) -> Iterator[str]:
    unmanaged: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for listing in listings:
        for name, error in listing.damaged.items():
            yield f"damaged, left alone: {printable(name)}: {printable(str(error))}"
        unmanaged[_proof(listing)].update(dict.fromkeys(listing.unmanaged))
    for proof, names in unmanaged.items():
        if names:
            yield f"without a {proof}, left alone: {few(list(names))}"


def _further(places: Sequence[str]) -> Iterator[str]:
    if places:
        names = few([os.path.basename(place) for place in places])
        yield printable(f"runs in sub-directories: {names} (keras-ckpt ls {shlex.quote(relative(places[0]))})")


def _proof(listing: Listing) -> str:
    """The word for the part of a checkpoint that proves that this package wrote it."""
    return "record" if listing.series.template else "sidecar"
