"""Saves a model as TensorFlow checkpoints of a directory: its snapshots, and their writing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import keras
import msgspec

from keras_ckpt.formats.arena import Arena
from keras_ckpt.formats.sharing import SharingWrite
from keras_ckpt.formats.variables import SUFFIX
from keras_ckpt.model import model_state
from keras_ckpt.model.backends import backend
from keras_ckpt.model.snapshot import Late, Snapshot, arena_of
from keras_ckpt.store import background
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.writer import SaveRequest, Writer


class Bundles:
    """A model that is saved as TensorFlow checkpoints.

    Example:

    ```python
    bundles = Bundles(model, Writer(directory))
    record = bundles.write(SaveRequest(step=10), bundles.snapshot(10), amends=False)
    ```

    Args:
        model: A built model.
        writer: The writer of the directory.
        weights_only: Whether to omit the optimizer.
    """

    def __init__(self, model: keras.Model, writer: Writer, weights_only: bool = False) -> None:
        self._state = model_state.ModelState(model, weights_only)
        self._arena = arena_of(model)
        self._held = Arena()
        self._attributes = self._state.attributes()
        self._writer = writer

    def holds(self, snapshot: Snapshot) -> bool:
        """Whether all assumptions about the values of a snapshot hold. This may take time."""
        return snapshot.is_true

    def snapshot(self, step: int, others: Mapping[str, Any] = {}, later: Late | None = None) -> Snapshot:
        """The snapshot of the model as it is now.

        Args:
            step: The step of the checkpoint.
            others: Other values to write, by key.
            later: Other values to write, which are known when the snapshot is moved.
        """
        return self._state.snapshot(step, others, later)

    def copy(self, snapshot: Snapshot) -> None:
        """Copies the values of a snapshot now, so that training need not copy values before it changes them."""
        snapshot.detach(self._arena, background.is_idle())

    def hold(self, snapshot: Snapshot) -> None:
        """Lets other callbacks change the model and save it, before this snapshot is saved or dropped."""
        if backend.COPIES_AT_ONCE:
            # Saves of other callbacks meanwhile use the arena of the model.
            snapshot.detach(self._held, background.is_idle())

    def preparation(self) -> Callable[[], str]:
        """A function that allocates the memory of the copies and makes the model's config, for a thread."""
        sizes, config = self._state.sizes(), self._state.config()

        def prepare() -> str:
            with contextlib.suppress(OSError, MemoryError):  # a save that needs the memory raises the error
                self._arena.make_room(sizes)
            return config().reason

        return prepare

    def unsaved(self) -> list[str]:
        """The places of state that a checkpoint of the model does not have."""
        return self._state.unsaved(self._attributes)

    def write(self, request: SaveRequest, snapshot: Snapshot, amends: bool) -> CheckpointRecord | None:
        """Writes a snapshot, as `Form.write` in `session` says."""
        with self._writer.explaining(request.step):
            values = snapshot.move(self._arena)
        sharing = SharingWrite(values, self._arena, self._writer)
        newest = self._writer.latest() if amends else None
        is_again = newest is not None and (newest.run_id, newest.step) == (request.run_id, request.step)
        if newest and is_again and sharing.is_in(newest, _is_model_variable):
            # The save of the epoch's last batch has the values. Only the metrics of the epoch's end are new.
            amended = self._writer.amend(newest, request.amended)
            if amended is not None:
                return amended
        # `sharing` checks the free space itself: it may link most files.
        request = msgspec.structs.replace(request, size=0, versions=model_state.versions())
        record = self._writer.save(request, sharing)
        if record is not None:
            sharing.remember(record)
        return record


def _is_model_variable(key: bytes) -> bool:
    """Whether a key names a variable of the model; the state of its metrics does not count."""
    return key.endswith(SUFFIX.encode()) and not key.startswith(b"metrics/")
