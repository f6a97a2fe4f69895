"""Background saves: which saves wait, which are skipped, and when errors are raised."""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import gc
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.formats import arena
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.model.snapshot import Snapshot, arena_of
from keras_ckpt.store import background
from keras_ckpt.store.files import Folder
from keras_ckpt.store.writer import Writer
from keras_ckpt.training import backlog
from support.models import Interrupts, X, Y, dense_model, fit, same, values


@pytest.fixture
def python(fork_server) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """A function that runs code with the names of this module in another process."""
    return lambda code: fork_server.run(f"import sys, warnings\nfrom test_background import *\n{code}")


@pytest.fixture(autouse=True)
def _free(monkeypatch) -> Iterator[None]:
    """Frees the busy threads of a failed test, which would block the other tests."""
    events = []
    monkeypatch.setattr(Busy, "events", events)
    yield
    for event in events:
        event.set()


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Makes Ctrl-C raise, as in a terminal. A process started in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class After(keras.callbacks.Callback):
    """Calls functions at the end of batches, counted from 1 across all epochs."""

    def __init__(self, calls: Mapping[int, Callable[[], object]]) -> None:
        super().__init__()
        self.calls = calls
        self.batches = 0

    def get_state(self) -> dict[str, int]:
        return {"batches": self.batches}

    def set_state(self, state: Mapping[str, int]) -> None:
        self.batches = state["batches"]

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.batches += 1
        if self.batches in self.calls:
            self.calls[self.batches]()


class Busy(keras.callbacks.Callback):
    """Blocks the writing thread from the first epoch until `free` is called.

    So the test decides which saves wait. Callbacks listed before have begun by then.
    """

    events: ClassVar[list[threading.Event]] = []

    def __init__(self) -> None:
        super().__init__()
        self.freed = threading.Event()
        self.events.append(self.freed)
        self.began = False

    def get_state(self) -> dict[str, int]:
        return {}

    def set_state(self, state: Mapping[str, int]) -> None:
        pass

    def on_epoch_begin(self, epoch, logs=None) -> None:
        if not self.began:
            self.began = True
            background.Job(self.freed.wait, ("another run", 1), 1)

    def free(self) -> None:
        self.freed.set()

    def free_soon(self) -> None:
        threading.Timer(0.3, self.free).start()


def on_disk(path: os.PathLike) -> list[str]:
    """The names of the checkpoints, read without `CheckpointDirectory`, which would wait."""
    return sorted(name.removesuffix(".json") for name in os.listdir(path) if name.endswith(".json"))


def test_training_continues_while_a_save_is_written(tmp_path) -> None:
    """`fit` ends when all saves are written."""
    seen, busy = [], Busy()
    looks = After({9: lambda: seen.append(on_disk(tmp_path)), 10: busy.free})
    fit(dense_model(), kc.ModelCheckpoint(tmp_path), busy, looks, epochs=3, batches=4)

    assert seen == [[]]
    assert on_disk(tmp_path) == ["ckpt-12", "ckpt-4", "ckpt-8"]


def test_an_epoch_without_the_monitored_metric_does_not_wait_for_its_save(tmp_path) -> None:
    """As with `validation_freq`. A read of the directory would wait."""
    busy, seen = Busy(), []

    class Looks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            seen.append(on_disk(tmp_path))
            busy.free()

    would_free = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: threading.Timer(5, busy.free).start())
    checkpoint = kc.ModelCheckpoint(tmp_path, keep=kc.BestN(1) | kc.LatestN(1))
    fit(dense_model(), would_free, checkpoint, busy, Looks(), epochs=2, validation_data=(X, Y), validation_freq=2)

    assert seen[0] == []
    assert on_disk(tmp_path) == ["ckpt-10"]


def test_without_save_on_background_a_batch_ends_when_its_checkpoint_is_durable(tmp_path) -> None:
    seen = []
    looks = After(dict.fromkeys((1, 2), lambda: seen.append(on_disk(tmp_path))))
    fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1, save_on_background=False), looks, batches=3)

    assert seen == [["ckpt-1"], ["ckpt-1", "ckpt-2"]]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 2}, {"jit_compile": True}], ids=str)
