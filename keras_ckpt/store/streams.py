"""The bytes of one open file: written and read in portions, by several threads, and digested on the way."""

from __future__ import annotations

import collections
import concurrent.futures.thread
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any

from blake3 import blake3

PORTION, _PORTIONS = 8 << 20, 3
"""So many bytes are written at once, and so many portions, written or read, are under way."""
_AHEAD = 4 << 20
"""So many bytes are read at once, and digested while they are in the caches of the processor still."""
_PIECES = 1000
"""So many pieces of memory may be read into at once; the kernel's limit is a little more."""
_DIRECT = getattr(os, "O_DIRECT", 0)


class OpenFile:
    """A file that is being read.

    Attributes:
        size: Its bytes.
    """

    def __init__(self, descriptor: int, size: int, name: str) -> None:
        self.size = size
        self._descriptor = descriptor
        self._name = name

    def read_into(self, memory: Sequence[memoryview], offset: int) -> None:
        """Reads bytes from an offset on, one piece of memory after another, until all are full."""
        left = list(memory)
        while left:
            count = read_into(self._descriptor, left[:_PIECES], offset, self._name)
            if not count:
                raise OSError(errno.EIO, f"it ends at {offset}, where more was to be read", self._name)
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def in_portions(
        self, parts: Sequence[tuple[int, memoryview]], threads: concurrent.futures.Executor
    ) -> Iterator[Sequence[memoryview]]:
        """Reads all of it, some portions ahead; the memory of each portion, in the order of the file."""
        under_way: collections.deque[tuple[concurrent.futures.Future[None], Sequence[memoryview]]]
        under_way = collections.deque()
        try:
            for offset, portion in _portions(self.size, parts):
                under_way.append((threads.submit(self.read_into, portion, offset), portion))
                if len(under_way) > _PORTIONS:
                    reading, memory = under_way.popleft()
                    reading.result()
                    yield memory
            for reading, memory in under_way:
                reading.result()
                yield memory
        finally:
            # The descriptor is not another file's before that.
            concurrent.futures.wait([reading for reading, _ in under_way])


def _portions(size: int, parts: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, Sequence[memoryview]]]:
    """All of a file in portions: where each begins, and memory for it, which is nobody's between the parts."""
    begin = filled = 0
    memory: list[memoryview] = []
    for piece in _cut(size, parts):
        if memory and (filled + len(piece) > _AHEAD or len(memory) == _PIECES):
            yield begin, memory
            begin, filled, memory = begin + filled, 0, []
        memory.append(piece)
        filled += len(piece)
    if memory:
        yield begin, memory


def _cut(size: int, parts: Sequence[tuple[int, memoryview]]) -> Iterator[memoryview]:
    """Memory for all of a file, in pieces of a portion at most."""
    # It costs nothing before it is written to. Often that is a few bytes, and a great page takes milliseconds.
    # It is used again when what was there is digested: by then no more portions than these are under way.
    scratch, used = memoryview(pages((_PORTIONS + 4) * _AHEAD, great=False)), 0
    at = 0
    for begin, part in [*parts, (size, memoryview(b""))]:
        for start in range(at, begin, _AHEAD):
            gap = min(_AHEAD, begin - start)
            used = used if used + gap <= len(scratch) else 0
            yield scratch[used : used + gap]
            used += gap
        for start in range(0, len(part), _AHEAD):
            yield part[start : start + _AHEAD]
        at = begin + len(part)


class NewFile:
    """A file that is being written: each part is digested while it is on its way to the disk.

    Attributes:
        size: The bytes that were written.
    """

    def __init__(self, descriptor: int) -> None:
        self.size = 0
        self._descriptor = descriptor
        self._hasher = blake3()
        self._gathered: list[memoryview] = []
        self._gathered_size = 0
        self._threads: list[concurrent.futures.Executor] = []
        self._under_way: collections.deque[concurrent.futures.Future[Any]] = collections.deque()

    def write(self, data: memoryview) -> None:
        """Adds bytes, which must not change before the end: they are gathered, to be written together."""
        self.size += len(data)
        self._gathered.append(data)
        self._gathered_size += len(data)
        if self._gathered_size >= PORTION:
            self._pass_on(self._taken(), direct=False)

    def write_pages(self, data: memoryview) -> None:
        """Adds whole pages of memory, which must not change before the end, before any other bytes.

        They go past the page cache where the file system can do that: it saves a copy, and the sync at the end finds
        nothing left to do.
        """
        self.size += len(data)
        self._pass_on(data, direct=True)

    def finish(self) -> tuple[int, str]:
        """Writes what is left, and has it sent to the disk: a later sync of several files waits for them together.

        Called again, it finds nothing to do.

        Returns:
            The size in bytes, and `"blake3:"` with the digest of all bytes in hexadecimal.
        """
        rest = self._taken()
        if self._under_way:
            self._pass_on(rest, direct=False)
            self._wait(0)
        else:
            self._hasher.update(rest)
            _write_all(self._descriptor, rest, direct=False)
        _begin_to_sync(self._descriptor)
        return self.size, f"blake3:{self._hasher.hexdigest()}"

    def close(self) -> None:
        """Waits for what is under way, however it ends, so that the descriptor is not another file's by then."""
        for thread in self._threads:
            thread.shutdown()

    def _taken(self) -> memoryview:
        """What was gathered, in one piece."""
        pieces, self._gathered, self._gathered_size = self._gathered, [], 0
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _pass_on(self, data: memoryview, direct: bool) -> None:
        if not self._threads:
            names = ("keras_ckpt-write", "keras_ckpt-digest")
            self._threads = [concurrent.futures.ThreadPoolExecutor(1, name) for name in names]
        self._wait(2 * _PORTIONS)
        writes, digests = self._threads
        self._under_way.append(writes.submit(_write_all, self._descriptor, data, direct))
        self._under_way.append(digests.submit(self._hasher.update, data))

    def _wait(self, number: int) -> None:
        """Waits until no more than so many writes and digests are under way."""
        while len(self._under_way) > number:
            self._under_way.popleft().result()


def pages(size: int, great: bool = True) -> mmap.mmap:
    """Memory that begins with a page; in great pages, if the kernel has them, or in none of these."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE if great else mmap.MADV_NOHUGEPAGE)
    return memory


def _send_function() -> Any:
    """Linux's `sync_file_range`, which Python does not have, if there is one."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_send = _send_function()
_SEND_NOW = 2


def _begin_to_sync(descriptor: int) -> None:
    """Has the kernel send to the disk what is in the page cache. It is a hint; errors are those of the sync."""
    if _send is not None:
        _send(descriptor, 0, 0, _SEND_NOW)


def _write_all(descriptor: int, data: memoryview, direct: bool) -> None:
    _set_direct(descriptor, direct)
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            # After a part was written, or on a file system that does not keep what it said, the cache has to help.
            if error.errno != errno.EINVAL or not fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT:
                raise
            _set_direct(descriptor, False)


def _set_direct(descriptor: int, direct: bool) -> None:
    """Says whether what is written next goes past the page cache."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if bool(flags & _DIRECT) != direct:
        with contextlib.suppress(OSError):  # not every file system can
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ _DIRECT)


def read_into(descriptor: int, memory: Sequence[memoryview], offset: int, name: str) -> int:
    """Reads into pieces of memory, one after another, what there is; how many bytes that were."""
    try:
        return os.preadv(descriptor, memory, offset)
    except OSError as error:
        error.filename = name
        raise
