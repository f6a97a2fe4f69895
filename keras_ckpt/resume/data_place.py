"""The place of a `fit` in its data: in an epoch of the data, or in a stream of batches over several epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from keras_ckpt.model.keras_internals import FitInProgress
from keras_ckpt.resume.resumable_dataset import ResumableDataset
from keras_ckpt.store.notices import warn


class DataPlace:
    """The place of a `fit` in a `ResumableDataset`.

    Without `steps_per_epoch`, each epoch of `fit` reads one epoch of the data. With it, the epochs of `fit` read one
    stream of batches: endless data, or the epochs of the data one after another.

    Args:
        data: The dataset.
        steps: The number of batches of an epoch, `None` if `fit` does not know the number yet.
        fit: The `fit` in progress.

    Raises:
        ValueError: The epochs do not fit the data.
    """

    def __init__(self, data: ResumableDataset, steps: int | None, fit: FitInProgress) -> None:
        self._data = data
        self._steps = steps
        self._streams = fit.steps_per_epoch is not None
        if fit.adapter is not None and not data.is_read_by(fit.adapter):
            raise ValueError(
                "fit() does not train on the ResumableDataset of BackupAndRestore. Give both the same dataset: "
                "model.fit(data, ..., callbacks=[keras_ckpt.BackupAndRestore(..., data=data)])."
            )
        self._refuse_other_epochs(fit)
        self._epoch, self._batch = data.passes, 0
        self._taken = 0

    def epoch_begin(self) -> None:
        """An epoch begins."""
        if not self._streams:
            self._epoch = self._data.passes

    def batch_end(self, ran: int) -> None:
        """Counts batches that were trained on."""
        self._taken += ran

    def get_state(self, batch: int) -> dict[str, Any]:
        """The place, for another process that resumes here.

        Args:
            batch: The number of batches of the epoch that are done.
        """
        state = self._data.get_state()
        if self._streams:
            number, place = self._epoch, self._batch + self._taken
            if self._data.num_batches is not None:
                number, place = number + place // self._data.num_batches, place % self._data.num_batches
            return state | {"pass": number, "batch": place}
        return state | ({"pass": self._epoch} if 0 < batch < (self._steps or 0) else {})

    def set_state(self, state: Mapping[str, Any], batch: int) -> None:
        """Moves to the place of another process.

        Args:
            state: The result of `get_state` in the other process.
            batch: The number of batches of the epoch that are done.

        Raises:
            MismatchError: The data differs, or its order does.
        """
        if ("batch" in state) != self._streams:
            warn(
                "The place in the data is not known, because the backup is of a fit() "
                + ("with steps_per_epoch. This fit() has none." if "batch" in state else "without steps_per_epoch.")
            )
            return
        self._epoch = state["pass"]
        self._batch = state.get("batch", 0)
        is_last = batch == self._steps
        self._data.set_state(state, self._batch if self._streams else 0 if is_last else batch, skips_a_step=is_last)

    def _refuse_other_epochs(self, fit: FitInProgress) -> None:
        batches = self._data.num_batches
        if self._streams:
            if fit.batches is not None:
                raise ValueError(
                    f"With steps_per_epoch={fit.steps_per_epoch} an epoch ends in the middle of the data, so the data "
                    f"must be endless. The data has {fit.batches} batches. Give fit() the repeated dataset, "
                    f"model.fit(data.repeat(), steps_per_epoch={fit.steps_per_epoch}, ...), and BackupAndRestore the "
                    "dataset itself; or omit steps_per_epoch."
                )
        elif batches is None:
            raise ValueError("The ResumableDataset is endless, so fit() needs steps_per_epoch.")
        elif self._steps != batches:
            raise ValueError(
                f"The training has {self._steps} batches in an epoch; the ResumableDataset of BackupAndRestore has "
                f"{batches}. Train on the whole dataset, or make the ResumableDataset of the part that is trained on."
            )
