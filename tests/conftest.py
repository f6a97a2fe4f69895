"""What tests share: histories written as lines, directories filled without TensorFlow, and small real models."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["KERAS_BACKEND"] = "tensorflow"

from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.policies import PreservationPolicy
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord
from keras_ckpt.store.writer import Write, Writer


def history(text: str) -> list[CheckpointRecord]:
    """Records in the order of saving, from words like `10:0.5`, `10:nan` or `10`: a step, and a loss or none."""
    records = []
    for sequence, word in enumerate(text.split(), 1):
        step, _, loss = word.partition(":")
        metrics = {"loss": float(loss)} if loss else {}
        records.append(
            CheckpointRecord(sequence=sequence, step=int(step), metrics=metrics, time=3600.0 * sequence, batch=0)
        )
    return records


def steps(text: str) -> set[int]:
    """A set of steps, from a line of them."""
    return {int(word) for word in text.split()}


def payload(content: bytes = b"weights", shards: int = 1) -> Write:
    """Writes the files of a checkpoint, as many as TensorFlow would."""

    def write(folder: Folder, name: str) -> list[CheckpointFile]:
        data = {f"{name}.data-{shard:05}-of-{shards:05}": content for shard in range(shards)}
        files = []
        for each, part in {**data, f"{name}.index": b"index of " + content}.items():
            with folder.writing(each) as file:
                file.write(memoryview(part))
                files.append(CheckpointFile(each, *file.finish()))
        return files

    return write


def shared_payload(runs: CheckpointDirectory, content: str) -> Write:
    """Writes a TensorFlow checkpoint, most of which is the same in each, so that it shares that with the newest."""
    import numpy as np

    from keras_ckpt.formats.arena import Arena
    from keras_ckpt.formats.sharing import SharingWrite
    from keras_ckpt.model.snapshot import Reader, Snapshot

    arrays = {"changed": np.frombuffer(content.encode(), np.uint8), "same": np.arange(10, dtype=np.uint8)}
    arena = Arena()
    return SharingWrite(Snapshot(Reader({}), arrays).move(arena), arena, runs)


class Filler:
    """Saves checkpoints into a directory without TensorFlow."""

    def __init__(self, path: pathlib.Path) -> None:
        self.runs = CheckpointDirectory(path)

    def save(
        self, text: str, keep: PreservationPolicy | None = None, run_id: str = "run", **facts: object
    ) -> CheckpointDirectory:
        writer = Writer(self.runs, keep)
        for record in history(text):
            named = {"metrics": record.metrics, "time": record.time, "batch": 0, "run_id": run_id, **facts}
            writer.save(payload(str(record.step).encode()), step=record.step, **named)
        writer.close()
        return self.runs


@pytest.fixture
def filler(tmp_path: pathlib.Path) -> Filler:
    return Filler(tmp_path / "run")


HOLD = """
import sys
from keras_ckpt.store.files import Folder
lock = Folder(sys.argv[1], create=True).lock()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the writer's lock of a directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    """Runs as a user who may write only where everybody may; the superuser may everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Each harness in tests/reliability and tests/resume has a short form, for the suite, and a long form."""
    parser.addoption("--long", action="store_true", help="run the long form of the harnesses")
    parser.addoption("--log", help="a file to add the counts of the harnesses to, a line of JSON a run")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long form is asked for."""
    return request.config.getoption("--long")


@pytest.fixture
def tally(request: pytest.FixtureRequest, record_property):
    """Counts what a harness saw; one that tried nothing has failed.

    `trials` is what was tried. `acknowledged` checkpoints were said to be saved; `lost` ones of them are gone without
    having been pruned; `invalid` ones are visible and not what was written. `leftovers` of a process that died were not
    cleaned up by the next. `differing` runs ended otherwise than the one that nobody disturbed.
    """
    counts = collections.Counter(trials=0, lost=0, invalid=0)
    yield counts
    record_property("tally", dict(counts))
    assert counts["trials"], "the harness ran no trial"
    assert not counts["lost"], counts
    assert not counts["invalid"], counts
    assert not counts["leftovers"], counts
    assert not counts["differing"], counts


def counts_of(report: object) -> dict[str, object] | None:
    """What a harness counted, or why it did not run; `None` for any other test."""
    if not isinstance(report, pytest.TestReport) or not re.search("tests/(reliability|resume)/", report.nodeid):
        return None
    if report.skipped:
        return {"not run": report.longrepr[2]}
    return dict(report.user_properties).get("tally")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """A line for each harness, and one for the log."""
    if hasattr(config, "workerinput"):
        return  # the process that started the workers tells of all
    reports = [report for category in terminalreporter.stats.values() for report in category]
    harnesses = {report.nodeid.rpartition("/")[2]: counts for report in reports if (counts := counts_of(report))}
    if not harnesses:
        return
    terminalreporter.section("harnesses")
    for test, counts in sorted(harnesses.items()):
        terminalreporter.line(f"{test}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if path := config.getoption("--log"):
        entry = {"date": time.strftime("%Y-%m-%d"), "kernel": platform.release(), "harnesses": harnesses}
        with open(path, "a") as file:
            file.write(json.dumps(entry) + "\n")
