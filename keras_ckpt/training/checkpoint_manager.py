"""`CheckpointManager`: TensorFlow's manager with policies and sidecars, for custom training loops."""

from __future__ import annotations

import contextlib
import copy
import errno
import inspect
import itertools
import numbers
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import msgspec

if (_backend := keras.backend.backend()) != "tensorflow":
    raise ImportError(
        f"CheckpointManager is a tf.train.CheckpointManager, for loops with TensorFlow. Received: the backend "
        f"{_backend}. Set KERAS_BACKEND=tensorflow, or save with keras_ckpt.ModelCheckpoint in fit()."
    )

import tensorflow as tf

from keras_ckpt.errors import DamagedCheckpointError, DirectoryNotEmptyError
from keras_ckpt.formats import graph
from keras_ckpt.formats.bundle_index import read_index
from keras_ckpt.model import model_state, object_graph
from keras_ckpt.store import layout
from keras_ckpt.store.commit import read_state, write_state
from keras_ckpt.store.directory import Change, CheckpointDirectory
from keras_ckpt.store.files import Folder, lasting_tensorflow_path
from keras_ckpt.store.journal import of_record
from keras_ckpt.store.layout import TENSORFLOW
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.locating import opened
from keras_ckpt.store.notices import warn
from keras_ckpt.store.policies import LatestN, PreservationPolicy, as_policy
from keras_ckpt.store.quantities import as_bytes
from keras_ckpt.store.record import Mode, as_metric, encodable_metadata, step_in
from keras_ckpt.store.tables import counted
from keras_ckpt.store.writer import SaveRequest, Writer, by_prefix
from keras_ckpt.training.hooks import Hook, Hooks

PRESERVED = "keep_checkpoint_every_n_hours"
"""The reason of a pin that the manager sets."""


