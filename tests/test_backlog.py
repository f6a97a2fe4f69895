"""Saves that are due and not on disk yet: their number, their age and their order are bounded on a slow disk."""

from __future__ import annotations

import os
import pathlib
import re
import threading
import time

import keras
import pytest

import keras_ckpt as kc
from keras_ckpt.training.backlog import MAX_WAITING, Backlog
from support.models import dense_model, fit


class TestABacklog:
    """Training waits for the disk when it is ahead by more than two saves and by more than a second."""

    @pytest.fixture
    def now(self) -> list[float]:
        return [0.0]

    @pytest.fixture
    def backlog(self, now) -> Backlog:
        return Backlog(lambda: now[0])

    def test_of_two_saves_is_never_too_long(self, backlog, now) -> None:
        backlog.due(), backlog.due()
        now[0] = 100.0

        assert not backlog.is_too_long()
        assert backlog.is_too_long(more=1)

    def test_of_many_saves_is_not_too_long_within_a_second(self, backlog, now) -> None:
        for _ in range(50):
            backlog.due()
        now[0] = 0.9

        assert not backlog.is_too_long()
        now[0] = 1.1
        assert backlog.is_too_long()

    def test_is_shorter_by_all_that_a_save_on_disk_covers(self, backlog, now) -> None:
        numbers = [backlog.due() for _ in range(5)]
        now[0] = 2.0
        backlog.done(numbers[2])

        assert not backlog.is_too_long()

    def test_counts_from_the_oldest_save_that_is_not_on_disk(self, backlog, now) -> None:
        first = backlog.due()
        now[0] = 1.5
        for _ in range(4):
            backlog.due()
        assert backlog.is_too_long()

        backlog.done(first)

        assert not backlog.is_too_long()


def steps(path: pathlib.Path) -> list[int]:
    """The steps of the checkpoints on disk."""
    found = [re.fullmatch(r"ckpt-(\d+)\.json", name) for name in (os.listdir(path) if path.exists() else ())]
    return sorted(int(match[1]) for match in found if match)


@pytest.fixture
def slow_disk(monkeypatch) -> None:
    """Each sync takes 20 ms more, so that a save takes longer than several batches."""
    sync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.02)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", slow)


class Watch(keras.callbacks.Callback):
    """Notes at each batch how far the directories on disk are behind, and how many saves wait."""

    def __init__(self, *paths: pathlib.Path) -> None:
        super().__init__()
        self.paths = [str(path) for path in paths]
        self.times = [0.0]
        self.behind: dict[str, list[tuple[int, float]]] = {path: [] for path in self.paths}

    def on_train_batch_end(self, batch, logs=None) -> None:
        # The callbacks that save come later: the saves of the batches before are due.
        last, now = len(self.times) - 1, time.monotonic()
        for path in self.paths:
            newest = max(steps(pathlib.Path(path)), default=0)
            if newest < last:
                self.behind[path].append((last - newest, now - self.times[newest + 1]))
        self.times.append(now)


def assert_near(behind: list[tuple[int, float]]) -> None:
    """Nothing on disk is more than two saves, or one second and the save in progress, behind."""
    late = [(saves, seconds) for saves, seconds in behind if saves > 2 and seconds > 2.0]
    assert late == []
    assert behind, "the disk was never behind"


def test_a_backup_stays_near_beside_a_callback_that_saves_as_often(tmp_path, slow_disk) -> None:
    """Small models train faster than the disk writes: training waits for the disk."""
    backup, run = tmp_path / "backup", tmp_path / "run"
    watch = Watch(backup, run)
    callbacks = [kc.ModelCheckpoint(run, save_freq=1), kc.BackupAndRestore(backup, save_freq=1)]

    fit(dense_model(), watch, *callbacks, batches=25)

    assert_near(watch.behind[str(backup)])
    assert_near(watch.behind[str(run)])


def test_a_backup_does_not_give_way_to_newer_ones_for_ever(tmp_path, slow_disk) -> None:
    """Beside a callback that fills the queue, the oldest backup that waits keeps its place."""
    backup, run = tmp_path / "backup", tmp_path / "run"
    watch = Watch(backup)

    fit(
        dense_model(),
        watch,
        kc.ModelCheckpoint(run, save_freq=1),
        kc.BackupAndRestore(backup, save_freq=3),
        batches=36,
    )

    assert max(saves for saves, _ in watch.behind[str(backup)]) <= 2 * (MAX_WAITING + 1) + 3


def test_of_one_step_the_backup_is_on_disk_first(tmp_path, slow_disk) -> None:
    """A checkpoint that only selects is saved again after a restart from the backup."""
    run, backup = tmp_path / "run", tmp_path / "backup"
    order: list[tuple[list[int], list[int]]] = []

    class Looks(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            while batch and max(steps(backup), default=0) < batch:
                time.sleep(0.001)
            order.append((steps(backup)[-1:], steps(run)[-1:]))

    fit(
        dense_model(),
        Looks(),
        kc.ModelCheckpoint(run, save_freq=1),
        kc.BackupAndRestore(backup, save_freq=1),
        batches=8,
    )

    # Of the first step the checkpoint had begun to be written.
    assert order[2:] == [([step], [step - 1]) for step in range(2, 8)]


def test_a_callback_that_keeps_all_saves_all(tmp_path, slow_disk) -> None:
    """Waiting is the only way then."""
    fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1), batches=12)

    assert steps(tmp_path) == [*range(1, 13)]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(kc.LatestN(1), [30]), (kc.LatestN(2), [29, 30]), (kc.LatestN(1) | kc.EveryNSteps(10), [1, 10, 20, 30])],
)
def test_a_save_that_waits_is_replaced_where_the_policy_would_not_keep_it(tmp_path, slow_disk, keep, kept) -> None:
    """So the disk has less to write, and what stays is the same."""
    written = set()

    class Looks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            written.update(steps(tmp_path))

    fit(dense_model(), Looks(), kc.ModelCheckpoint(tmp_path, save_freq=1, keep=keep), batches=30)

    assert steps(tmp_path) == kept
    assert len(written | set(kept)) < 30


def test_a_save_that_a_policy_of_ones_own_may_keep_is_not_replaced(tmp_path, slow_disk) -> None:
    """Nobody knows what it selects."""

    seen: set[int] = set()

    class Own(kc.PreservationPolicy):
        def select(self, records):
            seen.update(record.step for record in records)
            return {max(record.step for record in records)}

    fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1, keep=Own()), batches=15)

    assert seen == {*range(1, 16)}


def test_a_bounded_number_of_saves_waits(tmp_path, monkeypatch) -> None:
    """Training waits with the ninth save, however fast it is."""
    first, go_on = threading.Event(), threading.Event()
    sync = os.fsync

    def stuck(descriptor: int) -> None:
        first.set()
        go_on.wait(20)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", stuck)
    done: list[int] = []

    class Counts(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            done.append(batch)

    monkeypatch.setattr("keras_ckpt.training.backlog._MAX_SECONDS", 60.0)
    threading.Timer(1.5, go_on.set).start()
    counted: list[int] = []
    threading.Timer(1.4, lambda: counted.append(len(done))).start()

    fit(dense_model(), Counts(), kc.ModelCheckpoint(tmp_path, save_freq=1), batches=30)

    assert first.is_set()
    assert counted[0] <= MAX_WAITING + 3
    assert steps(tmp_path) == [*range(1, 31)]
