"""Scripts for Keras's and TensorFlow's own classes, run with these and with the classes of this package.

The rows of the tables are the ways in which 90 public scripts call the classes. Where Keras accepts a script, both
classes leave the same files with the same content, and print the same lines.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
from reliability.trainer import acknowledged_by, keras_station
from support.keras_files import content
from support.models import Interrupts, Reports, X, Y
from support.restarts import prepare

# Keras's own writer converts variables in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

EPOCHS, BATCHES = 3, 4
LOSSES = Reports(val_loss=[0.3, 0.1, 0.2], val_accuracy=[0.5, 0.7, 0.6])
"""Metrics of which the second epoch is the best, as in most scripts."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """Each script works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def momentum() -> keras.optimizers.Optimizer:
    """An optimizer with state, and with cheap steps."""
    return keras.optimizers.SGD(0.01, momentum=0.9)


def dense(**options: Any) -> keras.Model:
    """Without dropout: Keras's own callbacks do not restore its seeds."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="relu"), keras.layers.Dense(1)])
    model.compile(**{"optimizer": momentum(), "loss": "mse", "metrics": ["mae"], "run_eagerly": True, **options})
    return model


class Subclassed(keras.Model):
    """A model that is built by its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = keras.layers.Dense(3), keras.layers.Dense(1)
        self.compile(momentum(), "mse", run_eagerly=True)

    def call(self, x):
        return self.second(self.first(x))


def with_two_outputs() -> keras.Model:
    inputs = keras.Input((4,))
    outputs = {name: keras.layers.Dense(1, name=name)(inputs) for name in ("age", "height")}
    model = keras.Model(inputs, outputs)
    model.compile(
        momentum(), {"age": "mse", "height": "mse"}, metrics={"age": ["mae"], "height": ["mae"]}, run_eagerly=True
    )
    return model


def arrays() -> dict[str, Any]:
    return {"x": X[:BATCHES], "y": Y[:BATCHES], "batch_size": 1}


def arrays_for_two_outputs() -> dict[str, Any]:
    y = {"age": Y[:BATCHES], "height": -Y[:BATCHES]}
    return {"x": X[:BATCHES], "y": y, "batch_size": 1, "validation_data": (X[:BATCHES], y)}


def generator() -> dict[str, Any]:
    batches = ((X[batch : batch + 1], Y[batch : batch + 1]) for batch in range(40))
    return {"x": batches, "steps_per_epoch": BATCHES}


def dataset() -> dict[str, Any]:
    return {"x": tf.data.Dataset.from_tensor_slices((X[:BATCHES], Y[:BATCHES])).batch(1)}


class Script(NamedTuple):
    """A script that trains with `ModelCheckpoint`.

    Attributes:
        callbacks: Makes the callbacks, given the class.
        model: Makes the model.
        data: The arguments of `fit` with the data.
        fit: Other arguments of `fit`.
    """

    callbacks: Callable[[Any], Any]
    model: Callable[[], keras.Model] = dense
    data: Callable[[], dict[str, Any]] = arrays
    fit: Mapping[str, Any] = types.MappingProxyType({})

    def run(self, checkpoint: Any) -> keras.Model:
        """Runs the script with a class in the place of `ModelCheckpoint`."""
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(1)
        model = self.model()
        callbacks = self.callbacks(functools.partial(checkpoint, verbose=1))
        arguments = {"epochs": EPOCHS, "shuffle": False, "verbose": 0, **self.data(), **self.fit}
        model.fit(**arguments, callbacks=[LOSSES, *(callbacks if isinstance(callbacks, list) else [callbacks])])
        return model


