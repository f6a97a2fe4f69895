"""`initial_epoch`, and the line of a `fit` that does not continue the epochs of a restored run."""

import keras
import pytest

import keras_ckpt as kc
from support.models import dense_model, fit

LINE = "fit counts its epochs from 1, and the restored run has 2. To continue its count: fit(initial_epoch="


@pytest.fixture
def runs(tmp_path) -> kc.CheckpointDirectory:
    """A run of two epochs."""
    runs = kc.CheckpointDirectory(tmp_path / "run")
    fit(dense_model(), kc.ModelCheckpoint(runs.path), epochs=2)
    return runs


def restored(runs: kc.CheckpointDirectory) -> keras.Model:
    model = dense_model()
    kc.restore(model, runs)
    return model


def test_initial_epoch_is_the_number_of_completed_epochs(runs) -> None:
    """A model without a run has completed none."""
    assert kc.initial_epoch(dense_model()) == 0
    model = restored(runs)
    assert kc.initial_epoch(model) == 2

    history = fit(model, kc.ModelCheckpoint(runs.path), initial_epoch=kc.initial_epoch(model), epochs=3)

    assert history.epoch == [2]
    assert kc.initial_epoch(model) == 3


def test_a_fit_after_a_restore_says_where_its_epochs_count_from(runs, capsys) -> None:
    """Where `fit` prints its progress."""
    fit(restored(runs), kc.ModelCheckpoint(runs.path), verbose=2)

    assert LINE in capsys.readouterr().out


def test_a_silent_fit_logs_where_its_epochs_count_from(runs, capsys, caplog) -> None:
    with caplog.at_level("INFO", "keras_ckpt"):
        fit(restored(runs), kc.ModelCheckpoint(runs.path))

    assert any(message.startswith(LINE) for message in caplog.messages)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("case", ["initial_epoch", "a new model", "a second fit"])
def test_a_fit_whose_epochs_are_clear_says_nothing(runs, capsys, tmp_path, case) -> None:
    """It continues the count, or continues in the process that counts."""
    model, path, options = restored(runs), runs.path, {}
    match case:
        case "initial_epoch":
            options = {"initial_epoch": 2, "epochs": 3}
        case "a new model":
            model, path = dense_model(), tmp_path / "new"
        case "a second fit":
            fit(model, kc.ModelCheckpoint(path))

    fit(model, kc.ModelCheckpoint(path), verbose=2, **options)

    assert "fit counts its epochs" not in capsys.readouterr().out
