"""Restores a checkpoint into a model, all or nothing, and reports the restored variables."""

from __future__ import annotations

import os

import keras

from keras_ckpt.model.comparison import RestoreRequest
from keras_ckpt.model.learned import learners
from keras_ckpt.model.naming import named_objects, named_variables
from keras_ckpt.model.parts import is_built
from keras_ckpt.model.position import note_restored, note_rollback
from keras_ckpt.model.report import RestoreReport
from keras_ckpt.model.transfer import transfer
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.notices import log
from keras_ckpt.store.record import CheckpointRecord

_HOLDS_MODEL = "module", "_orig_mod"
"""The attributes in which `DistributedDataParallel` and `torch.compile` hold a model."""


def restore(
    model: keras.Model,
    checkpoint: CheckpointRecord | CheckpointDirectory | str | os.PathLike[str],
    *,
    strict: bool = True,
    check_digests: bool = True,
    weights_only: bool = False,
) -> RestoreReport:
    """Restores a checkpoint into a model: weights, seeds, and the optimizer if the model is compiled.

    Variables are matched by the names that `tf.train.list_variables` shows. The state of layers beyond variables, such
    as a vocabulary, is restored too. Everything is checked and read before the first variable changes. Afterwards `fit`
    continues the run of the checkpoint. A warning names weights that have NaN or infinity. Another names the settings
    of `compile` that differ from the saved model's.

    Example:

    ```python
    model.compile("adam", "mse")
    print(keras_ckpt.restore(model, "runs/digits"))
    checkpoint = keras_ckpt.ModelCheckpoint("runs/digits")
    model.fit(x, y, initial_epoch=keras_ckpt.initial_epoch(model), epochs=10, callbacks=[checkpoint])
    ```

    Args:
        model: A built model. To continue training, compile it before.
        checkpoint: A record, a directory (its newest checkpoint), or the path of a directory or a checkpoint.
            Checkpoints of TensorFlow are restored too, and `.keras` and `.weights.h5` files. A file that Keras itself
            wrote has no seeds and no run. A file of weights has no vocabularies.
        strict: Whether a difference in weights, seeds or optimizer is an error. If not, the matching variables are
            restored, and a warning names the rest. After a difference the model belongs to no run. An optimizer that
            differs is left as it is. If nothing of the model matches, that is always an error.
        check_digests: Whether to compare every byte with the digests. If not, the sizes of the files are compared, and
            TensorFlow's checksums of the values that are read. A file of Keras without a record has no digest: then the
            checksums of a `.keras` file are compared.
        weights_only: Whether to restore weights and seeds alone, and to leave the optimizer as compiled. The model
            continues the run: the next phase of a fine-tuning may unfreeze layers and use another optimizer. Low-rank
            updates (LoRA) are merged into their kernels if the model has none.

    Returns:
        The names that were restored, and the names that were not.

    Raises:
        MismatchError: The checkpoint does not fit the model, or a layer refuses its state; nothing was changed.
        DamagedCheckpointError: The checkpoint differs from its digests or cannot be read; nothing was changed.
        CheckpointNotFoundError: There is no such checkpoint.
        ValueError: The model is not built, or the file is a whole model in Keras's legacy `.h5` format.
    """
    if not isinstance(model, keras.Model):
        held = [name for name in _HOLDS_MODEL if isinstance(getattr(model, name, None), keras.Model)]
        advice = f" Pass the Keras model in it, model.{held[0]}." if held else ""
        raise TypeError(f"restore(model, checkpoint) expected a Keras model first. Received: {model!r:.200}.{advice}")
    if not is_built(model):
        raise ValueError(
            f"The model {model.name!r} is not built, so it has no variables to restore. Build it first: "
            "call it on a batch of data, or call model.build(input_shape) if its class defines build()."
        )
    if not (model.variables or named_variables(model, weights_only=True) or learners(named_objects(model))):
        raise ValueError(f"The model {model.name!r} is built and has no variables, so there is nothing to restore.")
    request = RestoreRequest(strict, weights_only, check_digests)
    report = read_checkpoint(checkpoint, lambda files, name, record: transfer(model, files, name, record, request))
    note_restored(model)
    log.info("restored %s", report.prefix)
    return report


def rollback(
    model: keras.Model, run: CheckpointDirectory | str | os.PathLike[str], step: int | CheckpointRecord
) -> RestoreReport:
    """Goes back to a checkpoint of a run: restores all of it, so that the next `fit` continues there.

    The checkpoints of later steps stay until the new training saves their steps again, or a policy removes them. The
    journal of the run shows a branch. A newer backup of `BackupAndRestore` does not undo the rollback: the next `fit`
    replaces the backup. The same script, run again after a crash, resumes from a backup since the rollback.

    Example:

    ```python
    keras_ckpt.rollback(model, "runs/digits", 40)
    model.optimizer.learning_rate = 1e-4
    model.fit(x, y, initial_epoch=keras_ckpt.initial_epoch(model), epochs=10)
    ```

    Args:
        model: A built and compiled model.
        run: A directory, or its path.
        step: The checkpoint's step or record.

    Returns:
        The report of `restore`. Its `epoch` is the number of completed epochs, as `initial_epoch(model)` is.

    Raises:
        CheckpointNotFoundError: The checkpoint does not exist.
        MismatchError, DamagedCheckpointError, ValueError: As `restore` says; nothing was changed.
    """
    directory = run if isinstance(run, CheckpointDirectory) else CheckpointDirectory(run)
    report = restore(model, directory[step])
    note_rollback(model)
    return report
