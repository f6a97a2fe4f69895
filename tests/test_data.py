"""`ResumableDataset`: each pass has its order, and can be entered anywhere, in another process too."""

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
    """Draws from the global generators, and shuffles itself at the ends of epochs."""

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
    """Draws nothing, so that its workers may be threads."""

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
    """A pass."""
    return [x.numpy().tolist() for x, *_ in data]


@pytest.mark.sample(4)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_another_process_enters_any_pass_at_any_batch(make) -> None:
    """From there on it has the batches that the first has."""
    first = make()
    states, passes = [], []
    for _ in range(3):
        states.append(first.get_state())
        passes.append(batches(first))

    for number, state in enumerate(states):
        for batch in (0, 1, BATCHES - 1):
            other = make()
            other.set_state(state, batch)
            rest = [batches(other) for _ in range(number, 3)]
            assert rest == [passes[number][batch:], *passes[number + 1 :]]


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_pass_has_each_sample_once(make) -> None:
    """Whatever its order."""
    data = make()

    for _ in range(2):
        assert sorted(int(y) for _, batch in data for y in batch) == Y.tolist()


@pytest.mark.parametrize("name", ["arrays", "pipeline", "function", "PyDataset", "Grain"])
def test_each_pass_has_an_order_of_its_own(name) -> None:
    """As with fit's shuffle=True."""
    data = MAKERS[name]()

    assert batches(data) != batches(data)


def test_the_order_is_a_function_of_the_seed() -> None:
    """The same for the same, another for another."""
    orders = [batches(kc.ResumableDataset(X, Y, batch_size=3, shuffle=True, seed=seed)) for seed in (1, 1, 2)]

    assert orders[0] == orders[1] != orders[2]


def test_it_is_an_ordinary_data_set() -> None:
    """Of tensorflow, with a length; it fits, evaluates and predicts without any callback."""
    x, y = np.random.rand(40, 4), np.random.rand(40, 1)
    data = kc.ResumableDataset(x, y, batch_size=16, shuffle=True)
    model = dense_model()

    history = model.fit(data, epochs=2, shuffle=False, verbose=0)

    assert isinstance(data, tf.data.Dataset)
    assert len(data) == 3
    assert len(history.history["loss"]) == 2
    assert np.isclose(model.evaluate(data, verbose=0), model.evaluate(x, y, verbose=0))
    assert model.predict(data, verbose=0).shape == (40, 1)


def test_samples_are_weighed_as_fit_weighs_them() -> None:
    """By sample_weight, and by class_weight for numbers and for one-hot targets."""
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
        ((_, _, weighed),) = data
        assert np.allclose(weighed, by_sample)


def test_structures_of_arrays_keep_their_form() -> None:
    """A dict of inputs, several targets; floats become Keras's."""
    data = kc.ResumableDataset({"a": X.astype("float64"), "b": np.arange(20).reshape(10, 2)}, [Y, Y + 1], batch_size=4)

    x, (first, second) = next(iter(data))

    assert x["a"].dtype == "float32"
    assert x["b"].shape == (4, 2)
    assert (second - first).numpy().tolist() == [1, 1, 1, 1]


def test_an_unseeded_pipeline_is_named() -> None:
    """It is never gone on with in another order."""
    first, second = (kc.ResumableDataset(tf.data.Dataset.range(999).shuffle(999).batch(99)) for _ in range(2))
    state = first.get_state()

    with pytest.raises(kc.MismatchError, match=r"do not come in the same order each time: give each shuffle\(\)"):
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
def test_other_data_are_refused(other, message) -> None:
    """With what differs."""
    state = kc.ResumableDataset(X, Y, batch_size=3, seed=3).get_state()

    with pytest.raises(kc.MismatchError, match=message):
        other().set_state(state)


def test_a_seed_that_was_drawn_is_taken_over() -> None:
    """So that a script needs none."""
    first, second = (kc.ResumableDataset(X, Y, batch_size=3, shuffle=True) for _ in range(2))

    second.set_state(first.get_state())

    assert batches(second) == batches(first)


@pytest.mark.parametrize("name", ["pipeline", "PyDataset"])
def test_what_moves_on_by_itself_cannot_go_back(name) -> None:
    """It is an error instead of another order."""
    data = MAKERS[name]()
    state = data.get_state()
    for _ in range(3):
        batches(data)

    with pytest.raises(ValueError, match="cannot go back"):
        data.set_state(state)


@pytest.mark.parametrize("name", MAKERS)
def test_the_global_generators_are_left_as_they_are(name) -> None:
    """What a PyDataset draws from them is drawn from copies."""
    data = MAKERS[name]()
    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), np.random.RandomState(1).rand()

    batches(data)

    assert (random.random(), np.random.rand()) == expected


def test_threads_that_share_a_generator_are_refused() -> None:
    """Their order, and so the batches, would be another each time."""
    with pytest.raises(ValueError, match="its workers are threads"):
        kc.ResumableDataset(Noisy(workers=2))


def test_a_batch_that_is_never_the_same_is_refused() -> None:
    """A generator of the dataset's own cannot be put back."""

    class Own(Quiet):
        def __getitem__(self, index):
            return np.random.default_rng().random((3, 1)), Y[:3]

    with pytest.raises(ValueError, match="another each time that it is read"):
        kc.ResumableDataset(Own()).get_state()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X, "y": Y[:5]}, r"one number of samples. Received: \[5, 10\]"),
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
def test_wrong_arguments_are_refused(arguments, message) -> None:
    """With what was received, and how to mend it."""
    with pytest.raises((ValueError, TypeError), match=message):
        kc.ResumableDataset(**arguments)


def test_fit_on_other_data_than_the_callback_has_is_refused(tmp_path) -> None:
    """Before the first batch by the number of batches, else after it."""
    data = kc.ResumableDataset(np.zeros((5, 4)), np.zeros((5, 1)), batch_size=1)
    backup = kc.BackupAndRestore(tmp_path / "backup", data=data)

    with pytest.raises(ValueError, match=r"has 4 batches an epoch; the ResumableDataset .* has 5"):
        fit(dense_model(), backup, batches=4)
    with pytest.raises(ValueError, match="does not train on the ResumableDataset"):
        fit(dense_model(), kc.BackupAndRestore(tmp_path / "other", data=data), batches=5)
