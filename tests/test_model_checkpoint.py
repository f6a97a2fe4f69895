"""`ModelCheckpoint` in real fits: what it saves, ranks, keeps and refuses."""

import contextlib
import datetime
import io
import math
import os
import pathlib
import re
import warnings

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.store.files import Folder
from support.frameworks import needs_executions, tf
from support.models import HoldsSaves, Interrupts, Reports, X, Y, dense_model, fit, same, warned


def steps(runs: kc.CheckpointDirectory) -> list[int]:
    return [record.step for record in runs]


def trained(runs, losses, **options) -> kc.CheckpointDirectory:
    """Trains with epochs of one batch that report these validation losses."""
    checkpoint = kc.ModelCheckpoint(runs.path, **options)
    fit(dense_model(), Reports(val_loss=losses), checkpoint, epochs=len(losses), batches=1)
    return runs


class Undirected(keras.metrics.Metric):
    """A metric that does not define whether less or more is better."""

    def update_state(self, y_true, y_pred, sample_weight=None) -> None:
        pass

    def result(self):
        return 0.5


class OwnAUC(keras.metrics.AUC):
    """A custom metric, which Keras could not build from its config."""


ALL = kc.EveryNSteps(1)
"""A policy that keeps every save."""


class Writes(io.StringIO):
    """An output that keeps each write apart."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes += [text] if text else []
        return len(text)


class TestSaves:
    def test_each_epoch_is_saved_by_default(self, runs) -> None:
        """A record has the position, the metrics, and the reason of the save."""
        fit(dense_model(), kc.ModelCheckpoint(runs.path), epochs=2, validation_data=(X, Y))

        assert [(r.step, r.epoch, r.batch, r.reason) for r in runs] == [(5, 1, 0, "epoch"), (10, 2, 0, "epoch")]
        assert set(runs[5].metrics) == {"loss", "val_loss"}
        assert (runs[5].monitor, runs[5].mode) == ("val_loss", "min")
        assert set(runs[5].versions) == {"keras_ckpt", "keras", keras.backend.backend(), "python"}
        assert set(runs[5].timings) == {"write_ms", "blocked_ms"}
        assert len({record.run_id for record in runs}) == 1

    def test_it_is_an_instance_of_keras_model_checkpoint(self, runs) -> None:
        """Code that expects Keras's callback accepts this one."""
        assert isinstance(kc.ModelCheckpoint(runs.path), keras.callbacks.ModelCheckpoint)

    def test_the_first_arguments_are_those_of_keras_in_the_same_order(self) -> None:
        """Users switch by changing the import."""
        import inspect

        ours = list(inspect.signature(kc.ModelCheckpoint).parameters)
        theirs = list(inspect.signature(keras.callbacks.ModelCheckpoint).parameters)

        assert ours[: len(theirs)] == theirs

    def test_metadata_is_a_dict_or_a_function_of_the_logs(self, tmp_path) -> None:
        """The sidecar has the dict, or the dict that the function returns."""
        for name, metadata in (("a", {"dataset": "digits"}), ("b", lambda logs: {"rounded": round(logs["loss"], 1)})):
            fit(dense_model(), kc.ModelCheckpoint(tmp_path / name, metadata=metadata))

        assert kc.CheckpointDirectory(tmp_path / "a").latest().metadata == {"dataset": "digits"}
        assert set(kc.CheckpointDirectory(tmp_path / "b").latest().metadata) == {"rounded"}

    def test_save_weights_only_omits_the_optimizer(self, runs) -> None:
        """The files have weights and seeds, and restore into a compiled model."""
        model = dense_model()
        fit(model, kc.ModelCheckpoint(runs.path, save_weights_only=True))

        names = [name for name, _ in tf.train.list_variables(runs.latest().prefix)]
        assert not [name for name in names if name.startswith(("optimizer/", "metrics/"))]
        other = dense_model()
        kc.restore(other, runs)
        assert np.array_equal(other.get_weights()[0], model.get_weights()[0])
        fit(other, kc.ModelCheckpoint(runs.path, save_weights_only=True))
        assert steps(runs) == [5, 10]

    def test_a_plain_tensorflow_program_restores_a_checkpoint(self, runs) -> None:
        """`tf.train.latest_checkpoint` finds it, and `tf.train.Checkpoint` restores all of it."""
        model = dense_model()
        fit(model, kc.ModelCheckpoint(runs.path, keep=2), epochs=3)
        prefix = tf.train.latest_checkpoint(runs.path)
        other = dense_model()
        other.optimizer.build(other.trainable_variables)

        tf.train.Checkpoint(model=other).read(prefix).assert_existing_objects_matched()

        assert prefix == runs.latest().prefix
        for mine, theirs in zip(
            model.weights + model.optimizer.variables, other.weights + other.optimizer.variables, strict=True
        ):
            assert np.array_equal(mine.numpy(), theirs.numpy())

    def test_a_tensorflow_manager_continues_the_numbering(self, runs) -> None:
        """A custom training loop may continue the run of `fit`."""
        model = dense_model()
        fit(model, kc.ModelCheckpoint(runs.path), epochs=2)
        checkpoint = tf.train.Checkpoint(model=model)
        manager = tf.train.CheckpointManager(checkpoint, runs.path, 5)
        manager.restore_or_initialize()

        assert manager.save() == f"{runs.path}/ckpt-11"

    def test_verbose_prints_improvements_outcomes_and_removals(self, runs, capsys) -> None:
        """One line for each save that was due, after the directory of the run."""
        trained(runs, [0.5, 0.25, 0.75], verbose=1, keep=1, save_on_background=False)

        lines = [re.sub(r" \(.*\)", "", line) for line in capsys.readouterr().out.splitlines() if line]
        assert lines == [
            f"Checkpoints are saved into {runs.path}",
            "Step 1, epoch 1: val_loss 0.5, saved ckpt-1",
            "Step 2, epoch 2: val_loss improved from 0.5 to 0.25, saved ckpt-2, removed ckpt-1",
            "Step 3, epoch 3: val_loss 0.75 did not improve from 0.25, saved ckpt-3, removed ckpt-2",
        ]

    def test_verbose_prints_the_improvement_before_a_background_save_has_ended(self, runs, capsys) -> None:
        """The outcome follows before the line of the next save."""
        checkpoint = kc.ModelCheckpoint(runs.path, verbose=1, save_best_only=True)
        fit(dense_model(), Reports(val_loss=[0.5, 0.25]), HoldsSaves(checkpoint), checkpoint, epochs=2, batches=1)

        lines = [re.sub(r" \(.*\)", "", line) for line in capsys.readouterr().out.splitlines() if line]
        assert lines == [
            "begin 1",
            f"Checkpoints are saved into {runs.path}",
            "Step 1, epoch 1: val_loss 0.5",
            "begin 2",
            "Step 1, epoch 1: saved ckpt-1",
            "Step 2, epoch 2: val_loss improved from 0.5 to 0.25",
            "Step 2, epoch 2: saved ckpt-2, removed ckpt-1",
        ]

    def test_verbose_writes_each_line_as_a_whole(self, tmp_path) -> None:
        """The lines of two trainings in two threads do not mix within a line."""
        out = Writes()
        checkpoints = [kc.ModelCheckpoint(tmp_path / name, "loss", verbose=1) for name in ("run", "last.keras")]
        with contextlib.redirect_stdout(out):
            fit(dense_model(), *checkpoints)

        assert [text.count("\n") for text in out.writes] == [1, 2, 2, 2, 2]
        assert all(text.endswith("\n") for text in out.writes)

    def test_verbose_prints_the_lines_of_each_of_two_callbacks_in_order(self, tmp_path, monkeypatch, capsys) -> None:
        monkeypatch.chdir(tmp_path)
        fit(dense_model(), *(kc.ModelCheckpoint(f"{name}.keras", "loss", verbose=1) for name in "ab"), epochs=3)

        out = capsys.readouterr().out
        for name in "ab":
            lines = re.findall(rf"Epoch (\d): ((?:finished )?saving) model to {name}.keras\n", out)
            for kind in ("saving", "finished saving"):
                assert [epoch for epoch, text in lines if text == kind] == ["1", "2", "3"]
            assert all(lines.index((epoch, "saving")) < lines.index((epoch, "finished saving")) for epoch in "123")

    def test_verbose_prints_that_a_save_would_not_be_kept(self, runs, capsys) -> None:
        """The best value may be of an earlier fit."""
        model = dense_model()
        for _ in range(2):
            checkpoint = kc.ModelCheckpoint(runs.path, verbose=1, save_best_only=True, save_on_background=False)
            fit(model, Reports(val_loss=[0.5]), checkpoint)

        out = capsys.readouterr().out
        assert "epoch 2: val_loss 0.5 did not improve from 0.5, not saved, it would not be kept" in out

    def test_verbose_prints_that_a_save_waits_for_the_epochs_end(self, runs, capsys) -> None:
        """A save in the middle of an epoch may only be ranked at its end."""
        fit(
            dense_model(),
            kc.ModelCheckpoint(runs.path, save_freq=3, save_best_only=True, verbose=1, save_on_background=False),
            validation_data=(X, Y),
        )

        out = capsys.readouterr().out
        assert "Step 3, epoch 0: val_loss not known, waits for the epoch's end" in out
        assert "Step 5, epoch 1" in out


