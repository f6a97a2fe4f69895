"""A run is looked at: its plot, its report, its sparkline, and while it trains."""

from __future__ import annotations

import io
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import matplotlib as mpl
import nbformat
import pytest
from blake3 import blake3
from click.testing import CliRunner
from matplotlib import pyplot as plt
from nbclient import NotebookClient
from rich.console import Console

import keras_ckpt as kc
from keras_ckpt.cli import main
from keras_ckpt.store import drawing, watching
from keras_ckpt.store.drawing import Mark, Picture
from keras_ckpt.store.history import Point
from keras_ckpt.store.journal import Event
from keras_ckpt.store.record import CheckpointFile, encode
from support.runs import Filler
from test_series import save as save_file

HOSTILE = "<script>alert('1')</script>&\"\x1b[31m\u202e"
"""A text that a page or a terminal would act on."""
EPOCHS = "10:0.9 20:0.5 30:0.25 40:0.125 50:0.3"
"""The best of five epochs is the fourth."""


@pytest.fixture
def run(filler) -> kc.CheckpointDirectory:
    runs = filler.save(EPOCHS, monitor="loss", mode="min")
    runs.pin(20, "paper")
    return runs


@pytest.fixture(autouse=True)
def figures():
    """Draws without a screen, and closes the figures."""
    mpl.use("agg")
    yield
    plt.close("all")


def picture(values, marks=()) -> Picture:
    """A picture of one line."""
    points = tuple(Point(step, None, float(value), 0) for step, value in enumerate(values, 1))
    return Picture("run", "loss", (points,), tuple(marks))


def drawn(picture: Picture) -> ET.Element:
    """The SVG of a picture, as a browser or any other program for XML reads it."""
    return ET.fromstring(drawing.svg(picture))


def titles(page: str) -> list[str]:
    """The titles of the marks in a page."""
    svg = re.search("<svg.*</svg>", page, re.DOTALL)[0]
    return [title.text for title in list(ET.fromstring(svg).iter("title"))[1:]]


class Page(HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data) -> None:
        self.text += data


def reported(runs: kc.CheckpointDirectory) -> str:
    path = pathlib.Path(runs.path).with_name("report.html")
    runs.report(path)
    return path.read_text()


def fill(runs: kc.CheckpointDirectory, losses: dict[int, float]) -> None:
    """Writes checkpoints of many steps without a writer, whose saves read the directory each time."""
    path = pathlib.Path(runs.path)
    path.mkdir()
    for sequence, (step, loss) in enumerate(losses.items(), 1):
        content = {f"ckpt-{step}.{part}": b"" for part in ("data-00000-of-00001", "index")}
        files = tuple(CheckpointFile(name, 0, f"blake3:{blake3(b'').hexdigest()}") for name in content)
        record = kc.CheckpointRecord(
            sequence=sequence, step=step, epoch=sequence, batch=0, run_id="run", metrics={"loss": loss},
            monitor="loss", mode="min", time=1.79e9 + sequence, reason="epoch", files=files,
        )  # fmt: skip
        for name, data in {**content, f"ckpt-{step}.json": encode(record)}.items():
            (path / name).write_bytes(data)


