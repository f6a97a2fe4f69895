"""Loads a model from its checkpoint without its code: built from the config, then restored to the bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

from keras_ckpt.errors import CannotBuildError
from keras_ckpt.formats.config import Config
from keras_ckpt.formats.description import Description
from keras_ckpt.formats.keras_reader import read_config
from keras_ckpt.model import building, compiled, parts
from keras_ckpt.model.checkpoint_reader import BundleSource, errors_as_damage
from keras_ckpt.model.comparison import RestoreRequest, other_backend
from keras_ckpt.model.naming import named_objects, named_variables
from keras_ckpt.model.position import note_restored
from keras_ckpt.model.transfer import transfer
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.notices import log, warn
from keras_ckpt.store.record import CheckpointRecord

_OPTIMIZERS, _MORE = 8, 64 << 20
"""A model may have so many times the bytes of its checkpoint, for a new optimizer, and so many more, for metrics."""


def load_model(
    checkpoint: CheckpointRecord | CheckpointDirectory | str | os.PathLike[str],
    custom_objects: Mapping[str, Any] | None = None,
    compile: bool = True,  # noqa: A002 - the name in keras.models.load_model
) -> keras.Model:
    """Loads a model from a checkpoint, without the code that built it.

    The model has the weights, seeds and optimizer of the checkpoint to the bit, so `fit` continues the run exactly. No
    code from the checkpoint runs: a model with a lambda is refused, in every mode of Keras.

    Files of Keras have low-rank updates (LoRA) merged into the kernels. The updates and their optimizer begin again,
    with a warning.

    Example:

    ```python
    model = keras_ckpt.load_model(keras_ckpt.CheckpointDirectory("runs/digits").best())
    model.predict(x)
    ```

    Args:
        checkpoint: A record, a directory (its newest checkpoint), or the path of a directory, a checkpoint or a
            `.keras` file. Keras's own callbacks may have saved the file.
        custom_objects: Classes and functions of the model that are neither Keras's nor registered with
            `keras.saving.register_keras_serializable`, by name.
        compile: Whether to compile the model as it was, and to restore its optimizer.

    Returns:
        The model, built.

    Raises:
        CannotBuildError: The checkpoint has no config, the config needs a class that this program does not have, or it
            would run code or make a model far larger than the checkpoint.
        DamagedCheckpointError: The checkpoint differs from its digests or cannot be read.
        CheckpointNotFoundError: There is no such checkpoint.
    """

    def read(files: Folder, name: str, record: CheckpointRecord | None) -> keras.Model:
        prefix = os.path.join(files.path, name)
        try:
            model = _build(_saved(files, name), custom_objects or {}, compile, other_backend(record) is not None)
        except CannotBuildError as error:
            raise CannotBuildError(
                f"{prefix} {error} The values need no config: build the model in code, and call "
                f"keras_ckpt.restore(model, {prefix!r})."
            ) from error.__cause__
        merged = bool(files.series.template and parts.lora_scales(model, _names(model)))
        if merged:
            warn(
                f"{prefix} has the low-rank updates (LoRA) of its model merged into the kernels, as Keras saves them. "
                "The updates begin at zero, and the optimizer is new."
            )
        transfer(model, files, name, record, RestoreRequest(weights_only=merged))
        return model

    model = read_checkpoint(checkpoint, read)
    note_restored(model)
    log.info("loaded %s", model.name)
    return model


class _Saved(NamedTuple):
    """The facts of a checkpoint that a model is built from.

    Attributes:
        config: The config of the model, `None` if the checkpoint has none.
        size: The bytes of the checkpoint.
        description: The description of the model, `None` if the checkpoint has none.
    """

    config: Config | None
    size: int
    description: Description | None


def _saved(files: Folder, name: str) -> _Saved:
    if not files.series.template:
        source = BundleSource(files, name)
        return _Saved(source.config(), source.size(), source.description)
    with errors_as_damage():
        return _Saved(read_config(files, name), files.size(name), None)


def _build(saved: _Saved, custom_objects: Mapping[str, Any], compiles: bool, is_of_other_backend: bool) -> keras.Model:
    """Builds the model of a checkpoint, with its settings of `compile`."""
    if saved.config is None:
        raise CannotBuildError(
            "has no config of its model: it is a file of weights, or TensorFlow, Keras 2 or an older version of "
            "keras_ckpt wrote it."
        )
    limit = _OPTIMIZERS * saved.size + _MORE
    model = building.build(saved.config, custom_objects, compiles, limit, is_of_other_backend)
    if saved.description is not None:
        _complete(model, saved.description)
    return model


def _complete(model: keras.Model, saved: Description) -> None:
    """Gives a model the saved settings that its config does not have, or has of another moment."""
    parts.set_lora_scales(model, _names(model), saved.lora)
    if saved.compiled is not None:
        objects = named_objects(model).items()
        optimizers = {name: each for name, each in objects if isinstance(each, keras.optimizers.Optimizer)}
        compiled.adopt(model, optimizers, saved.compiled)


def _names(model: keras.Model) -> dict[int, str]:
    """The names of a model's variables by identity."""
    return {id(variable): name for name, variable in named_variables(model).items()}
