"""What a save and a restore cost, beside the peers and what the machine can do: a table for each figure.

Run it from the top of the repository, alone on the machine: `python benchmarks/speed.py`. All of it takes five to six
hours; `python benchmarks/speed.py small bytes` measures some figures, `--states` some sizes. What is compared is
measured in one process, in turns. The samples go to `benchmarks/speed.json`, beside those of figures that were not
measured this time; the tables and a plot of all to `benchmarks/speed.md` and `benchmarks/speed.svg`. With
`KERAS_BACKEND=jax` or `torch` the results go to `speed-jax.json` or `speed-torch.json`, and so on.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import os
import pathlib
import platform
import random
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable

import keras
import matplotlib as mpl
import models
import numpy as np
import savers
from matplotlib import pyplot as plt
from savers import OURS, SAVERS, Saver, now

import keras_ckpt as kc
from keras_ckpt.model.position import set_position

ROUNDS, FITS = 7, 3
SMALL_SAVES = 60
KEPT = 10
MEMCPY, WRITE, READ, BARE = "floor: warm memcpy", "floor: write, sync", "floor: read", "floor: the bare files, sync"
SMALL = "500 KB"
COLUMNS = (*models.STATES, SMALL, *models.WORKLOADS)
NONE = "fit without a checkpoint, a batch"
BACKEND = keras.backend.backend()
peers = importlib.import_module(f"peers_of_{BACKEND}")
SAVERS |= peers.SAVERS
RESULTS = pathlib.Path(__file__).with_name("speed.json" if models.ON_TENSORFLOW else f"speed-{BACKEND}.json")

Samples = dict[str, list[float]]
"""By row."""


def in_fit(state: str, jit_compile: bool) -> tuple[Samples, Samples]:
    """How long training stands still for each save, and how much longer the batches of a `fit` take for each.

    The second is measured on TensorFlow alone, because it takes as many fits without saves.
    """
    model = models.dense(state, jit_compile)
    saves, every = (2, 16 if jit_compile else 8) if state.startswith("1 GB") else (5, 20)
    every *= 1 if models.ON_TENSORFLOW else 2  # a batch takes less time, and no save may be skipped
    batches = every * saves + every // 2
    models.train(model, 2)
    blocked: Samples = {MEMCPY: memcpy(model), **{name: [] for name in SAVERS}}
    lost: Samples = {NONE: [], MEMCPY: blocked[MEMCPY], **{name: [] for name in SAVERS}}

    def fit(name: str | None) -> Batches:
        set_position(model, None)  # the batches of a run are counted through all its fits
        clock = Batches()
        with savers.scratch() as path:
            callbacks = [] if name is None else [SAVERS[name].make(path, every, 1)]
            for callback in callbacks:
                timed(callback, every, blocked[name])
            models.train(model, batches, *callbacks, clock)
        return clock

    if not models.ON_TENSORFLOW:
        for name in [*SAVERS] * FITS:
            fit(name)
        return blocked, {}
    for _ in range(ROUNDS):
        waiting: list[tuple[str, Batches]] = []
        before = fit(None)
        for name in SAVERS:
            waiting.append((name, fit(name)))
            if len(waiting) == 2:
                after = fit(None)
                lost[NONE].append(after.usual)
                for each, clock in waiting:
                    lost[each].append((clock.excess - (before.excess + after.excess) / 2) / saves)
                before, waiting = after, []
    return blocked, lost


class Batches(keras.callbacks.Callback):
    """How long the batches of a `fit` take.

    Some fits are twice as fast as others, from the first batch to the last, so each is compared with itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self._ends: list[float] = []

    def on_train_batch_end(self, batch, logs=None) -> None:
        self._ends.append(now())

    def on_train_end(self, logs=None) -> None:
        self._ends.append(now())

    @property
    def usual(self) -> float:
        """The median."""
        return float(np.median(np.diff(self._ends)))

    @property
    def excess(self) -> float:
        """What all took beyond it."""
        return float(np.sum(np.diff(self._ends) - self.usual))


