"""Modules of PyTorch inside a Keras model: their parameters and buffers are values of a checkpoint, each once."""

import pathlib

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("the backend of this process is another", allow_module_level=True)

import safetensors.torch
import torch
from click.testing import CliRunner

import keras_ckpt as kc
from keras_ckpt.cli import main
from keras_ckpt.formats.arena import Arena
from keras_ckpt.model.file_snapshot import FileState
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.store.files import Folder
from support.keras_files import content
from support.models import Interrupts, save

rng = np.random.default_rng(0)
X = rng.normal(size=(40, 4)).astype("float32")
Y = rng.normal(size=(40, 1)).astype("float32")
pytestmark = pytest.mark.filterwarnings(
    "ignore:keras_ckpt.load_model.. cannot build", "ignore:__array__ implementation doesn't accept a copy"
)


class Block(torch.nn.Module):
    """A linear layer with batch normalization, and a buffer that no `state_dict` has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.norm(self.linear(x))


class Subclassed(keras.Model):
    """A model that Keras wraps a module in."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.out = keras.layers.Dense(1)

    def call(self, x, training=None):
        return self.out(self.block(x, training=training))


def functional() -> keras.Model:
    inputs = keras.Input((4,))
    wrapper = keras.layers.TorchModuleWrapper(Block(), name="block", output_shape=(None, 3))
    return keras.Model(inputs, keras.layers.Dense(1)(wrapper(inputs)))


def subclassed() -> keras.Model:
    model = Subclassed()
    model(X[:2], training=False)
    return model


def trained(model: keras.Model, batches: int = 4, *callbacks) -> keras.Model:
    if not model.compiled:
        model.compile("adam", "mse")
    model.fit(X[: 4 * batches], Y[: 4 * batches], batch_size=4, shuffle=False, verbose=0, callbacks=list(callbacks))
    return model


def module_of(model: keras.Model) -> torch.nn.Module:
    """The first module that a model wraps."""
    return next(each.module for each in model.layers if isinstance(each, keras.layers.TorchModuleWrapper))


def state(model: keras.Model) -> dict[str, bytes]:
    """The bytes of all that a module, its model and the optimizer have."""
    tensors = module_of(model).state_dict() | {str(place): each for place, each in enumerate(model.variables)}
    optimizer = model.optimizer.variables if model.compiled else []
    tensors |= {f"optimizer/{place}": each for place, each in enumerate(optimizer)}
    return {name: keras.ops.convert_to_numpy(each).tobytes() for name, each in tensors.items()}


@pytest.mark.parametrize("build", [functional, subclassed])
def test_a_checkpoint_has_the_state_dict_of_a_module_once_below_the_name_of_its_layer(tmp_path, build) -> None:
    model = trained(build())
    layer = next(each for each in model.layers if isinstance(each, keras.layers.TorchModuleWrapper))
    place = "block" if build is functional else "torch_module_wrapper"

    save(model, tmp_path)
    found = kc.load_variables(tmp_path)

    inside = {name: value for name, value in found.items() if name.startswith(f"model/{place}/")}
    expected = layer.module.state_dict()
    assert set(inside) == {f"model/{place}/{name}" for name in expected}
    for name, tensor in expected.items():
        assert np.array_equal(inside[f"model/{place}/{name}"], tensor.numpy()), name
    assert inside[f"model/{place}/norm.num_batches_tracked"].dtype == np.int64
    assert f"optimizer/{place}/linear.weight/momentum" in found
    assert {name for name in found.weights if name not in inside} == {"model/dense/kernel", "model/dense/bias"}


@pytest.mark.parametrize("build", [functional, subclassed])
def test_a_restored_module_has_its_parameters_its_buffers_and_the_slots_of_the_optimizer(tmp_path, build) -> None:
    model = trained(build())
    record = save(model, tmp_path)
    other = trained(build(), batches=2)

    report = kc.restore(other, record)

    assert state(other) == state(model)
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})


def test_a_restored_optimizer_that_was_not_built_has_its_slots_in_the_order_of_the_module(tmp_path) -> None:
    model = trained(functional())
    record = save(model, tmp_path)
    other = functional()
    other.compile("adam", "mse")

    kc.restore(other, record)

    assert state(other) == state(model)