class TestThePlot:
    """`CheckpointDirectory.plot`, with matplotlib."""

    def test_has_the_curve_and_a_mark_for_each_checkpoint(self, run) -> None:
        axes = run.plot()

        assert axes.lines[0].get_xydata().tolist() == [[10, 0.9], [20, 0.5], [30, 0.25], [40, 0.125], [50, 0.3]]
        marks = {each.get_label(): each.get_offsets().tolist() for each in axes.collections}
        assert marks == {
            "kept": [[10, 0.9], [30, 0.25], [40, 0.125], [50, 0.3]],
            "pinned": [[20, 0.5]],
            "best": [[40, 0.125]],
        }
        assert (axes.get_ylabel(), axes.get_xlabel(), axes.get_yscale()) == ("loss", "step", "linear")

    def test_is_drawn_on_the_axes_that_are_given(self, run) -> None:
        _, (first, second) = plt.subplots(2)

        assert run.plot(ax=second) is second
        assert second.lines
        assert not first.lines

    def test_shows_another_metric_whose_mode_is_not_known_without_a_best_checkpoint(self, run) -> None:
        run.add_metrics(10, accuracy=0.5)

        axes = run.plot("accuracy")

        assert axes.get_ylabel() == "accuracy"
        assert "best" not in {each.get_label() for each in axes.collections}

    def test_of_an_unknown_metric_names_the_metrics(self, run) -> None:
        with pytest.raises(kc.MonitorError, match=r"No step has the metric 'los'. .*mean 'loss'"):
            run.plot("los")

    @pytest.mark.parametrize("words", ["", "10 20"])
    def test_without_a_metric_is_refused(self, filler, words) -> None:
        with pytest.raises(kc.CheckpointNotFoundError, match="nothing to plot"):
            filler.save(words).plot()

    def test_draws_values_of_any_size(self) -> None:
        steps = [Point(0, None, 1e-300, 0), Point(2**63 - 1, None, 1e199, 0), Point(2**63 - 1, None, 1e300, 0)]
        marks = (Mark("kept", 2**63 - 1, 1.7e308, "kept"),)

        drawing.plot(Picture("run", "loss", (tuple(steps),), marks)).figure.savefig(io.BytesIO())

    def test_writes_a_name_with_dollars_as_it_is(self, filler) -> None:
        """matplotlib would read a formula, and fail at a wrong one."""
        run = filler.save("1", metrics={"$\\loss$": 1.0})

        run.plot().figure.savefig(io.BytesIO())

    def test_without_matplotlib_says_how_to_install_it(self, run, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)

        with pytest.raises(ImportError, match=r"pip install 'keras-ckpt\[plot\]'"):
            run.plot()


class TestAPicture:
    """The one description of a drawing, for every output."""

    def test_has_a_gap_where_a_value_is_not_finite(self) -> None:
        pieces = list(picture([3, 2, math.nan, 1, math.inf, 2]).curve())

        assert [[point.value for point in piece] for piece in pieces] == [[3, 2], [1], [2]]

    def test_has_a_line_for_each_time_that_the_run_went_back(self, filler) -> None:
        """The lines are not joined. The line that the run took to where it is now comes first."""
        runs = filler.save("10:0.9 20:0.5 30:0.7")
        runs.note(Event(kind="restored", step=20, run_id="run"))

        axes = filler.save("30:0.4 40:0.3").plot()

        assert [line.get_xydata().tolist() for line in axes.lines] == [
            [[10, 0.9], [20, 0.5], [30, 0.4], [40, 0.3]],
            [[30, 0.7]],
        ]

    def test_has_a_line_for_each_time_that_the_run_went_back_without_a_journal(self, filler) -> None:
        """A smaller step in the order of saving tells it. The second save of step 20 superseded the first."""
        filler.save("10:0.9 20:0.5 30:0.7")
        runs = filler.save("20:0.4 40:0.3")
        (pathlib.Path(runs.path) / "journal.jsonl").unlink()

        assert [line.get_xdata().tolist() for line in runs.plot().lines] == [[10, 20, 40], [30]]

    @pytest.mark.parametrize(
        ("values", "log"), [([1, 100], False), ([1, 101], True), ([-1, 101], False), ([0, 9], False)]
    )
    def test_has_a_logarithmic_axis_if_its_values_span_more_than_a_factor_of_100(self, values, log) -> None:
        assert picture(values).log == log
        assert drawing.plot(picture(values)).get_yscale() == ("log" if log else "linear")

    def test_thins_a_long_curve_and_keeps_its_extremes_and_all_marks(self) -> None:
        values = [1.0] * 50_000
        values[12_345], values[44_444] = 5.0, -5.0
        marks = [Mark("kept", step, 1.0, f"step {step}") for step in range(1, 50_001, 10)]

        thin = picture(values, marks)
        [piece] = thin.curve()

        assert len(piece) <= 2000
        assert {(12_346, 5.0), (44_445, -5.0)} <= {(point.step, point.value) for point in piece}
        assert len(thin.of_kind("kept")) == 5000

    def test_places_a_checkpoint_without_a_value_at_the_lower_edge(self) -> None:
        marks = [Mark("kept", 2, math.nan, "step 2")]

        assert [mark.value for mark in picture([3, 1], marks).of_kind("kept")] == [1]


