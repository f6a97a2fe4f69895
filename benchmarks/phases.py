"""Where the time of a save and of a restore goes: the phases of each, every one without those within it.

Run it from the top of the repository: `python benchmarks/phases.py`. Medians in milliseconds of one run. Watching takes
about a microsecond a call, and threads work at the same time, so the sums are greater than what `speed.py` measures.
"""

from __future__ import annotations

import collections
import functools
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras
import models
import savers

import keras_ckpt as kc
from keras_ckpt.formats import sharing
from keras_ckpt.model import checkpoint_reader, comparison, model_state, naming, snapshot
from keras_ckpt.model.backends import tensorflow as backend
from keras_ckpt.resume import backed_up_fit
from keras_ckpt.store import background, writer
from keras_ckpt.training import session

WATCHED: dict[str, list[tuple[Any, str]]] = {
    "callback: all else": [
        (kc.ModelCheckpoint, "on_train_batch_end"),
        (kc.BackupAndRestore, "on_train_batch_end"),
        (session.Session, "save"),
    ],
    "callback: the states of others, and random numbers": [(backed_up_fit.BackedUpFit, "_now")],
    "callback: is the model as it was (beside the next)": [(model_state._Plan, "holds")],
    "callback: one operation reads all variables": [(backend._Call, "run")],
    "callback: the rest of the snapshot": [(model_state.ModelState, "snapshot")],
    "copies": [(snapshot.Snapshot, "detach"), (snapshot.Snapshot, "move")],
    "what the directory holds, what to keep": [
        (writer, "examine"),
        (writer.Writer, "_claim"),
        (writer.Writer, "unkept"),
    ],
    "encoding and checksums": [(sharing, "write_bundle")],
    "files: sync": [(os, "fsync")],
    "files: write, open, rename, unlink": [(os, each) for each in ("write", "open", "rename", "unlink")],
    "background: all else": [(writer.Writer, "save")],
    "restore: all else": [(kc, "restore")],
    "restore: the index": [(checkpoint_reader, "read_index")],
    "restore: the model's names": [(naming, "named_variables"), (naming, "build_optimizers")],
    "restore: do the names and shapes fit": [(comparison.Comparison, "_match"), (comparison.Comparison, "_check")],
    "restore: memory for the values": [(backend, "allocate")],
    "restore: reading, digests and checksums": [(checkpoint_reader, "read_values")],
    "restore: assigning": [(backend, "assign"), (backend, "is_finite")],
}
"""What is watched, by the phase that it is."""
SAVES = 24


class Phases:
    """The time that each phase has taken since it was asked for."""

    def __init__(self) -> None:
        self._times: collections.Counter[str] = collections.Counter()
        self._within = threading.local()
        for phase, functions in WATCHED.items():
            for owner, name in functions:
                setattr(owner, name, self._watched(phase, getattr(owner, name)))

    def take(self) -> Mapping[str, float]:
        """The milliseconds by phase; then it begins anew."""
        times, self._times = self._times, collections.Counter()
        return times

    def _watched(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def watched(*arguments: Any, **named: Any) -> Any:
            outer = getattr(self._within, "inner", None)
            self._within.inner = 0.0
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                took = (time.perf_counter() - began) * 1000
                self._times[phase] += took - self._within.inner
                self._within.inner = None if outer is None else outer + took

        return watched


class Collect(keras.callbacks.Callback):
    """Waits until each save is done before the next batch, and takes its phases."""

    def __init__(self, phases: Phases, every: int) -> None:
        super().__init__()
        self.samples: list[Mapping[str, float]] = []
        self._phases = phases
        self._every = every

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        background.wait()
        times = self._phases.take()
        if batch and batch % self._every == 0:
            self.samples.append(times)

    def get_state(self) -> None:
        """Nothing of it is to be backed up."""

    def set_state(self, state: None) -> None:
        pass


def of_saves(
    phases: Phases, model: keras.Model, every: int, saver: str = "this: ModelCheckpoint"
) -> list[Mapping[str, float]]:
    """The phases of saves in a `fit`, but of the first ones."""
    collect = Collect(phases, every)
    with savers.scratch() as path:
        models.train(model, SAVES * every, savers.SAVERS[saver].make(path, every, 1), collect)
    return collect.samples[4:]


def of_restores(phases: Phases, state: str) -> list[Mapping[str, float]]:
    """The phases of restores into a model that is there, but of the first ones."""
    model, samples = models.dense(state), []
    with savers.scratch() as path:
        models.train(model, 1, kc.ModelCheckpoint(path, save_freq=1))
        for _ in range(SAVES):
            phases.take()
            kc.restore(model, path)
            samples.append(phases.take())
    return samples[4:]


def table(title: str, columns: Mapping[str, list[Mapping[str, float]]]) -> str:
    """Medians, a row for each phase and a column for each state."""
    rows = [phase for phase in WATCHED if any(phase in sample for samples in columns.values() for sample in samples)]
    medians = {
        name: [statistics.median(sample.get(row, 0.0) for sample in samples) for row in rows]
        for name, samples in columns.items()
    }
    lines = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(f'{of[at]:.2f}' for of in medians.values())} |" for at, row in enumerate(rows)]
    lines += [f"| in all | {' | '.join(f'{sum(of):.2f}' for of in medians.values())} |"]
    return "\n".join(lines)


def main() -> None:
    phases = Phases()
    little, great = "10 MB, 640 variables", "100 MB, 20 variables"
    states = (little, great, "100 MB, 640 variables")
    saves = {
        f"{name}{', XLA' * jit}": of_saves(phases, models.dense(name, jit), 8)
        for jit in (False, True)
        for name in states
    }
    saves[f"{states[-1]}, BackupAndRestore"] = of_saves(phases, models.dense(states[-1]), 8, "this: BackupAndRestore")
    print(table("a save, ms", {"500 KB": of_saves(phases, models.small(), 1), **saves}), end="\n\n")
    print(table("a restore, ms", {name: of_restores(phases, name) for name in states}))


if __name__ == "__main__":
    main()
