"""The place of a `fit` in its data: in an epoch of the data, or in a stream of batches over several epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from keras_ckpt.model.keras_internals import FitInProgress
from keras_ckpt.resume import pipelines
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
        between = pipelines.steps_between(fit.dataset, data)
        _refuse_another_order(between)
        _warn_of_draws(between)
        self._refuse_other_epochs(fit)
        self._epoch, self._batch = data.passes, 0
        self._taken = 0
        self._is_read = False

    def epoch_begin(self) -> None:
        """An epoch begins."""
        if not self._streams:
            self._epoch = self._data.passes

    def batch_end(self, ran: int) -> None:
        """Counts batches that were read and trained on.

        Raises:
            ValueError: The batches were not read from the dataset.
        """
        self._taken += ran
        if not self._is_read and self._data.passes == self._epoch:
            raise ValueError(
                "fit() does not train on the ResumableDataset of BackupAndRestore. Give both the same dataset: "
                "model.fit(data, ..., callbacks=[keras_ckpt.BackupAndRestore(..., data=data)])."
            )
        self._is_read = True

    def get_state(self, batch: int) -> dict[str, Any]:
        """The place, for another process that resumes here.

        Args:
            batch: The number of batches of the epoch that are done.
        """
        state = self._data.get_state()
        if self._streams:
            number, place = self._epoch, self._batch + self._taken
            if self._data.batches is not None:
                number, place = number + place // self._data.batches, place % self._data.batches
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
        self._data.set_state(state, self._batch if self._streams else batch if batch != self._steps else 0)

    def _refuse_other_epochs(self, fit: FitInProgress) -> None:
        batches = self._data.batches
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
        elif self._steps is None:
            raise ValueError(
                f"fit() does not know its number of batches; the ResumableDataset has {batches}. Give fit() the "
                "dataset itself, or a step that keeps its batches, such as data.map(...) or data.prefetch(...)."
            )
        elif self._steps != batches:
            raise ValueError(
                f"fit() has {self._steps} batches in an epoch; the ResumableDataset of BackupAndRestore has {batches}. "
                "Give both the same dataset. If fit() reads only a part of the data, make the ResumableDataset of this "
                "part."
            )


def _refuse_another_order(steps: Sequence[tf.data.Dataset]) -> None:
    """Refuses steps between a `ResumableDataset` and `fit` that may change the batches or their order."""
    other = [pipelines.name_of(step) for step in steps if not pipelines.keeps_batches(step)]
    if other:
        raise ValueError(
            f"fit() reads the ResumableDataset through a step {other[0]!r} of tf.data. It may change the batches or "
            "their order, so an epoch cannot be resumed at a batch. Give this step to the pipeline inside the "
            "ResumableDataset: ResumableDataset(pipeline). The steps map, prefetch, repeat and with_options keep the "
            "batches."
        )


def _warn_of_draws(steps: Sequence[tf.data.Dataset]) -> None:
    """Warns of steps whose random numbers a restart cannot repeat."""
    if any(map(pipelines.draws, steps)):
        warn(
            "fit() reads the ResumableDataset through a map() that draws random numbers or changes variables. A "
            "restart does not know how often the map() ran. To resume exactly, move the map() into the pipeline inside "
            "the ResumableDataset: ResumableDataset(pipeline.map(...))."
        )
