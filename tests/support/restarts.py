"""A training in a process of its own, which stops and resumes from its newest checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from reliability.trainer import acknowledged_by, keras_station


def prepare() -> None:
    """Loads TensorFlow, and builds nothing: a fork begins as a new process does."""
    import keras

    import keras_ckpt as kc
    from support import models

    _ = keras, kc.ModelCheckpoint, kc.restore, models


@contextlib.contextmanager
def trainer() -> Iterator[Callable[..., list[str]]]:
    """A function that trains in a new process: for at most so many batches, into a directory.

    It returns the errors that refused the training.
    """
    with keras_station(prepare) as place:
        yield lambda path, batches=1000: place.submit(acknowledged_by, _train, str(path), batches).result()


def _train(acknowledge: Callable[[str], None], path: str, batches: int) -> None:
    import keras_ckpt as kc
    from support.models import Interrupts, Reports, dense_model, fit

    values = [float("nan"), 0.5, 0.2, 0.4, 0.2, 0.3, 0.1, 0.6]
    model = dense_model()
    runs = kc.CheckpointDirectory(path)
    newest = runs.latest()
    if newest:
        kc.restore(model, runs)
    keep = kc.BestN(2) | kc.EveryNSteps(20) | kc.LatestN(2)
    checkpoint = kc.ModelCheckpoint(path, save_freq=["epoch", 4], keep=keep)
    best = kc.ModelCheckpoint(f"{path}-best", save_best_only=True)
    callbacks = [Reports(val_loss=values), checkpoint, best, Interrupts(batches, RuntimeError())]
    try:
        fit(model, *callbacks, initial_epoch=newest.epoch if newest else 0, epochs=len(values))
    except kc.DirectoryInUseError as error:
        acknowledge(str(error))
    except RuntimeError:
        pass
