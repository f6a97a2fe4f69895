"""`load_model`: a model from its checkpoint, without the code that built it."""

import json
import os
import pathlib
import textwrap
import threading
import zipfile
import zlib

import keras
import msgspec
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.formats import config
from keras_ckpt.formats.bundle_writer import array_value, string_value, write_bundle
from keras_ckpt.formats.config import Config
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.model.naming import named_variables
from keras_ckpt.store import background
from keras_ckpt.store.files import Folder
from support import keras_zoo
from support.frameworks import tf
from support.models import WithFunction, X, Y, dense_model, fit, same, save, warned

OWN = {kind.__name__: kind for kind in (keras_zoo.Subclassed, keras_zoo.OwnVariables, keras_zoo.OwnAssets)}
IN_OTHER_TESTS = "641 variables", "low-rank", "TextVectorization weighed"
DENSE = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 3}, "registered_name": None}


class Mine(keras.layers.Layer):
    """A layer that is not registered."""

    def call(self, x):
        return x


@keras.saving.register_keras_serializable("loading")
class Registered(Mine):
    """A layer that is registered."""


def sequence(*layers: keras.layers.Layer) -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), *layers, keras.layers.Dense(1)])
    model.compile("adam", "mse", run_eagerly=True)
    return model


def compiled() -> keras.Model:
    """A model with dropout, always with the same initial values and seeds."""
    keras.utils.set_random_seed(3)
    return dense_model(run_eagerly=False, metrics=["mae"])


def with_config(path: pathlib.Path, found: Config | bytes) -> pathlib.Path:
    """Writes a checkpoint that has a config and one value."""
    data = found if isinstance(found, bytes) else config.encode(found)
    with Folder(path, create=True) as folder:
        write_bundle(folder, "ckpt-1", [{config.KEY.encode(): string_value([data], ()), b"x": array_value(np.ones(3))}])
    return path


def model_with(*layers: object) -> Config:
    """The config of a sequence of layers, given by their configs."""
    inner = {"module": "keras.layers", "class_name": "InputLayer", "config": {"batch_shape": [None, 4]}}
    return Config(
        {
            "module": "keras",
            "class_name": "Sequential",
            "config": {"name": "made", "layers": [inner, *layers]},
            "registered_name": None,
        }
    )


def ways(record: kc.CheckpointRecord) -> dict[str, object]:
    return {
        "record": record,
        "directory": kc.CheckpointDirectory(record.directory),
        "path of a directory": record.directory,
        "path": pathlib.Path(record.prefix),
    }


@pytest.mark.parametrize("way", ["record", "directory", "path of a directory", "path"])
def test_a_loaded_model_has_all_values_of_the_saved_model(tmp_path, way) -> None:
    """Weights, seeds and optimizer are equal to the bit."""
    model = dense_model()
    fit(model, kc.ModelCheckpoint(tmp_path / "run"))
    (record,) = kc.CheckpointDirectory(tmp_path / "run")

    loaded = kc.load_model(ways(record)[way])

    assert same(loaded, model)
    assert loaded.optimizer.iterations.numpy() == 5
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_another_process_loads_the_model_and_continues_exactly(fork_server, tmp_path, monkeypatch) -> None:
    """The weights are those of a training without an interruption. The directory accepts the continued run."""
    unbroken = compiled()
    fit(unbroken, epochs=3)
    fit(compiled(), kc.ModelCheckpoint(tmp_path / "run"), epochs=2)
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    program = """
        import warnings, numpy as np, keras_ckpt as kc
        warnings.simplefilter("error", UserWarning)
        data = np.load("data.npz")
        model = kc.load_model("run")
        model.fit(data["x"][:5], data["y"][:5], batch_size=1, shuffle=False, verbose=0, initial_epoch=2, epochs=3,
                  callbacks=[kc.ModelCheckpoint("run")])
        np.savez("weights.npz", *[each.numpy() for each in (*model.variables, *model.optimizer.variables)])
    """
    monkeypatch.chdir(tmp_path)

    ended = fork_server.run(textwrap.dedent(program))

    assert ended.returncode == 0, ended.stderr
    found = np.load(tmp_path / "weights.npz")
    values = [each.numpy() for each in (*unbroken.variables, *unbroken.optimizer.variables)]
    assert [found[name].tobytes() for name in found] == [value.tobytes() for value in values]
    assert [record.step for record in kc.CheckpointDirectory(tmp_path / "run")] == [5, 10, 15]


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", [name for name in keras_zoo.MODELS if name != "641 variables"])
def test_models_of_each_kind_are_loaded(tmp_path, name) -> None:
    """A checkpoint of the loaded model has the same names, so the program's model can be restored from it."""
    model = keras_zoo.made(name)
    save(model, tmp_path)

    loaded = kc.load_model(tmp_path, OWN)

    assert same(loaded, model)
    assert named_variables(loaded).keys() == named_variables(model).keys()


