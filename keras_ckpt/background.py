"""The one thread of the process that writes while training goes on. What it is given is done in that order.

So a backup is never there before what was saved earlier. Leaving the process waits for it.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

LITTLE = 64 << 20
"""So many bytes may always wait to be written."""


class Job(Generic[Result]):
    """Something that is done in the background.

    Args:
        work: Does it.
        moment: Of which moment of a training it is.
        size: The bytes of a model that it holds; those of one moment are held once, however many jobs hold them.
    """

    def __init__(self, work: Callable[[], Result], moment: Hashable, size: int) -> None:
        self.moment = moment
        self.size = size
        self._future = _thread().submit(_do, work)
        _jobs.append(self)

    def done(self) -> bool:
        return self._future.done()

    def wait(self) -> None:
        concurrent.futures.wait([self._future])

    def error(self) -> BaseException | None:
        """What the work raised, if it did; waits until it is done."""
        return self._future.exception()

    def result(self) -> Result:
        """What the work returned, or an error that it raised; waits until it is done."""
        self.wait()
        if self in _jobs:
            _jobs.remove(self)
        return self._future.result()


def is_full(moment: Hashable, size: int) -> bool:
    """Whether one more job would hold too much beside those of other moments that are yet to be done."""
    others = {job.moment: job.size for job in _jobs if job.size and job.moment != moment and not job.done()}
    return bool(others) and sum(others.values()) + size > LITTLE


def is_idle() -> bool:
    """Whether all is done."""
    return all(job.done() for job in _jobs)


def wait() -> None:
    """Waits until all is done, well or not. What is being done does not wait for itself."""
    while not hasattr(_here, "works") and (pending := [job for job in _jobs if not job.done()]):
        pending[0].wait()


def tell() -> None:
    """Waits until all is done, and warns of the errors that nobody asks for, because their training was interrupted."""
    wait()
    for job in [job for job in _jobs if job.done()]:
        _jobs.remove(job)
        if error := job.error():
            warnings.warn(f"A save in the background failed: {error}", stacklevel=2)


def _do(work: Callable[[], Result]) -> Result:
    try:
        return work()
    except BaseException as error:
        # Whoever keeps the error would keep the model's values with it.
        each: BaseException | None = error
        while each is not None:
            traceback.clear_frames(each.__traceback__)
            each = each.__context__
        raise
    finally:
        del work


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    _thread.cache_clear()
    _jobs.clear()


@functools.cache
def _thread() -> concurrent.futures.Executor:
    return concurrent.futures.ThreadPoolExecutor(1, "keras_ckpt-save", lambda: setattr(_here, "works", True))


_here = threading.local()
_jobs: list[Job[Any]] = []
os.register_at_fork(after_in_child=_forget)
# At the end of a process its threads cannot begin others any more, which writing a file does; this comes before. Python
# has no public name for it.
threading._register_atexit(tell)  # type: ignore[attr-defined] # noqa: SLF001
