"""The command `keras-ckpt`: its output and its exit codes."""

import json
import os
import pathlib
import pty
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

import keras_ckpt as kc
from keras_ckpt.cli import main

README = pathlib.Path(__file__).parents[1] / "README.md"


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


def test_show_prints_all_facts_of_a_checkpoint(runs) -> None:
    """In lines, and as JSON."""
    text = run("show", runs.path, 20)

    assert re.search(r"^step +20$", text, re.MULTILINE)
    assert "ckpt-20.index" in text
    assert json.loads(run("show", runs.path, 20, "--json"))["step"] == 20


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

    assert out == f"{plan}\nDone.\n"
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
    ],
)
def test_prune_has_an_option_for_each_policy(runs, options, kept) -> None:
    """Several options keep the union."""
    run("prune", runs.path, *options)

    assert [record.step for record in runs] == kept


def test_pin_sets_a_reason_and_unpin_removes_the_pin(runs) -> None:
    run("pin", runs.path, 10, "paper figure 3")
    assert runs[10].pin == "paper figure 3"

    run("unpin", runs.path, 10)
    assert not runs[10].pinned


def test_clear_asks_for_confirmation(runs) -> None:
    """`n` aborts, and `--yes` does not ask."""
    run("clear", runs.path, answer="n\n", code=1)
    assert len(runs) == 4

    assert "Removed 4 checkpoints" in run("clear", runs.path, "--yes")
    assert len(runs) == 0


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
        (["ls", __file__], "this is a file"),
    ],
)
def test_a_missing_path_step_or_metric_exits_with_1(runs, arguments, text) -> None:
    """The output has the error of the library."""
    arguments = [str(argument).replace("{run}", runs.path) for argument in arguments]

    assert text in run(*arguments, code=1)


def test_show_of_a_damaged_checkpoint_exits_with_1(runs) -> None:
    """`ls` lists it with the others."""
    (pathlib.Path(runs.path) / "ckpt-20.json").write_text("")

    assert "cannot be used" in run("show", runs.path, 20, code=1)
    assert "damaged, left alone: ckpt-20" in run("ls", runs.path)


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
def test_every_command_has_help_and_is_in_the_readme(name) -> None:
    """A new command needs both."""
    text = run(name, "--help")

    assert f"Example: keras-ckpt {name}" in text
    assert f"keras-ckpt {name}" in README.read_text()


def test_python_m_keras_ckpt_runs_the_command(runs) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "keras_ckpt", "ls", runs.path, "--json"], capture_output=True, check=True, text=True
    ).stdout

    assert len(json.loads(out)["checkpoints"]) == 4


def test_the_demo_trains_restores_the_best_and_prunes(tmp_path) -> None:
    """It prints the table with reasons, and the restored metrics agree with the record."""
    out = subprocess.run(
        [sys.executable, "-m", "keras_ckpt", "demo", str(tmp_path / "demo")], capture_output=True, check=True, text=True
    ).stdout

    assert "BestN(3, 'val_accuracy', 'max')" in out
    assert "LatestN(2)" in out
    assert "They agree." in out
    assert len(kc.CheckpointDirectory(tmp_path / "demo")) == 1


def test_the_demo_refuses_a_directory_of_another_run(runs) -> None:
    """It exits with 1, and the error has the advice."""
    result = subprocess.run(
        [sys.executable, "-m", "keras_ckpt", "demo", runs.path], capture_output=True, check=False, text=True
    )

    assert result.returncode == 1
    assert "another directory" in result.stderr
    assert "Traceback" not in result.stderr
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
