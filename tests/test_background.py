"""Saving while training goes on: what waits, what is left out, and what is told when."""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import gc
import os
import pathlib
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
from keras_ckpt.formats.arena import arena_of
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.model.snapshot import Snapshot
from keras_ckpt.store import background
from keras_ckpt.store.files import Folder
from keras_ckpt.store.writer import Writer
from support.models import Interrupts, X, Y, dense_model, fit, same, values


@pytest.fixture(autouse=True)
def _free(monkeypatch) -> Iterator[None]:
    """What a test that fails leaves busy would keep the others waiting."""
    events = []
    monkeypatch.setattr(Busy, "events", events)
    yield
    for event in events:
        event.set()


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """Has its effect, as in a terminal; a process that was begun in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class After(keras.callbacks.Callback):
    """Calls something at the end of a batch, counted from 1 through all epochs."""

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
    """Keeps the thread that writes from going on, so that what happens meanwhile is no matter of luck.

    From the first epoch on, for the callbacks before this one have begun then, until `free` is called.
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
    """The names of the checkpoints; a CheckpointDirectory would wait."""
    return sorted(name.removesuffix(".json") for name in os.listdir(path) if name.endswith(".json"))


def test_training_goes_on_while_a_save_is_written(tmp_path) -> None:
    """And `fit` ends when all is."""
    seen, busy = [], Busy()
    looks = After({9: lambda: seen.append(on_disk(tmp_path)), 10: busy.free})
    fit(dense_model(), kc.ModelCheckpoint(tmp_path), busy, looks, epochs=3, batches=4)

    assert seen == [[]]
    assert on_disk(tmp_path) == ["ckpt-12", "ckpt-4", "ckpt-8"]


def test_an_epoch_without_the_metric_does_not_wait_for_its_save(tmp_path) -> None:
    """As with `validation_freq`: whether there is no such metric, only the directory knows, which would wait."""
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


def test_it_waits_if_told_to(tmp_path) -> None:
    """Then a batch ends when its checkpoint is durable."""
    seen = []
    looks = After(dict.fromkeys((1, 2), lambda: seen.append(on_disk(tmp_path))))
    fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1, save_on_background=False), looks, batches=3)

    assert seen == [["ckpt-1"], ["ckpt-1", "ckpt-2"]]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 2}, {"jit_compile": True}], ids=str)
def test_what_is_written_later_is_of_the_step_of_the_save(tmp_path, optimizer, options) -> None:
    """To the bit, though training has gone on to its end before the first byte is written."""
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


def test_a_snapshot_is_let_go_when_it_is_written() -> None:
    """It would hold the memory of what training changes."""
    snapshot = ModelState(dense_model()).snapshot()
    alive = weakref.ref(snapshot)
    freed = threading.Event()
    background.Job(freed.wait, ("another run", 1), 1)
    job = background.Job(functools.partial(id, snapshot), ("run", 1), 1)
    del snapshot
    assert alive() is not None

    freed.set()
    job.result()
    background.Job(bool, ("run", 1), 1).result()  # the thread has turned to something else

    assert alive() is None


