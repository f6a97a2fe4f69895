"""Streams of one file: reads and writes portions with several threads, and digests the bytes on the way."""

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
from typing import Any, Self

from blake3 import blake3

PORTION, _PORTIONS = 8 << 20, 3
"""The bytes of one write, and the number of reads or writes in progress."""
_AHEAD = 4 << 20
"""The bytes of one read. They are digested while they are still in the processor's caches."""
_PIECES = 1000
"""The most pieces of memory for one read; the kernel's limit is slightly larger."""
_DIRECT = getattr(os, "O_DIRECT", 0)


class OpenFile:
    """A file that is open for reading, until the end of a `with` statement.

    Attributes:
        descriptor: The descriptor.
        size: The size in bytes.
    """

    def __init__(self, descriptor: int, size: int, name: str) -> None:
        self.descriptor = descriptor
        self.size = size
        self._name = name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def read_into(self, memory: Sequence[memoryview], offset: int) -> None:
        """Reads bytes from an offset, until all pieces of memory are full, one after another."""
        left = list(memory)
        while left:
            count = read_into(self.descriptor, left[:_PIECES], offset, self._name)
            if not count:
                raise OSError(errno.EIO, f"the file ends at {offset}, more bytes were expected", self._name)
            offset += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]

    def in_portions(
        self, size: int, parts: Sequence[tuple[int, memoryview]], threads: concurrent.futures.Executor
    ) -> Iterator[Sequence[memoryview]]:
        """Reads the first `size` bytes, some portions ahead. Yields the memory of each portion, in the file's order."""
        pending: collections.deque[tuple[concurrent.futures.Future[None], Sequence[memoryview]]]
        pending = collections.deque()
        try:
            for offset, portion in _portions(size, parts):
                pending.append((threads.submit(self.read_into, portion, offset), portion))
                if len(pending) > _PORTIONS:
                    reading, memory = pending.popleft()
                    reading.result()
                    yield memory
            for reading, memory in pending:
                reading.result()
                yield memory
        finally:
            # After the close, the descriptor may be another file's.
            concurrent.futures.wait([reading for reading, _ in pending])


def _portions(size: int, parts: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[int, Sequence[memoryview]]]:
    """The offset and the memory of each portion of a file. Between the parts, the memory is scratch memory."""
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
    """The memory for a whole file, in pieces of at most one portion."""
    # Unused scratch memory costs nothing. Often only a few bytes are used, and a huge page takes milliseconds.
    # Scratch memory is used again once its bytes are digested: it holds more portions than are in progress.
    scratch, used = memoryview(pages((_PORTIONS + 4) * _AHEAD, huge=False)), 0
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
    """A new file that is open for writing: a thread digests each part while another thread writes it.

    Attributes:
        size: The bytes written so far.
    """

    def __init__(self, descriptor: int) -> None:
        self.size = 0
        self._descriptor = descriptor
        self._hasher = blake3()
        self._gathered: list[memoryview] = []
        self._gathered_size = 0
        self._threads: list[concurrent.futures.Executor] = []
        self._memory: collections.deque[memoryview] = collections.deque()
        self._pending: collections.deque[concurrent.futures.Future[Any]] = collections.deque()

    def write(self, data: memoryview) -> None:
        """Adds bytes, gathered with others into one write. They must not change before the end."""
        self.size += len(data)
        self._gathered.append(data)
        self._gathered_size += len(data)
        if self._gathered_size >= PORTION:
            self._submit(self._taken(), direct=False)

    def portion(self) -> memoryview:
        """Memory of whole pages for the next portion, to be filled and given to `write_pages`."""
        # The oldest memory is free again: `_submit` waits for all but the latest portions.
        if len(self._memory) < _PORTIONS + 2:
            self._memory.append(memoryview(pages(PORTION)))
        else:
            self._memory.rotate(-1)
        return self._memory[-1]

    def write_pages(self, data: memoryview) -> None:
        """Adds whole pages of memory, before any other bytes. Only memory of `portion` may change before the end.

        Where the file system can, the write bypasses the page cache: this saves a copy, and leaves nothing for the
        final sync.
        """
        self.size += len(data)
        self._submit(data, direct=True)

    def finish(self) -> tuple[int, str]:
        """Writes the rest and starts its transfer to disk, so that a later sync waits for several files together.

        Bytes that follow need another call.

        Returns:
            The size in bytes, and `"blake3:"` with the digest of all bytes in hexadecimal.
        """
        rest = self._taken()
        if self._pending:
            self._submit(rest, direct=False)
            self._wait(0)
        else:
            self._hasher.update(rest)
            _write_all(self._descriptor, rest, direct=False)
        _begin_to_sync(self._descriptor)
        return self.size, f"blake3:{self._hasher.hexdigest()}"

    def close(self) -> None:
        """Waits for the pending writes, failed or not: after the close, the descriptor may be another file's."""
        for thread in self._threads:
            thread.shutdown()

    def _taken(self) -> memoryview:
        """Takes the gathered bytes, in one piece."""
        pieces, self._gathered, self._gathered_size = self._gathered, [], 0
        return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))

    def _submit(self, data: memoryview, direct: bool) -> None:
        if not self._threads:
            names = ("keras_ckpt-write", "keras_ckpt-digest")
            self._threads = [concurrent.futures.ThreadPoolExecutor(1, name) for name in names]
        self._wait(2 * _PORTIONS)
        writes, digests = self._threads
        self._pending.append(writes.submit(_write_all, self._descriptor, data, direct))
        self._pending.append(digests.submit(self._hasher.update, data))

    def _wait(self, number: int) -> None:
        """Waits until at most `number` writes and digests are in progress."""
        while len(self._pending) > number:
            self._pending.popleft().result()


def pages(size: int, huge: bool = True) -> mmap.mmap:
    """Allocates page-aligned memory, with or without huge pages where the kernel has them."""
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    return memory


def _send_function() -> Any:
    """Linux's `sync_file_range`, which Python lacks, or `None` on other systems."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_send = _send_function()
_SEND_NOW = 2


def _begin_to_sync(descriptor: int) -> None:
    """Asks the kernel to write the file's page cache to disk. This is only a hint; the sync reports errors."""
    if _send is not None:
        _send(descriptor, 0, 0, _SEND_NOW)


def _write_all(descriptor: int, data: memoryview, direct: bool) -> None:
    _set_direct(descriptor, direct)
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except OSError as error:
            # After a partial write, or on a file system that only claims direct writes, use the page cache.
            if error.errno != errno.EINVAL or not fcntl.fcntl(descriptor, fcntl.F_GETFL) & _DIRECT:
                raise
            _set_direct(descriptor, False)


def _set_direct(descriptor: int, direct: bool) -> None:
    """Sets whether the next writes bypass the page cache."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if bool(flags & _DIRECT) != direct:
        with contextlib.suppress(OSError):  # some file systems have no direct writes
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags ^ _DIRECT)


def read_into(descriptor: int, memory: Sequence[memoryview], offset: int, name: str) -> int:
    """Reads available bytes into pieces of memory, one after another. Returns the number of bytes."""
    try:
        return os.preadv(descriptor, memory, offset)
    except OSError as error:
        error.filename = name
        raise
