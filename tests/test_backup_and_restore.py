"""`BackupAndRestore`: the same script resumes when it is run again, and removes only its own files at the end."""

import inspect
import pathlib
import re

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.model.position import position_of
from support.frameworks import needs_tensorflow, tf
from support.models import Interrupts, X, Y, dense_model, fit, into_a_stage, same


class Counts(keras.callbacks.Callback):
    """Records the numbers of the epochs that begin."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self.epochs.append(epoch)


def interrupted(backup: pathlib.Path, batches: int, **options) -> keras.Model:
    """Interrupts a training of ten epochs of five batches by an error. Returns the model."""
    model = dense_model()
    with pytest.raises(RuntimeError):
        fit(model, kc.BackupAndRestore(backup, **options), Interrupts(batches, RuntimeError()), epochs=10)
    return model


def test_an_interrupted_training_resumes(backup) -> None:
    """A training of ten epochs, interrupted in the fifth, runs the last six. The history has all ten epochs."""
    interrupted(backup, 22)
    counts = Counts()

    history = fit(dense_model(), kc.BackupAndRestore(backup), counts, epochs=10)

    assert counts.epochs == [4, 5, 6, 7, 8, 9]
    assert history.epoch == [*range(10)]
    assert len(history.history["loss"]) == 10


def test_a_restart_restores_the_model_as_it_was_backed_up(backup) -> None:
    """Weights, seeds and optimizer are equal before the first batch."""
    saved = {}

    class Keeps(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            saved[epoch] = [v.numpy() for v in (*self.model.variables, *self.model.optimizer.variables)]

    model = dense_model()
    with pytest.raises(RuntimeError):
        fit(model, kc.BackupAndRestore(backup), Keeps(), Interrupts(13, RuntimeError()), epochs=10)

    class Compares(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            now = [v.numpy() for v in (*self.model.variables, *self.model.optimizer.variables)]
            assert all(np.array_equal(a, b) for a, b in zip(now, saved[1], strict=True))
            raise RuntimeError("compared")

    with pytest.raises(RuntimeError, match="compared"):
        fit(dense_model(), kc.BackupAndRestore(backup), Compares(), epochs=10)


def test_a_restart_ends_where_the_uninterrupted_run_ends(backup) -> None:
    """With data in order and an interruption after an epoch, the models are equal to the bit."""
    whole = dense_model()
    start = [variable.numpy() for variable in whole.variables]
    fit(whole, epochs=4)

    def begun() -> keras.Model:
        model = dense_model()
        for variable, value in zip(model.variables, start, strict=True):
            variable.assign(value)
        return model

    with pytest.raises(RuntimeError):
        fit(begun(), kc.BackupAndRestore(backup), Interrupts(11, RuntimeError()), epochs=4)
    again = begun()
    fit(again, kc.BackupAndRestore(backup), epochs=4)

    assert same(whole, again)


def test_the_backup_is_removed_at_the_end(backup) -> None:
    """The directory is removed with the backup, if it holds nothing else."""
    fit(dense_model(), kc.BackupAndRestore(backup), epochs=2)

    assert not backup.exists()


def test_the_backup_stays_with_delete_checkpoint_false(backup) -> None:
    """A finished training that is started again trains nothing."""
    fit(dense_model(), kc.BackupAndRestore(backup, delete_checkpoint=False), epochs=2)
    counts = Counts()

    fit(dense_model(), kc.BackupAndRestore(backup, delete_checkpoint=False), counts, epochs=2)

    assert counts.epochs == []
    assert len(kc.CheckpointDirectory(backup)) == 1


@pytest.mark.parametrize(("double", "kept"), [(False, [15]), (True, [10, 15])])
def test_one_backup_is_kept_or_two_with_double_checkpoint(backup, double, kept) -> None:
    """`double_checkpoint=True` keeps the previous backup as well."""
    interrupted(backup, 17, double_checkpoint=double)

    assert [record.step for record in kc.CheckpointDirectory(backup)] == kept


def test_the_initial_epoch_of_a_restart_does_not_leak_into_the_next_fit(backup) -> None:
    """In Keras it does leak, and a later fit of fewer epochs would train nothing."""
    interrupted(backup, 17)
    model = dense_model()
    fit(model, kc.BackupAndRestore(backup), epochs=5)
    counts = Counts()

    fit(model, counts, epochs=2)

    assert counts.epochs == [0, 1]


def test_the_initial_epoch_of_a_restart_does_not_leak_from_a_fit_that_ctrl_c_ended(backup) -> None:
    """The next fit begins at its own first epoch."""
    interrupted(backup, 17)
    model = dense_model()
    with pytest.raises(KeyboardInterrupt):
        fit(model, kc.BackupAndRestore(backup), Interrupts(1), epochs=5)
    counts = Counts()

    fit(model, counts, epochs=2)

    assert counts.epochs == [0, 1]


def test_a_backup_within_an_epoch_repeats_the_epoch_without_a_resumable_dataset(backup) -> None:
    """The epoch in progress begins again on the newest weights, as in Keras, with a warning."""
    interrupted(backup, 13, save_freq=4)
    record = kc.CheckpointDirectory(backup).latest()
    assert (record.step, record.epoch, record.batch) == (12, 2, 2)
    counts = Counts()

    with pytest.warns(UserWarning, match=r"Epoch 3 begins again at its first batch, .*seen 2 of its batches"):
        fit(dense_model(), kc.BackupAndRestore(backup, save_freq=4), counts, epochs=4)

    assert counts.epochs == [2, 3]


def test_the_advice_to_wrap_the_data_resumes_exactly_as_it_is_typed(backup, tmp_path) -> None:
    """The dataset has the batch size of `fit`, and is shuffled where `fit` shuffles. No other warning follows."""
    options = {"x": X, "y": Y, "batch_size": 8, "shuffle": True, "epochs": 4, "verbose": 0}
    with pytest.raises(RuntimeError):
        dense_model().fit(**options, callbacks=[kc.BackupAndRestore(backup, 2), Interrupts(13, RuntimeError())])
    with pytest.warns(UserWarning, match="To resume exactly, wrap the data") as warned:
        dense_model().fit(**options, callbacks=[kc.BackupAndRestore(backup, 2)])
    advice = next(str(each.message) for each in warned if "wrap the data" in str(each.message))
    wrap, arguments = re.search(r"data = (.*?\)), and give it to fit\((data.*?)\)", advice).groups()
    assert wrap == "keras_ckpt.ResumableDataset(x, y, batch_size=8, shuffle=True)"

    def run(name: str, *callbacks: keras.callbacks.Callback) -> keras.Model:
        keras.utils.set_random_seed(1)
        model = dense_model()
        data = eval(wrap, {"keras_ckpt": kc, "x": X, "y": Y})
        own = kc.BackupAndRestore(tmp_path / name, 2, data=data)
        eval(
            f"model.fit({arguments}, epochs=4, verbose=0, callbacks=callbacks)",
            {"model": model, "data": data, "callbacks": [*callbacks, own]},
        )
        return model

    whole = run("whole")
    with pytest.raises(RuntimeError):
        run("killed", Interrupts(13, RuntimeError()))

    assert same(run("killed"), whole)


def test_a_second_fit_resumes_at_its_own_epoch(backup) -> None:
    """The backup holds the epoch of the fit, not the epoch of the run."""
    model = dense_model()
    fit(model, kc.BackupAndRestore(backup), epochs=3)
    with pytest.raises(RuntimeError):
        fit(model, kc.BackupAndRestore(backup), Interrupts(8, RuntimeError()), epochs=3)
    counts = Counts()

    fit(dense_model(), kc.BackupAndRestore(backup), counts, epochs=3)

    assert counts.epochs == [1, 2]


def test_a_model_checkpoint_keeps_the_same_checkpoints_after_a_restart(backup, tmp_path) -> None:
    """The restored model continues its run. The best and the newest checkpoints are as without the interruption."""
    runs = {name: kc.CheckpointDirectory(tmp_path / name) for name in ("whole", "interrupted")}
    losses = [0.5, 0.2, 0.4, 0.3, 0.6, 0.7]

    class Reports(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            logs["val_loss"] = losses[epoch]

    def callbacks(name: str) -> list[keras.callbacks.Callback]:
        checkpoint = kc.ModelCheckpoint(runs[name].path, save_freq=["epoch", 3], keep=kc.BestN(2) | kc.LatestN(2))
        return [Reports(), checkpoint, kc.BackupAndRestore(tmp_path / f"{name}-backup")]

    fit(dense_model(), *callbacks("whole"), epochs=6)
    with pytest.raises(RuntimeError):
        fit(dense_model(), *callbacks("interrupted"), Interrupts(18, RuntimeError()), epochs=6)
    model = dense_model()
    fit(model, *callbacks("interrupted"), epochs=6)

    facts = {name: [(r.step, r.epoch, r.batch, r.metrics.get("val_loss")) for r in each] for name, each in runs.items()}
    assert facts["whole"] == facts["interrupted"]
    assert position_of(model).step == 30


def test_a_backup_of_another_model_is_an_error(backup) -> None:
    """The training does not silently start from the beginning, and the backup stays."""
    interrupted(backup, 8)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.compile("adam", "mse")

    with pytest.raises(kc.MismatchError):
        fit(other, kc.BackupAndRestore(backup))

    assert len(kc.CheckpointDirectory(backup)) == 1


def test_a_damaged_backup_is_an_error(backup) -> None:
    """The training does not silently start from the beginning."""
    interrupted(backup, 8)
    record = kc.CheckpointDirectory(backup).latest()
    pathlib.Path(f"{record.prefix}.index").write_bytes(b"")

    with pytest.raises(kc.DamagedCheckpointError):
        fit(dense_model(), kc.BackupAndRestore(backup))


def test_a_directory_of_another_callback_is_refused(tmp_path) -> None:
    """Each callback would remove the checkpoints of the other."""
    with pytest.raises(kc.DirectoryNotEmptyError, match="Two callbacks"):
        fit(dense_model(), kc.ModelCheckpoint(tmp_path / "run"), kc.BackupAndRestore(tmp_path / "run"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"backup_dir": ""}, ValueError),
        ({"backup_dir": "b", "save_freq": False}, ValueError),
        ({"backup_dir": "b", "on_full_disk": "ignore"}, ValueError),
    ],
)
def test_wrong_arguments_of_backup_and_restore_are_refused(arguments, error) -> None:
    """The error tells the received value. (In Keras, save_freq=False saves on every batch.)"""
    with pytest.raises(error, match="Received"):
        kc.BackupAndRestore(**arguments)


def test_a_directory_of_checkpoints_that_are_no_backup_is_refused(backup) -> None:
    """A run of ModelCheckpoint is not restored, and not removed at the end."""
    fit(dense_model(), kc.ModelCheckpoint(backup), epochs=2)

    with pytest.raises(kc.DirectoryNotEmptyError, match="holds checkpoints that are no backup: ckpt-5, ckpt-10"):
        fit(dense_model(), kc.BackupAndRestore(backup), epochs=3)

    assert [record.step for record in kc.CheckpointDirectory(backup)] == [5, 10]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras's writing of HDF5
def test_a_backup_of_keras_is_refused(backup) -> None:
    """A user who switched from Keras's callback within a run gets an error instead of a new start."""
    with pytest.raises(RuntimeError):
        fit(dense_model(), keras.callbacks.BackupAndRestore(backup), Interrupts(8, RuntimeError()), epochs=3)

    with pytest.raises(kc.DirectoryNotEmptyError, match=r"a backup of keras\.callbacks\.BackupAndRestore"):
        fit(dense_model(), kc.BackupAndRestore(backup), epochs=3)


