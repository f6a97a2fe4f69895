"""Deduplication: checkpoints share the files of unchanged values by hard links, and each checkpoint is whole."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator

import keras
import msgspec
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
from keras_ckpt.model.keras_internals import value_of
from keras_ckpt.model.model_state import ModelState
from keras_ckpt.store import background, streams
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord, encode
from keras_ckpt.store.writer import Writer

X = np.random.default_rng(0).random((8, 700), "float32")
Y = np.random.default_rng(1).random((8, 1), "float32")


def frozen_model() -> keras.Model:
    """A model of 2 MB, of which two small layers are trained."""
    model = keras.Sequential(
        [keras.Input((700,)), keras.layers.Dense(700, name="frozen"), keras.layers.Dense(30), keras.layers.Dense(1)]
    )
    model.get_layer("frozen").trainable = False
    model.compile("adam", "mse")
    return model


def train(model: keras.Model, *callbacks: keras.callbacks.Callback, epochs: int = 3, **options) -> None:
    """Trains with two batches an epoch."""
    model.fit(
        X, Y, **{"batch_size": 4, "epochs": epochs, "verbose": 0, "shuffle": False, "callbacks": callbacks, **options}
    )


class Copies(keras.callbacks.Callback):
    """Copies all values at the end of each epoch, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[int, dict[str, bytes]] = {}

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.taken[(epoch + 1) * 2] = now(self.model)


def now(model: keras.Model) -> dict[str, bytes]:
    names = ModelState(model).names()
    return {name: value_of(each).numpy().tobytes() for name, each in names.items() if not name.startswith("metrics/")}


def on_disk(prefix: str) -> dict[str, bytes]:
    """The values of a checkpoint, read by TensorFlow without this package."""
    reader = tf.train.load_checkpoint(prefix)
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    keys = [key for key in reader.get_variable_to_shape_map() if key.endswith(suffix)]
    return {
        key.removesuffix(suffix): np.asarray(reader.get_tensor(key)).tobytes()
        for key in keys
        if not key.startswith(("metrics/", "save_counter"))
    }


def data_files(directory: pathlib.Path, step: int) -> dict[str, os.stat_result]:
    """The data files of a checkpoint, by name."""
    return {path.name: path.stat() for path in sorted(directory.glob(f"ckpt-{step}.data-*"))}


def taken(path: pathlib.Path) -> int:
    """The bytes of all files below a path. A file with several names counts once."""
    stats = [each.lstat() for each in path.rglob("*") if each.is_file()]
    return sum({each.st_ino: each.st_size for each in stats}.values())


