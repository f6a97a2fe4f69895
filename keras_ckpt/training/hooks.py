"""The user's functions for saved and removed checkpoints, such as uploads to a tracker, on the training thread."""

from __future__ import annotations

import collections
from collections.abc import Callable

from keras_ckpt.store.directory import Change, CheckpointDirectory
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord

Hook = Callable[[CheckpointRecord], object]


class Hooks:
    """Collects the changes of a directory in any thread, and calls the user's functions in one.

    Trackers keep their current run by thread, so a call in the background thread would begin another run.

    Args:
        directory: The directory.
        on_saved: Called with the record of each saved checkpoint.
        on_removed: Called with the record of each removed checkpoint.
    """

    def __init__(self, directory: CheckpointDirectory, on_saved: Hook | None, on_removed: Hook | None) -> None:
        self._hooks = {"saved": on_saved, "removed": on_removed}
        for kind, hook in self._hooks.items():
            if hook is not None and not callable(hook):
                raise TypeError(f"on_{kind} expected a function of a record. Received: {hook!r}")
        self._changes: collections.deque[Change] = collections.deque()
        directory.subscribe(self._hear)

    def call(self) -> None:
        """Calls the functions for each change since the last call. Their errors become warnings."""
        while self._changes:
            change = self._changes.popleft()
            hook = self._hooks.get(change.kind)
            try:
                if hook is not None:
                    hook(change.record)
            except Exception as error:  # noqa: BLE001 - the checkpoint is on disk, whatever a tracker raises
                warn(f"on_{change.kind} failed for {change.record.prefix}: {error!r}. Training continues.")

    def _hear(self, change: Change) -> None:
        # A method of this class, because a deep copy of a callback must hear with its own.
        self._changes.append(change)
