"""The other callbacks of a backed-up training resume with their state, and a stopped training continues on request."""

from __future__ import annotations

import collections
import logging
import os
import pathlib
import queue
import re
import sys
import threading
import time
from typing import ClassVar

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from support.frameworks import tf
from support.models import Reports, X, Y, dense_model, fit, same

callbacks = keras.callbacks
LOSSES = [5.0, 4.0, 4.5, 4.6, 3.0, 3.5, 3.6, 3.7, 3.8, 2.0]


class Crashes(callbacks.Callback):
    """A callback that ends a training by an error when an epoch begins."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None) -> None:
        if epoch == self.epoch:
            raise RuntimeError("crash")


def train(backup, *others, epochs=10, crash=None, initial=1, **options) -> keras.callbacks.History:
    """Trains epochs of one batch with scripted values of `val_loss`, and with a backup if `backup` is a directory."""
    keras.utils.set_random_seed(initial)
    model = dense_model(optimizer="sgd")
    own = [] if backup is None else [kc.BackupAndRestore(backup, **options)]
    more = [] if crash is None else [Crashes(crash)]
    reports = Reports(val_loss=LOSSES + [9.0] * 20)
    return fit(model, reports, *others, *own, *more, epochs=epochs, batches=1)


def rate_of(epoch: int, rate: float) -> float:
    return rate * 0.9


STATEFUL = {
    "EarlyStopping": lambda path: callbacks.EarlyStopping(patience=4, restore_best_weights=True),
    "EarlyStopping that stops": lambda path: callbacks.EarlyStopping(patience=3, restore_best_weights=True),
    "EarlyStopping with a baseline": lambda path: callbacks.EarlyStopping(patience=9, baseline=3.5, min_delta=0.2),
    "EarlyStopping of a maximum": lambda path: callbacks.EarlyStopping(mode="max", patience=8, start_from_epoch=3),
    "ReduceLROnPlateau": lambda path: callbacks.ReduceLROnPlateau(patience=2, factor=0.5, cooldown=1),
    "LearningRateScheduler": lambda path: callbacks.LearningRateScheduler(rate_of),
    "ModelCheckpoint of Keras": lambda path: callbacks.ModelCheckpoint(path / "best.keras", save_best_only=True),
    "ModelCheckpoint of Keras by steps": lambda path: callbacks.ModelCheckpoint(
        path / "{epoch}.weights.h5", save_weights_only=True, save_freq=3
    ),
    "SwapEMAWeights": lambda path: callbacks.SwapEMAWeights(swap_on_epoch=True),
    "CSVLogger": lambda path: callbacks.CSVLogger(path / "log.csv"),
    "CSVLogger that appends": lambda path: callbacks.CSVLogger(path / "log.csv", append=True),
    "TerminateOnNaN": lambda path: callbacks.TerminateOnNaN(),
    "ProgbarLogger": lambda path: callbacks.ProgbarLogger(),
    "LambdaCallback": lambda path: callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
}  # fmt: skip
TRANSIENT = {
    "params",
    "_model",
    "model",
    "csv_file",
    "writer",
    "progbar",
    "append_header",
    "_last_batch_seen",
    "validation_data",
    "filepath",
    "filename",
    "target",
}
"""Attributes of a process: open files, the model, progress bars, paths."""


def plain_state(callback: callbacks.Callback) -> dict[str, object]:
    """The attributes of a callback, except those that belong to its process."""
    found = {name: value for name, value in vars(callback).items() if name not in TRANSIENT and not callable(value)}
    return {name: value for name, value in found.items() if name != "best_weights"}


@pytest.mark.sample(10)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
@pytest.mark.parametrize("crash", [1, 6])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_callback_of_keras_ends_as_without_a_crash(tmp_path, backup, name, crash) -> None:
    """Its state, its files, the history and the model are equal, after an early or a late crash."""
    options = {"use_ema": True} if name == "SwapEMAWeights" else {}

    def run(callback, *others, seed=1):
        keras.utils.set_random_seed(seed)
        model = dense_model(optimizer=keras.optimizers.SGD(momentum=0.9, **options))
        history = fit(model, Reports(val_loss=LOSSES), callback, *others, epochs=len(LOSSES), batches=2)
        return history, model

    for folder in ("whole", "crashed"):
        (tmp_path / folder).mkdir()
    whole, crashed, resumed = (STATEFUL[name](tmp_path / folder) for folder in ("whole", "crashed", "crashed"))
    history, expected = run(whole)
    with pytest.raises(RuntimeError, match="crash"):
        run(crashed, kc.BackupAndRestore(backup), Crashes(crash))
    if isinstance(crashed, callbacks.CSVLogger):
        crashed.csv_file.close()
    resumed_history, model = run(resumed, kc.BackupAndRestore(backup), seed=99)

    assert plain_state(resumed) == plain_state(whole)
    assert (resumed_history.epoch, resumed_history.history) == (history.epoch, history.history)
    assert same(model, expected)
    assert texts(tmp_path / "crashed") == texts(tmp_path / "whole")


def texts(folder: pathlib.Path) -> dict[str, str | None]:
    """The names of the files in a folder, and the content of logs."""
    return {path.name: path.read_text() if path.suffix == ".csv" else None for path in folder.iterdir()}


def test_each_callback_of_keras_is_in_the_table() -> None:
    """A callback that a new version of Keras adds must be added to the table."""
    kinds = {name for name, kind in vars(callbacks).items() if isinstance(kind, type)}
    elsewhere = {
        "Callback",
        "CallbackList",
        "History",
        "BackupAndRestore",
        "TensorBoard",
        "RemoteMonitor",
        "MonitorCallback",
        "OrbaxCheckpoint",
    }

    assert kinds - elsewhere == {name.split()[0] for name in STATEFUL}


class Limit(callbacks.Callback):
    """A callback that stops after so many epochs of its process, as the time limit of a job does."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs

    def on_train_begin(self, logs=None) -> None:
        self.began = time.time()
        self.left = self.epochs
        self.file = open(os.devnull, "w")  # noqa: SIM115 - callbacks hold open files
        self.writer = tf.summary.create_noop_writer()
        self.lock, self.logger = threading.Lock(), logging.getLogger("limit")

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.left -= 1
        if self.left == 0:
            self.model.stop_training = True

    def on_train_end(self, logs=None) -> None:
        self.file.close()


