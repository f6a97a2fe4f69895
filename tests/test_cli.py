"""The command `keras-ckpt`: its output and its exit codes."""

import contextlib
import json
import os
import pathlib
import pty
import re
import subprocess
import sys
import textwrap

import pytest
from click.testing import CliRunner

import keras_ckpt as kc
from keras_ckpt.cli import main
from keras_ckpt.store.writer import SaveRequest, Writer
from support.runs import Filler, payload
from test_series import save as save_file

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]


def run(*arguments: object, code: int = 0, answer: str | None = None) -> str:
    """Runs a command, checks its exit code, and returns its output."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=answer)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def runs(filler) -> kc.CheckpointDirectory:
    return filler.save("10:0.5 20:0.2 30:0.4 40:nan", monitor="loss", mode="min", reason="epoch", epoch=1)


def test_ls_prints_the_table(runs) -> None:
    """The table is the same as `print(directory)`."""
    assert run("ls", runs.path) == f"{runs}\n"


def test_ls_prints_json(runs) -> None:
    """Each checkpoint has all facts of its sidecar, and a NaN is a string."""
    runs.pin(20, "why")
    (pathlib.Path(runs.path) / "ckpt-30.json").write_text("")
    (pathlib.Path(runs.path) / "ckpt-10.json").unlink()

    listed = json.loads(run("ls", runs.path, "--json"))

    assert [(each["step"], each["metrics"]["loss"], each["pin"]) for each in listed["checkpoints"]] == [
        (20, 0.2, "why"),
        (40, "NaN", None),
    ]
    assert listed["checkpoints"][0]["prefix"] == runs[20].prefix
    assert list(listed["damaged"]) == ["ckpt-30"]
    assert listed["without_sidecar"] == ["ckpt-10"]


def test_ls_all_prints_removed_checkpoints_with_the_reason(runs) -> None:
    runs.prune(kc.LatestN(1))

    lines = run("ls", "--all", runs.path).splitlines()

    assert re.search(r"^ +10 .* removed +LatestN\(1\): 40 is newer$", "\n".join(lines), re.MULTILINE)
    assert re.search(r"^ +40 .* kept$", "\n".join(lines), re.MULTILINE)
    assert lines[-1] == "3 removed, 1 kept"


def test_ls_all_numbers_the_runs_where_there_are_several(filler) -> None:
    """As after `new_run="replace"`. The oldest run is 1."""
    filler.save("10 20", run_id="old")
    assert run("ls", "--all", filler.runs.path).splitlines()[1].split()[0] == "step"
    writer = Writer(filler.runs)
    writer.replaced = {"old"}
    for step in (10, 20):
        writer.save(SaveRequest(step=step, run_id="new", batch=0), payload())
    writer.close()

    _title, head, _line, *rows = run("ls", "--all", filler.runs.path).splitlines()

    assert head.split()[:2] == ["run", "step"]
    assert [row.split()[:2] for row in rows[:4]] == [["1", "10"], ["1", "20"], ["2", "10"], ["2", "20"]]
    assert ["removed" in row for row in rows[:4]] == [True, True, False, False]


def test_ls_all_prints_json(runs) -> None:
    runs.prune(kc.LatestN(1))

    saves = json.loads(run("ls", "--all", "--json", runs.path))["saves"]

    assert [(each["step"], each["state"], each["metrics"]["loss"]) for each in saves] == [
        (10, "removed", 0.5),
        (20, "removed", 0.2),
        (30, "removed", 0.4),
        (40, "kept", "NaN"),
    ]
    assert saves[0]["why"] == "LatestN(1): 40 is newer"


def test_ls_all_dims_what_is_gone_in_a_terminal(runs) -> None:
    runs.prune(kc.LatestN(1))

    assert runs.seen().past._table().colors == ("dim", "dim", "dim", "")


def test_ls_all_lists_each_series_of_a_folder(tmp_path) -> None:
    for template in ("best.keras", "last.keras"):
        save_file(tmp_path / template, 10, template)

    listed = run("ls", "--all", tmp_path)

    assert listed.count("1 kept") == 2


def test_ls_all_lists_each_run_below_a_directory(tmp_path) -> None:
    for name in ("a", "b"):
        Filler(tmp_path / name).save("10 20", kc.LatestN(1))

    listed = run("ls", "--all", tmp_path)

    assert listed.count("1 removed, 1 kept") == 2


def test_why_prints_the_sentence_of_a_step(runs) -> None:
    """A step that is gone, `latest`, and a step that was never saved."""
    runs.prune(kc.LatestN(1))

    assert run("why", runs.path, 10) == f"{runs.why(10)}\n"
    assert run("why", runs.path, "latest") == "Step 40 is kept: nothing has removed it.\n"
    assert run("why", runs.path, 15) == f"{runs.why(15)}\n"


def test_why_of_a_file_of_keras_is_of_its_series(tmp_path) -> None:
    """The path of one file of a template."""
    template = "{epoch:02d}.keras"
    save_file(tmp_path / template, 10, "01.keras")
    save_file(tmp_path / template, 20, "02.keras")

    assert run("why", tmp_path / "01.keras") == "Step 10 is kept: nothing has removed it.\n"


def test_why_of_a_directory_that_does_not_exist_is_not_found(tmp_path) -> None:
    assert "There is no directory" in run("why", tmp_path / "nowhere", 10, code=1)


def test_show_prints_the_most_important_facts_of_a_checkpoint(runs) -> None:
    """The other facts would fill a screen."""
    text = run("show", runs.path, 20)

    assert re.search(r"^step +20$", text, re.MULTILINE)
    assert "ckpt-20.index" not in text
    assert len(text.splitlines()) < 10


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_show_verbose_prints_all_facts_of_a_checkpoint(runs, flag) -> None:
    """In lines, as `--json` in JSON."""
    text = run("show", runs.path, 20, flag)

    assert re.search(r"^step +20$", text, re.MULTILINE)
    assert "ckpt-20.index" in text
    facts = json.loads(run("show", runs.path, 20, "--json"))
    assert facts["step"] == 20
    assert [line.split()[0] for line in text.splitlines()] == list(facts)


@pytest.mark.parametrize(
    ("arguments", "step"), [(["show", 30], 30), (["show", "latest"], 40), (["show", "best"], 20), (["best"], 20)]
)
def test_path_prints_the_prefix_only(runs, monkeypatch, arguments, step) -> None:
    """For a script; the PATH defaults to the current directory."""
    monkeypatch.chdir(runs.path)

    assert run(*arguments, "--path") == f"{runs[step].prefix}\n"


@pytest.mark.parametrize("flags", [[], ["-v"], ["--json"], ["--path"]])
def test_latest_and_best_serve_as_steps(runs, flags) -> None:
    assert run("show", runs.path, "latest", *flags) == run("show", runs.path, 40, *flags)
    assert run("show", *flags, runs.path, "best") == run("show", runs.path, 20, *flags)


@pytest.mark.parametrize("name", ["ls", "best", "verify"])
def test_the_path_defaults_to_the_current_directory(runs, monkeypatch, name) -> None:
    there = run(name, runs.path)
    monkeypatch.chdir(runs.path)

    assert run(name) == run(name, ".") == there


def test_a_prefix_is_a_path_and_a_step(runs) -> None:
    """A script may give the output of `show --path` to the next command."""
    prefix = run("show", runs.path, "best", "--path").strip()

    assert run("show", prefix) == run("show", runs.path, 20)
    run("pin", prefix, "mine")
    assert [record.pin for record in runs] == [None, "mine", None, None]
    assert run("unpin", prefix) == "Unpinned step 20.\n"


def test_a_directory_may_have_the_name_of_a_step(runs, monkeypatch) -> None:
    """Two steps in a row are a PATH and a STEP."""
    named = pathlib.Path(runs.path).with_name("7")
    pathlib.Path(runs.path).rename(named)
    monkeypatch.chdir(named.parent)

    assert json.loads(run("show", "7", "latest", "--json"))["step"] == 40
    run("pin", "7", 10, "mine")
    assert kc.CheckpointDirectory(named)[10].pin == "mine"


def test_pin_takes_a_reason_without_a_path(runs, monkeypatch) -> None:
    monkeypatch.chdir(runs.path)

    assert run("pin", "best", "mine") == "Pinned step 20.\n"
    assert runs[20].pin == "mine"
    assert run("unpin", "best") == "Unpinned step 20.\n"
    assert not runs[20].pinned


@pytest.fixture
def two(runs, tmp_path) -> list[kc.CheckpointDirectory]:
    """Two directories."""
    return [runs, Filler(tmp_path / "other").save("1:0.5 2:0.4 3:0.6", monitor="loss", mode="min")]


def test_ls_and_best_and_verify_take_several_paths(two) -> None:
    """JSON has a line for each."""
    paths = [runs.path for runs in two]

    assert run("ls", *paths) == f"{two[0]}\n{two[1]}\n"
    listed = [json.loads(line) for line in run("ls", *paths, "--json").splitlines()]
    assert [len(each["checkpoints"]) for each in listed] == [4, 3]
    assert [json.loads(line)["step"] for line in run("best", *paths, "--json").splitlines()] == [20, 2]
    assert run("verify", *paths).count("0 damaged") == 2


def test_verify_of_several_paths_exits_with_1_if_one_is_damaged(two) -> None:
    """All are verified."""
    pathlib.Path(two[0][20].prefix + ".index").write_bytes(b"")

    text = run("verify", *(runs.path for runs in two), code=1)

    assert "1 damaged" in text
    assert "0 damaged" in text


def test_prune_and_clear_take_several_paths(two) -> None:
    paths = [runs.path for runs in two]

    assert run("prune", *paths, "--keep-best", 1).endswith("Removed 5 checkpoints.\n")
    assert [[record.step for record in runs] for runs in two] == [[20], [2]]

    assert run("clear", *paths, "--yes") == "Removed 2 checkpoints.\n"


def test_one_wrong_path_among_several_removes_nothing(two) -> None:
    run("prune", two[0].path, "nowhere", "--keep-latest", 1, code=1)
    run("clear", two[0].path, "nowhere", "--yes", code=1)

    assert len(two[0]) == 4


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_commands_print_errors_only(runs, flag) -> None:
    run_quietly = [
        ["verify", runs.path], ["pin", runs.path, 10], ["unpin", runs.path, 10],
        ["prune", runs.path, "--keep-latest", 3, "-n"], ["prune", runs.path, "--keep-latest", 3],
        ["clear", runs.path, "--yes"],
    ]  # fmt: skip
    for command in run_quietly:
        assert run(*command, flag) == ""
    assert len(runs) == 0
    assert "There is no directory" in run("verify", "nowhere", flag, code=1)


def test_quiet_verify_exits_with_1_for_a_damaged_checkpoint(runs) -> None:
    pathlib.Path(runs[20].prefix + ".index").write_bytes(b"")

    assert run("verify", runs.path, "-q", code=1) == ""


@pytest.mark.parametrize(
    ("options", "step"), [([], 20), (["--mode", "max"], 10), (["--monitor", "loss", "--mode", "max"], 10)]
)
def test_best_prints_the_best_checkpoint(runs, options, step) -> None:
    """By the monitor of the training, or by the given monitor and mode."""
    assert json.loads(run("best", runs.path, "--json", *options))["step"] == step


def test_prune_prints_its_plan_and_removes_checkpoints(runs) -> None:
    """The plan is the same as `plan()` returns."""
    plan = runs.plan(kc.LatestN(1) | kc.BestN(1, "loss", "min"))

    out = run("prune", runs.path, "--keep-latest", 1, "--keep-best", 1, "--monitor", "loss", "--mode", "min")

    assert out == f"{plan}\nRemoved 2 checkpoints.\n"
    assert [record.step for record in runs] == [20, 40]


@pytest.mark.parametrize("flag", ["--dry-run", "-n"])
def test_a_dry_run_removes_nothing_and_prints_so(runs, flag) -> None:
    assert "Nothing was removed" in run("prune", runs.path, "--keep-latest", 1, flag)
    assert len(runs) == 4


def test_prune_prints_json(runs) -> None:
    """The JSON has a decision for each checkpoint."""
    plan = json.loads(run("prune", runs.path, "--keep-every-steps", 20, "-n", "--json"))

    assert plan["policy"] == "EveryNSteps(20)"
    assert [(each["step"], each["kept"]) for each in plan["checkpoints"]] == [
        (10, True),
        (20, True),
        (30, False),
        (40, True),
    ]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--keep-best", 2], [10, 20, 30, 40][1:3]),
        (["--keep-every-hours", 2], [10, 30]),
        (["--keep-every-epochs", 1], [10]),
        (["--keep-every-epochs", 1, "--keep-latest", 1], [10, 40]),
        (["--keep-daily", 7], [10]),
        (["--keep-weekly", 4], [10]),
        (["--keep-monthly", 12], [10]),
        (["--keep-within", "1h"], [30, 40]),
        (["--keep-every-steps", 20, "--max-count", 2], [20, 40]),
        (["--max-bytes", "26 B"], [30, 40]),
        (["--max-bytes", "39B", "--max-count", "2"], [30, 40]),
    ],
)
def test_prune_has_an_option_for_each_policy(runs, options, kept) -> None:
    """Several options keep the union, as many of it as fit."""
    run("prune", runs.path, *options)

    assert [record.step for record in runs] == kept


def test_a_bound_of_prune_drops_by_the_order_of_the_options(runs) -> None:
    """The newest stays, and then those that the first option keeps."""
    best, steps = ["--keep-best", 1], ["--keep-every-steps", 30]

    plans = [json.loads(run("prune", runs.path, *options, "--max-count", 2, "-n", "--json")) for options in (
        [*best, *steps], [*steps, *best],
    )]  # fmt: skip

    assert [plan["policy"] for plan in plans] == [
        "(BestN(1, 'loss', 'min') | EveryNSteps(30)) & MaxCount(2)",
        "(EveryNSteps(30) | BestN(1, 'loss', 'min')) & MaxCount(2)",
    ]
    kept = [[each["step"] for each in plan["checkpoints"] if each["kept"]] for plan in plans]
    assert kept == [[20, 30], [10, 30]]
    assert "over 2 checkpoints when step 30 came" in run("prune", runs.path, *best, *steps, "--max-count", 2, "-n")


def test_pin_sets_a_reason_and_unpin_removes_the_pin(runs) -> None:
    run("pin", runs.path, 10, "paper figure 3")
    assert runs[10].pin == "paper figure 3"

    assert run("unpin", runs.path, 10) == "Unpinned step 10.\n"
    assert not runs[10].pinned


def test_unpin_says_that_a_checkpoint_has_no_pin(runs) -> None:
    assert run("unpin", runs.path, 10) == "Step 10 has no pin.\n"


def test_clear_asks_for_confirmation(runs) -> None:
    """`n` aborts, and `--yes` does not ask."""
    run("clear", runs.path, answer="n\n", code=1)
    assert len(runs) == 4

    assert "Removed 4 checkpoints" in run("clear", runs.path, "--yes")
    assert len(runs) == 0


def test_clear_refuses_a_pinned_checkpoint_before_it_asks(two) -> None:
    """The error has the command that removes pinned checkpoints too. Nothing of the other paths is removed."""
    two[1].pin(2)
    paths = [runs.path for runs in two]

    text = run("clear", *paths, answer="y\n", code=1)

    assert "[y/N]" not in text
    assert "has pinned checkpoints: ckpt-2. Nothing was removed." in text
    assert text.endswith(f"type keras-ckpt clear --pinned {' '.join(paths)}\n")
    assert [len(runs) for runs in two] == [4, 3]
    assert run("clear", "--pinned", *paths, answer="y\n").endswith("Removed 7 checkpoints.\n")
    assert [len(runs) for runs in two] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["show", "{run}", 15], "There are the steps 10, 20, 30, 40"),
        (["pin", "{run}", 15], "No checkpoint of step 15"),
        (["unpin", "{run}", 15], "No checkpoint of step 15"),
        (["best", "{run}", "--monitor", "lost", "--mode", "min"], "Recorded metrics: loss"),
        (["best", "{run}", "--monitor", "los"], "Did you mean 'loss'?"),
        (["prune", "{run}", "--keep-best", 1, "--monitor", "lost", "--mode", "min"], "which no checkpoint has"),
        (["ls", "nowhere"], "There is no directory nowhere"),
        (["show", "nowhere", 1], "There is no directory nowhere"),
        (["ls", __file__], "test_cli.py: Expected a checkpoint directory, this is a file\n"),
        (["export", "{run}", 10, "{run}/nodir/a.npz"], "/nodir: No such file or directory\n"),
    ],
)
def test_a_missing_path_step_or_metric_exits_with_1(runs, arguments, text) -> None:
    """The output has the error of the library, without the number of an error of the system."""
    arguments = [str(argument).replace("{run}", runs.path) for argument in arguments]

    printed = run(*arguments, code=1)
    assert text in printed
    assert "Errno" not in printed


def test_show_of_a_damaged_checkpoint_exits_with_1(runs) -> None:
    """`ls` lists it with the others."""
    (pathlib.Path(runs.path) / "ckpt-20.json").write_text("")

    assert "cannot be used" in run("show", runs.path, 20, code=1)
    assert "damaged, left alone: ckpt-20" in run("ls", runs.path)


@pytest.fixture
def files(tmp_path, monkeypatch) -> None:
    """A folder of two series of files in the current directory."""
    monkeypatch.chdir(tmp_path)
    for epoch, loss in enumerate((0.5, 0.2, 0.4), 1):
        facts = {"metrics": {"loss": loss}, "monitor": "loss", "mode": "min", "epoch": epoch}
        save_file("ckpt/{epoch:02d}.keras", 10 * epoch, f"{epoch:02d}.keras", **facts)
        if epoch < 3:
            save_file("ckpt/best.keras", 10 * epoch, "best.keras", **facts)


def test_ls_and_verify_show_all_series_of_a_directory(files) -> None:
    text = run("ls", "ckpt")

    assert re.findall(r"^\w+\.keras", text, re.MULTILINE) == ["best.keras", "01.keras", "02.keras", "03.keras"]
    assert len(json.loads(run("ls", "ckpt", "--json"))["checkpoints"]) == 4
    assert re.findall(r"(\d) checkpoints? whole", run("verify", "ckpt")) == ["1", "3"]


@pytest.mark.parametrize("command", [["best"], ["prune", "--keep-latest", 1], ["clear", "--yes"], ["show", "latest"]])
def test_other_commands_ask_for_a_template_of_a_directory_of_several_series(files, command) -> None:
    """A command must not guess what to remove."""
    name, *options = command
    before = sorted(pathlib.Path("ckpt").rglob("*"))

    assert run(name, "ckpt", *options, code=2).endswith("directory: 'ckpt/best.keras' or 'ckpt/{epoch:02d}.keras'.\n")
    assert sorted(pathlib.Path("ckpt").rglob("*")) == before
    assert run(name, "ckpt/{epoch:02d}.keras", *options)


@pytest.mark.parametrize(
    "command",
    [
        ["best"],
        ["prune", "--keep-latest", 1],
        ["clear", "--yes"],
        ["show", "latest"],
        ["show", 30],
        ["pin", "latest", "mine"],
        ["export", "best", "b.npz"],
    ],
    ids=lambda command: command[0],
)
def test_a_command_that_chooses_refuses_one_file_of_a_template(files, command) -> None:
    """The error has the path of the template. Another file must not be removed or pinned."""
    name, *options = command
    before = sorted(pathlib.Path("ckpt").rglob("*"))

    text = run(name, "ckpt/01.keras", *options, code=2)

    assert "01.keras is one file of a template. To name all files of it, type 'ckpt/{epoch:02d}.keras'." in text
    assert sorted(pathlib.Path("ckpt").rglob("*")) == before


def test_ls_and_verify_show_one_file_alone(files) -> None:
    assert re.findall(r"^\w+\.keras", run("ls", "ckpt/02.keras"), re.MULTILINE) == ["02.keras"]
    assert run("verify", "ckpt/02.keras").startswith("ckpt/02.keras\n1 checkpoint whole")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["ckpt/best.keras"], "best.keras"),
        (["ckpt/01.keras"], "01.keras"),
        (["ckpt", "01.keras"], "01.keras"),
        (["ckpt", "best.keras"], "best.keras"),
        (["ckpt/{epoch:02d}.keras", "01.keras"], "01.keras"),
        (["ckpt/{epoch:02d}.keras", "best"], "02.keras"),
        (["ckpt/best.keras", "latest"], "best.keras"),
    ],
)
def test_a_file_needs_no_step(files, arguments, name) -> None:
    """The name of a file is a STEP, even in a directory of several series."""
    assert run("show", *arguments, "--path") == run("show", "--path", *arguments)
    assert run("show", *arguments, "--path").endswith(f"/ckpt/{name}\n")


def test_pin_and_unpin_need_no_step_of_a_file(files) -> None:
    """Another file of the same step is not pinned."""
    run("pin", "ckpt/02.keras", "paper figure 3")

    assert kc.CheckpointDirectory("ckpt/02.keras")[20].pin == "paper figure 3"
    assert not kc.CheckpointDirectory("ckpt/best.keras")[20].pinned
    run("unpin", "ckpt/02.keras")
    assert not kc.CheckpointDirectory("ckpt/02.keras")[20].pinned


def test_a_file_is_pinned_in_a_directory_of_several_series(files) -> None:
    run("pin", "ckpt", "02.keras", "paper figure 3")

    assert kc.CheckpointDirectory("ckpt/02.keras")[20].pin == "paper figure 3"
    assert not kc.CheckpointDirectory("ckpt/best.keras")[20].pinned


def test_a_file_without_a_record_exits_with_1(files) -> None:
    """`ls` shows its name."""
    pathlib.Path("ckpt/mine.keras").write_bytes(b"by hand")

    text = run("show", "ckpt/mine.keras", code=1)
    assert "ckpt/mine.keras has no record" in text
    assert "type keras_ckpt.load_model('ckpt/mine.keras') in Python" in text
    assert "or keras-ckpt export ckpt/mine.keras values.npz in a shell" in text
    assert "There is no checkpoint none.keras" in run("show", "ckpt/none.keras", code=1)
    assert "without a record, left alone: mine.keras" in run("ls", "ckpt")


def test_verify_names_all_files_without_a_record_in_one_line(tmp_path, monkeypatch) -> None:
    """A folder of files that Keras wrote has no checkpoint to verify."""
    monkeypatch.chdir(tmp_path)
    for epoch in (1, 2, 3):
        pathlib.Path(f"{epoch}.keras").write_bytes(b"by Keras")

    text = run("verify", ".")

    assert text.endswith("without a record, cannot be verified: 1.keras, 2.keras, 3.keras\n")
    assert len(text.splitlines()) == 1
    assert json.loads(run("verify", "--json"))["without_sidecar"] == ["1.keras", "2.keras", "3.keras"]


def test_a_bug_is_not_shown_as_wrong_usage(runs, monkeypatch) -> None:
    """A ValueError from inside has a traceback, because it is not about the arguments."""

    def broken(*_: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(kc.CheckpointDirectory, "listing", broken)

    result = CliRunner().invoke(main, ["ls", "--json", runs.path])

    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)
    assert "Usage" not in result.output


def test_best_of_an_empty_directory_exits_with_1(tmp_path) -> None:
    """The path exists, but has no checkpoint."""
    assert "There is no checkpoint" in run("best", tmp_path, code=1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "{run}"],
        ["prune", "{run}", "--keep-latest", 0],
        ["prune", "{run}", "--keep-latest", "x"],
        ["prune", "{run}", "--keep-latest", 1, "--monitor", "loss"],
        ["best", "{run}", "--mode", "up"],
        ["prune", "{run}", "--keep-every-hours", "nan"],
        ["prune", "{run}", "--keep-within", "2"],
        ["prune", "{run}", "--keep-latest", 1, "--max-bytes", "5 potatoes"],
        ["prune", "{run}", "--max-count", 0],
        ["prune", "{run}", "--max-bytes", "1 GB", "--monitor", "loss"],
        ["pin", "{run}", 10, "x" * 5000],
        ["ls", "gs://bucket/run"],
        ["show", "{run}"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2_and_removes_nothing(runs, arguments) -> None:
    run(*(str(argument).replace("{run}", runs.path) for argument in arguments), code=2)

    assert len(runs) == 4


@pytest.mark.parametrize("name", main.commands)
def test_every_command_has_help_and_is_on_a_page(name) -> None:
    """A new command needs both."""
    text = run(name, "--help")

    assert f"Example: keras-ckpt {name}" in text
    assert any(f"keras-ckpt {name}" in page.read_text() for page in PAGES)


def test_the_help_of_demo_has_the_default_of_its_path() -> None:
    """The other commands read the current directory."""
    assert "Default of PATH: runs/demo." in run("demo", "--help")


def test_python_m_keras_ckpt_runs_the_command(runs) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "keras_ckpt", "ls", runs.path, "--json"], capture_output=True, check=True, text=True
    ).stdout

    assert len(json.loads(out)["checkpoints"]) == 4


def in_terminal(command: list[object], answer: str) -> tuple[str, int]:
    """The output and the exit code of a command in a terminal, in which a user types an answer."""
    master, slave = pty.openpty()
    words = [sys.executable, "-m", "keras_ckpt", *map(str, command)]
    with subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        os.write(master, answer.encode())
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while chunk := os.read(master, 1 << 16):
                shown += chunk
    os.close(master)
    return shown.decode(), process.returncode


@pytest.mark.parametrize(("answer", "left", "code"), [("y\n", 1, 0), ("n\n", 4, 1), ("\n", 4, 1)])
def test_prune_asks_at_a_terminal(runs, answer, left, code) -> None:
    """After it printed its plan. No answer means no."""
    text, exit_code = in_terminal(["prune", runs.path, "--keep-latest", 1], answer)

    assert text.index("1 kept, 3 removed") < text.index("Remove 3 checkpoints? [y/N]")
    assert len(runs) == left
    assert exit_code == code


@pytest.mark.parametrize("options", [["--keep-latest", 1, "--yes"], ["--keep-latest", 4], ["--keep-latest", 1, "-n"]])
def test_prune_does_not_ask_with_yes_or_if_it_removes_nothing(runs, options) -> None:
    text, exit_code = in_terminal(["prune", runs.path, *options], "")

    assert "[y/N]" not in text
    assert exit_code == 0


def completed(*words: object, kind: str = "plain") -> list[str]:
    """The completions that a shell gets for the last of some words: words, or the paths that it completes itself."""
    line = " ".join(["keras-ckpt", *map(str, words)])
    variables = {"_KERAS_CKPT_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    out = subprocess.run(
        [sys.executable, "-c", "from keras_ckpt.cli import main; main(prog_name='keras-ckpt')"],
        env={**os.environ, **variables}, capture_output=True, check=True, text=True,
    )  # fmt: skip
    return [line.removeprefix(f"{kind},") for line in out.stdout.splitlines() if line.startswith(f"{kind},")]


def test_a_shell_completes_steps(runs, monkeypatch) -> None:
    """After a PATH, and of the current directory without a PATH."""
    assert completed("show", runs.path, "") == ["latest", "best", "10", "20", "30", "40"]
    assert completed("pin", runs.path, "3") == ["30"]
    monkeypatch.chdir(runs.path)
    assert completed("show", "") == ["latest", "best", "10", "20", "30", "40"]
    assert completed("diff", "10", "3") == ["30"]


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5", "best.h5"])
def test_a_shell_completes_files_of_keras(tmp_path, monkeypatch, name) -> None:
    """A shell lists them beside directories, or after the steps of a command whose PATH may be missing."""
    monkeypatch.chdir(tmp_path)
    save_file(tmp_path / "runs" / name, 1, name)

    assert completed("ls", "runs/b", kind="file") == ["runs/b"]
    assert completed("show", "runs/b") == [f"runs/{name}"]
    monkeypatch.chdir("runs")
    assert completed("show", "be") == ["best", name]


def test_a_shell_completes_directories_alone_where_no_file_of_keras_is(runs) -> None:
    """The many files of TensorFlow checkpoints are no PATH."""
    assert completed("ls", f"{runs.path}/", kind="dir") == [f"{runs.path}/"]
    assert completed("ls", f"{runs.path}/", kind="file") == []


def test_a_shell_completes_metrics(runs, monkeypatch) -> None:
    """Those in a directory; without checkpoints, none."""
    assert completed("best", runs.path, "--monitor", "") == ["loss"]
    assert completed("prune", runs.path, "--monitor", "lo") == ["loss"]
    assert completed("best", "nowhere", "--monitor", "") == []
    monkeypatch.chdir(runs.path)
    assert completed("best", "--monitor", "") == ["loss"]


def test_a_shell_completes_commands_and_options() -> None:
    assert completed("pr") == ["prune"]
    assert "--keep-best" in completed("prune", "--keep")


def demonstrate(folder: pathlib.Path, name: str) -> str:
    """The output of the demo in a terminal of 80 columns. It prints nothing on the error stream."""
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    result = subprocess.run(
        [sys.executable, "-m", "keras_ckpt", "demo", name], capture_output=True, check=True, text=True, cwd=folder,
        env={**environment, "COLUMNS": "80"},
    )  # fmt: skip
    assert result.stderr == ""
    return result.stdout


def test_the_demo_shows_a_policy_and_restores_the_best(tmp_path) -> None:
    """The best epochs are in the middle, so that `BestN` and `LatestN` keep different checkpoints."""
    out = demonstrate(tmp_path, "demo")

    epochs = re.findall(r"^ +\d+ +\d\.\d{4}  ([\d ]+)$", out, re.MULTILINE)
    assert len(epochs) == 12
    on_disk = [int(epoch) for epoch in epochs[-1].split()]
    assert len(on_disk) == 5
    assert on_disk[3:] == [11, 12]
    assert 1 < on_disk[0] < on_disk[2] < 10
    assert out.count("keep  BestN(3, 'val_loss', 'min')") == 3
    assert out.count("keep  LatestN(2)") == 2
    assert "Both agree." in out
    assert max(map(len, out.splitlines())) <= 80
    assert [record.epoch for record in kc.CheckpointDirectory(tmp_path / "demo")] == [
        kc.CheckpointDirectory(tmp_path / "demo").best().epoch
    ]


def test_the_demo_can_run_again(fork_server, runs) -> None:
    """An earlier run stays, and the demo says where it trains."""
    path = pathlib.Path(runs.path)
    code = """
    import os, sys
    from keras_ckpt.cli import main
    os.environ["COLUMNS"] = "80"
    os.chdir(sys.argv[1])
    main(["demo", sys.argv[2]])
    """
    ended = fork_server.run(textwrap.dedent(code), str(path.parent), path.name)
    assert ended.returncode == 0, ended.stderr
    out = ended.stdout

    assert f"This run has a directory of its own: {path.name}/2" in out
    assert max(map(len, out.splitlines())) <= 80
    assert len(kc.CheckpointDirectory(f"{runs.path}/2")) == 1
    assert len(runs) == 4


def test_verify_finds_a_changed_byte(runs) -> None:
    """It exits with 1, names the checkpoint, and changes nothing."""
    data = pathlib.Path(runs[20].prefix + ".data-00000-of-00001")

    assert "4 checkpoints whole" in run("verify", runs.path)

    data.write_bytes(b"3" + data.read_bytes()[1:])
    before = sorted(pathlib.Path(runs.path).rglob("*"))

    text = run("verify", runs.path, code=1)
    assert re.search(r"^ckpt-20 +.*digest does not match", text, re.MULTILINE)
    assert "3 checkpoints whole" in text
    assert json.loads(run("verify", runs.path, "--json", code=1))["whole"] == [10, 30, 40]
    assert sorted(pathlib.Path(runs.path).rglob("*")) == before


def test_verify_shows_a_progress_bar_in_a_terminal(runs) -> None:
    """The bar is on the error stream."""
    script = "import sys, keras_ckpt.cli; keras_ckpt.cli.main(['verify', sys.argv[1]])"
    master, slave = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script, runs.path], stdout=subprocess.PIPE, stderr=slave) as process:
        printed, _ = process.communicate()
    os.close(slave)
    shown = os.read(master, 1 << 16)
    os.close(master)

    assert b"verifying" in shown
    assert b"verifying" not in printed
    assert b"4 checkpoints whole" in printed
