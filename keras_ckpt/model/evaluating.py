"""Evaluates each checkpoint of a run on further data, and adds the metrics to its sidecar."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import keras

from keras_ckpt.errors import CheckpointNotFoundError, DamagedCheckpointError
from keras_ckpt.model import learned, naming
from keras_ckpt.model.position import keeping_position
from keras_ckpt.model.restoring import restore
from keras_ckpt.model.transfer import UndoAssignment, retrace
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.notices import log, warn
from keras_ckpt.store.record import CheckpointRecord, Mode


def evaluate(
    model: keras.Model,
    run: CheckpointDirectory | str | os.PathLike[str],
    data: Any,
    prefix: str = "test_",
    **options: Any,
) -> dict[int, dict[str, float]]:
    """Evaluates each checkpoint of a run on data, and adds the metrics to its sidecar.

    Each checkpoint is restored into the model and measured by `model.evaluate`. Its metrics are on disk before the next
    checkpoint begins, so interrupted work is kept. Their modes are those that training knew. A checkpoint that has the
    metrics already is skipped, whatever the data are. A terminal shows a progress bar. At the end, or after an error,
    the model has its own state again: weights, seeds, learned state and place in its run.

    Example:

    ```python
    runs = keras_ckpt.CheckpointDirectory("runs/digits")
    keras_ckpt.evaluate(model, runs, (x_test, y_test))
    print(runs.best("test_accuracy"))
    ```

    Args:
        model: A compiled and built model that the checkpoints fit.
        run: A directory, or its path.
        data: Data in a form of `validation_data` of `fit`: a tuple `(x, y)` or `(x, y, sample_weight)`, a dataset, a
            `PyDataset`. No generator, which could be read once only.
        prefix: The prefix of the names of the metrics. Another prefix measures each checkpoint again.
        **options: Arguments of `model.evaluate`, such as `batch_size`, `steps` or `verbose`.

    Returns:
        The metrics with the prefix of each evaluated checkpoint, by step, also of those that had them already.

    Raises:
        ValueError: The model cannot be evaluated on the data. The model is as it was, and so is the checkpoint.
        TypeError: An argument has a wrong type.
        MismatchError: A checkpoint does not fit the model.
    """
    directory = run if isinstance(run, CheckpointDirectory) else CheckpointDirectory(run)
    _check(model, data, prefix)
    arguments = dict(zip(("x", "y", "sample_weight"), keras.utils.unpack_x_y_sample_weight(data), strict=True))
    arguments |= {"verbose": 0, **options, "return_dict": True}
    names, found, skipped = {f"{prefix}loss"}, {}, 0
    listing = directory.listing()
    for name, error in listing.damaged.items():
        warn(f"{os.path.join(listing.path, name)} is not evaluated: it is damaged. {error}")
    with _unchanged(model):
        for record in _shown(listing.records):
            if names <= record.metrics.keys():
                found[record.step] = {name: value for name, value in record.metrics.items() if name.startswith(prefix)}
                skipped += 1
                continue
            try:
                restore(model, record, weights_only=True)
                metrics = {f"{prefix}{name}": value for name, value in _measured(model, record, arguments).items()}
                directory.add_metrics(record, metrics, _modes(record, prefix, metrics))
            except (CheckpointNotFoundError, DamagedCheckpointError) as error:
                warn(f"{record.prefix} is not evaluated: {error}")
                continue
            names, found[record.step] = {*metrics}, metrics
    if skipped:
        log.info("%d checkpoints had %sloss already; another prefix measures them again", skipped, prefix)
    return found


def _modes(record: CheckpointRecord, prefix: str, metrics: Iterable[str]) -> dict[str, Mode]:
    """The modes of measured metrics: those of the same metrics, without the prefix, that training knew."""
    known = record.known_modes
    found = {name: (name.removeprefix(prefix), f"val_{name.removeprefix(prefix)}") for name in metrics}
    return {name: known[each] for name, names in found.items() for each in names if each in known}


def _check(model: object, data: Any, prefix: object) -> None:
    """Refuses arguments before a checkpoint is read."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"evaluate() expected a Keras model. Received: {model!r:.200}")
    if not model.compiled:
        raise ValueError(
            f"The model {model.name!r} is not compiled, so it has no loss and no metrics to measure. Call "
            "model.compile(loss=..., metrics=...)."
        )
    if not isinstance(prefix, str) or not prefix:
        raise TypeError(f"evaluate() expected a prefix of names, such as 'test_'. Received: prefix={prefix!r}")
    if data is None or isinstance(data, Iterator):
        raise TypeError(
            "evaluate() reads the data once for each checkpoint, so it expected arrays (x, y), a tf.data.Dataset or a "
            f"keras.utils.PyDataset. Received: data={data!r:.200}"
        )


def _measured(model: keras.Model, record: CheckpointRecord, arguments: dict[str, Any]) -> dict[str, float]:
    try:
        return dict(model.evaluate(**arguments))
    except Exception as error:
        text = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{record.prefix} could not be evaluated: {type(error).__name__}: {text:.500}. Give evaluate() data as for "
            "fit(), and options of model.evaluate(). The model and the checkpoint are as they were."
        ) from error


@contextlib.contextmanager
def _unchanged(model: keras.Model) -> Iterator[None]:
    """Gives a model its state back at the end of the block: variables, learned state, place in its run."""
    learners = learned.learners(naming.named_objects(model))
    undo = learned.Undo(learners.values())
    before = UndoAssignment(model, naming.named_variables(model))
    with keeping_position(model):
        try:
            yield
        finally:
            undo.undo()
            before.undo()
            if learners:
                retrace(model)


def _shown(records: tuple[CheckpointRecord, ...]) -> Iterator[CheckpointRecord]:
    """The records, with a progress bar in a terminal."""
    import rich.console
    from rich.progress import MofNCompleteColumn, Progress

    terminal = rich.console.Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bar:
        yield from bar.track(records, description="evaluating")
