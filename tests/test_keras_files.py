"""Keras's own files: their content is the content that Keras writes, at the moment of the snapshot."""

from __future__ import annotations

import gc
import pathlib
import types
import weakref
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import pytest
from keras.src.saving import saving_lib

from keras_ckpt.model import file_snapshot, keras_internals
from keras_ckpt.model.file_snapshot import FileState
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.model.snapshot import arena_of
from keras_ckpt.store.files import Folder
from keras_ckpt.store.tails import LIMIT
from support import keras_zoo, zoo
from support.keras_files import content

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


def told(warned: pytest.WarningsRecorder) -> list[str]:
    """The warnings for a user."""
    return [str(each.message) for each in warned if each.category is UserWarning]


def assert_same(model: keras.Model, other: keras.Model) -> None:
    """Two models have equal weights and optimizers. Keras's files lack the states of random generators."""
    pairs = [(model.weights, other.weights)]
    if model.compiled:
        pairs.append((model.optimizer.variables, other.optimizer.variables))
    for mine, theirs in pairs:
        assert [each.numpy().tobytes() for each in mine] == [each.numpy().tobytes() for each in theirs]


@pytest.mark.parametrize("kind", ["keras", "weights"])
@pytest.mark.parametrize("name", keras_zoo.MODELS)
@pytest.mark.sample(20)
@pytest.mark.filterwarnings("ignore:You are saving your model")
def test_a_file_has_the_content_that_keras_writes(tmp_path, name, kind) -> None:
    """Later changes of the model do not change the content of a snapshot."""
    model = keras_zoo.made(name)
    state = FileState(model, kind)
    for save in range(2):
        theirs = by_keras(model, tmp_path / f"keras-{save}", kind)
        snapshot = state.snapshot()
        keras_zoo.change(model, save + 2)

        _, ours = write(snapshot, tmp_path / f"ours-{save}", kind)

        assert content(ours) == content(theirs)
        assert not snapshot.is_copied  # training does not wait for copies


@pytest.mark.parametrize("optimizer", keras_zoo.OPTIMIZERS)
def test_a_file_has_the_state_of_the_optimizer_and_the_arguments_of_compile(tmp_path, optimizer) -> None:
    """Keras loads the file, and the model has the same optimizer."""
    model = keras_zoo.made("convolution", optimizer)
    state = FileState(model, "keras")
    for save in range(2):
        keras_zoo.change(model, save)
        theirs = by_keras(model, tmp_path / f"keras-{save}", "keras")

        _, ours = write(state.snapshot(), tmp_path / f"ours-{save}", "keras")

        assert content(ours) == content(theirs)
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

        assert content(ours) == content(theirs)
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

        assert content(ours) == content(theirs)


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

    assert content(ours) == content(theirs)
    loaded = keras.models.load_model(ours, compile=False)
    assert all(map(np.array_equal, loaded.get_weights(), model.get_weights()))


