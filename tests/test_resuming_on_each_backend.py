"""A resume on the backend of this process: values inside of `fit`, held moments, generators, another backend."""

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.resume import fit_state, random_state
from keras_ckpt.resume.callback_states import CallbackStates
from support.models import X, Y, dense_model, same

BACKEND = keras.backend.backend()


def model_with_averages() -> keras.Model:
    """A model that draws random numbers, and whose optimizer averages the weights."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.9), "mse", run_eagerly=BACKEND != "jax")
    return model


def train(backup: kc.BackupAndRestore, *callbacks: keras.callbacks.Callback, epochs: int = 3) -> keras.Model:
    """Trains on ten shuffled batches an epoch."""
    model = model_with_averages()
    model.fit(
        backup.data,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[backup, *callbacks],
        validation_data=(X, Y),
        validation_batch_size=8,
    )
    return model


def backup_in(path, save_freq=3) -> kc.BackupAndRestore:
    return kc.BackupAndRestore(path, save_freq, data=kc.ResumableDataset(X, Y, batch_size=4, shuffle=True, seed=1))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> keras.Model:
    """The model of an undisturbed training."""
    return train(backup_in(tmp_path_factory.mktemp("whole")))


class Fails(keras.callbacks.Callback):
    """A callback that raises an error in a method, at one of its calls."""

    def __init__(self, where: str, which: int) -> None:
        super().__init__()
        setattr(self, where, self._fail)
        self._left = which

    def get_state(self) -> None:
        """There is no state."""

    def set_state(self, state: None) -> None:
        """There is no state."""

    def _fail(self, *_: object, **__: object) -> None:
        self._left -= 1
        if self._left == 0:
            raise RuntimeError("injected")


class Spoils(keras.callbacks.Callback):
    """A callback that changes the weights in place for a validation, and restores them afterwards."""

    def on_test_begin(self, logs=None) -> None:
        self.before = self.model.get_weights()
        self.model.set_weights([each + 1 for each in self.before])

    def on_test_end(self, logs=None) -> None:
        self.model.set_weights(self.before)

    def get_state(self) -> None:
        """There is no state."""

    def set_state(self, state: None) -> None:
        """There is no state."""


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("where", "which", "step"),
    [
        ("on_train_batch_begin", 14, 13),
        ("on_test_batch_begin", 2, 10),
        ("on_epoch_end", 2, 20),
        ("on_epoch_begin", 3, 20),
    ],
)
def test_an_error_is_followed_by_a_backup_of_the_last_whole_state(tmp_path, whole, where, which, step) -> None:
    """On JAX, `fit` replaces the weights by their averages after the error. The backup has the weights before."""
    with pytest.raises(RuntimeError, match="injected"), backup_in(tmp_path / "backup", save_freq=100) as backup:
        train(backup, Fails(where, which))
    assert kc.CheckpointDirectory(tmp_path / "backup").latest().step == step

    assert same(whole, train(backup_in(tmp_path / "backup")))


def test_a_callback_that_changes_weights_for_a_validation_does_not_change_the_held_state(tmp_path, whole) -> None:
    """The state is held before the validation. Another callback saves the model meanwhile."""

    class Saves(keras.callbacks.Callback):
        def on_test_begin(self, logs=None) -> None:
            checkpoint.on_epoch_end(0, {})

    checkpoint = kc.ModelCheckpoint(tmp_path / "checkpoints", keep=None)

    with pytest.raises(RuntimeError, match="injected"), backup_in(tmp_path / "backup", save_freq=100) as backup:
        train(backup, checkpoint, Spoils(), Saves(), Fails("on_test_batch_end", 7))
    assert kc.CheckpointDirectory(tmp_path / "backup").latest().step == 20

    assert same(whole, train(backup_in(tmp_path / "backup"), Spoils()))


def test_a_restart_with_nothing_left_but_the_validation_returns_the_logs_of_the_last_batch(tmp_path) -> None:
    class Notes(keras.callbacks.History):
        pass

    whole = Notes()
    train(backup_in(tmp_path / "whole"), whole, epochs=2)
    with pytest.raises(RuntimeError, match="injected"), backup_in(tmp_path / "backup", save_freq=100) as backup:
        train(backup, Notes(), Fails("on_test_batch_begin", 3), epochs=2)

    again = Notes()
    train(backup_in(tmp_path / "backup"), again, epochs=2)

    assert again.history == whole.history


def test_a_callback_may_hold_variables_of_the_model_and_its_own(tmp_path) -> None:
    """Within an epoch on JAX, the variables of the model have no values of their own."""

    class Holds(keras.callbacks.Callback):
        def on_train_begin(self, logs=None) -> None:
            self.rate = self.model.optimizer.learning_rate
            self.kernel = self.model.layers[0].kernel
            self.large = keras.Variable(np.zeros(40_000, "float32"))
            self.mean = keras.metrics.Mean()
            self.states = CallbackStates([self], self.model)

        def on_train_batch_end(self, batch, logs=None) -> None:
            self.large.assign_add(np.ones(40_000, "float32"))
            self.mean.update_state(batch)
            taken.append(self.states.take().structure)
            if batch == 3:
                _ = self.model  # Keras gives the variables of the model their values
                kernels.append(np.array(keras.ops.convert_to_numpy(self.kernel)))

    def content(structure):
        places = dict(dict(structure["dict"])["Holds"]["dict"])
        return {name: each.get("ndarray") for name, each in places.items() if isinstance(each, dict)}

    taken, kernels = [], []
    model = dense_model(run_eagerly=False)
    model.fit(X[:16], Y[:16], batch_size=4, verbose=0, callbacks=[Holds()])

    last = content(taken[-1])
    assert np.array_equal(last["kernel"].array(), kernels[0])
    assert {"large", "kernel"} <= last.keys()


def test_a_backup_of_each_batch_does_not_give_the_variables_their_values(tmp_path) -> None:
    """On JAX, `fit` holds the values within an epoch. To give them to the variables and back takes time."""

    class Notes(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            if batch:
                synced.append(getattr(self._model, "_jax_state_synced", False))

    synced = []
    train(backup_in(tmp_path / "backup", save_freq=1), Notes(), epochs=2)

    assert synced == [False] * 18


def test_the_generators_of_the_backend_continue_with_the_same_numbers() -> None:
    """Dropout without a seed draws from PyTorch's generator on that backend."""
    dropout = keras.layers.Dropout(0.5)
    ones = np.ones((4, 50), "float32")
    dropout(ones, training=True)
    seeds = [each.numpy() for each in dropout.variables]
    state = random_state.get_state()

    def drawn() -> tuple[object, ...]:
        return (
            keras.ops.convert_to_numpy(dropout(ones, training=True)).tolist(),
            keras.ops.convert_to_numpy(keras.random.uniform((3,))).tolist(),
            np.random.random(),
        )

    first, second = drawn(), drawn()
    random_state.set_state(state)
    for variable, value in zip(dropout.variables, seeds, strict=True):
        variable.assign(value)

    assert first != second
    assert drawn() == first


