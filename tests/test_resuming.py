"""`BackupAndRestore`: the contents of a backup besides the model, its messages, and errors and signals in training."""

import collections
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import ClassVar

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.resume import backup_and_restore, random_state, restart
from keras_ckpt.store.files import Folder
from support.frameworks import tf
from support.models import X, Y, dense_model, into_a_stage, same
from support.runs import HOLD

HERE = pathlib.Path(__file__).parent
VALIDATION = {"validation_data": (X, Y)}


@pytest.fixture
def handle_usr1() -> Iterator[Callable[[Callable[[], object]], object]]:
    """A function that sets the handler of SIGUSR1 until the test ends."""
    before = signal.getsignal(signal.SIGUSR1)
    yield lambda action: signal.signal(signal.SIGUSR1, lambda number, frame: action())
    signal.signal(signal.SIGUSR1, before)


def data() -> kc.ResumableDataset:
    """Ten shuffled batches."""
    return kc.ResumableDataset(X, Y, batch_size=4, shuffle=True, seed=1)


def train(backup: kc.BackupAndRestore, *callbacks: keras.callbacks.Callback, model=None, epochs=3, **options):
    """Trains a model with the same initial values each time, and returns it."""
    if model is None:
        keras.utils.set_random_seed(1)
        model = dense_model(run_eagerly=False)
    options = {"shuffle": False, "verbose": 0, **options}
    model.fit(backup.data, epochs=epochs, callbacks=[backup, *callbacks], **options)
    return model


class Fails(keras.callbacks.Callback):
    """A callback that raises an error in a method, at one of its calls."""

    def __init__(self, where: str, which: int) -> None:
        super().__init__()
        setattr(self, where, self._fail)
        self._left = which

    def get_state(self) -> None:
        """There is no state."""

    def set_state(self, state: None) -> None:
        """There is no state."""

    def _fail(self, *_: object, **__: object) -> None:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("injected")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    ("where", "which", "step"),
    [
        ("on_train_batch_begin", 14, 13),
        ("on_train_batch_end", 14, 13),
        ("on_test_batch_end", 2, 10),
        ("on_epoch_end", 2, 20),
        ("on_epoch_begin", 3, 20),
        ("on_train_end", 1, 30),
    ],
)
def test_an_error_within_a_with_statement_saves_the_last_complete_state(backup, where, which, step) -> None:
    """The error propagates. The next training ends as without the error."""
    whole = train(kc.BackupAndRestore(backup, data=data()), **VALIDATION)

    with pytest.raises(RuntimeError, match="injected"), kc.BackupAndRestore(backup, save_freq=13, data=data()) as each:
        train(each, Fails(where, which), **VALIDATION)
    assert kc.CheckpointDirectory(backup).latest().step == step
    again = train(kc.BackupAndRestore(backup, data=data()), **VALIDATION)

    assert same(whole, again)


def half_precision() -> keras.Model:
    """A model whose optimizer skips batches with gradients that are not finite, as the first batches are."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="mixed_float16"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), initial_scale=2.0**40), "mse")
    return model


class OwnOptimizer(keras.Model):
    """A model that applies another optimizer than the compiled optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.inner = keras.optimizers.SGD(0.01)

    def build(self, input_shape) -> None:
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        self.inner.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


def own_optimizer() -> keras.Model:
    model = OwnOptimizer()
    model.compile("sgd", "mse")
    model.build((None, 4))
    return model


@pytest.mark.parametrize("make", [half_precision, own_optimizer])
def test_steps_are_counted_with_several_batches_in_one_execution(backup, make) -> None:
    """Neither skipped updates nor another optimizer change the count. The last execution of an epoch is shorter."""

    def trained(*callbacks: keras.callbacks.Callback) -> keras.Model:
        keras.utils.set_random_seed(1)
        model = make()
        model.steps_per_execution = 4
        with kc.BackupAndRestore(backup, save_freq=100, data=data()) as each:
            return train(each, *callbacks, model=model, **VALIDATION)

    whole = trained()
    with pytest.raises(RuntimeError, match="injected"):
        trained(Fails("on_test_batch_end", 2))
    assert [(each.step, each.batch) for each in kc.CheckpointDirectory(backup)] == [(20, 10)]

    assert same(whole, trained())


