"""`export` through the model: a SavedModel, and an ONNX file."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import keras_ckpt as kc
from keras_ckpt.cli import main
from support import keras_zoo
from support.models import X, dense_model, fit, save

HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "tf2onnx", "onnxruntime"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[keras.Model, kc.CheckpointRecord]:
    model, path = dense_model(), tmp_path_factory.mktemp("trained")
    fit(model, kc.ModelCheckpoint(path))
    return model, kc.CheckpointDirectory(path).latest()


@pytest.mark.parametrize("name", ["saved", "saved.v1/"])
def test_a_path_without_an_ending_gets_a_saved_model(trained, tmp_path, capfd, name) -> None:
    """A path that ends in a slash may have an ending. Nothing is printed to the output."""
    model, record = trained

    kc.export(record, f"{tmp_path}/{name}")

    loaded = tf.saved_model.load(f"{tmp_path}/{name}")
    np.testing.assert_allclose(loaded.serve(X), model.predict(X, verbose=0), rtol=1e-6)
    assert os.listdir(tmp_path) == [name.rstrip("/")]
    assert not capfd.readouterr().out


def test_no_log_names_the_private_folder_of_an_export(trained, tmp_path, caplog) -> None:
    """TensorFlow logs the folder in a notebook, where its level is INFO. After the export, the folder is gone."""
    with caplog.at_level(logging.INFO, "tensorflow"):
        kc.export(trained[1], tmp_path / "saved")

    assert str(tmp_path) not in caplog.text


def test_a_subclassed_model_is_exported(tmp_path) -> None:
    """Keras exports a model only after a call."""
    model = keras_zoo.made("subclassed")
    record = save(model, tmp_path / "run")

    kc.export(record, tmp_path / "saved")

    loaded = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.serve(X[:2]), model(X[:2]), rtol=1e-6)


class Doubles(keras.layers.Layer):
    """A layer that is not registered with Keras."""

    def call(self, x):
        return 2 * x


class TestClassesOfTheUser:
    """A model with a class that is neither Keras's nor registered is built with `custom_objects`."""

    @pytest.fixture(params=["run", "file.keras"])
    def saved(self, tmp_path, request) -> tuple[keras.Model, str]:
        """A model, and the path of its checkpoint or its file of Keras."""
        model = keras.Sequential([keras.Input((4,)), Doubles(), keras.layers.Dense(1)])
        model.compile("sgd", "mse", run_eagerly=True)
        fit(model, kc.ModelCheckpoint(tmp_path / request.param))
        return model, str(tmp_path / request.param)

    def test_an_export_takes_custom_objects(self, saved, tmp_path) -> None:
        model, path = saved

        kc.export(path, tmp_path / "saved", custom_objects={"Doubles": Doubles})

        loaded = tf.saved_model.load(tmp_path / "saved")
        np.testing.assert_allclose(loaded.serve(X), model.predict(X, verbose=0), rtol=1e-6)

    def test_the_error_of_the_command_names_the_argument_to_type_in_python(self, saved, tmp_path) -> None:
        """A shell cannot give a class."""
        step = [] if saved[1].endswith(".keras") else ["latest"]

        result = CliRunner().invoke(main, ["export", saved[1], *step, f"{tmp_path}/saved"])

        assert result.exit_code == 1
        advice = re.search(r"In Python, .*pass (custom_objects={.*}) to .* or (keras_ckpt.export)\.", result.output)
        eval(f"{advice[2]}({saved[1]!r}, '{tmp_path}/saved', {advice[1]})", {"keras_ckpt": kc, "Doubles": Doubles})
        assert (tmp_path / "saved" / "saved_model.pb").exists()


@pytest.mark.parametrize("before", ["file", "empty folder", "folder"])
def test_a_saved_model_replaces_nothing(trained, tmp_path, before) -> None:
    path = tmp_path / "saved"
    if before == "file":
        path.write_bytes(b"before")
    else:
        (path / "inner" if before == "folder" else path).mkdir(parents=True)

    with pytest.raises(FileExistsError, match="A SavedModel replaces nothing"):
        kc.export(trained[1], path)

    assert os.listdir(tmp_path) == ["saved"]
    assert path.is_file() == (before == "file")


def test_a_model_that_cannot_be_built_leaves_nothing(tmp_path) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x + 1)])
    record = save(model, tmp_path / "run")

    with pytest.raises(kc.CannotBuildError, match="contains a lambda"):
        kc.export(record, tmp_path / "saved")

    assert os.listdir(tmp_path) == ["run"]


def test_an_error_of_keras_leaves_nothing(trained, tmp_path, monkeypatch) -> None:
    """It comes after the first files are written."""

    def fail(model, path, **options) -> None:
        os.makedirs(f"{path}/variables")
        raise RuntimeError("in the middle")

    monkeypatch.setattr(keras.Model, "export", fail)

    with pytest.raises(RuntimeError, match="in the middle"):
        kc.export(trained[1], tmp_path / "saved")

    assert os.listdir(tmp_path) == []


def test_missing_packages_for_onnx_are_named_before_the_model_is_built(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tf2onnx", None)

    with pytest.raises(ImportError, match="pip install onnx tf2onnx"):
        kc.export(tmp_path / "missing", tmp_path / "model.onnx")

    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not HAS_ONNX, reason="pip install keras-ckpt[onnx] onnxruntime")
@pytest.mark.filterwarnings("ignore")  # of tf2onnx, and of Keras about it
def test_an_onnx_file_predicts_as_its_model(trained, tmp_path) -> None:
    """It replaces a file."""
    import onnxruntime

    model, record = trained
    (tmp_path / "model.onnx").write_bytes(b"before")

    kc.export(record, tmp_path / "model.onnx")

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: X})
    np.testing.assert_allclose(found, model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    assert os.listdir(tmp_path) == ["model.onnx"]


@pytest.mark.skipif(not HAS_ONNX, reason="pip install keras-ckpt[onnx] onnxruntime")
@pytest.mark.filterwarnings("ignore")  # of tf2onnx, and of Keras about it
def test_a_model_with_operations_that_onnx_lacks_is_refused(tmp_path) -> None:
    """The package that writes the file only logs them."""
    record = save(keras_zoo.made("StringLookup"), tmp_path / "run")

    with pytest.raises(ValueError, match=r"ONNX cannot hold the model: .*LookupTable.* Export a SavedModel"):
        kc.export(record, tmp_path / "model.onnx")

    assert os.listdir(tmp_path) == ["run"]
