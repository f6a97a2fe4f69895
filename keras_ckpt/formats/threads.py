"""Threads that copy memory side by side."""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")

_THREADS = min(os.cpu_count() or 1, 4)
"""So many copy large values; more would wait for the memory."""
_PIECE = 8 << 20


def share_out(copy: Callable[[Iterable[Any]], None], keys: Sequence[Any]) -> None:
    """Has this thread and others copy, each what is the next."""
    rest = iter(keys)
    others = [_threads().submit(copy, rest) for _ in range(min(_THREADS, len(keys)) - 1)]
    try:
        copy(rest)
    finally:
        # One that has not begun, because another save has the threads, has nothing left to do.
        begun = [each for each in others if not each.cancel()]
        concurrent.futures.wait(begun)
    for each in begun:
        each.result()


def copy_together(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copies arrays into others, by several threads; each pair is the target and the source."""

    pieces = [piece for pair in pairs for piece in _pieces(*pair)]

    def copy(part: Iterable[int]) -> None:
        for index in part:
            np.copyto(*pieces[index])

    share_out(copy, sorted(range(len(pieces)), key=lambda index: -pieces[index][1].nbytes))


def _pieces(target: np.ndarray, source: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """A copy as several of about `_PIECE` bytes, if the arrays lie in one piece of memory."""
    count = source.nbytes // _PIECE
    if count < 2 or not (target.flags.c_contiguous and source.flags.c_contiguous):
        return [(target, source)]
    flat = (np.array_split(each.reshape(-1), count) for each in (target, source))
    return zip(*flat, strict=True)


def begin(work: Callable[[], Result]) -> Callable[[], Result]:
    """Begins something in another thread.

    Returns:
        What waits for it and gives its result, or does it in this thread if no other has come to it.
    """
    job = _threads().submit(work)
    return lambda: work() if job.cancel() else job.result()


@functools.cache
def _threads() -> concurrent.futures.Executor:
    """Threads that stay, for a new one takes up to a millisecond to begin."""
    return concurrent.futures.ThreadPoolExecutor(max(1, _THREADS - 1), "keras_ckpt-copy")


# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_threads.cache_clear)
