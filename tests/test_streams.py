"""Resumable training data: class weights, cardinality, streams, and fits that map their data."""

from __future__ import annotations

import pathlib
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
from support.models import Interrupts, same

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


def pipeline() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, X)).shuffle(ROWS, seed=2).batch(4)


class Batches(keras.utils.PyDataset):
    """Six batches in order."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index):
        return X[index * 4 : index * 4 + 4], X[index * 4 : index * 4 + 4]


SOURCES = {
    "arrays": lambda: kc.ResumableDataset(X, X, batch_size=4, shuffle=True, seed=1),
    "a pipeline": lambda: kc.ResumableDataset(pipeline(), seed=1),
    "a function": lambda: kc.ResumableDataset(lambda number: pipeline(), seed=1),
    "a PyDataset": lambda: kc.ResumableDataset(Batches(), shuffle=True, seed=1),
}
STEPS = {
    "map": (lambda data: data.map(lambda *batch: batch), 6),
    "map in parallel": (lambda data: data.map(lambda *batch: batch, num_parallel_calls=2), 6),
    "prefetch": (lambda data: data.prefetch(2), 6),
    "take": (lambda data: data.take(4), 4),
    "skip": (lambda data: data.skip(1), 5),
    "repeat": (lambda data: data.repeat(3), 18),
    "endless": (lambda data: data.repeat(), tf.data.INFINITE_CARDINALITY),
    "options": (lambda data: data.with_options(tf.data.Options()), 6),
    "enumerate": (lambda data: data.enumerate(), 6),
    "concatenate": (lambda data: data.concatenate(pipeline()), 12),
    "zip": (lambda data: tf.data.Dataset.zip((data, pipeline())), 6),
    "batch": (lambda data: data.batch(2), 3),
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_pipeline_over_a_resumable_dataset_knows_its_cardinality(source, step) -> None:
    """Each transformation has the cardinality that it has over an ordinary dataset."""
    make, count = STEPS[step]

    data = make(SOURCES[source]())

    assert int(data.cardinality()) == count
    if count > 0:
        assert sum(1 for _ in data) == count


SEEN: weakref.WeakKeyDictionary[keras.Model, list[int]] = weakref.WeakKeyDictionary()
"""The lists are outside of the models, because a list in a model would be part of its state."""


class Net(keras.Model):
    """Records the first value of each training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.out = keras.layers.Dense(1)

    @property
    def seen(self) -> list[int]:
        return SEEN.setdefault(self, [])

    def call(self, x):
        return self.out(x / ROWS)

    def train_step(self, data):
        if tf.executing_eagerly():
            self.seen.append(int(data[0][0, 0]))
        return super().train_step(data)


class MapsItsData(Net):
    """Maps its data before Keras sees them, as the task models of KerasHub do."""

    def fit(self, x=None, **options):
        return super().fit(x=x.map(lambda *batch: batch, num_parallel_calls=2).prefetch(2), **options)


class WrapsItsData(Net):
    """Names the parts of a batch, and sets options."""

    def fit(self, x=None, **options):
        named = x.map(lambda x, y: {"x": x, "y": y}).map(lambda batch: (batch["x"], batch["y"]))
        return super().fit(x=named.with_options(tf.data.Options()), **options)


def net(kind=Net) -> Net:
    keras.utils.set_random_seed(1)
    model = kind()
    model(X[:1])
    model.compile(keras.optimizers.Adam(0.1), "mse", run_eagerly=True)
    return model


def resumed(path: pathlib.Path, source, fits, batches: int, kind=Net) -> Net:
    """The model of a process that resumes a training, which an error ended in the given batch."""
    data, crash = source(), Interrupts(batches, RuntimeError("crash"))
    with pytest.raises(RuntimeError, match="crash"):
        fits(net(kind), data, kc.BackupAndRestore(path, save_freq=1, data=data), crash)
    data, model = source(), net(kind)
    fits(model, data, kc.BackupAndRestore(path, save_freq=1, data=data))
    return model


