"""Several processes at one directory: writers, readers, and those who prune, pin and measure."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

import keras_ckpt as kc

ROOT = pathlib.Path(__file__).parents[2]

WRITE = """
import sys
import keras_ckpt as kc
from support.runs import payload
from keras_ckpt.store.writer import SaveRequest, Writer

runs, saves = kc.CheckpointDirectory(sys.argv[1]), int(sys.argv[2])
writer = Writer(runs, kc.LatestN(3))
try:
    writer.open()
except kc.DirectoryInUseError as error:
    print("refused:", error)
    sys.exit()
print("writing", flush=True)
sys.stdin.readline()
for step in range(1, saves + 1):
    writer.save(SaveRequest(step=step), payload(str(step).encode()))
    print(step, flush=True)
"""

READERS_AND_A_WRITER = """
import json, os, sys, warnings
import numpy as np
import keras, keras_ckpt as kc
from keras_ckpt.model.naming import named_variables
from keras_ckpt.formats.arena import Arena
from keras_ckpt.formats.sharing import SharingWrite
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.store.writer import SaveRequest, Writer
from support.models import dense_model

path, readers, restores = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = dense_model()
model.optimizer.build(model.trainable_variables)
state = ModelState(model)
writer = Writer(kc.CheckpointDirectory(path), kc.LatestN(1))
arena = Arena()

def save(step):
    for variable in model.weights:
        variable.assign(np.full(variable.shape, step, variable.dtype))
    write = SharingWrite(state.snapshot().move(arena), arena, writer)
    writer.save(SaveRequest(step=step, run_id="run"), write)

def read():
    counts = {"restores": 0, "mixed": 0, "errors": []}
    warnings.simplefilter("error")
    for _ in range(restores):
        try:
            step = kc.restore(model, path).step
        except Exception as error:
            counts["errors"].append(repr(error))
            continue
        counts["restores"] += 1
        counts["mixed"] += any((variable.numpy() != step).any() for variable in model.weights)
    return counts

save(1)
pipes = {}
for _ in range(readers):
    end, begin = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begin, json.dumps(read()).encode())
        os._exit(0)
    os.close(begin)
    pipes[child] = end
step = 1
while len(pipes) > 0:
    step += 1
    save(step % 7 + 1)  # the same steps again and again, so that names are of use once more
    child, status = os.waitpid(-1, os.WNOHANG)
    if child:
        assert status == 0, status
        print(os.read(pipes.pop(child), 1 << 16).decode())
print(json.dumps({"saves": step}))
"""


def start(script: str, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )


def test_of_several_writers_one_writes(tmp_path, tally, long) -> None:
    """The others are refused with its name; all that it acknowledged is there."""
    saves = 500 if long else 50
    writers = [start(WRITE, tmp_path / "run", saves) for _ in range(4)]
    first = [writer.stdout.readline() for writer in writers]
    writing = [writer for writer, line in zip(writers, first, strict=True) if line == "writing\n"]
    assert len(writing) == 1

    acknowledged = writing[0].communicate("go\n")[0].split()
    refused = [line for line in first if f"process {writing[0].pid} on " in line]
    for writer in writers:
        writer.communicate()

    runs = kc.CheckpointDirectory(tmp_path / "run")
    tally["trials"], tally["acknowledged"] = len(writers), len(acknowledged)
    tally["lost"] = int([record.step for record in runs] != [saves - 2, saves - 1, saves])
    tally["invalid"] = int(not runs.verify().ok)
    assert len(refused) == 3
    assert len(acknowledged) == saves


def test_readers_are_not_disturbed_by_one_who_prunes(fork_server, tmp_path, tally, long) -> None:
    """Eight processes restore while another saves and keeps one: each gets one checkpoint, whole, without a warning."""
    ended = fork_server.run(READERS_AND_A_WRITER, tmp_path / "run", 8, 625 if long else 25)
    assert ended.returncode == 0, ended.stderr[-2000:]

    *readers, writer = map(json.loads, ended.stdout.splitlines())
    tally["trials"] = sum(reader["restores"] for reader in readers)
    tally["saves"] = writer["saves"]
    tally["invalid"] = sum(reader["mixed"] for reader in readers)
    assert not [error for reader in readers for error in reader["errors"]]
    assert tally["trials"] == 8 * (625 if long else 25)
    assert tally["saves"] > 8


def test_a_stopped_writer_keeps_its_lock(tmp_path) -> None:
    """It is alive, however long it says nothing; once it is killed, the next one begins at once."""
    writer = start(WRITE, tmp_path / "run", 1)
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGSTOP)
    try:
        refused, _ = start(WRITE, tmp_path / "run", 1).communicate()
        assert f"process {writer.pid} on " in refused
    finally:
        writer.kill()
        writer.communicate()

    assert start(WRITE, tmp_path / "run", 1).communicate("go\n")[0] == "writing\n1\n"


def test_pins_and_metrics_of_others_are_kept_while_one_writes(tmp_path, tally, long) -> None:
    """None of them brings a pruned checkpoint back, or loses what was pinned or measured in between."""
    saves = 1000 if long else 150
    runs = kc.CheckpointDirectory(tmp_path / "run")
    writer = start(WRITE, runs.path, saves)
    writer.stdout.readline()
    writer.stdin.write("go\n")
    writer.stdin.flush()
    pinned: dict[int, float] = {}
    while writer.poll() is None and len(pinned) < 40:
        record = runs.latest()
        if record is None or record.step in pinned:
            continue
        try:
            runs.pin(record.step, "mine")
            runs.add_metrics(record.step, loss=record.step / 10)
            runs.prune(kc.LatestN(2))
        except (kc.CheckpointNotFoundError, kc.PlanError):
            continue
        pinned[record.step] = record.step / 10
    writer.communicate()

    kept = {record.step: record for record in runs}
    tally["trials"], tally["acknowledged"] = len(pinned), saves
    tally["lost"] = sum(not (step in kept and kept[step].pin == "mine") for step in pinned)
    tally["lost"] += sum(kept[step].metrics != {"loss": loss} for step, loss in pinned.items())
    tally["invalid"] = int(not runs.verify().ok)
    assert kept.keys() - pinned.keys() <= set(range(saves - 2, saves + 1))


@pytest.mark.parametrize("leftover", ["stage-0", "swap-0"])
def test_the_leftovers_of_a_live_writer_are_left_alone(tmp_path, leftover) -> None:
    """Only who holds the lock sweeps; who prunes or pins does not."""
    writer = start(WRITE, tmp_path / "run", 3)
    writer.stdout.readline()
    place = tmp_path / "run" / ".keras_ckpt" / leftover
    place.mkdir()
    runs = kc.CheckpointDirectory(tmp_path / "run")
    writer.stdin.write("go\n")
    writer.stdin.flush()
    for _ in range(3):
        writer.stdout.readline()
    runs.pin(3)
    runs.prune(kc.LatestN(1))
    assert place.exists()

    writer.communicate()
    start(WRITE, tmp_path / "run", 0).communicate("go\n")
    assert not place.exists()