def test_the_line_at_a_restart_describes_the_backup(backup, capsys) -> None:
    """It tells the step, the epoch, the batch, the restored parts, and the parts that were not restored."""

    class Extra(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            self.count = batch

    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, save_freq=4, data=data()), Extra(), Fails("on_train_batch_end", 14))
    capsys.readouterr()

    train(kc.BackupAndRestore(backup, data=data()), keras.callbacks.EarlyStopping("loss", patience=9))

    line = capsys.readouterr().out.splitlines()[0]
    assert line == (
        f"Found {backup}/ckpt-12; resuming from step 12, epoch 2 of 3, after batch 2 of 10; restored: model, random "
        "numbers, History, place in the data; not restored: Extra"
    )


def test_the_line_at_a_restart_names_the_callbacks_that_save_by_their_paths(
    backup, tmp_path, monkeypatch, capsys
) -> None:
    """Two callbacks of the same class and monitor are told apart."""
    monkeypatch.chdir(tmp_path)

    def saves() -> list[kc.ModelCheckpoint]:
        return [kc.ModelCheckpoint("run", "loss"), kc.ModelCheckpoint("files/best.keras", "loss")]

    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=data()), *saves(), Fails("on_train_batch_end", 14))
    capsys.readouterr()

    train(kc.BackupAndRestore(backup, data=data()), *saves())

    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith("ModelCheckpoint(run), ModelCheckpoint(files/best.keras), History, place in the data")


def test_a_callback_that_is_not_verbose_prints_nothing_and_logs(backup, capsys, caplog) -> None:
    """The log `keras_ckpt` has the line that a verbose callback prints."""
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, save_freq=4, data=data()), Fails("on_train_batch_end", 14))
    capsys.readouterr()

    with caplog.at_level("INFO", "keras_ckpt"):
        train(kc.BackupAndRestore(backup, data=data(), verbose=0))

    assert capsys.readouterr().out == ""
    assert any(line.startswith(f"Found {backup}/ckpt-12; resuming from step 12") for line in caplog.messages)


def test_a_finished_run_trains_nothing_and_says_so(backup, capsys) -> None:
    """With delete_checkpoint=False, the history and the weights of the run are restored."""
    first = train(kc.BackupAndRestore(backup, 7, delete_checkpoint=False, data=data()))
    again = train(kc.BackupAndRestore(backup, 7, delete_checkpoint=False, data=data()))

    assert "nothing is left to train after step 30, epoch 3 of 3" in capsys.readouterr().out
    assert same(first, again)
    assert again.history.history == first.history.history


def test_a_finished_run_continues_with_more_epochs(backup) -> None:
    """The run ends as if it had begun with the larger number of epochs."""
    whole = train(kc.BackupAndRestore(backup, data=data()), epochs=5)
    train(kc.BackupAndRestore(backup, delete_checkpoint=False, data=data()))

    assert same(whole, train(kc.BackupAndRestore(backup, data=data()), epochs=5))


def test_a_run_that_stopped_early_stays_stopped(backup) -> None:
    """The run stays stopped even if an error prevented the end of the training."""
    stops = [keras.callbacks.EarlyStopping("loss", min_delta=9.0, patience=0, restore_best_weights=True) for _ in "123"]
    whole = train(kc.BackupAndRestore(backup, data=data()), stops[0], epochs=9)
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=data()), stops[1], Fails("on_train_end", 1), epochs=9)

    again = train(kc.BackupAndRestore(backup, data=data()), stops[2], epochs=9)

    assert len(again.history.epoch) == len(whole.history.epoch) < 9
    assert same(whole, again)


