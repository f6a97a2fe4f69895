"""Restoring a checkpoint into a model: all of it or nothing, and a report of what went where."""

from __future__ import annotations

import os

import keras

from keras_ckpt.model.learned import learners
from keras_ckpt.model.naming import named_objects, named_variables
from keras_ckpt.model.parts import is_built
from keras_ckpt.model.report import RestoreReport
from keras_ckpt.model.transfer import Request, transfer
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.notices import log
from keras_ckpt.store.record import CheckpointRecord


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
    report = read_checkpoint(checkpoint, lambda files, name, record: transfer(model, files, name, record, request))
    log.info("restored %s", report.prefix)
    return report
