"""Signals that ask a process to end: noted while a training is under way, answered where its state is whole."""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from keras_ckpt.store.notices import warn

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class SignalWatch:
    """Notes the first signal that asks the process to end; a second one leaves at once.

    Args:
        under_way: A method that says of the frame in which a signal came whether the training is under way there. An
            error may have ended it without a word; then, or if nobody has its object any more, the signal has its
            effect as if nobody watched.

    Attributes:
        caught: The signal that came, `None` if none did.
    """

    def __init__(self, under_way: Callable[[FrameType | None], bool]) -> None:
        self.caught: signal.Signals | None = None
        # Python keeps who watches its signals, and would keep the training with it.
        self._under_way = weakref.WeakMethod(under_way)
        self._before: dict[int, Any] = {}

    def under_way(self, frame: FrameType | None) -> bool:
        """Whether the training is under way in a frame."""
        method = self._under_way()
        return method is not None and method(frame)

    def start(self) -> None:
        """Begins to watch, where Python allows it: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            warn(
                "This training is not in the main thread, the only one in which Python lets signals be watched: one "
                "that ends the process ends it without a last backup."
            )
            return
        for number in SIGNALS:
            owner = getattr(signal.getsignal(number), "__self__", None)
            if isinstance(owner, SignalWatch) and not owner.under_way(inspect.currentframe()):
                # Its training was ended by an error.
                self.caught = self.caught or owner.caught
                owner.stop()
            # What is ignored stays ignored, and what was not set by Python could not be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)

    def stop(self) -> None:
        """Puts back what had the signals before."""
        for number, handler in self._before.items():
            # Somebody else may have taken it since.
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._before = {}

    def answer(self, exit_code: int | None = None) -> None:
        """Lets the signal that came have its effect.

        Args:
            exit_code: With what the process ends; `None` leaves that to what had the signal before.
        """
        if self.caught is None:
            return
        if exit_code is not None:
            self.stop()
            raise SystemExit(exit_code)
        self._leave(self.caught, inspect.currentframe())
        # Whoever had the signal lets the training go on.
        self.start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is None and self.under_way(frame):
            self.caught = signal.Signals(number)
        else:
            self._leave(number, frame)

    def _leave(self, number: int, frame: FrameType | None) -> None:
        handler = self._before.get(number, signal.SIG_DFL)
        self.stop()
        self.caught = None
        if callable(handler):
            handler(number, frame)
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # there may be none, or nobody who reads it
                stream.flush()
        os.kill(os.getpid(), number)
