"""`start_from_epoch` and `min_delta`: warm-up epochs without saves, and improvements that are large enough."""

import datetime
import math
import re

import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st

import keras_ckpt as kc
from keras_ckpt.store.policies import selection
from keras_ckpt.training.improvement import Improvements
from support.models import Reports, dense_model, fit
from support.runs import history


def steps(runs: kc.CheckpointDirectory) -> list[int]:
    return [record.step for record in runs]


def train(path, losses, model=None, **options) -> keras.Model:
    """Trains with epochs of one batch that report these validation losses."""
    model = model or dense_model()
    fit(model, Reports(val_loss=losses), kc.ModelCheckpoint(path, **options), epochs=len(losses), batches=1)
    return model


class Stops(keras.callbacks.Callback):
    """Stops the training at the end of an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.model.stop_training = epoch == self.epoch


class TestStartFromEpoch:
    def test_no_checkpoint_is_saved_before_the_epoch(self, tmp_path) -> None:
        """Nor in the middle of an epoch before it. The first checkpoint may be of the middle of that epoch."""
        frequencies = ["epoch", 2, datetime.timedelta(microseconds=1)]
        checkpoints = [
            kc.ModelCheckpoint(tmp_path / str(number), save_freq=each, start_from_epoch=2)
            for number, each in enumerate(frequencies)
        ]
        fit(dense_model(), *checkpoints, epochs=4, batches=2)

        assert [steps(each.directory) for each in checkpoints] == [[6, 8], [6, 8], [5, 6, 7, 8]]

    def test_the_first_checkpoint_is_of_the_first_epoch_that_early_stopping_looks_at(self, runs) -> None:
        """With the same `start_from_epoch`, both begin with the same epoch of `fit`, from whatever it counts."""
        stopping = keras.callbacks.EarlyStopping("loss", patience=100, start_from_epoch=5, restore_best_weights=True)
        checkpoint = kc.ModelCheckpoint(runs.path, start_from_epoch=5)
        fit(dense_model(), stopping, checkpoint, initial_epoch=3, epochs=7, batches=1)

        assert steps(runs) == [3, 4]
        assert stopping.best_epoch >= 5

    def test_values_of_earlier_epochs_are_not_ranked(self, runs) -> None:
        """The best value of the first epochs is no checkpoint."""
        train(runs.path, [0.1, 0.5, 0.4, 0.6], save_best_only=True, start_from_epoch=1)

        assert steps(runs) == [3]

    def test_the_journal_tells_that_a_save_came_too_early(self, runs) -> None:
        train(runs.path, [0.1, 0.5], start_from_epoch=1)

        assert "start_from_epoch=1" in runs.why(1)

    def test_verbose_prints_no_line_about_the_earlier_epochs(self, tmp_path, capsys) -> None:
        train(tmp_path / "best.keras", [0.1, 0.5, 0.4], save_best_only=True, start_from_epoch=1, verbose=1)

        out = capsys.readouterr().out
        assert re.findall(r"Epoch (\d): val_loss improved from (\S+) to", out) == [("2", "None"), ("3", "0.50000")]

    def test_a_fit_that_ends_before_the_epoch_warns_before_its_first_batch(self, runs) -> None:
        """The epoch is an index: the third epoch is the first that `start_from_epoch=2` saves."""
        message = "fit ends after epoch 2, and start_from_epoch=2 begins to save in epoch 3"
        with pytest.warns(UserWarning, match=message) as caught:
            train(runs.path, [0.1, 0.2], start_from_epoch=2)

        assert len(caught) == 1
        assert steps(runs) == []

    def test_a_training_that_is_stopped_before_the_epoch_warns(self, runs) -> None:
        """It has saved nothing."""
        with pytest.warns(UserWarning, match="Nothing was saved into .*: fit has ended in epoch 2, and start_from_ep"):
            fit(dense_model(), Stops(1), kc.ModelCheckpoint(runs.path, start_from_epoch=5), epochs=9, batches=1)

    @pytest.mark.parametrize("value", [-1, 1.5, "2", None, True])
    def test_a_number_of_epochs_that_is_none_is_refused(self, runs, value) -> None:
        with pytest.raises(ValueError, match=r"start_from_epoch expected a whole number.*Received: "):
            kc.ModelCheckpoint(runs.path, start_from_epoch=value)


class TestMinDelta:
    @pytest.mark.sample(1)
    @pytest.mark.parametrize(
        ("mode", "values", "kept"),
        [
            ("min", [1.0, 0.75, 0.5, 0.375, 0.125], [1, 3, 5]),
            ("max", [1.0, 1.25, 1.5, 1.625, 1.875], [1, 3, 5]),
        ],
    )
    def test_a_value_is_saved_only_if_it_beats_the_best_by_more(self, runs, mode, values, kept) -> None:
        """A difference of exactly `min_delta` is not enough, as in `EarlyStopping`. Small steps add up."""
        train(runs.path, values, mode=mode, save_best_only=True, min_delta=0.25, keep=kc.EveryNSteps(1))

        assert steps(runs) == kept
        assert f"{values[1]:g} does not beat 1 by more than 0.25" in runs.why(2)

    def test_the_best_is_read_from_the_disk_in_the_next_fit(self, runs) -> None:
        """Nothing about the best is kept in memory."""
        options = {"save_best_only": True, "min_delta": 0.2}
        model = train(runs.path, [0.5], **options)
        train(runs.path, [0.4, 0.2], model, **options)

        assert [(record.step, record.metrics["val_loss"]) for record in runs] == [(3, 0.2)]

    def test_the_threshold_must_be_beaten_by_more_too(self, runs) -> None:
        options = {"save_best_only": True, "min_delta": 0.2, "initial_value_threshold": 0.5}
        train(runs.path, [0.4, 0.2], **options)

        assert steps(runs) == [2]

    def test_verbose_prints_that_a_small_difference_is_no_improvement(self, tmp_path, capsys) -> None:
        train(tmp_path / "best.keras", [0.5, 0.4, 0.2], save_best_only=True, min_delta=0.2, verbose=1)

        out = capsys.readouterr().out
        assert "Epoch 2: val_loss did not improve from 0.50000\n" in out
        assert "Epoch 3: val_loss improved from 0.50000 to 0.20000, saving" in out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"min_delta": 0.1}, "Without save_best_only .* Pass save_best_only=True"),
            ({"min_delta": math.nan, "save_best_only": True}, "min_delta expected a finite number. Received: nan"),
        ],
    )
    def test_a_minimum_that_has_no_effect_is_refused(self, runs, options, message) -> None:
        with pytest.raises(ValueError, match=message):
            kc.ModelCheckpoint(runs.path, **options)

    def test_a_minimum_that_is_no_number_is_refused(self, runs) -> None:
        with pytest.raises(TypeError, match=r"min_delta expected a number\. Received: '0.1'"):
            kc.ModelCheckpoint(runs.path, save_best_only=True, min_delta="0.1")


@given(
    losses=st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, math.nan, math.inf]), max_size=8),
    more=st.sampled_from([0.125, 0.75, math.nan]),
    min_delta=st.sampled_from([0.0, 0.125, 0.25]),
)
def test_the_improvements_stay_the_same_when_newer_checkpoints_come(losses, more, min_delta) -> None:
    """Each improvement beats all values before it by more than `min_delta`."""
    records = history(" ".join(f"{step}:{loss}" for step, loss in enumerate([*losses, more], 1)))
    policy = Improvements("loss", "min", min_delta)

    found = selection(policy, records)

    assert selection(policy, records[:-1]) == found - {len(records)}
    assert policy.why_not(records).keys() == {record.step for record in records} - found
    for record in records:
        value = record.finite("loss")
        earlier = [each.finite("loss") for each in records[: record.step - 1]]
        best = min([each for each in earlier if each is not None], default=math.inf)
        assert (record.step in found) == (value is not None and value + min_delta < best)
