"""Bounds: the checkpoints that `policy & MaxBytes(...)` and `policy & MaxCount(...)` keep, on disk too."""

import pathlib
import re

import msgspec
import pytest

import keras_ckpt as kc
from keras_ckpt.formats import sharing
from keras_ckpt.store.bounds import MaxBytes, MaxCount
from keras_ckpt.store.policies import BestN, EveryNHours, EveryNSteps, LatestN, PreservationPolicy, as_policy, is_known
from keras_ckpt.store.quantities import as_bytes
from keras_ckpt.store.record import CheckpointFile
from keras_ckpt.store.writer import SaveRequest, Writer
from support.models import dense_model, fit
from support.runs import history, payload, shared_payload, steps


def sized(text: str) -> list:
    """Records in the order of saving, from words such as `10:0.5=3`: a step, an optional loss, and a size."""
    words = [word.split("=") for word in text.split()]
    records = history(" ".join(word for word, *_ in words))
    sizes = [int(size[0]) if size else 1 for _, *size in words]
    return [
        msgspec.structs.replace(record, files=(CheckpointFile("data", size, f"digest of {record.step}"),))
        for record, size in zip(records, sizes, strict=True)
    ]


best_and_latest = BestN(3, "loss", "min") | LatestN(2)


@pytest.mark.parametrize(
    ("policy", "saved", "kept"),
    [
        (LatestN(3) & MaxBytes(2), "10 20 30 40", "30 40"),
        (LatestN(3) & MaxBytes(4), "10=2 20=2 30=2", "20 30"),
        (LatestN(3) & MaxBytes(1), "10=2 20=3", "20"),
        (MaxBytes(3), "10 20=2 30 40", "30 40"),
        (MaxBytes(3), "10 20=9 30", "30"),
        (MaxBytes(9) & MaxCount(2), "10 20 30", "20 30"),
        (MaxCount(2), "10 20 30", "20 30"),
        (EveryNSteps(20) & MaxCount(2), "0 20 30 40 60", "40 60"),
        # The newest stays first, then the best, and of these the best.
        (BestN(3, "loss", "min") & MaxCount(1), "10:0.1 20:0.2", "20"),
        (BestN(2, "loss", "min") & MaxCount(1), "10:0.1 20:0.2 30:0.3 40", "30"),
        (best_and_latest & MaxCount(2), "10:0.1 20:0.2 30:0.3 40:0.4 50:0.5", "10 50"),
        (best_and_latest & MaxCount(3), "10:0.1 20:0.2 30:0.3 40:0.4 50:0.5", "10 20 50"),
        ((LatestN(3) | BestN(1, "loss", "min")) & MaxCount(3), "10:0.1 20:0.2 30:0.3 40:0.4", "20 30 40"),
    ],
)
def test_keeps(policy: PreservationPolicy, saved: str, kept: str) -> None:
    """The policy keeps exactly these steps of the history, within its bounds."""
    assert policy.select(sized(saved)) == steps(kept)


def test_an_older_checkpoint_does_not_come_back_when_a_large_one_is_dropped() -> None:
    """At step 30 step 10 did not fit. At step 40 it would, since step 30 is no longer the newest."""
    policy = (BestN(1, "loss", "min") | LatestN(1)) & MaxBytes(4)

    assert policy.select(sized("10:0.1=2 30:0.2=3")) == {30}
    assert policy.select(sized("10:0.1=2 30:0.2=3 40:0.3=1")) == {30, 40}
    assert policy.select(sized("10:0.1=2 40:0.3=1")) == {10, 40}


def test_a_file_that_checkpoints_share_counts_once() -> None:
    records = [
        msgspec.structs.replace(record, files=(*record.files, CheckpointFile("same", 10, "digest of the same")))
        for record in sized("10 20 30")
    ]

    assert (LatestN(9) & MaxBytes(13)).select(records) == {10, 20, 30}
    assert (LatestN(9) & MaxBytes(12)).select(records) == {20, 30}


