"""A run that other processes resume ends with exactly the checkpoints of an uninterrupted run."""

import json

import pytest

import keras_ckpt as kc
from support.restarts import trainer


@pytest.fixture(scope="module")
def train():
    with trainer() as function:
        yield function


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> str:
    """The checkpoints that an uninterrupted process leaves."""
    path = tmp_path_factory.mktemp("whole") / "run"
    train(path)
    return kept(path)


def kept(path) -> str:
    """Steps, positions and metrics of all checkpoints of a run, and of its best checkpoint."""
    return json.dumps(
        [
            [
                (record.step, record.epoch, record.batch, record.metrics.get("val_loss"))
                for record in kc.CheckpointDirectory(each)
            ]
            for each in (path, f"{path}-best")
        ]
    )


@pytest.mark.parametrize("ends", [(10,), (5, 15, 10)])
def test_several_processes_leave_the_checkpoints_of_a_single_process(tmp_path, train, whole, ends) -> None:
    """Each process stops at the end of an epoch, and the next resumes from the newest checkpoint."""
    for batches in ends:
        train(tmp_path / "run", batches + 1)
    train(tmp_path / "run")

    assert kept(tmp_path / "run") == whole


def test_a_second_trainer_is_refused_with_the_name_of_the_first(tmp_path, train, holder) -> None:
    """Another process has the lock of the directory."""
    [error] = train(tmp_path)

    assert f"{tmp_path} is written to by another trainer: process {holder.pid}" in error
