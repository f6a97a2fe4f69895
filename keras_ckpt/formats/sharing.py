"""Deduplication: a checkpoint shares unchanged values with an older checkpoint by a hard link to its file.

A hard link is another name of the same file. So every checkpoint stays complete when others are removed.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Mapping, Sequence, Set

import msgspec

from keras_ckpt.errors import CheckpointError
from keras_ckpt.formats.arena import Arena, Saved
from keras_ckpt.formats.bundle_index import Entry, Index, read_index
from keras_ckpt.formats.bundle_writer import Linked, Value, write_bundle
from keras_ckpt.store import layout
from keras_ckpt.store.files import Folder
from keras_ckpt.store.reading import Stamp
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord
from keras_ckpt.store.writer import Writer

_WORTHWHILE = 1 << 20
"""The minimum bytes to share: a hard link has its costs too, so fewer bytes are written again."""


class SharingWrite:
    """Writes values into a stage of a directory, and shares unchanged values with older checkpoints.

    Example:

    ```python
    write = SharingWrite(snapshot.move(arena), arena, writer)
    record = writer.save(SaveRequest(step=10), write)
    write.remember(record)
    ```

    Args:
        values: The values to write, by key.
        arena: The arena that holds the copies of the values.
        writer: The writer of the directory.
    """

    def __init__(self, values: Mapping[bytes, Value], arena: Arena, writer: Writer) -> None:
        self._values = values
        self._arena = arena
        self._writer = writer
        self._entries: Mapping[bytes, Entry] = {}
        self._stamps: Mapping[str, Stamp] = {}

    def __call__(self, stage: Folder, record: CheckpointRecord) -> Sequence[CheckpointFile]:
        if not self._arena.saved and (newest := self._writer.latest()):
            self._compare(newest)
        values = dict(self._values)
        linked: list[Linked] = []
        stamps: list[Stamp] = []
        unchanged: set[bytes] = set()
        for saved in reversed(self._arena.saved.values()):
            if _size(values) >= _WORTHWHILE:
                linked += _link(stage, saved, self._candidates(saved, values), values, unchanged, stamps)
        self._writer.make_room(record, _size(values))
        files, self._entries = write_bundle(stage, record.name, _grouped(values, unchanged), linked)
        self._stamps = {file.name: stamp for file, stamp in zip(files, stamps, strict=False)}
        return files

    def remember(self, record: CheckpointRecord) -> None:
        """Records for later saves that the arena has the values of a checkpoint."""
        entries = {key: self._entries[key] for key, value in self._values.items() if self._arena.has(key, value)}
        # Without the stamps later saves make no links.
        with contextlib.suppress(OSError), Folder(record.directory) as folder:
            new = [file.name for file in record.files if file.size >= _WORTHWHILE and not file.shared]
            # A linked file keeps its stamp from before: another process may have written to the file since.
            stamps = {**self._stamps, **{name: folder.stamp(name) for name in new}}
            self._arena.remember(Saved(record, stamps, frozenset(self._values), entries))

    def is_in(self, record: CheckpointRecord, counts: Callable[[bytes], bool]) -> bool:
        """Whether a checkpoint holds the same values, to the bit.

        Args:
            record: The checkpoint.
            counts: Whether a key takes part in the comparison.
        """
        saved = self._arena.saved.get(record.directory)
        if saved is None or not saved.record.same_save(record):
            saved = self._compare(record)
        here = set(filter(counts, self._values))
        return (
            saved is not None
            and here == set(filter(counts, saved.variables))
            and all(self._has(key, saved.entries.get(key)) for key in here)
        )

    def _has(self, key: bytes, entry: Entry | None) -> bool:
        """Whether the value to write under a key is the arena's value that a known entry holds."""
        value = self._values[key]
        kind = (value.dtype, value.shape)
        return entry is not None and (entry.dtype, entry.shape) == kind and self._arena.has(key, value)

    def _compare(self, record: CheckpointRecord) -> Saved | None:
        """Compares the arena's values with a checkpoint that the arena does not know, such as another process's."""
        values = {key: value for key, value in self._values.items() if self._arena.has(key, value)}
        with contextlib.suppress(CheckpointError, OSError):
            saved = _saved_in(record, values)
            self._arena.remember(saved)
            return saved
        return None

    def _candidates(self, saved: Saved, values: Mapping[bytes, Value]) -> Mapping[int, Mapping[bytes, Entry]]:
        """The entries of a checkpoint whose values are not written yet, by data file."""
        found: dict[int, dict[bytes, Entry]] = collections.defaultdict(dict)
        for key, entry in saved.entries.items():
            if key in values and self._has(key, entry):
                found[entry.shard][key] = entry
        return found


