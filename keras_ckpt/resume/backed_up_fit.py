"""One `fit` that is backed up: what decides the rest of it, taken at a moment and put back in another process."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import keras
import msgspec
import tensorflow as tf

# Whether operations are deterministic can be set by a public function, but not be asked for.
from tensorflow.python.framework.config import is_op_determinism_enabled

from keras_ckpt.errors import FormatVersionError, MismatchError
from keras_ckpt.model.keras_internals import begin_with_epoch, data_of_fit
from keras_ckpt.model.model_state import TRAINING_KEY
from keras_ckpt.model.position import Position
from keras_ckpt.model.snapshot import Snapshot
from keras_ckpt.model.tensorflow import is_finite
from keras_ckpt.resume import random_state
from keras_ckpt.resume.callback_states import CallbackStates
from keras_ckpt.resume.capture import Later, copied
from keras_ckpt.resume.data_place import DataPlace
from keras_ckpt.resume.epoch_rest import EpochRest
from keras_ckpt.resume.plain_values import UnplainError, dict_of, dumped
from keras_ckpt.resume.restart import restore_backup
from keras_ckpt.resume.resumable_dataset import ResumableDataset
from keras_ckpt.resume.signals import SignalWatch
from keras_ckpt.store import background
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.writer import SaveRequest, Writer
from keras_ckpt.training.model_checkpoint import ModelCheckpoint
from keras_ckpt.training.session import Outcome, Session

Logs = Mapping[str, Any] | None

_VERSION = 2
"""Of what a backup holds beside the model."""
ENDED = "ended"
"""In the metadata of a backup: how many fits with a backup in this directory had ended in its process."""
_ended: collections.Counter[str] = collections.Counter()
INITIAL_EPOCH = "initial_epoch"
"""In the metadata of a backup: the epoch of `fit` to begin with."""
STOPPED = "stopped"
"""In the metadata of a backup: that a callback stopped its training, and the fit came to its end."""
_WRAP = (
    "To resume exactly, wrap the data, data = keras_ckpt.ResumableDataset(x, y, ...), and give it to fit(data) and to "
    "BackupAndRestore(..., data=data)."
)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in `fit` a training is.

    Attributes:
        epoch: The epoch that is under way, or that comes next.
        batch: How many of its batches are done.
    """

    epoch: int
    batch: int = 0


@dataclasses.dataclass(frozen=True)
class _Moment:
    """A training as it was at a place, and at a position in its run."""

    place: _Place
    position: Position
    snapshot: Snapshot


