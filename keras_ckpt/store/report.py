"""The report of a run: one page of HTML that needs no script and no network.

Each text from disk is escaped, and the page forbids a browser to load anything.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from typing import NamedTuple

import msgspec

from keras_ckpt.store import drawing, overview, tables
from keras_ckpt.store.drawing import Picture
from keras_ckpt.store.files import Folder
from keras_ckpt.store.history import Fate, Past
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.overview import Ranking
from keras_ckpt.store.record import CheckpointRecord, local_time
from keras_ckpt.store.tables import Column, Table, counted, few, metric, printable, size
from keras_ckpt.version import __version__

ROWS = 100
"""The largest number of rows of the table, so that the page of a long run stays small."""
_METRICS = 8
"""The largest number of metrics in the table."""
_COLORS = {"best": "green", "damaged": "red", "failed": "red", "removed": "gray", "lost": "gray", "skipped": "gray"}
_LONG = 300
"""The largest length of one fact."""
_STYLE = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}
h1{font-size:1.5rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin-top:2.5rem;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem}
dt,footer{color:#767b83}
dd{margin:0;overflow-wrap:anywhere}
div{overflow-x:auto}
svg{width:100%;min-width:34rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;margin-top:1rem}
th{font-weight:600;border-bottom:1px solid #767b83}
th,td{padding:.15rem .9rem .15rem 0;text-align:right;vertical-align:top;white-space:nowrap}
.w{text-align:left}
.l{text-align:left;white-space:normal;min-width:15em}
.green{font-weight:600;color:light-dark(#137333,#5bd27a)}
.red{color:light-dark(#c5221f,#ff8a80)}
.runs{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:1rem}
.runs svg{min-width:0}
figure{margin:0;min-width:0}
figcaption{font-weight:600;overflow-wrap:anywhere}
.gray{color:#767b83}
@media(max-width:64rem){
table{font-size:.85em}
th,td{padding-right:.6rem}
.l{min-width:9em}
td:last-child{white-space:normal;min-width:6em}
}
@media(max-width:40rem){dl{grid-template-columns:1fr}dd{margin-bottom:.5rem}}
"""


class Seen(NamedTuple):
    """One series of a directory: its checkpoints, its past, the best checkpoint, and the picture."""

    listing: Listing
    past: Past
    ranking: Ranking
    picture: Picture


@dataclasses.dataclass(frozen=True, repr=False)
class View(tables.Shown):
    """Everything that is shown of a directory.

    Attributes:
        title: The directory as a person names it.
        series: Its series.
        taken: The bytes that the checkpoints take.
        further: The sub-directories that hold other runs.
        rows: The largest number of rows of a complete table.
    """

    title: str
    series: Sequence[Seen]
    taken: int
    further: Sequence[str]
    rows: int

    def _repr_html_(self) -> str:
        """The pictures below the table: a viewer that drops drawings still shows the table."""
        style = ' style="display:block;width:100%;max-width:45rem;margin-top:1em"'
        pictures = [drawing.svg(each.picture, style) for each in self.series if each.picture.values]
        return tables.html(self.table()) + "".join(pictures)

    def has_ended(self, since: float) -> bool:
        """Whether the journals tell of a training that was there after a time, and that it has ended."""
        lasts = [each.past.last for each in self.series if each.past.last and each.past.last.at >= since]
        return bool(lasts) and all(last.kind == "ended" for last in lasts)

    def _table(self) -> Table:
        return self.table()

    def table(self) -> Table:
        """The table of all series."""
        listings, rankings = [each.listing for each in self.series], [each.ranking for each in self.series]
        bars = drawing.bars(self.series[0].picture) if len(self.series) == 1 else ""
        return overview.of_directory(self.title, listings, rankings, self.taken, self.further, bars, self.rows)


def page(view: View) -> bytes:
    """The page of a directory: facts, a picture and the saves of each series, and the notes of its table."""
    sections = [_section(each, heading=len(view.series) > 1) for each in view.series]
    return _page(view.title, [*sections, *_notes(view.table())])


def page_of_runs(table: Table, pictures: Sequence[Picture]) -> bytes:
    """The page of several runs: their table, and a small picture of each, all with the same axis of values."""
    values = [value for picture in pictures for value in picture.values]
    figures = (
        f"<figure><figcaption>{_text(each.title)}</figcaption>{drawing.svg(each, '', drawing.SMALL, values)}</figure>"
        for each in pictures
    )
    return _page(table.title, [_grid(table), *_notes(table), f'<div class="runs">{"".join(figures)}</div>'])


def write(file: str | os.PathLike[str], content: bytes) -> None:
    """Writes a page. An existing file is replaced."""
    folder, name = os.path.split(os.path.abspath(file))
    with Folder(folder) as place, place.replacing(name) as written:
        written.write(memoryview(content))


def _page(title: str, parts: Iterable[str]) -> bytes:
    text = "".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width">'
            # Even a text that were not escaped could load nothing.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            f"<title>{_text(title)}</title><style>{_STYLE}</style><h1>{_text(title)}</h1>",
            *parts,
            f"<footer>keras_ckpt {_text(__version__)}</footer></html>\n",
        ]
    )
    return text.encode()


def _notes(table: Table) -> Iterator[str]:
    return (f"<p>{escape(note)}" for note in table.notes)