SCRIPTS = {
    "the best model, one file": Script(
        lambda checkpoint: checkpoint("best_model.keras", monitor="val_accuracy", mode="max", save_best_only=True)
    ),
    "the best model, its monitor by position": Script(
        lambda checkpoint: checkpoint("best.keras", "val_loss", save_best_only=True)
    ),
    "each epoch in one file of the old format": Script(lambda checkpoint: checkpoint("models/x.h5")),
    "the best model in one file of the old format": Script(
        lambda checkpoint: checkpoint("models/x.h5", save_best_only=True)
    ),
    "a template with a metric": Script(
        lambda checkpoint: checkpoint("model-{epoch:03d}-{val_accuracy:.4f}.keras", monitor="val_accuracy", mode="max")
    ),
    "a template, improvements only": Script(
        lambda checkpoint: checkpoint("{epoch:02d}-{val_loss:.2f}.keras", save_best_only=True)
    ),
    "a template of weights": Script(
        lambda checkpoint: checkpoint("w.{epoch:02d}-{val_loss:.2f}.weights.h5", save_weights_only=True)
    ),
    "a template of folders": Script(lambda checkpoint: checkpoint("runs/e{epoch:02d}/model.keras")),
    "the best weights, with a threshold": Script(
        lambda checkpoint: checkpoint(
            "best.weights.h5", save_best_only=True, save_weights_only=True, initial_value_threshold=0.2
        )
    ),
    "each three batches": Script(lambda checkpoint: checkpoint("{epoch}-{batch}.keras", save_freq=3)),
    "each batch": Script(
        lambda checkpoint: checkpoint("{epoch}-{batch}.weights.h5", save_weights_only=True, save_freq=1)
    ),
    "batches in executions of two": Script(
        lambda checkpoint: checkpoint("{epoch}-{batch}.keras", save_freq=4),
        functools.partial(dense, steps_per_execution=2, run_eagerly=False),
    ),
    "one of several outputs": Script(
        lambda checkpoint: checkpoint("best.keras", monitor="val_age_mae", mode="min", save_best_only=True),
        with_two_outputs,
        arrays_for_two_outputs,
    ),
    "a generator": Script(lambda checkpoint: checkpoint("{epoch:02d}.keras"), data=generator),
    "a dataset": Script(lambda checkpoint: checkpoint("{epoch:02d}.keras", save_freq=5), data=dataset),
    "a model that its first batch builds": Script(
        lambda checkpoint: checkpoint("{epoch}.weights.h5", save_weights_only=True), Subclassed
    ),
    "a later epoch first": Script(
        lambda checkpoint: checkpoint("{epoch:02d}.keras"), fit={"initial_epoch": 1, "validation_data": (X, Y)}
    ),
    "a metric that does not exist": Script(
        lambda checkpoint: checkpoint("best.keras", monitor="val_acc", mode="max", save_best_only=True)
    ),
    "two series in one folder": Script(
        lambda checkpoint: [
            checkpoint("ckpt/best.keras", save_best_only=True),
            checkpoint("ckpt/{epoch:02d}.keras"),
        ]
    ),
    "models and weights in one folder": Script(
        lambda checkpoint: [
            checkpoint("ckpt/{epoch}.keras"),
            checkpoint("ckpt/{epoch}.weights.h5", save_weights_only=True),
        ]
    ),
    "beside other callbacks": Script(
        lambda checkpoint: [
            keras.callbacks.EarlyStopping("val_loss", patience=1, restore_best_weights=True),
            checkpoint("best.keras", save_best_only=True),
            keras.callbacks.ReduceLROnPlateau("val_loss", patience=1),
            keras.callbacks.CSVLogger("log.csv"),
        ]
    ),
}


