"""Signals that ask a process to end: noted while a training is in progress, answered when its state is saved."""

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
    """Notes the first signal that asks the process to end; a second one ends the process at once.

    Args:
        in_progress: A method that says whether the training is in progress in the frame that a signal interrupted. An
            error may have ended the training unnoticed. Then, or if nothing refers to the owner of the method any
            more, the signal has its effect as if nothing watched.
        exit_code: The exit code of the process after a signal; `None` leaves the effect of the signal to the handler
            before.

    Attributes:
        caught: The signal that came, `None` if none did.
    """

    def __init__(self, in_progress: Callable[[FrameType | None], bool], exit_code: int | None) -> None:
        self.caught: signal.Signals | None = None
        self._exit_code = exit_code
        # Python keeps the handlers of signals, and would keep the training with them.
        self._in_progress = weakref.WeakMethod(in_progress)
        self._before: dict[int, Any] = {}

    def is_in_progress(self, frame: FrameType | None) -> bool:
        """Whether the training is in progress in a frame."""
        method = self._in_progress()
        return method is not None and method(frame)

    def start(self) -> None:
        """Installs the handlers, where Python allows it: in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            warn(
                "This training is not in the main thread, and Python handles signals only there. A signal that ends "
                "the process ends it without a last backup."
            )
            return
        for number in SIGNALS:
            owner = getattr(signal.getsignal(number), "__self__", None)
            if isinstance(owner, SignalWatch) and not owner.is_in_progress(inspect.currentframe()):
                # An error has ended the training of the owner.
                self.caught = self.caught or owner.caught
                owner.stop()
            # An ignored signal stays ignored. A handler that Python did not set could not be restored.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._note)

    def stop(self) -> None:
        """Restores the handlers before."""
        for number, handler in self._before.items():
            # Another program part may have set its own handler since.
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
        self._before = {}

    def answer(self) -> None:
        """Lets the signal that came have its effect."""
        if self.caught is None:
            return
        if self._exit_code is not None:
            self.stop()
            raise SystemExit(self._exit_code)
        self._leave(self.caught, inspect.currentframe())
        # The handler lets the training continue.
        self.start()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is None and self.is_in_progress(frame):
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
            with contextlib.suppress(Exception):  # a stream may be missing, or closed at its other end
                stream.flush()
        os.kill(os.getpid(), number)
