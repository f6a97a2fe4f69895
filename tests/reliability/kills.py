"""Kills a process at random moments, and by strace before its system calls."""

from __future__ import annotations

import collections
import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.record import CheckpointRecord
from reliability.oracle import verify
from reliability.trainer import Acknowledge, Child, Job, at_random, train

# Calls with a question mark do not exist on every processor.
CHANGES = (
    "write,pwrite64,openat,?rename,?renameat,renameat2,?link,linkat,?unlink,unlinkat,?mkdir,mkdirat,?rmdir,fsync,fdatasync,"
    "ftruncate,flock"
)
Action = Callable[[Acknowledge, Job], None]


def kill_at_random(job: Job, delay: float) -> collections.Counter[str]:
    """Kills a training some time after the first acknowledgement, and checks the state that is left."""
    before = list(CheckpointDirectory(job.path))
    with Child(train, job, at_random()) as child:
        child.go_on(delay)
        child.kill()
    return verify(job, before, child.acknowledged)


def save(acknowledge: Acknowledge, job: Job) -> None:
    """Saves the next two steps, and prunes after each."""
    train(acknowledge, job, (1, 1))


def save_again(acknowledge: Acknowledge, job: Job) -> None:
    """Saves the newest step two times more."""
    train(acknowledge, job, (0, 0))


def prune(acknowledge: Acknowledge, job: Job) -> None:
    CheckpointDirectory(job.path).prune(job.keep)


def recover(acknowledge: Acknowledge, job: Job) -> None:
    job.writer().open()


def rest(acknowledge: Acknowledge) -> None:
    """Does nothing."""


def probe() -> None:
    """Raises where strace may not watch a process.

    Raises:
        PermissionError: With the message of strace.
    """
    with Child(rest) as child, _strace(child):
        child.end()


def fill(job: Job, steps: int) -> None:
    """Saves steps, and prunes none."""
    writer = job.writer()
    writer.keep = None
    for step in range(1, steps + 1):
        job.save(writer, step)
    writer.close()


class Choice(NamedTuple):
    """Which calls of each kind a process is killed before: each one, or every so many from an offset on."""

    every: int = 1
    offset: int = 0

    def of(self, count: int) -> range:
        """The numbers of the chosen calls, at least one of them."""
        return range(1 + self.offset % min(self.every, count), count + 1, self.every)


def kill_everywhere(job: Job, action: Action, choice: Choice) -> collections.Counter[str]:
    """Kills an action before each chosen system call, and checks each time the state that is left."""
    return _kill_everywhere(job, action, list(CheckpointDirectory(job.path)), [], choice)


def kill_recoveries(job: Job, choice: Choice, inner: Choice) -> collections.Counter[str]:
    """Kills saves that supersede, and kills each recovery before system calls of its own, the inner choice."""
    counts: collections.Counter[str] = collections.Counter()
    before = list(CheckpointDirectory(job.path))
    for call, number in _points(job, save_again, choice):
        _, acknowledged = _kill(job, save_again, call, number)
        counts.update(_kill_everywhere(job, recover, before, acknowledged, inner))
    return counts


def _kill_everywhere(
    job: Job,
    action: Action,
    before: Sequence[CheckpointRecord],
    acknowledged: Sequence[CheckpointRecord],
    choice: Choice,
) -> collections.Counter[str]:
    counts: collections.Counter[str] = collections.Counter()
    for call, number in _points(job, action, choice):
        killed, heard = _kill(job, action, call, number)
        counts.update(verify(job, before, [*acknowledged, *heard]), **{call if killed else "ended": 1})
    # How many files a writer reads again depends on the time: some runs make fewer calls than the counted run.
    assert counts["ended"] <= counts["openat"] / 5 + (choice.every > 1), counts
    return counts


def _points(job: Job, action: Action, choice: Choice) -> Iterator[tuple[str, int]]:
    """The chosen system calls of an action: name and number. The directory is as now for each of them."""
    with tempfile.TemporaryDirectory() as temporary:
        original = f"{temporary}/original"
        if os.path.exists(job.path):
            shutil.copytree(job.path, original)
        counts = _calls(job, action)
        points = [(call, number) for call, count in counts.items() for number in choice.of(count)]
        for call, number in points:
            shutil.rmtree(job.path)
            if os.path.exists(original):
                shutil.copytree(original, job.path)
            yield call, number


def _calls(job: Job, action: Action) -> collections.Counter[str]:
    """How often an action makes each system call that changes anything."""
    with tempfile.NamedTemporaryFile("r") as log:
        with Child(action, job) as child, _strace(child, "-o", log.name, "-e", f"trace={CHANGES}"):
            assert child.end() == 0
        return collections.Counter(re.findall(r"^\d+ +(\w+)\(", log.read(), re.MULTILINE))


def _kill(job: Job, action: Action, call: str, number: int) -> tuple[bool, list[CheckpointRecord]]:
    """Kills an action before it makes a system call for the n-th time.

    Returns:
        Whether it made the call, and the checkpoints that it acknowledged.
    """
    inject = f"inject={call}:signal=SIGKILL:when={number}"
    with Child(action, job) as child, _strace(child, "-e", f"trace={call}", "-e", inject, "-o", os.devnull):
        code = child.end()
    assert code == -signal.SIGKILL or (code, call) == (0, "openat"), (
        f"it ended by itself ({code}) before {call} {number}"
    )
    return code == -signal.SIGKILL, child.acknowledged


@contextlib.contextmanager
def _strace(child: Child, *options: str) -> Iterator[None]:
    """Lets a child go once strace watches it."""
    command = ["strace", "-f", "-p", str(child.process.pid), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        try:
            line = strace.stderr.readline()
            if "attached" not in line:
                raise PermissionError(line)
            child.go()
            yield
        finally:
            strace.terminate()
            strace.stderr.read()
