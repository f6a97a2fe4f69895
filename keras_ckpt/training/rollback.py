"""The answer to a loss that is not finite: the last good checkpoint of the run is restored, and training continues."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras

from keras_ckpt.errors import CheckpointNotFoundError, DamagedCheckpointError
from keras_ckpt.model.backends import backend
from keras_ckpt.model.comparison import RestoreRequest
from keras_ckpt.model.position import Progress, keeping_position
from keras_ckpt.model.transfer import UndoAssignment, transfer
from keras_ckpt.store import tables
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.training.monitor import metrics_in
from keras_ckpt.training.session import Session


@dataclasses.dataclass(frozen=True)
class Rollback:
    """The answer of `ModelCheckpoint(on_nan=...)` to a loss that is NaN or infinite.

    Example:

    ```python
    on_nan = keras_ckpt.Rollback(learning_rate=0.5, times=3)
    checkpoint = keras_ckpt.ModelCheckpoint("runs/digits", on_nan=on_nan)
    ```

    Args:
        learning_rate: The factor by which each rollback multiplies the learning rate.
        times: The number of rollbacks in one `fit`. At the next loss that is not finite, training stops.
    """

    learning_rate: float = 1.0
    times: int = 3

    def __post_init__(self) -> None:
        rate, times = self.learning_rate, self.times
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real) or not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"Rollback expected a factor greater than 0. Received: learning_rate={rate!r}")
        if isinstance(times, bool) or not isinstance(times, numbers.Integral) or times < 1:
            raise ValueError(f"Rollback expected a whole number of at least 1. Received: times={times!r}")


def checked_on_nan(value: object) -> Rollback | None:
    """Checks the argument `on_nan` of a callback."""
    if value == "rollback":
        return Rollback()
    if value is None or isinstance(value, Rollback):
        return value
    raise ValueError(
        "on_nan expected None, 'rollback' or a value such as keras_ckpt.Rollback(learning_rate=0.5). "
        f"Received: {value!r}"
    )


def has_finite_weights(model: keras.Model) -> bool:
    """Whether no weight that is trained is NaN or infinite."""
    weights = {str(place): each for place, each in enumerate(model.trainable_variables)}
    return all(map(backend.is_finite, backend.Reader(model, weights).read().values()))


class Recovery:
    """Watches the loss of a `fit`, and answers a loss that is not finite.

    A batch with a finite loss may make the weights NaN. So the weights are looked at too, where they would be saved.

    Args:
        rollback: The answer, `None` for none.
    """

    def __init__(self, rollback: Rollback | None) -> None:
        self._rollback = rollback
        self.begin()

    def begin(self) -> None:
        """Begins a `fit`."""
        self._count = 0
        self._is_back = self._is_over = False

    def get_state(self) -> dict[str, Any]:
        """The state that a restart needs."""
        return {"count": self._count, "is_back": self._is_back}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Sets the state that `get_state` returned in another process."""
        self._count, self._is_back = state["count"], state["is_back"]

    def check(self, model: keras.Model, answers: Sequence[Rollback | None]) -> None:
        """Refuses a fit whose loss could not be answered.

        Args:
            model: The model.
            answers: The answers of all callbacks of the fit.

        Raises:
            ValueError: Several callbacks would answer, or a schedule sets the learning rate.
        """
        if self._rollback is None:
            return
        if sum(each is not None for each in answers) > 1:
            raise ValueError("Several ModelCheckpoints of this fit have on_nan. Give it to one of them.")
        if self._rollback.learning_rate != 1 and _rate(model) is None:
            raise ValueError(
                f"{self._rollback} cannot change the learning rate, because a schedule sets it. Give "
                "on_nan='rollback', or compile the model with a number as learning_rate."
            )

    def batch_begin(self, model: keras.Model) -> None:
        """Begins a batch. The metrics of the epoch begin again after a rollback, because a mean with a NaN is NaN.

        They do not begin earlier: at the end of an epoch they would be zero, which might be taken for the best loss.
        """
        if self._is_back:
            self._is_back = False
            backend.synchronize(model)
            model.reset_metrics()

    def is_sound(
        self,
        session: Session[Any],
        directory: CheckpointDirectory,
        logs: Mapping[str, Any] | None,
        due: bool,
        note: Callable[..., object],
    ) -> bool:
        """Whether the model may be saved. Answers a loss, or weights, that are not finite.

        Args:
            session: The session of the fit.
            directory: The directory of the run.
            logs: The logs of a batch's or an epoch's end.
            due: Whether a save is due.
            note: Notes an event in the journal.

        Raises:
            SaveError: An earlier save failed.
            MismatchError: The model has changed since its checkpoints were saved.
        """
        if self._rollback is None:
            return True
        if self._is_back or self._is_over:
            return False
        loss = metrics_in({"loss": (logs or {}).get("loss")}).get("loss", 0.0)
        if math.isfinite(loss) and not (due and not has_finite_weights(session.progress.model)):
            return True
        session.settle(wait=True)
        what = "the weights are not finite" if math.isfinite(loss) else f"the loss is {loss}"
        session.note("skipped", metrics=metrics_in(logs), why=what)
        self._answer(self._rollback, session.progress, directory, what, note)
        return False

    def _answer(
        self,
        rollback: Rollback,
        progress: Progress,
        directory: CheckpointDirectory,
        what: str,
        note: Callable[..., object],
    ) -> None:
        """Restores the last good checkpoint, and says so. Stops the training instead after too many rollbacks."""
        model = progress.model
        backend.synchronize(model)
        what = f"Step {progress.position.step}: {what}"
        good = _good(directory, progress.position.run_id)
        if self._count == rollback.times:
            self._stop(model, f"{what}, after {tables.counted(rollback.times, 'rollback')}.", good)
            return
        rate = _rate(model)
        record = next((each for each in good if _is_restored(model, each)), None)
        if record is None:
            where = tables.relative(directory.path)
            self._stop(model, f"{what}, and no whole checkpoint of the run in {where} has a finite loss and weights.")
            return
        self._count, self._is_back = self._count + 1, True
        if rate is not None:
            # The rate of now, not of the checkpoint: another callback or an earlier rollback may have reduced it.
            model.optimizer.learning_rate = rate * rollback.learning_rate
        note("restored", step=record.step, epoch=record.epoch, batch=record.batch, why=what)
        rates = f", with the learning rate {rate * rollback.learning_rate:.6g}" if rate is not None else ""
        warn(
            f"{what}. Restored {record.prefix}, whose loss is {tables.metric(record.metrics['loss'])}{rates}. Training "
            f"continues with the next batch. This is rollback {self._count} of {rollback.times}."
        )

    def _stop(self, model: keras.Model, why: str, good: Sequence[CheckpointRecord] = ()) -> None:
        self._is_over = True
        model.stop_training = True
        ways = [f" keras_ckpt.restore(model, {tables.relative(each.prefix)!r}) restores the last." for each in good[:1]]
        warn(f"{why} Training stops.{''.join(ways)}")


