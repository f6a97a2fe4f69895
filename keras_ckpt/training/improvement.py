"""The decision whether a value of a metric is an improvement: over the best on disk, by at least a minimum."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence

from keras_ckpt.store import tables
from keras_ckpt.store.policies import PreservationPolicy
from keras_ckpt.store.record import CheckpointRecord, Mode


def improves(value: float, best: float | None, mode: Mode | None, min_delta: float = 0.0) -> bool:
    """Whether a value beats the best so far by more than `min_delta`. Any finite value beats `None`."""
    if best is None or not math.isfinite(value):
        return math.isfinite(value)
    return value + min_delta < best if mode == "min" else value - min_delta > best


def checked_min_delta(value: object, save_best_only: bool) -> float:
    """Checks the argument `min_delta` of a callback. Its sign does not count, as in Keras's `EarlyStopping`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"min_delta expected a number. Received: {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"min_delta expected a finite number. Received: {value!r}")
    if value and not save_best_only:
        raise ValueError(
            f"min_delta={value!r} is the least improvement that save_best_only=True saves. Without save_best_only each "
            "save that is due is written. Pass save_best_only=True, or omit min_delta."
        )
    return abs(float(value))


@dataclasses.dataclass(frozen=True, repr=False)
class Improvements(PreservationPolicy):
    """Keeps each checkpoint that beats the best before it. A checkpoint without a finite value is no improvement.

    Args:
        monitor: The metric's name.
        mode: `"min"` if smaller is better, `"max"` if larger is better.
        min_delta: The difference that is not enough.
    """

    monitor: str
    mode: Mode
    min_delta: float | None = None

    @property
    def monitors(self) -> frozenset[str]:
        return frozenset((self.monitor,))

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        return {record.step for record, best in self._with_best(records) if self._beats(record, best)}

    def why_not(self, records: Sequence[CheckpointRecord]) -> Mapping[int, str]:
        reasons = {}
        for record, best in self._with_best(records):
            value = tables.metric(record.metrics.get(self.monitor))
            if record.finite(self.monitor) is None:
                reasons[record.step] = f"{self.monitor} is {value or 'missing'}"
            elif not self._beats(record, best):
                by = f" by more than {self.min_delta:g}" if self.min_delta else ""
                reasons[record.step] = f"{value} does not beat {tables.metric(best)}{by}"
        return reasons

    def _beats(self, record: CheckpointRecord, best: float | None) -> bool:
        value = record.finite(self.monitor)
        return value is not None and improves(value, best, self.mode, self.min_delta or 0.0)

    def _with_best(self, records: Sequence[CheckpointRecord]) -> Iterator[tuple[CheckpointRecord, float | None]]:
        """Each record with the best value before it, oldest first."""
        best: float | None = None
        for record in sorted(records, key=lambda record: record.sequence):
            yield record, best
            value = record.finite(self.monitor)
            if value is not None and improves(value, best, self.mode):
                best = value