def test_a_stop_because_of_nan_keeps_the_earlier_backup(backup) -> None:
    """The stop is no success, and no later backup replaces the earlier backup."""

    class Spoils(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            if batch == 5:  # a backup is due here, and the loss does not show it yet
                self.model.layers[0].kernel.assign(np.full((4, 3), np.nan))

    with pytest.warns(UserWarning, match=r"its loss is not a finite number\. The earlier backup stays"):
        train(kc.BackupAndRestore(backup, 3, data=data()), Spoils(), keras.callbacks.TerminateOnNaN())

    assert [record.step for record in kc.CheckpointDirectory(backup)] == [3]


def test_the_state_of_a_callback_is_its_changed_attributes(backup) -> None:
    """An attribute that only the script sets keeps the value of the new script."""

    class Mine(keras.callbacks.Callback):
        def __init__(self, patience: int) -> None:
            super().__init__()
            self.patience = patience
            self.seen = []
            self.total = np.zeros(2)

        def on_train_batch_end(self, batch, logs=None) -> None:
            self.seen.append(batch)
            self.total += batch

    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=data()), Mine(3), Fails("on_train_batch_end", 14))
    mine = Mine(5)
    train(kc.BackupAndRestore(backup, 4, data=data()), mine)

    assert mine.patience == 5
    assert mine.seen == [*range(10)] * 3
    assert mine.total.tolist() == [3 * 45] * 2


def test_an_attribute_that_changed_back_is_part_of_the_state(backup) -> None:
    """When the state is restored, the attribute has already changed in the resumed process."""

    class Warms(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.fresh = False

        def on_epoch_begin(self, epoch, logs=None) -> None:
            self.fresh = True

        def on_train_batch_begin(self, batch, logs=None) -> None:
            rate = self.model.optimizer.learning_rate
            rate.assign(0.1 if self.fresh else rate * 0.9)
            self.fresh = False

    whole = train(kc.BackupAndRestore(backup, data=data()), Warms())
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=data()), Warms(), Fails("on_train_batch_end", 14))
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=data()), Warms(), Fails("on_train_batch_end", 4))

    assert same(train(kc.BackupAndRestore(backup, 4, data=data()), Warms()), whole)


@pytest.mark.parametrize("batch", [14, 20, 24])
def test_a_state_that_is_restored_twice_does_not_change_in_between(backup, batch) -> None:
    """A resumed epoch begins twice for the other callbacks, which change the lists of the restored state."""

    class Own(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.epochs = None

        def get_state(self) -> dict:
            return {"epochs": self.epochs}

        def set_state(self, state: dict) -> None:
            self.epochs = state["epochs"]

        def on_epoch_begin(self, epoch, logs=None) -> None:
            self.epochs = [] if self.epochs is None else self.epochs
            self.epochs.append(epoch)

    class Nested(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.seen = None

        def on_epoch_begin(self, epoch, logs=None) -> None:
            self.seen = {"epochs": []} if self.seen is None else self.seen
            self.seen["epochs"].append(epoch)

    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=data()), Own(), Nested(), Fails("on_train_batch_end", batch))
    own, nested = Own(), Nested()
    train(kc.BackupAndRestore(backup, 4, data=data()), own, nested)

    assert own.epochs == nested.seen["epochs"] == [0, 1, 2]


def test_the_best_weights_of_early_stopping_are_restored(backup) -> None:
    """The best weights are from the first epoch, before the restart."""

    def stop() -> keras.callbacks.EarlyStopping:
        return keras.callbacks.EarlyStopping("loss", mode="max", patience=2, restore_best_weights=True)

    stops = stop()
    whole = train(kc.BackupAndRestore(backup, data=data()), stops, epochs=6)
    assert (stops.best_epoch, stops.stopped_epoch) == (0, 2)
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=data()), stop(), Fails("on_train_batch_end", 16), epochs=6)

    assert same(train(kc.BackupAndRestore(backup, 4, data=data()), stop(), epochs=6), whole)


def test_an_empty_state_of_a_callback_is_restored(backup) -> None:
    """The callback may have another state when its empty state is restored."""

    class Notes(keras.callbacks.Callback):
        notes: ClassVar[list[dict]] = []

        def get_state(self) -> dict:
            return {}

        def set_state(self, state: dict) -> None:
            self.notes.append(state)

    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=data()), Notes(), Fails("on_train_batch_end", 14))
    train(kc.BackupAndRestore(backup, 4, data=data()), Notes())

    assert Notes.notes == [{}, {}]  # the second time within the epoch


