"""Messages of the package: warnings that point at the user's line, and a log of events.

The log `keras_ckpt` has a line of level INFO for each checkpoint that is saved, removed, recovered or restored:
`logging.basicConfig(level="INFO")` shows them. Callbacks print, if they are verbose.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import sysconfig
import threading
import warnings
from collections.abc import Iterator

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")
_STANDARD = os.path.join(sysconfig.get_path("stdlib"), "")
_FRAMEWORKS = tuple(os.path.join("", *parts, "") for parts in (("keras", "src"), ("tensorflow", "python")))

log = logging.getLogger("keras_ckpt")
_here = threading.local()


def warn(message: str) -> None:
    """Warns at the innermost line of the call stack outside of this package, Keras, TensorFlow and Python."""
    deferred: list[str] | None = getattr(_here, "deferred", None)
    if deferred is not None:
        deferred.append(message)
        return
    level, frame = 1, sys._getframe(0)  # noqa: SLF001 - the type of inspect.currentframe() includes None
    while frame is not None and _is_inner(frame.f_code.co_filename):
        frame = frame.f_back  # type: ignore[assignment]
        level += 1
    warnings.warn(message, stacklevel=level if frame is not None else 2)


@contextlib.contextmanager
def deferring(messages: list[str]) -> Iterator[None]:
    """Adds the warnings of this thread to a list: the call stack of a background thread has no line of the user."""
    _here.deferred = messages
    try:
        yield
    finally:
        _here.deferred = None


def _is_inner(path: str) -> bool:
    standard = path.startswith(_STANDARD) and "site-packages" not in path
    return path.startswith((_PACKAGE, "<frozen ")) or standard or any(each in path for each in _FRAMEWORKS)