class Deadline(callbacks.Callback):
    """A callback that stops after so many seconds of its process."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def on_train_begin(self, logs=None) -> None:
        self.until = time.monotonic() + self.seconds

    def on_epoch_end(self, epoch, logs=None) -> None:
        if time.monotonic() > self.until:
            self.model.stop_training = True


class Draws(callbacks.Callback):
    """A callback that draws a number in each epoch, and counts it in an array."""

    def __init__(self, generator: np.random.Generator, array: np.ndarray) -> None:
        super().__init__()
        self.generator, self.array = generator, array
        self.drawn: list[float] = []
        self.min_delta = 0

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.drawn.append(self.generator.random())
        self.array[epoch % 3] += 1
        self.min_delta += 1


def test_objects_that_two_callbacks_share_stay_shared_after_a_restart(backup) -> None:
    """Both callbacks draw from one generator and count in one array."""

    def make() -> list[Draws]:
        generator, array = np.random.default_rng(1), np.zeros(3)
        return [Draws(generator, array), Draws(generator, array)]

    whole, crashed, resumed = make(), make(), make()
    train(None, *whole)
    with pytest.raises(RuntimeError, match="crash"):
        train(backup, *crashed, crash=4)
    train(backup, *resumed)

    assert [each.drawn for each in resumed] == [each.drawn for each in whole]
    np.testing.assert_array_equal(resumed[0].array, whole[0].array)
    assert resumed[0].array is resumed[1].array
    assert resumed[0].min_delta == len(LOSSES)


def test_an_attribute_of_another_kind_is_replaced(backup) -> None:
    """The training replaces a list of the constructor by a bounded deque, and a dict by a set."""

    class Changes(callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.seen = [], {}

        def on_epoch_end(self, epoch, logs=None) -> None:
            self.last = collections.deque([*self.last, epoch], maxlen=2)
            self.seen = {*self.seen, epoch}

    with pytest.raises(RuntimeError, match="crash"):
        train(backup, Changes(), crash=4)
    resumed = Changes()
    train(backup, resumed)

    assert (resumed.last, resumed.last.maxlen, resumed.seen) == (collections.deque([8, 9]), 2, {*range(10)})


def test_a_deadline_belongs_to_the_process(backup) -> None:
    """The second process has a later deadline than the first, and trains the other epochs."""
    first, second = Deadline(600.0), Deadline(6000.0)
    with pytest.raises(RuntimeError, match="crash"):
        train(backup, first, crash=2)

    history = train(backup, second)

    assert second.until - first.until > 5000
    assert len(history.epoch) == len(LOSSES)
    assert not backup.exists()


def test_an_open_file_and_a_start_time_belong_to_the_process(backup, recwarn) -> None:
    """They are not saved, and no warning names them as unsaved."""
    crashed = Limit(99)
    with pytest.raises(RuntimeError, match="crash"):
        train(backup, crashed, crash=2)
    crashed.file.close()
    limit, began = Limit(99), time.time()

    train(backup, limit)

    assert limit.began >= began
    assert [str(each.message) for each in recwarn if "cannot be backed up" in str(each.message)] == []


class Stats(callbacks.Callback):
    """A callback with one dict that holds values of the process and values of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.stats = {"first": True, "count": 0}

    def on_train_begin(self, logs=None) -> None:
        self.stats["until"] = time.monotonic() + 600
        self.stats["file"] = sys.stderr

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.stats["count"] += 1
        self.stats["losses"] = [*self.stats.get("losses", []), logs["val_loss"]]
        self.stats.pop("first", None)