def test_a_background_save_has_the_values_of_its_step(tmp_path, optimizer, options) -> None:
    """To the bit, although training ends before the first byte is written."""
    model = dense_model(optimizer=optimizer, run_eagerly=False, **options)
    busy, taken = Busy(), {}

    class Copies(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            taken[batch + 1] = [each.tobytes() for each in values(model)]

        def on_epoch_end(self, epoch, logs=None) -> None:
            assert on_disk(tmp_path) == []
            busy.free()

    fit(model, kc.ModelCheckpoint(tmp_path, save_freq=2), busy, Copies(), batches=8)

    runs = kc.CheckpointDirectory(tmp_path)
    assert [record.step for record in runs] == [2, 4, 6, 8]
    for record in runs:
        kc.restore(model, record)
        assert [each.tobytes() for each in values(model)] == taken[record.step]


def test_a_snapshot_is_freed_once_it_is_written() -> None:
    """It would hold the memory of values that training changes."""
    snapshot = ModelState(dense_model()).snapshot()
    alive = weakref.ref(snapshot)
    freed = threading.Event()
    background.Job(freed.wait, ("another run", 1), 1)
    job = background.Job(functools.partial(id, snapshot), ("run", 1), 1)
    del snapshot
    assert alive() is not None

    freed.set()
    job.result()
    background.Job(bool, ("run", 1), 1).result()  # the thread has finished the job before

    assert alive() is None


def test_the_oldest_waiting_save_is_written_although_the_policy_keeps_a_newer_save(tmp_path, monkeypatch) -> None:
    """A newer save joins the end of the queue. If it replaced each waiting save, none would be written for long."""
    monkeypatch.setattr(backlog, "_MAX_SECONDS", math.inf)  # on a loaded machine training would wait for the disk
    saved, busy = [], Busy()
    checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=1, keep=1, on_saved=lambda record: saved.append(record.step))

    fit(dense_model(), checkpoint, busy, After({4: busy.free}), batches=4)

    assert saved == [1, 4]