@pytest.mark.parametrize("name", keras_zoo.OPTIMIZERS)
def test_models_of_each_optimizer_are_loaded(tmp_path, name) -> None:
    """A model that was not compiled is not compiled."""
    model = keras_zoo.made("dense", name)
    save(model, tmp_path)

    loaded = kc.load_model(tmp_path)

    assert loaded.compiled == model.compiled
    assert same(loaded, model)


def with_compiled_part() -> keras.Model:
    """A trained and compiled model in a compiled model."""
    inner = dense_model()
    fit(inner)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
    model.compile("sgd", "mae", metrics=["mse"])
    return model


@pytest.mark.parametrize("name", ["run", "model.keras"])
def test_a_compiled_model_in_a_compiled_model_is_loaded(tmp_path, name) -> None:
    """Both have their weights, and the optimizers that they had."""
    model = with_compiled_part()
    fit(model, kc.ModelCheckpoint(tmp_path / name))

    loaded = kc.load_model(tmp_path / name)

    pairs = [(loaded, model), (loaded.layers[1], model.layers[1])]
    assert same(loaded, model)
    for mine, theirs in pairs:
        assert type(mine.optimizer) is type(theirs.optimizer)
        assert mine.loss == theirs.loss
        assert all(map(np.array_equal, mine.optimizer.variables, theirs.optimizer.variables))
    assert not kc.load_model(tmp_path / name, compile=False).compiled


def test_compile_false_loads_the_weights_alone(tmp_path) -> None:
    model = dense_model()
    fit(model, kc.ModelCheckpoint(tmp_path))

    loaded = kc.load_model(tmp_path, compile=False)

    assert not loaded.compiled
    assert all(map(np.array_equal, loaded.get_weights(), model.get_weights()))


def test_a_checkpoint_of_weights_gives_a_model_with_a_new_optimizer(tmp_path) -> None:
    model = dense_model()
    fit(model, kc.ModelCheckpoint(tmp_path, save_weights_only=True))

    loaded = kc.load_model(tmp_path)

    assert all(map(np.array_equal, loaded.get_weights(), model.get_weights()))
    assert loaded.optimizer.iterations.numpy() == 0


def test_a_learning_rate_that_a_callback_set_is_loaded_without_a_warning(tmp_path) -> None:
    """The config has the learning rate of another moment. The value of the variable counts."""
    model = dense_model()
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.5 / (epoch + 1))
    fit(model, rates, kc.ModelCheckpoint(tmp_path), epochs=3)

    loaded = kc.load_model(tmp_path)

    assert float(loaded.optimizer.learning_rate) == float(model.optimizer.learning_rate)


def test_tensorflow_restores_a_checkpoint_that_has_a_config(tmp_path) -> None:
    model, other = dense_model(), dense_model()
    record = save(model, tmp_path)

    tf.train.Checkpoint(model=other).restore(record.prefix).expect_partial()

    assert all(map(np.array_equal, other.get_weights(), model.get_weights()))


@pytest.mark.filterwarnings("ignore:The model was compiled again")
def test_the_config_is_made_once_and_not_in_the_thread_that_trains(tmp_path) -> None:
    """A second compile makes another structure, which has another config.

    On JAX the thread that trains makes it, because the variables have no values elsewhere while `fit` runs.
    """
    threads, on_jax = [], keras.backend.backend() == "jax"

    class Watched(Mine):
        def get_config(self):
            threads.append(threading.current_thread())
            return super().get_config()

    model = sequence(Watched())
    fit(model, kc.ModelCheckpoint(tmp_path / "first", save_freq=1), epochs=3)
    assert [thread is threading.main_thread() for thread in threads] == [on_jax]

    model.compile("sgd", "mse", run_eagerly=True)
    fit(model, kc.ModelCheckpoint(tmp_path / "second", save_freq=1))
    assert [thread is threading.main_thread() for thread in threads] == [on_jax, on_jax]
    assert isinstance(kc.load_model(tmp_path / "second", {"Watched": Watched}).optimizer, keras.optimizers.SGD)


