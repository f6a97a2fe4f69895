"""`ResumableDataset`: each epoch has its order, and resumes at any batch, in another process too."""

import random

import grain
import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
from support.models import dense_model, fit

X = np.arange(10, dtype="float32")
Y = np.arange(10)
BATCHES = 4


class Noisy(keras.utils.PyDataset):
    """A PyDataset that draws from the global generators, and shuffles itself at the end of each epoch."""

    draws = True

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.order = np.arange(len(X))

    def __len__(self) -> int:
        return BATCHES

    def __getitem__(self, index):
        rows = self.order[index * 3 : index * 3 + 3]
        noise = 100 * (random.randrange(5) + np.random.randint(5, size=len(rows))) if self.draws else 0
        return X[rows] + noise, Y[rows]

    def on_epoch_end(self) -> None:
        np.random.shuffle(self.order)


class Quiet(Noisy):
    """A PyDataset that draws nothing in a batch, so that its workers may be threads."""

    draws = False


def slices() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices((X, Y))


MAKERS = {
    "arrays": lambda: kc.ResumableDataset(X, Y, batch_size=3, shuffle=True),
    "arrays in order": lambda: kc.ResumableDataset(X, Y, batch_size=3),
    "pipeline": lambda: kc.ResumableDataset(slices().shuffle(10, seed=1).batch(3).prefetch(1)),
    "function": lambda: kc.ResumableDataset(lambda epoch: slices().shuffle(10, seed=epoch).batch(3)),
    "PyDataset": lambda: kc.ResumableDataset(Noisy(), shuffle=True),
    "PyDataset with threads": lambda: kc.ResumableDataset(Quiet(workers=2), shuffle=True),
    "PyDataset with processes": lambda: kc.ResumableDataset(Noisy(workers=2, use_multiprocessing=True)),
    "Grain": lambda: kc.ResumableDataset(
        grain.MapDataset.source(list(zip(X, Y, strict=True))).seed(3).shuffle().batch(3)
    ),
}


def batches(data: tf.data.Dataset) -> list[list[float]]:
    """The inputs of the batches of one epoch."""
    return [x.numpy().tolist() for x, *_ in data]


@pytest.mark.sample(4)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_another_process_resumes_any_epoch_at_any_batch(make) -> None:
    """The batches from there on are the batches of the first process."""
    first = make()
    states, epochs = [], []
    for _ in range(3):
        states.append(first.get_state())
        epochs.append(batches(first))

    for number, state in enumerate(states):
        for batch in (0, 1, BATCHES - 1):
            other = make()
            other.set_state(state, batch)
            rest = [batches(other) for _ in range(number, 3)]
            assert rest == [epochs[number][batch:], *epochs[number + 1 :]]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_epoch_has_each_sample_once(make) -> None:
    """Every kind of source gives each sample once in an epoch, in any order."""
    data = make()

    for _ in range(2):
        assert sorted(int(y) for _, batch in data for y in batch) == Y.tolist()


@pytest.mark.parametrize("name", ["arrays", "pipeline", "function", "PyDataset", "Grain"])
def test_each_epoch_has_another_order(name) -> None:
    """A shuffled source changes its order from epoch to epoch, as `fit(shuffle=True)` does."""
    data = MAKERS[name]()

    assert batches(data) != batches(data)


def test_the_order_is_a_function_of_the_seed() -> None:
    """Equal seeds give equal orders, and different seeds give different orders."""
    orders = [batches(kc.ResumableDataset(X, Y, batch_size=3, shuffle=True, seed=seed)) for seed in (1, 1, 2)]

    assert orders[0] == orders[1] != orders[2]


def test_a_resumable_dataset_is_an_ordinary_tf_data_dataset() -> None:
    """It has a length, and a model fits, evaluates and predicts with it without any callback."""
    x, y = np.random.rand(40, 4), np.random.rand(40, 1)
    data = kc.ResumableDataset(x, y, batch_size=16, shuffle=True)
    model = dense_model()

    history = model.fit(data, epochs=2, shuffle=False, verbose=0)

    assert isinstance(data, tf.data.Dataset)
    assert len(data) == 3
    assert len(history.history["loss"]) == 2
    assert np.isclose(model.evaluate(data, verbose=0), model.evaluate(x, y, verbose=0))
    assert model.predict(data, verbose=0).shape == (40, 1)


def test_samples_are_weighted_as_fit_weights_them() -> None:
    """The weights come from sample_weight, or from class_weight for numbers and for one-hot targets."""
    x, y = np.random.rand(20, 4).astype("float32"), np.arange(20) % 3
    weights = {0: 2.0, 1: 0.5}
    by_sample = np.array([weights.get(each, 1.0) for each in y], "float32")
    one_hot = np.eye(3, dtype="float32")[y]

    for data in (
        kc.ResumableDataset(x, y, by_sample, batch_size=20),
        kc.ResumableDataset(x, y, class_weight=weights, batch_size=20),
        kc.ResumableDataset(x, one_hot, class_weight=weights, batch_size=20),
        kc.ResumableDataset(x, y[:, None].astype("float32"), class_weight=weights, batch_size=20),
        kc.ResumableDataset(tf.data.Dataset.from_tensor_slices((x, y)).batch(20), class_weight=weights),
    ):
        ((_, _, found),) = data
        assert np.allclose(found, by_sample)


