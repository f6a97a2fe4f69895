"""The past of a directory: the curve of a metric, the fate of each save, and the reason for it."""

from __future__ import annotations

import datetime
import math
import pathlib
import re
import shutil
import sys

import pytest

import keras_ckpt as kc
from keras_ckpt import (
    BackupAndRestore,
    BestN,
    CheckpointDirectory,
    EveryNSteps,
    LatestN,
    ModelCheckpoint,
    MonitorError,
    SaveError,
    restore,
)
from keras_ckpt.store.journal import _POLICIES, Event, policy_of, written
from keras_ckpt.store.writer import SaveRequest, Writer
from support.models import Reports, dense_model, fit
from support.runs import Filler


def states(runs: CheckpointDirectory) -> dict[int, str]:
    """The state of the newest save of each step."""
    return {fate.facts.step: fate.state for fate in runs.fates()}


@pytest.fixture
def filler(filler) -> Filler:
    """A filler of a directory that exists: an event creates no directory."""
    pathlib.Path(filler.runs.path).mkdir()
    return filler


def epochs(runs: CheckpointDirectory, text: str, run_id: str = "run") -> None:
    """Notes the ends of epochs of one step each, from words such as `10:0.5`, as a fit does."""
    for word in text.split():
        step, _, loss = word.partition(":")
        runs.note(Event(kind="epoch", step=int(step), run_id=run_id, epoch=int(step), metrics={"loss": float(loss)}))


def curve(runs: CheckpointDirectory, name: str = "loss") -> list[tuple[int, float]]:
    """The steps and values of the current line."""
    return [(point.step, point.value) for point in runs.history(name)]


def test_each_save_has_a_fate_with_its_facts_after_its_checkpoint_has_gone(filler) -> None:
    runs = filler.save("10:0.5 20:0.4 30:0.3", keep=LatestN(1))

    fates = runs.fates()

    assert [(fate.facts.step, fate.facts.metrics, fate.state) for fate in fates] == [
        (10, {"loss": 0.5}, "removed"),
        (20, {"loss": 0.4}, "removed"),
        (30, {"loss": 0.3}, "kept"),
    ]
    assert [fate.record for fate in fates] == [None, None, runs.latest()]


def test_why_tells_the_policy_that_removed_a_checkpoint(filler) -> None:
    runs = filler.save("10:0.5 20:0.4", keep=LatestN(1))

    assert re.fullmatch(r"Step 10 was removed on \S+ \S+ by the training: .+\.", runs.why(10))


def test_why_tells_who_pruned_a_checkpoint_and_the_reason_of_the_plan(filler) -> None:
    runs = filler.save("10:0.5 20:0.4")
    plan = runs.plan(LatestN(1))
    record = runs[10]
    runs.prune(plan)

    [fate] = [fate for fate in runs.fates() if fate.state == "removed"]

    assert "@" in fate.by
    assert fate.why == plan.decisions[0].reason
    assert runs.why(record) == runs.why(10)
    assert f"by {fate.by}: {fate.why}" in runs.why(10)


def test_why_tells_that_a_save_was_skipped_and_the_reason(filler) -> None:
    runs = filler.save("10:0.1 20:0.5", keep=BestN(1, "loss", "min"))

    assert states(runs) == {10: "kept", 20: "skipped"}
    assert re.fullmatch(r"Step 20 was not saved: .+\.", runs.why(20))


def test_why_tells_the_parts_of_the_policy_that_keep_a_checkpoint(filler) -> None:
    """The newest run tells its policy where it begins."""
    runs = filler.runs
    keep = LatestN(1) | BestN(1, "loss", "min") | EveryNSteps(1000)
    runs.note(Event(kind="run", step=0, run_id="run", policy=written(keep)))
    filler.save("10:0.1 20:0.5", keep=keep)

    assert runs.why(10) == "Step 10 is kept: BestN(1, 'loss', 'min'), EveryNSteps(1000)."
    assert runs.why(20) == "Step 20 is kept: LatestN(1)."


def test_why_tells_that_a_checkpoint_is_pinned_and_the_reason(filler) -> None:
    runs = filler.save("10 20")
    runs.pin(10, "figure 3")

    assert runs.why(10) == "Step 10 is kept: pinned: figure 3."


