"""The lines that `verbose=1` of `ModelCheckpoint` prints: for files they are Keras's."""

from __future__ import annotations

import collections
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

from keras_ckpt.errors import DiskFullError
from keras_ckpt.model.position import Position
from keras_ckpt.store import layout, tables
from keras_ckpt.store.directory import Change, CheckpointDirectory
from keras_ckpt.store.record import Mode
from keras_ckpt.training.improvement import improves
from keras_ckpt.training.session import Outcome

Handler = Callable[[Outcome], None]


class Save(NamedTuple):
    """A save that is due.

    Attributes:
        epoch: The number of the epoch in this `fit`, from 1.
        position: The position in the run.
        name: The name of the checkpoint, `""` for the default name of its step.
        value: The value of the monitored metric, `None` if it is not known.
        otherwise: The text to print if nothing is saved.
    """

    epoch: int
    position: Position
    name: str
    value: float | None
    otherwise: str


class Lines(Protocol):
    """Prints lines about saves."""

    def begin(self, path: str, metric: Metric) -> None:
        """Begins a `fit`.

        Args:
            path: The directory of its checkpoints.
            metric: The monitored metric.
        """

    def save(self, save: Save) -> Handler:
        """Takes a save. Returns the handler of its outcome."""

    def tell(self) -> None:
        """Prints all that is known by now.

        Call it where a save is due, and at the end: at other times a line would cut the progress bar of an epoch. A
        failed save is told at once.
        """


class Silent:
    """No lines."""

    def begin(self, path: str, metric: Metric) -> None:
        return

    def save(self, save: Save) -> Handler:
        return lambda outcome: None

    def tell(self) -> None:
        return


class OfDirectory:
    """The directory, the metric of each save when it is due, its outcome, and the checkpoints that the policy removed.

    An outcome that comes later has a line of its own.

    Args:
        directory: The directory.
    """

    def __init__(self, directory: CheckpointDirectory) -> None:
        self._facts: dict[Save, list[str]] = {}
        self._removed: collections.deque[str] = collections.deque()
        directory.subscribe(self._hear)

    def begin(self, path: str, metric: Metric) -> None:
        self._metric = metric
        _tell_place(tables.relative(path))

    def save(self, save: Save) -> Handler:
        self._facts[save] = [self._metric.judge(save.value)]

        def handler(outcome: Outcome) -> None:
            facts = self._facts.setdefault(save, [])
            facts.append(_result(outcome, save.otherwise))
            if removed := [self._removed.popleft() for _ in range(len(self._removed))]:
                facts.append(f"removed {tables.few(removed)}")
            if outcome.error is not None:
                self.tell()  # the error may end the training

        return handler

    def tell(self) -> None:
        for save, facts in self._facts.items():
            say(f"\nStep {save.position.step}, epoch {save.position.epoch}: {', '.join(facts)}")
        self._facts.clear()

    def _hear(self, change: Change) -> None:
        if change.kind == "removed":
            self._removed.append(change.record.name)


class OfFiles:
    """The lines of Keras's own callback: one before a save, one when the file is on disk.

    A fit that saves into a sub-directory begins with a line of its own. No line promises a save over a pinned file.

    Args:
        folder: The folder of the files, as the user typed it.
        path: The path of this folder.
        best_only: Whether only improvements are saved.
    """

    def __init__(self, folder: str, path: str, best_only: bool) -> None:
        self._base = folder, path
        self._folder, self._place = folder, path
        self._best_only = best_only
        self._lines: list[str] = []

    def begin(self, path: str, metric: Metric) -> None:
        self._metric = metric
        folder, base = self._base
        self._place = path
        self._folder = os.path.normpath(os.path.join(folder, os.path.relpath(path, base)))
        if path != base:
            _tell_place(self._folder)

    def save(self, save: Save) -> Handler:
        start = f"Epoch {save.epoch}:"
        saving = self._intent(save.name)
        if not self._best_only:
            self._lines.append(f"{start} {saving}")
        elif save.value is not None:  # a warning tells of a metric that is missing
            best = _five_places(self._metric.best)
            if self._metric.improves(save.value):
                change = f"improved from {best} to {save.value:.5f}, {saving}"
            else:
                change = f"did not improve from {best}"
            self._lines.append(f"{start} {self._metric.name} {change}")

        def handler(outcome: Outcome) -> None:
            if outcome.record is not None:
                self._lines.append(f"{start} finished saving model to {self._path(outcome.record.name)}")
            elif outcome.error is not None:
                self._lines.append(f"{start} {_result(outcome, save.otherwise)}")
                self.tell()  # the error may end the training

        return handler

    def tell(self) -> None:
        for line in self._lines:
            say(f"\n{line}")
        self._lines.clear()

    def _intent(self, name: str) -> str:
        """The words for a save to come. No save replaces a pinned file."""
        place = os.path.join(self._place, name)
        pinned = os.path.exists(place) and os.path.exists(layout.pin(place))
        return f"{self._path(name)} is pinned and stays" if pinned else f"saving model to {self._path(name)}"

    def _path(self, name: str) -> str:
        return os.path.normpath(os.path.join(self._folder, name))


class Metric:
    """The monitored metric, and its best value so far.

    Args:
        name: Its name.
        mode: Whether less or more of it is better.
        best: The best value so far.
        min_delta: The difference from the best value that is no improvement.
    """

    def __init__(self, name: str, mode: Mode | None, best: float | None, min_delta: float = 0.0) -> None:
        self.name, self._mode, self.best, self._min_delta = name, mode, best, min_delta

    def judge(self, value: float | None) -> str:
        """Tells whether a value is better than the best so far, and counts it."""
        if value is None:
            return f"{self.name} not known"
        best, shown = self.best, tables.metric(value)
        improves = self.improves(value)
        if best is None or self._mode is None:
            return f"{self.name} {shown}"
        if improves:
            return f"{self.name} improved from {tables.metric(best)} to {shown}"
        return f"{self.name} {shown} did not improve from {tables.metric(best)}"

    def improves(self, value: float) -> bool:
        """Whether a value is better than the best so far, and counts it."""
        better = improves(value, self.best, self._mode, self._min_delta)
        if better:
            self.best = value
        return better


def _tell_place(path: str) -> None:
    say(f"Checkpoints are saved into {path}")


def say(line: str) -> None:
    """Prints a line by one write, so that no line of another thread comes between its text and its end."""
    print(f"{line}\n", end="")


def _five_places(value: float | None) -> str:
    return "None" if value is None else f"{value:.5f}"


def _result(outcome: Outcome, otherwise: str) -> str:
    if outcome.record is not None:
        return f"saved {outcome.record.name} ({tables.save(outcome.record)})"
    if outcome.error is None:
        return otherwise
    return "not saved, the disk is full" if isinstance(outcome.error, DiskFullError) else "the save failed"