class TestPolicies:
    def test_a_union_keeps_the_best_and_the_newest(self, runs) -> None:
        """The policy takes the callback's monitor and mode."""
        trained(runs, [0.5, 0.2, 0.4, 0.3, 0.6], keep=kc.BestN(2) | kc.LatestN(1))

        assert steps(runs) == [2, 4, 5]

    def test_an_int_keeps_the_newest(self, runs) -> None:
        """`keep=2` means `LatestN(2)`."""
        assert steps(trained(runs, [1, 2, 3], keep=2)) == [2, 3]

    def test_a_first_nan_does_not_stop_the_tracking_of_the_best(self, runs) -> None:
        """In Keras a first NaN stops it."""
        trained(runs, [math.nan, 0.5, math.inf, 0.4, math.nan], save_best_only=True, keep=ALL)

        assert steps(runs) == [2, 4]

    def test_save_best_only_saves_only_improvements(self, runs) -> None:
        """An equal value is not an improvement. The policy here keeps every save."""
        trained(runs, [0.5, 0.5, 0.6, 0.4], save_best_only=True, keep=ALL)

        assert steps(runs) == [1, 4]
        assert runs.best().step == 4

    def test_save_best_only_keeps_only_the_best(self, runs) -> None:
        """As Keras's single file holds only the best."""
        trained(runs, [0.5, 0.3, 0.6, 0.4], save_best_only=True)

        assert steps(runs) == [2]

    def test_save_best_only_writes_improvements_and_the_policy_prunes_them(self, runs) -> None:
        """`keep=2` keeps the two newest improvements."""
        assert steps(trained(runs, [0.5, 0.6, 0.4, 0.3], save_best_only=True, keep=2)) == [3, 4]

    @pytest.mark.parametrize(("mode", "kept"), [("min", [3]), ("max", [1, 4])])
    def test_save_best_only_requires_the_first_save_to_beat_the_threshold(self, runs, mode, kept) -> None:
        """The mode decides whether less or more beats it."""
        trained(runs, [0.5, 0.45, 0.3, 0.6], save_best_only=True, mode=mode, initial_value_threshold=0.4, keep=ALL)

        assert steps(runs) == kept

    def test_the_attribute_best_is_the_best_value_on_disk(self, runs) -> None:
        """Keras's callback has this attribute. Here it is read from the directory."""
        checkpoint = kc.ModelCheckpoint(runs.path, mode="min", initial_value_threshold=0.45)
        assert checkpoint.best == 0.45

        trained(runs, [0.5, 0.2, 0.4])

        assert checkpoint.best == 0.2

    def test_the_attribute_best_can_be_assigned(self, runs) -> None:
        """Scripts for Keras's callback set it after a restart."""
        checkpoint = kc.ModelCheckpoint(runs.path, save_best_only=True, keep=ALL)
        checkpoint.best = 0.2
        fit(dense_model(), Reports(val_loss=[0.3, 0.1]), checkpoint, epochs=2, batches=1)

        assert steps(runs) == [2]

    def test_a_run_that_saved_nothing_warns_with_the_reason(self, runs) -> None:
        """The warning comes at the end of training."""
        with pytest.warns(
            UserWarning, match=r"Nothing was saved into .*: 2 saves were due.*BestN\(1, 'val_loss', 'min'\)"
        ):
            trained(runs, [math.nan, math.nan], keep=kc.BestN(1))

    def test_a_pinned_checkpoint_is_never_pruned(self, runs) -> None:
        """Even if the policy would remove it."""

        class Pins(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None) -> None:
                if epoch == 0:
                    runs.pin(1, "by hand")

        fit(dense_model(), kc.ModelCheckpoint(runs.path, keep=1), Pins(), epochs=3, batches=1)

        assert steps(runs) == [1, 3]


