"""Tables, sizes and counts for people: text that fits a terminal, HTML for notebooks."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from keras_ckpt.store.record import CheckpointRecord

_GAP = 2
"""The width between two columns."""
WISH, _LEAST = 30, 14
"""The width that words get before a less important column is shown, and their smallest width."""
_NAMES = 5
"""The number of names in a list."""
_HUES = {"green": "#1e8e3e", "red": "#e0402f", "dim": "#767b83"}
"""The colors in a notebook, which can be read on a light page and on a dark one."""
_PIPE = 10_000
"""The width of a pipe: all columns fit, and nothing wraps."""


class Column(NamedTuple):
    """A column of a table: a name, and a cell for each row.

    Attributes:
        name: The name.
        cells: The cells.
        rank: A narrow terminal drops columns, the largest rank first. A column of rank 0 always stays.
        words: Whether the cells are words, which may wrap. A number never wraps.
    """

    name: str
    cells: tuple[str, ...]
    rank: int = 0
    words: bool = False

    def width(self, most: int) -> int:
        """The width of the longest cell and the name, of which words take `most`."""
        from rich.cells import cell_len

        longest = max(map(cell_len, self.cells), default=0)
        return max(min(cell_len(self.name), most), min(longest, most) if self.words else longest)


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, columns with cells, and notes below the rows.

    Attributes:
        title: The title.
        columns: The columns, all with the same number of cells.
        notes: Lines below the rows.
        colors: The color of each row, `"green"`, `"red"` or `"dim"`, or an empty string.
        bars: A line of block characters below the rows. A terminal without UTF-8 does not show it.
    """

    title: str
    columns: tuple[Column, ...] = ()
    notes: tuple[str, ...] = ()
    colors: tuple[str, ...] = ()
    bars: str = ""

    def rows(self, columns: Sequence[Column]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The color and the cells of each row, of some columns."""
        cells = list(zip(*(column.cells for column in columns), strict=True))
        return zip(self.colors or [""] * len(cells), cells, strict=True)


class Shown:
    """Base class of values that display as a table: printed, printed by rich, and in a notebook."""

    # No abstract base class: the metaclass of a record is msgspec's.
    __slots__ = ()

    def _table(self) -> Table:
        """The table."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return _rendered(self._table(), console, options)

    def _repr_html_(self) -> str:
        return html(self._table())


def text(shown: Shown, *, color: bool = False) -> str:
    """The table of a value as text. It fits the terminal; a pipe has no width, so all columns fit.

    Args:
        shown: The value.
        color: Whether to add colors, if the output is a terminal and `NO_COLOR` is not set.
    """
    import rich.console

    width, height = shutil.get_terminal_size((_PIPE, 25))
    console = rich.console.Console(
        width=width,
        height=height,
        color_system="auto" if color else None,
        # In a notebook, rich would otherwise display the text itself.
        force_jupyter=False,
    )
    with console.capture() as captured:
        console.print(shown, crop=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def html(table: Table) -> str:
    """The table as HTML for a notebook."""
    from html import escape

    def cell(tag: str, column: Column, content: str) -> str:
        align = "left" if column.words else "right"
        # A notebook has styles of its own for cells, so each cell needs these.
        wrap = "normal;overflow-wrap:anywhere;min-width:15em" if column.words and len(content) > WISH else "nowrap"
        return f'<{tag} style="text-align:{align};white-space:{wrap}">{escape(content)}</{tag}>'

    def row(tag: str, cells: Sequence[str], color: str = "") -> str:
        inner = "".join(cell(tag, column, content) for column, content in zip(table.columns, cells, strict=True))
        return f'<tr style="color:{_HUES[color]}">{inner}</tr>' if color else f"<tr>{inner}</tr>"

    grid = ""
    if rows := "".join(row("td", cells, color) for color, cells in table.rows(table.columns)):
        names = [column.name for column in table.columns]
        head = f"<thead>{row('th', names)}</thead>" if any(names) else ""
        grid = f"<table>{head}<tbody>{rows}</tbody></table>"
    notes = "".join(f"<div>{escape(note)}</div>" for note in (table.bars, *table.notes) if note)
    return f'<div style="overflow-x:auto"><strong>{escape(table.title)}</strong>{grid}{notes}</div>'


def save(record: CheckpointRecord) -> str:
    """The cost of a save: bytes written, the time training was blocked, and the time of writing."""
    shared = f" new, {size(record.size_shared)} shared" if record.size_shared else ""
    timings = record.timings
    return (
        f"{size(record.size - record.size_shared)}{shared}, blocked {timings['blocked_ms']:.3g} ms, "
        f"written in {timings['write_ms']:.3g} ms"
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


def duration(seconds: float) -> str:
    """A time in the largest unit of which there is at least 1."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def ordinal(place: int) -> str:
    """A place in a ranking, such as `4th`."""
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{place}{'th' if place % 100 in (11, 12, 13) else endings.get(place % 10, 'th')}"


def printable(value: str) -> str:
    """Text from disk with control characters escaped, which a terminal would act on."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in value)


def few(names: Sequence[str]) -> str:
    """The first names of a list, and the number of the others."""
    more = [f"and {len(names) - _NAMES} more"] if len(names) > _NAMES else []
    return printable(", ".join([*names[:_NAMES], *more]))


def relative(path: str) -> str:
    """A path to display or to type: relative if it is below the working directory."""
    with contextlib.suppress(OSError):
        found = os.path.relpath(path)
        return path if found == os.curdir or found.startswith(os.pardir) else found
    return path


def metric(value: float | None) -> str:
    """A metric's value, or an empty string without a value."""
    return "" if value is None else f"{value:.5g}"


def _rendered(table: Table, console: Console, options: ConsoleOptions) -> RenderResult:
    """The parts of a table for rich."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as Grid
    from rich.text import Text

    yield Text(table.title)
    columns = _fitting(table.columns, options.max_width)
    if any(column.cells for column in columns):
        heads = any(column.name for column in columns)
        grid = Grid(
            box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, show_header=heads, header_style=""
        )
        for column in columns:
            justify: Literal["left", "right"] = "left" if column.words else "right"
            grid.add_column(Text(column.name), justify=justify, overflow="fold", min_width=column.width(_LEAST))
        for color, cells in table.rows(columns):
            grid.add_row(*map(Text, cells), style=color)
        # Rich would cut numbers to fit a terminal that is too narrow even for the columns that always stay.
        needed = sum(column.width(_LEAST) + _GAP for column in columns) - _GAP
        yield from console.render(grid, options.update_width(max(needed, options.max_width)))
    if table.bars and not options.ascii_only:
        yield Text(table.bars)
    for note in table.notes:
        yield Text(note)
    if dropped := [column.name for column in table.columns if column not in columns]:
        yield Text(f"not shown in {options.max_width} columns: {few(dropped)}")


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """The columns that fit into a width. The smallest rank comes first; rank 0 always stays."""
    room = width + _GAP
    chosen = set()
    for place, column in sorted(enumerate(columns), key=lambda each: each[1].rank):
        needed = column.width(WISH) + _GAP
        if column.rank == 0 or needed <= room:
            room -= needed
            chosen.add(place)
    return [columns[place] for place in sorted(chosen)]


def pandas() -> Any:
    """The module pandas, for `to_pandas`.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(f"to_pandas() needs pandas. Install it: pip install pandas ({error})") from error
    return pd
