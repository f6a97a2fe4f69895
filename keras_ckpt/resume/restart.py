"""The restart of a killed fit: its backup is read once, and restored into the `fit` that begins."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import shlex
from collections.abc import Callable
from typing import Any

from keras_ckpt.errors import FormatVersionError, MismatchError
from keras_ckpt.model.backends import backend
from keras_ckpt.model.comparison import RestoreRequest
from keras_ckpt.model.report import RestoreReport
from keras_ckpt.model.transfer import transfer
from keras_ckpt.resume import random_state
from keras_ckpt.resume.fit_state import BACKEND, ENDED, STOPPED, VERSION, FitState, read_document, settings
from keras_ckpt.store.files import Folder
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import INITIAL_EPOCH, CheckpointRecord
from keras_ckpt.store.tables import relative
from keras_ckpt.training.model_checkpoint import ModelCheckpoint


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a fit begins.

    Attributes:
        epoch: The index of the epoch; `None` leaves the epoch to `fit`.
        batch: The number of batches of the epoch that are done.
        done: Why nothing is left to train: all `"epochs"` are done, or a callback `"stopped"` the fit; else `None`.
    """

    epoch: int | None
    batch: int = 0
    done: str | None = None


class Restart:
    """The restart of a fit from its backup.

    `begin` restores the backup before the first epoch. Keras and other callbacks reset some of it when an epoch
    begins. So a restart within an epoch restores the backup again then, by `resume_within`, from the files that
    `begin` has verified and left open.

    Args:
        state: The state of the fit beside its model.
        listing: The listing of the backup's directory. The writer of this process was open when it was read.
        ended: The number of fits with this directory that have ended in the process.
        say: Tells the user what was restored.

    Attributes:
        start: Where the fit begins.
        document: The content of the backup beside the model.
    """

    def __init__(self, state: FitState, listing: Listing, ended: int, say: Callable[[str], object]) -> None:
        self.start = Start(None)
        self.document: Any = None
        self._state = state
        self._listing = listing
        self._ended = ended
        self._say = say
        self._files = contextlib.ExitStack()
        self._transfer: Callable[[RestoreRequest], RestoreReport] | None = None  # from the open files

    def begin(self) -> None:
        """Restores the backup, says so, and decides where the fit begins.

        Raises:
            MismatchError: The backup does not fit the model or the data.
            DamagedCheckpointError: No backup in the directory can be trusted.
            FormatVersionError: A newer version of this package saved the backup.
        """
        other_fit = self._warning_of_another_fit()
        try:
            record = self._restore()
            if self.document is None:
                self.start = Start(record.metadata[INITIAL_EPOCH])
            else:
                _refuse_newer(self.document, record)
                self._begin(record)
        except MismatchError as error:
            if other_fit:
                raise MismatchError(f"{error}\n{other_fit}") from error
            raise
        if other_fit:
            warn(other_fit)
        if not self.start.batch:
            self.close()
            if record.end is None:  # a fit that came to its end has saved everything
                self._save_owed()

    def resume_within(self) -> None:
        """Restores the backup again: Keras and the other callbacks have begun the epoch a second time."""
        if self._transfer is None:
            raise RuntimeError("Restart.begin() comes before resume_within().")
        batch = self.start.batch
        if self._state.element_spec is not None:
            backend.build_metrics(self._state.model, self._state.element_spec)
        report = self._transfer(RestoreRequest(check_digests=False, again=True))
        self.close()
        if batch < self.document["steps"] and any(name.startswith("metrics/") for name in report.unexpected):
            warn("The metrics of the epoch in progress begin at zero: they are made in its first step.")
        for each in self._checkpoints():
            each.resume_within(batch)
        self._state.states.restore(self.document["callbacks"])
        self._save_owed()
        random_state.set_state(self.document["seeds"])

    def close(self) -> None:
        """Closes the files of the backup."""
        self._transfer = None
        self._files.close()

    def _restore(self) -> CheckpointRecord:
        """Restores the model, reads the document, and leaves the files open."""

        def read(files: Folder, name: str, record: CheckpointRecord | None) -> CheckpointRecord:
            if record is None:
                raise MismatchError(f"{name} in {self._listing.path} has no sidecar, so it is no backup.")
            self.document = read_document(files, name)
            self._transfer = functools.partial(transfer, self._state.model, files, name, record)
            self._transfer(RestoreRequest(backup=self._listing.path))
            return record

        return read_checkpoint(self._listing, read, self._files)

    def _begin(self, record: CheckpointRecord) -> None:
        """Restores what is beside the model, and prints what was restored."""
        document = self.document
        if document["stopped"] and self._asks_for_more(record):
            document["stopped"] = False
        self._warn_of_the_stream(record)
        self.start = self._decided(record.metadata[INITIAL_EPOCH])
        restored = self._state.restore(document, self.start.batch)
        self._warn_of_other_settings()
        lost = [*self._state.states.strangers(document["callbacks"]), *document["unsaved"]]
        self._say(
            f"Found {record.prefix}; {self._described(record)}; restored: "
            + ", ".join(["model", "random numbers", *restored])
            + (f"; not restored: {', '.join(lost)}" if lost else "")
            + (self._way_to_train() if self.start.done else "")
        )

    def _decided(self, epoch: int) -> Start:
        """Where the fit begins, by the backup and by what this fit is asked for."""
        epochs, batch = self._state.epochs, self.document["batch"]
        if epochs is not None and epoch >= epochs:  # fewer epochs may be asked for than are done
            return Start(epochs, done="epochs")
        if self.document["stopped"] and not batch:
            return Start(epochs, done="stopped")
        if batch and not self._can_resume_within():
            self._warn_of_the_epoch(epoch)
            batch = 0
        return Start(epoch, batch)

    def _described(self, record: CheckpointRecord) -> str:
        """What the fit resumes, for the user."""
        start, epochs = self.start, self._state.epochs
        text = f"{'nothing is left to train after' if start.done else 'resuming from'} step {record.step}"
        if epochs and record.step:
            begin = record.metadata[INITIAL_EPOCH]
            text += f", epoch {min(begin if start.done else begin + 1, epochs)} of {epochs}"
        if start.batch:
            text += f", after batch {start.batch} of {self._state.steps}"
        if start.done == "stopped":
            text += ", where a callback stopped it: ask for more epochs, or more patience"
        return text

    def _way_to_train(self) -> str:
        """Tells how to train another run."""
        path = shlex.quote(relative(self._listing.path))
        return f". To train another run, remove the backup, in a shell: keras-ckpt clear {path}"

    def _can_resume_within(self) -> bool:
        state, document = self._state, self.document
        if state.fit.callbacks is None or state.steps is None or document["steps"] != state.steps:
            return False
        nothing_left = document["batch"] == state.steps or document["stopped"]
        return nothing_left or (state.data is not None and document["data"] is not None)

    def _asks_for_more(self, record: CheckpointRecord) -> bool:
        """Whether this fit asks for more than the fit that a callback stopped.

        More epochs ask for more, and so do other settings of `EarlyStopping`. After a stop by another callback, which
        has a limit of its own, a new fit asks for more. The restart of a process that was killed before the end of the
        stopped fit does not.
        """
        request = self.document.get("request")
        if request is None:
            return False
        early = request["early"]
        if (self._state.epochs or math.inf) > (request["epochs"] or math.inf):
            return True
        return STOPPED in record.metadata if early is None else bool(early != self._state.early_stopping())

    def _save_owed(self) -> None:
        """Has other callbacks save the step of the backup, if the killed process had yet to write it."""
        for each in self._checkpoints():
            each.save_owed()

    def _checkpoints(self) -> list[ModelCheckpoint]:
        return [each for each in self._state.others if isinstance(each, ModelCheckpoint)]

    def _warning_of_another_fit(self) -> str | None:
        """A warning if the backup is of another `fit()` of the script."""
        number = self._listing.records[-1].metadata.get(ENDED) if self._listing.records else self._ended
        if number == self._ended:
            return None
        return (
            f"The backup in {self._listing.path} is of another fit() of the script: when it was saved, {number} "
            f"trainings with that directory had ended in the process, and here it is {self._ended}. If the script "
            "trains more than once, give each fit() a backup_dir of its own, or one training is taken for the other."
        )

    def _warn_of_the_epoch(self, epoch: int) -> None:
        steps = self.document["steps"]
        why = f"the place in the data is not known.{self._wrapping()}"
        if self._state.data is not None and steps != self._state.steps:
            why = f"an epoch has {self._state.steps} batches here, and had {steps} when the backup was saved."
        warn(
            f"Epoch {epoch + 1} begins again at its first batch, on weights that have already seen "
            f"{self.document['batch']} of its batches, because {why}"
        )

    def _warn_of_the_stream(self, record: CheckpointRecord) -> None:
        """Warns if epochs are parts of a stream of batches, and the place in the stream is lost."""
        steps_per_epoch = self._state.fit.steps_per_epoch
        known = self._state.data is not None and self.document["data"] is not None
        if steps_per_epoch is not None and record.step and not known:
            warn(
                f"With steps_per_epoch={steps_per_epoch} an epoch begins where the last one ended. This one begins at "
                f"the first batch of the data, because the place in the data is not known.{self._wrapping()} Give "
                "fit() the dataset repeated: fit(data.repeat(), steps_per_epoch=...)."
            )

    def _wrapping(self) -> str:
        """Tells how to type the data of this fit so that a restart knows the place in the data."""
        if self._state.data is not None:
            return ""
        return (
            f" To resume exactly, wrap the data, data = keras_ckpt.ResumableDataset({self._state.fit.typed}), and give "
            "it to fit(data) and to BackupAndRestore(..., data=data)."
        )

    def _warn_of_other_settings(self) -> None:
        before, now = {BACKEND: "tensorflow", **self.document["settings"]}, settings(self._state.model)
        if before[BACKEND] != now[BACKEND]:
            warn(
                f"The backup was saved on Keras's backend {before[BACKEND]}, and this fit() is on {now[BACKEND]}. The "
                "state of the run is restored. From here on, random numbers differ, and so does the end of the run. To "
                f"resume exactly, set KERAS_BACKEND={before[BACKEND]}."
            )
            return
        known = [name for name in now if name in before]
        if other := [f"{name} {now[name]}, {before[name]} before" for name in known if before[name] != now[name]]:
            warn(f"From here on, results may differ in the last bits: {'; '.join(other)}.")


def _refuse_newer(document: Any, record: CheckpointRecord) -> None:
    if document["version"] > VERSION:
        raise FormatVersionError(
            f"{record.prefix} was saved by a newer version of keras_ckpt, {record.versions.get('keras_ckpt')}. Resume "
            "with that version."
        )
