"""`ResumableDataset`: each epoch has its order, and resumes at any batch, in another process too."""

import random

import grain
import keras
import numpy as np
import pytest

import keras_ckpt as kc
from support.models import dense_model, fit

try:
    import tensorflow as tf
except ModuleNotFoundError:
    tf = None
try:
    import torch
    from torch.utils.data import DataLoader, Dataset, IterableDataset
except ModuleNotFoundError:
    torch, Dataset = None, object

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


class Samples(Dataset):
    """A map-style dataset of PyTorch that draws from all global generators."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index):
        noise = random.randrange(5) + np.random.randint(5) + int(torch.randint(5, ()))
        return X[index] + 100 * noise, Y[index]


class Epoch:
    """The batches of one epoch, as an iterable with a length."""

    def __init__(self, number: int) -> None:
        self.order = np.random.default_rng(number).permutation(len(X))

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self):
        for begin in range(0, len(X), 3):
            rows = self.order[begin : begin + 3]
            yield X[rows] + 100 * np.random.randint(5), Y[rows]


def slices():
    return tf.data.Dataset.from_tensor_slices((X, Y))


def loader(**options):
    options = {"batch_size": 3, "shuffle": True, **options}
    return DataLoader(Samples(), **options)


MAKERS = {
    "arrays": lambda: kc.ResumableDataset(X, Y, batch_size=3, shuffle=True),
    "arrays in order": lambda: kc.ResumableDataset(X, Y, batch_size=3),
    "PyDataset": lambda: kc.ResumableDataset(Noisy(), shuffle=True),
    "PyDataset with threads": lambda: kc.ResumableDataset(Quiet(workers=2), shuffle=True),
    "Grain": lambda: kc.ResumableDataset(
        grain.MapDataset.source(list(zip(X, Y, strict=True))).seed(3).shuffle().batch(3)
    ),
    "function": lambda: kc.ResumableDataset(Epoch),
}
if tf:
    MAKERS |= {
        "pipeline": lambda: kc.ResumableDataset(slices().shuffle(10, seed=1).batch(3).prefetch(1)),
        "function of pipelines": lambda: kc.ResumableDataset(lambda epoch: slices().shuffle(10, seed=epoch).batch(3)),
    }
if torch:
    MAKERS |= {
        "DataLoader": lambda: kc.ResumableDataset(loader()),
        "DataLoader with workers": lambda: kc.ResumableDataset(loader(num_workers=2)),
        "DataLoader with persistent workers": lambda: kc.ResumableDataset(
            loader(num_workers=2, persistent_workers=True, generator=torch.Generator())
        ),
        "function of DataLoaders": lambda: kc.ResumableDataset(lambda epoch: loader()),
    }
if keras.backend.backend() != "jax":  # its threads are no friends of a fork
    MAKERS["PyDataset with processes"] = lambda: kc.ResumableDataset(Noisy(workers=2, use_multiprocessing=True))


def batches(data: kc.ResumableDataset) -> list[list[float]]:
    """The inputs of the batches of one epoch."""
    return [np.asarray(x).tolist() for x, *_ in data]


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


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "arrays in order"])
def test_each_epoch_has_another_order(name) -> None:
    """A shuffled source changes its order from epoch to epoch, as `fit(shuffle=True)` does."""
    data = MAKERS[name]()

    assert batches(data) != batches(data)


def test_the_order_is_a_function_of_the_seed() -> None:
    """Equal seeds give equal orders, and different seeds give different orders."""
    orders = [batches(kc.ResumableDataset(X, Y, batch_size=3, shuffle=True, seed=seed)) for seed in (1, 1, 2)]

    assert orders[0] == orders[1] != orders[2]


def test_a_model_fits_evaluates_and_predicts_without_any_callback() -> None:
    """The dataset has a length, and `fit` needs no `shuffle=False` beside it."""
    x, y = np.random.rand(40, 4), np.random.rand(40, 1)
    data = kc.ResumableDataset(x, y, batch_size=16, shuffle=True)
    model = dense_model()

    history = model.fit(data, validation_data=data, epochs=2, verbose=0)

    assert len(data) == data.num_batches == 3
    assert data.partial_batch_size == 8
    assert len(history.history["val_loss"]) == 2
    assert np.isclose(model.evaluate(data, verbose=0), model.evaluate(x, y, verbose=0))
    assert model.predict(data, verbose=0).shape == (40, 1)


@pytest.mark.parametrize("name", MAKERS)
def test_fit_begins_one_epoch_of_the_data_for_each_of_its_own(name) -> None:
    """A batch that Keras reads to build the model, and iterators that it drops, begin no epoch."""
    data = MAKERS[name]()
    first = data.passes
    model = keras.Sequential([keras.layers.Reshape((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"], run_eagerly=True)

    model.fit(data, epochs=2, verbose=0)

    assert data.passes == first + 2


def test_the_order_of_shuffled_arrays_is_the_same_on_every_backend() -> None:
    """A run that continues on another backend reads the rest of its epoch."""
    data = kc.ResumableDataset(X, Y, batch_size=5, shuffle=True, seed=1)

    assert [batches(data), batches(data)] == [
        [[3.0, 5.0, 2.0, 9.0, 7.0], [0.0, 8.0, 6.0, 1.0, 4.0]],
        [[0.0, 6.0, 5.0, 3.0, 4.0], [9.0, 7.0, 8.0, 2.0, 1.0]],
    ]


@pytest.mark.parametrize("step", ["map", "prefetch", "batch", "take"])
def test_a_step_of_tf_data_after_a_resumable_dataset_is_an_error(step) -> None:
    """The error says where the step belongs."""
    data = MAKERS["arrays"]()

    with pytest.raises(AttributeError, match=rf"has no '{step}'\. .* Give the steps to the pipeline inside it"):
        getattr(data, step)


@pytest.mark.parametrize("name", ["y", "sample_weight", "class_weight"])
def test_an_argument_of_fit_that_keras_would_ignore_is_refused(name) -> None:
    """Keras passes over it beside data of another package."""
    data = kc.ResumableDataset(np.zeros((5, 4)), np.zeros((5, 1)))
    given = {"y": Y, "sample_weight": Y, "class_weight": {0: 2.0}}[name]

    with pytest.raises(ValueError, match=rf"fit\(\) ignores {name} beside a ResumableDataset"):
        dense_model().fit(data, **{name: given}, verbose=0)


def test_validation_data_may_be_resumable_beside_arrays() -> None:
    """The targets of `fit` belong to its arrays."""
    data = kc.ResumableDataset(np.zeros((5, 4)), np.zeros((5, 1)))

    assert "val_loss" in fit(dense_model(), validation_data=data).history


def test_samples_are_weighted_as_fit_weights_them() -> None:
    """The weights come from sample_weight, or from class_weight for numbers and for one-hot targets."""
    x, y = np.random.rand(20, 4).astype("float32"), np.arange(20) % 3
    weights = {0: 2.0, 1: 0.5}
    by_sample = np.array([weights.get(each, 1.0) for each in y], "float32")
    one_hot = np.eye(3, dtype="float32")[y]
    pipelines = [tf.data.Dataset.from_tensor_slices((x, y))] if tf else []

    for data in (
        *(kc.ResumableDataset(each.batch(20), class_weight=weights) for each in pipelines),
        kc.ResumableDataset(x, y, by_sample, batch_size=20),
        kc.ResumableDataset(x, y, class_weight=weights, batch_size=20),
        kc.ResumableDataset(x, one_hot, class_weight=weights, batch_size=20),
        kc.ResumableDataset(x, y[:, None].astype("float32"), class_weight=weights, batch_size=20),
        kc.ResumableDataset(lambda number: [(x, y)], class_weight=weights),
    ):
        ((_, _, found),) = data
        assert np.allclose(found, by_sample)


def test_structures_of_arrays_keep_their_form() -> None:
    """Dicts of inputs and lists of targets keep their structure, and floats get Keras's float type."""
    data = kc.ResumableDataset({"a": X.astype("float64"), "b": np.arange(20).reshape(10, 2)}, [Y, Y + 1], batch_size=4)

    x, (first, second) = next(iter(data))

    assert keras.backend.standardize_dtype(x["a"].dtype) == "float32"
    assert tuple(x["b"].shape) == (4, 2)
    assert np.asarray(second - first).tolist() == [1, 1, 1, 1]


