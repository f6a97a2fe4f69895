"""A finished script that is run again: `ModelCheckpoint` and `BackupAndRestore` together, with their defaults."""

import collections
import pathlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.resume import backup_and_restore
from keras_ckpt.store.record import RunEnd
from support.models import Interrupts, Reports, dense_model, fit, same

EPOCHS = 3
BATCHES = 2


@pytest.fixture
def place(tmp_path) -> pathlib.Path:
    """The directory of the run; its backup is below it."""
    return tmp_path / "run"


@pytest.fixture
def another_process(monkeypatch) -> Callable[[], None]:
    """Makes the next fit the first of its process, as in a script that is run again."""
    return lambda: monkeypatch.setattr(backup_and_restore, "_ended", collections.Counter())


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
    fit(model, checkpoint, backup, batches, *callbacks, epochs=epochs, batches=BATCHES)
    return model, batches.count


def test_a_finished_script_trains_nothing_and_says_so(place, capsys) -> None:
    """The backup is gone. The last checkpoint says that the run has ended, and has the model."""
    first, batches = run(place)
    assert batches == EPOCHS * BATCHES
    assert not (place / "backup").exists()
    records = list(kc.CheckpointDirectory(place))
    assert [record.end for record in records] == [None, None, RunEnd(EPOCHS, EPOCHS * BATCHES)]
    capsys.readouterr()

    again, batches = run(place)

    assert batches == 0
    assert same(first, again)
    assert list(kc.CheckpointDirectory(place)) == records
    assert capsys.readouterr().out.splitlines()[0] == (
        f"Found a finished run in {place}; nothing is left to train; restored: model, as the run left it, from step "
        "6. To train another run, give ModelCheckpoint new_run='subdirectory' or new_run='replace'."
    )


def test_a_killed_script_that_was_resumed_to_its_end_trains_nothing(place) -> None:
    with pytest.raises(RuntimeError):
        run(place, Interrupts(3, RuntimeError()))
    whole, batches = run(place)
    assert batches == 2 * BATCHES

    again, batches = run(place)

    assert batches == 0
    assert same(whole, again)


def test_a_script_that_early_stopping_ended_trains_nothing(place) -> None:
    """It had asked for more epochs than it trained."""

    def stops() -> keras.callbacks.EarlyStopping:
        return keras.callbacks.EarlyStopping("loss", patience=0, min_delta=9.0)

    first, batches = run(place, stops(), epochs=9)
    assert 0 < batches < 9 * BATCHES

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
    fit(first, *callbacks(), epochs=9, batches=BATCHES)
    newest = kc.CheckpointDirectory(place).latest()
    assert (newest.step, newest.end) == ((2 if options else 4) * BATCHES, RunEnd(9, 2 * BATCHES))

    fit(again, *callbacks(), batches, epochs=9, batches=BATCHES)

    assert batches.count == 0
    assert all(np.array_equal(a, b) for a, b in zip(first.get_weights(), again.get_weights(), strict=True))


def test_weights_that_no_checkpoint_has_are_not_taken_for_an_end(place, another_process) -> None:
    """A callback changed them when the training ended. The backup stays, and the callback changes them again."""

    class Changes(keras.callbacks.Callback):
        def on_train_end(self, logs=None) -> None:
            self.model.layers[0].bias.assign([1.0, 2.0, 3.0])

    first, _ = run(place, Changes())
    assert [record.end for record in kc.CheckpointDirectory(place)] == [None] * EPOCHS
    another_process()

    again, batches = run(place, Changes())

    assert batches == 0
    assert same(first, again)


def test_a_run_whose_end_was_pruned_is_refused(place) -> None:
    """The newest checkpoint says that the run has ended with another."""
    stop = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=9.0, restore_best_weights=True)
    run(place, stop, epochs=9)
    runs = kc.CheckpointDirectory(place)
    assert runs.latest().end == RunEnd(9, BATCHES)
    runs.prune(kc.LatestN(1))

    with pytest.raises(kc.DirectoryNotEmptyError, match="1 checkpoint of a finished run of 9 epochs"):
        run(place, epochs=9)


def test_the_refusal_of_more_epochs_names_the_finished_run(place) -> None:
    """Its way out continues the run."""
    run(place)
    with pytest.raises(kc.DirectoryNotEmptyError, match=r"3 checkpoints of a finished run of 3 epochs") as caught:
        run(place, epochs=5)
    assert "initial_epoch=3" in str(caught.value)

    model = dense_model()
    kc.restore(model, place)
    fit(model, kc.ModelCheckpoint(place), initial_epoch=kc.initial_epoch(model), epochs=5, batches=BATCHES)

    assert [record.step for record in kc.CheckpointDirectory(place)] == [2, 4, 6, 8, 10]


