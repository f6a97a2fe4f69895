"""A finished script that is run again: `ModelCheckpoint` and `BackupAndRestore` together, with their defaults."""

import collections
import pathlib

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.resume import backup_and_restore
from keras_ckpt.store.record import RunEnd
from support.models import Interrupts, dense_model, fit, same

EPOCHS = 3


@pytest.fixture
def place(tmp_path) -> pathlib.Path:
    """The directory of the run; its backup is below it."""
    return tmp_path / "run"


class Batches(keras.callbacks.Callback):
    """Counts the batches that the process trains."""

    count = 0

    def get_state(self) -> dict[str, int]:
        return {}

    def set_state(self, state) -> None:
        """A backup does not change the count."""

    def on_train_batch_end(self, batch, logs=None) -> None:
        self.count += 1


def run(
    place: pathlib.Path, *callbacks: keras.callbacks.Callback, epochs: int = EPOCHS, model=None, **options
) -> tuple[keras.Model, int]:
    """Runs the script: a new model, a fit with both callbacks. Returns the model and the number of trained batches."""
    model = model or dense_model()
    batches = Batches()
    checkpoint, backup = kc.ModelCheckpoint(place, **options), kc.BackupAndRestore(place / "backup")
    fit(model, checkpoint, backup, batches, *callbacks, epochs=epochs)
    return model, batches.count


def test_a_finished_script_trains_nothing_and_says_so(place, capsys) -> None:
    """The backup is gone. The last checkpoint says that the run has ended, and has the model."""
    first, batches = run(place)
    assert batches == 15
    assert not (place / "backup").exists()
    records = list(kc.CheckpointDirectory(place))
    assert [record.end for record in records] == [None, None, RunEnd(EPOCHS, 15)]
    capsys.readouterr()

    again, batches = run(place)

    assert batches == 0
    assert same(first, again)
    assert list(kc.CheckpointDirectory(place)) == records
    assert capsys.readouterr().out.splitlines()[0] == (
        f"Found a finished run in {place}; nothing is left to train; restored: model, as the run left it, from step "
        "15. To train another run, give ModelCheckpoint new_run='subdirectory' or new_run='replace'."
    )


def test_a_killed_script_that_was_resumed_to_its_end_trains_nothing(place) -> None:
    with pytest.raises(RuntimeError):
        run(place, Interrupts(8, RuntimeError()))
    whole, batches = run(place)
    assert batches == 10

    again, batches = run(place)

    assert batches == 0
    assert same(whole, again)


def test_a_script_that_early_stopping_ended_trains_nothing(place) -> None:
    """It had asked for more epochs than it trained."""

    def stops() -> keras.callbacks.EarlyStopping:
        return keras.callbacks.EarlyStopping("loss", patience=0, min_delta=9.0)

    first, batches = run(place, stops(), epochs=9)
    assert 0 < batches < 45

    again, batches = run(place, stops(), epochs=9)

    assert batches == 0
    assert same(first, again)


@pytest.mark.parametrize("options", [{}, {"monitor": "loss", "save_best_only": True}])
def test_the_best_weights_that_early_stopping_restored_are_the_end(place, options) -> None:
    """They are in an earlier checkpoint than the last, or in the only one."""

    class Reports(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            logs["loss"] = [0.5, 0.3, 0.4, 0.6][epoch]

    def callbacks() -> list[keras.callbacks.Callback]:
        stop = keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True)
        return [Reports(), kc.ModelCheckpoint(place, **options), kc.BackupAndRestore(place / "backup"), stop]

    first, again, batches = dense_model(), dense_model(), Batches()
    fit(first, *callbacks(), epochs=9)
    newest = kc.CheckpointDirectory(place).latest()
    assert (newest.step, newest.end) == (10 if options else 20, RunEnd(9, 10))

    fit(again, *callbacks(), batches, epochs=9)

    assert batches.count == 0
    assert all(np.array_equal(a, b) for a, b in zip(first.get_weights(), again.get_weights(), strict=True))


def test_weights_that_no_checkpoint_has_are_not_taken_for_an_end(place) -> None:
    """A callback changed them when the training ended. The next start is refused."""

    class Changes(keras.callbacks.Callback):
        def on_train_end(self, logs=None) -> None:
            self.model.layers[0].bias.assign([1.0, 2.0, 3.0])

    run(place, Changes())
    assert [record.end for record in kc.CheckpointDirectory(place)] == [None] * EPOCHS

    with pytest.raises(kc.DirectoryNotEmptyError, match="3 checkpoints of another run"):
        run(place)


def test_a_run_whose_end_was_pruned_is_refused(place) -> None:
    """The newest checkpoint says that the run has ended with another."""
    stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=9.0, restore_best_weights=True)
    run(place, stop, epochs=9)
    runs = kc.CheckpointDirectory(place)
    assert runs.latest().end == RunEnd(9, 5)
    runs.prune(kc.LatestN(1))

    with pytest.raises(kc.DirectoryNotEmptyError, match="1 checkpoint of a finished run of 9 epochs"):
        run(place, epochs=9)


