"""`ModelCheckpoint` with a path in a format of Keras: as Keras's callback, with records, policies and safe commits."""

from __future__ import annotations

import math
import os
import pathlib

import h5py
import keras
import numpy as np
import pytest

import keras_ckpt as kc
from support.models import HoldsSaves, Interrupts, Reports, WithFunction, X, Y, dense_model, fit


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """Each test works in a folder of its own, as a script does."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: pathlib.Path) -> list[str]:
    """The names of the files that Keras can load."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".keras", ".h5"))


def predictions(model: keras.Model) -> bytes:
    return model.predict(np.ones((4, 4), "float32"), verbose=0).tobytes()


def test_a_template_may_have_fields_in_its_folders(folder) -> None:
    """Keras creates such folders too."""
    fit(dense_model(), kc.ModelCheckpoint("w/e{epoch:02d}/m.keras", keep=kc.LatestN(2)), epochs=3)

    assert sorted(str(path) for path in pathlib.Path("w").rglob("*.keras")) == ["w/e02/m.keras", "w/e03/m.keras"]
    assert [record.epoch for record in kc.CheckpointDirectory("w/e{epoch:02d}/m.keras")] == [2, 3]


def test_a_policy_keeps_the_best_files_of_a_template(folder) -> None:
    """The directory of the template lists what is kept."""
    reports = Reports(val_loss=[0.3, 0.1, 0.2, 0.4])
    checkpoint = kc.ModelCheckpoint("{epoch}.keras", keep=kc.BestN(2))

    fit(dense_model(), reports, checkpoint, epochs=4)

    assert files(folder) == ["2.keras", "3.keras"]
    records = list(kc.CheckpointDirectory("{epoch}.keras"))
    assert [(record.epoch, record.metrics["val_loss"]) for record in records] == [(2, 0.1), (3, 0.2)]


def test_a_fixed_name_holds_the_best_model(folder) -> None:
    """A worse epoch does not replace it."""
    reports = Reports(val_loss=[0.3, 0.1, 0.2])
    checkpoint = kc.ModelCheckpoint("best.keras", save_best_only=True)

    fit(dense_model(), reports, checkpoint, epochs=3)

    assert files(folder) == ["best.keras"]
    assert kc.CheckpointDirectory("best.keras").latest().epoch == 2
    assert checkpoint.best == 0.1


def test_a_fixed_name_may_be_the_name_of_a_file_of_a_template(folder) -> None:
    """The saves replace this file alone, under its name."""
    model = dense_model()
    fit(model, kc.ModelCheckpoint("{epoch}.keras"), epochs=2)

    fit(model, kc.ModelCheckpoint("1.keras"), epochs=4, initial_epoch=2)

    assert files(folder) == ["1.keras", "2.keras"]
    assert kc.CheckpointDirectory("1.keras").latest().epoch == 4
    assert [record.epoch for record in kc.CheckpointDirectory("{epoch}.keras")] == [2]


def test_a_loaded_model_continues_its_run(folder) -> None:
    """Keras's own callback would forget the best value, and replace the file by a worse model."""
    checkpoint = kc.ModelCheckpoint("best.keras", save_best_only=True)
    fit(dense_model(), Reports(val_loss=[0.3, 0.1]), checkpoint, epochs=2)
    first = kc.CheckpointDirectory("best.keras").latest()

    model = keras.models.load_model("best.keras")
    fit(model, Reports(val_loss=[0.2, 0.05]), kc.ModelCheckpoint("best.keras", save_best_only=True), epochs=2)

    record = kc.CheckpointDirectory("best.keras").latest()
    assert (record.run_id, record.epoch, record.metrics["val_loss"]) == (first.run_id, 4, 0.05)


def test_the_files_of_an_earlier_run_with_other_names_stay(folder) -> None:
    """They are neither ranked nor pruned."""
    fit(dense_model(), Reports(val_loss=[0.1, 0.2]), kc.ModelCheckpoint("{epoch}-{val_loss}.keras"), epochs=2)

    checkpoint = kc.ModelCheckpoint("{epoch}-{val_loss}.keras", keep=kc.BestN(1))
    with pytest.warns(UserWarning, match="An earlier training wrote .*2-0.2.keras.*1-0.1.keras"):
        fit(dense_model(), Reports(val_loss=[0.9, 0.8]), checkpoint, epochs=2)

    assert files(folder) == ["1-0.1.keras", "2-0.2.keras", "2-0.8.keras"]


