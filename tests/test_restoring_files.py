"""`restore` from files in Keras's own formats: all or nothing, exact, and from files that Keras itself wrote."""

from __future__ import annotations

import functools
import pathlib
import shutil
import zipfile
from typing import Any

import h5py
import keras
import msgspec
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.model.position import position_of
from keras_ckpt.store import streams, tails
from keras_ckpt.store.files import Folder
from support import keras_zoo
from support.models import Reports, dense_model, fit, same, values

# Keras's own writer converts variables in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

PATHS = ["best.keras", "best.weights.h5"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """Each test works in a folder of its own, as a script does."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def callback(path: str, **options) -> kc.ModelCheckpoint:
    return kc.ModelCheckpoint(path, save_weights_only=path.endswith(".weights.h5"), **options)


def saved(path: str, epochs: int = 2, **options) -> keras.Model:
    """A trained model, and a file of it with a record."""
    model = dense_model(**options)
    fit(model, callback(path), epochs=epochs)
    return model


def by_keras(model: keras.Model, path: str) -> None:
    """Keras writes the file, which has no record."""
    (model.save_weights if path.endswith(".weights.h5") else model.save)(path)


def unchanged(model: keras.Model, before: list[np.ndarray]) -> bool:
    """Whether the values of a model are as before. An optimizer may have been built since."""
    return all(np.array_equal(mine, other) for mine, other in zip(values(model), before, strict=False))


def stateful(model: keras.Model) -> list[bytes]:
    """The values that a file of Keras has."""
    optimizer = model.optimizer.variables if model.compiled else []
    return [variable.numpy().tobytes() for variable in (*model.weights, *optimizer)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", ["path", "absolute path", "directory", "record"])
def test_restore_takes_a_path_a_directory_or_a_record_of_a_file(folder, path, form) -> None:
    """Weights, seeds, the optimizer, and the position in the run are restored."""
    model = saved(path)
    files = kc.CheckpointDirectory(path)
    checkpoint = {"path": path, "absolute path": folder / path, "directory": files, "record": files.latest()}[form]
    other = dense_model()

    report = kc.restore(other, checkpoint)

    assert same(model, other)
    # Keras's files have no metrics, which each epoch resets.
    assert str(report) == f"restored {folder / path} at step 10: model 5 of 5, optimizer 10 of 10, metrics 0 of 2"
    position = position_of(other)
    assert (position.run_id, position.step, position.epoch) == (files.latest().run_id, 10, 2)


def test_restore_takes_the_newest_file_of_a_template() -> None:
    """The order of saving decides, not the names."""
    model = dense_model()
    reports = Reports(val_loss=[0.3, 0.2, 0.1])
    fit(model, reports, callback("{val_loss:.2f}.keras"), epochs=3)
    other = dense_model()

    report = kc.restore(other, kc.CheckpointDirectory("{val_loss:.2f}.keras"))

    assert (report.epoch, same(model, other)) == (3, True)


@pytest.mark.parametrize("harm", ["record", "content"])
def test_restore_falls_back_from_a_damaged_file_of_a_template(folder, harm) -> None:
    """A byte of the record or of the content was changed. A warning names the damaged file."""
    fit(dense_model(), callback("{epoch}.weights.h5"), epochs=3)
    path = folder / "3.weights.h5"
    data = bytearray(path.read_bytes())
    data[data.index(b'"epoch"') + 1 if harm == "record" else data.index(b"dense")] ^= 1
    path.write_bytes(data)

    with pytest.warns(UserWarning, match=r"3.weights.h5.*Going back to 2.weights.h5"):
        report = kc.restore(dense_model(), kc.CheckpointDirectory("{epoch}.weights.h5"))

    assert report.epoch == 2


@pytest.mark.parametrize("path", PATHS)
def test_training_of_a_restored_model_ends_like_an_unbroken_training(path) -> None:
    """Two epochs with dropout, a restore and two more epochs give the same bits as four epochs."""
    whole, first = dense_model(), dense_model()
    for variable, other in zip(first.variables, whole.variables, strict=True):
        variable.assign(other)
    fit(whole, epochs=4)
    fit(first, callback(path), epochs=2)

    second = dense_model()
    kc.restore(second, path)
    fit(second, initial_epoch=2, epochs=4)

    assert same(whole, second)


def test_a_restored_model_continues_its_run() -> None:
    """A worse model does not replace the best file of the run."""
    best = functools.partial(callback, "best.keras", save_best_only=True)
    fit(dense_model(), Reports(val_loss=[0.3, 0.1]), best(), epochs=2)
    first = kc.CheckpointDirectory("best.keras").latest()

    model = dense_model()
    kc.restore(model, "best.keras")
    fit(model, Reports(val_loss=[0.2, 0.05]), best(), epochs=2)

    record = kc.CheckpointDirectory("best.keras").latest()
    assert (record.run_id, record.epoch, record.metrics["val_loss"]) == (first.run_id, 4, 0.05)


@pytest.mark.parametrize("path", PATHS)
def test_a_renamed_copy_of_a_file_is_restored_with_its_seeds_and_position(folder, path) -> None:
    """The copy has its record at its end, and no sidecar beside it."""
    model = saved(path)
    (folder / "mail").mkdir()
    copy = shutil.copy(path, folder / "mail" / f"copy.{path.partition('.')[2]}")
    other = dense_model()

    report = kc.restore(other, copy)

    assert same(model, other)
    assert (report.step, position_of(other).step) == (10, 10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", keras_zoo.MODELS)
@pytest.mark.sample(8)
@pytest.mark.filterwarnings("ignore:.* is a file of weights. It lacks", "ignore:You are saving your model")
def test_a_file_that_keras_wrote_is_restored(name, path) -> None:
    """The file has the weights and the optimizer, not the seeds. The model belongs to no run."""
    model, other = keras_zoo.made(name), keras_zoo.MODELS[name]()
    by_keras(model, path)
    other.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"])
    weights_only = name == "low-rank"  # Keras merges low-rank updates into kernels

    report = kc.restore(other, path, weights_only=weights_only)

    if weights_only:
        numbers = np.arange(6).reshape(3, 2)
        np.testing.assert_array_equal(other.predict(numbers, verbose=0), model.predict(numbers, verbose=0))
    else:
        assert stateful(other) == stateful(model)
    assert all("seed_generator" in line or line.startswith("metrics/") for line in report.missing)
    assert not report.unexpected
    assert position_of(other) is None


@pytest.mark.parametrize("optimizer", keras_zoo.OPTIMIZERS)
def test_each_kind_of_optimizer_is_restored_from_a_file(optimizer) -> None:
    """The optimizer of the model is not built before."""
    model, other = keras_zoo.made("dense", optimizer), keras_zoo.MODELS["dense"]()
    by_keras(model, "model.weights.h5")
    if model.compiled:
        other.compile(keras_zoo.OPTIMIZERS[optimizer](), "mse")

    kc.restore(other, "model.weights.h5")

    assert stateful(other) == stateful(model)


def wider(case: str) -> keras.Model:
    """A model that the file does not fit."""
    layers = {
        "another shape": [keras.layers.Dense(3), keras.layers.Dropout(0.5), keras.layers.Dense(2)],
        "a layer more": [keras.layers.Dense(3), keras.layers.Dropout(0.5), *(keras.layers.Dense(1) for _ in range(2))],
        "a layer less": [keras.layers.Dense(1), keras.layers.Dropout(0.5)],
        "no dropout": [keras.layers.Dense(3), keras.layers.Dense(1)],
        "another name": [keras.layers.Dense(3, name="head"), keras.layers.Dropout(0.5), keras.layers.Dense(1)],
        "another dtype": [keras.layers.Dense(3, dtype="float16"), keras.layers.Dropout(0.5), keras.layers.Dense(1)],
    }.get(case, [keras.layers.Dense(3), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("rmsprop" if case == "another optimizer" else "adam", "mse", run_eagerly=True)
    return model


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("another shape", r"model/dense_1/kernel: shape \(3, 2\) float32 in the model, shape \(3, 1\) float32 in the"),
        ("a layer more", "model/dense_2/kernel: not in the checkpoint"),
        ("a layer less", "model/dense_1/0: in the checkpoint, not in the model"),
        ("no dropout", "model/seed_generator/seed_generator_state: in the checkpoint, not in the model"),
        ("another name", "model/head/kernel: not in the checkpoint"),
        ("another dtype", r"model/dense/kernel: shape \(4, 3\) float16 in the model, shape \(4, 3\) float32"),
        ("another optimizer", "optimizer/adam.*/2: in the checkpoint, not in the model"),
    ],
)
def test_a_difference_is_an_error_before_anything_changes(case, line) -> None:
    """The error names the variables with their shapes, and the option that helps."""
    saved("best.keras", epochs=1)
    other = wider(case)
    before = values(other)

    with pytest.raises(kc.MismatchError, match=line) as caught:
        kc.restore(other, "best.keras")

    assert ("weights_only=True" if case == "another optimizer" else "strict=False") in str(caught.value)
    assert unchanged(other, before)


def test_layers_that_a_user_named_are_not_confused() -> None:
    """Both layers have the same class and shape. Keras's own `load_weights` would swap them."""

    def build(*names: str) -> keras.Model:
        return keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(4, name=name) for name in names)])

    by_keras(build("left", "right"), "model.keras")

    with pytest.raises(kc.MismatchError, match=r"model/left/0: in the checkpoint, not in the model"):
        kc.restore(build("right", "left"), "model.keras")


