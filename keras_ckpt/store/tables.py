"""Tables of directories, plans and verifications: as text for terminals, as HTML for notebooks."""

from __future__ import annotations

import abc
import collections
import dataclasses
import io
import shutil
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from keras_ckpt.store.listing import Listing
from keras_ckpt.store.record import CheckpointRecord

_ROWS = 40
_METRICS = 5


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, number columns, then word columns, rows of cells for both, and notes below the rows."""

    title: str
    numbers: tuple[str, ...]
    words: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


class Shown(abc.ABC):
    """Base class of objects that display as a table, printed and in a notebook."""

    @abc.abstractmethod
    def _table(self) -> Table:
        """The table."""

    def __repr__(self) -> str:
        return text(self._table())

    def _repr_html_(self) -> str:
        return html(self._table())


def of_directory(path: str, listing: Listing, taken: int) -> Table:
    """The table of a directory: its checkpoints, the bytes they take, and notes on the damaged and unmanaged."""
    rows = [
        _Row(
            record,
            (size(record.size), f"{record.saved_at:%Y-%m-%d %H:%M:%S}"),
            (record.reason, _pin(record)),
            record.pinned,
        )
        for record in listing.records
    ]
    shared = sum(record.size for record in listing.records) - taken
    count = f"{counted(len(rows), 'checkpoint')}, {size(taken)}" if rows else "no checkpoints"
    count += f" on disk, for {size(shared)} of their sizes are shared" if shared > 0 else ""
    return _table(printable(path), listing, rows, _METRICS, ("size", "saved"), ("reason", "pin"), count)


def of_plan(policy: str, decisions: Sequence[tuple[CheckpointRecord, bool, str, int]], listing: Listing) -> Table:
    """The table of a plan: each record, whether it stays, the reason and the bytes."""
    rows = [
        _Row(record, (size(taken),), ("keep" if kept else "remove", reason), kept)
        for record, kept, reason, taken in decisions
    ]
    removed = [taken for _, kept, _, taken in decisions if not kept]
    summary = f"{len(rows) - len(removed)} kept, {len(removed)} removed, which frees {size(sum(removed))}"
    return _table(f"keep {printable(policy)}", listing, rows, _METRICS // 2, ("size",), ("plan", "why"), summary)


def of_verification(path: str, listing: Listing) -> Table:
    """The table of a verification: the damaged checkpoints."""
    rows = [(printable(name), printable(str(error))) for name, error in listing.damaged.items()]
    whole = size(sum(record.size for record in listing.records))
    notes = [f"{counted(len(listing.records), 'checkpoint')} whole, {whole}; {len(rows)} damaged"]
    if listing.unmanaged:
        notes.append(f"without a sidecar, cannot be verified: {_few(listing.unmanaged)}")
    return Table(printable(path), (), ("damaged", "why"), tuple(rows), tuple(notes))


def save(record: CheckpointRecord) -> str:
    """The cost of a save: bytes written, the time training was blocked, and the time of writing."""
    shared = f" new, {size(record.size_shared)} shared" if record.size_shared else ""
    timings = record.timings
    return (
        f"{size(record.size - record.size_shared)}{shared}, blocked {timings['blocked_ms']:.3g} ms, "
        f"written in {timings['write_ms']:.3g} ms"
    )


def text(table: Table) -> str:
    """The table as text, as wide as the terminal."""
    import rich.box
    import rich.console
    import rich.table
    import rich.text

    grid = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False, title_justify="left")
    for column in table.numbers:
        grid.add_column(rich.text.Text(column), justify="right", no_wrap=True)
    for column in table.words:
        grid.add_column(rich.text.Text(column), min_width=len(column))
    for row in table.rows:
        grid.add_row(*map(rich.text.Text, row))
    buffer = io.StringIO()
    console = rich.console.Console(
        file=buffer,
        width=max(100, shutil.get_terminal_size((160, 40)).columns),
        color_system=None,
        # In a notebook, rich would otherwise display the text itself.
        force_jupyter=False,
        force_terminal=False,
    )
    console.print(rich.text.Text(table.title))
    if table.rows:
        console.print(grid)
    for note in table.notes:
        console.print(rich.text.Text(note))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def html(table: Table) -> str:
    """The table as HTML for a notebook."""
    import html as markup

    head = "".join(f"<th>{markup.escape(column)}</th>" for column in (*table.numbers, *table.words))
    rows = ("".join(f"<td>{markup.escape(cell)}</td>" for cell in row) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    notes = "".join(f"<div>{markup.escape(note)}</div>" for note in table.notes)
    return (
        f"<div><strong>{markup.escape(table.title)}</strong>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}</div>"
    )


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as `2 checkpoints`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """A number of bytes in readable decimal units."""
    value, units = float(count), iter(("kB", "MB", "GB", "TB", "PB"))
    unit = "bytes"
    while value >= 999.5 and (larger := next(units, None)):
        value, unit = value / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{value:.3g} {unit}"


def printable(value: str) -> str:
    """Text from disk with control characters escaped, which a terminal would act on."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in value)