def test_a_state_that_is_an_array_is_restored(backup) -> None:
    """The comparison of two arrays has no truth value."""

    class Counts(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.counts = np.zeros(2)

        def on_train_batch_end(self, batch, logs=None) -> None:
            self.counts = self.counts + 1

        def get_state(self) -> np.ndarray:
            return self.counts

        def set_state(self, state: np.ndarray) -> None:
            self.counts = state

    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=data()), Counts(), Fails("on_train_batch_end", 14))
    counts = Counts()
    train(kc.BackupAndRestore(backup, 4, data=data()), counts)

    assert counts.counts.tolist() == [30, 30]


def test_bytes_in_an_attribute_of_a_callback_are_named_in_a_warning(backup) -> None:
    """JSON has no bytes. The training ends normally."""

    class Token(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            self.token = os.urandom(8)

    with pytest.warns(UserWarning, match=r"cannot be backed up: Token\.token\."):
        train(kc.BackupAndRestore(backup, 4, data=data()), Token())


def test_a_model_checkpoint_that_is_new_at_a_restart_counts_the_steps_of_the_run(backup, tmp_path) -> None:
    """The epoch resumes in its middle, and the backup has no state for the new callback."""
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=data()), Fails("on_train_batch_end", 14))
    train(kc.BackupAndRestore(backup, 4, data=data()), kc.ModelCheckpoint(tmp_path / "run", "loss", save_freq=1))

    assert [record.step for record in kc.CheckpointDirectory(tmp_path / "run")] == [*range(13, 31)]


def test_data_that_is_wrapped_after_a_crash_resumes_after_the_next_crash(backup) -> None:
    """The data is recognized by the first batch of its first epoch."""

    def shuffled(number: int) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(40, seed=number).batch(4)

    model, callbacks = dense_model(run_eagerly=False), [kc.BackupAndRestore(backup, 4), Fails("on_train_batch_end", 6)]
    with pytest.raises(RuntimeError):
        model.fit(shuffled(0), epochs=3, callbacks=callbacks, shuffle=False, verbose=0)
    with pytest.warns(UserWarning, match="begins again at its first batch"), pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=kc.ResumableDataset(shuffled)), Fails("on_train_batch_end", 14))

    train(kc.BackupAndRestore(backup, 4, data=kc.ResumableDataset(shuffled)))


def test_a_data_function_that_draws_random_numbers_does_not_move_the_restored_generators(backup) -> None:
    """The data is read before the global generators are restored."""

    class Draws(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.drawn = []

        def on_train_batch_end(self, batch, logs=None) -> None:
            self.drawn.append(float(np.random.rand()))

    def drawing(number: int) -> tf.data.Dataset:
        np.random.rand()
        return tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)

    whole = Draws()
    train(kc.BackupAndRestore(backup, data=kc.ResumableDataset(drawing)), whole)
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=kc.ResumableDataset(drawing)), Draws(), Fails("on_train_batch_end", 14))
    again = Draws()
    train(kc.BackupAndRestore(backup, data=kc.ResumableDataset(drawing)), again)

    assert again.drawn == whole.drawn


@pytest.mark.parametrize("complete", [False, True])
def test_a_csv_log_keeps_its_rows_at_a_restart(backup, tmp_path, complete) -> None:
    """The rows also stay if the process died after the backup was complete, but before it was published."""
    first, second = (keras.callbacks.CSVLogger(tmp_path / "log.csv") for _ in range(2))
    train(kc.BackupAndRestore(backup, data=data(), delete_checkpoint=False), first, epochs=2)
    if complete:
        into_a_stage(backup)
    train(kc.BackupAndRestore(backup, data=data()), second)

    assert [line.split(",")[0] for line in (tmp_path / "log.csv").read_text().splitlines()] == ["epoch", "0", "1", "2"]


