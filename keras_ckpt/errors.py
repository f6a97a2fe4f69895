"""The errors of this package: one class for each condition. Each class also derives from the matching builtin.

CheckpointError
├── CheckpointNotFoundError    KeyError,        no such checkpoint, or no checkpoint has the metric
│                              FileNotFoundError
├── DamagedCheckpointError     ValueError       a sidecar or a file differs from the saved bytes
├── FormatVersionError         ValueError       written by a newer version of this package
├── MismatchError              ValueError       the checkpoint and the model differ
├── CannotBuildError           ValueError       the model cannot be built without its code
├── PlanError                  ValueError       a plan would remove all checkpoints
├── MonitorError               ValueError       the metric to rank by, or its mode, is not known
├── DirectoryInUseError        BlockingIOError  another process writes into the directory
├── DirectoryNotEmptyError     FileExistsError  the directory holds another run's checkpoints
└── SaveError                  OSError          a checkpoint could not be written
    └── DiskFullError                           the disk is full
"""


class CheckpointError(Exception):
    """The base of all errors of this package; wrong arguments are plain ValueError and TypeError.

    Example:

    ```python
    try:
        keras_ckpt.restore(model, "runs/letters")
    except keras_ckpt.CheckpointError as error:
        print(error)
    ```
    """


class CheckpointNotFoundError(CheckpointError, KeyError, FileNotFoundError):
    """The checkpoint or the directory does not exist.

    Example:

    ```python
    try:
        keras_ckpt.restore(model, keras_ckpt.CheckpointDirectory("runs/digits")[1_000_000])
    except keras_ckpt.CheckpointNotFoundError as error:
        print(error)
    ```
    """

    # KeyError shows the repr of its argument: the message would appear in quotes.
    __str__ = Exception.__str__


class DamagedCheckpointError(CheckpointError, ValueError):
    """A sidecar, or a file that it lists, differs from the saved bytes.

    Example:

    ```python
    runs = keras_ckpt.CheckpointDirectory("runs/digits")
    try:
        keras_ckpt.restore(model, runs.best())
    except keras_ckpt.DamagedCheckpointError as error:
        print(error)
        keras_ckpt.restore(model, runs.verify().listing.records[-1])
    ```
    """


class FormatVersionError(CheckpointError, ValueError):
    """A newer version of this package wrote the sidecar.

    Example:

    ```python
    try:
        keras_ckpt.CheckpointDirectory("runs/digits").prune(keras_ckpt.LatestN(1))
    except keras_ckpt.FormatVersionError as error:
        print(error)
    ```
    """


class MismatchError(CheckpointError, ValueError):
    """The checkpoint does not match the model; nothing was restored.

    Example:

    ```python
    wider = keras.Sequential([keras.Input(model.input_shape[1:]), keras.layers.Dense(100)])
    try:
        keras_ckpt.restore(wider, "runs/digits")
    except keras_ckpt.MismatchError as error:
        print(error)
    ```
    """


class CannotBuildError(CheckpointError, ValueError):
    """The model of a checkpoint cannot be built from its config; the checkpoint is as it was.

    Example:

    ```python
    layers = [keras.layers.Lambda(lambda x: 2 * x), keras.layers.Dense(3)]
    doubled = keras.Sequential([keras.Input((4,)), *layers])
    doubled.save("doubled.keras")
    try:
        keras_ckpt.load_model("doubled.keras")
    except keras_ckpt.CannotBuildError as error:
        print(error)
        keras_ckpt.restore(doubled, "doubled.keras")
    ```
    """


class PlanError(CheckpointError, ValueError):
    """A plan would remove all checkpoints, or a checkpoint that must stay.

    Example:

    ```python
    try:
        keras_ckpt.CheckpointDirectory("runs/digits").prune(keras_ckpt.BestN(3, "val_recall", "max"))
    except keras_ckpt.PlanError as error:
        print(error)
    ```
    """


class MonitorError(CheckpointError, ValueError):
    """Neither the arguments nor the sidecars give the metric to rank by, or its mode.

    Example:

    ```python
    try:
        keras_ckpt.CheckpointDirectory("runs/digits").history("recall")
    except keras_ckpt.MonitorError as error:
        print(error)
    ```
    """


class DirectoryInUseError(CheckpointError, BlockingIOError):
    """Another process writes into the directory.

    Example:

    ```python
    try:
        model.fit(x, y, callbacks=[keras_ckpt.ModelCheckpoint("runs/digits")])
    except keras_ckpt.DirectoryInUseError as error:
        print(error)
    ```
    """


class DirectoryNotEmptyError(CheckpointError, FileExistsError):
    """The directory holds checkpoints of another run, or foreign files with a checkpoint's names.

    Example:

    ```python
    other = keras.models.clone_model(model)
    other.compile("sgd", "mse")
    try:
        other.fit(x, y, callbacks=[keras_ckpt.ModelCheckpoint("runs/digits", new_run="refuse")])
    except keras_ckpt.DirectoryNotEmptyError as error:
        print(error)
    ```
    """


class SaveError(CheckpointError, OSError):
    """A checkpoint could not be written; earlier checkpoints are untouched.

    Example:

    ```python
    try:
        model.fit(x, y, callbacks=[keras_ckpt.ModelCheckpoint("runs/digits")])
    except keras_ckpt.SaveError as error:
        print(error)
        model.save("rescued.keras")
    ```
    """


class DiskFullError(SaveError):
    """The disk has no room for a checkpoint; earlier checkpoints are untouched.

    Example:

    ```python
    manager = keras_ckpt.CheckpointManager(tf.train.Checkpoint(model=model), "runs/loop")
    try:
        manager.save()
    except keras_ckpt.DiskFullError as error:
        print(error)
    ```
    """
