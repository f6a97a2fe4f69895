"""A run that is watched while it trains: in a terminal by `keras-ckpt watch`, in a notebook from a thread.

A look once a second asks the file system for a few times. The run is read when one of them has changed.
"""

from __future__ import annotations

import contextlib
import functools
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from keras_ckpt.errors import CheckpointError
from keras_ckpt.store.files import Folder
from keras_ckpt.store.journal import Journal
from keras_ckpt.store.layout import Series
from keras_ckpt.store.listing import TICK
from keras_ckpt.store.tables import Shown, relative

if TYPE_CHECKING:
    from keras_ckpt.store.directory import CheckpointDirectory

_SECONDS = 1.0
"""The time between two looks."""


def views(run: CheckpointDirectory, rows: int, stopped: threading.Event, since: float = 0.0) -> Iterator[Shown]:
    """Yields what is to be seen of a run: now, and after each change, until its training has ended.

    Args:
        run: The run.
        rows: The largest number of rows of a complete table.
        stopped: Ends the iteration.
        since: A training that ended earlier does not count, in seconds since 1970.
    """
    before = None
    while not stopped.is_set():
        now = _stamps(run.path)
        if now != before:
            before = now
            try:
                view = run.look(rows)
            except (CheckpointError, OSError):
                yield run  # its table has the error
            else:
                yield view
                if view.has_ended(since):
                    return
        stopped.wait(_SECONDS)


def _stamps(path: str) -> list[object]:
    """Values that differ once the checkpoints or a journal have changed."""
    stamps: list[object] = []
    with contextlib.suppress(OSError), Folder(path) as folder:
        for template in ["", *sorted(folder.templates())]:
            with Folder(path, Series(template)) as each:
                changed = each.changed()
                # A change right after this one may have the same time, so one more look follows.
                stamps += [changed, time.time_ns() - changed < TICK, Journal(each).stamp()]
    return stamps


class Watch:
    """A run that a notebook shows while it trains.

    Args:
        run: The run.
        rows: The largest number of rows of a complete table.

    Raises:
        ImportError: IPython is not installed.
    """

    def __init__(self, run: CheckpointDirectory, rows: int) -> None:
        try:
            from IPython.display import display
        except ImportError as error:
            raise ImportError(
                f"watch() shows a run in a notebook, and IPython is not installed ({error}). In a shell, type "
                f"keras-ckpt watch {shlex.quote(relative(run.path))}"
            ) from error
        self._path = run.path
        self._stopped = threading.Event()
        shown = views(run, rows, self._stopped, since=time.time())
        show: Callable[..., Any] = functools.partial(display, display_id=f"keras_ckpt-{uuid.uuid4().hex}")
        show(next(shown))
        self._thread = threading.Thread(target=_follow, args=(shown, show), name="keras_ckpt-watch", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<{'watching' if self._thread.is_alive() else 'watched'} {relative(self._path)}>"

    def stop(self) -> None:
        """Ends the watch. The notebook keeps what it shows."""
        self._stopped.set()
        self._thread.join()


def _follow(shown: Iterator[Shown], show: Callable[..., Any]) -> None:
    for view in shown:
        show(view, update=True)
