"""Publishes, withdraws and recovers checkpoints, by one rule: the sidecar is published last and withdrawn first.

The sidecar is the commit record. Without a complete, valid sidecar in the directory there is no checkpoint, whatever
other files exist. The order of the steps here survives a crash at any point. The caller holds the directory's mutex.
"""

from __future__ import annotations

import contextlib
import errno
import re
import uuid
from collections.abc import Container, Iterable, Sequence

import msgspec

from keras_ckpt.errors import CheckpointError, DirectoryNotEmptyError, FormatVersionError
from keras_ckpt.store import layout
from keras_ckpt.store import record as sidecars
from keras_ckpt.store.checks import check_files, has_sidecar, is_current, read_record
from keras_ckpt.store.files import Folder, UnfinishedError
from keras_ckpt.store.listing import Listing, scan
from keras_ckpt.store.notices import log, warn
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord, superseded

_STATE_LIMIT = 1 << 24
_NO_FILE = (errno.ENOENT, errno.EFBIG, errno.EINVAL, errno.ELOOP, errno.ENXIO)
"""Errors of `Folder.read` for a file that is missing, too large, not regular, or a link. Others may be temporary."""


def publish(folder: Folder, stage: Folder, record: CheckpointRecord, earlier: Iterable[CheckpointRecord] = ()) -> None:
    """Publishes a staged checkpoint, and withdraws the checkpoints that it supersedes.

    Args:
        folder: The directory.
        stage: The folder with the staged files.
        record: The checkpoint.
        earlier: The checkpoints of the same step or the same name.

    Raises:
        DirectoryNotEmptyError: A foreign file has the name of one of the checkpoint's files.
        FormatVersionError: A newer version of this package saved the checkpoint of this name.
        UnfinishedError: The checkpoint is not published, but another is withdrawn for it. Recovery finishes it.
        OSError: The checkpoint is not published.
    """
    if record.template:
        _publish_file(folder, stage, record, earlier)
        return
    sidecar = layout.sidecar(record.name)
    previous = _whole(folder, record.name)
    with folder.private() as private, private.folder("trash", create=True) as trash:
        _refuse_foreign(folder, stage, record, [previous, _read(trash, sidecar)])
    # From here on, a crash is recovered from the stage, which is durable.
    withdrawn = [each for each in earlier if each.name != record.name]
    if previous:
        withdrawn.append(previous)
    else:
        # An earlier checkpoint of this name left its pin; the pin does not apply to this checkpoint.
        folder.remove(layout.pin(record.name))
    staged = [file.name for file in record.files if stage.exists(file.name)]
    try:
        withdraw(folder, withdrawn)
        for name in staged:
            stage.move(name, folder)
        folder.sync()
        stage.move(sidecar, folder)
        folder.sync()
    except Exception as error:
        if _undo(folder, stage, [sidecar, *staged], withdrawn):
            raise
        raise UnfinishedError(*error.args) from error


def _publish_file(folder: Folder, stage: Folder, record: CheckpointRecord, earlier: Iterable[CheckpointRecord]) -> None:
    """Publishes a file of Keras. It holds its record, so one rename commits both, also over a file of this name."""
    sidecar = layout.sidecar(record.name)
    if not folder.exists(record.name):
        folder.remove(layout.pin(record.name))  # it belonged to an earlier file, which was removed by hand
    if stage.exists(record.name):
        stage.move(record.name, folder)
    try:
        folder.sync()
        withdraw(folder, [each for each in earlier if each.name != record.name])
        # The stage keeps the sidecar until all is done, so recovery can finish the work.
        stage.move(sidecar, folder)
        folder.sync()
    except OSError as error:
        raise UnfinishedError(*error.args) from error


def _undo(folder: Folder, stage: Folder, names: Iterable[str], earlier: Iterable[CheckpointRecord]) -> bool:
    """Moves the published files back into the stage. Returns whether the directory is as it was before."""
    try:
        for name in names:
            if not stage.exists(name):
                folder.move(name, stage)
        return all(folder.exists(layout.sidecar(record.name)) for record in earlier)
    except OSError:
        return False


def withdraw(folder: Folder, records: Sequence[CheckpointRecord]) -> None:
    """Removes checkpoints: first the sidecars, then the listed files and no other files."""
    if not records:
        return
    if folder.series.template:
        _withdraw_files(folder, records)
        return
    with folder.private(create=True) as private, private.folder("trash", create=True) as trash:
        for record in records:
            folder.move(layout.sidecar(record.name), trash)
        trash.sync()
        folder.sync()
        _empty_trash(folder, trash, records)


def _withdraw_files(folder: Folder, records: Sequence[CheckpointRecord]) -> None:
    """Removes files of Keras, which hold their records: first the files, then the sidecars."""
    for record in records:
        if is_current(folder, record):  # a file that its user wrote by hand stays
            folder.remove(record.name)
    folder.sync()
    for record in records:
        folder.remove(layout.sidecar(record.name))
        folder.remove_empty_folders(record.name)


