"""`load_variables`: names to NumPy arrays, read and checked when they are asked for."""

import io
import os
import pathlib

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
from keras_ckpt.formats.keras_writer import members_of
from keras_ckpt.model.naming import named_variables
from support import keras_zoo
from support.bundles import NUMBERS, content, write
from support.models import dense_model, fit, save


@pytest.fixture
def model() -> keras.Model:
    model = dense_model()
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture
def record(model, tmp_path) -> kc.CheckpointRecord:
    return save(model, tmp_path / "run")


def ways(record: kc.CheckpointRecord) -> dict[str, object]:
    return {
        "record": record,
        "directory": kc.CheckpointDirectory(record.directory),
        "path of a directory": record.directory,
        "path": pathlib.Path(record.prefix),
        "prefix": record.prefix,
        "file": f"{record.prefix}.index",
    }


def damage(path: str, place: int) -> None:
    """Changes a bit of a file in its place."""
    with open(path, "r+b") as file:
        file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
        byte = file.read(1)[0] ^ 16
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte]))


@pytest.mark.parametrize("way", ["record", "directory", "path of a directory", "path", "prefix", "file"])
def test_each_variable_is_loaded_by_its_name(model, record, way) -> None:
    found = kc.load_variables(ways(record)[way])

    expected = named_variables(model)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], variable.numpy()) for name, variable in expected.items())
    assert all(found[name].dtype == variable.numpy().dtype for name, variable in expected.items())


@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
def test_each_type_is_loaded_bit_for_bit(tmp_path, dtype) -> None:
    """Types that NumPy lacks are those of `ml_dtypes`."""
    between = tf.int8 if dtype.name.endswith("int4") else tf.float32
    value = tf.cast(tf.cast(tf.constant([[0, 1], [2, 3]]), between), dtype)
    write(tmp_path, {"value": value}, "ckpt-1")

    found = kc.load_variables(tmp_path / "ckpt-1")["value"]

    assert found.dtype == getattr(ml_dtypes, dtype.name, dtype.as_numpy_dtype)
    assert (found.shape, found.tobytes()) == ((2, 2), content(value))


def test_strings_are_loaded_as_bytes(tmp_path) -> None:
    write(tmp_path, {"words": tf.constant(["some", "words"])}, "ckpt-1")

    assert kc.load_variables(tmp_path)["words"].tolist() == [b"some", b"words"]


def test_a_checkpoint_of_tensorflow_has_the_names_of_its_keys(tmp_path, model) -> None:
    """Without the suffix, without the graph of objects, without the counter of saves."""
    tf.train.Checkpoint(net=model).save(str(tmp_path / "theirs"))

    found = kc.load_variables(tmp_path)

    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    keys = {key for key, _ in tf.train.list_variables(str(tmp_path)) if key.endswith(suffix)}
    assert found.keys() == {key.removesuffix(suffix) for key in keys} - {"save_counter"}
    for name, value in found.items():
        np.testing.assert_array_equal(value, tf.train.load_variable(str(tmp_path), f"{name}{suffix}"))


def test_an_array_is_the_callers_own(record) -> None:
    """It may be changed and kept; the next look reads the file again."""
    found = kc.load_variables(record)
    first = found["model/dense/kernel"]
    before = first.copy()

    first[:] = 7

    np.testing.assert_array_equal(found["model/dense/kernel"], before)
    del found
    assert (first == 7).all()


def test_no_file_stays_open(record) -> None:
    """So many checkpoints can be loaded and compared."""
    before = set(os.listdir("/proc/self/fd"))

    found = kc.load_variables(record)
    _ = found["model/dense/kernel"]

    assert set(os.listdir("/proc/self/fd")) <= before


def test_an_unknown_name_is_a_key_error(record) -> None:
    found = kc.load_variables(record)

    with pytest.raises(KeyError, match="model/other"):
        _ = found["model/other"]
    assert "model/other" not in found
    assert "model/dense/kernel" in found


def test_the_mapping_shows_names_types_and_shapes(record) -> None:
    shown = repr(kc.load_variables(record))

    assert shown.startswith(f"variables of {record.prefix}:\n")
    assert "\n  model/dense/kernel: float32 (4, 3)\n" in shown


def test_a_long_mapping_is_shown_in_part(tmp_path) -> None:
    write(tmp_path, {f"{number:02}": tf.constant(number) for number in range(25)}, "ckpt-1")

    lines = repr(kc.load_variables(tmp_path)).splitlines()

    assert (len(lines), lines[-1]) == (22, "  and 5 more")


def test_a_changed_value_is_refused_when_it_is_read(tmp_path) -> None:
    """The checksum in the index is of this value alone, so others can be read."""
    data, _ = write(tmp_path, {"first": tf.ones(100), "second": tf.zeros(100)}, "ckpt-1")
    damage(tmp_path / data, 10)

    found = kc.load_variables(tmp_path)

    assert not found["second"].any()
    with pytest.raises(kc.DamagedCheckpointError, match=r"ckpt-1 cannot be trusted: .*checksum .* of first"):
        _ = found["first"]


def test_an_index_with_another_digest_is_refused_at_once(record) -> None:
    """A changed index could name other checksums."""
    other = save(dense_model(), pathlib.Path(record.directory).parent / "other")
    index = pathlib.Path(f"{record.prefix}.index")
    replaced = pathlib.Path(f"{other.prefix}.index").read_bytes()
    size = index.stat().st_size
    index.write_bytes(replaced[:size].ljust(size, b"\0"))

    with pytest.raises(kc.DamagedCheckpointError, match=r"its digest does not match"):
        kc.load_variables(record)