def test_restore_without_strict_restores_the_matching_variables_of_a_file() -> None:
    """A head of another size keeps its weights, and the model belongs to no run."""
    model, other = saved("best.keras"), wider("another shape")
    head = other.layers[-1].get_weights()

    with pytest.warns(UserWarning, match=r"Left as they were: model/dense_1 \(2\)"):
        kc.restore(other, "best.keras", strict=False)

    assert np.array_equal(other.layers[0].get_weights()[0], model.layers[0].get_weights()[0])
    assert all(map(np.array_equal, head, other.layers[-1].get_weights()))
    assert position_of(other) is None


def test_restore_without_strict_skips_an_optimizer_of_another_class_in_a_file() -> None:
    """The weights are restored."""
    model, other = saved("best.keras"), wider("another optimizer")

    report = kc.restore(other, "best.keras", strict=False)

    assert not any(name.startswith("optimizer/") for name in report.matched)
    assert all(map(np.array_equal, model.get_weights(), other.get_weights()))
    assert int(other.optimizer.iterations) == 0


@pytest.mark.parametrize("path", PATHS)
def test_weights_only_leaves_the_optimizer_as_compiled(path) -> None:
    """The optimizer is not built, so the program may still unfreeze layers. The run continues."""
    model, other = saved(path), wider("another optimizer")

    kc.restore(other, path, weights_only=True)

    assert not other.optimizer.built
    assert all(
        map(np.array_equal, [each.numpy() for each in model.variables], [each.numpy() for each in other.variables])
    )
    assert position_of(other).step == 10


