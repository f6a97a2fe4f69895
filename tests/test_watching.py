"""A training with the callbacks, also a resumed training, ends bit for bit as the same training without them."""

from __future__ import annotations

import random

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
from keras_ckpt.model.parts import optimizers_of
from support import trainings, zoo
from support.models import Interrupts

pytestmark = pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning")  # the default of `fit`
OPTIMIZERS = {**zoo.OPTIMIZERS, **trainings.optimizer_options()}


def state(model: keras.Model) -> dict[str, np.ndarray]:
    """The variables of a model, its optimizers and its loss, and the next draws of the global generators."""
    optimizers = optimizers_of(model).values()
    variables = [*model.variables, *(each for optimizer in optimizers for each in optimizer.variables)]
    if isinstance(getattr(model, "loss", None), trainings.OwnLoss):
        variables.append(model.loss.seen)
    drawn = {
        "python": random.random(),
        "numpy": np.random.random(),
        "keras": keras.random.uniform(()),
        "tf": tf.random.uniform(()),
    }
    return {str(number): np.asarray(each) for number, each in enumerate([*variables, *drawn.values()])}


def trained(make, source, *callbacks, seed: int = 1, **options) -> tuple[dict[str, np.ndarray], dict[str, list[float]]]:
    """Trains a new model. Returns its state at the end, and the history."""
    keras.utils.set_random_seed(seed)
    model = make()
    arguments = {"epochs": trainings.EPOCHS, "verbose": 0, "callbacks": [*callbacks], **source(), **options}
    history = model.fit(**arguments).history
    return state(model), history


def callbacks(path) -> list[keras.callbacks.Callback]:
    """Both callbacks, which save in the middle of epochs too."""
    return [
        kc.ModelCheckpoint(path / "run", save_freq=3, keep=kc.LatestN(2)),
        kc.BackupAndRestore(path / "backup", save_freq=2),
    ]


def assert_same(one, other) -> None:
    """Asserts that two trainings ended equally to the bit, with equal histories."""
    (first, first_history), (second, second_history) = one, other
    assert first.keys() == second.keys()
    np.testing.assert_equal(second, first)
    np.testing.assert_equal(second_history, first_history)


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", trainings.MODELS)
def test_a_model_trains_with_the_callbacks_as_without_them(tmp_path, name) -> None:
    """The weights, the optimizers and all later random numbers are the same."""
    make, source = trainings.MODELS[name], trainings.SOURCES["arrays"]

    assert_same(trained(make, source), trained(make, source, *callbacks(tmp_path)))


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", trainings.SOURCES)
def test_data_is_read_with_the_callbacks_as_without_them(tmp_path, name) -> None:
    """Each epoch has the same batches in the same order."""
    make, source = trainings.MODELS["dropout and batch normalization"], trainings.SOURCES[name]

    assert_same(trained(make, source), trained(make, source, *callbacks(tmp_path)))


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["diffusion", "a momentum encoder", "mixed precision", "a loss with state"])
def test_a_traced_model_trains_with_the_callbacks_as_without_them(tmp_path, name) -> None:
    """The training step is a function of TensorFlow instead of eager Python."""

    def make() -> keras.Model:
        model = trainings.MODELS[name]()
        model.run_eagerly = False
        return model

    assert_same(
        trained(make, trainings.SOURCES["arrays"]), trained(make, trainings.SOURCES["arrays"], *callbacks(tmp_path))
    )


def resumed(path, make, source, batches: int, **options):
    """Interrupts a training by an error after so many batches, and resumes it. Returns as `trained` does."""
    data = source()["x"]
    first = kc.BackupAndRestore(path, save_freq=2, data=data)
    with pytest.raises(RuntimeError, match="interrupted"):
        trained(make, lambda: {"x": data}, Interrupts(batches, RuntimeError("interrupted")), first, **options)
    data = source()["x"]
    second = kc.BackupAndRestore(path, save_freq=2, data=data)
    return trained(make, lambda: {"x": data}, second, seed=77, **options)


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", trainings.MODELS)
def test_a_resumed_model_ends_as_an_uninterrupted_model(tmp_path, name) -> None:
    """The second training begins with a new model that has other initial values."""
    make = trainings.MODELS[name]

    assert_same(trained(make, trainings.wrapped), resumed(tmp_path, make, trainings.wrapped, 6))


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_ends_as_an_uninterrupted_optimizer(tmp_path, name) -> None:
    """The optimizer's variables are the same after an interruption within an epoch."""

    def make() -> keras.Model:
        return trainings.compiled(trainings.network(), OPTIMIZERS[name]())

    assert_same(trained(make, trainings.wrapped), resumed(tmp_path, make, trainings.wrapped, 5))


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", trainings.MODELS)
def test_a_restored_model_trains_as_the_saved_model(tmp_path, name) -> None:
    """`kc.restore` restores the checkpoint into a new compiled model."""
    make, source = trainings.MODELS[name], trainings.SOURCES["arrays in order"]
    keras.utils.set_random_seed(1)
    model = make()
    model.fit(**source(), verbose=0)
    zoo.save(model, tmp_path)
    keras.utils.set_random_seed(2)
    restored = make()
    if not restored.built:
        restored(trainings.X[:1])

    kc.restore(restored, tmp_path)
    ends = []
    for each in (model, restored):
        keras.utils.set_random_seed(3)
        each.fit(**source(), verbose=0)
        ends.append(state(each))

    np.testing.assert_equal(ends[1], ends[0])
