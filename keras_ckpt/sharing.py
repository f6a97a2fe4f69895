"""What of a new checkpoint an older one has already: files that have much of it are linked, and the rest is written.

A link is the file itself under one more name, so every checkpoint is complete, whatever is removed around it.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import google_crc32c
import msgspec
import numpy as np

from keras_ckpt.bundle import Entry, read_index
from keras_ckpt.bundle_writer import Linked, Value, checksum_of, data_file, write_bundle
from keras_ckpt.directory import CheckpointDirectory
from keras_ckpt.errors import CheckpointError
from keras_ckpt.files import Folder
from keras_ckpt.record import CheckpointFile, CheckpointRecord
from keras_ckpt.snapshot import Snapshot
from keras_ckpt.writer import look_for_room

_WORTHWHILE = 1 << 20
"""Fewer bytes are written once more: a link has its costs too."""
_SAMPLE = 4096


class Predecessor(NamedTuple):
    """A checkpoint that later ones may share files with.

    Attributes:
        record: What it is.
        entries: Of its index, by key.
        samples: Checksums of some bytes of each value, by key, so that one that has changed is known at once. Empty if
            another process wrote it.
    """

    record: CheckpointRecord
    entries: Mapping[bytes, Entry]
    samples: Mapping[bytes, int]


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
        self._samples: Mapping[bytes, int] = {}

    def __call__(self, stage: Folder, name: str) -> Sequence[CheckpointFile]:
        values = self._snapshot.encoded()
        self._samples = {key: _sample(value) for key, value in values.items()}
        linked: list[Linked] = []
        for predecessor in self._predecessors():
            if _size(values) >= _WORTHWHILE:
                linked += _link(stage, predecessor, values, self._samples, len(linked))
        look_for_room(stage, _size(values))
        files, self._entries = write_bundle(stage, name, values, linked)
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
                yield Predecessor(newest, read_index(folder, newest.name).entries, {})
        yield from list(reversed(_known.values()))


def _link(
    stage: Folder, predecessor: Predecessor, values: dict[bytes, Value], samples: Mapping[bytes, int], number: int
) -> list[Linked]:
    """Links the files of a checkpoint that are worth it, and takes what they have out of the values."""
    record = predecessor.record
    files = {file.name: file for file in record.files}
    linked: list[Linked] = []
    # What cannot be linked is written.
    with contextlib.suppress(CheckpointError, OSError), Folder(record.directory) as folder:
        if not folder.shares_disk(stage):
            return []
        for shard, entries in _candidates(predecessor, values, samples).items():
            file = files[data_file(record.name, shard, len(files) - 1)]
            if sum(entry.size for entry in entries.values()) < max(file.size / 2, _WORTHWHILE):
                continue  # it would keep more alive than is used
            with folder.held([file.name]) as held:
                # All of it is read, for a new checkpoint must not begin with a damaged file.
                if held.digest(file.name) != (file.size, file.digest):
                    continue
                same = {
                    key: entry
                    for key, entry in entries.items()
                    if held.holds(file.name, entry.offset, values[key].data.data)
                }
                new = f"shared-{number + len(linked)}"
                held.link(file.name, stage, new)
            linked.append(Linked(msgspec.structs.replace(file, name=new, shared=True), same))
            for key in same:
                del values[key]
    return linked


def _candidates(
    predecessor: Predecessor, values: dict[bytes, Value], samples: Mapping[bytes, int]
) -> Mapping[int, Mapping[bytes, Entry]]:
    """The entries that seem to have the same bytes, by the numbers of their files."""
    found: dict[int, dict[bytes, Entry]] = collections.defaultdict(dict)
    for key in values.keys() & predecessor.entries.keys():
        value, entry = values[key], predecessor.entries[key]
        if (entry.dtype, entry.shape, entry.size, entry.slices) != (value.dtype, value.shape, len(value.data), ()):
            continue
        if predecessor.samples.get(key, samples[key]) == samples[key]:
            values[key] = value._replace(checksum=checksum_of(value))
            if entry.checksum == values[key].checksum:
                found[entry.shard][key] = entry
    return found


def _sample(value: Value) -> int:
    checksum: int = google_crc32c.value(np.concatenate([value.data[:_SAMPLE], value.data[-_SAMPLE:]]))
    return checksum


def _size(values: Mapping[bytes, Value]) -> int:
    return sum(len(value.data) for value in values.values())
