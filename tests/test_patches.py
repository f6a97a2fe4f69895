"""The attributes of Keras objects that a resume replaces: all of them are restored, however the `fit` ends."""

import keras
import pytest

import keras_ckpt as kc
from keras_ckpt.model.keras_internals import begin_with_epoch
from keras_ckpt.resume.patches import Patches
from support.models import Interrupts, X, Y, dense_model, fit


@pytest.fixture
def callbacks() -> keras.callbacks.CallbackList:
    return keras.callbacks.CallbackList([], model=dense_model())


def test_remove_restores_the_methods_of_the_list_of_callbacks(callbacks) -> None:
    """The methods are those of the class again."""
    before, patches = dict(vars(callbacks)), Patches()

    patches.begin_with(callbacks.model, callbacks, 2)
    patches.resume_within(callbacks, 1, 3, None)
    assert vars(callbacks) != before
    patches.remove()

    assert vars(callbacks) == before


def test_remove_restores_the_first_epoch_of_fit(callbacks) -> None:
    """The next `fit` begins with its own first epoch."""
    model, patches = dense_model(), Patches()

    patches.begin_with(model, callbacks, 2)
    assert fit(model, epochs=3).epoch == [2]
    patches.remove()

    assert fit(model, epochs=3).epoch == [0, 1, 2]
    begin_with_epoch(model, None)


def test_keep_csv_files_names_the_loggers_that_would_empty_their_files(tmp_path) -> None:
    """`remove` restores `append` of these loggers, and leaves the others alone."""
    new, old = (keras.callbacks.CSVLogger(tmp_path / f"{each}.csv", append=each) for each in (False, True))
    patches = Patches()

    kept = patches.keep_csv_files(keras.callbacks.CallbackList([new, old]))
    assert (kept, new.append, old.append) == ([new], True, True)
    patches.remove()

    assert (new.append, old.append) == (False, True)


def test_a_csv_file_of_an_earlier_training_is_emptied_by_a_new_training(tmp_path) -> None:
    """A `CSVLogger` without `append` begins a new file, as without `BackupAndRestore`."""
    path = tmp_path / "log.csv"
    path.write_text("of an earlier training\n")

    fit(dense_model(), keras.callbacks.CSVLogger(path), kc.BackupAndRestore(tmp_path / "backup"), epochs=2)

    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["epoch", "0", "1"]


def test_the_list_of_callbacks_is_as_before_after_an_error_within_a_resumed_epoch(tmp_path) -> None:
    """The user may call `fit` again with the same list of callbacks."""

    def train(backup, *others, model):
        lists = keras.callbacks.CallbackList(
            [backup, *others], add_history=True, model=model, epochs=2, steps=10, verbose=0
        )
        before = dict(vars(lists))
        with pytest.raises(RuntimeError), backup:
            model.fit(backup.data, epochs=2, shuffle=False, verbose=0, callbacks=lists)
        return {name for name, value in vars(lists).items() if name not in before}

    def backup() -> kc.BackupAndRestore:
        return kc.BackupAndRestore(tmp_path, 3, data=kc.ResumableDataset(X, Y, batch_size=4))

    train(backup(), Interrupts(4, RuntimeError()), model=dense_model())
    resumed = dense_model()
    added = train(backup(), Interrupts(2, RuntimeError()), model=resumed)

    assert int(resumed.optimizer.iterations) == 4, "one batch of the resumed epoch has ended"
    assert added == set()
