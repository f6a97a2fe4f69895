"""The learned state of layers beyond variables: saved, compared and restored by Keras's saving protocol."""

import collections
import json
import os
import pathlib
import re

import keras
import msgspec
import numpy as np
import pytest
from blake3 import blake3

import keras_ckpt as kc
from keras_ckpt.formats import description
from keras_ckpt.model.model_state import ModelState
from support import zoo
from support.frameworks import needs_tensorflow, tf
from support.keras_files import content
from support.models import save

DATA = np.random.default_rng(0).normal(5, 3, (32, 4)).astype("float32")
registered = keras.saving.register_keras_serializable("tests")


@registered
class InStore(keras.layers.Layer):
    """Learns an array that is not a variable, and stores it with its variables."""

    mean = None

    def adapt(self, x) -> None:
        self.mean = np.asarray(x).mean(0)

    def call(self, x):
        return x if self.mean is None else x - keras.ops.convert_to_tensor(self.mean)

    def save_own_variables(self, store) -> None:
        super().save_own_variables(store)
        if self.mean is not None:
            store["mean"] = self.mean

    def load_own_variables(self, store) -> None:
        self.mean = store["mean"][:] if "mean" in store else None


@registered
class InAssets(keras.layers.Layer):
    """Learns a dict, and writes it into a file in a folder, and an empty file."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.table = {}

    def adapt(self, x) -> None:
        self.table = {"scale": 2.0, "shift": 3.0}

    def call(self, x):
        return x * self.table.get("scale", 1.0) + self.table.get("shift", 0.0)

    def save_assets(self, directory) -> None:
        pathlib.Path(directory, "deep").mkdir()
        pathlib.Path(directory, "deep", "table.json").write_text(json.dumps(dict(self.table)))
        pathlib.Path(directory, "empty").touch()

    def load_assets(self, directory) -> None:
        assert pathlib.Path(directory, "empty").exists()
        self.table = json.loads(pathlib.Path(directory, "deep", "table.json").read_text())


@registered
class Finalized(keras.layers.Layer):
    """Computes a constant from its variable after each change."""

    def build(self, shape) -> None:
        self.mean = self.add_weight(shape=(shape[-1],), name="mean", trainable=False)
        self.finalize_state()

    def adapt(self, x) -> None:
        if not self.built:
            self.build(x.shape)
        self.mean.assign(np.asarray(x).mean(0))
        self.finalize_state()

    def finalize_state(self) -> None:
        self.constant = keras.ops.convert_to_tensor(self.mean * 2)

    def call(self, x):
        return x - self.constant


@registered
class BuiltByConfig(keras.layers.Layer):
    """Learns the size of its variable, and has the size in its build config."""

    size = None

    def adapt(self, x) -> None:
        self.build_from_config({"size": 7})
        self.table.assign(np.arange(7.0))

    def build(self, shape) -> None:
        pass

    def get_build_config(self):
        return {"size": self.size}

    def build_from_config(self, config) -> None:
        self.size = config["size"]
        if self.size:
            self.table = self.add_weight(shape=(self.size,), name="table")

    def call(self, x):
        return x + (keras.ops.sum(self.table) if self.size else 0.0)


@registered
class InConfig(keras.layers.Layer):
    """Learns a value that only its config has."""

    def __init__(self, center=None, **options) -> None:
        super().__init__(**options)
        self.center = center

    def adapt(self, x) -> None:
        self.center = np.asarray(x).mean(0).tolist()

    def call(self, x):
        return x if self.center is None else x - keras.ops.convert_to_tensor(self.center)

    def get_config(self):
        return {**super().get_config(), "center": self.center}


@registered
class Parts(keras.layers.Layer):
    """Holds adaptable layers in a list and in an attribute."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.listed = [InStore(), InAssets()]
        self.normalization = keras.layers.Normalization()
        self.dense = keras.layers.Dense(3)

    def build(self, shape) -> None:
        for layer in (*self.listed, self.normalization, self.dense):
            if not layer.built:
                layer.build(shape)

    def adapt(self, x) -> None:
        for layer in (*self.listed, self.normalization):
            layer.adapt(x)

    def call(self, x):
        for layer in (*self.listed, self.normalization):
            x = layer(x)
        return self.dense(x)