class TestSavesDuringASave:
    """Waiting copies may take the memory of one state, or a small amount for any number."""

    @pytest.fixture(autouse=True)
    def _no_copy_is_small(self, monkeypatch) -> None:
        monkeypatch.setattr(background, "SMALL", 0)

    def test_a_save_by_batches_is_skipped_with_one_warning(self, tmp_path, capsys) -> None:
        """With `verbose` each skip prints a line."""
        busy = Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=1, verbose=1)
        frees = After({3: busy.free, 4: background.wait})
        with pytest.warns(UserWarning, match="The save of step 1 into .* is skipped, because an earlier save") as told:
            fit(dense_model(), checkpoint, busy, frees, batches=5)

        assert len(told) == 1
        assert {"ckpt-1", "ckpt-2", "ckpt-3"}.isdisjoint(on_disk(tmp_path))
        assert "ckpt-5" in on_disk(tmp_path)
        assert "Step 2, epoch 0: val_loss not known, skipped, because an earlier save is" in capsys.readouterr().out

    def test_a_save_at_the_end_of_an_epoch_waits(self, tmp_path) -> None:
        """A save by batches at the epoch's last batch waits too."""
        busy = Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=["epoch", 4])
        fit(dense_model(), checkpoint, busy, After({3: busy.free_soon}), epochs=2, batches=4)

        assert on_disk(tmp_path) == ["ckpt-4", "ckpt-8"]

    def test_a_ranked_save_waits(self, tmp_path) -> None:
        """It may be the best."""
        busy = Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, monitor="loss", save_freq=2, keep=kc.BestN(10))
        fit(dense_model(), checkpoint, busy, After({1: busy.free_soon}), batches=5)

        assert on_disk(tmp_path) == ["ckpt-2", "ckpt-4"]

    def test_a_save_in_the_foreground_is_not_skipped(self, tmp_path) -> None:
        """It also waits for the background saves of another callback."""
        busy = Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=2, save_on_background=False)
        fit(dense_model(), checkpoint, busy, After({1: busy.free_soon}), batches=5)

        assert on_disk(tmp_path) == ["ckpt-2", "ckpt-4"]

    def test_callbacks_that_save_the_same_step_do_not_wait_for_each_other(self, tmp_path) -> None:
        """They share a snapshot. If the second waited for the first, the fit would deadlock."""
        freed = threading.Event()

        class FreesLast(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None) -> None:
                assert [on_disk(tmp_path / name) for name in "ab"] == [[], []]
                freed.set()

        first, second = (kc.ModelCheckpoint(tmp_path / name) for name in "ab")
        holds = Holds(first, freed)
        fit(dense_model(), first, second, holds, FreesLast(), batches=2)

        assert [on_disk(tmp_path / name) for name in "ab"] == [["ckpt-2"], ["ckpt-2"]]

    def test_with_xla_each_callback_saves_the_values_at_its_call(self, tmp_path, monkeypatch) -> None:
        """The model changes between two callbacks of a step, while the first save waits."""
        freed, model = threading.Event(), dense_model(run_eagerly=False, jit_compile=True)
        taken, save = [], Writer.save

        def slow(writer: Writer, *arguments: object, **named: object) -> object:
            freed.wait()
            return save(writer, *arguments, **named)

        monkeypatch.setattr(Writer, "save", slow)

        def change(epoch: int, logs: object) -> None:
            taken.append([each.tobytes() for each in values(model)])
            model.layers[0].bias.assign(model.layers[0].bias + 1)
            taken.append([each.tobytes() for each in values(model)])

        first, second = (kc.ModelCheckpoint(tmp_path / name) for name in "ab")
        changes = keras.callbacks.LambdaCallback(on_epoch_end=change)
        frees = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: freed.set())
        fit(model, first, changes, second, frees, batches=2)

        for name, expected in zip("ab", taken, strict=True):
            kc.restore(model, tmp_path / name)
            assert [each.tobytes() for each in values(model)] == expected

    def test_a_backup_by_batches_is_skipped_but_the_backup_of_a_signal_waits(self, python, tmp_path) -> None:
        """The process may end after the signal."""
        code = f"""
warnings.simplefilter("ignore")
background.SMALL = 0
busy = Busy()
def stop():
    assert on_disk({str(tmp_path)!r}) == []
    busy.free_soon()
    os.kill(os.getpid(), signal.SIGTERM)
backup = kc.BackupAndRestore({str(tmp_path)!r}, save_freq=1, exit_code=7)
fit(dense_model(), busy, After({{6: stop}}), backup, batches=9)
"""
        ended = python(code)

        assert ended.returncode == 7, ended.stderr
        assert on_disk(tmp_path) == ["ckpt-6"]

    def test_saves_of_a_small_model_do_not_wait(self, tmp_path, monkeypatch) -> None:
        """Each batch is saved, however slow the disk is."""
        monkeypatch.setattr(background, "SMALL", 1 << 20)
        busy = Busy()
        fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1), busy, After({5: busy.free}), batches=5)

        assert len(on_disk(tmp_path)) == 5


