"""The door of `export`: a checkpoint in another format, through its model only where the format needs the model."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from keras_ckpt.formats.exporting import ENDINGS, NAMED, Checkpoint, Names, export_values
from keras_ckpt.store.files import Folder

_ONNX = ".onnx"


def export(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    *,
    weights_only: bool = False,
    names: Names = "variables",
    custom_objects: Mapping[str, Any] | None = None,
) -> None:
    """Exports a checkpoint to a file in another format, or to a SavedModel.

    The ending of the path is the format. The first four need neither TensorFlow nor the model:

    - `.keras`: the file that Keras would have written. `keras.models.load_model` reads it. Without the state of an
      optimizer the model is not compiled.
    - `.weights.h5`: the same for `load_weights`.
    - `.npz` and `.safetensors`: the values by the names of `load_variables`, or of a `state_dict`. Numbers of a type
      that the format lacks, such as `bfloat16` in an `.npz`, become the next larger type that it has, with the same
      values.
    - `.onnx`: an ONNX file. `load_model` builds the model. The packages `onnx` and `tf2onnx` are needed.
    - A path that ends in `/` or has no ending: a folder with TensorFlow's SavedModel. `load_model` builds the model.

    An export is complete and durable, or not there. It replaces a file, but never a folder or a checkpoint.

    Example:

    ```python
    keras_ckpt.export(keras_ckpt.CheckpointDirectory("runs/digits").best(), "digits.keras")
    ```

    Args:
        checkpoint: A record, a directory (its newest checkpoint), or the path of a directory or a checkpoint. A file of
            Keras is accepted too.
        path: The file or the folder to write.
        weights_only: Whether to skip the optimizer and the metrics. ONNX and SavedModels never have them.
        names: The names of the values in an `.npz` or a `.safetensors` file. `"state_dict"` means those of the model's
            `state_dict` on PyTorch: `model.load_state_dict(safetensors.torch.load_file(path))` loads them. Such a file
            has the weights alone. The checkpoint must be of a model on PyTorch.
        custom_objects: Classes and functions of the model that are neither Keras's nor registered with
            `keras.saving.register_keras_serializable`, by name. Only the formats that build the model need them.

    Raises:
        DamagedCheckpointError: The checkpoint cannot be trusted.
        CheckpointNotFoundError: There is no such checkpoint.
        CannotBuildError: The format needs the model, and the checkpoint cannot build it.
        ValueError: The ending is unknown, or the format cannot hold the checkpoint. Nothing is written.
        FileExistsError: The path is a checkpoint, or something lies at the path of a SavedModel.
        ImportError: A package for ONNX is missing.
        OSError: The file cannot be written.
    """
    name = os.fspath(path)
    path = os.path.abspath(name)
    if names not in get_args(Names):
        raise ValueError(f"names expected 'variables' or 'state_dict'. Received: {names!r}")
    if names == "state_dict" and not path.endswith(NAMED):
        raise ValueError(f"names='state_dict' is for files that end in {' or '.join(NAMED)}. Received: {name!r}")
    if path.endswith(ENDINGS):
        export_values(checkpoint, path, weights_only, names)
    elif path.endswith(_ONNX):
        _export_model(checkpoint, path, "onnx", custom_objects)
    elif name.endswith(os.sep) or not os.path.splitext(path)[1]:
        _export_model(checkpoint, path, "tf_saved_model", custom_objects)
    else:
        raise ValueError(
            f"export() writes files that end in {', '.join(ENDINGS)} or {_ONNX}, and SavedModels to paths that end in "
            f"/ or have no ending. Received: {name!r}"
        )


def _export_model(checkpoint: Checkpoint, path: str, form: str, custom_objects: Mapping[str, Any] | None) -> None:
    """Builds the model of a checkpoint, and lets Keras export it."""
    _require_tensorflow(path)
    if form == "onnx":
        _require_onnx()
    elif os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "A SavedModel replaces nothing. Remove it, or choose another path", path)
    from keras_ckpt.model.loading import load_model  # the other formats need no Keras

    model = load_model(checkpoint, custom_objects, compile=False)
    _call(model)
    with Folder(os.path.dirname(path)) as folder, folder.adopting(os.path.basename(path)) as new, _unlogged(new):
        model.export(new, format=form, verbose=False)
        if form == "onnx":
            _check_onnx(new)


def _require_tensorflow(path: str) -> None:
    import keras

    if (name := keras.backend.backend()) != "tensorflow":
        raise ValueError(
            f"Keras exports {os.path.basename(path) or path} with TensorFlow. Received: the backend {name}. Export the "
            "checkpoint in a process with KERAS_BACKEND=tensorflow; it builds the same model there. Or export to "
            f"{', '.join(ENDINGS)} here."
        )


def _call(model: Any) -> None:
    """Calls a model with symbols: Keras exports only models that were called."""
    import keras

    inputs = getattr(model, "input", None)
    if inputs is None and (shape := (model.get_build_config() or {}).get("input_shape")):
        inputs = keras.KerasTensor(shape)
    if inputs is not None:
        model(inputs)


@contextlib.contextmanager
def _unlogged(private: str) -> Iterator[None]:
    """Hides lines of TensorFlow's log that name a private folder, which is gone when a person reads them."""

    def is_public(entry: logging.LogRecord) -> bool:
        return private not in entry.getMessage()

    log = logging.getLogger("tensorflow")
    log.addFilter(is_public)
    try:
        yield
    finally:
        log.removeFilter(is_public)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import tf2onnx  # noqa: F401
    except ImportError as error:
        raise ImportError(f"export() needs packages for .onnx files: pip install onnx tf2onnx ({error})") from error


def _check_onnx(path: str) -> None:
    """Refuses a file with operations that ONNX does not have: the writer copies them, and only logs it."""
    import onnx

    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"ONNX cannot hold the model: {reason:.300}. Export a SavedModel.") from error