LAYERS = [InStore, InAssets, Finalized, BuiltByConfig, InConfig, Parts]


def model_of(layer: keras.layers.Layer) -> keras.Model:
    """A model of a layer and a trainable head."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(layer(inputs)))
    model.compile("sgd", "mse")
    return model


def saved(path: pathlib.Path, layer: keras.layers.Layer) -> keras.Model:
    """Adapts a layer, saves a model of it, and returns the model."""
    layer.adapt(DATA)
    model = model_of(layer)
    zoo.save(model, path)
    return model


def outputs(model: keras.Model) -> np.ndarray:
    return keras.ops.convert_to_numpy(model(DATA))


@pytest.mark.parametrize("make", LAYERS)
def test_a_restored_layer_predicts_as_the_saved_layer(tmp_path, make) -> None:
    """The layer was called before it was restored."""
    model, restored = saved(tmp_path, make()), model_of(make())
    restored.predict(DATA, verbose=0)

    report = kc.restore(restored, tmp_path)

    np.testing.assert_array_equal(restored.predict(DATA, verbose=0), model.predict(DATA, verbose=0))
    np.testing.assert_array_equal(outputs(restored), outputs(model))
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras's file
@pytest.mark.parametrize("make", [make for make in LAYERS if make is not Finalized])
def test_a_restored_layer_predicts_as_a_layer_of_a_keras_file(tmp_path, make) -> None:
    """Keras's file restores each of these layers. It does not finalize the state of `Finalized`."""
    model, restored = saved(tmp_path / "run", make()), model_of(make())
    model.save(tmp_path / "model.keras")

    kc.restore(restored, tmp_path / "run")

    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(restored.predict(DATA, verbose=0), loaded.predict(DATA, verbose=0))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras's file
@needs_tensorflow  # Keras counts in int32 on other backends, a checkpoint in int64
@pytest.mark.parametrize("make", LAYERS)
def test_an_exported_layer_has_the_content_that_keras_writes(tmp_path, make) -> None:
    model = saved(tmp_path / "run", make())
    model.save(tmp_path / "theirs.keras")

    kc.export(tmp_path / "run", tmp_path / "model.keras")

    assert content(tmp_path / "model.keras") == content(tmp_path / "theirs.keras")


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras's file
def test_an_exported_feature_space_has_the_content_that_keras_writes(tmp_path) -> None:
    model = featured()
    zoo.save(model, tmp_path / "run")
    model.save(tmp_path / "theirs.keras")

    kc.export(tmp_path / "run", tmp_path / "model.keras")

    assert content(tmp_path / "model.keras") == content(tmp_path / "theirs.keras")


def featured() -> keras.Model:
    """A model of a `FeatureSpace`, whose names depend on earlier layers of the process."""
    kinds = keras.utils.FeatureSpace
    space = kinds(
        {
            "age": kinds.float_normalized(),
            "height": kinds.float_normalized(),
            "size": kinds.float_discretized(num_bins=3),
            "colour": kinds.string_categorical(),
            "shape": kinds.string_categorical(),
            "number": kinds.integer_categorical(),
        }
    )
    rows = {
        "age": np.arange(8.0),
        "height": np.arange(8.0) * 3,
        "size": np.arange(8.0) + 1,
        "colour": [*"abcabcab"],
        "shape": [*"xyzxyzxy"],
        "number": np.arange(8),
    }
    space.adapt(tf.data.Dataset.from_tensor_slices(rows))
    model = keras.Model(space.get_inputs(), keras.layers.Dense(1)(space.get_encoded_features()))
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("strict", [True, False])
def test_a_feature_space_is_restored_into_another_of_the_same_process(tmp_path, strict, recwarn) -> None:
    """Its automatic names have their number in the middle: `float_normalized_2_preprocessor`."""
    model = featured()
    zoo.save(model, tmp_path)

    report = kc.restore(again := featured(), tmp_path, strict=strict)

    assert (report.missing, report.unexpected, report.mismatched) == ((), (), {})
    np.testing.assert_array_equal(again.get_weights()[-1], model.get_weights()[-1])
    assert "model/float_normalized_1_preprocessor/mean" in report.matched
    assert [str(each.message) for each in recwarn] == []