class TestFrozenLayer:
    """Four checkpoints of a model with a layer that is not trained."""

    @pytest.fixture(params=["one after another", "with XLA", "with XLA, while all saves wait"])
    def saved(self, tmp_path, request, monkeypatch) -> tuple[pathlib.Path, dict[int, dict[str, bytes]], keras.Model]:
        # On a loaded machine training would wait for the disk, which waits for the last epoch.
        monkeypatch.setattr("keras_ckpt.training.backlog._MAX_SECONDS", 600.0)
        model, copies, freed = frozen_model(), Copies(), threading.Event()
        model.jit_compile = "XLA" in request.param

        def begin(batch: int, logs: object) -> None:
            if batch == 1 and not copies.taken and "while" in request.param:
                background.wait()  # until the memory of the copies is allocated
                background.Job(freed.wait, ("another run", 1), 0)

        def end(epoch: int, logs: object) -> None:
            if epoch == 3:
                freed.set()

        waits = keras.callbacks.LambdaCallback(on_train_batch_begin=begin, on_epoch_end=end)
        train(model, kc.ModelCheckpoint(tmp_path / "run"), copies, waits, epochs=4)
        return tmp_path / "run", copies.taken, model

    def test_a_frozen_layer_is_written_once(self, saved) -> None:
        """The first checkpoint is one file, which the others share."""
        run, _, _ = saved
        names = [list(data_files(run, step)) for step in (2, 4, 6, 8)]
        assert names[0] == ["ckpt-2.data-00000-of-00001"]
        assert names[3] == ["ckpt-8.data-00000-of-00002", "ckpt-8.data-00001-of-00002"]
        assert len({data_files(run, step)[each[0]].st_ino for step, each in zip((2, 4, 6, 8), names, strict=True)}) == 1
        assert taken(run) < 1.5 * data_files(run, 2)[names[0][0]].st_size

    def test_tensorflow_and_restore_read_each_checkpoint_to_the_bit(self, saved) -> None:
        run, copies, model = saved
        for step, copy in copies.items():
            assert on_disk(str(run / f"ckpt-{step}")) == copy
            kc.restore(model, kc.CheckpointDirectory(run)[step])
            assert now(model) == copy

    @pytest.mark.sample(5)
    @pytest.mark.parametrize("gone", [[2], [2, 4, 6], [4], [8], [6, 8]], ids=str)
    def test_checkpoints_stay_whole_when_others_are_removed(self, saved, gone) -> None:
        """A file exists as long as one checkpoint has it."""
        run, copies, _ = saved
        runs = kc.CheckpointDirectory(run)
        for step in copies.keys() - set(gone):
            runs.pin(step)
        runs.prune(runs.plan(kc.LatestN(1) if 8 not in gone else kc.EveryNSteps(1000)))
        assert [record.step for record in runs] == sorted(copies.keys() - set(gone))

        assert runs.verify().ok
        for record in runs:
            assert on_disk(record.prefix) == copies[record.step]

    def test_verify_reports_a_damaged_shared_file_for_each_checkpoint(self, saved) -> None:
        run, _, _ = saved
        with open(run / "ckpt-4.data-00000-of-00002", "r+b") as file:
            file.seek(1000)
            byte = file.read(1)
            file.seek(1000)
            file.write(bytes([byte[0] ^ 1]))

        assert kc.CheckpointDirectory(run).verify().listing.damaged.keys() == {"ckpt-2", "ckpt-4", "ckpt-6", "ckpt-8"}

    @pytest.mark.sample(2)
    @pytest.mark.parametrize("place", ["model/frozen/kernel", "model/dense/kernel"])
    def test_a_damaged_file_is_not_shared_by_a_new_fit(self, saved, place) -> None:
        """Even if the damage is in bytes that the new checkpoint would not use."""
        run, copies, model = saved
        damage(run / "ckpt-2.data-00000-of-00001", copies[2][place])

        train(model, kc.ModelCheckpoint(run), epochs=1)

        assert "ckpt-10" not in kc.CheckpointDirectory(run).verify().listing.damaged

    def test_the_sidecar_records_shared_files_and_their_size(self, saved) -> None:
        run, _, _ = saved
        first, second = list(kc.CheckpointDirectory(run))[:2]
        assert [file.shared for file in first.files] == [False, False]
        assert [file.shared for file in second.files] == [True, False, False]
        assert (first.size_shared, second.size_shared) == (0, second.files[0].size)

    def test_a_plan_shows_the_bytes_that_a_removal_frees(self, saved) -> None:
        """Without the bytes that other checkpoints share. The directory shows its real size."""
        run, _, _ = saved
        runs = kc.CheckpointDirectory(run)
        before = taken(run)

        plan = runs.plan(kc.LatestN(2))
        frees = [decision.size for decision in plan.decisions if not decision.kept]
        removed = runs.prune(plan)

        assert removed == [2, 4]
        # The rest is sidecars, which a plan does not count, and the state file.
        assert sum(frees) < before - taken(run) < sum(frees) + 10_000
        assert max(frees) < 300_000
        assert re.search(r"which frees \d+ kB", str(plan))
        assert re.search(r"2 checkpoints, 2.\d+ MB on disk, for 2.\d+ MB of their sizes are shared", str(runs))


def damage(path: pathlib.Path, where: bytes) -> None:
    """Flips a bit in a file, in the first occurrence of some bytes."""
    content = bytearray(path.read_bytes())
    content[content.index(where)] ^= 1
    path.write_bytes(content)


def test_a_file_that_another_process_wrote_to_is_not_shared(tmp_path) -> None:
    """The arena of the running training still has the values of the file."""
    model, copies = frozen_model(), Copies()

    def write(epoch: int, logs: object) -> None:
        if epoch == 2:
            background.wait()
            damage(tmp_path / "ckpt-2.data-00000-of-00001", copies.taken[2]["model/frozen/kernel"])

    train(model, kc.ModelCheckpoint(tmp_path), copies, keras.callbacks.LambdaCallback(on_epoch_begin=write))

    assert kc.CheckpointDirectory(tmp_path).verify().listing.damaged.keys() == {"ckpt-2", "ckpt-4"}
    assert on_disk(str(tmp_path / "ckpt-6")) == copies.taken[6]


def test_a_file_that_is_written_to_after_its_link_is_not_shared_again(tmp_path, monkeypatch) -> None:
    """The stamp of a linked file is from before the link."""
    model, copies, save = frozen_model(), Copies(), Writer.save

    def damaging(writer: Writer, *arguments: object, **named: object) -> CheckpointRecord | None:
        record = save(writer, *arguments, **named)
        if record and record.step == 4:
            damage(tmp_path / "ckpt-2.data-00000-of-00001", copies.taken[2]["model/frozen/kernel"])
        return record

    monkeypatch.setattr(Writer, "save", damaging)
    train(model, kc.ModelCheckpoint(tmp_path), copies)

    assert kc.CheckpointDirectory(tmp_path).verify().listing.damaged.keys() == {"ckpt-2", "ckpt-4"}
    assert on_disk(str(tmp_path / "ckpt-6")) == copies.taken[6]