def test_a_backup_of_another_backend_is_restored_with_a_warning(tmp_path, monkeypatch) -> None:
    """The state of the run is restored, and the steps continue. The random numbers differ, so the end does too."""
    settings = fit_state.settings
    monkeypatch.setattr(fit_state, "settings", lambda model: {**settings(model), "backend": "another"})
    with pytest.raises(RuntimeError, match="injected"), backup_in(tmp_path / "backup") as backup:
        train(backup, Fails("on_epoch_end", 2))
    monkeypatch.undo()

    history = keras.callbacks.History()
    with pytest.warns(UserWarning, match=f"backend another, and this fit.. is on {BACKEND}.*KERAS_BACKEND=another"):
        train(backup_in(tmp_path / "backup"), history)

    assert history.epoch == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.skipif(BACKEND == "torch", reason="PyTorch has one batch in an execution")
def test_the_batches_of_an_execution_are_counted_where_the_data_has_no_known_length(tmp_path) -> None:
    """The optimizer has counted them."""

    def batches():
        for place in range(8):
            yield X[4 * place : 4 * place + 4], Y[4 * place : 4 * place + 4]

    model = dense_model(run_eagerly=False, steps_per_execution=4)
    checkpoint = kc.ModelCheckpoint(tmp_path, save_freq=4, keep=None)
    model.fit(batches(), verbose=0, shuffle=False, callbacks=[checkpoint])

    assert [each.step for each in checkpoint.directory] == [4, 8]


def test_validation_does_not_wait_for_the_end_of_each_batch(tmp_path) -> None:
    """Keras dispatches the ends of batches to a thread, unless a callback has a method for them."""
    plain = keras.callbacks.CallbackList([])
    ours = keras.callbacks.CallbackList([kc.BackupAndRestore(tmp_path / "backup"), kc.ModelCheckpoint(tmp_path)])

    assert (ours._async_test, ours._async_predict) == (plain._async_test, plain._async_predict)