def timed(callback: keras.callbacks.Callback, every: int, times: list[float]) -> None:
    """Has a callback note how long each of its saves takes."""
    batch_end = callback.on_train_batch_end

    def measured(batch: int, logs: object = None) -> None:
        began = now()
        batch_end(batch, logs)
        if (batch + 1) % every == 0:
            times.append(now() - began)

    callback.on_train_batch_end = measured


def memcpy(model: keras.Model) -> list[float]:
    """The time of a copy of all values into memory that is there already."""
    sources = models.arrays(model)
    targets = [np.ones_like(each) for each in sources]

    def copy() -> float:
        began = now()
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)
        return now() - began

    return [copy() for _ in range(ROUNDS + 1)][1:]


class Turns(keras.callbacks.Callback):
    """Has several callbacks save after each batch, one after another, each until what it wrote is on disk.

    The first batch is not counted. The order is another after each batch: the first saver waits for the threads of the
    batch.
    """

    def __init__(self, path: pathlib.Path, chosen: dict[str, Saver], floors: dict[str, Callable[[], object]]) -> None:
        super().__init__()
        self.chosen, self.floors, self.path = chosen, floors, path
        self.returned: Samples = {name: [] for name in chosen}
        self.durable: Samples = {name: [] for name in (*floors, *chosen)}
        self.callbacks = {}
        for name, saver in chosen.items():
            place(path, name).mkdir()
            self.callbacks[name] = saver.make(place(path, name), 1, 1)

    def set_model(self, model) -> None:
        super().set_model(model)
        for callback in self.callbacks.values():
            callback.set_model(model)

    def set_params(self, params) -> None:
        super().set_params(params)
        for callback in self.callbacks.values():
            callback.set_params(params)

    def on_train_begin(self, logs=None) -> None:
        for callback in self.callbacks.values():
            callback.on_train_begin(logs)
            callback.on_epoch_begin(0, logs)

    def on_train_batch_end(self, batch, logs=None) -> None:
        for name, callback in random.Random(batch).sample([*self.callbacks.items()], len(self.callbacks)):
            began = now()
            callback.on_train_batch_end(batch, logs)
            returned = now()
            durable = self.chosen[name].finish(callback)
            if not self.chosen[name].syncs:
                savers.sync(place(self.path, name))
            if batch:
                self.returned[name].append(returned - began)
                self.durable[name].append((durable or now()) - began)
                if durable:
                    self.durable.setdefault(f"{name}, and all else done", []).append(now() - began)
        for name, floor in self.floors.items():
            began = now()
            floor()
            if batch:
                self.durable[name].append(now() - began)

    def on_train_end(self, logs=None) -> None:
        for callback in self.callbacks.values():
            callback.on_train_end(logs)


def place(path: pathlib.Path, name: str) -> pathlib.Path:
    return path / "".join(filter(str.isalnum, name))


def durable(state: str) -> Samples:
    """How long it takes from the call until everything is on disk, nothing else being done meanwhile."""
    model = models.dense(state)
    models.train(model, 1)
    content = savers.whole_pages(models.arrays(model))
    # A backup of the same step would share its bytes.
    chosen = {name: saver for name, saver in SAVERS.items() if name != "this: BackupAndRestore"}
    with savers.scratch() as path:
        floors = {
            f"{WRITE} ({kind})": functools.partial(savers.write, path / kind, [content], kind == "direct")
            for kind in ("buffered", "direct")
        }
        for kind in ("buffered", "direct"):
            (path / kind).mkdir()
        turns = Turns(path, chosen, floors)
        models.train(model, ROUNDS + 1, turns)
    times = turns.durable
    kinds = {name: times.pop(name) for name in floors}
    fastest = min(kinds, key=lambda name: statistics.median(kinds[name]))
    return {WRITE: kinds[fastest]} | times


