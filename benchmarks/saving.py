"""What a save and a restore cost, against Keras, TensorFlow and what the machine can do, for models of several sizes.

Run it from the top of the repository: `python benchmarks/saving.py`. A model's figures come from one run, in turns.
Each save ends with a sync of what it wrote, also those of the others, who leave that out. A line of JSON a model is
added to `benchmarks/saving.jsonl`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import mmap
import os
import pathlib
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

import keras_ckpt as kc
from keras_ckpt.files import Folder
from keras_ckpt.state import ModelState, value_of
from keras_ckpt.writer import Writer

ROUNDS = 9
SHAPES = {
    "10 MB, 20 variables": (5, 400),
    "10 MB, 640 variables": (105, 88),
    "100 MB, 20 variables": (5, 1290),
    "100 MB, 640 variables": (105, 280),
    "1 GB, 20 variables": (5, 4080),
    "1 GB, 640 variables": (105, 890),
}
"""The number and the width of the layers; a layer has two weights and four slots."""


def build(layers: int, width: int) -> keras.Model:
    """Dense layers, with the slots of Adam."""
    model = keras.Sequential([keras.Input((width,)), *(keras.layers.Dense(width) for _ in range(layers))])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    rng = np.random.default_rng(0)
    for variable in (*model.variables, *model.optimizer.variables):
        if len(variable.shape):
            variable.assign(rng.random(variable.shape, np.float32))
    return model


def sync(path: pathlib.Path) -> None:
    """Syncs what is there, and the names."""
    for file in (*path.iterdir(), path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def raw_write(path: pathlib.Path, buffer: memoryview, size: int, direct: int) -> None:
    """As many bytes as fast as they go, and a sync."""
    descriptor = os.open(path / "raw", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | direct)
    for at in range(0, size, len(buffer)):
        # A file may end anywhere, a direct write may not.
        os.write(descriptor, buffer[: -(-min(len(buffer), size - at) // 4096) * 4096])
    os.fsync(descriptor)
    os.close(descriptor)
    sync(path)


def raw_read(files: list[pathlib.Path], buffer: bytearray) -> None:
    """All bytes of the files, into memory that is there already."""
    view = memoryview(buffer)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(view):
                pass


def measure(name: str, folder: pathlib.Path) -> dict[str, list[float]]:
    """Milliseconds by what was done."""
    model = build(*SHAPES[name])
    other = build(*SHAPES[name])
    state = ModelState(model)
    values = [value_of(each) for each in state.names().values()]
    sources = [each.numpy() for each in values]
    targets = [np.ones_like(each) for each in sources]
    size = sum(each.nbytes for each in sources)
    buffer = memoryview(mmap.mmap(-1, 8 << 20))
    scratch = bytearray(8 << 20)
    writer = Writer(kc.CheckpointDirectory(folder / "ours"), kc.LatestN(1))
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(model=model), str(folder / "manager"), 1)
    steps = iter(range(1, 10**9))
    paths = {each: folder / each for each in ("raw", "direct", "saved", "keras", "manager")}
    for path in paths.values():
        path.mkdir(exist_ok=True)

    def native() -> None:
        shutil.rmtree(paths["saved"])
        paths["saved"].mkdir()
        tensors = [each.read_value() for each in values]
        tf.raw_ops.SaveV2(
            prefix=str(paths["saved"] / "ckpt"),
            tensor_names=[str(number) for number in range(len(tensors))],
            shape_and_slices=[""] * len(tensors),
            tensors=tensors,
        )
        sync(paths["saved"])

    def keras_saves() -> None:
        model.save_weights(paths["keras"] / "model.weights.h5")
        sync(paths["keras"])

    def manager_saves() -> None:
        manager.save()
        sync(paths["manager"])

    def ours_read() -> None:
        kc.restore(other, kc.CheckpointDirectory(folder / "ours"))

    actions: dict[str, Callable[[], object]] = {
        "memcpy": lambda: [np.copyto(target, source) for target, source in zip(targets, sources, strict=True)],
        "this: snapshot": state.snapshot,
        "write, sync": lambda: raw_write(paths["raw"], buffer, size, 0),
        "write past the cache, sync": lambda: raw_write(paths["direct"], buffer, size, os.O_DIRECT),
        "this: save": lambda: writer.save(state.snapshot(), step=next(steps), size=size),
        "SaveV2, sync": native,
        "CheckpointManager, sync": manager_saves,
        "save_weights, sync": keras_saves,
        "read, first time": lambda: raw_read(list((folder / "ours").glob("ckpt-*.data*")), scratch),
        "read": lambda: raw_read(list((folder / "ours").glob("ckpt-*.data*")), scratch),
        "this: restore": ours_read,
        "load_weights": lambda: other.load_weights(paths["keras"] / "model.weights.h5"),
    }
    times: dict[str, list[float]] = {action: [] for action in actions}
    for turn in range(ROUNDS + 1):
        for action, run in actions.items():
            began = time.perf_counter()
            run()
            if turn:
                times[action].append((time.perf_counter() - began) * 1000)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(SHAPES), help=f"some of: {', '.join(SHAPES)}")
    for name in parser.parse_args().models:
        with tempfile.TemporaryDirectory(dir=".") as folder, Folder(folder):
            times = measure(name, pathlib.Path(folder))
        medians = {action: statistics.median(each) for action, each in times.items()}
        disk = min(medians["write, sync"], medians["write past the cache, sync"])
        floors = dict.fromkeys(("memcpy", "this: snapshot"), medians["memcpy"])
        floors |= dict.fromkeys(("read, first time", "read", "this: restore", "load_weights"), medians["read"])
        print(f"\n{name}: {ROUNDS} rounds in turns\n{'milliseconds':28}{'median':>9}{'p95':>9}{'of the floor':>14}")
        for action, each in times.items():
            slow = sorted(each)[round(0.95 * (len(each) - 1))]
            ratio = medians[action] / floors.get(action, disk)
            print(f"{action:28}{medians[action]:9.1f}{slow:9.1f}{ratio:14.2f}")
        entry = {"model": name, "date": f"{datetime.date.today()}", "kernel": platform.release(),
                 "processors": os.cpu_count(), "milliseconds": times}  # fmt: skip
        with pathlib.Path(__file__).with_name("saving.jsonl").open("a") as log:
            log.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
