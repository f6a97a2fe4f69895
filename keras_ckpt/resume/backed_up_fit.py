"""One `fit` that is backed up: which state of it is whole, and when the state is saved."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from keras_ckpt.model.position import Position
from keras_ckpt.model.snapshot import Snapshot
from keras_ckpt.resume.fit_state import FitState, Place
from keras_ckpt.store import background
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import INITIAL_EPOCH
from keras_ckpt.store.writer import SaveRequest
from keras_ckpt.training.bundle_form import Bundles
from keras_ckpt.training.rollback import has_finite_weights
from keras_ckpt.training.session import Outcome, Session

Logs = Mapping[str, Any] | None


class Phase(enum.Enum):
    """Which state of a fit is whole, so that a backup of it can be resumed from.

    | Phase | whole is | begins when |
    |---|---|---|
    | `CHANGING` | nothing | the fit begins; a batch begins; validation begins, and `HELD` did not come before |
    | `WHOLE` | the state in memory | a batch has ended; an epoch has ended |
    | `HELD` | the held moment, if it is not saved | `hold()` after the last batch of an epoch, or after its end |
    | `STOPPED` | the last backup | `hold()` after a callback has stopped the fit within an epoch |

    Other callbacks act between the last batch of an epoch and the first batch of the next: they validate, swap
    weights, restore the best. So the fit takes a moment before they act, and holds the moment until a batch begins.
    """

    CHANGING = enum.auto()
    WHOLE = enum.auto()
    HELD = enum.auto()
    STOPPED = enum.auto()


@dataclasses.dataclass(frozen=True)
class _Moment:
    """The state of a fit at a place, and at a position in its run."""

    place: Place
    position: Position
    snapshot: Snapshot


class BackedUpFit:
    """One `fit` that is backed up. `begin` comes first, `close` last.

    Args:
        model: The model.
        session: The open session that saves.
        bundles: Takes the snapshots that the session saves.
        state: The state of the fit beside its model.
        noted: The metadata of each backup, which a restart compares.
        epoch: The index of the epoch that the fit begins with.
    """

    def __init__(
        self,
        model: keras.Model,
        session: Session[Snapshot],
        bundles: Bundles,
        state: FitState,
        noted: Mapping[str, Any],
        epoch: int,
    ) -> None:
        self._model = model
        self._session = session
        self._bundles = bundles
        self._state = state
        self._noted = noted
        self._phase = Phase.CHANGING
        self._place = Place(epoch)
        self._logs: dict[str, Any] = {}
        self._unsaved = False  # whether the fit has made progress since the last save
        self._held: _Moment | None = None
        self._beginning: _Moment | None = None
        self._due: str | None = None  # the reason of a save that waits for the end of the epoch
        self._repeat: str | None = None  # the reason of a save that found a wrong assumption
        self._answers_nan = any(map(_answers_nan, state.others))

    @property
    def is_safe(self) -> bool:
        """Whether the process may end after `save_last`, and lose no more than the batch in progress."""
        return self._can_save or not self._unsaved

    @property
    def is_cut_short(self) -> bool:
        """Whether a callback other than `EarlyStopping` has stopped the fit before its last epoch was done."""
        epochs_left = self._state.epochs is not None and self._place.epoch < self._state.epochs
        stopped = bool(self._model.stop_training) and not self._state.is_stopped_early(self._place)
        return stopped and (self._phase is Phase.STOPPED or epochs_left)

    @property
    def is_whole_run(self) -> bool:
        """Whether the epochs of the fit are those of its run: no other fit has trained the model before."""
        return self._state.epochs is not None and self._session.progress.position.epoch == self._place.epoch

    @property
    def is_saved(self) -> bool:
        """Whether the newest backup has all that the fit has trained."""
        return not self._unsaved

    @property
    def is_broken(self) -> bool:
        """Whether a callback has stopped the fit because of a loss that is not finite."""
        loss = self._logs.get("loss", 0.0)
        return bool(self._model.stop_training) and isinstance(loss, float) and not math.isfinite(loss)

    def begin(self) -> None:
        """Takes the state before the first batch of a new run, and saves it with the first batch or an earlier save.

        A crash must not leave the checkpoints of another callback without their run. A fit whose first batch fails
        leaves nothing.
        """
        self._beginning = self._now(assumes=False)  # the run begins with the arrays of this process
        if self._session.copy(self._beginning.snapshot):
            self._beginning = None
        self._session.hold_first(self, BackedUpFit._save_the_beginning)

    def resume(self, batch: int, document: Mapping[str, Any]) -> None:
        """Resumes within the epoch that has begun.

        Args:
            batch: The number of batches of the epoch that are done.
            document: The content of the backup beside the model.
        """
        self._session.progress.resume(batch)
        self._place = Place(self._place.epoch, batch)
        self._logs = document["logs"]
        self._due = document["due"]
        self._model.stop_training = document["stopped"]

    def epoch_begin(self, epoch: int) -> None:
        """The other callbacks have begun an epoch."""
        self._state.states.look()
        self._place = Place(epoch)
        if self._state.data is not None:
            self._state.data.epoch_begin()

    def batch_begin(self) -> None:
        """A batch begins."""
        self._phase = Phase.CHANGING
        self._held = None  # a held moment takes the memory of what the batch changes

    def validation_begin(self) -> None:
        """Other callbacks may have changed the model for a validation."""
        if self._phase is Phase.WHOLE:
            self._phase = Phase.CHANGING

    def batch_end(self, batch: int, logs: Logs) -> None:
        """The other callbacks have ended a batch, or the last batch of an execution of several."""
        began = time.perf_counter()
        self._logs = dict(logs or {})
        before = self._session.progress.position.step
        reason = self._session.batch_end(batch)
        position = self._session.progress.position
        self._place = Place(self._place.epoch, position.batch)
        self._phase, self._unsaved = Phase.WHOLE, True
        self._session.settle()
        if self._state.data is not None:
            self._state.data.batch_end(position.step - before)
        if self._is_stopped_within:
            self._save_instead_of_the_beginning("stop", began)
        elif self._is_trained:
            self._due = reason
        elif (reason := reason or self._repeat_within) and not self._session.skips():
            self._save_instead_of_the_beginning(reason, began)
        self._session.save_first()

    def epoch_end(self, epoch: int, logs: Logs, keep: bool) -> None:
        """The other callbacks have ended an epoch.

        Args:
            epoch: The index of the epoch.
            logs: The logs of the epoch.
            keep: Whether the last state of the fit is saved in any case.
        """
        began = time.perf_counter()
        self._logs = dict(logs or {})
        reasons = [reason for reason in (self._due, self._session.epoch_end()) if reason]
        if self._repeat and not reasons:
            reasons = [self._repeat]
        self._held = self._due = None
        nothing_ran = self._beginning is not None and not reasons
        if nothing_ran or self._phase is Phase.STOPPED:
            return
        self._place = Place(epoch + 1)
        self._phase, self._unsaved = Phase.WHOLE, True
        is_last = self._model.stop_training or epoch + 1 == self._state.epochs
        if is_last and (keep or self.is_cut_short):
            self._save_and_wait(", ".join(reasons or ["end"]), began)
        elif reasons:
            self._save(", ".join(reasons), began, self._now())

    def hold(self) -> None:
        """Holds the state if other callbacks may change it before a batch begins."""
        if self._phase is not Phase.WHOLE:
            return
        if self._is_stopped_within:
            self._phase = Phase.STOPPED
        elif self._is_trained or not self._place.batch:
            self._hold_now()

    def hold_before_averages(self) -> None:
        """Holds the state before `fit` replaces the weights by their averages, which it does after an error too."""
        if self._phase is Phase.WHOLE:
            self._hold_now()

    def save_last(self, reason: str) -> None:
        """Saves the last state that is whole, if it is not saved, and waits until it is on disk."""
        began = time.perf_counter()
        while self._session.is_saving:
            with errors_as_warnings():
                self._session.settle(wait=True)
        if self._unsaved and self._can_save:
            self._save_and_wait(reason, began)
        background.report()  # the process may end before other callbacks tell of their saves

    def close(self) -> None:
        """Waits for the saves, and lets another session save into the directory."""
        self._session.close()

    @contextlib.contextmanager
    def unlocking(self) -> Iterator[None]:
        """Lets another process write after an error, because a notebook keeps the error and all that it holds."""
        try:
            yield
        except Exception:
            self._session.unlock()
            raise

    @property
    def _can_save(self) -> bool:
        return self._phase is Phase.WHOLE or self._held is not None

    @property
    def _is_trained(self) -> bool:
        """Whether the last batch of the epoch has ended."""
        return self._place.batch > 0 and self._place.batch == self._state.steps

    @property
    def _is_stopped_within(self) -> bool:
        """Whether a callback has stopped the fit after a batch that is not the last of its epoch."""
        return bool(self._model.stop_training) and self._place.batch > 0 and not self._is_trained

    @property
    def _repeat_within(self) -> str | None:
        """The reason of a save to repeat within an epoch."""
        return self._repeat if self._state.data is not None else None

    def _hold_now(self) -> None:
        self._phase, self._held = Phase.HELD, None
        if self._unsaved:
            with errors_as_warnings():  # such as no memory for a copy
                moment = self._now()
                self._bundles.hold(moment.snapshot)
                self._held = moment

    def _now(self, assumes: bool = True) -> _Moment:
        document, later = self._state.take(self._place, self._logs, self._due, assumes)
        return _Moment(
            self._place,
            self._session.progress.position,
            self._bundles.snapshot(self._session.progress.position.step, document, later),
        )

    def _save_the_beginning(self) -> None:
        beginning, self._beginning = self._beginning, None
        if beginning is not None:
            unsaved = self._unsaved
            self._save("begin", time.perf_counter(), beginning)
            self._unsaved = unsaved

    def _save_instead_of_the_beginning(self, reason: str, began: float) -> None:
        self._beginning = None
        self._save(reason, began, self._now())

    def _save(self, reason: str, began: float, moment: _Moment) -> None:
        """Saves a moment, unless its values are not finite: the backup before is worth more."""
        if self.is_broken or (self._answers_nan and not has_finite_weights(self._model)):
            return
        position = moment.position
        request = SaveRequest(
            step=position.step,
            run_id=position.run_id,
            epoch=position.epoch,
            batch=position.batch,
            reason=reason,
            metadata={INITIAL_EPOCH: moment.place.epoch, **self._noted},
            began=began,
        )
        self._unsaved, self._repeat = False, None
        try:
            self._session.save(request, moment.snapshot, functools.partial(self._note_outcome, reason))
        except BaseException:
            self._unsaved = True
            raise

    def _note_outcome(self, reason: str, outcome: Outcome) -> None:
        self._unsaved = self._unsaved or (outcome.record is None and not outcome.replaced)
        if outcome.changed:
            self._repeat = reason

    def _save_and_wait(self, reason: str, began: float) -> None:
        """Saves and waits, and repeats the save if an array was wrongly assumed to be unchanged."""
        moment, self._held = self._held or self._now(), None  # a save uses up the snapshot
        self._save(reason, began, moment)
        self._session.settle(wait=True)
        while self._repeat and self._phase is Phase.WHOLE:
            self._save(reason, began, self._now())
            self._session.settle(wait=True)


def _answers_nan(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback answers a loss that is NaN, so that weights with NaN are not worth a backup."""
    return isinstance(callback, keras.callbacks.TerminateOnNaN) or bool(getattr(callback, "on_nan", None))


@contextlib.contextmanager
def errors_as_warnings() -> Iterator[None]:
    """Warns of a save that failed, because something else ends the training."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - such as no memory for the save
        warn(str(error) or repr(error))