class TestMonitor:
    def test_a_monitor_that_never_appears_warns_once_and_keeps_everything(self, runs) -> None:
        """After the first epoch with validation, with the names in the logs and the closest match."""
        model = dense_model(metrics=["mae"])

        with pytest.warns(UserWarning, match="nothing can be ranked by it") as caught:
            fit(
                model,
                kc.ModelCheckpoint(runs.path, monitor="val_ma", mode="min", keep=kc.BestN(1) | kc.LatestN(1)),
                epochs=4,
                validation_data=(X, Y),
                validation_freq=2,
            )

        assert len(warned(caught)) == 1
        assert "The metrics are: loss, mae, val_loss, val_mae. Did you mean 'val_mae'?" in warned(caught)[0]
        assert steps(runs) == [5, 10, 15, 20]

    def test_an_unused_monitor_causes_no_warning(self, runs) -> None:
        """The default monitor is `val_loss`, and many fits have no validation."""
        fit(dense_model(), kc.ModelCheckpoint(runs.path, keep=1), epochs=2)

        assert steps(runs) == [10]

    def test_without_validation_the_checkpoints_of_epoch_ends_stay(self, runs) -> None:
        """A policy by a metric that never comes does not lose the run."""
        with pytest.warns(UserWarning, match="Two epochs have ended without 'val_loss'"):
            fit(dense_model(), kc.ModelCheckpoint(runs.path, keep=kc.BestN(1)), epochs=3)

        assert steps(runs) == [5, 10, 15]

    def test_a_monitor_of_every_second_epoch_ranks_when_it_appears(self, runs) -> None:
        """Other epochs are saved until the first ranking, which prunes them."""
        trained(runs, [None, 0.5, None, 0.4, None], keep=kc.BestN(1))

        assert steps(runs) == [4]

    @pytest.mark.parametrize(
        ("value", "received"),
        [([1.0, 2.0], r"\[1.0, 2.0\]"), (np.ones(3), r"an array of shape \(3,\)"), ("0.5", "'0.5'"), ({}, "{}")],
    )
    def test_a_metric_that_is_not_one_number_warns_and_keeps_everything(self, runs, value, received) -> None:
        """The warning has the received value and the advice. Training continues."""
        with pytest.warns(UserWarning, match=f"'val_loss' is not one number but {received}, .* Reduce it"):
            trained(runs, [0.5, value, value], keep=kc.BestN(1))

        assert steps(runs) == [1, 2, 3]

    @pytest.mark.parametrize(
        "shaped",
        [
            np.float16, np.float64, lambda value: np.array([value]), lambda value: np.array([[value]]),
            keras.ops.convert_to_tensor, lambda value: keras.ops.convert_to_tensor([value]), lambda value: [value],
            lambda value: (value,),
            lambda value: keras.Variable(value, trainable=False), lambda value: tf.Variable([value]),
        ],
    )  # fmt: skip
    def test_a_metric_of_one_number_ranks_in_any_shape(self, runs, shaped) -> None:
        """A number of NumPy or of a backend, alone or in an array or a list."""
        trained(runs, [shaped(0.5), shaped(0.25), shaped(0.75)], keep=kc.BestN(1))

        assert [record.metrics["val_loss"] for record in runs] == [0.25]

    def test_logs_that_are_not_numbers_are_not_recorded(self, runs) -> None:
        """The sidecar holds only metrics."""
        fit(dense_model(), Reports(matrix=[np.ones((2, 2))], none=[None], text=["x"]), kc.ModelCheckpoint(runs.path))

        assert set(runs.latest().metrics) == {"loss"}

    @pytest.mark.parametrize(
        ("metric", "monitor", "mode"),
        [
            ("accuracy", "val_accuracy", "max"),
            ("acc", "acc", "max"),
            ("mae", "val_mae", "min"),
            ("mean_absolute_error", "mean_absolute_error", "min"),
            (keras.metrics.AUC, "val_auc", "max"),
            (keras.metrics.CosineSimilarity, "val_cosine_similarity", "max"),
            (keras.losses.hinge, "val_hinge", "min"),
            (OwnAUC, "val_own_auc", "max"),
            (None, "val_loss", "min"),
        ],
    )
    def test_auto_mode_is_keras_choice_but_known_before_training(self, runs, metric, monitor, mode) -> None:
        """Keras's callback finds the same mode, but at the end of the first epoch."""
        metric = metric(name=monitor.removeprefix("val_")) if isinstance(metric, type) else metric
        model = dense_model(metrics=[metric] if metric else None)
        theirs = keras.callbacks.EarlyStopping(monitor=monitor)
        data = (X, (Y > 0).astype("float32"))

        class Looks(keras.callbacks.Callback):
            found = None

            def on_train_batch_begin(self, batch, logs=None) -> None:
                self.found = self.found or checkpoint._ranking.mode

        looks, checkpoint = Looks(), kc.ModelCheckpoint(runs.path, monitor=monitor, keep=kc.BestN(1))
        fit(model, checkpoint, looks, theirs, validation_data=data)

        assert looks.found == mode
        assert (theirs.monitor_op is keras.ops.less) == (mode == "min")

    @pytest.mark.parametrize(
        "options", [{"save_best_only": True}, {"keep": kc.BestN(1)}, {"keep": kc.BestN(1, "other") | kc.LatestN(1)}]
    )
    def test_a_mode_that_keras_cannot_find_is_an_error_before_the_first_batch(self, runs, options) -> None:
        """The error names both modes, and the model is unchanged."""
        model = dense_model()
        before = model.get_weights()

        with pytest.raises(ValueError, match=r"Pass mode='max' if more is better, mode='min' if less is better"):
            fit(model, kc.ModelCheckpoint(runs.path, monitor="val_f1", **options))

        assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))

    def test_a_misspelled_monitor_gets_a_suggestion_before_training(self, runs) -> None:
        """The mode of an unknown metric is unknown too."""
        with pytest.raises(ValueError, match="Did you mean 'val_loss'"):
            fit(dense_model(), kc.ModelCheckpoint(runs.path, monitor="val_lss", save_best_only=True))

    def test_an_unknown_mode_is_no_error_if_nothing_ranks_by_it(self, runs) -> None:
        """The record has the metric without a mode."""
        fit(dense_model(), kc.ModelCheckpoint(runs.path, monitor="val_f1"))

        assert (runs.latest().monitor, runs.latest().mode) == ("val_f1", None)

    def test_the_modes_of_all_compiled_metrics_are_recorded(self, runs) -> None:
        """So `best()` needs no mode for them. A metric without a known mode is absent."""
        model = dense_model()
        model.compile("sgd", "mse", metrics=["mae", "accuracy", Undirected()])
        fit(model, kc.ModelCheckpoint(runs.path, monitor="loss"), epochs=2, validation_data=(X, Y))

        assert runs.latest().modes == {
            "mae": "min",
            "accuracy": "max",
            "val_loss": "min",
            "val_mae": "min",
            "val_accuracy": "max",
        }
        assert runs.best("val_loss") in list(runs)

    def test_an_unknown_mode_warns_and_means_auto(self, runs) -> None:
        """Keras does the same."""
        with pytest.warns(UserWarning, match="ModelCheckpoint mode 'lowest' is unknown, fallback to auto mode"):
            assert kc.ModelCheckpoint(runs.path, mode="lowest").mode == "auto"


