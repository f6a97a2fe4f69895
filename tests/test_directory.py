"""The directory: each call reads it again, plans come before removals, and damaged checkpoints are never removed."""

import errno
import fcntl
import json
import os
import pathlib
import shutil

import pytest

from keras_ckpt.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    DirectoryInUseError,
    FormatVersionError,
    PlanError,
)
from keras_ckpt.store import commit, files
from keras_ckpt.store.checks import check_files, held
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.policies import BestN, EveryNSteps, LatestN
from keras_ckpt.store.writer import SaveRequest, Writer
from support.runs import payload
from test_record import sealed


def names(runs: CheckpointDirectory) -> list[str]:
    """The names in the directory, without the package's private folder."""
    return sorted(set(os.listdir(runs.path)) - {".keras_ckpt", "journal.jsonl"})


def files_of(step: int) -> list[str]:
    return [f"ckpt-{step}.data-00000-of-00001", f"ckpt-{step}.index", f"ckpt-{step}.json"]


def test_a_directory_is_a_collection_of_records(filler) -> None:
    """A directory has a length, iterates in the order of saving, and is indexed by step."""
    runs = filler.save("30:1 10:2 20:3")

    assert len(runs) == 3
    assert [record.step for record in runs] == [30, 10, 20]
    assert runs[10].metrics == {"loss": 2.0}
    assert runs.latest().step == 20


def test_a_missing_directory_is_empty() -> None:
    """A directory need not exist before the first training."""
    runs = CheckpointDirectory("never there")

    assert len(runs) == 0
    assert list(runs) == []
    assert runs.latest() is None
    assert runs.best() is None
    assert runs.clear() == []
    assert runs.plan(BestN(1)).decisions == ()
    assert "no checkpoints" in str(runs)


def test_none_as_a_step_is_refused_with_its_probable_origin(filler) -> None:
    """`runs.pin(runs.best())` says that `best()` of an empty directory returns None."""
    runs = filler.save("10")

    with pytest.raises(TypeError, match=r"latest\(\) and best\(\) return"):
        runs.pin(CheckpointDirectory("never there").best())


def test_each_call_reads_the_directory_again(filler) -> None:
    """A directory sees the changes of other processes."""
    runs = filler.save("10:1 20:2")
    assert len(runs) == 2

    (pathlib.Path(runs.path) / "ckpt-10.json").unlink()

    assert [record.step for record in runs] == [20]


def test_a_directory_can_be_moved(filler, tmp_path) -> None:
    """No file in a directory has its path."""
    filler.save("10:1 20:2")
    os.rename(tmp_path / "run", tmp_path / "moved")

    moved = CheckpointDirectory(tmp_path / "moved")

    assert moved.best("loss", "min").prefix == str(tmp_path / "moved" / "ckpt-10")


def test_a_relative_path_survives_a_change_of_the_working_directory(filler, tmp_path, monkeypatch) -> None:
    """The path is made absolute at construction."""
    filler.save("10:1")
    monkeypatch.chdir(tmp_path)
    runs = CheckpointDirectory("run")
    monkeypatch.chdir("/")

    assert len(runs) == 1


def test_the_error_of_an_unknown_step_lists_the_known_steps(filler) -> None:
    """The error is a KeyError whose text is a sentence."""
    runs = filler.save("10:1 20:2")

    with pytest.raises(KeyError) as caught:
        runs[15]

    assert isinstance(caught.value, CheckpointNotFoundError)
    assert str(caught.value) == f"No checkpoint of step 15 in {runs.path}. There are the steps 10, 20."


def test_best_defaults_to_the_monitor_and_mode_of_training(filler) -> None:
    """Without arguments, `best()` takes the monitor and the mode of the sidecars."""
    runs = filler.save("10:0.5 20:0.4 30:0.4 40:nan", monitor="loss", mode="min")

    assert runs.best().step == 20
    assert runs.best(mode="max").step == 10
    assert runs.best("loss", "max").step == 10