class TestErrors:
    """A foreign file in the place of a checkpoint makes a save fail, even for root."""

    def test_the_error_of_a_save_is_raised_at_the_next_batch(self, tmp_path) -> None:
        """Training ends there."""
        (tmp_path / "ckpt-2.data-00000-of-00001").write_bytes(b"mine")
        batches = After({2: background.wait})

        with pytest.raises(kc.DirectoryNotEmptyError, match="ckpt-2"):
            fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=2), batches, batches=9)

        assert batches.batches == 2  # the third batch ended for callbacks before this one in the list
        assert (tmp_path / "ckpt-2.data-00000-of-00001").read_bytes() == b"mine"

    def test_verbose_prints_that_a_save_failed(self, tmp_path, capsys) -> None:
        """It does not print that the policy would not keep it."""
        (tmp_path / "ckpt-2.data-00000-of-00001").write_bytes(b"mine")
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=2, verbose=1, save_on_background=False)

        with pytest.raises(kc.DirectoryNotEmptyError):
            fit(dense_model(), checkpoint, batches=2)

        assert "Step 2, epoch 0: val_loss not known, the save failed\n" in capsys.readouterr().out

    def test_verbose_prints_that_a_save_in_the_background_failed(self, tmp_path, capsys) -> None:
        """The line comes with the error, in the middle of an epoch."""
        (tmp_path / "ckpt-2.data-00000-of-00001").write_bytes(b"mine")
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=2, verbose=1)

        with pytest.raises(kc.DirectoryNotEmptyError):
            fit(dense_model(), checkpoint, After({2: background.wait}), batches=9)

        assert re.search(r"^Step 2, epoch 0: .*the save failed$", capsys.readouterr().out, re.MULTILINE)

    @pytest.mark.parametrize("callback", [kc.ModelCheckpoint, kc.BackupAndRestore])
    def test_the_error_of_the_last_save_is_raised_at_the_end_of_training(self, tmp_path, callback) -> None:
        """`fit` does not end as if all saves had succeeded."""
        adds = Adds(tmp_path / "ckpt-3.data-00000-of-00001")

        with pytest.raises(kc.DirectoryNotEmptyError, match="ckpt-3"):
            fit(dense_model(), adds, callback(tmp_path), batches=3)

    def test_after_a_failed_backup_the_error_that_ends_the_training_triggers_a_backup(self, tmp_path) -> None:
        """The state of the batch in which the error is raised is whole."""
        adds = Adds(tmp_path / "ckpt-2.data-00000-of-00001")
        with pytest.raises(kc.DirectoryNotEmptyError), kc.BackupAndRestore(tmp_path, save_freq=2) as backup:
            fit(dense_model(), adds, After({3: background.wait}), backup, batches=9)

        assert on_disk(tmp_path) == ["ckpt-3"]

    def test_after_several_failed_backups_the_last_backup_is_saved(self, tmp_path) -> None:
        """The first failure ends the training. The others cause warnings."""
        busy = Busy()

        def free() -> None:
            busy.free()
            background.wait()

        adds = [Adds(tmp_path / f"ckpt-{step}.data-00000-of-00001") for step in (2, 3)]
        told = pytest.warns(UserWarning, match="ckpt-3")
        raised = pytest.raises(kc.DirectoryNotEmptyError, match="ckpt-2")
        with told, raised, kc.BackupAndRestore(tmp_path, save_freq=1, double_checkpoint=True) as backup:
            fit(dense_model(), *adds, busy, After({4: free}), backup, batches=9)

        assert on_disk(tmp_path) == ["ckpt-1", "ckpt-4"]

    @pytest.mark.usefixtures("_ctrl_c")
    def test_the_error_of_the_training_is_raised_although_all_backups_failed(self, tmp_path) -> None:
        """Warnings report the failed saves, and the next fit can start."""
        busy = Busy()

        class Frees(Interrupts):
            def on_train_batch_end(self, batch, logs=None) -> None:
                if batch == 2:
                    busy.free()
                    background.wait()
                super().on_train_batch_end(batch, logs)

        adds = [Adds(tmp_path / f"ckpt-{step}.data-00000-of-00001") for step in (1, 2)]
        told, raised = pytest.warns(UserWarning, match="has a file"), pytest.raises(RuntimeError, match="no more")
        with told as warned, raised, kc.BackupAndRestore(tmp_path, save_freq=1, double_checkpoint=True) as backup:
            fit(dense_model(), busy, *adds, Frees(3, RuntimeError("no more")), backup, batches=9)

        texts = " ".join(str(each.message) for each in warned)
        assert "ckpt-1.data" in texts
        assert "ckpt-2.data" in texts
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @pytest.mark.parametrize("reason", ["ckpt-2", "Cannot allocate"])
    def test_after_a_failed_backup_an_error_in_validation_triggers_a_backup(
        self, tmp_path, monkeypatch, reason
    ) -> None:
        """Validation may change the model, so the backup has the state before it."""
        busy = Busy()

        class Fails(keras.callbacks.Callback):
            def on_test_batch_end(self, batch, logs=None) -> None:
                busy.free()
                background.wait()
                raise RuntimeError("no more")

        move = Snapshot.move

        def fails_once(*arguments: object) -> None:
            monkeypatch.setattr(Snapshot, "move", move)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        adds = Adds(tmp_path / "ckpt-2.data-00000-of-00001")
        if reason != "ckpt-2":
            adds = After({2: lambda: monkeypatch.setattr(Snapshot, "move", fails_once)})
        told, raised = pytest.warns(UserWarning, match=reason), pytest.raises(RuntimeError, match="no more")
        with told, raised, kc.BackupAndRestore(tmp_path, save_freq=2) as backup:
            fit(dense_model(), adds, busy, Fails(), backup, batches=3, validation_data=(X, Y))

        assert on_disk(tmp_path) == ["ckpt-3"]

    @pytest.mark.parametrize("jit_compile", [False, True])
    def test_a_save_without_memory_for_its_copies_is_skipped_with_a_warning(
        self, tmp_path, monkeypatch, jit_compile
    ) -> None:
        """The warning names the step and the fix, even if the allocation before the first save fails."""

        def none(size: int) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        model, pages = dense_model(), arena.pages
        model.jit_compile = jit_compile
        monkeypatch.setattr(arena, "pages", none)

        after = After({3: lambda: monkeypatch.setattr(arena, "pages", pages)})
        words = r"Could not save step 2 into .* Cannot allocate memory\. A save needs .* Training continues\."
        with pytest.warns(UserWarning, match=words):
            fit(model, after, kc.ModelCheckpoint(tmp_path, save_freq=2, save_on_background=False))

        assert on_disk(tmp_path) == ["ckpt-4"]

    @pytest.mark.usefixtures("_ctrl_c")
    def test_a_backup_is_saved_although_ctrl_c_interrupts_the_wait_for_it(self, tmp_path, monkeypatch) -> None:
        """The first Ctrl-C waits, the second does not, and the exit of `with` waits again."""
        monkeypatch.setattr(background, "SMALL", 0)
        busy, main = Busy(), threading.main_thread().ident

        class Impatient(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None) -> None:
                for seconds in (0.3, 0.6):
                    threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT)).start()
                threading.Timer(1, busy.free).start()

        with pytest.raises(KeyboardInterrupt), kc.BackupAndRestore(tmp_path) as backup:
            fit(dense_model(), busy, Impatient(), backup, epochs=2)

        assert on_disk(tmp_path) == ["ckpt-5"]


