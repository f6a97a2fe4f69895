"""The one thread of the process that writes while training goes on.

Jobs are done in the order in which they come, so what was due earlier is on disk earlier. Of one moment of a training,
a backup goes before checkpoints that only select: after a restart from it they are saved again. Leaving the process
waits for all jobs.
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

from keras_ckpt.store.notices import warn

Result = TypeVar("Result")

LITTLE = 64 << 20
"""So many bytes may always wait to be written."""


class Job(Generic[Result]):
    """Something that is done in the background.

    Args:
        work: Does it.
        moment: Of which moment of a training it is: the run, and the step.
        size: The bytes that it holds; those of one moment are the same ones, however many jobs hold them.
        first: Whether it goes before other jobs of the moment that wait.
    """

    def __init__(self, work: Callable[[], Result], moment: tuple[str, int], size: int, first: bool = False) -> None:
        self.moment = moment
        self.size = size
        self._work: Callable[[], Result] | None = work
        self._future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        # Before it can begin, for Ctrl-C may come in between.
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
        """What the work raised, if it did; waits until it is done."""
        return self._future.exception()

    def result(self) -> Result:
        """What the work returned, or an error that it raised; waits until it is done."""
        self.wait()
        _jobs.pop(self, None)
        return self._future.result()

    def drop(self) -> bool:
        """Gives the job up, unless it has begun. Says whether it was given up; then it is as if it had never been."""
        with _lock, contextlib.suppress(ValueError):
            _queue.remove(self)
            self._work = None
            _jobs.pop(self, None)
            return self._future.cancel()
        return False

    def do(self) -> None:
        """Does the work, in the thread that is there for it."""
        work, self._work = self._work, None
        try:
            if work is not None and self._future.set_running_or_notify_cancel():
                result = work()
                work = None  # whoever waits for the result may expect that nothing is held any more
                self._future.set_result(result)
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            # Whoever keeps the error would keep the model's values with it.
            work = None
            each: BaseException | None = error
            while each is not None:
                traceback.clear_frames(each.__traceback__)
                each = each.__context__
            self._future.set_exception(error)


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
                warn(f"{what}: {error}")


def _pending() -> list[Job[Any]]:
    return [job for job in list(_jobs) if not job.done()]


def _do_next() -> None:
    with _lock:
        job = _queue.pop(0) if _queue else None  # one may have been dropped
    if job is not None:
        job.do()


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _lock  # noqa: PLW0603
    _lock = threading.Lock()  # the parent's may have been held
    _thread.cache_clear()
    _jobs.clear()
    _queue.clear()


@functools.cache
def _thread() -> concurrent.futures.Executor:
    executor = concurrent.futures.ThreadPoolExecutor(1, "keras_ckpt-save", lambda: setattr(_here, "works", True))
    executor.submit(int).result()  # Ctrl-C while a thread begins would leave one of which the executor does not know
    return executor


_here = threading.local()
_lock = threading.Lock()
_queue: list[Job[Any]] = []
"""The jobs that have not begun."""
# A dict, because other threads may add and remove while one looks.
_jobs: dict[Job[Any], None] = {}
os.register_at_fork(after_in_child=_forget)
# At the end of a process its threads cannot begin others any more, which writing a file does. This comes before, for
# it is registered after `concurrent.futures.thread` was imported. Python has no public name for it.
threading._register_atexit(tell)  # type: ignore[attr-defined] # noqa: SLF001
