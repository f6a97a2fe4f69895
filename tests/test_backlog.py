"""The backlog: on a slow disk the number, the age and the order of waiting saves are bounded."""

from __future__ import annotations

import os
import pathlib
import re
import threading
import time
from collections.abc import Callable

import keras
import pytest

import keras_ckpt as kc
from keras_ckpt.training.backlog import MAX_WAITING, Backlog
from support.models import dense_model, fit


class TestBacklog:
    """Training waits for the disk when it is ahead by more than two saves and by more than a second."""

    @pytest.fixture
    def now(self) -> list[float]:
        return [0.0]

    @pytest.fixture
    def backlog(self, now) -> Backlog:
        return Backlog(lambda: now[0])

    def test_two_saves_are_never_too_many(self, backlog, now) -> None:
        backlog.due(), backlog.due()
        now[0] = 100.0

        assert not backlog.is_too_long()
        assert backlog.is_too_long(more=1)

    def test_many_saves_are_not_too_many_within_a_second(self, backlog, now) -> None:
        for _ in range(50):
            backlog.due()
        now[0] = 0.9

        assert not backlog.is_too_long()
        now[0] = 1.1
        assert backlog.is_too_long()

    def test_a_save_on_disk_completes_all_earlier_saves(self, backlog, now) -> None:
        numbers = [backlog.due() for _ in range(5)]
        now[0] = 2.0
        backlog.done(numbers[2])

        assert not backlog.is_too_long()

    def test_the_age_is_that_of_the_oldest_save_not_on_disk(self, backlog, now) -> None:
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
def slow_disk(monkeypatch) -> Callable[[float], None]:
    """A function that makes each sync take so many seconds longer. A save takes longer than several batches then."""
    sync = os.fsync

    def slow(seconds: float) -> None:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (time.sleep(seconds), sync(descriptor)))

    return slow


class Watch(keras.callbacks.Callback):
    """Records at each batch how far the directories on disk are behind training."""

    def __init__(self, *paths: pathlib.Path) -> None:
        super().__init__()
        self.paths = [str(path) for path in paths]
        self.times = [0.0]
        self.behind: dict[str, list[tuple[int, float]]] = {path: [] for path in self.paths}

    def on_train_batch_end(self, batch, logs=None) -> None:
        # The callbacks that save come later in the list, so only earlier batches are due.
        last, now = len(self.times) - 1, time.monotonic()
        for path in self.paths:
            newest = max(steps(pathlib.Path(path)), default=0)
            if newest < last:
                self.behind[path].append((last - newest, now - self.times[newest + 1]))
        self.times.append(now)


def assert_near(behind: list[tuple[int, float]]) -> None:
    """The directory is at most two saves, or one second and the save in progress, behind."""
    late = [(saves, seconds) for saves, seconds in behind if saves > 2 and seconds > 2.0]
    assert late == []
    assert behind, "the disk was never behind"


def test_training_waits_for_a_slow_disk_with_two_callbacks_that_save_each_batch(tmp_path, slow_disk) -> None:
    """Small models train faster than the disk writes."""
    slow_disk(0.02)
    backup, run = tmp_path / "backup", tmp_path / "run"
    watch = Watch(backup, run)
    callbacks = [kc.ModelCheckpoint(run, save_freq=1), kc.BackupAndRestore(backup, save_freq=1)]

    fit(dense_model(), watch, *callbacks, batches=25)

    assert_near(watch.behind[str(backup)])
    assert_near(watch.behind[str(run)])


def test_the_backup_of_a_step_is_written_before_the_checkpoint_of_the_step(tmp_path, slow_disk) -> None:
    """After a restart from the backup the checkpoint is saved again."""
    slow_disk(0.01)
    run, backup = tmp_path / "run", tmp_path / "backup"
    looks: list[tuple[int, int]] = []

    class Looks(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            while batch and max(steps(backup), default=0) < batch:
                time.sleep(0.001)
                looks.append((max(steps(run), default=0), max(steps(backup), default=0)))

    fit(
        dense_model(),
        Looks(),
        kc.ModelCheckpoint(run, save_freq=1),
        kc.BackupAndRestore(backup, save_freq=1),
        batches=8,
    )

    # The checkpoint of the first step began before the backup was due.
    assert [look for look in looks if look[0] > max(look[1], 1)] == []
    assert any(1 < checkpoint < backed_up for checkpoint, backed_up in looks)


def test_a_callback_without_a_policy_saves_every_due_checkpoint(tmp_path, slow_disk) -> None:
    """Training waits for a slow disk."""
    slow_disk(0.01)
    fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1), batches=12)

    assert steps(tmp_path) == [*range(1, 13)]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(kc.LatestN(1), [30]), (kc.LatestN(2), [29, 30]), (kc.LatestN(1) | kc.EveryNSteps(10), [1, 10, 20, 30])],
)
def test_a_waiting_save_that_the_policy_would_not_keep_is_replaced(tmp_path, slow_disk, keep, kept) -> None:
    """The disk has less to write, and the same checkpoints stay."""
    slow_disk(0.01)
    written = set()

    class Looks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            written.update(steps(tmp_path))

    fit(dense_model(), Looks(), kc.ModelCheckpoint(tmp_path, save_freq=1, keep=keep), batches=30)

    assert steps(tmp_path) == kept
    assert len(written | set(kept)) < 30


def test_a_custom_policy_never_causes_a_replacement(tmp_path, slow_disk) -> None:
    """The package does not know which records it selects."""
    slow_disk(0.01)

    seen: set[int] = set()

    class Own(kc.PreservationPolicy):
        def select(self, records):
            seen.update(record.step for record in records)
            return {max(record.step for record in records)}

    fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1, keep=Own()), batches=15)

    assert seen == {*range(1, 16)}


def test_the_number_of_waiting_saves_is_bounded(tmp_path, monkeypatch) -> None:
    """Training waits at the ninth save, however fast it is."""
    first, resume = threading.Event(), threading.Event()
    sync = os.fsync

    def stuck(descriptor: int) -> None:
        first.set()
        resume.wait(20)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", stuck)
    done: list[int] = []

    class Counts(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            done.append(batch)

    monkeypatch.setattr("keras_ckpt.training.backlog._MAX_SECONDS", 60.0)
    threading.Timer(1.5, resume.set).start()
    counted: list[int] = []
    threading.Timer(1.4, lambda: counted.append(len(done))).start()

    fit(dense_model(), Counts(), kc.ModelCheckpoint(tmp_path, save_freq=1), batches=30)

    assert first.is_set()
    assert counted[0] <= MAX_WAITING + 3
    assert steps(tmp_path) == [*range(1, 31)]