def test_a_number_of_batches_counts_from_the_last_save_of_the_callback(folder) -> None:
    """Five batches an epoch: a save each seven batches, across epochs and fits, as with Keras."""
    model, checkpoint = dense_model(), kc.ModelCheckpoint("{epoch}-{batch}.keras", save_freq=7)

    fit(model, checkpoint, epochs=3)
    fit(model, checkpoint, epochs=2)

    assert files(folder) == ["2-1.keras", "2-2.keras", "3-4.keras"]


@pytest.mark.parametrize("save_freq", [0, True, False, -3])
def test_a_number_of_batches_below_two_saves_each_batch(folder, save_freq) -> None:
    """Keras accepts any int."""
    fit(dense_model(), kc.ModelCheckpoint("{epoch}-{batch}.keras", save_freq=save_freq), batches=2)

    assert files(folder) == ["1-1.keras", "1-2.keras"]


def test_a_restarted_fit_saves_the_files_of_an_unbroken_fit(folder) -> None:
    """The count of batches since the last save resumes, and the names too."""

    def train(place: str, *callbacks: keras.callbacks.Callback) -> None:
        checkpoint = kc.ModelCheckpoint(f"{place}/{{epoch}}-{{batch}}.keras", save_freq=7)
        fit(dense_model(), checkpoint, kc.BackupAndRestore(f"{place}/backup"), *callbacks, epochs=5)

    train("unbroken")
    with pytest.raises(KeyboardInterrupt):
        train("broken", Interrupts(12))
    train("broken")

    assert files(folder / "broken") == files(folder / "unbroken") == ["2-2.keras", "3-4.keras", "5-1.keras"]


def test_names_count_the_epochs_of_the_fit_and_records_those_of_the_run(folder) -> None:
    """As with Keras, a second fit begins with the name of epoch 1."""
    model = dense_model()
    fit(model, kc.ModelCheckpoint("first-{epoch}.keras"), epochs=2)
    fit(model, kc.ModelCheckpoint("second-{epoch}.keras"))

    record = kc.CheckpointDirectory("second-{epoch}.keras").latest()
    assert (record.name, record.epoch, record.step) == ("second-1.keras", 3, 15)


def test_a_value_that_is_no_finite_number_is_never_best(folder) -> None:
    """A first NaN stops Keras's callback. An epoch without the metric would replace Keras's best file."""
    values = [math.nan, 0.5, None, math.inf, -math.inf, 0.4]

    fit(dense_model(), Reports(val_loss=values), kc.ModelCheckpoint("{epoch}.keras", save_best_only=True), epochs=6)

    assert files(folder) == ["2.keras", "6.keras"]


def test_a_metric_that_never_comes_is_told_in_the_words_of_keras(folder) -> None:
    """Each epoch is saved."""
    checkpoint = kc.ModelCheckpoint("{epoch}.keras", monitor="val_acc", mode="max", save_best_only=True)

    with pytest.warns(UserWarning, match="Can save best model only with val_acc available"):
        fit(dense_model(), Reports(val_loss=[0.5, 0.4]), checkpoint, epochs=2)

    assert files(folder) == ["1.keras", "2.keras"]


@pytest.mark.parametrize("path", ["gs://bucket/best.keras", "s3://bucket/{epoch}.keras"])
def test_a_path_in_a_remote_store_is_refused(folder, path) -> None:
    """A local folder of this name would hold the files otherwise."""
    with pytest.raises(ValueError, match=r"must be local\. Received: .*'"):
        kc.ModelCheckpoint(path)

    assert list(folder.iterdir()) == []


def test_a_file_that_the_user_wrote_over_stays(folder) -> None:
    """A callback of his replaces a file of the template. The policy keeps one file, and does not count his."""
    save_by_hand = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: epoch == 1 and model.save("1.keras")
    )
    model = dense_model()

    fit(model, kc.ModelCheckpoint("{epoch}.keras", keep=1), save_by_hand, epochs=3)

    assert files(folder) == ["1.keras", "3.keras"]
    assert kc.CheckpointDirectory("{epoch}.keras").listing().unmanaged == ("1.keras",)