@pytest.mark.parametrize("crash", [2, 4])
def test_a_deadline_in_a_dict_belongs_to_the_process(backup, crash, recwarn) -> None:
    """The keys that changed since the training began are saved. The key that was removed is removed again."""
    crashed, whole, resumed = Stats(), Stats(), Stats()
    train(None, whole)
    with pytest.raises(RuntimeError, match="crash"):
        train(backup, crashed, crash=crash)

    train(backup, resumed)

    assert resumed.stats["until"] > crashed.stats["until"]
    assert resumed.stats["file"] is sys.stderr
    for key in ("count", "losses"):
        assert resumed.stats[key] == whole.stats[key]
    assert resumed.stats.keys() == whole.stats.keys()
    assert [str(each.message) for each in recwarn if "cannot be backed up" in str(each.message)] == []


class OfClass(callbacks.Callback):
    """A callback with state in attributes of its class, and in a slot."""

    __slots__ = ("slot",)
    seen: ClassVar[list[int]] = []
    count = 0
    best = None
    pattern = re.compile("constant")

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.seen.append(epoch)
        type(self).count += 1
        self.best = min(self.best or 99.0, logs["val_loss"])
        self.slot = (epoch, *getattr(self, "slot", ()))


def test_attributes_of_a_class_and_slots_are_restored(backup, recwarn) -> None:
    """A new process begins with the attributes of the class as in the script."""
    with pytest.raises(RuntimeError, match="crash"):
        train(backup, OfClass(), crash=4)
    OfClass.count = 0
    OfClass.seen.clear()
    resumed = OfClass()

    train(backup, resumed)

    epochs = [*range(len(LOSSES))]
    assert (OfClass.seen, OfClass.count, OfClass.best) == (epochs, len(LOSSES), None)
    assert (resumed.best, resumed.slot) == (min(LOSSES), (*reversed(epochs),))
    assert [str(each.message) for each in recwarn if "cannot be backed up" in str(each.message)] == []


class NestedStats(callbacks.Callback):
    """A callback with a deadline two dicts deep, next to a count of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.job = {"limits": {"count": 0}}

    def on_train_begin(self, logs=None) -> None:
        self.job["limits"]["until"] = time.monotonic()

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.job["limits"]["count"] += 1


def test_a_deadline_deep_in_dicts_belongs_to_the_process(backup) -> None:
    """Each key of a nested dict is saved separately."""
    crashed, resumed = NestedStats(), NestedStats()
    with pytest.raises(RuntimeError, match="crash"):
        train(backup, crashed, crash=4)

    train(backup, resumed)

    assert resumed.job["limits"]["until"] > crashed.job["limits"]["until"]
    assert resumed.job["limits"]["count"] == len(LOSSES)


class Rotates(callbacks.Callback):
    """A callback that moves the first key of a dict to the end in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.turns, self.used = {"a": 1, "b": 2, "c": 3}, []

    def on_epoch_end(self, epoch, logs=None) -> None:
        key = next(iter(self.turns))
        self.turns[key] = self.turns.pop(key)
        self.used.append(key)


