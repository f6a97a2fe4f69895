"""`on_nan`: after a loss that is not finite, the last good checkpoint is restored and training continues."""

import math
import pathlib
import re

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from support.models import Interrupts, X, Y, dense_model, fit, same, warned

Rollback = kc.Rollback


class Poisons(keras.callbacks.Callback):
    """Makes the weights NaN at the begin or the end of batches, which are counted from 1 over the whole fit."""

    def __init__(self, *batches: int, at_end: bool = False) -> None:
        super().__init__()
        self.batches, self.at_end, self.count = batches, at_end, 0

    def on_train_batch_begin(self, batch, logs=None) -> None:
        self.count += 1
        if self.count in self.batches and not self.at_end:
            self.poison()

    def on_train_batch_end(self, batch, logs=None) -> None:
        if self.count in self.batches and self.at_end:
            self.poison()

    def poison(self) -> None:
        kernel = self.model.layers[-1].kernel
        kernel.assign(kernel * math.nan)


def steps(runs: kc.CheckpointDirectory) -> list[int]:
    return [record.step for record in runs]


def has_nan(record: kc.CheckpointRecord) -> bool:
    return any(np.isnan(values).any() for name, values in kc.load_variables(record).items() if "kernel" in name)


def test_training_continues_from_the_last_good_checkpoint_in_graph_mode(runs) -> None:
    """With a smaller learning rate, if asked. The steps count on, and the metrics of the epoch begin again."""
    seen = []

    class Looks(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            if Looks.poisons.count == 6:
                other = dense_model()
                kc.restore(other, runs[4])
                other.optimizer.learning_rate = 0.0005
                seen.append(same(self.model, other))

    model, Looks.poisons = dense_model(run_eagerly=False), Poisons(6)
    checkpoint = kc.ModelCheckpoint(runs.path, on_nan=Rollback(learning_rate=0.5))
    with pytest.warns(UserWarning, match="rollback") as caught:
        history = fit(model, Looks.poisons, checkpoint, Looks(), epochs=3, batches=4)

    assert seen == [True]
    assert re.fullmatch(
        r"Step 6: the loss is nan. Restored \S+/ckpt-4, whose loss is [\d.]+, with the learning rate 0.0005. Training "
        "continues with the next batch. This is rollback 1 of 3.",
        warned(caught)[0],
    )
    assert len(warned(caught)) == 1
    assert steps(runs) == [4, 8, 12]
    assert all(math.isfinite(loss) for loss in history.history["loss"])
    assert float(model.optimizer.learning_rate) == pytest.approx(0.0005)
    assert [(event.step, event.why) for event in runs.events() if event.kind == "restored"] == [
        (4, "Step 6: the loss is nan")
    ]


@pytest.mark.parametrize("save_freq", ["epoch", 1])
def test_the_step_of_a_nan_is_the_end_of_a_branch_in_the_history_and_in_each_picture(runs, tmp_path, save_freq) -> None:
    """Also if nothing was saved since the checkpoint that was restored. The monitored metric has no value there."""
    checkpoint = kc.ModelCheckpoint(runs.path, save_freq=save_freq, on_nan="rollback")
    with pytest.warns(UserWarning, match="Step 6: the loss is nan"):
        fit(dense_model(), Poisons(6), checkpoint, epochs=3, batches=4, validation_data=(X, Y))

    branch = [point for point in runs.history("loss").points if point.branch]
    assert [(point.step, point.branch) for point in branch] == [(6, 1)]
    assert math.isnan(branch[0].value)
    assert runs.why(6) == "Step 6 was not saved: the loss is nan."
    [end] = runs.seen("val_loss").picture.of_kind("left")
    assert (end.step, end.text) == (6, "step 6: nan, the run went back: Step 6: the loss is nan")
    runs.report(tmp_path / "report.html")
    assert f"<title>{end.text}</title>" in (tmp_path / "report.html").read_text()
    labels = [each.get_text() for each in runs.plot().get_legend().get_texts()]
    assert labels[0] == "left"


def test_a_training_that_diverges_is_rescued_by_a_smaller_learning_rate(runs) -> None:
    """Each rollback reduces the rate of before, although the checkpoint has the first rate."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-3), "mse")
    fit(model, kc.ModelCheckpoint(runs.path), epochs=1, batches=5)
    model.optimizer.learning_rate = 1e12

    with pytest.warns(UserWarning, match="rollback") as caught:
        history = fit(model, kc.ModelCheckpoint(runs.path, on_nan=Rollback(1e-5, times=9)), epochs=3, batches=20)

    assert 2 <= len(warned(caught)) <= 4
    assert math.isfinite(history.history["loss"][-1])
    assert not any(map(has_nan, runs))


@pytest.mark.sample(1)
@pytest.mark.parametrize("path", ["run", "{epoch}.keras"])
def test_a_model_with_nan_in_its_weights_is_not_saved(tmp_path, backup, path) -> None:
    """Although the loss of its last batch is finite. The backup of that step is not written either."""
    checkpoint = kc.ModelCheckpoint(tmp_path / path, on_nan="rollback", keep=1)
    backups = kc.BackupAndRestore(backup, delete_checkpoint=False)
    with pytest.warns(UserWarning, match="Step 4: the weights are not finite. Restored .*rollback 1 of 3"):
        fit(dense_model(), Poisons(4, at_end=True), checkpoint, backups, epochs=2, batches=2)

    assert steps(checkpoint.directory) == [2]
    assert not has_nan(checkpoint.directory.latest())
    assert not has_nan(kc.CheckpointDirectory(backup).latest())


def test_a_backup_with_nan_in_its_weights_is_not_written_between_two_checkpoints(runs, backup) -> None:
    """A backup is due after the batch, and no checkpoint is. The next batch is followed by the rollback."""
    checkpoint = kc.ModelCheckpoint(runs.path, on_nan="rollback")
    newest = []

    class Looks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            newest.append(kc.CheckpointDirectory(backup).latest())
            assert not has_nan(newest[-1])

    backups = kc.BackupAndRestore(backup, save_freq=1, double_checkpoint=True)
    with pytest.warns(UserWarning, match="Step 6: the loss is nan"):
        fit(dense_model(), Poisons(5, at_end=True), checkpoint, Looks(), backups, epochs=2, batches=4)

    assert len(newest) == 2


def test_a_nan_in_the_last_batch_of_an_epoch_is_one_rollback(runs) -> None:
    """The epoch is not saved, because nothing was trained since the checkpoint. Its loss is NaN, not zero."""
    with pytest.warns(UserWarning, match="rollback 1 of 3") as caught:
        history = fit(dense_model(), Poisons(4), kc.ModelCheckpoint(runs.path, on_nan="rollback"), epochs=3, batches=2)

    assert len(warned(caught)) == 1
    assert [math.isnan(loss) for loss in history.history["loss"]] == [False, True, False]
    assert steps(runs) == [2, 6]


def test_training_stops_after_too_many_rollbacks(runs) -> None:
    """The warning tells how to restore the last good checkpoint, and nothing more is saved."""
    model = dense_model()
    checkpoint = kc.ModelCheckpoint(runs.path, save_freq=["epoch", 1], on_nan=Rollback(times=2))
    with pytest.warns(UserWarning, match="loss is nan") as caught:
        history = fit(model, Poisons(4, 5, 6), checkpoint, epochs=9, batches=3)

    assert history.epoch == [0, 1]
    assert steps(runs) == [1, 2, 3]
    last = warned(caught)[-1]
    assert "Step 6: the loss is nan, after 2 rollbacks. Training stops. keras_ckpt.restore(model, '" in last
    assert last.endswith("ckpt-3') restores the last.")


def test_training_stops_without_a_good_checkpoint(runs) -> None:
    """Nothing was saved before the first NaN."""
    with pytest.warns(UserWarning, match=r"no whole checkpoint of the run in \S+ has a finite loss and weights\. Tr"):
        history = fit(dense_model(), Poisons(2), kc.ModelCheckpoint(runs.path, on_nan="rollback"), epochs=3, batches=3)

    assert history.epoch == [0]
    assert steps(runs) == []


def test_a_checkpoint_that_is_damaged_or_has_nan_is_not_good(runs) -> None:
    """The newest is damaged. The next has NaN weights and a finite loss, from a fit without `on_nan`."""
    model = dense_model()
    fit(model, Poisons(4, at_end=True), kc.ModelCheckpoint(runs.path), epochs=2, batches=2)
    kc.restore(model, runs[2])
    fit(model, kc.ModelCheckpoint(runs.path), epochs=1, batches=4)
    path = pathlib.Path(runs[6].paths[-1])
    path.write_bytes(bytes(path.stat().st_size))

    with pytest.warns(UserWarning, match="restored|Restored") as caught:
        fit(model, Poisons(1), kc.ModelCheckpoint(runs.path, on_nan="rollback"), epochs=1, batches=2)

    assert "ckpt-6 is not restored: " in warned(caught)[0]
    assert "Step 7: the loss is nan. Restored " in warned(caught)[1]
    assert "ckpt-2, whose loss is " in warned(caught)[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nan": "stop"}, r"on_nan expected None, 'rollback' or .*Received: 'stop'"),
        ({"on_nan": True}, "Received: True"),
        ({"on_nan": "rollback", "save_weights_only": True}, "on_nan needs the state of the optimizer"),
        ({"on_nan": "rollback", "filepath": "best.h5"}, r"restores no legacy \.h5 file"),
    ],
)
def test_an_answer_that_cannot_be_carried_out_is_refused_by_the_constructor(tmp_path, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        kc.ModelCheckpoint(**{"filepath": tmp_path / "run", **options})


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0}, {"learning_rate": math.nan}, {"learning_rate": "0.5"}, {"times": 0}, {"times": 1.5}],
)
def test_a_rollback_of_wrong_numbers_is_refused(options) -> None:
    with pytest.raises(ValueError, match=r"Rollback expected .* Received: "):
        Rollback(**options)


def test_a_fit_that_could_not_be_answered_is_refused_before_its_first_batch(tmp_path) -> None:
    """A schedule sets the learning rate, or two callbacks would restore."""
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.9)
    scheduled = dense_model(optimizer=keras.optimizers.Adam(schedule))
    with pytest.raises(ValueError, match="cannot change the learning rate, because a schedule sets it"):
        fit(scheduled, kc.ModelCheckpoint(tmp_path / "a", on_nan=Rollback(learning_rate=0.5)))
    both = [kc.ModelCheckpoint(tmp_path / name, on_nan="rollback") for name in "ab"]
    with pytest.raises(ValueError, match="Several ModelCheckpoints of this fit have on_nan"):
        fit(dense_model(), *both)

    assert not (tmp_path / "a").exists()
    with pytest.warns(UserWarning, match=r"whose loss is [\d.]+\. Training continues"):
        fit(scheduled, Poisons(3), kc.ModelCheckpoint(tmp_path / "a", on_nan="rollback"), epochs=2, batches=2)


def test_a_restart_counts_the_rollbacks_of_before(runs, backup) -> None:
    """A killed training has no more rollbacks than one that was not killed."""

    def train(*callbacks) -> None:
        checkpoint = kc.ModelCheckpoint(runs.path, on_nan=Rollback(times=1))
        fit(dense_model(), *callbacks, checkpoint, kc.BackupAndRestore(backup), epochs=4, batches=2)

    with pytest.warns(UserWarning, match="rollback 1 of 1"), pytest.raises(RuntimeError):
        train(Poisons(3), Interrupts(6, RuntimeError()))

    with pytest.warns(UserWarning, match="loss") as caught:
        train(Poisons(5), Interrupts(99))

    assert "Step 5: the loss is nan, after 1 rollback. Training stops." in warned(caught)[0]
    assert "The earlier backup stays" in warned(caught)[1]
    assert kc.CheckpointDirectory(backup).latest().step == 4