def test_a_field_that_is_not_in_the_logs_becomes_nan_with_one_warning(folder) -> None:
    """Keras ends the training with a KeyError, after a whole epoch."""
    with pytest.warns(UserWarning, match=r"has {val_acc}, which a save does not have.* The metrics are: loss") as told:
        fit(dense_model(), kc.ModelCheckpoint("{epoch}-{val_acc:.2f}.keras"), epochs=2)

    assert files(folder) == ["1-nan.keras", "2-nan.keras"]
    assert len([each for each in told if each.category is UserWarning]) == 1


def test_the_end_of_an_epoch_has_no_batch(folder) -> None:
    """Keras raises a KeyError."""
    with pytest.warns(UserWarning, match=r"has {batch}, which a save does not have"):
        fit(dense_model(), kc.ModelCheckpoint("{epoch}-{batch}.keras"))

    assert files(folder) == ["1-nan.keras"]


def test_a_save_that_waits_for_the_epochs_end_gets_its_name_there(folder) -> None:
    """Three saves are due in three epochs. No warning tells of the missing metric. Keras raises an error."""
    checkpoint = kc.ModelCheckpoint("{epoch}-{val_loss}.keras", save_best_only=True, save_freq=4)

    fit(dense_model(), Reports(val_loss=[0.5, 0.6, 0.4]), checkpoint, epochs=3)

    assert files(folder) == ["1-0.5.keras", "3-0.4.keras"]
    assert [record.step for record in kc.CheckpointDirectory("{epoch}-{val_loss}.keras")] == [5, 15]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("{epoch:.1f}-{val_loss:02d}.keras", "1.0-0.5.keras"),
        ("{text:.2f}-{val_loss}.keras", "a_b_c-0.5.keras"),
        ("{parent}/m.keras", "_/m.keras"),
        ("e{empty}/{empty}/m.keras", "e_/_/m.keras"),
        ("{array:.3f}.keras", f"{str(np.ones(300))[:60]}.keras"),
        ("{batch}-{val_loss}.keras", "7-0.5.keras"),
    ],
)
def test_a_value_that_does_not_fit_its_format_is_text(folder, path, name) -> None:
    """Keras ends the training. No value leads into another folder, and the name is not too long."""
    logs = Reports(val_loss=[0.5], text=["a/b\0c"], parent=[".."], empty=[""], array=[np.ones(300)], batch=[7])

    fit(dense_model(), logs, kc.ModelCheckpoint(f"w/{path}"))

    assert [str(each.relative_to("w")) for each in pathlib.Path("w").rglob("*.keras")] == [name]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("{val_loss.__class__}.keras", "has the field {val_loss.__class__}"),
        ("{}.keras", "has the field {}"),
        ("{0}.keras", "has the field {0}"),
        ("{epoch!r}.keras", "has the field {epoch}"),
        ("{epoch.keras", "malformed"),
        ("{val/loss}.keras", "has the field {val/loss}"),
    ],
)
def test_a_malformed_template_is_refused_before_training(path, text) -> None:
    """With Keras each of these ends the training after an epoch, or reads attributes of objects."""
    with pytest.raises(ValueError, match=text):
        kc.ModelCheckpoint(path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"filepath": "a.keras", "save_weights_only": True}, "must end in `.weights.h5`"),
        ({"filepath": "a.weights.h5"}, "Pass save_weights_only=True"),
        ({"filepath": "a.keras", "keep": 3}, "One file cannot hold several checkpoints.*a-{epoch:02d}.keras"),
        ({"filepath": "a.keras", "keep": kc.BestN(3)}, "One file cannot hold several checkpoints"),
        ({"filepath": "a.keras", "save_freq": "batch"}, "Unrecognized save_freq"),
    ],
)
def test_arguments_that_contradict_the_path_are_refused(arguments, text) -> None:
    """The error names the argument."""
    with pytest.raises(ValueError, match=text):
        kc.ModelCheckpoint(**arguments)


