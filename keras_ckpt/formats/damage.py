"""Errors of readers of damaged files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from keras_ckpt.errors import CheckpointError, DamagedCheckpointError
from keras_ckpt.store.checks import unreadable


@contextlib.contextmanager
def damage_of(prefix: str) -> Iterator[None]:
    """Adds the path of a checkpoint to the error of its damage."""
    try:
        yield
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{prefix} cannot be trusted: {error}") from error


@contextlib.contextmanager
def errors_as_damage(*others: type[Exception]) -> Iterator[None]:
    """Turns the many errors of readers of a damaged file into `DamagedCheckpointError`; lack of memory is no damage.

    Args:
        others: More errors that propagate.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except others:
        raise
    except OSError as error:
        raise unreadable(error) from error
    except Exception as error:
        raise DamagedCheckpointError(f"it cannot be read: {error}") from error