class TestUnreportedErrors:
    """An interrupt ends the training before it can raise the error of a save."""

    @pytest.fixture
    def interrupted(self, tmp_path) -> kc.CheckpointDirectory:
        """A run that was interrupted after its second save failed."""
        runs = kc.CheckpointDirectory(tmp_path / "run")
        with pytest.raises(KeyboardInterrupt):
            fit(
                dense_model(),
                kc.ModelCheckpoint(runs.path, save_freq=2),
                After({3: lambda: pathlib.Path(runs.path, "ckpt-4.data-00000-of-00001").write_bytes(b"mine")}),
                Interrupts(4),
                batches=9,
            )
        return runs

    def test_the_next_restore_warns_of_a_failed_save_once(self, interrupted) -> None:
        with pytest.warns(UserWarning, match="in the background failed: .* has a file ckpt-4.data-00000-of-00001"):
            kc.restore(dense_model(), interrupted)

        kc.restore(dense_model(), interrupted)

    def test_each_failed_save_warns_even_with_the_same_text(self, tmp_path) -> None:
        """By default Python shows a warning of the same text once."""
        (tmp_path / "ckpt-1.data-00000-of-00001").write_bytes(b"mine")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1), Interrupts(1))
                background.report()

        assert len([each for each in told if "in the background failed" in str(each.message)]) == 2

    def test_the_next_fit_warns_of_a_failed_save(self, interrupted, tmp_path) -> None:
        """That fit itself succeeds."""
        with pytest.warns(UserWarning, match="in the background failed: .* has a file ckpt-4.data-00000-of-00001"):
            fit(dense_model(), kc.ModelCheckpoint(tmp_path / "other"))

        assert on_disk(tmp_path / "other") == ["ckpt-5"]

    def test_the_end_of_the_process_prints_a_failed_save_to_stderr(self, python, tmp_path) -> None:
        (tmp_path / "ckpt-2.data-00000-of-00001").write_bytes(b"mine")
        ended = python(f"""
checkpoint = kc.ModelCheckpoint({str(tmp_path)!r}, save_freq=2)
fit(dense_model(), checkpoint, Interrupts(2, RuntimeError("no more")), batches=9)
""")

        assert "has a file ckpt-2.data-00000-of-00001" in ended.stderr

    def test_a_process_that_a_signal_ends_prints_a_failed_save_to_stderr(self, python, tmp_path) -> None:
        """The backup is saved, the checkpoint of the same batch is not."""
        code = f"""
path = pathlib.Path({str(tmp_path)!r})
stop = After({{4: lambda: os.kill(os.getpid(), signal.SIGTERM)}})
adds = Adds(path / "run" / "ckpt-4.data-00000-of-00001")
checkpoint = kc.ModelCheckpoint(path / "run", save_freq=4)
fit(dense_model(), checkpoint, adds, stop, kc.BackupAndRestore(path / "backup"), batches=9)
"""
        ended = python(code)

        assert ended.returncode == -signal.SIGTERM, ended.stderr
        assert "has a file ckpt-4.data-00000-of-00001" in ended.stderr
        assert on_disk(tmp_path / "backup") == ["ckpt-4"]

    def test_an_error_that_a_restore_reported_is_still_raised_by_the_training(self, tmp_path) -> None:
        """A callback may restore during the training."""
        runs, other = kc.CheckpointDirectory(tmp_path), dense_model()
        (tmp_path / "ckpt-4.data-00000-of-00001").write_bytes(b"mine")
        restores = After({4: lambda: kc.restore(other, runs)})

        with pytest.raises(kc.DirectoryNotEmptyError), pytest.warns(UserWarning, match="in the background failed"):
            fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=2), restores, batches=9)


