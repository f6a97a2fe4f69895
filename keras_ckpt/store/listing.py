"""Reads and checks a directory's contents: sidecars, pins and checkpoints without a sidecar."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import operator
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set

import msgspec

from keras_ckpt.errors import CheckpointError, CheckpointNotFoundError, DamagedCheckpointError, FormatVersionError
from keras_ckpt.store import layout, tails
from keras_ckpt.store import record as sidecars
from keras_ckpt.store.checks import check, has_sidecar, is_current, read_record
from keras_ckpt.store.files import Folder
from keras_ckpt.store.layout import TENSORFLOW, Series
from keras_ckpt.store.reading import Reading
from keras_ckpt.store.record import CheckpointRecord, superseded
from keras_ckpt.store.tables import relative

Check = Callable[[CheckpointRecord], object]
"""Raises an error for a damaged checkpoint."""
PIN_LIMIT = 4096
"""The largest size of a pin's reason in bytes."""
_CHECKED = 16
"""The number of known checkpoints that each look reads again, in turns."""
TICK = 100_000_000
"""The nanoseconds within which a file system may give two changes of a directory the same time."""


@dataclasses.dataclass(frozen=True)
class Listing:
    """The contents of a directory when it was read.

    Example:

    ```python
    listing = keras_ckpt.CheckpointDirectory("runs/digits").listing()
    print(len(listing.records), dict(listing.damaged), listing.unmanaged)
    ```

    Attributes:
        path: The directory.
        records: The checkpoints, oldest first in the order of saving.
        damaged: The error of each checkpoint that cannot be trusted, by name. Its files are never removed.
        unmanaged: Names of TensorFlow checkpoints without a sidecar, or of files without a record, which other programs
            wrote.
        sequence: The largest place in the order of saving.
        series: The series of the checkpoints.
        other_runs: The files of earlier runs, for files of Keras: a later run does not rank them.
    """

    path: str
    records: tuple[CheckpointRecord, ...] = ()
    damaged: Mapping[str, CheckpointError] = dataclasses.field(default_factory=dict)
    unmanaged: tuple[str, ...] = ()
    sequence: int = 0
    series: Series = TENSORFLOW
    other_runs: tuple[CheckpointRecord, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.records or self.damaged or self.unmanaged)

    @property
    def title(self) -> str:
        """The path of the series, to display."""
        name = self.series.only or self.series.template
        return relative(os.path.join(self.path, name) if name else self.path)

    @property
    def all_runs(self) -> tuple[CheckpointRecord, ...]:
        """The checkpoints of all runs, oldest first."""
        return _oldest_first([*self.other_runs, *self.records]) if self.other_runs else self.records

    def of_run(self, run_id: str) -> Listing:
        """The listing as a run sees it: the files of all other runs are apart."""
        if not self.records or self.records[-1].run_id == run_id:
            return self
        records, others = _apart(self.all_runs, run_id)
        return dataclasses.replace(self, records=records, other_runs=others)

    def named(self, name: str) -> CheckpointRecord:
        """The checkpoint of a name, even of an earlier run.

        Raises:
            DamagedCheckpointError, FormatVersionError: The checkpoint cannot be trusted.
            CheckpointNotFoundError: No checkpoint has the name, or its file has no record.
        """
        for record in (*self.records, *self.other_runs):
            if record.name == name:
                return record
        if name in self.damaged:
            raise type(self.damaged[name])(f"{name} in {self.path} cannot be used: {self.damaged[name]}")
        if name in self.unmanaged:
            raise CheckpointNotFoundError(_without_record(relative(os.path.join(self.path, name))))
        raise CheckpointNotFoundError(f"There is no checkpoint {name} in {self.path}.")

    def find(self, step: int) -> CheckpointRecord:
        """The checkpoint of a step.

        Raises:
            DamagedCheckpointError, FormatVersionError: The checkpoint cannot be trusted.
            CheckpointNotFoundError: The step has no checkpoint. The error names the steps that have one.
        """
        for record in self.records:
            if record.step == step:
                return record
        for name, error in self.damaged.items():
            if sidecars.step_in(name) == step:
                raise type(error)(f"{name} in {self.path} cannot be used: {error}")
        steps = sorted(record.step for record in self.records)
        there = f"There are the steps {', '.join(map(str, steps[-20:]))}" if steps else "There are none"
        more = " and smaller ones" if len(steps) > 20 else ""
        raise CheckpointNotFoundError(f"No checkpoint of step {step!r} in {self.path}. {there}{more}.")

    @property
    def newer(self) -> bool:
        """Whether a newer version of this package wrote here: its intention for each checkpoint is not known."""
        return any(isinstance(error, FormatVersionError) for error in self.damaged.values())

    def refuse_newer(self) -> None:
        """Raises an error if a newer version of this package wrote here."""
        for name, error in self.damaged.items():
            if isinstance(error, FormatVersionError):
                raise FormatVersionError(f"{self.path} is left unchanged, because of {layout.sidecar(name)}: {error}")

    def joined_by(self, record: CheckpointRecord) -> Listing:
        """The listing with one newer record, saved or changed."""
        gone = superseded(record, self.records)
        others = [other for other in self.records if other not in gone]
        other_runs = tuple(other for other in self.other_runs if other.name != record.name)
        return dataclasses.replace(self, records=_oldest_first([*others, record]), other_runs=other_runs)


