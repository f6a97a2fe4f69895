"""Keras's own files: their content is the content that Keras writes, at the moment of the snapshot."""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from keras_ckpt.formats.keras_file import TAIL_LIMIT
from keras_ckpt.model.keras_files import FileState
from keras_ckpt.store.files import Folder
from support import keras_zoo, zoo

# Keras's own writer converts variables in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

NAMES = {"keras": "model.keras", "weights": "model.weights.h5", "legacy": "model.h5"}


def tail(size: int, digest: str) -> bytes:
    """A tail with the facts that it is made from."""
    return f"{size:020} {digest}".encode()


def write(snapshot, path: pathlib.Path, kind: str, tail=tail):
    """Writes a snapshot into a folder. Returns the file, and its path."""
    with Folder(path, create=True) as folder:
        file = snapshot.write(folder, NAMES[kind], tail)
    return file, path / NAMES[kind]


def by_keras(model: keras.Model, path: pathlib.Path, kind: str) -> pathlib.Path:
    """A file that Keras writes."""
    path.mkdir()
    (model.save_weights if kind == "weights" else model.save)(path / NAMES[kind])
    return path / NAMES[kind]


def content(path: pathlib.Path, kind: str) -> dict[str, Any]:
    """Everything that h5py and zipfile show of a file, without the date."""
    if kind != "keras":
        return hdf5(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        members = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(members.pop("metadata.json"))
    assert metadata.pop("date_saved")
    weights = hdf5(io.BytesIO(members.pop("model.weights.h5")))
    return {"metadata": metadata, "config": json.loads(members.pop("config.json")), **members, **weights}


def assert_same(model: keras.Model, other: keras.Model) -> None:
    """Two models have equal weights and optimizers. Keras's files lack the states of random generators."""
    pairs = [(model.weights, other.weights)]
    if model.compiled:
        pairs.append((model.optimizer.variables, other.optimizer.variables))
    for mine, theirs in pairs:
        assert [each.numpy().tobytes() for each in mine] == [each.numpy().tobytes() for each in theirs]


def hdf5(file: Any) -> dict[str, Any]:
    """Everything that h5py shows of an HDF5 file, by path."""
    found = {}

    def look(name: str, each: Any) -> None:
        attributes = {key: np.asarray(value).tolist() for key, value in each.attrs.items()}
        values = (each.shape, each.dtype, each[()].tobytes()) if isinstance(each, h5py.Dataset) else None
        found[name] = attributes, values

    with h5py.File(file, "r") as opened:
        look("/", opened)
        opened.visititems(look)
    return found


@pytest.mark.parametrize("kind", ["keras", "weights"])
@pytest.mark.parametrize("name", keras_zoo.MODELS)
@pytest.mark.filterwarnings("ignore:You are saving your model")
def test_a_file_has_the_content_that_keras_writes(tmp_path, name, kind) -> None:
    """Later changes of the model do not change the content of a snapshot."""
    model = keras_zoo.made(name)
    state = FileState(model, kind)
    for save in range(3):
        theirs = by_keras(model, tmp_path / f"keras-{save}", kind)
        snapshot = state.snapshot()
        keras_zoo.change(model, save + 2)

        _, ours = write(snapshot, tmp_path / f"ours-{save}", kind)

        assert content(ours, kind) == content(theirs, kind)


@pytest.mark.parametrize("optimizer", keras_zoo.OPTIMIZERS)
def test_a_file_has_the_state_of_the_optimizer_and_the_arguments_of_compile(tmp_path, optimizer) -> None:
    """Keras loads the file, and the model has the same optimizer."""
    model = keras_zoo.made("convolution", optimizer)
    state = FileState(model, "keras")
    for save in range(2):
        keras_zoo.change(model, save)
        theirs = by_keras(model, tmp_path / f"keras-{save}", "keras")

        _, ours = write(state.snapshot(), tmp_path / f"ours-{save}", "keras")

        assert content(ours, "keras") == content(theirs, "keras")
        loaded = keras.models.load_model(ours)
        assert_same(loaded, model)
        assert loaded.get_compile_config() == model.get_compile_config()


@pytest.mark.parametrize("name", sorted(zoo.LAYERS))
@pytest.mark.sample(6)
def test_a_file_has_the_weights_of_each_layer_of_keras(tmp_path, name) -> None:
    model = zoo.trained(name)
    kind = "weights" if any(isinstance(layer, zoo.Twice) for layer in model.layers) else "keras"  # it has no config
    state = FileState(model, kind)
    for save in range(2):
        theirs = by_keras(model, tmp_path / f"keras-{save}", kind)
        _, ours = write(state.snapshot(), tmp_path / f"ours-{save}", kind)

        assert content(ours, kind) == content(theirs, kind)
        zoo.outputs_of(name, model)


@pytest.mark.parametrize("name", sorted(zoo.OPTIMIZERS))
@pytest.mark.sample(4)
def test_a_file_has_the_variables_of_each_optimizer_of_keras(tmp_path, name) -> None:
    model = zoo.small(zoo.OPTIMIZERS[name]())
    state = FileState(model, "weights")
    for save in range(2):
        zoo.train(model)
        theirs = by_keras(model, tmp_path / f"keras-{save}", "weights")
        _, ours = write(state.snapshot(), tmp_path / f"ours-{save}", "weights")

        assert content(ours, "weights") == content(theirs, "weights")


def test_keras_loads_the_weights_of_a_file(tmp_path) -> None:
    """The optimizer too."""
    model, other = keras_zoo.made("subclassed"), keras_zoo.made("subclassed")
    state = FileState(model, "weights")
    for save in range(2):
        keras_zoo.change(model, 5 + save)
        _, path = write(state.snapshot(), tmp_path / str(save), "weights")
        other.load_weights(path)

        assert_same(other, model)


def test_a_legacy_file_is_a_whole_model_in_hdf5(tmp_path) -> None:
    """Keras's own writer makes it."""
    model = keras_zoo.made("dense")
    theirs = by_keras(model, tmp_path / "keras", "legacy")
    _, ours = write(FileState(model, "legacy").snapshot(), tmp_path / "ours", "legacy")

    assert content(ours, "legacy") == content(theirs, "legacy")
    loaded = keras.models.load_model(ours, compile=False)
    assert all(map(np.array_equal, loaded.get_weights(), model.get_weights()))


@pytest.mark.parametrize("kind", NAMES)
def test_the_tail_is_made_from_the_size_and_the_digest_of_the_bytes_before_it(tmp_path, kind) -> None:
    """The file that is returned has the size and the digest of all bytes."""
    model = keras_zoo.made("dense")
    state = FileState(model, kind)
    for save in range(2):
        file, path = write(state.snapshot(), tmp_path / str(save), kind)
        data = path.read_bytes()
        size = len(data) - len(tail(0, f"blake3:{'0' * 64}"))
        (path.parent / "before").write_bytes(data[:size])

        with Folder(path.parent) as folder:
            assert data[size:] == tail(*folder.digest("before"))
            assert folder.digest(path.name) == (file.size, file.digest)
        assert file.name == path.name


def test_the_tail_of_a_keras_file_is_the_comment_of_the_archive(tmp_path) -> None:
    """The longest comment too."""
    state = FileState(keras_zoo.made("dense"), "keras")
    for save in range(2):
        _, path = write(state.snapshot(), tmp_path / str(save), "keras", lambda size, digest: b"x" * TAIL_LIMIT)

        with zipfile.ZipFile(path) as archive:
            assert archive.comment == b"x" * TAIL_LIMIT
        assert keras.models.load_model(path).built


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (lambda size, digest: b"x" * (TAIL_LIMIT + 1), "65536 bytes, the limit is 65535"),
        (lambda size, digest: b"x" * digest.count("0"), "64 were expected"),
    ],
)
def test_a_tail_that_no_comment_can_hold_is_an_error(tmp_path, tail, message) -> None:
    """The tail is longer than a comment, or its size depends on the digest."""
    snapshot = FileState(keras_zoo.made("dense"), "keras").snapshot()

    with pytest.raises(ValueError, match=message):
        write(snapshot, tmp_path, "keras", tail)


def test_the_size_of_a_snapshot_is_about_the_size_of_the_file(tmp_path) -> None:
    """Callers look for room on the disk with it."""
    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(300)])
    state = FileState(model, "keras")
    for save in range(2):
        snapshot = state.snapshot()
        file, _ = write(snapshot, tmp_path / str(save), "keras")

        assert file.size * 0.9 < snapshot.size < file.size * 1.1
