"""`BackupAndRestore`: the same script, run again, goes on; and only its own files are removed at the end."""

import inspect
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
from keras_ckpt.model.position import position_of
from support.models import Interrupts, X, dense_model, fit, into_a_stage, same


@pytest.fixture
def backup(tmp_path) -> pathlib.Path:
    return tmp_path / "backup"


class Counts(keras.callbacks.Callback):
    """Notes the epochs that were run."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs = []

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self.epochs.append(epoch)


def interrupted(backup: pathlib.Path, batches: int, **options) -> keras.Model:
    """A training of ten epochs of five batches that ends with an error."""
    model = dense_model()
    with pytest.raises(RuntimeError):
        fit(model, kc.BackupAndRestore(backup, **options), Interrupts(batches, RuntimeError()), epochs=10)
    return model


def test_a_training_that_was_interrupted_goes_on(backup) -> None:
    """Interrupted in its fifth epoch, it is restored and runs the other six; the history is of all ten."""
    interrupted(backup, 22)
    counts = Counts()

    history = fit(dense_model(), kc.BackupAndRestore(backup), counts, epochs=10)

    assert counts.epochs == [4, 5, 6, 7, 8, 9]
    assert history.epoch == [*range(10)]
    assert len(history.history["loss"]) == 10


def test_the_model_is_what_it_was_when_it_was_backed_up(backup) -> None:
    """Weights, seeds and optimizer, before the first batch."""
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
    """With the data in order, killed at an epoch's end: to the bit."""
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
    """With its directory, if nothing else is in it."""
    fit(dense_model(), kc.BackupAndRestore(backup), epochs=2)

    assert not backup.exists()


def test_nothing_of_anybody_elses_is_removed(backup) -> None:
    """Keras removes the whole directory."""
    backup.mkdir()
    (backup / "thesis.tex").write_text("mine")

    fit(dense_model(), kc.BackupAndRestore(backup), epochs=2)

    assert (backup / "thesis.tex").read_text() == "mine"
    assert [path.name for path in backup.iterdir() if path.name != ".keras_ckpt"] == ["thesis.tex"]


def test_the_backup_stays_if_asked_for(backup) -> None:
    """And a finished training that is started again trains nothing."""
    fit(dense_model(), kc.BackupAndRestore(backup, delete_checkpoint=False), epochs=2)
    counts = Counts()

    fit(dense_model(), kc.BackupAndRestore(backup, delete_checkpoint=False), counts, epochs=2)

    assert counts.epochs == []
    assert len(kc.CheckpointDirectory(backup)) == 1


@pytest.mark.parametrize(("double", "kept"), [(False, [15]), (True, [10, 15])])
def test_one_backup_is_kept_or_two(backup, double, kept) -> None:
    """double_checkpoint keeps the one before, too."""
    interrupted(backup, 17, double_checkpoint=double)

    assert [record.step for record in kc.CheckpointDirectory(backup)] == kept


def test_the_epoch_to_begin_with_does_not_leak_into_the_next_fit(backup) -> None:
    """In Keras it does: a later fit of fewer epochs would train nothing."""
    interrupted(backup, 17)
    model = dense_model()
    fit(model, kc.BackupAndRestore(backup), epochs=5)
    counts = Counts()

    fit(model, counts, epochs=2)

    assert counts.epochs == [0, 1]


def test_the_epoch_to_begin_with_does_not_leak_from_an_interrupted_fit(backup) -> None:
    """Nor after Ctrl-C."""
    interrupted(backup, 17)
    model = dense_model()
    with pytest.raises(KeyboardInterrupt):
        fit(model, kc.BackupAndRestore(backup), Interrupts(1), epochs=5)
    counts = Counts()

    fit(model, counts, epochs=2)

    assert counts.epochs == [0, 1]


def test_backups_within_an_epoch(backup) -> None:
    """The epoch under way begins again, on the newest weights, as with Keras."""
    interrupted(backup, 13, save_freq=4)
    record = kc.CheckpointDirectory(backup).latest()
    assert (record.step, record.epoch, record.batch) == (12, 2, 2)
    counts = Counts()

    with pytest.warns(UserWarning, match=r"Epoch 3 begins again at its first batch, .*seen 2 of its batches"):
        fit(dense_model(), kc.BackupAndRestore(backup, save_freq=4), counts, epochs=4)

    assert counts.epochs == [2, 3]


def test_a_second_fit_has_its_own_epochs(backup) -> None:
    """The backup tells fit's own epoch, not that of the run."""
    model = dense_model()
    fit(model, kc.BackupAndRestore(backup), epochs=3)
    with pytest.raises(RuntimeError):
        fit(model, kc.BackupAndRestore(backup), Interrupts(8, RuntimeError()), epochs=3)
    counts = Counts()

    fit(dense_model(), kc.BackupAndRestore(backup), counts, epochs=3)

    assert counts.epochs == [1, 2]


def test_with_model_checkpoint_beside_it(backup, tmp_path) -> None:
    """The restored model goes on with its run: what is best and what is newest is as without the interruption."""
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