def small() -> tuple[Samples, Samples]:
    """Saves of 500 KB after each batch: until the callback returns, and until all is on disk."""
    model = models.small()
    keeping_all = SAVERS[OURS]._replace(make=lambda path, every, keep: kc.ModelCheckpoint(path, save_freq=every))
    chosen = {f"{OURS}, all kept": keeping_all, f"{OURS}, the newest kept": SAVERS[OURS]}
    chosen |= {name: saver for name, saver in SAVERS.items() if not name.startswith("this:")}
    with savers.scratch() as path:

        def bare() -> None:
            newest = kc.CheckpointDirectory(place(path, f"{OURS}, all kept")).latest()
            sidecar = path / place(path, f"{OURS}, all kept") / f"{newest.name}.json"
            sizes = [*(file.size for file in newest.files), sidecar.stat().st_size, 200]
            contents = [memoryview(os.urandom(size)) for size in sizes]
            bares.append(place(path, f"bare{len(bares)}"))
            bares[-1].mkdir()
            began = now()
            savers.write(bares[-1], contents, False)
            times.append(now() - began)

        bares: list[pathlib.Path] = []
        times: list[float] = []
        turns = Turns(path, chosen, {BARE: bare})
        models.train(model, SMALL_SAVES + 1, turns)
    return turns.returned, turns.durable | {BARE: times[1:]}


def restored(state: str) -> Samples:
    """Restores into a model that is there, with the files in the cache."""
    model, other = models.dense(state), models.dense(state)
    for each in (model, other):
        models.train(each, 1)
    with savers.scratch() as path:
        ours = [
            kc.ModelCheckpoint(path / "ours", save_freq=1, keep=1),
            kc.ModelCheckpoint(path / "ours.weights.h5", save_weights_only=True, save_freq=1),
            kc.ModelCheckpoint(path / "ours.keras", save_freq=1),
        ]
        models.train(model, 1, *ours)
        model.save_weights(path / "model.weights.h5")
        model.save(path / "model.keras")
        runs = kc.CheckpointDirectory(path / "ours")
        data = [path / "ours" / file.name for file in runs.latest().files]
        actions: dict[str, Callable[[], object]] = {
            READ: lambda: savers.read(data),
            "this: restore": lambda: kc.restore(other, runs),
            "this: restore, check_digests=False": lambda: kc.restore(other, runs, check_digests=False),
            "this: restore of its .weights.h5": lambda: kc.restore(other, path / "ours.weights.h5"),
            "this: restore of its .keras": lambda: kc.restore(other, path / "ours.keras"),
            "this: restore of .weights.h5": lambda: kc.restore(other, path / "model.weights.h5"),
            "this: restore of .keras": lambda: kc.restore(other, path / "model.keras"),
            "load_weights": lambda: other.load_weights(path / "model.weights.h5"),
            "load_weights of .keras": lambda: other.load_weights(path / "model.keras"),
            "keras.models.load_model": lambda: keras.models.load_model(path / "model.keras"),
            **peers.restores(model, other, path),
        }
        times: Samples = {name: [] for name in actions}
        order = random.Random(0)
        for turn in range(ROUNDS + 1):
            # Some leave memory that the next can use at once, so nobody is always the next.
            for name, run in order.sample([*actions.items()], len(actions)):
                began = now()
                run()
                if turn:
                    times[name].append(now() - began)
    return times


def bytes_written(workload: str) -> tuple[Samples, Samples]:
    """What ten saves write, each as a part of the state, and what ten kept take on disk, as a multiple of it."""
    wrote: Samples = {}
    taken: Samples = {}
    for name, saver in SAVERS.items():
        model = models.WORKLOADS[workload]()
        models.train(model, 1)
        size = sum(each.nbytes for each in models.arrays(model))
        with savers.scratch() as path:
            counted: list[float] = []
            callback = saver.make(path, 2, KEPT)
            count(callback, saver, path, counted)
            models.train(model, 2 * KEPT + 1, callback)
            # The first has nothing to share with.
            wrote[name] = [each / size for each in np.diff(counted)]
            if saver.keeps:
                taken[name] = [disk_usage(path) / size]
    return wrote, taken


