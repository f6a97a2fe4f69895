"""Threads that read and copy in parallel."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")

_THREADS = min(os.cpu_count() or 1, 4)
"""The number of threads that copy large values; more would wait for the memory."""
_PIECE = 8 << 20


def share_out(copy: Callable[[Iterable[Any]], None], keys: Sequence[Any]) -> None:
    """Copies keys in this thread and others. Each thread takes the next key when it is free."""
    rest = iter(keys)
    others = [helpers().submit(copy, rest) for _ in range(min(_THREADS, len(keys)) - 1)]
    try:
        copy(rest)
    finally:
        # A job that has not begun, because another save uses the threads, has nothing left to do.
        begun = [job for job in others if not job.cancel()]
        concurrent.futures.wait(begun)
    for job in begun:
        job.result()


def copy_together(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copies arrays into other arrays by several threads. Each pair is a target and a source."""
    pieces = [piece for pair in pairs for piece in _pieces(*pair)]

    def copy(part: Iterable[int]) -> None:
        for index in part:
            np.copyto(*pieces[index])

    share_out(copy, sorted(range(len(pieces)), key=lambda index: -pieces[index][1].nbytes))


def _pieces(target: np.ndarray, source: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Splits a copy into pieces of about `_PIECE` bytes, if both arrays are contiguous."""
    count = source.nbytes // _PIECE
    if count < 2 or not (target.flags.c_contiguous and source.flags.c_contiguous):
        return [(target, source)]
    flat = (np.array_split(array.reshape(-1), count) for array in (target, source))
    return zip(*flat, strict=True)


def begin(work: Callable[[], Result]) -> Callable[[], Result]:
    """Starts a function in another thread.

    Returns:
        A function that returns the result. It waits, or runs the work in this thread if no other has begun it.
    """
    job = helpers().submit(work)
    return lambda: work() if job.cancel() else job.result()


@functools.cache
def helpers() -> concurrent.futures.Executor:
    """The pool of threads. They stay, because a new thread takes up to a millisecond to start."""
    return concurrent.futures.ThreadPoolExecutor(max(1, _THREADS - 1), "keras_ckpt-copy")


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=helpers.cache_clear)