@pytest.mark.parametrize("make", LAYERS)
def test_a_resumed_training_has_the_learned_state_of_a_layer(tmp_path, make) -> None:
    """The script of the second process does not adapt the layer."""
    layer = make()
    layer.adapt(DATA)
    first = model_of(layer)
    backup = kc.BackupAndRestore(tmp_path, delete_checkpoint=False)
    first.fit(DATA, DATA[:, :2], epochs=1, verbose=0, callbacks=[backup])

    second = model_of(make())
    second.fit(
        DATA, DATA[:, :2], epochs=1, verbose=0, callbacks=[kc.BackupAndRestore(tmp_path, delete_checkpoint=False)]
    )

    np.testing.assert_array_equal(outputs(second), outputs(first))


@pytest.mark.parametrize(
    ("make", "learned"),
    [
        (InStore, ["learned/in_store/mean"]),
        (InAssets, ["learned/in_assets/deep/table.json", "learned/in_assets/empty"]),
        (InConfig, ["learned/in_config/center"]),
        pytest.param(
            lambda: keras.layers.Discretization(num_bins=3),
            ["learned/discretization/bin_boundaries"],
            marks=needs_tensorflow,
        ),
    ],
)
def test_the_report_names_the_learned_state_of_a_layer(tmp_path, make, learned) -> None:
    """The names begin with `learned/`."""
    saved(tmp_path, make())

    report = kc.restore(model_of(make()), tmp_path)

    assert sorted(name for name in report.matched if name.startswith("learned/")) == learned


def test_plain_tensorflow_reads_a_checkpoint_with_assets(tmp_path) -> None:
    """Variables have plain names, and learned state has reserved names."""
    model = saved(tmp_path, Parts())
    (record,) = kc.CheckpointDirectory(tmp_path)
    restored = model_of(Parts())

    status = tf.train.Checkpoint(model=restored).restore(record.prefix)
    status.assert_existing_objects_matched()
    names = {name for name, _ in tf.train.list_variables(record.prefix)}

    np.testing.assert_array_equal(restored.get_weights()[-2], model.get_weights()[-2])
    assert {name.partition("/")[0] for name in names if not name.endswith("VARIABLE_VALUE")} <= {
        "_CHECKPOINTABLE_OBJECT_GRAPH", "_KERAS_CKPT_NAMES", "_KERAS_CKPT_MODEL", "_KERAS_CKPT_CONFIG",
    }  # fmt: skip


def words() -> keras.layers.Layer:
    return keras.layers.StringLookup(vocabulary=["a", "b"])


@pytest.mark.parametrize(
    ("there", "here", "message"),
    [
        (InStore, InAssets, "of class InAssets in the model, InStore in the checkpoint"),
        (
            lambda: keras.layers.Normalization(axis=-1),
            lambda: keras.layers.Normalization(axis=None),
            r"axis=.* in the model, .* in the checkpoint",
        ),
        (
            lambda: keras.layers.Normalization(mean=1.0, variance=2.0),
            lambda: keras.layers.Normalization(mean=1.0, variance=3.0),
            "the model was given another mean or variance",
        ),
    ],
)
def test_another_layer_of_the_same_name_is_a_difference(tmp_path, there, here, message) -> None:
    """Nothing is restored."""

    def made(make):
        layer = make()
        layer.name = "one"
        return layer

    zoo.save(model_of(made(there)), tmp_path)
    model = model_of(made(here))
    before = outputs(model)

    with pytest.raises(kc.MismatchError, match=message):
        kc.restore(model, tmp_path)
    np.testing.assert_array_equal(outputs(model), before)


def lookup_model(vocabulary) -> keras.Model:
    inputs = keras.Input((1,), dtype="string")
    model = keras.Model(inputs, keras.layers.StringLookup(vocabulary=vocabulary, name="words")(inputs))
    model.compile("sgd")
    return model