def count(callback: keras.callbacks.Callback, saver: Saver, path: pathlib.Path, counted: list[float]) -> None:
    """Has a callback note the bytes that the process has written, after each save."""
    batch_end = callback.on_train_batch_end

    def measured(batch: int, logs: object = None) -> None:
        batch_end(batch, logs)
        if (batch + 1) % 2 == 0:
            saver.finish(callback)
            savers.sync(path)
            fields = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
            counted.append(float(fields["write_bytes"]))

    callback.on_train_batch_end = measured


def disk_usage(path: pathlib.Path) -> int:
    """The bytes of a directory on disk; what several names share, once."""
    found = {each.stat().st_ino: each.stat().st_blocks * 512 for each in path.rglob("*")}
    return sum(found.values())


def memory(state: str) -> Samples:
    """The most memory that a `fit` with saves takes beyond one without, as a multiple of the state.

    Each time in a process of its own, for what one has had is seldom given back.
    """
    command = [sys.executable, __file__, "--states", state, "--memory-of"]
    peaks: Samples = {name: [] for name in SAVERS}
    for _ in range(ROUNDS):
        for name, found in peaks.items():
            ended = subprocess.run([*command, name], check=True, capture_output=True, text=True)
            found.append(float(ended.stdout.split()[-1]))
    return peaks


def memory_of(state: str, name: str) -> float:
    """What a process of its own measures."""
    model = models.dense(state)
    models.train(model, 12)
    size = sum(each.nbytes for each in models.arrays(model))

    def peak(*callbacks: keras.callbacks.Callback) -> int:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # begins to look for the peak anew
        models.train(model, 12, *callbacks)
        return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

    peak()  # gives back what the first steps needed
    without = peak()
    set_position(model, None)
    with savers.scratch() as path:
        return (peak(SAVERS[name].make(path, 4, 1)) - without) / size