def test_the_order_of_the_keys_of_a_dict_is_restored(backup) -> None:
    """The values of the keys have not changed since the constructor."""
    with pytest.raises(RuntimeError, match="crash"):
        train(backup, Rotates(), crash=4)

    train(backup, resumed := Rotates())

    assert resumed.used == [*"abcabcabca"]


class Counts(callbacks.Callback):
    """A callback that counts in a default dict."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = collections.defaultdict(lambda: 10)

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.counts[epoch % 7] += 1


def test_a_default_dict_keeps_the_factory_of_the_script(backup) -> None:
    """A backup cannot name a factory that is a function."""
    with pytest.raises(RuntimeError, match="crash"):
        train(backup, Counts(), crash=4)

    train(backup, resumed := Counts())

    assert [resumed.counts[key] for key in range(8)] == [12, 12, 12, 11, 11, 11, 11, 10]


class Base(callbacks.Callback):
    """A callback whose subclasses have separate counts."""

    count = 0

    def on_epoch_end(self, epoch, logs=None) -> None:
        type(self).count += 1


class Derived(Base):
    __slots__ = "__secret"  # noqa: PLC0205 - Python accepts a single string

    def on_epoch_end(self, epoch, logs=None) -> None:
        super().on_epoch_end(epoch, logs)
        self.__secret = getattr(self, "_Derived__secret", 0) + 1

    @property
    def secret(self) -> int:
        return self.__secret


def test_an_attribute_of_a_class_is_restored_to_its_class(backup) -> None:
    """The attribute of the base class is unchanged. A private slot is restored as well."""
    with pytest.raises(RuntimeError, match="crash"):
        train(backup, Derived(), crash=4)
    del Derived.count

    train(backup, resumed := Derived())

    assert (Base.count, Derived.count, resumed.secret) == (0, len(LOSSES), len(LOSSES))


class OwnStopping(callbacks.EarlyStopping):
    """A subclass that adds nothing."""


class OwnLog(callbacks.CSVLogger):
    """A subclass that counts its rows."""

    rows = 0

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.rows += 1
        super().on_epoch_end(epoch, logs)


@pytest.mark.parametrize("crash", [2, 4, 6])
def test_subclasses_of_callbacks_of_keras_end_as_without_a_crash(tmp_path, backup, crash, recwarn) -> None:
    """`min_delta` keeps its sign, and a log has each row once."""

    def make(name: str) -> tuple[OwnStopping, OwnLog]:
        return OwnStopping(min_delta=0.3, patience=3), OwnLog(tmp_path / name)

    whole, crashed, resumed = make("whole.csv"), make("log.csv"), make("log.csv")
    train(None, *whole)
    with pytest.raises(RuntimeError, match="crash"):
        train(backup, *crashed, crash=crash)
    crashed[1].csv_file.close()

    train(backup, *resumed)

    assert resumed[0].min_delta == whole[0].min_delta
    assert resumed[0].stopped_epoch == whole[0].stopped_epoch
    assert resumed[1].rows == whole[1].rows
    assert (tmp_path / "log.csv").read_text() == (tmp_path / "whole.csv").read_text()
    assert [str(each.message) for each in recwarn if "cannot be backed up" in str(each.message)] == []


class HoldsTheFit(callbacks.Callback):
    """A callback that holds objects of the process, parts of the model and another callback."""

    def __init__(self, other: callbacks.Callback) -> None:
        super().__init__()
        self.other, self.event, self.queue = other, threading.Event(), queue.Queue()

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.layer, self.optimizer = self.model.layers[0], self.model.optimizer
        self.networks = self.model


def test_parts_of_the_model_and_other_callbacks_are_not_named_as_unsaved(backup, recwarn) -> None:
    """The backup already holds them as the model and the callbacks."""
    other = callbacks.History()
    train(backup, other, HoldsTheFit(other))

    assert [str(each.message) for each in recwarn if "cannot be backed up" in str(each.message)] == []


@pytest.mark.parametrize("delete", [True, False])
def test_a_run_that_a_deadline_stopped_continues_in_the_next_job(backup, capsys, delete) -> None:
    """Several short jobs end as one long job."""
    whole = train(None)
    for _ in range(3):
        train(backup, Deadline(0.0), delete_checkpoint=delete)
        assert list(kc.CheckpointDirectory(backup))
    assert "A callback has stopped the training" in capsys.readouterr().out or not delete

    history = train(backup, Deadline(600.0), delete_checkpoint=delete)

    assert history.epoch == whole.epoch
    assert same(history.model, whole.model)


def test_a_stop_at_the_last_epoch_removes_the_backup(backup) -> None:
    """The run is complete, although a callback stopped it."""
    train(backup, Deadline(0.0), epochs=1)

    assert not backup.exists()


class Steps(callbacks.Callback):
    """A callback that stops in the middle of an epoch."""

    def on_train_batch_end(self, batch, logs=None) -> None:
        if batch == 0:
            self.model.stop_training = True


def test_a_run_that_was_stopped_within_an_epoch_continues(backup) -> None:
    """With a `ResumableDataset`, the run continues from the batch where it was stopped."""

    def run(*others):
        keras.utils.set_random_seed(1)
        data = kc.ResumableDataset(X, Y, batch_size=8, shuffle=True, seed=1)
        model = dense_model()
        own = kc.BackupAndRestore(backup, data=data)
        model.fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[*others, own])
        return model

    whole = run()
    run(Steps())
    assert list(kc.CheckpointDirectory(backup))

    assert same(run(), whole)


@pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
def test_a_stopped_epoch_of_unknown_length_begins_again(backup) -> None:
    """The place in data of unknown length is not known. No batch of the epoch is silently skipped."""
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).filter(lambda x, y: True)

    def run(*others) -> keras.callbacks.History:
        own = kc.BackupAndRestore(backup)
        return dense_model().fit(data, epochs=2, verbose=0, shuffle=False, callbacks=[*others, own])

    run(Steps())

    batches = Batches()
    with pytest.warns(UserWarning, match="Epoch 1 begins again at its first batch"):
        history = run(batches)
    assert history.epoch == [0, 1]
    assert batches.seen == [*range(5), *range(5)]


class Batches(callbacks.Callback):
    """A callback that records the numbers of the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.seen.append(batch)


