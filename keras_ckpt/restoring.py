"""Putting a checkpoint back into a model: all of it or nothing, and a report of what went where."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_ckpt import commit, state
from keras_ckpt import record as sidecars
from keras_ckpt.directory import CheckpointDirectory
from keras_ckpt.errors import CheckpointError, CheckpointNotFoundError, DamagedCheckpointError, MismatchError
from keras_ckpt.files import Folder
from keras_ckpt.listing import check_files
from keras_ckpt.position import Position, set_position
from keras_ckpt.record import CheckpointRecord

_LINES = 12
_UNNAMED = {"seed_generator", "variable"}


@dataclasses.dataclass(frozen=True)
class RestoreReport:
    """What `restore` did, by the names of variables.

    Attributes:
        prefix: The checkpoint.
        step: Its step, `None` if it has no sidecar.
        matched: Restored.
        missing: In the model, not in the checkpoint; left as they were.
        unexpected: In the checkpoint, not in the model.
        mismatched: In both, of another shape or type; left as they were. The values say which.
        ambiguous: In both under an automatic name such as `dense_1`, but the model has more or fewer layers of that
            name, so which is which cannot be known; left as they were. Give the layers names.
    """

    prefix: str
    step: int | None
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, str]
    ambiguous: tuple[str, ...] = ()

    def __str__(self) -> str:
        wanted = [*self.matched, *self.missing, *self.mismatched, *self.ambiguous]
        parts = ("model", "optimizer", "metrics")
        counts = {part: (_count(self.matched, part), _count(wanted, part)) for part in parts}
        restored = ", ".join(f"{part} {done} of {total}" for part, (done, total) in counts.items() if total)
        at = "" if self.step is None else f" at step {self.step}"
        lines = [f"restored {self.prefix}{at}: {restored}"]
        lines += _block("not in the checkpoint, left as they were", _by_layer(self.missing))
        lines += _block("in the checkpoint, not in the model", _by_layer(self.unexpected))
        lines += _block("of another shape or type, left as they were", list(self.mismatched.values()))
        lines += _block("automatic names of another number of layers, left as they were", _by_layer(self.ambiguous))
        return "\n".join(lines)

    __repr__ = __str__


def restore(
    model: keras.Model,
    checkpoint: CheckpointRecord | CheckpointDirectory | str | os.PathLike[str],
    *,
    strict: bool = True,
) -> RestoreReport:
    """Puts a checkpoint back into a model: weights, seeds, and the optimizer if the model is compiled.

    Variables are matched by the names that `tf.train.list_variables` shows. Everything is checked and read before the
    first variable changes. Afterwards `fit` goes on with the run of the checkpoint.

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
            the model belongs to no run.

    Returns:
        What was restored and what was not.

    Raises:
        MismatchError: The checkpoint does not fit the model; nothing was changed.
        DamagedCheckpointError: It is not what was written; nothing was changed.
        CheckpointNotFoundError: There is no such checkpoint.
        ValueError: The model is not built.
    """
    if not model.built or not model.variables:
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no variables to restore. Build it first: "
            "model.build(input_shape), or call it on a batch of data."
        )
    directory, name = _locate(checkpoint)
    try:
        with Folder(directory) as folder:
            return _restore(model, folder, name, strict)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"No checkpoint {os.path.join(directory, name)}: {error}") from error


def _locate(checkpoint: object) -> tuple[str, str]:
    """The directory of a checkpoint and its name."""
    if isinstance(checkpoint, CheckpointRecord):
        return checkpoint.directory, checkpoint.name
    if isinstance(checkpoint, CheckpointDirectory):
        return checkpoint.path, _newest(checkpoint)
    if not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(
            "restore() expected a record, a directory, or a path. "
            f"Received: {checkpoint!r}" + (", which latest() gives for an empty directory" * (checkpoint is None))
        )
    path = os.path.abspath(os.fspath(checkpoint))
    if os.path.isdir(path):
        return path, _newest(CheckpointDirectory(path))
    name = re.sub(r"\.(index|json|data-\d{5}-of-\d{5})\Z", "", os.path.basename(path))
    return os.path.dirname(path), name


def _newest(directory: CheckpointDirectory) -> str:
    listing = directory.listing()
    if listing.records:
        return listing.records[-1].name
    if listing.damaged:
        reasons = "; ".join(f"{name}: {error}" for name, error in listing.damaged.items())
        raise DamagedCheckpointError(f"All checkpoints in {directory.path} are damaged: {reasons}")
    if listing.unmanaged:
        with Folder(directory.path) as folder:
            newest = commit.read_state(folder)[0]
        return newest if newest in listing.unmanaged else listing.unmanaged[-1]
    raise CheckpointNotFoundError(f"There is no checkpoint in {directory.path}.")


def _restore(model: keras.Model, folder: Folder, name: str, strict: bool) -> RestoreReport:
    prefix = os.path.join(folder.path, name)
    record = _record(folder, name)
    if not folder.exists(f"{name}.index"):
        raise FileNotFoundError(f"there is no {name}.index")
    if model.compiled and model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    wanted = state.names(model)
    try:
        source = _Source(folder.tensorflow_path(name), model)
    except Exception as error:  # TensorFlow's readers raise almost anything when a file is not what they expect.
        raise DamagedCheckpointError(f"{prefix} cannot be read: {error}") from error
    report = _compare(wanted, source, prefix, record, None if strict else state.automatic_stems(model))
    differences = _differences(report, source)
    if strict and differences:
        raise MismatchError(
            f"{prefix} does not fit the model {model.name!r}; nothing was restored.\n"
            + "\n".join(_shortened(differences))
            + "\nBuild and compile the model as it was when the checkpoint was saved, or restore what matches with "
            "strict=False."
        )
    try:
        values = source.read(report.matched)
    except Exception as error:
        raise DamagedCheckpointError(f"{prefix} cannot be read: {error}") from error
    for each, value in values.items():
        wanted[each].assign(value)
    # Without its optimizer a model does not continue the run, whatever it is trained with later.
    continues = record is not None and record.run_id and model.compiled and not differences
    set_position(model, _position(record) if record and continues else None)
    return report


def _record(folder: Folder, name: str) -> CheckpointRecord | None:
    """The checked record of a checkpoint, `None` if it has no sidecar."""
    if not folder.exists(f"{name}.json"):
        return None
    try:
        record = sidecars.decode(folder.read(f"{name}.json", sidecars.SIZE_LIMIT), name, folder.path)
        check_files(folder, record)
    except (CheckpointError, OSError) as error:
        kind = type(error) if isinstance(error, CheckpointError) else DamagedCheckpointError
        raise kind(f"{os.path.join(folder.path, name)} cannot be trusted: {error}") from error
    return record


def _position(record: CheckpointRecord) -> Position:
    return Position(record.run_id, record.step, record.epoch or 0, record.batch or 0)


class _Source:
    """An open checkpoint, with the key of each variable by its name.

    Attributes:
        foreign: Whether its names are those of TensorFlow's object graph.
    """

    def __init__(self, path: str, model: keras.Model) -> None:
        self._path = path
        reader = tf.train.load_checkpoint(path)
        self._shapes: dict[str, list[int]] = reader.get_variable_to_shape_map()
        self._dtypes: dict[str, tf.DType] = reader.get_variable_to_dtype_map()
        self.foreign = state.NAMES_KEY not in self._shapes
        counter = f"save_counter{state.SUFFIX}"  # TensorFlow's own, no part of a model
        keys = [key for key in self._shapes if key.endswith(state.SUFFIX) and key != counter]
        named = {key.removesuffix(state.SUFFIX): key for key in keys}
        self.keys = _keys_by_graph(path, reader, model, named) if self.foreign else named

    def kind(self, name: str) -> tuple[tuple[int, ...], str]:
        """The shape and the type of a variable."""
        key = self.keys[name]
        return tuple(self._shapes[key]), self._dtypes[key].name

    def read(self, names: Sequence[str]) -> dict[str, tf.Tensor]:
        """Reads variables, all before any is used; TensorFlow checks each one's checksum."""
        if not names:
            return {}
        keys = [self.keys[name] for name in names]
        tensors = tf.raw_ops.RestoreV2(
            prefix=self._path,
            tensor_names=keys,
            shape_and_slices=[""] * len(keys),
            dtypes=[self._dtypes[key] for key in keys],
        )
        return dict(zip(names, tensors, strict=True))


