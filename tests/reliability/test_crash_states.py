"""A crash at any moment of any workload: what was acknowledged is there, what is visible is whole, nothing is left."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import functools
import os
import pathlib
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Set
from typing import NamedTuple

import pytest

from keras_ckpt.errors import DamagedCheckpointError, DiskFullError, SaveError
from keras_ckpt.formats import sharing
from keras_ckpt.store import commit, files, streams
from keras_ckpt.store.checks import check_files
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import PRIVATE
from keras_ckpt.store.layout import TENSORFLOW, Series
from keras_ckpt.store.policies import LatestN, PreservationPolicy
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.writer import SaveRequest, Writer
from reliability.crash_states import (
    IN_ANY_ORDER,
    IN_ORDER,
    RENAMES_IN_TWO,
    Disk,
    Operation,
    Recorder,
    Snapshot,
    key,
    make,
    read,
)
from support.runs import Filler, file_payload, payload, shared_payload

FOREIGN = {
    "notes.txt": b"mine",
    "history-2.json": b"{}",
    "ckpt-7.index": b"of TensorFlow",
    "ckpt-7.data-00000-of-00001": b"of TensorFlow",
}


class Checkpoint(NamedTuple):
    """What is to be the same of a checkpoint after a crash."""

    sequence: int
    step: int
    name: str
    digests: tuple[str, ...]
    metrics: tuple[tuple[str, float], ...]
    pin: str | None

    @classmethod
    def of(cls, record: CheckpointRecord) -> Checkpoint:
        digests = tuple(file.digest for file in record.files)
        return cls(record.sequence, record.step, record.name, digests, tuple(record.metrics.items()), record.pin)


@dataclasses.dataclass(frozen=True)
class Promise:
    """What must be there at a moment: all as before what is being done, or all as after it.

    Of several that are pruned, any may be gone, once what is saved is there.
    """

    before: frozenset[Checkpoint]
    after: frozenset[Checkpoint]

    def kept(self, there: set[Checkpoint]) -> bool:
        going, coming = self.before - self.after, self.after - self.before
        return self.before & self.after <= there <= self.before | self.after and (going <= there or coming <= there)

    def lost(self, there: set[Checkpoint], *, recovered: bool) -> int:
        """How many are missing. A superseded checkpoint may be out of sight until the directory is recovered."""
        saved = {fact for checkpoint in self.after - self.before for fact in (checkpoint.step, checkpoint.name)}
        gone = set() if recovered else self.before - self.after
        hidden = {checkpoint for checkpoint in gone if checkpoint.step in saved or checkpoint.name in saved}
        return 0 if self.kept(there) or self.kept(there | hidden) else 1

    def joined_by(self, checkpoint: Checkpoint) -> Promise:
        return Promise(self.before | {checkpoint}, self.after | {checkpoint})


class Run:
    """A workload's hand on a directory: it does things, and notes in the log when they began and ended."""

    def __init__(self, path: pathlib.Path, recorder: Recorder, series: Series) -> None:
        self.runs = CheckpointDirectory(path, series)
        self.recorder = recorder
        self.there = seen(self.runs)
        self.moments: list[tuple[int, Promise]] = []

    def save(
        self,
        step: int,
        keep: PreservationPolicy | None = None,
        content: str = "",
        shards: int = 1,
        name: str = "",
        run_id: str = "run",
        replaced: Set[str] = frozenset(),
    ) -> None:
        with self._action():
            writer = Writer(self.runs, keep)
            writer.replaced = replaced
            request = SaveRequest(step=step, name=name, run_id=run_id, batch=0)
            record = writer.save(request, payload(f"{step} {content}".encode(), shards))
            writer.close()
            assert record in list(self.runs)

    def save_file(
        self,
        step: int,
        name: str,
        keep: PreservationPolicy | None = None,
        run_id: str = "run",
        replaced: Set[str] = frozenset(),
    ) -> None:
        with self._action():
            writer = Writer(self.runs, keep)
            writer.replaced = replaced
            request = SaveRequest(step=step, name=name, run_id=run_id, batch=0)
            record = writer.save(request, file_payload(b"%d %s" % (step, run_id.encode())))
            writer.close()
            assert record in list(self.runs)

    def save_by(self, writer: Writer, step: int) -> None:
        with self._action():
            assert writer.save(SaveRequest(step=step, run_id="run", batch=0), payload(os.urandom(4)))

    def save_shared(self, step: int, keep: PreservationPolicy | None = None) -> None:
        """Half of it is as before, so that it is a link."""
        with self._action(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharing, "_WORTHWHILE", 1)
            writer = Writer(self.runs, keep)
            assert writer.save(
                SaveRequest(step=step, size=0, run_id="run", batch=0), shared_payload(self.runs, f"{step}")
            )

    def save_without_a_state_file(self, step: int) -> None:
        def full(*arguments: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        writer, write = Writer(self.runs), payload(b"")
        with self._action(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(commit, "write_state", full)
            with pytest.raises(DiskFullError, match="is saved"):
                writer.save(SaveRequest(step=step, run_id="run", batch=0), write)

    def prune(self, keep: PreservationPolicy) -> None:
        with self._action():
            assert self.runs.prune(keep)

    def pin(self, step: int) -> None:
        with self._action():
            self.runs.pin(step, "mine")

    def unpin(self, step: int) -> None:
        with self._action():
            self.runs.unpin(step)

    def add_metrics(self, step: int, **metrics: float) -> None:
        with self._action():
            self.runs.add_metrics(step, metrics)

    def recover(self) -> None:
        Writer(self.runs).open()

    @contextlib.contextmanager
    def _action(self) -> Iterator[None]:
        began, before = len(self.recorder.log), self.there
        yield
        self.there = seen(self.runs)
        self.moments.append((began + 1, Promise(before, self.there)))
        self.moments.append((len(self.recorder.log), Promise(self.there, self.there)))


def saves_with_pruning(run: Run) -> None:
    for step in (10, 20, 30):
        run.save(step, LatestN(1))


def save_without_a_state_file(run: Run) -> None:
    run.save(10)
    run.save_without_a_state_file(20)


def step_saved_again(run: Run) -> None:
    run.save(10)
    run.save(20)
    run.save(10, content="again")


def step_saved_again_in_other_files(run: Run) -> None:
    run.save(10, shards=2)
    run.save(10, content="again", shards=1)


def step_saved_again_under_another_name(run: Run) -> None:
    run.save(10)
    run.save(10, name="model-10")


def other_step_under_the_same_name(run: Run) -> None:
    run.save(10, LatestN(1), name="best")
    run.save(20, LatestN(1), name="best")
    run.save(30, LatestN(2), name="other")
    run.save(20, LatestN(1), name="other")


def step_saved_again_with_the_same_bytes(run: Run) -> None:
    run.save(10)
    run.save(10)


def run_replaced(run: Run) -> None:
    for step in (10, 20, 30):
        run.save(step)
    run.pin(30)
    run.save(10, content="new", run_id="new", replaced={"run"})
    run.save(20, LatestN(1), content="new", run_id="new", replaced={"run"})


def explicit_prune(run: Run) -> None:
    for step in (10, 20, 30):
        run.save(step)
    run.prune(LatestN(1))


def pin_and_prune(run: Run) -> None:
    run.save(10)
    run.save(20)
    run.pin(10)
    run.save(30, LatestN(1))
    run.unpin(10)
    run.prune(LatestN(1))


def metrics_added(run: Run) -> None:
    run.save(10)
    run.save(20)
    run.add_metrics(10, accuracy=0.5)
    run.add_metrics(10, accuracy=0.75)


def saves_that_share(run: Run) -> None:
    for step in (10, 20, 30):
        run.save_shared(step, LatestN(2))
    assert run.runs[30].size_shared


def step_saved_again_that_shares(run: Run) -> None:
    run.save_shared(10)
    run.save_shared(20)
    run.save_shared(20)
    run.save_shared(10)


def saves_of_one_writer(run: Run) -> None:
    writer = Writer(run.runs, LatestN(1))
    for step in (10, 20, 20, 30):
        run.save_by(writer, step)


def files_of_one_name(run: Run) -> None:
    for step in (10, 20, 30):
        run.save_file(step, "last.keras")


def files_with_pruning(run: Run) -> None:
    for step in (10, 20, 30):
        run.save_file(step, f"{step}.keras", LatestN(1))
    run.add_metrics(30, accuracy=0.5)


def files_of_one_step(run: Run) -> None:
    run.save_file(10, "1.keras")
    run.save_file(20, "2.keras")
    run.save_file(10, "3.keras")
    run.pin(20)


def files_of_a_run_replaced(run: Run) -> None:
    for step in (10, 20, 30):
        run.save_file(step, f"{step}.keras")
    run.pin(30)
    run.save_file(10, "10.keras", run_id="new", replaced={"run"})
    run.save_file(20, "2.keras", LatestN(1), run_id="new", replaced={"run"})


def save_over_a_leftover_pin(run: Run) -> None:
    run.save(10)
    run.save(20)


def prune_of_a_copy(run: Run) -> None:
    run.prune(LatestN(1))


def save_into_a_copy(run: Run) -> None:
    run.save(10, content="again")


def copy(path: pathlib.Path) -> None:
    """Three checkpoints, without the private folder, which a copy need not have."""
    Filler(path).save("10 20 30")
    shutil.rmtree(path / PRIVATE)


class Workload(NamedTuple):
    """What is done, and in which directory."""

    work: Callable[[Run], None]
    decoys: Snapshot = FOREIGN
    prepare: Callable[[pathlib.Path], object] = lambda path: None
    series: Series = TENSORFLOW


WORKLOADS = {
    "saves with pruning": Workload(saves_with_pruning),
    "a save without a state file": Workload(save_without_a_state_file),
    "a step saved again": Workload(step_saved_again),
    "a step saved again in other files": Workload(step_saved_again_in_other_files),
    "a step saved again under another name": Workload(step_saved_again_under_another_name),
    "another step under the same name": Workload(other_step_under_the_same_name),
    "a step saved again with the same bytes": Workload(step_saved_again_with_the_same_bytes),
    "a run replaced by another": Workload(run_replaced),
    "an explicit prune": Workload(explicit_prune),
    "pins and prunes": Workload(pin_and_prune),
    "metrics added": Workload(metrics_added),
    "saves that share": Workload(saves_that_share),
    "a step saved again that shares": Workload(step_saved_again_that_shares),
    "saves of one writer": Workload(saves_of_one_writer),
    "files of one name": Workload(files_of_one_name, {"notes.txt": b"mine"}, series=Series("last.keras")),
    "files with pruning": Workload(files_with_pruning, {"0.keras": b"mine"}, series=Series("{step}.keras")),
    "files of a run replaced": Workload(files_of_a_run_replaced, {"0.keras": b"mine"}, series=Series("{step}.keras")),
    "files of one step": Workload(files_of_one_step, series=Series("{number}.keras")),
    "a save over a leftover pin": Workload(save_over_a_leftover_pin, {**FOREIGN, "ckpt-20.keep": b"left"}),
    "a prune of a copy": Workload(prune_of_a_copy, prepare=copy),
    "a save into a copy": Workload(save_into_a_copy, prepare=copy),
}


def seen(runs: CheckpointDirectory) -> frozenset[Checkpoint]:
    return frozenset(Checkpoint.of(record) for record in runs.listing().all_runs)


class Recording(NamedTuple):
    """What a workload did, and what had to be there at each moment of it."""

    start: Snapshot
    log: list[Operation]
    moments: list[tuple[int, Promise]]

    def promise(self, moment: int) -> Promise:
        """What must be there after so many operations."""
        return [promise for began, promise in self.moments if began <= moment][-1]


def record(path: pathlib.Path, work: Callable[[Run], None], series: Series) -> Recording:
    """Does the work in a directory, and removes it."""
    start = read(path)
    recorder = Recorder(path)
    with pytest.MonkeyPatch.context() as patch:
        for module in (files, streams):
            patch.setattr(module, "os", recorder)
        patch.setattr(files, "shutil", recorder)
        run = Run(path, recorder, series)
        run.moments.append((0, Promise(run.there, run.there)))
        work(run)
    shutil.rmtree(path)
    return Recording(start, recorder.log, run.moments)


@functools.cache
def perform(name: str) -> Recording:
    """Records a workload, once in a process."""
    workload = WORKLOADS[name]
    with in_memory(tempfile.gettempdir()) as scratch:
        path = scratch / "run"
        make(workload.decoys, path)
        workload.prepare(path)
        return record(path, workload.work, workload.series)


class Examiner:
    """Looks at states in a scratch directory, and counts what is wrong with them."""

    def __init__(
        self,
        scratch: pathlib.Path,
        tally: collections.Counter[str],
        decoys: Snapshot,
        series: Series = TENSORFLOW,
    ) -> None:
        self.path = scratch / "state"
        self.tally = tally
        self.decoys = decoys
        self.series = series
        self.known: set[object] = set()

    @property
    def wrong(self) -> int:
        """How much was wrong so far."""
        return sum(self.tally[what] for what in ("lost", "invalid", "leftovers", "decoys"))

    def examine(self, state: Snapshot, promise: Promise) -> None:
        """Makes a directory of a state that was not seen yet, and checks it."""
        if (identity := (key(state), promise)) in self.known:
            return
        self.known.add(identity)
        make(state, self.path)
        self.check(promise)
        shutil.rmtree(self.path)

    def check(self, promise: Promise) -> None:
        """The directory before recovery, after it, and after one more save."""
        self.tally["trials"] += 1
        runs = CheckpointDirectory(self.path, self.series)
        self.tally["lost"] += promise.lost(self.visible(runs), recovered=False)

        writer = Writer(runs)
        writer.open()
        there = self.visible(runs)
        self.tally["lost"] += promise.lost(there, recovered=True)
        self._count_leftovers(runs)

        if self.series.template:
            next_name = self.series.template.replace("{step}", "99").replace("{number}", "99")
            writer.save(SaveRequest(step=99, name=next_name), file_payload(b"next"))
            there = {checkpoint for checkpoint in there if checkpoint.name != next_name}
        else:
            writer.save(SaveRequest(step=99), payload(b"next"))
        self.tally["lost"] += len(there - self.visible(runs))
        self.tally["lost"] += 99 not in runs
        writer.close()

    def visible(self, runs: CheckpointDirectory) -> set[Checkpoint]:
        """The checkpoints that are listed, each checked to the byte."""
        there = set()
        with runs.open() as folder:
            for record in runs.listing().all_runs:
                try:
                    check_files(folder, record)
                    there.add(Checkpoint.of(record))
                except DamagedCheckpointError:
                    self.tally["invalid"] += 1
        return there

    def _count_leftovers(self, runs: CheckpointDirectory) -> None:
        """Whatever belongs to no checkpoint and to nobody else, and whatever is gone of somebody else's."""
        state = read(self.path)
        for name, content in self.decoys.items():
            if not name.endswith(".keep"):
                self.tally["decoys"] += state[name] != content
            state.pop(name, None)
        listing = runs.listing()
        for record in listing.all_runs:
            for name in (*(file.name for file in record.files), f"{record.name}.json"):
                state.pop(name, None)
            if record.pinned:
                state.pop(f"{record.name}.keep", None)
        state.pop("checkpoint", None)
        private = state.pop(PRIVATE)
        assert isinstance(private, dict)
        if self.series.private:
            private = private[self.series.private]
        self.tally["leftovers"] += bool(state) + (private != {"trash": {}}) + bool(listing.damaged)


@contextlib.contextmanager
def in_memory(otherwise: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """A directory for many short-lived files, in memory where possible."""
    shared = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else otherwise) as path:
        yield pathlib.Path(path)


@pytest.fixture
def memory(tmp_path) -> Iterator[pathlib.Path]:
    with in_memory(tmp_path) as path:
        yield path


class Harness:
    """Examines every state that a crash at any moment of a workload may leave, or samples of many."""

    def __init__(
        self, scratch: pathlib.Path, name: str, tally: collections.Counter[str], limit: int, chance: random.Random
    ) -> None:
        self.path = scratch / "run"
        self.recording = perform(name)
        self.series = WORKLOADS[name].series
        self.examiner = Examiner(scratch, tally, WORKLOADS[name].decoys, self.series)
        self.limit = limit
        self.chance = chance

    def crash(self, recording: Recording, order: str, first: int = 0, dropped: str = "") -> None:
        """A crash after each operation from the first on."""
        disk = Disk(recording.start, order, dropped=dropped)
        for moment, operation in enumerate([None, *recording.log]):
            if operation:
                disk.replay(operation)
            if moment >= first:
                for state in disk.crash(self.limit, self.chance):
                    self.examiner.examine(state, recording.promise(moment))
            if dropped and self.examiner.wrong:
                return

    def crash_in_recovery(self, number: int, order: str) -> None:
        """A crash, and another while the first one is recovered from, for a number of the first."""
        disk = Disk(self.recording.start, order)
        states = []
        for moment, operation in enumerate(self.recording.log, 1):
            disk.replay(operation)
            states += [(state, self.recording.promise(moment)) for state in disk.crash(self.limit, self.chance)]
        for state, promise in self.chance.sample(states, min(number, len(states))):
            make(state, self.path)
            log = record(self.path, Run.recover, self.series).log
            self.crash(Recording(state, log, [(0, promise)]), order=order)

    def kill_and_cut(self, number: int, order: str) -> None:
        """A kill, and a power cut during recovery: what the killed process did is visible, but need not be durable."""
        moments = range(1, len(self.recording.log) + 1)
        for moment in sorted(self.chance.sample(moments, min(number, len(moments)))):
            done = self.recording.log[:moment]
            disk = Disk(self.recording.start, order)
            for operation in done:
                disk.replay(operation)
            make(disk.whole(), self.path)
            log = done + record(self.path, Run.recover, self.series).log
            promise = self.recording.promise(moment)
            self.crash(Recording(self.recording.start, log, [(0, promise)]), order=order, first=moment + 1)


ORDERS = (IN_ORDER, IN_ANY_ORDER, RENAMES_IN_TWO)
"""In which order changes to directories may reach the disk. Equal states of several orders are examined once."""


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_crash_loses_no_acknowledged_checkpoint(memory, tally, long, dice, name) -> None:
    """After a crash at any moment each visible checkpoint is whole, and recovery removes all leftovers."""
    harness = Harness(memory, name, tally, 20_000 if long else 4, dice)
    for order in ORDERS:
        harness.crash(harness.recording, order)

        assert not harness.examiner.wrong, (order, tally)


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_crash_during_recovery_loses_no_checkpoint(memory, tally, long, dice, name) -> None:
    """A second crash, in the middle of the recovery from the first, loses nothing either."""
    harness = Harness(memory, name, tally, 256 if long else 8, dice)
    for order in ORDERS:
        harness.crash_in_recovery(400 if long else 6, order)

        assert not harness.examiner.wrong, (order, tally)


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_power_cut_after_a_kill_loses_no_checkpoint(memory, tally, long, dice, name) -> None:
    """The next process makes durable all that it relies on: the killed process may not have."""
    harness = Harness(memory, name, tally, 256 if long else 8, dice)
    for order in ORDERS:
        harness.kill_and_cut(400 if long else 5, order)

        assert not harness.examiner.wrong, (order, tally)


SYNCS = {
    "formats.bundle_writer.write_bundle: ExitStack 1": "saves that share",
    "support.runs.payload.<locals>.write: writing 1": "a save over a leftover pin",
    "store.writer._sealed: create 1": "a save over a leftover pin",
    "store.writer._sealed: sync 1": "a step saved again",
    "store.commit.publish: sync 1": "a save over a leftover pin",
    "store.commit.publish: sync 2": "a save without a state file",
    "store.commit.withdraw: sync 1": "an explicit prune",
    "store.commit.withdraw: sync 2": "an explicit prune",
    "store.commit._empty_trash: sync 1": "an explicit prune",
    "store.files.Folder.replace: create 1": "metrics added",
    "store.files.Folder.replace: sync 1": "metrics added",
    "store.directory.CheckpointDirectory.unpin: sync 1": "pins and prunes",
    "store.files.Folder.folder: sync 1": "a prune of a copy",
}
"""Each sync, named by function and call, and a workload that needs it."""


@pytest.mark.parametrize("site", SYNCS)
def test_every_sync_is_needed(memory, site) -> None:
    """The harness finds a wrong state where a sync is dropped."""
    harness = Harness(memory, SYNCS[site], collections.Counter(), 4, random.Random(site))
    first = [operation.site for operation in harness.recording.log].index(site)

    with contextlib.suppress(SaveError):  # the recovery may say itself that something is wrong
        harness.crash(harness.recording, RENAMES_IN_TWO, first=first, dropped=site)
        assert harness.examiner.wrong