def test_structures_of_arrays_keep_their_form() -> None:
    """Dicts of inputs and lists of targets keep their structure, and floats get Keras's float type."""
    data = kc.ResumableDataset({"a": X.astype("float64"), "b": np.arange(20).reshape(10, 2)}, [Y, Y + 1], batch_size=4)

    x, (first, second) = next(iter(data))

    assert x["a"].dtype == "float32"
    assert x["b"].shape == (4, 2)
    assert (second - first).numpy().tolist() == [1, 1, 1, 1]


def test_an_unseeded_pipeline_is_refused_at_a_restart() -> None:
    """The error asks for seeds, and the training never resumes in another order."""
    first, second = (kc.ResumableDataset(tf.data.Dataset.range(999).shuffle(999).batch(99)) for _ in range(2))
    state = first.get_state()

    with pytest.raises(kc.MismatchError, match=r"its order differs between processes\. Give each shuffle\(\)"):
        second.set_state(state)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: kc.ResumableDataset(X + 1, Y, batch_size=3), "first batch"),
        (lambda: kc.ResumableDataset(X, Y, batch_size=4), "batches 3 here, 4 there"),
        (lambda: kc.ResumableDataset(X, Y, batch_size=3, seed=7), "Give the same seed, or none"),
        (lambda: kc.ResumableDataset(slices().batch(3)), "kind 'tf.data.Dataset' here, 'arrays' there"),
    ],
)
def test_other_data_is_refused_at_a_restart(other, message) -> None:
    """The error names the first property that differs."""
    state = kc.ResumableDataset(X, Y, batch_size=3, seed=3).get_state()

    with pytest.raises(kc.MismatchError, match=message):
        other().set_state(state)


def test_a_restart_takes_the_seed_that_the_first_process_drew() -> None:
    """A script that gives no seed resumes in the same order."""
    first, second = (kc.ResumableDataset(X, Y, batch_size=3, shuffle=True) for _ in range(2))

    second.set_state(first.get_state())

    assert batches(second) == batches(first)


@pytest.mark.parametrize("name", ["pipeline", "PyDataset"])
def test_a_source_that_cannot_rewind_refuses_an_earlier_epoch(name) -> None:
    """Pipelines and PyDatasets with epoch methods raise an error instead of another order."""
    data = MAKERS[name]()
    state = data.get_state()
    for _ in range(3):
        batches(data)

    with pytest.raises(ValueError, match="cannot rewind"):
        data.set_state(state)


@pytest.mark.parametrize("name", MAKERS)
def test_reading_data_leaves_the_global_generators_unchanged(name) -> None:
    """A PyDataset that draws from Python's and NumPy's generators does not move them."""
    data = MAKERS[name]()
    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), np.random.RandomState(1).rand()

    batches(data)

    assert (random.random(), np.random.rand()) == expected


def test_worker_threads_that_share_a_global_generator_are_refused() -> None:
    """The order of the threads, and so the batches, would differ each time."""
    with pytest.raises(ValueError, match="Its workers are threads"):
        kc.ResumableDataset(Noisy(workers=2))


def test_a_pydataset_whose_batches_differ_at_each_reading_is_refused() -> None:
    """A private generator of the dataset cannot be restored."""

    class Own(Quiet):
        def __getitem__(self, index):
            return np.random.default_rng().random((3, 1)), Y[:3]

    with pytest.raises(ValueError, match="differs each time that it is read"):
        kc.ResumableDataset(Own()).get_state()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X, "y": Y[:5]}, r"the same number of samples. Received: \[5, 10\]"),
        ({"x": X, "batch_size": 0}, "batch_size"),
        ({"x": X, "shuffle": "batch"}, "shuffle='batch'"),
        ({"x": X, "seed": -1}, "seed=-1"),
        ({"x": X[:0]}, "arrays of length 0"),
        ({"x": 3.0}, "samples along the first axis"),
        ({"x": (number for number in range(3))}, "expected arrays, a tf.data.Dataset, .* Received: <generator"),
        ({"x": slices().batch(3), "y": Y}, "y: for arrays only"),
        ({"x": slices().batch(3), "shuffle": True}, "shuffle: for arrays only"),
        ({"x": slices().filter(lambda *batch: True).batch(3)}, "is not known"),
        ({"x": slices().filter(lambda x, y: y > 3)}, "is not known"),
        ({"x": lambda epoch: 3}, "returns a tf.data.Dataset"),
        ({"x": kc.ResumableDataset(X)}, "Received: a ResumableDataset"),
        ({"x": X, "y": Y, "class_weight": {"a": 1.0}}, "numbers of classes"),
    ],
)
def test_wrong_arguments_of_a_resumable_dataset_are_refused(arguments, message) -> None:
    """The error tells the received argument, or how to mend it."""
    with pytest.raises((ValueError, TypeError), match=message):
        kc.ResumableDataset(**arguments)


def test_fit_is_refused_if_it_trains_on_other_data_than_the_callback_has(tmp_path) -> None:
    """Another number of batches is refused before the first batch, and other data with this number after it."""
    data = kc.ResumableDataset(np.zeros((5, 4)), np.zeros((5, 1)), batch_size=1)
    backup = kc.BackupAndRestore(tmp_path / "backup", data=data)

    with pytest.raises(ValueError, match=r"has 4 batches in an epoch; the ResumableDataset .* has 5"):
        fit(dense_model(), backup, batches=4)
    with pytest.raises(ValueError, match="does not train on the ResumableDataset"):
        fit(dense_model(), kc.BackupAndRestore(tmp_path / "other", data=data), batches=5)