@pytest.mark.sample(10)
@pytest.mark.parametrize("batches", [1, 4, 5, 8, 10])
@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_of_a_stream_resumes_at_its_place(tmp_path, source, batches) -> None:
    """Epochs have four steps, the data six batches: the place continues across the ends of both."""

    def fits(model, data, *callbacks) -> None:
        options = {"steps_per_epoch": 4, "epochs": 4, "shuffle": False, "verbose": 0}
        model.fit(data.repeat(), callbacks=list(callbacks), **options)

    whole = net()
    fits(whole, SOURCES[source]())

    model = resumed(tmp_path, SOURCES[source], fits, batches)

    assert model.seen == whole.seen[batches - 1 :]
    assert same(model, whole)


@pytest.mark.sample(4)
@pytest.mark.parametrize("kind", [MapsItsData, WrapsItsData])
@pytest.mark.parametrize("source", SOURCES)
def test_a_fit_that_maps_its_data_resumes_at_its_place(tmp_path, source, kind) -> None:
    """The dataset is recognized because the fit reads it."""

    def fits(model, data, *callbacks) -> None:
        model.fit(data, epochs=3, shuffle=False, verbose=0, callbacks=list(callbacks))

    whole = net(kind)
    fits(whole, SOURCES[source]())

    model = resumed(tmp_path, SOURCES[source], fits, 8, kind)

    assert model.seen == whole.seen[7:]
    assert same(model, whole)


MIXED = {
    "shuffle": lambda data: data.shuffle(3),
    "cache": lambda data: data.cache().prefetch(1),
    "shuffle, mapped": lambda data: data.map(lambda *batch: batch).shuffle(3).prefetch(1),
    "zip": lambda data: tf.data.Dataset.zip((data, pipeline())).map(lambda batch, other: batch),
    "zip, enumerated": lambda data: data.enumerate().map(lambda number, batch: batch),
    "zip, with itself": lambda data: tf.data.Dataset.zip((data, data)).map(lambda batch, other: batch),
    "scan": lambda data: data.scan(0, lambda state, *batch: (state, batch)),
    "directedinterleave": lambda data: tf.data.Dataset.choose_from_datasets(
        [data.repeat(), pipeline().repeat()], tf.data.Dataset.range(2).repeat(3)
    ).apply(tf.data.experimental.assert_cardinality(6)),
}


@pytest.mark.parametrize("name", MIXED)
def test_a_fit_whose_batches_may_differ_is_refused(tmp_path, name) -> None:
    """A place in the dataset does not determine a place in these data. The error says where the step belongs."""
    data = SOURCES["arrays"]()
    step = name.partition(",")[0]

    with pytest.raises(ValueError, match=rf"through a step '{step}'.*Give this step to the pipeline"):
        net().fit(MIXED[name](data), verbose=0, shuffle=False, callbacks=[kc.BackupAndRestore(tmp_path, data=data)])


@pytest.mark.parametrize(
    "mix",
    [lambda data: data.unbatch().batch(4), lambda data: data.shard(2, 1), lambda data: data.filter(lambda *b: True)],
)
def test_a_stream_whose_batches_may_differ_is_refused(tmp_path, mix) -> None:
    """Also where epochs are parts of a stream."""
    data = SOURCES["arrays"]()
    options = {"steps_per_epoch": 4, "verbose": 0, "shuffle": False}

    with pytest.raises(ValueError, match="through a step"):
        net().fit(mix(data.repeat()), callbacks=[kc.BackupAndRestore(tmp_path, data=data)], **options)


