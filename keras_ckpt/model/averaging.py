"""The door of `average`: the mean of checkpoints as a checkpoint, or in a model, which alone needs Keras."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from keras_ckpt.formats.averaging import average_into, chosen
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.record import CheckpointRecord, Mode

if TYPE_CHECKING:
    import keras

    from keras_ckpt.formats.exporting import Checkpoint
    from keras_ckpt.model.report import RestoreReport


def average(
    checkpoints: CheckpointDirectory | str | os.PathLike[str] | Iterable[Checkpoint],
    best: int = 3,
    *,
    into: keras.Model | str | os.PathLike[str],
    data: Any = None,
    monitor: str | None = None,
    mode: Mode | None = None,
) -> CheckpointRecord | RestoreReport:
    """Averages the weights of checkpoints, into a new checkpoint or into a model.

    Floats are summed in float32, or in float64 if they are float64, and get their own type again. A variable that is
    equal in all checkpoints stays as it is, to the bit. All else is that of the newest checkpoint: integers, booleans,
    seeds, vocabularies, and in a new checkpoint the optimizer.

    An averaged checkpoint is a run of its own. It can be listed, restored, loaded and exported. Its metadata names the
    steps it was made of, in `average_of`, and their paths, in `average_from`. Making it needs no TensorFlow. Its
    metrics are not known: `add_metrics` adds them.

    Example:

    ```python
    averaged = keras_ckpt.average("runs/digits", best=2, into="runs/digits-averaged")
    print(averaged.metadata["average_of"])
    keras_ckpt.average(runs, best=2, into=model, data=x)
    ```

    Args:
        checkpoints: The directory of a run, or its path. Or a list of checkpoints, each a record or a path.
        best: The number of checkpoints of a run. The checkpoints of a list are all averaged.
        into: The path of a new directory. For a file of Keras, a path that ends in `.keras` or `.weights.h5`. Or a
            built model: its weights and seeds are assigned, all or none, and its optimizer stays as it is. Then the
            model belongs to no run.
        data: Inputs as `model.evaluate` takes them, such as an array or a `tf.data.Dataset`. The statistics of each
            `BatchNormalization` that trains are counted again, as means over the batches. Needs a model. By default
            the statistics are averaged too, which suits checkpoints of one training.
        monitor: The metric that tells the best. Defaults to the metric that training monitored.
        mode: `"min"` or `"max"`. Defaults to the metric's mode in the sidecars.

    Returns:
        The record of the new checkpoint; for a model, the report of what was assigned.

    Raises:
        MismatchError: The checkpoints differ in their weights, or do not fit the model. The error names the weights.
        DirectoryNotEmptyError: Checkpoints are at the path.
        DamagedCheckpointError, CheckpointNotFoundError: A checkpoint cannot be read.
        MonitorError: Neither the arguments nor the sidecars give the metric, or its mode.
        ValueError, TypeError: An argument is wrong.
        SaveError: The checkpoint could not be saved.
    """
    if isinstance(into, str | os.PathLike):
        if data is not None:
            raise ValueError(
                "average(data=...) needs a model to count the statistics of its batch normalization. Average into the "
                "model, and save it."
            )
        return average_into(chosen(checkpoints, best, monitor, mode), os.fspath(into))
    from keras_ckpt.model.averaged import average_in  # a path needs no Keras

    return average_in(into, chosen(checkpoints, best, monitor, mode), data)
