"""Which variables of a checkpoint are which of a model, and what differs."""

from __future__ import annotations

import collections
import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

_UNNAMED = {"seed_generator{}", "variable{}"}
_LORA = re.compile(r"(.*/)lora_(kernel|embeddings)_a")

Shape = tuple[int | None, ...] | None


class Kind(NamedTuple):
    """The shape of a variable, `None` for a size that is not fixed, and its type."""

    shape: Shape
    dtype: str

    def takes(self, other: Kind) -> bool:
        """Whether a variable of this kind can have the value of another."""
        return self.dtype == other.dtype and self.fits(other.shape)

    def fits(self, shape: Shape) -> bool:
        """Whether a variable of this kind can have a value of a shape."""
        if self.shape is None or shape is None:
            return True
        return len(self.shape) == len(shape) and all(
            mine in (None, theirs) for mine, theirs in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"shape {self.shape} {self.dtype}"


class Matching(NamedTuple):
    """What of a checkpoint goes where.

    Attributes:
        matched: The names on disk of what is restored, by the names in the model.
        missing: In the model, not in the checkpoint.
        unexpected: In the checkpoint, not in the model.
        mismatched: In both, and not restored; each with the reason.
    """

    matched: Mapping[str, str]
    missing: Sequence[str]
    unexpected: Sequence[str]
    mismatched: Mapping[str, str]


def match(
    here: Mapping[str, Kind], there: Mapping[str, Kind], automatic: Collection[str] | None, adapted: Container[str]
) -> Matching:
    """Matches the variables of a model with those of a checkpoint.

    Args:
        here: The kinds of the model's variables, by name.
        there: The kinds of those in the checkpoint.
        automatic: For a partial restore, the names that Keras gave to layers by itself, with `{}` in the places of
            their numbers.
        adapted: The names of variables of layers that may be adapted, and so built, before they are in the model.
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
        doubtful = unsure(here, there, {*automatic, *_UNNAMED})
        why = "an automatic name, of another number of layers in the checkpoint: give them names"
        mismatched |= {name: why for name in names if name in doubtful}
        # Half an optimizer is worse than none: counters of many steps beside slots of none.
        if any(name.startswith("optimizer/") for name in (*mismatched, *missing, *unexpected)):
            why = "part of an optimizer that differs"
            mismatched |= {name: why for name in names if name.startswith("optimizer/") and name not in mismatched}
    order = [name for name in here if name in names and name not in mismatched]
    return Matching({name: names[name] for name in order}, missing, unexpected, mismatched)


def lora_in(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The low-rank updates of kernels, as pairs of names, by the names of the kernels."""
    found = {}
    for name in names:
        if pair := _LORA.fullmatch(name):
            found[f"{pair[1]}{pair[2]}"] = name, f"{name[:-1]}b"
    return found


def _moved(
    missing: Sequence[str], unexpected: Sequence[str], here: Mapping[str, Kind], there: Mapping[str, Kind]
) -> dict[str, str]:
    """The names on disk of layers that were built before they were in the model, by the names in the model.

    Such a layer is called by a shorter path.
    """
    found: dict[str, list[str]] = collections.defaultdict(list)
    for name in missing:
        found[name] = [
            other for other in unexpected if same_end(name, other, least=2) and here[name].takes(there[other])
        ]
    counts = collections.Counter(other for others in found.values() for other in others)
    return {name: others[0] for name, others in found.items() if len(others) == 1 and counts[others[0]] == 1}


def same_end(name: str, other: str, least: int) -> bool:
    """Whether one of two names has more of a path in front than the other, with at least so many segments in both."""
    part, *path = name.split("/")
    other_part, *other_path = other.split("/")
    length = min(len(path), len(other_path))
    # A slot has its name after that of its variable.
    least += part not in ("model", "losses", "metrics")
    return part == other_part and length >= least and path[-length:] == other_path[-length:]


def is_lora(name: str) -> bool:
    """Whether a variable is a factor of the low-rank update of a kernel."""
    return name.rpartition("/")[2] in ("lora_kernel_a", "lora_kernel_b", "lora_embeddings_a", "lora_embeddings_b")


def unsure(model: Iterable[str], disk: Iterable[str], automatic: Collection[str]) -> set[str]:
    """The names with a number of Keras's own in them that is counted among another number of layers on disk."""
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
