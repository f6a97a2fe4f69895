"""Checkpoints of every backend, restored on the backend of this process.

`tests/checkpoints` has them; `docs/development.md` says how they are made.
"""

import functools
import pathlib
import shutil

import keras
import pytest

import keras_ckpt as kc
from keras_ckpt.model.backends import NAMES
from support import backends
from support.backends import MODELS, Trained, check

CHECKPOINTS = pathlib.Path(__file__).parent / "checkpoints"
each_checkpoint = pytest.mark.parametrize(
    ("backend", "name"), [(backend, name) for backend in NAMES for name in MODELS]
)
built = functools.cache(backends.built)
"""A model is restored as a whole, so that all tests of a process share it."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for archive in CHECKPOINTS.glob("*.zip"):
        shutil.unpack_archive(archive, folder / archive.stem)
    return folder


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")  # JAX has int32 for int64
@pytest.mark.sample(6)
@each_checkpoint
def test_a_checkpoint_of_each_backend_is_restored_to_the_bit(saved, backend, name) -> None:
    """Weights, optimizer, metrics, seeds and adapted layers have the saved values, and the model predicts the same."""
    trained = built(name)

    report = kc.restore(trained.model, saved / backend / name)

    assert (report.missing, report.unexpected, dict(report.mismatched)) == ((), (), {})
    check(trained, saved / backend / name)


@pytest.mark.parametrize("backend", NAMES)
def test_the_report_names_another_backend_that_saved_the_checkpoint(saved, backend) -> None:
    """A further training draws other random numbers, so it is no exact continuation."""
    report = kc.restore(built("bfloat16").model, saved / backend / "bfloat16")

    is_other = backend != keras.backend.backend()
    assert report.other_backend == (backend if is_other else None)
    assert (f"saved on the backend {backend}: random numbers differ" in str(report)) == is_other
    assert (f"saved on the backend {backend}: random numbers differ" in report._repr_html_()) == is_other


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="plain TensorFlow restores models of TensorFlow")
@pytest.mark.sample(6)
@each_checkpoint
def test_plain_tensorflow_restores_the_weights_of_each_backend(saved, backend, name) -> None:
    """It restores the optimizer too. It knows neither the seeds of Keras nor the metrics of `compile`."""
    import tensorflow as tf

    trained: Trained = built(name)
    path = saved / backend / name

    status = tf.train.Checkpoint(model=trained.model).restore(kc.CheckpointDirectory(path).latest().prefix)

    status.assert_existing_objects_matched()
    check(trained, path, parts=["weights"])


@pytest.mark.parametrize("backend", NAMES)
def test_a_loaded_model_of_another_backend_is_compiled_as_this_backend_compiles(saved, backend) -> None:
    """JAX compiles by XLA unless told otherwise. On PyTorch the same setting would start another compiler."""
    model = kc.load_model(saved / backend / "dense")

    assert model.jit_compile == built("dense").model.jit_compile


@pytest.mark.parametrize("backend", NAMES)
def test_keras_loads_and_compiles_an_export_of_a_checkpoint_of_each_backend(saved, tmp_path, backend) -> None:
    """Keras saves an optimizer on PyTorch as a class of that backend. The export names the class of all backends."""
    kc.export(saved / backend / "dense", tmp_path / "dense.keras")

    model = keras.models.load_model(tmp_path / "dense.keras")

    check(built("dense")._replace(model=model), saved / backend / "dense", parts=["weights"])
    assert type(model.optimizer).__name__ == type(built("dense").model.optimizer).__name__
