"""The lines that `verbose=1` of `ModelCheckpoint` prints: for files they are Keras's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

from keras_ckpt.errors import DiskFullError
from keras_ckpt.model.position import Position
from keras_ckpt.store import tables
from keras_ckpt.store.record import Mode
from keras_ckpt.training.session import Outcome

Handler = Callable[[Outcome], None]


class Save(NamedTuple):
    """A save that is due.

    Attributes:
        epoch: The number of the epoch in this `fit`, from 1.
        position: The position in the run.
        path: The path of the checkpoint.
        value: The value of the monitored metric, `None` if it is not known.
        otherwise: The text to print if nothing is saved.
    """

    epoch: int
    position: Position
    path: str
    value: float | None
    otherwise: str


class Lines(Protocol):
    """Prints lines about saves."""

    def begin(self, monitor: str, mode: Mode | None, best: float | None) -> None:
        """Begins a `fit`.

        Args:
            monitor: The monitored metric.
            mode: Whether less or more of it is better.
            best: The best value so far, if only improvements are saved.
        """

    def save(self, save: Save) -> Handler:
        """Prints what is known now. Returns the handler of the outcome, which prints the rest."""


class Silent:
    """No lines."""

    def begin(self, monitor: str, mode: Mode | None, best: float | None) -> None:
        return

    def save(self, save: Save) -> Handler:
        return lambda outcome: None


class OfDirectory:
    """One line a save, once its outcome is known."""

    def begin(self, monitor: str, mode: Mode | None, best: float | None) -> None:
        self._monitor = monitor

    def save(self, save: Save) -> Handler:
        value = tables.metric(save.value) or "not known"
        start = f"\nStep {save.position.step}, epoch {save.position.epoch}: {self._monitor} {value},"
        return lambda outcome: print(start, _result(outcome, save.otherwise))


class OfFiles:
    """The lines of Keras's own callback: one before a save, one when the file is on disk.

    Args:
        best_only: Whether only improvements are saved.
    """

    def __init__(self, best_only: bool) -> None:
        self._best_only = best_only

    def begin(self, monitor: str, mode: Mode | None, best: float | None) -> None:
        self._monitor, self._mode, self._best = monitor, mode, best

    def save(self, save: Save) -> Handler:
        start = f"\nEpoch {save.epoch}:"
        if not self._best_only or save.value is None:
            print(start, f"saving model to {save.path}")
        elif not self._is_better(save.value):
            print(start, f"{self._monitor} did not improve from {_five_places(self._best)}")
        else:
            best = _five_places(self._best)
            print(start, f"{self._monitor} improved from {best} to {save.value:.5f}, saving model to {save.path}")
            self._best = save.value

        def tell(outcome: Outcome) -> None:
            if outcome.record is not None:
                print(start, f"finished saving model to {outcome.record.prefix}")
            elif outcome.error is not None:
                print(start, _result(outcome, save.otherwise))

        return tell

    def _is_better(self, value: float) -> bool:
        if self._best is None:
            return math.isfinite(value)
        return value < self._best if self._mode == "min" else value > self._best


def _five_places(value: float | None) -> str:
    return "None" if value is None else f"{value:.5f}"


def _result(outcome: Outcome, otherwise: str) -> str:
    if outcome.record is not None:
        return f"saved {outcome.record.prefix} ({tables.save(outcome.record)})"
    if outcome.error is None:
        return otherwise
    return "not saved, the disk is full" if isinstance(outcome.error, DiskFullError) else "the save failed"
