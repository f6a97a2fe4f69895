"""Who writes into a directory: one process at a time, and within it one thread."""

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
    """The mark of a directory's one writing process; it ends when the last reference to it is dropped.

    Attributes:
        session: What the process is writing for at the moment, to tell two writers of one training apart from
            two trainings after one another.
        recovered: Whether what an earlier process left half done has been seen to.
        saving: Held by the thread that saves.
        stage: The name of an empty folder for the next save, `""` if there is none.
    """

    def __init__(self, descriptor: int) -> None:
        self.session: object = None
        self.recovered = False
        self.saving = threading.RLock()
        self.stage = ""
        self._close = weakref.finalize(self, os.close, descriptor)

    def take_stage(self) -> str:
        """The name of an empty private folder, which is the caller's until it is given back as `stage`."""
        name, self.stage = self.stage or f"stage-{uuid.uuid4().hex}", ""
        return name

    def drop_after_fork(self) -> None:
        """A forked child must not keep its parent's lock alive."""
        self._close()


def claim(descriptor: int, path: str) -> WriterLock:
    """The process's one lock of a directory.

    Args:
        descriptor: An open file of the directory, which is there to be locked. It is closed with the lock.
        path: The directory, for the message.

    Raises:
        DirectoryInUseError: Another process writes there; it is named.
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
    """A forked child has none of its parent's locks."""
    # A thread that the child has not may hold the other.
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
    # Only for the message that another process gets; a full disk is no reason not to train.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, msgspec.json.encode(holder) + b"\n", 0)


def _read_holder(descriptor: int) -> str:
    for _ in range(_LOOKS):
        with contextlib.suppress(msgspec.MsgspecError, KeyError, OSError, RecursionError, ValueError):
            holder = msgspec.json.decode(os.pread(descriptor, 4096, 0), type=dict[str, str | int])
            return "process {pid} on {host} since {since} ({command})".format_map(holder)
        time.sleep(0.01)  # it has the lock, and may be about to leave its name
    return "a process that left no name"