def test_another_vocabulary_of_the_program_is_a_difference(tmp_path) -> None:
    """A vocabulary that the program gives is not replaced. The same vocabulary is not a difference."""
    zoo.save(lookup_model(["a", "b"]), tmp_path)

    kc.restore(lookup_model(["a", "b"]), tmp_path)
    with pytest.raises(kc.MismatchError, match="the model was given another vocabulary"):
        kc.restore(lookup_model(["b", "a"]), tmp_path)


@registered
class Refuses(InAssets):
    """Raises after it has read a part of its assets."""

    def load_assets(self, directory) -> None:
        self.table["scale"] = -1.0
        super().load_assets(directory)
        raise OSError("no GPU for the index")


class TestALayerThatRaises:
    """A layer that raises in a restore leaves the model's variables and learned state as they were."""

    def model(self, last: type) -> keras.Model:
        inputs = keras.Input((4,))
        hidden = keras.layers.Dense(4, name="dense")(keras.layers.Normalization(name="first")(inputs))
        model = keras.Model(inputs, last(name="last")(InStore(name="store")(hidden)))
        model.compile("sgd", "mse")
        return model

    @pytest.fixture
    def path(self, tmp_path) -> pathlib.Path:
        model = self.model(InAssets)
        for layer in model.layers:
            if hasattr(layer, "adapt"):
                layer.adapt(DATA)
        zoo.save(model, tmp_path)
        return tmp_path

    def test_a_layer_that_raises_leaves_the_model_as_it_was(self, path) -> None:
        model = self.model(Refuses)
        before = outputs(model)
        entry = next(iter(kc.CheckpointDirectory(path)))
        rename(entry.prefix, {"InAssets": "Refuses"})

        with pytest.raises(
            kc.MismatchError, match=r"model/last refused its state in .* nothing was restored.*no GPU for the"
        ):
            kc.restore(model, entry.prefix)
        np.testing.assert_array_equal(outputs(model), before)
        assert model.get_layer("store").mean is None

    def test_a_layer_that_raises_at_a_restart_leaves_the_model_as_it_was(self, tmp_path) -> None:
        """The error of the restart names the layer and the backup."""
        model = model_of(InAssets(name="last"))
        model.get_layer("last").adapt(DATA)
        backup = kc.BackupAndRestore(tmp_path, delete_checkpoint=False)
        model.fit(DATA, DATA[:, :2], verbose=0, callbacks=[backup])
        (record,) = kc.CheckpointDirectory(tmp_path)
        rename(record.prefix, {"InAssets": "Refuses"})
        reseal(tmp_path, record)

        restarted = model_of(Refuses(name="last"))
        with pytest.raises(kc.MismatchError, match=r"model/last refused its state in"):
            restarted.fit(DATA, DATA[:, :2], verbose=0, callbacks=[kc.BackupAndRestore(tmp_path)])
        assert restarted.get_layer("last").table == {}


def entries(prefix: str) -> dict[str, np.ndarray]:
    """The values of a checkpoint by key."""
    reader = tf.train.load_checkpoint(prefix)
    return {key: reader.get_tensor(key) for key in reader.get_variable_to_dtype_map()}


def write(prefix: str, values: dict[str, np.ndarray]) -> None:
    """Writes a checkpoint as TensorFlow does."""
    for file in pathlib.Path(prefix).parent.glob(f"{pathlib.Path(prefix).name}.[id]*"):
        file.unlink()
    tensors = [tf.constant(value) for value in values.values()]
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=[*values], shape_and_slices=[""] * len(values), tensors=tensors)


def rename(prefix: str, words: dict[str, str]) -> None:
    """Replaces words in the description of a checkpoint."""
    values = entries(prefix)
    text = values[description.KEY]
    for old, new in words.items():
        text = text.replace(old.encode(), new.encode())
    write(prefix, values | {description.KEY: np.array(text, object)})
    pathlib.Path(f"{prefix}.json").unlink()


def reseal(path: pathlib.Path, record) -> None:
    """Writes the sidecar of a checkpoint whose files were changed."""
    from keras_ckpt.store.files import Folder
    from keras_ckpt.store.record import CheckpointFile, encode

    with Folder(path) as folder:
        files = tuple(CheckpointFile(file.name, *folder.digest(file.name)) for file in record.files)
        folder.replace(f"{record.name}.json", encode(msgspec.structs.replace(record, files=files)))