def test_a_model_that_keras_cannot_save_as_a_whole_is_refused_at_the_first_batch(folder) -> None:
    """With Keras an epoch is lost. The error names the layer and the paths that work."""
    model = keras.Sequential([keras.Input((4,)), WithFunction(keras.ops.relu), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)

    with pytest.raises(ValueError, match=r"because WithFunction has no get_config\(\)\. .* in \.weights\.h5 with"):
        fit(model, kc.ModelCheckpoint("best.keras"))
    assert (files(folder), int(model.optimizer.iterations)) == ([], 1)

    fit(model, kc.ModelCheckpoint("best.weights.h5", save_weights_only=True))
    assert files(folder) == ["best.weights.h5"]


def test_an_existing_folder_at_the_path_is_refused(folder) -> None:
    """The words are Keras's."""
    (folder / "best.keras").mkdir()

    with pytest.raises(OSError, match="Please specify a non-directory filepath for ModelCheckpoint"):
        kc.ModelCheckpoint("best.keras")


def test_an_existing_folder_with_the_name_of_an_epoch_is_an_error_of_its_save(folder) -> None:
    """The files of earlier epochs are whole."""
    (folder / "2.keras").mkdir()

    with (
        pytest.warns(UserWarning, match=r"An earlier training wrote 2\.keras \(damaged\)"),
        pytest.raises(kc.SaveError, match=r"Could not save step 10 .*Is a directory: '2\.keras'") as caught,
    ):
        fit(dense_model(), kc.ModelCheckpoint("{epoch}.keras"), epochs=3)

    assert isinstance(caught.value, OSError)
    assert [record.name for record in kc.CheckpointDirectory("{epoch}.keras")] == ["1.keras"]


def test_the_best_value_can_be_assigned(folder) -> None:
    """Scripts for Keras's callback set it after a restart."""
    checkpoint = kc.ModelCheckpoint("best.keras", save_best_only=True)
    checkpoint.best = 0.2

    fit(dense_model(), Reports(val_loss=[0.3, 0.1, 0.25]), checkpoint, epochs=3)

    assert checkpoint.best == 0.1
    assert kc.CheckpointDirectory("best.keras").latest().epoch == 2


@pytest.mark.parametrize("path", ["best.keras", "w/best.keras", "{folder}/best.keras"])
@pytest.mark.parametrize("on_background", [False, True])
def test_verbose_prints_the_lines_of_keras(folder, capsys, path, on_background) -> None:
    """The path is as typed. The second line of a save comes before the line of the next save, not in an epoch."""
    path = path.format(folder=folder)
    checkpoint = kc.ModelCheckpoint(path, save_best_only=True, verbose=1, save_on_background=on_background)

    fit(dense_model(), Reports(val_loss=[0.25, 0.5, 0.125]), HoldsSaves(checkpoint), checkpoint, epochs=3)

    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        "begin 1",
        f"Epoch 1: val_loss improved from None to 0.25000, saving model to {path}",
        *(["begin 2"] if on_background else []),
        f"Epoch 1: finished saving model to {path}",
        *([] if on_background else ["begin 2"]),
        "Epoch 2: val_loss did not improve from 0.25000",
        "begin 3",
        f"Epoch 3: val_loss improved from 0.25000 to 0.12500, saving model to {path}",
        f"Epoch 3: finished saving model to {path}",
    ]


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
class TestTheLossOfALegacyFile:
    """Keras 3.15 writes the short name of a loss, such as `mse`, into a legacy `.h5` file and cannot load the file."""

    def test_is_warned_of_at_the_first_batch_if_keras_cannot_load_it(self, folder) -> None:
        """One warning names the loss and each way out."""
        with pytest.warns(UserWarning, match="Keras cannot load") as warned:
            fit(dense_model("digits"), kc.ModelCheckpoint("best.h5"), epochs=2)

        assert [str(each.message) for each in warned if each.category is UserWarning] == [
            "Keras cannot load 'digits' from its legacy .h5 files, because compile was given the loss by a short name: "
            "'mse'. Give ModelCheckpoint a filepath that ends in .keras. Or give compile the full name, such as "
            "'mean_squared_error'. keras.models.load_model(path, compile=False) loads the files without the loss and "
            "the optimizer."
        ]
        with pytest.raises(ValueError, match=r"Could not deserialize 'keras\.metrics\.mse'"):
            keras.models.load_model("best.h5")
        keras.models.load_model("best.h5", compile=False)

    @pytest.mark.parametrize(
        ("path", "loss"),
        [
            ("best.keras", "mse"),
            ("best.h5", "mean_squared_error"),
            ("best.h5", ["huber"]),
            ("best.h5", keras.losses.MeanSquaredError()),
            ("best.h5", keras.losses.mean_squared_error),
        ],
    )
    def test_is_not_warned_of_if_keras_loads_it(self, folder, path, loss) -> None:
        """A file in the format `.keras`, a full name, a function or an object."""
        fit(dense_model(loss=loss), kc.ModelCheckpoint(path))

        keras.models.load_model(path)

    def test_is_warned_of_for_one_of_several_outputs(self, folder) -> None:
        inputs = keras.Input((4,))
        outputs = {name: keras.layers.Dense(1, name=name)(inputs) for name in "ab"}
        model = keras.Model(inputs, outputs)
        model.compile("sgd", {"a": "mae", "b": "huber"}, run_eagerly=True)

        with pytest.warns(UserWarning, match="by a short name: 'mae'. Give"):
            model.fit(X, {"a": Y, "b": Y}, verbose=0, callbacks=[kc.ModelCheckpoint("best.h5")])


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5", "best.h5"])
@pytest.mark.filterwarnings("ignore:Keras cannot load:UserWarning")
@pytest.mark.parametrize("part", [0, 0.5, 0.999])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_file_that_was_cut_is_damaged(folder, name, part) -> None:
    """A file that lost its end has no record, but it is no file of another program either."""
    checkpoint = kc.ModelCheckpoint(name, save_weights_only="weights" in name)
    fit(dense_model(), checkpoint, epochs=1)
    os.truncate(name, int(os.path.getsize(name) * part))

    verification = kc.CheckpointDirectory(name).verify()

    assert not verification.ok
    assert list(verification.listing.damaged) == [name]
    with pytest.raises(kc.DamagedCheckpointError, match="it ends early"):
        kc.load_variables(name)