class TestTheDrawing:
    """The SVG of a report."""

    def test_has_a_title_for_each_mark(self) -> None:
        marks = [Mark(kind, step, 0.5, f"step {step}, {kind}") for step, kind in enumerate(drawing.KINDS)]

        found = [title.text for title in drawn(picture([0.5] * 4, marks)).iter("title")]

        assert found == ["loss of run", *(mark.text for mark in marks)]

    @pytest.mark.parametrize(
        "values",
        [
            [],
            [math.nan],
            [1],
            [0, 0],
            [-1e-300, 1e-300],
            [1e300, -1e300],
            [1e-9, 1e9],
            [-1.7e308, 1.7e308],
            [5e-324, 1e308],
            [10**9, 10**9 + 1],
        ],
    )
    def test_is_xml_with_places_in_its_frame_for_any_values(self, values) -> None:
        marks = [Mark("kept", step, value, "") for step, value in enumerate(values, 1)]

        svg = drawn(picture(values, marks))

        assert svg.get("viewBox") == "0 0 1440 560"
        places = [re.match(r"M(-?\d+) (-?\d+)", path.get("d")) for path in svg.iter("path") if path.get("d")]
        assert all(0 <= int(place[1]) <= 1440 and 0 <= int(place[2]) <= 560 for place in places)

    def test_escapes_each_text(self) -> None:
        hostile = Picture(HOSTILE, HOSTILE, (), (Mark("kept", 1, 1.0, HOSTILE),))

        svg = drawing.svg(hostile)

        assert "<script" not in svg
        assert "\x1b" not in svg
        assert "\u202e" not in svg
        assert [title.text for title in ET.fromstring(svg).iter("title")][1].startswith("<script>alert")

    def test_has_a_few_kilobytes_for_40_checkpoints(self) -> None:
        marks = [Mark("kept", step, 0.5, f"step {step}: 0.5, kept") for step in range(40)]

        assert len(drawing.svg(picture(range(40), marks))) < 5000