class Known:
    """A cache of a directory's last listing: the next look reads only checkpoints with replaced files.

    A file may also change in place, so each look reads some other checkpoints again, in turns.
    """

    def __init__(self) -> None:
        self.records: dict[str, CheckpointRecord] = {}  # the longest unread first
        self._listing: Listing | None = None
        self._inodes: Mapping[str, int] = {}
        self._changed = 0

    def look(self, folder: Folder, check: Check) -> Listing:
        """Reads the sidecars of a directory, as `scan` does."""
        changed = folder.changed()
        if self._listing is not None and changed == self._changed:
            return self._listing
        inodes = folder.inodes()
        self._forget(inodes)
        listing = _listed(folder, inodes.keys(), check, self)
        self._inodes, self._listing = inodes, listing
        trusted = not listing.damaged and time.time_ns() - changed > TICK
        self._changed = changed if trusted else 0
        return listing

    def _forget(self, inodes: Mapping[str, int]) -> None:
        """Forgets each checkpoint with a replaced file, and some others in turns."""
        replaced = {file for file, _ in inodes.items() ^ self._inodes.items()}
        owners = itertools.chain.from_iterable(map(_owners, replaced))
        for name in [*owners, *itertools.islice(self.records, _CHECKED)]:
            self.records.pop(name, None)


def scan(files: Reading, check: Check = lambda record: None) -> Listing:
    """Reads the sidecars of a directory.

    Args:
        files: The directory.
        check: Called with each record. A checkpoint is damaged if the call raises.
    """
    return _listed(files, set(files.names()), check, Known())


def _listed(files: Reading, present: Set[str], check: Check, known: Known) -> Listing:
    damaged, foreign, sequence, present = _read_others(files, present, check, known)
    sound = sorted(known.records.values(), key=operator.attrgetter("sequence"))
    newest = {(record.run_id, record.step): record for record in sound}
    for record in sound:
        if (newer := newest[record.run_id, record.step]) is not record:
            damaged[record.name] = DamagedCheckpointError(f"{newer.name} has the same step, and is newer")
    if not files.series.template:
        indexed = layout.of_indexes(present) - known.records.keys() - damaged.keys()
        foreign = unmanaged(files, {name for name in indexed if sidecars.step_in(name) is not None})
    records = tuple(record for record in sound if newest[record.run_id, record.step] is record)
    records, other_runs = _apart(records, records[-1].run_id) if records and files.series.template else (records, ())
    return Listing(
        files.path,
        records,
        {name: damaged[name] for name in _by_step(damaged) if _is_checkpoint(files, name, present, damaged[name])},
        _by_step(foreign),
        max([sequence, *(record.sequence for record in sound[-1:])]),
        files.series,
        other_runs,
    )


def _apart(
    records: Iterable[CheckpointRecord], run_id: str
) -> tuple[tuple[CheckpointRecord, ...], tuple[CheckpointRecord, ...]]:
    """The records of a run, and the records of all other runs."""
    return (
        tuple(record for record in records if record.run_id == run_id),
        tuple(record for record in records if record.run_id != run_id),
    )


