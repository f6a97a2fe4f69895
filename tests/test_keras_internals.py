"""Private names of Keras: each test names the function whose private name has changed in Keras."""

import inspect
import io
import json
import sys

import h5py
import keras
import numpy as np
import pytest
from keras.src.saving import saving_lib

import keras_ckpt as kc
from keras_ckpt.model import keras_internals as internals
from support.frameworks import tf
from support.models import X, Y, dense_model, fit


@pytest.fixture
def model() -> keras.Model:
    model = dense_model(metrics=["mae", keras.metrics.AUC(name="auc")], weighted_metrics=["mse"], loss_weights=[2.0])
    model.optimizer.build(model.trainable_variables)
    return model


def test_layers_of_has_the_layers_inside_layers() -> None:
    """`Bidirectional` is a layer of layers, and not a model."""
    layer = keras.layers.Bidirectional(keras.layers.LSTM(2))
    model = keras.Sequential([keras.Input((3, 2)), layer])

    found = internals.layers_of(model)

    assert found[0] is model
    assert all(any(each is inner for each in found) for inner in (layer, layer.forward_layer, layer.backward_layer))


def test_trained_by_has_the_variables_in_the_order_of_the_optimizer(model) -> None:
    assert internals.trained_by(model.optimizer) == model.trainable_variables
    assert internals.trained_by(keras.optimizers.SGD()) == []


def test_value_of_is_the_value_of_a_variable_in_the_backend(model) -> None:
    assert all(internals.value_of(variable) is variable.value for variable in model.variables)
    variable = tf.Variable(1.0)
    assert internals.value_of(variable) is variable


def test_set_value_changes_a_variable(model) -> None:
    """The private name is `_direct_assign`."""
    variable = model.variables[0]

    internals.set_value(variable, keras.ops.ones(variable.shape))

    assert np.array_equal(keras.ops.convert_to_numpy(variable), np.ones(variable.shape))


def test_model_of_is_the_model_of_a_callback(model) -> None:
    """The private name is `Callback._model`."""
    callback = keras.callbacks.Callback()
    callback.set_model(model)

    assert internals.model_of(callback) is model


def test_new_variables_are_checked_before_they_take_memory() -> None:
    """The private name is `Variable._initialize_with_initializer`."""
    seen = []

    def check(shape: tuple[int, ...], dtype: str) -> None:
        seen.append((shape, dtype))
        if shape[0] > 5:
            raise MemoryError

    with internals.new_variables_checked(check):
        layer = keras.layers.Dense(3)
        layer.build((None, 4))
        with pytest.raises(MemoryError):
            keras.layers.Dense(3).build((None, 10**12))

    assert seen == [((4, 3), "float32"), ((3,), "float32"), ((10**12, 3), "float32")]
    assert layer.kernel.shape == (4, 3)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="only on JAX does fit hold the values of variables")
def test_the_state_of_a_fit_on_jax_has_the_value_of_each_variable(model) -> None:
    """The private names are `_jax_state` and `_jax_state_synced`."""
    found = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            state, places = internals.state_of_jax_fit(self._model), internals.places_in_jax_fit(self._model)
            held = {number: np.asarray(state[part][place]) for number, (part, place) in places.items()}
            variables = [*self.model.variables, *self.model.optimizer.variables]  # with the values of fit
            found.extend(np.array_equal(held[id(each)], each) for each in variables)
            found.append(internals.state_of_jax_fit(self._model) is None)

    model.fit(
        np.ones((4, *model.input_shape[1:])), np.ones((4, *model.output_shape[1:])), verbose=0, callbacks=[Look()]
    )

    assert found
    assert all(found)


def test_unlock_lets_a_built_layer_add_variables(model) -> None:
    layer = model.layers[0]
    with pytest.raises(ValueError, match="cannot add new elements"):
        layer.more = keras.Variable(1.0)

    internals.unlock(layer)
    layer.more = keras.Variable(1.0)

    assert any(each is layer.more for each in layer.variables)