def _section(seen: Seen, heading: bool) -> str:
    facts = "".join(f"<dt>{_text(name)}<dd>{_text(_cut(fact))}" for name, fact in _facts(seen) if fact)
    head = f"<h2>{_text(seen.picture.title)}</h2>" if heading else ""
    picture = f"<div>{drawing.svg(seen.picture)}</div>" if seen.picture.values else ""
    return f"<section>{head}<dl>{facts}</dl>{picture}{_grid(_saves(seen))}</section>"


def _facts(seen: Seen) -> Iterator[tuple[str, str]]:
    """The names and the facts of the head of a page."""
    records = seen.listing.records
    states = collections.Counter(fate.state for fate in seen.past.fates())
    yield "saves", ", ".join(f"{count} {state}" for state, count in states.items())
    wrong = [f"step {fate.facts.step}: {fate.why}" for fate in seen.past.fates() if fate.state in ("failed", "damaged")]
    yield "errors", few(wrong)
    if not records:
        return
    newest = records[-1]
    for record in records:
        if record.step in seen.ranking.best:
            yield "best", f"{_value(record, seen.picture.metric)} at {_place(record)}"
    yield "newest", f"{_value(newest, seen.picture.metric)} at {_place(newest)}"
    first, last = (each.saved_at for each in (min(records, key=_time), max(records, key=_time)))
    yield "saved", f"{first:%Y-%m-%d %H:%M:%S} to {last:%Y-%m-%d %H:%M:%S}"
    yield "training was blocked", _spread(records, "blocked_ms")
    yield "a save was written in", _spread(records, "write_ms")
    yield "ended", f"after {counted(newest.end.epochs, 'epoch')}" if newest.end else ""
    yield "metadata", msgspec.json.encode(newest.metadata).decode() if newest.metadata else ""
    yield "versions", ", ".join(f"{name} {version}" for name, version in newest.versions.items())
    yield "run", newest.run_id


def _time(record: CheckpointRecord) -> float:
    return record.time


def _value(record: CheckpointRecord, name: str) -> str:
    value = metric(record.metrics.get(name))
    return f"{name} {value}" if value else record.name


def _place(record: CheckpointRecord) -> str:
    return f"step {record.step}" if record.epoch is None else f"step {record.step}, epoch {record.epoch}"


def _spread(records: Iterable[CheckpointRecord], name: str) -> str:
    """The median and the largest of a timing."""
    times = [record.timings[name] for record in records if name in record.timings]
    return f"{statistics.median(times):.3g} ms (median), {max(times):.3g} ms (longest)" if times else ""


def _saves(seen: Seen) -> Table:
    """The table of all saves: of checkpoints that are there, of those that went, and of saves that were not made."""
    best = {record.identity for record in seen.listing.records if record.step in seen.ranking.best}
    fates = seen.past.fates()
    rows = overview.shortened(fates, lambda fate: fate.record is not None, ROWS)
    names = overview.metric_names([fate.facts for fate in fates], seen.ranking.monitors)[:_METRICS]

    def column(name: str, fact: Callable[[Fate], str], *, gap: str = "", words: bool = False) -> Column:
        cells = (gap.format(row) if isinstance(row, int) else printable(fact(row)) for row in rows)
        return Column(printable(name), tuple(cells), words=words)

    def state(fate: Fate) -> str:
        return "best" if fate.facts.identity in best else fate.state

    columns = [
        column("run", overview.run_number(fates)),
        column("step", lambda fate: str(fate.facts.step), gap="..."),
        column("epoch", lambda fate: "" if fate.facts.epoch is None else str(fate.facts.epoch)),
        *(column(name, functools.partial(_metric, name)) for name in names),
        column("state", state, words=True),
        column("why", lambda fate: fate.why, gap="... {} more", words=True),
        column("size", lambda fate: size(fate.facts.size) if fate.facts.size else ""),
        column("saved", lambda fate: f"{local_time(fate.facts.at):%Y-%m-%d %H:%M:%S}"),
    ]
    colors = tuple("" if isinstance(row, int) else _COLORS.get(state(row), "") for row in rows)
    return Table("", tuple(column for column in columns if any(column.cells)), colors=colors)


def _metric(name: str, fate: Fate) -> str:
    return metric(fate.facts.metrics.get(name))


def _grid(table: Table) -> str:
    """A table as short HTML, whose look the style of the page has."""

    def row(tag: str, cells: Iterable[str], color: str = "") -> str:
        inner = "".join(map(cell, [tag] * len(table.columns), table.columns, cells))
        return f'<tr class="{color}">{inner}' if color else f"<tr>{inner}"

    def cell(tag: str, column: Column, content: str) -> str:
        kind = ' class="l"' if len(content) > tables.WISH else ' class="w"'
        return f"<{tag}{kind if column.words else ''}>{escape(content)}"

    rows = "".join(row("td", cells, color) for color, cells in table.rows(table.columns))
    head = row("th", [column.name for column in table.columns])
    return f"<div><table>{head}{rows}</table></div>" if rows else ""


def _text(text: str) -> str:
    """Text from disk as text of a page."""
    return escape(printable(text))


def _cut(fact: str) -> str:
    return fact if len(fact) <= _LONG else f"{fact[:_LONG]}…"
