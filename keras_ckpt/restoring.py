"""Putting a checkpoint back into a model: all of it or nothing, and a report of what went where."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import itertools
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_ckpt import background, commit, naming, state
from keras_ckpt.bundle import read_index
from keras_ckpt.directory import CheckpointDirectory
from keras_ckpt.document import decode
from keras_ckpt.errors import CheckpointNotFoundError, DamagedCheckpointError, FormatVersionError, MismatchError
from keras_ckpt.files import Folder
from keras_ckpt.listing import check_files, held, read_record, unmanaged
from keras_ckpt.position import Position, set_position
from keras_ckpt.record import CheckpointFile, CheckpointRecord, step_in
from keras_ckpt.source import Source, what_fails_is_damaged

_LINES = 12
_ATTEMPTS = 100
_UNNAMED = {"seed_generator", "variable"}


@dataclasses.dataclass(frozen=True)
class RestoreReport:
    """What `restore` did, by the names of variables.

    Attributes:
        prefix: The checkpoint.
        step: Its step, `None` if it has no sidecar.
        epoch: Epochs completed there, for `fit(initial_epoch=...)`; `None` if it is not known.
        matched: Restored.
        missing: In the model, not in the checkpoint; left as they were.
        unexpected: In the checkpoint, not in the model.
        mismatched: In both, and left as they were; each with the reason.
    """

    prefix: str
    step: int | None
    epoch: int | None
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, str]

    def __str__(self) -> str:
        wanted = [*self.matched, *self.missing, *self.mismatched]
        parts = ("model", "optimizer", "metrics")
        counts = {part: (_count(self.matched, part), _count(wanted, part)) for part in parts}
        restored = ", ".join(f"{part} {done} of {total}" for part, (done, total) in counts.items() if total)
        at = "" if self.step is None else f" at step {self.step}"
        lines = [f"restored {self.prefix}{at}: {restored}"]
        lines += _block("not in the checkpoint, left as they were", _by_layer(self.missing))
        lines += _block("in the checkpoint, not in the model", _by_layer(self.unexpected))
        lines += _block("in both, left as they were", _by_reason(self.mismatched))
        return "\n".join(lines)

    __repr__ = __str__


def restore(
    model: keras.Model,
    checkpoint: CheckpointRecord | CheckpointDirectory | str | os.PathLike[str],
    *,
    strict: bool = True,
    check_digests: bool = True,
) -> RestoreReport:
    """Puts a checkpoint back into a model: weights, seeds, and the optimizer if the model is compiled.

    Variables are matched by the names that `tf.train.list_variables` shows. Everything is checked and read before the
    first variable changes. Afterwards `fit` goes on with the run of the checkpoint. A warning names weights with NaN or
    infinity in them.

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
        strict: Whether a difference in weights, seeds or optimizer is an error. If not, what matches is restored, and
            the model belongs to no run unless it all did. An optimizer that differs is left as it is.
        check_digests: Whether to compare every byte with what was written. If not, the sizes of the files are compared,
            and TensorFlow's checksums of the values that it reads.

    Returns:
        What was restored and what was not.

    Raises:
        MismatchError: The checkpoint does not fit the model; nothing was changed.
        DamagedCheckpointError: It is not what was written; nothing was changed.
        CheckpointNotFoundError: There is no such checkpoint.
        ValueError: The model is not built.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"restore(model, checkpoint) expected a Keras model first. Received: {model!r:.200}")
    if not model.built or not model.variables:
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no variables to restore. Build it first: "
            "call it on a batch of data, or, if it has a build() of its own, model.build(input_shape)."
        )
    return _restore(model, checkpoint, strict, check_digests, lambda files, name: None)[0]


def restore_backup(model: keras.Model, directory: CheckpointDirectory) -> tuple[RestoreReport, Any]:
    """As `restore`, of a backup of `BackupAndRestore`.

    Returns:
        The report, and what the backup holds beside the model; `None` if it is of a version that held no more.
    """
    return _restore(model, directory, True, True, _document)


def _restore(
    model: keras.Model,
    checkpoint: object,
    strict: bool,
    check_digests: bool,
    read: Callable[[Folder, str], Any],
) -> tuple[RestoreReport, Any]:
    """Restores, and reads something else of the very same files."""
    expected = checkpoint if isinstance(checkpoint, CheckpointRecord) else None
    background.tell()
    for _ in range(_ATTEMPTS):
        directory, names = _locate(checkpoint)
        try:
            return _restore_first(model, directory, names, expected, strict, check_digests, read)
        except FileNotFoundError as error:
            # Pruned, or saved anew, between two looks; what is there now is another list.
            gone = error
    raise CheckpointNotFoundError(f"There is no checkpoint {os.path.join(directory, names[0])}.") from gone