def test_a_checkpoint_with_an_additional_file_is_shared_too(tmp_path) -> None:
    """A sidecar may list more than TensorFlow's files."""
    model = frozen_model()
    train(model, kc.ModelCheckpoint(tmp_path), epochs=1)
    record = kc.CheckpointDirectory(tmp_path).latest()
    with Folder(str(tmp_path)) as folder:
        folder.create(f"{record.name}.notes", b"good")
        notes = CheckpointFile(f"{record.name}.notes", *folder.digest(f"{record.name}.notes"))
        folder.replace(f"{record.name}.json", encode(msgspec.structs.replace(record, files=(*record.files, notes))))
    assert len(kc.CheckpointDirectory(tmp_path).latest().files) == 3

    train(model, kc.ModelCheckpoint(tmp_path), epochs=1)

    assert any(file.shared for file in kc.CheckpointDirectory(tmp_path).latest().files)


def test_a_new_fit_shares_with_the_newest_checkpoint(tmp_path) -> None:
    """As in another process, it compares the files."""
    train(frozen_model(), kc.ModelCheckpoint(tmp_path), epochs=1)
    model = frozen_model()
    kc.restore(model, tmp_path)
    train(model, kc.ModelCheckpoint(tmp_path), epochs=1)

    _, second = kc.CheckpointDirectory(tmp_path)
    assert second.files[0].shared
    assert on_disk(second.prefix) == now(model)


