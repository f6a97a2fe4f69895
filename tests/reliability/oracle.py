"""What is to be true of a directory whatever happened to those who wrote into it."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import logging
import pathlib
import time
from collections.abc import Iterator, Sequence

from keras_ckpt.errors import CheckpointError
from keras_ckpt.store import commit
from keras_ckpt.store.checks import check_files
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import PRIVATE, Folder
from keras_ckpt.store.layout import JOURNAL
from keras_ckpt.store.policies import PreservationPolicy, kept_in_training
from keras_ckpt.store.record import CheckpointRecord
from reliability.trainer import Job


def replay(
    keep: PreservationPolicy, records: Sequence[CheckpointRecord], saved: Sequence[CheckpointRecord] = ()
) -> list[CheckpointRecord]:
    """What the policy keeps of what was there after others were saved one after another."""

    def kept(records: Sequence[CheckpointRecord]) -> list[CheckpointRecord]:
        steps = kept_in_training(keep, records)
        return [record for record in records if record.step in steps]

    records = kept(records)
    for record in saved:
        records = kept([*(other for other in records if other.step != record.step), record])
    return records


def look(path: str) -> collections.Counter[str]:
    """Reads every byte of the visible checkpoints; one that is replaced or pruned meanwhile is not visible."""
    counts: collections.Counter[str] = collections.Counter()
    listing = CheckpointDirectory(path).listing()
    for record in listing.records:
        counts["observations"] += 1
        try:
            with Folder(path) as folder:
                check_files(folder, record)
        except CheckpointError as error:
            if record in CheckpointDirectory(path).listing().records:
                counts.update(_found("invalid", f"{record}: {error}"))
    for name, error in listing.damaged.items():
        counts.update(_found("invalid", f"{name}: {error}"))
    return counts


@contextlib.contextmanager
def looking(path: str) -> Iterator[collections.Counter[str]]:
    """Looks at a directory all the time."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        counts: collections.Counter[str] = collections.Counter()
        done = False

        def look_on() -> None:
            while not done:
                counts.update(look(path))
                time.sleep(0.001)  # the trainings need the processor too

        future = pool.submit(look_on)
        try:
            yield counts
        finally:
            done = True
            future.result()


def verify(
    job: Job, before: Sequence[CheckpointRecord], acknowledged: Sequence[CheckpointRecord]
) -> collections.Counter[str]:
    """Counts what a crash has lost or harmed, and sees that the next writer recovers, cleans up and goes on.

    The save that was under way may be there or not: it was not acknowledged.
    """
    counts = collections.Counter(trials=1, acknowledged=len(acknowledged))
    counts.update(look(job.path))
    writer = job.writer()
    writer.open()
    counts.update(look(job.path))
    after = list(writer.directory)
    last = max((record.sequence for record in (*before, *acknowledged)), default=0)
    under_way = [record for record in after if record.sequence > last]
    known = [*before, *acknowledged, *under_way[:1]]
    for record in replay(job.keep, before, [*acknowledged, *under_way]):
        if record not in after:
            counts.update(_found("lost", record))
    for record in after:
        if record not in known or not _is_of_its_step(job, record):
            counts.update(_found("invalid", record))
    if newest_for_tensorflow(job.path) not in {None, *(record.name for record in after)}:
        counts.update(_found("invalid", "the state file"))
    counts.update(_leftovers(job.path))

    saved = job.save(writer, job.newest() + 1)
    if list(writer.directory) != (replay(job.keep, after, [saved]) if saved else after):
        counts.update(_found("lost", f"not {after} and {saved} by {job.keep}, but {list(writer.directory)}"))
    if saved and newest_for_tensorflow(job.path) != saved.name:
        counts.update(_found("invalid", "the state file"))
    writer.close()  # which takes its stage away
    counts.update(_leftovers(job.path))
    return counts


def newest_for_tensorflow(path: str) -> str | None:
    with Folder(path) as folder:
        return commit.read_state(folder)[0]


def _is_of_its_step(job: Job, record: CheckpointRecord) -> bool:
    """Whether the weights are those of the step that the sidecar says."""
    with contextlib.suppress(Exception):  # what is damaged fails in many ways
        return job.payload.step_in(record) == record.step
    return False


def _leftovers(path: str) -> dict[str, int]:
    """Files that belong to no checkpoint, and are no lock."""
    records = list(CheckpointDirectory(path))
    known = {file.name for record in records for file in record.files} | {f"{record.name}.json" for record in records}
    known |= {"checkpoint", JOURNAL, PRIVATE, *(f"{PRIVATE}/{name}" for name in ("lock", "mutex", "trash"))}
    found = {str(file.relative_to(path)) for file in pathlib.Path(path).rglob("*")} - known
    return _found("leftovers", sorted(found)) if found else {}


def _found(kind: str, what: object) -> dict[str, int]:
    logging.error("%s: %s", kind, what)
    return {kind: 1}