def _keys_by_graph(path: str, reader: Any, model: keras.Model, named: Mapping[str, str]) -> dict[str, str]:
    """The keys of a checkpoint that TensorFlow named by its object graph; what is the model's, by the model's names."""
    graph = state.object_graph(reader)
    variables = {id(variable): name for name, variable in state.names(model).items()}
    view = tf.train.CheckpointView(path)
    # What the model is called there is up to the one who wrote it; or it is the root itself.
    children = {child.local_name for child in graph.nodes[0].children} - {"save_counter"}
    roots = [(called, tf.train.Checkpoint(**{called: model})) for called in sorted(children)]
    best: tuple[dict[str, str], str] = ({}, "")
    for called, root in [*roots, ("", model)]:
        found = {
            variables[id(trackable)]: attribute.checkpoint_key
            for node, trackable in view.match(root).items()
            if id(trackable) in variables
            for attribute in graph.nodes[node].attributes
        }
        best = max(best, (found, f"{called}/" if called else ""), key=lambda each: len(each[0]))
    names, called = best
    used = set(names.values())
    for name, key in named.items():
        if key not in used and name.startswith(called):
            own = name.removeprefix(called)
            names[own if own.startswith("optimizer/") else f"model/{own}"] = key
    return names


def _compare(
    wanted: Mapping[str, Any],
    source: _Source,
    prefix: str,
    record: CheckpointRecord | None,
    automatic: Collection[str] | None,
) -> RestoreReport:
    shared = [name for name in wanted if name in source.keys]
    unsure = set() if automatic is None else _unsure(wanted, source.keys, {*automatic, *_UNNAMED})
    ambiguous = tuple(name for name in shared if name in unsure)
    mismatched = {}
    for name in shared:
        kind = tuple(wanted[name].shape), tf.as_dtype(wanted[name].dtype).name
        if kind != source.kind(name):
            mismatched[name] = f"{name}: {_kind(kind)} in the model, {_kind(source.kind(name))} in the checkpoint"
    return RestoreReport(
        prefix,
        record.step if record else None,
        matched=tuple(name for name in shared if name not in mismatched and name not in unsure),
        missing=tuple(name for name in wanted if name not in source.keys),
        unexpected=tuple(sorted(name for name in source.keys if name not in wanted)),
        mismatched={name: text for name, text in mismatched.items() if name not in unsure},
        ambiguous=ambiguous,
    )


