"""What of a new checkpoint an older one has already: files that have much of it are linked, and the rest is written.

A link is the file itself under one more name, so every checkpoint is complete, whatever is removed around it. Of a
great table of which few rows have changed, only ranges with these rows are written; TensorFlow reads it in parts too.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import NamedTuple

import google_crc32c
import msgspec
import numpy as np

from keras_ckpt.bundle import Entry, Index, Slice, read_index, slice_key
from keras_ckpt.bundle_writer import STRING, Linked, Value, checksum_of, data_file, write_bundle
from keras_ckpt.directory import CheckpointDirectory
from keras_ckpt.errors import CheckpointError
from keras_ckpt.files import Folder
from keras_ckpt.record import CheckpointFile, CheckpointRecord
from keras_ckpt.snapshot import Snapshot
from keras_ckpt.writer import look_for_room

_WORTHWHILE = 1 << 20
"""Fewer bytes are written once more: a link has its costs too."""
_SAMPLE = 4096
_GREAT = 4 << 20
"""Values of so many bytes may be cut into ranges of rows."""
_RANGE, _RANGES = 4096, 4096
"""The least bytes of a range, and the most ranges."""
_SAMPLES = 64


class Predecessor(NamedTuple):
    """A checkpoint that later ones may share files with.

    Attributes:
        record: What it is.
        entries: Of its index, by key.
        samples: Checksums of some bytes of values, by key, so that one that has changed is known at once.
    """

    record: CheckpointRecord
    entries: Mapping[bytes, Entry]
    samples: Mapping[bytes, Sequence[int]]


_known: dict[str, Predecessor] = {}
"""The last checkpoint that this process saved into each directory, the latest last."""


class SharingWrite:
    """Writes a snapshot into a stage of a directory, sharing what older checkpoints have of it.

    Example:

    ```python
    write = SharingWrite(snapshot, directory)
    record = writer.save(write, step=10)
    write.remember(record)
    ```

    Args:
        snapshot: What to write.
        directory: Where its checkpoint will be.
    """

    def __init__(self, snapshot: Snapshot, directory: CheckpointDirectory) -> None:
        self._snapshot = snapshot
        self._directory = directory
        self._entries: Mapping[bytes, Entry] = {}
        self._samples: Mapping[bytes, Sequence[int]] = {}

    def __call__(self, stage: Folder, name: str) -> Sequence[CheckpointFile]:
        whole = self._snapshot.encoded()
        self._samples = {key: _sampled(value) for key, value in whole.items()}
        values = dict(whole)
        linked: list[Linked] = []
        unchanged: set[bytes] = set()
        for predecessor in self._predecessors():
            if _size(values) >= _WORTHWHILE:
                linked += _link(stage, predecessor, values, self._samples, unchanged, len(linked))
        _join(values, whole, unchanged)
        look_for_room(stage, _size(values))
        files, self._entries = write_bundle(stage, name, _grouped(values, unchanged), linked)
        return files

    def remember(self, record: CheckpointRecord) -> None:
        """Makes what was written a predecessor of what this process saves later."""
        _known.pop(record.directory, None)
        _known[record.directory] = Predecessor(record, self._entries, self._samples)
        while len(_known) > 8:
            del _known[next(iter(_known))]

    def _predecessors(self) -> Iterator[Predecessor]:
        """The newest of the directory, and what this process saved elsewhere; the latest first."""
        if self._directory.path not in _known and (newest := self._directory.latest()):
            with contextlib.suppress(CheckpointError, OSError), Folder(self._directory.path) as folder:
                index = read_index(folder, newest.name)
                yield Predecessor(newest, index.entries, dict(_samples_in(folder, index)))
        yield from list(reversed(_known.values()))


def _link(
    stage: Folder,
    predecessor: Predecessor,
    values: dict[bytes, Value],
    samples: Mapping[bytes, Sequence[int]],
    unchanged: set[bytes],
    number: int,
) -> list[Linked]:
    """Links the files of a checkpoint that are worth it, and takes what they have out of the values.

    What seems to be unchanged in the others is added to `unchanged`.
    """
    record = predecessor.record
    files = {file.name: file for file in record.files}
    linked: list[Linked] = []
    # What cannot be linked is written.
    with contextlib.suppress(CheckpointError, OSError), Folder(record.directory) as folder:
        if not folder.shares_disk(stage):
            return []
        for shard, entries in _candidates(predecessor, values, samples).items():
            file = files[data_file(record.name, shard, len(files) - 1)]
            if not _is_worthwhile(entries, file):
                unchanged.update(entries)
                continue
            with folder.held([file.name]) as held:
                # All of it is read, for a new checkpoint must not begin with a damaged file.
                if held.digest(file.name) != (file.size, file.digest):
                    continue
                same = {
                    key: entry
                    for key, entry in entries.items()
                    if held.holds(file.name, entry.offset, values[key].data.data)
                }
                if not _is_worthwhile(same, file):
                    unchanged.update(same)
                    continue
                new = f"shared-{number + len(linked)}"
                held.link(file.name, stage, new)
            linked.append(Linked(msgspec.structs.replace(file, name=new, shared=True), same))
            for key in same:
                del values[key]
    return linked


def _candidates(
    predecessor: Predecessor, values: dict[bytes, Value], samples: Mapping[bytes, Sequence[int]]
) -> Mapping[int, Mapping[bytes, Entry]]:
    """The entries that seem to have the same bytes, by the numbers of their files."""
    found: dict[int, dict[bytes, Entry]] = collections.defaultdict(dict)
    for key in values.keys() & predecessor.entries.keys():
        value, entry = values[key], predecessor.entries[key]
        alike = _alike(predecessor.samples.get(key), samples.get(key))
        if (entry.dtype, entry.shape) != (value.dtype, value.shape) or value.slices or alike < 0.5:
            continue
        if alike == 1 and not entry.slices:
            values[key] = value = value._replace(checksum=checksum_of(value))
            if entry.checksum == value.checksum:
                found[entry.shard][key] = entry
                continue
        if _is_table(value) and entry.slices in ((), _ranges(value)):
            for part, place in _split(key, values, predecessor.entries).items():
                found[place.shard][part] = place
    return found


def _split(key: bytes, values: dict[bytes, Value], entries: Mapping[bytes, Entry]) -> dict[bytes, Entry]:
    """Cuts a value into ranges of rows; the entries of those that may be the same."""
    value, entry = values[key], entries[key]
    values[key] = Value(value.dtype, value.shape, value.data[:0], slices=_ranges(value))
    row = len(value.data) // value.shape[0]
    found = {}
    for each in values[key].slices:
        part = slice_key(key, each)
        start, length = each[0]
        rows = Value(value.dtype, (length, *value.shape[1:]), value.data[start * row : (start + length) * row])
        checksum = checksum_of(rows)
        values[part] = rows._replace(checksum=checksum)
        if entry.slices:
            place = entries[part]
        else:
            place = Entry(
                entry.dtype, rows.shape, entry.shard, entry.offset + start * row, len(rows.data), checksum, ()
            )
        if place.checksum == checksum:
            found[part] = place
    return found


def _is_table(value: Value) -> bool:
    return len(value.data) >= _GREAT and bool(value.shape) and value.dtype != STRING


def _ranges(value: Value) -> tuple[Slice, ...]:
    """Ranges of rows, of one size but for the last."""
    rows = value.shape[0]
    length = max(-(-rows // _RANGES), -(-_RANGE * rows // len(value.data)))
    rest = tuple((0, size) for size in value.shape[1:])
    return tuple(((start, min(length, rows - start)), *rest) for start in range(0, rows, length))


def _join(values: dict[bytes, Value], whole: Mapping[bytes, Value], unchanged: set[bytes]) -> None:
    """Makes those whole again of which no range is shared; they count as unchanged if most ranges are."""
    for key, value in whole.items():
        parts = [slice_key(key, each) for each in values[key].slices] if key in values else []
        if parts and values.keys() >= set(parts):
            values[key] = value
            if len(unchanged.intersection(parts)) > len(parts) / 2:
                unchanged.add(key)
            for part in parts:
                del values[part]


def _grouped(values: Mapping[bytes, Value], unchanged: Set[bytes]) -> list[Mapping[bytes, Value]]:
    """What has not changed for a while apart from the rest, so that it may be linked by the next."""
    still = {key: value for key, value in values.items() if key in unchanged}
    if _size(still) < _WORTHWHILE:
        return [values]
    return [still, {key: value for key, value in values.items() if key not in unchanged}]


def _is_worthwhile(entries: Mapping[bytes, Entry], file: CheckpointFile) -> bool:
    """Whether a link would not keep more alive than is used."""
    return sum(entry.size for entry in entries.values()) >= max(file.size / 2, _WORTHWHILE)


def _alike(before: Sequence[int] | None, now: Sequence[int] | None) -> float:
    """Which part of the samples is the same; all, if that is not known."""
    if before is None or now is None:
        return 1
    return [old == new for old, new in zip(before, now, strict=True)].count(True) / len(now)


def _sampled(value: Value) -> Sequence[int]:
    """Checksums of some bytes, all over a great value."""
    if len(value.data) < _GREAT:
        return [google_crc32c.value(np.concatenate([value.data[:_SAMPLE], value.data[-_SAMPLE:]]))]
    return [google_crc32c.value(value.data[at : at + _SAMPLE // _SAMPLES]) for at in _places(len(value.data))]


def _samples_in(folder: Folder, index: Index) -> Iterator[tuple[bytes, Sequence[int]]]:
    """Those of the great values of a checkpoint."""
    for key, entry in index.entries.items():
        if entry.size >= _GREAT:
            file, at = index.files[entry.shard], entry.offset
            pieces = (folder.read_range(file, at + place, _SAMPLE // _SAMPLES) for place in _places(entry.size))
            yield key, [google_crc32c.value(piece) for piece in pieces]


def _places(size: int) -> range:
    """Where in so many bytes samples are taken."""
    return range(0, size, size // _SAMPLES)


def _size(values: Mapping[bytes, Value]) -> int:
    return sum(len(value.data) for value in values.values())