def series_in(folder: Folder) -> tuple[list[Series], list[Series]]:
    """The series that the path of a directory means, and the other series in the directory.

    The path means the TensorFlow checkpoints; without them, the files of Keras with sidecars; without sidecars, the
    files with records. A file that has a name of no template is a series of its own.
    """
    names = folder.names()
    files = set(filter(layout.is_keras_file, names))
    managed = {_template(folder, name) for name in files if folder.exists(layout.sidecar(name))} - {""}
    managed |= _nested(folder)
    recorded = managed | {template_of(folder, name) for name in files} - {""}
    if not files and not managed:
        return [], []
    series = list(map(Series, recorded))
    single = {name for name in files if not any(each.checkpoints([name]) for each in series)}
    meant = managed or recorded
    if TENSORFLOW.checkpoints(names) or layout.of_indexes(names):
        meant = {TENSORFLOW.template}
    others = (recorded | single) - meant
    return [Series(template) for template in sorted(meant)], [Series(template) for template in sorted(others)]


def _without_record(file: str) -> str:
    """The error of a file of Keras that has no record, with the ways to use the file."""
    load = f"load_model({file!r})" if file.endswith(".keras") else f"restore(model, {file!r})"
    return (
        f"{file} has no record, so neither its step nor its metrics are known. To use it, type keras_ckpt.{load} in "
        f"Python, or keras-ckpt export {shlex.quote(file)} values.npz in a shell."
    )


def meaning_of(path: str) -> tuple[str, Series]:
    """The directory and the series that a path means. One file of a template means this file alone."""
    folder, series = layout.split(path)
    name = series.template
    if name and series.is_one_name:
        with contextlib.suppress(OSError), Folder(folder) as files:
            if (template := template_of(files, name) or name) != name:
                return folder, Series(template, only=name)
    return folder, series


def _nested(folder: Folder) -> set[str]:
    """The templates with fields in their folders that have files below the directory."""
    found = set()
    for template in folder.templates():
        if (series := Series(template)).depth:
            with Folder(folder.path, series) as inner:
                if series.checkpoints(inner.names()):
                    found.add(template)
    return found


def template_of(folder: Reading, name: str) -> str:
    """The template of a file of Keras, `""` for a file without a readable record."""
    with contextlib.suppress(CheckpointError, OSError):
        if found := tails.read_tail(folder, name):
            return found[1].template
    return ""


def _template(folder: Reading, name: str) -> str:
    """The template in the sidecar of a file of Keras, `""` without a valid sidecar."""
    with contextlib.suppress(CheckpointError, OSError):
        return sidecars.decode(folder.read(layout.sidecar(name), sidecars.SIZE_LIMIT), name).template
    return ""


def unmanaged(folder: Reading, names: set[str]) -> set[str]:
    """The names that have an index but no sidecar, and that no writer publishes or removes now."""
    if not names:
        return names
    names = names - layout.of_sidecars(folder.moving())
    return {name for name in names if folder.exists(layout.index(name)) and not folder.exists(layout.sidecar(name))}


def examine(folder: Folder, known: Known | None = None) -> Listing:
    """Reads all sidecars of a directory, and compares the sizes of the listed files."""

    def look(record: CheckpointRecord) -> None:
        check(folder, record, digests=False)

    return scan(folder, look) if known is None else known.look(folder, look)


def verify(folder: Reading, progress: Callable[[int, int], object]) -> Listing:
    """Reads all sidecars of a directory, and every byte of the listed files.

    Args:
        folder: The directory.
        progress: Called after each piece with the bytes read so far and the bytes in total.
    """
    total = sum(record.size for record in scan(folder).records)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, max(done, total))

    return scan(folder, lambda record: check(folder, record, advance=advance))


def taken(records: Sequence[CheckpointRecord]) -> int:
    """The bytes that checkpoints of a directory take on disk. Shared files count once."""
    return sum({inode: size for links in _links(records) for inode, _, size in links}.values())


