"""Snapshots: the values of one moment, unaffected by later training."""

import concurrent.futures
import operator
import os
import threading
import weakref
from typing import NamedTuple

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_ckpt.formats import threads
from keras_ckpt.formats.arena import Arena
from keras_ckpt.formats.bundle_writer import Value
from keras_ckpt.model.backends.tensorflow import Reader, array_of
from keras_ckpt.model.keras_internals import value_of
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.model.snapshot import Snapshot, arena_of
from support.bundles import NUMBERS

BATCHES = 24
ROWS = np.random.default_rng(0).integers(0, 500, (BATCHES * 8, 6))
Y = np.random.default_rng(1).random((BATCHES * 8, 1)).astype("float32")
OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.1),
    "SGD": lambda: keras.optimizers.SGD(0.1),
    "SGD with momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "AdamW with averages": lambda: keras.optimizers.AdamW(0.1, use_ema=True),
    "Adam, accumulated": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2),
}


def embedding_model(optimizer: keras.optimizers.Optimizer, **options) -> keras.Model:
    """A model with an embedding of which a batch changes few rows, normalization and dropout."""
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(500, 8),
            keras.layers.Flatten(),
            keras.layers.Dense(16),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer, "mse", **options)
    return model


class Snapshots(keras.callbacks.Callback):
    """Takes a snapshot and copies of all values after each batch, and compares them steps later."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[dict[str, tf.Tensor], dict[str, bytes]]] = []
        self.compared = 0
        self.moved: set[str] = set()

    def on_train_begin(self, logs=None) -> None:
        self._state = ModelState(self.model)

    def on_train_batch_end(self, batch, logs=None) -> None:
        copies = {name: value_of(each).numpy().tobytes() for name, each in self._state.names().items()}
        self.taken.append((self._state.snapshot().values, copies))
        if len(self.taken) > 3:
            self.compare(*self.taken.pop(0))

    def on_train_end(self, logs=None) -> None:
        while self.taken:
            self.compare(*self.taken.pop(0))

    def compare(self, values: dict[str, tf.Tensor], copies: dict[str, bytes]) -> None:
        now = self._state.names()
        for name, copy in copies.items():
            held = values[f"{name}/.ATTRIBUTES/VARIABLE_VALUE"].numpy().tobytes()
            assert held == copy, name
            self.compared += 1
            if held != value_of(now[name]).numpy().tobytes():
                self.moved.add(name)


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    "options",
    [{}, {"steps_per_execution": 4}, {"jit_compile": True}, {"jit_compile": True, "steps_per_execution": 4}],
    ids=["as it is", "four batches an execution", "XLA", "XLA, four batches an execution"],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_later_steps_do_not_change_a_snapshot(optimizer, options) -> None:
    """Weights, slots, averages, seeds and metrics of a real training keep their values."""
    model = embedding_model(OPTIMIZERS[optimizer](), **options)
    snapshots = Snapshots()

    model.fit(ROWS, Y, batch_size=8, epochs=2, verbose=0, callbacks=[snapshots])

    assert snapshots.compared > 100
    # Each kind of variable changes meanwhile, so a torn snapshot would show.
    assert {
        "model/embedding/embeddings",
        "model/dense/kernel",
        "model/batch_normalization/moving_mean",
        "model/seed_generator/seed_generator_state",
        "optimizer/iteration",
        "metrics/loss/total",
    } <= snapshots.moved


def test_a_read_shares_the_memory_of_the_variables() -> None:
    """A read makes no copy."""
    variables = [tf.Variable(tf.ones(1000)) for _ in range(3)]

    reader = Reader(None, dict(zip("abc", variables, strict=True)))

    first, second = reader.read(), reader.read()

    for key in "abc":
        assert np.shares_memory(np.asarray(first[key]), np.asarray(second[key]))


def test_a_read_of_a_table_whose_rows_change_in_place_is_a_copy() -> None:
    """TensorFlow changes the rows of such a variable even if its value is held."""
    table = tf.Variable(tf.zeros((4, 2)))
    table.scatter_nd_update([[0]], [[1.0, 1.0]])
    before = Reader(None, {"table": table}).read()["table"]

    table.scatter_nd_update([[1]], [[2.0, 2.0]])

    assert before.numpy().tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]


@pytest.mark.parametrize("change", [True, False])
def test_several_threads_copy_the_values_of_the_variables(monkeypatch, change) -> None:
    """Values are large and small, and the previous copies are already written or not."""
    variables = {f"{number}": tf.Variable(tf.fill((1 + number % 2 * 600_000,), float(number))) for number in range(9)}
    monkeypatch.setattr(threads, "_THREADS", 3)
    threads.helpers.cache_clear()
    arena = Arena()
    Snapshot(Reader(None, variables), {}).move(arena)
    for variable in variables.values():
        variable.assign_add(tf.ones_like(variable))

    taken = Snapshot(Reader(None, variables), {"text": "as it is"})
    taken.detach(arena, change)
    copies = taken.move(arena)

    assert copies.keys() == {*(key.encode() for key in variables), b"text"}
    for key, variable in variables.items():
        assert copies[key.encode()].data.tobytes() == variable.numpy().tobytes()


class TestDetached:
    """A detached snapshot holds no memory of a variable, which XLA would have to copy."""

    VARIABLES = ("large", "small", "another small", "largest")

    def test_a_detached_snapshot_has_the_values_of_its_moment(self) -> None:
        arena, variables = Arena(), self.variables()
        taken = Snapshot(Reader(None, variables), {"other": np.ones(2, np.float32)})
        before = {key: variable.numpy().tobytes() for key, variable in variables.items()}

        taken.detach(arena, change=True)
        for variable in variables.values():
            variable.assign_add(tf.ones_like(variable))

        copies = taken.move(arena)
        assert {key: copies[key.encode()].data.tobytes() for key in variables} == before
        assert copies[b"other"].data.tobytes() == np.ones(2, np.float32).tobytes()

    def test_a_detached_snapshot_holds_no_memory_of_variables(self) -> None:
        variables = self.variables()
        taken = Snapshot(Reader(None, variables), {})

        taken.detach(Arena(), change=True)

        assert not taken.values
        for variable in variables.values():
            place = address(variable)
            variable.assign_add(tf.ones_like(variable))
            assert address(variable) == place  # it was changed in place

    def test_a_detached_snapshot_is_in_the_order_of_the_variables(self) -> None:
        """The arena has the same order, so the values are written in long runs."""
        arena, variables = Arena(), self.variables()
        taken = Snapshot(Reader(None, variables), {})

        taken.detach(arena, change=True)

        assert [*taken.move(arena)] == [key.encode() for key in variables]

    def test_a_detached_snapshot_does_not_change_an_earlier_unwritten_snapshot(self) -> None:
        """Two callbacks save the same step, and one of them saves the next step."""
        arena, variables = Arena(), self.variables()
        taken = []
        for _ in range(3):
            taken.append(
                (Snapshot(Reader(None, variables), {}), [each.numpy().tobytes() for each in variables.values()])
            )
            taken[-1][0].detach(arena, change=len(taken) == 1)
            if len(taken) == 2:
                for variable in variables.values():
                    variable.assign_add(tf.ones_like(variable))

        for each, values in taken:
            assert [copy.data.tobytes() for copy in each.move(arena).values()] == values
            assert len(arena.spare) == 1  # one buffer is kept for the next snapshot, not one for each

    @pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
    def test_a_detached_snapshot_keeps_small_values_of_every_dtype(self, dtype) -> None:
        between = tf.int8 if dtype.name.endswith("int4") else tf.float32
        tensors = {
            key: tf.cast(tf.cast(value, between), dtype) for key, value in {"x": [[0, 1]], "": 1, "no": [[]]}.items()
        }
        variables = {key: tf.Variable(value) for key, value in tensors.items()}
        arena, taken = Arena(), Snapshot(Reader(None, variables), {})

        taken.detach(arena, change=True)

        copies = taken.move(arena)
        for key, tensor in tensors.items():
            copy = copies[key.encode()]
            assert (copy.dtype, copy.shape) == (dtype.as_datatype_enum, tuple(tensor.shape))
            assert copy.data.tobytes() == array_of(tensor).tobytes()

    def variables(self) -> dict[str, tf.Variable]:
        sizes = zip(self.VARIABLES, (1 << 17, 10, 1 << 10, 1 << 19), strict=True)
        return {key: tf.Variable(tf.range(float(size))) for key, size in sizes}


def address(variable: tf.Variable) -> int:
    return np.asarray(variable.read_value()).__array_interface__["data"][0]


class TestSeveralThreads:
    """Threads copy large values together, one checks the model during a read, and all stay for the next save."""

    @pytest.fixture(autouse=True)
    def two_threads(self, monkeypatch) -> None:
        """Replaces the threads of earlier tests."""
        monkeypatch.setattr(threads, "_THREADS", 2)
        threads.helpers.cache_clear()

    def test_an_error_of_another_thread_is_raised(self, monkeypatch) -> None:
        """Otherwise a value that was not copied would be written with its old bytes."""
        failed = threading.Event()

        def take(arena: Arena, key: bytes, value: Value, change: bool) -> Value:
            if threading.current_thread() is threading.main_thread():
                assert failed.wait(20)
                return value
            failed.set()
            raise MemoryError

        monkeypatch.setattr(Arena, "take", take)

        with pytest.raises(MemoryError):
            self.large().move(Arena())

    def test_a_copy_does_not_wait_for_busy_threads(self) -> None:
        """Training may detach a snapshot while the previous snapshot is copied."""
        freed = threading.Event()
        busy = threads.helpers().submit(freed.wait, 20)

        copies = self.large().move(Arena())
        waited = busy.done()
        freed.set()

        assert not waited
        assert all(value.data.any() for value in copies.values())

    def test_the_check_of_a_model_does_not_wait_for_busy_threads(self) -> None:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        state = ModelState(model)
        state.snapshot()
        model.compile("adam")
        model.optimizer.build(model.trainable_variables)
        freed = threading.Event()
        busy = threads.helpers().submit(freed.wait, 20)

        keys = state.snapshot().values.keys()
        waited = busy.done()
        freed.set()

        assert not waited
        assert "optimizer/dense/kernel/momentum/.ATTRIBUTES/VARIABLE_VALUE" in keys

    def test_a_forked_child_has_its_own_threads(self) -> None:
        self.large().move(Arena())
        taken = self.large()

        child = os.fork()
        if not child:  # pragma: no cover - another process
            try:
                whole = (value.data.all() for value in taken.move(Arena()).values())
                done, _ = concurrent.futures.wait([threads.helpers().submit(all, whole)], 10)
                os._exit(5 if done and done.pop().result() else 1)
            finally:
                os._exit(2)  # after an error the child must not run the other tests

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5

    def large(self) -> Snapshot:
        return Snapshot(Reader(None, {key: tf.Variable(tf.fill(1 << 20, np.uint8(1))) for key in "ab"}), {})


def test_a_read_of_a_variable_of_a_strategy_has_one_copy() -> None:
    """Each device has a copy of the variable."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        mirrored = tf.Variable([1.0, 2.0])
    plain = tf.Variable([3.0])

    values = Reader(None, {"mirrored": mirrored, "plain": plain}).read()

    assert {key: value.numpy().tolist() for key, value in values.items()} == {"mirrored": [1, 2], "plain": [3]}