def test_an_uncompiled_model_is_restored_from_a_file() -> None:
    """The missing optimizer is not a difference."""
    model, other = saved("best.keras"), dense_model(compiled=False)

    report = kc.restore(other, "best.keras")

    assert all(map(np.array_equal, model.get_weights(), other.get_weights()))
    assert "model 5 of 5" in str(report)


def test_a_file_from_before_the_first_batch_resets_the_slots_of_the_optimizer() -> None:
    """The file has no slots, because the optimizer was not built."""
    new, other = dense_model(), dense_model()
    by_keras(new, "new.keras")
    fit(other)

    kc.restore(other, "new.keras")

    assert not any(np.any(variable.numpy()) for variable in other.optimizer.variables if "momentum" in variable.path)
    assert int(other.optimizer.iterations) == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "harm",
    [
        "cut",
        "content cut",
        "record cut",
        "a byte of the content",
        "a byte of the record",
        "the last byte",
        "other bytes",
    ],
)
def test_a_damaged_file_changes_nothing(folder, path, harm) -> None:
    """The content is compared with the digest in its record."""
    model = saved(path, epochs=1)
    kernel = model.layers[0].kernel.numpy().tobytes()
    data = (folder / path).read_bytes()
    damaged = {
        "cut": data[: len(data) // 2],
        "content cut": data[:-3000] if path.endswith(".h5") else data[:5000] + data[5100:],
        "record cut": data[:-100],
        "the last byte": data[:-1] + b"T",
        "a byte of the content": data.replace(kernel, kernel[:-1] + bytes([kernel[-1] ^ 1])),
        "a byte of the record": data.replace(b'"epoch": 1', b'"epoch": 2'),
        "other bytes": b"no file of Keras" * 500,
    }[harm]
    assert damaged != data
    (folder / path).write_bytes(damaged)
    other = dense_model()
    before = values(other)

    for checkpoint in (path, kc.CheckpointDirectory(path)):
        with pytest.raises(kc.DamagedCheckpointError):
            kc.restore(other, checkpoint)

    assert unchanged(other, before)


@pytest.mark.parametrize("path", PATHS)
def test_seeds_in_a_record_that_lies_change_nothing(folder, path) -> None:
    """A seed of 2^63 is no integer of 64 bits."""
    saved(path, epochs=1)
    with Folder(folder) as place:
        size, record = tails.read_tail(place, path)
    (file,) = record.files
    lie = msgspec.structs.replace(record, seeds={name: [2**63, 0] for name in record.seeds})
    (folder / path).write_bytes((folder / path).read_bytes()[:size] + tails.tail(lie, file.size, file.digest))
    (folder / f"{path}.json").unlink()
    other = dense_model()
    before = values(other)

    with pytest.raises(kc.DamagedCheckpointError, match="cannot be read"):
        kc.restore(other, path)

    assert unchanged(other, before)


@pytest.mark.parametrize("path", PATHS)
def test_the_digest_of_a_file_is_compared_in_the_read_of_its_values(folder, monkeypatch, path) -> None:
    """A second read of the file would take as long again."""
    model = keras.Sequential([keras.Input((500,)), keras.layers.Dense(500)])
    model.compile("sgd", "mse")
    model.fit(np.zeros((2, 500)), np.zeros((2, 500)), verbose=0, callbacks=[callback(path)])
    read = streams.read_into
    counts = []

    def noted(*arguments: Any) -> int:
        counts.append(read(*arguments))
        return counts[-1]

    monkeypatch.setattr(streams, "read_into", noted)
    kc.restore(model, path)

    size = (folder / path).stat().st_size
    assert size * 0.9 < sum(counts) < size * 1.5  # an archive has a table of its members


def test_a_damaged_text_in_a_file_without_a_record_does_not_hang_the_restore(folder) -> None:
    """HDF5 loops forever when it reads the name of a layer from a heap with an object of no size."""
    by_keras(dense_model(), "model.weights.h5")
    path = folder / "model.weights.h5"
    data = path.read_bytes()
    heap = data.index(b"GCOL") + 16  # index, count, 4 bytes, then the size of the first object
    path.write_bytes(data[: heap + 8] + b"\xf0" + b"\xff" * 7 + data[heap + 16 :])
    other = dense_model()

    kc.restore(other, path)

    assert np.isfinite(other.layers[0].kernel.numpy()).all()


def test_a_changed_byte_in_an_archive_without_a_record_is_found(folder) -> None:
    """The archive has checksums."""
    model = dense_model()
    by_keras(model, "model.keras")
    kernel = model.layers[0].kernel.numpy().tobytes()
    (folder / "model.keras").write_bytes((folder / "model.keras").read_bytes().replace(kernel, b"\1" * len(kernel)))

    with pytest.raises(kc.DamagedCheckpointError, match=r"checksum of 'model.weights.h5' does not match"):
        kc.restore(dense_model(), "model.keras")


def test_check_digests_false_compares_only_the_size_of_a_file(folder) -> None:
    """A wrong digest is not noticed."""
    model = saved("best.weights.h5", epochs=1)
    kernel = model.layers[0].kernel.numpy()
    path, other = folder / "best.weights.h5", dense_model()
    path.write_bytes(path.read_bytes().replace(kernel.tobytes(), np.ones_like(kernel).tobytes()))

    kc.restore(other, path, check_digests=False)

    assert np.array_equal(other.layers[0].kernel.numpy(), np.ones_like(kernel))


@pytest.mark.filterwarnings("ignore:Keras cannot load:UserWarning")
def test_the_error_of_a_legacy_file_names_load_model(folder) -> None:
    """Its layout has no paths of objects."""
    saved("model.h5", epochs=1)

    with pytest.raises(ValueError, match=r"legacy format.*keras\.models\.load_model") as caught:
        kc.restore(dense_model(), "model.h5")

    assert not isinstance(caught.value, kc.DamagedCheckpointError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda archive: archive.writestr("assets/../../escape", "x"), "unsafe name"),
        (lambda archive: archive.writestr("/escape", "x"), "unsafe name"),
        (lambda archive: archive.writestr("assets/bomb", b"\0" * 100_000, zipfile.ZIP_DEFLATED), "is compressed"),
        (lambda archive: archive.writestr("config.json", "{}"), "two members of one name"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_unsafe_archive_is_refused(folder, change, message) -> None:
    """Nothing is written outside of a temporary folder, and no memory is filled."""
    by_keras(dense_model(), "model.keras")
    with zipfile.ZipFile("model.keras", "a") as archive:
        change(archive)

    with pytest.raises(kc.DamagedCheckpointError, match=message):
        kc.restore(dense_model(), "model.keras")


def large(group: h5py.Group) -> None:
    group.create_dataset("0", (1 << 20, 1 << 20), "f4", chunks=True, fillvalue=0)


def external(group: h5py.Group) -> None:
    group.create_dataset("0", (4, 3), "f4", external=[("elsewhere", 0, h5py.h5f.UNLIMITED)])


def link(group: h5py.Group) -> None:
    group["0"] = h5py.ExternalLink("elsewhere.h5", "/value")


def text(group: h5py.Group) -> None:
    group["0"] = "text"


def swapped(group: h5py.Group) -> None:
    group.create_dataset("0", data=np.zeros((4, 3), ">f4"))


@pytest.mark.parametrize("change", [large, external, link, text, swapped], ids=lambda change: change.__name__)
def test_a_value_that_is_not_plain_bytes_in_the_file_is_refused(folder, change) -> None:
    """A large value in few bytes, values in other files, and text."""
    (folder / "elsewhere").write_bytes(b"\0" * 48)
    with h5py.File("elsewhere.h5", "w") as file:
        file["value"] = np.zeros((4, 3), "float32")
    by_keras(dense_model(), "model.weights.h5")
    with h5py.File("model.weights.h5", "r+") as file:
        group = file["layers/dense/vars"]
        del group["0"]
        change(group)
    other = dense_model()
    before = values(other)

    with pytest.raises((kc.DamagedCheckpointError, kc.MismatchError)):
        kc.restore(other, "model.weights.h5")

    assert unchanged(other, before)


@keras.saving.register_keras_serializable("restoring_files")
class Refuses(keras.layers.Layer):
    """A layer with a number beside its variable, which refuses to load a number above 5."""

    def build(self, shape) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        self.number = 0

    def call(self, x):
        return x * self.scale

    def save_own_variables(self, store) -> None:
        store["scale"], store["number"] = self.scale, np.array(self.number)

    def load_own_variables(self, store) -> None:
        self.number = int(store["number"])
        self.scale.assign(store["scale"])
        if self.number > 5:
            raise OverflowError("too much")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("number", [3, 7])
def test_an_object_reads_its_own_state_or_refuses_all(path, number) -> None:
    """After a refusal the variables and the attributes of all objects are as before."""

    def build() -> keras.Model:
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), Refuses(), keras.layers.Dense(2)])

    model, other = build(), build()
    model.layers[1].number = number
    model.layers[1].scale.assign([1, 2, 3, 4])
    by_keras(model, path)
    before = values(other)

    if number > 5:
        with pytest.raises(kc.MismatchError, match=r"model/refuses refused its state .*OverflowError: too much"):
            kc.restore(other, path)
        assert (other.layers[1].number, unchanged(other, before)) == (0, True)
    else:
        kc.restore(other, path)
        assert (other.layers[1].number, stateful(other)) == (3, stateful(model))