def test_pinned_checkpoints_count_and_stay() -> None:
    """A bound drops others for them."""
    records = sized("10=5 20 30 40")
    records[0] = msgspec.structs.replace(records[0], pin="")

    assert (LatestN(9) & MaxBytes(7)).select(records) == {10, 30, 40}
    assert (LatestN(9) & MaxBytes(2)).select(records) == {10, 40}
    assert (LatestN(2) & MaxBytes(7)).select(records) == {30, 40}


def test_the_verdicts_name_the_policies_that_keep_and_the_bound_with_the_step_that_exceeded_it() -> None:
    """A policy of the union is asked about the records that were there: step 30 was 3rd when step 40 came."""
    verdicts = (best_and_latest & MaxCount(4) & MaxBytes("2 kB")).explain(
        sized("10:0.1=600 20:0.2=600 25:0.9 30:0.3=600 40:0.4=600 50:0.5=100")
    )

    assert {step: verdict.reason for step, verdict in verdicts.items()} == {
        10: "BestN(3, 'loss', 'min')",
        20: "BestN(3, 'loss', 'min')",
        25: "BestN(3, 'loss', 'min'): 0.9 is 5th; LatestN(2): 40 and 30 are newer",
        30: "over 2 kB when step 40 came",
        40: "BestN(3, 'loss', 'min'), LatestN(2)",
        50: "LatestN(2)",
    }
    assert {step for step, verdict in verdicts.items() if verdict.kept} == {10, 20, 40, 50}


def test_a_bound_alone_says_why_a_step_is_dropped() -> None:
    assert MaxBytes(1_500).explain(sized("10=800 20=800"))[10] == (
        False,
        "MaxBytes(1500): over 1.5 kB when step 20 came",
    )
    assert MaxCount(1).why_not(sized("10 20")) == {10: "over 1 checkpoint when step 20 came"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("50 GB", 50 * 10**9), ("50GB", 50 * 10**9), (" 1.5 kb ", 1500), ("2 MiB", 2 * 2**20), ("1 KiB", 1024),
        ("3 TB", 3 * 10**12), ("1 PiB", 2**50), ("7 bytes", 7), ("7B", 7), (7, 7), (2e3, 2000),
    ],
)  # fmt: skip
def test_a_size_is_a_number_or_a_text_with_a_unit(text: object, count: int) -> None:
    """Capitals and spaces have no meaning."""
    assert as_bytes(text, "MaxBytes") == count


@pytest.mark.parametrize(
    ("size", "error"),
    [
        ("50 G", ValueError), ("GB", ValueError), ("50 5", ValueError), ("-1 GB", ValueError), ("1e9 B", ValueError),
        ("0 GB", ValueError), (0, ValueError), (-5, ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
        (True, TypeError), (None, TypeError), (b"1 GB", TypeError),
    ],
)  # fmt: skip
def test_a_wrong_size_is_refused_at_construction(size: object, error: type[Exception]) -> None:
    """The error shows the received value and an example."""
    with pytest.raises(error, match=r"MaxBytes expected a size above 0, such as '50 GB'.* Received: "):
        MaxBytes(size)


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (True, TypeError), ("3", TypeError)])
def test_a_wrong_count_is_refused_at_construction(n: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"MaxCount expected .*Received: {n!r}"):
        MaxCount(n)


def test_the_repr_is_the_source_text() -> None:
    """With brackets around a union."""
    assert repr((BestN(3) | LatestN(2)) & MaxBytes("50 GB")) == "(BestN(3) | LatestN(2)) & MaxBytes('50 GB')"
    assert repr(BestN(3) & MaxBytes(10) & MaxCount(5)) == "BestN(3) & MaxBytes(10) & MaxCount(5)"
    assert repr(MaxBytes("1 TB") & MaxCount(5)) == "MaxBytes('1 TB') & MaxCount(5)"


def test_resolve_fills_in_the_arguments_of_the_bounded_policy() -> None:
    policy = ((BestN(3) | LatestN(2)) & MaxCount(4)).resolve("loss", lambda name: "min")

    assert repr(policy) == "(BestN(3, 'loss', 'min') | LatestN(2)) & MaxCount(4)"
    assert policy.monitors == {"loss"}