class Late(keras.Model):
    """Makes variables and optimizers after its first step."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(1)
        self.second = keras.optimizers.Adam()
        self.another = None

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)


def test_the_next_snapshot_has_variables_that_a_model_got_later() -> None:
    """These are slots, metrics, and variables in new attributes. Keras itself refuses new layers so late."""
    model = Late()
    model.compile("adam", "mse", metrics=["mae"])
    model.build((None, 2))
    state = ModelState(model)
    seen = [state.snapshot().values.keys()]

    def new() -> set[str]:
        seen.append(state.snapshot().values.keys())
        names = seen[-1] - seen[-2]
        assert {name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE") for name in seen[-1]} >= state.names().keys()
        return {name.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE") for name in names}

    assert not new()
    model.fit(np.zeros((4, 2)), np.zeros((4, 1)), verbose=0)
    assert "optimizer/dense/kernel/momentum" in new()
    model.second.build(model.trainable_variables)
    assert "optimizer/second/dense/kernel/momentum" in new()
    model.another = tf.Variable(1.0)
    assert new() == {"model/another"}
    assert not new()


class Holds(tf.Module):
    """A module as in Sonnet or in TensorFlow itself."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.inner = tf.Module()
        self.inner.number = tf.Variable(number)
        self.inner.generator = tf.random.Generator.from_seed(int(number))


