"""The position of a model in its run: kept with the model, and counted by `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import uuid
from collections.abc import Iterator
from typing import Any

import keras

from keras_ckpt.model.backends import backend
from keras_ckpt.model.companions import companion
from keras_ckpt.model.keras_internals import FitInProgress
from keras_ckpt.store.notices import warn


@dataclasses.dataclass(frozen=True)
class Position:
    """A place in a run.

    Attributes:
        run_id: The run.
        step: Training batches completed since the run began.
        epoch: Epochs completed since the run began.
        batch: Batches completed in the epoch in progress, 0 at an epoch's end.
    """

    run_id: str
    step: int = 0
    epoch: int = 0
    batch: int = 0


@dataclasses.dataclass(frozen=True)
class RolledBack:
    """A rollback that the user asked for.

    Attributes:
        position: The position of the checkpoint.
        number: The number of rollbacks in this process. The same script, run again, has the same number here.
    """

    position: Position
    number: int


_numbers = itertools.count(1)


@dataclasses.dataclass
class _Current:
    """The position of a model in its run.

    Attributes:
        position: The position, `None` without a run.
        optimizer: The optimizer with the state of the position, `None` if any optimizer fits.
        restored: The position that the user last restored, until a hint has named its epochs.
        rollback: The rollback that the user last asked for.
    """

    position: Position | None = None
    optimizer: Any = None
    restored: Position | None = None
    rollback: RolledBack | None = None


def position_of(model: keras.Model) -> Position | None:
    """The position of a model in its run, `None` if the model belongs to no run."""
    return companion(model, _Current).position


def set_position(model: keras.Model, position: Position | None, with_optimizer: bool = True) -> None:
    """Sets the position of a model in its run.

    Args:
        model: The model.
        position: The position. `None` takes the model out of its run.
        with_optimizer: Whether the optimizer of the model has the state of the position.
    """
    current = companion(model, _Current)
    current.position = position
    current.optimizer = _optimizer(model) if position and with_optimizer else None


@contextlib.contextmanager
def keeping_position(model: keras.Model) -> Iterator[None]:
    """Gives a model its position back at the end of the block."""
    current = companion(model, _Current)
    before = dataclasses.replace(current)
    try:
        yield
    finally:
        vars(current).update(vars(before))


def initial_epoch(model: keras.Model) -> int:
    """The number of epochs that the run of a model has completed, for `fit(initial_epoch=...)`; 0 without a run.

    `restore` and `load_model` of this package set the run. A `fit` with a callback of this package counts its epochs.
    `keras.models.load_model` sets no run, so the number is 0 until a `ModelCheckpoint` of the file begins a `fit`.

    Example:

    ```python
    keras_ckpt.restore(model, "runs/digits")
    model.fit(x, y, initial_epoch=keras_ckpt.initial_epoch(model), epochs=10)
    ```

    Args:
        model: A model, restored, loaded or new.
    """
    position = position_of(model)
    return position.epoch if position else 0


def note_restored(model: keras.Model) -> None:
    """Notes that the user has restored or loaded the position of a model."""
    current = companion(model, _Current)
    current.restored = current.position


def note_rollback(model: keras.Model) -> None:
    """Notes that the user has rolled a model back to its position."""
    current = companion(model, _Current)
    if current.position is not None:  # a checkpoint without a run
        current.rollback = RolledBack(current.position, next(_numbers))


def rollback_of(model: keras.Model) -> RolledBack | None:
    """The rollback of a model that has not been trained or restored since, else `None`."""
    current = companion(model, _Current)
    return current.rollback if current.rollback and current.rollback.position == current.position else None


def take_restored_epochs(model: keras.Model) -> int:
    """The completed epochs of a model that the user has restored and not trained since, else 0; 0 at the next call."""
    current = companion(model, _Current)
    now, restored = current.position, current.restored
    current.restored = None
    return now.epoch if now and restored and (now.run_id, now.step) == (restored.run_id, restored.step) else 0


class Progress:
    """Counts the steps and epochs of one `fit`. A model without a run begins a run.

    Each callback of a fit counts separately, and all reach the same numbers.

    Args:
        model: The model that is trained.
        steps: The number of batches of an epoch, `None` if it is not known.
        fit: The `fit` in progress.
    """

    def __init__(self, model: keras.Model, steps: int | None, fit: FitInProgress) -> None:
        self.model = model
        self.steps = steps
        self._least = 0 if fit.is_known else 1
        self._data_end = steps if fit.steps_per_epoch is None else None
        self.position = position_of(model) or Position(uuid.uuid4().hex)
        if companion(model, _Current).optimizer not in (None, _optimizer(model)):
            warn(
                f"The model was compiled again since step {self.position.step} of its run, so its optimizer has no "
                "state. To resume exactly, compile the model first, then restore it. To begin a phase with a new "
                "optimizer, restore it with weights_only=True."
            )
        if self.position.batch:
            # fit begins the epoch again, so its earlier batches do not count.
            self.position = dataclasses.replace(self.position, batch=0)
        self._last_batch = -1
        self._iterations = _iterations(model)
        set_position(model, self.position)

    def resume(self, batch: int) -> None:
        """Resumes within an epoch.

        Args:
            batch: The number of batches of the epoch that are done.
        """
        self._last_batch = batch - 1
        self._move(batch=batch)

    def batch_end(self, batch: int) -> Position:
        """Counts the batches since the last call.

        Args:
            batch: The index that `on_train_batch_end` was given.
        """
        ran = self._ran(batch)
        self._last_batch = batch
        position = self.position
        return self._move(step=position.step + ran, batch=position.batch + ran)

    def epoch_end(self) -> Position:
        """Counts an epoch, unless training was stopped in its middle."""
        if self._last_batch < 0:
            # The user's own loop reports no batches; the optimizer has counted them.
            self._move(step=self.position.step + max(self._least, _iterations(self.model) - self._iterations))
        done, self._last_batch = self._last_batch + 1, -1
        self._iterations = _iterations(self.model)
        if getattr(self.model, "stop_training", False) and self.steps is not None and done < self.steps:
            return self.position
        return self._move(epoch=self.position.epoch + 1, batch=0)

    def _move(self, **changes: Any) -> Position:
        self.position = dataclasses.replace(self.position, **changes)
        set_position(self.model, self.position)
        return self.position

    def _ran(self, batch: int) -> int:
        """The number of batches of the execution that ended with this index.

        Keras reports the index at which a whole execution of `steps_per_execution` batches would have ended. If the
        data ends earlier, at an unknown place, the count of the compiled optimizer is the best estimate.
        """
        whole = batch - self._last_batch
        if self.model.steps_per_execution == 1:
            return whole
        if self._data_end is not None:
            return min(batch + 1, self._data_end) - (self._last_batch + 1)
        before, self._iterations = self._iterations, _iterations(self.model)
        skips = isinstance(_optimizer(self.model), keras.optimizers.LossScaleOptimizer)
        if skips and self.steps is not None and batch + 1 < self.steps:
            return whole
        counted = self._iterations - before
        return counted if 1 <= counted <= whole else whole


def _iterations(model: keras.Model) -> int:
    """The number of updates of the optimizer, from its variable: gradient accumulation divides `iterations`."""
    optimizer = _optimizer(model)
    variables: list[Any] = optimizer.variables if optimizer is not None else []
    counters = {str(place): each for place, each in enumerate(variables) if each.name == "iteration"}
    return max((int(backend.array_of(each)) for each in backend.Reader(model, counters).read().values()), default=0)


def _optimizer(model: keras.Model) -> Any:
    return getattr(model, "optimizer", None)