def test_a_first_backup_that_fails_releases_the_directory(backup, monkeypatch) -> None:
    """Another process can lock the directory, although the program holds the error."""
    monkeypatch.setattr(Folder, "free", lambda folder: 0)
    with pytest.raises(kc.DiskFullError) as kept:
        train(kc.BackupAndRestore(backup, data=data(), on_full_disk="raise"))

    subprocess.run([sys.executable, "-c", HOLD, backup], input="", text=True, check=True, capture_output=True)
    assert kept.value


def test_an_attribute_of_a_callback_that_cannot_be_saved_is_named_once(backup) -> None:
    """Several backups give one warning, which tells how to mend it."""

    class Client(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            self.session = object()

    with pytest.warns(
        UserWarning, match=r"cannot be backed up: Client\.session\. .*Give the class get_state"
    ) as caught:
        train(kc.BackupAndRestore(backup, 4, data=data()), Client())

    assert len(caught) == 1


def test_a_state_from_get_state_that_is_not_plain_is_named_in_a_warning(backup) -> None:
    """The training ends normally, without this state in the backup."""

    class Wrong(keras.callbacks.Callback):
        def get_state(self) -> object:
            return {"lock": threading.Lock()}

        def set_state(self, state: object) -> None:
            raise AssertionError("no state was saved")

    with pytest.warns(UserWarning, match=r"cannot be backed up: Wrong\.get_state\(\)\['lock'\]"):
        train(kc.BackupAndRestore(backup, 4, data=data()), Wrong())


def test_a_backup_of_a_newer_version_is_refused(backup, monkeypatch) -> None:
    """An older version does not know the meaning of the backup."""
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=data()), Fails("on_train_batch_end", 14))
    monkeypatch.setattr(restart, "VERSION", 0)

    with pytest.raises(kc.FormatVersionError, match=r"ckpt-10 was saved by a newer version of keras_ckpt, \d"):
        train(kc.BackupAndRestore(backup, data=data()))


def test_a_restart_with_another_jit_compile_gives_a_warning(backup) -> None:
    """The last bits of the results depend on this setting."""
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=data()), Fails("on_train_batch_end", 14))
    other = dense_model(run_eagerly=False, jit_compile=True)

    with pytest.warns(UserWarning, match="may differ in the last bits: jit_compile True, False before"):
        train(kc.BackupAndRestore(backup, data=data()), model=other)


def test_a_restart_with_other_determinism_of_operations_gives_a_warning(fork_server, backup) -> None:
    """The last bits depend on determinism. It cannot be turned off in a process, so another process turns it on."""
    program = """
import sys
import keras
import tensorflow as tf
import keras_ckpt as kc
from support.models import X, Y, dense_model

if sys.argv[2] == "on":
    keras.utils.set_random_seed(1)
    tf.config.experimental.enable_op_determinism()
backup = kc.BackupAndRestore(sys.argv[1], data=kc.ResumableDataset(X, Y, batch_size=4), delete_checkpoint=False)
dense_model().fit(backup.data, epochs=int(sys.argv[3]), shuffle=False, verbose=0, callbacks=[backup])
"""
    first, second = (fork_server.run(program, backup, *arguments) for arguments in (("off", 1), ("on", 2)))

    assert first.returncode == second.returncode == 0
    assert "may differ" not in first.stderr
    assert "may differ in the last bits: deterministic operations True, False before" in second.stderr


@pytest.mark.skipif(keras.__version__.startswith("3.14."), reason="after an error Keras 3.14 loses the last events")
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # Keras's variables, when TensorBoard reads them
def test_tensorboard_resumes_at_the_right_steps(backup, tmp_path) -> None:
    """The batches and epochs after a restart follow those before it."""

    def board() -> keras.callbacks.TensorBoard:
        return keras.callbacks.TensorBoard(tmp_path / "logs", update_freq=1, write_graph=False)

    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=data()), board(), Fails("on_train_batch_end", 14))
    train(kc.BackupAndRestore(backup, data=data()), board())

    batches = _logged_steps(tmp_path / "logs" / "train", "batch_loss")
    assert batches == sorted([*range(1, 31), 11, 12, 13])  # the last three before the error were trained again
    assert _logged_steps(tmp_path / "logs" / "train", "epoch_loss") == [0, 1, 2]


