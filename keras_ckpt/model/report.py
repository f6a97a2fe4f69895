"""The report of a restore: restored and differing variables by name, short enough for a screen."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from keras_ckpt.store.tables import Column, Shown, Table

_LINES = 12


@dataclasses.dataclass(frozen=True)
class RestoreReport(Shown):
    """The result of `restore`, by the names of variables.

    A name that begins with `learned/` names the state of a layer beyond its variables: a vocabulary, the boundaries of
    bins.

    Example:

    ```python
    report = keras_ckpt.restore(model, "runs/digits", strict=False)
    print(report.step, report.missing, report.unexpected, dict(report.mismatched))
    ```

    Attributes:
        prefix: The prefix of the checkpoint.
        step: The step of the checkpoint, `None` if it has no sidecar.
        epoch: The epochs completed in the checkpoint, for `fit(initial_epoch=...)`; `None` if not known.
        matched: The names that were restored.
        missing: The names in the model, not in the checkpoint; left as they were.
        unexpected: The names in the checkpoint, not in the model.
        mismatched: The names in both that were left as they were; each with the reason.
        other_backend: The backend of Keras that saved the checkpoint, if it is not the present one: `"jax"`. A further
            training draws other random numbers than on that backend, so it is no exact continuation of the run.
    """

    prefix: str
    step: int | None
    epoch: int | None
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, str]
    other_backend: str | None = None

    def __str__(self) -> str:
        restored = ", ".join(f"{part} {done} of {total}" for part, done, total in self._counts())
        lines = [f"{self._title()}: {restored}"]
        for title, names in self._lists():
            lines += [f"  {title}:", *(f"    {line}" for line in names)]
        lines += [f"  {note}" for note in self._notes()]
        return "\n".join(lines)

    __repr__ = __str__

    def _table(self) -> Table:
        counts = self._counts()
        columns = (
            Column("part", tuple(part for part, _, _ in counts), words=True),
            Column("restored", tuple(str(done) for _, done, _ in counts)),
            Column("of", tuple(str(total) for _, _, total in counts)),
        )
        notes = [f"{title}: {', '.join(lines)}" for title, lines in self._lists()]
        return Table(self._title(), columns, (*notes, *self._notes()))

    def _title(self) -> str:
        at = "" if self.step is None else f" at step {self.step}"
        return f"restored {self.prefix}{at}"

    def _counts(self) -> list[tuple[str, int, int]]:
        """The parts of the model with the numbers of restored and of all names."""
        wanted = [*self.matched, *self.missing, *self.mismatched]
        parts = ("model", "learned", "optimizer", "losses", "metrics")
        counts = [(part, _count(self.matched, part), _count(wanted, part)) for part in parts]
        return [(part, done, total) for part, done, total in counts if total]

    def _notes(self) -> list[str]:
        """The line about another backend, if one saved the checkpoint."""
        if self.other_backend is None:
            return []
        return [f"saved on the backend {self.other_backend}: random numbers differ, so no training continues exactly"]

    def _lists(self) -> list[tuple[str, list[str]]]:
        """The titles and the lines of the lists of names, without empty lists."""
        lists = {
            "learned": [name.removeprefix("learned/") for name in self.matched if name.startswith("learned/")],
            "not in the checkpoint, left as they were": by_layer(self.missing),
            "in the checkpoint, not in the model": by_layer(self.unexpected),
            "in both, left as they were": _by_reason(self.mismatched),
        }
        return [(title, shortened(lines)) for title, lines in lists.items() if lines]


def by_layer(names: Iterable[str]) -> list[str]:
    """The layers with the numbers of their variables. Metrics are skipped, because each epoch resets them."""
    counts = collections.Counter(name.rpartition("/")[0] for name in names if not name.startswith("metrics/"))
    return [f"{layer} ({count})" for layer, count in counts.items()]


def shortened(lines: list[str]) -> list[str]:
    """The lines, cut to the first ones if there are many."""
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"and {len(lines) - _LINES + 1} more"]


def _count(names: Iterable[str], part: str) -> int:
    return sum(name == part or name.startswith(f"{part}/") for name in names)


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """The reasons with their variables. A reason of several variables is given once, with their layers."""
    names = collections.defaultdict(list)
    for name, reason in reasons.items():
        names[reason].append(name)
    return [f"{each[0] if len(each) == 1 else ', '.join(by_layer(each))}: {why}" for why, each in names.items()]
