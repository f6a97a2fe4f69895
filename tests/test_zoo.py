"""Every layer of Keras with state, every optimizer and every metric: saved, and restored in another process."""

import fcntl
import os
import pickle

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from support import zoo

PROGRAM = """
import pathlib, sys, warnings
from support import zoo
warnings.simplefilter("error", UserWarning)
zoo.main(pathlib.Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def saved(fork_server, tmp_path_factory):
    """The directory where another process saved all models, and their outputs there. Test workers share it."""
    path = tmp_path_factory.getbasetemp()
    path = (path.parent if os.environ.get("PYTEST_XDIST_WORKER") else path) / "zoo"
    path.mkdir(exist_ok=True)
    with open(path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (path / "found.pickle").exists():
            ended = fork_server.run(PROGRAM, path)
            assert ended.returncode == 0, ended.stderr
    return path, pickle.loads((path / "found.pickle").read_bytes())


@pytest.mark.parametrize("name", zoo.LAYERS)
def test_a_restored_layer_computes_what_the_saved_layer_computed(saved, name) -> None:
    """The restored layer is newly built, and not adapted. It draws the same random numbers in training too."""
    path, found = saved
    model = zoo.model_of(name)

    report = kc.restore(model, path / "layers" / name)

    for after, before in zip(zoo.outputs_of(name, model), found[f"layer {name}"], strict=True):
        np.testing.assert_array_equal(after, before)
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})


@pytest.mark.parametrize("name", zoo.OPTIMIZERS)
def test_a_restored_optimizer_continues_as_the_saved_optimizer(saved, name) -> None:
    """Every variable of the optimizer is restored. The next epoch is the same to the bit."""
    path, found = saved
    variables, loss, predictions = found[f"optimizer {name}"]
    model = zoo.small(zoo.OPTIMIZERS[name]())

    kc.restore(model, kc.CheckpointDirectory(path / "optimizers" / name)[3])

    for after, before in zip(model.optimizer.variables, variables, strict=True):
        np.testing.assert_array_equal(after, before)
    assert zoo.train(model)["loss"] == [loss]
    np.testing.assert_array_equal(model.predict(zoo.X, verbose=0), predictions)


@pytest.mark.parametrize("name", zoo.metric_classes())
def test_a_restored_metric_has_the_result_of_the_saved_metric(saved, name) -> None:
    """The result is read before anything is measured."""
    path, found = saved
    model = zoo.measured(name)
    model.evaluate(zoo.X[:4], zoo.Y[:4].argmax(1) if name.startswith("Sparse") else zoo.Y[:4], verbose=0)
    model.reset_metrics()

    kc.restore(model, path / "metrics" / name)

    keras.tree.map_structure(np.testing.assert_array_equal, zoo.results(model), found[f"metric {name}"])


def test_every_layer_of_keras_is_in_the_zoo() -> None:
    """A layer that Keras adds must be listed as a layer with state or without."""
    with_state = {name.split()[0] for name in zoo.LAYERS}

    assert with_state | zoo.STATELESS | zoo.ABSTRACT | zoo.OF_OTHER_FRAMEWORKS == zoo.layer_classes().keys()
    assert not with_state & zoo.STATELESS


def test_every_optimizer_of_keras_is_in_the_zoo() -> None:
    """An optimizer that Keras adds must be listed."""
    assert {name.split()[0] for name in zoo.OPTIMIZERS} == zoo.optimizer_classes().keys() - {"Optimizer"}


def test_losses_of_keras_have_no_state() -> None:
    """So the zoo needs no losses. A user's losses may have variables."""
    for kind in vars(keras.losses).values():
        if isinstance(kind, type) and issubclass(kind, keras.losses.Loss) and kind is not keras.losses.Loss:
            loss = kind()
            assert not [each for each in vars(loss).values() if isinstance(each, keras.Variable)]