class Figure:
    """The samples of one figure, and how to show them.

    Args:
        title: What it is.
        unit: Of its samples.
        floor: The row to compare with, if there is one.
    """

    def __init__(self, title: str, unit: str, floor: str = "") -> None:
        self.title, self.unit, self.floor = title, unit, floor
        self.columns: dict[str, Samples] = {}

    def table(self) -> str:
        """In Markdown: medians, 95th percentiles, and ratios to the floor."""
        rows = list(dict.fromkeys(row for column in self.columns.values() for row in column))
        compared = ", x floor" if self.floor else ""
        lines = [f"| {self.unit}: median (p95){compared} | {' | '.join(self.columns)} |"]
        lines.append("|---" * (1 + len(self.columns)) + "|")
        for row in rows:
            cells = (self._cell(column, row) for column in self.columns.values())
            lines.append(f"| {row} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _cell(self, column: Samples, row: str) -> str:
        if not (values := column.get(row)):
            return ""
        median = statistics.median(values)
        late = f" ({_short(float(np.quantile(values, 0.95)))})" if len(values) > 1 else ""
        ratio = f", {_short(median / statistics.median(column[self.floor]))}x" if self.floor not in ("", row) else ""
        return f"{_short(median)}{late}{ratio}"


def _short(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


FIGURES = {
    "blocked": Figure("Training stands still for a save", "ms", MEMCPY),
    "blocked_jit": Figure("Training stands still for a save, jit_compile=True", "ms", MEMCPY),
    "lost": Figure("The batches of a fit take longer, for each save", "ms", MEMCPY),
    "lost_jit": Figure("The batches of a fit take longer, for each save, jit_compile=True", "ms", MEMCPY),
    "durable": Figure("Until a save is on disk, what others write synced too", "ms", WRITE),
    "restore": Figure("Restore, the files in memory", "ms", READ),
    "small_returned": Figure("A save of 500 KB, until the callback returns", "ms"),
    "small_durable": Figure("A save of 500 KB, until it is on disk", "ms", BARE),
    "bytes": Figure("Bytes written for a save", "states"),
    "taken": Figure("Bytes on disk of ten saves that are kept", "states"),
    "memory": Figure("Peak memory beyond a fit without saves", "states"),
}


def measure(names: list[str], states: list[str]) -> None:
    """Fills the figures."""
    for state in states:
        for jit_compile in (False, True):
            suffix = "_jit" if jit_compile else ""
            if f"fit{suffix}" in names:
                blocked, lost = in_fit(state, jit_compile)
                FIGURES[f"blocked{suffix}"].columns[state] = blocked
                if lost:
                    FIGURES[f"lost{suffix}"].columns[state] = lost
        for name, run in {"durable": durable, "restore": restored, "memory": memory}.items():
            if name in names:
                FIGURES[name].columns[state] = run(state)
        save()
    if "small" in names:
        FIGURES["small_returned"].columns[SMALL], FIGURES["small_durable"].columns[SMALL] = small()
    for workload in models.WORKLOADS if "bytes" in names else ():
        FIGURES["bytes"].columns[workload], FIGURES["taken"].columns[workload] = bytes_written(workload)
    save()


def load() -> None:
    """Takes what was measured before."""
    if RESULTS.exists():
        for name, columns in json.loads(RESULTS.read_text())["figures"].items():
            FIGURES[name].columns |= columns


def save() -> None:
    for figure in FIGURES.values():
        # In one order, whatever was measured first.
        figure.columns = {each: figure.columns[each] for each in COLUMNS if each in figure.columns}
    machine = {"processors": os.cpu_count(), "kernel": platform.release(), BACKEND: peers.VERSION}
    figures = {name: figure.columns for name, figure in FIGURES.items()}
    RESULTS.write_text(json.dumps({"date": f"{datetime.date.today()}", **machine, "figures": figures}) + "\n")


def plot() -> None:
    """All figures, as medians on a logarithmic scale."""
    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    figures = [figure for figure in FIGURES.values() if figure.columns]
    canvas, axes = plt.subplots(len(figures), figsize=(9, 4 * len(figures)), squeeze=False, layout="constrained")
    for axis, figure in zip(axes[:, 0], figures, strict=True):
        rows = dict.fromkeys(row for column in figure.columns.values() for row in column)
        for row in rows:
            medians = [
                statistics.median(column[row]) if column.get(row) else None for column in figure.columns.values()
            ]
            points = [
                (column, value) for column, value in zip(figure.columns, medians, strict=True) if value is not None
            ]
            style = {"linewidth": 2.5} if row.startswith("this") else {"linewidth": 1}
            style["linestyle"] = ":" if row.startswith(("floor", "fit")) else "-"
            axis.plot(*zip(*points, strict=True), marker="o", label=row, **style)
        axis.set_yscale("symlog" if "longer" in figure.title or "memory" in figure.title else "log")
        axis.set_title(f"{figure.title} ({figure.unit})", fontsize=10)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    canvas.savefig(RESULTS.with_suffix(".svg"))


def main() -> None:
    kinds = ["fit", "fit_jit", "durable", "restore", "memory", "small", "bytes"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figures", nargs="*", default=kinds, help=f"some of: {', '.join(kinds)}")
    parser.add_argument("--states", nargs="*", default=list(models.STATES), choices=models.STATES)
    parser.add_argument("--memory-of", choices=SAVERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_of(*arguments.states, arguments.memory_of))
        return
    # A save that is skipped while an earlier save is written would cost nothing.
    warnings.filterwarnings("error", message=".* is skipped")
    load()
    measure(arguments.figures, arguments.states)
    text = "\n\n".join(f"{each.title}\n\n{each.table()}" for each in FIGURES.values() if each.columns)
    if models.ON_TENSORFLOW:
        with savers.scratch() as path:
            text += f"\n\nTensorFlow's `enable_async` {peers.tensorflow_in_the_background(models.small(), path)}\n"
    print(text)
    RESULTS.with_suffix(".md").write_text(text)
    plot()


if __name__ == "__main__":
    main()