class TestSaveFreq:
    @pytest.mark.parametrize(
        ("save_freq", "saved"),
        [
            ("epoch", [5, 10, 15]),
            (4, [4, 8, 12]),
            (5, [5, 10, 15]),
            (7, [7, 14]),
            (["epoch", 4], [4, 5, 8, 10, 12, 15]),
            ([6, 4], [4, 6, 8, 12]),
            (datetime.timedelta(hours=1), []),
            (datetime.timedelta(microseconds=1), list(range(1, 16))),
            (["epoch", datetime.timedelta(hours=1)], [5, 10, 15]),
        ],
    )
    def test_saves_are_due_by_epochs_batches_and_time(self, runs, save_freq, saved) -> None:
        """Three epochs of five batches."""
        fit(dense_model(), kc.ModelCheckpoint(runs.path, save_freq=save_freq), epochs=3)

        assert steps(runs) == saved

    @pytest.mark.parametrize(
        "save_freq", [0, -3, True, False, "batch", 2.5, None, [], ["epoch", 0], datetime.timedelta(0)]
    )
    def test_an_invalid_save_freq_is_refused(self, runs, save_freq) -> None:
        """The error has the received value."""
        with pytest.raises((ValueError, TypeError), match="Received"):
            kc.ModelCheckpoint(runs.path, save_freq=save_freq)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"epochs": 2}, [3, 6, 9, 10, 13, 16, 19, 20]),
            ({"epochs": 2, "steps_per_epoch": 4}, [3, 6, 9, 10]),
            ({"epochs": 2, "steps_per_epoch": 20}, [3, 6, 9, 10, 13, 16, 19, 20]),
            ({"epochs": 3, "steps_per_epoch": 8}, [3, 6, 9, 10, 13, 16, 19]),
        ],
    )
    @needs_executions
    def test_steps_count_the_batches_that_each_execution_ran(self, runs, options, expected) -> None:
        """Executions of three batches; the last execution of an epoch runs the rest."""
        model = dense_model(steps_per_execution=3, run_eagerly=False)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Your input ran out of data")
            fit(model, kc.ModelCheckpoint(runs.path, save_freq=1), batches=10, **options)

        assert steps(runs) == expected
        assert steps(runs)[-1] == int(model.optimizer.iterations.numpy())

    def test_steps_per_epoch_over_endless_data_counts_whole_executions(self, runs) -> None:
        """Fourteen steps asked for, in executions of three: fifteen run."""
        data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(1).repeat()
        model = dense_model(steps_per_execution=3, run_eagerly=False)

        model.fit(
            data, epochs=2, steps_per_epoch=14, verbose=0, shuffle=False, callbacks=[kc.ModelCheckpoint(runs.path)]
        )

        assert steps(runs) == [15, 30]
        assert int(model.optimizer.iterations.numpy()) == 30

    @pytest.mark.parametrize("execution", [1, 4])
    @pytest.mark.parametrize("accumulation", [None, 2])
    def test_steps_are_exact_for_data_of_unknown_length(self, runs, execution, accumulation) -> None:
        """Ten batches, with and without gradient accumulation."""
        data = tf.data.Dataset.from_tensor_slices((X[:10], Y[:10])).filter(lambda x, y: True).batch(1)
        optimizer = keras.optimizers.Adam(gradient_accumulation_steps=accumulation)
        model = dense_model(optimizer=optimizer, steps_per_execution=execution, run_eagerly=False)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Your input ran out of data")
            model.fit(
                data,
                epochs=2,
                verbose=0,
                shuffle=False,
                callbacks=[kc.ModelCheckpoint(runs.path, save_freq=["epoch", 4])],
            )

        assert [(record.step, record.epoch) for record in runs] == [
            (4, 0),
            (8, 0),
            (10, 1),
            *([(12, 1), (16, 1), (20, 2)] if execution == 1 else [(14, 1), (18, 1), (20, 2)]),
        ]

    def test_a_fit_that_stops_within_an_epoch_has_not_completed_it(self, runs) -> None:
        """As with `TerminateOnNaN`."""

        class Stops(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None) -> None:
                self.model.stop_training = batch == 2

        fit(dense_model(), Stops(), kc.ModelCheckpoint(runs.path), epochs=3)

        assert [(r.step, r.epoch, r.batch) for r in runs] == [(3, 0, 3)]


