"""The protocol by which checkpoints are read, wherever their files are: on a disk or in an archive."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol


class Stamp(NamedTuple):
    """Tells whether a file was written to since: its number, its size in bytes, the time of its last change."""

    inode: int
    size: int
    changed: int


class Reading(Protocol):
    """The files of one directory.

    A missing file is a `FileNotFoundError` with the name of the file, and any other failure an `OSError`.
    """

    path: str
    """The directory, for messages and for the records of its checkpoints."""

    def names(self) -> Iterable[str]:
        """The names of the files, in any order."""

    def moving(self) -> set[str]:
        """The names of files that a writer publishes or removes at the moment."""

    def exists(self, name: str) -> bool:
        """Whether there is a file of a name."""

    def read(self, name: str, limit: int) -> bytes:
        """Reads a whole file. A file of more than `limit` bytes is an `OSError`, and is not read."""

    def size(self, name: str) -> int:
        """The size of a file in bytes."""

    def stamp(self, name: str) -> Stamp:
        """Tells later whether a file is as it is now."""

    def digest(self, name: str, advance: Callable[[int], object] | None = None) -> tuple[int, str]:
        """The size of a file in bytes, and `"blake3:"` with its digest in hexadecimal.

        Args:
            name: The file.
            advance: Called with the number of bytes after each piece that was read.
        """
