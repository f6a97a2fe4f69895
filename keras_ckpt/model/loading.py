"""Loads a model from its checkpoint without its code: built from the config, then restored to the bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras

from keras_ckpt.errors import CannotBuildError
from keras_ckpt.formats.description import Description
from keras_ckpt.model import building, compiled, parts
from keras_ckpt.model.checkpoint_reader import Source
from keras_ckpt.model.comparison import RestoreRequest
from keras_ckpt.model.naming import named_objects, named_variables
from keras_ckpt.model.transfer import transfer
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.notices import log
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

    Example:

    ```python
    model = keras_ckpt.load_model(keras_ckpt.CheckpointDirectory("runs/digits").best())
    model.predict(x)
    ```

    Args:
        checkpoint: A record, a directory (its newest checkpoint), or the path of a directory or a checkpoint.
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
            model = _build(Source(files, name), custom_objects or {}, compile)
        except CannotBuildError as error:
            raise CannotBuildError(
                f"{prefix} {error} The values need no config: build the model in code, and call "
                f"keras_ckpt.restore(model, {prefix!r})."
            ) from error.__cause__
        transfer(model, files, name, record, RestoreRequest())
        return model

    model = read_checkpoint(checkpoint, read)
    log.info("loaded %s", model.name)
    return model


def _build(source: Source, custom_objects: Mapping[str, Any], compiles: bool) -> keras.Model:
    """Builds the model of a checkpoint, with its settings of `compile`."""
    config = source.config()
    if config is None:
        raise CannotBuildError("has no config of its model: TensorFlow or an older version of keras_ckpt wrote it.")
    model = building.build(config, custom_objects, compiles, _OPTIMIZERS * source.size() + _MORE)
    if source.description is not None:
        _complete(model, source.description)
    return model


def _complete(model: keras.Model, saved: Description) -> None:
    """Gives a model the saved settings that its config does not have, or has of another moment."""
    names = {id(variable): name for name, variable in named_variables(model).items()}
    parts.set_lora_scales(model, names, saved.lora)
    if saved.compiled is not None:
        objects = named_objects(model).items()
        optimizers = {name: each for name, each in objects if isinstance(each, keras.optimizers.Optimizer)}
        compiled.adopt(model, optimizers, saved.compiled)
