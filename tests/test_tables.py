"""Tables of directories, plans, verifications and records: as text that fits a terminal, and as HTML."""

from __future__ import annotations

import os
import pathlib
import pty
import re
import subprocess
import sys
import textwrap

import msgspec
import pytest

import keras_ckpt as kc
from keras_ckpt.store import overview
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.tables import text
from keras_ckpt.store.writer import SaveRequest, Writer
from support.runs import Filler, history, payload

LOSSES = [0.9, 0.5, 0.25, 0.125, 0.5, 0.7]
"""The best of the six epochs is the fourth."""


def trained(path: pathlib.Path, monitor: str = "val_loss") -> kc.CheckpointDirectory:
    """A directory with a checkpoint of each epoch, four metrics and one pin."""
    runs = kc.CheckpointDirectory(path)
    writer = Writer(runs)
    for epoch, loss in enumerate(LOSSES, 1):
        metrics = {"accuracy": 1 - loss / 2, "loss": loss / 2, "val_accuracy": 1 - loss, monitor: loss}
        request = SaveRequest(
            step=1000 * epoch, run_id="run", epoch=epoch, batch=0, metrics=metrics, monitor=monitor, mode="min",
            time=1.79e9 + 60 * epoch, reason="epoch",
        )  # fmt: skip
        writer.save(request, payload(b"x" * 74_800))
    writer.close()
    runs.pin(2000, "paper figure 3")
    return runs


@pytest.fixture
def runs(tmp_path, monkeypatch) -> kc.CheckpointDirectory:
    monkeypatch.chdir(tmp_path)
    return trained(tmp_path / "digits")


@pytest.fixture
def plan(runs):
    return runs.plan(kc.BestN(2) | kc.LatestN(1))


def screen(shown: object, width: int, monkeypatch) -> str:
    """The text of a value in a terminal of a width."""
    monkeypatch.setenv("COLUMNS", str(width))
    return repr(shown)


