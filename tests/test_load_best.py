"""`load_best_at_end`: the model has the best checkpoint of its run when `fit` ends."""

import math
import pathlib

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from support.models import Interrupts, Reports, dense_model, fit, same

LOSSES = [0.5, 0.25, 0.75]
"""The second of three epochs is the best."""


class Remembers(keras.callbacks.Callback):
    """Keeps the weights of each epoch's end."""

    def on_train_begin(self, logs=None) -> None:
        self.weights: list[list[np.ndarray]] = []

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.weights.append(self.model.get_weights())


def has(model: keras.Model, weights: list[np.ndarray]) -> bool:
    return all(np.array_equal(mine, theirs) for mine, theirs in zip(model.get_weights(), weights, strict=True))


def steps(runs: kc.CheckpointDirectory) -> list[int]:
    return [record.step for record in runs]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("run", {"keep": kc.BestN(1) | kc.LatestN(1)}),
        ("run", {"save_best_only": True, "save_weights_only": True}),
        ("{epoch}.keras", {}),
        ("best.weights.h5", {"save_best_only": True, "save_weights_only": True}),
    ],
    ids=["a directory", "weights alone", "a template of files", "a file of weights"],
)
def test_the_model_has_the_best_weights_after_fit(tmp_path, capsys, path, options) -> None:
    """`verbose=1` says so in one line."""
    model, remembers = dense_model(), Remembers()
    checkpoint = kc.ModelCheckpoint(tmp_path / path, load_best_at_end=True, verbose=1, **options)
    fit(model, remembers, Reports(val_loss=LOSSES), checkpoint, epochs=3, batches=1)

    assert has(model, remembers.weights[1])
    assert not has(model, remembers.weights[2])
    best = kc.CheckpointDirectory(tmp_path / path).best()
    assert f"Restored the best checkpoint: {best.prefix}, val_loss 0.25\n" in capsys.readouterr().out


def test_the_next_fit_continues_from_the_best_checkpoint(runs) -> None:
    """Optimizer and place are those of the checkpoint too. A step that is saved again takes the place of its record."""
    model, other = dense_model(), dense_model()
    fit(model, Reports(val_loss=LOSSES), kc.ModelCheckpoint(runs.path, load_best_at_end=True), epochs=3, batches=1)
    kc.restore(other, runs[2])
    assert same(model, other)
    assert kc.initial_epoch(model) == 2

    fit(model, kc.ModelCheckpoint(runs.path, keep=kc.EveryNSteps(1)), initial_epoch=2, epochs=3, batches=1)

    assert [record.metrics.get("val_loss") for record in runs] == [0.5, 0.25, None]
    assert len({record.run_id for record in runs}) == 1


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("stop", "losses"),
    [
        (keras.callbacks.EarlyStopping("val_loss", patience=1), LOSSES),
        (keras.callbacks.TerminateOnNaN(), [0.5, 0.25, math.nan]),
        (keras.callbacks.LambdaCallback(), [0.5, 0.25, math.nan]),
    ],
    ids=["early stopping", "a NaN that stops", "a NaN in the last epoch"],
)
def test_the_best_weights_are_restored_however_fit_ends(runs, stop, losses) -> None:
    """A NaN is never best."""
    model, remembers = dense_model(), Remembers()
    nan = Poisons(epoch=2) if isinstance(stop, keras.callbacks.TerminateOnNaN) else keras.callbacks.Callback()
    checkpoint = kc.ModelCheckpoint(runs.path, load_best_at_end=True)
    fit(model, nan, remembers, Reports(val_loss=[*losses, 0.1]), checkpoint, stop, epochs=3, batches=1)

    assert has(model, remembers.weights[1])


class Poisons(keras.callbacks.Callback):
    """Makes the weights NaN before the first batch of an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None) -> None:
        if epoch == self.epoch:
            self.model.set_weights([each * math.nan for each in self.model.get_weights()])


def test_an_error_in_fit_leaves_the_model_as_training_left_it(runs) -> None:
    """Keras calls no callback at such an end, and the error is the user's news."""
    model, remembers = dense_model(), Remembers()
    checkpoint = kc.ModelCheckpoint(runs.path, load_best_at_end=True)
    with pytest.raises(KeyboardInterrupt):
        fit(model, remembers, Reports(val_loss=LOSSES), checkpoint, Interrupts(3), epochs=3, batches=1)

    assert not has(model, remembers.weights[0])
    assert not has(model, remembers.weights[1])
    assert steps(runs) == [1, 2]