class TestSavesWithinAnEpoch:
    def test_a_save_that_a_policy_keeps_unranked_is_written_at_once(self, runs) -> None:
        """It has the training metrics so far. The epoch's end is ranked too."""
        fit(
            dense_model(),
            kc.ModelCheckpoint(runs.path, save_freq=2, keep=kc.BestN(1) | kc.LatestN(2)),
            validation_data=(X, Y),
        )

        assert [(r.step, r.epoch, r.batch, "val_loss" in r.metrics) for r in runs] == [
            (4, 0, 4, False),
            (5, 1, 0, True),
        ]
        assert runs[5].reason == "every 2 batches"

    def test_a_save_that_only_ranking_could_keep_waits_for_the_epochs_end(self, runs) -> None:
        """It is ranked with the weights that were validated. Keras raises a TypeError here."""
        fit(
            dense_model(),
            Reports(val_loss=[0.5, 0.6, 0.4]),
            kc.ModelCheckpoint(runs.path, save_freq=3, save_best_only=True, keep=ALL),
            epochs=3,
        )

        assert steps(runs) == [5, 15]

    def test_an_epochs_end_saves_only_if_a_save_was_due_in_the_epoch(self, runs) -> None:
        """Nine batches are due in the second and the fourth epoch only."""
        fit(
            dense_model(),
            Reports(val_loss=[0.5, 0.4, 0.3, 0.2]),
            kc.ModelCheckpoint(runs.path, save_freq=9, save_best_only=True, keep=ALL),
            epochs=4,
        )

        assert steps(runs) == [10, 20]

    def test_a_training_metric_ranks_within_the_epoch(self, runs) -> None:
        """Keras gives the running mean of the epoch so far."""
        fit(dense_model(), kc.ModelCheckpoint(runs.path, monitor="loss", save_freq=2, save_best_only=True, keep=ALL))

        best = runs.best("loss", "min")
        assert best.step in (2, 4)
        assert steps(runs)[0] == 2

    def test_the_epochs_end_amends_the_record_of_its_last_batch(self, runs) -> None:
        """The sidecar gets the validation metrics, the files stay."""
        seen = {}

        class Looks(keras.callbacks.Callback):
            def on_test_begin(self, logs=None) -> None:
                seen["before"] = runs.latest()

        fit(
            dense_model(),
            kc.ModelCheckpoint(runs.path, save_freq=5, keep=kc.LatestN(2)),
            Looks(),
            validation_data=(X, Y),
        )
        # Nothing ranks here, so the epoch's end is no save.
        assert "val_loss" not in runs.latest().metrics

        runs.clear()
        keep = kc.LatestN(2) | kc.BestN(1)
        fit(dense_model(), kc.ModelCheckpoint(runs.path, save_freq=5, keep=keep), Looks(), validation_data=(X, Y))

        record, before = runs.latest(), seen["before"]
        assert before.step == record.step == 5
        assert before.files == record.files
        assert before.sequence == record.sequence
        assert (before.epoch, before.batch, record.epoch, record.batch) == (0, 5, 1, 0)
        assert "val_loss" not in before.metrics
        assert "val_loss" in record.metrics

    def test_weights_that_changed_after_the_last_batch_are_saved_again(self, runs) -> None:
        """`SwapEMAWeights` swaps in the averages that are validated."""
        optimizer = keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5)
        model = dense_model(optimizer=optimizer)
        swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
        seen = {}

        class Looks(keras.callbacks.Callback):
            def on_test_begin(self, logs=None) -> None:
                seen["before"] = runs.latest()

            def on_epoch_end(self, epoch, logs=None) -> None:
                seen["measured"] = self.model.get_weights()

        checkpoint = kc.ModelCheckpoint(runs.path, save_freq=5, keep=kc.LatestN(1) | kc.BestN(1))
        fit(model, swap, Looks(), checkpoint, validation_data=(X, Y))

        record = runs.latest()
        assert record.step == seen["before"].step == 5
        assert record.sequence == seen["before"].sequence + 1
        assert record.files != seen["before"].files
        other = dense_model(optimizer=keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5))
        kc.restore(other, record)
        assert all(np.array_equal(a, b) for a, b in zip(other.get_weights(), seen["measured"], strict=True))