def test_callbacks_that_save_the_same_step_share_the_common_values(tmp_path) -> None:
    """All layers are trained, so no value of an earlier step is the same."""
    model = keras.Sequential([keras.Input((700,)), keras.layers.Dense(700), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    with kc.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False) as backup:
        train(model, kc.ModelCheckpoint(tmp_path / "run"), kc.ModelCheckpoint(tmp_path / "other"), backup)

    names = ("run", "other", "backup")
    inodes = [{each.st_ino for each in data_files(tmp_path / name, 6).values()} for name in names]
    records = [kc.CheckpointDirectory(tmp_path / name).latest() for name in names]
    *alone, whole = sorted(record.size - record.size_shared for record in records)
    assert inodes[0] & inodes[1] & inodes[2]
    assert 0 < max(alone) < 100_000 < whole
    for name in names:
        assert on_disk(str(tmp_path / name / "ckpt-6")) == now(model)


def test_a_copy_of_one_callback_does_not_change_bytes_that_another_writes(tmp_path, monkeypatch) -> None:
    """With XLA on a slow disk, when both callbacks use the same memory pages."""
    write = streams._write_all

    def slowly(*arguments: object, **named: object) -> None:
        time.sleep(0.1)
        write(*arguments, **named)

    monkeypatch.setattr(streams, "_write_all", slowly)
    model = keras.Sequential([keras.Input((700,)), *(keras.layers.Dense(width) for width in (45, 1200, 1800, 1))])
    model.compile("adam", "mse", jit_compile=True)
    train(
        model,
        kc.ModelCheckpoint(tmp_path / "all"),
        kc.ModelCheckpoint(tmp_path / "weights", save_weights_only=True, save_freq=2),
        epochs=1,
    )

    for name in ("weights", "all"):
        found = kc.CheckpointDirectory(tmp_path / name).verify()
        assert found.ok, found
        assert len(found.listing.records) == 1


def test_a_file_with_less_than_half_of_its_bytes_in_use_is_written_again(tmp_path) -> None:
    """In each epoch another of five layers changes."""
    layers = [keras.layers.Dense(700, trainable=False) for _ in range(5)]
    model = keras.Sequential([keras.Input((700,)), *layers, keras.layers.Dense(1)])
    model.compile("sgd", "mse")

    class Changes(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None) -> None:
            layers[epoch].kernel.assign(layers[epoch].kernel + 1)

    train(model, Changes(), kc.ModelCheckpoint(tmp_path), epochs=4)

    inodes = [[each.st_ino for each in data_files(tmp_path, step).values()] for step in (2, 4, 6, 8)]
    first = inodes[0][0]
    assert [first in each for each in inodes] == [True, True, True, False]
    assert inodes[2][1] in inodes[3]  # all of its bytes are in use
    records = list(kc.CheckpointDirectory(tmp_path))
    assert max(record.size for record in records) < 2 * records[0].size
    assert on_disk(str(tmp_path / "ckpt-8")) == now(model)


def test_a_small_model_is_never_shared(tmp_path) -> None:
    """A link has its costs too."""
    model = keras.Sequential([keras.Input((700,)), keras.layers.Dense(10, trainable=False), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    train(model, kc.ModelCheckpoint(tmp_path))

    assert not any(record.size_shared for record in kc.CheckpointDirectory(tmp_path))


def test_checkpoints_share_files_only_within_a_file_system(tmp_path) -> None:
    """A hard link cannot cross file systems."""
    places = [place for place in map(pathlib.Path, ("/dev/shm", "/var/tmp")) if place.is_dir()]
    places = [place for place in places if place.stat().st_dev != tmp_path.stat().st_dev]
    if not places:
        pytest.skip("there is one file system only")
    other = places[0] / f"keras_ckpt-{os.getpid()}"
    model = frozen_model()
    try:
        train(model, kc.ModelCheckpoint(tmp_path / "run"), kc.ModelCheckpoint(other), epochs=2)
        assert [record.size_shared > 0 for record in kc.CheckpointDirectory(other)] == [False, True]
        assert on_disk(str(other / "ckpt-4")) == now(model)
    finally:
        shutil.rmtree(other, ignore_errors=True)


@pytest.fixture
def disk() -> Iterator[pathlib.Path]:
    """A folder on a disk. All other temporary files may be in memory."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:
        yield pathlib.Path(path)


def test_at_the_limit_of_hard_links_all_values_are_written(disk) -> None:
    """The limit of ext4 is 65,000. A file system in memory has none."""
    model = frozen_model()
    train(model, kc.ModelCheckpoint(disk / "run"), epochs=1)
    (disk / "links").mkdir()
    try:
        for number in range(70_000):
            os.link(disk / "run" / "ckpt-2.data-00000-of-00001", disk / "links" / str(number))
    except OSError:
        pass
    else:
        pytest.skip("this file system has no limit of links")
    train(model, kc.ModelCheckpoint(disk / "run"), epochs=1)

    assert [record.size_shared for record in kc.CheckpointDirectory(disk / "run")] == [0, 0]
    assert kc.CheckpointDirectory(disk / "run").verify().ok


def test_shared_values_need_no_free_space(tmp_path, monkeypatch) -> None:
    """The free space suffices only for the changed values."""
    model = frozen_model()
    monkeypatch.setattr(
        Folder, "free", lambda folder: 3_000_000 if not (tmp_path / "ckpt-2.json").exists() else 500_000
    )

    train(model, kc.ModelCheckpoint(tmp_path, on_full_disk="raise"), epochs=2)

    assert len(kc.CheckpointDirectory(tmp_path)) == 2


def test_a_step_that_is_saved_again_shares_with_its_superseded_checkpoint(tmp_path) -> None:
    """Their files have the same names."""
    model = frozen_model()
    train(model, kc.ModelCheckpoint(tmp_path), epochs=2)
    kc.restore(model, kc.CheckpointDirectory(tmp_path)[2])
    model.fit(X, Y + 1, batch_size=4, verbose=0, callbacks=[kc.ModelCheckpoint(tmp_path)])

    again = kc.CheckpointDirectory(tmp_path)[4]
    assert again.sequence == 3
    assert again.size_shared
    assert kc.CheckpointDirectory(tmp_path).verify().ok
    assert on_disk(again.prefix) == now(model)


def test_unchanged_values_are_written_into_a_separate_file(tmp_path) -> None:
    """The first file is mostly changed and not worth a link, the second file is."""
    layers = [keras.layers.Dense(700, trainable=number > 0) for number in range(3)]
    model = keras.Sequential([keras.Input((700,)), *layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-6), "mse")
    copies = Copies()
    train(model, copies, kc.ModelCheckpoint(tmp_path), epochs=4)

    records = list(kc.CheckpointDirectory(tmp_path))
    assert [record.size_shared // 1_900_000 for record in records] == [0, 0, 1, 1]
    assert len({data_files(tmp_path, step)[f"ckpt-{step}.data-00000-of-00002"].st_ino for step in (4, 6, 8)}) == 1
    for record in records:
        assert on_disk(record.prefix) == copies.taken[record.step]


def test_an_embedding_with_few_changed_rows_is_written_whole(tmp_path) -> None:
    """No part of a value is shared: optimizers with momentum change every used row."""
    model = keras.Sequential(
        [keras.Input((4,), dtype="int32"), keras.layers.Embedding(40_000, 32), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    rows = np.random.default_rng(0).choice(500, (8, 4)).astype("int32")

    model.fit(rows, np.ones((8, 4, 1)), batch_size=4, epochs=2, verbose=0, callbacks=[kc.ModelCheckpoint(tmp_path)])

    first, second = kc.CheckpointDirectory(tmp_path)
    assert (first.size_shared, second.size_shared) == (0, 0)
    assert on_disk(second.prefix) == now(model)
