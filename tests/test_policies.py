"""Policies: the steps that each policy keeps of a history. A history is steps in the order of saving, with losses."""

import datetime
import math
import time

import pytest

from keras_ckpt.store.bounds import MaxCount
from keras_ckpt.store.periods import Daily, KeepWithin, Monthly, Weekly
from keras_ckpt.store.policies import (
    BestN,
    EveryNEpochs,
    EveryNHours,
    EveryNSteps,
    LatestN,
    PreservationPolicy,
    as_policy,
    kept_in_training,
    missing,
    selection,
)
from keras_ckpt.store.quantities import as_seconds
from keras_ckpt.store.record import CheckpointRecord
from support.runs import history, steps


@pytest.mark.parametrize(
    ("policy", "saved", "kept"),
    [
        (LatestN(2), "10 20 30", "20 30"),
        (LatestN(2), "10", "10"),
        (LatestN(2), "30 10 20", "10 20"),
        (BestN(1, "loss", "min"), "10:0.5 20:0.4 30:0.6", "20"),
        (BestN(1, "loss", "max"), "10:0.5 20:0.4 30:0.6", "30"),
        (BestN(2, "loss", "min"), "10:0.5 20:0.4 30:0.6", "10 20"),
        (BestN(1, "loss", "min"), "10:0.4 20:0.4", "10"),
        (BestN(1, "loss", "min"), "20:0.4 10:0.4", "20"),
        (BestN(1, "loss", "max"), "10:0.4 20:0.4", "10"),
        (BestN(3, "loss", "min"), "10:nan 20:inf 30:-inf 40:0.5 50", "40"),
        (BestN(1, "loss", "min"), "10:nan 20:nan", ""),
        (BestN(1, "other", "min"), "10:0.1 20:0.2", ""),
        (EveryNSteps(100), "40 90 100 130 250 300 310", "40 100 250 300"),
        (EveryNSteps(100), "130 100", "100"),
        (EveryNSteps(100), "0 50 100", "0 100"),
        (EveryNHours(2), "10 20 30 40 50", "10 30 50"),
        (EveryNHours(0.5), "10 20 30", "10 20 30"),
        (LatestN(1) | BestN(1, "loss", "min"), "10:0.4 20:0.5 30:0.6", "10 30"),
    ],
)
def test_keeps(policy: PreservationPolicy, saved: str, kept: str) -> None:
    """The policy keeps exactly these steps of the history."""
    assert policy.select(history(saved)) == steps(kept)


def test_every_n_epochs_keeps_the_first_at_or_after_each_multiple() -> None:
    """EveryNEpochs(2) keeps the run's first record, and the first at or after 2, 4 and 6. It skips unknown epochs."""
    epochs = {10: 1, 20: 2, 25: 2, 30: 3, 50: 5, 60: 6, 70: 7, 80: None}
    records = [CheckpointRecord(sequence=step, step=step, epoch=epoch) for step, epoch in epochs.items()]

    assert EveryNEpochs(2).select(records) == {10, 20, 50, 60}


def test_every_n_hours_counts_a_clock_that_was_set_back() -> None:
    """After a clock jumps ten years back, the policy keeps records again."""
    decade = datetime.timedelta(days=3652).total_seconds()
    times = [decade, decade + 7200, 0.0, 3600.0, 7200.0]
    records = [CheckpointRecord(sequence=n, step=n, time=time) for n, time in enumerate(times, 1)]

    assert EveryNHours(2).select(records) == {1, 2, 3, 5}


def saved_at(*times: str) -> list[CheckpointRecord]:
    """Records with the steps 1, 2, 3 and so on, saved at these times in UTC."""
    stamps = [datetime.datetime.fromisoformat(f"{time}+00:00").timestamp() for time in times]
    return [CheckpointRecord(sequence=step, step=step, time=stamp) for step, stamp in enumerate(stamps, 1)]


