"""A run that is gone on with by another process ends with exactly the set that one uninterrupted run ends with."""

import json
import pathlib
import subprocess
import sys

import pytest

import keras_ckpt as kc
from support.runs import HOLD

HERE = pathlib.Path(__file__).parent
PROGRAM = """
import json, sys
import keras
import keras_ckpt as kc
from support.models import Reports, Interrupts, dense_model, fit

path, batches = sys.argv[1], int(sys.argv[2])
values = [float("nan"), 0.5, 0.2, 0.4, 0.2, 0.3, 0.1, 0.6]
other = kc.EveryNSteps(20) | kc.LatestN(2)
model = dense_model()
runs = kc.CheckpointDirectory(path)
begin = 0
if runs.latest():
    kc.restore(model, runs)
    begin = runs.latest().epoch
checkpoint = kc.ModelCheckpoint(path, save_freq=["epoch", 4], keep=kc.BestN(2) | other)
best = kc.ModelCheckpoint(path + "-best", save_best_only=True)
try:
    fit(model, Reports(val_loss=values), checkpoint, best, Interrupts(batches, RuntimeError()),
        initial_epoch=begin, epochs=len(values))
except RuntimeError:
    pass
"""


def run(path, batches: int = 1000) -> list[list]:
    """Trains in a process of its own, at most so many batches, and gives what is on disk then."""
    subprocess.run([sys.executable, "-c", PROGRAM, str(path), str(batches)], check=True, cwd=HERE, capture_output=True)
    return [
        [
            (record.step, record.epoch, record.batch, record.metrics.get("val_loss"))
            for record in kc.CheckpointDirectory(each)
        ]
        for each in (path, f"{path}-best")
    ]


@pytest.mark.parametrize("ends", [(10,), (5, 15, 10)])
def test_processes_after_one_another_leave_what_one_leaves(tmp_path, monkeypatch, ends) -> None:
    """Stopped at ends of epochs, and gone on with from the newest: steps, metrics and the best are the same."""
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))
    whole = run(tmp_path / "whole")

    for batches in ends:
        run(tmp_path / "parts", batches + 1)
    parts = run(tmp_path / "parts")

    assert json.dumps(parts) == json.dumps(whole)


def test_a_second_trainer_is_refused_with_the_holders_name(tmp_path, monkeypatch) -> None:
    """While another process trains into the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent))

    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run"), "99"],
        check=False,
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    process.kill()
    process.communicate()

    assert result.returncode == 1
    assert (
        f"DirectoryInUseError: {tmp_path / 'run'} is written to by another trainer: process {process.pid}"
        in result.stderr
    )