def remove(folder: Folder, listing: Listing, doomed: Sequence[CheckpointRecord]) -> None:
    """Removes checkpoints, first from TensorFlow's state file. The caller holds the mutex."""
    steps = {record.step for record in doomed}
    remaining = [record for record in listing.records if record.step not in steps]
    try:
        write_state(folder, remaining)
    except OSError as error:
        # On a full disk, the removal frees the space for the state file.
        if not doomed or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        withdraw(folder, doomed)
        write_state(folder, remaining)
    else:
        withdraw(folder, doomed)


def recover(folder: Folder) -> None:
    """Finishes the work of a process that died: rolls complete stages forward, and removes incomplete stages."""
    with folder.private(create=True) as private, private.folder("trash", create=True) as trash:
        # A process that was killed may not have synced everything.
        for changed in (trash, private, folder):
            changed.sync()
        for name in private.names():
            if name.startswith("stage-"):
                with private.folder(name, series=folder.series) as stage:
                    for sidecar in stage.names():
                        _roll_forward(folder, stage, sidecar)
            if name.startswith(("stage-", "swap-")):
                private.remove_folder(name)
        if folder.series.template:
            _drop_lone_sidecars(folder)
        for name in trash.names():
            record, published = _read(trash, name), _read(folder, name)
            if record is None or (published is None and folder.exists(name)):
                trash.remove(name)
            else:
                # The same step may have been saved again since, under some of the same file names.
                used = {file.name for file in published.files} if published else set()
                _empty_trash(folder, trash, [record], used)


def write_state(folder: Folder, records: Iterable[CheckpointRecord], last_preserved: float | None = None) -> None:
    """Writes TensorFlow's state file: the list of checkpoints and the newest checkpoint for TensorFlow's functions.

    Args:
        folder: The directory.
        records: The directory's checkpoints, oldest first. The file names only TensorFlow checkpoints. It does not
            list pinned checkpoints, because TensorFlow's manager would delete them.
        last_preserved: When `keep_checkpoint_every_n_hours` last preserved a checkpoint. Defaults to the time in the
            file.
    """
    if folder.series.template:
        return
    records = [record for record in records if _is_tensorflows(record)]
    if not records:
        # The file goes with the last checkpoint, unless it names a checkpoint that TensorFlow wrote.
        newest = read_state(folder)[0]
        if newest is None or folder.exists(layout.sidecar(newest)) or not folder.exists(layout.index(newest)):
            folder.remove(layout.STATE_FILE)
        return
    listed = [record for record in records if not record.pinned]
    lines = [f"model_checkpoint_path: {_quoted(records[-1].name)}"]
    lines += [f"all_model_checkpoint_paths: {_quoted(record.name)}" for record in listed]
    lines += [f"all_model_checkpoint_timestamps: {record.time!r}" for record in listed]
    if last_preserved is None:
        last_preserved = read_state(folder)[1]
    if last_preserved is not None:
        lines.append(f"last_preserved_timestamp: {last_preserved!r}")
    folder.replace(layout.STATE_FILE, "\n".join([*lines, ""]).encode())


def read_state(folder: Folder) -> tuple[str | None, float | None]:
    """Reads the newest checkpoint's name and the time of the last preserved checkpoint from TensorFlow's state file.

    The name is only a hint: the file may be missing, but it is never outside the directory.
    """
    try:
        text = folder.read(layout.STATE_FILE, _STATE_LIMIT).decode()
    except (OSError, UnicodeDecodeError):
        return None, None
    newest = re.search(r'^model_checkpoint_path: "([^"\\/]+)"$', text, re.MULTILINE)
    preserved = re.search(r"^last_preserved_timestamp: ([0-9.e+]+)$", text, re.MULTILINE)
    with contextlib.suppress(ValueError):
        return newest and newest[1], preserved and float(preserved[1])
    return newest and newest[1], None


