"""The schedule of saves that the argument `save_freq` of a callback defines."""

from __future__ import annotations

import datetime
import numbers
import time
from collections.abc import Sequence
from typing import Literal

SaveFreq = Literal["epoch"] | int | datetime.timedelta


class SaveSchedule:
    """Decides after which batches and epochs a save is due.

    A number of batches counts from the beginning of the run, not of the process. So a restarted run saves at the same
    steps. With several batches in one execution, the save comes after the execution that reaches the multiple.

    Args:
        save_freq: `"epoch"`, a number of batches, a `datetime.timedelta`, or a list of these.

    Raises:
        ValueError: `save_freq` has another type or value.
    """

    def __init__(self, save_freq: SaveFreq | list[SaveFreq] | tuple[SaveFreq, ...]) -> None:
        triggers = save_freq if isinstance(save_freq, list | tuple) else [save_freq]
        if not triggers:
            raise ValueError(f"save_freq expected at least one trigger. Received: {save_freq!r}")
        for trigger in triggers:
            _check(trigger)
        self.every_epoch = "epoch" in triggers
        self.batches = [trigger for trigger in triggers if isinstance(trigger, int)]
        self.intervals = [trigger for trigger in triggers if isinstance(trigger, datetime.timedelta)]
        self._last: list[float] = []
        self.start()

    def start(self) -> None:
        """Starts every interval now."""
        self._last = [time.monotonic()] * len(self.intervals)

    def elapsed(self) -> list[float]:
        """The seconds since the last save, by interval."""
        now = time.monotonic()
        return [now - last for last in self._last]

    def resume(self, elapsed: Sequence[float]) -> None:
        """Sets the seconds that `elapsed` returned in another process, if the number of intervals is the same."""
        if len(elapsed) == len(self._last):
            now = time.monotonic()
            self._last = [now - seconds for seconds in elapsed]

    def after_batches(self, before: int, after: int) -> str | None:
        """Whether a save is due after training has advanced from step `before` to step `after`.

        Returns:
            The reason in words, `None` if no save is due.
        """
        reasons = [f"every {n} batches" if n > 1 else "every batch" for n in self._due(before, after)]
        now = time.monotonic() if self.intervals else 0.0
        for index, interval in enumerate(self.intervals):
            if now - self._last[index] >= interval.total_seconds():
                self._last[index] = now
                reasons.append(f"every {interval}")
        return ", ".join(reasons) or None

    def _due(self, before: int, after: int) -> list[int]:
        """The numbers of batches after which a save is due now."""
        return [n for n in self.batches if after // n > before // n]

    def after_epoch(self) -> str | None:
        """The reason of a save that is due at an epoch's end, `None` if no save is due."""
        return "epoch" if self.every_epoch else None


class CallbackSchedule(SaveSchedule):
    """The schedule of Keras's own callback: a number of batches counts from the last save of the callback.

    The count continues from epoch to epoch and from fit to fit. With 0, each batch is saved, as with 1.

    Args:
        save_freq: As in `SaveSchedule`.

    Raises:
        ValueError: `save_freq` is no schedule.
    """

    def __init__(self, save_freq: SaveFreq | list[SaveFreq] | tuple[SaveFreq, ...]) -> None:
        triggers = save_freq if isinstance(save_freq, list | tuple) else [save_freq]
        super().__init__([max(1, trigger) if isinstance(trigger, int) else trigger for trigger in triggers])
        self._seen = [0] * len(self.batches)

    def elapsed(self) -> list[float]:
        return [*super().elapsed(), *self._seen]

    def resume(self, elapsed: Sequence[float]) -> None:
        if len(elapsed) == len(self._last) + len(self._seen):
            super().resume(elapsed[: len(self._last)])
            self._seen = [int(count) for count in elapsed[len(self._last) :]]

    def _due(self, before: int, after: int) -> list[int]:
        self._seen = [count + after - before for count in self._seen]
        due = [n for n, count in zip(self.batches, self._seen, strict=True) if count >= n]
        self._seen = [0 if count >= n else count for n, count in zip(self.batches, self._seen, strict=True)]
        return due


def checked_start_from_epoch(value: object) -> int:
    """Checks the argument `start_from_epoch` of a callback."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise ValueError(f"start_from_epoch expected a whole number of at least 0. Received: {value!r}")
    return int(value)


def _check(trigger: object) -> None:
    match trigger:
        case "epoch":
            return
        case bool():
            pass
        case int() if trigger >= 1:
            return
        case datetime.timedelta() if trigger.total_seconds() > 0:
            return
    raise ValueError(
        "Unrecognized save_freq. Invalid value: save_freq expected 'epoch', a number of batches of at least 1, a "
        f"positive datetime.timedelta, or a list of these. Received: {trigger!r}"
    )
