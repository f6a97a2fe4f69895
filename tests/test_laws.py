"""The laws of the policies, for every policy and for unions, over random histories.

1. A policy selects only records that it received. 2. Pruning twice equals pruning once. 3. `a | b` is commutative and
keeps at least the records that `a` keeps. 4. Over records appended in order of saving, pruning after every save ends
where pruning once at the end ends. 5. Kept and removed are all records. A record once not selected is never selected
again when newer records come.
"""

import math
import tempfile

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_ckpt.store.bounds import MaxBytes, MaxCount
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.periods import Daily, KeepWithin, Monthly, Weekly
from keras_ckpt.store.policies import (
    BestN,
    EveryNEpochs,
    EveryNHours,
    EveryNSteps,
    LatestN,
    PreservationPolicy,
    is_final,
    kept_in_training,
    selection,
)
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord
from keras_ckpt.store.writer import SaveRequest, Writer
from support.runs import payload


class EverySecondOfAKind(PreservationPolicy):
    """A custom policy that obeys the laws: it decides about each record alone."""

    def select(self, records):
        return {record.step for record in records if record.step % 2 == 0}


values = st.one_of(
    st.sampled_from([0.0, -0.0, 0.5, 1.0, math.nan, math.inf, -math.inf]), st.floats(allow_nan=True), st.none()
)
counts = st.integers(1, 4)
simple = st.one_of(
    counts.map(LatestN),
    st.builds(BestN, counts, st.sampled_from(["loss", "accuracy"]), st.sampled_from(["min", "max"])),
    st.integers(1, 12).map(EveryNSteps),
    counts.map(EveryNEpochs),
    st.sampled_from([0.25, 1, 2.5, 24]).map(EveryNHours),
    st.builds(lambda kind, n: kind(n), st.sampled_from([Daily, Weekly, Monthly]), counts),
    st.sampled_from(["30 min", "2 h", "1 day", "6 weeks"]).map(KeepWithin),
    st.builds(EverySecondOfAKind),
)
unbounded = st.one_of(
    simple, st.builds(lambda a, b: a | b, simple, simple), st.builds(lambda a, b, c: a | b | c, *[simple] * 3)
)
bounds = st.one_of(st.integers(1, 16).map(MaxBytes), counts.map(MaxCount))
bounded = st.one_of(
    bounds,
    st.builds(lambda a, b: a & b, unbounded, bounds),
    st.builds(lambda a, b, c: a & b & c, unbounded, bounds, bounds),
)
policies = st.one_of(unbounded, bounded)


# The sizes of files, and whether other checkpoints share them.
files = st.sampled_from(
    [(), ((1, ""),), ((3, ""),), ((4, "shared"),), ((1, ""), (4, "shared")), ((2, ""), (2, "shared"))]
)