def test_a_directory_whose_newest_is_damaged_gives_the_one_before(model, tmp_path) -> None:
    """With a warning, as `restore` does."""
    first, second = save(model, tmp_path, step=1), save(model, tmp_path, step=2)
    damage(f"{second.prefix}.index", 10)

    with pytest.warns(UserWarning, match=r"ckpt-2 cannot be trusted: .* Going back to ckpt-1"):
        found = kc.load_variables(tmp_path)

    assert first.prefix in repr(found)


@pytest.mark.parametrize("name", ["", "ckpt-7", "missing/ckpt-1"])
def test_a_missing_checkpoint_is_not_found(tmp_path, name) -> None:
    with pytest.raises(kc.CheckpointNotFoundError, match="There is no checkpoint"):
        kc.load_variables(tmp_path / name)


@pytest.mark.parametrize("wrong", [None, 3, ""])
def test_an_argument_that_names_no_checkpoint_is_a_type_error(wrong) -> None:
    with pytest.raises(TypeError, match="Expected a record, a directory, or a path"):
        kc.load_variables(wrong)


def test_a_value_of_a_checkpoint_that_was_pruned_is_not_found(record) -> None:
    found = kc.load_variables(record)
    kept = found["model/dense/kernel"]

    kc.CheckpointDirectory(record.directory).clear()

    with pytest.raises(kc.CheckpointNotFoundError, match="was removed or saved again since it was loaded"):
        _ = found["model/dense/bias"]
    assert kept.shape == (4, 3)


def test_a_value_of_a_checkpoint_that_was_saved_again_is_not_found(record) -> None:
    """Values of two saves are never mixed."""
    found = kc.load_variables(record)

    save(dense_model(), record.directory, step=record.step)

    with pytest.raises(kc.CheckpointNotFoundError, match="was removed or saved again since it was loaded"):
        _ = found["model/dense/bias"]


def in_hdf5(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The values in a file of Keras by path, as h5py reads them."""
    data = path.read_bytes()
    found: dict[str, np.ndarray] = {}
    with h5py.File(io.BytesIO(members_of(data)["model.weights.h5"] if path.suffix == ".keras" else data)) as file:
        file.visititems(lambda name, each: found.update({name: each[()]}) if isinstance(each, h5py.Dataset) else None)
    return found


def saved_by_keras(model: keras.Model, path: pathlib.Path) -> pathlib.Path:
    (model.save_weights if path.name.endswith(".weights.h5") else model.save)(path)
    return path


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.filterwarnings("ignore:Keras cannot load:UserWarning")
@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5", "best.h5"])
@pytest.mark.parametrize("ours", [True, False], ids=["keras_ckpt", "Keras"])
def test_each_value_of_a_file_of_keras_is_loaded_by_its_path(model, tmp_path, name, ours) -> None:
    """The whole file is compared with its digest, if it has a record."""
    path = tmp_path / name
    if ours:
        fit(model, kc.ModelCheckpoint(path, save_weights_only="weights" in name))
    else:
        saved_by_keras(model, path)

    found = kc.load_variables(path)

    expected = in_hdf5(path)
    assert found.keys() == expected.keys()
    assert all((found[name].dtype, found[name].shape) == (expected[name].dtype, expected[name].shape) for name in found)
    assert all(found[name].tobytes() == expected[name].tobytes() for name in found)
    kernel = next(each for each in found.values() if each.shape == (4, 3))
    np.testing.assert_array_equal(kernel, model.layers[0].kernel)


def test_a_file_of_keras_may_have_values_of_bfloat16(tmp_path) -> None:
    model = keras_zoo.made("bfloat16")

    found = kc.load_variables(saved_by_keras(model, tmp_path / "best.keras"))["layers/dense/vars/0"]

    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found, model.layers[0].kernel)


def test_a_file_of_keras_that_differs_from_its_record_is_refused_at_once(model, tmp_path) -> None:
    path = tmp_path / "best.keras"
    fit(model, kc.ModelCheckpoint(path))
    damage(os.fspath(path), path.stat().st_size // 2)

    with pytest.raises(kc.DamagedCheckpointError, match=r"best\.keras cannot be trusted: .*digest"):
        kc.load_variables(path)


def test_a_value_of_a_file_of_keras_that_was_changed_is_not_found(model, tmp_path) -> None:
    """The file was verified when it was loaded, so no other bytes are trusted."""
    path = saved_by_keras(model, tmp_path / "best.weights.h5")
    found = kc.load_variables(path)

    damage(os.fspath(path), -1)

    with pytest.raises(kc.CheckpointNotFoundError, match="was removed or saved again since it was loaded"):
        _ = found["layers/dense/vars/0"]


@pytest.mark.parametrize("name", ["best.keras", "best.h5"])
def test_a_file_that_is_no_file_of_keras_is_refused(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"no file of Keras")

    with pytest.raises(kc.DamagedCheckpointError, match="cannot be read"):
        kc.load_variables(tmp_path / name)


def test_a_checkpoint_of_tensorflow_with_a_variant_is_loaded(tmp_path) -> None:
    """A variant, such as the state of an iterator, is no array."""
    tf.train.Checkpoint(place=iter(tf.data.Dataset.range(3))).save(str(tmp_path / "theirs"))
    name = "place/.ATTRIBUTES/ITERATOR_STATE"

    found = kc.load_variables(tmp_path)

    assert name in found
    with pytest.raises(TypeError, match=f"{name} is a variant, which no array can hold"):
        _ = found[name]