class TestWhatComesMeanwhile:
    """Copies that wait may take the memory of one state, or a little of any number."""

    @pytest.fixture(autouse=True)
    def _nothing_is_little(self, monkeypatch) -> None:
        monkeypatch.setattr(background, "LITTLE", 0)

    def test_a_save_by_batches_is_left_out_and_told_of_once(self, tmp_path, capsys) -> None:
        """With verbose, each."""
        busy = Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=1, verbose=1)
        frees = After({3: busy.free, 4: background.wait})
        with pytest.warns(UserWarning, match="The save of step 1 into .* is skipped, because an earlier save") as told:
            fit(dense_model(), checkpoint, busy, frees, batches=5)

        assert len(told) == 1
        assert {"ckpt-1", "ckpt-2", "ckpt-3"}.isdisjoint(on_disk(tmp_path))
        assert "ckpt-5" in on_disk(tmp_path)
        assert "Step 2, epoch 0: val_loss not known, skipped, because an earlier save is" in capsys.readouterr().out

    def test_one_at_the_end_of_an_epoch_waits(self, tmp_path) -> None:
        """So does one of its last batch."""
        busy = Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=["epoch", 4])
        fit(dense_model(), checkpoint, busy, After({3: busy.free_soon}), epochs=2, batches=4)

        assert on_disk(tmp_path) == ["ckpt-4", "ckpt-8"]

    def test_one_that_is_ranked_waits(self, tmp_path) -> None:
        """It may be the best."""
        busy = Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, monitor="loss", save_freq=2, keep=kc.BestN(10))
        fit(dense_model(), checkpoint, busy, After({1: busy.free_soon}), batches=5)

        assert on_disk(tmp_path) == ["ckpt-2", "ckpt-4"]

    def test_one_that_training_waits_for_is_not_left_out(self, tmp_path) -> None:
        """It waits for what another callback saves in the background too."""
        busy = Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=2, save_on_background=False)
        fit(dense_model(), checkpoint, busy, After({1: busy.free_soon}), batches=5)

        assert on_disk(tmp_path) == ["ckpt-2", "ckpt-4"]

    def test_callbacks_that_save_the_same_step_do_not_wait_for_each_other(self, tmp_path) -> None:
        """They share a snapshot. Were the second to wait for the first, nobody would free it."""
        freed = threading.Event()

        class FreesLast(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None) -> None:
                assert [on_disk(tmp_path / name) for name in "ab"] == [[], []]
                freed.set()

        first, second = (kc.ModelCheckpoint(tmp_path / name) for name in "ab")
        holds = Holds(first, freed)
        fit(dense_model(), first, second, holds, FreesLast(), batches=2)

        assert [on_disk(tmp_path / name) for name in "ab"] == [["ckpt-2"], ["ckpt-2"]]

    def test_with_xla_each_has_what_was_there_when_it_was_called(self, tmp_path, monkeypatch) -> None:
        """The second is called when the first is yet to be written, and something has changed in between."""
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

    def test_a_backup_by_batches_is_left_out_and_one_that_a_signal_asks_for_waits(self, tmp_path) -> None:
        """The process may end after it."""
        code = f"""
warnings.simplefilter("ignore")
background.LITTLE = 0
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

    def test_little_models_do_not_wait(self, tmp_path, monkeypatch) -> None:
        """A save after every batch is written, however slow the disk is at the moment."""
        monkeypatch.setattr(background, "LITTLE", 1 << 20)
        busy = Busy()
        fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1), busy, After({5: busy.free}), batches=5)

        assert len(on_disk(tmp_path)) == 5


class TestErrors:
    """A file of somebody else's where a checkpoint's is to be: the save of its step fails, whoever is root."""

    def test_one_comes_with_the_next_batch(self, tmp_path) -> None:
        """And training ends there."""
        (tmp_path / "ckpt-2.data-00000-of-00001").write_bytes(b"mine")
        batches = After({2: background.wait})

        with pytest.raises(kc.DirectoryNotEmptyError, match="ckpt-2"):
            fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=2), batches, batches=9)

        assert batches.batches == 2  # the third ended, for those before this one in the list
        assert (tmp_path / "ckpt-2.data-00000-of-00001").read_bytes() == b"mine"

    def test_verbose_does_not_call_it_a_decision(self, tmp_path, capsys) -> None:
        """As if the policy did not want what could not be written."""
        (tmp_path / "ckpt-2.data-00000-of-00001").write_bytes(b"mine")

        with pytest.raises(kc.DirectoryNotEmptyError):
            fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=2, verbose=1), batches=2)

        assert "Step 2, epoch 0: val_loss not known, the save failed\n" in capsys.readouterr().out

    @pytest.mark.parametrize("callback", [kc.ModelCheckpoint, kc.BackupAndRestore])
    def test_one_of_the_last_save_comes_at_the_end_of_training(self, tmp_path, callback) -> None:
        """`fit` does not end as if all were well."""
        adds = Adds(tmp_path / "ckpt-3.data-00000-of-00001")

        with pytest.raises(kc.DirectoryNotEmptyError, match="ckpt-3"):
            fit(dense_model(), adds, callback(tmp_path), batches=3)

    def test_what_a_backup_failed_to_save_is_saved_where_an_error_ends_the_training(self, tmp_path) -> None:
        """The state of the batch at which the error came is whole."""
        adds = Adds(tmp_path / "ckpt-2.data-00000-of-00001")
        with pytest.raises(kc.DirectoryNotEmptyError), kc.BackupAndRestore(tmp_path, save_freq=2) as backup:
            fit(dense_model(), adds, After({3: background.wait}), backup, batches=9)

        assert on_disk(tmp_path) == ["ckpt-3"]

    def test_backups_that_failed_do_not_keep_the_last_from_being_saved(self, tmp_path) -> None:
        """Of the first the training ends, and the others are told of."""
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
    def test_the_error_that_ended_the_training_is_raised_though_no_backup_could_be_saved(self, tmp_path) -> None:
        """All of them are told of, and the next training may begin."""
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
    def test_a_backup_that_failed_does_not_cost_the_one_of_an_error_in_validation(
        self, tmp_path, monkeypatch, reason
    ) -> None:
        """Validation may be changing the model, so what is saved is from before it."""
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
    def test_no_memory_for_copies_is_an_error_of_the_save(self, tmp_path, monkeypatch, jit_compile) -> None:
        """It says which, and what to do; also where the memory was asked for before there was anything to save."""

        def none(size: int) -> None:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

        model = dense_model()
        model.jit_compile = jit_compile
        monkeypatch.setattr(arena, "pages", none)

        with pytest.raises(kc.SaveError, match=r"Could not save step 2 into .* Cannot allocate memory\. A save needs"):
            fit(model, kc.ModelCheckpoint(tmp_path, save_freq=2))

        assert on_disk(tmp_path) == []

    @pytest.mark.usefixtures("_ctrl_c")
    def test_a_backup_that_ctrl_c_cuts_off_is_saved_after_all(self, tmp_path, monkeypatch) -> None:
        """The first waits for the backup, the second does not wait for the disk; leaving the `with` statement does."""
        monkeypatch.setattr(background, "LITTLE", 0)
        busy, main = Busy(), threading.main_thread().ident

        class Impatient(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None) -> None:
                for seconds in (0.3, 0.6):
                    threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT)).start()
                threading.Timer(1, busy.free).start()

        with pytest.raises(KeyboardInterrupt), kc.BackupAndRestore(tmp_path) as backup:
            fit(dense_model(), busy, Impatient(), backup, epochs=2)

        assert on_disk(tmp_path) == ["ckpt-5"]


class TestErrorsThatNobodyHeardOf:
    """Because the training was interrupted before they could be told."""

    @pytest.fixture
    def interrupted(self, tmp_path) -> kc.CheckpointDirectory:
        """Its second save failed."""
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

    def test_are_told_of_by_the_next_restore(self, interrupted) -> None:
        """Once."""
        with pytest.warns(UserWarning, match="in the background failed: .* has a file ckpt-4.data-00000-of-00001"):
            kc.restore(dense_model(), interrupted)

        kc.restore(dense_model(), interrupted)

    def test_are_told_of_each_time(self, tmp_path) -> None:
        """Python shows a warning of the same words once."""
        (tmp_path / "ckpt-1.data-00000-of-00001").write_bytes(b"mine")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            for _ in range(2):
                with pytest.raises(KeyboardInterrupt):
                    fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1), Interrupts(1))
                background.tell()

        assert len([each for each in told if "in the background failed" in str(each.message)]) == 2

    def test_are_told_of_by_the_next_training(self, interrupted, tmp_path) -> None:
        """Which is another one, and ends well."""
        with pytest.warns(UserWarning, match="in the background failed: .* has a file ckpt-4.data-00000-of-00001"):
            fit(dense_model(), kc.ModelCheckpoint(tmp_path / "other"))

        assert on_disk(tmp_path / "other") == ["ckpt-5"]

    def test_are_told_of_by_the_end_of_the_process(self, tmp_path) -> None:
        """On its error output."""
        (tmp_path / "ckpt-2.data-00000-of-00001").write_bytes(b"mine")
        ended = python(f"""
