"""The journal of a directory: a file to which each event of a run is appended. No decision reads it.

The journal tells what the checkpoints on disk cannot tell: which checkpoints there were, why they are gone, and the
metrics of each epoch. It is best effort. A missing, cut or foreign journal is a past that is not known. The norm is
docs/format.md.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import getpass
import io
import operator
import os
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import msgspec

from keras_ckpt.store import layout
from keras_ckpt.store.bounds import MaxBytes, MaxCount
from keras_ckpt.store.files import Folder
from keras_ckpt.store.periods import Daily, KeepWithin, Monthly, Weekly
from keras_ckpt.store.policies import BestN, EveryNEpochs, EveryNHours, EveryNSteps, LatestN, PreservationPolicy
from keras_ckpt.store.reading import Stamp
from keras_ckpt.store.record import CheckpointRecord, Count, Metric, Mode, from_json, to_json

EventKind = Literal[
    "run", "restored", "epoch", "saved", "skipped", "failed", "removed", "pinned", "unpinned", "metrics", "ended"
]
TRAINING = "callback"
"""The author of the events of a training."""
_LINE = 4096
"""The largest size of a line in bytes. One write of this size is not mixed with the writes of other processes."""
_SIZE = 64 << 20
"""The largest size of a journal in bytes: nothing more is written, and nothing more is read."""
_POLICIES: dict[str, Callable[..., PreservationPolicy]] = {
    kind.__name__: kind
    for kind in (LatestN, BestN, EveryNSteps, EveryNEpochs, EveryNHours, Daily, Weekly, Monthly, KeepWithin)
}
_POLICIES |= {kind.__name__: kind for kind in (MaxBytes, MaxCount)}
_TEXTS = ("run_id", "name", "reason", "why", "by", "error", "monitor")


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """An event of a run: one line of its journal.

    Example:

    ```python
    for event in keras_ckpt.CheckpointDirectory("runs/digits").events():
        print(event.kind, event.step, event.why)
    ```

    Attributes:
        at: When the event was written, in seconds since 1970; 0 before.
        kind: `"run"`: a fit begins a run. `"restored"`: a fit continues the run from the step. `"epoch"`: an epoch
            has ended. `"saved"`: a checkpoint was saved, or got the metrics of the epoch's end. `"skipped"`: a save
            was due, or the loss was not finite, and no save was made. `"failed"`: a save failed. `"removed"`,
            `"pinned"`, `"unpinned"`: of a checkpoint. `"metrics"`: a checkpoint got metrics. `"ended"`: a fit has
            ended.
        step: Training batches completed since the run began.
        run_id: The run.
        epoch: Epochs completed since the run began; `None` if not known.
        batch: Batches completed in the current epoch; `None` if not known.
        name: The name of the checkpoint.
        sequence: The place of the checkpoint in the order of saving.
        metrics: The metrics of the step, by name.
        monitor: The monitored metric, where a fit begins.
        mode: Whether smaller (`"min"`) or larger (`"max"`) values of the monitor are better.
        reason: The trigger of a save, or the reason of a pin.
        why: The reason why a checkpoint was removed, or why a save was skipped.
        by: Who did it: `"callback"` for the training, a user and a host for a notebook or a command line.
        size: The bytes of the checkpoint.
        policy: The policy that retains checkpoints, where a fit begins: each part and each bound with its arguments.
            Empty for a policy of the user's own.
        error: The error of a failed save.
        versions: The versions of Python and of the packages, where a fit begins.
    """

    at: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    kind: EventKind
    step: Count
    run_id: str = ""
    epoch: Count | None = None
    batch: Count | None = None
    name: str = ""
    sequence: Count = 0
    metrics: dict[str, Metric] = {}
    monitor: str = ""
    mode: Mode | None = None
    reason: str = ""
    why: str = ""
    by: str = TRAINING
    size: Count = 0
    policy: list[list[Any]] = []
    error: str = ""
    versions: dict[str, str] = {}

    @property
    def identity(self) -> tuple[str, int, int]:
        """The identity of the checkpoint, as in its record."""
        return self.run_id, self.sequence, self.step


def of_record(kind: EventKind, record: CheckpointRecord, **facts: Any) -> Event:
    """An event of a checkpoint."""
    return Event(
        kind=kind,
        step=record.step,
        run_id=record.run_id,
        epoch=record.epoch,
        batch=record.batch,
        name=record.name,
        sequence=record.sequence,
        **facts,
    )


def of_save(record: CheckpointRecord, kind: EventKind = "saved", **facts: Any) -> Event:
    """An event of a save, with all facts that stay known when the checkpoint is removed."""
    return of_record(kind, record, metrics=record.metrics, reason=record.reason, size=record.size, **facts)


def written(policy: PreservationPolicy | None) -> list[list[Any]]:
    """A policy as an event has it."""
    # A bound alone is its own part.
    parts = [] if policy is None else list(dict.fromkeys([*policy.parts, *policy.bounds]))
    if any(type(part) not in _POLICIES.values() for part in parts):
        return []
    return [[type(part).__name__, *map(_plain, vars(part).values())] for part in parts]


def policy_of(event: Event) -> PreservationPolicy | None:
    """The policy of an event; `None` if the event has none, or has one that this version cannot read."""
    with contextlib.suppress(LookupError, TypeError, ValueError):
        parts = [_POLICIES[name](*arguments) for name, *arguments in event.policy]
        policies, bounds = [[part for part in parts if bool(part.bounds) is limits] for limits in (False, True)]
        union = [functools.reduce(operator.or_, policies)] if policies else []
        return functools.reduce(operator.and_, [*union, *bounds])
    return None


def _plain(value: Any) -> Any:
    return f"{value.total_seconds()} seconds" if isinstance(value, datetime.timedelta) else value


def user() -> str:
    """The user and the host of this process."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container may run as a user without a name
        name = str(os.getuid())
    return f"{name}@{os.uname().nodename}"