def test_the_buffers_of_a_background_save_are_of_its_step(tmp_path) -> None:
    """PyTorch changes a buffer in place, so it is copied before the callback returns."""
    seen = {}

    class Watches(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None) -> None:
            norm = module_of(self.model).norm
            seen[batch + 1] = norm.running_mean.numpy().copy(), int(norm.num_batches_tracked)

    runs = kc.CheckpointDirectory(tmp_path)
    trained(functional(), 10, Watches(), kc.ModelCheckpoint(tmp_path, save_freq=1))

    for record in runs:
        found = kc.load_variables(record)
        mean, batches = seen[record.step]
        assert np.array_equal(found["model/block/norm.running_mean"], mean)
        assert found["model/block/norm.num_batches_tracked"] == batches == record.step
    assert len(runs) > 1


def test_a_killed_fit_with_batch_normalization_of_pytorch_ends_as_an_unbroken_fit(tmp_path) -> None:
    def train(path: pathlib.Path, *callbacks) -> keras.Model:
        keras.utils.set_random_seed(1)
        model, data = functional(), kc.ResumableDataset(X, Y, batch_size=4, shuffle=True, seed=1)
        model.compile("adam", "mse")
        backup = kc.BackupAndRestore(path, save_freq=1, delete_checkpoint=False, data=data)
        model.fit(data, epochs=2, shuffle=False, verbose=0, callbacks=[*callbacks, backup])
        return model

    expected = state(train(tmp_path / "unbroken"))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", Interrupts(15))

    resumed = train(tmp_path / "killed")

    assert state(resumed) == expected
    assert module_of(resumed).norm.num_batches_tracked == 20


def test_a_frozen_module_is_saved_and_restored(tmp_path) -> None:
    """Its running statistics are saved, and the optimizer has no slots of it."""
    model = functional()
    model.get_layer("block").trainable = False
    record = save(trained(model), tmp_path)
    other = functional()
    other.get_layer("block").trainable = False
    other.compile("adam", "mse")

    kc.restore(other, record)

    assert state(other) == state(model)
    assert not [name for name in kc.load_variables(record) if name.startswith("optimizer/block")]


def test_a_module_in_two_layers_has_its_buffers_once(tmp_path) -> None:
    """Keras makes two variables of a parameter that two layers wrap. A buffer has the name of the first layer."""

    def build() -> keras.Model:
        module, inputs = torch.nn.BatchNorm1d(4), keras.Input((4,))
        first = keras.layers.TorchModuleWrapper(module, name="first", output_shape=(None, 4))
        second = keras.layers.TorchModuleWrapper(module, name="second", output_shape=(None, 4))
        return keras.Model(inputs, keras.layers.Dense(1)(second(first(inputs))))

    model, other = trained(build()), build()
    other.compile("adam", "mse")
    record = save(model, tmp_path)

    kc.restore(other, record)

    assert state(other) == state(model)
    assert [name for name in kc.load_variables(record) if "running_mean" in name] == ["model/first/running_mean"]


def test_a_parameter_that_a_module_has_twice_is_saved_once(tmp_path) -> None:
    module = torch.nn.ModuleDict({"one": torch.nn.Linear(4, 4), "two": torch.nn.Linear(4, 4)})
    module["two"].weight = module["one"].weight
    model = keras.Sequential([keras.Input((4,)), keras.layers.TorchModuleWrapper(module, name="tied")])

    save(model, tmp_path)

    assert set(kc.load_variables(tmp_path).weights) == {
        "model/tied/one.weight",
        "model/tied/one.bias",
        "model/tied/two.bias",
    }


def test_a_module_in_a_model_in_a_model_is_restored(tmp_path) -> None:
    def build() -> keras.Model:
        inputs = keras.Input((4,))
        return keras.Model(inputs, functional()(inputs))

    model, other = build(), build()
    model.compile("sgd", "mse")
    model.fit(X, Y, verbose=0)
    record = save(model, tmp_path)

    kc.restore(other, record, weights_only=True)

    assert all(map(torch.equal, module_of(model.layers[1]).state_dict().values(),
                   module_of(other.layers[1]).state_dict().values()))  # fmt: skip


def test_a_buffer_that_a_module_replaces_by_another_tensor_is_saved() -> None:
    model = functional()
    states, arena = ModelState(model), Arena()
    states.snapshot().move(arena)

    module_of(model).norm.running_mean = torch.full((3,), 7.0)
    found = states.snapshot().move(arena)

    assert found[b"model/block/norm.running_mean/.ATTRIBUTES/VARIABLE_VALUE"].data.view("f4").tolist() == [7, 7, 7]