ASSET = f"{description.KEY}/assets/0"
VALUE = f"{description.KEY}/values/0"


def described(values: dict, **changes) -> dict:
    """The entries with the only asset, or the whole description, changed."""
    text = json.loads(values[description.KEY])
    (learned,) = text["objects"].values()
    if "path" in changes:
        learned["assets"] = {changes["path"]: next(iter(learned["assets"].values()))}
    elif "index" in changes:
        next(iter(learned["assets"].values()))["index"] = changes["index"]
    else:
        text |= changes
    return values | {description.KEY: np.array(json.dumps(text).encode(), object)}


HARMS = {
    "cut": lambda values: values | {ASSET: np.array(values[ASSET][:-1], object)},
    "changed": lambda values: values | {ASSET: np.array(b"?" + values[ASSET][1:], object)},
    "too long": lambda values: values | {ASSET: np.array(values[ASSET] * 1000, object)},
    "missing": lambda values: {key: value for key, value in values.items() if key != ASSET},
    "of another type": lambda values: values | {ASSET: np.zeros(3)},
    "with an index that is not there": lambda values: described(values, index=7),
    "with a negative index": lambda values: described(values, index=-1),
    "with a path that leaves its place": lambda values: described(values, path="../../evil"),
    "with an absolute path": lambda values: described(values, path="/tmp/evil"),
    "with a path through itself": lambda values: described(values, path="a/../../evil"),
    "with an empty path": lambda values: described(values, path=""),
    "with a path of zero bytes": lambda values: described(values, path="a\0b"),
    "with a description that is cut": lambda values: values | {
        description.KEY: np.array(values[description.KEY][:-9], object)
    },
    "with a description of another form": lambda values: described(values, objects=[1]),
    "with a description that is no text": lambda values: values | {description.KEY: np.array(b"\xff\xfe", object)},
    "with a description without a version": lambda values: described(values, version="one"),
}  # fmt: skip


class OneAsset(InAssets):
    """Writes one file."""

    def save_assets(self, directory) -> None:
        pathlib.Path(directory, "table.json").write_text(json.dumps(dict(self.table)))

    def load_assets(self, directory) -> None:
        self.table = json.loads(pathlib.Path(directory, "table.json").read_text())


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_changed_asset_or_description_is_damaged(tmp_path, harm) -> None:
    """The model does not change, and no file is written outside of the layer's directory."""
    saved(tmp_path / "run", OneAsset(name="one"))
    prefix = str(tmp_path / "plain")
    (record,) = kc.CheckpointDirectory(tmp_path / "run")
    write(prefix, harm(entries(record.prefix)))
    model = model_of(OneAsset(name="one"))
    files = set(tmp_path.rglob("*"))

    with pytest.raises(kc.DamagedCheckpointError):
        kc.restore(model, prefix)
    assert model.get_layer("one").table == {}
    assert set(tmp_path.rglob("*")) == files
    assert not os.path.exists("/tmp/evil")


def test_a_checkpoint_that_lacks_a_described_array_is_damaged(tmp_path) -> None:
    """The description names an array that the index does not have."""
    saved(tmp_path / "run", InStore(name="one"))
    prefix = str(tmp_path / "plain")
    (record,) = kc.CheckpointDirectory(tmp_path / "run")
    write(prefix, {key: value for key, value in entries(record.prefix).items() if key != VALUE})

    with pytest.raises(kc.DamagedCheckpointError):
        kc.restore(model_of(InStore(name="one")), prefix)


def test_a_description_of_a_newer_format_is_refused(tmp_path) -> None:
    """The error advises to upgrade."""
    saved(tmp_path / "run", OneAsset(name="one"))
    prefix = str(tmp_path / "plain")
    (record,) = kc.CheckpointDirectory(tmp_path / "run")
    write(prefix, described(entries(record.prefix), version=2))

    with pytest.raises(kc.FormatVersionError, match="upgrade keras_ckpt"):
        kc.restore(model_of(OneAsset(name="one")), prefix)


