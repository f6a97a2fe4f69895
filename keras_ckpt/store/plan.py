"""The plan of a prune: which checkpoints a policy would keep and remove, and why."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from keras_ckpt.errors import CheckpointError, MonitorError
from keras_ckpt.store import overview, tables
from keras_ckpt.store.listing import Listing, freed
from keras_ckpt.store.policies import BestN, PreservationPolicy
from keras_ckpt.store.record import CheckpointRecord, Mode


class Decision(NamedTuple):
    """A plan's decision for one checkpoint: kept or removed, and why.

    Example:

    ```python
    plan = keras_ckpt.CheckpointDirectory("runs/digits").plan(keras_ckpt.LatestN(1))
    for decision in plan.decisions:
        print(decision.record.step, decision.kept, decision.reason)
    ```

    Attributes:
        record: The checkpoint.
        kept: Whether the checkpoint stays.
        reason: Why.
        size: The bytes of a kept checkpoint. For a removed checkpoint, the bytes that its removal frees after the
            removals before it; files shared with a kept checkpoint free nothing.
    """

    record: CheckpointRecord
    kept: bool
    reason: str
    size: int


@dataclasses.dataclass(frozen=True, repr=False)
class PrunePlan(tables.Shown):
    """The checkpoints that a policy would keep and remove, and why. Only `CheckpointDirectory.prune(plan)` removes.

    Example:

    ```python
    runs = keras_ckpt.CheckpointDirectory("runs/digits")
    plan = runs.plan(keras_ckpt.LatestN(1) | keras_ckpt.BestN(1, "val_loss", "min"))
    print(plan)
    runs.prune(plan)
    ```

    Attributes:
        policy: The policy, with its monitor and mode filled in.
        decisions: One decision for each checkpoint, oldest first.
        listing: The contents of the directory when the plan was made.
    """

    policy: PreservationPolicy
    decisions: tuple[Decision, ...]
    listing: Listing

    @property
    def kept(self) -> tuple[CheckpointRecord, ...]:
        return tuple(decision.record for decision in self.decisions if decision.kept)

    @property
    def removed(self) -> tuple[CheckpointRecord, ...]:
        return tuple(decision.record for decision in self.decisions if not decision.kept)

    def _table(self) -> tables.Table:
        ranking = rank(self.listing, self.policy)
        return overview.of_plan(self.policy, self.decisions, self.listing, ranking)


def resolved(policy: PreservationPolicy, listing: Listing, unknown: type[CheckpointError]) -> PreservationPolicy:
    """The policy with its open monitor and mode filled in from the sidecars.

    Raises:
        CheckpointError: An error of the type `unknown`: no checkpoint has a metric that the policy ranks by.
        MonitorError: Neither the policy nor the sidecars give the metric, or its mode.
    """
    modes = {name: mode for record in listing.records for name, mode in record.known_modes.items()}
    known = sorted({name for record in listing.records for name in record.metrics})

    def mode_of(monitor: str) -> Mode:
        if monitor in modes:
            return modes[monitor]
        raise MonitorError(
            f"No sidecar says whether a smaller or a larger {monitor!r} is better: give the mode, 'min' or 'max'."
        )

    # An unknown metric is the worse mistake, so this error comes first.
    _refuse_unknown(policy, known, unknown)
    complete = policy.resolve(listing.records[-1].monitor, mode_of)
    _refuse_unknown(complete, known, unknown)
    return complete


def rank(listing: Listing, policy: PreservationPolicy) -> overview.Ranking:
    """The metrics that a policy ranks by, or else the metric that training monitored, and the best checkpoints."""
    first = [BestN(1, part.monitor, part.mode) for part in policy.parts if isinstance(part, BestN)] or [BestN(1)]
    if not listing.records:
        return overview.Ranking()
    try:
        complete = resolved(functools.reduce(operator.or_, first), listing, MonitorError)
    except MonitorError:
        return overview.Ranking()
    return overview.Ranking(complete.monitors, complete.select(listing.records))


def _refuse_unknown(policy: PreservationPolicy, known: Sequence[str], error: type[CheckpointError]) -> None:
    for monitor in sorted(policy.monitors.difference(known)):
        close = difflib.get_close_matches(monitor, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise error(
            f"{policy!r} ranks by {monitor!r}, which no checkpoint has. "
            f"Recorded metrics: {', '.join(known) or 'none'}.{hint}"
        )


def decide(policy: PreservationPolicy, records: Sequence[CheckpointRecord]) -> Iterator[Decision]:
    """The decision of a policy for each checkpoint, oldest first. A pin keeps a checkpoint too."""
    verdicts = policy.explain(records)
    reasons: dict[CheckpointRecord, list[str]] = {}
    for record in records:
        reasons[record] = [verdicts[record.step].reason] if verdicts[record.step].kept else []
        if record.pin is not None:
            reasons[record].append(f"pinned: {record.pin}" if record.pin else "pinned")
    sizes = iter(freed([record for record in records if not reasons[record]]))
    for record, why in reasons.items():
        reason = ", ".join(why) or verdicts[record.step].reason
        yield Decision(record, bool(why), reason, record.size if why else next(sizes))
