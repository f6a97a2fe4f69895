"""Saves inside real trainings: each checkpoint has the state of one step, while training continues."""

import functools
import pathlib
import threading

import keras
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.model.backends import backend
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.store import background

BATCHES = 24
ROWS = np.random.default_rng(0).integers(0, 500, (BATCHES * 8, 6))
Y = np.random.default_rng(1).random((BATCHES * 8, 1)).astype("float32")
OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.1),
    "SGD with momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "AdamW with averages": lambda: keras.optimizers.AdamW(0.1, use_ema=True, ema_overwrite_frequency=5),
    "Adam, accumulated": lambda: keras.optimizers.Adam(0.1, gradient_accumulation_steps=2),
    "Adam, scaled loss": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.1), dynamic_growth_steps=3
    ),
}
COMPILED = {
    "tensorflow": [{}, {"steps_per_execution": 4}, {"jit_compile": True}, {"run_eagerly": True}],
    "jax": [{}, {"steps_per_execution": 4}, {"run_eagerly": True}],
    "torch": [{}],
}[keras.backend.backend()]


def embedding_model(optimizer: keras.optimizers.Optimizer, dtype: str = "float32", **options) -> keras.Model:
    """A model with an embedding of which a batch changes few rows, normalization and dropout."""
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            keras.layers.Embedding(500, 8, dtype=dtype),
            keras.layers.Flatten(),
            keras.layers.Dense(16, dtype=dtype),
            keras.layers.BatchNormalization(dtype=dtype),
            keras.layers.Dropout(0.3, seed=1),
            keras.layers.Dense(1, dtype="float32"),
        ]
    )
    model.compile(optimizer, "mse", metrics=["mae"], **options)
    return model


class Copies(keras.callbacks.Callback):
    """Copies all values after each batch or each epoch. It follows the callback that saves the same values."""

    def __init__(self, *, epochs: bool = False) -> None:
        super().__init__()
        self.epochs = epochs
        self.taken: dict[int, dict[str, np.ndarray]] = {}
        self.begun = 0

    def on_epoch_begin(self, epoch, logs=None) -> None:
        self.begun = epoch

    def on_train_batch_end(self, batch, logs=None) -> None:
        if not self.epochs:
            self.copy(self.begun * BATCHES + batch + 1)

    def on_epoch_end(self, epoch, logs=None) -> None:
        if self.epochs:
            self.copy((epoch + 1) * BATCHES)

    def copy(self, step: int) -> None:
        self.taken[step] = values_of(self.model)


class Late(keras.callbacks.Callback):
    """Lets no save be written before the training has changed the values: it keeps the background thread busy."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def on_train_batch_begin(self, batch, logs=None) -> None:
        if batch % 4 == 2:
            self.gate.set()
            self.gate = threading.Event()
            background.Job(functools.partial(self.gate.wait, 20), ("gate", batch), 0)

    def on_train_end(self, logs=None) -> None:
        self.gate.set()


def values_of(model: keras.Model) -> dict[str, np.ndarray]:
    """Copies of the values of a model by name."""
    return {name: keras.ops.convert_to_numpy(each).copy() for name, each in ModelState(model).names().items()}


MOVING = {
    "model/embedding/embeddings",
    "model/dense/kernel",
    "model/batch_normalization/moving_mean",
    "model/seed_generator/seed_generator_state",
    "metrics/loss/total",
    "metrics/mean_absolute_error/count",
}
"""Variables of each kind. They change in each step, so a torn checkpoint would show."""


@pytest.mark.sample(4)
@pytest.mark.parametrize("options", COMPILED, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_has_all_values_of_one_step(tmp_path, optimizer, options) -> None:
    """Weights, slots, averages, seeds, counters and metrics are those of the step, while later steps change them."""
    dtype = "mixed_float16" if optimizer == "Adam, scaled loss" else "float32"
    model = embedding_model(OPTIMIZERS[optimizer](), dtype, **options)
    check_saves(model, tmp_path / "run", save_freq=options.get("steps_per_execution", 1))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX alone has a processor with pinned memory")
def test_a_checkpoint_from_an_accelerator_has_all_values_of_one_step(tmp_path, monkeypatch) -> None:
    """The values are on their way into pinned memory while the next step donates their memory.

    The processor takes the path of an accelerator here.
    """
    import jax

    monkeypatch.setattr(backend, "has_accelerator", lambda: True)
    transfers = []
    put = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda values, *places: transfers.append(places) or put(values, *places))

    check_saves(embedding_model(keras.optimizers.Adam(0.1)), tmp_path / "run")

    assert {place.memory_kind for places in transfers for each in places for place in each.values()} == {"pinned_host"}


def check_saves(model: keras.Model, path: pathlib.Path, save_freq: int = 1) -> None:
    """Saves within a fit while the training continues, and compares each checkpoint with copies of its step."""
    copies = Copies()
    checkpoint = kc.ModelCheckpoint(path, save_freq=save_freq, keep=None)

    model.fit(ROWS, Y, batch_size=8, epochs=2, verbose=0, callbacks=[Late(), checkpoint, copies])

    records = list(kc.CheckpointDirectory(path))
    first, moved = copies.taken[records[0].step], set()
    for record in records:
        values, copied = kc.load_variables(record), copies.taken[record.step]
        assert values.keys() == copied.keys()
        assert [name for name, value in values.items() if not np.array_equal(value, copied[name])] == []
        moved |= {name for name, value in values.items() if not np.array_equal(value, first[name])}
    assert moved >= MOVING
    assert any(name.endswith("/iteration") for name in moved)


def test_a_checkpoint_of_averaged_weights_has_no_value_of_the_weights_that_are_swapped_back(tmp_path) -> None:
    """Keras's SwapEMAWeights writes into the model before the save, after it, and around each validation."""
    model = embedding_model(keras.optimizers.Adam(0.1, use_ema=True))
    copies = Copies(epochs=True)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    checkpoint = kc.ModelCheckpoint(tmp_path / "run", keep=None)

    model.fit(
        ROWS,
        Y,
        batch_size=8,
        epochs=4,
        verbose=0,
        validation_data=(ROWS, Y),
        callbacks=[Late(), swap, checkpoint, copies],
    )

    records = list(kc.CheckpointDirectory(tmp_path / "run"))
    assert len(records) == 4
    for record in records:
        kc.restore(model, record)
        values, copied = values_of(model), copies.taken[record.step]
        assert all(np.array_equal(values[name], copied[name]) for name in copied if not name.startswith("metrics/"))