layer_that_draws = keras.layers.GaussianNoise(0.1, seed=1)
DRAWS = {
    "an operation": lambda *batch: (batch[0] + tf.random.normal(tf.shape(batch[0]), seed=3), *batch[1:]),
    "a layer": lambda *batch: (layer_that_draws(batch[0], training=True), *batch[1:]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_map_that_draws_random_numbers_is_warned_of(tmp_path, name) -> None:
    """A restart does not know how many numbers the map drew."""
    data = SOURCES["arrays"]()
    mapped = data.map(DRAWS[name])

    with pytest.warns(UserWarning, match="draws random numbers or changes variables"):
        net().fit(mapped, verbose=0, shuffle=False, callbacks=[kc.BackupAndRestore(tmp_path, data=data)])


def test_a_map_without_random_numbers_is_not_warned_of(tmp_path, recwarn) -> None:
    """A layer in a map may read its variables."""
    data = SOURCES["arrays"]()
    scale = keras.layers.Rescaling(0.5)
    mapped = data.map(lambda *batch: (scale(batch[0]), *batch[1:]))

    net().fit(mapped, verbose=0, shuffle=False, callbacks=[kc.BackupAndRestore(tmp_path, data=data)])

    assert [str(each.message) for each in recwarn if each.category is UserWarning] == []


NUMBERS = tf.data.Dataset.from_tensor_slices((X, CLASSES))


@pytest.mark.parametrize(
    ("pipeline", "step"),
    [
        (NUMBERS.shuffle(9, seed=1).cache().batch(4), "cache"),
        (NUMBERS.batch(4).shuffle(9, seed=1).map(lambda *batch: batch).cache().prefetch(1), "cache"),
        (NUMBERS.shuffle(9, seed=1).batch(4).shuffle(3, seed=2), "shuffle"),
    ],
)
def test_a_pipeline_that_keeps_a_shuffled_epoch_is_warned_of(pipeline, step) -> None:
    """A later epoch depends on the order of the first epoch."""
    with pytest.warns(UserWarning, match=rf"shuffle\(\) before {step}\(\)"):
        kc.ResumableDataset(pipeline)


@pytest.mark.parametrize(
    "pipeline",
    [
        NUMBERS.cache().shuffle(9, seed=1).batch(4),
        NUMBERS.shuffle(9, seed=1, reshuffle_each_iteration=False).cache().batch(4),
        NUMBERS.shuffle(9, seed=1).batch(4).prefetch(1),
        NUMBERS.batch(4),
    ],
)
def test_other_pipelines_are_not_warned_of(pipeline, recwarn) -> None:
    """Each epoch shuffles data of a fixed order."""
    kc.ResumableDataset(pipeline)

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
        net().fit(data.repeat(), steps_per_epoch=steps, verbose=0, shuffle=False, callbacks=callbacks)

    with pytest.raises(KeyboardInterrupt):
        train(5, Interrupts(3))

    with pytest.warns(UserWarning, match="an epoch has 4 batches here, and had 5 when the backup was saved"):
        train(4)


def test_a_fit_may_read_through_many_transformations(tmp_path) -> None:
    """Each transformation is checked once."""
    data = SOURCES["arrays"]()
    mapped: tf.data.Dataset = data
    for _ in range(40):
        mapped = mapped.prefetch(1)

    net().fit(mapped, verbose=0, shuffle=False, callbacks=[kc.BackupAndRestore(tmp_path, data=data)])


class Generator:
    """Yields endlessly."""

    def __iter__(self):
        while True:
            yield X[:4], X[:4]


STREAMS = {
    "a repeated pipeline": lambda: pipeline().repeat(),
    "a generator": lambda: iter(Generator()),
    "a PyDataset": Batches,
}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_whose_place_is_lost_is_warned_of_at_an_epochs_end_too(tmp_path, stream) -> None:
    """The warning says how to resume exactly."""
    options = {"steps_per_epoch": 3, "verbose": 0, "shuffle": False}
    net().fit(
        STREAMS[stream](), epochs=1, callbacks=[kc.BackupAndRestore(tmp_path, delete_checkpoint=False)], **options
    )

    with pytest.warns(UserWarning, match=r"steps_per_epoch=3 an epoch begins where .*data.repeat\(\)") as seen:
        net().fit(STREAMS[stream](), epochs=2, callbacks=[kc.BackupAndRestore(tmp_path)], **options)
    assert [each.filename for each in seen] == [__file__]
