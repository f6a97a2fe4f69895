"""`Runs`: which directories are runs, their table, the best checkpoint of all, and a prune of all runs."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
import tempfile
import textwrap
import threading

import pytest

import keras_ckpt as kc
from keras_ckpt.formats import sharing
from keras_ckpt.store.listing import taken
from keras_ckpt.store.writer import SaveRequest, Writer
from support.models import dense_model, fit
from support.runs import Filler, shared_payload, unprivileged_user
from test_cli import run
from test_series import save as save_file
from test_tables import screen

RANKED = {"monitor": "loss", "mode": "min"}


def search(root: pathlib.Path) -> kc.Runs:
    """Three runs of a search, each with three checkpoints: the second is the best of its run."""
    for number, (rate, units) in enumerate([(0.1, 64), (0.01, 64), (0.01, 16)]):
        losses = (0.5 - number / 10, 0.4 - number / 10, 0.45 - number / 10)
        text = " ".join(f"{10 * place}:{loss:.2f}" for place, loss in enumerate(losses, 1))
        facts = {"metadata": {"rate": rate, "units": units, "data": "digits"}, "epoch": 3, "time": 1.79e9}
        Filler(root / f"run{number}").save(text, **RANKED, **facts)
    return kc.Runs(root)


@pytest.fixture
def runs(tmp_path, monkeypatch) -> kc.Runs:
    monkeypatch.chdir(tmp_path)
    return search(tmp_path / "runs")


def names(runs: kc.Runs) -> list[str]:
    """The path of each run, and the template of its files, below the directory."""
    return [os.path.relpath(os.path.join(run.path, run.series.template), runs.path) for run in runs]


def kept(runs: kc.Runs) -> dict[str, list[int]]:
    """The steps that each run has on disk."""
    return {os.path.basename(run.path): [record.step for record in run] for run in runs}


class TestARun:
    def test_is_each_directory_with_sidecars_at_any_depth(self, tmp_path) -> None:
        """The directory itself, and runs below runs. Folders of one parent are in natural order."""
        for place in (".", "2", "10", "all/deep/er", "2/again"):
            Filler(tmp_path / place).save("10:0.5")

        assert names(kc.Runs(tmp_path)) == [".", "2", "2/again", "10", "all/deep/er"]
        assert len(kc.Runs(tmp_path)) == 5
        assert [len(run) for run in kc.Runs(tmp_path / "2")] == [1, 1]

    def test_is_no_backup(self, tmp_path) -> None:
        """Whatever the name of its directory. A run may have a `backup` below it that is a run."""
        callbacks = [
            kc.ModelCheckpoint(tmp_path / "run", monitor="loss"),
            kc.BackupAndRestore(tmp_path / "run" / "safe", delete_checkpoint=False),
        ]
        fit(dense_model(), *callbacks)
        Filler(tmp_path / "backup").save("10:0.5", **RANKED, metadata={"initial_epoch": 3})

        assert names(kc.Runs(tmp_path)) == ["run", "backup"]
        assert len(list(kc.CheckpointDirectory(tmp_path / "run" / "safe"))) == 1

    def test_is_each_series_of_files_of_keras(self, tmp_path) -> None:
        """Beside TensorFlow checkpoints too."""
        Filler(tmp_path / "both").save("10:0.5")
        save_file(tmp_path / "both" / "best.keras", 10, "best.keras")
        for step in (1, 2):
            save_file(tmp_path / "files" / "{epoch}.keras", step, f"{step}.keras")

        assert names(kc.Runs(tmp_path)) == ["both", "both/best.keras", "files/{epoch}.keras"]
        assert [len(run) for run in kc.Runs(tmp_path)] == [1, 1, 2]

    def test_has_its_files_in_folders_that_are_no_runs(self, tmp_path) -> None:
        """A template may have fields in its folders."""
        for epoch in (1, 2):
            save_file(tmp_path / "e{epoch}" / "model.keras", epoch, f"e{epoch}/model.keras")
        Filler(tmp_path / "e3").save("10:0.5")

        assert names(kc.Runs(tmp_path)) == ["e{epoch}/model.keras", "e3"]

    def test_is_no_folder_of_other_files(self, tmp_path) -> None:
        """JSON, data, checkpoints and models of other programs, links and hidden folders are no runs."""
        run = Filler(tmp_path / "run").save("10:0.5")
        for name in ("notes/history-2.json", "notes/images.h5", "tf/ckpt-1.index", "keras/model.keras", "empty/a.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"of another program")
        (tmp_path / "link").symlink_to(run.path)
        Filler(tmp_path / ".hidden").save("10:0.5")

        assert names(kc.Runs(tmp_path)) == ["run"]

    def test_may_have_damaged_checkpoints_alone(self, tmp_path) -> None:
        """A line below the table names them."""
        Filler(tmp_path / "run").save("10:0.5")
        (tmp_path / "run" / "ckpt-10.json").write_text("{}")

        *_, count, note = repr(kc.Runs(tmp_path)).splitlines()
        assert count == "1 run, 0 checkpoints, 0 bytes"
        assert note.startswith("damaged, left alone: run/ckpt-10: it is not a sidecar")


class TestTheTable:
    def test_has_the_metadata_that_differs_and_the_best_run_first(self, runs, monkeypatch) -> None:
        """A narrow terminal drops the columns that matter least."""
        assert screen(runs, 80, monkeypatch) == textwrap.dedent("""\
            runs
            rate  units  best loss  at step  steps  epochs      size             saved  run
            ────────────────────────────────────────────────────────────────────────────────
            0.01     16        0.2       20     30       3  39 bytes  2026-09-21 14:13  run2
            0.01     64        0.3       20     30       3  39 bytes  2026-09-21 14:13  run1
             0.1     64        0.4       20     30       3  39 bytes  2026-09-21 14:13  run0
            3 runs, 9 checkpoints, 117 bytes
            not shown in 80 columns: kept""")
        assert screen(runs, 40, monkeypatch).splitlines()[1] == "rate  units  best loss  at step  run"

    def test_has_runs_without_a_best_checkpoint_last(self, runs) -> None:
        """A run whose loss was never a number shows so. Of equal runs, the earlier is better."""
        Filler(pathlib.Path(runs.path, "nan")).save("10:nan", **RANKED)
        Filler(pathlib.Path(runs.path, "none")).save("10")
        Filler(pathlib.Path(runs.path, "early")).save("10:0.2", **RANKED, time=1.0)

        rows = [line.split() for line in repr(runs).splitlines()[3:9]]
        assert [row[-1] for row in rows] == ["early", "run2", "run1", "run0", "nan", "none"]
        assert "nan" in rows[4][:-1]

    def test_has_metadata_of_any_kind(self, tmp_path) -> None:
        """A value that a run lacks is empty. Control characters are escaped."""
        Filler(tmp_path / "a").save("10:0.5", **RANKED, metadata={"kind": "x\x1b[31m", "sizes": [1, 2]})
        Filler(tmp_path / "b").save("10:0.6", **RANKED, metadata={"kind": None, "sizes": {"a": 1}})

        table = repr(kc.Runs(tmp_path)).splitlines()
        assert table[1].split()[:2] == ["kind", "sizes"]
        assert table[3].startswith("x\\x1b[31m  [1,2]")
        assert table[4].split()[0] == '{"a":1}'

    def test_is_in_order_of_the_paths_without_a_metric(self, tmp_path) -> None:
        for name in ("b", "a"):
            Filler(tmp_path / name).save("10")

        assert [line.split()[-1] for line in repr(kc.Runs(tmp_path)).splitlines()[3:5]] == ["a", "b"]

    def test_of_many_runs_has_the_best(self, tmp_path) -> None:
        for number in range(45):
            Filler(tmp_path / f"{number}").save(f"1:{number}", **RANKED)

        table = repr(kc.Runs(tmp_path)).splitlines()
        assert [line.split()[-1] for line in table[3:43]] == [str(number) for number in range(40)]
        assert table[43].strip() == "... 5 more"
        assert table[44].startswith("45 runs, 45 checkpoints")

    def test_is_the_same_in_a_notebook(self, runs) -> None:
        assert "<strong>runs</strong><table>" in runs._repr_html_()
        assert "3 runs, 9 checkpoints, 117 bytes" in runs._repr_html_()

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("absent", "no runs: the directory does not exist"),
            ("", "no runs: nothing was saved"),
            ("file", "Not a dir"),
        ],
    )
    def test_of_no_runs_says_why(self, tmp_path, name, reason) -> None:
        """A `repr` never raises."""
        (tmp_path / "file").write_text("")

        assert reason in repr(kc.Runs(tmp_path / name))

    def test_counts_files_that_checkpoints_share_once(self, tmp_path, monkeypatch) -> None:
        """By their digests, without a look at the files."""
        monkeypatch.setattr(sharing, "_WORTHWHILE", 1)
        run = kc.CheckpointDirectory(tmp_path)
        for step in (10, 20):
            Writer(run).save(SaveRequest(step=step, run_id="run", **RANKED), shared_payload(run, f"{step}"))

        [facts] = kc.Runs(tmp_path).facts()
        assert facts["size"] == taken(list(run)) < sum(record.size for record in run)


class TestTheBest:
    def test_is_the_best_of_all_runs(self, runs) -> None:
        """The mode is in the sidecars, or given."""
        assert runs.best().prefix == f"{runs.path}/run2/ckpt-20"
        assert runs.best("loss").metrics == {"loss": 0.2}
        assert runs.best("loss", mode="max").prefix == f"{runs.path}/run0/ckpt-10"

    def test_is_by_the_metric_that_most_runs_monitor(self, runs) -> None:
        """A run that monitors another metric takes part if it has the metric."""
        Filler(pathlib.Path(runs.path, "other")).save("10:0.1", monitor="accuracy", mode="max", time=1.9e9)
        Filler(pathlib.Path(runs.path, "loop")).save("10:0.15", time=1.9e9)

        assert runs.best().prefix == f"{runs.path}/other/ckpt-10"

    def test_is_the_earlier_of_equal_checkpoints(self, runs) -> None:
        Filler(pathlib.Path(runs.path, "late")).save("10:0.2", **RANKED, time=1.9e9)
        assert runs.best().prefix == f"{runs.path}/run2/ckpt-20"

        Filler(pathlib.Path(runs.path, "soon")).save("10:0.2", **RANKED, time=1.0)
        assert runs.best().prefix == f"{runs.path}/soon/ckpt-10"

    def test_is_no_damaged_checkpoint(self, runs) -> None:
        pathlib.Path(runs.path, "run2", "ckpt-20.index").write_bytes(b"cut")

        assert runs.best().prefix == f"{runs.path}/run2/ckpt-30"

    def test_is_none_without_checkpoints(self, tmp_path) -> None:
        assert kc.Runs(tmp_path).best() is None
        assert kc.Runs(tmp_path / "absent").best("loss", "min") is None

    def test_by_an_unknown_metric_is_an_error_that_names_the_metrics(self, runs) -> None:
        with pytest.raises(kc.CheckpointNotFoundError, match=r"Recorded metrics: loss. Did you mean 'loss'\?"):
            runs.best("los")

    def test_by_a_metric_without_a_finite_value_is_an_error(self, tmp_path) -> None:
        Filler(tmp_path / "run").save("10:nan 20:inf", **RANKED)

        with pytest.raises(kc.CheckpointNotFoundError, match="found no finite value"):
            kc.Runs(tmp_path).best()

    def test_without_a_mode_is_an_error(self, tmp_path) -> None:
        Filler(tmp_path / "run").save("10:0.5")

        with pytest.raises(kc.MonitorError, match="has no metric"):
            kc.Runs(tmp_path).best()
        with pytest.raises(kc.MonitorError, match="give the mode"):
            kc.Runs(tmp_path).best("loss")


class TestAPrune:
    def test_keeps_in_each_run_what_the_policy_keeps_there(self, runs) -> None:
        """Also with a plan made before. The removed checkpoints are returned."""
        plan = runs.plan(kc.BestN(1) | kc.LatestN(1))
        assert kept(runs) == {f"run{number}": [10, 20, 30] for number in range(3)}
        assert [record.step for record in plan.kept] == [20, 30] * 3

        removed = runs.prune(plan)

        assert [record.prefix for record in removed] == [f"{runs.path}/run{number}/ckpt-10" for number in range(3)]
        assert kept(runs) == {f"run{number}": [20, 30] for number in range(3)}
        assert runs.prune(kc.BestN(1)) == [record for record in plan.kept if record.step == 30]
        assert runs.prune(kc.BestN(1)) == []

    def test_has_a_plan_with_a_row_for_each_run(self, runs, monkeypatch) -> None:
        kc.CheckpointDirectory(f"{runs.path}/run1").prune(kc.LatestN(1))
        pathlib.Path(runs.path, "run0", "ckpt-10.json").write_text("{}")

        text = screen(runs.plan(kc.LatestN(1)), 60, monkeypatch)
        assert text.startswith(
            textwrap.dedent("""\
            keep LatestN(1) in each run
            keep  remove     frees  run
            ────────────────────────────
            30    20      13 bytes  run0
            30                      run1
            30    10, 20  26 bytes  run2
            3 runs: 3 kept, 3 removed, which frees 39 bytes
            damaged, left alone: run0/ckpt-10: it is not a sidecar""")
        )

    def test_keeps_pinned_checkpoints_and_backups(self, runs) -> None:
        Filler(pathlib.Path(runs.path, "run0", "backup")).save("10 20", metadata={"initial_epoch": 0})
        kc.CheckpointDirectory(f"{runs.path}/run1").pin(10)

        runs.prune(kc.LatestN(1))

        assert kept(runs) == {"run0": [30], "run1": [10, 30], "run2": [30]}
        assert len(kc.CheckpointDirectory(f"{runs.path}/run0/backup")) == 2

    def test_is_refused_before_it_removes_anything_if_a_run_lacks_the_metric(self, runs) -> None:
        """The error names the run."""
        Filler(pathlib.Path(runs.path, "run9")).save("10 20", monitor="accuracy", mode="max")

        with pytest.raises(kc.PlanError, match=r"^No plan for runs/run9: .* ranks by 'loss', which no checkpoint has"):
            runs.prune(kc.BestN(1, "loss", "min"))

        assert kept(runs)["run0"] == [10, 20, 30]

    def test_is_refused_before_it_removes_anything_if_a_run_would_keep_a_damaged_checkpoint(self, runs) -> None:
        """Every byte of the checkpoints that stay is read in all runs first."""
        data = pathlib.Path(runs.path, "run2", "ckpt-20.index")
        data.write_bytes(bytes(len(data.read_bytes())))

        with pytest.raises(kc.PlanError, match=r"Nothing was removed: .*run2/ckpt-20, which is damaged"):
            runs.prune(kc.BestN(1))

        assert kept(runs) == {f"run{number}": [10, 20, 30] for number in range(3)}

    def test_that_fails_in_a_later_run_tells_what_was_removed_before(self, runs) -> None:
        """The checkpoint that the plan keeps was removed after the plan."""
        plan = runs.plan(kc.LatestN(1))
        for part in pathlib.Path(runs.path, "run1").glob("ckpt-30*"):
            part.unlink()

        with pytest.raises(
            kc.PlanError, match=r"no longer in .*run1.* Before, 2 checkpoints of other runs were removed"
        ):
            runs.prune(plan)

        assert kept(runs) == {"run0": [30], "run1": [10, 20], "run2": [10, 20, 30]}

    @pytest.mark.parametrize(("keep", "error"), [(None, TypeError), ("2", TypeError), (0, ValueError)])
    def test_needs_a_policy(self, tmp_path, keep, error) -> None:
        with pytest.raises(error):
            kc.Runs(tmp_path).plan(keep)

    def test_needs_a_plan_of_its_runs_or_a_policy(self, runs) -> None:
        """A number might be meant as a step."""
        with pytest.raises(TypeError, match="takes a plan, or a policy"):
            runs.prune(1)
        with pytest.raises(ValueError, match="The plan is for"):
            runs.prune(kc.Runs(f"{runs.path}/run0").plan(1))


class TestDisturbedReads:
    def test_of_runs_that_are_saved_pruned_and_removed_meanwhile_raise_nothing(self, runs) -> None:
        """Another thread saves, prunes and deletes runs, while each reader reads."""
        ended = threading.Event()

        def disturb() -> None:
            filler = Filler(pathlib.Path(runs.path, "busy"))
            for number in range(30):
                filler.save(f"{10 * number + 1}:0.5 {10 * number + 2}:0.4", kc.LatestN(2), **RANKED)
                gone = pathlib.Path(runs.path, f"gone{number % 2}")
                Filler(gone).save("10:0.5", **RANKED)
                shutil.rmtree(gone)
            ended.set()

        thread = threading.Thread(target=disturb)
        thread.start()
        while not ended.is_set():
            assert all(f"run{number}\n" in repr(runs) for number in range(3))
            assert runs.best().prefix.startswith(f"{runs.path}/run2")
            assert len(runs.plan(kc.LatestN(1)).kept) >= 3
            assert {"run0", "run1", "run2"} <= kept(runs).keys()
        thread.join()

    def test_of_a_folder_that_cannot_be_read_show_the_others(self) -> None:
        """The table has a line, and the other methods a warning."""
        with tempfile.TemporaryDirectory(dir="/tmp") as path:  # all users may enter /tmp
            os.chmod(path, 0o755)
            runs = search(pathlib.Path(path))
            os.chmod(f"{path}/run2", 0)

            with unprivileged_user():
                assert repr(runs).splitlines()[-1].startswith(f"cannot be read: {path}/run2: ")
                with pytest.warns(UserWarning, match="run2 is skipped, because it cannot be read"):
                    assert runs.best().prefix == f"{path}/run1/ckpt-20"

    def test_of_a_file_are_an_error(self, tmp_path) -> None:
        (tmp_path / "file").write_text("")

        with pytest.raises(NotADirectoryError):
            kc.Runs(tmp_path / "file").best()


class TestTheFacts:
    def test_are_those_of_the_best_checkpoint_and_of_the_run(self, runs) -> None:
        best, *_ = runs.facts()

        assert best.pop("saved_at") == kc.CheckpointDirectory(f"{runs.path}/run2")[30].saved_at
        assert best == {
            "run": "run2",
            "path": f"{runs.path}/run2",
            "metadata": {"rate": 0.01, "units": 16, "data": "digits"},
            "metrics": {"loss": 0.2},
            "best_step": 20,
            "step": 30,
            "epoch": 3,
            "checkpoints": 3,
            "size": 39,
        }

    def test_are_a_data_frame_with_a_row_for_each_run(self, runs) -> None:
        pytest.importorskip("pandas")

        frame = runs.to_pandas()

        assert list(frame["run"]) == ["run2", "run1", "run0"]
        assert list(frame["metadata.rate"]) == [0.01, 0.01, 0.1]
        assert list(frame["metrics.loss"]) == [0.2, 0.3, 0.4]

    def test_need_pandas_for_a_data_frame(self, runs, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "pandas", None)

        with pytest.raises(ImportError, match="pip install pandas"):
            runs.to_pandas()


@pytest.mark.parametrize("path", ["", "gs://bucket/runs", None])
def test_the_path_is_a_local_directory(path) -> None:
    with pytest.raises((ValueError, TypeError)):
        kc.Runs(path)


class TestTheCommandLine:
    """A directory that holds no run itself means the runs below it."""

    def test_ls_prints_the_table_of_the_runs(self, runs) -> None:
        assert run("ls", runs.path) == f"{runs}\n"

    def test_ls_prints_the_facts_as_json(self, runs) -> None:
        listed = json.loads(run("ls", runs.path, "--json"))["runs"]

        assert [(each["run"], each["metadata"]["rate"], each["best_step"]) for each in listed] == [
            ("run2", 0.01, 20),
            ("run1", 0.01, 20),
            ("run0", 0.1, 20),
        ]

    def test_ls_of_a_directory_with_a_run_prints_its_checkpoints(self, runs) -> None:
        """Runs below it are in a line."""
        Filler(pathlib.Path(runs.path)).save("10:0.5")

        assert run("ls", runs.path) == f"{kc.CheckpointDirectory(runs.path)}\n"

    def test_best_prints_the_best_checkpoint_of_all_runs(self, runs) -> None:
        assert run("best", runs.path, "--path") == f"{runs.path}/run2/ckpt-20\n"
        assert run("best", runs.path, "--path", "--mode", "max", "--monitor", "loss") == f"{runs.path}/run0/ckpt-10\n"

    def test_prune_prints_one_plan_and_removes_in_all_runs(self, runs) -> None:
        options = ("--keep-best", 1, "--keep-latest", 1)

        assert "3 runs: 6 kept, 3 removed, which frees 39 bytes" in run("prune", runs.path, *options, "--dry-run")
        assert kept(runs)["run0"] == [10, 20, 30]
        assert run("prune", runs.path, *options).endswith("Removed 3 checkpoints.\n")
        assert kept(runs) == {f"run{number}": [20, 30] for number in range(3)}

    def test_prune_prints_the_plan_of_each_run_as_json(self, runs) -> None:
        plans = json.loads(run("prune", runs.path, "--keep-latest", 1, "--json", "--dry-run"))["runs"]

        assert [os.path.basename(plan["path"]) for plan in plans] == ["run0", "run1", "run2"]
        assert [each["kept"] for each in plans[0]["checkpoints"]] == [False, False, True]

    def test_prune_that_is_refused_in_a_run_removes_nothing(self, runs) -> None:
        Filler(pathlib.Path(runs.path, "nan")).save("10:nan", **RANKED)

        assert "No plan for runs/nan" in run("prune", runs.path, "--keep-best", 1, code=1)
        assert kept(runs)["run0"] == [10, 20, 30]
