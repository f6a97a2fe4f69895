"""Tables of directories, plans, verifications and records: as text that fits a terminal, and as HTML."""

from __future__ import annotations

import os
import pathlib
import pty
import re
import subprocess
import sys
import tempfile
import textwrap

import msgspec
import pytest
from click.testing import CliRunner

import keras_ckpt as kc
from keras_ckpt.cli import main
from keras_ckpt.store import overview
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.tables import text
from keras_ckpt.store.writer import SaveRequest, Writer
from support.runs import Filler, history, payload, unprivileged_user
from test_series import save as save_file

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
        val_loss  0.9 ▇▄▂▁▄▆ 0.7
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
        val_loss  0.9 ▇▄▂▁▄▆ 0.7
        6 checkpoints, 898 kB
        not shown in 60 columns: accuracy, loss, size, saved, reason
    """)


def test_a_plan_in_a_terminal_of_80_columns(plan, monkeypatch) -> None:
    assert screen(plan, 80, monkeypatch) == expected("""
        keep BestN(2, 'val_loss', 'min') | LatestN(1)
        step  epoch  val_loss    size  mark    plan    why
        ────────────────────────────────────────────────────────────────────────────────
        1000      1       0.9  150 kB          remove  BestN(2, 'val_loss', 'min'): 0.9
                                                       is 6th; LatestN(1): 6000 is newer
        2000      2       0.5  150 kB          keep    pinned: paper figure 3
        3000      3      0.25  150 kB          keep    BestN(2, 'val_loss', 'min')
        4000      4     0.125  150 kB  best    keep    BestN(2, 'val_loss', 'min')
        5000      5       0.5  150 kB          remove  BestN(2, 'val_loss', 'min'): 0.5
                                                       is 4th; LatestN(1): 6000 is newer
        6000      6       0.7  150 kB  newest  keep    LatestN(1)
        4 kept, 2 removed, which frees 299 kB
        not shown in 80 columns: val_accuracy, accuracy, loss
    """)


def test_a_plan_in_a_terminal_of_60_columns(plan, monkeypatch) -> None:
    assert screen(plan, 60, monkeypatch) == expected("""
        keep BestN(2, 'val_loss', 'min') | LatestN(1)
        step  val_loss  plan    why
        ────────────────────────────────────────────────────────────
        1000       0.9  remove  BestN(2, 'val_loss', 'min'): 0.9 is
                                6th; LatestN(1): 6000 is newer
        2000       0.5  keep    pinned: paper figure 3
        3000      0.25  keep    BestN(2, 'val_loss', 'min')
        4000     0.125  keep    BestN(2, 'val_loss', 'min')
        5000       0.5  remove  BestN(2, 'val_loss', 'min'): 0.5 is
                                4th; LatestN(1): 6000 is newer
        6000       0.7  keep    LatestN(1)
        4 kept, 2 removed, which frees 299 kB
        not shown in 60 columns: epoch, val_accuracy, accuracy,
        loss, size, and 1 more
    """)


def files(path: pathlib.Path) -> None:
    """Files of a template with the epoch and the loss, and beside them the file of the best."""
    for epoch, loss in enumerate(LOSSES[:4], 1):
        facts = {
            "metrics": {"loss": loss / 2, "val_accuracy": 1 - loss, "val_loss": loss},
            "monitor": "val_loss", "mode": "min", "epoch": epoch, "time": 1.79e9 + 60 * epoch,
        }  # fmt: skip
        save_file(path / "{epoch:02d}-{val_loss:.2f}.keras", 100 * epoch, f"{epoch:02d}-{loss:.2f}.keras", **facts)
        if epoch < 4:
            save_file(path / "best.keras", 100 * epoch, "best.keras", **facts)


class TestRunsInSubdirectories:
    """`new_run="subdirectory"` saves further runs into numbered sub-directories: a line below the table names them."""

    @pytest.mark.parametrize("width", [80, 60])
    @pytest.mark.parametrize("name", ["", "best.keras", "{epoch}.keras"])
    @pytest.mark.parametrize("first", [True, False], ids=["a run in the directory", "no run in the directory"])
    def test_are_named_with_the_command_that_lists_them(self, tmp_path, monkeypatch, width, name, first) -> None:
        """A directory of TensorFlow checkpoints, or of files of Keras. Without a run of its own it is listed too."""
        monkeypatch.chdir(tmp_path)
        for place in ["."] * first + ["2", "3"]:
            folder = pathlib.Path("runs", "all", place)
            save_file(folder / name, 1, name.format(epoch=1)) if name else Filler(folder).save("1")

        for path in ["runs/all", f"runs/all/{name}"]:
            note = screen(kc.CheckpointDirectory(path), width, monkeypatch).splitlines()[-1]
            assert note == "runs in sub-directories: 2, 3 (keras-ckpt ls runs/all/2)"
        listed = CliRunner().invoke(main, note.partition("(keras-ckpt ")[2].rstrip(")").split())
        assert listed.output.endswith("1 checkpoint, 11 bytes\n" if not name else "1 checkpoint, 9 bytes\n")

    @pytest.mark.parametrize("other", ["backup", "2", "3/notes"])
    def test_are_no_other_folders(self, tmp_path, other) -> None:
        """A folder of another name, and a folder without a checkpoint, are not named."""
        runs = Filler(tmp_path).save("1")
        (tmp_path / other).mkdir(parents=True)
        if other == "backup":
            Filler(tmp_path / other).save("1")

        assert repr(runs).endswith("1 checkpoint, 11 bytes")

    def test_of_any_name_are_named_below_a_directory_without_a_run(self, tmp_path, monkeypatch) -> None:
        """A search may name its runs itself."""
        monkeypatch.chdir(tmp_path)
        for name in ("seed10", "seed9", "notes"):
            pathlib.Path("search", name).mkdir(parents=True)
        for name in ("seed10", "seed9"):
            Filler(pathlib.Path("search", name)).save("1")

        note = repr(kc.CheckpointDirectory("search")).splitlines()[-1]

        assert note == "runs in sub-directories: seed9, seed10 (keras-ckpt ls search/seed9)"

    def test_that_cannot_be_read_do_not_hide_the_table(self) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp") as path:  # all users may enter /tmp
            runs = Filler(pathlib.Path(path)).save("1")
            Filler(pathlib.Path(path, "2")).save("1")
            os.chmod(path, 0o755)
            os.chmod(f"{path}/2", 0)

            with unprivileged_user():
                assert repr(runs).endswith("1 checkpoint, 11 bytes")


def test_a_folder_of_two_series_of_files_in_a_terminal_of_80_columns(tmp_path, monkeypatch) -> None:
    """The best and the newest are marked within the series of several files."""
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "ckpt")
    kc.CheckpointDirectory("ckpt/03-0.25.keras").pin(300, "paper")

    assert screen(kc.CheckpointDirectory("ckpt"), 80, monkeypatch) == expected("""
        ckpt
        file           step  epoch  val_loss  val_accuracy      size  mark
        ───────────────────────────────────────────────────────────────────────────
        best.keras      300      3      0.25          0.75  11 bytes
        01-0.90.keras   100      1       0.9           0.1  11 bytes
        02-0.50.keras   200      2       0.5           0.5  11 bytes
        03-0.25.keras   300      3      0.25          0.75  11 bytes  pinned: paper
        04-0.12.keras   400      4     0.125         0.875  11 bytes  best, newest
        5 checkpoints, 55 bytes
        best and newest are marked among the files of one template
        not shown in 80 columns: loss, saved
    """)


def test_a_folder_of_two_series_of_files_in_a_terminal_of_60_columns(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "ckpt")

    assert screen(kc.CheckpointDirectory("ckpt"), 60, monkeypatch) == expected("""
        ckpt
        file           step  epoch  val_loss      size  mark
        ────────────────────────────────────────────────────────────
        best.keras      300      3      0.25  11 bytes
        01-0.90.keras   100      1       0.9  11 bytes
        02-0.50.keras   200      2       0.5  11 bytes
        03-0.25.keras   300      3      0.25  11 bytes
        04-0.12.keras   400      4     0.125  11 bytes  best, newest
        5 checkpoints, 55 bytes
        best and newest are marked among the files of one template
        not shown in 60 columns: val_accuracy, loss, saved
    """)


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_plan_of_files_fits_its_terminal(tmp_path, monkeypatch, width) -> None:
    """A narrow terminal drops the marks, and keeps the file, the step, the metric, the plan and its reason."""
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "ckpt")

    runs = kc.CheckpointDirectory("ckpt/{epoch:02d}-{val_loss:.2f}.keras")

    table = screen(runs.plan(kc.LatestN(2)), width, monkeypatch)

    assert max(map(len, table.splitlines())) <= width
    assert re.search(r"^02-0.50.keras +200 .* 0.5 .*remove  LatestN\(2\): 400", table, re.MULTILINE)
    assert ("mark" in table.splitlines()[1]) == (width == 100)


def test_a_table_of_files_has_those_of_earlier_runs_and_names_those_without_a_record(tmp_path, monkeypatch) -> None:
    """No policy removes these files, so a plan names both."""
    monkeypatch.chdir(tmp_path)
    for step, run_id in ((100, "first"), (200, "first"), (50, "second")):
        facts = {"run_id": run_id, "epoch": 1, "time": 1.79e9, "metrics": {"loss": 0.5}, "monitor": "loss"}
        save_file(tmp_path / "w" / "{step}.keras", step, f"{step}.keras", **facts)
    (tmp_path / "w" / "by_keras.keras").write_bytes(b"of another program")
    runs = kc.CheckpointDirectory("w")

    assert screen(runs, 60, monkeypatch) == expected("""
        w/{step}.keras
        file       step  epoch  loss      size  mark
        ───────────────────────────────────────────────────
        100.keras   100      1   0.5  11 bytes  earlier run
        200.keras   200      1   0.5  11 bytes  earlier run
        50.keras     50      1   0.5  10 bytes  newest
        3 checkpoints, 32 bytes
        without a record, left alone: by_keras.keras
        not shown in 60 columns: saved
    """)
    assert repr(runs.plan(kc.LatestN(1))).splitlines()[-3:-1] == [
        "of an earlier run, left alone: 100.keras, 200.keras",
        "without a record, left alone: by_keras.keras",
    ]
    assert "3 checkpoints whole" in repr(runs.verify())


def test_a_file_that_was_copied_into_another_folder_is_in_the_table_of_the_folder(tmp_path, monkeypatch) -> None:
    """The record at the end of the file suffices."""
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "ckpt")
    (tmp_path / "mail").mkdir()
    (tmp_path / "mail" / "good.keras").write_bytes((tmp_path / "ckpt" / "02-0.50.keras").read_bytes())

    assert screen(kc.CheckpointDirectory("mail"), 60, monkeypatch) == expected("""
        mail/good.keras
        file        step  epoch  val_loss  val_accuracy      size
        ─────────────────────────────────────────────────────────
        good.keras   200      2       0.5           0.5  11 bytes
        1 checkpoint, 11 bytes
        not shown in 60 columns: loss, saved
    """)
    assert kc.CheckpointDirectory("mail").verify().ok


def test_a_copy_beside_the_files_of_a_template_is_in_the_table_and_disturbs_no_file(tmp_path, monkeypatch) -> None:
    """The path of the directory still means the files of the template."""
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        save_file(tmp_path / "{epoch}.keras", step, f"{step}.keras")
    pathlib.Path("good.keras").write_bytes(pathlib.Path("1.keras").read_bytes())
    runs = kc.CheckpointDirectory(tmp_path)

    assert [record.name for record in runs] == ["1.keras", "2.keras"]
    assert re.findall(r"^(\S+)\.keras +(\d)", repr(runs), re.MULTILINE) == [("1", "1"), ("2", "2"), ("good", "1")]
    assert "damaged" not in repr(runs)


def test_files_that_keras_wrote_are_named(tmp_path) -> None:
    """A folder may have no other files."""
    for epoch in range(7):
        (tmp_path / f"{epoch}.keras").write_bytes(b"of Keras")

    assert repr(kc.CheckpointDirectory(tmp_path)).splitlines()[1:] == [
        "no checkpoints that can be used",
        "without a record, left alone: 0.keras, 1.keras, 2.keras, 3.keras, 4.keras, and 2 more",
    ]


def test_the_table_of_a_path_that_cannot_be_read_tells_the_reason(tmp_path) -> None:
    """A `repr` never raises."""
    (tmp_path / "file").write_text("")

    assert "this is a file" in repr(kc.CheckpointDirectory(tmp_path / "file"))


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
        "LatestN(1): 20 is newer",
        "13 bytes",
        "1 kept, 1 removed, which frees 13 bytes",
    ):
        assert cell in table
        assert cell in markup


def test_a_long_table_is_shortened(filler) -> None:
    """The table shows the first, the newest, the best and the pinned rows, and the number of skipped rows."""
    many = history(" ".join(f"{step}:{step}" for step in range(5000)))
    many[700] = msgspec.structs.replace(many[700], pin="milestone")
    table = overview.of_directory("run", [Listing("run", tuple(many))], [overview.Ranking(best={900})], 0)

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


def test_only_a_long_text_wraps_in_a_notebook(runs) -> None:
    """A number, a date and a file name stay in one line. The cells say so, because a notebook has styles for cells."""
    runs.pin(3000, "a reason that takes more than thirty columns")

    cells = re.findall('<t[dh] style="text-align:(?:left|right);white-space:([^"]*)">([^<]*)<', runs._repr_html_())

    assert len(cells) == 7 * 10
    assert [content for wrap, content in cells if wrap != "nowrap"] == [
        "pinned: a reason that takes more than thirty columns"
    ]
    assert "white-space:normal;overflow-wrap:anywhere" in runs._repr_html_()


def test_numbers_are_at_the_right_and_words_at_the_left_in_a_notebook(runs) -> None:
    markup = runs._repr_html_()

    assert re.search("text-align:right[^>]*>150 kB<", markup)
    assert re.search("text-align:left[^>]*>newest<", markup)


def test_a_record_has_no_empty_head_in_a_notebook(runs) -> None:
    """Its columns have no names."""
    assert "<thead>" not in runs.best()._repr_html_()
    assert "<thead>" in runs._repr_html_()


def test_a_record_and_a_verification_are_tables_in_a_notebook(runs) -> None:
    """A record has a row for each fact, a verification a row for each damaged checkpoint."""
    best = runs.best()._repr_html_()
    assert ">val_loss</td><td" in best
    assert ">0.125</td>" in best

    pathlib.Path(runs.best().prefix + ".index").write_bytes(b"")

    assert ">ckpt-4000</td>" in runs.verify()._repr_html_()


def luminance(color: str) -> float:
    """The luminance of a color such as `#1e8e3e`, as the guidelines for accessible pages define it."""
    parts = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_plan_in_a_notebook_has_colors_for_light_and_dark_pages(plan) -> None:
    """A color for kept and a color for removed. Their contrast with white, gray and black lines suffices."""
    colors = re.findall('<tr style="color:(#[0-9a-f]+)">', plan._repr_html_())

    remove, keep = colors[0], colors[1]
    assert colors == [remove, keep, keep, keep, remove, keep]
    for page in ("#ffffff", "#f5f5f5", "#111111", "#1e1e1e"):
        for color in (keep, remove):
            dark, light = sorted((luminance(page), luminance(color)))
            assert (light + 0.05) / (dark + 0.05) > 3.8


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
