"""A script that trains on real data with a backup, of which each process that runs it is another."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pathlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np

Tell = Callable[[str, int], object]
EPOCHS = 3
BATCHES = 20
BATCH_SIZE = 32
BACKEND = os.environ.get("KERAS_BACKEND", "tensorflow")


def prepare() -> None:
    """Loads what takes long, and begins nothing that a fork would not survive."""
    import keras
    import sklearn.datasets

    import keras_ckpt as kc

    _ = keras, sklearn.datasets, kc.BackupAndRestore, kc.ModelCheckpoint, kc.ResumableDataset


def digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16).astype("float32"), y.astype("int32")


def training_part() -> tuple[np.ndarray, np.ndarray]:
    """Twenty batches, the last of which is not full."""
    x, y = digits()
    size = BATCHES * BATCH_SIZE - 5
    return x[:size], y[:size]


def validation_part() -> tuple[np.ndarray, np.ndarray]:
    x, y = digits()
    return x[-300:], y[-300:]


class Row:
    """A way to train. What is different from row to row is overridden."""

    backends = "tensorflow", "jax", "torch"
    save_freq: Any = 3
    validates = True
    executions = EPOCHS * BATCHES

    def data(self) -> Any:
        import keras_ckpt as kc

        return kc.ResumableDataset(*training_part(), batch_size=BATCH_SIZE, shuffle=True)

    def optimizer(self) -> Any:
        import keras

        return keras.optimizers.AdamW(0.01, use_ema=True, ema_momentum=0.9)

    def compile_options(self) -> dict[str, Any]:
        return {}

    def model(self) -> Any:
        import keras

        model = keras.Sequential(
            [
                keras.Input((64,)),
                keras.layers.Dense(16),
                keras.layers.BatchNormalization(),
                keras.layers.Activation("relu"),
                keras.layers.Dropout(0.3),
                keras.layers.GaussianNoise(0.1),
                keras.layers.Dense(10),
            ]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(self.optimizer(), loss, metrics=["accuracy"], **self.compile_options())
        return model

    def callbacks(self, path: pathlib.Path) -> list[Any]:
        import keras

        return [
            keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=0, min_delta=0.4),
            keras.callbacks.EarlyStopping(monitor="val_accuracy", patience=5, restore_best_weights=True),
        ]


class Arrays(Row):
    """Dropout, noise, batch normalization, AdamW with averages, ReduceLROnPlateau, EarlyStopping."""


class ArraysSavedAtEveryBatch(Row):
    """The same, and a backup after each batch."""

    save_freq = 1


class Pipeline(Row):
    """A tf.data pipeline, a schedule of the learning rate, and swapped averages."""

    backends = ("tensorflow",)

    def data(self) -> Any:
        import tensorflow as tf

        import keras_ckpt as kc

        dataset = tf.data.Dataset.from_tensor_slices(training_part())
        dataset = dataset.shuffle(500, seed=7).map(lambda x, y: (x * 2 - 1, y), num_parallel_calls=2)
        return kc.ResumableDataset(dataset.batch(BATCH_SIZE).prefetch(2))

    def callbacks(self, path: pathlib.Path) -> list[Any]:
        import keras

        schedule = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.7)
        return [*super().callbacks(path)[1:], schedule, keras.callbacks.SwapEMAWeights()]


class Listed(Row):
    """A function that lists the batches of an epoch, a schedule of the learning rate, and swapped averages."""

    def data(self) -> Any:
        import keras_ckpt as kc

        x, y = training_part()

        def batches(epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
            order = np.random.default_rng(epoch).permutation(len(x))
            return [(x[rows], y[rows]) for rows in np.array_split(order, BATCHES)]

        return kc.ResumableDataset(batches)

    def callbacks(self, path: pathlib.Path) -> list[Any]:
        return Pipeline().callbacks(path)


class Loaded(Row):
    """A DataLoader of PyTorch whose workers draw random numbers, and a log in CSV."""

    backends = ("torch",)

    def data(self) -> Any:
        import torch

        import keras_ckpt as kc

        x, y = training_part()

        class Noisy(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return len(x)

            def __getitem__(self, index: int) -> tuple[Any, int]:
                return torch.from_numpy(x[index]) + 0.1 * torch.randn(64) * random.random(), int(y[index])

        generator = torch.Generator().manual_seed(3)
        loader = torch.utils.data.DataLoader(Noisy(), BATCH_SIZE, shuffle=True, num_workers=2, generator=generator)
        return kc.ResumableDataset(loader)

    def callbacks(self, path: pathlib.Path) -> list[Any]:
        import keras

        return [*super().callbacks(path), keras.callbacks.CSVLogger(str(path / "log.csv"))]


class Generated(Row):
    """A PyDataset that draws from NumPy's generator, four batches an execution."""

    backends = "tensorflow", "jax"
    save_freq = 4
    executions = EPOCHS * BATCHES // 4

    def data(self) -> Any:
        import keras

        import keras_ckpt as kc

        x, y = training_part()

        class Noisy(keras.utils.PyDataset):
            def __init__(self) -> None:
                super().__init__()
                self.order = np.arange(len(x))

            def __len__(self) -> int:
                return BATCHES

            def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
                rows = self.order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
                return x[rows] + np.random.normal(0, 0.1, (len(rows), 64)), y[rows]

            def on_epoch_end(self) -> None:
                np.random.shuffle(self.order)

        return kc.ResumableDataset(Noisy(), shuffle=True)

    def compile_options(self) -> dict[str, Any]:
        return {"steps_per_execution": 4}


class GeneratedByBatch(Generated):
    """The same, a batch an execution."""

    backends = Row.backends
    save_freq = 3
    executions = EPOCHS * BATCHES

    def compile_options(self) -> dict[str, Any]:
        return {}