@pytest.mark.parametrize(
    "where",
    [
        "holds",
        "holds.inner",
        "holds.inner.number",
        "holds.inner.generator",
        "generator",
        "of_tensorflow.number",
        "of_tensorflow.optimizer",
        "of_two.second.number",
    ],
)
def test_the_next_snapshot_reads_an_object_that_replaced_another(where) -> None:
    """This holds outside of Keras layers too. Otherwise every save would silently have the old object."""

    def holder(number: int) -> keras.Model:
        model = Late()
        model.build((None, 2))
        model.holds, model.generator = Holds(number), tf.random.Generator.from_seed(number)
        model.of_tensorflow = tf.train.Checkpoint(
            number=tf.Variable(number), optimizer=keras.optimizers.SGD(float(number))
        )
        model.of_two = Two(tf.Module(), Holds(number).inner)
        return model

    model, other = holder(1), holder(2)
    state = ModelState(model)
    state.snapshot()
    place, _, name = where.rpartition(".")
    owner, new = (operator.attrgetter(place)(each) if place else each for each in (model, other))

    setattr(owner, name, getattr(new, name))

    variables = ModelState(model).snapshot().values
    now = state.snapshot().values
    assert {key: each.numpy().tolist() for key, each in now.items()} == {
        key: each.numpy().tolist() for key, each in variables.items()
    }


class Two(NamedTuple):
    """A named tuple."""

    first: tf.Module
    second: tf.Module


def test_the_next_snapshot_reads_a_variable_whose_tf_variable_was_replaced() -> None:
    """Keras may make it again. Otherwise every save would silently have the old value."""
    model = Late()
    model.build((None, 2))
    state = ModelState(model)
    state.snapshot()

    model.dense.kernel._value = tf.Variable([[1.0], [2.0]])

    assert state.snapshot().values["model/dense/kernel/.ATTRIBUTES/VARIABLE_VALUE"].numpy().tolist() == [[1], [2]]


def test_all_that_save_a_model_share_one_arena_which_ends_with_the_last_of_them() -> None:
    """An arena has the size of its model, so it must not stay when no callback needs it."""
    model, other = keras.Sequential(), keras.Sequential()
    arena = arena_of(model)
    assert arena_of(model) is arena
    assert arena_of(other) is not arena
    lives = weakref.ref(arena)

    del arena

    assert lives() is None
    assert isinstance(arena_of(model), Arena)
