"""Reads parts of files by several threads into memory of the caller, and verifies checksums and digests."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from crc32c import crc32c

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats.bundle_index import masked
from keras_ckpt.formats.threads import helpers, share_out
from keras_ckpt.store.checks import refuse_changed
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile

_PIECE = 1 << 20
_SMALL = 8 << 20
"""One thread reads this many bytes before a second thread would have started."""
_THREADS = min(os.cpu_count() or 1, 8)


class Target(NamedTuple):
    """Bytes to read.

    Attributes:
        key: The name of the value, for messages.
        file: The file.
        offset: Where the bytes begin.
        memory: The memory to fill.
        checksum: TensorFlow's checksum of the bytes, `None` if they have none.
    """

    key: bytes
    file: str
    offset: int
    memory: memoryview
    checksum: int | None


def fill(files: Folder, targets: Sequence[Target], digested: Sequence[CheckpointFile] = ()) -> None:
    """Reads and verifies targets, by several threads.

    Args:
        files: A folder with the files.
        targets: The bytes to read.
        digested: The files to read whole and compare with their digests.

    Raises:
        DamagedCheckpointError: A checksum or a digest does not match.
        OSError: A file cannot be read.
    """
    targets = [target for target in targets if target.memory]
    for file in digested:
        wanted = sorted((target for target in targets if target.file == file.name), key=_offset)
        parts = [(target.offset, target.memory) for target in wanted]
        # This thread computes the digests.
        found = files.scatter(file.name, parts, helpers(), file.size if files.series.template else None)
        refuse_changed(file, *found)
    names = {file.name for file in digested}

    def read(groups: Iterable[Sequence[Target]]) -> None:
        for group in groups:
            _read_together(files, group)

    share_out(read, _of_equal_size([target for target in targets if target.file not in names]))


def _offset(target: Target) -> int:
    return target.offset


def _read_together(files: Folder, targets: Sequence[Target]) -> None:
    """Reads targets one after another, and compares their checksums."""
    for file, group in itertools.groupby(targets, lambda target: target.file):
        with files.reading(file) as opened:
            for target in group:
                checksum = 0
                for at in range(0, len(target.memory), _PIECE):
                    piece = target.memory[at : at + _PIECE]
                    opened.read_into([piece], target.offset + at)
                    if target.checksum is not None:
                        checksum = crc32c(piece, checksum)
                if target.checksum not in (None, masked(checksum)):
                    raise DamagedCheckpointError(
                        f"{file} was changed after it was written: a checksum in it does not match, of "
                        f"{target.key.decode(errors='replace')}"
                    )


def _of_equal_size(targets: Sequence[Target]) -> list[list[Target]]:
    """Splits targets into at most `_THREADS` groups of about equal size."""
    number = _THREADS if sum(len(target.memory) for target in targets) >= _SMALL else 1
    groups: list[list[Target]] = [[] for _ in range(number)]
    filled = [0] * number
    for target in sorted(targets, key=lambda target: -len(target.memory)):
        least = filled.index(min(filled))
        groups[least].append(target)
        filled[least] += len(target.memory)
    return [sorted(sorted(group, key=_offset), key=lambda target: target.file) for group in groups if group]
