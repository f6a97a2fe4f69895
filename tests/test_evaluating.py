"""`evaluate`: each checkpoint of a run is measured on further data, and its sidecar gets the metrics."""

import pathlib
import shutil

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.model.evaluating import _modes
from keras_ckpt.store.record import CheckpointRecord
from support.frameworks import tf
from support.models import X, Y, dense_model, fit, same, values, warned

DATA = X[20:], Y[20:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[keras.Model, pathlib.Path]:
    """A model, and the directory of its run of three checkpoints."""
    model, path = dense_model(metrics=["mae"]), tmp_path_factory.mktemp("trained") / "run"
    fit(model, kc.ModelCheckpoint(path), epochs=3, batches=2)
    return model, path


@pytest.fixture
def model(runs, trained) -> keras.Model:
    """The model of the run, after its last checkpoint. The run is a copy, for one test."""
    model, path = trained
    shutil.copytree(path, runs.path)
    kc.restore(model, runs[6])
    return model


def measured(runs: kc.CheckpointDirectory) -> list[int]:
    return [record.step for record in runs if "test_loss" in record.metrics]


class CountsTests(keras.callbacks.Callback):
    """Counts the evaluations."""

    tests = 0

    def on_test_end(self, logs=None) -> None:
        self.tests += 1


class AtTheEndOf(keras.callbacks.Callback):
    """Calls a function at the end of an evaluation, given its number from 1."""

    def __init__(self, number: int, function) -> None:
        super().__init__()
        self.left = number
        self.function = function

    def on_test_end(self, logs=None) -> None:
        self.left -= 1
        if self.left == 0:
            self.function()


def test_each_checkpoint_gets_the_metrics_of_its_own_weights(runs, model) -> None:
    """They rank like any other metric. The result has them by step."""
    added = runs.evaluate(model, DATA, batch_size=4)

    assert list(added) == [2, 4, 6]
    for step, metrics in added.items():
        other = dense_model(metrics=["mae"])
        kc.restore(other, runs[step])
        own = other.evaluate(*DATA, batch_size=4, verbose=0, return_dict=True)
        assert metrics == pytest.approx({"test_loss": own["loss"], "test_mae": own["mae"]})
        assert {name: value for name, value in runs[step].metrics.items() if name in metrics} == metrics
    assert runs.best("test_mae").step == min(added, key=lambda step: added[step]["test_mae"])


def test_the_mode_of_a_measured_metric_is_that_of_the_same_metric_in_the_sidecar(runs, model) -> None:
    """Training knew a mode of `loss` and `mae`, and of its monitor `val_loss`. For another metric `best` asks."""

    def own(y_true, y_pred):
        return keras.ops.mean(y_pred)

    added = runs.evaluate(dense_model(metrics=["mae", own]), DATA)

    assert runs.latest().modes == {"loss": "min", "mae": "min", "test_loss": "min", "test_mae": "min"}
    assert runs.best("test_loss").step == min(added, key=lambda step: added[step]["test_loss"])
    with pytest.raises(kc.MonitorError, match="'test_own' is better: give the mode"):
        runs.best("test_own")


def test_the_mode_of_a_measured_metric_may_be_known_from_validation_alone() -> None:
    """Such as that of the monitor, which the user gave."""
    record = CheckpointRecord(sequence=1, step=1, monitor="val_own", mode="max", modes={"val_mae": "min"})

    assert _modes(record, "test_", ["test_own", "test_mae", "test_loss"]) == {"test_own": "max", "test_mae": "min"}


def test_the_model_has_its_own_state_afterwards(runs, model) -> None:
    """Its run continues where it was, and the optimizer has its state."""
    before = dense_model(metrics=["mae"])
    kc.restore(before, runs[6])

    kc.evaluate(model, runs.path, DATA)

    assert same(model, before)
    fit(model, kc.ModelCheckpoint(runs.path), initial_epoch=kc.initial_epoch(model), epochs=4, batches=2)
    assert [(record.step, record.epoch) for record in runs] == [(2, 1), (4, 2), (6, 3), (8, 4)]


def test_a_model_of_another_run_stays_in_its_run(runs, model, tmp_path) -> None:
    """Nothing of the evaluated run remains in it."""
    other = dense_model(metrics=["mae"])
    fit(other, kc.ModelCheckpoint(tmp_path / "other"), batches=1)
    before = values(other)

    runs.evaluate(other, DATA)

    assert all(map(np.array_equal, values(other), before))
    fit(other, kc.ModelCheckpoint(tmp_path / "other"), batches=1)
    assert len(kc.CheckpointDirectory(tmp_path / "other")) == 2


def test_a_checkpoint_that_has_the_metrics_is_skipped(runs, model) -> None:
    """Its metrics are returned. Another prefix measures it again. The next call measures a later checkpoint."""
    first, counts = runs.evaluate(model, DATA), CountsTests()
    assert list(first) == [2, 4, 6]
    fit(model, kc.ModelCheckpoint(runs.path), batches=2)

    second = runs.evaluate(model, DATA, callbacks=[counts])
    assert (list(second), counts.tests) == ([2, 4, 6, 8], 1)
    assert {step: second[step] for step in first} == first
    assert (runs.evaluate(model, DATA, callbacks=[counts]), counts.tests) == (second, 1)
    assert list(runs.evaluate(model, DATA, prefix="again_", callbacks=[counts])) == [2, 4, 6, 8]
    assert counts.tests == 5


def test_interrupted_work_is_kept(runs, model) -> None:
    """After Ctrl-C the model has its state, and the next call measures the rest."""
    before = values(model)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.evaluate(model, DATA, callbacks=[AtTheEndOf(2, interrupt)])

    assert measured(runs) == [2]
    assert all(map(np.array_equal, values(model), before))
    counts = CountsTests()
    assert list(runs.evaluate(model, DATA, callbacks=[counts])) == [2, 4, 6]
    assert counts.tests == 2


def test_a_checkpoint_that_is_pruned_or_damaged_meanwhile_is_skipped_with_a_warning(runs, model) -> None:
    """The others are measured."""

    def meanwhile() -> None:
        path = pathlib.Path(runs[4].paths[-1])
        path.write_bytes(bytes(path.stat().st_size))
        for path in runs[6].paths:
            pathlib.Path(path).unlink()

    with pytest.warns(UserWarning, match="is not evaluated") as caught:
        added = runs.evaluate(model, DATA, callbacks=[AtTheEndOf(1, meanwhile)])

    assert list(added) == [2]
    assert ["ckpt-4" in warned(caught)[0], "ckpt-6" in warned(caught)[1]] == [True, True]
    pathlib.Path(runs[4].paths[-1]).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"ckpt-4 is not evaluated: it is damaged\. "):
        assert list(runs.evaluate(model, DATA)) == [2]


