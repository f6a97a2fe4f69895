"""Each file operation fails in turn: what was there stays, the error says where, and the next save works."""

from __future__ import annotations

import collections
import errno
import fcntl
import gc
import itertools
import os
import pathlib
import random
import shutil
import types
import warnings
from collections.abc import Callable

import pytest

from keras_ckpt.errors import CheckpointError
from keras_ckpt.store import files, locks, streams
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.policies import LatestN
from keras_ckpt.store.writer import SaveRequest, Writer
from reliability.crash_states import IN_ORDER, Disk, Snapshot, make, read
from reliability.test_crash_states import FOREIGN, Checkpoint, Examiner, Promise, copy, memory, perform, seen
from support.runs import payload

__all__ = ["memory"]

NUMBERS = ("ENOSPC", "EDQUOT", "EIO", "EACCES", "EROFS", "EMFILE", "EINTR", "ESTALE")


class Fault:
    """Fails the n-th call of all that go through it, and, if it lasts, those that come after.

    Args:
        call: Which call; none at 0.
        number: The error's name.
        lasting: `""` for that call only, `"same"` for each later call of that function, `"all"` for each later call;
            but for reads. Where no sidecar can be read any more, all are damaged, and the order of saving starts again.
    """

    def __init__(self, call: int = 0, number: str = "EIO", lasting: str = "") -> None:
        self.call = call
        self.number = getattr(errno, number)
        self.lasting = lasting
        self.calls = 0
        self.failed = ""

    def meet(self, name: str, subject: object = None) -> None:
        self.calls += 1
        again = self.failed and (self.lasting == "all" or (self.lasting == "same" and name == self.failed))
        if self.calls == self.call or (again and name not in ("read", "pread")):
            self.failed = self.failed or name
            raise OSError(self.number, os.strerror(self.number), subject)


class Faulty:
    """A module some of whose functions meet a fault."""

    READING = frozenset(("open", "read", "pread", "preadv", "listdir", "lstat", "fstat"))
    CHANGING = frozenset(("mkdir", "rename", "unlink", "rmdir", "fsync", "write", "pwrite", "ftruncate", "flock"))

    def __init__(self, module: types.ModuleType, fault: Fault) -> None:
        self.module = module
        self.fault = fault

    def __getattr__(self, name: str):
        function = getattr(self.module, name)
        if name not in self.READING | self.CHANGING:
            return function

        def call(*arguments, **named):
            self.fault.meet(name, arguments[0] if isinstance(arguments[0], str) else None)
            return function(*arguments, **named)

        return call

    def rmtree(self, name: str, *, dir_fd: int) -> None:
        """As `shutil.rmtree`, which does not go through the file module's `os`."""
        self.fault.meet("rmtree")
        shutil.rmtree(name, dir_fd=dir_fd)


def save(runs: CheckpointDirectory, step: int, keep: LatestN | None = None) -> None:
    Writer(runs, keep).save(SaveRequest(step=step, run_id="run", batch=0), payload(b"new"))


ACTIONS: dict[str, Callable[[CheckpointDirectory], object]] = {
    "a save": lambda runs: save(runs, 40),
    "a save that prunes": lambda runs: save(runs, 40, LatestN(1)),
    "a step saved again": lambda runs: save(runs, 10),
    "a step saved again that prunes": lambda runs: save(runs, 10, LatestN(1)),
    "a step saved again that is pinned": lambda runs: save(runs, 20),
    "a prune": lambda runs: runs.prune(LatestN(1)),
    "a pin": lambda runs: runs.pin(10, "mine"),
    "an unpin": lambda runs: runs.unpin(20),
    "metrics added": lambda runs: runs.add_metrics(10, accuracy=0.5),
}


def three_checkpoints(path: pathlib.Path) -> Snapshot:
    """Three checkpoints, one of them pinned."""
    make(FOREIGN, path)
    copy(path)
    CheckpointDirectory(path).pin(20)
    start = read(path)
    shutil.rmtree(path)
    return start


