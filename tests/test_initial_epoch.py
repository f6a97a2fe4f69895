"""`initial_epoch`, and the line of a `fit` that does not continue the epochs of a restored run."""

import keras
import pytest

import keras_ckpt as kc
from support.models import dense_model, fit

LINE = (
    "fit counts its epochs from 1, and the restored run has 2. To continue its count, after keras_ckpt.restore or "
    "keras_ckpt.load_model: fit(initial_epoch=keras_ckpt.initial_epoch(model), epochs=...), where epochs is the last "
    "of the run."
)


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


@pytest.mark.parametrize("load", [restored, kc.load_model])
def test_a_fit_after_a_restore_says_once_where_its_epochs_count_from(runs, tmp_path, capsys, load) -> None:
    """Where `fit` prints its progress, however many callbacks save."""
    fit(load(runs), kc.ModelCheckpoint(runs.path), kc.ModelCheckpoint(tmp_path / "other"), verbose=2)

    assert capsys.readouterr().out.count(LINE) == 1


@pytest.mark.parametrize("load", [keras.models.load_model, kc.load_model])
def test_a_fit_of_a_model_from_a_file_says_once_where_its_epochs_count_from(tmp_path, capsys, load) -> None:
    """Keras loads no run with a model. The callback of the file recognizes the weights when `fit` begins."""
    path = tmp_path / "last.keras"
    fit(dense_model(), kc.ModelCheckpoint(path), epochs=2)
    model = load(path)
    assert kc.initial_epoch(model) == (2 if load is kc.load_model else 0)

    fit(model, kc.ModelCheckpoint(path), kc.ModelCheckpoint(tmp_path / "other.keras"), verbose=2)

    assert capsys.readouterr().out.count(LINE) == 1
    assert kc.initial_epoch(model) == 3


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