def test_why_tells_that_a_step_was_saved_again(filler) -> None:
    runs = filler.save("10")
    old = runs[10]
    filler.save("10")

    assert "step 10 was saved again" in runs.why(old)
    assert runs.why(10) == "Step 10 is kept: nothing has removed it."


def test_why_tells_that_no_save_was_due_at_a_step(filler) -> None:
    filler.runs.note(Event(kind="run", step=0, run_id="run"))
    runs = filler.save("10 20")

    assert runs.why(15) == "Step 15 was never saved: no save was due."
    assert runs.why(25) == "Step 25 was not reached: the newest known step is 20."


def test_without_a_journal_the_past_is_not_known(filler) -> None:
    """A directory of an older version has none. The checkpoints that are there give the curve."""
    runs = filler.save("10:0.5 20:0.4 30:0.3", keep=LatestN(2))
    (pathlib.Path(runs.path) / "journal.jsonl").unlink()

    assert runs.events() == []
    assert states(runs) == {20: "kept", 30: "kept"}
    assert curve(runs) == [(20, 0.4), (30, 0.3)]
    assert runs.why(10) == "Step 10 has no checkpoint, and the journal does not tell of it."
    assert runs.why(20) == "Step 20 is kept: nothing has removed it."


def test_a_directory_that_does_not_exist_has_no_past(runs) -> None:
    assert (runs.events(), runs.fates(), len(runs.history("loss"))) == ([], (), 0)
    assert runs.why(10) == "Step 10 has no checkpoint, and the journal does not tell of it."


def test_the_curve_has_the_epochs_that_were_not_saved(filler) -> None:
    epochs(filler.runs, "10:0.5 20:nan 30:0.3")
    runs = filler.save("30:0.3")

    steps, values = zip(*curve(runs), strict=True)

    assert steps == (10, 20, 30)
    assert [value for value in values if not math.isnan(value)] == [0.5, 0.3]


def test_steps_after_the_step_that_a_run_went_back_to_are_a_branch(filler) -> None:
    epochs(filler.runs, "10:0.5 20:0.4 30:0.3")
    filler.runs.note(Event(kind="restored", step=20, run_id="run"))
    epochs(filler.runs, "30:0.2 40:0.1")

    history = filler.runs.history("loss")

    assert curve(filler.runs) == [(10, 0.5), (20, 0.4), (30, 0.2), (40, 0.1)]
    assert [(point.step, point.value, point.branch) for point in history.points if point.branch] == [(30, 0.3, 1)]


def test_a_run_can_go_back_to_a_branch(filler) -> None:
    epochs(filler.runs, "10:0.5 20:0.4 30:0.3 40:0.2")
    filler.runs.note(Event(kind="restored", step=10, run_id="run"))
    epochs(filler.runs, "20:0.8")
    filler.runs.note(Event(kind="restored", step=30, run_id="run"))
    epochs(filler.runs, "40:0.1")

    history = filler.runs.history("loss")

    assert curve(filler.runs) == [(10, 0.5), (20, 0.4), (30, 0.3), (40, 0.1)]
    assert {(point.value, point.branch) for point in history.points if point.branch} == {(0.2, 1), (0.8, 2)}


def test_without_a_journal_a_smaller_step_than_before_tells_a_branch(filler) -> None:
    runs = filler.save("10:0.5 20:0.4 30:0.3 20:0.2")
    (pathlib.Path(runs.path) / "journal.jsonl").unlink()

    assert curve(runs) == [(10, 0.5), (20, 0.2)]
    assert {point.step for point in runs.history("loss").points if point.branch} == {30}


def test_the_curve_is_of_the_monitored_metric_by_default(filler) -> None:
    runs = filler.save("10:0.5", monitor="loss", mode="min")

    assert runs.history() == runs.history("loss")
    assert str(runs.history()).splitlines()[1].split() == ["step", "epoch", "loss"]


def test_an_unknown_metric_is_an_error_that_names_the_metrics(filler) -> None:
    runs = filler.save("10:0.5")

    with pytest.raises(MonitorError, match=r"No step has the metric 'los'. Recorded metrics: loss. Did you mean"):
        runs.history("los")
    with pytest.raises(MonitorError, match=r"No metric was monitored, so name a metric. Recorded metrics: loss"):
        runs.history()