class TestOneRunPerDirectory:
    def test_a_second_fit_continues_the_run(self, runs) -> None:
        """Steps and epochs count from the beginning of the run."""
        model = dense_model()
        checkpoint = kc.ModelCheckpoint(runs.path)
        fit(model, checkpoint, epochs=2)
        fit(model, checkpoint, epochs=1)
        fit(model, kc.ModelCheckpoint(runs.path), epochs=1)

        assert [(record.step, record.epoch) for record in runs] == [(5, 1), (10, 2), (15, 3), (20, 4)]
        assert len({record.run_id for record in runs}) == 1

    def test_a_restored_model_continues_the_run(self, runs) -> None:
        """A new model object, as in a new process."""
        fit(dense_model(), kc.ModelCheckpoint(runs.path), epochs=2)
        model = dense_model()
        kc.restore(model, runs)

        fit(model, kc.ModelCheckpoint(runs.path), initial_epoch=2, epochs=3)

        assert [(record.step, record.epoch) for record in runs] == [(5, 1), (10, 2), (15, 3)]

    @pytest.mark.parametrize(
        "case", ["a fresh model", "weights loaded otherwise", "restored from elsewhere", "in part", "uncompiled"]
    )
    def test_any_other_fit_is_refused_before_its_first_batch(self, runs, tmp_path, case) -> None:
        """The error names the ways out. The directory and the model do not change."""
        first = dense_model()
        fit(first, kc.ModelCheckpoint(runs.path))
        model = dense_model()
        match case:
            case "weights loaded otherwise":
                model.set_weights(first.get_weights())
            case "restored from elsewhere":
                fit(dense_model(), kc.ModelCheckpoint(tmp_path / "other"))
                kc.restore(model, tmp_path / "other")
            case "in part":
                model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)])
                model.compile("adam", "mse", run_eagerly=True)
                with pytest.warns(UserWarning, match="Left as they were: model/dense_1"):
                    kc.restore(model, runs, strict=False)
            case "uncompiled":
                model = dense_model(compiled=False)
                kc.restore(model, runs)
                model.compile("adam", "mse", run_eagerly=True)
        before = model.get_weights()

        with pytest.raises(kc.DirectoryNotEmptyError) as caught:
            fit(model, kc.ModelCheckpoint(runs.path))

        assert isinstance(caught.value, FileExistsError)
        for way_out in ("keras_ckpt.restore(model, ", "new_run='subdirectory'", "new_run='replace'"):
            assert way_out in str(caught.value)
        assert steps(runs) == [5]
        assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))

    def test_a_directory_of_checkpoints_without_sidecars_is_refused(self, runs) -> None:
        """They belong to a run of TensorFlow's manager."""
        pathlib.Path(runs.path).mkdir()
        tf.train.CheckpointManager(tf.train.Checkpoint(step=tf.Variable(1)), runs.path, 3).save()

        with pytest.raises(kc.DirectoryNotEmptyError, match=r"without a sidecar.*ckpt-1.*left alone"):
            fit(dense_model(), kc.ModelCheckpoint(runs.path))

    def test_after_clear_a_new_run_starts(self, runs) -> None:
        """It starts at step 0, with a new run id."""
        fit(dense_model(), kc.ModelCheckpoint(runs.path), epochs=2)
        first = runs.latest().run_id
        runs.clear()

        fit(dense_model(), kc.ModelCheckpoint(runs.path))

        assert steps(runs) == [5]
        assert runs.latest().run_id != first

    def test_after_a_restore_of_an_older_step_the_new_branch_is_the_newest(self, runs) -> None:
        """Steps saved again supersede. The old branch is older than every save of the new."""
        fit(dense_model(), Reports(val_loss=[0.5, 0.4, 0.3, 0.2]), kc.ModelCheckpoint(runs.path), epochs=4)
        model = dense_model()
        kc.restore(model, runs[5])

        fit(model, Reports(val_loss=[0.9, 0.8]), kc.ModelCheckpoint(runs.path), epochs=2)

        assert steps(runs) == [5, 20, 10, 15]
        assert [record.metrics["val_loss"] for record in runs] == [0.5, 0.2, 0.9, 0.8]
        assert tf.train.latest_checkpoint(runs.path) == runs[15].prefix
        assert runs.plan(kc.LatestN(2)).kept == (runs[10], runs[15])

    def test_a_replay_with_equal_weights_is_a_new_branch_too(self, runs) -> None:
        """The same bits are newer than the old branch all the same."""
        fit(dense_model(), kc.ModelCheckpoint(runs.path, save_freq=["epoch", 5], keep=4), epochs=3, batches=5)
        model = dense_model()
        kc.restore(model, runs[5])
        fit(model, kc.ModelCheckpoint(runs.path, save_freq=["epoch", 5], keep=4), epochs=1)

        assert steps(runs) == [5, 15, 10]

    def test_a_later_step_without_a_sidecar_is_refused_before_the_first_batch(self, runs) -> None:
        """Training would fail when it reaches that step."""
        fit(dense_model(), kc.ModelCheckpoint(runs.path), epochs=3)
        pathlib.Path(f"{runs[15].prefix}.json").unlink()
        model = dense_model()
        kc.restore(model, runs)

        with pytest.raises(kc.DirectoryNotEmptyError, match=r"without a sidecar.*ckpt-15"):
            fit(model, kc.ModelCheckpoint(runs.path))

        assert steps(runs) == [5, 10]

    def test_a_model_that_was_compiled_again_causes_a_warning(self, runs) -> None:
        """The run continues, but its optimizer starts fresh."""
        model = dense_model()
        fit(model, kc.ModelCheckpoint(runs.path))
        model.compile("adam", "mse", run_eagerly=True)

        with pytest.warns(UserWarning, match="compiled again since step 5.*weights_only=True"):
            fit(model, kc.ModelCheckpoint(runs.path))

        fit(model, kc.ModelCheckpoint(runs.path))
        assert steps(runs) == [5, 10, 15]

    def test_a_loop_that_reports_only_epochs_has_steps_too(self, runs) -> None:
        """The optimizer counts the steps."""
        model = dense_model()
        callbacks = keras.callbacks.CallbackList([kc.ModelCheckpoint(runs.path)], model=model)
        callbacks.on_train_begin()
        for epoch in range(2):
            callbacks.on_epoch_begin(epoch)
            for _ in range(3):
                model.train_on_batch(X[:2], Y[:2])
            callbacks.on_epoch_end(epoch, {"loss": 0.5})
        callbacks.on_train_end()

        assert [(record.step, record.epoch) for record in runs] == [(3, 1), (6, 2)]

    def test_two_callbacks_of_one_fit_cannot_share_a_directory(self, runs) -> None:
        """Each would remove the checkpoints that the other keeps."""
        with pytest.raises(kc.DirectoryNotEmptyError, match=r"keep=first \| second"):
            fit(dense_model(), kc.ModelCheckpoint(runs.path), kc.ModelCheckpoint(runs.path, keep=1))

    def test_two_callbacks_of_one_fit_with_two_directories_share_run_and_steps(self, tmp_path) -> None:
        """Both directories have the same run id and steps."""
        first, second = (kc.CheckpointDirectory(tmp_path / name) for name in ("a", "b"))
        fit(dense_model(), kc.ModelCheckpoint(first.path), kc.ModelCheckpoint(second.path, save_freq=5), epochs=2)

        assert steps(first) == steps(second) == [5, 10]
        assert first.latest().run_id == second.latest().run_id

    def test_an_interrupted_cell_can_be_run_again(self, runs) -> None:
        """Ctrl-C calls no hook of Keras. The same model continues with a new callback."""
        model = dense_model()
        with pytest.raises(KeyboardInterrupt):
            fit(model, kc.ModelCheckpoint(runs.path, save_freq=2), Interrupts(7), epochs=3)
        assert steps(runs) == [2, 4, 6]

        fit(model, kc.ModelCheckpoint(runs.path, save_freq=2))

        assert steps(runs) == [2, 4, 6, 8, 10, 12]

    def test_the_lock_is_free_after_the_fit(self, runs) -> None:
        """Another process may continue."""
        import subprocess
        import sys

        from support.runs import HOLD

        fit(dense_model(), kc.ModelCheckpoint(runs.path))

        subprocess.run([sys.executable, "-c", HOLD, runs.path], input="", text=True, check=True, capture_output=True)