checkpoint = kc.ModelCheckpoint({str(tmp_path)!r}, save_freq=2)
fit(dense_model(), checkpoint, Interrupts(2, RuntimeError("no more")), batches=9)
""")

        assert "has a file ckpt-2.data-00000-of-00001" in ended.stderr

    def test_are_told_of_by_a_process_that_a_signal_ends(self, tmp_path) -> None:
        """The backup was saved, the checkpoint of the same batch was not."""
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

    def test_are_raised_too_where_the_training_goes_on(self, tmp_path) -> None:
        """A callback may restore meanwhile."""
        runs, other = kc.CheckpointDirectory(tmp_path), dense_model()
        (tmp_path / "ckpt-4.data-00000-of-00001").write_bytes(b"mine")
        restores = After({4: lambda: kc.restore(other, runs)})

        with pytest.raises(kc.DirectoryNotEmptyError), pytest.warns(UserWarning, match="in the background failed"):
            fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=2), restores, batches=9)


def test_threads_that_save_and_restore_do_not_disturb_each_other(long) -> None:
    """One takes up what it has saved, the other tells of what nobody takes up."""
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
                background.tell()
                time.sleep(0.001)
        finally:
            ended.set()
    training.result()


def test_of_saves_of_one_moment_the_greatest_counts() -> None:
    """One of the whole model holds more than one of its weights."""
    freed = threading.Event()
    for size in (100 << 20, 30 << 20):
        job = background.Job(freed.wait, ("run", 10), size)
    full = background.is_full(("run", 15), 30 << 20)
    freed.set()
    job.result()

    assert full


def test_what_is_saved_beside_the_model_counts_too(tmp_path) -> None:
    """A callback may hold more than the model does."""

    class Holds(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            self.held = np.full(5 << 20, batch, "float64")

    busy = Busy()
    skipped = pytest.warns(UserWarning, match=r"The save of step 2 .* is skipped")
    with skipped, kc.BackupAndRestore(tmp_path, save_freq=1) as backup:
        fit(dense_model(), busy, Holds(), backup, After({4: busy.free}), batches=5)


def test_many_little_variables_count_as_more_than_their_bytes() -> None:
    """A snapshot of them is objects, most of all."""
    state = ModelState(dense_model())
    state.snapshot()

    assert state.size > 1000 * len(state.names())


def test_an_error_does_not_keep_the_values_that_were_to_be_saved() -> None:
    """Nor does what led to it."""

    class Great:
        pass

    def fails(great: Great) -> None:
        held = [great]
        try:
            raise OSError("no")
        except OSError as error:
            raise kc.SaveError(f"no, for all {len(held)}") from error

    great = Great()
    alive = weakref.ref(great)
    job = background.Job(functools.partial(fails, great), ("run", 1), 1)
    del great
    with pytest.raises(kc.SaveError, match="for all 1") as caught:
        job.result()
    background.Job(bool, ("run", 1), 1).result()  # the thread has turned to something else

    assert caught.value.__cause__
    assert alive() is None


@pytest.mark.parametrize("began", [False, True])
def test_a_job_that_ctrl_c_cuts_off_is_waited_for_if_it_began(monkeypatch, began) -> None:
    """If it did not, nobody waits for it."""
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


class TestLeaving:
    """The training, or the process."""

    def test_a_process_ends_whenever_ctrl_c_came(self, tmp_path) -> None:
        """Also while the thread that writes began."""
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

    def test_a_process_that_ends_waits(self, tmp_path) -> None:
        """An error in another callback ended the training, so that nobody else has waited."""
        ended = python(f"""