@pytest.mark.parametrize(
    ("saved", "facts", "arguments", "error", "text"),
    [
        ("10:1", {}, ("lost", "min"), CheckpointNotFoundError, "Recorded metrics: loss"),
        ("10:nan", {}, ("loss", "min"), CheckpointNotFoundError, "no finite value"),
        ("10:1", {}, ("loss",), ValueError, "give the mode, 'min' or 'max'"),
        ("10:1", {}, (), ValueError, "no metric to rank by"),
        ("10:1", {}, ("loss", "best"), ValueError, "'min' or 'max'"),
    ],
)
def test_best_without_a_result_says_why(filler, saved, facts, arguments, error, text) -> None:
    """An unknown metric, no finite value and no mode have different errors."""
    runs = filler.save(saved, **facts)

    with pytest.raises(error, match=text):
        runs.best(*arguments)


def test_a_plan_says_for_each_checkpoint_whether_it_stays_and_why(filler) -> None:
    """Each decision has the record, and the policies that keep it, or why none does."""
    runs = filler.save("10:0.1 20:0.5 30:0.4")

    plan = runs.plan(LatestN(1) | BestN(1, "loss", "min") | EveryNSteps(1000))

    assert [(each.record.step, each.kept, each.reason) for each in plan.decisions] == [
        (10, True, "BestN(1, 'loss', 'min'), EveryNSteps(1000)"),
        (
            20,
            False,
            "LatestN(1): 30 is newer; BestN(1, 'loss', 'min'): 0.5 is 3rd; "
            "EveryNSteps(1000): 10 is the first of 0 to 999",
        ),
        (30, True, "LatestN(1)"),
    ]
    assert [record.step for record in plan.kept] == [10, 30]
    assert [record.step for record in plan.removed] == [20]
    assert len(runs) == 3


def test_pruning_removes_the_files_of_a_plan_and_nothing_else(filler) -> None:
    """Data, index and sidecar go; foreign files stay."""
    runs = filler.save("10:0.1 20:0.5 30:0.4")
    for name in ("notes.txt", "ckpt-20.png", "history-20.json", "ckpt-2.index"):
        (pathlib.Path(runs.path) / name).write_text("mine")

    assert runs.prune(runs.plan(LatestN(1))) == [10, 20]

    assert names(runs) == sorted(
        ["checkpoint", *files_of(30), "ckpt-2.index", "ckpt-20.png", "history-20.json", "notes.txt"]
    )


def test_pruning_updates_the_state_file_of_tensorflow(filler) -> None:
    """The state file names the newest checkpoint and all other remaining checkpoints."""
    runs = filler.save("10:0.1 20:0.5 30:0.4")
    runs.prune(BestN(2, "loss", "min"))

    state = (pathlib.Path(runs.path) / "checkpoint").read_text()

    assert 'model_checkpoint_path: "ckpt-30"' in state
    assert [line.split('"')[1] for line in state.splitlines() if line.startswith("all_model_checkpoint_paths")] == [
        "ckpt-10",
        "ckpt-30",
    ]


def test_prune_skips_checkpoints_pinned_or_saved_again_after_the_plan(filler) -> None:
    """A plan removes only the saves that it was made for."""
    runs = filler.save("10 20 30 40")
    plan = runs.plan(LatestN(1))
    runs.pin(10, "since")
    filler.save("20")

    assert runs.prune(plan) == [30]
    assert [record.step for record in runs] == [10, 40, 20]


def test_a_plan_of_another_directory_is_refused(filler, tmp_path) -> None:
    """The steps of one run mean nothing in another run."""
    runs = filler.save("10 20")
    plan = runs.plan(LatestN(1))

    with pytest.raises(ValueError, match=r"The plan is for .*, not for "):
        CheckpointDirectory(tmp_path / "other").prune(plan)


