"""The one thread of the process that writes while training goes on. What it is given is done in that order.

So a backup is never there before what was saved earlier. Leaving the process waits for it.
"""

from __future__ import annotations

import concurrent.futures.thread
import functools
import os
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

LITTLE = 64 << 20
"""So many bytes may always wait to be written."""


class Job(Generic[Result]):
    """Something that is done in the background.

    Args:
        work: Does it.
        moment: Of which moment of a training it is: the run, and the step.
        size: The bytes that it holds; those of one moment are the same ones, however many jobs hold them.
    """

    def __init__(self, work: Callable[[], Result], moment: tuple[str, int], size: int) -> None:
        self.moment = moment
        self.size = size
        self._future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        # Before it can begin, for Ctrl-C may come in between.
        _jobs[self] = None
        try:
            _thread().submit(_do, self._future, work)
        except BaseException:
            if self._future.cancel():
                _jobs.pop(self, None)
            raise

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
        _jobs.pop(self, None)
        return self._future.result()


def is_full(moment: tuple[str, int], size: int) -> bool:
    """Whether one more job would hold too much beside those of other moments that are yet to be done."""
    others: dict[tuple[str, int], int] = {}
    for job in _pending():
        if job.size and job.moment != moment:
            others[job.moment] = max(job.size, others.get(job.moment, 0))
    return bool(others) and sum(others.values()) + size > LITTLE


def is_idle() -> bool:
    """Whether there is nothing to be done of what holds something."""
    return not any(job.size for job in _pending())


def wait() -> None:
    """Waits until all that there is by now is done, well or not. What is being done does not wait for itself."""
    if not hasattr(_here, "works"):
        for job in _pending():
            job.wait()


def tell() -> None:
    """Waits until all is done, and warns of the errors that nobody asks for, because their training was interrupted."""
    wait()
    for job in list(_jobs):
        if job.done():
            _jobs.pop(job, None)
            if error := job.error():
                # Python shows a text once, so each error has one of its own.
                run, step = job.moment
                what = f"The save of step {step} of run {run} in the background failed"
                warnings.warn(f"{what}: {error}", stacklevel=2)


def _pending() -> list[Job[Any]]:
    return [job for job in list(_jobs) if not job.done()]


def _do(future: concurrent.futures.Future[Result], work: Callable[[], Result]) -> None:
    try:
        if future.set_running_or_notify_cancel():
            future.set_result(work())
    except BaseException as error:
        # Whoever keeps the error would keep the model's values with it.
        each: BaseException | None = error
        while each is not None:
            traceback.clear_frames(each.__traceback__)
            each = each.__context__
        future.set_exception(error)
        raise  # or the executor would keep the work for as long as somebody has the error
    finally:
        del future, work


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    _thread.cache_clear()
    _jobs.clear()


@functools.cache
def _thread() -> concurrent.futures.Executor:
    executor = concurrent.futures.ThreadPoolExecutor(1, "keras_ckpt-save", lambda: setattr(_here, "works", True))
    executor.submit(int).result()  # Ctrl-C while a thread begins would leave one of which the executor does not know
    return executor


_here = threading.local()
# A dict, because other threads may add and remove while one looks.
_jobs: dict[Job[Any], None] = {}
os.register_at_fork(after_in_child=_forget)
# At the end of a process its threads cannot begin others any more, which writing a file does. This comes before, for
# it is registered after `concurrent.futures.thread` was imported. Python has no public name for it.
threading._register_atexit(tell)  # type: ignore[attr-defined] # noqa: SLF001