def test_metrics_that_were_added_are_in_the_curve_after_the_checkpoint_has_gone(filler) -> None:
    runs = filler.save("10 20")
    runs.add_metrics(10, test=0.5)
    runs.prune(LatestN(1))

    assert curve(runs, "test") == [(10, 0.5)]


def test_a_curve_as_pandas_has_a_row_for_each_point(filler) -> None:
    pandas = pytest.importorskip("pandas")
    frame = filler.save("10:0.5 20:0.4").history("loss").to_pandas()

    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["step", "epoch", "value", "branch"]
    assert list(frame["value"]) == [0.5, 0.4]


def test_without_pandas_the_error_says_how_to_install_it(filler, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)

    with pytest.raises(ImportError, match="pip install pandas"):
        filler.save("10:0.5").history("loss").to_pandas()


def test_a_copied_directory_has_the_same_past(filler, tmp_path) -> None:
    runs = filler.save("10:0.5 20:0.4", keep=LatestN(1))
    copied = CheckpointDirectory(shutil.copytree(runs.path, tmp_path / "copied"))

    assert copied.why(10) == runs.why(10)
    assert curve(copied) == curve(runs)
    assert states(copied) == states(runs)


def test_a_checkpoint_that_was_removed_by_hand_is_lost(filler) -> None:
    runs = filler.save("10 20")
    for file in pathlib.Path(runs.path).glob("ckpt-10.*"):
        file.unlink()

    assert states(runs) == {10: "lost", 20: "kept"}
    assert re.fullmatch(r"Step 10 was saved on \S+ \S+ and is gone: the journal does not tell why\.", runs.why(10))


def test_a_damaged_checkpoint_is_told_with_its_damage(filler) -> None:
    runs = filler.save("10 20")
    (pathlib.Path(runs.path) / "ckpt-10.index").unlink()

    assert states(runs) == {10: "damaged", 20: "kept"}
    assert runs.why(10) == "Step 10 is there, and is damaged: ckpt-10.index is missing."


class TestOfAFit:
    """The events that a real fit writes."""

    def test_a_fit_tells_its_begin_each_epoch_each_save_and_its_end(self, runs) -> None:
        """The metrics of an epoch are told also where nothing is saved."""
        checkpoint = ModelCheckpoint(runs.path, monitor="val_loss", keep=BestN(1), save_on_background=False)
        fit(dense_model(), Reports(val_loss=[0.5, 0.7, 0.3]), checkpoint, epochs=3)

        events = runs.events()

        assert [event.kind for event in events] == [
            *("run", "epoch", "saved"),
            *("epoch", "skipped"),
            *("epoch", "saved", "removed", "ended"),
        ]
        assert (events[0].policy, events[0].monitor, events[0].mode) == (
            [["BestN", 1, "val_loss", "min"]],
            "val_loss",
            "min",
        )
        assert [event.metrics["val_loss"] for event in events if event.kind == "epoch"] == [0.5, 0.7, 0.3]
        assert [point.value for point in runs.history()] == [0.5, 0.7, 0.3]
        assert {event.run_id for event in events} == {runs.latest().run_id}
        assert [runs.why(fate.facts.step).split(": ", 1)[1] for fate in runs.fates()] == [
            "BestN(1, 'val_loss', 'min'): 0.5 is 2nd.",
            "BestN(1, 'val_loss', 'min'): 0.7 is 2nd.",
            "BestN(1, 'val_loss', 'min').",
        ]

    def test_a_fit_after_going_back_is_a_branch(self, runs) -> None:
        model, checkpoint = dense_model(), ModelCheckpoint(runs.path, monitor="val_loss")
        fit(model, Reports(val_loss=[0.5, 0.4, 0.3]), checkpoint, epochs=3)
        first = next(iter(runs))
        restore(model, first)
        fit(model, Reports(val_loss=[None, 0.2]), checkpoint, initial_epoch=1, epochs=2)

        history = runs.history()

        assert [event.step for event in runs.events() if event.kind == "restored"] == [first.step]
        assert [(point.epoch, point.value) for point in history] == [(1, 0.5), (2, 0.2)]
        assert [point.value for point in history.points if point.branch == 1] == [0.4, 0.3]

    def test_the_directory_of_a_backup_has_no_journal(self, runs, backup) -> None:
        """It is removed when the training has ended."""
        fit(dense_model(), ModelCheckpoint(runs.path), BackupAndRestore(backup, delete_checkpoint=False), epochs=2)

        assert not (backup / "journal.jsonl").exists()
        assert runs.events()[-1].kind == "ended"

    def test_clear_removes_the_journal(self, runs) -> None:
        """Another run can begin in the directory, with a past of its own."""
        fit(dense_model(), ModelCheckpoint(runs.path), epochs=1)
        runs.clear()

        assert runs.events() == []
        assert not (pathlib.Path(runs.path) / "journal.jsonl").exists()

    def test_a_failed_save_is_told_with_its_error(self, filler) -> None:
        runs = filler.save("10")

        def fails(folder, record):
            raise OSError("the disk has burned")

        with pytest.raises(SaveError):
            Writer(runs).save(SaveRequest(step=20, run_id="run"), fails)

        assert states(runs) == {10: "kept", 20: "failed"}
        assert "the save failed: Could not save step 20 into" in runs.why(20)

    def test_a_policy_that_cannot_explain_itself_fails_no_save(self, filler) -> None:
        class Silent(LatestN):
            def why_not(self, records):
                raise RuntimeError("no reason")

        runs = filler.save("10 20", keep=Silent(1))

        assert [record.step for record in runs] == [20]
        assert runs.why(10).endswith(": Silent(1).")

    def test_the_next_fit_tells_after_the_journal_was_removed(self, runs) -> None:
        """A journal is never needed. The checkpoints before it are in the curve."""
        model, checkpoint = dense_model(), ModelCheckpoint(runs.path, monitor="val_loss")
        fit(model, Reports(val_loss=[0.5]), checkpoint, epochs=1)
        (pathlib.Path(runs.path) / "journal.jsonl").unlink()
        fit(model, Reports(val_loss=[0.4]), checkpoint, epochs=1)

        assert [point.value for point in runs.history()] == [0.5, 0.4]


