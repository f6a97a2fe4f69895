"""Bounds: `policy & MaxBytes("50 GB")` keeps what the policy keeps, as far as it fits.

A bound is a fold over the saves. The records come one after another; after each, the policy and then the bound drop
some. So no record comes back, and pruning after every save ends where pruning once at the end ends. The plain
definition does not have these laws: of the selection, what fits. There an older record fits again once a newer one is
dropped.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set

from keras_ckpt.store import tables
from keras_ckpt.store.policies import (
    CountedPolicy,
    PreservationPolicy,
    Select,
    Verdict,
    oldest_first,
    selection,
)
from keras_ckpt.store.quantities import as_bytes
from keras_ckpt.store.record import CheckpointRecord, Mode


class Bound(PreservationPolicy):
    """Base class of the bounds. Alone, a bound keeps the newest checkpoints that fit."""

    @property
    def bounds(self) -> tuple[Bound, ...]:
        return (self,)

    @property
    def limit(self) -> int:
        """The largest amount."""
        raise NotImplementedError

    def amounts(self, record: CheckpointRecord) -> Iterable[tuple[Hashable, int]]:
        """The amounts of a record, each with a key. Records that share a key share the amount."""
        raise NotImplementedError

    def text(self, amount: int | None = None) -> str:
        """An amount for people, by default the largest."""
        raise NotImplementedError

    def bounding(self, policy: PreservationPolicy) -> PreservationPolicy:
        if isinstance(policy, _Bounded):
            return _Bounded(policy.policy, (*policy.limits, self))
        return _Bounded(policy, (self,))

    @property
    def unranked(self) -> PreservationPolicy | None:
        return self

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        return {record.step for record in records} - self.why_not(records).keys()

    def why_not(self, records: Sequence[CheckpointRecord]) -> Mapping[int, str]:
        present = _Present([self])
        waiting: collections.deque[CheckpointRecord] = collections.deque()
        reasons: dict[int, str] = {}
        for newest in oldest_first(records):
            present.add(newest)
            while waiting and (over := present.over()):
                present.drop(oldest := waiting.popleft())
                reasons[oldest.step] = _reason(over, newest)
            if not newest.pinned:
                waiting.append(newest)
        return reasons


@dataclasses.dataclass(frozen=True, repr=False)
class MaxBytes(Bound):
    """Bounds the bytes on disk of the checkpoints that a policy keeps.

    A file that checkpoints share counts once. If the checkpoints do not fit, the bound drops the last of an order until
    they do. The newest checkpoint is the first of the order, and stays, however large it is. Those of the first policy
    follow, then those of the second, and so on. `BestN` puts its best first, any other policy its newest. Pinned
    checkpoints stay, and count. Alone, the bound keeps the newest checkpoints that fit.

    Example:

    ```python
    keep = (keras_ckpt.BestN(3) | keras_ckpt.LatestN(2)) & keras_ckpt.MaxBytes("50 GB")
    ```

    Args:
        size: The largest size: a number of bytes, or a text with a unit. The units are kB, MB, GB, TB, PB, and KiB,
            MiB, GiB, TiB, PiB.
    """

    size: str | float

    def __post_init__(self) -> None:
        as_bytes(self.size, "MaxBytes")

    @property
    def limit(self) -> int:
        return as_bytes(self.size, "MaxBytes")

    def amounts(self, record: CheckpointRecord) -> Iterable[tuple[Hashable, int]]:
        return [(file.digest, file.size) for file in record.files]

    def text(self, amount: int | None = None) -> str:
        if amount is None and isinstance(self.size, str):
            return self.size
        return tables.size(self.limit if amount is None else amount)


@dataclasses.dataclass(frozen=True, repr=False)
class MaxCount(CountedPolicy, Bound):
    """Bounds the number of checkpoints that a policy keeps, by the order of `MaxBytes`. Pinned checkpoints count.

    Example:

    ```python
    keep = (keras_ckpt.BestN(3) | keras_ckpt.EveryNEpochs(10)) & keras_ckpt.MaxCount(20)
    ```

    Args:
        n: The largest number of checkpoints, at least 1.
    """

    @property
    def limit(self) -> int:
        return self.n

    def amounts(self, record: CheckpointRecord) -> Iterable[tuple[Hashable, int]]:
        return [(record.step, 1)]

    def text(self, amount: int | None = None) -> str:
        return tables.counted(self.n if amount is None else amount, "checkpoint")


@dataclasses.dataclass(frozen=True, repr=False)
class _Bounded(PreservationPolicy):
    """The result of `policy & bound`."""

    policy: PreservationPolicy
    limits: tuple[Bound, ...]

    @property
    def monitors(self) -> frozenset[str]:
        return self.policy.monitors

    @property
    def parts(self) -> tuple[PreservationPolicy, ...]:
        return self.policy.parts

    @property
    def bounds(self) -> tuple[Bound, ...]:
        return (*self.policy.bounds, *self.limits)

    @property
    def unranked(self) -> PreservationPolicy | None:
        return functools.reduce(operator.and_, self.bounds)

    def resolve(self, monitor: str | None, mode_of: Callable[[str], Mode]) -> PreservationPolicy:
        return dataclasses.replace(self, policy=self.policy.resolve(monitor, mode_of))

    def select(self, records: Sequence[CheckpointRecord]) -> set[int]:
        return self.within(records, selection)

    def within(self, records: Sequence[CheckpointRecord], select: Select) -> set[int]:
        return _fold(self.policy, self.limits, records, select)[0]

    def explain(self, records: Sequence[CheckpointRecord]) -> dict[int, Verdict]:
        verdicts: dict[int, Verdict] = {}

        def select(policy: PreservationPolicy, present: Sequence[CheckpointRecord]) -> set[int]:
            """Notes the verdicts on the records that are present. The last verdict on a record counts."""
            found = policy.explain(present)
            verdicts.update(found)
            return {step for step, verdict in found.items() if verdict.kept}

        _, reasons = _fold(self.policy, self.limits, records, select)
        return verdicts | {step: Verdict(False, reason) for step, reason in reasons.items()}

    def __repr__(self) -> str:
        policy = f"({self.policy!r})" if len(self.parts) > 1 else repr(self.policy)
        return " & ".join([policy, *map(repr, self.limits)])


class _Tally:
    """The amount that some records have together under a bound."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.total = 0
        self._uses: collections.Counter[Hashable] = collections.Counter()

    def add(self, record: CheckpointRecord) -> None:
        for key, amount in self.bound.amounts(record):
            self._uses[key] += 1
            self.total += amount * (self._uses[key] == 1)

    def subtract(self, record: CheckpointRecord) -> None:
        for key, amount in self.bound.amounts(record):
            self._uses[key] -= 1
            self.total -= amount * (self._uses[key] == 0)


