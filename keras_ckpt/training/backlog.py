"""The backlog of a callback: its saves that are due but not on disk yet."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

MAX_WAITING = 8
"""The maximum number of waiting saves of a callback."""
_MAX_SAVES, _MAX_SECONDS = 2, 1.0
"""Training waits for the disk when it exceeds both limits: this many saves, and this many seconds."""


class Backlog:
    """The saves of a callback that are due but not on disk yet.

    A save on disk completes every save that was due before it.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: collections.deque[tuple[int, float]] = collections.deque()
        self._count = 0

    def due(self) -> int:
        """Adds a save that is due. Returns its number."""
        self._count += 1
        self._due.append((self._count, self._clock()))
        return self._count

    def done(self, number: int) -> None:
        """Removes a save that is on disk, or that was dropped, with all earlier saves."""
        while self._due and self._due[0][0] <= number:
            self._due.popleft()

    def is_too_long(self, more: int = 0) -> bool:
        """Whether training must wait for the disk, after `more` further saves."""
        return len(self._due) + more > _MAX_SAVES and self._clock() - self._due[0][1] > _MAX_SECONDS