def _saved_in(record: CheckpointRecord, values: Mapping[bytes, Value]) -> Saved:
    """Reads the files of a checkpoint to find which of the values it holds."""
    entries: dict[bytes, Entry] = {}
    stamps = {}
    with Folder(record.directory) as folder, folder.held([file.name for file in record.files]) as files:
        index = read_index(files, record.name)
        for key, value in values.items():
            entry = index.entries.get(key)
            if entry is None or entry.slices or (entry.dtype, entry.shape) != (value.dtype, value.shape):
                continue
            if _holds(files, index, entry, value):
                entries[key] = entry
        for file in record.files:
            stamp = files.stamp(file.name)
            # The whole file is read: a new checkpoint must not share a damaged file.
            if file.size >= _WORTHWHILE and files.digest(file.name) == (file.size, file.digest.lower()):
                stamps[file.name] = stamp
    return Saved(record, stamps, frozenset(key.encode() for key in index.variables), entries)


def _holds(files: Folder, index: Index, entry: Entry, value: Value) -> bool:
    return files.holds(index.files[entry.shard], entry.offset, value.data.data)


def _link(
    stage: Folder,
    saved: Saved,
    candidates: Mapping[int, Mapping[bytes, Entry]],
    values: dict[bytes, Value],
    unchanged: set[bytes],
    stamps: list[Stamp],
) -> list[Linked]:
    """Links the worthwhile files of a checkpoint, and removes their values from `values`.

    Unchanged values of the other files are added to `unchanged`, stamps of links to `stamps`.
    """
    record = saved.record
    # Sorted names are in the order of the shards.
    files = sorted((file for file in record.files if layout.is_data(file.name)), key=lambda file: file.name)
    linked: list[Linked] = []
    # A file that cannot be linked is written instead.
    with contextlib.suppress(OSError), Folder(record.directory) as folder:
        disks = folder.shares_disk(stage)
        for shard, entries in candidates.items():
            file = files[shard]
            if not disks or not _is_worthwhile(entries, file):
                unchanged.update(entries)
                continue
            with folder.held([file.name]) as held:
                # A file with another stamp was written to since, and may be damaged.
                stamp = held.stamp(file.name)
                if stamp != saved.stamps.get(file.name):
                    continue
                new = f"shared-{len(stamps)}"
                held.link(file.name, stage, new)
                stamps.append(stamp)
            linked.append(Linked(msgspec.structs.replace(file, name=new, shared=True), entries))
            for key in entries:
                del values[key]
    return linked


def _grouped(values: Mapping[bytes, Value], unchanged: Set[bytes]) -> list[Mapping[bytes, Value]]:
    """The values in two groups, unchanged and changed, so that the next save can link the file of the unchanged."""
    stable = {key: value for key, value in values.items() if key in unchanged}
    if _size(stable) < _WORTHWHILE:
        return [values]
    return [stable, {key: value for key, value in values.items() if key not in unchanged}]


def _is_worthwhile(entries: Mapping[bytes, Entry], file: CheckpointFile) -> bool:
    """Whether at least half of a file is in use, so that a link does not keep many unused bytes."""
    return sum(entry.size for entry in entries.values()) >= max(file.size / 2, _WORTHWHILE)


def _size(values: Mapping[bytes, Value]) -> int:
    return sum(len(value.data) for value in values.values())