class Saves(keras.callbacks.Callback):
    """Takes a snapshot after each epoch, and writes it in another thread an epoch later."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__()
        self.path = path
        self.pairs: list[tuple[pathlib.Path, Future]] = []
        self.copied: list[bool] = []
        self.thread = ThreadPoolExecutor(1)

    def on_train_begin(self, logs=None) -> None:
        self.state, self.waiting = FileState(self.model, "keras"), None

    def on_epoch_end(self, epoch, logs=None) -> None:
        if self.waiting is not None:
            snapshot, theirs = self.waiting
            self.pairs.append((theirs, self.thread.submit(write, snapshot, self.path / f"ours-{epoch}", "keras")))
        self.waiting = self.state.snapshot(), by_keras(self.model, self.path / f"keras-{epoch}", "keras")
        self.copied.append(self.waiting[0].is_copied)


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"steps_per_execution": 4}])
@pytest.mark.sample(1)
def test_a_file_that_is_written_while_training_continues_has_the_values_of_its_snapshot(tmp_path, options) -> None:
    """The config has the learning rate of the snapshot too."""
    model = keras_zoo.MODELS["dense"]()
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"], **options)
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1))
    saves = Saves(tmp_path)
    x = np.random.default_rng(0).normal(size=(64, 4))

    valid = x[:8], x[:8, :1]
    model.fit(x, x[:, :1], validation_data=valid, batch_size=4, epochs=6, verbose=0, callbacks=[rate, saves])

    assert saves.copied == [False] * 6
    assert len(saves.pairs) == 5
    for theirs, writing in saves.pairs:
        _, ours = writing.result()
        assert content(ours) == content(theirs)


def _enable_lora(model: keras.Model) -> None:
    model.layers[0].enable_lora(2)
    keras_zoo.change(model, 7)


def _quantize(model: keras.Model) -> None:
    model.layers[0].quantize("int8")


def _compile(model: keras.Model) -> None:
    model.compile(keras.optimizers.SGD(momentum=0.5), "mae", metrics=["mse"])
    model.optimizer.build(model.trainable_variables)


def _compile_with_another_loss(model: keras.Model) -> None:
    model.compile(model.optimizer, "mae")


def _freeze(model: keras.Model) -> None:
    model.layers[0].trainable = False


@pytest.mark.parametrize("kind", ["keras", "weights"])
@pytest.mark.parametrize("change", [_enable_lora, _quantize, _compile, _compile_with_another_loss, _freeze])
def test_a_file_after_a_change_of_the_structure_has_the_new_structure(tmp_path, change, kind) -> None:
    """Another callback may save it too."""
    model = keras_zoo.made("dense")
    first, second = FileState(model, kind), FileState(model, kind)
    first.snapshot(), first.snapshot()
    change(model)
    for save, state in enumerate([first, first, second, FileState(model, kind)]):
        theirs = by_keras(model, tmp_path / f"keras-{save}", kind)
        snapshot = state.snapshot()
        _, ours = write(snapshot, tmp_path / f"ours-{save}", kind)

        assert content(ours) == content(theirs)
    assert not snapshot.is_copied


def _rename(model: keras.Model) -> None:
    model.layers[0].name = "renamed"


def _compile_with_another_class(model: keras.Model) -> None:
    model.compile(keras.optimizers.AdamW(0.01), "mse", metrics=["mae"])
    model.optimizer.build(model.trainable_variables)


@pytest.mark.parametrize("kind", ["keras", "weights"])
def test_keras_writes_a_model_once_for_all_fits_and_callbacks(tmp_path, monkeypatch, kind) -> None:
    """The file of a later callback has the values of its own moment."""
    model, images = keras_zoo.made("dense"), []

    def noted(*arguments: Any) -> bytes:
        images.append(keras_internals.written_by_keras(*arguments))
        return images[-1]

    monkeypatch.setattr(file_snapshot, "written_by_keras", noted)
    for save in range(3):
        keras_zoo.change(model, save)
        theirs = by_keras(model, tmp_path / f"keras-{save}", kind)
        _, ours = write(FileState(model, kind).snapshot(), tmp_path / f"ours-{save}", kind)

        assert content(ours) == content(theirs)
    assert len(images) == 1


@pytest.mark.parametrize("kind", ["keras", "weights"])
@pytest.mark.parametrize("change", [_rename, _compile_with_another_class])
def test_a_file_of_a_new_callback_has_the_names_that_objects_have_now(tmp_path, change, kind) -> None:
    """The variables have the same shapes as before."""
    model = keras_zoo.made("dense")
    FileState(model, kind).snapshot()
    change(model)
    theirs = by_keras(model, tmp_path / "keras", kind)
    _, ours = write(FileState(model, kind).snapshot(), tmp_path / "ours", kind)

    assert content(ours) == content(theirs)


def test_a_model_that_was_saved_as_a_file_is_freed() -> None:
    model = keras_zoo.made("dense")
    assert FileState(model, "keras").snapshot().content.weights
    freed = weakref.ref(model)
    del model
    gc.collect()

    assert freed() is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("StringLookup", ["c", "c", "b", "a"]),
        ("TextVectorization", ["f f f e", "f e d c b a"]),
        ("TextVectorization weighed", ["f f f e", "f e d c b a"]),
    ],
)
def test_a_file_has_the_vocabulary_that_a_layer_learned_since(tmp_path, name, words) -> None:
    """Keras refuses a vocabulary of another size."""
    model = keras_zoo.made(name)
    state = FileState(model, "keras")
    state.snapshot(), state.snapshot()
    model.layers[0].adapt(np.array(words)[:, None])
    theirs = by_keras(model, tmp_path / "keras", "keras")

    _, ours = write(state.snapshot(), tmp_path / "ours", "keras")

    assert content(ours) == content(theirs)


def test_a_file_has_the_assets_that_a_layer_of_the_user_saves_now(tmp_path) -> None:
    model = keras_zoo.made("own save_assets")
    state = FileState(model, "keras")
    state.snapshot(), state.snapshot()
    model.layers[0].notes = "second"
    _, path = write(state.snapshot(), tmp_path, "keras")

    assert keras.models.load_model(path).layers[0].notes == "second"


@keras.saving.register_keras_serializable("test_keras_files")
class Counts(keras.layers.Layer):
    """Saves the number of its saves."""

    saves = 0

    def call(self, x):
        return x

    def save_own_variables(self, store) -> None:
        self.saves += 1
        store["saves"] = np.array(self.saves)


@keras.saving.register_keras_serializable("test_keras_files")
class Grows(keras.layers.Layer):
    """Saves an array that grows."""

    length = 1

    def call(self, x):
        return x

    def save_own_variables(self, store) -> None:
        store["array"] = np.arange(self.length)


@pytest.mark.parametrize("kind", ["keras", "weights"])
def test_keras_writes_the_files_of_a_model_that_saves_another_state_each_time(tmp_path, kind) -> None:
    """One warning tells it."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), Counts()])
    state = FileState(model, kind)
    with pytest.warns(UserWarning, match=r"the values of layers/counts/vars/saves differ") as warned:
        state.snapshot()
    for _ in range(2):
        before = model.layers[1].saves
        _, path = write(state.snapshot(), tmp_path / str(before), kind)

        assert content(path)["layers/counts/vars/saves"][1][2] == np.array(before + 1).tobytes()
    assert len(told(warned)) == 1