class TestErrors:
    @pytest.mark.parametrize("path", ["run.h5.old", "a{b", "best.keras/run"])
    def test_a_directory_path_with_a_suffix_or_brace_inside_is_accepted(self, tmp_path, path) -> None:
        """Only a file's suffix at the end, or a template, is refused."""
        fit(dense_model(), kc.ModelCheckpoint(tmp_path / path))

        assert len(kc.CheckpointDirectory(tmp_path / path)) == 1

    @pytest.mark.parametrize("monitor", [3, "", ["loss"]])
    def test_a_monitor_that_is_no_name_is_refused(self, runs, monitor) -> None:
        """The error has the received value."""
        with pytest.raises(TypeError, match="Received: monitor="):
            kc.ModelCheckpoint(runs.path, monitor=monitor)

    @pytest.mark.parametrize(
        "options", [{"filepath": None}, {"filepath": 3}, {"verbose": "yes"}, {"initial_value_threshold": "low"}]
    )
    def test_arguments_of_a_wrong_type_are_refused_by_the_constructor(self, runs, options) -> None:
        """Not in the middle of a fit."""
        with pytest.raises(TypeError, match="Received: "):
            kc.ModelCheckpoint(**{"filepath": runs.path, **options})

    @pytest.mark.parametrize("metadata", [{"model": object()}, "text", {1: 2}])
    def test_metadata_that_json_cannot_hold_is_refused_by_the_constructor(self, runs, metadata) -> None:
        """Before training."""
        with pytest.raises(TypeError, match="metadata"):
            kc.ModelCheckpoint(runs.path, metadata=metadata)

    def test_a_metadata_function_with_an_invalid_result_keeps_earlier_checkpoints(self, runs) -> None:
        """The error names the invalid item."""
        results = iter([{"a": 1}, {"b": object()}])

        with pytest.raises(TypeError, match=r"metadata\['b'\]"):
            fit(dense_model(), kc.ModelCheckpoint(runs.path, metadata=lambda logs: next(results)), epochs=2)

        assert steps(runs) == [5]

    def test_a_path_that_is_a_file_is_an_error_before_the_first_batch(self, tmp_path) -> None:
        """The file stays unchanged."""
        (tmp_path / "file").write_text("mine")
        model = dense_model()

        with pytest.raises(kc.SaveError, match="this is a file"):
            fit(model, kc.ModelCheckpoint(tmp_path / "file"))

        assert (tmp_path / "file").read_text() == "mine"

    def test_a_full_disk_is_an_error_and_leaves_earlier_checkpoints_whole(self, runs, monkeypatch) -> None:
        """With `on_full_disk="raise"`. The fit can be repeated."""
        import errno

        from keras_ckpt.store import files

        model = dense_model()
        checkpoint = kc.ModelCheckpoint(runs.path, keep=1, on_full_disk="raise")
        fit(model, checkpoint)
        before = values_on_disk(runs)

        def full(*arguments) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            fill = keras.callbacks.LambdaCallback(
                on_train_batch_begin=lambda *_, **__: patch.setattr(files.os, "fsync", full)
            )
            with pytest.raises(
                kc.DiskFullError, match=r"Could not save step 10 .*No space left.*Free some space"
            ) as caught:
                fit(model, checkpoint, fill)

        assert isinstance(caught.value, OSError)
        assert values_on_disk(runs) == before
        fit(model, checkpoint)
        assert steps(runs) == [15]


