"""`export` to Keras's own files: their content is the content that Keras writes, without Keras."""

from __future__ import annotations

import pathlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from blake3 import blake3

import keras_ckpt as kc
from keras_ckpt.formats import config, description
from keras_ckpt.formats.bundle_writer import array_value, string_value, write_bundle
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.store.files import Folder
from support import keras_zoo, zoo
from support.keras_files import content
from support.models import X, dense_model, fit, save

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

NAMES = ["model.keras", "model.weights.h5"]
LEARNED = [name for name in keras_zoo.MODELS if any(part in name for part in ("Lookup", "Text", "save_assets"))]
"""The models with files of layers, which a `.weights.h5` file lacks."""


def by_keras(model: keras.Model, path: pathlib.Path) -> pathlib.Path:
    """A file that Keras writes."""
    (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
    return path


def assert_same(model: keras.Model, other: keras.Model) -> None:
    """Two models have equal weights and optimizers. Files of Keras lack the states of random generators."""
    for mine, theirs in ((model.weights, other.weights), (model.optimizer.variables, other.optimizer.variables)):
        assert [each.numpy().tobytes() for each in mine] == [each.numpy().tobytes() for each in theirs]


def sequence(*layers: keras.layers.Layer, **options) -> keras.Model:
    model = keras.Sequential([keras.Input((4,), **options), *layers])
    model.compile("adam", "mse", run_eagerly=True)
    return model


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", [name for name in keras_zoo.MODELS if name != "low-rank"])
def test_an_exported_model_has_the_content_that_keras_writes(tmp_path, name) -> None:
    """Groups, names, types, values, assets and the config are equal."""
    model = keras_zoo.made(name)
    record = save(model, tmp_path / "run")

    kc.export(record, tmp_path / "model.keras")

    theirs = by_keras(model, tmp_path / "theirs.keras")
    assert content(tmp_path / "model.keras") == content(theirs)


@pytest.mark.sample(6)
@pytest.mark.parametrize("name", [name for name in zoo.LAYERS if "weighed" not in name])
def test_each_layer_of_keras_is_exported_with_the_content_that_keras_writes(tmp_path, name) -> None:
    """Or refused, with the way to a file. No difference is silent."""
    model = zoo.model_of(name)
    zoo.save(model, tmp_path / "run")
    if refused := "has no get_config" * ("Attention" in name) or "its layer computes" * ("low-rank" in name):
        with pytest.raises(ValueError, match=refused):
            kc.export(tmp_path / "run", tmp_path / "model.keras")
        return

    kc.export(tmp_path / "run", tmp_path / "model.keras")

    theirs = by_keras(model, tmp_path / "theirs.keras")
    assert content(tmp_path / "model.keras") == content(theirs)


@pytest.mark.sample(3)
@pytest.mark.parametrize("optimizer", keras_zoo.OPTIMIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_an_export_has_the_state_of_each_optimizer(tmp_path, optimizer, name) -> None:
    """A model that was not compiled is not compiled."""
    model = keras_zoo.made("dense", optimizer)
    record = save(model, tmp_path / "run")

    kc.export(record, tmp_path / name)

    theirs = by_keras(model, tmp_path / f"theirs.{name.partition('.')[2]}")
    assert content(tmp_path / name) == content(theirs)


def test_keras_loads_an_exported_model_and_its_optimizer(tmp_path) -> None:
    """The learning rate is that of the checkpoint, although a callback changed it after the config was made."""
    model = dense_model()
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: 0.5 / (epoch + 1))
    fit(model, rates, kc.ModelCheckpoint(tmp_path / "run"), epochs=3)

    kc.export(tmp_path / "run", tmp_path / "model.keras")

    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(loaded, model)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_keras_loads_exported_weights(tmp_path) -> None:
    """The optimizer is in the file, as in a file of Keras."""
    model, other = dense_model(), dense_model()
    fit(model, kc.ModelCheckpoint(tmp_path / "run"))
    fit(other)

    kc.export(tmp_path / "run", tmp_path / "model.weights.h5")

    other.load_weights(tmp_path / "model.weights.h5")
    assert_same(other, model)


@pytest.mark.parametrize(
    ("source", "target"),
    [("best.keras", "model.keras"), ("best.keras", "model.weights.h5"), ("best.weights.h5", "model.weights.h5")],
)
@pytest.mark.parametrize("ours", [True, False], ids=["keras_ckpt", "Keras"])
def test_a_file_of_keras_is_exported(tmp_path, source, target, ours) -> None:
    model, other = dense_model(), dense_model()
    path = tmp_path / source
    if ours:
        fit(model, kc.ModelCheckpoint(path, save_weights_only="weights" in source))
    else:
        fit(model)
        by_keras(model, path)

    kc.export(path, tmp_path / target)

    if target == "model.keras":
        other = keras.models.load_model(tmp_path / target)
    else:
        fit(other)
        other.load_weights(tmp_path / target)
    assert_same(other, model)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", LEARNED)
def test_a_file_of_keras_is_exported_with_the_files_of_layers(tmp_path, name) -> None:
    path = by_keras(keras_zoo.made(name), tmp_path / "theirs.keras")

    kc.export(path, tmp_path / "model.keras")

    ours, theirs = content(tmp_path / "model.keras"), content(path)
    files = {name for name in theirs if name.startswith("assets/")}
    assert files
    assert {name: ours.get(name) for name in files} == {name: theirs[name] for name in files}


@pytest.mark.parametrize("source", ["run", "best.keras"])
def test_weights_only_exports_a_model_that_is_not_compiled(tmp_path, source) -> None:
    model = dense_model()
    fit(model, kc.ModelCheckpoint(tmp_path / source))

    kc.export(tmp_path / source, tmp_path / "model.keras", weights_only=True)

    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert not loaded.compiled
    assert all(map(np.array_equal, loaded.get_weights(), model.get_weights()))
    assert not any("optimizer" in name for name in kc.load_variables(tmp_path / "model.keras"))


def test_a_checkpoint_of_weights_is_exported_as_a_model_that_is_not_compiled(tmp_path) -> None:
    model = dense_model()
    fit(model, kc.ModelCheckpoint(tmp_path / "run", save_weights_only=True))

    kc.export(tmp_path / "run", tmp_path / "model.keras")

    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert not loaded.compiled
    assert all(map(np.array_equal, loaded.get_weights(), model.get_weights()))


def test_a_compiled_model_in_a_compiled_model_is_exported(tmp_path) -> None:
    inputs, inner = keras.Input((4,)), dense_model()
    fit(inner)
    model = keras.Model(inputs, keras.layers.Dense(1)(inner(inputs)))
    model.compile("sgd", "mse", run_eagerly=True)
    fit(model, kc.ModelCheckpoint(tmp_path / "run"))

    kc.export(tmp_path / "run", tmp_path / "model.keras")

    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(loaded, model)
    assert_same(loaded.layers[1], inner)


def test_a_value_that_a_layer_computes_is_refused_with_the_way_through_the_model(tmp_path) -> None:
    """Keras merges low-rank updates into the kernels when it saves."""
    record = save(keras_zoo.made("low-rank"), tmp_path / "run")

    with pytest.raises(ValueError, match=r"computes when Keras saves it, .*keras_ckpt\.load_model\(.*\)\.save\("):
        kc.export(record, tmp_path / "model.keras")

    assert not (tmp_path / "model.keras").exists()
    kc.load_model(record).save(tmp_path / "model.keras")


@pytest.mark.parametrize("words", [["one", "two\nthree"], ["one", "last\r"]])
def test_a_vocabulary_that_the_text_file_of_keras_cannot_hold_is_refused(tmp_path, words) -> None:
    """Keras would read other words."""
    lookup = keras.layers.StringLookup(output_mode="multi_hot")
    lookup.adapt(np.array([[word] for word in words]))
    model = keras.Sequential([keras.Input((1,), dtype="string"), lookup, keras.layers.Dense(2)])
    record = save(model, tmp_path / "run")

    with pytest.raises(ValueError, match=r"cannot hold the vocabulary of layers/string_lookup .* line break"):
        kc.export(record, tmp_path / "model.keras")


def test_a_layer_that_was_adapted_after_the_first_save_is_refused(tmp_path) -> None:
    """The checkpoint has one config for all saves, and this layer learns into its config alone."""
    layer = keras.layers.Discretization(num_bins=3)
    layer.adapt(np.arange(12.0))
    model = sequence(layer, keras.layers.Dense(1))

    class Adapts(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None) -> None:
            layer.adapt(np.arange(12.0) ** (epoch + 1))

    fit(model, Adapts(), kc.ModelCheckpoint(tmp_path / "run"), epochs=2)
    first, second = kc.CheckpointDirectory(tmp_path / "run")

    kc.export(first, tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"another config of layers/discretization .* adapted after the first save"):
        kc.export(second, tmp_path / "model.keras")

    assert keras.models.load_model(tmp_path / "model.keras").layers[0].bin_boundaries == pytest.approx([3, 7], abs=2)


def test_a_file_of_weights_lacks_vocabularies_with_a_warning(tmp_path) -> None:
    """As a file that Keras writes. Keras says nothing."""
    model = keras_zoo.made("StringLookup")
    record = save(model, tmp_path / "run")

    with pytest.warns(UserWarning, match=r"lacks .* a vocabulary: layers/string_lookup/vocabulary\.txt"):
        kc.export(record, tmp_path / "model.weights.h5")

    theirs = by_keras(model, tmp_path / "theirs.weights.h5")
    assert content(tmp_path / "model.weights.h5") == content(theirs)


def test_a_model_without_a_config_is_exported_as_weights_alone(tmp_path) -> None:
    model, other = (sequence(keras.layers.Dense(1), keras.layers.Lambda(lambda x: x + 1)) for _ in range(2))
    record = save(model, tmp_path / "run")

    with pytest.raises(ValueError, match=r"has no config .* it contains a lambda.* Export to \.weights\.h5"):
        kc.export(record, tmp_path / "model.keras")
    kc.export(record, tmp_path / "model.weights.h5")

    other.load_weights(tmp_path / "model.weights.h5")
    assert all(map(np.array_equal, other.get_weights(), model.get_weights()))


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("theirs.weights.h5", r"has no config of its model, because it is a file of weights"),
        ("theirs.h5", r"legacy format.*keras\.models\.load_model\(.*\)\.save\("),
        ("theirs-1", r"does not tell the places of its values .* TensorFlow or an older version"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_of_a_model_is_refused(tmp_path, source, message) -> None:
    model = dense_model()
    if source == "theirs-1":
        tf.train.Checkpoint(model=model).save(str(tmp_path / "theirs"))
    else:
        by_keras(model, tmp_path / source)

    with pytest.raises(ValueError, match=message):
        kc.export(tmp_path / source, tmp_path / "model.keras")

    assert not (tmp_path / "model.keras").exists()


def forged(path: pathlib.Path, places: dict[str, config.Place]) -> pathlib.Path:
    """A checkpoint of one value and one asset, with these places in its config."""
    digest = f"blake3:{blake3(b'asset').hexdigest()}"
    learned = description.Learned("Mine", assets={"file": description.Asset(0, 5, digest)})
    texts = {
        config.KEY: config.encode(config.Config({}, places=places)),
        description.KEY: description.encode(description.Description(objects={"model/mine": learned})),
        description.asset_key(0): b"asset",
    }
    values = {key.encode(): string_value([text], ()) for key, text in texts.items()}
    with Folder(path, create=True) as folder:
        write_bundle(folder, "ckpt-1", [{**values, b"model/x/.ATTRIBUTES/VARIABLE_VALUE": array_value(np.ones(3))}])
    return path


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a/../../b": config.Place(learned="model/mine")}, "unsafe path: 'a/../../b/file'"),
        ({"a": config.Place(learned="model/other")}, "has no state of a, which its config names"),
        ({"a": config.Place(variables={"0": "model/y"})}, "does not have model/y, which its config names"),
    ],
)
def test_a_checkpoint_whose_places_do_not_fit_its_values_is_damaged(tmp_path, places, message) -> None:
    run = forged(tmp_path / "run", places)

    with pytest.raises(kc.DamagedCheckpointError, match=re.escape(message)):
        kc.export(run, tmp_path / "model.keras")

    assert not (tmp_path / "model.keras").exists()


def test_the_places_take_little_room_in_a_checkpoint(tmp_path) -> None:
    """Every checkpoint has the paths of its values in a file of Keras."""
    model = sequence(*(keras.layers.Dense(4) for _ in range(30)))
    with_places = ModelState(model).config()()

    without = config.Config(with_places.config, with_places.paths, keras=with_places.keras)
    assert len(with_places.places) == 32
    assert len(config.encode(with_places)) - len(config.encode(without)) < 500