@pytest.mark.parametrize("new_run", ["subdirectory", "replace"])
def test_a_finished_script_that_asks_for_a_new_run_trains_it(place, new_run) -> None:
    run(place, new_run=new_run)

    _, batches = run(place, new_run=new_run)

    assert batches == EPOCHS * BATCHES
    newest = kc.CheckpointDirectory(place / "2" if new_run == "subdirectory" else place).latest()
    assert newest.end == RunEnd(EPOCHS, EPOCHS * BATCHES)


def test_a_second_fit_of_the_model_trains(place) -> None:
    """It is not the script again: the model is in the run."""
    model, _ = run(place)

    _, batches = run(place, model=model)

    assert batches == EPOCHS * BATCHES
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
            fit(
                model,
                kc.ModelCheckpoint(place, keep=2),
                backup,
                epochs=epochs,
                initial_epoch=epochs - 2,
                batches=BATCHES,
            )

    script()
    records = list(kc.CheckpointDirectory(place))
    script()

    assert [record.step for record in records] == [3 * BATCHES, 4 * BATCHES]
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

    assert run(place)[1] == EPOCHS * BATCHES


def test_a_kill_between_the_note_and_the_removal_of_the_backup_resumes(place, monkeypatch) -> None:
    """The backup is newer than the note."""

    def fails(*arguments) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(backup_and_restore.CheckpointDirectory, "clear", fails)
        patch.setattr(backup_and_restore, "_ended", collections.Counter())  # it would die with the process
        with pytest.raises(RuntimeError, match="killed"):
            run(place)
    assert kc.CheckpointDirectory(place).latest().end == RunEnd(EPOCHS, EPOCHS * BATCHES)
    assert len(kc.CheckpointDirectory(place / "backup")) == 1

    _, batches = run(place)

    assert batches == 0
    assert kc.CheckpointDirectory(place).latest().end == RunEnd(EPOCHS, EPOCHS * BATCHES)
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

    fit(model, batches, epochs=2, batches=BATCHES)

    assert batches.count == 2 * BATCHES


class Script:
    """A script whose checkpoints do not have the end of its run. Each call is a start in a new process.

    The first epoch is the best, so `best.keras` never has the end.

    Attributes:
        place: The folder of the script.
        another_process: Makes the next fit the first of its process.
    """

    def __init__(self, place: pathlib.Path, another_process: Callable[[], None]) -> None:
        self.place = place
        self.another_process = another_process

    def __call__(
        self,
        *callbacks: keras.callbacks.Callback,
        file: str = "best.keras",
        epochs: int = 2,
        batches: int = BATCHES,
        model: keras.Model | None = None,
        backup: Mapping[str, Any] = MappingProxyType({}),
        **options: Any,
    ) -> tuple[keras.Model, int]:
        """Runs the script. Returns the model and the number of trained batches."""
        self.another_process()
        keras.utils.set_random_seed(1)
        model, counted = model or dense_model(), Batches()
        options = {"monitor": "made_up", "mode": "min", "save_best_only": True, **options}
        saves = kc.ModelCheckpoint(self.place / file, **options), kc.BackupAndRestore(self.place / "backup", **backup)
        fit(model, Reports(made_up=range(9)), *saves, counted, *callbacks, epochs=epochs, batches=batches)
        return model, counted.count

    @property
    def files(self) -> dict[str, bytes]:
        """The bytes of all files of the checkpoints and of the backup."""
        paths = [path for path in self.place.rglob("*") if path.is_file() and ".keras_ckpt" not in path.parts]
        return {str(path.relative_to(self.place)): path.read_bytes() for path in paths}


@pytest.fixture
def script(place, another_process) -> Script:
    return Script(place, another_process)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"file": "last.weights.h5", "save_weights_only": True, "save_best_only": False},
        {"file": "{epoch}.keras", "save_best_only": False, "save_freq": 4},
        {"file": "best"},
        {"backup": {"save_freq": 4, "double_checkpoint": True}},
    ],
    ids=str,
)
def test_a_script_whose_checkpoints_lack_the_end_trains_nothing_and_says_so(script, capsys, options) -> None:
    """Its backup stays. The next start restores the end from it, and changes nothing on disk."""
    first, batches = script(batches=5, **options)
    assert batches == 10
    assert capsys.readouterr().out == (
        f"\nThe backup stays in {script.place}/backup: with it the same script trains nothing when it is run again. In "
        f"a shell, keras-ckpt clear {script.place}/backup removes it.\n"
    )
    files = script.files

    again, batches = script(batches=5, **options)

    assert batches == 0
    assert same(first, again)
    assert script.files == files
    out = capsys.readouterr().out
    assert "ckpt-10; nothing is left to train after step 10, epoch 2 of 2; restored: model, " in out
    assert out.endswith(
        f". To train another run, remove the backup, in a shell: keras-ckpt clear {script.place}/backup\n"
    )


def test_the_history_and_the_weights_that_early_stopping_restored_are_those_of_the_end(script) -> None:
    def stop() -> keras.callbacks.EarlyStopping:
        return keras.callbacks.EarlyStopping("made_up", mode="min", patience=1, restore_best_weights=True)

    first, batches = script(stop(), epochs=9)
    assert batches == 2 * BATCHES

    again, batches = script(stop(), epochs=9)

    assert batches == 0
    assert all(np.array_equal(a, b) for a, b in zip(first.get_weights(), again.get_weights(), strict=True))
    assert again.history.history == first.history.history