def test_a_finished_script_that_runs_again_ends_with_the_best_weights(tmp_path) -> None:
    """Whether the backup is kept or removed at the end: the second start trains nothing."""
    for delete in (True, False):
        path, models = tmp_path / str(delete), []
        for _ in range(2):
            models.append(dense_model())
            checkpoint = kc.ModelCheckpoint(path, load_best_at_end=True)
            backup = kc.BackupAndRestore(path / "backup", delete_checkpoint=delete, verbose=0)
            fit(models[-1], Reports(val_loss=LOSSES), checkpoint, backup, epochs=3, batches=1)

        assert same(*models)
        assert steps(kc.CheckpointDirectory(path)) == [1, 2, 3]


def test_a_run_in_a_subdirectory_ends_with_its_own_best_weights(runs) -> None:
    """The better checkpoint of the other run does not count."""
    fit(dense_model(), Reports(val_loss=[0.1]), kc.ModelCheckpoint(runs.path), epochs=1, batches=1)
    model, remembers = dense_model(), Remembers()
    checkpoint = kc.ModelCheckpoint(runs.path, load_best_at_end=True, new_run="subdirectory")
    fit(model, remembers, Reports(val_loss=LOSSES), checkpoint, epochs=3, batches=1)

    assert has(model, remembers.weights[1])


def test_without_a_finite_value_the_model_stays_and_a_warning_tells(runs) -> None:
    model, remembers = dense_model(), Remembers()
    checkpoint = kc.ModelCheckpoint(runs.path, load_best_at_end=True)
    with pytest.warns(UserWarning, match="No checkpoint of the run has a finite 'val_loss', so the model stays"):
        fit(model, remembers, Reports(val_loss=[math.nan]), checkpoint, batches=1)

    assert has(model, remembers.weights[0])


def test_a_damaged_best_checkpoint_is_a_warning(runs) -> None:
    """`fit` returns its history, and the model is as training left it."""

    class Damages(keras.callbacks.Callback):
        def on_train_end(self, logs=None) -> None:
            path = pathlib.Path(runs[2].paths[-1])
            path.write_bytes(bytes(path.stat().st_size))

    model, remembers = dense_model(), Remembers()
    checkpoint = kc.ModelCheckpoint(runs.path, load_best_at_end=True)
    with pytest.warns(UserWarning, match=r"The best checkpoint could not be restored, so the model stays.*ckpt-2"):
        history = fit(model, Damages(), remembers, Reports(val_loss=LOSSES), checkpoint, epochs=3, batches=1)

    assert history.epoch == [0, 1, 2]
    assert has(model, remembers.weights[2])


def test_a_save_within_an_epoch_is_followed_by_one_that_has_the_metric(runs) -> None:
    """A metric of validation belongs to the epoch's end, and only a checkpoint that has it can be best."""
    model, remembers = dense_model(), Remembers()
    checkpoint = kc.ModelCheckpoint(runs.path, save_freq=2, load_best_at_end=True)
    fit(model, remembers, Reports(val_loss=LOSSES), checkpoint, epochs=3, batches=3)

    assert has(model, remembers.weights[1])


@pytest.mark.parametrize(
    ("path", "options", "kept"),
    [
        ("run", {"keep": 2}, r"keep=LatestN\(2\) does not keep it. Pass keep=LatestN\(2\) \| BestN\(1\)"),
        ("run", {"keep": kc.LatestN(2) & kc.MaxCount(9)}, r"keep=\(LatestN\(2\) \| BestN\(1\)\) & MaxCount\(9\)"),
        ("run", {"keep": kc.BestN(1, "loss") | kc.LatestN(1)}, "does not keep it"),
        ("run", {"keep": kc.BestN(1, mode="max"), "mode": "min"}, "does not keep it"),
        ("run", {"keep": kc.EveryNSteps(2), "save_best_only": True}, "does not keep it"),
        ("last.keras", {}, "a file that each save replaces does not keep it. Pass save_best_only=True"),
        ("best.h5", {"save_best_only": True}, r"restores no legacy .h5 file.*Write .*best\.keras"),
    ],
)
def test_arguments_that_keep_no_best_checkpoint_are_refused_by_the_constructor(tmp_path, path, options, kept) -> None:
    """The error says how to keep it."""
    with pytest.raises(ValueError, match=kept):
        kc.ModelCheckpoint(tmp_path / path, load_best_at_end=True, **options)


def test_policies_that_keep_the_best_checkpoint_are_accepted(tmp_path) -> None:
    """A user's own policy may keep it."""

    class Own(kc.PreservationPolicy):
        def select(self, records):
            return {record.step for record in records}

    for keep in (None, kc.BestN(2) | kc.LatestN(1), kc.BestN(1, "val_loss", "min"), Own()):
        assert kc.ModelCheckpoint(tmp_path, keep=keep, load_best_at_end=True).load_best_at_end
    assert kc.ModelCheckpoint(tmp_path, keep=3, save_best_only=True, load_best_at_end=True)
