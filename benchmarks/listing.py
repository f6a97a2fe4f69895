"""Listing and planning over 10,000 checkpoints, against a bare loop that opens and decodes the same sidecars.

Run it from the top of the repository: `python benchmarks/listing.py`. All figures come from one run, in turns.
"""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import msgspec

import keras_ckpt as kc
from keras_ckpt.store import record as sidecars
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord

COUNT = 10_000
ROUNDS = 9


def fill(path: pathlib.Path) -> None:
    """Writes sidecars and the state file as a run of 10,000 epochs leaves them, with empty files beside them."""
    digest = f"blake3:{'0' * 64}"
    for step in range(1, COUNT + 1):
        name = f"ckpt-{step}"
        files = [f"{name}.data-00000-of-00001", f"{name}.index"]
        record = CheckpointRecord(
            sequence=step,
            step=step,
            epoch=step,
            batch=0,
            run_id="0" * 32,
            metrics={"loss": 1 / step, "accuracy": 0.9, "val_loss": abs(step - 5000) / 5000, "val_accuracy": 0.8},
            monitor="val_loss",
            mode="min",
            time=1.7e9 + step,
            reason="epoch",
            metadata={"dataset": "digits"},
            versions={"keras_ckpt": "0.1.0", "keras": "3.15.1", "tensorflow": "2.21.0", "python": "3.11.7"},
            timings={"write_ms": 5.2, "blocked_ms": 6.1},
            files=tuple(CheckpointFile(file, 0, digest) for file in files),
        )
        (path / f"{name}.json").write_bytes(sidecars.encode(record))
        for file in files:
            (path / file).touch()
    (path / "checkpoint").write_text(f'model_checkpoint_path: "ckpt-{COUNT}"\n')


def seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def bare_loop(path: pathlib.Path) -> None:
    decode = msgspec.json.Decoder(CheckpointRecord).decode
    for file in [file for file in path.iterdir() if file.name.endswith(".json")]:
        with open(file, "rb") as stream:
            decode(stream.read())


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        fill(path)
        runs = kc.CheckpointDirectory(path)
        policy = kc.LatestN(3) | kc.BestN(5, "val_loss", "min") | kc.EveryNSteps(500) | kc.EveryNHours(1)
        actions: dict[str, Callable[[], object]] = {
            "bare loop": lambda: bare_loop(path),
            "for record in directory": lambda: [None for _ in runs],
            # Python asks for the length first, so the directory is read twice.
            "list(directory)": lambda: list(runs),
            "directory.plan(policy)": lambda: runs.plan(policy),
            "print(directory)": lambda: str(runs),
            "interpreter's start": lambda: python("-c", ""),
            "keras-ckpt ls --json": lambda: python("-m", "keras_ckpt", "ls", str(path), "--json"),
        }
        bare_loop(path)  # the cache is warm for all
        times: dict[str, list[float]] = {action: [] for action in actions}
        for _ in range(ROUNDS):
            for action, run in actions.items():
                times[action].append(seconds(run))
    times["ls --json less the start"] = [
        whole - start for whole, start in zip(times["keras-ckpt ls --json"], times["interpreter's start"], strict=True)
    ]
    print(f"{COUNT} checkpoints, median of {ROUNDS} rounds in turns\n")
    print(f"{'':26}{'seconds':>9}{'times the bare loop':>22}")
    for action, values in times.items():
        ratios = [value / loop for value, loop in zip(values, times["bare loop"], strict=True)]
        print(f"{action:26}{statistics.median(values):9.3f}{statistics.median(ratios):22.2f}")


if __name__ == "__main__":
    main()
