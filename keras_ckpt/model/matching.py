"""The matching of a model's variables with a checkpoint's variables, by name."""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

_UNNAMED = {"seed_generator{}", "variable{}"}
_LORA = re.compile(r"(.*/)lora_(kernel|embeddings)_a")

COUNTERS = frozenset(("uint16", "int32", "uint32", "int64"))
"""The types of integers for which a backend may have another one of them. A variable takes a value of another one, if
it can hold the value."""

Shape = tuple[int | None, ...] | None


class Kind(NamedTuple):
    """The shape of a variable, with `None` for a size that is not fixed, and its dtype."""

    shape: Shape
    dtype: str

    def takes(self, other: Kind) -> bool:
        """Whether a variable of this kind can take a value of another kind."""
        same = self.dtype == other.dtype or {self.dtype, other.dtype} <= COUNTERS
        return same and self.fits(other.shape)

    def fits(self, shape: Shape) -> bool:
        """Whether a variable of this kind can take a value of a shape."""
        if self.shape is None or shape is None:
            return True
        return len(self.shape) == len(shape) and all(
            mine in (None, theirs) for mine, theirs in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"shape {self.shape} {self.dtype}"


class Matching(NamedTuple):
    """The matched variables of a model and a checkpoint, and their differences.

    Attributes:
        matched: The names on disk of the variables to restore, by their names in the model.
        missing: The names in the model that the checkpoint does not have.
        unexpected: The names in the checkpoint that the model does not have.
        mismatched: The names in both that are not restored, each with the reason.
    """

    matched: Mapping[str, str]
    missing: Sequence[str]
    unexpected: Sequence[str]
    mismatched: Mapping[str, str]


def match(
    here: Mapping[str, Kind], there: Mapping[str, Kind], automatic: Collection[str] | None, adapted: Container[str]
) -> Matching:
    """Matches the variables of a model with the variables of a checkpoint.

    Args:
        here: The kinds of the model's variables, by name.
        there: The kinds of the checkpoint's variables, by name.
        automatic: For a partial restore, the automatic names of layers, with `{}` for their numbers.
        adapted: The names of variables of layers that a user may adapt, and so build, before the model holds them.
    """
    names = {name: name for name in here if name in there}
    missing = [name for name in here if name not in names]
    unexpected = sorted(name for name in there if name not in here)
    moved = _moved([name for name in missing if name in adapted], unexpected, here, there)
    names |= moved
    missing = [name for name in missing if name not in moved]
    unexpected = [name for name in unexpected if name not in moved.values()]
    mismatched = {
        name: f"{here[name]} in the model, {there[other]} in the checkpoint"
        for name, other in names.items()
        if not here[name].takes(there[other])
    }
    if automatic is not None:
        uncertain = ambiguous(here, there, {*automatic, *_UNNAMED})
        why = "an automatic name, and the checkpoint has another number of these layers: give them names"
        mismatched |= {name: why for name in names if name in uncertain}
        # A partly restored optimizer is worse than a new one: its counter is large, its slots are empty.
        if any(name.startswith("optimizer/") for name in (*mismatched, *missing, *unexpected)):
            why = "part of an optimizer that differs"
            mismatched |= {name: why for name in names if name.startswith("optimizer/") and name not in mismatched}
    order = [name for name in here if name in names and name not in mismatched]
    return Matching({name: names[name] for name in order}, missing, unexpected, mismatched)


def lora_in(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The low-rank updates (LoRA) of kernels, as pairs of names, by the names of the kernels."""
    found = {}
    for name in names:
        if pair := _LORA.fullmatch(name):
            found[f"{pair[1]}{pair[2]}"] = name, f"{name[:-1]}b"
    return found


def _moved(
    missing: Sequence[str], unexpected: Sequence[str], here: Mapping[str, Kind], there: Mapping[str, Kind]
) -> dict[str, str]:
    """The names on disk, by name in the model, for layers that were built before the model held them.

    These names have a shorter path.
    """
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name in missing:
        found[name] = [
            other for other in unexpected if same_end(name, other, least=2) and here[name].takes(there[other])
        ]
    counts = collections.Counter(other for others in found.values() for other in others)
    return {name: others[0] for name, others in found.items() if len(others) == 1 and counts[others[0]] == 1}


def same_end(name: str, other: str, least: int) -> bool:
    """Whether two names differ only in the leading segments of one, and share at least `least` segments."""
    part, *path = name.split("/")
    other_part, *other_path = other.split("/")
    length = min(len(path), len(other_path))
    # A slot's name has one segment after its variable's name.
    least += part not in ("model", "losses", "metrics")
    return part == other_part and length >= least and path[-length:] == other_path[-length:]


def is_lora(name: str) -> bool:
    """Whether a variable is a factor of the low-rank update of a kernel."""
    return name.rpartition("/")[2] in ("lora_kernel_a", "lora_kernel_b", "lora_embeddings_a", "lora_embeddings_b")


def ambiguous(model: Iterable[str], disk: Iterable[str], automatic: Collection[str]) -> set[str]:
    """The names with an automatic number whose siblings on disk differ, so the number may mean another layer."""
    numbers = [re.escape(stem).replace(r"\{\}", r"(?:_\d+)?") for stem in automatic]
    pattern = re.compile("|".join(f"({each})" for each in numbers))

    def numbered(name: str) -> Iterator[tuple[tuple[str, int | None], str]]:
        """The segments of a name that may be numbered, each after its parent and its stem."""
        segments = name.split("/")
        for place, segment in enumerate(segments[1:], 1):
            if found := pattern.fullmatch(segment):
                yield ("/".join(segments[:place]), found.lastindex), segment

    def siblings(names: Iterable[str]) -> dict[tuple[str, int | None], set[str]]:
        found: dict[tuple[str, int | None], set[str]] = collections.defaultdict(set)
        for name in names:
            for group, segment in numbered(name):
                found[group].add(segment)
        return found

    here, there = siblings(model), siblings(disk)
    return {name for name in model if any(here[group] != there[group] for group, _ in numbered(name))}