class TestTheReport:
    """`CheckpointDirectory.report` and `keras-ckpt report`: one page of HTML."""

    def test_shows_facts_the_plot_and_the_table(self, run) -> None:
        page = reported(run)

        assert titles(page) == [
            "step 10: 0.9, kept", "step 30: 0.25, kept", "step 40: 0.125, kept", "step 50: 0.3, kept",
            "step 20: 0.5, pinned: paper",
            "step 40: 0.125, kept, best",
        ]  # fmt: skip
        text = Page(page).text
        assert "loss 0.125 at step 40" in text
        assert re.search(r"training was blocked[\d.e-]+ ms \(median\), [\d.e-]+ ms \(longest\)", text)
        assert re.search(r"a save was written in[\d.e-]+ ms", text)
        assert "5 checkpoints, 65 bytes" in text

    def test_has_no_script_and_loads_nothing(self, run) -> None:
        page = reported(run)

        assert Page(page).tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base", "form", "a"})
        assert Page(page).attributes.isdisjoint({"src", "href", "xlink:href", "action", "style"})
        assert not re.search(r"url\(|@import|//", page)
        assert "default-src 'none'" in page

    def test_of_1000_saves_is_smaller_than_100_kilobytes(self, runs) -> None:
        fill(runs, {1_000_000 + 10 * each: 1 / (each + 1) for each in range(1000)})

        page = reported(runs)

        assert len(titles(page)) == 1001
        assert len(page.encode()) < 100_000

    def test_escapes_everything_from_the_disk(self, filler, tmp_path) -> None:
        facts = {"metrics": {HOSTILE: 0.5}, "monitor": HOSTILE, "mode": "min", "reason": HOSTILE, "run_id": HOSTILE}
        run = filler.save("1", metadata={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE}, **facts)
        run.pin(1, HOSTILE)
        (pathlib.Path(run.path) / "<script>-2.json").write_text("{}")
        moved = pathlib.Path(run.path).rename(tmp_path / "<script>&'\"")

        page = reported(kc.CheckpointDirectory(moved))

        assert page.count("&lt;script&gt;") > 8
        assert "script" not in Page(page).tags
        assert "\x1b" not in page
        assert "\u202e" not in page

    def test_tells_why_checkpoints_went_and_which_saves_failed(self, filler) -> None:
        run = filler.save("10:0.9 20:0.5 30:0.4", keep=kc.LatestN(1), monitor="loss", mode="min")
        run.note(Event(kind="failed", step=40, run_id="run", error="No space left on device"))

        page = reported(run)

        reason = next(fate.why for fate in run.fates() if fate.facts.step == 20)
        assert f"step 20: 0.5, removed: {reason}" in titles(page)
        assert re.search(rf"20.*0\.5.*removed.*{re.escape(reason)}", Page(page).text)
        assert "saves2 removed, 1 kept, 1 failed" in Page(page).text
        assert "errorsstep 40: No space left on device" in Page(page).text

    def test_names_what_is_damaged(self, run) -> None:
        (pathlib.Path(run.path) / "ckpt-30.index").write_bytes(b"")

        assert "damaged, left alone: ckpt-30" in Page(reported(run)).text

    def test_has_a_plot_for_each_template_of_files(self, tmp_path) -> None:
        for name in ("{epoch}.keras", "best-{epoch}.keras"):
            for epoch in (1, 2):
                save_file(tmp_path / "w" / name, epoch, name.format(epoch=epoch), metrics={"loss": 1.0 / epoch})

        page = reported(kc.CheckpointDirectory(tmp_path / "w"))

        assert page.count("<svg") == 2
        assert re.findall("<h2>.*?([^/]*)</h2>", page) == ["best-{epoch}.keras", "{epoch}.keras"]

    def test_of_a_directory_without_checkpoints_says_so(self, tmp_path) -> None:
        (tmp_path / "run").mkdir()

        assert "no checkpoints: nothing was saved here yet" in reported(kc.CheckpointDirectory(tmp_path / "run"))

    def test_of_no_directory_is_an_error(self, runs) -> None:
        with pytest.raises(kc.CheckpointNotFoundError, match="There is no directory"):
            runs.report("report.html")

    def test_replaces_a_report_and_leaves_no_other_file(self, run, tmp_path) -> None:
        (tmp_path / "report.html").write_text("old")

        page = reported(run)

        assert page.startswith("<!doctype html>")
        assert {path.name for path in tmp_path.iterdir()} == {"run", "report.html"}

    def test_of_a_missing_folder_is_an_error_that_names_it(self, run, tmp_path) -> None:
        with pytest.raises(FileNotFoundError, match="missing"):
            run.report(tmp_path / "missing" / "report.html")

    def test_is_written_by_the_command(self, run, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)

        result = CliRunner().invoke(main, ["report", "run", "-o", "page.html"])

        assert (result.exit_code, result.output) == (0, "Wrote page.html.\n")
        assert (tmp_path / "page.html").read_text() == reported(run)


class TestTheSparkline:
    """The curve in one line below the table of a directory."""

    def test_shows_the_first_and_the_last_value_around_the_curve(self, run) -> None:
        assert "\nloss  0.9 ▇▄▂▁▂ 0.3\n5 checkpoints, 65 bytes" in repr(run)
        assert "<div>loss  0.9 ▇▄▂▁▂ 0.3</div>" in run._repr_html_()

    @pytest.mark.parametrize("words", ["1:0.5 2:0.4", "1 2 3", "1:0.5 2:0.5 3:0.5", "1:1.7e308 2:-1.7e308 3:0"])
    def test_is_missing_for_few_values_and_for_a_constant_metric(self, filler, words) -> None:
        assert not re.search(f"[{drawing._BARS}]", repr(filler.save(words)))

    def test_is_missing_in_a_terminal_without_utf_8(self, run) -> None:
        out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        Console(file=out, width=80).print(run)
        out.flush()

        assert b"5 checkpoints" in out.buffer.getvalue()
        assert b"loss  0.9" not in out.buffer.getvalue()

    def test_has_a_blank_for_values_that_are_not_finite(self, filler) -> None:
        assert "loss  0.9 ▇ ▄▁ 0.1" in repr(filler.save("1:0.9 2:nan 3:0.5 4:0.1"))

    def test_of_a_long_run_fits_60_columns(self, runs) -> None:
        fill(runs, {step: float(step) for step in range(100, 300)})

        [line] = [line for line in repr(runs).splitlines() if line.startswith("loss")]

        assert line == "loss  100 ▁▁▁▁▁▂▂▂▂▂▃▃▃▃▃▃▄▄▄▄▄▅▅▅▅▅▆▆▆▆▆▇▇▇▇▇ 299"


