"""Draws the figures of the guides that choose: history.svg, bounds.svg, runs.svg and changes.svg in docs/images."""

import itertools
import os
import pathlib
import sys
import tempfile

import keras
from matplotlib import pyplot as plt
from run import BLUE, GRAY, IMAGES, build, data, save

import keras_ckpt as kc

EPOCHS = 12


def fit(path: str, keep: kc.PreservationPolicy, epochs: int = EPOCHS, rate: float = 0.01) -> keras.Model:
    """Trains a model that saves each epoch in this thread, so that the journal has the order of the epochs."""
    keras.utils.set_random_seed(7)
    model = build()
    model.optimizer.learning_rate = rate
    proceed(model, path, keep, epochs)
    return model


def proceed(model: keras.Model, path: str, keep: kc.PreservationPolicy, epochs: int) -> None:
    checkpoint = kc.ModelCheckpoint(path, "val_loss", keep=keep, metadata={"epochs": epochs}, save_on_background=False)
    x, y = data()
    model.fit(x, y, validation_split=0.2, epochs=epochs, callbacks=[checkpoint], verbose=0)


def history(path: str, epochs: int) -> plt.Figure:
    """A run that went back to its third epoch, and took another way from there."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    keep = kc.BestN(3) | kc.LatestN(epochs - 2)
    model, run = fit(path, keep, epochs, rate=0.05), kc.CheckpointDirectory(path)
    kc.rollback(model, run, run.latest().step * 3 // epochs)
    model.optimizer.learning_rate = 0.005
    proceed(model, path, keep, epochs - 3)
    run.plot(ax=axes).set_title("")
    return figure


def bounds(path: str, epochs: int) -> plt.Figure:
    """The bytes on disk after each save, without a bound and with a bound."""
    figure, axes = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
    policies = {
        "LatestN(8)": (kc.LatestN(8), GRAY),
        "LatestN(8) & MaxBytes('50 kB')": (kc.LatestN(8) & kc.MaxBytes("50 kB"), BLUE),
    }
    for label, (keep, color) in policies.items():
        place = os.path.join(path, label)
        fit(place, keep, epochs)
        events = [event for event in kc.CheckpointDirectory(place).events() if event.kind in ("saved", "removed")]
        sizes = {event.identity: event.size for event in events if event.kind == "saved"}
        changes = [sizes[event.identity] * (1 if event.kind == "saved" else -1) for event in events]
        steps = [event.step if event.kind == "saved" else None for event in events]
        times = list(itertools.accumulate(steps, lambda last, step: last if step is None else step))
        totals = dict(zip(times, itertools.accumulate(changes), strict=True))
        axes.step(list(totals), [total / 1000 for total in totals.values()], where="post", color=color, label=label)
    axes.axhline(50, color=BLUE, linewidth=0.8, linestyle=":")
    axes.set_xlabel("step")
    axes.set_ylabel("kB on disk")
    axes.legend(frameon=False, loc="lower right")
    return figure


def runs(path: str, epochs: int) -> plt.Figure:
    """Three runs of a search, by `Runs.plot`."""
    for rate in (0.1, 0.01, 0.001):
        fit(os.path.join(path, f"rate-{rate}"), kc.BestN(2) | kc.LatestN(1), epochs, rate)
    return kc.Runs(path).plot("val_loss")[0].figure


def changes(path: str, epochs: int) -> plt.Figure:
    """The relative change of each layer from an early checkpoint to the newest."""
    fit(path, kc.LatestN(epochs), epochs)
    first, *_, last = kc.CheckpointDirectory(path)
    layers = [each for each in kc.diff(first, last).layers if each.change is not None]
    figure, axes = plt.subplots(figsize=(6.4, 1.8), layout="constrained")
    axes.barh([each.name for each in layers], [each.change for each in layers], color=BLUE, height=0.5)
    axes.invert_yaxis()
    axes.set_xlabel(f"relative change from step {first.step} to step {last.step}")
    return figure


def draw(images: pathlib.Path, epochs: int = EPOCHS) -> None:
    for each in (history, bounds, runs, changes):
        with tempfile.TemporaryDirectory() as scratch:
            save(each(os.path.join(scratch, "run"), epochs), images / f"{each.__name__}.svg")


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]) if sys.argv[1:] else IMAGES)