def _restore_first(
    model: keras.Model,
    directory: str,
    names: Sequence[str],
    expected: CheckpointRecord | None,
    strict: bool,
    check_digests: bool,
    read: Callable[[Folder, str], Any],
) -> tuple[RestoreReport, Any]:
    """Restores the first of the checkpoints that is not damaged."""
    for name, older in itertools.zip_longest(names, names[1:]):
        try:
            # The digests are compared while the values are read.
            with Folder(directory) as folder, opened(folder, name, expected, check_digests=False) as (record, files):
                others = read(files, name)
                digested = record.files if record and check_digests else ()
                return _put_back(model, files, name, record, strict, digested), others
        except (DamagedCheckpointError, FormatVersionError) as error:
            message = f"{os.path.join(directory, name)} cannot be trusted: {error}"
            if older is None or isinstance(error, FormatVersionError):
                raise type(error)(message) from error
            warnings.warn(f"{message}. Going back to {older}.", stacklevel=3)
    raise CheckpointNotFoundError(f"There is no checkpoint in {directory}.")


def _document(files: Folder, name: str) -> Any:
    with what_fails_is_damaged():
        read_index(files, name)
        reader = tf.train.load_checkpoint(files.tensorflow_path(name))
        if not reader.has_tensor(state.TRAINING_KEY):
            return None
        prefix = f"{state.TRAINING_KEY}/"
        keys = [key for key in reader.get_variable_to_shape_map() if key.startswith(prefix)]
        arrays = {int(key.removeprefix(prefix)): reader.get_tensor(key) for key in keys}
        return decode(reader.get_tensor(state.TRAINING_KEY).decode(), arrays)


def _locate(checkpoint: object) -> tuple[str, list[str]]:
    """The directory of a checkpoint, and its name; for a directory, the names of all, newest first."""
    if isinstance(checkpoint, CheckpointRecord):
        return checkpoint.directory, [checkpoint.name]
    if isinstance(checkpoint, CheckpointDirectory):
        return checkpoint.path, _newest_first(checkpoint)
    if not isinstance(checkpoint, str | os.PathLike) or not os.fspath(checkpoint):
        raise TypeError(
            "restore() expected a record, a directory, or a path. "
            f"Received: {checkpoint!r:.200}" + (", which latest() gives for an empty directory" * (checkpoint is None))
        )
    path = os.path.abspath(os.fspath(checkpoint))
    if os.path.isdir(path):
        return path, _newest_first(CheckpointDirectory(path))
    if path.endswith((".keras", ".h5")):
        raise ValueError(
            f"{path} is a file of Keras's own: model.load_weights() or keras.models.load_model() reads it."
        )
    name = re.sub(r"\.(index|json|data-\d{5}-of-\d{5})\Z", "", os.path.basename(path))
    return os.path.dirname(path), [name]


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
                warnings.warn(f"{reason}. Going back to {names[0]}.", stacklevel=4)
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
    if not folder.exists(f"{name}.json"):
        if not unmanaged(folder, {name}):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        own = re.compile(re.escape(name) + r"\.(index|data-\d{5}-of-\d{5})")
        with folder.held(filter(own.fullmatch, folder.names())) as files:
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


def _put_back(
    model: keras.Model,
    files: Folder,
    name: str,
    record: CheckpointRecord | None,
    strict: bool,
    digested: Sequence[CheckpointFile],
) -> RestoreReport:
    prefix = os.path.join(files.path, name)
    source = Source(files, name, model, digested)
    wanted = naming.named_variables(model)
    report = _compare(wanted, source, prefix, record, None if strict else naming.automatic_stems(model))
    differences = _differences(report, source)
    if strict and differences:
        raise MismatchError(
            f"{prefix} does not fit the model {model.name!r}; nothing was restored.\n"
            + "\n".join(_shortened(differences))
            + "\nBuild and compile the model as it was when the checkpoint was saved, or restore what matches with "
            "strict=False."
        )
    values = source.read(report.matched)
    if spoiled := [each for each, value in values.items() if each.startswith("model/") and not is_finite(value)]:
        # Before anything changes, so that who makes warnings errors keeps the model as it is.
        warnings.warn(f"{prefix} has NaN or infinity in {', '.join(_shortened(spoiled))}", stacklevel=4)
    for each, value in values.items():
        _assign(state.value_of(wanted[each]), value)
    # Without its optimizer a model does not continue the run, whatever it is trained with later.
    continues = record is not None and record.run_id and model.compiled and not differences
    set_position(model, _position(record) if record and continues else None)
    return report


def _assign(variable: tf.Variable, value: tf.Tensor) -> None:
    """Gives a variable the memory of a value."""
    if isinstance(variable, tf.distribute.DistributedValues):
        variable.assign(value, read_value=False)
    else:
        tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