def _differences(report: RestoreReport, source: _Source) -> list[str]:
    """What a strict restore refuses, a line each."""
    parts: tuple[str, ...] = ("model/", "optimizer/")
    known = [*report.matched, *report.missing, *report.mismatched, *report.ambiguous]
    if not any(name.startswith("optimizer/") for name in source.keys):
        parts = ("model/",)  # saved with save_weights_only
    elif not any(name.startswith("optimizer/") for name in known):
        parts = ("model/",)  # the model is not compiled
    missing = [name for name in report.missing if not (source.foreign and name.endswith("/seed_generator_state"))]
    lines = {name: f"{name}: not in the checkpoint" for name in missing}
    lines |= {name: f"{name}: in the checkpoint, not in the model" for name in report.unexpected}
    lines |= report.mismatched
    lines |= {name: f"{name}: may be another layer's" for name in report.ambiguous}
    return [text for name, text in lines.items() if name.startswith(parts)]


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


def _kind(kind: tuple[tuple[int, ...], str]) -> str:
    return f"shape {kind[0]} {kind[1]}"


def _count(names: Iterable[str], part: str) -> int:
    return sum(name.startswith(f"{part}/") for name in names)


def _by_layer(names: Iterable[str]) -> list[str]:
    counts = collections.Counter(name.rpartition("/")[0] for name in names)
    return [f"{layer} ({count})" for layer, count in counts.items()]


def _block(title: str, lines: list[str]) -> list[str]:
    return [f"  {title}:", *_shortened([f"    {line}" for line in lines])] if lines else []


def _shortened(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"    and {len(lines) - _LINES + 1} more"]


def same_values(saved: state.ModelState, record: CheckpointRecord) -> bool:
    """Whether a checkpoint holds, to the bit, what the model holds now; what its metrics have counted aside."""
    variables = {name: each for name, each in saved.names().items() if not name.startswith("metrics/")}
    try:
        with Folder(record.directory) as folder:
            source = _Source(folder.tensorflow_path(record.name), saved.model)
            values = source.read([name for name in source.keys if not name.startswith("metrics/")])
    except Exception:  # noqa: BLE001 - TensorFlow's readers raise almost anything; what cannot be read is not the same
        return False
    return values.keys() == variables.keys() and all(
        value.numpy().tobytes() == variables[name].numpy().tobytes() for name, value in values.items()
    )
