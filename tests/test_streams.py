"""Resumable training data in `fit`: class weights, epochs, streams of several epochs, and other arguments."""

from __future__ import annotations

import pathlib

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from support.models import Interrupts, same

try:
    import tensorflow as tf
except ModuleNotFoundError:
    tf = None
try:
    from torch.utils.data import DataLoader
except ModuleNotFoundError:
    DataLoader = None

ROWS = 24
X = np.arange(ROWS, dtype="float32")[:, None]
CLASSES = np.arange(ROWS) % 3
WEIGHTS = {0: 1.0, 1: 5.0, 2: 0.5}


def classifier(loss: str) -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", loss, weighted_metrics=["accuracy"], run_eagerly=True)
    return model


ONE_HOT = keras.utils.to_categorical(CLASSES, 3)
TARGETS = {
    "numbers": CLASSES,
    "numbers of 32 bits": CLASSES.astype("int32"),
    "numbers in a column": CLASSES[:, None],
    "fractions": CLASSES.astype("float32"),
    "one-hot": ONE_HOT,
    "one-hot of whole numbers": ONE_HOT.astype("int32"),
    "smoothed": ONE_HOT * 0.9 + 0.1 / 3,
}


@pytest.mark.sample(7)
@pytest.mark.parametrize("batch", [3, 4, 24])
@pytest.mark.parametrize("name", TARGETS)
def test_class_weights_act_as_in_fit(name, batch) -> None:
    """Losses, metrics and model weights are equal to those of `fit(class_weight=...)`, to the bit."""
    y = TARGETS[name]
    loss = "categorical_crossentropy" if y.ndim == 2 and y.shape[1] == 3 else "sparse_categorical_crossentropy"
    options = {"epochs": 2, "shuffle": False, "verbose": 0}
    theirs, ours = classifier(loss), classifier(loss)
    expected = theirs.fit(X, y, batch_size=batch, class_weight=WEIGHTS, **options).history

    got = ours.fit(kc.ResumableDataset(X, y, class_weight=WEIGHTS, batch_size=batch), **options).history

    assert got == expected
    assert same(ours, theirs)


@pytest.mark.parametrize("name", TARGETS)
def test_class_weights_do_not_change_targets(name) -> None:
    """The targets keep their values, shape and type."""
    y = TARGETS[name]
    data = kc.ResumableDataset(X, y, class_weight=WEIGHTS, batch_size=ROWS)
    plain = kc.ResumableDataset(X, y, batch_size=ROWS)

    ((_, got, weights),), ((_, expected),) = data, plain

    np.testing.assert_array_equal(got, expected)
    assert got.dtype == expected.dtype
    np.testing.assert_allclose(weights, [WEIGHTS[each] for each in CLASSES])


def pipeline():
    return tf.data.Dataset.from_tensor_slices((X, X)).shuffle(ROWS, seed=2).batch(4)


