"""Draws docs/images/resume.svg: a training that crashes and resumes, beside a training that does not."""

import contextlib
import os
import pathlib
import sys
import tempfile

import keras
from matplotlib import pyplot as plt
from run import BLUE, GOLD, GRAY, IMAGES, build, data, save

import keras_ckpt as kc

EPOCHS, CRASH = 4, 45


class Losses(keras.callbacks.Callback):
    """The loss of each batch. It may raise an error at the end of a batch."""

    def __init__(self, crash: int | None = None) -> None:
        super().__init__()
        self.crash = crash
        self.batches: dict[int, float] = {}

    def on_train_batch_end(self, batch, logs=None) -> None:
        step = int(self.model.optimizer.iterations)
        self.batches[step] = logs["loss"]
        if step == self.crash:
            raise RuntimeError("a crash")

    def get_state(self) -> dict:
        """Nothing: a restart begins with no batches."""
        return {}

    def set_state(self, state: dict) -> None:
        """Nothing is restored."""


def train(path: str, epochs: int, crash: int | None = None) -> dict[int, float]:
    """The loss of each batch that this start of the training ran."""
    x, y = data()
    keras.utils.set_random_seed(7)
    losses = Losses(crash)
    batches = kc.ResumableDataset(x, y, batch_size=32, shuffle=True, seed=1)
    with contextlib.suppress(RuntimeError), kc.BackupAndRestore(path, save_freq=10, data=batches) as backup:
        build().fit(batches, epochs=epochs, callbacks=[losses, backup], verbose=0)
    return losses.batches


def draw(images: pathlib.Path, epochs: int = EPOCHS) -> None:
    """Trains without a crash, then with a crash and to the end, and draws the losses over each other."""
    with tempfile.TemporaryDirectory() as scratch:
        whole = train(os.path.join(scratch, "whole"), epochs)
        crashed = train(os.path.join(scratch, "crashed"), epochs, CRASH)
        resumed = train(os.path.join(scratch, "crashed"), epochs)
    if whole != crashed | resumed:
        raise AssertionError("The resumed training is another one.")

    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    axes.plot(list(whole), list(whole.values()), color=GRAY, linewidth=1.2, label="never crashed", zorder=1)
    for losses, label, color, size in ((crashed, "crashed at batch 45", BLUE, 26), (resumed, "resumed", GOLD, 9)):
        axes.scatter(list(losses), list(losses.values()), color=color, s=size, label=label, zorder=2)
    axes.axvline(CRASH + 0.5, color=GRAY, linewidth=1, linestyle=":")
    axes.set_xlabel("batch")
    axes.set_ylabel("loss of the epoch so far")
    axes.legend(frameon=False)
    save(figure, images / "resume.svg")


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]) if sys.argv[1:] else IMAGES)