@pytest.mark.parametrize("other", [LatestN(2), BestN(3)])
def test_a_policy_after_the_ampersand_is_refused_with_what_to_write(other: PreservationPolicy) -> None:
    """A bound comes last; two policies are joined by `|`."""
    with pytest.raises(TypeError, match=rf"To keep what either keeps, write {re.escape(repr(LatestN(3) | other))}\."):
        LatestN(3) & other
    with pytest.raises(TypeError, match=rf"Write {re.escape(repr(other & MaxCount(3)))}\. Received: MaxCount"):
        MaxCount(3) & other


@pytest.mark.parametrize("other", [5, "50 GB", None])
def test_only_a_bound_can_stand_after_the_ampersand(other: object) -> None:
    with pytest.raises(TypeError, match=r"`&` bounds a policy by MaxBytes or MaxCount\. Received: LatestN"):
        LatestN(3) & other
    with pytest.raises(TypeError, match=r"MaxBytes or MaxCount\. Received: MaxCount"):
        MaxCount(3) & other


def test_a_union_with_a_bounded_policy_is_refused_with_the_brackets_that_it_needs() -> None:
    """`a | b & bound` would bound `b` alone, and the bytes of `a` would come on top."""
    advice = r"Write \(BestN\(3\) \| LatestN\(2\)\) & MaxBytes\('5 GB'\)\. Received: "

    with pytest.raises(TypeError, match=advice):
        BestN(3) | LatestN(2) & MaxBytes("5 GB")
    with pytest.raises(TypeError, match=advice):
        BestN(3) & MaxBytes("5 GB") | LatestN(2)
    with pytest.raises(TypeError, match=r"Write LatestN\(2\) & MaxCount\(5\)"):
        MaxCount(5) | LatestN(2)
    with pytest.raises(TypeError, match=r"Write MaxCount\(5\) & MaxBytes\(9\)"):
        MaxCount(5) | MaxBytes(9)


def test_a_bound_is_known_if_its_policy_is_and_is_a_policy_itself() -> None:
    class Mine(LatestN):
        pass

    assert is_known(best_and_latest & MaxCount(3))
    assert is_known(MaxBytes(3))
    assert not is_known((LatestN(1) | Mine(1)) & MaxCount(3))
    assert as_policy(MaxBytes(3)) == MaxBytes(3)


SIZE = len(b"10" + b"index of 10")


def test_a_directory_stays_within_its_bound_save_by_save(filler) -> None:
    """The bytes of the files on disk, without the sidecars."""
    keep = (BestN(2, "loss", "min") | LatestN(2)) & MaxBytes(3 * SIZE)
    for saved in ("10:0.1", "20:0.2", "30:0.3", "40:0.4", "50:0.5"):
        runs = filler.save(saved, keep)
        files = [*pathlib.Path(runs.path).glob("*.index"), *pathlib.Path(runs.path).glob("*.data-*")]
        assert sum(path.stat().st_size for path in files) <= 3 * SIZE

    assert [record.step for record in runs] == [10, 20, 50]


def test_a_save_that_would_go_with_a_checkpoint_that_it_displaces_is_not_made(tmp_path) -> None:
    """`EveryNHours` counts from step 10. If the bound dropped step 10, step 30 would be half an hour too early."""
    keep = (BestN(1, "loss", "min") | EveryNHours(1)) & MaxBytes(2 * SIZE)
    runs = kc.CheckpointDirectory(tmp_path)
    writer = Writer(runs, keep)
    saved = []
    for record, hours in zip(history("10:0.5 20:0.1 30:0.3"), (0, 0.5, 1), strict=True):
        request = SaveRequest(step=record.step, metrics=record.metrics, time=3600.0 * hours, batch=0, size=0)
        saved.append(writer.save(request, payload(str(record.step).encode())))
    writer.close()

    assert [record.step for record in runs] == [10, 20]
    assert saved[2] is None
    assert "30 min after 20" in runs.why(30)


