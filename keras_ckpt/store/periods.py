"""Policies by the calendar: the first checkpoint of each day, week or month, and those of the last days.

The first of a period, because it stays the first whatever comes. The last would be removed and replaced after every
save, and would agree with no other policy.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import ClassVar

from keras_ckpt.store import tables
from keras_ckpt.store.policies import CountedPolicy, PreservationPolicy, oldest_first
from keras_ckpt.store.quantities import as_seconds
from keras_ckpt.store.record import CheckpointRecord


class _OfPeriods(CountedPolicy):
    """Keeps the first checkpoint of each of the `n` newest periods that have one."""

    _name: ClassVar[str]
    _label: ClassVar[str]
    """The format of a period's label. Labels are in the order of their periods."""

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        first = self._first(records)
        return {first[period] for period in sorted(first)[-self.n :]}

    def why_not(self, records: Sequence[CheckpointRecord]) -> Mapping[int, str]:
        first = self._first(records)
        places = {period: place for place, period in enumerate(sorted(first, reverse=True), 1)}
        reasons = {}
        for record in records:
            period = self._period(record)
            if places[period] > self.n:
                reasons[record.step] = f"{period} is the {tables.ordinal(places[period])} newest {self._name}"
            elif first[period] != record.step:
                reasons[record.step] = f"{first[period]} is the first of {period}"
        return reasons

    def _first(self, records: Sequence[CheckpointRecord]) -> dict[str, int]:
        """For each period the step of its first record, in the order of saving."""
        return {self._period(record): record.step for record in reversed(oldest_first(records))}

    def _period(self, record: CheckpointRecord) -> str:
        return record.saved_at.astimezone(datetime.UTC).strftime(self._label)


@dataclasses.dataclass(frozen=True, repr=False)
class Daily(_OfPeriods):
    """Keeps the first checkpoint of each of the `n` newest days that have one.

    The days are those of UTC, by the times in the records. Join it with `LatestN(1)` to keep the newest too.

    Example:

    ```python
    keep = keras_ckpt.Daily(7) | keras_ckpt.Weekly(4) | keras_ckpt.Monthly(12) | keras_ckpt.LatestN(1)
    ```

    Args:
        n: The number of days, at least 1. Days without a checkpoint do not count.
    """

    _name = "day"
    _label = "%Y-%m-%d"


@dataclasses.dataclass(frozen=True, repr=False)
class Weekly(_OfPeriods):
    """Keeps the first checkpoint of each of the `n` newest weeks that have one.

    A week begins on Monday, in UTC.

    Example:

    ```python
    keep = keras_ckpt.Weekly(4) | keras_ckpt.LatestN(1)
    ```

    Args:
        n: The number of weeks, at least 1. Weeks without a checkpoint do not count.
    """

    _name = "week"
    _label = "%G-W%V"


@dataclasses.dataclass(frozen=True, repr=False)
class Monthly(_OfPeriods):
    """Keeps the first checkpoint of each of the `n` newest months that have one.

    The months are those of UTC.

    Example:

    ```python
    keep = keras_ckpt.Monthly(12) | keras_ckpt.LatestN(1)
    ```

    Args:
        n: The number of months, at least 1. Months without a checkpoint do not count.
    """

    _name = "month"
    _label = "%Y-%m"


@dataclasses.dataclass(frozen=True, repr=False)
class KeepWithin(PreservationPolicy):
    """Keeps the checkpoints of the last time of training, such as two days.

    The time ends at the latest checkpoint, not now. So a paused run loses no checkpoints.

    Example:

    ```python
    keep = keras_ckpt.KeepWithin("2 days") | keras_ckpt.Weekly(4)
    ```

    Args:
        age: The time: a `datetime.timedelta`, or a text with a unit. The units are seconds, minutes, hours, days,
            weeks, and s, min, h, d, w.
    """

    age: str | datetime.timedelta

    def __post_init__(self) -> None:
        as_seconds(self.age, "KeepWithin")

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        return {record.step for record in records} - self.why_not(records).keys()

    def why_not(self, records: Sequence[CheckpointRecord]) -> Mapping[int, str]:
        seconds = as_seconds(self.age, "KeepWithin")
        latest = max(records, key=lambda record: (record.time, record.sequence), default=None)
        return {
            record.step: f"{tables.duration(latest.time - record.time)} before {latest.step}"
            for record in records
            if latest is not None and latest.time - record.time > seconds
        }
