"""The protocol for reading the files of checkpoints, on a disk or in an archive."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from keras_ckpt.store.layout import Series


class Stamp(NamedTuple):
    """Detects a change of a file: its inode, its size in bytes, the time of its last change."""

    inode: int
    size: int
    changed: int


class Reading(Protocol):
    """The files of one directory.

    A missing file raises a `FileNotFoundError` with the file's name. Any other failure raises an `OSError`.
    """

    series: Series
    """The checkpoints of the directory that are read."""
    path: str
    """The directory, for messages and for the records of its checkpoints."""

    def names(self) -> Iterable[str]:
        """The names of the files, in any order."""

    def moving(self) -> set[str]:
        """The names of files that a writer publishes or removes now."""

    def exists(self, name: str) -> bool:
        """Whether a file exists."""

    def read(self, name: str, limit: int) -> bytes:
        """Reads a whole file. A file of more than `limit` bytes is an `OSError`, and is not read."""

    def read_end(self, name: str, size: int) -> tuple[int, bytes]:
        """The size of a file, and the bytes at its end, at most `size` bytes."""

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Reads `size` bytes of a file from an offset, fewer at its end."""

    def size(self, name: str) -> int:
        """The size of a file in bytes."""

    def stamp(self, name: str) -> Stamp:
        """A stamp that differs once the file has changed."""

    def digest(
        self, name: str, advance: Callable[[int], object] | None = None, end: int | None = None
    ) -> tuple[int, str]:
        """The number of bytes that were read, and `"blake3:"` with their digest in hexadecimal.

        Args:
            name: The file.
            end: The number of bytes to read; defaults to the whole file.
            advance: Called with the number of bytes after each piece that was read.
        """