def outcome(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The content of each file that Keras can load, by its path below a folder."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".keras", ".h5") and path.is_file()]
    return {str(path.relative_to(folder)): content(path) for path in paths}


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore:.*val_acc")
@pytest.mark.filterwarnings("ignore:Keras cannot load:UserWarning")
def test_a_script_leaves_the_files_and_prints_the_lines_of_keras(folder, monkeypatch, capsys, name) -> None:
    """The same files, the same content and the same lines, with another import alone."""
    results = []
    for package in (keras.callbacks, kc):
        place = folder / package.__name__
        place.mkdir()
        monkeypatch.chdir(place)
        SCRIPTS[name].run(package.ModelCheckpoint)
        # The second line of a save comes when the file is on disk.
        results.append((outcome(place), sorted(filter(None, capsys.readouterr().out.splitlines()))))

    (files, lines), (our_files, our_lines) = results
    assert sorted(our_files) == sorted(files)
    assert our_files == files
    assert our_lines == lines
    assert files


def with_weights_of(path: str) -> keras.Model:
    """A new model with the weights that Keras loads."""
    model = dense()
    model.optimizer.build(model.trainable_variables)
    model.load_weights(path)
    return model


LOADS: dict[str, Callable[[str], keras.Model]] = {"a model": keras.models.load_model, "weights": with_weights_of}
REFUSED = {
    "the best model in .hdf5": ("a model", "best_model.hdf5", {"save_best_only": True}),
    "a template of .hdf5": ("a model", "model.{epoch:02d}-{val_loss:.2f}.hdf5", {}),
    "weights in .hdf5": ("weights", "weights/best.hdf5", {"save_weights_only": True, "save_best_only": True}),
    "weights in .hd5": ("weights", "weights.hd5", {"save_weights_only": True}),
    "weights in .ckpt": ("weights", "training_1/cp.ckpt", {"save_weights_only": True}),
    "a template of .ckpt": ("weights", "training_2/cp-{epoch:04d}.ckpt", {"save_weights_only": True}),
    "a model in .ckpt": ("a model", "checkpoint.ckpt", {"save_best_only": True}),
    "a template of weights in .h5": ("weights", "w.{epoch:02d}-{val_loss:.2f}.h5", {"save_weights_only": True}),
    "weights without the rest of the suffix": ("weights", "best.weights", {"save_weights_only": True}),
    "a suffix in capital letters": ("a model", "best.Keras", {}),
    "weights in .h5": ("weights", "weights.h5", {"save_weights_only": True}),
    "a template of weights without a suffix": ("weights", "w/{epoch:02d}", {"save_weights_only": True}),
    "a template of models without a suffix": ("a model", "models/model_{epoch}_{val_loss:.3f}", {}),
}
"""What the script loads, the path, and other arguments."""


@pytest.mark.sample(5)
@pytest.mark.parametrize("name", REFUSED)
def test_a_path_that_keras_refuses_is_refused_before_training_with_a_path_that_works(name) -> None:
    """The script runs with the advised path, and Keras loads the file."""
    loads, path, options = REFUSED[name]
    with pytest.raises(ValueError, match="filepath provided must end in"):
        keras.callbacks.ModelCheckpoint(path, **options)
    with pytest.raises(ValueError, match=r"Received: filepath=.*rite ") as refused:
        kc.ModelCheckpoint(path, **options)

    advised = re.search(r"[Ww]rite (\S+)", str(refused.value))[1].rstrip(".")
    model = Script(lambda checkpoint: checkpoint(advised, **options)).run(kc.ModelCheckpoint)

    saved = kc.CheckpointDirectory(advised)
    loaded = LOADS[loads](saved.latest().prefix)
    if not options.get("save_best_only"):
        assert predictions(loaded) == predictions(model)


def predictions(model: keras.Model) -> bytes:
    return model.predict(X, verbose=0).tobytes()


@pytest.mark.parametrize(
    ("template", "directory"), [("training_2/cp-{epoch:04d}", "training_2/cp"), ("{epoch}", "checkpoints")]
)
def test_a_template_of_directories_may_become_a_directory_that_tensorflow_reads(template, directory) -> None:
    """As in `tf.train.latest_checkpoint(dirname)`."""
    with pytest.raises(ValueError, match="For a directory of checkpoints, write") as refused:
        kc.ModelCheckpoint(template, save_weights_only=True)
    advised = str(refused.value).rpartition(" ")[2]
    assert advised == directory

    model = Script(lambda checkpoint: checkpoint(directory, save_weights_only=True)).run(kc.ModelCheckpoint)

    newest = tf.train.latest_checkpoint(directory)
    kernel = tf.train.load_variable(newest, "model/dense/kernel/.ATTRIBUTES/VARIABLE_VALUE")
    assert np.array_equal(kernel, model.layers[0].kernel)


def test_a_directory_which_keras_refuses_takes_a_generator() -> None:
    with pytest.raises(ValueError, match="filepath provided must end in"):
        keras.callbacks.ModelCheckpoint("runs")

    Script(lambda checkpoint: checkpoint("runs"), data=generator).run(kc.ModelCheckpoint)

    assert tf.train.latest_checkpoint("runs") == f"runs/ckpt-{EPOCHS * BATCHES}"


def test_weights_that_keras_could_not_load_are_refused() -> None:
    """Keras writes a whole model under the name, and its `load_weights` fails."""
    with pytest.raises(ValueError, match=r"Pass save_weights_only=True, or end the filepath in \.keras: best\.keras"):
        kc.ModelCheckpoint("best.weights.h5")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ModelCheckpoint", {"filepath": "best.keras", "period": 5}),
        ("ModelCheckpoint", {"filepath": "best.keras", "save_freq": "batch"}),
        ("BackupAndRestore", {"backup_dir": "backup", "save_before_preemption": True}),
        ("BackupAndRestore", {"backup_dir": ""}),
    ],
)
def test_arguments_that_keras_refuses_are_refused_with_the_same_class_of_error(name, arguments) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        getattr(keras.callbacks, name)(**arguments)

    with pytest.raises(theirs.type):
        getattr(kc, name)(**arguments)


