"""Retention policies: frozen values, each with one pure function that selects the records to keep.

A policy reads no clock and no file. `a | b` keeps each checkpoint that `a` or `b` keeps. A policy never selects a
record again that it once did not select, however many newer records come. Therefore pruning after every save ends
where pruning once at the end ends.

`policy & bound` comes last, and is in the module `bounds`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from keras_ckpt.errors import MonitorError
from keras_ckpt.store import tables
from keras_ckpt.store.record import CheckpointRecord, Mode

if TYPE_CHECKING:
    from keras_ckpt.store.bounds import Bound

Select = Callable[["PreservationPolicy", Sequence[CheckpointRecord]], set[int]]
"""The selection of a policy, by itself or by a rule beside it."""


class Verdict(NamedTuple):
    """Whether a policy keeps a checkpoint, and why."""

    kept: bool
    reason: str


class PreservationPolicy:
    """Base class of the policies, which select the checkpoints to keep.

    A custom policy is a subclass with one method, `select`. It must be a pure function: the same records give the
    same answer. A record that it did not select must stay unselected when newer records are added.

    Example:

    ```python
    class KeepRoundSteps(keras_ckpt.PreservationPolicy):
        def select(self, records):
            return {record.step for record in records if record.step % 1000 == 0}

    keep = KeepRoundSteps() | keras_ckpt.LatestN(2)
    ```
    """

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        """Chooses the checkpoints to keep.

        Args:
            records: The records of one directory, with distinct steps, oldest first in the order of saving.

        Returns:
            The steps to keep.
        """
        raise NotImplementedError(f"{type(self).__name__} must define select(records), which returns a set of steps.")

    def why_not(self, records: Sequence[CheckpointRecord]) -> Mapping[int, str]:
        """Explains the checkpoints that `select` does not choose, with the numbers that decided.

        All at once, because an explanation of each alone would rank all records again. A custom policy may omit it.

        Args:
            records: The records that `select` was given.

        Returns:
            For each step that is not selected the reason, such as `"0.93159 is 4th"`.
        """
        return {}

    def explain(self, records: Sequence[CheckpointRecord]) -> dict[int, Verdict]:
        """The verdict on each record, by its step: the policies that keep it, or the reason of each that does not."""
        parts = [(repr(part), selection(part, records), part.why_not(records)) for part in self.parts]
        verdicts = {}
        for step in (record.step for record in records):
            kept = ", ".join(name for name, selected, _ in parts if step in selected)
            why_not = "; ".join(f"{name}: {reasons.get(step, 'not selected')}" for name, _, reasons in parts)
            verdicts[step] = Verdict(bool(kept), kept or why_not)
        return verdicts

    @property
    def monitors(self) -> frozenset[str]:
        """The metrics that the policy ranks by."""
        return frozenset()

    def preferred(self, records: Sequence[CheckpointRecord]) -> list[int]:
        """The selected steps in the order of their worth, by which a bound decides: the newest first."""
        selected = selection(self, records)
        return [record.step for record in reversed(oldest_first(records)) if record.step in selected]

    def within(self, records: Sequence[CheckpointRecord], select: Select) -> set[int]:
        """The steps that `select` keeps within the bounds of this policy."""
        return select(self, records)

    @property
    def parts(self) -> tuple[PreservationPolicy, ...]:
        """The policies that `|` joined into this policy, without bounds; otherwise only the policy itself."""
        return (self,)

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """The bounds that `&` put on this policy."""
        return ()

    @property
    def unranked(self) -> PreservationPolicy | None:
        """The policy while nothing can be ranked: the bounds alone. `None` keeps everything."""
        return None

    def bounding(self, policy: PreservationPolicy) -> PreservationPolicy:
        """The result of `policy & self`. Only a bound has one."""
        advice = f"Write {self & policy!r}" if policy.bounds else f"To keep what either keeps, write {policy | self!r}"
        raise TypeError(f"`&` bounds a policy by MaxBytes or MaxCount. {advice}. Received: {policy!r} & {self!r}")

    def resolve(self, monitor: str | None, mode_of: Callable[[str], Mode]) -> PreservationPolicy:
        """This policy with its open arguments filled in.

        Args:
            monitor: The metric for a policy without a metric, or `None`.
            mode_of: Returns the mode of a metric for a policy without a mode. It may raise.
        """
        return self

    def __repr__(self) -> str:
        """The source text of the policy, without its open arguments."""
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        values = [getattr(self, field.name) for field in fields]
        return f"{type(self).__name__}({', '.join(repr(value) for value in values if value is not None)})"

    def __or__(self, other: PreservationPolicy) -> PreservationPolicy:
        if not isinstance(other, PreservationPolicy):
            raise TypeError(f"`|` joins a policy with another policy. Received: {other!r}")
        if self.bounds or other.bounds:
            raise TypeError(
                "A bound comes last and bounds the whole. Python evaluates `&` before `|`, so brackets are needed. "
                f"Write {joined(self, other)!r}. Received: {self!r} | {other!r}"
            )
        return _AnyOf((*self.parts, *(part for part in other.parts if part not in self.parts)))

    def __and__(self, bound: PreservationPolicy) -> PreservationPolicy:
        if not isinstance(bound, PreservationPolicy):
            raise TypeError(f"`&` bounds a policy by MaxBytes or MaxCount. Received: {self!r} & {bound!r}")
        return bound.bounding(self)


@dataclasses.dataclass(frozen=True, repr=False)
class CountedPolicy(PreservationPolicy):
    """A policy with a number of at least 1."""

    n: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        if isinstance(self.n, bool) or not isinstance(self.n, numbers.Integral):
            raise TypeError(f"{name} expected a whole number of at least 1. Received: {self.n!r}")
        if self.n < 1:
            raise ValueError(f"{name} expected n >= 1; omit the policy to keep none of its kind. Received: {self.n!r}")


@dataclasses.dataclass(frozen=True, repr=False)
class LatestN(CountedPolicy):
    """Keeps the `n` newest checkpoints, in the order of saving.

    Example:

    ```python
    keras_ckpt.ModelCheckpoint("runs/digits", keep=keras_ckpt.LatestN(3))
    ```

    Args:
        n: The number of checkpoints, at least 1.
    """

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        return {record.step for record in oldest_first(records)[-self.n :]}

    def why_not(self, records: Sequence[CheckpointRecord]) -> Mapping[int, str]:
        steps = [record.step for record in oldest_first(records)]
        newer = [str(step) for step in steps[: -self.n - 1 : -1]]
        return dict.fromkeys(steps[: -self.n], f"{_and(newer)} {'is' if self.n == 1 else 'are'} newer")


@dataclasses.dataclass(frozen=True, repr=False)
class BestN(CountedPolicy):
    """Keeps the `n` best checkpoints by a metric.

    With equal values, the earlier checkpoint is better. A checkpoint whose metric is missing, NaN or infinite is never
    best.

    Example:

    ```python
    keep = keras_ckpt.BestN(3, "val_accuracy", "max") | keras_ckpt.LatestN(2)
    ```

    Args:
        n: The number of checkpoints, at least 1.
        monitor: The metric's name. Defaults to the metric that the callback monitors.
        mode: `"min"` if smaller is better, `"max"` if larger is better. Defaults to the callback's mode, or to the
            metric's mode in the sidecars.
    """

    monitor: str | None = None
    mode: Mode | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.monitor is not None and not isinstance(self.monitor, str):
            raise TypeError(f"BestN expected the name of a metric. Received: monitor={self.monitor!r}")
        if self.mode not in (None, "min", "max"):
            raise ValueError(f"BestN expected mode 'min' or 'max'. Received: mode={self.mode!r}")

    @property
    def monitors(self) -> frozenset[str]:
        return frozenset(() if self.monitor is None else (self.monitor,))

    def resolve(self, monitor: str | None, mode_of: Callable[[str], Mode]) -> PreservationPolicy:
        monitor = self.monitor if self.monitor is not None else monitor
        if monitor is None:
            raise MonitorError(f"{self!r} has no metric to rank by. Give it a metric: BestN({self.n}, 'val_loss')")
        return BestN(self.n, monitor, self.mode or mode_of(monitor))

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        return set(self._ranked(records)[: self.n])

    def why_not(self, records: Sequence[CheckpointRecord]) -> Mapping[int, str]:
        values = {record.step: record.metrics.get(str(self.monitor)) for record in records}
        reasons = {
            step: f"{self.monitor} is {tables.metric(value) or 'missing'}"
            for step, value in values.items()
            if value is None or not math.isfinite(value)
        }
        for place, step in enumerate(self._ranked(records)[self.n :], self.n + 1):
            reasons[step] = f"{tables.metric(values[step])} is {tables.ordinal(place)}"
        return reasons

    def preferred(self, records: Sequence[CheckpointRecord]) -> list[int]:
        """The selected steps, the best first."""
        return self._ranked(records)[: self.n]

    def _ranked(self, records: Sequence[CheckpointRecord]) -> list[int]:
        """The steps of the records with a finite value, the best first."""
        if self.monitor is None or self.mode is None:
            raise MonitorError(
                f"{self!r} has no metric to rank by, or no mode. "
                f"Expected for example BestN({self.n}, 'val_loss', 'min')"
            )
        sign = 1 if self.mode == "min" else -1
        values = [(record.finite(self.monitor), record.sequence, record.step) for record in records]
        ranked = sorted((sign * value, sequence, step) for value, sequence, step in values if value is not None)
        return [step for _, _, step in ranked]


@dataclasses.dataclass(frozen=True, repr=False)
class EveryNSteps(CountedPolicy):
    """Keeps, for each multiple of `n` steps, the first checkpoint at or after it and before the next multiple.

    Zero is also a multiple: the first checkpoint of a run stays.

    Example:

    ```python
    keep = keras_ckpt.EveryNSteps(10_000) | keras_ckpt.LatestN(2)
    ```

    Args:
        n: The interval in steps, at least 1.
    """

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        return set(self._first(records).values())

    def why_not(self, records: Sequence[CheckpointRecord]) -> Mapping[int, str]:
        first = self._first(records)
        return {
            record.step: f"{first[multiple]} is the first of {multiple * self.n} to {(multiple + 1) * self.n - 1}"
            for record in records
            if first[multiple := record.step // self.n] != record.step
        }

    def _first(self, records: Sequence[CheckpointRecord]) -> dict[int, int]:
        return _first_of_each((record.step // self.n, record.step, record.step) for record in records)


@dataclasses.dataclass(frozen=True, repr=False)
class EveryNEpochs(CountedPolicy):
    """Keeps, for each multiple of `n` epochs, the first checkpoint at or after it and before the next multiple.

    Zero is also a multiple: the first checkpoint of a run stays. A checkpoint whose epoch is not known is not kept.

    Example:

    ```python
    keep = keras_ckpt.EveryNEpochs(10) | keras_ckpt.BestN(1)
    ```

    Args:
        n: The interval in epochs, at least 1.
    """

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        return set(self._first(records).values())

    def why_not(self, records: Sequence[CheckpointRecord]) -> Mapping[int, str]:
        first = self._first(records)
        reasons = {}
        for record in records:
            if record.epoch is None:
                reasons[record.step] = "its epoch is not known"
            elif (step := first[record.epoch // self.n]) != record.step:
                since = record.epoch // self.n * self.n
                until = f"s {since} to {since + self.n - 1}" if self.n > 1 else f" {since}"
                reasons[record.step] = f"{step} is the first of epoch{until}"
        return reasons

    def _first(self, records: Sequence[CheckpointRecord]) -> dict[int, int]:
        return _first_of_each(
            (record.epoch // self.n, (record.epoch, record.step), record.step)
            for record in records
            if record.epoch is not None
        )


@dataclasses.dataclass(frozen=True, repr=False)
class EveryNHours(PreservationPolicy):
    """Keeps the oldest checkpoint, and each checkpoint saved at least `hours` after the last kept one.

    The policy uses the times in the records, never the clock of the pruning machine: a paused run loses no
    checkpoints. After a clock was set back, the difference counts in either direction.

    Example:

    ```python
    keep = keras_ckpt.EveryNHours(6) | keras_ckpt.LatestN(2)
    ```

    Args:
        hours: The interval in hours, greater than 0.
    """

    hours: float

    def __post_init__(self) -> None:
        hours = self.hours
        if isinstance(hours, bool) or not isinstance(hours, numbers.Real):
            raise TypeError(f"EveryNHours expected a number of hours. Received: {hours!r}")
        if not (math.isfinite(hours) and hours > 0):
            raise ValueError(f"EveryNHours expected hours > 0. Received: {hours!r}")

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        return {record.step for record, last in self._last(records) if record is last}

    def why_not(self, records: Sequence[CheckpointRecord]) -> Mapping[int, str]:
        return {
            record.step: f"{tables.duration(abs(record.time - last.time))} "
            f"{'after' if record.time >= last.time else 'before'} {last.step}"
            for record, last in self._last(records)
            if record is not last
        }

    def _last(self, records: Sequence[CheckpointRecord]) -> Iterator[tuple[CheckpointRecord, CheckpointRecord]]:
        """Each record with the last that is kept then, which may be the record itself."""
        last: CheckpointRecord | None = None
        for record in oldest_first(records):
            if last is None or abs(record.time - last.time) >= self.hours * 3600:
                last = record
            yield record, last


@dataclasses.dataclass(frozen=True, repr=False)
class _AnyOf(PreservationPolicy):
    """The result of `a | b`: keeps each checkpoint that any of its policies keeps."""

    policies: tuple[PreservationPolicy, ...]

    @property
    def monitors(self) -> frozenset[str]:
        return frozenset().union(*(policy.monitors for policy in self.policies))

    @property
    def parts(self) -> tuple[PreservationPolicy, ...]:
        return self.policies

    def resolve(self, monitor: str | None, mode_of: Callable[[str], Mode]) -> PreservationPolicy:
        return _AnyOf(tuple(policy.resolve(monitor, mode_of) for policy in self.policies))

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        return set().union(*(selection(policy, records) for policy in self.policies))

    def preferred(self, records: Sequence[CheckpointRecord]) -> list[int]:
        """The selected steps of the first policy, then those of the second, and so on."""
        return list(itertools.chain.from_iterable(policy.preferred(records) for policy in self.policies))

    def __repr__(self) -> str:
        return " | ".join(repr(policy) for policy in self.policies)


def joined(first: PreservationPolicy, second: PreservationPolicy) -> PreservationPolicy:
    """The union of two policies, within the bounds of both."""
    bounds = (*first.bounds, *second.bounds)
    policies = [part for part in (*first.parts, *second.parts) if part not in bounds]
    union = [functools.reduce(operator.or_, policies)] if policies else []
    return functools.reduce(operator.and_, (*union, *bounds))


def as_policy(keep: PreservationPolicy | int | None) -> PreservationPolicy | None:
    """The policy of a `keep` argument: a policy is itself, an int `n` is `LatestN(n)`, `None` keeps all."""
    if keep is None or isinstance(keep, PreservationPolicy):
        return keep
    if isinstance(keep, numbers.Integral) and not isinstance(keep, bool):
        if keep < 1:
            raise ValueError(f"keep expected a number of at least 1, or None to keep all. Received: {keep!r}")
        return LatestN(int(keep))
    raise TypeError(
        "keep must be None (keep all), an int (the number of newest checkpoints) or a policy such as "
        f"keras_ckpt.BestN(3) | keras_ckpt.LatestN(2). Received: {keep!r}"
    )


def selection(policy: PreservationPolicy, records: Sequence[CheckpointRecord]) -> set[int]:
    """The checked selection of a policy: a custom policy may select only records that it received.

    Raises:
        TypeError: The policy did not return steps.
        ValueError: The policy returned steps of no record.
    """
    records = oldest_first(records)
    answer = policy.select(records)
    try:
        selected = set(answer)
        unknown = selected - {record.step for record in records}
    except TypeError as error:
        raise TypeError(f"{policy!r} must return a set of steps from select(). Received: {answer!r}") from error
    if unknown:
        raise ValueError(
            f"{policy!r} selected steps that it was not given: {sorted(map(repr, unknown))[:5]}. "
            "select() must return a set of the steps of the records to keep."
        )
    return selected


def is_known(policy: PreservationPolicy) -> bool:
    """Whether all parts are this package's policies."""
    return all(type(part).__module__.startswith("keras_ckpt.") for part in policy.parts)