def test_a_registered_class_needs_no_custom_objects(tmp_path) -> None:
    save(sequence(Registered()), tmp_path)

    assert type(kc.load_model(tmp_path).layers[1]) is Registered


def test_a_class_that_this_program_did_not_register_may_be_given_by_its_own_name(tmp_path, monkeypatch) -> None:
    save(sequence(Registered()), tmp_path)
    monkeypatch.delitem(keras.saving.get_custom_objects(), "loading>Registered")

    assert type(kc.load_model(tmp_path, {"Registered": Registered}).layers[1]) is Registered


def test_a_class_that_is_not_there_is_named_with_the_ways_out(tmp_path) -> None:
    record = save(sequence(Mine()), tmp_path)

    with pytest.raises(kc.CannotBuildError) as raised:
        kc.load_model(tmp_path)

    text = str(raised.value)
    assert text.startswith(f"{record.prefix} has a model that needs Mine, which this program does not have.")
    assert "custom_objects={'Mine': Mine}" in text
    assert f"keras_ckpt.restore(model, {record.prefix!r})" in text
    assert isinstance(raised.value, ValueError)


def test_a_keras_file_is_loaded_with_the_seeds_and_the_position_of_its_record(tmp_path) -> None:
    """A training continues as if nothing had happened. Keras's own load_model draws other random numbers."""
    path = tmp_path / "last.keras"
    unbroken, model = compiled(), compiled()
    fit(unbroken, epochs=3)
    fit(model, kc.ModelCheckpoint(path), epochs=2)

    loaded = kc.load_model(path)
    fit(loaded, kc.ModelCheckpoint(path), epochs=3, initial_epoch=2)

    assert same(loaded, unbroken)
    (record,) = kc.CheckpointDirectory(path)
    assert (record.step, record.epoch) == (15, 3)


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", [name for name in keras_zoo.MODELS if name not in IN_OTHER_TESTS])
def test_keras_files_of_models_of_each_kind_are_loaded(tmp_path, name) -> None:
    """Keras's own writer made the file, so it has no record."""
    model = keras_zoo.made(name)
    model.save(tmp_path / "model.keras")

    loaded = kc.load_model(tmp_path / "model.keras", OWN)

    theirs = keras.models.load_model(tmp_path / "model.keras", OWN)
    assert all(map(np.array_equal, loaded.get_weights(), theirs.get_weights()))
    assert all(map(np.array_equal, loaded.optimizer.variables, model.optimizer.variables))


def test_a_keras_file_of_low_rank_updates_is_loaded_with_new_updates(tmp_path) -> None:
    """Keras merges the updates into the kernels when it saves, so the updates and their optimizer begin again."""
    model = keras_zoo.made("low-rank")
    model.save(tmp_path / "model.keras")

    with pytest.warns(UserWarning, match=r"merged into the kernels.* begin at zero, and the optimizer is new"):
        loaded = kc.load_model(tmp_path / "model.keras")

    theirs = keras.models.load_model(tmp_path / "model.keras")
    x = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), theirs.predict(x, verbose=0))
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5)
    assert loaded.optimizer.iterations.numpy() == 0


def test_a_keras_file_of_weighed_words_is_loaded(tmp_path) -> None:
    """The layer is built before it has term weights. Keras's own load_model fails."""
    model = keras_zoo.made("TextVectorization weighed")
    model.save(tmp_path / "model.keras")

    loaded = kc.load_model(tmp_path / "model.keras")

    assert same(loaded, model)
    words = tf.constant(keras_zoo.WORDS)
    np.testing.assert_array_equal(loaded.predict(words, verbose=0), model.predict(words, verbose=0))