class Sweep:
    """Does an action again and again, with a fault at another place."""

    def __init__(
        self,
        scratch: pathlib.Path,
        tally: collections.Counter[str],
        start: Snapshot,
        action: Callable[[CheckpointDirectory], object],
        before: frozenset[Checkpoint] | None = None,
    ) -> None:
        self.examiner = Examiner(scratch, tally, FOREIGN)
        self.tally = tally
        self.start = start
        self.action = action
        make(start, self.examiner.path)
        runs = CheckpointDirectory(self.examiner.path)
        before = seen(runs) if before is None else before
        whole = Fault()
        self.run(runs, whole)
        self.calls = whole.calls
        self.promise = Promise(before, seen(runs))
        shutil.rmtree(self.examiner.path)

    def run(self, runs: CheckpointDirectory, fault: Fault) -> str | None:
        """What the error that the action raises says."""
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in (files, locks, streams):
                patch.setattr(module, "os", Faulty(os, fault))
                patch.setattr(module, "fcntl", Faulty(fcntl, fault))
            patch.setattr(files, "shutil", Faulty(shutil, fault))
            try:
                self.action(runs)
            except (CheckpointError, OSError) as error:
                return str(error)  # the error itself would keep the descriptors of the action's frames open
        return None

    def fail(self, call: int, number: str, lasting: str) -> None:
        """One trial."""
        make(self.start, self.examiner.path)
        runs = CheckpointDirectory(self.examiner.path)
        fault = Fault(call, number, lasting)
        error = self.run(runs, fault)
        self.tally["errors"] += error is not None
        if error is None:
            # A prune on a full disk frees some of it, and writes the state file again: nothing is synced twice.
            full = self.promise.before - self.promise.after and number in ("ENOSPC", "EDQUOT")
            self.tally["acknowledged after a failed sync"] += fault.failed == "fsync" and not full
            self.tally["untrue"] += not self.promise.after - self.promise.before <= seen(runs)
        else:
            self.tally["unexplained"] += runs.path not in error
        self.tally["lost"] += self.promise.lost(self.examiner.visible(runs), recovered=False)
        Writer(runs).save(SaveRequest(step=98), payload())
        locks.drop_all()  # the next start is another process
        self.examiner.check(self.promise.joined_by(Checkpoint.of(runs[98])))
        shutil.rmtree(self.examiner.path)

    def fail_everywhere(self, chance: random.Random, common: float, other: float) -> None:
        """Tries a share of the common errors, which are ENOSPC and EIO, once and for good, and of all other errors."""
        for call, number, lasting in itertools.product(range(1, self.calls + 1), NUMBERS, ("", "same", "all")):
            share = common if number in ("ENOSPC", "EIO") and lasting != "same" else other
            if chance.random() < share:
                self.fail(call, number, lasting)

    def verify(self) -> None:
        """What a failure counts beside what is lost or invalid."""
        for what in ("leftovers", "decoys", "unexplained", "untrue", "acknowledged after a failed sync"):
            assert not self.tally[what], self.tally


@pytest.mark.parametrize("name", ACTIONS)
def test_an_error_at_any_call_loses_nothing(memory, tally, long, dice, name) -> None:
    """Once, for that function from then on, or for all: what was there stays, and the next save works."""
    sweep = Sweep(memory, tally, three_checkpoints(memory / "run"), ACTIONS[name])

    sweep.fail_everywhere(dice, common=1 if long else 0.2, other=1 if long else 0.02)

    sweep.verify()
    assert tally["errors"] > tally["trials"] / 4


@pytest.mark.parametrize("name", ["a step saved again", "a step saved again in other files", "saves with pruning"])
def test_an_error_in_a_recovery_loses_nothing(memory, tally, long, dice, name) -> None:
    """Wherever the process before was killed, and whatever fails then: the next start recovers."""
    recording = perform(name)
    disk = Disk(recording.start, IN_ORDER)
    every = 1 if long else 15
    offset = dice.randrange(every)
    for moment, operation in enumerate(recording.log, 1):
        disk.replay(operation)
        if moment % every == offset:
            before = recording.promise(moment).before
            sweep = Sweep(memory, tally, disk.whole(), lambda runs: Writer(runs).open(), before)
            sweep.fail_everywhere(dice, common=1 if long else 0.2, other=0.1 if long else 0)

            sweep.verify()


@pytest.mark.parametrize("name", ACTIONS)
def test_an_error_leaves_no_descriptor_open(memory, name) -> None:
    """Neither a leak nor a lock that the process holds against itself."""
    sweep = Sweep(memory, collections.Counter(), three_checkpoints(memory / "run"), ACTIONS[name])
    gc.freeze()  # what is there already need not be looked at again and again
    for call in range(1, sweep.calls + 1):
        make(sweep.start, sweep.examiner.path)
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))

        sweep.run(CheckpointDirectory(sweep.examiner.path), Fault(call))

        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before
        shutil.rmtree(sweep.examiner.path)
    gc.unfreeze()
