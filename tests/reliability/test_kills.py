"""A process that is killed at any moment loses nothing that it acknowledged, and leaves nothing half done."""

import math
import os
import random
import shutil
import tempfile

import pytest

from keras_ckpt.store.policies import BestN, LatestN
from reliability import kills
from reliability.oracle import looking
from reliability.trainer import Job, Noise, RealModel, station

BEST = BestN(1, "loss", "min")
WORKLOADS = {
    "first saves": (kills.save, LatestN(1), 0),
    "saves that prune": (kills.save, LatestN(1) | BEST, 3),
    "a step saved again": (kills.save_again, LatestN(2), 3),
    "a prune": (kills.prune, LatestN(1) | BEST, 4),
}


@pytest.fixture
def directory(tmp_path):
    """A directory that is not there yet; in memory where that can be: a kill leaves alone what is not synced."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as path:
        yield f"{path}/run"


@pytest.fixture(scope="module")
def plain_station():
    """Where processes without TensorFlow are forked, and strace may watch them."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    with station() as place:
        try:
            place.submit(kills.probe).result()
        except PermissionError as error:
            pytest.skip(f"strace is not permitted: {error}")
        yield place


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_kill_before_any_system_call(directory, tally, plain_station, workload) -> None:
    """The directory is as it was or as it is afterwards, and the next process goes on."""
    action, keep, steps = WORKLOADS[workload]
    job = Job(directory, keep)
    kills.fill(job, steps)

    tally.update(plain_station.submit(kills.kill_everywhere, job, action).result())


def test_a_kill_before_any_system_call_of_a_recovery(directory, tally, long, plain_station) -> None:
    """A process that dies while it cleans up after one that died leaves that to the next."""
    job = Job(directory, LatestN(2))
    kills.fill(job, 3)

    tally.update(plain_station.submit(kills.kill_recoveries, job, 1 if long else 12).result())


@pytest.mark.parametrize("workload", ["saves that prune", "a step saved again"])
def test_a_kill_before_any_system_call_of_a_real_model(directory, tally, long, plain_station, workload) -> None:
    """TensorFlow's writing included."""
    action, keep, steps = WORKLOADS[workload]
    job = Job(directory, keep, RealModel())
    with station(job.payload.prepare) as place:
        place.submit(kills.fill, job, steps).result()
        tally.update(place.submit(kills.kill_everywhere, job, action, 1 if long else 4).result())
    assert tally["linkat"], "nothing was shared"


@pytest.mark.parametrize("payload", [Noise(), RealModel()], ids=["bytes", "real model"])
def test_a_kill_at_random(directory, tally, long, payload) -> None:
    """Trainings in one directory after one another, each killed, while another process reads."""
    keeps = (LatestN(1), LatestN(3), LatestN(2) | BEST, BestN(2, "loss", "min"))
    with station(payload.prepare) as place, looking(directory) as seen:
        for number in range(1000 if long else 60):
            delay = random.uniform(0, 0.1) if number % 2 else math.exp(random.uniform(-9, -1))
            job = Job(directory, random.choice(keeps), payload)
            tally.update(place.submit(kills.kill_at_random, job, delay).result())
    tally.update(seen)