class Batches(keras.utils.PyDataset):
    """Six batches in order."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index):
        return X[index * 4 : index * 4 + 4], X[index * 4 : index * 4 + 4]


SOURCES = {
    "arrays": lambda: kc.ResumableDataset(X, X, batch_size=4, shuffle=True, seed=1),
    "a PyDataset": lambda: kc.ResumableDataset(Batches(), shuffle=True, seed=1),
    "a function": lambda: kc.ResumableDataset(lambda number: Batches(), seed=1),
}
if tf:
    SOURCES |= {
        "a pipeline": lambda: kc.ResumableDataset(pipeline(), seed=1),
        "a function of pipelines": lambda: kc.ResumableDataset(lambda number: pipeline(), seed=1),
    }
if DataLoader:
    SOURCES["a DataLoader"] = lambda: kc.ResumableDataset(
        DataLoader(list(zip(X, X, strict=True)), batch_size=4, shuffle=True), seed=1
    )


def net() -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Rescaling(1 / ROWS), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.1), "mse", metrics=["mae"], run_eagerly=True)
    return model


class InterruptsValidation(keras.callbacks.Callback):
    """Raises an error before the first validation."""

    def on_test_begin(self, logs=None) -> None:
        raise RuntimeError("crash")


def interrupts(batches: int) -> Interrupts:
    return Interrupts(batches, RuntimeError("crash"))


def resumed(path: pathlib.Path, source, fits, crash: keras.callbacks.Callback) -> keras.Model:
    """The model of a process that resumes a training, which a callback ended by an error."""
    data = source()
    with pytest.raises(RuntimeError, match="crash"), kc.BackupAndRestore(path, save_freq=1, data=data) as backup:
        fits(net(), data, crash, backup)
    data, model = source(), net()
    fits(model, data, kc.BackupAndRestore(path, save_freq=1, data=data))
    return model


@pytest.mark.sample(10)
@pytest.mark.parametrize("batches", [1, 4, 5, 8, 10])
@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_of_a_stream_resumes_at_its_place(tmp_path, source, batches) -> None:
    """Epochs have four steps, the data six batches: the place continues across the ends of both."""

    def fits(model, data, *callbacks) -> None:
        model.fit(data.repeat(), callbacks=list(callbacks), steps_per_epoch=4, epochs=4, verbose=0)

    whole = net()
    fits(whole, SOURCES[source]())

    assert same(resumed(tmp_path, SOURCES[source], fits, interrupts(batches)), whole)


CRASHES = {
    "within an epoch": lambda: interrupts(3),
    "in validation": InterruptsValidation,
    "in the second epoch": lambda: interrupts(8),
}


@pytest.mark.sample(6)
@pytest.mark.parametrize("crash", CRASHES)
@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_resumes_at_its_place(tmp_path, source, crash) -> None:
    """Where only validation is left, no batch of the next epoch is lost."""

    def fits(model, data, *callbacks) -> None:
        model.fit(data, validation_data=(X, X), epochs=3, verbose=0, callbacks=list(callbacks))

    whole = net()
    fits(whole, SOURCES[source]())

    assert same(resumed(tmp_path, SOURCES[source], fits, CRASHES[crash]()), whole)


def numbers():
    return tf.data.Dataset.from_tensor_slices((X, CLASSES))


KEEPING = {
    "cache": lambda: numbers().shuffle(9, seed=1).cache().batch(4),
    "cache of batches": lambda: numbers().batch(4).shuffle(9, seed=1).map(lambda *batch: batch).cache().prefetch(1),
    "shuffle": lambda: numbers().shuffle(9, seed=1).batch(4).shuffle(3, seed=2),
}
NOT_KEEPING = {
    "cache first": lambda: numbers().cache().shuffle(9, seed=1).batch(4),
    "one order": lambda: numbers().shuffle(9, seed=1, reshuffle_each_iteration=False).cache().batch(4),
    "no cache": lambda: numbers().shuffle(9, seed=1).batch(4).prefetch(1),
    "no shuffle": lambda: numbers().batch(4),
}


@pytest.mark.skipif(tf is None, reason="pipelines of TensorFlow")
@pytest.mark.parametrize("name", KEEPING)
def test_a_pipeline_that_keeps_a_shuffled_epoch_is_warned_of(name) -> None:
    """A later epoch depends on the order of the first epoch."""
    with pytest.warns(UserWarning, match=rf"shuffle\(\) before {name.split()[0]}\(\)"):
        kc.ResumableDataset(KEEPING[name]())


@pytest.mark.skipif(tf is None, reason="pipelines of TensorFlow")
@pytest.mark.parametrize("name", NOT_KEEPING)
def test_other_pipelines_are_not_warned_of(name, recwarn) -> None:
    """Each epoch shuffles data of a fixed order."""
    kc.ResumableDataset(NOT_KEEPING[name]())

    assert not recwarn


class TestOtherArgumentsAtARestart:
    """The program gives `ResumableDataset` different arguments than before."""

    def state(self, **options) -> dict:
        return kc.ResumableDataset(X, CLASSES, batch_size=4, seed=1, **options).get_state()

    def test_another_shuffling_is_refused(self) -> None:
        """The batches would have another order."""
        data = kc.ResumableDataset(X, CLASSES, batch_size=4, seed=1)

        with pytest.raises(kc.MismatchError, match="shuffle False here, True there"):
            data.set_state(self.state(shuffle=True) | {"first_batch": data.get_state()["first_batch"]})

    def test_other_class_weights_are_warned_of(self) -> None:
        """The program's class weights apply."""
        data = kc.ResumableDataset(X, CLASSES, batch_size=4, seed=1, class_weight={0: 2})

        with pytest.warns(UserWarning, match=r"class_weight \{0: 2\.0\} as in the program, not \{0: 1\.5\} as saved"):
            data.set_state(self.state(class_weight={0: 1.5}))

    def test_the_same_class_weights_in_other_types_are_not_warned_of(self, recwarn) -> None:
        data = kc.ResumableDataset(X, CLASSES, batch_size=4, seed=1, class_weight={1: 1, 0: 2})

        data.set_state(self.state(class_weight={np.int64(0): np.float32(2), np.int64(1): 1.0}))

        assert not recwarn

    def test_a_state_of_an_older_version_is_accepted(self) -> None:
        """The state lacks these arguments."""
        state = self.state(shuffle=True)
        data = kc.ResumableDataset(X, CLASSES, batch_size=4, seed=1, shuffle=True, class_weight={0: 2.0})

        data.set_state({name: value for name, value in state.items() if name not in ("shuffle", "class_weight")}, 2)

        assert data.get_state()["pass"] == state["pass"]


def test_the_warning_of_a_restarted_epoch_names_another_number_of_steps(tmp_path) -> None:
    """The warning does not advise `ResumableDataset`, which the program uses already."""
    data = SOURCES["arrays"]()

    def train(steps: int, *others) -> None:
        callbacks = [*others, kc.BackupAndRestore(tmp_path, save_freq=1, data=data)]
        net().fit(data.repeat(), steps_per_epoch=steps, verbose=0, callbacks=callbacks)

    with pytest.raises(KeyboardInterrupt):
        train(5, Interrupts(3))

    with pytest.warns(UserWarning, match="an epoch has 4 batches here, and had 5 when the backup was saved"):
        train(4)


class Generator:
    """Yields endlessly."""

    def __iter__(self):
        while True:
            yield X[:4], X[:4]


STREAMS = {"a generator": lambda: iter(Generator()), "a PyDataset": Batches}
if tf:
    STREAMS["a repeated pipeline"] = lambda: pipeline().repeat()


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_whose_place_is_lost_is_warned_of_at_an_epochs_end_too(tmp_path, stream) -> None:
    """The warning says how to resume exactly."""
    options = {"steps_per_epoch": 3, "verbose": 0, "shuffle": False}
    net().fit(
        STREAMS[stream](), epochs=1, callbacks=[kc.BackupAndRestore(tmp_path, delete_checkpoint=False)], **options
    )

    with pytest.warns(UserWarning, match=r"steps_per_epoch=3 an epoch begins where .*data.repeat\(\)") as seen:
        net().fit(STREAMS[stream](), epochs=2, callbacks=[kc.BackupAndRestore(tmp_path)], **options)
    assert [each.filename for each in seen if "steps_per_epoch=3" in str(each.message)] == [__file__]