@pytest.mark.parametrize("name", ["model.weights.h5", "model.h5"])
def test_a_file_of_keras_without_a_config_is_refused(tmp_path, name) -> None:
    model = dense_model()
    (model.save_weights if "weights" in name else model.save)(tmp_path / name)

    with pytest.raises(kc.CannotBuildError, match="has no config of its model: it is a file of weights, or"):
        kc.load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("cut", "it ends early"), ("text", "it is neither an archive nor HDF5"), ("empty", "it ends early")],
)
def test_a_damaged_file_of_keras_is_refused(tmp_path, damage, message) -> None:
    """The error does not take it for a file of weights, which has no config."""
    path = tmp_path / "model.keras"
    dense_model().save(path)
    path.write_bytes({"cut": path.read_bytes()[:-50], "text": b"text" * 99, "empty": b""}[damage])

    with pytest.raises(kc.DamagedCheckpointError, match=message):
        kc.load_model(path)


def test_a_keras_file_with_a_lambda_is_refused(tmp_path) -> None:
    sequence(keras.layers.Lambda(lambda x: x + 1)).save(tmp_path / "model.keras")

    with pytest.raises(kc.CannotBuildError, match=r"model\.keras has a model that contains a lambda"):
        kc.load_model(tmp_path / "model.keras")


LAMBDA = {"class_name": "__lambda__", "config": {"code": "4wE=", "defaults": None, "closure": None}}
MALICIOUS = {
    "a lambda": (
        {"module": "keras.layers", "class_name": "Lambda", "config": {"function": LAMBDA}, "registered_name": None},
        "runs no code",
    ),
    "os.system as a layer": (
        {"module": "os", "class_name": "system", "config": {"command": "touch ran"}, "registered_name": None},
        "needs system",
    ),
    "os.system as an activation": (
        {**DENSE, "config": {"units": 3, "activation": {
            "module": "os", "class_name": "function", "config": "system", "registered_name": "system",
        }}},
        "needs system",
    ),
    "a module that would be imported": (
        {"module": "ran", "class_name": "Ran", "config": {}, "registered_name": "Ran"},
        "needs Ran",
    ),
    "a download": (
        {**DENSE, "config": {"units": 3, "activation": {
            "module": "keras.utils", "class_name": "function", "config": "get_file", "registered_name": "get_file",
        }}},
        "Keras cannot build",
    ),
    "a SavedModel": (
        {"module": "keras.layers", "class_name": "TFSMLayer", "config": {"filepath": "ran"}, "registered_name": None},
        "Keras cannot build",
    ),
    "a class that Keras does not have": ({**DENSE, "class_name": "Dens"}, "Keras cannot build"),
    "10^12 units": ({**DENSE, "config": {"units": 10**12}}, "needs more than"),
    "10^9 units": ({**DENSE, "config": {"units": 10**9}}, "needs more than"),
    "an argument that Keras does not know": ({**DENSE, "config": {"units": 3, "unit": 3}}, "Keras cannot build"),
    "a name that is no text": ({**DENSE, "class_name": "function", "config": [1]}, "malformed"),
}  # fmt: skip