def test_each_public_policy_can_be_read_from_an_event() -> None:
    """A new policy is added there too, or the reasons of what it keeps stay unknown."""
    kinds = [kind for name in kc.__all__ if isinstance(kind := getattr(kc, name), type)]
    public = {kind.__name__ for kind in kinds if issubclass(kind, kc.PreservationPolicy)}

    assert public - {"PreservationPolicy"} == set(_POLICIES)


def test_a_policy_of_this_package_is_read_as_it_was_written() -> None:
    """With bounds, periods, numbers and texts."""
    best, time = kc.BestN(2, "the loss, (mean)", "max"), kc.KeepWithin(datetime.timedelta(hours=2))
    union = kc.LatestN(1) | kc.EveryNHours(0.5) | best | kc.EveryNEpochs(10) | kc.EveryNSteps(1000)
    bounded = (union & kc.MaxCount(3) & kc.MaxBytes("50 GB"), kc.LatestN(2) & kc.MaxBytes(10**9))
    for keep in (
        union,
        union | kc.Daily(3) | kc.Weekly(2) | kc.Monthly(1),
        *bounded,
        kc.MaxCount(3),
        kc.MaxBytes("5 GB"),
    ):
        event = Event(kind="run", step=0, policy=written(keep))
        assert repr(policy_of(event)) == repr(keep)
    assert repr(policy_of(Event(kind="run", step=0, policy=written(time)))) == "KeepWithin('7200.0 seconds')"


@pytest.mark.parametrize(
    "arguments",
    [[], [1], [0], [-1], [1e300], [0.5], ["a"], ["2 days"], [1, "loss", "min"], [1, "loss"], [[1]], [None], [{}]],
)
def test_no_policy_that_a_journal_names_fails_a_listing(filler, arguments) -> None:
    """Whatever class and arguments a foreign line has: also base classes, which cannot select."""
    runs = filler.save("10:0.5 20:0.4")
    for name in (*_POLICIES, "CountedPolicy", "PreservationPolicy", "Bound", "_AnyOf", "dict", "", 3):
        for others in ([], [["LatestN", 1]], [["MaxCount", 1]]):
            runs.note(Event(kind="run", step=0, run_id="run", policy=[[name, *arguments], *others]))
            assert [fate.state for fate in runs.fates()] == ["kept", "kept"], (name, others)