def older(path: pathlib.Path, model: keras.Model) -> str:
    """Writes a checkpoint without a description, as an older version of this package did, and returns its prefix."""
    prefix = str(path / "older")
    found = entries(save(model, path / "run").prefix)
    values = {key: value for key, value in found.items() if not key.startswith(description.KEY)}
    write(prefix, values)
    return prefix


class TestACheckpointOfAnOlderVersion:
    """A checkpoint of an older version has variables, and no other learned state."""

    @pytest.mark.parametrize(
        "make",
        [
            InStore,
            InAssets,
            pytest.param(lambda **options: keras.layers.Discretization(num_bins=2, **options), marks=needs_tensorflow),
        ],
    )
    def test_an_older_checkpoint_is_restored_with_a_warning_that_names_the_layers(self, tmp_path, make) -> None:
        layer = make(name="one")
        layer.adapt(DATA)
        prefix = older(tmp_path, model_of(layer))
        restored = make(name="one")
        restored.adapt(DATA)

        with pytest.warns(UserWarning, match=r"written by an older version of keras_ckpt. .* they were: one\.") as seen:
            kc.restore(model_of(restored), prefix)
        assert [each.filename for each in seen] == [__file__]

    def test_a_restore_of_an_older_checkpoint_calls_load_own_variables(self, tmp_path) -> None:
        """`Normalization` computes constants from its variables when it loads them."""
        layer = keras.layers.Normalization()
        layer.adapt(DATA)
        model, restored = model_of(layer), model_of(keras.layers.Normalization())

        kc.restore(restored, older(tmp_path, model))

        np.testing.assert_array_equal(outputs(restored), outputs(model))

    def test_a_layer_that_raises_for_an_older_checkpoint_leaves_the_model_as_it_was(self, tmp_path) -> None:
        class Reads(keras.layers.Dense):
            def load_own_variables(self, store) -> None:
                raise ValueError("not mine")

        prefix = older(tmp_path, model_of(keras.layers.Dense(2, name="one")))
        model = model_of(Reads(2, name="one"))
        before = outputs(model)

        with pytest.raises(kc.MismatchError, match=r"model/one refused its state in .*ValueError: not mine"):
            kc.restore(model, prefix)
        np.testing.assert_array_equal(outputs(model), before)


def test_an_unchanged_vocabulary_is_collected_once(tmp_path, monkeypatch) -> None:
    """A later save of a layer that was not adapted again does not call `save_assets`."""
    layer = keras.layers.StringLookup(vocabulary=[str(number) for number in range(1000)])
    model = keras.Sequential([keras.Input((1,), dtype="string"), layer])
    state = ModelState(model)
    first = state.snapshot()
    monkeypatch.setattr(keras.layers.StringLookup, "save_assets", lambda *arguments: pytest.fail("collected again"))

    state.snapshot()

    assert first is not None


@pytest.mark.parametrize(
    "words",
    [["x\r", "y"], ["a\u2028b", "c"], ["p\x0bq", "r"], ["a", "b", ""], ["a\nb", "c"], ["ä", "日本"], ["1", "01"]],
)
def test_a_vocabulary_may_have_any_words(tmp_path, words) -> None:
    """Words may have line breaks, which Keras's own text file cannot hold."""
    layer, fresh = keras.layers.StringLookup(), keras.layers.StringLookup()
    layer.adapt(np.array([[word] for word in words]))
    zoo.save(keras.Sequential([keras.Input((1,), dtype="string"), layer]), tmp_path)

    kc.restore(keras.Sequential([keras.Input((1,), dtype="string"), fresh]), tmp_path)

    np.testing.assert_array_equal(fresh(tf.constant(words)), layer(tf.constant(words)))


def test_a_vocabulary_of_another_encoding_is_restored(tmp_path) -> None:
    """The bytes of the words differ from UTF-8."""
    words = tf.constant([["é".encode("latin-1")], [b"b"]])
    layer, fresh = (keras.layers.StringLookup(encoding="latin-1") for _ in "12")
    layer.adapt(words)
    zoo.save(keras.Sequential([keras.Input((1,), dtype="string"), layer]), tmp_path)

    kc.restore(keras.Sequential([keras.Input((1,), dtype="string"), fresh]), tmp_path)

    np.testing.assert_array_equal(fresh(words), layer(words))