def test_a_pinned_backup_stays_at_the_end(backup) -> None:
    """The fit ends normally, with a warning."""

    class Pins(keras.callbacks.Callback):
        def on_train_end(self, logs=None) -> None:
            kc.CheckpointDirectory(backup).pin(10)

    with pytest.warns(UserWarning, match=r"The backup stays: .*pinned checkpoints: \[10\]"):
        fit(dense_model(), Pins(), kc.BackupAndRestore(backup), epochs=2)

    assert [record.step for record in kc.CheckpointDirectory(backup)] == [10]


def test_a_crash_before_the_first_save_resumes_the_same_run(backup, tmp_path) -> None:
    """The initial state is backed up, so that checkpoints of another callback continue their run."""
    runs = kc.CheckpointDirectory(tmp_path / "run")
    first = dense_model()
    start = first.get_weights()

    def callbacks() -> list[keras.callbacks.Callback]:
        return [kc.ModelCheckpoint(runs.path, save_freq=2), kc.BackupAndRestore(backup)]

    with pytest.raises(RuntimeError):
        fit(first, *callbacks(), Interrupts(4, RuntimeError()), epochs=2)
    assert [record.step for record in kc.CheckpointDirectory(backup)] == [0]
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            seen.append(self.model.get_weights())

    fit(dense_model(), *callbacks(), Looks(), epochs=2)

    assert all(np.array_equal(a, b) for a, b in zip(start, seen[0], strict=True))
    assert [record.step for record in runs] == [2, 4, 6, 8, 10]


