"""The journal of a directory: one line an event, written by several processes that may be killed at any moment."""

from __future__ import annotations

import functools
import itertools
import json
import math
import operator
import os
import pathlib
import random
import resource
import subprocess
import sys
import time

import pytest

import keras_ckpt as kc
from keras_ckpt.store.files import Folder
from keras_ckpt.store.journal import Event, Journal
from keras_ckpt.store.plan import decide
from keras_ckpt.store.writer import SaveRequest, Writer
from support.runs import file_payload, payload, unprivileged_user

WRITE = """
import os, sys
from keras_ckpt.store.files import Folder
from keras_ckpt.store.journal import Event, Journal

with Folder(sys.argv[1]) as folder:
    for step in range(int(sys.argv[2]), 1 << 40):
        Journal(folder).append(Event(kind="epoch", step=step, run_id=sys.argv[3], metrics={"loss": 0.5}))
        if step == int(sys.argv[2]):
            print("writing", flush=True)
"""

POLICIES = [
    kc.LatestN(1),
    kc.LatestN(3),
    kc.BestN(1, "loss", "min"),
    kc.BestN(3, "loss", "max"),
    kc.EveryNSteps(4),
    kc.EveryNEpochs(5),
    kc.EveryNHours(2),
]


@pytest.fixture
def folder(tmp_path):
    with Folder(tmp_path) as folder:
        yield folder


@pytest.fixture
def journal(folder) -> Journal:
    return Journal(folder)


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
    return tmp_path / "journal.jsonl"


def event(step: int = 1, **facts: object) -> Event:
    return Event(kind="epoch", step=step, **facts)


def test_events_are_read_as_they_were_written(journal) -> None:
    facts = {
        "at": 1.5,
        "run_id": "run",
        "epoch": 2,
        "batch": 0,
        "metrics": {"loss": 0.5},
        "why": "ü\n",
        "size": 3,
        "by": "me@host",
    }
    events = [event(1, **facts), event(2, at=2.5)]

    journal.append(*events)

    assert journal.read() == events


def test_an_event_gets_the_time_at_which_it_is_written(journal) -> None:
    before = time.time()
    journal.append(event())

    assert before <= journal.read()[0].at <= time.time()


def test_metrics_that_json_cannot_hold_are_read_as_they_were_written(journal) -> None:
    journal.append(event(metrics={"a": math.inf, "b": -math.inf, "c": math.nan}))

    [read] = journal.read()

    assert (read.metrics["a"], read.metrics["b"]) == (math.inf, -math.inf)
    assert math.isnan(read.metrics["c"])


def test_each_event_is_a_line_of_json_without_the_defaults(journal, file) -> None:
    journal.append(Event(kind="ended", at=1.5, step=3))

    assert file.read_text() == '{"at":1.5,"kind":"ended","step":3}\n'


def test_no_line_is_larger_than_a_page(journal, file) -> None:
    """Metrics are dropped first, then texts are cut."""
    metrics = {f"metric {number}": 0.5 for number in range(1000)}
    journal.append(event(metrics=metrics, why="short"))
    journal.append(event(error="\0\N{SNOWMAN}" * 10_000, policy="p" * 10_000, name="n" * 10_000))

    many, long = journal.read()

    assert all(len(line) <= 4096 for line in file.read_bytes().splitlines(keepends=True))
    assert (many.metrics, many.why) == ({}, "short")
    assert long.error.startswith("\0\N{SNOWMAN}")


def test_a_text_that_is_not_utf_8_is_written(journal) -> None:
    """The error of a save may name a file with such bytes."""
    journal.append(event(error="no file \udce4", metrics={"loss": 0.5}))

    [read] = journal.read()

    assert (read.error, read.metrics) == ("no file ?", {"loss": 0.5})


def test_the_next_event_ends_a_line_that_was_cut(journal, file) -> None:
    journal.append(event(1))
    file.write_bytes(file.read_bytes() + b'{"at":1,"kind":"ep')

    journal.append(event(2))

    assert [each.step for each in journal.read()] == [1, 2]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"notes of a user",
        b"\xff\xfe\0\0",
        b"[1, 2]",
        b"[" * 4000,
        b'{"kind":"epoch","at":1}',
        b'{"kind":"epoch","at":1,"step":-1}',
        b'{"kind":"epoch","at":1,"step":1.5}',
        b'{"kind":"epoch","at":1,"step":99999999999999999999999}',
        b'{"kind":"epoch","at":-1,"step":1}',
        b'{"kind":"epoch","at":1,"step":1,"metrics":{"loss":"small"}}',
        b'{"kind":"epoch","at":1,"step":1,"why":3}',
        b'{"kind":"later version","at":1,"step":1}',
        b'{"at":1,"kind":"epoch","step":1,"why":"' + b"x" * 5000 + b'"}',
    ],
)
def test_a_line_that_is_no_event_is_skipped(journal, file, line) -> None:
    """Foreign, incomplete, contradictory, of a newer version, or too long."""
    journal.append(event(1))
    file.write_bytes(file.read_bytes() + line + b"\n")
    journal.append(event(2))

    assert [each.step for each in journal.read()] == [1, 2]


def test_unknown_members_of_an_event_are_ignored(journal, file) -> None:
    """A newer version may add members."""
    file.write_bytes(b'{"at":1,"kind":"epoch","step":1,"color":"red"}\n')

    assert [each.step for each in journal.read()] == [1]


