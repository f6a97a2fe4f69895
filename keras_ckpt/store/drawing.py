"""The picture of a run: the curve of a metric with a mark for each checkpoint; as SVG, on axes of matplotlib, as bars.

One `Picture` has all that the outputs show, so they agree.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from keras_ckpt.errors import MonitorError
from keras_ckpt.store import tables
from keras_ckpt.store.history import Fate, History, Past, Point
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.overview import Ranking, metric_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Kind = Literal["left", "removed", "kept", "pinned", "best"]
KINDS: tuple[Kind, ...] = ("left", "removed", "kept", "pinned", "best")
"""The kinds of marks. A later kind is drawn above an earlier kind."""
GRAY, BLUE, VIOLET, GOLD = "#767b83", "#2f7de1", "#9a5fe0", "#c27c0e"
"""Colors that can be read on a light page and on a dark one."""

_POINTS = 2000
"""The largest number of points of a drawn curve."""
_SPAN = 100
"""The ratio of the largest and the smallest value from which the axis is logarithmic."""
_REASONS = 100
"""The largest number of marks that tell why, so that a page stays small: of checkpoints, and of ends of branches."""
_HUGE = 1e200
"""The size from which a value counts as infinite: scales and their margins must be finite too."""
_GONE = ("removed", "lost")
_BARS = "▁▂▃▄▅▆▇"  # a full block would touch the line above
_FEW = 3
"""The number of values from which bars tell more than the values."""
_MOST, _LEAST = 40, 8
"""The letters of the name and the bars of a line, which fits 60 columns; the bars beside a long name."""


class Mark(NamedTuple):
    """A checkpoint in a picture, or the end of a branch.

    Attributes:
        kind: The kind. The best checkpoint has a second mark, of the kind `"best"`. `"left"`: the end of a branch.
        step: The step.
        value: The value of the metric; NaN without a finite value: the mark is at the lower edge.
        text: The facts that a reader sees who points at the mark.
    """

    kind: Kind
    step: int
    value: float
    text: str


@dataclasses.dataclass(frozen=True)
class Picture:
    """The curve of a metric over a run, and its checkpoints.

    Attributes:
        title: The run.
        metric: The name of the metric.
        lines: The lines of the curve, each of one branch. A run that went back to an earlier step has several.
        marks: The checkpoints, and the ends of the branches.
    """

    title: str
    metric: str
    lines: tuple[tuple[Point, ...], ...]
    marks: tuple[Mark, ...]

    @property
    def steps(self) -> list[int]:
        """The steps of all points and marks."""
        return [*(point.step for line in self.lines for point in line), *(mark.step for mark in self.marks)]

    @property
    def values(self) -> list[float]:
        """All finite values of points and marks."""
        values = [*(point.value for line in self.lines for point in line), *(mark.value for mark in self.marks)]
        return list(filter(_is_drawn, values))

    @property
    def log(self) -> bool:
        """Whether the axis of the values is logarithmic."""
        return _is_log(self.values)

    @property
    def floor(self) -> float:
        """The lower edge, where marks without a value are."""
        return min(self.values, default=0.0)

    def curve(self) -> Iterator[Sequence[Point]]:
        """The pieces of the lines as they are drawn. A value that is not finite is a gap; long pieces are thinned."""
        total = sum(map(len, self.lines))
        for line in self.lines:
            for finite, group in itertools.groupby(line, lambda point: _is_drawn(point.value)):
                if finite:
                    piece = list(group)
                    yield _thinned(piece, max(2, _POINTS * len(piece) // total))

    def of_kind(self, kind: Kind) -> list[Mark]:
        """The marks of a kind, each with a finite value."""
        marks = [mark for mark in self.marks if mark.kind == kind]
        return [mark if _is_drawn(mark.value) else mark._replace(value=self.floor) for mark in marks]


def _is_drawn(value: float) -> bool:
    """Whether a value has a place in a drawing."""
    return abs(value) < _HUGE


def _is_log(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) > _SPAN * min(values)


def of_past(title: str, past: Past, listing: Listing, ranking: Ranking, monitor: str | None = None) -> Picture:
    """The picture of a series.

    Args:
        title: The run.
        past: Everything that is known of it.
        listing: The checkpoints that are there.
        ranking: The best checkpoints, and the metric that decides.
        monitor: The metric. Defaults to the metric that decides, then to the first in the table.

    Raises:
        MonitorError: No step has the metric. The error names the metrics.
    """
    names = [*filter(None, [monitor]), *ranking.monitors, *metric_names(listing.records, frozenset())]
    try:
        history = past.history(next(iter(names), None))
    except MonitorError:
        if monitor:
            raise
        history = History(listing.path, "")
    lines = itertools.groupby(history.points, lambda point: point.branch)
    # Removed checkpoints of an earlier run are no part of this curve.
    own = {record.run_id for record in listing.records[-1:]}
    saves = [fate for fate in past.fates() if fate.record or (fate.state in _GONE and own <= {fate.facts.run_id})]
    best = {record.identity for record in listing.records if record.step in ranking.best}
    best = best if history.name in ranking.monitors else set()
    marks = [_mark(fate, history.name, len(saves) <= _REASONS) for fate in saves]
    pairs = zip(marks, saves, strict=True)
    rings = [Mark("best", *mark[1:3], f"{mark.text}, best") for mark, fate in pairs if fate.facts.identity in best]
    ends = [_end(history.name, *end) for end in past.ends()[-_REASONS:]]
    return Picture(title, history.name, tuple(tuple(line) for _, line in lines), (*ends, *marks, *rings))


def _mark(fate: Fate, metric: str, reasons: bool) -> Mark:
    """The mark of a checkpoint."""
    kind: Kind = "removed" if fate.record is None else "pinned" if fate.record.pinned else "kept"
    value = fate.facts.metrics.get(metric, math.nan)
    why = fate.why if reasons else ""
    text = why if why.startswith(kind) else f"{kind}: {why}" if why else kind
    return Mark(kind, fate.facts.step, value, f"step {fate.facts.step}: {tables.metric(value)}, {text}")


def _end(metric: str, step: int, metrics: Mapping[str, float], why: str) -> Mark:
    """The mark at the end of a branch."""
    value = metrics.get(metric, math.nan)
    return Mark("left", step, value, f"step {step}: {tables.metric(value)}, {why}")


def bars(picture: Picture) -> str:
    """The curve as a line of block characters, between its first and its last value.

    Empty for few values, and for a metric that never changes.

    A character stands for the mean of the values in its part of the curve.
    """
    points = [point for line in picture.lines for point in line if not point.branch]
    finite = [point.value for point in points if _is_drawn(point.value)]
    if len(finite) < _FEW or min(finite) == max(finite):
        return ""
    height = math.log if picture.log else float
    low, high = height(min(finite)), height(max(finite))
    line = ""
    for part in _parts(points, min(len(points), max(_LEAST, _MOST - len(picture.metric)))):
        heights = [height(point.value) for point in part if _is_drawn(point.value)]
        share = (sum(heights) / len(heights) - low) / (high - low) if heights else 0
        line += _BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] if heights else " "
    return f"{tables.printable(picture.metric)}  {tables.metric(finite[0])} {line} {tables.metric(finite[-1])}"


def plot(picture: Picture, ax: Axes | None = None) -> Axes:
    """Draws a picture with matplotlib.

    Args:
        picture: The picture.
        ax: The axes to draw on. Defaults to those of a new figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    axes: Axes = _pyplot().subplots()[1] if ax is None else ax
    _draw(picture, axes, legend=True)
    return axes


