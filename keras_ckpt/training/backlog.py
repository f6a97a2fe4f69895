"""The saves of a callback that were due and are not on disk yet: how many, and since when."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable

MOST = 8
"""So many saves of a callback may wait."""
_FEW, _SECONDS = 2, 1.0
"""Training is ahead of the disk by so many saves, or by so many seconds, at most, whichever is longer."""


class Backlog:
    """The saves of a callback that are not on disk yet.

    A save that is on disk covers the ones that were due before it.

    Args:
        clock: Gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: collections.deque[tuple[int, float]] = collections.deque()
        self._count = 0

    def due(self) -> int:
        """Notes that a save is due. Returns its number."""
        self._count += 1
        self._due.append((self._count, self._clock()))
        return self._count

    def done(self, number: int) -> None:
        """Notes that a save is on disk, or need not be."""
        while self._due and self._due[0][0] <= number:
            self._due.popleft()

    def is_too_long(self, more: int = 0) -> bool:
        """Whether training has to wait for the disk, if so many more saves are due."""
        return len(self._due) + more > _FEW and self._clock() - self._due[0][1] > _SECONDS
