"""Draws docs/images/look.svg: the plot of a run, by `CheckpointDirectory.plot`."""

import os
import pathlib
import sys
import tempfile

from matplotlib import pyplot as plt
from run import EPOCHS, IMAGES, save, train

import keras_ckpt as kc


def draw(images: pathlib.Path, epochs: int = EPOCHS) -> None:
    """Trains, and plots the run."""
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, "run")
        train(path, epochs)
        kc.CheckpointDirectory(path).plot(ax=axes).set_title("")
    save(figure, images / "look.svg")


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]) if sys.argv[1:] else IMAGES)
