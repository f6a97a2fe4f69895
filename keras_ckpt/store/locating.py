"""Finds a checkpoint by a record, a directory or a path, and opens its files."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from keras_ckpt.errors import CheckpointNotFoundError, DamagedCheckpointError, FormatVersionError
from keras_ckpt.store import background, commit, layout, tails
from keras_ckpt.store.checks import check_files, has_record, held, read_record
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.listing import Listing, unmanaged
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord, step_in

Result = TypeVar("Result")
Read = Callable[[Folder, str, CheckpointRecord | None], Result]
"""Reads a checkpoint from its files, its name, and its record (`None` without a sidecar)."""

_ATTEMPTS = 100
_VALUES = (".npz", ".safetensors")
"""The endings of exports that have values alone."""


def read_checkpoint(checkpoint: object, read: Read[Result], keep_open: contextlib.ExitStack | None = None) -> Result:
    """Reads a checkpoint; for a directory, the newest undamaged checkpoint.

    Args:
        checkpoint: A record, a directory, its listing, or the path of a directory or a checkpoint.
        read: Reads the checkpoint. Errors propagate, except those of a damaged checkpoint.
        keep_open: Closes the files of the checkpoint. By default they are closed when `read` returns.

    Returns:
        The result of `read`.

    Raises:
        DamagedCheckpointError, FormatVersionError: The checkpoint cannot be trusted.
        CheckpointNotFoundError: The checkpoint does not exist.
    """
    expected = checkpoint if isinstance(checkpoint, CheckpointRecord) else None
    background.report()
    for _ in range(_ATTEMPTS):
        directory, names = _locate(checkpoint)
        try:
            return _read_first(directory, names, expected, read, keep_open)
        except CheckpointNotFoundError:
            raise
        except FileNotFoundError as error:
            # The checkpoint was pruned or saved again after the listing; the next listing differs.
            gone = error
    raise CheckpointNotFoundError(f"There is no checkpoint {os.path.join(directory.path, names[0])}.") from gone


def _read_first(
    directory: CheckpointDirectory,
    names: Sequence[str],
    expected: CheckpointRecord | None,
    read: Read[Result],
    keep_open: contextlib.ExitStack | None,
) -> Result:
    """Reads the first undamaged checkpoint of the names."""
    for name, older in itertools.zip_longest(names, names[1:]):
        try:
            # `read` compares the digests while it reads the values.
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(directory.open())
                record, files = stack.enter_context(opened(folder, name, expected, check_digests=False))
                result = read(files, name, record)
                if keep_open is not None:
                    keep_open.enter_context(stack.pop_all())
                return result
        except (DamagedCheckpointError, FormatVersionError) as error:
            message = f"{os.path.join(directory.path, name)} cannot be trusted: {error}"
            if older is None or isinstance(error, FormatVersionError):
                raise type(error)(message) from error
            warn(f"{message}. Going back to {older}.")
    raise CheckpointNotFoundError(f"There is no checkpoint in {directory.path}.")


def _locate(checkpoint: object) -> tuple[CheckpointDirectory, list[str]]:
    """The directory of a checkpoint, and its name; for a directory, all names, newest first."""
    if isinstance(checkpoint, CheckpointRecord):
        return CheckpointDirectory(checkpoint.directory, layout.Series(checkpoint.template)), [checkpoint.name]
    if isinstance(checkpoint, CheckpointDirectory):
        return checkpoint, _newest_first(checkpoint.listing())
    if isinstance(checkpoint, Listing):
        return CheckpointDirectory(checkpoint.path, checkpoint.series), _newest_first(checkpoint)
    if not isinstance(checkpoint, str | os.PathLike) or not os.fspath(checkpoint):
        raise TypeError(
            "Expected a record, a directory, or a path of a checkpoint. "
            f"Received: {checkpoint!r:.200}"
            + (", which latest() and best() return for an empty directory" * (checkpoint is None))
        )
    path = os.path.abspath(os.fspath(checkpoint))
    directory = CheckpointDirectory(path)
    if directory.series.template and "{" not in path:
        return directory, [directory.series.only or directory.series.template]
    if directory.series.template or os.path.isdir(path):
        return directory, _newest_first(directory.listing())
    if path.endswith(_VALUES) and os.path.isfile(path):
        raise CheckpointNotFoundError(
            f"{path} is an export of values, which cannot be restored. Restore its checkpoint, or an export to .keras "
            "or .weights.h5."
        )
    return CheckpointDirectory(os.path.dirname(path), layout.TENSORFLOW), [layout.named_by(os.path.basename(path))]


def _newest_first(listing: Listing) -> list[str]:
    """The names of the checkpoints to try, newest first. Warns of each damaged checkpoint that is newer."""
    names = [record.name for record in reversed(listing.records)]
    reasons = [f"{name} in {listing.path} is damaged: {error}" for name, error in listing.damaged.items()]
    if not names and listing.damaged:
        raise DamagedCheckpointError(f"No checkpoint can be restored. {'. '.join(reasons)}.")
    if names:
        newest = listing.records[-1].step
        for name, reason in zip(listing.damaged, reasons, strict=True):
            # The name of a file does not tell its step.
            if listing.series.template or (step_in(name) or 0) > newest:
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
    """Opens a checkpoint: its record (`None` without a sidecar) and its files, checked and held open.

    Args:
        folder: The directory.
        name: The name of the checkpoint.
        expected: The record that the checkpoint must still have.
        check_digests: Whether to compare every byte. If not, only the sizes are compared.

    Raises:
        DamagedCheckpointError, FormatVersionError: The checkpoint cannot be trusted.
        CheckpointNotFoundError: The checkpoint was saved again since `expected` was read.
        FileNotFoundError: No checkpoint has the name, or it was removed.
    """
    if not has_record(folder, name):
        if folder.series.template and tails.is_cut(folder, name):
            raise DamagedCheckpointError("it ends early: it was cut, or is being written")
        with folder.held(_files_without_record(folder, name)) as files:
            yield None, files
        return
    record = read_record(folder, name)
    if expected and not expected.same_save(record):
        raise CheckpointNotFoundError(f"{record.prefix} was saved again after this record was read. Look it up again.")
    with held(folder, record) as files:
        check_files(files, record, digests=check_digests)
        yield record, files


def _files_without_record(folder: Folder, name: str) -> list[str]:
    """The files of a checkpoint that another program wrote."""
    if folder.series.template:
        return [name]
    if not unmanaged(folder, {name}):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return [file for file in folder.names() if layout.is_tensorflows(file, name)]