def plots(pictures: Sequence[Picture]) -> list[Axes]:
    """Draws pictures beside each other with matplotlib, on axes of one scale.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plt = _pyplot()
    across = math.ceil(math.sqrt(len(pictures)))
    down = math.ceil(len(pictures) / across)
    options = {"sharey": True, "squeeze": False, "figsize": (4 * across, 3 * down), "layout": "constrained"}
    grid = list(plt.subplots(down, across, **options)[1].flat)
    for empty in grid[len(pictures) :]:
        empty.remove()
    for picture, axes in zip(pictures, grid, strict=False):
        _draw(picture, axes, legend=axes is grid[0])
    return grid[: len(pictures)]


def _draw(picture: Picture, axes: Axes, legend: bool) -> None:
    for line in picture.curve():
        style = "dashed" if line[0].branch else "solid"
        axes.plot(*_columns(line), color=GRAY, linewidth=1, alpha=0.6, linestyle=style, zorder=1)
    styles: dict[Kind, dict[str, Any]] = {
        "left": {"color": GRAY, "s": 40, "marker": "x"},
        "removed": {"facecolors": "none", "edgecolors": GRAY, "s": 20},
        "kept": {"color": BLUE, "s": 30},
        "pinned": {"color": VIOLET, "s": 40, "marker": "D"},
        "best": {"facecolors": "none", "edgecolors": GOLD, "linewidths": 2, "s": 130},
    }
    for kind in KINDS:
        if marks := picture.of_kind(kind):
            axes.scatter(*_columns(marks), label=kind, zorder=2, **styles[kind])
    if picture.log:
        axes.set_yscale("log")
    # A name of a metric or a directory is no formula.
    axes.set_title(picture.title, parse_math=False)
    axes.set_ylabel(picture.metric, parse_math=False)
    axes.set_xlabel("step")
    if legend and picture.marks:
        axes.legend(frameon=False)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"A plot needs matplotlib, which is not installed ({error}). Install it: pip install 'keras-ckpt[plot]'."
        ) from error
    return plt


def _columns(points: Sequence[Point | Mark]) -> tuple[list[int], list[float]]:
    return [point.step for point in points], [point.value for point in points]


def _thinned(line: Sequence[Point], most: int) -> Sequence[Point]:
    """At most so many points of a line: the smallest and the largest value of each part of it."""
    if len(line) <= most:
        return line
    parts = _parts(line, most // 2)
    return [point for part in parts for point in sorted({min(part, key=_value), max(part, key=_value)})]


def _parts(points: Sequence[Point], count: int) -> Iterator[Sequence[Point]]:
    """So many parts of points, of about the same length."""
    bounds = itertools.pairwise(len(points) * place // count for place in range(count + 1))
    return (points[start:end] for start, end in bounds)


def _value(point: Point) -> float:
    return point.value


# The SVG. Two units are a pixel, so that whole numbers suffice for places.
class Size(NamedTuple):
    """The width and the height of a drawing."""

    width: int
    height: int


LARGE, SMALL = Size(1440, 560), Size(720, 440)
_EDGE, _HEAD, _FOOT = 24, 84, 76
_FONT, _LETTER = 24, 14
"""The size of the text, and the mean width of a letter."""
_NAME = 60
"""The largest number of letters of the metric's name."""


