"""The cost of the journal for a training, and of bounds for a plan.

Run it from the top of the repository: `python benchmarks/choosing.py`. All figures come from one run, in turns. They
are times of the processor, which other programs do not change.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import msgspec

import keras_ckpt as kc
from keras_ckpt.store.journal import Event
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord

ROUNDS = 9
EVENTS = 2000
RECORDS = 10_000
METRICS = {"loss": 0.123456789, "accuracy": 0.987654321, "val_loss": 0.23456789, "val_accuracy": 0.87654321}
UNION = kc.BestN(3, "loss", "min") | kc.LatestN(2) | kc.EveryNEpochs(100)
POLICIES = {
    repr(UNION): UNION,
    repr(UNION & kc.MaxBytes("50 GB")): UNION & kc.MaxBytes("50 GB"),
    repr(UNION & kc.MaxCount(20)): UNION & kc.MaxCount(20),
}


def seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def journal(path: pathlib.Path) -> None:
    """Prints the time of an event in the journal, beside a bare write of the same line."""
    run = kc.CheckpointDirectory(path)
    path.mkdir()
    events = [Event(kind="epoch", step=step, epoch=step, run_id="0" * 32, metrics=METRICS) for step in range(EVENTS)]
    line = msgspec.json.encode(events[0]) + b"\n"
    descriptor = os.open(path / "bare", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    rounds = []
    for _ in range(ROUNDS):
        written = seconds(lambda: [run.note(event) for event in events])
        bare = seconds(lambda: [os.write(descriptor, line) for _ in events])
        told = len(run.events())
        rounds.append((written / EVENTS, bare / EVENTS, seconds(run.events) / told))
    os.close(descriptor)
    written, bare, read = (statistics.median(each) * 1e6 for each in zip(*rounds, strict=True))
    print(f"an event in the journal: {written:.1f} us to write ({bare:.1f} us bare), {read:.1f} us to read")


def plans() -> None:
    """Prints the time in which a policy selects, with a bound and without."""
    records = [record(step) for step in range(RECORDS)]
    times = {
        name: [seconds(lambda policy=policy: policy.select(records)) for _ in range(ROUNDS)]
        for name, policy in POLICIES.items()
    }
    for name, each in times.items():
        print(f"{RECORDS} records: {statistics.median(each) * 1e3:7.1f} ms  {name}")


def record(step: int) -> CheckpointRecord:
    files: Sequence[CheckpointFile] = (CheckpointFile("data", 100_000_000, f"digest {step}"),)
    return CheckpointRecord(
        sequence=step + 1, step=step, epoch=step, batch=0, metrics={"loss": 1 / (1 + step)}, files=files
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        journal(pathlib.Path(scratch, "run"))
    plans()


if __name__ == "__main__":
    main()