def _logged_steps(directory: pathlib.Path, tag: str) -> list[int]:
    """The steps of the values with a tag in the log of TensorBoard."""
    records = tf.data.TFRecordDataset([str(file) for file in sorted(directory.iterdir())])
    events = [tf.compat.v1.Event.FromString(record.numpy()) for record in records]
    return sorted(event.step for event in events for value in event.summary.value if value.tag == tag)


def test_objects_of_a_callback_that_change_in_place_are_restored_in_place(backup) -> None:
    """The objects are dicts, generators, variables and metrics. A list that the script holds too stays the same."""
    seen = []

    class Mine(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.counts = collections.defaultdict(int)
            self.generator = np.random.default_rng(1)
            self.variable = keras.Variable(0.0)
            self.mean = keras.metrics.Mean()
            self.seen = seen

        def on_train_batch_end(self, batch, logs=None) -> None:
            self.counts[batch] += 1
            self.variable.assign_add(self.generator.random())
            self.mean.update_state(batch)
            self.seen.append(batch)

    def facts(mine: Mine) -> list[str]:
        return list(map(repr, (dict(mine.counts), mine.variable.numpy(), mine.mean.result().numpy(), seen)))

    whole = Mine()
    train(kc.BackupAndRestore(backup, data=data()), whole)
    expected = facts(whole)
    seen.clear()
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=data()), Mine(), Fails("on_train_batch_end", 14))
    seen.clear()
    again = Mine()
    train(kc.BackupAndRestore(backup, 4, data=data()), again)

    assert facts(again) == expected


def test_two_callbacks_of_a_class_are_distinguished_by_their_monitors(backup) -> None:
    """The order of the callbacks may differ at a restart."""

    def stops() -> list[keras.callbacks.EarlyStopping]:
        return [keras.callbacks.EarlyStopping(monitor, patience=9) for monitor in ("loss", "val_loss")]

    first, second = stops()
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=data()), first, second, Fails("on_train_batch_end", 14), **VALIDATION)
    best = first.best, second.best
    first, second = stops()
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=data()), second, first, Fails("on_train_batch_end", 2), **VALIDATION)

    assert (first.best, second.best) == best


def test_a_restart_with_fewer_epochs_than_are_done_trains_nothing(backup, capsys) -> None:
    """The data is at the start of an epoch afterwards, ready for another fit."""
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, 4, data=data()), Fails("on_train_batch_end", 26))
    each = kc.BackupAndRestore(backup, 4, data=data())

    model = train(each, epochs=2)

    assert "nothing is left to train after step 24, epoch 2 of 2" in capsys.readouterr().out
    assert len(list(each.data)) == 10
    assert len(model.history.epoch) == 2


def test_steps_per_epoch_is_refused_with_data_that_is_not_endless(backup) -> None:
    """Keras would train the rest of a resumed epoch in the next epoch."""
    with pytest.raises(ValueError, match="omit steps_per_epoch"):
        train(kc.BackupAndRestore(backup, data=data()), steps_per_epoch=10)


def test_a_backup_of_another_fit_of_the_script_gives_a_warning(backup) -> None:
    """A script that trains twice needs two directories."""
    each = kc.BackupAndRestore(backup, data=data())
    train(each)
    with pytest.raises(RuntimeError):
        train(each, Fails("on_train_batch_end", 14))
    backup_and_restore._ended.clear()  # as in a new process

    with pytest.warns(UserWarning, match="1 trainings with that directory had ended in the process, and here it is 0"):
        train(kc.BackupAndRestore(backup, data=data()))