def test_a_whole_file_without_a_record_is_not_damaged(folder) -> None:
    """Keras wrote it."""
    model = dense_model()
    model.save("one.keras")
    model.save_weights("two.weights.h5")
    with h5py.File("three.weights.h5", "w", libver="latest") as file:
        file["value"] = [1.0]

    for name in ("one.keras", "two.weights.h5", "three.weights.h5"):
        listing = kc.CheckpointDirectory(name).listing()
        assert (listing.unmanaged, dict(listing.damaged)) == ((name,), {})


class ReadsAtOnce(keras.callbacks.Callback):
    """A callback of a user's own, which opens the file at the end of each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.same: list[bool] = []

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.same.append(predictions(keras.models.load_model("last.keras")) == predictions(self.model))


def test_a_later_callback_finds_the_file_of_the_same_epoch(folder) -> None:
    """Training waits for the file where a callback of the user's own comes after."""
    reads = ReadsAtOnce()

    fit(dense_model(), kc.ModelCheckpoint("last.keras"), reads, epochs=3)

    assert reads.same == [True] * 3


def test_a_later_function_finds_the_file_of_the_same_epoch(folder) -> None:
    """The class `LambdaCallback` is Keras's, and its functions are the user's."""
    found = []
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: found.append(files(folder)))

    fit(dense_model(), kc.ModelCheckpoint("{epoch}.keras"), look, epochs=2)

    assert found == [["1.keras"], ["1.keras", "2.keras"]]


def test_wait_waits_for_the_file(folder) -> None:
    """A callback that comes before, or another thread, can ask for it."""
    checkpoint = kc.ModelCheckpoint("last.keras", save_on_background=True)

    def look(epoch, logs) -> None:
        checkpoint.wait()
        assert kc.CheckpointDirectory("last.keras").latest().epoch == epoch + 1

    fit(dense_model(), checkpoint, keras.callbacks.LambdaCallback(on_epoch_end=look), epochs=2)


class Subclass(kc.ModelCheckpoint):
    """A subclass that overrides the methods of Keras's callback, as trackers do."""

    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.saved: list[str] = []

    def _should_save_model(self, epoch, batch, logs, filepath) -> bool:
        return epoch != 1 and super()._should_save_model(epoch, batch, logs, filepath)

    def _get_file_path(self, epoch, batch, logs) -> str:
        return super()._get_file_path(epoch + 100, batch, logs)

    def _save_model(self, epoch, batch, logs) -> None:
        self.saved.append(self._get_file_path(epoch, batch, logs))
        super()._save_model(epoch, batch, logs)