def test_a_plan_that_would_keep_nothing_is_an_error(filler) -> None:
    """A policy that selects no checkpoint is a mistake."""
    runs = filler.save("10:nan 20:nan")

    with pytest.raises(PlanError, match=r"would keep none of the 2 checkpoints.* use clear\(\)"):
        runs.plan(BestN(1, "loss", "min"))


def test_a_plan_by_a_metric_that_no_checkpoint_has_is_an_error(filler) -> None:
    """A typo does not delete a run."""
    runs = filler.save("10:1 20:2")

    with pytest.raises(PlanError, match=r"ranks by 'val_los', which no checkpoint has\. Recorded metrics: loss"):
        runs.plan(BestN(1, "val_los", "min") | LatestN(1))


def test_a_pin_overrides_every_policy_until_unpin(filler) -> None:
    """The plan shows the reason of the pin."""
    runs = filler.save("10 20 30")
    runs.pin(10, "paper figure 3")

    assert runs[10].pin == "paper figure 3"
    assert runs.plan(LatestN(1)).decisions[0].reason == "pinned: paper figure 3"
    assert runs.prune(LatestN(1)) == [20]

    runs.unpin(10)
    runs.unpin(10)
    assert runs.prune(LatestN(1)) == [10]


def test_a_touch_in_a_shell_is_a_pin(filler) -> None:
    """`touch ckpt-10.keep` pins step 10."""
    runs = filler.save("10 20")
    (pathlib.Path(runs.path) / "ckpt-10.keep").touch()

    assert runs[10].pinned
    assert runs.prune(LatestN(1)) == []


@pytest.mark.parametrize("method", ["pin", "unpin", "add_metrics"])
def test_changing_an_unknown_step_is_an_error(filler, method) -> None:
    """The failed call leaves no files."""
    runs = filler.save("10")
    before = names(runs)

    with pytest.raises(CheckpointNotFoundError):
        getattr(runs, method)(11)

    assert names(runs) == before


def test_a_pins_reason_is_bounded(filler) -> None:
    """A reason has at most 4096 bytes."""
    with pytest.raises(ValueError, match="at most 4096 bytes"):
        filler.save("10").pin(10, "x" * 5000)


def test_metrics_are_added_to_the_sidecar(filler) -> None:
    """Other metrics stay. A dict takes names that are not identifiers."""
    runs = filler.save("10:0.5 20:0.4")
    data = (pathlib.Path(runs.path) / "ckpt-10.index").read_bytes()

    runs.add_metrics(10, {"top-5 accuracy": 0.99}, test_accuracy=0.97)
    runs.add_metrics(10, test_accuracy=0.98)

    assert runs[10].metrics == {"loss": 0.5, "top-5 accuracy": 0.99, "test_accuracy": 0.98}
    assert runs.best("test_accuracy", "max").step == 10
    assert (pathlib.Path(runs.path) / "ckpt-10.index").read_bytes() == data


def test_metrics_are_added_with_their_modes(filler) -> None:
    """Then `best` needs no mode. A wrong mode is refused, and changes nothing."""
    runs = filler.save("10 20")
    for step, value in ((10, 0.5), (20, 0.75)):
        runs.add_metrics(step, {"f1": value}, {"f1": "max"})
    runs.add_metrics(10, {"error": 0.1}, {"error": "min"})

    assert runs.best("f1").step == 20
    assert runs[10].modes == {"f1": "max", "error": "min"}
    with pytest.raises(ValueError, match=r"expected mode 'min' or 'max' for each metric\. Received: .*'up'"):
        runs.add_metrics(20, {"f1": 0.9}, {"f1": "up"})
    assert runs[20].metrics == {"f1": 0.75}


@pytest.mark.parametrize("value", [[0.5, 0.4], [], [True], "0.5", None, True, {}, 1j])
def test_a_metric_that_is_not_one_number_is_refused(filler, value) -> None:
    """The error shows the received value."""
    with pytest.raises(TypeError, match=r"A metric is one number\. Received: accuracy="):
        filler.save("10").add_metrics(10, accuracy=value)


