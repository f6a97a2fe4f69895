"""What checking costs: restoring 100 MB of state with digests and without, against Keras's `load_weights`.

Run it from the top of the repository: `python benchmarks/checking.py`. All figures come from one run, in turns, with
the files in memory.
"""

from __future__ import annotations

import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable

import keras

import keras_ckpt as kc
from keras_ckpt.state import ModelState
from keras_ckpt.writer import Writer

ROUNDS = 15
LAYERS, WIDTH = 8, 1024


def large_model() -> keras.Model:
    """A network of eight million weights, trained by Adam."""
    model = keras.Sequential([keras.Input((WIDTH,)), *(keras.layers.Dense(WIDTH) for _ in range(LAYERS))])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    return model


def main() -> None:
    model = large_model()
    state = ModelState(model)
    with tempfile.TemporaryDirectory(dir=".") as name:
        path = pathlib.Path(name)
        runs = kc.CheckpointDirectory(path / "run")
        Writer(runs).save(state.snapshot(), step=1)
        model.save_weights(path / "weights.weights.h5")
        actions: dict[str, Callable[[], object]] = {
            "restore, sizes only": lambda: kc.restore(model, runs, check_digests=False),
            "restore": lambda: kc.restore(model, runs),
            "verify": runs.verify,
            "Keras, load_weights": lambda: model.load_weights(path / "weights.weights.h5"),
        }
        times: dict[str, list[float]] = {action: [] for action in actions}
        for _ in range(ROUNDS):
            for action, run in actions.items():
                begin = time.perf_counter()
                run()
                times[action].append((time.perf_counter() - begin) * 1000)
    print(f"{state.size() / 1e6:.0f} MB of state, {ROUNDS} rounds in turns\n")
    print(f"{'':24}{'median ms':>10}{'times sizes only':>18}")
    for action, values in times.items():
        ratio = statistics.median(
            value / other for value, other in zip(values, times["restore, sizes only"], strict=True)
        )
        print(f"{action:24}{statistics.median(values):10.1f}{ratio:18.2f}")


if __name__ == "__main__":
    main()