@pytest.mark.parametrize(
    ("more", "epochs"),
    [
        ({"patience": 2, "epochs": 12}, "patience ran out"),
        ({"patience": 30, "epochs": 6}, "all"),
        ({"patience": 30, "epochs": 12}, "all"),
        ({"patience": 1, "epochs": 6, "min_delta": 0.5}, "stops again"),
    ],
)
def test_a_run_that_stopped_early_continues_with_more_epochs_or_patience(backup, more, epochs) -> None:
    """The run trains further epochs, up to the new limit or the new patience."""
    stop = callbacks.EarlyStopping(patience=1)
    first = train(backup, stop, epochs=6, delete_checkpoint=False)
    assert len(first.epoch) == 3
    options = {name: value for name, value in more.items() if name != "epochs"}

    again = train(backup, callbacks.EarlyStopping(**options), epochs=more["epochs"], delete_checkpoint=False)

    assert len(again.epoch) > 3
    if epochs == "all":
        assert len(again.epoch) == more["epochs"]


def test_a_run_that_stopped_early_stays_stopped_with_the_same_arguments(backup, capsys) -> None:
    """The printed line says how to continue the run."""
    train(backup, callbacks.EarlyStopping(patience=1), epochs=6, delete_checkpoint=False)

    again = train(backup, callbacks.EarlyStopping(patience=1), epochs=6, delete_checkpoint=False)

    assert len(again.epoch) == 3
    assert "where a callback stopped it: ask for more epochs, or more patience" in capsys.readouterr().out


def test_a_run_that_stopped_early_ends_as_with_the_larger_patience_from_the_start(backup) -> None:
    """Without `restore_best_weights`, the early stop leaves no trace in the model or the history."""
    whole = train(None, callbacks.EarlyStopping(patience=4), epochs=8)
    train(backup, callbacks.EarlyStopping(patience=1), epochs=8, delete_checkpoint=False)

    again = train(backup, callbacks.EarlyStopping(patience=4), epochs=8, delete_checkpoint=False)

    assert again.history == whole.history
    assert same(again.model, whole.model)