busy = Busy()
checkpoint = kc.ModelCheckpoint({str(tmp_path)!r}, save_freq=2)
fit(dense_model(), checkpoint, busy, After({{3: busy.free_soon}}), Interrupts(4, RuntimeError("no more")), batches=9)
""")

        assert ended.returncode == 1
        assert "no more" in ended.stderr
        assert on_disk(tmp_path) == ["ckpt-2", "ckpt-4"]
        assert kc.CheckpointDirectory(tmp_path).verify().ok

    def test_it_waits_whatever_was_imported_first(self, tmp_path) -> None:
        """A directory may be looked at before Keras and its threads are there. Great values are written by threads."""
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

    def test_who_waits_does_not_wait_for_what_comes_later(self) -> None:
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

    def test_the_training_after_an_interrupted_one_waits(self, tmp_path) -> None:
        """It goes on in the same directory, in a notebook."""
        model, busy = dense_model(), Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=2)
        with pytest.raises(KeyboardInterrupt):
            fit(model, checkpoint, busy, Interrupts(3), batches=9)
        assert on_disk(tmp_path) == []
        busy.free_soon()

        fit(model, kc.ModelCheckpoint(tmp_path, save_freq=2), batches=3)

        assert on_disk(tmp_path) == ["ckpt-2", "ckpt-4", "ckpt-6"]

    def test_what_is_restored_after_an_interrupt_is_the_newest(self, tmp_path) -> None:
        """Though it is being written still."""
        model, other, busy = dense_model(), dense_model(), Busy()
        checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=2)
        with pytest.raises(KeyboardInterrupt):
            fit(model, checkpoint, busy, Interrupts(2), batches=9)
        assert on_disk(tmp_path) == []
        busy.free_soon()

        assert kc.restore(other, tmp_path).step == 2
        assert same(model, other)

    @pytest.mark.usefixtures("_ctrl_c")
    def test_a_backup_that_an_error_ended_keeps_nothing(self, tmp_path) -> None:
        """Python keeps who watches its signals: not the model, the data and the copies with it."""
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
    def test_the_memory_for_copies_is_given_back_at_once(self, tmp_path, callback) -> None:
        """Not when Python comes to look for what is unreachable."""
        model = dense_model()
        gc.disable()
        try:
            fit(model, callback(tmp_path))
            background.Job(bool, ("run", 1), 1).result()  # the thread has turned to something else

            assert not arena_of(model)._rooms
        finally:
            gc.enable()

    @pytest.mark.usefixtures("_ctrl_c")
    def test_an_error_of_the_last_backup_ends_the_watch_for_signals(self, tmp_path) -> None:
        """They are for whoever had them before."""
        adds = Adds(tmp_path / "ckpt-5.data-00000-of-00001")
        with pytest.raises(kc.DirectoryNotEmptyError):
            fit(dense_model(), adds, kc.BackupAndRestore(tmp_path))

        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_a_forked_child_neither_waits_nor_is_waited_for(self) -> None:
        """As the processes that prepare data are."""
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
        """It was forked while a save was published."""
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


def test_timings_tell_how_long_training_stood_still(tmp_path) -> None:
    """Not how long the save had to wait to be written."""
    busy, times = Busy(), {}
    notes = After({2: lambda: times.update(save=time.perf_counter()), 4: busy.free})
    fit(dense_model(), notes, kc.ModelCheckpoint(tmp_path, save_freq=2), busy, batches=5)
    waited = (time.perf_counter() - times["save"]) * 1000

    record = kc.CheckpointDirectory(tmp_path)[2]
    assert 0 < record.timings["blocked_ms"] < waited
    assert record.timings["write_ms"] > 0


class Holds(keras.callbacks.Callback):
    """Has the thread that writes wait at the end of an epoch, for something of the moment of another callback."""

    def __init__(self, other: kc.ModelCheckpoint, freed: threading.Event) -> None:
        super().__init__()
        self.other = other
        self.freed = freed

    def on_epoch_begin(self, epoch, logs=None) -> None:
        # Before the first save, so that it waits too.
        background.Job(self.freed.wait, self.moment(), 1)

    def moment(self) -> object:
        position = self.other._session.progress.position
        return position.run_id, position.step + self.params["steps"]


class Adds(keras.callbacks.Callback):
    """Makes a file of somebody else's in the first batch."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.path = path

    def on_train_batch_begin(self, batch, logs=None) -> None:
        self.path.write_bytes(b"mine")


def python(code: str) -> subprocess.CompletedProcess[str]:
    """A process that runs the code with the names of this module."""
    here = os.path.dirname(__file__)
    code = f"import sys, warnings\nsys.path.insert(0, {here!r})\nfrom test_background import *\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