def with_config_in_a_file(path: pathlib.Path, found: Config) -> pathlib.Path:
    """Writes a `.keras` file that has a config and the values of another model."""
    dense_model().save("whole.keras")
    path.mkdir()
    with zipfile.ZipFile("whole.keras") as whole, zipfile.ZipFile(path / "model.keras", "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, json.dumps(found.config) if name == "config.json" else whole.read(name))
    pathlib.Path("whole.keras").unlink()
    return path / "model.keras"


@pytest.mark.sample(12)
@pytest.mark.parametrize("write", [with_config, with_config_in_a_file])
@pytest.mark.parametrize("name", MALICIOUS)
def test_a_config_made_to_do_harm_is_refused_in_plain_words(tmp_path, monkeypatch, name, write) -> None:
    """No code runs, no memory is taken, and no file changes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    pathlib.Path("ran.py").write_text("open('imported', 'w')")
    layer, message = MALICIOUS[name]
    checkpoint = write(tmp_path / "run", model_with(layer))
    before = {path: path.read_bytes() for path in pathlib.Path("run").iterdir()}

    with pytest.raises(kc.CannotBuildError, match=message) as raised:
        kc.load_model(checkpoint)

    assert len(str(raised.value)) < 800
    assert sorted(os.listdir()) == ["ran.py", "run"]
    assert {path: path.read_bytes() for path in pathlib.Path("run").iterdir()} == before


def test_metrics_count_as_memory(tmp_path) -> None:
    metric = {"module": "keras.metrics", "class_name": "MeanIoU", "config": {"num_classes": 10**6}}
    found = model_with(DENSE)
    compile_config = {"optimizer": "adam", "loss": "mse", "metrics": [{**metric, "registered_name": None}]}
    with_config(tmp_path, Config({**found.config, "compile_config": compile_config}))

    with pytest.raises(kc.CannotBuildError, match="needs more than"):
        kc.load_model(tmp_path)


def test_an_object_that_is_no_model_is_refused(tmp_path) -> None:
    with_config(tmp_path, Config(DENSE))

    with pytest.raises(kc.CannotBuildError, match="has a Dense instead of a model"):
        kc.load_model(tmp_path)


def test_a_checkpoint_of_tensorflow_has_no_config(tmp_path) -> None:
    """The error tells the way without a config."""
    tf.train.Checkpoint(model=dense_model()).save(str(tmp_path / "theirs"))

    with pytest.raises(kc.CannotBuildError, match=r"has no config .*keras_ckpt\.restore\(model, "):
        kc.load_model(tmp_path)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (b"no zlib", kc.DamagedCheckpointError, "cannot be read"),
        (zlib.compress(b"[]"), kc.DamagedCheckpointError, "cannot be read"),
        (zlib.compress(b"[" * 100_000), kc.DamagedCheckpointError, "cannot be read"),
        (config.encode(Config({}))[:-3], kc.DamagedCheckpointError, "incomplete"),
        (config.encode(Config({}, version=2)), kc.FormatVersionError, "upgrade"),
    ],
)
def test_a_damaged_config_is_refused(tmp_path, data, error, message) -> None:
    with_config(tmp_path, data)

    with pytest.raises(error, match=message):
        kc.load_model(tmp_path)


def test_a_config_that_expands_beyond_the_limit_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(config, "LIMIT", 1 << 20)

    with pytest.raises(kc.DamagedCheckpointError, match="more than 1048576 bytes"):
        config.decode(zlib.compress(b" " * (2 << 20)))


NO_CONFIG = {
    "layer": (lambda: sequence(WithFunction(keras.ops.relu)), r"WithFunction has no get_config\(\)"),
    "lambda": (lambda: sequence(keras.layers.Lambda(lambda x: x + 1)), "it contains a lambda"),
    "value": (lambda: sequence(keras.layers.Dense(3, name="a", activation=object())), "the config of Dense cannot"),
}


@pytest.mark.parametrize("name", ["layer", "lambda"])
def test_a_model_without_a_config_is_named_once_at_the_first_batch(tmp_path, name) -> None:
    """The first save comes later. A backup is restored by the same program, so it says nothing."""
    make, message = NO_CONFIG[name]
    model = make()
    shown = []

    class Looks(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None) -> None:
            background.wait()

        def on_train_batch_end(self, batch, logs=None) -> None:
            shown.append(len(warned(caught)))

    callbacks = kc.ModelCheckpoint(tmp_path / "a"), kc.ModelCheckpoint(tmp_path / "b"), Looks()

    with pytest.warns(UserWarning, match="cannot build '.*' from its checkpoints, because") as caught:
        fit(model, kc.BackupAndRestore(tmp_path / "backup"), *callbacks, epochs=2)

    fit(model, kc.ModelCheckpoint(tmp_path / "a"))
    assert len(warned(caught)) == 1
    assert shown[:2] == [0, 1]
    with pytest.raises(kc.CannotBuildError, match=f"cannot be built without its code, because {message}"):
        kc.load_model(tmp_path / "a")


def test_a_backup_alone_does_not_name_a_model_without_a_config(tmp_path) -> None:
    """Warnings are errors in this test."""
    fit(sequence(WithFunction(keras.ops.relu)), kc.BackupAndRestore(tmp_path))


def test_a_config_is_small_on_disk(tmp_path) -> None:
    """Every checkpoint has its own."""
    made = ModelState(sequence(*(keras.layers.Dense(4) for _ in range(30)))).config()()

    assert len(json.dumps(made.config)) > 20_000
    assert len(config.encode(made)) < 2_000
    assert msgspec.json.decode(zlib.decompress(config.encode(made)))["config"] == made.config