def is_finite(value: tf.Tensor) -> bool:
    """Whether there is neither NaN nor infinity in a tensor."""
    if not value.dtype.is_floating:
        return True
    if value.dtype in (tf.float32, tf.float64):
        # The cheapest pass over the values; a sum that overflows proves nothing.
        array = np.asarray(value).reshape(-1)
        if np.isfinite(np.dot(array, array)):
            return True
    if value.dtype.size == 1:
        value = tf.cast(value, tf.float32)  # TensorFlow has no arithmetic for float8
    return bool(tf.math.is_finite(tf.reduce_sum(value))) or bool(tf.reduce_all(tf.math.is_finite(value)))


def _position(record: CheckpointRecord) -> Position:
    return Position(record.run_id, record.step, record.epoch or 0, record.batch or 0)


def _compare(
    wanted: Mapping[str, Any],
    source: Source,
    prefix: str,
    record: CheckpointRecord | None,
    automatic: Collection[str] | None,
) -> RestoreReport:
    shared = [name for name in wanted if name in source.keys]
    mismatched = {}
    for name in shared:
        shape, dtype = tf.TensorShape(wanted[name].shape), tf.as_dtype(wanted[name].dtype).name
        there = source.kind(name)
        if dtype != there[1] or not shape.is_compatible_with(there[0]):
            mismatched[name] = f"{_kind(shape, dtype)} in the model, {_kind(*there)} in the checkpoint"
    missing = [name for name in wanted if name not in source.keys]
    unexpected = sorted(name for name in source.keys if name not in wanted)
    if automatic is not None:
        unsure = _unsure(wanted, source.keys, {*automatic, *_UNNAMED})
        why = "an automatic name, of another number of layers in the checkpoint: give them names"
        mismatched |= {name: why for name in shared if name in unsure}
        # Half an optimizer is worse than none: counters of many steps beside slots of none.
        if any(name.startswith("optimizer/") for name in (*mismatched, *missing, *unexpected)):
            why = "part of an optimizer that differs"
            mismatched |= {name: why for name in shared if name.startswith("optimizer/") and name not in mismatched}
    return RestoreReport(
        prefix,
        record.step if record else None,
        record.epoch if record else None,
        matched=tuple(name for name in shared if name not in mismatched),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        mismatched=mismatched,
    )


def _differences(report: RestoreReport, source: Source) -> list[str]:
    """What a strict restore refuses, a line each."""
    parts: tuple[str, ...] = ("model/", "optimizer/")
    known = [*report.matched, *report.missing, *report.mismatched]
    if not any(name.startswith("optimizer/") for name in source.keys):
        parts = ("model/",)  # saved with save_weights_only
    elif not any(name.startswith("optimizer/") for name in known):
        parts = ("model/",)  # the model is not compiled
    missing = [name for name in report.missing if not (source.foreign and name.endswith("/seed_generator_state"))]
    reasons = dict.fromkeys(missing, "not in the checkpoint")
    reasons |= dict.fromkeys(report.unexpected, "in the checkpoint, not in the model")
    reasons |= report.mismatched
    return [f"{name}: {reason}" for name, reason in reasons.items() if name.startswith(parts)]


def _unsure(model: Iterable[str], disk: Iterable[str], automatic: Collection[str]) -> set[str]:
    """The names with a number of Keras's own in them that is counted among another number of layers on disk."""
    pattern = re.compile(rf"({'|'.join(map(re.escape, automatic))})(_\d+)?")

    def numbered(name: str) -> Iterator[tuple[tuple[str, str], str]]:
        """The segments of a name that may be numbered, each after its parent and its stem."""
        segments = name.split("/")
        for place, segment in enumerate(segments[1:], 1):
            if match := pattern.fullmatch(segment):
                yield ("/".join(segments[:place]), str(match[1])), segment

    def siblings(names: Iterable[str]) -> dict[tuple[str, str], set[str]]:
        found: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
        for name in names:
            for group, segment in numbered(name):
                found[group].add(segment)
        return found

    here, there = siblings(model), siblings(disk)
    return {name for name in model if any(here[group] != there[group] for group, _ in numbered(name))}


def _kind(shape: Any, dtype: str) -> str:
    return f"shape {shape} {dtype}"


def _count(names: Iterable[str], part: str) -> int:
    return sum(name.startswith(f"{part}/") for name in names)


def _by_layer(names: Iterable[str]) -> list[str]:
    """The layers with the numbers of their variables. What metrics have counted is nothing to be told of."""
    counts = collections.Counter(name.rpartition("/")[0] for name in names if not name.startswith("metrics/"))
    return [f"{layer} ({count})" for layer, count in counts.items()]


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """The reasons, those that hold for several variables once with their layers."""
    names = collections.defaultdict(list)
    for name, reason in reasons.items():
        names[reason].append(name)
    return [f"{each[0] if len(each) == 1 else ', '.join(_by_layer(each))}: {why}" for why, each in names.items()]


def _block(title: str, lines: list[str]) -> list[str]:
    return [f"  {title}:", *_shortened([f"    {line}" for line in lines])] if lines else []


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"    and {len(lines) - _LINES + 1} more"]