@pytest.mark.parametrize("harm", ["path", "config"])
def test_a_forged_description_of_a_lookup_is_damaged(tmp_path, harm) -> None:
    """The path of an asset leaves its folder, or a config is not an object. The vocabulary stays as it was."""
    layer = keras.layers.StringLookup(name="words")
    layer.adapt(np.array([["a"]]))
    zoo.save(keras.Sequential([keras.Input((1,), dtype="string"), layer]), tmp_path / "run")
    prefix = str(tmp_path / "plain")
    (record,) = kc.CheckpointDirectory(tmp_path / "run")
    values = entries(record.prefix)
    text = json.loads(values[description.KEY])
    (learned,) = (each for each in text["objects"].values() if each["class"] == "StringLookup")
    if harm == "path":
        learned["assets"] = {"../../evil": next(iter(learned["assets"].values()))}
    else:
        learned["config"] = "{no"
    write(prefix, values | {description.KEY: np.array(json.dumps(text).encode(), object)})
    fresh = keras.layers.StringLookup(name="words")

    with pytest.raises(kc.DamagedCheckpointError):
        kc.restore(keras.Sequential([keras.Input((1,), dtype="string"), fresh]), prefix)
    assert fresh.get_vocabulary() == ["[UNK]"]


def looked_up(path: pathlib.Path, change) -> str:
    """Saves a lookup that learned `b` and `a`, changes the path and bytes of its asset, and returns the prefix."""
    layer = keras.layers.StringLookup(name="words")
    layer.adapt(np.array([["b"], ["b"], ["a"]]))
    zoo.save(keras.Sequential([keras.Input((1,), dtype="string"), layer]), path / "run")
    (record,) = kc.CheckpointDirectory(path / "run")
    values = entries(record.prefix)
    text = json.loads(values[description.KEY])
    (learned,) = text["objects"].values()
    ((name, asset),) = learned["assets"].items()
    name, data = change(name, values[ASSET])
    digest = f"blake3:{blake3(data).hexdigest()}"
    learned["assets"] = {name: asset | {"size": len(data), "digest": digest}}
    text = json.dumps(text).encode()
    write(str(path / "plain"), values | {ASSET: np.array(data, object), description.KEY: np.array(text, object)})
    return str(path / "plain")


def test_a_vocabulary_of_an_older_checkpoint_is_restored(tmp_path) -> None:
    """Older checkpoints have the vocabulary as the text that Keras writes."""
    prefix = looked_up(tmp_path, lambda name, data: ("vocabulary.txt", "\n".join(json.loads(data)).encode()))
    fresh = keras.layers.StringLookup(name="words")

    kc.restore(keras.Sequential([keras.Input((1,), dtype="string"), fresh]), prefix)

    assert fresh.get_vocabulary() == ["[UNK]", "b", "a"]


@pytest.mark.parametrize(
    "change",
    [
        lambda name, data: ("table.json", data),
        lambda name, data: (name, data[:-1]),
        lambda name, data: (name, b'{"a": 1}'),
        lambda name, data: (name, b"[1, 2]"),
        lambda name, data: ("vocabulary.txt", b"\xff\xfe"),
    ],
)
def test_a_lookup_without_a_vocabulary_is_damaged(tmp_path, change) -> None:
    """Its file belongs to another layer, is cut, or has no words."""
    fresh = keras.layers.StringLookup(name="words")

    with pytest.raises(kc.DamagedCheckpointError):
        kc.restore(keras.Sequential([keras.Input((1,), dtype="string"), fresh]), looked_up(tmp_path, change))
    assert fresh.get_vocabulary() == ["[UNK]"]


class HoldsANumber(InStore):
    """Holds an array without dimensions."""

    number = None

    def build(self, shape) -> None:
        self.number = np.array(3.0)