class CheckpointManager(tf.train.CheckpointManager):
    """A `tf.train.CheckpointManager` with retention policies, sidecars and crash-safe saves.

    All arguments and methods of TensorFlow's manager keep their meaning. Eager code written for it runs unchanged. This
    class shares no state with its parent: it reads the checkpoints from the directory.

    Example:

    ```python
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    manager = keras_ckpt.CheckpointManager(checkpoint, "runs/digits", keep=keras_ckpt.BestN(3, "loss", "min"))
    manager.restore_or_initialize()
    for epoch in range(10):
        loss = train_one_epoch()
        manager.save(metrics={"loss": loss}, epoch=epoch + 1)
    ```

    Args:
        checkpoint: The `tf.train.Checkpoint` to save.
        directory: The directory to save into.
        max_to_keep: How many checkpoints to keep; `None` keeps all.
        keep_checkpoint_every_n_hours: The minimum hours between preserved checkpoints. A checkpoint that would be
            removed is pinned instead if it is that much newer than the last preserved checkpoint.
        checkpoint_name: The prefix of the checkpoints' names.
        step_counter: An integer `tf.Variable`, needed for `checkpoint_interval`.
        checkpoint_interval: The minimum number of steps between two checkpoints.
        init_fn: Called by `restore_or_initialize` if there is no checkpoint.
        last_checkpoint_step: The step of the last checkpoint, from which the interval counts.
        keep: A policy, or an int `n` for the newest `n`, instead of `max_to_keep`.
        metadata: A dict to put into each sidecar.
        monitor: The metric that `keep` ranks by if it names no metric.
        mode: Whether less (`"min"`) or more (`"max"`) of the metric is better.
        min_free: The bytes of the disk to leave free: a number, or a text such as `"10 GB"`. A save that would leave
            less removes checkpoints before it, as for `ModelCheckpoint`. If these are too few, `save` raises. A save
            counts as large as the newest checkpoint.
        on_saved: A function of a `CheckpointRecord`, called by `save` after the checkpoint is on disk. An error in it
            is a warning.
        on_removed: The same for each checkpoint that was removed.

    Raises:
        ValueError, TypeError: A wrong argument.
    """

    def __init__(
        self,
        checkpoint: tf.train.Checkpoint,
        directory: str | os.PathLike[str],
        max_to_keep: int | None = None,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: tf.Variable | None = None,
        checkpoint_interval: int | None = None,
        init_fn: Callable[[], object] | None = None,
        last_checkpoint_step: int | None = None,
        *,
        keep: PreservationPolicy | int | None = None,
        metadata: Mapping[str, Any] | None = None,
        monitor: str | None = None,
        mode: Mode | None = None,
        min_free: str | float | None = None,
        on_saved: Hook | None = None,
        on_removed: Hook | None = None,
    ) -> None:
        if not isinstance(checkpoint, tf.train.Checkpoint):
            raise TypeError(
                f"CheckpointManager expected a tf.train.Checkpoint. Received: {checkpoint!r:.200}. "
                "Wrap the objects to save: tf.train.Checkpoint(model=model)."
            )
        if keep is not None and max_to_keep is not None:
            raise ValueError(
                f"keep and max_to_keep exclude each other. Received: keep={keep!r}, max_to_keep={max_to_keep!r}. "
                f"Give keep alone, for example keep=keras_ckpt.BestN(3) | keras_ckpt.LatestN({max_to_keep})."
            )
        if max_to_keep is not None and not (isinstance(max_to_keep, numbers.Integral) and max_to_keep > 0):
            raise ValueError(f"max_to_keep expected a number of at least 1, or None. Received: {max_to_keep!r}")
        if keep_checkpoint_every_n_hours is not None and not keep_checkpoint_every_n_hours > 0:
            raise ValueError(
                f"keep_checkpoint_every_n_hours expected a number > 0. Received: {keep_checkpoint_every_n_hours!r}"
            )
        if checkpoint_interval is not None and step_counter is None:
            raise ValueError("checkpoint_interval counts steps. Also give step_counter, an integer tf.Variable.")
        if not isinstance(checkpoint_name, str) or not checkpoint_name or "/" in checkpoint_name:
            raise ValueError(f"checkpoint_name expected a file name without '/'. Received: {checkpoint_name!r}")
        if init_fn is not None and not callable(init_fn):
            raise TypeError(f"init_fn expected a function. Received: {init_fn!r}")
        if mode not in (None, "min", "max"):
            raise ValueError(f"CheckpointManager expected mode 'min' or 'max'. Received: mode={mode!r}")
        self._checkpoint = checkpoint
        self._directory = os.fspath(directory)
        self._step_counter = step_counter
        self._name = checkpoint_name
        self._interval = checkpoint_interval
        self._init_fn = init_fn
        self._last_step = last_checkpoint_step
        self._has_checked = False
        self._metadata = encodable_metadata(metadata or {})
        self._monitor = monitor
        self._mode = mode
        policy = as_policy(keep if max_to_keep is None else LatestN(max_to_keep))
        policy = policy and policy.resolve(monitor, self._mode_of)
        target = CheckpointDirectory(self._directory, TENSORFLOW)
        self._hooks = Hooks(target, on_saved, on_removed)
        room = 0 if min_free is None else as_bytes(min_free, "min_free")
        self._writer = _PreservingWriter(keep_checkpoint_every_n_hours, target, policy, min_free=room)

    @property
    def directory(self) -> str:
        """The directory as passed to the constructor."""
        return self._directory

    @property
    def checkpoint(self) -> tf.train.Checkpoint:
        """The `tf.train.Checkpoint`."""
        return self._checkpoint

    @property
    def checkpoint_interval(self) -> int | None:
        """The minimum number of steps between two checkpoints."""
        return self._interval

    @property
    def latest_checkpoint(self) -> str | None:
        """The prefix of the newest checkpoint, with or without a sidecar; `None` if there is no checkpoint."""
        name = self._latest()
        return None if name is None else os.path.join(self._directory, name)

    @property
    def checkpoints(self) -> list[str]:
        """The prefixes of the checkpoints that a policy may remove, oldest first. Pinned checkpoints are absent."""
        listing = self._writer.directory.listing()
        if not listing.records:
            return [os.path.join(self._directory, name) for name in listing.unmanaged]
        return [os.path.join(self._directory, record.name) for record in listing.records if not record.pinned]

    def save(
        self,
        checkpoint_number: Any = None,
        check_interval: bool = True,
        options: tf.train.CheckpointOptions | None = None,
        *,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        epoch: int | None = None,
    ) -> str | None:
        """Saves a checkpoint, and prunes by the policy.

        Args:
            checkpoint_number: The number, an int or an integer variable or tensor. The default is the checkpoint's
                `save_counter`, which is incremented in any case.
            check_interval: Whether `checkpoint_interval` applies. If not, only a second save at one step is skipped.
            options: A `tf.train.CheckpointOptions`.
            metrics: The metrics of the current state, by name.
            metadata: A dict for the sidecar, in addition to the manager's.
            epoch: Epochs completed, for `EveryNEpochs`.

        Returns:
            The prefix of the checkpoint; `None` if the interval is not over or the policy would not keep it.

        Raises:
            SaveError: The checkpoint could not be saved. The others are untouched.
            DirectoryInUseError: Another process writes into the directory.
            DirectoryNotEmptyError: The directory holds a run of `fit` from which nothing was restored.
        """
        began = time.perf_counter()
        if not self._interval_is_over(check_interval):
            return None
        if not isinstance(metrics or {}, Mapping):
            raise TypeError(f"save() expected a dict of metrics. Received: metrics={metrics!r:.200}")
        measured = {name: as_metric(name, value) for name, value in (metrics or {}).items()}
        if checkpoint_number is not None and _integer(checkpoint_number) < 0:
            raise ValueError(f"save() expected a number >= 0. Received: checkpoint_number={checkpoint_number!r}")
        epoch = None if epoch is None else _integer(epoch)
        extra = encodable_metadata(metadata or {})
        options, callbacks = _without_callbacks(options)
        self._warn_of_hidden()
        number = self._count(checkpoint_number)

        def write(prefix: str) -> None:
            with _plain_errors():
                self._checkpoint.write(prefix, options)

        request = SaveRequest(
            step=number,
            name=layout.numbered(number, self._name),
            epoch=epoch,
            metrics=measured,
            monitor=self._monitor,
            mode=self._mode,
            reason="save",
            metadata={**self._metadata, **extra},
            versions=model_state.versions(),
            began=began,
        )
        try:
            record = self._writer.save(request, by_prefix(write))
        finally:
            self._hooks.call()
        # Not earlier, so that a failed save can be tried again at once.
        self._begin_interval()
        if record is None:
            return None
        path = os.path.join(self._directory, record.name)
        for callback in callbacks:
            callback(path)
        return path

    def restore_or_initialize(self) -> str | None:
        """Restores the newest checkpoint, or calls `init_fn` if there is none.

        Returns:
            The prefix of the restored checkpoint, `None` if there is none.

        Raises:
            DamagedCheckpointError: The checkpoint cannot be read, or all checkpoints are damaged.
        """
        while (name := self._latest()) is not None:
            self._warn_of_damaged(name)
            try:
                self._restore(name)
            except (FileNotFoundError, tf.errors.NotFoundError):
                if self._latest() == name:
                    raise
                continue  # pruned meanwhile; there is a newer checkpoint
            self._begin_interval()
            return os.path.join(self._directory, name)
        self._warn_of_damaged(name)
        if self._init_fn is not None:
            self._init_fn()
        return None

    def sync(self) -> None:
        """Waits for saves in progress."""
        self._checkpoint.sync()

    def _restore(self, name: str) -> None:
        try:
            with Folder(self._directory) as folder, opened(folder, name) as (_, files):
                read_index(files, name)
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{os.path.join(self._directory, name)} cannot be trusted: {error}") from error
        _ = self._checkpoint.save_counter  # created by this access
        path = lasting_tensorflow_path(self._directory, name)
        reader = tf.train.load_checkpoint(path)
        if reader.has_tensor(graph.KEY):
            objects = object_graph.ObjectGraph(reader.get_tensor(graph.KEY))
            _check_differences(os.path.join(self._directory, name), objects.compare(self._checkpoint))
        self._checkpoint.restore(path)

    def _latest(self) -> str | None:
        listing = self._writer.directory.listing()
        if listing.unmanaged:
            with Folder(self._directory) as folder:
                hinted = read_state(folder)[0]
            # This package writes its own newest name there, so another name is a later save by TensorFlow's manager.
            if hinted in listing.unmanaged:
                return hinted
        return listing.records[-1].name if listing.records else next(reversed(listing.unmanaged), None)

    def _warn_of_damaged(self, name: str | None) -> None:
        """Warns of damaged checkpoints newer than the checkpoint to restore. Raises if there is none to restore."""
        step = -1 if name is None else step_in(name) or 0
        damaged = self._writer.directory.listing().damaged.items()
        newer = [f"{other} is damaged: {error}" for other, error in damaged if (step_in(other) or 0) > step]
        if not newer:
            return
        if name is None:
            raise DamagedCheckpointError(f"No checkpoint in {self._directory} can be restored. {'. '.join(newer)}.")
        warn(f"In {self._directory}: {'. '.join(newer)}. Going back to {name}.")

    def _warn_of_hidden(self) -> None:
        """Warns, at the first save, of weights that TensorFlow does not save."""
        hidden = [] if self._has_checked else object_graph.hidden(self._checkpoint)
        self._has_checked = True
        if hidden:
            warn(
                f"TensorFlow does not save these weights: {', '.join(hidden[:20])}. It does not track lists and dicts "
                "of Keras's layers. Hold each layer in an attribute, or save with ModelCheckpoint."
            )

    def _count(self, checkpoint_number: Any) -> int:
        """Increments the save counter. Returns the number of the save."""
        counter = self._checkpoint.save_counter
        if int(counter.numpy()) == 0:
            self._check_first_save()
        counter.assign_add(1)
        return _integer(counter if checkpoint_number is None else checkpoint_number)

    def _check_first_save(self) -> None:
        """Refuses to save a new checkpoint object over a run of `fit`, and warns of other checkpoints."""
        newest = self._writer.directory.latest()
        if newest is None:
            return
        restore = "restore it: manager.restore_or_initialize()"
        if newest.batch is not None:
            raise DirectoryNotEmptyError(
                f"{self._directory} holds a run of fit, the newest checkpoint of step {newest.step}. The checkpoint to "
                f"save does not continue that run. To continue it, {restore}. To start a new run, save into another "
                f"directory, or remove these checkpoints: keras_ckpt.CheckpointDirectory({self._directory!r}).clear()."
            )
        # TensorFlow's manager overwrites silently; this one does it with a warning.
        warn(
            f"{self._directory} holds checkpoints, and the checkpoint to save was not restored from them. So its "
            f"numbers begin again, and it may overwrite them. To continue from them, {restore}."
        )

    def _interval_is_over(self, check_interval: bool) -> bool:
        if self._interval is None:
            return True
        step = _integer(self._step_counter)
        if self._last_step is not None:
            least = self._last_step + (self._interval if check_interval else 1)
            if step == self._last_step or (check_interval and step < least):
                return False
        return True

    def _begin_interval(self) -> None:
        if self._interval is not None:
            self._last_step = _integer(self._step_counter)

    def _mode_of(self, monitor: str) -> Mode:
        if monitor == self._monitor and self._mode is not None:
            return self._mode
        raise ValueError(f"It is unknown whether less or more of {monitor!r} is better: give mode='min' or mode='max'.")