@pytest.mark.parametrize(
    ("policy", "times", "kept"),
    [
        (Daily(2), ["2026-11-28T23:59:59", "2026-11-29T00:00:00", "2026-11-29T12:00", "2026-12-01T01:00"], "2 4"),
        (Daily(9), ["2026-11-29T01:00", "2026-11-29T02:00", "2026-11-30T00:30"], "1 3"),
        # A Sunday and a Monday; the last days of a year are in the first week of the next.
        (Weekly(2), ["2026-11-22T10:00", "2026-11-23T10:00", "2026-11-29T23:00", "2026-11-30T01:00"], "2 4"),
        (Weekly(9), ["2025-12-29T10:00", "2026-01-04T10:00", "2026-01-05T10:00"], "1 3"),
        (Monthly(1), ["2026-10-31T23:59", "2026-11-01T00:00", "2026-11-30T10:00"], "2"),
        (Monthly(9), ["2025-11-30T10:00", "2026-11-01T10:00", "2026-11-02T10:00"], "1 2"),
        # A clock that was set back: the first is the first that was saved.
        (Daily(1), ["2026-11-29T12:00", "2026-11-29T10:00", "2026-11-28T10:00"], "1"),
        (KeepWithin("2 days"), ["2026-11-27T09:59", "2026-11-27T10:00", "2026-11-29T10:00"], "2 3"),
        (KeepWithin("36h"), ["2026-11-27T09:00", "2026-11-28T00:00", "2026-11-29T10:00"], "2 3"),
        (KeepWithin(datetime.timedelta(minutes=1)), ["2026-11-29T10:00", "2026-11-29T10:02", "2026-11-29T10:00"], "2"),
    ],
)
def test_keeps_by_the_calendar(policy: PreservationPolicy, times: list[str], kept: str) -> None:
    """The first of each of the newest periods that have a checkpoint, or all of the last time of training."""
    assert policy.select(saved_at(*times)) == steps(kept)


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/Los_Angeles"])
def test_days_are_those_of_utc_everywhere(monkeypatch, zone: str) -> None:
    """Two machines in two time zones must agree about a directory that they share."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert Daily(9).select(saved_at("2026-11-29T00:10", "2026-11-29T23:50", "2026-11-30T00:10")) == {1, 3}
    finally:
        monkeypatch.undo()
        time.tzset()


def test_policies_by_the_calendar_say_why_a_step_is_not_selected() -> None:
    records = saved_at("2026-10-01T10:00", "2026-11-23T10:00", "2026-11-29T10:00", "2026-11-29T11:30")

    assert Daily(2).why_not(records) == {1: "2026-10-01 is the 3rd newest day", 4: "3 is the first of 2026-11-29"}
    assert Weekly(1).why_not(records) == {
        1: "2026-W40 is the 2nd newest week",
        3: "2 is the first of 2026-W48",
        4: "2 is the first of 2026-W48",
    }
    assert Monthly(1).why_not(records)[1] == "2026-10 is the 2nd newest month"
    assert KeepWithin("1 h").why_not(records) == {1: "59.1 d before 4", 2: "6.06 d before 4", 3: "1.5 h before 4"}


def test_a_time_beyond_the_calendar_is_in_its_last_day() -> None:
    """A sidecar may have any time."""
    records = [CheckpointRecord(sequence=step, step=step, time=time) for step, time in [(1, 1e9), (2, 1e300)]]

    assert Daily(1).select(records) == Weekly(1).select(records) == Monthly(1).select(records) == {2}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90 s", 90),
        ("5min", 300),
        ("2h", 7200),
        ("2d", 172800),
        ("1 Week", 604800),
        ("1.5 hours", 5400),
        ("1 day", 86400),
    ],
)
def test_a_time_is_a_text_with_a_unit(text: str, seconds: float) -> None:
    """Capitals and spaces have no meaning."""
    assert as_seconds(text, "KeepWithin") == seconds


@pytest.mark.parametrize(
    ("age", "error"),
    [
        ("2", ValueError), ("days", ValueError), ("2 months", ValueError), ("-2 d", ValueError), ("0 d", ValueError),
        (datetime.timedelta(0), ValueError), (2, TypeError), (None, TypeError),
    ],
)  # fmt: skip
def test_a_wrong_time_is_refused_at_construction(age: object, error: type[Exception]) -> None:
    """The error shows the received value and an example."""
    with pytest.raises(error, match=r"KeepWithin expected a time above 0, such as '2 days'.* Received: "):
        KeepWithin(age)


def test_the_order_of_the_list_does_not_matter() -> None:
    """The order of saving is in the records; the order of the list has no meaning."""
    records = history("30:1 10:2 20:3")

    for policy in (LatestN(1), BestN(1, "loss", "min"), EveryNSteps(20), EveryNHours(2), Daily(1), MaxCount(2)):
        assert selection(policy, records) == selection(policy, records[::-1])


@pytest.mark.parametrize(
    ("policy", "saved", "step", "reason"),
    [
        (LatestN(1), "10 20 30", 10, "30 is newer"),
        (LatestN(2), "10 20 30", 10, "30 and 20 are newer"),
        (LatestN(3), "40 10 20 30", 40, "30, 20 and 10 are newer"),
        (LatestN(4), "10 20 30 40 50", 10, "50, 40 and 2 more are newer"),
        (BestN(2, "loss", "min"), "10:0.5 20:0.4 30:0.123456", 10, "0.5 is 3rd"),
        (BestN(1, "loss", "max"), "10:0.5 20:0.5", 20, "0.5 is 2nd"),
        (BestN(10, "loss", "min"), " ".join(f"{n}:{n}" for n in range(12)), 10, "10 is 11th"),
        (BestN(1, "loss", "min"), " ".join(f"{n}:{n}" for n in range(30)), 20, "20 is 21st"),
        (BestN(1, "loss", "min"), "10:nan 20:0.5", 10, "loss is nan"),
        (BestN(1, "loss", "min"), "10:-inf 20:0.5", 10, "loss is -inf"),
        (BestN(1, "loss", "min"), "10 20:0.5", 10, "loss is missing"),
        (EveryNSteps(100), "130 210 190", 190, "130 is the first of 100 to 199"),
        (EveryNHours(2), "10 20 30", 20, "1 h after 10"),
        (EveryNHours(50), " ".join(map(str, range(40))), 36, "1.5 d after 0"),
    ],
)
def test_says_why_a_step_is_not_selected(policy: PreservationPolicy, saved: str, step: int, reason: str) -> None:
    """The reason has the numbers that decided."""
    assert policy.why_not(history(saved))[step] == reason


@pytest.mark.parametrize(("n", "reason"), [(1, "10 is the first of epoch 2"), (2, "10 is the first of epochs 2 to 3")])
def test_every_n_epochs_says_why_a_step_is_not_selected(n: int, reason: str) -> None:
    """The reason names the epochs, or says that the epoch is not known."""
    records = [
        CheckpointRecord(sequence=step, step=step, epoch=epoch) for step, epoch in {10: 2, 20: 2, 30: None}.items()
    ]

    assert EveryNEpochs(n).why_not(records) == {20: reason, 30: "its epoch is not known"}


def test_every_n_hours_says_that_a_clock_was_set_back() -> None:
    """A time before that of the last kept step is named as such."""
    records = [CheckpointRecord(sequence=n, step=n, time=time) for n, time in enumerate([7200.0, 1800.0, 7155.0], 1)]

    assert EveryNHours(2).why_not(records) == {2: "1.5 h before 1", 3: "45 s before 1"}


@pytest.mark.parametrize("policy", [LatestN, BestN, EveryNSteps, EveryNEpochs, Daily, Weekly, Monthly])
@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (True, TypeError), ("3", TypeError)])
def test_a_wrong_count_is_refused_at_construction(policy: type, n: object, error: type[Exception]) -> None:
    """n=0, n=-1, n=True and n="3" are errors that show the received value."""
    with pytest.raises(error, match=repr(n)):
        policy(n)


@pytest.mark.parametrize("hours", [0, -1.0, math.nan, math.inf, True, "6", None])
def test_a_wrong_number_of_hours_is_refused_at_construction(hours: object) -> None:
    """The hours must be a finite number greater than 0."""
    with pytest.raises((ValueError, TypeError), match="EveryNHours expected"):
        EveryNHours(hours)


def test_an_unknown_mode_is_refused_at_construction() -> None:
    """The mode of BestN is min or max."""
    with pytest.raises(ValueError, match=r"'min' or 'max'\. Received: mode='up'"):
        BestN(1, "loss", "up")


def test_a_policy_is_a_frozen_value() -> None:
    """Equal arguments make equal policies, which cannot be changed."""
    assert BestN(3, "loss", "min") == BestN(3, "loss", "min")
    assert len({LatestN(2), LatestN(2), LatestN(3)}) == 2
    with pytest.raises(AttributeError):
        LatestN(2).n = 3


def test_the_repr_of_a_policy_is_its_source_text() -> None:
    """The repr omits open arguments."""
    policy = BestN(3) | LatestN(2) | EveryNHours(6) | BestN(1, "loss", "min")

    assert repr(policy) == "BestN(3) | LatestN(2) | EveryNHours(6) | BestN(1, 'loss', 'min')"


def test_joining_a_policy_with_another_type_is_an_error() -> None:
    """The error of `BestN(3) | 2` shows the received value."""
    with pytest.raises(TypeError, match="Received: 2"):
        BestN(3) | 2


def test_best_n_without_a_metric_is_an_error_when_it_selects() -> None:
    """The error shows a complete example."""
    with pytest.raises(ValueError, match=r"BestN\(3, 'val_loss', 'min'\)"):
        BestN(3).select(history("10:1"))


def test_resolve_fills_in_open_arguments_only() -> None:
    """A policy without a metric takes the given metric; a policy with a metric keeps it."""
    policy = (BestN(3) | BestN(1, "accuracy") | LatestN(2)).resolve(
        "loss", lambda name: {"loss": "min"}.get(name, "max")
    )

    assert repr(policy) == "BestN(3, 'loss', 'min') | BestN(1, 'accuracy', 'max') | LatestN(2)"


class KeepRound(PreservationPolicy):
    """A custom policy."""

    def select(self, records: object) -> set[int]:
        return {record.step for record in records if record.step % 20 == 0}


def test_a_custom_policy_joins_with_other_policies() -> None:
    """A subclass with select() is a policy."""
    policy = KeepRound() | LatestN(1)

    assert policy.select(history("10 20 30")) == {20, 30}
    assert repr(policy) == "KeepRound() | LatestN(1)"


def test_a_verdict_joins_the_reasons_of_all_policies() -> None:
    """A policy that keeps a step is named. Otherwise each policy says why not, a custom policy as it can."""

    class KeepFast(KeepRound):
        def why_not(self, records: object) -> dict[int, str]:
            return {30: "30 is slow"}

    verdicts = (KeepRound() | KeepFast() | BestN(1, "loss", "min") | LatestN(1)).explain(history("10:1 20 30 40"))

    assert verdicts[20] == (True, "KeepRound(), KeepFast()")
    assert verdicts[30] == (
        False,
        "KeepRound(): not selected; KeepFast(): 30 is slow; BestN(1, 'loss', 'min'): loss is missing; "
        "LatestN(1): 40 is newer",
    )


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        ({99}, ValueError, "selected steps that it was not given"),
        (None, TypeError, "set of steps"),
        ([[1]], TypeError, "set of steps"),
    ],
)
def test_an_invalid_selection_of_a_custom_policy_is_an_error(answer: object, error: type, text: str) -> None:
    """A selection must be a set of given steps; otherwise nothing is removed."""

    class Nonsense(PreservationPolicy):
        def select(self, records: object) -> set[int]:
            return answer

    with pytest.raises(error, match=text):
        selection(Nonsense() | LatestN(1), history("10 20"))


def test_a_custom_policy_without_select_is_an_error() -> None:
    """The error names the class that lacks the method."""

    class Unfinished(PreservationPolicy):
        pass

    with pytest.raises(NotImplementedError, match="Unfinished must define select"):
        Unfinished().select([])


@pytest.mark.parametrize(("keep", "policy"), [(None, None), (3, LatestN(3)), (BestN(2), BestN(2))])
def test_keep_takes_a_policy_or_a_number_or_none(keep: object, policy: object) -> None:
    """An int is the number of newest checkpoints, None means all."""
    assert as_policy(keep) == policy


@pytest.mark.parametrize("keep", [True, "3", 2.0, LatestN])
def test_keep_refuses_other_types(keep: object) -> None:
    """The error shows the received value."""
    with pytest.raises(TypeError, match="Received"):
        as_policy(keep)


def test_records_at_epoch_ends_stay_while_no_record_has_the_metric() -> None:
    """The policy selects among the other records."""
    records = [CheckpointRecord(sequence=n, step=n, batch=batch) for n, batch in enumerate([5, 0, 5, 5, 0, 5], 1)]

    assert kept_in_training(BestN(1, "val_loss", "min") | LatestN(1), records) == {2, 5, 6}


def test_a_missing_metric_keeps_all_records() -> None:
    """A metric is missing once an epoch ended with metrics of its kind, but without it."""
    records = history("10:0.5 20:0.4 30:0.3")
    middle = CheckpointRecord(sequence=0, step=5, batch=5)

    assert missing("lost", records)
    assert kept_in_training(BestN(1, "lost", "min") | LatestN(1), [middle, *records]) == {5, 10, 20, 30}


def test_a_validation_metric_is_not_missing_before_validation_ran() -> None:
    """Records with only training metrics do not prove that a `val_` metric is missing."""
    assert not missing("val_loss", history("10:0.5 20:0.4"))
