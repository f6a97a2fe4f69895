"""Finds the checkpoint that a user names by a record, a directory or a path, and opens its files."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from keras_ckpt.errors import CheckpointNotFoundError, DamagedCheckpointError, FormatVersionError
from keras_ckpt.store import background, commit, layout
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.listing import Listing, check_files, held, read_record, unmanaged
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord, step_in

Result = TypeVar("Result")
Read = Callable[[Folder, str, CheckpointRecord | None], Result]
"""Reads a checkpoint: its files, its name, and its record, `None` if it has no sidecar."""

_ATTEMPTS = 100


def read_checkpoint(checkpoint: object, read: Read[Result], keep_open: contextlib.ExitStack | None = None) -> Result:
    """Reads a checkpoint; for a directory its newest that is not damaged.

    Args:
        checkpoint: A record, a directory, its listing, or the path of a directory or a checkpoint.
        read: Reads it. Another error than that of a damaged checkpoint is propagated.
        keep_open: Closes the files of the checkpoint. By default they are closed when `read` returns.

    Returns:
        What `read` returns.

    Raises:
        DamagedCheckpointError, FormatVersionError: It cannot be trusted.
        CheckpointNotFoundError: There is no such checkpoint.
    """
    expected = checkpoint if isinstance(checkpoint, CheckpointRecord) else None
    background.tell()
    for _ in range(_ATTEMPTS):
        directory, names = _locate(checkpoint)
        try:
            return _read_first(directory, names, expected, read, keep_open)
        except CheckpointNotFoundError:
            raise
        except FileNotFoundError as error:
            # The checkpoint was pruned or saved again between two looks; the next look gives another list.
            gone = error
    raise CheckpointNotFoundError(f"There is no checkpoint {os.path.join(directory, names[0])}.") from gone


def _read_first(
    directory: str,
    names: Sequence[str],
    expected: CheckpointRecord | None,
    read: Read[Result],
    keep_open: contextlib.ExitStack | None,
) -> Result:
    """Reads the first of the checkpoints that is not damaged."""
    for name, older in itertools.zip_longest(names, names[1:]):
        try:
            # The digests are compared while the values are read.
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(Folder(directory))
                record, files = stack.enter_context(opened(folder, name, expected, check_digests=False))
                result = read(files, name, record)
                if keep_open is not None:
                    keep_open.enter_context(stack.pop_all())
                return result
        except (DamagedCheckpointError, FormatVersionError) as error:
            message = f"{os.path.join(directory, name)} cannot be trusted: {error}"
            if older is None or isinstance(error, FormatVersionError):
                raise type(error)(message) from error
            warn(f"{message}. Going back to {older}.")
    raise CheckpointNotFoundError(f"There is no checkpoint in {directory}.")


def _locate(checkpoint: object) -> tuple[str, list[str]]:
    """The directory of a checkpoint, and its name; for a directory, the names of all, newest first."""
    if isinstance(checkpoint, CheckpointRecord):
        return checkpoint.directory, [checkpoint.name]
    if isinstance(checkpoint, CheckpointDirectory):
        return checkpoint.path, _newest_first(checkpoint.listing())
    if isinstance(checkpoint, Listing):
        return checkpoint.path, _newest_first(checkpoint)
    if not isinstance(checkpoint, str | os.PathLike) or not os.fspath(checkpoint):
        raise TypeError(
            "Expected a record, a directory, or a path of a checkpoint. "
            f"Received: {checkpoint!r:.200}"
            + (", which latest() and best() return for an empty directory" * (checkpoint is None))
        )
    path = os.path.abspath(os.fspath(checkpoint))
    if os.path.isdir(path):
        return path, _newest_first(CheckpointDirectory(path).listing())
    if path.endswith((".keras", ".h5")):
        raise ValueError(
            f"{path} is a file of Keras's own: model.load_weights() or keras.models.load_model() reads it."
        )
    return os.path.dirname(path), [layout.named_by(os.path.basename(path))]


def _newest_first(listing: Listing) -> list[str]:
    """The checkpoints to try, and a warning for each newer one that is damaged already at first sight."""
    names = [record.name for record in reversed(listing.records)]
    reasons = [f"{name} in {listing.path} is damaged: {error}" for name, error in listing.damaged.items()]
    if not names and listing.damaged:
        raise DamagedCheckpointError(f"No checkpoint can be restored. {'. '.join(reasons)}.")
    if names:
        newest = listing.records[-1].step
        for name, reason in zip(listing.damaged, reasons, strict=True):
            if (step_in(name) or 0) > newest:
                warn(f"{reason}. Going back to {names[0]}.")
        return names
    if not listing.unmanaged:
        return []
    with Folder(listing.path) as folder:
        hinted = commit.read_state(folder)[0]
    return [hinted if hinted in listing.unmanaged else listing.unmanaged[-1]]


@contextlib.contextmanager
def opened(
    folder: Folder, name: str, expected: CheckpointRecord | None = None, check_digests: bool = True
) -> Iterator[tuple[CheckpointRecord | None, Folder]]:
    """The record of a checkpoint, `None` if it has no sidecar, and its files, checked and held.

    Args:
        folder: The directory.
        name: The checkpoint.
        expected: What it has to be still.
        check_digests: Whether to compare every byte; if not, the sizes of the files.

    Raises:
        DamagedCheckpointError, FormatVersionError: It cannot be trusted.
        CheckpointNotFoundError: It is not the expected one.
        FileNotFoundError: There is none of that name, or none any more.
    """
    if not folder.exists(layout.sidecar(name)):
        if not unmanaged(folder, {name}):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        with folder.held(file for file in folder.names() if layout.is_tensorflows(file, name)) as files:
            yield None, files
        return
    record = read_record(folder, name)
    if expected and not expected.same_save(record):
        raise CheckpointNotFoundError(
            f"{record.prefix} was saved anew since this record of it was read. Look it up once more."
        )
    with held(folder, record) as files:
        check_files(files, record, digests=check_digests)
        yield record, files
