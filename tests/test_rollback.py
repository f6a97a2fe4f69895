"""`rollback`: going back to a checkpoint of a run is one call, which a newer backup does not undo."""

import math
import pathlib
import shutil

import keras
import pytest

import keras_ckpt as kc
from support.models import Interrupts, dense_model, fit, same


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> pathlib.Path:
    """A run that crashed in its fourth epoch of two batches, and its backup of step 6."""
    path = tmp_path_factory.mktemp("crashed")
    runs, backup = kc.CheckpointDirectory(path / "run"), kc.CheckpointDirectory(path / "backup")
    with pytest.raises(RuntimeError):
        train(dense_model(), runs, backup.path, Interrupts(8, RuntimeError()))
    assert (steps(runs), steps(backup)) == ([2, 4, 6], [6])
    return path


@pytest.fixture
def crashed(original, runs, backup) -> kc.CheckpointDirectory:
    """A copy of the crashed run and of its backup, for one test."""
    shutil.copytree(original / "run", runs.path)
    shutil.copytree(original / "backup", backup)
    return runs


def train(model, runs, backup, *callbacks, epochs=4) -> keras.callbacks.History:
    """Trains as the script of a run does, with a backup of each epoch."""
    callbacks = [kc.ModelCheckpoint(runs.path), *callbacks, kc.BackupAndRestore(backup)]
    return fit(model, *callbacks, initial_epoch=kc.initial_epoch(model), epochs=epochs, batches=2)


def steps(runs: kc.CheckpointDirectory) -> list[int]:
    return [record.step for record in runs]


def test_the_next_fit_continues_from_the_checkpoint_as_a_branch(runs) -> None:
    """The report and `initial_epoch` tell the epoch. Weights and optimizer are those of the checkpoint."""
    model, other = dense_model(), dense_model()
    fit(model, kc.ModelCheckpoint(runs.path), epochs=3, batches=2)

    report = kc.rollback(model, runs, 2)

    kc.restore(other, runs[2])
    assert same(model, other)
    assert (report.step, report.epoch, kc.initial_epoch(model)) == (2, 1, 1)
    fit(model, kc.ModelCheckpoint(runs.path), initial_epoch=1, epochs=2, batches=2)
    assert [(record.step, record.epoch) for record in runs] == [(2, 1), (6, 3), (4, 2)]
    assert [event.step for event in runs.events() if event.kind == "restored"] == [2]
    assert {point.step for point in runs.history("loss").points if point.branch} == {4, 6}


def test_a_newer_backup_does_not_undo_it(crashed, backup, capsys) -> None:
    """The fit trains as one that has no backup. It says so, and its first backup replaces the old one."""
    model, other = dense_model(), dense_model()
    kc.restore(other, crashed[2])
    fit(other, initial_epoch=1, epochs=3, batches=2)

    kc.rollback(model, crashed.path, 2)
    history = train(model, crashed, backup, epochs=3)

    assert history.epoch == [1, 2]
    assert same(model, other)
    out = capsys.readouterr().out
    assert "The model was rolled back to step 2, so the fit begins there. Its first backup replaces " in out
    assert "ckpt-6, which is of before" in out


def test_a_loss_that_was_nan_is_followed_by_a_rollback(runs, backup) -> None:
    """A training that a NaN stopped keeps its earlier backup. After a rollback the next fit begins at its step."""

    class Poisons(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None) -> None:
            if epoch == 2:
                self.model.layers[0].kernel.assign(self.model.layers[0].kernel * math.nan)

    model = dense_model()
    with pytest.warns(UserWarning, match="Training was stopped because its loss is not a finite number"):
        train(model, runs, backup, Poisons(), keras.callbacks.TerminateOnNaN())

    kc.rollback(model, runs, runs[2])
    model.optimizer.learning_rate = 1e-4
    history = train(model, runs, backup)

    assert history.epoch == [1, 2, 3]
    assert all(math.isfinite(loss) for loss in history.history["loss"])


SCRIPT = """
import sys
import keras_ckpt as kc
from support.models import Interrupts, dense_model, fit
from test_rollback import train

runs, backup, *batches = sys.argv[1:]
model, runs = dense_model(), kc.CheckpointDirectory(runs)
kc.rollback(model, runs, 2)
print(train(model, runs, backup, *(Interrupts(int(each), RuntimeError()) for each in batches)).epoch)
"""


def test_the_same_script_resumes_from_its_backup_since_the_rollback(runs, backup, fork_server) -> None:
    """A script that was killed after its rollback loses nothing: it goes back once."""
    fit(dense_model(), kc.ModelCheckpoint(runs.path), epochs=3, batches=2)
    assert "RuntimeError" in fork_server.run(SCRIPT, runs.path, backup, 4).stderr
    assert kc.CheckpointDirectory(backup).latest().step == 4

    ended = fork_server.run(SCRIPT, runs.path, backup)

    assert "resuming from step 4" in ended.stdout
    assert ended.stdout.endswith("[1, 2, 3]\n")


def test_a_second_rollback_in_a_notebook_goes_back_again(crashed, backup) -> None:
    """Although the backup is of after the first rollback to the same step."""
    model = dense_model()
    kc.rollback(model, crashed, 2)
    with pytest.raises(RuntimeError):
        train(model, crashed, backup, Interrupts(4, RuntimeError()))

    kc.rollback(model, crashed, 2)

    assert train(model, crashed, backup, epochs=2).epoch == [1]


def test_a_rollback_that_was_followed_by_training_is_over(crashed, backup) -> None:
    """A later fit with the backup resumes from it, as after any crash."""
    model = dense_model()
    kc.rollback(model, crashed, 2)
    fit(model, kc.ModelCheckpoint(crashed.path), initial_epoch=1, epochs=2, batches=2)

    assert train(model, crashed, backup).epoch == [0, 1, 2, 3]


def test_the_backup_of_another_run_is_not_replaced(crashed, backup, tmp_path) -> None:
    """It may still be needed, so the fit is refused before its first batch."""
    other, model = kc.CheckpointDirectory(tmp_path / "other"), dense_model()
    fit(dense_model(), kc.ModelCheckpoint(other.path), batches=2)
    kc.rollback(model, other, 2)

    with pytest.raises(kc.DirectoryNotEmptyError, match=r"ckpt-6 is the backup of another run.*\.clear\(\)"):
        train(model, other, backup)

    assert kc.CheckpointDirectory(backup).latest().step == 6


def test_a_rollback_to_a_file_of_keras(tmp_path) -> None:
    """The files of a template are a run too."""
    template, model = tmp_path / "{epoch}.keras", dense_model()
    fit(model, kc.ModelCheckpoint(template), epochs=3, batches=2)

    kc.rollback(model, template, 4)
    fit(model, kc.ModelCheckpoint(template), initial_epoch=kc.initial_epoch(model), epochs=3, batches=2)

    assert [(record.name, record.step) for record in kc.CheckpointDirectory(template)] == [
        ("1.keras", 2), ("2.keras", 4), ("3.keras", 6),
    ]  # fmt: skip


def test_a_rollback_to_a_missing_checkpoint_changes_nothing(crashed, backup) -> None:
    """The error names the steps that there are. The backup is still resumed from."""
    model = dense_model()
    with pytest.raises(kc.CheckpointNotFoundError, match="5"):
        kc.rollback(model, crashed, 5)

    assert train(model, crashed, backup).epoch == [0, 1, 2, 3]