def test_clear_removes_the_run_and_nothing_else(filler) -> None:
    """Afterwards another run can use the directory."""
    runs = filler.save("10 20")
    (pathlib.Path(runs.path) / "notes.txt").write_text("mine")

    assert runs.clear() == [10, 20]
    assert names(runs) == ["notes.txt"]


def test_clear_refuses_pinned_checkpoints(filler) -> None:
    """The error names the steps and the argument that removes them."""
    runs = filler.save("10 20")
    runs.pin(10)

    with pytest.raises(PlanError, match=r"pinned checkpoints: \[10\].*clear\(pinned=True\)"):
        runs.clear()

    assert len(runs) == 2


def test_clear_with_pinned_removes_pinned_checkpoints(filler) -> None:
    """The pins go with the checkpoints."""
    runs = filler.save("10 20")
    runs.pin(10)

    assert runs.clear(pinned=True) == [10, 20]
    assert names(runs) == []


class TestARecordAsAStep:
    """A record that one method returns is an argument of another."""

    def test_is_accepted(self, filler) -> None:
        runs = filler.save("10:0.5 20:0.4", monitor="loss", mode="min")

        runs.pin(runs.best(), "the best")
        runs.add_metrics(runs.best(), accuracy=0.9)

        assert runs[runs.best()].metrics == {"loss": 0.4, "accuracy": 0.9}
        assert runs[20].pin == "the best"
        runs.unpin(runs.best())
        assert runs[20].pin is None

    def test_is_refused_if_it_was_saved_again(self, filler) -> None:
        """The pin was meant for the older save."""
        runs = filler.save("10 20")
        old = runs[20]
        filler.save("20")

        with pytest.raises(CheckpointNotFoundError, match="was saved again after this record was read"):
            runs.pin(old)
        assert runs[20].pin is None

    def test_is_refused_if_it_belongs_to_another_directory(self, filler, tmp_path) -> None:
        """The other directory may have a checkpoint of the same step."""
        runs = filler.save("10")
        shutil.copytree(runs.path, tmp_path / "copy")

        with pytest.raises(ValueError, match="The record belongs to"):
            CheckpointDirectory(tmp_path / "copy").pin(runs[10])


def test_clear_is_refused_while_another_process_trains(tmp_path, holder) -> None:
    """The error names the process."""
    with pytest.raises(DirectoryInUseError, match=f"process {holder.pid} "):
        CheckpointDirectory(tmp_path).clear()


def test_in_finds_a_step_or_a_record(filler) -> None:
    """`in` accepts the same keys as `[]`."""
    runs = filler.save("10 20")

    assert 10 in runs
    assert runs[10] in runs
    assert 15 not in runs
    assert "ckpt-10" not in runs


def test_pruning_by_a_number_is_refused(filler) -> None:
    """A user might mean `prune(10)` as a step."""
    runs = filler.save("10 20")

    with pytest.raises(TypeError, match="Received: 10"):
        runs.prune(10)


def test_clear_keeps_a_file_named_checkpoint_without_checkpoints(tmp_path) -> None:
    """The file may belong to another program."""
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "/runs/a/model-5"\n')

    assert CheckpointDirectory(tmp_path).clear() == []
    assert (tmp_path / "checkpoint").exists()


def test_clear_keeps_the_state_file_of_tensorflows_checkpoints(tmp_path) -> None:
    """Checkpoints without a sidecar stay, and their state file with them."""
    (tmp_path / "ckpt-1.index").touch()
    state = tmp_path / "checkpoint"
    state.write_text('model_checkpoint_path: "ckpt-1"\n')

    assert CheckpointDirectory(tmp_path).clear() == []
    assert state.exists()


