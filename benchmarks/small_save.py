"""The save of a small model, 500 KB of state, against Keras's `save_weights`.

Run it from the top of the repository: `python benchmarks/small_save.py`. All figures come from one run, in turns.
Keras writes neither seeds nor a sidecar, and syncs nothing; its second row syncs its file and the directory.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import keras
import numpy as np

import keras_ckpt as kc
from keras_ckpt.state import ModelState
from keras_ckpt.writer import Writer

ROUNDS = 60


def small_model() -> keras.Model:
    """A network with about 41,000 weights, trained by Adam: 500 KB of weights and slots."""
    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
            keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(30, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(np.zeros((64, 28, 28, 1)), np.zeros(64), verbose=0)
    return model


def sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def main() -> None:
    model = small_model()
    variables = [*model.variables, *model.optimizer.variables]
    size = sum(variable.numpy().nbytes for variable in variables)
    with tempfile.TemporaryDirectory(dir=".") as name:
        path = pathlib.Path(name)
        state, steps = ModelState(model), iter(range(10**9))
        writers = {
            keep: Writer(kc.CheckpointDirectory(path / f"keep-{keep}"), keep and kc.LatestN(keep)) for keep in (1, None)
        }

        def keras_synced() -> None:
            model.save_weights(path / "synced.weights.h5")
            sync(path / "synced.weights.h5")
            sync(path)

        def keras_plain() -> None:
            model.save_weights(path / "plain.weights.h5")

        def ours(keep: int | None) -> Callable[[], object]:
            return lambda: writers[keep].save(
                state.snapshot(), step=next(steps), epoch=1, batch=0, metrics={"loss": 0.5}
            )

        actions: dict[str, Callable[[], object]] = {
            "Keras, .weights.h5": keras_plain,
            "Keras, .weights.h5, synced": keras_synced,
            "this, without a sidecar": lambda: state.write(path / f"bare-{next(steps)}"),
            "this, saved": ours(None),
            "this, saved and pruned": ours(1),
        }
        times: dict[str, list[float]] = {action: [] for action in actions}
        for round_number in range(ROUNDS + 3):
            for action, run in actions.items():
                begin = time.perf_counter()
                run()
                if round_number >= 3:
                    times[action].append((time.perf_counter() - begin) * 1000)
    print(f"{size / 1000:.0f} kB of state in {len(variables)} variables, {ROUNDS} rounds in turns\n")
    print(f"{'':30}{'median ms':>10}{'p95 ms':>10}{'times Keras':>14}{'times Keras synced':>21}")
    for action, values in times.items():
        ratios = [
            statistics.median(value / other for value, other in zip(values, times[peer], strict=True))
            for peer in ("Keras, .weights.h5", "Keras, .weights.h5, synced")
        ]
        high = statistics.quantiles(values, n=20)[-1]
        print(f"{action:30}{statistics.median(values):10.2f}{high:10.2f}{ratios[0]:14.2f}{ratios[1]:21.2f}")


if __name__ == "__main__":
    main()