def test_a_stateful_layer_resumes_with_its_state(backup) -> None:
    """Keras does not list the state among the variables of the model."""

    def run(*callbacks: keras.callbacks.Callback) -> keras.Model:
        keras.utils.set_random_seed(1)
        inputs = keras.Input(batch_shape=(4, 2, 2))
        model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.LSTM(3, stateful=True)(inputs)))
        model.compile("sgd", "mse")
        batches = kc.ResumableDataset(X.reshape(-1, 2, 2), Y, batch_size=4)
        each = kc.BackupAndRestore(backup, 4, data=batches)
        model.fit(batches, epochs=3, shuffle=False, verbose=0, callbacks=[each, *callbacks])
        return model

    whole = run()
    with pytest.raises(RuntimeError):
        run(Fails("on_train_batch_end", 14))

    assert same(whole, run())


def test_metrics_of_a_custom_training_step_resume(backup) -> None:
    """The metrics are built by a trace of the step, which may take any structure of data."""

    class Own(keras.Sequential):
        def train_step(self, batch):
            return super().train_step((batch["x"], batch["y"]))

    def run(*callbacks: keras.callbacks.Callback) -> keras.callbacks.History:
        keras.utils.set_random_seed(1)
        model = Own([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile("sgd", "mse", metrics=["mae"])
        batches = kc.ResumableDataset({"x": X, "y": Y}, batch_size=4)
        each = kc.BackupAndRestore(backup, 4, data=batches)
        return model.fit(batches, epochs=2, shuffle=False, verbose=0, callbacks=[each, *callbacks])

    whole = run()
    with pytest.raises(RuntimeError):
        run(Fails("on_train_batch_end", 14))

    assert run().history == whole.history


def test_the_initial_epoch_of_a_restart_does_not_leak_after_an_error_in_the_first_epoch(backup) -> None:
    """A later fit of the model without the callback begins at its own first epoch."""
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=data()), Fails("on_train_batch_end", 24))
    model = dense_model(run_eagerly=False)
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=data()), Fails("on_epoch_begin", 1), model=model)

    assert model.fit(X, Y, epochs=2, verbose=0).epoch == [0, 1]


def test_a_second_fit_begins_at_its_initial_epoch(backup) -> None:
    """The finished first fit with the same callback does not change it."""
    each = kc.BackupAndRestore(backup, data=data())
    model = train(each)

    history = train(each, model=model, epochs=5, initial_epoch=3).history

    assert history.epoch == [3, 4]


def test_a_fit_outside_the_main_thread_gives_a_warning(backup) -> None:
    """Python allows handlers of signals only in the main thread."""
    failed = []

    def run() -> None:
        with pytest.warns(UserWarning, match="not in the main thread"):
            train(kc.BackupAndRestore(backup, data=data()))
        failed.append(False)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()

    assert failed == [False]


def test_the_earlier_handlers_of_signals_are_restored(backup, handle_usr1) -> None:
    """The restore comes at the end of a fit, or at the first signal after a fit that an error ended."""
    heard = []
    handle_usr1(lambda: heard.append(signal.SIGUSR1))
    train(kc.BackupAndRestore(backup, data=data()))
    ours = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError):
        train(kc.BackupAndRestore(backup, data=data()), Fails("on_train_batch_end", 14))
    os.kill(os.getpid(), signal.SIGUSR1)

    assert heard == [signal.SIGUSR1]
    assert signal.getsignal(signal.SIGTERM) == ours == signal.SIG_DFL


def test_a_signal_before_an_error_is_handled_in_the_next_training(backup, tmp_path, handle_usr1) -> None:
    """A script may catch the error and train again."""
    heard = []
    handle_usr1(lambda: heard.append(signal.SIGUSR1))

    class Breaks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)
            raise RuntimeError("injected")

    first = kc.BackupAndRestore(backup, data=data())
    with pytest.raises(RuntimeError, match="injected"):
        train(first, Breaks())
    assert heard == []

    train(kc.BackupAndRestore(tmp_path / "other", data=data()))
    assert heard == [signal.SIGUSR1]