def values_on_disk(runs) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted(pathlib.Path(runs.path).glob("ckpt-*"))]


def test_the_position_does_not_depend_on_the_number_of_callbacks(tmp_path) -> None:
    """A restored model continues at the same step with one callback and with two."""
    for callbacks in (1, 2):
        model = dense_model()
        runs = [kc.CheckpointDirectory(tmp_path / f"{callbacks}-{number}") for number in range(callbacks)]
        fit(model, *(kc.ModelCheckpoint(each.path, save_freq=3) for each in runs), epochs=2)
        other = dense_model()
        kc.restore(other, runs[0])
        assert not same(model, other)  # step 9 is not the end

        fit(other, *(kc.ModelCheckpoint(each.path, save_freq=3) for each in runs))

        assert [[(r.step, r.epoch, r.batch) for r in each][-2:] for each in runs] == [
            [(9, 1, 4), (12, 1, 3)]
        ] * callbacks


def test_a_fit_that_continues_a_run_reads_each_sidecar_once(tmp_path, monkeypatch) -> None:
    """The first save reads no sidecar again that the fit has read when it began."""
    fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1, save_on_background=False), batches=40)
    model = dense_model()
    kc.restore(model, tmp_path)
    reads, read = [], Folder.read

    def counted(self: Folder, name: str, limit: int) -> bytes:
        reads.append(name)
        return read(self, name, limit)

    monkeypatch.setattr(Folder, "read", counted)
    os.utime(tmp_path, (0, 0))  # a listing of a directory that changed just now is not trusted, and is read again
    fit(model, kc.ModelCheckpoint(tmp_path, save_freq=1), batches=1)

    sidecars = [name for name in reads if name.endswith(".json")]
    assert 40 <= len(sidecars) < 60