def test_a_damaged_backup_falls_back_to_the_previous_backup(backup) -> None:
    """`double_checkpoint=True` keeps a previous backup. A warning names it."""
    interrupted(backup, 17, double_checkpoint=True)
    data = pathlib.Path(f"{kc.CheckpointDirectory(backup)[15].prefix}.data-00000-of-00001")
    data.write_bytes(bytes(len(data.read_bytes())))
    counts = Counts()

    with pytest.warns(UserWarning, match=r"ckpt-15 cannot be trusted.*Going back to ckpt-10"):
        fit(dense_model(), kc.BackupAndRestore(backup, double_checkpoint=True), counts, epochs=4)

    assert counts.epochs == [2, 3]


class TwoOptimizers(keras.Model):
    """A model like a GAN: each of two optimizers trains one half, and the optimizer of compile() is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = keras.layers.Dense(3), keras.layers.Dense(1)
        self.opt_first = self.opt_second = None

    def compile(self, opt_first, opt_second) -> None:
        super().compile(run_eagerly=True)
        self.opt_first, self.opt_second = opt_first, opt_second

    def call(self, x):
        return self.second(self.first(x))

    def train_step(self, data):
        x, y = data
        for layer, optimizer in ((self.first, self.opt_first), (self.second, self.opt_second)):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((self(x) - y) ** 2)
            variables = layer.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"loss": loss}


def two_optimizers() -> TwoOptimizers:
    model = TwoOptimizers()
    model.compile(keras.optimizers.Adam(0.1), keras.optimizers.SGD(0.1, momentum=0.9))
    model(X[:1])
    return model


@needs_tensorflow
def test_every_optimizer_that_a_model_holds_is_backed_up(backup) -> None:
    """A restart of a model with two optimizers ends where the uninterrupted run ends."""
    whole = two_optimizers()
    start = whole.get_weights()
    fit(whole, epochs=4)
    first = two_optimizers()
    first.set_weights(start)
    with pytest.raises(RuntimeError):
        fit(first, kc.BackupAndRestore(backup), Interrupts(11, RuntimeError()), epochs=4)

    again = two_optimizers()
    fit(again, kc.BackupAndRestore(backup), epochs=4)

    for each in ("opt_first", "opt_second"):
        for mine, theirs in zip(getattr(whole, each).variables, getattr(again, each).variables, strict=True):
            assert np.array_equal(mine.numpy(), theirs.numpy())
    assert all(np.array_equal(a, b) for a, b in zip(whole.get_weights(), again.get_weights(), strict=True))


def test_backup_and_restore_takes_the_arguments_of_keras_in_order(backup) -> None:
    """It is also an instance of Keras's BackupAndRestore."""
    ours, theirs = (
        list(inspect.signature(each).parameters) for each in (kc.BackupAndRestore, keras.callbacks.BackupAndRestore)
    )

    assert ours[: len(theirs)] == theirs
    assert isinstance(kc.BackupAndRestore(backup), keras.callbacks.BackupAndRestore)


def test_a_backup_that_was_complete_when_its_process_died_is_restored(backup) -> None:
    """The complete backup was not yet published. The script that runs again resumes from it."""
    model, other = dense_model(), dense_model()
    fit(model, kc.BackupAndRestore(backup, delete_checkpoint=False))
    into_a_stage(backup)
    assert not kc.CheckpointDirectory(backup).listing()

    fit(other, kc.BackupAndRestore(backup), epochs=1)

    assert same(model, other)
