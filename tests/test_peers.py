"""The policies beside those of Orbax and the options of restic, which have similar names: where they agree, and not.

Both tools run for real. A tool that is not installed skips its tests.
"""

import datetime
import json
import os
import shutil
import subprocess
import types
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_ckpt.store.periods import Daily, KeepWithin, Monthly, Weekly
from keras_ckpt.store.policies import BestN, EveryNHours, EveryNSteps, LatestN, PreservationPolicy
from keras_ckpt.store.record import CheckpointRecord
from support.runs import history

HOUR = 3600


@pytest.fixture(scope="module")
def orbax() -> types.ModuleType:
    return pytest.importorskip("orbax.checkpoint.checkpoint_managers", reason="Orbax needs the extra 'benchmarks'")


def kept_by(policy: object, records: Sequence[CheckpointRecord]) -> set[int]:
    """The steps that a policy of Orbax preserves, which reads a step, a time and the metrics of a checkpoint."""
    checkpoints = [
        types.SimpleNamespace(step=record.step, time=record.saved_at, metrics=record.metrics or None)
        for record in records
    ]
    preserved = policy.should_preserve(checkpoints, context=None)
    return {record.step for record, stays in zip(records, preserved, strict=True) if stays}


def best_of_orbax(orbax: types.ModuleType, n: int, mode: str, **options: object) -> object:
    return orbax.BestN(n=n, get_metric_fn=lambda metrics: metrics["loss"], reverse=mode == "min", **options)


counts = st.integers(1, 4)
modes = st.sampled_from(["min", "max"])
# Steps and times that grow, and losses that differ. The space between two saves is up to six hours.
gaps = st.lists(st.integers(1, 24), min_size=1, max_size=14)


@st.composite
def histories(draw) -> list[CheckpointRecord]:
    words, quarters = [], 0
    gaps_of_run = draw(gaps)
    losses = draw(st.permutations(range(len(gaps_of_run))))
    for gap, loss in zip(gaps_of_run, losses, strict=True):
        quarters += gap
        words.append((quarters, loss))
    return [
        CheckpointRecord(sequence=place, step=step, metrics={"loss": loss / 8}, time=step * HOUR / 4, batch=0)
        for place, (step, loss) in enumerate(words, 1)
    ]


@settings(max_examples=50)
@given(histories(), counts, counts, modes)
def test_orbax_keeps_the_same_newest_and_the_same_best_checkpoints(orbax, records, latest, best, mode) -> None:
    """Each alone, and both joined. Every checkpoint has a loss of its own."""
    ours = LatestN(latest), BestN(best, "loss", mode)
    theirs = orbax.LatestN(latest), best_of_orbax(orbax, best, mode)

    assert kept_by(theirs[0], records) == ours[0].select(records)
    assert kept_by(theirs[1], records) == ours[1].select(records)
    assert kept_by(orbax.AnyPreservationPolicy(theirs), records) == (ours[0] | ours[1]).select(records)


@settings(max_examples=50)
@given(histories(), st.sampled_from([0.25, 1, 2.5, 24]))
def test_orbax_keeps_the_same_checkpoints_by_an_interval_of_time(orbax, records, hours) -> None:
    """The clock never goes back."""
    assert kept_by(orbax.EveryNSeconds(int(hours * HOUR)), records) == EveryNHours(hours).select(records)


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 14))
def test_orbax_keeps_the_same_multiples_where_each_multiple_has_a_checkpoint(orbax, every, times, count) -> None:
    """Saves at step 0 and after each `every` steps. The policy keeps each `times`-th of them."""
    records = history(" ".join(str(every * place) for place in range(count)))

    assert kept_by(orbax.EveryNSteps(every * times), records) == EveryNSteps(every * times).select(records)


@pytest.mark.parametrize(
    ("ours", "theirs", "saved", "here", "there"),
    [
        pytest.param(
            EveryNSteps(10),
            lambda orbax: orbax.EveryNSteps(10),
            "7 14 20 27 31", {7, 14, 20, 31}, {20},
            id="a multiple without a checkpoint has no substitute",
        ),
        pytest.param(
            EveryNSteps(10),
            lambda orbax: orbax.EveryNSteps(10, exact_interval=False),
            "7 14 20 27 31", {7, 14, 20, 31}, {7, 20, 31},
            id="an inexact interval counts from the last kept",
        ),
        pytest.param(
            BestN(1, "loss", "min"),
            lambda orbax: best_of_orbax(orbax, 1, "min"),
            "1:0.5 2:0.5", {1}, {2},
            id="with equal values the later is better",
        ),
        pytest.param(
            BestN(1, "loss", "min"),
            lambda orbax: best_of_orbax(orbax, 1, "min"),
            "1 2:0.5 3:0.1", {3}, {1, 3},
            id="those without the metric stay",
        ),
        pytest.param(
            BestN(3, "loss", "min"),
            lambda orbax: best_of_orbax(orbax, 3, "min", keep_checkpoints_without_metrics=False),
            "1 2:0.5", {2}, {1, 2},
            id="while there are few, all stay",
        ),
        pytest.param(
            KeepWithin("2 h"),
            lambda orbax: orbax.LatestDuration(datetime.timedelta(hours=2)),
            "1 2 3 4", {2, 3, 4}, set(),
            id="a duration ends now",
        ),
    ],
)  # fmt: skip
def test_orbax_differs(orbax, ours: PreservationPolicy, theirs: Callable, saved: str, here: set, there: set) -> None:
    """The guide tells these differences. The saves of the last case are of 1970."""
    records = history(saved)

    assert (ours.select(records), kept_by(theirs(orbax), records)) == (here, there)