def test_a_buffer_of_a_layer_of_keras_is_saved_and_restored(tmp_path) -> None:
    class Counts(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__(name="counts")
            self.register_buffer("seen", torch.zeros((), dtype=torch.int32))

        def call(self, x):
            self.seen += len(x)
            return x

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((4,)), Counts(), keras.layers.Dense(1)])

    model, other = trained(build()), build()
    seen = int(model.layers[0].seen)

    kc.restore(other, save(model, tmp_path), weights_only=True)

    assert int(other.layers[0].seen) == seen > 0


def test_the_extra_state_of_a_module_is_saved_and_restored(tmp_path) -> None:
    class Scaled(torch.nn.Linear):
        factor = 1.0

        def get_extra_state(self) -> torch.Tensor:
            return torch.tensor(self.factor)

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.factor = float(state)

    def build() -> keras.Model:
        wrapper = keras.layers.TorchModuleWrapper(Scaled(4, 1), name="scaled")
        return keras.Sequential([keras.Input((4,)), wrapper])

    model, other = build(), build()
    module_of(model).factor = 3.0

    kc.restore(other, save(model, tmp_path))

    assert module_of(other).factor == 3.0
    assert torch.equal(module_of(other).weight, module_of(model).weight)


def test_a_module_of_another_shape_is_refused_by_the_name_of_its_parameter(tmp_path) -> None:
    def build(size: int) -> keras.Model:
        wrapper = keras.layers.TorchModuleWrapper(torch.nn.BatchNorm1d(size), name="norm")
        return keras.Sequential([keras.Input((size,)), wrapper])

    record = save(build(4), tmp_path)

    with pytest.raises(kc.MismatchError, match=r"model/norm/running_mean"):
        kc.restore(build(5), record)


@pytest.mark.parametrize("kind", ["keras", "weights"])
@pytest.mark.parametrize("build", [functional, subclassed])
def test_a_file_of_keras_has_the_content_that_keras_writes(tmp_path, build, kind) -> None:
    """Also the config, which has the module and its values as a pickle, is of the moment of the save."""
    model, name = trained(build()), "model.keras" if kind == "keras" else "model.weights.h5"
    states = FileState(model, kind)
    for number in range(2):
        (model.save if kind == "keras" else model.save_weights)(tmp_path / name)
        snapshot = states.snapshot()
        snapshot.detach(change=True)
        trained(model)

        with Folder(tmp_path / str(number), create=True) as folder:
            snapshot.write(folder, name, lambda size, digest: b"")

        assert content(tmp_path / str(number) / name) == content(tmp_path / name)


@pytest.mark.parametrize("name", ["model.weights.h5", "model.keras"])
def test_a_file_of_keras_is_restored_with_the_buffers(tmp_path, name) -> None:
    model, other = trained(functional()), functional()
    other.compile("adam", "mse")
    (model.save if name.endswith(".keras") else model.save_weights)(tmp_path / name)

    kc.restore(other, tmp_path / name)

    assert state(other) == state(model)


def test_a_checkpoint_is_exported_as_the_file_of_weights_that_keras_writes(tmp_path) -> None:
    model = trained(functional())
    record = save(model, tmp_path / "run")
    model.save_weights(tmp_path / "theirs.weights.h5")

    kc.export(record, tmp_path / "ours.weights.h5")
    with pytest.raises(ValueError, match="Keras pickles"):
        kc.export(record, tmp_path / "ours.keras")

    # A checkpoint counts in int64 on each backend.
    ours, theirs = content(tmp_path / "ours.weights.h5"), content(tmp_path / "theirs.weights.h5")
    assert ours.pop("optimizer/vars/0") != theirs.pop("optimizer/vars/0")
    assert ours == theirs


def test_a_checkpoint_has_no_pickle_and_says_that_it_cannot_build_the_model(tmp_path) -> None:
    """Keras's config of a wrapped module is a pickle with all values of the module."""
    model = trained(functional())
    record = save(model, tmp_path)

    assert ModelState(model).config()().config is None
    with pytest.raises(kc.CannotBuildError, match=r"it has a torch\.nn\.Module, which Keras pickles"):
        kc.load_model(record)


def test_a_parameter_of_a_module_in_a_list_is_named_as_unsaved() -> None:
    """Keras wraps no module in a list: it neither trains nor saves the parameters."""

    class Listed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.parts = [torch.nn.Linear(4, 1)]

        def call(self, x):
            return self.parts[0](x)

    model = Listed()
    model(X)
    states = ModelState(model)

    found = states.unsaved(states.attributes())

    assert [name for name in found if name.endswith("weight")] == ["parts/0/_parameters/weight"]


