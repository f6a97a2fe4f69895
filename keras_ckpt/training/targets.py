"""The targets of `ModelCheckpoint`: a directory of TensorFlow checkpoints, or files in Keras's own formats."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import keras

from keras_ckpt.model.file_snapshot import Kind, fingerprint
from keras_ckpt.model.position import Position, note_restored, position_of, set_position
from keras_ckpt.store import layout
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.policies import BestN, LatestN, PreservationPolicy
from keras_ckpt.store.writer import Writer
from keras_ckpt.training.bundle_form import Bundles
from keras_ckpt.training.file_form import KerasFiles
from keras_ckpt.training.file_names import Template
from keras_ckpt.training.lines import Lines, OfDirectory, OfFiles
from keras_ckpt.training.schedule import CallbackSchedule, SaveFreq, SaveSchedule

_WEIGHTS = ".weights.h5"
_OTHERS = (".hdf5", ".hd5", ".ckpt")
"""The suffixes of files that other savers write."""


class Target(Protocol):
    """Where a callback saves, and in which form."""

    directory: CheckpointDirectory

    def schedule(self, save_freq: SaveFreq | list[SaveFreq]) -> SaveSchedule:
        """The schedule of the saves."""

    def name(self, values: Mapping[str, Any]) -> str:
        """The name of a checkpoint, `""` for the default name of its step.

        Args:
            values: The epoch and the batch as in Keras's file names, and the logs.
        """

    def warn_of_missing(self, values: Mapping[str, Any]) -> None:
        """Warns once of values that the name of a saved checkpoint lacks. Arguments as in `name`."""

    def form(self, model: keras.Model, writer: Writer) -> Bundles | KerasFiles:
        """The form in which a model is saved."""

    def keep(self, policy: PreservationPolicy | None, best_only: bool) -> PreservationPolicy | None:
        """The policy, with the default for callbacks that save only the best."""

    def lines(self, best_only: bool) -> Lines:
        """The lines that `verbose=1` prints."""

    def refuse_unreadable(self, with_optimizer: bool) -> None:
        """Refuses a form of checkpoints that cannot be restored at the end of `fit`, or in it.

        Args:
            with_optimizer: Whether the optimizer must be restored too.

        Raises:
            ValueError: The files are in Keras's legacy format, or lack the optimizer.
        """

    def adopt(self, model: keras.Model, places: Iterable[CheckpointDirectory]) -> None:
        """Lets a model without a run continue the run of the checkpoint whose weights it has.

        Args:
            model: The model.
            places: The directories in which the checkpoint may be.
        """

    def is_read_by(self, callback: keras.callbacks.Callback, others: keras.callbacks.CallbackList | None) -> bool:
        """Whether code of a user could read a checkpoint at once: in a subclass, or in a later callback."""


class Directory:
    """A directory of TensorFlow checkpoints.

    Args:
        path: The directory.
        weights_only: Whether to omit the optimizer.
    """

    def __init__(self, path: str, weights_only: bool) -> None:
        self.directory = CheckpointDirectory(path, layout.TENSORFLOW)
        self._weights_only = weights_only

    def schedule(self, save_freq: SaveFreq | list[SaveFreq]) -> SaveSchedule:
        return SaveSchedule(save_freq)

    def name(self, values: Mapping[str, Any]) -> str:
        return ""

    def warn_of_missing(self, values: Mapping[str, Any]) -> None:
        return

    def form(self, model: keras.Model, writer: Writer) -> Bundles:
        return Bundles(model, writer, self._weights_only)

    def keep(self, policy: PreservationPolicy | None, best_only: bool) -> PreservationPolicy | None:
        return BestN(1) if policy is None and best_only else policy

    def lines(self, best_only: bool) -> Lines:
        return OfDirectory(self.directory)

    def refuse_unreadable(self, with_optimizer: bool) -> None:
        if with_optimizer and self._weights_only:
            raise ValueError(
                "on_nan needs the state of the optimizer, which may have NaN too, and save_weights_only=True omits it. "
                "Pass save_weights_only=False."
            )

    def adopt(self, model: keras.Model, places: Iterable[CheckpointDirectory]) -> None:
        return

    def is_read_by(self, callback: keras.callbacks.Callback, others: keras.callbacks.CallbackList | None) -> bool:
        return False


class Files:
    """Files in a format of Keras, named by a template.

    Args:
        path: The template, or the name of one file that each save replaces.
        kind: The format.

    Raises:
        ValueError: The template is malformed.
    """

    def __init__(self, path: str, kind: Kind) -> None:
        self._kind = kind
        # Nothing is read here: a file of another template may have the name.
        self._folder, series = layout.split(path)
        self.directory = CheckpointDirectory(self._folder, series)
        self._template = Template(series.template)

    def schedule(self, save_freq: SaveFreq | list[SaveFreq]) -> SaveSchedule:
        return CallbackSchedule(save_freq)

    def name(self, values: Mapping[str, Any]) -> str:
        return self._template.name(values)

    def warn_of_missing(self, values: Mapping[str, Any]) -> None:
        self._template.warn_of_missing(values)

    def form(self, model: keras.Model, writer: Writer) -> KerasFiles:
        return KerasFiles(model, writer, self._kind)

    def keep(self, policy: PreservationPolicy | None, best_only: bool) -> PreservationPolicy | None:
        return policy

    def lines(self, best_only: bool) -> Lines:
        return OfFiles(self._folder, self.directory.path, best_only)

    def refuse_unreadable(self, with_optimizer: bool) -> None:
        if self._kind == "legacy":
            path = os.path.join(self._folder, self.directory.series.template)
            raise ValueError(
                "ModelCheckpoint restores no legacy .h5 file, which load_best_at_end and on_nan need. Received: "
                f"filepath={path}. Write {os.path.splitext(path)[0]}.keras"
            )

    def adopt(self, model: keras.Model, places: Iterable[CheckpointDirectory]) -> None:
        if position_of(model) is not None:
            return
        records = [record for place in places for record in reversed(place.listing().all_runs)]
        weights = fingerprint(model) if records else None
        record = next((each for each in records if each.weights == weights), None)
        if record is not None:
            set_position(model, Position(record.run_id, record.step, record.epoch or 0))
            note_restored(model)

    def is_read_by(self, callback: keras.callbacks.Callback, others: keras.callbacks.CallbackList | None) -> bool:
        callbacks = others.callbacks if others else []
        later = callbacks[callbacks.index(callback) :] if callback in callbacks else [callback, *callbacks]
        return any(map(_has_code_of_a_user, later))


def _has_code_of_a_user(callback: keras.callbacks.Callback) -> bool:
    is_ours = type(callback).__module__.startswith(("keras.", "keras_ckpt."))
    return not is_ours or isinstance(callback, keras.callbacks.LambdaCallback)


def target(filepath: str | os.PathLike[str], weights_only: bool, keep: PreservationPolicy | None) -> Target:
    """The target that the arguments of a callback name.

    Args:
        filepath: A directory, a file in a format of Keras, or a template of such files.
        weights_only: The argument `save_weights_only`: the format of a file, or the omission of the optimizer.
        keep: The policy.

    Raises:
        ValueError, TypeError: The path is no target, or does not fit the other arguments.
    """
    if not isinstance(filepath, str | os.PathLike) or not isinstance(path := os.fspath(filepath), str):
        raise TypeError(f"ModelCheckpoint expected a path. Received: filepath={filepath!r}")
    if not layout.is_keras_file(path):
        _refuse_other_file(path, weights_only)
        return Directory(path, weights_only)
    if weights_only and not path.endswith(_WEIGHTS):
        raise ValueError(
            "When using `save_weights_only=True` in `ModelCheckpoint`, the filepath provided must end in `.weights.h5` "
            f"(Keras weights format), or be a directory. Received: filepath={path}. "
            f"Write {os.path.splitext(path)[0]}{_WEIGHTS}"
        )
    if path.endswith(_WEIGHTS) and not weights_only:
        raise ValueError(
            f"The filepath {path!r} is for weights, but the whole model would be saved. Pass save_weights_only=True, "
            f"or end the filepath in .keras: {path.removesuffix(_WEIGHTS)}.keras"
        )
    if os.path.isdir(path):
        raise IsADirectoryError(
            "Please specify a non-directory filepath for ModelCheckpoint. Filepath used is an existing directory: "
            f"{path}"
        )
    if not Template(path).fields and not (
        keep is None or keep == LatestN(1) or (isinstance(keep, BestN) and keep.n == 1)
    ):
        raise ValueError(
            f"One file cannot hold several checkpoints. Received: filepath={path!r} and keep={keep!r}. Put {{epoch}} "
            f"into the name: {os.path.splitext(path)[0]}-{{epoch:02d}}{os.path.splitext(path)[1]}"
        )
    kind: Kind = "keras" if path.endswith(".keras") else "weights" if weights_only else "legacy"
    return Files(path, kind)


def _refuse_other_file(path: str, weights_only: bool) -> None:
    """Refuses a path that other savers would write as a file, and a template of directories."""
    stem, suffix = os.path.splitext(path)
    keras_suffix = _WEIGHTS if weights_only else ".keras"
    if suffix.lower() in (*_OTHERS, ".keras", ".h5") or path.lower().endswith(".weights"):
        raise ValueError(
            "The filepath provided must end in `.keras` (Keras model format), in `.weights.h5` with "
            f"save_weights_only=True, or be a directory without a suffix. Received: filepath={path}. "
            f"Write {stem.removesuffix('.weights')}{keras_suffix}"
        )
    if re.search(r"\{.*\}", path):
        raise ValueError(
            "A directory names its checkpoints by step, and has their metrics in sidecars. Received: "
            f"filepath={path!r}. For files named by a template, write {path}{keras_suffix}. For a directory of "
            f"checkpoints, write {_directory_for(path)}"
        )


def _directory_for(path: str) -> str:
    """The directory to suggest instead of a template of names."""
    start = path.partition("{")[0]
    return start.rstrip("/" if start.endswith("/") else "-_.= ") or "checkpoints"