class Restic:
    """A repository with a snapshot for each record, of that record's time."""

    def __init__(self, path: os.PathLike[str], records: Sequence[CheckpointRecord]) -> None:
        self._environment = {
            **os.environ, "RESTIC_REPOSITORY": str(path), "RESTIC_PASSWORD": "restic", "TZ": "UTC",
        }  # fmt: skip
        self._call("init")
        for record in records:
            time = f"{record.saved_at.astimezone(datetime.UTC):%Y-%m-%d %H:%M:%S}"
            self._call("backup", "--time", time, "--tag", str(record.step), "--host", "host", __file__)

    def kept(self, *options: str) -> set[int]:
        """The steps of the snapshots that `restic forget` would keep."""
        [group] = json.loads(self._call("forget", "--dry-run", "--group-by", "", *options))
        return {int(tag) for snapshot in group["keep"] for tag in snapshot["tags"]}

    def _call(self, *arguments: str) -> str:
        command = ["restic", "--no-cache", "--json", *arguments]
        done = subprocess.run(command, env=self._environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout


TIMES = (
    "2025-11-03 09:00", "2025-11-30 23:59", "2025-12-01 00:00", "2025-12-28 23:59", "2025-12-29 00:00",
    "2025-12-31 18:00", "2026-01-01 06:00", "2026-01-01 21:00", "2026-01-02 20:00",
)  # fmt: skip
"""Times in UTC. A month, a week (Sunday, Monday) and a year end between two of them; one day has two."""
RECORDS = [
    CheckpointRecord(sequence=place, step=place, time=datetime.datetime.fromisoformat(f"{time}Z").timestamp(), batch=0)
    for place, time in enumerate(TIMES, 1)
]


@pytest.fixture(scope="module")
def restic(tmp_path_factory) -> Restic:
    if not shutil.which("restic"):
        pytest.skip("restic is not installed")
    return Restic(tmp_path_factory.mktemp("restic"), RECORDS)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (LatestN(5), ["--keep-last", "5"]),
        (KeepWithin("39 h"), ["--keep-within", "39h"]),
        (LatestN(2) | KeepWithin("2 days"), ["--keep-last", "2", "--keep-within", "2d"]),
    ],
)
def test_restic_keeps_the_same(restic, policy: PreservationPolicy, options: list[str]) -> None:
    """The times grow with the order of saving."""
    assert restic.kept(*options) == policy.select(RECORDS)


def test_restic_drops_a_snapshot_at_exactly_the_time_of_keep_within(restic) -> None:
    """Step 7 was saved 38 hours before the latest."""
    assert KeepWithin("38 h").select(RECORDS) == {7, 8, 9}
    assert restic.kept("--keep-within", "38h") == {8, 9}


@pytest.mark.parametrize(
    ("policy", "option", "form"),
    [
        (Daily(3), "--keep-daily", "%Y-%m-%d"),
        (Weekly(2), "--keep-weekly", "%G-W%V"),
        (Monthly(2), "--keep-monthly", "%Y-%m"),
    ],
)
def test_restic_keeps_the_last_of_the_periods_of_which_a_policy_keeps_the_first(restic, policy, option, form) -> None:
    """The number of periods is reached, so no version of restic adds the oldest snapshot of all."""
    periods: dict[str, list[int]] = {}
    for record in RECORDS:
        periods.setdefault(f"{record.saved_at.astimezone(datetime.UTC):{form}}", []).append(record.step)
    newest = list(periods.values())[-policy.n :]

    assert len(newest) == policy.n
    assert any(len(steps) > 1 for steps in newest)
    assert policy.select(RECORDS) == {steps[0] for steps in newest}
    assert restic.kept(option, str(policy.n)) == {steps[-1] for steps in newest}
