"""Draws docs/images/run.svg: a run that a policy thins while it trains."""

import os
import pathlib
import sys
import tempfile

import keras
import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

import keras_ckpt as kc

IMAGES = pathlib.Path(__file__).parents[1] / "images"
GRAY, BLUE, GOLD, VIOLET = "#767b83", "#2f7de1", "#c27c0e", "#9a5fe0"
"""Colors that can be read on a white page and on a dark page."""
EPOCHS, PINNED = 30, 4

mpl.use("svg")
mpl.rcParams |= {
    "svg.fonttype": "none",  # text stays text, in a font of the reader
    "svg.hashsalt": "keras_ckpt",
    "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans", "sans-serif"],
    "font.size": 12,
    "axes.edgecolor": GRAY,
    "axes.labelcolor": GRAY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": GRAY,
    "xtick.color": GRAY,
    "ytick.color": GRAY,
}


def data() -> tuple[np.ndarray, np.ndarray]:
    """Samples of two classes, a tenth of them in the wrong class: a model that trains for long learns these too."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1000, 8)).astype("float32")
    return x, ((x[:, 0] * x[:, 1] > 0) ^ (generator.random(1000) < 0.1)).astype("int32")


def build() -> keras.Model:
    """A model of a few hundred weights."""
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(path: str, epochs: int) -> tuple[dict[int, float], dict[int, int]]:
    """Trains a run that keeps the best three and the newest two, and pins the checkpoint of an early epoch.

    Returns:
        The accuracy of each epoch, and for each removed checkpoint the epoch at whose end it was removed.
    """
    accuracies: dict[int, float] = {}
    removed: dict[int, int] = {}

    def saved(record: kc.CheckpointRecord) -> None:
        accuracies[record.epoch] = record.metrics["val_accuracy"]
        if record.epoch == min(PINNED, epochs):
            checkpoint.directory.pin(record, "in production")

    def gone(record: kc.CheckpointRecord) -> None:
        removed[record.epoch] = max(accuracies)

    checkpoint = kc.ModelCheckpoint(
        path,
        monitor="val_accuracy",
        keep=kc.BestN(3) | kc.LatestN(2),
        save_on_background=False,  # so that each removal is told in its epoch
        on_saved=saved,
        on_removed=gone,
    )
    x, y = data()
    keras.utils.set_random_seed(7)
    build().fit(x, y, validation_split=0.2, epochs=epochs, callbacks=[checkpoint], verbose=0)
    return accuracies, removed


def save(figure: plt.Figure, path: pathlib.Path) -> None:
    """Writes a figure without a background and without a date."""
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def draw(images: pathlib.Path, epochs: int = EPOCHS) -> None:
    """Trains, and draws the accuracy of each checkpoint above the time for which it was on disk."""
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "run")
        accuracies, removed = train(path, epochs)
        runs = kc.CheckpointDirectory(path)
        kept = {record.epoch for record in runs}
        best, newest = runs.best("val_accuracy", mode="max").epoch, runs.latest().epoch
    pinned = min(PINNED, epochs)
    assert kept | set(removed) == set(accuracies)

    figure, (curve, disk) = plt.subplots(2, sharex=True, figsize=(6.4, 4.8), height_ratios=(3, 2), layout="constrained")
    curve.plot(list(accuracies), list(accuracies.values()), color=GRAY, linewidth=1, alpha=0.6, zorder=1)
    marks = [
        ("removed", set(removed), {"facecolors": "none", "edgecolors": GRAY, "s": 34}),
        ("kept", kept - {best, pinned}, {"color": BLUE, "s": 44}),
        ("pinned", {pinned} - {best}, {"color": VIOLET, "s": 60, "marker": "D"}),
        ("best", {best}, {"color": GOLD, "s": 190, "marker": "*"}),
    ]
    for label, chosen, style in marks:
        curve.scatter(sorted(chosen), [accuracies[each] for each in sorted(chosen)], label=label, zorder=2, **style)
    curve.set_ylabel("val_accuracy")
    curve.legend(frameon=False, ncols=4, loc="upper left", handletextpad=0.2, columnspacing=1.4)
    low, high = min(accuracies.values()), max(accuracies.values())
    curve.set_ylim(low - 0.02, high + 0.3 * (high - low))

    colors = {best: GOLD, pinned: VIOLET}
    for epoch in accuracies:
        end, color = (removed[epoch], GRAY) if epoch in removed else (newest + 0.7, colors.get(epoch, BLUE))
        disk.plot([epoch, end], [epoch, epoch], color=color, linewidth=2.2, solid_capstyle="round")
    disk.set_ylabel("saved in epoch")
    disk.set_xlabel("epoch (each line: a checkpoint, while it is on disk)")
    disk.invert_yaxis()
    save(figure, images / "run.svg")


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]) if sys.argv[1:] else IMAGES)
