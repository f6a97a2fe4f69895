"""A power cut loses nothing that was acknowledged, on file systems that keep for themselves what is not synced."""

import contextlib
import itertools
import math
import random
import subprocess

import pytest

from keras_ckpt.store.policies import BestN, LatestN
from reliability import power
from reliability.trainer import Job, Noise, RealModel

KEEPS = (LatestN(1), LatestN(3), LatestN(2) | BestN(2, "loss", "min"))


@contextlib.contextmanager
def disk(kind, path, payload):
    """A file system of its own: its image, a directory in it, and how to call what sees it mounted."""
    image, place = str(path / "image"), path / "mounted"
    place.mkdir()
    with payload.station() as process:

        def call(function, *arguments):
            return process.submit(function, *arguments).result()

        call(power.prepare, kind, image, str(place))
        yield image, str(place / "run"), call
    loops = subprocess.run(["losetup", "--associated", image], check=True, capture_output=True)
    assert not loops.stdout, "a loop device was left behind"


@pytest.fixture(scope="module", autouse=True)
def _power_can_be_cut(tmp_path_factory):
    """Skips where file systems cannot be made, mounted and shut down."""
    for kind in power.SIZES:
        try:
            with disk(kind, tmp_path_factory.mktemp(kind), Noise()):
                pass
        except OSError as error:
            pytest.skip(f"power can be cut by root with loop devices and mkfs only: {error}")


@pytest.mark.parametrize(
    ("payload", "cuts"), [(Noise(), (8, 450)), (RealModel(), (2, 50))], ids=["bytes", "real model"]
)
@pytest.mark.parametrize("kind", power.SIZES)
def test_a_power_cut_while_training(tmp_path, tally, long, kind, payload, cuts) -> None:
    """Trainings in one directory after one another, each ended by a power cut."""
    with disk(kind, tmp_path, payload) as (image, path, call):
        for _ in range(cuts[long]):
            job = Job(path, random.choice(KEEPS), payload)
            tally.update(call(power.cut, job, image, math.exp(random.uniform(-7, 0))))


def test_a_power_cut_after_a_wait(tmp_path, tally, long) -> None:
    """When the file system has written back what it liked to, in which TensorFlow's manager may lose all it had.

    Its losses with max_to_keep=1 are counted beside ours in the long form.
    """
    payload = RealModel() if long else Noise()
    waits = [("ext4", 7), *itertools.product(["ext4", "xfs"], [6, 33])] if long else [("ext4", 7)]
    for kind, seconds in waits:
        path = tmp_path / f"{kind}-{seconds}"
        path.mkdir()
        with disk(kind, path, payload) as (image, directory, call):
            for _ in range(5 if long else 1):
                job = Job(directory, LatestN(1), payload)
                tally.update(call(power.cut_after_wait, job, image, seconds, long))