def metric(value: float | None) -> str:
    """A metric's value, or an empty string without a value."""
    return "" if value is None else f"{value:.5g}"


class _Row(NamedTuple):
    """A record, its number cells, its word cells, and whether a long table shows the row too."""

    record: CheckpointRecord
    numbers: tuple[str, ...]
    words: tuple[str, ...]
    matters: bool


def _table(
    title: str,
    listing: Listing,
    rows: Sequence[_Row],
    most: int,
    numbers: tuple[str, ...],
    words: tuple[str, ...],
    summary: str,
) -> Table:
    metrics = _metric_names(listing.records)
    columns = ("step", "epoch", "batch", *map(printable, metrics[:most]), *numbers, *words)
    cells: list[tuple[str, ...]] = []
    for skipped, row in _visible(rows):
        if row is None:
            cells.append((f"... {skipped} more", *("",) * (len(columns) - 1)))
            continue
        record = row.record
        facts = (str(record.step), "" if record.epoch is None else str(record.epoch), str(record.batch or ""))
        values = (metric(record.metrics.get(name)) for name in metrics[:most])
        cells.append((*facts, *values, *row.numbers, *map(printable, row.words)))
    # Empty columns would waste the width.
    used = [place for place in range(len(columns)) if any(row[place] for row in cells)]
    return Table(
        title,
        tuple(columns[place] for place in used if place < len(columns) - len(words)),
        tuple(columns[place] for place in used if place >= len(columns) - len(words)),
        tuple(tuple(row[place] for place in used) for row in cells),
        (summary, *_notes(listing, metrics[most:])),
    )


def _notes(listing: Listing, hidden: Sequence[str]) -> Iterable[str]:
    if hidden:
        yield f"more metrics: {printable(', '.join(hidden))}"
    for name, error in listing.damaged.items():
        yield f"damaged, left alone: {printable(name)}: {printable(str(error))}"
    if listing.unmanaged:
        yield f"without a sidecar, left alone: {_few(listing.unmanaged)}"


def _few(names: Sequence[str]) -> str:
    return printable(", ".join(names[:10])) + (", ..." if len(names) > 10 else "")


def _metric_names(records: Sequence[CheckpointRecord]) -> list[str]:
    """The names of all metrics: first the monitored metric, then by the number of records with the metric."""
    counts = collections.Counter(name for record in records for name in record.metrics)
    monitored = {record.monitor for record in records[-1:]}
    return sorted(counts, key=lambda name: (name not in monitored, -counts[name], name))


def _visible(rows: Sequence[_Row]) -> Iterable[tuple[int, _Row | None]]:
    """The rows to show, each with 0. A gap is the number of skipped rows, with `None`."""
    shown = set(range(len(rows)))
    if len(rows) > _ROWS:
        half = _ROWS // 2
        important = [position for position, row in enumerate(rows) if row.matters][-half:]
        shown = {0, 1, *important, *range(len(rows) - half, len(rows))}
    last = -1
    for position in sorted(shown):
        if position > last + 1:
            yield position - last - 1, None
        yield 0, rows[position]
        last = position


def _pin(record: CheckpointRecord) -> str:
    return "" if record.pin is None else record.pin or "pinned"
