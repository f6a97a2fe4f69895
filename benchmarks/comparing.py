"""`diff` of two checkpoints of 100 MB, against the bare reading of the same checkpoints.

Run it from the top of the repository: `python benchmarks/comparing.py`. All figures come from one run, in turns. They
are times of the processor, which other programs do not change.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import ml_dtypes
import numpy as np

import keras_ckpt as kc
from keras_ckpt.formats.bundle_writer import array_value, write_bundle
from keras_ckpt.formats.variables import SUFFIX
from keras_ckpt.store.writer import SaveRequest, Writer

ROUNDS = 9
SIZE, LAYERS = 100_000_000, 25
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int32": np.int32}


def save(path: pathlib.Path, dtype: type) -> list[kc.CheckpointRecord]:
    """Two checkpoints whose values all differ."""
    rng = np.random.default_rng(0)
    writer = Writer(kc.CheckpointDirectory(path))
    count = SIZE // LAYERS // np.dtype(dtype).itemsize
    first = [(rng.random(count, "float32") * 1000).astype(dtype) for _ in range(LAYERS)]
    records = []
    for step in (1, 2):
        arrays = {
            f"model/dense_{i}/kernel{SUFFIX}".encode(): array_value(each * dtype(step)) for i, each in enumerate(first)
        }
        write = lambda folder, record, arrays=arrays: write_bundle(folder, record.name, [arrays])[0]  # noqa: E731
        records.append(writer.save(SaveRequest(step=step), write))
    writer.close()
    return records


def read(records: Sequence[kc.CheckpointRecord]) -> None:
    """The bare reading: each value of each checkpoint, one after another."""
    for record in records:
        for _ in kc.load_variables(record).values():
            pass


def seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def measured(records: Sequence[kc.CheckpointRecord]) -> tuple[float, float, float]:
    """The medians of the bare reading, of `diff`, and of their ratio."""
    read(records)  # the cache is warm for both
    times = [(seconds(lambda: read(records)), seconds(lambda: kc.diff(*records))) for _ in range(ROUNDS)]
    bare, found, ratio = zip(*((bare, found, found / bare) for bare, found in times), strict=True)
    return statistics.median(bare), statistics.median(found), statistics.median(ratio)


def main() -> None:
    print(f"two checkpoints of {SIZE / 1e6:.0f} MB in {LAYERS} layers, medians of {ROUNDS} rounds in turns\n")
    print(f"{'seconds of a processor':24}{'bare reading':>14}{'diff':>8}{'times':>8}")
    for name, dtype in TYPES.items():
        with tempfile.TemporaryDirectory() as path:
            bare, found, ratio = measured(save(pathlib.Path(path), dtype))
        print(f"{name:24}{bare:14.3f}{found:8.3f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