def test_the_methods_that_subclasses_of_kerass_callback_override_are_called(folder) -> None:
    """The path, the decision and the save can be overridden."""
    checkpoint = Subclass("model-{epoch}.keras")

    fit(dense_model(), checkpoint, epochs=3)

    assert files(folder) == ["model-101.keras", "model-103.keras"]
    assert [os.path.basename(path) for path in checkpoint.saved] == [f"model-10{epoch}.keras" for epoch in (1, 2, 3)]
    assert checkpoint.monitor_op is keras.ops.less


class Uploads(kc.ModelCheckpoint):
    """A subclass that reads each file after its save, as the callback of Weights & Biases does."""

    def __init__(self, *arguments, **named) -> None:
        super().__init__(*arguments, **named)
        self.read: list[tuple[str, bool]] = []

    def on_train_batch_end(self, batch, logs=None) -> None:
        if self._should_save_on_batch(batch):
            self._save_model(epoch=self._current_epoch, batch=batch, logs=logs)
            self.upload(self._get_file_path(epoch=self._current_epoch, batch=batch, logs=logs))

    def on_epoch_end(self, epoch, logs=None) -> None:
        super().on_epoch_end(epoch, logs)
        if self.save_freq == "epoch":
            self.upload(self._get_file_path(epoch=epoch, batch=None, logs=logs))

    def upload(self, path: str) -> None:
        same = os.path.exists(path) and predictions(keras.models.load_model(path)) == predictions(self.model)
        self.read.append((os.path.basename(path), same))


@pytest.mark.parametrize(
    ("path", "save_freq", "names"),
    [("{epoch}.keras", "epoch", ["1.keras", "2.keras"]), ("{epoch}-{batch}.keras", 4, ["1-4.keras", "2-3.keras"])],
)
def test_a_subclass_finds_the_file_after_its_save(folder, path, save_freq, names) -> None:
    """Training waits for the file, because the code of the subclass could read it."""
    checkpoint = Uploads(path, save_freq=save_freq)

    fit(dense_model(), checkpoint, epochs=2)

    assert checkpoint.read == [(name, True) for name in names]


class Elsewhere(kc.ModelCheckpoint):
    def _get_file_path(self, epoch, batch, logs) -> str:
        return "elsewhere.keras"


def test_a_subclass_that_saves_outside_the_template_is_refused(folder) -> None:
    """No later process would find the file."""
    with pytest.raises(
        ValueError, match=r"_get_file_path\(\) returned 'elsewhere.keras', which is not of the template"
    ):
        fit(dense_model(), Elsewhere("model-{epoch}.keras"))


def test_two_callbacks_save_two_series_into_one_folder(folder) -> None:
    """Each has its own records and policy."""
    best = kc.ModelCheckpoint("best.keras", save_best_only=True)
    latest = kc.ModelCheckpoint("{epoch}.weights.h5", save_weights_only=True, keep=2)

    fit(dense_model(), Reports(val_loss=[0.1, 0.2, 0.3]), best, latest, epochs=3)

    assert files(folder) == ["2.weights.h5", "3.weights.h5", "best.keras"]
    assert kc.CheckpointDirectory("best.keras").latest().epoch == 1


def test_a_directory_of_checkpoints_and_a_file_share_a_folder(folder) -> None:
    """Each callback sees its own checkpoints alone."""
    best = kc.ModelCheckpoint("runs/best.keras", save_best_only=True)

    fit(dense_model(), Reports(val_loss=[0.1, 0.2, 0.3]), best, kc.ModelCheckpoint("runs", keep=2), epochs=3)

    assert [record.epoch for record in kc.CheckpointDirectory("runs")] == [2, 3]
    assert [record.epoch for record in kc.CheckpointDirectory("runs/best.keras")] == [1]


def test_a_killed_process_leaves_the_file_of_before_or_the_new_file(fork_server, folder) -> None:
    """The process is killed while it saves again and again; the file always loads, with its own record."""
    import random
    import time

    script = """
import keras_ckpt as kc
from support.models import dense_model, fit
fit(dense_model(), kc.ModelCheckpoint("last.keras", save_freq=1), epochs=400)
"""
    for _ in range(2):
        process = fork_server.start(script)
        deadline = time.monotonic() + 60
        while not (folder / "last.keras").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(random.random())
        process.kill()
        process.wait()

        model = keras.models.load_model("last.keras")
        record = kc.CheckpointDirectory("last.keras").latest()
        assert record is not None
        assert int(model.optimizer.iterations.numpy()) == record.step
        (folder / "last.keras").unlink()