class _Axis(NamedTuple):
    """An axis: the values at its ends, and their places."""

    low: float
    high: float
    start: int
    end: int
    log: bool = False

    def place(self, value: float) -> int:
        low, high, at = (math.log(each) if self.log else each for each in (self.low, self.high, value))
        return round(self.start + (at - low) / (high - low) * (self.end - self.start))

    def ticks(self, whole: bool = False) -> list[float]:
        """Round values between the ends."""
        if self.log:
            first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
            return [10.0**power for power in range(first, last + 1, 1 + (last - first) // 6)]
        exponent = 10.0 ** math.floor(math.log10((self.high - self.low) / 6))
        step = next(each * exponent for each in (1, 2, 5, 10) if each * exponent * 6 >= self.high - self.low)
        step = max(step, 1.0) if whole else step
        return [step * place for place in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def svg(picture: Picture, attributes: str = "", size: Size = LARGE, values: Sequence[float] = ()) -> str:
    """A picture as SVG for a page of HTML: each mark has a title, which a browser shows.

    Args:
        picture: The picture.
        attributes: Further attributes of the element, such as a style.
        size: The size. A small picture has no legend.
        values: The values that the axis spans. Defaults to those of the picture.
    """
    values = values or picture.values or [0.0]
    low, high, log = min(values), max(values), _is_log(values)
    # A constant metric needs a height too, and a mark at the edge needs room.
    room = 1.1 if log else (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    y = _Axis(low / room if log else low - room, high * room if log else high + room, size.height - _FOOT, _HEAD, log)
    names = [(y.place(tick), f"{tick:.6g}") for tick in y.ticks()]
    left = _EDGE + _LETTER * max((len(name) for _, name in names), default=0)
    first, last = min(picture.steps, default=0), max(picture.steps, default=0)
    alone = first == last
    x = _Axis(first - alone, last + alone, left + _EDGE, size.width - 2 * _EDGE)
    return (
        f'<svg viewBox="0 0 {size.width} {size.height}" role="img" font-size="{_FONT}" fill="none"{attributes}>'
        f"<title>{_text(f'{picture.metric} of {picture.title}')}</title>"
        + "".join(itertools.chain(_grid(x, names, left, size), _curve(picture, x, y), _marks(picture, x, y)))
        + f'<g fill="currentColor"><text x="{_EDGE // 2}" y="{_FONT + 8}">{_text(_short(picture.metric))}</text>'
        + "".join(_legend(picture, size) if size is LARGE else ())
        + "</g></svg>"
    )


def _grid(x: _Axis, names: Sequence[tuple[int, str]], left: int, size: Size) -> Iterator[str]:
    """The lines and the numbers of the axes."""
    lines = "".join(f"M{left} {place}H{size.width - _EDGE}" for place, _ in names)
    yield f'<path stroke="{GRAY}" stroke-opacity=".3" d="{lines}"/><g fill="{GRAY}">'
    for place, name in names:
        yield f'<text x="{left - 12}" y="{place + 8}" text-anchor="end">{name}</text>'
    bottom = size.height - _FOOT + _FONT + 10
    for tick in x.ticks(whole=True):
        yield f'<text x="{x.place(tick)}" y="{bottom}" text-anchor="middle">{tick:,.0f}</text>'
    yield f'<text x="{size.width - _EDGE}" y="{bottom + _FONT + 6}" text-anchor="end">step</text></g>'


def _curve(picture: Picture, x: _Axis, y: _Axis) -> Iterator[str]:
    """The lines of the curve. A line that the run left again is dashed."""
    paths = {"": "", ' stroke-dasharray="6 6"': ""}
    for line in picture.curve():
        places = [(x.place(point.step), y.place(point.value)) for point in line]
        # Differences of whole numbers are short.
        moves = " ".join(f"{b[0] - a[0]} {b[1] - a[1]}" for a, b in itertools.pairwise(places)) or "0 0"
        dashes = list(paths)[line[0].branch > 0]
        paths[dashes] += f"M{places[0][0]} {places[0][1]}l{moves}".replace(" -", "-")
    for dashes, path in paths.items():
        if path:
            yield f'<path stroke="{GRAY}" stroke-width="2.5" stroke-linejoin="round"{dashes} d="{path}"/>'


_DOTS: dict[Kind, str] = {
    "left": f'stroke="{GRAY}" stroke-width="4"',
    "removed": f'stroke="{GRAY}" stroke-width="9" stroke-linecap="round"',
    "kept": f'stroke="{BLUE}" stroke-width="15" stroke-linecap="round"',
    "pinned": f'stroke="{VIOLET}" stroke-width="17" stroke-linecap="square"',
    "best": f'stroke="{GOLD}" stroke-width="5"',
}


def _dot(kind: Kind, x: int, y: int, text: str = "") -> str:
    """A mark: a cross, a ring, or a line without a length, which is a dot in fewer bytes than a circle."""
    title = text and f"<title>{_text(text)}</title>"
    if kind == "best":
        return f'<circle cx="{x}" cy="{y}" r="15" pointer-events="all">{title}</circle>'
    shape = "m-9 -9l18 18m0 -18l-18 18" if kind == "left" else "h0"
    return f'<path d="M{x} {y}{shape}">{title}</path>'


def _marks(picture: Picture, x: _Axis, y: _Axis) -> Iterator[str]:
    for kind in KINDS:
        if marks := picture.of_kind(kind):
            dots = (_dot(kind, x.place(mark.step), y.place(mark.value), mark.text) for mark in marks)
            yield f"<g {_DOTS[kind]}>{''.join(dots)}</g>"


def _legend(picture: Picture, size: Size) -> Iterator[str]:
    """The kinds of the marks, at the right end of the first line."""
    place = size.width - _EDGE
    for kind in reversed([kind for kind in KINDS if picture.of_kind(kind)]):
        yield f'<text x="{place}" y="{_FONT + 8}" text-anchor="end">{kind}</text>'
        place -= _LETTER * len(kind) + _EDGE
        yield f'<g fill="none" {_DOTS[kind]}>{_dot(kind, place, _FONT)}</g>'
        place -= 3 * _EDGE


def _text(text: str) -> str:
    """Text from disk as text of a page."""
    return escape(tables.printable(text))


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