class Network(keras.Model):
    """A model with a module of PyTorch, a module in a module, layers of Keras, and a seed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Subclassed()
        self.block = torch.nn.Sequential(Block(), torch.nn.Linear(3, 4))
        self.dropout = keras.layers.Dropout(0.5, seed=1)

    def call(self, x, training=None):
        return self.inner(self.dropout(self.block(x, training=training), training=training), training=training)


def network() -> keras.Model:
    model = Network()
    model(X[:2], training=False)
    return model


def sequential() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(3, dtype="bfloat16"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ]
    )


@pytest.fixture
def unnumbered():
    """Keras numbers automatic names as in a new process, at each call."""
    keras.utils.clear_session()
    return keras.utils.clear_session


@pytest.mark.parametrize("build", [sequential, subclassed, network])
def test_a_checkpoint_is_exported_as_a_state_dict_that_the_model_loads(tmp_path, unnumbered, build) -> None:
    """Each name of the `state_dict` is in the file, and loads strictly."""
    model = trained(build())
    save(model, tmp_path / "run")
    expected = {name: each.clone() for name, each in model.state_dict().items()}
    unnumbered()
    other = build()

    kc.export(tmp_path / "run", tmp_path / "x.safetensors", names="state_dict")
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    other.load_state_dict(found)

    assert found.keys() == expected.keys()
    assert all(torch.equal(each, expected[name]) for name, each in other.state_dict().items())
    assert all(map(np.array_equal, other.get_weights(), model.get_weights()))


def test_the_command_exports_the_same_state_dict(tmp_path, unnumbered) -> None:
    save(trained(sequential()), tmp_path / "run")
    kc.export(tmp_path / "run", tmp_path / "x.safetensors", names="state_dict")

    ended = CliRunner().invoke(
        main, ["export", str(tmp_path / "run"), "latest", str(tmp_path / "y.safetensors"), "--names", "state_dict"]
    )

    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


def test_a_module_outside_of_keras_loads_its_part_of_an_export(tmp_path) -> None:
    """The names in the part are those of the module. A `state_dict` of a functional model lacks the module."""
    model = trained(functional())
    save(model, tmp_path / "run")
    module = Block()

    kc.export(tmp_path / "run", tmp_path / "x.safetensors", weights_only=True)
    found = safetensors.torch.load_file(tmp_path / "x.safetensors")
    place = "model/block/"
    module.load_state_dict({key.removeprefix(place): each for key, each in found.items() if key.startswith(place)})

    expected = module_of(model).state_dict()
    assert all(torch.equal(each, expected[name]) for name, each in module.state_dict().items())


def test_an_export_as_a_state_dict_names_the_buffers_that_the_state_dict_of_keras_lacks(tmp_path) -> None:
    """A functional model has its layers in a list, so PyTorch does not see the modules in them."""
    save(trained(functional()), tmp_path / "run")

    with pytest.warns(UserWarning, match=r"lacks .*model/block/norm\.running_mean.*names=\"variables\""):
        kc.export(tmp_path / "run", tmp_path / "x.safetensors", names="state_dict")


def test_a_run_continues_from_a_state_dict_that_the_model_loaded(tmp_path, unnumbered) -> None:
    """A file that PyTorch wrote is loaded by PyTorch. The next checkpoint has its values."""
    model = trained(subclassed())
    safetensors.torch.save_file({name: each.clone() for name, each in model.state_dict().items()}, tmp_path / "x")
    unnumbered()
    other, third = subclassed(), subclassed()

    other.load_state_dict(safetensors.torch.load_file(tmp_path / "x"))
    kc.restore(third, save(other, tmp_path / "run"))

    assert module_of(third).norm.num_batches_tracked == 4
    assert all(map(np.array_equal, third.get_weights(), model.get_weights()))
    assert all(map(torch.equal, module_of(third).state_dict().values(), module_of(model).state_dict().values()))


def test_an_archive_of_numpy_has_the_names_of_a_state_dict_too(tmp_path) -> None:
    model = trained(subclassed())
    save(model, tmp_path / "run")

    kc.export(tmp_path / "run", tmp_path / "x.npz", names="state_dict")

    assert np.load(tmp_path / "x.npz").keys() == model.state_dict().keys()
