"""Cuts the power of a file system: what it had not written back is gone."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import os
import pathlib
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator

from keras_ckpt.store.directory import CheckpointDirectory
from reliability.oracle import verify
from reliability.trainer import Acknowledge, Child, Job, acknowledged_by, at_random, train

SIZES = {"ext4": 64 << 20, "xfs": 320 << 20}
_DIE_WITH_PARENT = 1
_NEW_NAMESPACE = 0x00020000
_SHUTDOWN = 0x8004587D
_WITHOUT_LOG_FLUSH = 2


def _private_mounts() -> None:
    """What this process mounts is seen by it and its children only, and gone with them however they end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NAMESPACE):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    _run("mount", "--make-rprivate", "/")


@contextlib.contextmanager
def _mounted(image: str, place: str) -> Iterator[None]:
    """Mounts a file system on a loop device, which is freed with it."""
    _run("mount", "-o", "loop", image, place)
    try:
        yield
    finally:
        _run("umount", place)


def prepare(kind: str, image: str, place: str) -> None:
    """Makes a file system, and raises an `OSError` where its power cannot be cut."""
    _private_mounts()
    with open(image, "wb") as file:
        file.truncate(SIZES[kind])
    _run(f"mkfs.{kind}", "-q", image)
    with _mounted(image, place):
        _cut_power(place)


def cut(job: Job, image: str, delay: float) -> collections.Counter[str]:
    """Cuts the power so long after the first acknowledgement, and checks what is left."""
    place = os.path.dirname(job.path)
    with _mounted(image, place):
        before = list(CheckpointDirectory(job.path))
        with Child(train, job, at_random()) as child:
            child.go_on(delay)
            _cut_power(place)
            child.kill()
    with _mounted(image, place):
        return verify(job, before, child.acknowledged)


def cut_after_wait(job: Job, image: str, seconds: float, beside_tensorflow: bool) -> collections.Counter[str]:
    """Cuts the power so long after three saves, and three of TensorFlow's manager where that is asked for."""
    place = os.path.dirname(job.path)
    with _mounted(image, place):
        before = list(CheckpointDirectory(job.path))
        acknowledged = acknowledged_by(train, job, (1, 1, 1))
        plain = tempfile.mkdtemp(dir=place)
        if beside_tensorflow:
            acknowledged_by(_save_by_tensorflow, plain)
        time.sleep(seconds)
        _cut_power(place)
    with _mounted(image, place):
        counts = verify(job, before, acknowledged)
        if beside_tensorflow:
            counts["lost by TensorFlow"] = int(not _restores(plain))
        return counts


def _cut_power(place: str) -> None:
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG_FLUSH))
    finally:
        os.close(descriptor)


def _save_by_tensorflow(acknowledge: Acknowledge, path: str) -> None:
    import tensorflow as tf

    manager = tf.train.CheckpointManager(tf.train.Checkpoint(value=tf.Variable([1.0] * 100)), path, max_to_keep=1)
    for _ in range(3):
        manager.save()


def _restores(path: str) -> bool:
    """Whether any checkpoint that TensorFlow wrote can be read."""
    import tensorflow as tf

    for index in pathlib.Path(path).glob("*.index"):
        with contextlib.suppress(Exception):  # what it raises for a damaged one is of many types
            tf.train.load_variable(str(index.with_suffix("")), "value/.ATTRIBUTES/VARIABLE_VALUE")
            return True
    return False


def _run(*command: str) -> None:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise OSError(f"{' '.join(command)}: {result.stderr.strip()}")