def is_final(policy: PreservationPolicy) -> bool:
    """Whether a record that is unselected among the newest stays unselected among all.

    The choice of a bound and of `EveryNHours` depends on older records.
    """
    return is_known(policy) and not policy.bounds and not any(isinstance(part, EveryNHours) for part in policy.parts)


def kept_in_training(policy: PreservationPolicy, records: Sequence[CheckpointRecord]) -> set[int]:
    """The steps to keep during training: the policy's selection, and more while the policy cannot rank.

    A policy that ranks by a metric without values would delete all records. Until a record has the metric, all records
    of an epoch's end stay. Once the metric is known to be missing, all records stay. Bounds hold in any case.
    """
    return policy.within(records, _selection_or_more)


def _selection_or_more(policy: PreservationPolicy, records: Sequence[CheckpointRecord]) -> set[int]:
    """The steps to keep during training, without bounds."""
    selected = selection(policy, records)
    for monitor in policy.monitors:
        if missing(monitor, records):
            return {record.step for record in records}
        if not any(monitor in record.metrics for record in records):
            selected |= {record.step for record in records if not record.batch}
    return selected


def missing(monitor: str, records: Sequence[CheckpointRecord]) -> bool:
    """Whether no record has the metric, although a record of an epoch's end has metrics of its kind."""
    kind = "val_" if monitor.startswith("val_") else ""
    measured = (name for record in records if not record.batch for name in record.metrics)
    return any(name.startswith(kind) for name in measured) and not any(monitor in record.metrics for record in records)


def oldest_first(records: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
    """Records in the order of saving."""
    return sorted(records, key=lambda record: record.sequence)


def _first_of_each(entries: Iterable[tuple[int, Any, int]]) -> dict[int, int]:
    """For each group the step of its smallest entry. An entry is (group, order, step)."""
    first: dict[int, int] = {}
    for group, _, step in sorted(entries):
        first.setdefault(group, step)
    return first


def _and(words: Sequence[str]) -> str:
    """A list of words in a sentence, of which a long one is cut."""
    shown = [*words[:2], f"{len(words) - 2} more"] if len(words) > 3 else words
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))