@pytest.mark.parametrize("file", ["best.keras", "best"])
def test_more_epochs_continue_a_finished_run_from_its_backup(script, tmp_path, another_process, file) -> None:
    """The run ends as a run that was asked for these epochs at once."""
    whole, _ = Script(tmp_path / "whole", another_process)(file=file, epochs=3)
    script(file=file)

    longer, batches = script(file=file, epochs=3)

    assert batches == BATCHES
    assert same(whole, longer)
    assert script(file=file, epochs=3)[1] == 0


def test_fewer_epochs_than_a_finished_run_has_train_nothing(script) -> None:
    """The backup stays for those who ask for all epochs again."""
    script()
    files = script.files

    assert script(epochs=1)[1] == 0
    assert script.files == files


@pytest.mark.parametrize("options", [{}, {"file": "run", "save_best_only": False}], ids=str)
def test_a_kill_at_the_end_of_the_training_loses_no_end(script, monkeypatch, options) -> None:
    """The backup of the last epoch is not noted as the end. The second start notes it, and the third trains nothing."""

    def fails(*arguments) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(backup_and_restore.BackupAndRestore, "_end", fails)
        with pytest.raises(RuntimeError, match="killed"):
            script(**options)

    assert [script(**options)[1], script(**options)[1]] == [0, 0]


@pytest.mark.parametrize("removed", ["backup", "best.keras"])
def test_a_finished_script_trains_again_when_its_backup_or_its_file_was_removed(script, removed) -> None:
    """Those who start over remove the results of the run. Its backup alone is no reason to train nothing."""
    script()
    if removed == "backup":
        kc.CheckpointDirectory(script.place / "backup").clear()
        with pytest.warns(UserWarning, match="An earlier training wrote"):
            assert script()[1] == 2 * BATCHES
    else:
        (script.place / "best.keras").unlink()
        assert script()[1] == 2 * BATCHES

    assert script()[1] == 0


@pytest.mark.parametrize("new_run", ["subdirectory", "replace"])
def test_a_finished_script_with_a_file_of_keras_that_asks_for_a_new_run_trains_it(script, new_run) -> None:
    """Its backup does not stay."""
    script()

    assert script(new_run=new_run)[1] == 2 * BATCHES
    assert not (script.place / "backup").exists()


def test_another_model_than_that_of_the_finished_run_is_refused(script) -> None:
    """It replaces neither the file nor the backup. The error says how to start over."""
    script()
    files = script.files
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.compile("adam", "mse", run_eagerly=True)

    with pytest.raises(kc.MismatchError, match="To start the training over, remove the backup"):
        script(model=other)

    assert script.files == files


@pytest.mark.parametrize("load", [keras.models.load_model, kc.load_model], ids=["Keras's", "own"])
def test_a_model_that_was_loaded_from_the_file_trains(script, load) -> None:
    """The script continues the run from the best epoch, as it asks for. The backup of the end does not replace it."""
    script()

    assert script(model=load(script.place / "best.keras"))[1] == 2 * BATCHES


def test_fits_of_one_process_that_share_a_backup_and_a_file_all_train(script, monkeypatch) -> None:
    """The backup of one fit does not end another, in this process and when the script is run again."""
    monkeypatch.setattr(script, "another_process", lambda: None)
    assert script()[1] == 2 * BATCHES
    with pytest.warns(UserWarning, match="An earlier training wrote"):
        assert script()[1] == 2 * BATCHES

    backup_and_restore._ended.clear()
    with pytest.warns(UserWarning, match="An earlier training wrote"):
        assert script()[1] == 2 * BATCHES


def test_folds_that_share_a_backup_train_when_their_files_are_their_own(script) -> None:
    """The checkpoints of the backup's run are not those of the second fold."""
    assert [script(file=f"{fold}.keras")[1] for fold in "ab"] == [2 * BATCHES, 2 * BATCHES]


def test_a_pinned_file_of_a_finished_run_is_no_reason_for_a_warning(script) -> None:
    """Nothing is saved. The filter of the suite turns a warning into an error."""
    script()
    kc.CheckpointDirectory(script.place / "best.keras").pin(BATCHES)

    assert script()[1] == 0


def test_a_backup_beside_kerass_own_checkpoint_is_removed(place, another_process) -> None:
    """As in Keras, the script trains again."""
    for _ in range(2):
        batches = Batches()
        place.mkdir(exist_ok=True)
        saves = keras.callbacks.ModelCheckpoint(place / "last.keras"), kc.BackupAndRestore(place / "backup")
        fit(dense_model(), *saves, batches, epochs=2, batches=BATCHES)
        another_process()

        assert batches.count == 2 * BATCHES
        assert not (place / "backup").exists()