@pytest.fixture
def search(tmp_path) -> kc.Runs:
    """Three runs, one without the metric of the others."""
    for name, words in {"a": "10:0.9 20:0.5", "b <&>": "10:0.9 20:0.1", "c": "10 20"}.items():
        Filler(tmp_path / "search" / name).save(words, monitor="loss", mode="min")
    return kc.Runs(tmp_path / "search")


class TestSeveralRuns:
    """`Runs.plot` and `Runs.report`: small plots beside each other, the best run first."""

    def test_have_axes_of_one_scale(self, search) -> None:
        first, second = search.plot()

        assert [first.get_title(), second.get_title()] == ["b <&>", "a"]
        assert first.get_ylim() == second.get_ylim()
        assert first.get_legend()
        assert not second.get_legend()

    def test_of_a_metric_that_no_run_has_are_refused(self, search) -> None:
        with pytest.raises(kc.CheckpointNotFoundError, match="nothing to plot"):
            search.plot("accuracy")

    def test_are_a_table_and_small_drawings_in_a_report(self, search, tmp_path) -> None:
        search.report(tmp_path / "report.html")

        page = (tmp_path / "report.html").read_text()
        assert Page(page).tags >= {"table", "svg"}
        assert re.findall("<figcaption>(.*?)</figcaption>", page) == ["b &lt;&amp;&gt;", "a"]
        drawings = [ET.fromstring(svg) for svg in re.findall("<svg.*?</svg>", page)]
        places = [svg.findall("g")[1].findall("path")[0].get("d") for svg in drawings]
        assert places[0] == places[1]  # the first values are equal, and so are their places

    def test_are_reported_by_the_command(self, search, tmp_path, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)

        result = CliRunner().invoke(main, ["report", "search"])

        assert (result.exit_code, result.output) == (0, "Wrote report.html.\n")
        assert "<figcaption>" in (tmp_path / "report.html").read_text()

    def test_of_a_search_of_40_runs_are_those_of_the_best_24(self, tmp_path) -> None:
        for number in range(40):
            fill(kc.CheckpointDirectory(tmp_path / str(number)), {10: 1 + number / 40, 20: 0.5})

        kc.Runs(tmp_path).report(tmp_path / "report.html")

        assert (tmp_path / "report.html").read_text().count("<svg") == 24


class Ticks(threading.Event):
    """An event that is set after 20 looks, without waiting for the time between them."""

    looks = 0

    def wait(self, timeout=None) -> bool:
        self.looks += 1
        return self.set() if self.looks == 20 else False


class Counting(kc.CheckpointDirectory):
    """A directory that counts how often it is read."""

    reads = 0

    def look(self, *arguments):
        self.reads += 1
        return super().look(*arguments)


def ended(runs: kc.CheckpointDirectory) -> None:
    """Notes the end of a training, as `fit` does."""
    runs.note(Event(kind="ended", step=30, run_id="run"))