def test_prune_works_on_a_full_disk(filler, monkeypatch) -> None:
    """If the state file cannot be written before the removal, it is written after it."""
    runs = filler.save("10 20 30")
    write, calls = commit.write_state, []

    def full_at_first(*arguments):
        calls.append(len(runs))
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(commit, "write_state", full_at_first)

    assert runs.prune(LatestN(1)) == [10, 20]
    assert calls == [3, 1]


def test_plan_accepts_each_policy_that_fit_accepted(filler) -> None:
    """The sidecars have the mode of every metric that fit ranked by."""
    runs = filler.save("10:0.5 20:0.2", monitor="val_loss", mode="min", modes={"loss": "max"})

    assert runs.plan(BestN(1, "loss")).kept == (runs[10],)
    assert runs.best("loss").step == 10


@pytest.mark.parametrize("change", ["pruned", "saved again"])
def test_a_checkpoint_that_changes_during_a_listing_is_not_damaged(filler, monkeypatch, change) -> None:
    """A training may prune a checkpoint or save it again after its sidecar was read."""
    runs = filler.save("10 20")

    def changed_first(folder: Folder, name: str) -> int:
        monkeypatch.undo()
        if change == "pruned":
            runs.prune(LatestN(1))
        else:
            Writer(runs).save(SaveRequest(step=10), payload(b"again"))
        return folder.size(name)

    monkeypatch.setattr(Folder, "size", changed_first)
    listing = runs.listing()

    assert listing.damaged == {}
    assert [record.step for record in listing.records] == ([20] if change == "pruned" else [20, 10])


def test_a_checkpoint_published_or_removed_during_a_listing_is_not_unmanaged(filler, monkeypatch) -> None:
    """The names are read before one sidecar is published and other data is removed."""
    runs = filler.save("10 20")
    names = (set(os.listdir(runs.path)) - {"ckpt-20.json"}) | {"ckpt-5.index"}
    monkeypatch.setattr(Folder, "names", lambda folder: names)

    assert runs.listing().unmanaged == ()


def test_a_checkpoint_with_a_withdrawn_sidecar_is_not_unmanaged(filler) -> None:
    """Another process may list the directory between the withdrawal of a sidecar and the removal of its data."""
    runs = filler.save("10 20")
    trash = pathlib.Path(runs.path) / ".keras_ckpt" / "trash"
    os.rename(pathlib.Path(runs.path) / "ckpt-10.json", trash / "ckpt-10.json")

    assert runs.listing().unmanaged == ()


def damage(runs: CheckpointDirectory, name: str, data: bytes | None) -> None:
    path = pathlib.Path(runs.path) / name
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)


