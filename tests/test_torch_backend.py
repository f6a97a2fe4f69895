"""PyTorch's side of the seam: memory that changes in place, and types that NumPy lacks."""

import errno
import functools

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("the backend of this process is another", allow_module_level=True)

import ml_dtypes
import torch

import keras_ckpt as kc
from keras_ckpt.formats import arena
from keras_ckpt.model.backends import backend
from support.models import X, dense_model, fit, save


def test_a_value_that_was_read_is_the_memory_of_its_variable() -> None:
    """So a snapshot copies it before the next step."""
    variable = keras.Variable(np.zeros(3, np.float32))
    value = backend.Reader(None, {"x": variable}).read()["x"]

    variable.assign_add(np.ones(3))

    assert value.tolist() == [1, 1, 1]
    assert backend.COPIES_AT_ONCE


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8", "int32", "bool"])
def test_a_variable_of_any_type_is_read_and_assigned_bit_by_bit(dtype) -> None:
    variable = keras.Variable(np.zeros((2, 3)), dtype=dtype, trainable=False)
    value = np.array([[0, 1, 1], [1, 0, 1]]).astype(getattr(ml_dtypes, dtype, dtype))

    backend.assign(variable, value)
    found = backend.Reader(None, {"x": variable}).read()["x"]

    assert found.dtype == value.dtype
    assert found.tobytes() == value.tobytes()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_tensor_of_eight_bits_is_read_bit_by_bit(dtype) -> None:
    """Keras makes no variables of these types with values on PyTorch, so the tensor is a variable's."""
    bits = torch.arange(16, dtype=torch.uint8)
    variable = keras.Variable(bits.view(getattr(torch, dtype)), dtype=dtype)

    found = backend.Reader(None, {"x": variable}).read()["x"]

    assert found.dtype == getattr(ml_dtypes, dtype)
    assert found.tobytes() == bytes(range(16))


def test_a_transposed_parameter_is_read_in_the_order_of_its_elements() -> None:
    variable = keras.Variable(torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).t()))

    found = backend.Reader(None, {"x": variable}).read()["x"]

    assert found.flags.c_contiguous
    assert found.tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU of CUDA, where the reading was never tried")
def test_a_model_on_a_gpu_is_saved_and_restored(tmp_path) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.compile("adam", "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 3)), verbose=0, callbacks=[kc.ModelCheckpoint(tmp_path / "runs")])
    saved = [keras.ops.convert_to_numpy(each) for each in model.variables]
    model.set_weights([np.zeros_like(each) for each in model.get_weights()])

    kc.restore(model, tmp_path / "runs")

    assert all(map(np.array_equal, saved, map(keras.ops.convert_to_numpy, model.variables)))
    assert model.variables[0].value.is_cuda


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")], ids=repr)
def test_a_save_without_memory_for_its_copies_is_skipped_with_a_warning(tmp_path, monkeypatch, error) -> None:
    """The values are copied before the callback returns. Training continues, and the next save has memory."""
    pages, refused = arena.pages, []

    def once(size: int) -> object:
        if len(refused) < 2:  # the preparation of the first save, and the save itself
            refused.append(size)
            raise error
        return pages(size)

    monkeypatch.setattr(arena, "pages", once)

    with pytest.warns(UserWarning, match=r"Could not save step 1 into .* A save needs memory .* Training continues\."):
        fit(dense_model(), kc.ModelCheckpoint(tmp_path, save_freq=1, save_on_background=False), batches=3)

    assert [record.step for record in kc.CheckpointDirectory(tmp_path)] == [2, 3]


def test_a_backup_without_memory_for_its_copies_lets_the_training_continue(tmp_path, monkeypatch) -> None:
    """Also for the copy of the state before the first batch."""

    def none(size: int) -> None:
        raise MemoryError

    monkeypatch.setattr(arena, "pages", none)
    backup = kc.BackupAndRestore(tmp_path, save_freq=2, delete_checkpoint=False)

    with pytest.warns(UserWarning, match="A save needs memory") as told:
        history = fit(dense_model(), backup, batches=4)

    assert len(history.history["loss"]) == 1
    assert any("Could not save step 0" in str(each.message) for each in told)


def test_the_model_in_distributed_data_parallel_is_saved_and_named_by_the_error_of_a_restore(tmp_path) -> None:
    """Keras gives a callback the model itself. A loop of PyTorch trains the module around the model."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model, checkpoint = dense_model(), kc.ModelCheckpoint(tmp_path / "run", save_freq=2)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters())
        checkpoint.set_params({"steps": 4, "epochs": 1})
        checkpoint.set_model(parallel)
        checkpoint.on_train_begin()
        checkpoint.on_epoch_begin(0)
        for batch in range(4):
            optimizer.zero_grad()
            parallel(torch.from_numpy(X[batch : batch + 4])).square().mean().backward()
            optimizer.step()
            checkpoint.on_train_batch_end(batch, {})
        checkpoint.on_epoch_end(0, {})
        checkpoint.on_train_end()

        with pytest.raises(TypeError, match=r"Pass the Keras model in it, model\.module\.$"):
            kc.restore(parallel, tmp_path / "run")
        other = dense_model()
        kc.restore(other, tmp_path / "run", weights_only=True)
    finally:
        torch.distributed.destroy_process_group()

    assert [record.step for record in kc.CheckpointDirectory(tmp_path / "run")] == [2, 4]
    assert all(map(np.array_equal, other.get_weights(), model.get_weights()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_step_is_saved_at_its_step(tmp_path, monkeypatch, long) -> None:
    """The code that `torch.compile` makes from a step changes the values in place too."""
    if not long:
        pytest.skip("PyTorch takes 15 s of a processor to compile: --long")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    seen = {}

    class Watches(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            seen[batch + 1] = self.model.get_weights()[0].copy()

    model = dense_model(run_eagerly=False, jit_compile=True)
    fit(model, Watches(), kc.ModelCheckpoint(tmp_path, save_freq=1), batches=4)

    runs = kc.CheckpointDirectory(tmp_path)
    assert all(np.array_equal(kc.load_variables(each)["model/dense/kernel"], seen[each.step]) for each in runs)
    assert runs.latest().step == 4


def test_a_layer_that_refuses_its_state_leaves_all_variables_as_they_were(tmp_path) -> None:
    """The values of before are copies: their memory changes with the variables."""

    class Picky(keras.layers.Layer):
        def save_own_variables(self, store) -> None:
            store["size"] = np.ones(1)

        def load_own_variables(self, store) -> None:
            raise RuntimeError("not mine")

        def call(self, x):
            return x

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(1), Picky(name="picky")])

    model = build()
    record, before = save(build(), tmp_path), model.get_weights()[0].copy()

    with pytest.raises(kc.MismatchError, match=r"model/picky refused its state in .*nothing was restored"):
        kc.restore(model, record)

    assert np.array_equal(model.get_weights()[0], before)