def _whole(folder: Folder, name: str) -> CheckpointRecord | None:
    """The checkpoint of a name, if all files exist with the recorded sizes. Moves a damaged checkpoint away.

    Afterwards a new checkpoint can be saved under its name.
    """
    reason: object = "one of its files is missing, or has another size"
    try:
        record = sidecars.decode(folder.read(layout.sidecar(name), sidecars.SIZE_LIMIT), name)
        with contextlib.suppress(FileNotFoundError):
            if all(folder.size(file.name) == file.size for file in record.files):
                return record
    except FileNotFoundError:
        return None
    except FormatVersionError as error:
        raise FormatVersionError(f"{name} in {folder.path} is not overwritten: {error}") from error
    except (CheckpointError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_FILE:
            raise  # the error may be temporary and the checkpoint whole
        reason = error
    place = f"damaged-{uuid.uuid4().hex}"
    with folder.private(create=True) as private, private.folder(place, create=True) as aside:
        for file in [file for file in folder.names() if layout.is_of(file, name)]:
            folder.move(file, aside)
        warn(f"{name} is damaged ({reason}); its remaining files are in {aside.path}")
    return None


def _roll_forward(folder: Folder, stage: Folder, sidecar: str) -> None:
    record = _read(stage, sidecar) if layout.is_sidecar(sidecar) else None
    if record is None:
        return
    if record.template:
        _roll_file_forward(folder, stage, record)
        return
    earlier = superseded(record, scan(folder).records)
    pinned = folder.exists(sidecar) and folder.exists(layout.pin(record.name))
    if pinned or any(each.pinned or each.sequence >= record.sequence for each in earlier):
        return  # the stage is out of date: this checkpoint or a newer one is published, or a pin protects it
    for file in record.files:
        # Beside a published sidecar, a file belongs to that checkpoint, even if the bytes are the same.
        holder = stage if folder.exists(sidecar) or stage.exists(file.name) else folder
        if not _holds(holder, file):
            return
        if holder is stage and not folder.exists(sidecar) and _holds(folder, file):
            # A crash in the middle of a rename may leave both names.
            folder.sync_file(file.name)
            stage.remove(file.name)
    _publish_again(folder, stage, record, earlier)


def _publish_again(folder: Folder, stage: Folder, record: CheckpointRecord, earlier: list[CheckpointRecord]) -> None:
    """Publishes the complete stage of a process that died."""
    for name in stage.names():
        stage.sync_file(name)
    stage.sync()
    with contextlib.suppress(DirectoryNotEmptyError):
        publish(folder, stage, record, earlier)
        log.info("recovered %s/%s", folder.path, record.name)


def _roll_file_forward(folder: Folder, stage: Folder, record: CheckpointRecord) -> None:
    """Publishes the staged file of a template, or finishes its publication."""
    others = [each for each in _records_of_run(folder, record.run_id) if not each.same_save(record)]
    earlier = superseded(record, others)
    if is_current(folder, record):
        if has_sidecar(folder, record):
            return  # all is done; the sidecar of now may have more metrics
        # A crash in the middle of a rename may leave both names.
        folder.sync_file(record.name)
        stage.remove(record.name)
        _publish_again(folder, stage, record, [each for each in earlier if not each.pinned])
    elif not any(each.pinned for each in earlier) and _may_replace(folder, stage, record):
        _publish_again(folder, stage, record, earlier)


def _records_of_run(folder: Folder, run_id: str) -> list[CheckpointRecord]:
    """The records of a run in a series, even those of one step, which a listing has as damaged but the newest."""
    found = []
    for name in folder.series.checkpoints(folder.names()):
        with contextlib.suppress(CheckpointError, OSError):
            record = read_record(folder, name)
            pin = "" if folder.exists(layout.pin(name)) else None
            if (record.run_id, record.template) == (run_id, folder.series.template):
                found.append(msgspec.structs.replace(record, pin=pin))
    return found


def _drop_lone_sidecars(folder: Folder) -> None:
    """Removes the sidecars of a series whose files are gone: of a removal that was cut short, or by hand."""
    for name in layout.of_sidecars(folder.names()):
        if layout.is_keras_file(name) and not folder.exists(name):
            record = _read(folder, layout.sidecar(name))
            if record is not None and record.template == folder.series.template:
                folder.remove(layout.sidecar(name))


def _may_replace(folder: Folder, stage: Folder, record: CheckpointRecord) -> bool:
    """Whether a staged file of Keras is whole, and replaces no file that is newer or that its user wrote by hand."""
    if folder.exists(record.name) and folder.exists(layout.pin(record.name)):
        return False
    try:
        check_files(stage, record)
        return not folder.exists(record.name) or read_record(folder, record.name).sequence < record.sequence
    except (CheckpointError, FileNotFoundError):
        return False


def _is_tensorflows(record: CheckpointRecord) -> bool:
    return any(file.name == layout.index(record.name) for file in record.files)


def _refuse_foreign(
    folder: Folder, stage: Folder, record: CheckpointRecord, earlier: Iterable[CheckpointRecord | None]
) -> None:
    ours = {file.name for each in earlier if each for file in each.files}
    for file in record.files:
        if file.name not in ours and stage.exists(file.name) and folder.exists(file.name):
            raise DirectoryNotEmptyError(
                f"{folder.path} has a file {file.name} that belongs to no checkpoint of this package. It is left "
                "alone: move it away, or save into another directory."
            )


def _holds(folder: Folder, file: CheckpointFile) -> bool:
    """Whether a file exists with the recorded size and digest."""
    try:
        return folder.digest(file.name) == (file.size, file.digest.lower())
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        return False


def _read(folder: Folder, name: str) -> CheckpointRecord | None:
    try:
        return sidecars.decode(folder.read(name, sidecars.SIZE_LIMIT), layout.named_by(name))
    except CheckpointError:
        return None
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        return None


def _empty_trash(folder: Folder, trash: Folder, records: Sequence[CheckpointRecord], used: Container[str] = ()) -> None:
    for record in records:
        for file in record.files:
            if file.name not in used:
                folder.remove(file.name)
    # If the sidecars went first, a power cut could bring back files that no sidecar lists.
    folder.sync()
    for record in records:
        trash.remove(layout.sidecar(record.name))


def _quoted(text: str) -> str:
    """A string in protocol buffer text form."""
    if text.isascii() and text.isprintable() and not set('"\\') & set(text):
        return f'"{text}"'
    plain = (chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\{byte:03o}" for byte in text.encode())
    return f'"{"".join(plain)}"'