def test_files_that_are_hard_links_count_once_on_disk(tmp_path, monkeypatch) -> None:
    """Three checkpoints share one array. Without the links they would not fit."""
    monkeypatch.setattr(sharing, "_WORTHWHILE", 1)
    runs = kc.CheckpointDirectory(tmp_path)
    writer = Writer(runs)
    for step in (10, 20, 30):
        writer.save(SaveRequest(step=step, size=0), shared_payload(runs, str(step)))
    writer.close()
    records = list(runs)
    distinct = {file.digest: file.size for record in records for file in record.files}
    inodes = {
        path.stat().st_ino: path.stat().st_size for record in records for path in map(pathlib.Path, record.paths[1:])
    }

    assert sum(distinct.values()) == sum(inodes.values()) < sum(record.size for record in records)
    assert MaxBytes(sum(inodes.values())).select(records) == {10, 20, 30}
    assert MaxBytes(sum(inodes.values()) - 1).select(records) == {20, 30}


def test_a_budget_below_one_checkpoint_keeps_the_newest_and_warns_once(filler) -> None:
    with pytest.warns(UserWarning, match=f"have {SIZE} bytes, over 5 bytes: a bound leaves one checkpoint") as warned:
        runs = filler.save("10 20 30", LatestN(3) & MaxBytes(5))

    assert [record.step for record in runs] == [30]
    assert len(warned) == 1


def test_pins_that_exceed_the_budget_stay_with_the_newest_and_a_warning(filler) -> None:
    runs = filler.save("10 20")
    runs.pin(10)
    runs.pin(20)

    with pytest.warns(
        UserWarning, match="over 1 checkpoint: a bound leaves one checkpoint and the pinned. Unpin some"
    ) as warned:
        filler.save("30 40", LatestN(9) & MaxCount(1))

    assert [record.step for record in runs] == [10, 20, 40]
    assert len(warned) == 1


def test_a_plan_says_that_what_stays_exceeds_the_bound(filler) -> None:
    runs = filler.save("10 20 30")
    runs.pin(10)

    plan = runs.plan(LatestN(2) & MaxCount(1))

    assert [record.step for record in plan.removed] == [20]
    assert "a bound leaves one checkpoint and the pinned: 2 checkpoints, over 1 checkpoint" in str(plan)
    assert "a bound leaves" not in str(runs.plan(LatestN(2) & MaxCount(3)))


def test_a_fit_stays_within_a_bound(tmp_path) -> None:
    """The best and the newest stay, of which the bound leaves room for two."""
    runs = kc.CheckpointDirectory(tmp_path)
    keep = (kc.BestN(3) | kc.LatestN(3)) & kc.MaxCount(2)
    fit(dense_model(), kc.ModelCheckpoint(tmp_path, monitor="loss", keep=keep), epochs=6)

    records = list(runs)
    assert [record.epoch for record in records][-1] == 6
    assert len(records) == 2


def test_a_bound_holds_while_the_metric_to_rank_by_is_missing(tmp_path) -> None:
    """Without the metric everything would stay."""
    with pytest.warns(UserWarning, match="val_loss"):
        fit(dense_model(), kc.ModelCheckpoint(tmp_path, keep=kc.BestN(1, "val_loss") & kc.MaxCount(2)), epochs=5)

    assert [record.epoch for record in kc.CheckpointDirectory(tmp_path)] == [4, 5]


@pytest.mark.parametrize(("min_free", "error"), [("10 G", ValueError), (0, ValueError), (True, TypeError)])
def test_a_wrong_min_free_is_refused_at_construction(tmp_path, min_free: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="min_free expected a size above 0, such as '50 GB'"):
        kc.ModelCheckpoint(tmp_path, min_free=min_free)


def test_a_manager_stays_within_a_bound(tmp_path) -> None:
    import tensorflow as tf

    manager = kc.CheckpointManager(tf.train.Checkpoint(a=tf.Variable(0)), tmp_path, keep=LatestN(3) & MaxCount(2))

    assert all(manager.save(step) for step in (1, 2, 3))
    assert [record.step for record in kc.CheckpointDirectory(tmp_path)] == [2, 3]


def test_ten_thousand_records_are_planned_in_the_time_of_few_asks() -> None:
    """The policy is asked only where a bound is exceeded: not at each record of a run within its bound."""
    records = sized(" ".join(f"{step}:{step}" for step in range(10_000)))
    asked = []

    class Asked(LatestN):
        def select(self, records: object) -> set[int]:
            asked.append(len(records))
            return super().select(records)

    assert (Asked(50) & MaxBytes(100)).select(records) == set(range(9950, 10_000))
    assert len(asked) < 300
