"""The background thread: one thread of the process that writes while training continues.

Jobs run in the order of submission, so earlier saves reach the disk earlier. Within one moment of a training, a backup
runs before checkpoints: a restart from the backup saves these checkpoints again. The process waits for all jobs before
it exits.
"""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import functools
import os
import threading
import traceback
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from keras_ckpt.store.notices import deferring, warn

Result = TypeVar("Result")

SMALL = 64 << 20
"""The bytes that may always wait to be written."""


class Job(Generic[Result]):
    """One piece of work for the background thread.

    Args:
        work: The function to call.
        moment: The moment of a training: the run and the step.
        size: The bytes that the job holds. All jobs of one moment hold the same bytes.
        first: Whether the job runs before other waiting jobs of the moment.
    """

    def __init__(self, work: Callable[[], Result], moment: tuple[str, int], size: int, first: bool = False) -> None:
        self.moment = moment
        self.size = size
        self._work: Callable[[], Result] | None = work
        self._warnings: list[str] = []
        self._future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        # Registered before the job can begin: Ctrl-C may come in between.
        _jobs[self] = None
        try:
            with _lock:
                place = len(_queue)
                while first and place and _queue[place - 1].moment == moment:
                    place -= 1
                _queue.insert(place, self)
            _thread().submit(_do_next)
        except BaseException:
            self.drop()
            raise

    def done(self) -> bool:
        return self._future.done()

    def has_begun(self) -> bool:
        with _lock:
            return self not in _queue

    def wait(self) -> None:
        concurrent.futures.wait([self._future])

    def error(self) -> BaseException | None:
        """The error of the work, if any. Waits for its end."""
        return self._future.exception()

    def result(self) -> Result:
        """Returns the result of the work, or raises its error. Issues its warnings. Waits for its end."""
        self.wait()
        self.claim()
        return self._future.result()

    def claim(self) -> None:
        """Forgets the job, which has ended, and issues the warnings of its work in this thread."""
        _jobs.pop(self, None)
        messages, self._warnings = self._warnings, []
        for message in messages:
            warn(message)

    def drop(self) -> bool:
        """Cancels the job, unless it has begun. Returns whether it was canceled; a canceled job leaves no trace."""
        with _lock, contextlib.suppress(ValueError):
            _queue.remove(self)
            self._work = None
            _jobs.pop(self, None)
            return self._future.cancel()
        return False

    def do(self) -> None:
        """Runs the work, in the background thread."""
        work, self._work = self._work, None
        try:
            if work is not None and self._future.set_running_or_notify_cancel():
                with deferring(self._warnings):
                    result = work()
                work = None  # a waiter for the result may expect that the job holds nothing any more
                self._future.set_result(result)
        except BaseException as error:  # noqa: BLE001 - result() raises it
            # The frames of a kept error would keep the model's values.
            work = None
            each: BaseException | None = error
            while each is not None:
                traceback.clear_frames(each.__traceback__)
                each = each.__context__
            self._future.set_exception(error)


def is_full(moment: tuple[str, int], size: int) -> bool:
    """Whether one more job would hold too many bytes beside the pending jobs of other moments."""
    others: dict[tuple[str, int], int] = {}
    for job in _pending():
        if job.size and job.moment != moment:
            others[job.moment] = max(job.size, others.get(job.moment, 0))
    return bool(others) and sum(others.values()) + size > SMALL


def is_idle() -> bool:
    """Whether no pending job holds bytes."""
    return not any(job.size for job in _pending())


def wait() -> None:
    """Waits for the end of all jobs submitted so far, failed or not. A running job does not wait for itself."""
    if not hasattr(_here, "works"):
        for job in _pending():
            job.wait()


def report() -> None:
    """Waits for all jobs, and issues unclaimed warnings and errors: an interrupted training never asks for results."""
    wait()
    for job in list(_jobs):
        if job.done():
            job.claim()
            if error := job.error():
                # Python shows equal warnings once, so each error gets a distinct text.
                run, step = job.moment
                what = f"The save of step {step} of run {run} in the background failed"
                warn(f"{what}: {error}")


def _pending() -> list[Job[Any]]:
    return [job for job in list(_jobs) if not job.done()]


def _do_next() -> None:
    with _lock:
        job = _queue.pop(0) if _queue else None  # a job may have been dropped
    if job is not None:
        job.do()


def _forget() -> None:
    """Resets the module in a forked child, which has none of its parent's threads."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()  # another thread of the parent may have held the old lock
    _thread.cache_clear()
    _jobs.clear()
    _queue.clear()


@functools.cache
def _thread() -> concurrent.futures.Executor:
    executor = concurrent.futures.ThreadPoolExecutor(1, "keras_ckpt-save", lambda: setattr(_here, "works", True))
    executor.submit(int).result()  # Ctrl-C while a thread starts would leave a thread unknown to the executor
    return executor


_here = threading.local()
_lock = threading.Lock()
_queue: list[Job[Any]] = []
"""The jobs that have not begun."""
# A dict, because other threads may add and remove jobs while a thread reads it.
_jobs: dict[Job[Any], None] = {}
os.register_at_fork(after_in_child=_forget)
# At the exit of a process, threads can no longer start threads, which writing a file does. This function runs before
# that, because it is registered after the import of `concurrent.futures.thread`. Python has no public name for it.
threading._register_atexit(report)  # type: ignore[attr-defined] # noqa: SLF001
