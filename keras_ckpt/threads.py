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

    def copy(part: Iterable[int]) -> None:
        for index in part:
            np.copyto(*pairs[index])

    share_out(copy, sorted(range(len(pairs)), key=lambda index: -pairs[index][1].nbytes))


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
