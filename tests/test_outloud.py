"""Differences between a program and its checkpoints: each is an error that says how to mend it, or a warning."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
from support.models import Interrupts, X, Y, dense_model, fit, same, values
from support.runs import Filler, unprivileged_user

optimizers = keras.optimizers


def lines(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    """The texts of the warnings, each of which must point at this file."""
    caught = list(caught)
    here = pathlib.Path(__file__)
    assert {each.filename for each in caught} <= {__file__, str(here.with_name("support") / "models.py")}
    return [str(each.message) for each in caught]


class TestAFitWithoutACompleteBatch:
    """A fit in which no batch ended leaves no files."""

    @pytest.mark.parametrize("delete", [True, False])
    def test_of_no_epochs_leaves_no_directory(self, backup, delete) -> None:
        fit(dense_model(), kc.BackupAndRestore(backup, delete_checkpoint=delete), epochs=0)

        assert not backup.exists()

    @pytest.mark.parametrize(
        "moment", ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"]
    )
    @pytest.mark.parametrize("inside", [True, False], ids=["with", "without with"])
    def test_has_no_backup(self, backup, moment, inside) -> None:
        """Wherever the error occurs, with or without a `with` statement."""
        bug = keras.callbacks.Callback()
        setattr(bug, moment, fails)
        callback = kc.BackupAndRestore(backup)

        with pytest.raises(KeyError, match="a bug"), callback if inside else contextlib.nullcontext():
            fit(dense_model(), callback, bug)

        assert not list(kc.CheckpointDirectory(backup))

    @pytest.mark.parametrize(
        "mended",
        [
            lambda: dense_model(optimizer=optimizers.Adam(0.5)),
            lambda: dense_model(optimizer="sgd", loss="mae"),
            lambda: keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="other")]),
        ],
    )
    def test_does_not_affect_the_fixed_program(self, backup, mended, recwarn) -> None:
        """The fixed program trains as if the failed fit had not happened."""
        bug = keras.callbacks.LambdaCallback(on_train_batch_end=fails)
        with pytest.raises(KeyError, match="a bug"), kc.BackupAndRestore(backup) as callback:
            fit(dense_model(), callback, bug)
        trained = []
        for own in ([], [kc.BackupAndRestore(backup)]):
            keras.utils.set_random_seed(1)
            model = mended()
            if not model.compiled:
                model.compile("sgd", "mse", run_eagerly=True)
            fit(model, *own)
            trained.append(model)

        assert same(*trained)
        assert lines(recwarn) == []

    @pytest.mark.parametrize("empty", [lambda data: data.take(0), lambda data: data.filter(lambda *batch: False)])
    @pytest.mark.filterwarnings("ignore:Your input ran out of data:UserWarning")
    def test_of_data_without_batches_saves_nothing(self, tmp_path, empty) -> None:
        """A later fit with data trains all epochs."""
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)

        def train(data) -> keras.callbacks.History:
            saves = [kc.ModelCheckpoint(tmp_path / "run"), kc.BackupAndRestore(tmp_path / "b", delete_checkpoint=False)]
            return dense_model().fit(data, epochs=2, verbose=0, shuffle=False, callbacks=saves)

        train(empty(data))

        assert not list(kc.CheckpointDirectory(tmp_path / "run"))
        assert not list(kc.CheckpointDirectory(tmp_path / "b"))
        assert len(train(data).history["loss"]) == 2


def fails(*arguments: object, **logs: object) -> None:
    raise KeyError("a bug")


SETTINGS = {
    "another learning rate": (
        {"optimizer": optimizers.Adam(0.1)},
        {"optimizer": optimizers.Adam(0.2)},
        r"learning_rate is 0\.1 as saved, not 0\.2 as in the program. To take the program's, set",
    ),
    "another schedule of the learning rate": (
        {"optimizer": optimizers.Adam(optimizers.schedules.ExponentialDecay(0.1, 10, 0.9))},
        {"optimizer": optimizers.Adam(optimizers.schedules.ExponentialDecay(0.2, 10, 0.9))},
        r"initial_learning_rate is 0\.2 as in the program, not 0\.1 as saved\.$",
    ),
    "another weight decay": (
        {"optimizer": optimizers.AdamW(0.1, weight_decay=0.1)},
        {"optimizer": optimizers.AdamW(0.1, weight_decay=0.2)},
        r"weight_decay is 0\.2 as in the program, not 0\.1 as saved\.$",
    ),
    "another clipping": (
        {"optimizer": optimizers.Adam(0.1)},
        {"optimizer": optimizers.Adam(0.1, clipnorm=1.0)},
        r"clipnorm is 1 as in the program, not None as saved\.$",
    ),
    "another loss": (
        {"loss": "mse"},
        {"loss": "mae"},
        "loss is 'mean_absolute_error' as in the program, not 'mean_squared_error' as saved",
    ),
    "another setting of a loss": (
        {"loss": keras.losses.Huber(delta=1.0)},
        {"loss": keras.losses.Huber(delta=2.0)},
        r"loss is \['Huber', .*'delta': 2\.0.* as in the program, not 'huber' as saved",
    ),
    "other weights of losses": (
        {"loss": ["mse"], "loss_weights": [1.0]},
        {"loss": ["mse"], "loss_weights": [2.0]},
        r"loss_weights is \[2\.0\] as in the program, not \[1\.0\] as saved",
    ),
}


def of(options: dict) -> keras.Model:
    """A model with a copy of the given optimizer."""
    options = dict(options)
    if "optimizer" in options:
        options["optimizer"] = type(options["optimizer"]).from_config(options["optimizer"].get_config())
    keras.utils.set_random_seed(1)
    return dense_model(**options)


class TestADifferenceInCompile:
    """One warning names each setting that differs between the program and the checkpoint, with both values."""

    @pytest.mark.parametrize("name", SETTINGS)
    def test_is_warned_of_at_a_restore(self, tmp_path, name) -> None:
        before, after, message = SETTINGS[name]
        fit(of(before), kc.ModelCheckpoint(tmp_path))

        with pytest.warns(UserWarning, match=message) as caught:
            kc.restore(of(after), tmp_path)
        assert len(lines(caught)) == 1

    @pytest.mark.parametrize("name", SETTINGS)
    def test_is_warned_of_at_a_restart(self, backup, name) -> None:
        before, after, message = SETTINGS[name]
        fit(of(before), kc.BackupAndRestore(backup, delete_checkpoint=False))

        with pytest.warns(UserWarning, match=message) as caught:
            fit(of(after), kc.BackupAndRestore(backup), epochs=2)
        assert len(lines(caught)) == 1

    @pytest.mark.parametrize("name", SETTINGS)
    def test_is_not_warned_of_with_equal_settings(self, tmp_path, name, recwarn) -> None:
        _, after, _ = SETTINGS[name]
        fit(of(after), kc.ModelCheckpoint(tmp_path))

        kc.restore(of(after), tmp_path)

        assert lines(recwarn) == []

    @pytest.mark.parametrize("name", ["mse", "mean_squared_error", "huber", "binary_crossentropy"])
    def test_is_not_warned_of_with_another_spelling_of_a_loss(self, tmp_path, name, recwarn) -> None:
        """A name, a function and an object may be the same Keras loss."""
        function = keras.losses.get(name)
        kind = {"huber": keras.losses.Huber, "binary_crossentropy": keras.losses.BinaryCrossentropy}
        fit(of({"loss": name}), kc.ModelCheckpoint(tmp_path))

        for loss in (function, kind.get(name, keras.losses.MeanSquaredError)()):
            kc.restore(of({"loss": loss}), tmp_path)

        assert lines(recwarn) == []

    def test_the_learning_rate_of_the_checkpoint_holds_until_a_callback_sets_another(self, backup) -> None:
        """The warning names the method of the callback."""
        fit(of({"optimizer": optimizers.Adam(0.1)}), kc.BackupAndRestore(backup, delete_checkpoint=False))
        again = of({"optimizer": optimizers.Adam(0.2)})
        with pytest.warns(
            UserWarning, match=r"set model\.optimizer\.learning_rate in on_train_batch_begin of a callback"
        ):
            fit(again, kc.BackupAndRestore(backup, delete_checkpoint=False), epochs=2)
        assert float(again.optimizer.learning_rate) == pytest.approx(0.1)

        sets = keras.callbacks.LambdaCallback(
            on_train_batch_begin=lambda batch, logs: again.optimizer.learning_rate.assign(0.2)
        )
        with pytest.warns(UserWarning, match="learning_rate"):
            fit(again := of({"optimizer": optimizers.Adam(0.2)}), sets, kc.BackupAndRestore(backup), epochs=3)

        assert float(again.optimizer.learning_rate) == pytest.approx(0.2)

    def test_in_the_learning_rate_schedule_is_warned_of(self, tmp_path) -> None:
        decay = optimizers.schedules.CosineDecay
        fit(of({"optimizer": optimizers.Adam(decay(0.1, 10))}), kc.ModelCheckpoint(tmp_path))

        with pytest.warns(UserWarning, match="learning_rate"):
            kc.restore(of({"optimizer": optimizers.Adam(decay(0.1, 99))}), tmp_path)

    def test_is_not_warned_of_with_a_loss_in_a_list(self, tmp_path, recwarn) -> None:
        """A list of one loss equals the loss."""
        fit(of({"loss": "mse"}), kc.ModelCheckpoint(tmp_path))

        kc.restore(of({"loss": ["mse"]}), tmp_path)

        assert lines(recwarn) == []

    def test_a_callback_can_set_the_learning_rate_within_the_resumed_epoch(self, backup) -> None:
        """The advice of the warning works from the first batch."""
        data = kc.ResumableDataset(X, Y, batch_size=8)
        rates = []

        class Sets(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None) -> None:
                self.model.optimizer.learning_rate.assign(0.5)

            def on_train_batch_end(self, batch, logs=None) -> None:
                rates.append(float(self.model.optimizer.learning_rate))

        def train(model: keras.Model, *others: keras.callbacks.Callback) -> None:
            model.fit(
                data, verbose=0, shuffle=False,
                callbacks=[*others, kc.BackupAndRestore(backup, save_freq=1, data=data)],
            )  # fmt: skip

        with pytest.raises(KeyboardInterrupt):
            train(of({"optimizer": optimizers.Adam(0.1)}), Interrupts(3))
        with pytest.warns(UserWarning, match="in on_train_batch_begin of a callback"):
            train(of({"optimizer": optimizers.Adam(0.5)}), Sets())

        assert len(rates) < 5
        assert {*rates} == {0.5}


def phases(trainable: bool, optimizer: object) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, name="backbone", trainable=trainable),
            keras.layers.Dense(1, name="head"),
        ]
    )
    model.compile(optimizer, "mse", run_eagerly=True)
    return model


class TestASecondPhase:
    """Another process unfreezes layers or uses another optimizer, and continues the run in its directory."""

    @pytest.mark.parametrize("optimizer", ["sgd", "adam", optimizers.Adam(1e-5)])
    @pytest.mark.parametrize("trainable", [True, False])
    def test_continues_with_weights_only(self, tmp_path, optimizer, trainable) -> None:
        if not isinstance(optimizer, str):
            optimizer = optimizers.Adam(1e-5)
        first = phases(False, "adam")
        fit(first, kc.ModelCheckpoint(tmp_path), epochs=2)
        model = phases(trainable, optimizer)

        report = kc.restore(model, tmp_path, weights_only=True)

        np.testing.assert_equal(model.get_weights(), first.get_weights())
        assert int(model.optimizer.iterations) == 0
        assert report.epoch == 2
        fit(model, kc.ModelCheckpoint(tmp_path), initial_epoch=2, epochs=3)
        assert [record.step for record in kc.CheckpointDirectory(tmp_path)] == [5, 10, 15]

    def test_may_compile_after_the_restore(self, tmp_path, recwarn) -> None:
        """The new optimizer has no state to lose."""
        fit(phases(False, "adam"), kc.ModelCheckpoint(tmp_path), epochs=2)
        model = phases(True, "sgd")
        kc.restore(model, tmp_path, weights_only=True)
        model.get_layer("backbone").trainable = False
        model.compile("adam", "mse", run_eagerly=True)

        fit(model, kc.ModelCheckpoint(tmp_path), initial_epoch=2, epochs=3)

        assert lines(recwarn) == []

    def test_is_advised_if_the_optimizer_does_not_match(self, tmp_path) -> None:
        """The weights match, the optimizer does not: the error names `weights_only=True`."""
        fit(phases(False, "adam"), kc.ModelCheckpoint(tmp_path))
        model = phases(True, "sgd")
        before = values(model)

        with pytest.raises(kc.MismatchError, match="weights_only=True"):
            kc.restore(model, tmp_path)
        np.testing.assert_equal(values(model)[: len(before)], before)

    def test_is_advised_by_the_restore_that_a_refused_fit_advises(self, tmp_path) -> None:
        """The advice of both errors, one after the other, continues the run."""
        fit(phases(False, "adam"), kc.ModelCheckpoint(tmp_path))
        model = phases(True, "sgd")
        with pytest.raises(kc.DirectoryNotEmptyError, match=r"keras_ckpt\.restore\(model, "):
            fit(model, kc.ModelCheckpoint(tmp_path))
        with pytest.raises(kc.MismatchError, match="weights_only=True"):
            kc.restore(model, tmp_path)
        kc.restore(model, tmp_path, weights_only=True)

        fit(model, kc.ModelCheckpoint(tmp_path))

        assert [record.step for record in kc.CheckpointDirectory(tmp_path)] == [5, 10]

    def test_merges_low_rank_updates(self, tmp_path) -> None:
        """The model without LoRA predicts as the model with LoRA."""
        first = phases(True, "adam")
        first.get_layer("backbone").enable_lora(2)
        first.compile("adam", "mse", run_eagerly=True)
        fit(first, kc.ModelCheckpoint(tmp_path), epochs=3)
        model = phases(True, "sgd")

        kc.restore(model, tmp_path, weights_only=True)

        np.testing.assert_allclose(model(X), first(X), atol=1e-6)
        assert not np.allclose(model.get_layer("backbone").kernel, first.get_layer("backbone")._kernel)


class TestLowRankUpdates:
    """Low-rank updates of kernels (LoRA): a kernel without its update predicts differently."""

    @pytest.fixture
    def saved(self, tmp_path) -> keras.Model:
        model = phases(True, "adam")
        model.get_layer("backbone").enable_lora(2, lora_alpha=6)
        model.compile("adam", "mse", run_eagerly=True)
        fit(model, kc.ModelCheckpoint(tmp_path), epochs=2)
        return model

    def test_that_the_model_lacks_are_refused_with_advice_to_merge_them(self, saved, tmp_path) -> None:
        model = phases(True, "adam")

        with pytest.raises(kc.MismatchError, match="restore with weights_only=True"):
            kc.restore(model, tmp_path)
        kc.restore(model, tmp_path, weights_only=True)

        np.testing.assert_allclose(model(X), saved(X), atol=1e-5)

    def test_that_a_partial_restore_skips_are_warned_of(self, saved, tmp_path) -> None:
        with pytest.warns(
            UserWarning, match=r"its predictions differ: model/backbone .* weights_only=True\) merges them"
        ):
            kc.restore(phases(True, "adam"), tmp_path, strict=False)

    def test_of_another_scale_are_a_difference(self, saved, tmp_path) -> None:
        model = phases(True, "adam")
        model.get_layer("backbone").enable_lora(2, lora_alpha=3)
        model.compile("adam", "mse", run_eagerly=True)

        with pytest.raises(kc.MismatchError, match=r"lora_alpha / rank is 1\.5 in the model, 3 in the checkpoint"):
            kc.restore(model, tmp_path)


class TestAPartialRestore:
    """A restore with `strict=False`."""

    def test_that_restores_nothing_of_the_model_is_an_error(self, tmp_path) -> None:
        fit(phases(True, "adam"), kc.ModelCheckpoint(tmp_path))
        other = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(8, name="stem"), keras.layers.Dense(1, name="top")]
        )
        other.compile("adam", "mse")
        before = other.get_weights()

        with pytest.raises(kc.MismatchError, match=r"nothing that fits .*(.|\n)*Give the layers the names"):
            kc.restore(other, tmp_path, strict=False)
        np.testing.assert_equal(other.get_weights(), before)

    def test_that_restores_a_seed_alone_is_an_error(self, tmp_path) -> None:
        """No weight of the model matches."""

        def model(name: str) -> keras.Model:
            layers = [keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(1, name=name)]
            return keras.Sequential(layers)

        saved = model("head")
        saved.compile("adam", "mse", run_eagerly=True)
        fit(saved, kc.ModelCheckpoint(tmp_path))

        with pytest.raises(kc.MismatchError, match="nothing that fits"):
            kc.restore(model("top"), tmp_path, strict=False)

    @pytest.mark.filterwarnings("ignore:The model does not have any trainable weights:UserWarning")
    def test_of_a_model_of_seeds_restores_them(self, tmp_path) -> None:
        saved = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5)])
        saved.compile("adam", "mse", run_eagerly=True)
        fit(saved, kc.ModelCheckpoint(tmp_path))

        report = kc.restore(keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5)]), tmp_path, strict=False)

        assert report.matched == ("model/seed_generator/seed_generator_state",)

    @pytest.mark.parametrize("name", ["top", "backbone2"])
    def test_warns_of_exactly_the_layers_that_it_skips(self, tmp_path, name) -> None:
        """One warning names these layers and no others."""
        fit(phases(True, "adam"), kc.ModelCheckpoint(tmp_path))
        other = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(8, name="backbone"), keras.layers.Dense(3, name=name)]
        )

        with pytest.warns(UserWarning, match=rf"Left as they were: model/{name} \(2\)\.") as caught:
            kc.restore(other, tmp_path, strict=False)
        assert len(lines(caught)) == 1

    def test_leaves_an_optimizer_of_another_class_as_compiled(self, tmp_path) -> None:
        fit(phases(True, "sgd"), kc.ModelCheckpoint(tmp_path))
        model = phases(True, optimizers.Adam(0.25))

        with pytest.warns(UserWarning, match="optimizer is 'Adam' as in the program, not 'SGD' as saved"):
            report = kc.restore(model, tmp_path, strict=False)

        assert float(model.optimizer.learning_rate) == 0.25
        assert not [name for name in report.matched if name.startswith("optimizer/")]


class TestTwoFitsWithOneBackupDirectory:
    """A script trains two models with the same backup directory."""

    @pytest.mark.parametrize("second", [lambda: phases(True, "adam"), lambda: phases(False, "sgd"), dense_model])
    def test_raise_an_error_that_says_that_the_backup_is_of_another_fit(self, backup, monkeypatch, second) -> None:
        """The script was killed in its second fit. Its restart finds the backup in the first fit."""
        from keras_ckpt.resume import backup_and_restore

        fit(phases(False, "adam"), kc.BackupAndRestore(backup))
        with pytest.raises(RuntimeError, match="killed"):
            fit(second(), kc.BackupAndRestore(backup), Interrupts(8, RuntimeError("killed")), epochs=2)
        monkeypatch.setattr(backup_and_restore, "_ended", type(backup_and_restore._ended)())  # as in a new process

        with pytest.raises(kc.MismatchError, match=r"another fit.*give each fit\(\) a backup_dir of its own") as error:
            fit(phases(False, "adam"), kc.BackupAndRestore(backup))
        assert "strict=False" not in str(error.value)


def plain() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", "mse", run_eagerly=True)
    return model


@pytest.mark.parametrize("make", [lambda: dense_model(optimizer=optimizers.SGD(momentum=0.9)), plain])
def test_the_advice_of_an_error_at_a_restart_works(backup, make) -> None:
    """BackupAndRestore has no `strict`; clearing the backup works."""
    fit(dense_model(), kc.BackupAndRestore(backup, delete_checkpoint=False))

    with pytest.raises(kc.MismatchError) as error:
        fit(make(), kc.BackupAndRestore(backup), epochs=2)

    assert "strict" not in str(error.value)
    (path,) = re.findall(r"keras_ckpt\.CheckpointDirectory\('([^']*)'\)\.clear\(\)", str(error.value))
    kc.CheckpointDirectory(path).clear()
    fit(make(), kc.BackupAndRestore(backup), epochs=2)


class TestAReadOnlyDirectory:
    """The error names the path that cannot be written."""

    @pytest.fixture
    def directory(self) -> Iterator[pathlib.Path]:
        """A directory with two checkpoints that all users may read and no user may change."""
        with tempfile.TemporaryDirectory(dir="/tmp") as path:  # all users may enter /tmp
            Filler(pathlib.Path(path)).save("10 20")
            for folder, _, files in os.walk(path):
                for each in (folder, *(f"{folder}/{file}" for file in files)):
                    os.chmod(each, 0o555 if os.path.isdir(each) else 0o444)
            yield pathlib.Path(path)

    @pytest.mark.parametrize(
        "write",
        [
            lambda path: fit(dense_model(), kc.ModelCheckpoint(path, keep=kc.LatestN(1))),
            lambda path: fit(dense_model(), kc.BackupAndRestore(path / "backup")),
            lambda path: kc.CheckpointDirectory(path).prune(kc.LatestN(1)),
            lambda path: kc.CheckpointDirectory(path).pin(10),
            lambda path: kc.CheckpointDirectory(path).add_metrics(10, loss=1.0),
            lambda path: kc.CheckpointDirectory(path).clear(),
        ],
        ids=["ModelCheckpoint", "BackupAndRestore", "prune", "pin", "add_metrics", "clear"],
    )
    def test_is_named_in_the_error_of_each_writer(self, directory, write) -> None:
        with unprivileged_user(), pytest.raises(OSError, match=re.escape(str(directory))) as error:
            write(directory)

        paths = re.findall(r"(/[\w./-]+)", str(error.value))
        assert {path for path in paths if not os.path.exists(path.rstrip("."))} <= {f"{directory}/backup"}, error.value
        assert sorted(record.step for record in kc.CheckpointDirectory(directory)) == [10, 20]


class TestTheMonitor:
    """A monitor that this fit never measures ranks nothing, whatever metrics older checkpoints have."""

    def two(self, path, first: str, second: str, *, monitor: str, mode: str) -> list[int]:
        model = dense_model(metrics=[keras.metrics.MeanAbsoluteError(name=first)])
        options = {"monitor": monitor, "mode": mode, "keep": kc.BestN(1)}
        fit(model, kc.ModelCheckpoint(path, **options), epochs=1, validation_data=(X, Y))
        fresh = dense_model(metrics=[keras.metrics.MeanAbsoluteError(name=second)])
        kc.restore(fresh, path)
        fit(fresh, kc.ModelCheckpoint(path, **options), initial_epoch=1, epochs=4, validation_data=(X, Y))
        return [record.epoch for record in kc.CheckpointDirectory(path)]

    @pytest.mark.parametrize(
        ("first", "second", "monitor"), [("auc", "auc_1", "val_auc"), ("f1", "score", "val_f1"), ("a", "b", "a")]
    )
    def test_under_another_name_keeps_everything(self, tmp_path, first, second, monitor) -> None:
        with pytest.warns(UserWarning, match=f"'{monitor}' is not there.* every checkpoint is saved") as caught:
            kept = self.two(tmp_path, first, second, monitor=monitor, mode="max")

        assert kept == [1, 2, 3, 4]
        assert len(lines(caught)) == 1

    def test_of_the_previous_process_is_warned_of_if_missing_after_a_restart(self, tmp_path, backup) -> None:
        """A notebook's second AUC metric has another name than the metric in the backup."""

        def run(name: str, *more: keras.callbacks.Callback) -> None:
            model = dense_model(metrics=[keras.metrics.MeanAbsoluteError(name=name)])
            saves = kc.ModelCheckpoint(tmp_path / "run", monitor="auc", mode="max", keep=kc.BestN(2))
            fit(model, saves, kc.BackupAndRestore(backup), *more, epochs=5)

        with pytest.raises(RuntimeError, match="crash"):
            run("auc", Interrupts(12, RuntimeError("crash")))
        with pytest.warns(UserWarning, match="'auc' is not there"):
            run("auc_1")

        assert {15, 20, 25} <= {record.step for record in kc.CheckpointDirectory(tmp_path / "run")}

    @pytest.mark.parametrize(
        "monitor", ["val_head_accuracy", "loss", "head_acc", "val_accuracy", "val_mae", "val_lossy"]
    )
    def test_a_hint_names_only_a_metric_of_the_logs(self, tmp_path, monitor) -> None:
        """The hint of an error or a warning, for a model with two outputs."""

        def model():
            inputs = keras.Input((4,))
            outputs = {
                "head": keras.layers.Dense(1, name="head")(inputs),
                "tail": keras.layers.Dense(1, name="tail")(inputs),
            }
            model = keras.Model(inputs, outputs)
            model.compile("sgd", {"head": "mse", "tail": "mse"}, metrics={"head": ["accuracy"]}, run_eagerly=True)
            return model

        y = {"head": Y[:5], "tail": Y[:5]}
        options = {"validation_data": (X[:5], y), "verbose": 0, "epochs": 2}
        there = model().fit(X[:5], y, **options).history
        texts = []
        for mode in ("auto", "max"):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                callback = kc.ModelCheckpoint(tmp_path / mode, monitor=monitor, mode=mode, keep=kc.BestN(1))
                try:
                    model().fit(X[:5], y, callbacks=[callback], **options)
                except ValueError as error:
                    texts.append(str(error))
            texts += lines(each for each in caught if each.category is UserWarning)
        assert bool(texts) == (monitor not in there)
        hints = [hint for text in texts for hint in re.findall("Did you mean '([^']*)'", text)]
        assert set(hints) <= set(there)