@pytest.mark.skipif(tf is None, reason="a pipeline of TensorFlow")
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
        (lambda: kc.ResumableDataset(Quiet()), "kind 'PyDataset' here, 'arrays' there"),
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


@pytest.mark.parametrize("name", ["pipeline", "PyDataset"] if tf else ["PyDataset"])
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


WRONG = [
    ({"x": X, "y": Y[:5]}, r"the same number of samples. Received: \[5, 10\]"),
    ({"x": X, "batch_size": 0}, "batch_size"),
    ({"x": X, "shuffle": "batch"}, "shuffle='batch'"),
    ({"x": X, "seed": -1}, "seed=-1"),
    ({"x": X[:0]}, "arrays of length 0"),
    ({"x": 3.0}, "samples along the first axis"),
    ({"x": [object()]}, "expected arrays, .* Received: <object"),
    ({"x": (number for number in range(3))}, "expected arrays, a tf.data.Dataset, .* Received: <generator"),
    ({"x": lambda epoch: 3}, "returns a tf.data.Dataset"),
    ({"x": lambda epoch: (X, Y)}, "or another iterable of batches. It returned"),
    ({"x": lambda epoch: iter([X])}, r"which has no len\(\)"),
    ({"x": Epoch, "y": Y}, "y: for arrays only"),
    ({"x": Epoch, "shuffle": True}, "shuffle: for arrays only"),
    ({"x": kc.ResumableDataset(X)}, "Received: a ResumableDataset"),
    ({"x": X, "y": Y, "class_weight": {"a": 1.0}}, "numbers of classes"),
    ({"x": X, "y": {"a": Y}, "class_weight": {0: 1.0}}, "where y is one array of classes"),
]
if tf:
    WRONG += [
        ({"x": slices().batch(3), "y": Y}, "y: for arrays only"),
        ({"x": slices().batch(3), "shuffle": True}, "shuffle: for arrays only"),
        ({"x": slices().filter(lambda *batch: True).batch(3)}, "is not known"),
        ({"x": slices().filter(lambda x, y: y > 3)}, "is not known"),
    ]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_of_a_resumable_dataset_are_refused(arguments, message) -> None:
    """The error tells the received argument, or how to mend it."""
    with pytest.raises((ValueError, TypeError), match=message):
        kc.ResumableDataset(**arguments)