HOSTILE = {
    "empty": ("ckpt-20.json", b""),
    "cut": ("ckpt-20.json", b'{"format": "keras_ckpt", "format_v'),
    "no JSON": ("ckpt-20.json", b"weights"),
    "of wrong types": ("ckpt-20.json", b'{"format": "keras_ckpt", "format_version": 1, "step": "20"}'),
    "deeply nested": ("ckpt-20.json", b"[" * 100_000),
    "huge": ("ckpt-20.json", b" " * (2 << 20)),
    "cut data": ("ckpt-20.data-00000-of-00001", b"2"),
    "without data": ("ckpt-20.data-00000-of-00001", None),
    "without index": ("ckpt-20.index", None),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_damaged_checkpoint_is_listed_as_damaged_and_left_alone(filler, kind) -> None:
    """Other checkpoints are listed and pruned; a damaged checkpoint is not counted, not found and not removed."""
    runs = filler.save("10 20 30 40")
    damage(runs, *HOSTILE[kind])
    before = {name for name in names(runs) if name.startswith("ckpt-20")}

    assert [record.step for record in runs.listing().records] == [10, 30, 40]
    assert "damaged, left alone: ckpt-20:" in str(runs)
    with pytest.raises(DamagedCheckpointError, match=r"ckpt-20 in .* cannot be used"):
        runs[20]
    assert runs.prune(LatestN(1)) == [10, 30]
    assert before <= set(names(runs))


def test_a_checkpoint_with_truncated_data_is_neither_best_nor_latest(filler) -> None:
    """A plan does not count it as kept either."""
    runs = filler.save("10:0.3 20:0.2 30:0.1")
    damage(runs, "ckpt-30.data-00000-of-00001", b"3")

    assert runs.latest().step == 20
    assert runs.best("loss", "min").step == 20
    assert [record.step for record in runs.plan(LatestN(1)).kept] == [20]
    assert runs.prune(LatestN(1)) == [10]


def test_a_sidecar_that_names_other_files_removes_none_of_them(filler, tmp_path) -> None:
    """A path in a file list makes the checkpoint damaged, so pruning never follows the path."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    runs = filler.save("10 20")
    path = pathlib.Path(runs.path) / "ckpt-10.json"
    facts = json.loads(path.read_text())
    del facts["digest"]
    with Folder(tmp_path) as folder:
        size, digest = folder.digest("victim")
    facts["files"].append({"name": "../victim", "size": size, "digest": digest})
    path.write_bytes(sealed(facts))

    runs.prune(LatestN(1))

    assert victim.exists()
    assert "ckpt-10" in runs.listing().damaged


def test_data_without_a_sidecar_is_listed_and_left_alone(filler) -> None:
    """TensorFlow may have written the data."""
    runs = filler.save("10 20")
    damage(runs, "ckpt-10.json", None)

    assert runs.listing().unmanaged == ("ckpt-10",)
    assert "without a sidecar, left alone: ckpt-10" in str(runs)
    runs.prune(LatestN(1))
    assert "ckpt-10.index" in names(runs)


def test_a_foreign_json_file_is_not_a_damaged_checkpoint(filler) -> None:
    """Even if its name ends in a number."""
    runs = filler.save("10")
    damage(runs, "history-2.json", b'{"loss": [1, 2]}')

    assert not runs.listing().damaged


def test_nothing_is_removed_where_a_newer_version_wrote(filler) -> None:
    """The newer version's rules are unknown. Checkpoints of this version are still listed and saved."""
    runs = filler.save("10 20")
    made_before = runs.plan(LatestN(1))
    damage(runs, "ckpt-30.json", json.dumps({"format": "keras_ckpt", "format_version": 3}).encode())
    before = names(runs)

    with pytest.raises(FormatVersionError, match="upgrade keras_ckpt"):
        runs.plan(LatestN(1))
    with pytest.raises(FormatVersionError):
        runs.prune(made_before)
    with pytest.raises(FormatVersionError):
        runs.clear()
    filler.save("40", keep=LatestN(1))

    assert [record.step for record in runs] == [10, 20, 40]
    assert set(before) <= set(names(runs))


def test_two_checkpoints_of_one_step_count_as_one(filler) -> None:
    """The newer checkpoint counts, the other is listed as damaged."""
    runs = filler.save("10 20")
    for name in files_of(10):
        path = pathlib.Path(runs.path) / name
        text = path.read_bytes().replace(b"ckpt-10", b"copy-10")
        (path.parent / name.replace("ckpt", "copy")).write_bytes(text)

    assert len(runs) == 2
    assert "copy-10" in runs.listing().damaged


@pytest.mark.parametrize("path", ["", b"bytes", "gs://bucket/run", "s3://bucket"])
def test_a_directory_must_be_a_local_path(path) -> None:
    """Empty paths, bytes and URLs are refused."""
    with pytest.raises(ValueError, match="Received"):
        CheckpointDirectory(path)


def test_a_path_that_is_a_file_is_refused(tmp_path) -> None:
    """The error comes at the first read."""
    (tmp_path / "file").touch()

    with pytest.raises(NotADirectoryError, match="Expected a checkpoint directory"):
        list(CheckpointDirectory(tmp_path / "file"))


@pytest.mark.parametrize("keep", [None, "3", 0, -1, True])
def test_a_plan_needs_a_policy(filler, keep) -> None:
    """The error shows the received value."""
    with pytest.raises((TypeError, ValueError), match="Received"):
        filler.save("10").plan(keep)


def test_verify_tells_the_whole_from_the_damaged(filler) -> None:
    """Verify finds a changed byte and a truncated file. Its progress never decreases, and its total is constant."""
    runs = filler.save("1 2 3")
    for step, data in {1: b"X", 3: b""}.items():
        pathlib.Path(f"{runs.path}/ckpt-{step}.data-00000-of-00001").write_bytes(data)
    seen = []

    found = runs.verify(lambda done, total: seen.append((done, total)))

    assert [record.step for record in found.listing.records] == [2]
    assert list(found.listing.damaged) == ["ckpt-1", "ckpt-3"]
    assert not found.ok
    assert "1 checkpoint whole" in str(found)
    assert ">ckpt-3</td>" in found._repr_html_()
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1


def test_an_error_of_the_progress_function_propagates(filler) -> None:
    """A closed terminal, for example, is not damage."""
    filler.save("10:1 20:2")

    def closed(done: int, total: int) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        filler.runs.verify(closed)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_running_out_of_descriptors_or_memory_is_not_damage(filler, monkeypatch, number) -> None:
    """The checkpoint is whole: going back to an older checkpoint would be wrong."""
    filler.save("10:1 20:2")
    opening = os.open

    def scarce(path, *rest, **named):
        if str(path).endswith(".json"):
            raise OSError(number, os.strerror(number), path)
        return opening(path, *rest, **named)

    monkeypatch.setattr(os, "open", scarce)

    with pytest.raises(OSError, match=r"ckpt-\d+\.json") as caught:
        filler.runs.latest()
    assert caught.value.errno == number


def test_verify_changes_nothing(filler) -> None:
    """Verify leaves no lock file, and does not wait for a writer."""
    runs = filler.save("1 2")
    shutil.rmtree(f"{runs.path}/.keras_ckpt")
    before = sorted(os.listdir(runs.path))
    with Folder(runs.path) as folder, folder.mutex():
        assert runs.verify().ok
    shutil.rmtree(f"{runs.path}/.keras_ckpt")

    assert runs.verify().ok
    assert sorted(os.listdir(runs.path)) == before


def test_what_is_read_is_not_taken_away(filler) -> None:
    """A reader keeps its files until it closes them, even if the step is saved again: it never mixes two saves."""
    runs = filler.save("1")
    with Folder(runs.path) as folder, held(folder, runs[1]) as files:
        record = runs[1]
        Writer(runs).save(SaveRequest(step=1), payload(b"other weights"))

        check_files(files, record)


def test_a_checkpoint_removed_before_it_is_read_is_not_damaged(filler) -> None:
    """The read raises FileNotFoundError, and the next look finds the remaining checkpoints."""
    runs = filler.save("1 2")
    with Folder(runs.path) as folder:
        record = runs[1]
        runs.prune(LatestN(1))

        with pytest.raises(FileNotFoundError), held(folder, record):
            pass

    assert [record.step for record in runs.verify().listing.records] == [2]


def test_nothing_is_removed_in_favour_of_what_is_damaged(filler) -> None:
    """The kept checkpoint has a changed byte but the right size. The older checkpoint may be the last whole one."""
    runs = filler.save("1 2")
    pathlib.Path(f"{runs.path}/ckpt-2.data-00000-of-00001").write_bytes(b"X")
    plan = runs.plan(LatestN(1))
    assert [record.step for record in plan.removed] == [1]

    with pytest.raises(PlanError, match=r"Nothing was removed: the plan keeps .*ckpt-2, which is damaged"):
        runs.prune(plan)

    assert [record.step for record in runs] == [1, 2]


@pytest.mark.parametrize("change", ["save", "pin", "unpin", "add_metrics", "prune", "recover"])
def test_what_is_visible_changes_under_the_mutex(filler, monkeypatch, change) -> None:
    """Each rename and unlink in the directory happens under the mutex."""
    runs = filler.save("1 2")
    runs.pin(1)
    held = []

    def locked() -> bool:
        with open(f"{runs.path}/.keras_ckpt/mutex") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def noting(name: str):
        original = getattr(os, name)

        def call(*arguments, **named):
            held.append(locked())
            return original(*arguments, **named)

        return call

    changes = {
        "save": lambda: Writer(runs, LatestN(1)).save(SaveRequest(step=3), payload()),
        "pin": lambda: runs.pin(2),
        "unpin": lambda: runs.unpin(1),
        "add_metrics": lambda: runs.add_metrics(2, loss=1),
        "prune": lambda: runs.prune(LatestN(1)),
        "recover": lambda: Writer(runs).open(),
    }
    if change == "prune":
        runs.unpin(1)
    if change == "recover":
        os.rename(f"{runs.path}/ckpt-2.json", f"{runs.path}/.keras_ckpt/trash/ckpt-2.json")
    with monkeypatch.context() as patch:
        for name in ("rename", "unlink"):
            patch.setattr(files.os, name, noting(name))
        changes[change]()

    assert held
    assert all(held)


def test_a_plan_whose_kept_checkpoints_are_gone_removes_nothing(filler) -> None:
    """Another process pruned by another policy meanwhile: both together would leave no checkpoint."""
    runs = filler.save("10:0.1 20:0.2 30:0.3")
    plan = runs.plan(LatestN(1))
    runs.prune(BestN(1, "loss", "min"))

    with pytest.raises(PlanError, match=r"Nothing was removed: the checkpoints that the plan keeps are no longer in "):
        runs.prune(plan)

    assert [record.step for record in runs] == [10]


def test_clear_removes_the_complete_stage_of_a_dead_process(filler) -> None:
    """Otherwise recovery would bring back a checkpoint of the cleared run."""
    runs = filler.save("10 20")
    with Folder(runs.path) as folder, folder.folder(".keras_ckpt") as private:
        stage = private.folder("stage-0", create=True)
        for name in ("ckpt-20.index", "ckpt-20.data-00000-of-00001", "ckpt-20.json"):
            folder.move(name, stage)
        stage.close()

    assert runs.clear() == [10, 20]

    Writer(runs).open()
    assert list(runs) == []


def test_a_listener_receives_each_saved_and_removed_checkpoint(filler) -> None:
    """By a save and its pruning, by `prune`, and by `clear`."""
    heard = []
    filler.runs.subscribe(lambda change: heard.append((change.kind, change.record.step)))

    runs = filler.save("10 20", keep=LatestN(1))
    assert heard == [("saved", 10), ("saved", 20), ("removed", 10)]
    heard.clear()
    filler.save("30 40")
    runs.prune(LatestN(1))
    runs.clear()

    assert heard == [("saved", 30), ("saved", 40), ("removed", 20), ("removed", 30), ("removed", 40)]


def test_a_listener_receives_superseded_checkpoints_as_removed(filler) -> None:
    """A step that is saved again replaces its checkpoint."""
    filler.save("10")
    heard = []
    filler.runs.subscribe(lambda change: heard.append((change.kind, change.record.sequence)))

    filler.save("10")

    assert heard == [("saved", 2), ("removed", 1)]


def test_an_error_of_a_listener_becomes_a_warning(filler) -> None:
    """The checkpoint is saved, and the other listeners receive the change."""
    heard = []

    def fails(change) -> None:
        raise RuntimeError("no network")

    filler.runs.subscribe(fails)
    filler.runs.subscribe(heard.append)

    with pytest.warns(UserWarning, match="A listener of .*ckpt-10 was saved, and RuntimeError.*no network"):
        filler.save("10")

    assert [change.record for change in heard] == list(filler.runs)