def test_metrics_given_are_the_metrics_of_compile(model) -> None:
    given = [each for metric in model.metrics for each in internals.metrics_given(metric)]

    assert [getattr(each, "name", each) for each in given] == ["mae", "auc", "mse"]


@pytest.mark.parametrize(
    ("metric", "direction"),
    [(keras.metrics.AUC(), "up"), (keras.metrics.MeanSquaredError(), "down"), (keras.metrics.Mean(), None)],
)
def test_direction_of_a_metric(metric, direction) -> None:
    assert internals.direction_of(metric) == direction


def test_loss_weights_are_the_loss_weights_of_compile(model) -> None:
    assert internals.loss_weights(model) == [2.0]
    assert internals.loss_weights(dense_model()) is None


def test_arguments_of_a_loss_are_the_arguments_of_its_function() -> None:
    assert internals.arguments_of(keras.losses.Huber(delta=2.0)) == {"delta": 2.0}
    assert internals.arguments_of(keras.losses.Loss()) == {}


def test_begin_with_epoch_makes_fit_begin_with_that_epoch() -> None:
    """A callback calls it in `on_train_begin`."""
    model = dense_model()
    says = keras.callbacks.LambdaCallback(on_train_begin=lambda logs: internals.begin_with_epoch(model, 2))

    assert fit(model, says, epochs=4).epoch == [2, 3]