def freed(records: Sequence[CheckpointRecord]) -> list[int]:
    """The bytes that the removal of each checkpoint frees, after the removal of the checkpoints before it."""
    removed: collections.Counter[int] = collections.Counter()
    sizes = []
    for links in _links(records):
        removed.update(inode for inode, _, _ in links)
        sizes.append(sum(size for inode, names, size in links if removed[inode] == names))
    return sizes


def _links(records: Sequence[CheckpointRecord]) -> list[list[tuple[int, int, int]]]:
    """The inode, the number of names and the size of each file of each record."""
    found: list[list[tuple[int, int, int]]] = [[] for _ in records]
    if records:
        with Folder(records[0].directory) as folder:
            for links, record in zip(found, records, strict=True):
                for file in record.files:
                    with contextlib.suppress(FileNotFoundError):  # pruned since
                        links.append((*folder.links(file.name), file.size))
    return found


def amend(folder: Folder, record: CheckpointRecord) -> CheckpointRecord:
    """Replaces the sidecar of a checkpoint for a changed record, by one rename. The caller holds the mutex."""
    file = layout.sidecar(record.name)
    data = sidecars.encode(record)
    if has_sidecar(folder, record):
        data = sidecars.update(folder.read(file, sidecars.SIZE_LIMIT), record)
    folder.replace(file, data)
    return record


def _read_others(
    folder: Reading, present: Set[str], check: Check, known: Known
) -> tuple[dict[str, CheckpointError], set[str], int, Set[str]]:
    """Reads the checkpoints that are not known.

    Returns:
        The errors of the damaged checkpoints, the files of the template without a record, the largest place in the
        order of saving among the checkpoints read, and the names of all files.
    """
    damaged: dict[str, CheckpointError] = {}
    foreign: set[str] = set()
    other: set[str] = set()
    sequence = 0
    again = True
    while again:
        again = False
        names = folder.series.checkpoints(present) - known.records.keys() - damaged.keys() - foreign - other
        for name in names:
            try:
                record = _read(folder, name, present)
                if record.template != folder.series.template:
                    other.add(name)
                    continue
                sequence = max(sequence, record.sequence)
                check(record)
                known.records[record.name] = record
            except FileNotFoundError:
                if not (folder.series.template and folder.exists(name)):
                    again = True  # a removed checkpoint may have a successor, which this list of names lacks
                elif _is_cut(folder, name):
                    damaged[name] = DamagedCheckpointError("it ends early: it was cut, or is being written")
                else:
                    foreign.add(name)  # it has no record
            except CheckpointError as error:
                damaged[name] = error
        if again:
            present = set(folder.names())
    return damaged, foreign, sequence, present


def _is_cut(folder: Reading, name: str) -> bool:
    with contextlib.suppress(OSError):
        return tails.is_cut(folder, name)
    return False


def _owners(file: str) -> Iterator[str]:
    """The names of the checkpoints that may have a file: a file of Keras, or a file whose name begins with theirs."""
    parts = file.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _read(folder: Reading, name: str, present: Set[str]) -> CheckpointRecord:
    record = read_record(folder, name)
    if (pin := _read_pin(folder, name, present)) is not None:
        record = msgspec.structs.replace(record, pin=pin)
    for file in record.files:
        if file.name not in present and not folder.exists(file.name):
            if not is_current(folder, record):
                raise FileNotFoundError(name)
            raise DamagedCheckpointError(f"{file.name} is missing")
    return record


def _read_pin(folder: Reading, name: str, present: Set[str]) -> str | None:
    if layout.pin(name) not in present:
        return None
    try:
        return folder.read(layout.pin(name), PIN_LIMIT).decode(errors="replace").strip()
    except OSError:
        return ""


def _is_checkpoint(folder: Reading, name: str, present: Set[str], error: CheckpointError) -> bool:
    """Whether an invalid sidecar was meant as a sidecar; a user may have an unrelated history-2.json."""
    if folder.series.template:
        return True
    usual = (step := sidecars.step_in(name)) is not None and name == layout.numbered(step)
    return usual or layout.index(name) in present or isinstance(error, FormatVersionError)


def _oldest_first(records: Iterable[CheckpointRecord]) -> tuple[CheckpointRecord, ...]:
    return tuple(sorted(records, key=lambda record: record.sequence))


def _by_step(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(names, key=lambda name: (sidecars.step_in(name), name)))
