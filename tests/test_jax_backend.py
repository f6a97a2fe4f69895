"""JAX's side of the seam: values inside of `fit`, memory that is taken over, arrays on several devices."""

import concurrent.futures
import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("the backend of this process is another", allow_module_level=True)


from keras_ckpt.model.backends import backend


def small_model() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dropout(0.5, seed=1)])
    model.compile("adam", "mse", metrics=["mae"])
    return model


def test_a_reader_has_the_values_of_fit_while_the_variables_have_none() -> None:
    model, seen = small_model(), []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None) -> None:
            variables = [*self.model.variables, *self.model.optimizer.variables]
            self.variables = dict(zip(map(str, range(len(variables))), variables, strict=True))
            self.reader = backend.Reader(self.model, self.variables)

        def on_train_batch_end(self, batch, logs=None) -> None:
            purged = all(each._value is None for each in self.variables.values())
            read = {key: value.copy() for key, value in self.reader.read().items()}
            _ = self.model  # gives the variables their values
            seen.append(purged and all(np.array_equal(read[key], each) for key, each in self.variables.items()))

    model.fit(np.ones((8, 4)), np.ones((8, 3)), batch_size=2, verbose=0, callbacks=[Look()])

    assert seen == [True] * 4


def test_a_value_that_was_read_does_not_change_in_later_steps() -> None:
    """A step reuses the memory of the values before it, unless an array holds the memory."""
    model, held = small_model(), []

    class Hold(keras.callbacks.Callback):
        def on_train_begin(self, logs=None) -> None:
            self.reader = backend.Reader(self.model, {"kernel": self.model.layers[0].kernel})

        def on_train_batch_end(self, batch, logs=None) -> None:
            value = self.reader.read()["kernel"]
            held.append((value, value.copy()))

    model.fit(np.ones((16, 4)), np.ones((16, 3)), batch_size=2, verbose=0, callbacks=[Hold()])

    assert len({copy.tobytes() for _, copy in held}) == 8
    assert all(np.array_equal(value, copy) for value, copy in held)


def test_a_variable_takes_over_allocated_memory() -> None:
    """`jax.device_put` copies memory that is not aligned."""
    variable = keras.Variable(np.zeros((64, 3), np.float32))
    array, memory = backend.allocate(1, (64, 3))
    memory[:] = np.ones(64 * 3, np.float32).tobytes()

    backend.assign(variable, array)

    assert np.array_equal(variable, np.ones((64, 3)))
    assert np.shares_memory(np.asarray(variable.value), array)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_a_model_on_two_devices_is_saved_whole_and_restored_with_its_layout(tmp_path) -> None:
    code = f"""
import keras, numpy as np, keras_ckpt as kc, jax
keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices()))
def make():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("adam", "mse")
    return model
model, x, y = make(), np.ones((8, 4)), np.ones((8, 3))
model.fit(x, y, verbose=0, batch_size=4, callbacks=[kc.ModelCheckpoint({str(tmp_path / "runs")!r}, save_freq=1)])
other = make()
kc.restore(other, {str(tmp_path / "runs")!r})
for mine, theirs in zip(other.variables + other.optimizer.variables, model.variables + model.optimizer.variables):
    assert np.array_equal(mine, theirs) and mine.value.sharding == theirs.value.sharding, mine.path
assert len(other.variables[0].value.sharding.device_set) == 2
other.fit(x, y, verbose=0, batch_size=4)
"""
    ended = run(code, XLA_FLAGS="--xla_force_host_platform_device_count=2")

    assert ended.returncode == 0, ended.stderr[-2000:]


def test_a_model_over_two_processes_is_refused_before_training(tmp_path) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    code = f"""
import os, jax
jax.distributed.initialize("localhost:{port}", 2, int(os.environ["PLACE"]))
import keras, numpy as np, keras_ckpt as kc
keras.utils.set_random_seed(0)
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
model.compile("adam", "mse")
try:
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0, callbacks=[kc.ModelCheckpoint({str(tmp_path)!r} + "/runs")])
except ValueError as error:
    print(error)
"""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        ended = [*pool.map(lambda place: run(code, PLACE=str(place)), range(2))]

    refusal = "is spread over several processes. Received: 2 processes"
    assert all(refusal in each.stdout for each in ended), [each.stderr[-1000:] for each in ended]
    assert not list((tmp_path / "runs").glob("ckpt*"))