RESTARTS: dict[str, Callable[[Any], Any]] = {
    "one callback instead of a list": lambda backup: backup("backup"),
    "the path as a keyword": lambda backup: [backup(backup_dir="backup", save_freq="epoch")],
    "each four batches": lambda backup: [backup("backup", save_freq=BATCHES)],
    "two backups": lambda backup: [backup("backup", double_checkpoint=True)],
    "a backup that stays": lambda backup: [backup("backup", delete_checkpoint=False)],
    "beside a log": lambda backup: [backup("backup"), keras.callbacks.CSVLogger("log.csv", append=True)],
    "behind a log": lambda backup: [keras.callbacks.CSVLogger("log.csv", append=True), backup("backup")],
    "beside TensorBoard": lambda backup: [keras.callbacks.TensorBoard("logs", histogram_freq=1), backup("backup")],
    "beside EarlyStopping": lambda backup: [
        backup("backup"),
        keras.callbacks.EarlyStopping("loss", min_delta=9.0, patience=1, start_from_epoch=1),
    ],
    "beside a ModelCheckpoint": lambda backup: [keras.callbacks.ModelCheckpoint("{epoch}.keras"), backup("backup")],
}
SAME_AS = {"each four batches": "one callback instead of a list"}
"""Keras trains an epoch again after a backup at its last batch. The result is then of another script."""