class _PreservingWriter(Writer):
    """A writer that pins one of the checkpoints to remove every `hours` hours.

    The hours count from the first manager in the directory, even a manager without this option, as in TensorFlow.
    """

    def __init__(self, hours: float | None, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._hours = hours
        # One second earlier, as in TensorFlow, for a manager that is created again at once.
        self._opened = time.time() - 1.0

    def retain(self, folder: Folder, listing: Listing) -> list[Change]:
        with self._explaining("The checkpoint is saved, but the checkpoint to preserve could not be pinned in"):
            listing = self._preserved(folder, listing)
        return super().retain(folder, listing)

    def _preserved(self, folder: Folder, listing: Listing) -> Listing:
        noted = read_state(folder)[1]
        last = min(time.time(), self._opened if noted is None else noted)
        for record in self.unkept(listing):
            if self._hours and record.time - self._hours * 3600 >= last:
                last = record.time
                folder.replace(layout.pin(record.name), PRESERVED.encode())
                self.directory.note(of_record("pinned", record, reason=PRESERVED))
                listing = listing.joined_by(msgspec.structs.replace(record, pin=PRESERVED))
        if last != noted:
            write_state(folder, listing.records, last)
        return listing


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Raises TensorFlow's error of a full disk as the underlying `OSError`."""
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number)) from error
        raise