@st.composite
def records(draw, steps):
    """Records of these steps in this order of saving: any metrics, any times, some pinned."""
    drawn = []
    for sequence, step in enumerate(steps, 1):
        metrics = {name: draw(values) for name in ("loss", "accuracy")}
        drawn.append(
            CheckpointRecord(
                sequence=sequence,
                step=step,
                epoch=draw(st.none() | st.just(step // 5)),
                batch=draw(st.sampled_from([0, 0, 3])),
                metrics={name: value for name, value in metrics.items() if value is not None},
                # Hours that repeat, jump, and go back.
                time=3600.0 * max(0.0, sequence + draw(st.sampled_from([0, 0, 0, -0.5, -3, 5, -1000, 1000]))),
                pin=draw(st.sampled_from([None, None, None, "", "a reason"])),
                files=tuple(
                    CheckpointFile(f"ckpt-{step}.{place}", size, f"{shared or step} {place} {size}")
                    for place, (size, shared) in enumerate(draw(files))
                ),
            )
        )
    return drawn


histories = st.lists(st.integers(0, 60), unique=True, max_size=14).flatmap(records)
histories_with_repeats = st.lists(st.integers(0, 12), max_size=14).flatmap(records)


def prune(policy, present):
    """The records after pruning: the policy's selection and the pinned records."""
    selected = selection(policy, present)
    return [record for record in present if record.step in selected or record.pinned]


def append(present, record):
    """A save: a record supersedes an older record of the same step."""
    return [other for other in present if other.step != record.step] + [record]


def prune_after_each(policy, saved):
    present = []
    for record in saved:
        present = prune(policy, append(present, record))
    return present


def saved_last(saved):
    """The history as it would be on disk without pruning."""
    present = []
    for record in saved:
        present = append(present, record)
    return present


saves = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(saves, st.sampled_from([None, LatestN(1), LatestN(2), EveryNSteps(2)]))
def test_a_save_supersedes_the_same_name_and_the_same_step_and_nothing_else(saved, policy):
    """On disk, a directory holds one checkpoint for each name and each step. Retention removes no new checkpoint."""
    with tempfile.TemporaryDirectory() as path:
        runs = CheckpointDirectory(path)
        writer = Writer(runs, policy)
        present = []
        for name, step in saved:
            joined = [other for other in present if name != other.name and step != other.step]
            record = writer.save(SaveRequest(step=step, name=name), payload(f"{name} {step}".encode()))
            if record is not None:
                present = [*joined, record]
            if policy is not None:
                selected = policy.select(present)
                present = [each for each in present if each.step in selected]

            assert list(runs) == present
        assert runs.verify().ok
        writer.close()


@given(policies, histories_with_repeats)
def test_a_policy_selects_only_given_records(policy, saved):
    """Law 1."""
    present = saved_last(saved)

    assert policy.select(present) <= {record.step for record in present}


@given(policies, histories_with_repeats)
def test_pruning_twice_equals_pruning_once(policy, saved):
    """Law 2, also after steps were saved again."""
    once = prune(policy, saved_last(saved))

    assert prune(policy, once) == once


@given(unbounded, unbounded, histories_with_repeats)
def test_a_union_is_commutative_and_keeps_exactly_what_its_policies_keep(first, second, saved):
    """Law 3, and a union keeps no other records."""
    present = saved_last(saved)

    both = (first | second).select(present)

    assert both == (second | first).select(present)
    assert both == first.select(present) | second.select(present)


@settings(max_examples=300)
@given(policies, histories)
def test_pruning_after_every_save_ends_where_pruning_once_ends(policy, saved):
    """Law 4."""
    assert prune_after_each(policy, saved) == prune(policy, saved)


@given(st.one_of(counts.map(LatestN), st.integers(1, 12).map(EveryNSteps)), histories_with_repeats)
def test_law_4_holds_for_steps_saved_again_if_the_policy_ignores_metrics_and_times(policy, saved):
    """A step that is saved again may have another metric or time; LatestN and EveryNSteps ignore them."""
    assert prune_after_each(policy, saved) == prune(policy, saved_last(saved))


@given(policies, histories)
def test_a_record_once_not_selected_is_never_selected_again(policy, saved):
    """Law 5: newer records bring no older record back. A pinned record does not go, so a bound may select it later."""
    rejected: set[int] = set()
    for count in range(1, len(saved) + 1):
        selected = policy.select(saved[:count])
        assert not rejected & selected
        rejected |= {record.step for record in saved[:count] if not (policy.bounds and record.pinned)} - selected


@settings(max_examples=50)
@given(policies.filter(is_final), histories, st.integers(0, 14))
def test_a_record_unselected_among_the_newest_stays_unselected_among_all(policy, saved, older):
    """So a save that waits for an earlier save may be dropped, whatever is on disk. A waiting save has no pin."""
    saved = [*saved[:older], *(msgspec.structs.replace(record, pin=None) for record in saved[older:])]
    rejected = {record.step for record in saved[older:]} - policy.select(saved[older:])

    assert not rejected & policy.select(saved)


@given(policies, histories_with_repeats, st.randoms())
def test_a_policy_is_a_pure_function_of_records(policy, saved, random):
    """A second call, another order and equal copies give the same answer, and the records do not change."""
    present = saved_last(saved)
    copies = [msgspec.structs.replace(record) for record in present]
    shuffled = random.sample(present, len(present))

    answer = policy.select(present)

    assert policy.select(present) == policy.select(copies) == policy.select(shuffled) == answer
    assert repr(present) == repr(copies)


@settings(max_examples=50)
@given(policies, histories_with_repeats)
def test_a_policy_explains_each_record_as_it_selects(policy, saved):
    """The verdicts agree with the selection, and a policy of this package always has a reason."""
    present = saved_last(saved)

    verdicts = policy.explain(present)

    assert {step for step, verdict in verdicts.items() if verdict.kept} == policy.select(present)
    assert verdicts.keys() == {record.step for record in present}
    for part in [] if policy.bounds else policy.parts:
        if not isinstance(part, EverySecondOfAKind):
            assert part.why_not(present).keys() == verdicts.keys() - part.select(present)


def exceeds(bound, present):
    """Whether records exceed a bound, where each file counts once."""
    if isinstance(bound, MaxCount):
        return len(present) > bound.n
    return sum({file.digest: file.size for record in present for file in record.files}.values()) > bound.size


@settings(max_examples=50)
@given(bounded, histories)
def test_a_bound_holds_or_one_checkpoint_is_left(policy, saved):
    """Pinned records count, and stay. In training the bound holds too, while nothing can be ranked."""
    for keep in (selection, kept_in_training):
        present = []
        for record in saved:
            present.append(record)
            kept = keep(policy, present)
            present = [each for each in present if each.step in kept or each.pinned]

            over = any(exceeds(bound, present) for bound in policy.bounds)
            assert not over or sum(not each.pinned for each in present) <= 1


@settings(max_examples=50)
@given(unbounded.filter(lambda policy: "EveryNHours" not in repr(policy)), bounds, histories)
def test_a_bound_keeps_the_newest_checkpoint_that_the_policy_keeps(policy, bound, saved):
    """However large it is. `EveryNHours` may drop the newest after the bound dropped the one from which it counts."""
    newest = {record.step for record in saved[-1:]}

    assert newest & policy.select(saved) <= (policy & bound).select(saved)
    assert newest <= bound.select(saved)


@settings(max_examples=50)
@given(bounds, histories)
def test_a_bound_alone_is_a_bound_on_all_checkpoints(bound, saved):
    """With the same reasons."""
    everything = LatestN(99) & bound
    dropped = {step: verdict.reason for step, verdict in everything.explain(saved).items() if not verdict.kept}

    assert bound.select(saved) == everything.select(saved)
    assert bound.why_not(saved) == dropped


@settings(max_examples=50)
@given(unbounded, histories_with_repeats)
def test_a_bound_that_nothing_exceeds_changes_nothing(policy, saved):
    present = saved_last(saved)

    assert (policy & MaxCount(14) & MaxBytes("1 kB")).select(present) == policy.select(present)
    assert (policy & MaxCount(14)).explain(present) == policy.explain(present)


@settings(max_examples=50)
@given(unbounded, histories_with_repeats)
def test_training_keeps_at_least_what_the_policy_keeps(policy, saved):
    """Before a metric has values, training keeps more records, never fewer."""
    present = saved_last(saved)

    assert policy.select(present) <= kept_in_training(policy, present)


@given(policies, histories)
def test_in_training_too_pruning_after_every_save_ends_where_pruning_once_ends(policy, saved):
    """Law 4 for a callback, if the first record has the metrics that the policy ranks by. A pin keeps that record."""
    metrics = {"loss": 1.0, "accuracy": 1.0}
    first = CheckpointRecord(sequence=1, step=1000, metrics=metrics, epoch=0, batch=0, pin="")
    later = [msgspec.structs.replace(record, sequence=record.sequence + 1) for record in saved]

    present = []
    for record in [first, *later]:
        present = append(present, record)
        kept = kept_in_training(policy, present)
        present = [each for each in present if each.step in kept or each.pinned]

    kept = kept_in_training(policy, [first, *later])
    assert present == [each for each in [first, *later] if each.step in kept or each.pinned]