@keras.saving.register_keras_serializable("restoring_files")
class Counts(keras.Model):
    """A model with a number and a text of its own, beside its layers."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.head = keras.layers.Dense(2)
        self.number, self.notes = 0, ""

    def call(self, x):
        return self.head(x)

    def save_own_variables(self, store) -> None:
        store["number"] = np.array(self.number)

    def load_own_variables(self, store) -> None:
        self.number = int(store["number"])

    def save_assets(self, path) -> None:
        pathlib.Path(path, "notes.txt").write_text(self.notes)

    def load_assets(self, path) -> None:
        self.notes = pathlib.Path(path, "notes.txt").read_text()


def test_the_own_state_of_a_model_is_restored_from_a_file() -> None:
    """The file has it beside the state of the layers."""
    model, other = Counts(), Counts()
    for each in (model, other):
        each(np.zeros((1, 4), "float32"))
    model.number, model.notes = 3, "first"
    by_keras(model, "model.keras")

    kc.restore(other, "model.keras")

    assert (other.number, other.notes, stateful(other)) == (3, "first", stateful(model))


def test_a_vocabulary_is_restored_from_an_archive() -> None:
    """The program adapted its layer to other words."""
    name = "TextVectorization weighed"
    model, other = keras_zoo.made(name), keras_zoo.made(name)
    by_keras(model, "text.keras")
    other.layers[0].adapt(np.array([["g h"], ["i j k g"], ["l"]]))

    report = kc.restore(other, "text.keras")

    assert "learned/text_vectorization/vocabulary.txt" in report.matched
    words = keras.ops.convert_to_tensor(keras_zoo.WORDS)
    np.testing.assert_array_equal(other(words), model(words))


def test_a_file_of_weights_lacks_vocabularies_with_a_warning() -> None:
    """The layer is as the program adapted it."""
    model, other = keras_zoo.made("StringLookup"), keras_zoo.made("StringLookup")
    by_keras(model, "model.weights.h5")

    with pytest.warns(UserWarning, match=r"is a file of weights. It lacks .* They are as they were: string_lookup"):
        kc.restore(other, "model.weights.h5")


@pytest.mark.parametrize("path", ["model.keras", "{epoch}.keras"])
def test_a_missing_file_is_not_found(path) -> None:
    """The error names the path."""
    with pytest.raises(kc.CheckpointNotFoundError, match="There is no checkpoint"):
        kc.restore(dense_model(), path)


def test_restore_and_load_model_name_the_template_of_each_series_of_a_folder(folder) -> None:
    """The path of a template means its newest file. The path of one file works too."""
    model = dense_model()
    saves = kc.ModelCheckpoint("ckpt/{epoch:02d}.keras"), kc.ModelCheckpoint("ckpt/best.keras", save_best_only=True)
    fit(model, Reports(val_loss=[0.5, 0.25]), *saves, epochs=2)

    for read in (functools.partial(kc.restore, dense_model()), kc.load_model):
        with pytest.raises(
            ValueError, match=r"Name a template .*: 'ckpt/best\.keras' or 'ckpt/\{epoch:02d\}\.keras'\."
        ):
            read("ckpt")
        for path in ("ckpt/best.keras", "ckpt/{epoch:02d}.keras", "ckpt/01.keras"):
            read(path)

    assert kc.restore(dense_model(), "ckpt/{epoch:02d}.keras").prefix.endswith("/02.keras")
    assert kc.restore(dense_model(), "ckpt/01.keras").prefix.endswith("/01.keras")
