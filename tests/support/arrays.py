"""Checkpoints of arrays, written without a framework."""

from __future__ import annotations

import pathlib

import numpy as np

from keras_ckpt.formats.bundle_writer import array_value, write_bundle
from keras_ckpt.formats.variables import SUFFIX
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.writer import SaveRequest, Writer


def written(path: pathlib.Path, step: int = 1, loss: float = 0.0, /, **arrays: np.ndarray) -> CheckpointRecord:
    """A checkpoint of arrays, by the names of variables in a model: `dense__kernel` is `model/dense/kernel`."""
    values = {f"model/{name.replace('__', '/')}{SUFFIX}".encode(): array_value(each) for name, each in arrays.items()}
    writer = Writer(CheckpointDirectory(path))
    request = SaveRequest(step=step, metrics={"loss": loss}, monitor="loss", mode="min", metadata={"data": "digits"})
    record = writer.save(request, lambda folder, record: write_bundle(folder, record.name, [values])[0])
    writer.close()
    return record