class Training:
    """One `fit` that is backed up. To be made when the other callbacks have begun the training.

    Args:
        callback: The callback that backs it up, the last of the list.
        callbacks: The list that `fit` calls, `None` if a loop of somebody's own calls the callback.
        states: Those of the other callbacks.
        directory: Where the backup is.
        data: What `fit` trains on, if it is to be gone on with within an epoch.
        open_session: Makes the session that saves.
        exit_code: With what the process ends after a signal; `None` leaves it as usual.
    """

    def __init__(
        self,
        callback: keras.callbacks.Callback,
        callbacks: keras.callbacks.CallbackList | None,
        states: CallbackStates,
        directory: CheckpointDirectory,
        data: ResumableDataset | None,
        open_session: Callable[[], Session],
        exit_code: int | None,
    ) -> None:
        params = callback.params or {}
        self._model = callback.model
        self._callbacks = callbacks
        self._directory = directory
        self._exit_code = exit_code
        self._steps: int | None = params.get("steps")
        self._epochs: int | None = params.get("epochs")
        self._states = states
        self._watch = SignalWatch(self._under_way)
        self._place = _Place(0)
        self._fit = data_of_fit()
        self._data = None if data is None else DataPlace(data, params.get("steps"), self._fit)
        self._spec = None if data is None else data.element_spec
        self._logs: dict[str, Any] = {}
        self._due: str | None = None
        self._again: str | None = None  # the reason of a save that is to be repeated
        self._held: _Moment | None = None
        self._go_on: Callable[[], None] | None = None
        self._first: _Moment | None = None
        # Whether nobody is in the middle of changing the state, and whether it changed since it was saved.
        self._whole = self._changed = False
        # Whether a callback stopped the training in the middle of an epoch, and whether it was EarlyStopping.
        self._stopped_within = self._ended_early = False
        self._told: set[str] = set()
        self._others = callbacks.callbacks if callbacks is not None else []
        self._ends_with_nan = any(isinstance(each, keras.callbacks.TerminateOnNaN) for each in self._others)
        resumes = bool(directory.listing())
        with contextlib.ExitStack() as undo:
            undo.callback(self._forget_the_beginning)
            if resumes:
                self._resume()
            if resumes and self._go_on is None:
                self._save_owed()
            self._session = open_session()
            undo.callback(self._session.close)  # a notebook keeps an error, and with it whatever has a reference here
            if not resumes:
                self._hold_the_beginning()
            self._watch.start()
            undo.pop_all()

    def epoch_begin(self, epoch: int) -> None:
        """The other callbacks have begun an epoch."""
        self._forget_the_beginning()
        self._states.look()
        self._place = _Place(epoch)
        if self._data is not None:
            self._data.epoch_begin()
        if self._go_on is not None:
            self._go_on()
            self._go_on = None

    def batch_begin(self) -> None:
        self._whole = False
        self._held = None  # it would cost the memory of what the batch changes

    def validation_begin(self) -> None:
        """Other callbacks may have changed the model for it; what is held is from before."""
        self._whole = False

    @contextlib.contextmanager
    def unlocking(self) -> Iterator[None]:
        """Lets another process write where an error ends the training; a notebook keeps the error and all it holds."""
        try:
            yield
        except Exception:
            self._session.unlock()
            raise

    def batch_end(self, batch: int, logs: Logs) -> None:
        """The other callbacks have ended a batch, or the last of an execution of several."""
        began = time.perf_counter()
        self._logs = dict(logs or {})
        before = self._session.progress.position.step
        reason = self._session.batch_end(batch)
        position = self._session.progress.position
        self._place = _Place(self._place.epoch, position.batch)
        self._whole = self._changed = True
        self._session.settle()
        if self._data is not None:
            self._data.batch_end(position.step - before)
        self._stopped_within = bool(self._model.stop_training) and position.batch != self._steps
        if self._stopped_within:
            self._forget_the_first()
            self._save("stop", began, self._now())
        elif self._place.batch == self._steps:
            # The epoch's end saves what is due. Until then this is the last state that is whole.
            self._due = reason
            self._held = self._now()
        elif (reason := reason or self._repeats()) and not self._session.skips():
            self._forget_the_first()
            self._save(reason, began, self._now())
        self._session.save_first()
        self.answer()

    def epoch_end(self, epoch: int, logs: Logs, keep: bool) -> None:
        """The other callbacks have ended an epoch.

        Args:
            epoch: Its index.
            logs: Its logs.
            keep: Whether the last state of the training is to be saved in any case.
        """
        began = time.perf_counter()
        self._logs = dict(logs or {})
        reasons = [reason for reason in (self._due, self._session.epoch_end()) if reason]
        if self._again and not reasons:
            reasons = [self._again]
        self._held = self._due = None
        self._ended_early = self._is_stopped_early(epoch)
        if self._first is not None and not reasons:
            return  # no batch of the fit has ended
        if self._stopped_within:
            self._whole = False  # the state in the middle of the epoch is the one to continue from
            return
        self._place = _Place(epoch + 1)
        last = self._model.stop_training or epoch + 1 == self._epochs
        self._whole = self._changed = True
        if last and (keep or self.is_cut_short):
            self._save_at_once(", ".join(reasons or ["end"]), began)
        elif reasons:
            self._save(", ".join(reasons), began, self._now())
        self.answer()
        # Other callbacks begin the next epoch, or end the training, before this one hears of it.
        self._whole = False
        self._held = self._now() if self._changed else None

    def answer(self) -> None:
        """Answers a signal that came, if one did, and saves the training before.

        Where no state is whole, as in the validation after an epoch whose last batch was not known, its end answers.
        """
        if self._watch.caught is not None and (self._whole or self._held or not self._changed):
            self._save_last(self._watch.caught.name)
            if newest := self._directory.latest():
                with contextlib.suppress(Exception):  # who reads it may have got the same signal
                    print(f"\n{self._watch.caught.name}: backed up at step {newest.step} in {self._directory.path}")
            self._watch.answer(self._exit_code)

    @contextlib.contextmanager
    def ending(self) -> Iterator[bool]:
        """The training has ended; says whether it ended well. Afterwards a signal of the last moment has its effect."""
        self._forget_the_beginning()
        try:
            self._session.close()
            yield not self._is_broken()
        except BaseException:
            self._watch.stop()  # it has its own effect, which a signal might hide
            raise
        self.leave()

    def forget(self) -> None:
        """The backup is to be removed, and a later one in its place is of another training."""
        _ended[self._directory.path] += 1

    def leave(self) -> None:
        """Ends the watch, and lets a signal that came at the last moment have its effect."""
        self._watch.answer(self._exit_code)
        self._watch.stop()

    def end_by_error(self) -> None:
        """An error has ended the training: saves what is whole of it."""
        self._forget_the_beginning()
        with contextlib.ExitStack() as last:
            last.callback(self.leave)
            last.callback(self._session.close)
            with _errors_as_warnings():
                self._save_last("error")

    @property
    def is_cut_short(self) -> bool:
        """Whether a callback has stopped the training before its last epoch was done, and not because it was done."""
        epochs_left = self._epochs is not None and self._place.epoch < self._epochs
        return bool(self._model.stop_training) and not self._ended_early and (self._stopped_within or epochs_left)

    def note_the_end(self) -> None:
        """Notes in the backup that its training came to its end: nobody killed it after a callback stopped it."""
        newest = self._directory.latest()
        if newest is not None and self._model.stop_training:
            Writer(self._directory).amend(newest, _stopped)

    def _is_stopped_early(self, epoch: int) -> bool:
        """Whether an `EarlyStopping` stopped the training in this epoch."""
        stops = [each for each in self._others if isinstance(each, keras.callbacks.EarlyStopping)]
        return bool(self._model.stop_training) and any(each.stopped_epoch == epoch > 0 for each in stops)

    def _hold_the_beginning(self) -> None:
        """Takes the state before the first batch, and saves it when that has ended, or before any other save.

        A crash must not leave another callback's checkpoints without their run. A fit whose first batch fails leaves
        nothing.
        """
        self._first = self._now(assumes=False)  # a run begins with the arrays that its process has
        self._session.copy(self._first.snapshot)
        self._session.hold_first(self._save_the_beginning)

    def _save_the_beginning(self) -> None:
        first, self._first = self._first, None
        if first is not None:
            changed = self._changed
            self._save("begin", time.perf_counter(), first)
            self._changed = changed

    def _forget_the_first(self) -> None:
        self._first = None

    def _resume(self) -> None:
        """Restores the backup. What belongs to the middle of an epoch is restored again when the epoch begins."""
        newest = self._directory.latest()
        ended = None if newest is None else newest.metadata.get(ENDED)
        another = newest is not None and ended != _ended[self._directory.path]
        try:
            report, document = restore_backup(self._model, self._directory)
            record = self._directory[report.step or 0]
            begin = record.metadata[INITIAL_EPOCH]
            if document is None:
                self._begin_with(begin)
                return
            _refuse_newer(document, record)
            self._resume_from(record, document)
        except MismatchError as error:
            if another:
                raise MismatchError(f"{error}\n{self._another_fit(ended)}") from error
            raise
        if another:
            warn(self._another_fit(ended))

    def _resume_from(self, record: CheckpointRecord, document: Any) -> None:
        begin = record.metadata[INITIAL_EPOCH]
        # Fewer epochs may be asked for than are done.
        past = self._epochs is not None and begin >= self._epochs
        if document["stopped"] and self._asks_for_more(record, document):
            document["stopped"] = False
        batch = 0 if past else document["batch"]
        self._warn_of_the_stream(record, document)
        if batch and not self._can_resume_within(document):
            self._warn_of_the_epoch(begin, batch, document["steps"])
            batch = 0
        restored = self._put_back(document, batch)
        if batch and self._callbacks is not None and self._steps is not None:
            self._go_on = functools.partial(self._go_on_within, document, self._callbacks, self._steps)
        ended = past or (document["stopped"] and not document["batch"])
        self._begin_with(self._epochs if ended else begin)
        self._warn_of_other_settings(document["settings"])
        epoch = begin if ended else begin + 1
        lost = [*self._states.strangers(document["callbacks"]), *document["unsaved"]]
        print(
            f"Found {record.prefix}; "
            + ("nothing is left to train after " if ended else "going on from ")
            + f"step {record.step}"
            + (f", epoch {min(epoch, self._epochs)} of {self._epochs}" if self._epochs and record.step else "")
            + (f", after batch {batch} of {self._steps}" if batch else "")
            + (", where a callback stopped it: ask for more epochs, or more patience" if ended and not past else "")
            + f"; restored: {', '.join(['model', 'random numbers', *restored])}"
            + (f"; not restored: {', '.join(lost)}" if lost else "")
        )

    def _asks_for_more(self, record: CheckpointRecord, document: Any) -> bool:
        """Whether this fit asks for more than the one that a callback stopped.

        More epochs are more, and so is more patience. A training that another callback than EarlyStopping stopped, by
        a limit of its own, is asked for again by a new fit; but not by the restart of a process that was killed before
        the end of the old one.
        """
        request = document.get("request")
        if request is None:
            return False
        early = request["early"]
        more_epochs = (self._epochs or math.inf) > (request["epochs"] or math.inf)
        if early is None:
            return more_epochs or STOPPED in record.metadata
        return more_epochs or bool(early != self._early_stopping())

    def _early_stopping(self) -> list[list[Any]]:
        """How the `EarlyStopping` callbacks of this fit are set."""
        stops = [each for each in self._others if isinstance(each, keras.callbacks.EarlyStopping)]
        names = ("monitor", "mode", "patience", "baseline", "start_from_epoch")
        return [[*(repr(getattr(each, name, None)) for name in names), abs(each.min_delta)] for each in stops]

    def _put_back(self, document: Any, batch: int) -> list[str]:
        """Restores what is beside the model, for an epoch of which so many batches are done, and says what."""
        restored = self._states.put_back(document["callbacks"])
        if self._data is not None and document["data"] is not None:
            self._data.set_state(document["data"], batch)
            restored.append("place in the data")
        random_state.set_state(document["seeds"])  # a look at the data may have drawn from them
        return restored

    def _begin_with(self, epoch: int | None) -> None:
        """Tells `fit` with which epoch to begin, which it reads before its first one."""
        begin_with_epoch(self._model, epoch)
        if self._callbacks is not None:
            # Left there, it would hold for the next fit too, if another callback has an error in the first epoch.
            self._callbacks.on_epoch_begin = self._first_epoch_begin

    def _first_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        self._forget_the_beginning()
        if self._callbacks is not None:
            self._callbacks.on_epoch_begin(epoch, logs)

    def _forget_the_beginning(self) -> None:
        begin_with_epoch(self._model, None)
        if self._callbacks is not None:
            vars(self._callbacks).pop("on_epoch_begin", None)

    def _warn_of_other_settings(self, before: Mapping[str, Any]) -> None:
        now = _settings(self._model)
        known = [name for name in now if name in before]
        if other := [f"{name} {now[name]}, {before[name]} before" for name in known if before[name] != now[name]]:
            warn(f"What is computed from here on may differ in the last bits: {'; '.join(other)}.")

    def _can_resume_within(self, document: Any) -> bool:
        if self._callbacks is None or self._steps is None or document["steps"] != self._steps:
            return False
        nothing_left = document["batch"] == self._steps or document["stopped"]
        return nothing_left or (self._data is not None and document["data"] is not None)

    def _another_fit(self, number: object) -> str:
        return (
            f"The backup in {self._directory.path} is of another fit() of the script: when it was saved, {number} "
            f"trainings with that directory had ended in the process, and here it is {_ended[self._directory.path]}. "
            "If the script trains more than once, give each fit() a backup_dir of its own, or one training is taken "
            "for the other."
        )

    def _warn_of_the_epoch(self, epoch: int, batch: int, steps: int | None) -> None:
        why = f"the place in the data is not known. {_WRAP}"
        if self._data is not None and steps != self._steps:
            why = f"an epoch has {self._steps} batches here, and had {steps} when the backup was saved."
        warn(
            f"Epoch {epoch + 1} begins again at its first batch, on weights that have already seen {batch} of its "
            f"batches, because {why}"
        )

    def _warn_of_the_stream(self, record: CheckpointRecord, document: Any) -> None:
        """Warns where epochs are parts of a stream of batches, and the place in it is lost."""
        known = self._data is not None and document["data"] is not None
        if self._fit.steps_per_epoch is not None and record.step and not known:
            warn(
                f"With steps_per_epoch={self._fit.steps_per_epoch} an epoch begins where the last one ended. This one "
                f"begins at the first batch of the data, because the place in the data is not known. {_WRAP} Give "
                "fit() the dataset repeated: fit(data.repeat(), steps_per_epoch=...)."
            )

    def _go_on_within(self, document: Any, callbacks: keras.callbacks.CallbackList, steps: int) -> None:
        """Puts everything back once more: the other callbacks have begun the epoch a second time."""
        batch = document["batch"]
        self._build_metrics()
        report, _ = restore_backup(self._model, self._directory, again=True)
        if batch < steps and any(name.startswith("metrics/") for name in report.unexpected):
            warn("The metrics of the epoch in progress begin at zero: they are made in its first step.")
        for each in callbacks.callbacks:
            if isinstance(each, ModelCheckpoint):
                each.go_on_within(batch)
        self._states.put_back(document["callbacks"])
        self._save_owed()
        random_state.set_state(document["seeds"])
        self._session.progress.resume(batch)
        self._place = _Place(self._place.epoch, batch)
        self._logs = document["logs"]
        self._due = document["due"]
        self._model.stop_training = document["stopped"]
        trained = batch == steps or document["stopped"]
        if trained:
            self._held = self._now()
        EpochRest(callbacks, batch, steps, self._logs if trained else None)

    def _save_owed(self) -> None:
        """Has other callbacks save what the process that died had yet to write of the very moment of the backup."""
        for each in self._others:
            if isinstance(each, ModelCheckpoint):
                each.save_owed()

    def _build_metrics(self) -> None:
        """Makes the variables that metrics have from their first batch on, by a look at a step that is not taken."""
        if self._spec is not None:
            with contextlib.suppress(Exception):  # it is somebody else's, and may not be one that TensorFlow can trace
                tf.function(self._model.train_step).get_concrete_function(self._spec)

    def _now(self, assumes: bool = True) -> _Moment:
        callbacks = self._states.take()
        if new := [name for name in self._states.unsaved if name not in self._told]:
            self._told.update(new)
            warn(
                f"These attributes of callbacks cannot be backed up: {', '.join(new)}. After a restart they are as "
                "the script makes them. Give the class get_state() and set_state(state), of plain values and arrays."
            )
        stopped = bool(self._model.stop_training)
        others = {
            "version": _VERSION,
            "unsaved": self._states.unsaved,
            "seeds": random_state.get_state(),
            "data": None if self._data is None else self._data.get_state(self._place.batch),
            "logs": {name: value for name, value in self._logs.items() if _is_plain(value)},
            "due": self._due,
            "steps": self._steps,
            "batch": self._place.batch,
            "stopped": stopped,
            "request": self._request() if stopped else None,
            "settings": _settings(self._model),
        }
        structures = {name: copied(value) for name, value in others.items()}
        text, leaves = dumped(dict_of({**structures, "callbacks": callbacks.structure}))
        keys = {f"{TRAINING_KEY}/{number}": leaf for number, leaf in enumerate(leaves)}
        later = Later(keys, callbacks.assumed if assumes else ())
        snapshot = self._session.snapshot({TRAINING_KEY: text}, later)
        return _Moment(self._place, self._session.progress.position, snapshot)

    def _repeats(self) -> str | None:
        """The reason of a save that is to be repeated in the middle of an epoch."""
        return self._again if self._data is not None else None

    def _request(self) -> dict[str, Any]:
        """What was asked for of a training that a callback has stopped, to know later what is more."""
        return {"epochs": self._epochs, "early": self._early_stopping() if self._ended_early else None}

    def _save(self, reason: str, began: float, moment: _Moment) -> None:
        if self._is_broken() or (self._ends_with_nan and not self._is_finite()):
            return  # the backup before is worth more
        metadata = {INITIAL_EPOCH: moment.place.epoch, ENDED: _ended[self._directory.path]}
        self._changed, self._again = False, None
        try:
            position = moment.position
            request = SaveRequest(
                step=position.step,
                run_id=position.run_id,
                epoch=position.epoch,
                batch=position.batch,
                reason=reason,
                metadata=metadata,
                began=began,
            )
            self._session.save(request, moment.snapshot, functools.partial(self._ended, reason))
        except BaseException:
            self._changed = True  # for all that is known
            raise

    def _ended(self, reason: str, outcome: Outcome) -> None:
        self._changed = self._changed or (outcome.record is None and not outcome.replaced)
        if outcome.changed:
            self._again = reason

    def _save_at_once(self, reason: str, began: float) -> None:
        """Saves and waits, and repeats the save if an array was wrongly assumed to be unchanged."""
        moment, self._held = self._held or self._now(), None  # a snapshot is used up by a save
        self._save(reason, began, moment)
        self._session.settle(wait=True)
        while self._again and self._whole:
            self._save(reason, began, self._now())
            self._session.settle(wait=True)

    def _save_last(self, reason: str) -> None:
        began = time.perf_counter()
        # Whatever became of those before it.
        while self._session.is_saving:
            with _errors_as_warnings():
                self._session.settle(wait=True)
        if self._changed and (self._held or self._whole):
            self._save_at_once(reason, began)
        background.tell()  # of what other callbacks have saved, before the process may end

    def _is_finite(self) -> bool:
        return all(is_finite(each.value) for each in self._model.trainable_variables)

    def _is_broken(self) -> bool:
        """Whether the training was stopped because of a loss that is not finite."""
        loss = self._logs.get("loss", 0.0)
        return bool(self._model.stop_training) and isinstance(loss, float) and not math.isfinite(loss)

    def _under_way(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if self._callbacks is None or any(value is self._callbacks for value in frame.f_locals.values()):
                return True
            frame = frame.f_back
        return False


@contextlib.contextmanager
def _errors_as_warnings() -> Iterator[None]:
    """Has a save that failed told of by a warning, because something else ends the training."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - there may be no memory for it, for one
        warn(str(error) or repr(error))


def _stopped(record: CheckpointRecord) -> CheckpointRecord:
    return msgspec.structs.replace(record, metadata={**record.metadata, STOPPED: True})


def _refuse_newer(document: Any, record: CheckpointRecord) -> None:
    if document["version"] > _VERSION:
        raise FormatVersionError(
            f"{record.prefix} was saved by a newer version of keras_ckpt, {record.versions.get('keras_ckpt')}: go "
            "on with that one."
        )


def _settings(model: keras.Model) -> dict[str, Any]:
    """What decides the last bits of a result."""
    return {
        "TensorFlow": tf.__version__,
        "Keras": keras.__version__,
        "processors": os.cpu_count(),
        "threads of an operation": tf.config.threading.get_intra_op_parallelism_threads(),
        "threads of operations": tf.config.threading.get_inter_op_parallelism_threads(),
        "deterministic operations": is_op_determinism_enabled(),
        "jit_compile": bool(model.jit_compile),
    }


def _is_plain(value: Any) -> bool:
    try:
        copied(value)
    except UnplainError:
        return False
    return True
