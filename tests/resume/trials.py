"""Processes that run the script and are killed or interrupted. They are forked from a station."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

from keras_ckpt.store.directory import CheckpointDirectory
from reliability.trainer import keras_station
from resume import script

_forks = multiprocessing.get_context("fork")


def prepared():
    """A station that has Keras and its backend loaded."""
    return keras_station(script.prepare)


class Process:
    """A process that runs the script.

    Args:
        name: The row of the script.
        path: Where the run is.
        seed: The seed of the process, if it resumes. A process that finds no backup has seed 0, as the script has.
        place: Where in the list of callbacks the backup stands.
        kill_at: The batch at which the process is killed, 0 for none.

    Attributes:
        resumes: Whether the process finds a backup.
        trained: The number of batches that the process has reported.
        seconds: The time since the end of its first batch.
        result: The digests of the end of the run, once it has ended.
    """

    def __init__(self, name: str, path: str, seed: int, place: int = 0, kill_at: int = 0) -> None:
        self._ours, theirs = _forks.Pipe()
        self.resumes = CheckpointDirectory(pathlib.Path(path, "backup")).latest() is not None
        seed = seed if self.resumes else 0
        self._process = _forks.Process(target=_run, args=(theirs, name, path, seed, place, kill_at))
        self._process.start()
        theirs.close()
        self.result: dict[str, str] | None = None
        self.trained = 0
        self.seconds = 0.0
        self._first: float | None = None

    def listen(self, until: Callable[[str], bool] = lambda what: False, seconds: float | None = None) -> None:
        """Receives reports until the process ends, the time is over, or a report is the awaited report."""
        end = None if seconds is None else time.monotonic() + seconds
        try:
            while self._ours.poll(None if end is None else max(0, end - time.monotonic())):
                what, number = self._ours.recv()
                self.trained += what == "batch"
                if what == "batch":
                    self._first = self._first or time.monotonic()
                    self.seconds = time.monotonic() - self._first
                if what == "result":
                    self.result = number
                if until(what):
                    return
        except (EOFError, ConnectionResetError):
            return

    def send(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def end(self) -> int:
        """Waits for the end, and returns the exit code."""
        self.listen()
        self._process.join()
        return self._process.exitcode


def _run(theirs: Connection, name: str, path: str, seed: int, place: int, kill_at: int) -> None:
    trained = 0

    def tell(what: str, number: int) -> None:
        nonlocal trained
        trained += what == "batch"
        theirs.send((what, number))
        if kill_at and trained == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    # A shell starts a background process with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        theirs.send(("result", script.run(name, path, seed, place, tell)))
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        os._exit(1)


def whole(name: str) -> dict[str, str]:
    """The digests of an undisturbed run."""
    with tempfile.TemporaryDirectory() as path:
        return _finished(Process(name, path, 0))


def killed(name: str, at: int, place: int) -> tuple[dict[str, str], bool, float]:
    """Kills a run at the end of a batch, and resumes it in a second process.

    Returns:
        The digests of the resumed run, whether the second process found a backup, and the seconds from the end of the
        first batch to the kill.
    """
    with tempfile.TemporaryDirectory() as path:
        first = Process(name, path, 0, place, at)
        assert first.end() == -signal.SIGKILL
        second = Process(name, path, at, place)
        return _finished(second), second.resumes, first.seconds


def killed_often(name: str, times: int, seed: int) -> dict[str, str]:
    """The digests of a run that is killed at random moments, several times, and resumed each time."""
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as path:
        for number in range(times):
            process = Process(name, path, number)
            process.listen(until=lambda what: what == "begin")
            process.listen(seconds=moments.uniform(0, 1))
            process.send(signal.SIGKILL)
            if process.end() == 0:
                break
        else:
            process = Process(name, path, times)
        return process.result or _finished(process)


def signalled(name: str, number: int, seed: int) -> tuple[dict[str, str], int, bool]:
    """Sends a signal to a run at a random moment, and resumes the run.

    Returns:
        The digests of the resumed run, the exit code of the first process, and whether the backup of the first process
        has all batches that it trained.
    """
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as path:
        process = Process(name, path, 0)
        process.listen(until=lambda what: what == "begin")
        kind, most = moments.choice([("begin", 0), ("batch", 55), ("validation", 12), ("epoch", 2), ("time", 0)])
        for _ in range(moments.randint(1, most) if most else 0):
            process.listen(until=lambda what: what == kind)
        if kind == "time":
            process.listen(seconds=moments.uniform(0, 0.5))
        process.send(number)
        code = process.end()
        if code == 0:
            return process.result or {}, code, False
        newest = CheckpointDirectory(pathlib.Path(path, "backup")).latest()
        complete = newest is not None and newest.step >= process.trained
        return _finished(Process(name, path, 1)), code, complete


def _finished(process: Process) -> dict[str, str]:
    code = process.end()
    assert process.result is not None, f"the script ended with {code}"
    return process.result