def test_a_run_whose_end_was_not_kept_is_refused(place) -> None:
    """The best checkpoint is not the end of the run."""

    class Reports(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            logs["val_loss"] = float(epoch)

    model = dense_model()
    callbacks = [Reports(), kc.ModelCheckpoint(place, save_best_only=True), kc.BackupAndRestore(place / "backup")]
    fit(model, *callbacks, epochs=EPOCHS)

    with pytest.raises(kc.DirectoryNotEmptyError, match="1 checkpoint of another run"):
        run(place, save_best_only=True)


def test_the_refusal_of_more_epochs_names_the_finished_run(place) -> None:
    """Its way out continues the run."""
    run(place)
    with pytest.raises(kc.DirectoryNotEmptyError, match=r"3 checkpoints of a finished run of 3 epochs") as caught:
        run(place, epochs=5)
    assert "initial_epoch=3" in str(caught.value)

    model = dense_model()
    kc.restore(model, place)
    fit(model, kc.ModelCheckpoint(place), initial_epoch=kc.initial_epoch(model), epochs=5)

    assert [record.step for record in kc.CheckpointDirectory(place)] == [5, 10, 15, 20, 25]


@pytest.mark.parametrize("new_run", ["subdirectory", "replace"])
def test_a_finished_script_that_asks_for_a_new_run_trains_it(place, new_run) -> None:
    run(place, new_run=new_run)

    _, batches = run(place, new_run=new_run)

    assert batches == 15
    newest = kc.CheckpointDirectory(place / "2" if new_run == "subdirectory" else place).latest()
    assert newest.end == RunEnd(EPOCHS, 15)


def test_a_second_fit_of_the_model_trains(place) -> None:
    """It is not the script again: the model is in the run."""
    model, _ = run(place)

    _, batches = run(place, model=model)

    assert batches == 15
    assert kc.CheckpointDirectory(place).latest().end is None


def test_the_fits_of_a_script_that_train_one_model_are_not_taken_for_its_end(place) -> None:
    """If the first fit trained nothing, the second would train on the end of the second."""
    model, _ = run(place)
    run(place, model=model)

    with pytest.raises(kc.DirectoryNotEmptyError, match="6 checkpoints of another run"):
        run(place)


def test_a_finished_fit_that_is_run_again_saves_no_checkpoint_that_a_later_fit_has_pruned(place) -> None:
    """Otherwise the end of the first fit would be the newest checkpoint of the run."""

    def script() -> None:
        model = dense_model()
        for name, epochs in (("first", 2), ("second", 4)):
            backup = kc.BackupAndRestore(place / name, delete_checkpoint=False)
            fit(model, kc.ModelCheckpoint(place, keep=2), backup, epochs=epochs, initial_epoch=epochs - 2)

    script()
    records = list(kc.CheckpointDirectory(place))
    script()

    assert [record.step for record in records] == [15, 20]
    assert list(kc.CheckpointDirectory(place)) == records


def test_another_model_is_refused(place) -> None:
    """The end of the run does not fit it."""
    run(place)
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.compile("adam", "mse", run_eagerly=True)

    with pytest.raises(kc.DirectoryNotEmptyError, match="a finished run of 3 epochs"):
        run(place, model=other)


def test_after_clear_the_script_trains_again(place) -> None:
    run(place)
    kc.CheckpointDirectory(place).clear()

    assert run(place)[1] == 15


def test_a_kill_between_the_note_and_the_removal_of_the_backup_resumes(place, monkeypatch) -> None:
    """The backup is newer than the note."""

    def fails(*arguments) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(backup_and_restore.CheckpointDirectory, "clear", fails)
        patch.setattr(backup_and_restore, "_ended", collections.Counter())  # it would die with the process
        with pytest.raises(RuntimeError, match="killed"):
            run(place)
    assert kc.CheckpointDirectory(place).latest().end == RunEnd(EPOCHS, 15)
    assert len(kc.CheckpointDirectory(place / "backup")) == 1

    _, batches = run(place)

    assert batches == 0
    assert kc.CheckpointDirectory(place).latest().end == RunEnd(EPOCHS, 15)
    assert not (place / "backup").exists()


def test_a_csv_log_stays_when_nothing_is_trained(place, tmp_path) -> None:
    """`CSVLogger` would empty its file."""
    run(place, keras.callbacks.CSVLogger(tmp_path / "log.csv"))
    log = (tmp_path / "log.csv").read_text()
    assert len(log.splitlines()) == EPOCHS + 1

    run(place, keras.callbacks.CSVLogger(tmp_path / "log.csv"))

    assert (tmp_path / "log.csv").read_text() == log


def test_the_next_fit_of_a_model_whose_run_was_finished_trains(place, tmp_path) -> None:
    """The epoch that the first fit began with does not leak."""
    run(place)
    model, _ = run(place)
    batches = Batches()

    fit(model, batches, epochs=2)

    assert batches.count == 10


def test_a_finished_script_that_saves_files_of_keras_trains_again(place) -> None:
    """As in Keras: the files are replaced, with a warning."""

    def run_with_files() -> int:
        batches = Batches()
        callbacks = [kc.ModelCheckpoint(place / "last.keras"), kc.BackupAndRestore(place / "backup"), batches]
        fit(dense_model(), *callbacks, epochs=EPOCHS)
        return batches.count

    assert run_with_files() == 15
    with pytest.warns(UserWarning, match="An earlier training wrote"):
        assert run_with_files() == 15