class MixedPrecision(Row):
    """Half the bits, a scaled loss, accumulated gradients, a function that makes the pipeline, a log in CSV."""

    backends = ("tensorflow",)
    save_freq = 5

    def data(self) -> Any:
        import tensorflow as tf

        import keras_ckpt as kc

        dataset = tf.data.Dataset.from_tensor_slices(training_part())
        return kc.ResumableDataset(lambda epoch: dataset.shuffle(700, seed=epoch).batch(BATCH_SIZE))

    def optimizer(self) -> Any:
        import keras

        rate = keras.optimizers.schedules.CosineDecay(0.02, 60)
        return keras.optimizers.Adam(rate, gradient_accumulation_steps=3)

    def model(self) -> Any:
        import keras

        keras.config.set_dtype_policy("mixed_float16")
        return super().model()

    def callbacks(self, path: pathlib.Path) -> list[Any]:
        import keras

        return [*super().callbacks(path)[1:], keras.callbacks.CSVLogger(str(path / "log.csv"))]


class NotValidated(Row):
    """Compiled by XLA, no validation, and a backup at the ends of epochs beside that by batches."""

    backends = "tensorflow", "jax"

    save_freq = ("epoch", 6)
    validates = False

    def compile_options(self) -> dict[str, Any]:
        return {"jit_compile": True}

    def callbacks(self, path: pathlib.Path) -> list[Any]:
        return []


class Stops(Row):
    """EarlyStopping that stops after the second epoch."""

    executions = 2 * BATCHES

    def callbacks(self, path: pathlib.Path) -> list[Any]:
        import keras

        return [
            keras.callbacks.EarlyStopping(
                monitor="val_accuracy", patience=0, min_delta=1.0, start_from_epoch=1, restore_best_weights=True
            )
        ]


ROWS = {
    row.__name__: row
    for row in (
        Arrays,
        ArraysSavedAtEveryBatch,
        Pipeline,
        Listed,
        Loaded,
        Generated,
        GeneratedByBatch,
        MixedPrecision,
        NotValidated,
        Stops,
    )
    if BACKEND in row.backends
}


def run(
    name: str,
    path: str,
    seed: int,
    place: int = 0,
    tell: Tell = lambda what, number: None,
) -> dict[str, str]:
    """The script.

    Args:
        name: The row.
        path: Where the run is.
        seed: The seed of this process.
        place: Where in the list of callbacks the backup stands.
        tell: Called with what happens, and a number: of which batch or epoch.

    Returns:
        Digests of all that the run ends with.
    """
    import keras

    import keras_ckpt as kc

    row = ROWS[name]()
    keras.utils.set_random_seed(seed)
    model = row.model()
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.random.set_seed(1)  # which TensorFlow joins with the seeds of a pipeline
    data = row.data()
    records, tells = _callbacks(tell)
    checkpoint = kc.ModelCheckpoint(
        f"{path}/checkpoints",
        monitor="val_accuracy" if row.validates else "accuracy",
        keep=kc.BestN(2) | kc.LatestN(2),
        save_freq=["epoch", 7],
    )
    callbacks = [checkpoint, *row.callbacks(pathlib.Path(path)), records, tells]
    backup = kc.BackupAndRestore(f"{path}/backup", save_freq=row.save_freq, data=data)
    callbacks.insert(place % (len(callbacks) + 1), backup)
    validation = {"validation_data": validation_part(), "validation_batch_size": 64} if row.validates else {}
    with contextlib.redirect_stdout(io.StringIO()), backup:
        history = model.fit(data, epochs=EPOCHS, shuffle=False, verbose=2, callbacks=callbacks, **validation)
    variables = {
        f"{kind} {index} {each.name}": _digest(keras.ops.convert_to_numpy(each.value).tobytes())
        for kind, each_of in (("model", model.variables), ("optimizer", model.optimizer.variables))
        for index, each in enumerate(each_of)
    }
    kept = [(each.step, each.epoch, each.batch, each.metrics) for each in checkpoint.directory]
    log = pathlib.Path(path, "log.csv")
    return {
        **variables,
        "history": repr((history.history, history.epoch)),
        "batches": repr(records.batches),
        "epochs": repr(records.epochs),
        "kept": repr(sorted(kept)),
        "generators": repr((random.random(), np.random.random(), _drawn_by_the_backend())),
        "log": log.read_text() if log.exists() else "",
    }


def _drawn_by_the_backend() -> Any:
    import keras

    numbers = [keras.ops.convert_to_numpy(keras.random.uniform((1,))).tolist()]
    if BACKEND == "torch":
        import torch

        numbers.append(torch.rand(1).tolist())  # as Dropout without a seed
    return numbers


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _callbacks(tell: Tell) -> tuple[Any, Any]:
    """One that keeps what a callback is told of the run and what it draws, and one that tells what happens."""
    import keras

    class Records(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.batches: list[Any] = []
            self.epochs: list[Any] = []

        def on_train_batch_end(self, batch, logs=None) -> None:
            self.batches.append((batch, dict(logs), random.random(), float(np.random.random())))

        def on_epoch_end(self, epoch, logs=None) -> None:
            rate = float(self.model.optimizer.learning_rate)
            self.epochs.append((epoch, dict(logs), rate, bool(self.model.stop_training)))

    tells = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: tell("begin", epoch),
        on_train_batch_end=lambda batch, logs: tell("batch", batch),
        on_test_batch_end=lambda batch, logs: tell("validation", batch),
        on_epoch_end=lambda epoch, logs: tell("epoch", epoch),
    )
    return Records(), tells
