"""How long it takes from the start of a process to its first new batch: of a fresh run, and of a run resumed far in.

Run it from the top of the repository: `python benchmarks/restarts.py`. All figures come from one run, in turns;
each is of a process of its own. The epoch has 110,000 batches of arrays.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 7
BATCHES, BATCH = 110_000, 4
PLACES = {"a fresh start": 0, "at batch 10": 10, "at batch 100,000": 100_000}
SCRIPT = f"""
import os, sys
import keras
import numpy as np
import keras_ckpt as kc

path, stop = sys.argv[1], int(sys.argv[2])

class Stop(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if not stop:
            print("a new batch", batch, flush=True)
            os._exit(0)
        if batch == stop:
            os._exit(0)

keras.utils.set_random_seed(1)
model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(1)])
model.compile("adam", "mse")
x = np.zeros(({BATCHES * BATCH}, 8), "float32")
data = kc.ResumableDataset(x, x[:, 0], batch_size={BATCH}, shuffle=True, seed=1)
backup = kc.BackupAndRestore(path, save_freq=stop or {BATCHES}, data=data, save_on_background=False)
model.fit(data, epochs=1, verbose=0, callbacks=[backup, Stop()])
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{place}" for name, place in PLACES.items()}
        for name, place in PLACES.items():
            if place:
                run(paths[name], place)
        times: dict[str, list[float]] = {name: [] for name in PLACES}
        for _ in range(ROUNDS):
            for name, place in PLACES.items():
                copy = f"{folder}/copy"
                if place:
                    shutil.copytree(paths[name], copy)
                began = time.perf_counter()
                told = run(copy, 0)
                times[name].append(time.perf_counter() - began)
                assert f"a new batch {place}" in told, told
                shutil.rmtree(copy)
    fresh = times["a fresh start"]
    print(f"{BATCHES} batches an epoch, {ROUNDS} rounds in turns\n")
    print(f"{'seconds to the first new batch':32}{'median':>8}{'slowest':>9}{'of a fresh start':>18}")
    for name, each in times.items():
        ratio = statistics.median(mine / other for mine, other in zip(each, fresh, strict=True))
        print(f"{name:32}{statistics.median(each):8.2f}{max(each):9.2f}{ratio:18.2f}")


def run(path: str, stop: int) -> str:
    """A process that trains, to its first batch or until there is a backup at `stop`."""
    command = [sys.executable, "-c", SCRIPT, path, str(stop)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


if __name__ == "__main__":
    main()