def test_a_later_epoch_of_another_length_is_refused() -> None:
    """A restart could not tell where the epochs begin."""
    data = kc.ResumableDataset(lambda epoch: [(X, Y)] * (epoch + 1))

    batches(data)

    with pytest.raises(Exception, match=r"Each epoch expected 1 batches, .* Received: 2 in epoch 1"):
        batches(data)


def test_fit_is_refused_if_it_trains_on_other_data_than_the_callback_has(tmp_path) -> None:
    """The error comes before the first batch, also where the other data has as many batches."""
    data = kc.ResumableDataset(np.zeros((5, 4)), np.zeros((5, 1)), batch_size=1)

    other = kc.ResumableDataset(np.zeros((5, 4)), np.zeros((5, 1)), batch_size=1)
    for number, given in enumerate(
        ({"x": X[:5, None].repeat(4, axis=1), "y": X[:5, None], "batch_size": 1}, {"x": other})
    ):
        backup = kc.BackupAndRestore(tmp_path / str(number), data=data)
        with pytest.raises(ValueError, match="does not train on the ResumableDataset"):
            dense_model().fit(**given, callbacks=[backup], verbose=0)


if torch:

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    class Own:
        """A sampler of batches that draws from NumPy's generator, and is told of the epoch."""

        epoch = None

        def __len__(self) -> int:
            return 2

        def __iter__(self):
            rows = np.random.permutation(len(X))
            yield from (rows[:5].tolist(), rows[5:].tolist())

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch


