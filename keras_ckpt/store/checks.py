"""Checks of one checkpoint: whether its sidecar and its files are as they were written."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import Any

from keras_ckpt.errors import CheckpointError, DamagedCheckpointError
from keras_ckpt.store import layout, tails
from keras_ckpt.store import record as sidecars
from keras_ckpt.store.files import Folder
from keras_ckpt.store.reading import Reading
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of the process, which say nothing about the file."""


@contextlib.contextmanager
def held(folder: Folder, record: CheckpointRecord) -> Iterator[Folder]:
    """Holds the files of a checkpoint open: a removal by others does not disturb the reader.

    Raises:
        DamagedCheckpointError: A file cannot be read.
        FileNotFoundError: The checkpoint was removed or saved again after its sidecar was read.
    """
    names = [file.name for file in record.files]
    try:
        with folder.held(names) as files:
            yield files
    except (OSError, DamagedCheckpointError) as error:
        if isinstance(error, OSError) and error.filename not in names:
            raise  # the error is not about these files
        raise _judged(folder, record, error) from error


def read_record(folder: Reading, name: str) -> CheckpointRecord:
    """The record of a checkpoint.

    Raises:
        DamagedCheckpointError, FormatVersionError: The sidecar cannot be trusted.
        FileNotFoundError: The checkpoint has no sidecar, or no file of Keras with a record.
    """
    if not folder.series.template:
        return _read_sidecar(folder, name)
    try:
        found = tails.read_tail(folder, name)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(error) from error
    if found is None:
        raise FileNotFoundError(errno.ENOENT, "it has no record", name)
    # The sidecar also has what was added later. Where it is of another save, the file's own record holds.
    return _read_sidecar(folder, name) if has_sidecar(folder, found[1]) else found[1]


def has_record(folder: Reading, name: str) -> bool:
    """Whether a checkpoint has a record, even one that cannot be trusted."""
    if folder.series.template:
        return tails.read_tail(folder, name) is not None
    return folder.exists(layout.sidecar(name))


def has_sidecar(folder: Reading, record: CheckpointRecord) -> bool:
    """Whether the sidecar beside a checkpoint is of the same save."""
    with contextlib.suppress(CheckpointError, FileNotFoundError):
        sidecar = _read_sidecar(folder, record.name)
        return sidecar.same_save(record) and sidecar.files == record.files
    return False


def _read_sidecar(folder: Reading, name: str) -> CheckpointRecord:
    try:
        data = folder.read(layout.sidecar(name), sidecars.SIZE_LIMIT)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(error) from error
    return sidecars.decode(data, name, folder.path)


def check(folder: Reading, record: CheckpointRecord, **how: Any) -> None:
    """Compares a checkpoint's files as `check_files` does, in a directory that others may change at the same time.

    Raises:
        DamagedCheckpointError: A file is missing, or differs from the saved bytes.
        FileNotFoundError: The checkpoint was removed or saved again after its sidecar was read.
    """
    try:
        check_files(folder, record, **how)
    except DamagedCheckpointError as error:
        raise _judged(folder, record, error) from error


def check_files(
    folder: Reading,
    record: CheckpointRecord,
    *,
    digests: bool = True,
    advance: Callable[[int], object] | None = None,
) -> None:
    """Compares the files of a checkpoint with the sizes and digests in its sidecar.

    Args:
        folder: The directory.
        record: The checkpoint.
        digests: Whether to read every byte. If not, only the sizes are compared.
        advance: Called with the number of bytes after each piece that was read.

    Raises:
        DamagedCheckpointError: A file is missing, or differs from the saved bytes.
    """
    for file in record.files:
        end = file.size if record.template else None
        try:
            if digests:
                size, digest = folder.digest(file.name, advance, end)
            else:
                size, digest = tails.content_size(folder, file.name) if end else folder.size(file.name), None
        except OSError as error:
            if error.filename != file.name:
                raise  # the error came from `advance`
            raise unreadable(error) from error
        refuse_changed(file, size, digest)


def refuse_changed(file: CheckpointFile, size: int, digest: str | None) -> None:
    """Refuses a file that differs from the saved bytes.

    Args:
        file: The file as it was saved.
        size: Its size now, in bytes.
        digest: Its digest now, `None` to compare only the size.

    Raises:
        DamagedCheckpointError: The size or the digest differs.
    """
    if size != file.size:
        raise DamagedCheckpointError(f"{file.name} has {size} bytes, {file.size} were written")
    if digest not in (None, file.digest.lower()):
        raise DamagedCheckpointError(f"{file.name} was changed after it was written: its digest does not match")


def _judged(folder: Reading, record: CheckpointRecord, error: Exception) -> Exception:
    """The error to raise: damage, or `FileNotFoundError` if the checkpoint was removed or saved again meanwhile."""
    if not is_current(folder, record):
        return FileNotFoundError(errno.ENOENT, "it was removed or saved again", record.name)
    return unreadable(error) if isinstance(error, OSError) else error


def is_current(folder: Reading, record: CheckpointRecord) -> bool:
    """Whether a checkpoint was neither removed nor saved again after its sidecar was read."""
    try:
        return read_record(folder, record.name).same_save(record)
    except FileNotFoundError:
        return False
    except CheckpointError:
        return True


def unreadable(error: OSError) -> Exception:
    """The error to raise for a failed read: damage, unless the process has run out of descriptors or memory."""
    if error.errno in _EXHAUSTED:
        return error
    return DamagedCheckpointError(f"it cannot be read: {error}")
