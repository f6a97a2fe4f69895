"""The package on every backend: nothing imports TensorFlow on the others, and its own parts are refused in words."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import keras
import pytest

import keras_ckpt as kc
from keras_ckpt.model.backends import backend
from support.models import X, Y, dense_model, fit, save

ROOT = pathlib.Path(__file__).parents[1]
BACKEND = keras.backend.backend()
elsewhere = pytest.mark.skipif(BACKEND == "tensorflow", reason="on TensorFlow's backend these parts are there")

SCRIPT = """
import sys
import keras, numpy as np

def frameworks():
    return {name.partition(".")[0] for name in sys.modules} & {"tensorflow", "jax", "torch"}

before = frameworks()  # on PyTorch, Keras imports JAX too if it is installed
assert ("tensorflow" in before) == (keras.backend.backend() == "tensorflow")
import keras_ckpt as kc
for name in kc.__all__:
    if name != "CheckpointManager":
        getattr(kc, name)
path, x, y = sys.argv[1], np.ones((8, 4)), np.ones((8, 1))
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
model.compile(keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)), "mse")
data = kc.ResumableDataset(x, y, batch_size=2)
backup = kc.BackupAndRestore(f"{path}/backup", save_freq=2, data=data)
files = kc.ModelCheckpoint(f"{path}/best.keras", monitor="loss", save_best_only=True)
model.fit(data, epochs=2, verbose=0, callbacks=[kc.ModelCheckpoint(f"{path}/run"), files, backup])
kc.restore(model, f"{path}/run")
kc.load_model(f"{path}/run")
kc.evaluate(model, f"{path}/run", (x, y))
kc.average(f"{path}/run", best=2, monitor="loss", mode="min", into=f"{path}/average")
kc.export(f"{path}/run", f"{path}/model.safetensors")
print(kc.diff(model, f"{path}/run"), kc.CheckpointDirectory(f"{path}/run"))
assert frameworks() == before, frameworks()
"""


def run(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_training_loads_no_framework_but_that_of_its_backend(tmp_path) -> None:
    """Saves, restores, backups, data, files, exports and comparisons, also where the other frameworks are installed."""
    ended = run(SCRIPT, tmp_path)

    assert ended.returncode == 0, ended.stderr[-2000:]


@elsewhere
@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is None, reason="the layer needs TensorFlow")
def test_a_model_with_a_layer_that_needs_tensorflow_is_loaded_where_it_is_not_imported_yet(tmp_path) -> None:
    """Keras looks up words with TensorFlow on every backend."""
    words = keras.layers.StringLookup(vocabulary=["a", "b"])
    model = keras.Sequential([keras.Input((1,), dtype="string"), words, keras.layers.Embedding(3, 2)])
    model.compile("sgd", "mse")
    save(model, tmp_path)

    ended = run("import sys, keras_ckpt as kc; print(kc.load_model(sys.argv[1]).layers[0].vocabulary_size())", tmp_path)

    assert ended.stdout == "3\n", ended.stderr[-2000:]


@elsewhere
def test_the_manager_of_tensorflow_is_refused_on_another_backend() -> None:
    with pytest.raises(ImportError, match=rf"Received: the backend {BACKEND}\. Set KERAS_BACKEND=tensorflow"):
        _ = kc.CheckpointManager


@elsewhere
def test_a_saved_model_is_refused_on_another_backend(tmp_path) -> None:
    fit(dense_model(), kc.ModelCheckpoint(tmp_path / "run"))

    with pytest.raises(ValueError, match="in a process with KERAS_BACKEND=tensorflow"):
        kc.export(tmp_path / "run", tmp_path / "saved")

    assert not (tmp_path / "saved").exists()


@pytest.mark.skipif(BACKEND != "jax", reason="Keras's NumPy backend needs JAX")
def test_a_backend_that_trains_no_models_is_refused_and_directories_can_be_read(tmp_path) -> None:
    fit(dense_model(), kc.ModelCheckpoint(tmp_path / "run"))
    script = """
import sys, keras, keras_ckpt as kc
print(len(kc.CheckpointDirectory(sys.argv[1])), len(kc.load_variables(sys.argv[1])) > 5)
kc.ModelCheckpoint
"""

    ended = run(script, tmp_path / "run", KERAS_BACKEND="numpy")

    assert ended.stdout == "1 True\n"
    assert "models of Keras's backends tensorflow, jax and torch" in ended.stderr
    assert "Received: numpy, which trains no models" in ended.stderr


def test_each_backend_has_the_names_of_tensorflows_module() -> None:
    """The seam is one set of names. A module of a backend without a name would fail in a rare save."""
    tree = ast.parse((ROOT / "keras_ckpt/model/backends/tensorflow.py").read_text())
    defined = [each for each in tree.body if isinstance(each, ast.FunctionDef | ast.ClassDef)]
    constants = [each.targets[0] for each in tree.body if isinstance(each, ast.Assign)]
    names = {each.name for each in defined} | {each.id for each in constants if isinstance(each, ast.Name)}
    names = {name for name in names if not name.startswith("_")}

    assert {"Reader", "assign", "COPIES_AT_ONCE"} <= names
    assert names <= {*vars(backend)}


def test_the_backend_is_told_in_the_versions_of_each_sidecar(tmp_path) -> None:
    model = dense_model()
    model.fit(X[:4], Y[:4], verbose=0, callbacks=[kc.ModelCheckpoint(tmp_path / "run")])

    versions = kc.CheckpointDirectory(tmp_path / "run").latest().versions
    assert {*versions} & {"tensorflow", "jax", "torch"} == {BACKEND}
