"""The report of a restore: what went where, in names of variables, short enough for a screen."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping

_LINES = 12


@dataclasses.dataclass(frozen=True)
class RestoreReport:
    """What `restore` did, by the names of variables.

    A name that begins with `learned/` is that of something a layer learned beyond its variables: a vocabulary, the
    boundaries of bins.

    Attributes:
        prefix: The checkpoint.
        step: Its step, `None` if it has no sidecar.
        epoch: Epochs completed there, for `fit(initial_epoch=...)`; `None` if it is not known.
        matched: Restored.
        missing: In the model, not in the checkpoint; left as they were.
        unexpected: In the checkpoint, not in the model.
        mismatched: In both, and left as they were; each with the reason.
    """

    prefix: str
    step: int | None
    epoch: int | None
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, str]

    def __str__(self) -> str:
        wanted = [*self.matched, *self.missing, *self.mismatched]
        parts = ("model", "learned", "optimizer", "losses", "metrics")
        counts = {part: (_count(self.matched, part), _count(wanted, part)) for part in parts}
        restored = ", ".join(f"{part} {done} of {total}" for part, (done, total) in counts.items() if total)
        at = "" if self.step is None else f" at step {self.step}"
        lines = [f"restored {self.prefix}{at}: {restored}"]
        lines += _block("learned", [name.removeprefix("learned/") for name in self.matched if _is_learned(name)])
        lines += _block("not in the checkpoint, left as they were", by_layer(self.missing))
        lines += _block("in the checkpoint, not in the model", by_layer(self.unexpected))
        lines += _block("in both, left as they were", _by_reason(self.mismatched))
        return "\n".join(lines)

    __repr__ = __str__


def by_layer(names: Iterable[str]) -> list[str]:
    """Layers with the numbers of their variables. Metrics are left out: nobody misses what they counted."""
    counts = collections.Counter(name.rpartition("/")[0] for name in names if not name.startswith("metrics/"))
    return [f"{layer} ({count})" for layer, count in counts.items()]


def shortened(lines: list[str]) -> list[str]:
    """Lines, of many only the first."""
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"    and {len(lines) - _LINES + 1} more"]


def _is_learned(name: str) -> bool:
    return name.startswith("learned/")


def _count(names: Iterable[str], part: str) -> int:
    return sum(name == part or name.startswith(f"{part}/") for name in names)


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """The reasons, those that hold for several variables once with their layers."""
    names = collections.defaultdict(list)
    for name, reason in reasons.items():
        names[reason].append(name)
    return [f"{each[0] if len(each) == 1 else ', '.join(by_layer(each))}: {why}" for why, each in names.items()]


def _block(title: str, lines: list[str]) -> list[str]:
    return [f"  {title}:", *shortened([f"    {line}" for line in lines])] if lines else []