def expected(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


def test_a_directory_in_a_terminal_of_80_columns(runs, monkeypatch) -> None:
    assert screen(runs, 80, monkeypatch) == expected("""
        digits
        step  epoch  val_loss  val_accuracy  accuracy    size  mark
        ─────────────────────────────────────────────────────────────────────────────
        1000      1       0.9           0.1      0.55  150 kB
        2000      2       0.5           0.5      0.75  150 kB  pinned: paper figure 3
        3000      3      0.25          0.75     0.875  150 kB
        4000      4     0.125         0.875    0.9375  150 kB  best
        5000      5       0.5           0.5      0.75  150 kB
        6000      6       0.7           0.3      0.65  150 kB  newest
        6 checkpoints, 898 kB
        not shown in 80 columns: loss, saved, reason
    """)


def test_a_directory_in_a_terminal_of_60_columns(runs, monkeypatch) -> None:
    assert screen(runs, 60, monkeypatch) == expected("""
        digits
        step  epoch  val_loss  val_accuracy  mark
        ───────────────────────────────────────────────────────────
        1000      1       0.9           0.1
        2000      2       0.5           0.5  pinned: paper figure 3
        3000      3      0.25          0.75
        4000      4     0.125         0.875  best
        5000      5       0.5           0.5
        6000      6       0.7           0.3  newest
        6 checkpoints, 898 kB
        not shown in 60 columns: accuracy, loss, size, saved, reason
    """)


def test_a_plan_in_a_terminal_of_80_columns(plan, monkeypatch) -> None:
    assert screen(plan, 80, monkeypatch) == expected("""
        keep BestN(2, 'val_loss', 'min') | LatestN(1)
        step  epoch  val_loss  val_accuracy  mark    plan    why
        ────────────────────────────────────────────────────────────────────────────────
        1000      1       0.9           0.1          remove  no policy keeps it
        2000      2       0.5           0.5          keep    pinned: paper figure 3
        3000      3      0.25          0.75          keep    BestN(2, 'val_loss', 'min')
        4000      4     0.125         0.875  best    keep    BestN(2, 'val_loss', 'min')
        5000      5       0.5           0.5          remove  no policy keeps it
        6000      6       0.7           0.3  newest  keep    LatestN(1)
        4 kept, 2 removed, which frees 299 kB
        not shown in 80 columns: accuracy, loss, size
    """)


def test_a_plan_in_a_terminal_of_60_columns(plan, monkeypatch) -> None:
    assert screen(plan, 60, monkeypatch) == expected("""
        keep BestN(2, 'val_loss', 'min') | LatestN(1)
        step  val_loss  mark    plan    why
        ───────────────────────────────────────────────────────────
        1000       0.9          remove  no policy keeps it
        2000       0.5          keep    pinned: paper figure 3
        3000      0.25          keep    BestN(2, 'val_loss', 'min')
        4000     0.125  best    keep    BestN(2, 'val_loss', 'min')
        5000       0.5          remove  no policy keeps it
        6000       0.7  newest  keep    LatestN(1)
        4 kept, 2 removed, which frees 299 kB
        not shown in 60 columns: epoch, val_accuracy, accuracy,
        loss, size
    """)


def test_a_record_is_a_table_of_its_most_important_facts(runs) -> None:
    """Its `repr` stays one line."""
    best = runs.best()

    assert text(best) == expected(f"""
        {best.prefix}
        step          4000
        epoch         4
        val_loss      0.125
        val_accuracy  0.875
        accuracy      0.9375
        loss          0.0625
        saved         {best.saved_at:%Y-%m-%d %H:%M:%S}
        reason        epoch
        size          150 kB
    """)
    assert "\n" not in repr(best)


@pytest.mark.parametrize("monitor", ["val_loss", "val_sparse_categorical_crossentropy"])
@pytest.mark.parametrize("width", [60, 70, 80, 90, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path, monkeypatch, monitor, width) -> None:
    """Even with a metric of a long name, and with a policy of a long name."""
    runs = trained(tmp_path / "digits", monitor)
    plan = runs.plan(kc.BestN(2) | kc.LatestN(1))

    lines = f"{screen(runs, width, monkeypatch)}\n{screen(plan, width, monkeypatch)}".splitlines()

    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [1, 20, 40, 60])
def test_no_terminal_is_so_narrow_that_a_number_is_cut(runs, plan, monkeypatch, width) -> None:
    """The step and the metric that decides are in every row."""
    for table in (screen(runs, width, monkeypatch), screen(plan, width, monkeypatch)):
        for epoch, loss in enumerate(LOSSES, 1):
            assert re.search(rf"^ ?{1000 * epoch} .* {loss}\b", table, re.MULTILINE)
        assert "…" not in table


def test_a_pipe_has_no_width_so_all_columns_are_shown(runs, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)

    heads = repr(runs).splitlines()[1]

    assert heads.split() == [
        "step", "epoch", "val_loss", "val_accuracy", "accuracy", "loss", "size", "saved", "reason", "mark",
    ]  # fmt: skip


def test_the_metric_that_training_monitored_is_the_first(tmp_path) -> None:
    """Validation comes before training."""
    heads = repr(trained(tmp_path, "head_loss")).splitlines()[1]

    assert re.findall(r"\S*(?:loss|accuracy)", heads) == ["head_loss", "val_accuracy", "accuracy", "loss"]


def test_the_metrics_of_the_policy_are_the_first_in_a_plan(runs) -> None:
    """The best checkpoint is the best by these metrics."""
    plan = repr(runs.plan(kc.BestN(1, "accuracy", "min") | kc.BestN(1, "loss", "max")))

    assert re.findall(r"\S*(?:loss|accuracy)", plan.splitlines()[1]) == ["accuracy", "loss", "val_accuracy", "val_loss"]
    assert re.search(r"^1000 .* best +keep", plan, re.MULTILINE)


def test_without_a_monitor_the_first_metric_stays_in_a_narrow_terminal(filler, monkeypatch) -> None:
    """No checkpoint is marked as the best, because no mode is known."""
    table = screen(filler.save("10:0.5 20:0.25"), 20, monkeypatch)

    assert "0.25" in table
    assert "best" not in table


def test_a_table_names_the_columns_that_it_dropped(filler, monkeypatch) -> None:
    """Five names, and the number of the others."""
    metrics = {f"m{number}": 0.5 for number in range(9)}
    Writer(filler.runs).save(SaveRequest(step=1, run_id="run", metrics=metrics), payload())

    table = screen(filler.runs, 20, monkeypatch).replace("\n", " ")

    assert table.endswith("not shown in 20 columns: m1, m2, m3, m4, m5, and 5 more")


@pytest.mark.parametrize(
    ("fill", "reason"),
    [
        (lambda path: None, "no checkpoints: the directory does not exist"),
        (lambda path: path.mkdir(), "no checkpoints: nothing was saved here yet"),
        (lambda path: Filler(path).save("10") and (path / "ckpt-10.json").write_text(""), "no checkpoints that can be"),
        (lambda path: Filler(path).save("10") and (path / "ckpt-10.json").unlink(), "no checkpoints that can be used"),
    ],
    ids=["no directory", "empty", "damaged", "unmanaged"],
)
def test_an_empty_table_says_why(tmp_path, fill, reason) -> None:
    """In a terminal and in a notebook, of a directory and of a plan."""
    fill(tmp_path / "run")
    runs = kc.CheckpointDirectory(tmp_path / "run")

    for shown in (runs, runs.plan(kc.LatestN(1))):
        assert reason in repr(shown)
        assert reason in shown._repr_html_()
        assert "<table" not in shown._repr_html_()


def test_the_table_is_the_same_in_a_terminal_and_a_notebook(filler) -> None:
    """Text and HTML have the same cells."""
    runs = filler.save("10:0.5 20:0.25", monitor="loss", mode="min", reason="epoch")
    runs.pin(20, "<b>best</b>")
    table, markup = str(runs), runs._repr_html_()

    for cell in ("step", "loss", "0.25", "epoch", "2 checkpoints"):
        assert cell in table
        assert cell in markup
    assert repr(runs) == table
    assert "&lt;b&gt;best&lt;/b&gt;" in markup
    assert "<b>best</b>" in table


def test_a_plan_displays_equally_in_a_terminal_and_a_notebook(filler) -> None:
    """Both show the decision, the reason, the size, and the freed bytes."""
    plan = filler.save("10:0.5 20:0.25").plan(kc.LatestN(1))
    table, markup = str(plan), plan._repr_html_()

    for cell in (
        "keep",
        "remove",
        "LatestN(1)",
        "no policy keeps it",
        "13 bytes",
        "1 kept, 1 removed, which frees 13 bytes",
    ):
        assert cell in table
        assert cell in markup


def test_a_long_table_is_shortened(filler) -> None:
    """The table shows the first, the newest, the best and the pinned rows, and the number of skipped rows."""
    many = history(" ".join(f"{step}:{step}" for step in range(5000)))
    many[700] = msgspec.structs.replace(many[700], pin="milestone")
    table = overview.of_directory("run", Listing("run", tuple(many)), 0, overview.Ranking(best={900}))

    lines = [cells for _, cells in table.rows(table.columns)]

    assert len(lines) < 50
    assert [steps for steps, *_ in lines[:8]] == ["0", "1", "...", "700", "...", "900", "...", "4980"]
    assert [marks for *_, marks in lines[2:8]] == [
        "... 698 more", "pinned: milestone", "... 199 more", "best", "... 4079 more", "",
    ]  # fmt: skip
    assert table.notes == ("5000 checkpoints, 0 bytes",)


def test_control_characters_from_disk_are_escaped(filler) -> None:
    """A terminal must not act on names and reasons from disk."""
    runs = filler.save("10", reason="\x1b[31mred\nline")

    assert "\x1b" not in str(runs)
    assert "\\x1b[31mred\\nline" in str(runs)


def test_only_words_wrap_in_a_notebook(runs, plan) -> None:
    """A number stays in one line."""
    for shown in (runs, plan):
        markup = shown._repr_html_()

        assert '<table style="white-space:nowrap">' in markup
        wrapping = re.findall('<td style="[^"]*white-space:normal">([^<]+)', markup)
        assert "paper figure 3" in " ".join(wrapping)
        assert set(re.findall(r"<td>([^<]*)", markup)) >= {str(1000 * epoch) for epoch in range(1, 7)}
        assert not [cell for cell in wrapping if cell.replace(".", "").isdigit()]


def test_a_record_and_a_verification_are_tables_in_a_notebook(runs) -> None:
    """A record has a row for each fact, a verification a row for each damaged checkpoint."""
    best = runs.best()._repr_html_()
    assert ">val_loss</td><td" in best
    assert ">0.125</td>" in best

    pathlib.Path(runs.best().prefix + ".index").write_bytes(b"")

    assert ">ckpt-4000</td>" in runs.verify()._repr_html_()


def test_a_plan_in_a_notebook_has_colors(plan) -> None:
    """Green for kept, red for removed."""
    colors = re.findall('<tr style="color:([a-z]+)">', plan._repr_html_())

    assert colors == ["red", "green", "green", "green", "red", "green"]


def in_terminal(path: str, **environment: str) -> str:
    """The output of `keras-ckpt prune --dry-run` in a terminal."""
    code = "from keras_ckpt.cli import main; main()"
    command = [sys.executable, "-c", code, "prune", path, "--keep-latest", "1", "--dry-run"]
    master, slave = pty.openpty()
    variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    with subprocess.Popen(command, stdout=slave, env={**variables, "TERM": "xterm", **environment}):
        os.close(slave)
        shown = b""
        while chunk := _read(master):
            shown += chunk
    os.close(master)
    return shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # the other end is closed
        return b""


def test_a_terminal_shows_colors(runs) -> None:
    table = in_terminal(runs.path)

    assert "\x1b[31m1000" in table
    assert "\x1b[32m6000" in table


def test_no_color_turns_colors_off(runs) -> None:
    """The environment variable of no-color.org; no escape sequence is left."""
    assert "\x1b" not in in_terminal(runs.path, NO_COLOR="1")


def test_a_pipe_has_no_colors(runs) -> None:
    command = [sys.executable, "-m", "keras_ckpt", "prune", runs.path, "--keep-latest", "1", "--dry-run"]

    assert "\x1b" not in subprocess.run(command, capture_output=True, check=True, text=True).stdout