def restarted(script: Callable[[Any], Any], backup: type, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Trains until an error in the second epoch, and starts the script again. Returns the facts that a user sees."""
    keras.utils.set_random_seed(1)
    arguments = {**arrays(), "epochs": 4, "shuffle": False}
    callbacks = script(backup)
    with pytest.raises(RuntimeError):
        dense().fit(**arguments, callbacks=[callbacks, Interrupts(BATCHES + 2, RuntimeError())], verbose=0)
    for each in keras.tree.flatten(callbacks):
        if isinstance(each, keras.callbacks.CSVLogger):
            each.csv_file.close()  # as the end of a process does
    capsys.readouterr()
    model = dense()
    model.fit(**arguments, callbacks=script(backup), verbose=2)
    log = pathlib.Path("log.csv")
    return {
        "epochs": re.findall(r"^Epoch (\d)/4", capsys.readouterr().out, re.MULTILINE),
        "weights": [each.tobytes() for each in model.get_weights()],
        "log": log.read_text() if log.exists() else "",
        "files": sorted(path.name for path in pathlib.Path().glob("*") if path.is_dir() or path.suffix == ".keras"),
    }


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", RESTARTS)
def test_a_script_that_is_started_again_ends_as_with_kerass_callback(folder, monkeypatch, capsys, name) -> None:
    """It trains the same epochs, and ends with the same weights and logs."""
    results = []
    for package, script in ((keras.callbacks, RESTARTS[SAME_AS.get(name, name)]), (kc, RESTARTS[name])):
        place = folder / package.__name__
        place.mkdir()
        monkeypatch.chdir(place)
        results.append(restarted(script, package.BackupAndRestore, capsys))

    for fact, theirs in results[0].items():
        assert results[1][fact] == theirs, fact


def test_a_model_that_is_not_built_is_refused_as_by_keras() -> None:
    """An unbuilt model could not be restored after a crash. The error says how to build it."""
    for package, advice in ((keras.callbacks, "calling it on a batch"), (kc, r"model\.build\(input_shape\)")):
        with pytest.raises(ValueError, match=advice):
            Subclassed().fit(X[:1], Y[:1], callbacks=[package.BackupAndRestore("backup")], verbose=0)


def test_files_of_others_in_the_directory_of_backups_stay() -> None:
    """Keras's callback removes the whole directory."""
    pathlib.Path("backup").mkdir()
    pathlib.Path("backup/thesis.tex").write_text("mine")

    dense().fit(X[:1], Y[:1], callbacks=kc.BackupAndRestore("backup"), verbose=0)

    assert [path.name for path in pathlib.Path("backup").iterdir() if path.name != ".keras_ckpt"] == ["thesis.tex"]


def net() -> keras.Model:
    return keras.Sequential([keras.layers.Dense(2, kernel_initializer="ones"), keras.layers.Dense(1)])


def everything_in_one_checkpoint(manager: Any) -> Iterator[Any]:
    """The step, the network, the optimizer and the iterator of a tutorial of TensorFlow."""

    def program() -> tuple[tf.train.Checkpoint, Any]:
        keras.utils.set_random_seed(1)
        model, optimizer = net(), momentum()
        model.build((None, 4))
        optimizer.build(model.trainable_variables)
        iterator = iter(tf.data.Dataset.range(100))
        checkpoint = tf.train.Checkpoint(step=tf.Variable(1), optimizer=optimizer, net=model, iterator=iterator)
        return checkpoint, manager(checkpoint, "./tf_ckpts", max_to_keep=3)

    def train(checkpoint: tf.train.Checkpoint, saves: Any, steps: int) -> None:
        for _ in range(steps):
            value = next(checkpoint.iterator)
            gradients = [tf.ones_like(each) * float(value) for each in checkpoint.net.trainable_variables]
            checkpoint.optimizer.apply_gradients(zip(gradients, checkpoint.net.trainable_variables, strict=True))
            checkpoint.step.assign_add(1)
            if int(checkpoint.step) % 3 == 0:
                saves.save()

    train(*program(), 14)
    checkpoint, saves = program()
    checkpoint.restore(saves.latest_checkpoint).assert_consumed()
    yield saves.latest_checkpoint, saves.checkpoints, int(checkpoint.step), int(next(checkpoint.iterator))
    yield [each.numpy().tobytes() for each in (*checkpoint.net.weights, *checkpoint.optimizer.variables)]
    train(checkpoint, saves, 3)
    yield saves.latest_checkpoint, tf.train.latest_checkpoint("tf_ckpts")


def two_managers_of_one_checkpoint(manager: Any) -> Iterator[Any]:
    """One for the newest, and one for the best."""
    checkpoint = tf.train.Checkpoint(value=tf.Variable(0))
    newest = manager(checkpoint, "ckpts/newest", max_to_keep=2)
    best = manager(checkpoint, "ckpts/best", max_to_keep=1, checkpoint_name="best")
    for loss in (0.5, 0.3, 0.4):
        checkpoint.value.assign_add(1)
        newest.save()
        if loss in (0.5, 0.3):
            best.save()
    for each in (newest, best):
        checkpoint.restore(each.latest_checkpoint)
        yield each.checkpoints, int(checkpoint.value)


def number_in_the_name_of_the_newest(manager: Any) -> Iterator[Any]:
    """`latest_checkpoint` split at "-", as in tutorials of translation."""
    checkpoint = tf.train.Checkpoint(net=net())
    saves = manager(checkpoint, "checkpoints/train", max_to_keep=5)
    yield saves.latest_checkpoint
    for _ in range(3):
        saves.save()
    saves = manager(checkpoint, "checkpoints/train", max_to_keep=5)
    yield int(saves.latest_checkpoint.split("-")[-1])


def parts_restored_before_their_first_call(manager: Any) -> Iterator[Any]:
    """The encoder and the decoder get their values when they are called."""
    for begins in (True, False):
        encoder, decoder, optimizer = net(), net(), momentum()
        checkpoint = tf.train.Checkpoint(encoder=encoder, decoder=decoder, optimizer=optimizer)
        saves = manager(checkpoint, "attention", max_to_keep=5)
        if not begins:
            checkpoint.restore(saves.latest_checkpoint)
        outputs = decoder(encoder(X))
        if begins:
            keras.utils.set_random_seed(2)
            for each in (*encoder.weights, *decoder.weights):
                each.assign(tf.random.normal(each.shape))
            outputs = decoder(encoder(X))
            saves.save()
        yield outputs.numpy().tobytes()


@pytest.mark.parametrize(
    "script",
    [
        everything_in_one_checkpoint,
        two_managers_of_one_checkpoint,
        number_in_the_name_of_the_newest,
        parts_restored_before_their_first_call,
    ],
    ids=lambda script: script.__name__.replace("_", " "),
)
def test_a_loop_with_a_manager_ends_as_with_tensorflows_manager(folder, monkeypatch, script) -> None:
    """The same names, the same values, and the same numbers after a restart."""
    results = []
    for package in (tf.train, kc):
        place = folder / package.__name__
        place.mkdir()
        monkeypatch.chdir(place)
        results.append(repr(list(script(package.CheckpointManager))).replace(f"{place}/", ""))

    assert results[1] == results[0]


@pytest.fixture(scope="module")
def forks() -> Iterator[Any]:
    """A process that has loaded TensorFlow and has no model, to fork from: a fork begins as a new process does."""
    with keras_station(prepare) as place:
        yield place


def restored(path: str) -> keras.Model:
    model = dense()
    kc.restore(model, path)
    return model


def of_the_old_format(path: str) -> keras.Model:
    """Keras 3.15 cannot load the loss "mse" from the old format."""
    model = keras.models.load_model(path, compile=False)
    model.compile(momentum(), "mse", run_eagerly=True)
    return model


FORMATS: dict[str, tuple[str, Callable[[str], keras.Model], dict[str, Any]]] = {
    "a directory of checkpoints": ("runs", restored, {}),
    "a model of Keras": ("last.keras", keras.models.load_model, {}),
    "weights of Keras": ("last.weights.h5", with_weights_of, {"save_weights_only": True}),
    "a model in the old format": ("last.h5", of_the_old_format, {}),
    "a file of Keras, restored": ("last.keras", restored, {}),
    "weights of Keras, restored": ("last.weights.h5", restored, {"save_weights_only": True}),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore:Keras cannot load:UserWarning")
def test_a_new_process_loads_a_checkpoint_and_continues_its_run(folder, forks, name) -> None:
    """Its model predicts the same to the bit, and its checkpoints are of the same run."""
    path, _, options = FORMATS[name]
    model = Script(lambda checkpoint: checkpoint(path, **options)).run(kc.ModelCheckpoint)
    first = kc.CheckpointDirectory(path).latest()

    (loaded,) = forks.submit(acknowledged_by, load_and_train, str(folder), name).result()

    newest = kc.CheckpointDirectory(path).latest()
    assert loaded == predictions(model)
    assert (newest.run_id, newest.step) == (first.run_id, first.step + BATCHES)
    assert kc.CheckpointDirectory(path).verify().ok


def load_and_train(acknowledge: Callable[[Any], None], folder: str, name: str) -> None:
    """Loads a checkpoint, acknowledges its predictions, and trains."""
    os.chdir(folder)
    path, load, options = FORMATS[name]
    model = load(path)
    acknowledge(predictions(model))
    model.fit(**arrays(), epochs=1, verbose=0, callbacks=[kc.ModelCheckpoint(path, **options)])