def test_threads_that_save_and_restore_do_not_disturb_each_other(long) -> None:
    """One thread takes the results of its jobs, the other reports unclaimed errors."""
    ended = threading.Event()

    def train() -> None:
        jobs: list[background.Job] = []
        while not ended.is_set():
            jobs.append(background.Job(bool, ("run", 1), 1))
            while jobs and jobs[0].done():
                jobs.pop(0).result()

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        training = threads.submit(train)
        try:
            for _ in range(200 if long else 50):
                background.report()
                time.sleep(0.001)
        finally:
            ended.set()
    training.result()


def test_saves_of_one_step_count_with_the_largest_size() -> None:
    """A save of the whole model holds more than a save of its weights."""
    freed = threading.Event()
    for size in (100 << 20, 30 << 20):
        job = background.Job(freed.wait, ("run", 10), size)
    full = background.is_full(("run", 15), 30 << 20)
    freed.set()
    job.result()

    assert full


def test_the_state_of_callbacks_counts_to_the_size_of_a_save(tmp_path) -> None:
    """A callback may hold more than the model does."""

    class Holds(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            self.held = np.full(5 << 20, batch, "float64")

    busy = Busy()
    skipped = pytest.warns(UserWarning, match=r"The save of step 2 .* is skipped")
    with skipped, kc.BackupAndRestore(tmp_path, save_freq=1) as backup:
        # A third save would wait after a second of a loaded machine.
        fit(dense_model(), busy, Holds(), backup, After({2: busy.free}), batches=5)


def test_many_small_variables_count_as_more_than_their_bytes() -> None:
    """The objects of their snapshot take most of the memory."""
    state = ModelState(dense_model())

    assert state.snapshot().size > 1000 * len(state.names())


def test_the_error_of_a_save_does_not_keep_its_values_alive() -> None:
    """Neither does the cause of the error."""

    class Large:
        pass

    def fails(large: Large) -> None:
        held = [large]
        try:
            raise OSError("no")
        except OSError as error:
            raise kc.SaveError(f"no, for all {len(held)}") from error

    large = Large()
    alive = weakref.ref(large)
    job = background.Job(functools.partial(fails, large), ("run", 1), 1)
    del large
    with pytest.raises(kc.SaveError, match="for all 1") as caught:
        job.result()
    background.Job(bool, ("run", 1), 1).result()  # the thread has finished the job before

    assert caught.value.__cause__
    assert alive() is None


@pytest.mark.parametrize("began", [False, True])
def test_a_job_whose_submission_ctrl_c_interrupts_is_waited_for_if_it_began(monkeypatch, began) -> None:
    """If it did not begin, nothing waits for it."""
    started, freed, thread = threading.Event(), threading.Event(), concurrent.futures.ThreadPoolExecutor(1)

    def work() -> None:
        started.set()
        freed.wait()

    class Interrupted:
        def submit(self, *job: object) -> None:
            if began:
                thread.submit(*job)
                started.wait()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(background, "_thread", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.Job(work, ("run", 1), 1)
    idle = background.is_idle()
    freed.set()
    background.wait()
    thread.shutdown()

    assert idle is not began
    assert background.is_idle()


class TestExit:
    """The end of the training, or of the process."""

    def test_a_process_ends_after_ctrl_c_during_the_start_of_the_writing_thread(self, python, tmp_path) -> None:
        ended = python(f"""
start = threading.Thread.start
def interrupted(thread):
    threading.Thread.start = start
    start(thread)
    raise KeyboardInterrupt
threading.Thread.start = interrupted
try:
    background.Job(bool, ("run", 1), 1)
except KeyboardInterrupt:
    fit(dense_model(), kc.ModelCheckpoint({str(tmp_path)!r}))
""")

        assert ended.returncode == 0, ended.stderr
        assert on_disk(tmp_path) == ["ckpt-5"]

    def test_the_exit_of_the_process_waits_for_all_saves(self, python, tmp_path) -> None:
        """An error in another callback ended the training, which did not wait."""
        ended = python(f"""
busy = Busy()
checkpoint = kc.ModelCheckpoint({str(tmp_path)!r}, save_freq=2)
fit(dense_model(), checkpoint, busy, After({{3: busy.free_soon}}), Interrupts(4, RuntimeError("no more")), batches=9)
""")

        assert ended.returncode == 1
        assert "no more" in ended.stderr
        assert on_disk(tmp_path) == ["ckpt-2", "ckpt-4"]
        assert kc.CheckpointDirectory(tmp_path).verify().ok

    def test_the_exit_waits_even_if_the_directory_was_read_before_keras_was_imported(self, tmp_path) -> None:
        """Several threads write large values."""
        script = f"""
import keras_ckpt as kc
kc.CheckpointDirectory({str(tmp_path)!r}).latest()
import keras
from support.models import Interrupts, fit
model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(width) for width in (1500, 1500, 1))])
model.compile("sgd", "mse", run_eagerly=True)
fit(model, kc.ModelCheckpoint({str(tmp_path)!r}, save_freq=2), Interrupts(2, RuntimeError("no more")))
"""
        here = os.path.dirname(__file__)
        subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, cwd=here)

        assert on_disk(tmp_path) == ["ckpt-2"]

    def test_a_wait_does_not_include_later_saves(self) -> None:
        """A training in another thread may save without end."""
        first, second = threading.Event(), threading.Event()
        background.Job(first.wait, ("run", 1), 1)
        waits = threading.Thread(target=background.wait)
        waits.start()
        later = background.Job(second.wait, ("run", 2), 1)
        first.set()
        waits.join(30)
        ended = not waits.is_alive()
        second.set()
        later.result()

        assert ended

    def test_the_fit_after_an_interrupted_fit_waits_for_its_saves(self, tmp_path) -> None:
        """It continues in the same directory, as in a notebook."""
        model, busy = dense_model(), Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=2)
        with pytest.raises(KeyboardInterrupt):
            fit(model, checkpoint, busy, Interrupts(3), batches=9)
        assert on_disk(tmp_path) == []
        busy.free_soon()

        fit(model, kc.ModelCheckpoint(tmp_path, save_freq=2), batches=3)

        assert on_disk(tmp_path) == ["ckpt-2", "ckpt-4", "ckpt-6"]

    def test_a_restore_after_an_interrupt_waits_for_the_newest_checkpoint(self, tmp_path) -> None:
        """The checkpoint is still being written."""
        model, other, busy = dense_model(), dense_model(), Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=2)
        with pytest.raises(KeyboardInterrupt):
            fit(model, checkpoint, busy, Interrupts(2), batches=9)
        assert on_disk(tmp_path) == []
        busy.free_soon()

        assert kc.restore(other, tmp_path).step == 2
        assert same(model, other)

    @pytest.mark.usefixtures("_ctrl_c")
    def test_a_backup_callback_keeps_no_model_alive_after_an_error(self, tmp_path) -> None:
        """Python keeps signal handlers alive, but not the model, the data and the copies."""
        model, backup = dense_model(), kc.BackupAndRestore(tmp_path)
        alive = weakref.ref(model)
        with pytest.raises(KeyboardInterrupt):
            fit(model, backup, Interrupts(2))
        background.wait()  # a save in progress holds the model
        keras.utils.clear_session()
        del model, backup
        gc.collect()

        assert alive() is None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @pytest.mark.parametrize("callback", [kc.ModelCheckpoint, kc.BackupAndRestore])
    def test_the_memory_for_copies_is_freed_at_the_end_of_fit(self, tmp_path, callback) -> None:
        """Without the help of the garbage collector."""
        model = dense_model()
        gc.disable()
        try:
            fit(model, callback(tmp_path))
            background.Job(bool, ("run", 1), 1).result()  # the thread has finished the job before

            assert not arena_of(model)._rooms
        finally:
            gc.enable()

    @pytest.mark.usefixtures("_ctrl_c")
    def test_an_error_of_the_last_backup_restores_the_signal_handlers(self, tmp_path) -> None:
        adds = Adds(tmp_path / "ckpt-5.data-00000-of-00001")
        with pytest.raises(kc.DirectoryNotEmptyError):
            fit(dense_model(), adds, kc.BackupAndRestore(tmp_path))

        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_forked_child_does_not_wait_for_the_saves_of_its_parent(self) -> None:
        """Data loaders fork such processes."""
        freed = threading.Event()
        job = background.Job(freed.wait, ("run", 1), 1)
        child = os.fork()
        if not child:  # pragma: no cover - another process
            background.wait()
            os._exit(background.Job(lambda: 5, ("run", 1), 1).result())
        status = os.waitpid(child, 0)[1]
        freed.set()
        job.result()

        assert os.waitstatus_to_exitcode(status) == 5

    def test_a_forked_child_does_not_keep_a_directory_locked(self, tmp_path) -> None:
        """It is forked while a save is committed."""
        with Folder(tmp_path) as folder:
            with folder.mutex():
                child = os.fork()
                if not child:  # pragma: no cover - another process
                    time.sleep(60)
                    os._exit(0)
            try:
                with folder.mutex():
                    pass
            finally:
                os.kill(child, signal.SIGKILL)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_blocked_ms_is_the_time_that_training_waited(tmp_path) -> None:
    """It does not include the wait of the save in the queue."""
    busy, times = Busy(), {}
    notes = After({2: lambda: times.update(save=time.perf_counter()), 4: busy.free})
    fit(dense_model(), notes, kc.ModelCheckpoint(tmp_path, save_freq=2), busy, batches=5)
    waited = (time.perf_counter() - times["save"]) * 1000

    record = kc.CheckpointDirectory(tmp_path)[2]
    assert 0 < record.timings["blocked_ms"] < waited
    assert record.timings["write_ms"] > 0


class Holds(keras.callbacks.Callback):
    """Blocks the writing thread at the end of an epoch with a job of another callback's step."""

    def __init__(self, other: kc.ModelCheckpoint, freed: threading.Event) -> None:
        super().__init__()
        self.other = other
        self.freed = freed

    def on_epoch_begin(self, epoch, logs=None) -> None:
        # Before the first save, so that the save waits.
        background.Job(self.freed.wait, self.moment(), 1)

    def moment(self) -> object:
        position = self.other._session.progress.position
        return position.run_id, position.step + self.params["steps"]


class Adds(keras.callbacks.Callback):
    """Creates a foreign file at the beginning of each batch."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.path = path

    def on_train_batch_begin(self, batch, logs=None) -> None:
        self.path.write_bytes(b"mine")