def test_a_journal_ends_at_64_mb(journal, file) -> None:
    """Nothing more is written, and nothing more is read."""
    line = json.dumps({"at": 1, "kind": "epoch", "step": 1, "why": "x" * 3000}).encode() + b"\n"
    with file.open("wb") as stream:
        stream.write(line)
        stream.truncate((64 << 20) - 10)
        stream.seek(64 << 20)
        stream.write(b"\n" + line)
    before = file.stat().st_size

    journal.append(event(2))

    assert file.stat().st_size == before
    assert [each.step for each in journal.read()] == [1]


def test_a_link_in_the_place_of_the_journal_is_not_followed(journal, file, tmp_path) -> None:
    target = tmp_path / "other.jsonl"
    target.write_bytes(b'{"at":1,"kind":"epoch","step":1}\n')
    file.symlink_to(target)

    journal.append(event(2))

    assert target.read_bytes().count(b"\n") == 1
    assert journal.read() == []


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
def test_no_other_thing_in_the_place_of_the_journal_is_waited_for(journal, file, make) -> None:
    make(file)

    journal.append(event(1))

    assert journal.read() == []


def test_a_directory_that_cannot_be_written_raises_no_error(journal, tmp_path) -> None:
    tmp_path.chmod(0o755)
    with unprivileged_user():
        journal.append(event(1))

    assert journal.read() == []


def test_an_event_that_fits_in_part_is_cut_and_ended_by_the_next(journal, file) -> None:
    """A full disk, or a limit of the size of files, ends a write early."""
    journal.append(event(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, hard))
    try:
        journal.append(event(2))
        journal.append(event(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    cut = file.read_bytes()
    journal.append(event(4))

    assert not cut.endswith(b"\n")
    assert [each.step for each in journal.read()] == [1, 4]


def test_the_journal_of_keras_files_is_in_their_private_folder(tmp_path) -> None:
    """The folder of a script is not littered, and two series in a folder have a journal each."""
    for template, step in (("best.keras", 1), ("last.keras", 2)):
        runs = kc.CheckpointDirectory(tmp_path / template)
        Writer(runs).save(SaveRequest(step=step, name=template, run_id="run"), file_payload(b"weights"))

    assert [
        [each.step for each in kc.CheckpointDirectory(tmp_path / f"{name}.keras").events()] for name in ("best", "last")
    ] == [[1], [2]]
    assert not (tmp_path / "journal.jsonl").exists()
    assert len(list((tmp_path / ".keras_ckpt").rglob("journal.jsonl"))) == 2


def test_two_writers_that_are_killed_lose_no_line_in_the_middle(tmp_path, journal, file, dice, long) -> None:
    """Only the last line of a killed writer may be missing. Each writer's events are in its order.

    A line may be empty: a writer that sees half of another's write ends it.
    """
    rounds, written = 20 if long else 1, 0
    for _ in range(rounds):
        writers = {
            run_id: subprocess.Popen(
                [sys.executable, "-c", WRITE, str(tmp_path), str(written), run_id], stdout=subprocess.PIPE, text=True
            )
            for run_id in ("a", "b")
        }
        for process in writers.values():
            assert process.stdout.readline() == "writing\n"
        for process in writers.values():
            time.sleep(dice.random() * 0.05)
            process.kill()
            process.communicate()
        written += 1 << 20
    events = journal.read()
    lines = [line for line in file.read_bytes().splitlines() if line]

    for run_id in ("a", "b"):
        steps = [each.step for each in events if each.run_id == run_id]
        gaps = [(one, two) for one, two in itertools.pairwise(steps) if two != one + 1 and two % (1 << 20)]
        assert len(steps) > 1
        assert not gaps
    assert 0 <= len(lines) - len(events) <= 2 * rounds


def test_why_is_the_reason_of_the_plan_at_that_time(tmp_path, dice, long) -> None:
    """For random runs and policies: of each checkpoint that a save removed, and of each save that was skipped."""
    for number in range(200 if long else 8):
        check_reasons(tmp_path / str(number), dice)


def check_reasons(path: pathlib.Path, dice: random.Random) -> None:
    """Plans before each save of a random run, and compares what the run tells at its end."""
    keep = functools.reduce(operator.or_, dice.sample(POLICIES, dice.randint(1, 3)))
    path.mkdir()  # a plan measures files there, also before the first save
    runs = kc.CheckpointDirectory(path)
    writer = Writer(runs, keep)
    reasons: dict[int, str] = {}
    for step in range(1, 15):
        facts = {"step": step, "run_id": "run", "batch": 0, "epoch": step, "time": 1800.0 * step}
        request = SaveRequest(metrics={"loss": dice.choice([0.1, 0.2, 0.3, 0.4, math.nan])}, **facts)
        candidate = request.record(step, directory=str(path))
        planned = {each.record.step: each for each in decide(keep, [*runs, candidate])}
        saved = writer.save(request, payload(b"weights"))
        gone = {step for step in planned if step not in runs}
        assert saved is None or step not in gone
        reasons |= {step: planned[step].reason for step in gone}
    told = {fate.facts.step: fate for fate in runs.fates() if fate.state != "kept"}

    assert {step: fate.why for step, fate in told.items()} == reasons
    for step, fate in told.items():
        sentence = f"Step {step} was not saved: {reasons[step]}."
        assert runs.why(step) == sentence if fate.state == "skipped" else runs.why(step).endswith(f": {reasons[step]}.")