@pytest.mark.skipif(torch is None, reason="a DataLoader of PyTorch")
class TestDataLoader:
    """A `DataLoader` on each backend, where PyTorch is installed."""

    def test_batches_do_not_depend_on_the_number_of_workers(self) -> None:
        """Random augmentation in a worker is a function of the seed, the epoch and the batch."""
        alone, shared = (kc.ResumableDataset(loader(num_workers=number), seed=1) for number in (0, 2))

        assert [batches(alone), batches(alone)] == [batches(shared), batches(shared)]

    def test_the_seed_of_a_generator_determines_the_order(self) -> None:
        """As in PyTorch, a seeded generator makes a script repeatable."""
        one, same, other = (
            kc.ResumableDataset(loader(generator=torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
        )

        assert batches(one) == batches(same) != batches(other)

    def test_reading_does_not_move_the_generator_of_pytorch(self) -> None:
        torch.manual_seed(1)
        expected = torch.rand(1, generator=torch.Generator().manual_seed(1))

        batches(kc.ResumableDataset(loader(num_workers=2)))

        assert torch.rand(1) == expected

    def test_a_sampler_is_told_of_the_epoch(self) -> None:
        """As `DistributedSampler` demands. Its draws are a function of the seed and the epoch."""
        sampler = Own()
        data, again = (
            kc.ResumableDataset(DataLoader(Samples(), batch_sampler=each), seed=1) for each in (sampler, Own())
        )

        first = [batches(data), batches(data)]

        assert sampler.epoch == 1
        assert first[0] != first[1]
        assert first == [batches(again), batches(again)]

    def test_the_parts_of_a_distributed_sampler_make_the_whole(self) -> None:
        """Each process has its part of each epoch."""
        sampler = torch.utils.data.distributed.DistributedSampler
        parts = [
            kc.ResumableDataset(DataLoader(Samples(), batch_size=1, sampler=sampler(Samples(), 2, rank)))
            for rank in range(2)
        ]

        seen = [int(y) for part in parts for _, y in part]

        assert sorted(seen) == Y.tolist()

    def test_a_collate_function_makes_the_batch(self) -> None:
        """Lists of tensors become tuples."""
        data = kc.ResumableDataset(
            loader(collate_fn=lambda samples: [np.stack([x for x, _ in samples])[:, None], torch.zeros(len(samples))])
        )

        x, y = next(iter(data))

        assert tuple(x.shape) == (3, 1)
        assert tuple(y.shape) == (3,)

    def test_a_dataset_may_give_whole_batches(self) -> None:
        """`batch_size=None` turns the collation off."""
        data = kc.ResumableDataset(DataLoader(Samples(), batch_size=None))

        assert len(data) == len(X)
        assert [int(y) for _, y in data] == Y.tolist()

    def test_an_iterable_dataset_is_refused(self) -> None:
        """The error names the way out."""
        with pytest.raises(TypeError, match=r"a DataLoader of an IterableDataset.* a function that takes"):
            kc.ResumableDataset(DataLoader(Stream()))

    def test_a_sampler_without_a_length_is_refused(self) -> None:
        with pytest.raises(ValueError, match="whose sampler has no len"):
            kc.ResumableDataset(DataLoader(Samples(), sampler=iter([1, 2])))

    @pytest.mark.parametrize("argument", [{"y": Y}, {"batch_size": 3}, {"shuffle": True}])
    def test_arguments_for_arrays_are_refused(self, argument) -> None:
        """The loader has its own."""
        with pytest.raises(ValueError, match="for arrays only"):
            kc.ResumableDataset(loader(), **argument)
