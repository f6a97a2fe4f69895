"""The writer's lock of a directory: one process writes at a time, and within it one thread."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import threading
import time
import uuid
import weakref

import msgspec

from keras_ckpt.errors import DirectoryInUseError

_LOOKS = 20


class WriterLock:
    """The lock of a directory's writing process; dropping the last reference releases it.

    Attributes:
        session: The session that writes now. It distinguishes two writers of one training from two trainings in
            sequence.
        recovered: Whether this process has recovered the unfinished work of an earlier process.
        saving: A lock that the saving thread holds.
        stage: The name of an empty folder for the next save, `""` without a folder.
    """

    def __init__(self, descriptor: int) -> None:
        self.session: object = None
        self.recovered = False
        self.saving = threading.RLock()
        self.stage = ""
        self._close = weakref.finalize(self, os.close, descriptor)

    def take_stage(self) -> str:
        """The name of an empty private folder. It belongs to the caller until the caller sets it as `stage`."""
        name, self.stage = self.stage or f"stage-{uuid.uuid4().hex}", ""
        return name

    def drop_after_fork(self) -> None:
        """Closes the child's descriptor after a fork: the child must not keep the parent's lock alive."""
        self._close()


def claim(descriptor: int, path: str) -> WriterLock:
    """Locks a directory for this process. Every call returns the same lock.

    Args:
        descriptor: The descriptor of the directory's lock file. It is closed with the lock.
        path: The directory, for the message.

    Raises:
        DirectoryInUseError: Another process writes there. The error names the process.
    """
    with _one_at_a_time, contextlib.ExitStack() as failed:
        failed.callback(os.close, descriptor)
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)
        if (lock := _locks.get(identity)) is not None:
            return lock
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DirectoryInUseError(
                f"{path} is written to by another trainer: {_read_holder(descriptor)}. A directory has one "
                "writing process at a time: wait for it to end, stop it (a notebook's kernel counts), or use "
                "another directory."
            ) from None
        _write_holder(descriptor)
        failed.pop_all()
        lock = _locks[identity] = WriterLock(descriptor)
    return lock


_one_at_a_time = threading.RLock()
_locks: weakref.WeakValueDictionary[tuple[int, int], WriterLock] = weakref.WeakValueDictionary()


def drop_all() -> None:
    """Drops all of the parent's locks in a forked child."""
    # A thread of the parent, which the child lacks, may hold the old lock.
    global _one_at_a_time  # noqa: PLW0603
    _one_at_a_time = threading.RLock()
    for lock in list(_locks.values()):
        lock.drop_after_fork()
    _locks.clear()


os.register_at_fork(after_in_child=drop_all)


def _write_holder(descriptor: int) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": " ".join(sys.argv)[:500],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    # Best effort: only another process's error message uses it, and a full disk must not stop training.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, msgspec.json.encode(holder) + b"\n", 0)


def _read_holder(descriptor: int) -> str:
    for _ in range(_LOOKS):
        with contextlib.suppress(msgspec.MsgspecError, KeyError, OSError, RecursionError, ValueError):
            holder = msgspec.json.decode(os.pread(descriptor, 4096, 0), type=dict[str, str | int])
            return "process {pid} on {host} since {since} ({command})".format_map(holder)
        time.sleep(0.01)  # the holder has the lock, and may not have written its name yet
    return "a process of unknown name"