def test_keras_writes_the_files_of_a_model_whose_arrays_change_their_shape(tmp_path) -> None:
    """One warning tells it."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), Grows()])
    state = FileState(model, "keras")
    state.snapshot()
    model.layers[1].length = 2
    with pytest.warns(UserWarning, match=r"layers/grows/vars/array is .* it was") as warned:
        snapshots = [state.snapshot(), state.snapshot()]
    theirs = by_keras(model, tmp_path / "keras", "keras")
    for number, snapshot in enumerate(snapshots):
        _, ours = write(snapshot, tmp_path / str(number), "keras")

        assert content(ours) == content(theirs)
    assert len(told(warned)) == 1


def test_a_change_of_the_structure_may_change_the_shape_of_an_array(tmp_path) -> None:
    """No warning tells it, and later snapshots are cheap again."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2), Grows()])
    state = FileState(model, "weights")
    state.snapshot()
    model.layers[1].length = 2
    model.compile("sgd", "mse")
    state.snapshot()
    snapshot = state.snapshot()
    theirs = by_keras(model, tmp_path / "keras", "weights")
    _, ours = write(snapshot, tmp_path / "ours", "weights")

    assert content(ours) == content(theirs)
    assert not snapshot.is_copied


@pytest.mark.parametrize("kind", ["keras", "weights"])
def test_keras_writes_the_files_if_a_private_name_of_it_is_gone(tmp_path, monkeypatch, kind) -> None:
    """One warning names it."""
    model = keras_zoo.made("convolution")
    state = FileState(model, kind)
    public = types.SimpleNamespace(
        save_model=saving_lib.save_model, save_weights_only=saving_lib.save_weights_only, H5IOStore=saving_lib.H5IOStore
    )
    monkeypatch.setattr(keras_internals, "saving_lib", public)
    with pytest.warns(UserWarning, match="_save_state") as warned:
        snapshots = [state.snapshot(), state.snapshot()]
    theirs = by_keras(model, tmp_path / "keras", kind)
    for number, snapshot in enumerate(snapshots):
        _, ours = write(snapshot, tmp_path / str(number), kind)

        assert content(ours) == content(theirs)
    assert len(told(warned)) == 1


@pytest.mark.parametrize("save", range(2))
@pytest.mark.filterwarnings("ignore:Keras's own writer")
def test_an_error_of_the_model_is_an_error_of_the_snapshot(save, monkeypatch) -> None:
    """It is the error that Keras's own save raises."""
    model = keras_zoo.made("own save_own_variables")
    state = FileState(model, "weights")
    for _ in range(save):
        state.snapshot()

    def fail(store) -> None:
        raise OSError("no state today")

    monkeypatch.setattr(model.layers[0], "save_own_variables", fail)
    with pytest.raises(OSError, match="no state today"):
        state.snapshot()


def test_a_detached_snapshot_has_copies_of_the_values(tmp_path) -> None:
    """Training with XLA need not copy values then."""
    model = keras_zoo.made("dense")
    state = FileState(model, "keras")
    state.snapshot()
    theirs = by_keras(model, tmp_path / "keras", "keras")
    snapshot = state.snapshot()
    snapshot.detach(change=True)
    keras_zoo.change(model, 9)

    _, ours = write(snapshot, tmp_path / "ours", "keras")

    assert snapshot.is_copied
    assert content(ours) == content(theirs)


def test_files_and_checkpoints_of_a_model_use_the_same_memory(tmp_path) -> None:
    """The memory for copies of the values, which lives as long as the callbacks."""
    model = keras_zoo.made("nested models")
    arena = arena_of(model)
    ModelState(model).snapshot().move(arena)
    before = dict(arena._rooms)
    for kind in ("keras", "weights"):
        state = FileState(model, kind)
        state.snapshot()
        write(state.snapshot(), tmp_path, kind)

    assert arena._rooms == before


@pytest.mark.parametrize("kind", NAMES)
def test_the_content_has_the_states_of_the_seed_generators_at_the_moment_of_the_snapshot(kind) -> None:
    """A file of Keras lacks them."""
    model = keras_zoo.made("convolution")
    (seed,) = [variable for variable in model.variables if "seed" in variable.path]
    state = FileState(model, kind)
    for save in range(2):
        seed.assign([save, 7])
        snapshot = state.snapshot()
        seed.assign([100, 100])

        assert snapshot.content.seeds == {"model/seed_generator/seed_generator_state": [save, 7]}


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
        _, path = write(state.snapshot(), tmp_path / str(save), "keras", lambda size, digest: b"x" * LIMIT)

        with zipfile.ZipFile(path) as archive:
            assert archive.comment == b"x" * LIMIT
        assert keras.models.load_model(path).built


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (lambda size, digest: b"x" * (LIMIT + 1), "65536 bytes, the limit is 65535"),
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
