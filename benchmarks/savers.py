"""Those who save in a `fit`: this package, its peers, and a plain write of the same bytes."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np

import keras_ckpt as kc
from keras_ckpt.store import background, commit


class Saver(NamedTuple):
    """A callback to be measured.

    Attributes:
        make: Makes it: of a directory, how many batches there are from save to save, and how many saves stay.
        finish: Waits for what it does in the background, and may say when the save was on disk, in milliseconds.
        syncs: Whether what it writes is durable then.
        keeps: Whether more than one save stays.
    """

    make: Callable[[pathlib.Path, int, int], keras.callbacks.Callback]
    finish: Callable[[Any], float | None] = lambda callback: None
    syncs: bool = False
    keeps: bool = True


class Every(keras.callbacks.Callback):
    """Saves every so many batches."""

    def __init__(self, path: pathlib.Path, every: int, keep: int) -> None:
        super().__init__()
        self.path, self.every, self.keep = path, every, keep

    def on_train_batch_end(self, batch, logs=None) -> None:
        if (batch + 1) % self.every == 0:
            self.save(batch + 1)

    def save(self, number: int) -> None:
        raise NotImplementedError


def now() -> float:
    return time.perf_counter() * 1000


def noted(publish: Callable[..., None]) -> Callable[..., None]:
    """What comes after it, the removal of older checkpoints and TensorFlow's state file, is no part of the save."""

    @functools.wraps(publish)
    def publish_and_note(*arguments: Any) -> None:
        publish(*arguments)
        _published.append(now())

    return publish_and_note


_published: list[float] = []
commit.publish = noted(commit.publish)


def finished(callback: keras.callbacks.Callback) -> float:
    """Waits for this package; says when the last save was published."""
    background.wait()
    return _published[-1]


SAVERS = {
    "this: ModelCheckpoint": Saver(
        lambda path, every, keep: kc.ModelCheckpoint(path, save_freq=every, keep=keep),
        finished,
        syncs=True,
    ),
    "this: BackupAndRestore": Saver(
        lambda path, every, keep: kc.BackupAndRestore(path, save_freq=every),
        finished,
        syncs=True,
        keeps=False,
    ),
    "this: .weights.h5": Saver(
        lambda path, every, keep: kc.ModelCheckpoint(
            path / "{batch:04d}.weights.h5", save_freq=every, save_weights_only=True, keep=keep, save_on_background=True
        ),
        finished,
        syncs=True,
    ),
    "this: .keras": Saver(
        lambda path, every, keep: kc.ModelCheckpoint(
            path / "{batch:04d}.keras", save_freq=every, keep=keep, save_on_background=True
        ),
        finished,
        syncs=True,
    ),
    "ModelCheckpoint, .weights.h5": Saver(
        lambda path, every, keep: keras.callbacks.ModelCheckpoint(
            path / ("{batch:04d}.weights.h5" if keep > 1 else "model.weights.h5"),
            save_freq=every,
            save_weights_only=True,
        )
    ),
    "ModelCheckpoint, .keras": Saver(
        lambda path, every, keep: keras.callbacks.ModelCheckpoint(
            path / ("{batch:04d}.keras" if keep > 1 else "model.keras"), save_freq=every
        )
    ),
    "keras BackupAndRestore": Saver(
        lambda path, every, keep: keras.callbacks.BackupAndRestore(path, save_freq=every), keeps=False
    ),
    "OrbaxCheckpoint": Saver(
        lambda path, every, keep: keras.callbacks.OrbaxCheckpoint(path, save_freq=every, max_to_keep=keep),
        lambda callback: callback.wait_until_finished() and None,
    ),
}
"""The savers on each backend. A module `peers_of_<backend>` adds the backend's own."""
OURS = "this: ModelCheckpoint"


def sync(path: pathlib.Path) -> None:
    """Syncs what is there, and the names."""
    for file in (*path.rglob("*"), path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write(path: pathlib.Path, contents: list[memoryview], direct: bool) -> None:
    """Files with these bytes, as fast as they go, and a sync of each and of the directory."""
    for number, content in enumerate(contents):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0)
        descriptor = os.open(path / f"{number}", flags)
        for at in range(0, len(content), _PIECE):
            os.write(descriptor, content[at : at + _PIECE])
        os.fsync(descriptor)
        os.close(descriptor)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def whole_pages(arrays: list[np.ndarray]) -> memoryview:
    """The bytes of all, in pages of memory."""
    size = sum(each.nbytes for each in arrays)
    memory = np.frombuffer(mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE), np.uint8)
    memory[:size] = np.concatenate([each.reshape(-1).view(np.uint8) for each in arrays])
    return memory.data


def read(files: list[pathlib.Path]) -> None:
    """All bytes of the files, into memory that is there already."""
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(_buffer):
                pass


_PIECE = 8 << 20
_buffer = memoryview(mmap.mmap(-1, _PIECE))


@contextlib.contextmanager
def scratch() -> Iterator[pathlib.Path]:
    """A directory on the disk of the working directory."""
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as name:
        yield pathlib.Path(name)
    os.sync()