def _good(directory: CheckpointDirectory, run_id: str) -> list[CheckpointRecord]:
    """The checkpoints of a run with a finite loss, newest first."""
    records = [record for record in directory.listing().all_runs if record.run_id == run_id]
    return [record for record in reversed(records) if record.finite("loss") is not None]


def _is_restored(model: keras.Model, record: CheckpointRecord) -> bool:
    """Restores a checkpoint, and returns whether the weights are finite now.

    Training stays where it is in its epochs and in its data, so the steps count on. The metrics of the epoch stay too:
    those of another epoch would be in its logs.
    """

    def read(files: Folder, name: str, found: CheckpointRecord | None) -> object:
        return transfer(model, files, name, found, RestoreRequest(again=True))

    try:
        metrics = UndoAssignment(model, {str(place): each for place, each in enumerate(model.metrics_variables)})
        with keeping_position(model):
            read_checkpoint(record, read)
        metrics.undo()
    except (DamagedCheckpointError, CheckpointNotFoundError) as error:
        warn(f"{record.prefix} is not restored: {error}")
        return False
    return has_finite_weights(model)


def _rate(model: keras.Model) -> float | None:
    """The learning rate, `None` if a schedule or a function sets it."""
    try:
        rate = float(model.optimizer.learning_rate)
        model.optimizer.learning_rate = rate  # Keras refuses it beside a schedule, and fails beside a function
    except (TypeError, AttributeError):
        return None
    return rate