class TestAWatch:
    """`keras-ckpt watch` and `CheckpointDirectory.watch`, beside a writer."""

    def test_shows_each_change_until_the_training_has_ended(self, filler, monkeypatch) -> None:
        """It may begin before the directory is there."""
        monkeypatch.setattr(watching, "_SECONDS", 0.01)
        changes = [
            lambda: filler.save("10:0.5"),
            lambda: filler.runs.pin(10),
            lambda: filler.runs.add_metrics(10, test=0.25),
            lambda: filler.runs.note(Event(kind="epoch", step=20, run_id="run", metrics={"loss": 0.3})),
            lambda: filler.runs.note(Event(kind="epoch", step=30, run_id="run", metrics={"loss": 0.2})),
            lambda: ended(filler.runs),
        ]
        seen = [""]

        for view in watching.views(filler.runs, 10, threading.Event()):
            if repr(view) != seen[-1]:
                seen.append(repr(view))
            for change in changes[:1]:
                changes.remove(change)
                change()

        text = "\n".join(seen)
        order = ["the directory does not exist", "1 checkpoint", "pinned", "0.25", "loss  0.5 ▇▃▁ 0.2"]
        assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)

    def test_reads_nothing_while_nothing_changes(self, run) -> None:
        """A look once a second asks for times alone, so a training does not feel it."""
        os.utime(run.path, (1.79e9, 1.79e9))  # longer ago than the resolution of the file system's clock
        counting, ticks = Counting(run.path), Ticks()

        assert len(list(watching.views(counting, 10, ticks))) == 1
        assert (counting.reads, ticks.looks) == (1, 20)

    def test_reads_again_if_the_last_change_is_just_over(self, run) -> None:
        """Two changes may have the same time."""
        ticks = Ticks()
        now = time.time() + 1e3
        os.utime(run.path, (now, now))

        shown = [os.utime(run.path, (1.79e9, 1.79e9)) for _ in watching.views(run, 10, ticks)]

        assert len(shown) == 2

    def test_does_not_take_the_end_of_an_earlier_training_for_the_end(self, run) -> None:
        ended(run)

        assert len(list(watching.views(run, 10, Ticks(), since=time.time() + 1e3))) == 1
        assert len(list(watching.views(run, 10, Ticks(), since=0.0))) == 1
        ticks = Ticks()
        list(watching.views(run, 10, ticks))
        assert ticks.looks == 0

    def test_shows_the_error_of_a_path_that_cannot_be_read(self, tmp_path) -> None:
        (tmp_path / "file").write_text("")

        [view] = watching.views(kc.CheckpointDirectory(tmp_path / "file"), 10, Ticks())

        assert "this is a file" in repr(view)

    def test_in_a_shell_ends_with_the_training_of_another_process(self, filler) -> None:
        command = [sys.executable, "-m", "keras_ckpt", "watch", filler.runs.path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            filler.save("10:0.5 20:0.25 30:0.125")
            ended(filler.runs)
            output = process.communicate()[0]

        assert process.returncode == 0
        assert "loss  0.5 ▇▃▁ 0.125\n3 checkpoints, 39 bytes\n" in output

    def test_in_a_shell_ends_with_control_c(self, run, monkeypatch) -> None:
        monkeypatch.setattr(watching, "_stamps", lambda path: signal.raise_signal(signal.SIGINT))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

        try:
            assert CliRunner().invoke(main, ["watch", run.path]).exit_code == 0
        finally:
            signal.signal(signal.SIGINT, before)

    def test_in_a_notebook_replaces_the_output_of_its_cell(self, tmp_path) -> None:
        """A real kernel. The training in a later cell changes the output of the first, and ends the watch."""
        setup = f"import sys; sys.path[:0] = {sys.path!r}\nimport pathlib\nfrom support.runs import Filler\n"
        first = f"{setup}filler = Filler(pathlib.Path({str(tmp_path / 'run')!r}))\nwatch = filler.runs.watch()"
        second = (
            "from keras_ckpt.store.journal import Event\nfiller.save('10:0.5 20:0.25 30:0.125')\n"
            "filler.runs.note(Event(kind='ended', step=30, run_id='run'))\nwatch._thread.join()\nprint(watch)"
        )
        notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, [first, second])))

        NotebookClient(notebook, timeout=60).execute()

        [shown] = notebook.cells[0].outputs
        assert "3 checkpoints, 39 bytes" in shown.data["text/plain"]
        assert "<svg" in shown.data["text/html"]
        assert notebook.cells[1].outputs[0].text.startswith("<watched ")

    def test_is_stopped_by_its_method(self, run, capsys) -> None:
        """Without a notebook, IPython prints."""
        watch = run.watch()

        assert repr(watch).startswith("<watching ")
        watch.stop()
        assert repr(watch).startswith("<watched ")
        assert "5 checkpoints" in capsys.readouterr().out

    def test_without_ipython_names_the_command(self, run, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "IPython.display", None)

        with pytest.raises(ImportError, match="type keras-ckpt watch"):
            run.watch()
