"""The door of `diff`: two checkpoints, or models in memory, which alone need Keras."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from keras_ckpt.formats.difference import Difference, Side, difference, open_side
from keras_ckpt.formats.variables import Kind
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.record import CheckpointRecord

if TYPE_CHECKING:
    import keras

_ON_DISK = CheckpointRecord, CheckpointDirectory, str, os.PathLike


def diff(
    a: keras.Model | CheckpointRecord | CheckpointDirectory | str | os.PathLike[str],
    b: keras.Model | CheckpointRecord | CheckpointDirectory | str | os.PathLike[str],
    *,
    optimizer: bool = False,
) -> Difference:
    """Compares the weights of two checkpoints, or of a checkpoint and a model, layer by layer.

    For each layer, the table has the relative change, the largest change of an element, the fraction of the elements
    that changed, and the number of NaN and infinite elements. A layer is frozen if it is equal to the bit. A layer in a
    file that both checkpoints share by a hard link is frozen too, and is not read. Two checkpoints are compared without
    TensorFlow. A checkpoint that is removed meanwhile is compared to the end.

    Example:

    ```python
    runs = keras_ckpt.CheckpointDirectory("runs/digits")
    print(keras_ckpt.diff(runs[40], runs.best()))
    print(keras_ckpt.diff(model, "runs/digits"))
    ```

    Args:
        a: A record, a directory (its newest checkpoint), the path of a directory or a checkpoint, or a built model. A
            `.keras`, `.weights.h5` or `.h5` file is accepted too.
        b: The same. If only one is a file of Keras, the names are those of the file.
        optimizer: Whether to compare the state of the optimizer too.

    Returns:
        The layers, the largest change first, and the variables that only one has or that differ in shape or type.

    Raises:
        DamagedCheckpointError: A checkpoint cannot be trusted.
        CheckpointNotFoundError: There is no such checkpoint.
        ValueError: A model is not built, or a checkpoint cannot give the names of a file of Keras.
    """
    with contextlib.ExitStack() as keep_open:
        return difference(_side(a, keep_open), _side(b, keep_open), optimizer)


def _side(each: Any, keep_open: contextlib.ExitStack) -> Side:
    if not isinstance(each, _ON_DISK):
        import keras  # two checkpoints need no Keras

        if isinstance(each, keras.Model):
            return _in_memory(each)
    return open_side(each, keep_open)


def _in_memory(model: keras.Model) -> Side:
    """The values of a model, without a copy of them where the backend allows it."""
    from keras_ckpt.formats.keras_writer import dataset_of
    from keras_ckpt.model import naming
    from keras_ckpt.model.backends import backend
    from keras_ckpt.model.parts import is_built
    from keras_ckpt.model.places import places_of

    if not is_built(model):
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no variables to compare. Build it first: call it on a "
            "batch of data."
        )
    variables = naming.named_variables(model)
    tensors = backend.Reader(model, variables).read()
    values = {name: backend.array_of(tensors[name]) for name in variables}
    title = f"the model {model.name!r}"

    def side(names: dict[str, str], is_file: bool) -> Side:
        """The values by other names, each with its name in the model."""
        kinds = {name: Kind(values[own].dtype, values[own].shape) for name, own in names.items()}
        weights = [name for name, own in names.items() if own.startswith("model/")]
        return Side(title, is_file, kinds, weights, lambda name: values[names[name]], {}, as_file)

    def as_file() -> Side:
        places = places_of(model, {id(variable): name for name, variable in variables.items()}, {})
        known = {
            dataset_of(path, key): name for path, each in places.items() for key, name in each.variables.items() if name
        }
        return side(known, True)

    return side({name: name for name in variables}, False)