def test_a_backup_that_does_not_fit_is_an_error(backup) -> None:
    """Never a silent start from the beginning."""
    interrupted(backup, 8)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.compile("adam", "mse")

    with pytest.raises(kc.MismatchError):
        fit(other, kc.BackupAndRestore(backup))

    assert len(kc.CheckpointDirectory(backup)) == 1


def test_a_damaged_backup_is_an_error(backup) -> None:
    """Nor here."""
    interrupted(backup, 8)
    record = kc.CheckpointDirectory(backup).latest()
    pathlib.Path(f"{record.prefix}.index").write_bytes(b"")

    with pytest.raises(kc.DamagedCheckpointError):
        fit(dense_model(), kc.BackupAndRestore(backup))


def test_a_model_that_is_not_built_is_refused(backup) -> None:
    """It could not be restored after a crash."""
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("adam", "mse", run_eagerly=True)

    with pytest.raises(ValueError, match=r"model\.build\(input_shape\)"):
        fit(model, kc.BackupAndRestore(backup))


def test_its_directory_is_not_that_of_another_callback(tmp_path) -> None:
    """Each would remove what the other keeps."""
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
def test_wrong_arguments_are_refused(arguments, error) -> None:
    """With what was received. (In Keras save_freq=False saves on every batch.)"""
    with pytest.raises(error, match="Received"):
        kc.BackupAndRestore(**arguments)


def test_a_directory_that_is_no_backup_is_refused(backup) -> None:
    """A run is not restored from, and above all not removed at the end."""
    fit(dense_model(), kc.ModelCheckpoint(backup), epochs=2)

    with pytest.raises(kc.DirectoryNotEmptyError, match="holds checkpoints that are no backup: ckpt-5, ckpt-10"):
        fit(dense_model(), kc.BackupAndRestore(backup), epochs=3)

    assert [record.step for record in kc.CheckpointDirectory(backup)] == [5, 10]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in Keras's writing of HDF5
def test_a_backup_of_keras_is_not_ignored(backup) -> None:
    """One who switched in the middle of a run is told, instead of beginning again."""
    with pytest.raises(RuntimeError):
        fit(dense_model(), keras.callbacks.BackupAndRestore(backup), Interrupts(8, RuntimeError()), epochs=3)

    with pytest.raises(kc.DirectoryNotEmptyError, match=r"a backup of keras\.callbacks\.BackupAndRestore"):
        fit(dense_model(), kc.BackupAndRestore(backup), epochs=3)


def test_a_backup_that_was_pinned_stays(backup) -> None:
    """With a warning, and the fit ends well."""

    class Pins(keras.callbacks.Callback):
        def on_train_end(self, logs=None) -> None:
            kc.CheckpointDirectory(backup).pin(10)

    with pytest.warns(UserWarning, match=r"The backup stays: .*pinned checkpoints: \[10\]"):
        fit(dense_model(), Pins(), kc.BackupAndRestore(backup), epochs=2)

    assert [record.step for record in kc.CheckpointDirectory(backup)] == [10]


def test_a_crash_before_the_first_save_goes_on_with_the_same_run(backup, tmp_path) -> None:
    """The state at the beginning is backed up, so another callback's checkpoints are not without their run."""
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


def test_a_damaged_backup_falls_back_to_the_one_before(backup) -> None:
    """With double_checkpoint there is one, and a warning says which."""
    interrupted(backup, 17, double_checkpoint=True)
    data = pathlib.Path(f"{kc.CheckpointDirectory(backup)[15].prefix}.data-00000-of-00001")
    data.write_bytes(bytes(len(data.read_bytes())))
    counts = Counts()

    with pytest.warns(UserWarning, match=r"ckpt-15 cannot be trusted.*Going back to ckpt-10"):
        fit(dense_model(), kc.BackupAndRestore(backup, double_checkpoint=True), counts, epochs=4)

    assert counts.epochs == [2, 3]


class TwoOptimizers(keras.Model):
    """A model as that of a GAN: what compile() makes is not used, and two others train half of it each."""

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


def test_every_optimizer_that_a_model_holds_is_backed_up(backup) -> None:
    """Not that of compile() alone; and a restart ends where the uninterrupted run ends."""
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


def test_takes_keras_arguments_in_their_order(backup) -> None:
    """And is a callback of Keras's class."""
    ours, theirs = (
        list(inspect.signature(each).parameters) for each in (kc.BackupAndRestore, keras.callbacks.BackupAndRestore)
    )

    assert ours[: len(theirs)] == theirs
    assert isinstance(kc.BackupAndRestore(backup), keras.callbacks.BackupAndRestore)


def test_a_backup_that_was_complete_when_its_process_died_is_restored(backup) -> None:
    """It is not yet in its place, and the script that runs again goes on from it all the same."""
    model, other = dense_model(), dense_model()
    fit(model, kc.BackupAndRestore(backup, delete_checkpoint=False))
    into_a_stage(backup)
    assert not kc.CheckpointDirectory(backup).listing()

    fit(other, kc.BackupAndRestore(backup), epochs=1)

    assert same(model, other)