class Journal:
    """The journal of a series.

    Args:
        folder: The directory, opened as its series.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def append(self, *events: Event) -> None:
        """Appends events, as far as possible: an error never reaches the caller."""
        with contextlib.suppress(OSError), self._place(create=True) as place:
            for event in events:
                place.append(layout.JOURNAL, _line(event), _SIZE)

    def read(self) -> list[Event]:
        """The events in the order of writing, without the lines that cannot be read."""
        with contextlib.suppress(OSError), self._place() as place:
            size = min(place.size(layout.JOURNAL), _SIZE)
            return list(_events(place.read_range(layout.JOURNAL, 0, size)))
        return []

    def stamp(self) -> Stamp | None:
        """A stamp that differs once an event was appended; `None` without a journal."""
        with contextlib.suppress(OSError), self._place() as place:
            return place.stamp(layout.JOURNAL)
        return None

    def remove(self) -> None:
        """Removes the journal."""
        with contextlib.suppress(FileNotFoundError), self._place() as place:
            place.remove(layout.JOURNAL)

    @contextlib.contextmanager
    def _place(self, *, create: bool = False) -> Iterator[Folder]:
        """The folder of the journal. The folder of a script is not littered with the journals of its templates."""
        if not self._folder.series.template:
            yield self._folder
            return
        with self._folder.private(create=create) as private:
            yield private


def _line(event: Event) -> bytes:
    """The line of an event. Metrics are dropped, and texts are cut, if it would be too long."""
    event = msgspec.structs.replace(event, at=event.at or time.time(), metrics=to_json(event.metrics))
    size = _LINE
    while True:
        try:
            line = msgspec.json.encode(event) + b"\n"
        except UnicodeEncodeError:  # the name of a file may have bytes that are not UTF-8
            line = b""
        if line and len(line) < _LINE:  # one byte remains to end an incomplete line
            return line
        size //= 2
        texts = {name: getattr(event, name)[:size].encode(errors="replace").decode() for name in _TEXTS}
        metrics = {} if line else event.metrics
        event = msgspec.structs.replace(event, metrics=metrics, versions={}, policy=[], **texts)


_decode = msgspec.json.Decoder(Event).decode


def _events(data: bytes) -> Iterator[Event]:
    for line in io.BytesIO(data):
        # Text outside UTF-8 raises a ValueError.
        with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
            if len(line) <= _LINE:
                event = _decode(line)
                if any(isinstance(value, str) for value in event.metrics.values()):
                    event = msgspec.structs.replace(event, metrics=from_json(event.metrics))
                yield event