class _Present:
    """The records that are there at one moment of a fold, by their steps, in the order of saving."""

    def __init__(self, bounds: Iterable[Bound], records: Iterable[CheckpointRecord] = ()) -> None:
        self._records: dict[int, CheckpointRecord] = {}
        self._tallies = [_Tally(bound) for bound in bounds]
        for record in records:
            self.add(record)

    @property
    def records(self) -> list[CheckpointRecord]:
        return list(self._records.values())

    def add(self, record: CheckpointRecord) -> None:
        self._records[record.step] = record
        for tally in self._tallies:
            tally.add(record)

    def drop(self, record: CheckpointRecord) -> None:
        del self._records[record.step]
        for tally in self._tallies:
            tally.subtract(record)

    def over(self) -> list[_Tally]:
        """The bounds that the records exceed."""
        return [tally for tally in self._tallies if tally.total > tally.bound.limit]


def excess(policy: PreservationPolicy, records: Iterable[CheckpointRecord]) -> str:
    """Tells by how much records exceed the bounds of a policy, `""` if they do not."""
    over = _Present(policy.bounds, records).over()
    return " and ".join(f"{tally.bound.text(tally.total)}, over {tally.bound.text()}" for tally in over)


def _fold(
    policy: PreservationPolicy, bounds: Iterable[Bound], records: Sequence[CheckpointRecord], select: Select
) -> tuple[set[int], dict[int, str]]:
    """Selects within bounds.

    The policy is asked when a bound is exceeded, and at the end. To ask it after each record would give the same,
    because of its laws.

    Returns:
        The selected steps, and for each step that a bound dropped the reason.
    """
    present = _Present(bounds)
    reasons: dict[int, str] = {}
    for newest in oldest_first(records):
        present.add(newest)
        if not present.over():
            continue
        selected = select(policy, present.records)
        for record in present.records:
            if record.step not in selected and not record.pinned:
                present.drop(record)
        for record in droppable(policy, present.records, selected) if present.over() else ():
            if over := present.over():
                present.drop(record)
                reasons[record.step] = _reason(over, newest)
    return select(policy, present.records), reasons


def _reason(over: Sequence[_Tally], newest: CheckpointRecord) -> str:
    """The reason why a checkpoint was dropped when a newer one came."""
    return f"over {over[0].bound.text()} when step {newest.step} came"


def droppable(
    policy: PreservationPolicy, records: Sequence[CheckpointRecord], selected: Set[int]
) -> list[CheckpointRecord]:
    """The records that a policy selects and a bound may drop, in the order in which it drops them.

    Args:
        policy: The policy.
        records: The records, oldest first.
        selected: The steps that the policy selects of them.
    """
    by_step = {record.step: record for record in reversed(records)}
    order = dict.fromkeys([*list(by_step)[:1], *policy.preferred(records), *by_step])
    droppable = [by_step[step] for step in order if step in selected][:0:-1]
    return [record for record in droppable if not record.pinned]
