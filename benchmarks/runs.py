"""The table of 1,000 runs of 20 checkpoints, against a bare loop that opens and decodes the same sidecars.

Run it from the top of the repository: `python benchmarks/runs.py`. The figures are medians of ratios of CPU time, in
turns.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import msgspec

import keras_ckpt as kc
from keras_ckpt.store import record as sidecars
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord

RUNS, COUNT = 1000, 20
ROUNDS = 9


def fill(path: pathlib.Path, number: int) -> None:
    """Writes sidecars and the state file as a run of 20 epochs leaves them, with empty files beside them."""
    path.mkdir()
    (path / ".keras_ckpt").mkdir()
    for step in range(1, COUNT + 1):
        name = f"ckpt-{step}"
        files = [f"{name}.data-00000-of-00001", f"{name}.index"]
        record = CheckpointRecord(
            sequence=step,
            step=step,
            epoch=step,
            batch=0,
            run_id=f"{number:032}",
            metrics={"loss": 1 / step, "accuracy": 0.9, "val_loss": abs(step - 9) / number, "val_accuracy": 0.8},
            monitor="val_loss",
            mode="min",
            modes={"val_accuracy": "max", "accuracy": "max"},
            time=1.7e9 + step,
            reason="epoch",
            metadata={"dataset": "digits", "rate": 1 / number, "units": 2 ** (number % 9)},
            versions={"keras_ckpt": "0.1.0", "keras": "3.15.1", "tensorflow": "2.21.0", "python": "3.11.7"},
            timings={"write_ms": 5.2, "blocked_ms": 6.1},
            files=tuple(
                CheckpointFile(file, 10, f"blake3:{number:032}{step:030}{place:02}") for place, file in enumerate(files)
            ),
        )
        (path / f"{name}.json").write_bytes(sidecars.encode(record))
        for file in files:
            (path / file).touch()
    (path / "checkpoint").write_text(f'model_checkpoint_path: "ckpt-{COUNT}"\n')


def bare_loop(path: pathlib.Path) -> None:
    decode = msgspec.json.Decoder(CheckpointRecord).decode
    for run in path.iterdir():
        for file in [file for file in run.iterdir() if file.name.endswith(".json")]:
            with open(file, "rb") as stream:
                decode(stream.read())


def seconds(action: Callable[[], object]) -> float:
    begin = time.process_time()
    action()
    return time.process_time() - begin


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = pathlib.Path(name)
        for number in range(1, RUNS + 1):
            fill(path / f"run{number}", number)
        runs = kc.Runs(path)
        actions: dict[str, Callable[[], object]] = {
            "bare loop": lambda: bare_loop(path),
            "print(runs)": lambda: str(runs),
            "runs.facts()": runs.facts,
            "len(runs)": lambda: len(runs),
        }
        for action in actions.values():  # the cache is warm for all
            action()
        times: dict[str, list[float]] = {action: [] for action in actions}
        for _ in range(ROUNDS):
            for action, run in actions.items():
                times[action].append(seconds(run))
    print(f"{RUNS} runs of {COUNT} checkpoints, median of {ROUNDS} rounds in turns\n")
    print(f"{'':16}{'CPU seconds':>13}{'times the bare loop':>22}")
    for action, values in times.items():
        ratios = [value / loop for value, loop in zip(values, times["bare loop"], strict=True)]
        print(f"{action:16}{statistics.median(values):13.3f}{statistics.median(ratios):22.2f}")


if __name__ == "__main__":
    main()
