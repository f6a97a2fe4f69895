"""What a backup holds beside the model: taken from one `fit`, and restored into the `fit` of another process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import keras

from keras_ckpt.formats import arrays
from keras_ckpt.formats.bundle_index import read_index
from keras_ckpt.formats.bundle_reader import read_values
from keras_ckpt.model.backends import backend
from keras_ckpt.model.checkpoint_reader import errors_as_damage
from keras_ckpt.model.keras_internals import FitInProgress
from keras_ckpt.model.model_state import TRAINING_KEY
from keras_ckpt.resume import random_state
from keras_ckpt.resume.callback_states import CallbackStates
from keras_ckpt.resume.capture import Later, copied
from keras_ckpt.resume.data_place import DataPlace
from keras_ckpt.resume.plain_values import UnplainError, decode, dict_of, dumped
from keras_ckpt.resume.resumable_dataset import ResumableDataset
from keras_ckpt.store.files import Folder
from keras_ckpt.store.notices import warn

VERSION = 2
"""The version of the document of a backup."""
ENDED = "ended"
"""In the metadata of a backup: the number of fits with this directory that had ended in the process."""
ROLLBACK = "rollback"
"""In the metadata of a backup: the step to which the user rolled the model back before the fit, and the number of the
rollback in the process."""
BACKEND = "backend"
"""In the settings of a backup: the backend of Keras. Backups without it are TensorFlow's."""
STOPPED = "stopped"
"""In the metadata of a backup: a callback stopped the fit, and the fit came to its end."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A place in a `fit`.

    Attributes:
        epoch: The index of the epoch in progress, or of the next epoch.
        batch: The number of batches of the epoch that are done.
    """

    epoch: int
    batch: int = 0

    @property
    def last_epoch(self) -> int:
        """The index of the epoch of the last batch."""
        return self.epoch if self.batch else self.epoch - 1


class FitState:
    """The state of a `fit` beside its model: callbacks, place in the data, random numbers, settings.

    Make it when the other callbacks have begun the training: what they set then belongs to the process.

    Args:
        model: The model.
        fit: The `fit` in progress.
        params: The parameters that Keras gives to callbacks.
        data: The data that `fit` trains on, to resume within an epoch.

    Attributes:
        steps: The number of batches of an epoch, `None` if it is not known.
        epochs: The number of epochs that `fit` is asked for, `None` if it is not known.
        others: The other callbacks.
        states: The states of the other callbacks.
        data: The place in the data, `None` if it is not known.

    Raises:
        ValueError: The epochs of `fit` do not fit the data.
    """

    def __init__(
        self, model: keras.Model, fit: FitInProgress, params: Mapping[str, Any], data: ResumableDataset | None
    ) -> None:
        self.model = model
        self.fit = fit
        self.steps: int | None = params.get("steps")
        self.epochs: int | None = params.get("epochs")
        callbacks = [] if fit.callbacks is None else fit.callbacks.callbacks
        self.others = [each for each in callbacks if not isinstance(each, keras.callbacks.BackupAndRestore)]
        self.states = CallbackStates(self.others, model)
        self.data = None if data is None else DataPlace(data, self.steps, fit)
        self.element_spec = None if data is None else data.element_spec
        self._told: set[str] = set()

    def take(
        self, place: Place, logs: Mapping[str, Any], due: str | None, assumes: bool = True
    ) -> tuple[dict[str, str], Later]:
        """Takes the state as it is now.

        Args:
            place: The place in the fit.
            logs: The logs of the last batch.
            due: The reason of a save that waits for the end of the epoch.
            assumes: Whether arrays of callbacks may be assumed to be unchanged until the state is written.

        Returns:
            The document by its key, and the arrays of the document.
        """
        callbacks = self.states.take()
        self._warn_of_unsaved()
        stopped = bool(self.model.stop_training)
        others = {
            "version": VERSION,
            "unsaved": self.states.unsaved,
            "seeds": random_state.get_state(),
            "data": None if self.data is None else self.data.get_state(place.batch),
            "logs": {name: value for name, value in logs.items() if _is_plain(value)},
            "due": due,
            "steps": self.steps,
            "batch": place.batch,
            "stopped": stopped,
            "request": self._request(place) if stopped else None,
            "settings": settings(self.model),
        }
        structures = {name: copied(value) for name, value in others.items()}
        text, leaves = dumped(dict_of({**structures, "callbacks": callbacks.structure}))
        keys = {f"{TRAINING_KEY}/{number}": leaf for number, leaf in enumerate(leaves)}
        return {TRAINING_KEY: text}, Later(keys, callbacks.assumed if assumes else ())

    def restore(self, document: Mapping[str, Any], batch: int) -> list[str]:
        """Restores the state for an epoch of which some batches are done.

        Returns:
            The names of what was restored.
        """
        restored = self.states.restore(document["callbacks"])
        if self.data is not None and document["data"] is not None:
            self.data.set_state(document["data"], batch)
            restored.append("place in the data")
        random_state.set_state(document["seeds"])  # a look at the data may have drawn random numbers
        return restored

    def early_stopping(self) -> list[list[Any]]:
        """The settings of each `EarlyStopping` of the fit."""
        names = ("monitor", "mode", "patience", "baseline", "start_from_epoch")
        stops = [each for each in self.others if isinstance(each, keras.callbacks.EarlyStopping)]
        return [[*(repr(getattr(each, name, None)) for name in names), abs(each.min_delta)] for each in stops]

    def is_stopped_early(self, place: Place) -> bool:
        """Whether an `EarlyStopping` stopped the fit in the epoch of the last batch."""
        stops = [each for each in self.others if isinstance(each, keras.callbacks.EarlyStopping)]
        return bool(self.model.stop_training) and any(each.stopped_epoch == place.last_epoch > 0 for each in stops)

    def _request(self, place: Place) -> dict[str, Any]:
        """What was asked of a fit that a callback has stopped. A later fit may ask for more."""
        return {
            "epochs": self.epochs,
            "early": self.early_stopping() if self.is_stopped_early(place) else None,
        }

    def _warn_of_unsaved(self) -> None:
        new = [name for name in self.states.unsaved if name not in self._told]
        self._told.update(new)
        if new:
            warn(
                f"These attributes of callbacks cannot be backed up: {', '.join(new)}. After a restart they are as "
                "the script makes them. Give the class get_state() and set_state(state), of plain values and arrays."
            )


def read_document(files: Folder, name: str) -> Any:
    """Reads the document of a backup, `None` if a version without documents has saved the backup."""
    with errors_as_damage():
        index = read_index(files, name)
        text, prefix = TRAINING_KEY.encode(), f"{TRAINING_KEY}/".encode()
        if text not in index.entries:
            return None
        keys = [key for key in index.entries if key.startswith(prefix)]
        values = read_values(files, index, [text, *keys], arrays.empty)
        return decode(values[text].item().decode(), {int(key.removeprefix(prefix)): values[key] for key in keys})


def settings(model: keras.Model) -> dict[str, Any]:
    """The settings that decide the last bits of a result."""
    return {
        BACKEND: keras.backend.backend(),
        **backend.settings(),
        "Keras": keras.__version__,
        "processors": os.cpu_count(),
        "jit_compile": bool(model.jit_compile),
    }


def _is_plain(value: Any) -> bool:
    try:
        copied(value)
    except UnplainError:
        return False
    return True