def test_a_layer_may_hold_an_array_without_dimensions(tmp_path) -> None:
    """A restore copies the arrays of a layer, to undo the restore if another layer refuses."""
    model, restored = saved(tmp_path, HoldsANumber()), model_of(HoldsANumber())

    kc.restore(restored, tmp_path)

    np.testing.assert_array_equal(outputs(restored), outputs(model))


@registered
class Multiplied(keras.layers.Layer):
    """Has a factor in its build config."""

    factor = 1

    def build(self, shape) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def get_build_config(self):
        return {"factor": self.factor, "input_shape": (None, 4)}

    def build_from_config(self, config) -> None:
        self.factor = config["factor"]
        if not self.built:
            self.build(config["input_shape"])

    def call(self, x):
        return x * self.scale * self.factor


def test_a_build_config_that_differs_is_restored(tmp_path) -> None:
    """No variable is missing in the model."""
    layer, fresh = Multiplied(), Multiplied()
    model, restored = model_of(layer), model_of(fresh)
    layer.factor = 7
    zoo.save(model, tmp_path)

    kc.restore(restored, tmp_path)

    np.testing.assert_array_equal(outputs(restored), outputs(model))


class Spoils(keras.layers.Layer):
    """Changes its state while it loads, and raises."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.nested = {"a": {"b": [1, 2]}, "c": collections.deque([3])}

    def build(self, shape) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def load_own_variables(self, store) -> None:
        self.scale.assign(self.scale * 0)
        self.nested["a"]["b"].append(9)
        self.nested["c"].clear()
        raise RuntimeError("not mine")

    def call(self, x):
        return x * self.scale


def test_a_layer_that_raises_while_it_loads_variables_is_reset(tmp_path) -> None:
    """The variables and the contents of nested containers are as they were."""
    zoo.save(model_of(Spoils(name="one")), tmp_path)
    layer = Spoils(name="one")
    model = model_of(layer)
    before = model.get_weights()

    with pytest.raises(kc.MismatchError, match=r"model/one refused its state in .*RuntimeError: not mine"):
        kc.restore(model, tmp_path)
    np.testing.assert_equal(model.get_weights(), before)
    assert layer.nested == {"a": {"b": [1, 2]}, "c": collections.deque([3])}


def test_a_model_without_variables_gets_its_vocabulary(tmp_path) -> None:
    """The vocabulary is the model's only state."""
    layer, fresh = keras.layers.StringLookup(), keras.layers.StringLookup()
    layer.adapt(np.array([["a"], ["b"]]))
    zoo.save(keras.Sequential([keras.Input((1,), dtype="string"), layer]), tmp_path)

    kc.restore(keras.Sequential([keras.Input((1,), dtype="string"), fresh]), tmp_path)

    assert fresh.get_vocabulary() == layer.get_vocabulary()


def test_each_save_has_the_present_vocabulary_of_a_layer(tmp_path) -> None:
    """A layer that is adapted again is collected again."""
    layer = keras.layers.StringLookup()
    model = keras.Sequential([keras.Input((1,), dtype="string"), layer])
    model.compile("sgd")
    for number, letters in enumerate((["a"], ["b", "c"])):
        layer.adapt(tf.constant([[letter] for letter in letters]))
        zoo.save(model, tmp_path / str(number))

    for number, words in enumerate((["[UNK]", "a"], ["[UNK]", "b", "c"])):
        fresh = keras.layers.StringLookup()
        restored = keras.Sequential([keras.Input((1,), dtype="string"), fresh])
        kc.restore(restored, tmp_path / str(number))
        assert sorted(fresh.get_vocabulary()) == sorted(words)


def test_a_warning_at_the_first_save_names_a_layer_that_cannot_save_its_state(tmp_path) -> None:
    """The training continues, and the checkpoint is saved."""

    class Fails(InStore):
        def save_own_variables(self, store) -> None:
            raise RuntimeError("no space in the cache")

    model = model_of(Fails(name="broken"))
    with pytest.warns(UserWarning, match=r"do not have this state of it: .*broken.*no space in the cache"):
        model.fit(DATA, DATA[:, :2], verbose=0, callbacks=[kc.ModelCheckpoint(tmp_path)])
    assert re.search(r"ckpt-1\b", str(kc.CheckpointDirectory(tmp_path).latest()))
