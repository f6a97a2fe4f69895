"""A finished script that is run again: `ModelCheckpoint` and `BackupAndRestore` together, with their defaults."""

import collections
import pathlib

import keras
import pytest

import keras_ckpt as kc
from keras_ckpt.resume import backup_and_restore
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
    assert [record.finished for record in records] == [None, None, EPOCHS]
    capsys.readouterr()

    again, batches = run(place)

    assert batches == 0
    assert same(first, again)
    assert list(kc.CheckpointDirectory(place)) == records
    assert capsys.readouterr().out.splitlines()[0] == (
        f"Found {place}/ckpt-15, the end of a finished run; nothing is left to train after step 15, epoch 3 of 3; "
        "restored: model. To train another run, give ModelCheckpoint new_run='subdirectory' or new_run='replace'."
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


def test_a_model_that_a_callback_changed_at_the_end_is_not_taken_for_its_last_checkpoint(place) -> None:
    """`EarlyStopping` restores the best weights, and no checkpoint is the end. The next start is refused."""
    stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=9.0, restore_best_weights=True)
    run(place, stop, epochs=9)
    assert [record.finished for record in kc.CheckpointDirectory(place)] == [None] * 2

    with pytest.raises(kc.DirectoryNotEmptyError, match="2 checkpoints of another run"):
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
    assert (newest.step, newest.finished) == (15, EPOCHS)


def test_a_second_fit_of_the_model_trains(place) -> None:
    """It is not the script again: the model is in the run."""
    model, _ = run(place)

    _, batches = run(place, model=model)

    assert batches == 15
    assert [record.finished for record in kc.CheckpointDirectory(place)][-1] is None


def test_the_fits_of_a_script_that_train_one_model_are_not_taken_for_its_end(place) -> None:
    """If the first fit trained nothing, the second would train on the end of the second."""
    model, _ = run(place)
    run(place, model=model)

    with pytest.raises(kc.DirectoryNotEmptyError, match="6 checkpoints of another run"):
        run(place)


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
    assert kc.CheckpointDirectory(place).latest().finished == EPOCHS
    assert len(kc.CheckpointDirectory(place / "backup")) == 1

    _, batches = run(place)

    assert batches == 0
    assert kc.CheckpointDirectory(place).latest().finished == EPOCHS
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