def test_a_handler_that_does_not_end_the_training_is_called_after_the_backup(backup, handle_usr1) -> None:
    """The handler of a scheduler may return. The training continues after it."""
    saved = []
    handle_usr1(lambda: saved.append(kc.CheckpointDirectory(backup).latest().step))

    class Signals(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            if batch == 4:
                os.kill(os.getpid(), signal.SIGUSR1)

    history = train(kc.BackupAndRestore(backup, data=data()), Signals()).history

    assert saved == [5, 15, 25]
    assert len(history.epoch) == 3


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_signal_in_a_validation_is_handled_after_it_with_data_of_unknown_length(backup, handle_usr1) -> None:
    """Keras begins one more batch to find the end of the data."""
    saved = []
    handle_usr1(lambda: saved.append(kc.CheckpointDirectory(backup).latest().step))

    class Signals(keras.callbacks.Callback):
        def on_test_batch_begin(self, batch, logs=None) -> None:
            if batch == 0:
                os.kill(os.getpid(), signal.SIGUSR1)

    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).filter(lambda x, y: True)
    callbacks = [kc.BackupAndRestore(backup), Signals()]
    model = dense_model(run_eagerly=False)
    model.fit(batches, epochs=2, callbacks=callbacks, shuffle=False, verbose=0, **VALIDATION)

    assert saved == [10, 20]


PROGRAM = """
import os, signal, sys
import keras
import keras_ckpt as kc
from test_resuming import data, train

class Signals(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        for _ in range(int(sys.argv[2])):
            os.kill(os.getpid(), signal.SIGTERM)

backup = kc.BackupAndRestore(sys.argv[1], save_freq=1000, data=data(), exit_code=eval(sys.argv[3]))
train(backup, Signals())
"""


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("signals", "exit_code", "code", "steps"),
    [(1, None, -signal.SIGTERM, [1]), (1, 75, 75, [1]), (2, None, -signal.SIGTERM, [])],
    ids=["one", "one with an exit code", "two"],
)
def test_a_signal_ends_the_process_after_the_batch_and_a_second_signal_at_once(
    fork_server, backup, signals, exit_code, code, steps
) -> None:
    """The process ends with the usual exit code of the signal, or with `exit_code`."""
    ended = fork_server.run(PROGRAM, backup, signals, repr(exit_code))

    assert ended.returncode == code
    assert [record.step for record in kc.CheckpointDirectory(backup)] == steps


@pytest.mark.sample(1)
@pytest.mark.parametrize("output", [">&-", "| true"])
def test_a_signal_ends_the_process_though_its_output_has_no_reader(backup, monkeypatch, output) -> None:
    """The same signal may have ended the reader."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE.parent}:{HERE}")
    command = f'"$0" -c "$1" "$2" 1 None {output}; echo ${{PIPESTATUS[0]}} >&2'

    ended = subprocess.run(
        ["bash", "-c", command, sys.executable, PROGRAM, backup], check=False, stderr=subprocess.PIPE, text=True
    )

    assert ended.stderr.splitlines()[-1] == str(128 + signal.SIGTERM)


def test_every_global_generator_is_restored() -> None:
    """Python's, NumPy's, TensorFlow's and Keras's, and the one that seeds eager operations; two have no public name."""
    import random

    import tensorflow as tf

    def draw() -> list[object]:
        generator = tf.random.get_global_generator()
        found = random.random(), np.random.rand(), generator.uniform((2,)).numpy(), keras.random.uniform((2,)).numpy()
        return list(map(repr, (*found, float(tf.random.uniform(())))))

    keras.utils.set_random_seed(1)
    state = random_state.get_state()
    expected = draw()
    keras.utils.set_random_seed(5)

    for _ in range(2):
        random_state.set_state(state)
        assert draw() == expected


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_callback_runs_last_at_any_place_in_the_list(backup, place) -> None:
    """Keras has no public access to the other callbacks, so this depends on Keras's way of calling them."""
    seen = []

    class Sees(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None) -> None:
            seen.append([type(each).__name__ for each in ours._fit.callbacks.callbacks])

    ours = kc.BackupAndRestore(backup, data=data())
    callbacks = [Sees(), keras.callbacks.EarlyStopping("loss")]
    callbacks.insert(place, ours)
    dense_model().fit(ours.data, shuffle=False, verbose=0, callbacks=callbacks)

    assert seen == [["Sees", "EarlyStopping", "History", "BackupAndRestore"]]
    assert len(callbacks) == 3