def test_fit_replaces_weights_by_averages_after_an_error_where_the_constant_says_so() -> None:
    """`fit` on JAX does. It calls `finalize_variable_values` of the optimizer."""
    model = dense_model(optimizer=keras.optimizers.SGD(0.1, use_ema=True), run_eagerly=False)

    class Stops(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            if batch == 3:
                self.before = self.model.get_weights()
                raise RuntimeError("injected")

    stops = Stops()
    with pytest.raises(RuntimeError, match="injected"):
        fit(model, stops)

    is_replaced = any(map(np.any, map(np.not_equal, model.get_weights(), stops.before)))
    assert is_replaced == internals.AVERAGES_AFTER_ERRORS


def test_no_step_is_what_a_train_function_returns_to_fit() -> None:
    """The logs of the step are the logs of the epoch, and no weight changes."""
    model = dense_model(run_eagerly=False)
    before = model.get_weights()

    class Replaces(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            self.model.train_function = lambda *arguments: internals.no_step({"own": 5.0}, arguments)
            self.model.stop_training = True

    history = fit(model, Replaces())

    assert history.history == {"own": [5.0]}
    assert all(map(np.array_equal, model.get_weights(), before))


def test_set_seed_of_random_restores_a_state_or_removes_it() -> None:
    """The generator of unseeded functions draws the same numbers after the state is set."""
    before = internals.seed_of_random()
    state = None if before is None else np.asarray(before)
    try:
        first = np.asarray(keras.random.normal((2,)))
        internals.set_seed_of_random(state)
        internals.set_seed_of_random(None)
        assert internals.seed_of_random() is None
        keras.utils.set_random_seed(1)
        first = np.asarray(keras.random.normal((2,)))
        there = np.asarray(internals.seed_of_random())
        second = np.asarray(keras.random.normal((2,)))
        internals.set_seed_of_random(there)
        np.testing.assert_array_equal(np.asarray(keras.random.normal((2,))), second)
        assert not np.array_equal(first, second)
    finally:
        internals.set_seed_of_random(state)


def test_fit_in_progress_finds_the_data_and_the_callbacks_of_fit() -> None:
    """One walk up the stack finds the arguments and data of the `fit` that calls a callback."""
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_begin(self, logs=None) -> None:
            seen.append(internals.fit_in_progress(self))

    data, model = kc.ResumableDataset(X, Y).repeat(), dense_model()
    fit(model)  # so that Keras needs no batch to build the model
    with pytest.raises(ValueError, match="fit\\(\\) ignores y"):
        model.fit(data, Y, steps_per_epoch=3, verbose=0, callbacks=[looks := Looks()])
    found = seen[0]

    assert (found.steps_per_epoch, found.batches, found.is_known) == (3, None, True)
    assert found.adapter is data
    assert found.beside == ("y",)
    assert looks in found.callbacks.callbacks


class Batches(internals.DataAdapter):
    """Two batches, for each backend."""

    num_batches, batch_size = 2, 4

    def get_tf_dataset(self):
        return tf.data.Dataset.from_tensors((X[:4], Y[:4])).repeat(2)

    def get_jax_iterator(self):
        return iter([(X[:4], Y[:4])] * 2)

    get_torch_dataloader = get_jax_iterator


def test_fit_reads_the_batches_of_a_data_adapter() -> None:
    """Keras takes an object of any subclass as it is."""
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            seen.append(internals.fit_in_progress().adapter)

    dense_model().fit(data := Batches(), verbose=0, callbacks=[Looks()])

    assert seen == [data, data]


def test_builds_a_model_says_that_keras_reads_a_batch_for_its_shapes() -> None:
    """Such a batch is not trained on."""
    model = dense_model()
    seen = [internals.builds_a_model()]

    def batches():
        seen.append(internals.builds_a_model())
        yield X[:4], Y[:4]

    model._symbolic_build(iterator=[(0, 0, batches())])

    assert seen == [False, True]


class OneBatch(keras.utils.PyDataset):
    """Ten samples in one batch."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        return X[:10], Y[:10]


@pytest.mark.parametrize(
    ("typed", "options"),
    [
        ("x, y, batch_size=32, shuffle=True", {"x": X, "y": Y}),
        ("x, y, batch_size=20", {"x": X, "y": Y, "batch_size": 20, "shuffle": False}),
        (
            "x, y, sample_weight, batch_size=40, shuffle=True",
            {"x": X, "y": Y, "sample_weight": Y[:, 0] ** 2, "batch_size": 40},
        ),
        ("x, shuffle=True", {"x": OneBatch()}),
        ("x", lambda: {"x": tf.data.Dataset.from_tensors((X, Y)), "shuffle": False}),
    ],
)
def test_fit_in_progress_tells_how_to_type_its_data_as_a_dataset(typed, options) -> None:
    """The arguments make a `ResumableDataset` of the same batches, shuffled where `fit` shuffles."""
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_begin(self, logs=None) -> None:
            seen.append(internals.fit_in_progress(self))

    options = options() if callable(options) else options
    dense_model().fit(**options, verbose=0, callbacks=[Looks()])

    assert seen[0].typed == typed
    data = eval(f"ResumableDataset({typed})", {"ResumableDataset": kc.ResumableDataset, **options})
    assert data.num_batches == seen[0].batches


def test_fit_in_progress_finds_the_list_of_callbacks_of_a_loop_of_the_user() -> None:
    """A list of callbacks may be called without a `fit`."""
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_begin(self, logs=None) -> None:
            seen.append(internals.fit_in_progress(self))

    callbacks = keras.callbacks.CallbackList([Looks()], model=dense_model())
    callbacks.on_train_begin()

    assert seen == [internals.FitInProgress(callbacks)]


def test_fit_in_progress_finds_nothing_outside_of_a_training() -> None:
    """Every value has its default."""
    assert internals.fit_in_progress(keras.callbacks.Callback()) == internals.FitInProgress()


def test_built_from_builds_a_shared_object_once_and_in_safe_mode() -> None:
    """Safe mode holds in a program that turned it off."""
    shared = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 1}, "shared_object_id": 7}
    code = {"class_name": "__lambda__", "config": {"value": ["", None, None]}}

    first, second = internals.built_from([shared, shared], {})

    assert first is second
    with internals.SafeModeScope(False), pytest.raises(ValueError, match="lambda"):
        internals.built_from(code, {})


def test_set_path_sets_the_paths_of_layers_and_variables() -> None:
    layer = keras.layers.Dense(1, name="own")
    layer.build((None, 2))

    internals.set_path(layer, "outer/own")
    internals.set_path(layer.kernel, "outer/own/kernel")

    assert (layer.path, layer.kernel.path) == ("outer/own", "outer/own/kernel")


def test_compile_from_compiles_a_model_in_safe_mode(model) -> None:
    config = model.get_compile_config()
    other = dense_model(compiled=False)
    code = {"class_name": "__lambda__", "config": {"value": ["", None, None]}}

    internals.compile_from(other, config, {})

    assert type(other.optimizer) is type(model.optimizer)
    with internals.SafeModeScope(False), pytest.raises(ValueError, match="lambda"):
        internals.compile_from(other, {**config, "loss": code}, {})


def test_is_running_says_whether_a_caller_uses_the_list_of_callbacks() -> None:
    """A signal handler gets the frame that the signal interrupted."""
    seen = []

    def look(logs) -> None:
        seen.append(internals.is_running(lists[0], inspect.currentframe()))

    lists = [keras.callbacks.CallbackList([keras.callbacks.LambdaCallback(on_train_begin=look)])]
    lists[0].on_train_begin()
    look(None)

    assert seen == [True, False]


def test_the_variables_of_an_optimizer_begin_with_iteration_and_learning_rate(model) -> None:
    """The rest are slots, whose names `naming` parses."""
    names = [variable.path.split("/")[-1] for variable in model.optimizer.variables[:2]]

    assert names == ["iteration", "learning_rate"]


@pytest.mark.parametrize(("kind", "begin"), [("keras", b"PK"), ("weights", b"\x89HDF"), ("legacy", b"\x89HDF")])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
def test_written_by_keras_is_a_file_in_memory(model, kind, begin) -> None:
    """Keras's public functions write to paths alone."""
    assert internals.written_by_keras(model, kind).startswith(begin)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
def test_places_in_files_has_the_objects_that_save_variables(model) -> None:
    """The path of an object is its group in Keras's file."""
    with h5py.File(io.BytesIO(internals.written_by_keras(model, "weights"))) as file:
        saved = {f"{path}/vars/{name}" for path in ("layers/dense", "optimizer") for name in file[path]["vars"]}

    places = internals.places_in_files(model)

    assert places["layers/dense"] is model.layers[0]
    assert places["optimizer"] is model.optimizer
    assert saved <= {f"{path}/vars/{name}" for path, each in places.items() for name in internals.answers_of(each)}


def test_answers_of_an_object_are_its_variables(model) -> None:
    """Keras's own optimizer would answer with copies of their values."""
    assert internals.answers_of(model.layers[0])["0"] is model.layers[0].kernel
    assert internals.answers_of(model.optimizer)["2"] is model.optimizer.variables[2]


def test_places_in_files_makes_the_sets_of_skipped_attributes_once(model) -> None:
    """Keras 3.15 would make an optimizer or a layer for each set."""
    keras.backend.clear_session()

    internals.places_in_files(model)

    for kind in ("Layer", "Sequential", "Optimizer"):
        assert saving_lib.get_attr_skipset(kind) is saving_lib.get_attr_skipset(kind)


def test_config_of_is_the_config_in_a_file_of_keras(model) -> None:
    """A variable may have another value in it than now."""
    rate = model.optimizer.variables[1]
    value = tf.constant(0.25)

    config, metadata = internals.config_of(model, [(rate, value)])

    assert json.loads(config)["compile_config"]["optimizer"]["config"]["learning_rate"] == 0.25
    assert float(rate.value) != 0.25
    assert json.loads(metadata).keys() == {"keras_version", "date_saved"}


def test_serialized_imports_no_tensorflow(monkeypatch) -> None:
    """Keras asks its module `tensorflow` for `available`, which imports TensorFlow unless `_available` is known."""
    from keras.src.utils import module_utils

    monkeypatch.setattr(module_utils.tensorflow, "_available", None)
    monkeypatch.setattr(module_utils.tensorflow, "initialize", lambda: pytest.fail("TensorFlow would be imported"))
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    layer = keras.layers.Dense(3, name="dense")

    config = internals.serialized(layer)

    assert config["config"]["units"] == 3
    assert module_utils.tensorflow._available is None
