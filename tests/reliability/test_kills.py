"""A process that is killed at any moment loses no acknowledged checkpoint, and leaves nothing half done."""

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
    """A missing directory, in memory where possible: a kill does not harm changes that are not synced."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as path:
        yield f"{path}/run"


def sample(long: bool, dice: random.Random, every: int) -> kills.Choice:
    """Every call in the long form; in the short form every so many from a random offset on."""
    return kills.Choice() if long else kills.Choice(every, dice.randrange(every))


@pytest.fixture(scope="module")
def plain_station():
    """A station without TensorFlow, whose processes strace may watch."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    with station() as place:
        try:
            place.submit(kills.probe).result()
        except PermissionError as error:
            pytest.skip(f"strace is not permitted: {error}")
        yield place


@pytest.fixture(scope="module")
def real_station():
    """A station with TensorFlow."""
    with RealModel().station() as place:
        yield place


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_kill_before_any_system_call(directory, tally, long, dice, plain_station, workload) -> None:
    """The directory is as before the action or as after it, and the next process continues."""
    action, keep, steps = WORKLOADS[workload]
    job = Job(directory, keep)
    kills.fill(job, steps)

    tally.update(plain_station.submit(kills.kill_everywhere, job, action, sample(long, dice, 4)).result())


def test_a_kill_before_any_system_call_of_a_recovery(directory, tally, long, dice, plain_station) -> None:
    """A process that dies during a recovery leaves the recovery to the next process."""
    job = Job(directory, LatestN(2))
    kills.fill(job, 3)

    choices = sample(long, dice, 12), sample(long, dice, 4)
    tally.update(plain_station.submit(kills.kill_recoveries, job, *choices).result())


@pytest.mark.parametrize("workload", ["saves that prune", "a step saved again"])
@pytest.mark.usefixtures("plain_station")
def test_a_kill_before_any_system_call_of_a_real_model(directory, tally, long, dice, real_station, workload) -> None:
    """TensorFlow's writing included."""
    action, keep, steps = WORKLOADS[workload]
    job = Job(directory, keep, RealModel())
    real_station.submit(kills.fill, job, steps).result()

    tally.update(real_station.submit(kills.kill_everywhere, job, action, sample(long, dice, 8)).result())
    assert tally["linkat"], "nothing was shared"


@pytest.fixture(scope="module")
def noise_station():
    """A station without TensorFlow; strace is not needed."""
    with station() as place:
        yield place


@pytest.mark.parametrize(
    ("place", "payload"),
    [("noise_station", Noise()), ("real_station", RealModel())],
    ids=["bytes", "real model"],
)
def test_a_kill_at_random(directory, tally, long, dice, request, place, payload) -> None:
    """Trainings in one directory after one another, each killed, while another process reads."""
    place = request.getfixturevalue(place)
    keeps = (LatestN(1), LatestN(3), LatestN(2) | BEST, BestN(2, "loss", "min"))
    with looking(directory) as seen:
        for number in range(1000 if long else 30):
            delay = dice.uniform(0, 0.1) if number % 2 else math.exp(dice.uniform(-9, -1))
            job = Job(directory, dice.choice(keeps), payload)
            tally.update(place.submit(kills.kill_at_random, job, delay).result())
    tally.update(seen)