def test_data_that_does_not_fit_is_an_error_that_changes_nothing(runs, model) -> None:
    """The error names the checkpoint. The sidecars are as they were, and so is the model."""
    before, sidecars = values(model), [pathlib.Path(record.paths[0]).read_bytes() for record in runs]

    with pytest.raises(
        ValueError, match=r"ckpt-2 could not be evaluated: ValueError: .* Give evaluate\(\) data as for fit"
    ):
        runs.evaluate(model, (X[:, :3], Y))
    with pytest.raises(ValueError, match=r"could not be evaluated: .*'stepz'"):
        runs.evaluate(model, DATA, stepz=3)

    assert [pathlib.Path(record.paths[0]).read_bytes() for record in runs] == sidecars
    assert all(map(np.array_equal, values(model), before))
    assert len(runs.evaluate(model, DATA)) == 3


def test_a_model_that_does_not_fit_is_an_error_that_changes_nothing(runs, model) -> None:
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    other.compile("adam", "mse")
    before = values(other)

    with pytest.raises(kc.MismatchError, match="does not fit the model"):
        runs.evaluate(other, DATA)

    assert all(map(np.array_equal, values(other), before))
    assert measured(runs) == []


def test_a_vocabulary_of_the_model_is_its_own_afterwards(runs) -> None:
    """In its traced functions too."""
    words, numbers = tf.constant([["a"], ["b"]]), tf.constant([[1.0], [2.0]])

    def build(text) -> keras.Model:
        lookup = keras.layers.StringLookup(output_mode="one_hot")
        lookup.adapt(text)
        model = keras.Sequential([keras.Input((1,), dtype="string"), lookup, keras.layers.Dense(1)])
        model.compile("adam", "mse")
        return model

    build(["a", "a", "b"]).fit(words, numbers, verbose=0, callbacks=[kc.ModelCheckpoint(runs.path)])
    model = build(["b", "b", "a"])
    before = model.evaluate(words, numbers, verbose=0)

    assert len(runs.evaluate(model, (words, numbers))) == 1

    assert model.layers[0].get_vocabulary() == ["[UNK]", "b", "a"]
    assert model.evaluate(words, numbers, verbose=0) == before


def test_files_of_keras_are_evaluated_too(tmp_path) -> None:
    template = tmp_path / "{epoch}.keras"
    model = dense_model()
    fit(model, kc.ModelCheckpoint(template), epochs=2, batches=1)
    runs = kc.CheckpointDirectory(template)

    runs.evaluate(model, DATA)

    assert measured(runs) == [1, 2]


def test_a_terminal_shows_a_progress_bar(runs, model, capsys, monkeypatch) -> None:
    """A pipe shows nothing."""
    runs.evaluate(model, DATA)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")

    runs.evaluate(model, DATA, prefix="again_")

    shown = capsys.readouterr().err
    assert "evaluating" in shown
    assert "3/3" in shown


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": iter([DATA])}, TypeError, "reads the data once for each checkpoint"),
        ({"data": None}, TypeError, "Received: data=None"),
        ({"prefix": ""}, TypeError, "expected a prefix of names"),
        ({"model": "model.keras"}, TypeError, r"expected a Keras model\. Received: 'model.keras'"),
        ({"model": dense_model(compiled=False)}, ValueError, "is not compiled"),
    ],
)
def test_a_wrong_argument_is_refused(runs, change, error, message) -> None:
    """Before a checkpoint is read."""
    with pytest.raises(error, match=message):
        runs.evaluate(**{"model": dense_model(), "data": DATA, **change})


def test_an_empty_directory_adds_nothing(tmp_path) -> None:
    assert kc.evaluate(dense_model(), tmp_path / "nothing", DATA) == {}