def _check_differences(prefix: str, found: object_graph.Comparison) -> None:
    """Refuses a restore into unbuilt layers, and warns of variables that a restore skips.

    Raises:
        ValueError: A layer is not built, so its parts would keep their initial values.
    """
    if found.unbuilt:
        names = ", ".join(sorted({repr(layer.name) for layer in found.unbuilt})[:10])
        raise ValueError(
            f"{prefix} has variables of layers that are not built: {names}. Keras initializes their parts at the first "
            "call, which would undo the restore. Call the model on a batch before restore_or_initialize()."
        )
    skipped = []
    if found.unused:
        unused = (f"{place} ({counted(count, 'variable')})" for place, count in found.unused.items())
        skipped.append(f"In the checkpoint, but not in the program: {', '.join(itertools.islice(unused, 20))}.")
    if found.missing:
        skipped.append(f"In the program, but not in the checkpoint: {', '.join(found.missing[:20])}.")
    if skipped:
        warn(f"{prefix} is restored in part. {' '.join(skipped)}")


def _without_callbacks(
    options: tf.train.CheckpointOptions | None,
) -> tuple[tf.train.CheckpointOptions, list[Callable[..., object]]]:
    """The options without write callbacks, and the callbacks to call after the commit."""
    options = copy.copy(options) if options is not None else tf.train.CheckpointOptions()
    callbacks = [
        callback if inspect.signature(callback).parameters else (lambda _, callback=callback: callback())
        for callback in options.experimental_write_callbacks or []
    ]
    options.experimental_write_callbacks = None
    # save() commits the checkpoint before it returns, so its files must be complete.
    options.enable_async = options.experimental_enable_async_checkpoint = False
    return options, callbacks


def _integer(number: Any) -> int:
    return int(number.numpy() if hasattr(number, "numpy") else number)
