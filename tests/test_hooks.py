"""`on_saved` and `on_removed`: the user's functions hear of each checkpoint, in the training thread."""

import os
import threading

import keras
import pytest
import tensorflow as tf

import keras_ckpt as kc
from support.models import Interrupts, Reports, dense_model, fit


class Heard(list):
    """The kinds and the steps of the changes, as the functions `saved` and `removed` hear them."""

    def saved(self, record: kc.CheckpointRecord) -> None:
        self.append(("saved", record.step))

    def removed(self, record: kc.CheckpointRecord) -> None:
        self.append(("removed", record.step))


@pytest.mark.parametrize("on_background", [True, False])
def test_each_saved_and_removed_checkpoint_is_told_in_order(runs, on_background) -> None:
    """All are told when `fit` returns."""
    heard = Heard()
    checkpoint = kc.ModelCheckpoint(
        runs.path, keep=1, on_saved=heard.saved, on_removed=heard.removed, save_on_background=on_background
    )

    fit(dense_model(), checkpoint, epochs=3)

    told = [step for kind, step in heard if kind == "saved"]
    assert told[-1] == 15  # a save that waits may be replaced by a newer save
    assert [step for kind, step in heard if kind == "removed"] == told[:-1]
    assert heard.index(("saved", told[-1])) < heard.index(("removed", told[-2]))


def test_the_functions_are_called_in_the_training_thread(runs) -> None:
    """Trackers keep their current run by thread."""
    threads = set()
    checkpoint = kc.ModelCheckpoint(runs.path, save_freq=2, on_saved=lambda _: threads.add(threading.current_thread()))

    fit(dense_model(), checkpoint, epochs=2)

    assert threads == {threading.current_thread()}


def test_the_files_are_on_disk_when_on_saved_is_called(runs) -> None:
    """`record.paths` has the sidecar first."""
    sizes = []

    def look(record: kc.CheckpointRecord) -> None:
        assert record.paths[0] == f"{record.prefix}.json"
        assert record.paths[1:] == [f"{record.directory}/{file.name}" for file in record.files]
        sizes.extend(map(os.path.getsize, record.paths))

    fit(dense_model(), kc.ModelCheckpoint(runs.path, on_saved=look))

    assert len(sizes) == 3
    assert all(sizes)


def test_a_save_is_told_at_the_next_batch_after_it(runs) -> None:
    """Not only at the end of `fit`."""
    heard, seen = Heard(), []
    look = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: seen.append(list(heard)))

    checkpoint = kc.ModelCheckpoint(runs.path, save_freq=2, on_saved=heard.saved, save_on_background=False)
    fit(dense_model(), checkpoint, look)

    assert seen == [[], [("saved", 2)], [("saved", 2)], [("saved", 2), ("saved", 4)], [("saved", 2), ("saved", 4)]]


def test_a_checkpoint_that_gets_the_metrics_of_the_epochs_end_is_told_again(runs) -> None:
    """The second record has the validation metrics."""
    heard = []
    checkpoint = kc.ModelCheckpoint(runs.path, save_freq=["epoch", 5], on_saved=heard.append, save_on_background=False)

    fit(dense_model(), Reports(val_loss=[0.5]), checkpoint)

    assert [(record.step, "val_loss" in record.metrics) for record in heard] == [(5, False), (5, True)]


def test_a_file_of_keras_is_told_with_its_sidecar(tmp_path) -> None:
    """The removed file too."""
    heard = []
    checkpoint = kc.ModelCheckpoint(
        tmp_path / "{epoch}.keras", keep=1, on_saved=heard.append, on_removed=heard.append, save_on_background=False
    )

    fit(dense_model(), checkpoint, epochs=2)

    assert [record.paths for record in heard] == [
        [f"{tmp_path}/{epoch}.keras.json", f"{tmp_path}/{epoch}.keras"] for epoch in (1, 2, 1)
    ]


def test_an_error_of_on_saved_is_a_warning(runs) -> None:
    """The training continues, and the checkpoints are on disk."""

    def fails(record: kc.CheckpointRecord) -> None:
        raise ConnectionError("offline")

    with pytest.warns(UserWarning, match=r"on_saved failed for .*/ckpt-5: ConnectionError\('offline'\)"):
        fit(dense_model(), kc.ModelCheckpoint(runs.path, on_saved=fails))

    assert [record.step for record in runs] == [5]


def test_saves_that_an_interrupted_fit_did_not_tell_are_told_by_the_next_fit(runs) -> None:
    """The same callback continues in a notebook."""
    heard = Heard()
    checkpoint = kc.ModelCheckpoint(runs.path, save_freq=2, on_saved=heard.saved)
    model = dense_model()
    with pytest.raises(KeyboardInterrupt):
        fit(model, Interrupts(2), checkpoint)
    with pytest.raises(KeyboardInterrupt):
        fit(model, checkpoint, Interrupts(4))

    fit(model, checkpoint)

    assert heard == [("saved", record.step) for record in runs]


def test_a_replaced_run_is_told_as_removed(runs) -> None:
    fit(dense_model(), kc.ModelCheckpoint(runs.path), epochs=2)
    heard = Heard()

    checkpoint = kc.ModelCheckpoint(runs.path, new_run="replace", on_saved=heard.saved, on_removed=heard.removed)
    fit(dense_model(), checkpoint)

    assert heard == [("saved", 5), ("removed", 5), ("removed", 10)]


@pytest.mark.parametrize("name", ["on_saved", "on_removed"])
def test_a_hook_that_is_no_function_is_refused(runs, name) -> None:
    with pytest.raises(TypeError, match=f"{name} expected a function of a record. Received: 'print'"):
        kc.ModelCheckpoint(runs.path, **{name: "print"})


def test_the_manager_tells_of_saved_and_removed_checkpoints(runs) -> None:
    """Before `save` returns."""
    heard = Heard()
    manager = kc.CheckpointManager(
        tf.train.Checkpoint(step=tf.Variable(1)), runs.path, 1, on_saved=heard.saved, on_removed=heard.removed
    )

    manager.save()
    assert heard == [("saved", 1)]
    manager.save()

    assert heard == [("saved", 1), ("saved", 2), ("removed", 1)]
