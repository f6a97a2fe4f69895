"""Helpers for runs: histories from text, directories filled without TensorFlow, and a process that holds a lock."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from blake3 import blake3

from keras_ckpt.store import tails
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.policies import PreservationPolicy
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord
from keras_ckpt.store.writer import SaveRequest, Write, Writer


def history(text: str) -> list[CheckpointRecord]:
    """Records in the order of saving, from words such as `10:0.5`, `10:nan` or `10`: a step, and an optional loss."""
    records = []
    for sequence, word in enumerate(text.split(), 1):
        step, _, loss = word.partition(":")
        metrics = {"loss": float(loss)} if loss else {}
        records.append(
            CheckpointRecord(sequence=sequence, step=int(step), metrics=metrics, time=3600.0 * sequence, batch=0)
        )
    return records


def steps(text: str) -> set[int]:
    """A set of steps, from a line of numbers."""
    return {int(word) for word in text.split()}


def payload(content: bytes = b"weights", shards: int = 1) -> Write:
    """A `Write` of the same files as TensorFlow's: an index and data shards."""

    def write(folder: Folder, record: CheckpointRecord) -> list[CheckpointFile]:
        name = record.name
        data = {f"{name}.data-{shard:05}-of-{shards:05}": content for shard in range(shards)}
        files = []
        for each, part in {**data, f"{name}.index": b"index of " + content}.items():
            with folder.writing(each) as file:
                file.write(memoryview(part))
                files.append(CheckpointFile(each, *file.finish()))
        return files

    return write


def file_payload(content: bytes) -> Write:
    """A `Write` of one file of Keras with a content and its record."""

    def write(folder: Folder, record: CheckpointRecord) -> list[CheckpointFile]:
        digest = f"blake3:{blake3(content).hexdigest()}"
        folder.create(record.name, content + tails.tail(record, len(content), digest))
        return [CheckpointFile(record.name, len(content), digest)]

    return write


def shared_payload(runs: CheckpointDirectory, content: str, same: bytes = bytes(range(10))) -> Write:
    """A `Write` of a TensorFlow checkpoint with two arrays. Later checkpoints with the same second array share it."""
    import numpy as np

    from keras_ckpt.formats.arena import Arena
    from keras_ckpt.formats.bundle_writer import array_value
    from keras_ckpt.formats.sharing import SharingWrite

    arrays = {b"changed": np.frombuffer(content.encode(), np.uint8), b"same": np.frombuffer(same, np.uint8)}
    arena, values = Arena(), {key: array_value(array) for key, array in arrays.items()}
    arena.make_room({key: len(value.data) for key, value in values.items()})
    return SharingWrite({key: arena.take(key, value) for key, value in values.items()}, arena, Writer(runs))


class Filler:
    """Saves checkpoints into a directory without TensorFlow."""

    def __init__(self, path: pathlib.Path) -> None:
        self.runs = CheckpointDirectory(path)

    def save(
        self, text: str, keep: PreservationPolicy | None = None, run_id: str = "run", **facts: object
    ) -> CheckpointDirectory:
        writer = Writer(self.runs, keep)
        for record in history(text):
            named = {"metrics": record.metrics, "time": record.time, "batch": 0, "run_id": run_id, **facts}
            writer.save(SaveRequest(step=record.step, **named), payload(str(record.step).encode()))
        writer.close()
        return self.runs


HOLD = """
import sys
from keras_ckpt.store.files import Folder
lock = Folder(sys.argv[1], create=True).lock()
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def unprivileged_user() -> Iterator[None]:
    """Drops the superuser's rights: runs as a user who may write only where everybody may."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if user == 0:
            os.seteuid(user)
