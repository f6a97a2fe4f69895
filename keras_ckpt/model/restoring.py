"""Restoring a checkpoint into a model: all of it or nothing, and a report of what went where."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras

from keras_ckpt.errors import CheckpointNotFoundError, DamagedCheckpointError, FormatVersionError
from keras_ckpt.model.learned import learners
from keras_ckpt.model.naming import named_objects, named_variables
from keras_ckpt.model.parts import is_built
from keras_ckpt.model.report import RestoreReport
from keras_ckpt.model.transfer import Request, transfer
from keras_ckpt.store import background, commit, layout
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.listing import check_files, held, read_record, unmanaged
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord, step_in

_ATTEMPTS = 100


def restore(
    model: keras.Model,
    checkpoint: CheckpointRecord | CheckpointDirectory | str | os.PathLike[str],
    *,
    strict: bool = True,
    check_digests: bool = True,
    weights_only: bool = False,
) -> RestoreReport:
    """Restores a checkpoint into a model: weights, seeds, and the optimizer if the model is compiled.

    Variables are matched by the names that `tf.train.list_variables` shows. What layers learned beyond variables, such
    as a vocabulary, is restored too. Everything is checked and read before the first variable changes. Afterwards `fit`
    continues the run of the checkpoint. A warning names weights with NaN or infinity in them, and another what the
    model is compiled with otherwise than the one that was saved.

    Example:

    ```python
    model.compile("adam", "mse")
    print(keras_ckpt.restore(model, "runs/digits"))
    model.fit(x, y, initial_epoch=3, epochs=10, callbacks=[keras_ckpt.ModelCheckpoint("runs/digits")])
    ```

    Args:
        model: A built model. Compile it before, if training is to go on.
        checkpoint: A record, a directory (its newest), or the path of a directory or a checkpoint. One that
            TensorFlow wrote does as well.
        strict: Whether a difference in weights, seeds or optimizer is an error. If not, what matches is restored, with
            a warning that names the rest, and the model belongs to no run unless it all did. An optimizer that differs
            is left as it is. That nothing of the model matches is an error in any case.
        check_digests: Whether to compare every byte with what was written. If not, the sizes of the files are compared,
            and TensorFlow's checksums of the values that it reads.
        weights_only: Whether to restore weights and seeds alone, and to leave the optimizer as it is compiled. The
            model continues the run: in the next phase of a fine-tuning, with other layers unfrozen and another
            optimizer. Low-rank updates of kernels (LoRA) are merged into these if the model has none.

    Returns:
        What was restored and what was not.

    Raises:
        MismatchError: The checkpoint does not fit the model, or a layer refuses what it learned; nothing was changed.
        DamagedCheckpointError: It is not what was written; nothing was changed.
        CheckpointNotFoundError: There is no such checkpoint.
        ValueError: The model is not built.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"restore(model, checkpoint) expected a Keras model first. Received: {model!r:.200}")
    if not is_built(model):
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no variables to restore. Build it first: "
            "call it on a batch of data, or, if it has a build() of its own, model.build(input_shape)."
        )
    if not (model.variables or named_variables(model, weights_only=True) or learners(named_objects(model))):
        raise ValueError(f"The model {model.name!r} is built and has no variables, so there is nothing to restore.")
    request = Request(strict, weights_only, check_digests)
    return restore_and_read(model, checkpoint, request, lambda files, name: None)[0]


def restore_and_read(
    model: keras.Model, checkpoint: object, request: Request, read: Callable[[Folder, str], Any]
) -> tuple[RestoreReport, Any]:
    """Restores as `restore` does, and reads something else of the very same files.

    Args:
        model: A built model.
        checkpoint: A record, a directory, or a path.
        request: What is asked.
        read: Called with the files of the checkpoint and its name.

    Returns:
        The report, and what `read` gave.
    """
    expected = checkpoint if isinstance(checkpoint, CheckpointRecord) else None
    background.tell()
    for _ in range(_ATTEMPTS):
        directory, names = _locate(checkpoint)
        try:
            return _restore_first(model, directory, names, expected, request, read)
        except CheckpointNotFoundError:
            raise
        except FileNotFoundError as error:
            # Pruned, or saved anew, between two looks; what is there now is another list.
            gone = error
    raise CheckpointNotFoundError(f"There is no checkpoint {os.path.join(directory, names[0])}.") from gone


def _restore_first(
    model: keras.Model,
    directory: str,
    names: Sequence[str],
    expected: CheckpointRecord | None,
    request: Request,
    read: Callable[[Folder, str], Any],
) -> tuple[RestoreReport, Any]:
    """Restores the first of the checkpoints that is not damaged."""
    for name, older in itertools.zip_longest(names, names[1:]):
        try:
            # The digests are compared while the values are read.
            with Folder(directory) as folder, opened(folder, name, expected, check_digests=False) as (record, files):
                others = read(files, name)
                return transfer(model, files, name, record, request), others
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
        return checkpoint.path, _newest_first(checkpoint)
    if not isinstance(checkpoint, str | os.PathLike) or not os.fspath(checkpoint):
        raise TypeError(
            "restore() expected a record, a directory, or a path. "
            f"Received: {checkpoint!r:.200}"
            + (", which latest() and best() return for an empty directory" * (checkpoint is None))
        )
    path = os.path.abspath(os.fspath(checkpoint))
    if os.path.isdir(path):
        return path, _newest_first(CheckpointDirectory(path))
    if path.endswith((".keras", ".h5")):
        raise ValueError(
            f"{path} is a file of Keras's own: model.load_weights() or keras.models.load_model() reads it."
        )
    return os.path.dirname(path), [layout.named_by(os.path.basename(path))]


def _newest_first(directory: CheckpointDirectory) -> list[str]:
    """The checkpoints to try, and a warning for each newer one that is damaged already at first sight."""
    listing = directory.listing()
    names = [record.name for record in reversed(listing.records)]
    reasons = [f"{name} in {directory.path} is damaged: {error}" for name, error in listing.damaged.items()]
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
    with Folder(directory.path) as folder:
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
