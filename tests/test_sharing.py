"""A checkpoint shares files with older ones where it has the same values, and is none the less whole."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import threading
import time

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
    """Of 2 MB, of which two small layers are trained."""
    model = keras.Sequential(
        [keras.Input((700,)), keras.layers.Dense(700, name="frozen"), keras.layers.Dense(30), keras.layers.Dense(1)]
    )
    model.get_layer("frozen").trainable = False
    model.compile("adam", "mse")
    return model


def train(model: keras.Model, *callbacks: keras.callbacks.Callback, epochs: int = 3, **options) -> None:
    """Two batches an epoch."""
    model.fit(
        X, Y, **{"batch_size": 4, "epochs": epochs, "verbose": 0, "shuffle": False, "callbacks": callbacks, **options}
    )


class Copies(keras.callbacks.Callback):
    """All values at the end of each epoch, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: dict[int, dict[str, bytes]] = {}

    def on_epoch_end(self, epoch, logs=None) -> None:
        self.taken[(epoch + 1) * 2] = now(self.model)


def now(model: keras.Model) -> dict[str, bytes]:
    names = ModelState(model).names()
    return {name: value_of(each).numpy().tobytes() for name, each in names.items() if not name.startswith("metrics/")}


def on_disk(prefix: str) -> dict[str, bytes]:
    """What TensorFlow reads, with nothing of this package."""
    reader = tf.train.load_checkpoint(prefix)
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    keys = [key for key in reader.get_variable_to_shape_map() if key.endswith(suffix)]
    return {
        key.removesuffix(suffix): np.asarray(reader.get_tensor(key)).tobytes()
        for key in keys
        if not key.startswith(("metrics/", "save_counter"))
    }


def data_files(directory: pathlib.Path, step: int) -> dict[str, os.stat_result]:
    """The data files of a checkpoint."""
    return {path.name: path.stat() for path in sorted(directory.glob(f"ckpt-{step}.data-*"))}


def taken(path: pathlib.Path) -> int:
    """The bytes of all files below, those of several names once."""
    stats = [each.lstat() for each in path.rglob("*") if each.is_file()]
    return sum({each.st_ino: each.st_size for each in stats}.values())


class TestWhatStaysTheSame:
    """The layer that is not trained."""

    @pytest.fixture(params=["one after another", "with XLA", "with XLA, while all are yet to be written"])
    def saved(self, tmp_path, request, monkeypatch) -> tuple[pathlib.Path, dict[int, dict[str, bytes]], keras.Model]:
        # On a loaded machine training would wait for the disk, which waits for the last epoch.
        monkeypatch.setattr("keras_ckpt.training.backlog._MAX_SECONDS", 600.0)
        model, copies, freed = frozen_model(), Copies(), threading.Event()
        model.jit_compile = "XLA" in request.param

        def begin(batch: int, logs: object) -> None:
            if batch == 1 and not copies.taken and "while" in request.param:
                background.wait()  # until there is memory for copies
                background.Job(freed.wait, ("another run", 1), 0)

        def end(epoch: int, logs: object) -> None:
            if epoch == 3:
                freed.set()

        waits = keras.callbacks.LambdaCallback(on_train_batch_begin=begin, on_epoch_end=end)
        train(model, kc.ModelCheckpoint(tmp_path / "run"), copies, waits, epochs=4)
        return tmp_path / "run", copies.taken, model

    def test_it_is_written_once(self, saved) -> None:
        """The first checkpoint is whole, so that it is the file that the others share."""
        run, _, _ = saved
        names = [list(data_files(run, step)) for step in (2, 4, 6, 8)]
        assert names[0] == ["ckpt-2.data-00000-of-00001"]
        assert names[3] == ["ckpt-8.data-00000-of-00002", "ckpt-8.data-00001-of-00002"]
        assert len({data_files(run, step)[each[0]].st_ino for step, each in zip((2, 4, 6, 8), names, strict=True)}) == 1
        assert taken(run) < 1.5 * data_files(run, 2)[names[0][0]].st_size

    def test_tensorflow_and_restore_read_each_to_the_bit(self, saved) -> None:
        """As it was when it was saved."""
        run, copies, model = saved
        for step, copy in copies.items():
            assert on_disk(str(run / f"ckpt-{step}")) == copy
            kc.restore(model, kc.CheckpointDirectory(run)[step])
            assert now(model) == copy

    @pytest.mark.sample(5)
    @pytest.mark.parametrize("gone", [[2], [2, 4, 6], [4], [8], [6, 8]], ids=str)
    def test_whatever_is_removed_the_others_are_whole(self, saved, gone) -> None:
        """A file is there as long as one checkpoint has it."""
        run, copies, _ = saved
        runs = kc.CheckpointDirectory(run)
        for step in copies.keys() - set(gone):
            runs.pin(step)
        runs.prune(runs.plan(kc.LatestN(1) if 8 not in gone else kc.EveryNSteps(1000)))
        assert [record.step for record in runs] == sorted(copies.keys() - set(gone))

        assert runs.verify().ok
        for record in runs:
            assert on_disk(record.prefix) == copies[record.step]

    def test_a_changed_bit_is_found_in_each_that_has_the_file(self, saved) -> None:
        """They are all damaged then, and each is told of."""
        run, _, _ = saved
        with open(run / "ckpt-4.data-00000-of-00002", "r+b") as file:
            file.seek(1000)
            byte = file.read(1)
            file.seek(1000)
            file.write(bytes([byte[0] ^ 1]))

        assert kc.CheckpointDirectory(run).verify().listing.damaged.keys() == {"ckpt-2", "ckpt-4", "ckpt-6", "ckpt-8"}

    @pytest.mark.sample(2)
    @pytest.mark.parametrize("place", ["model/frozen/kernel", "model/dense/kernel"])
    def test_a_damaged_file_is_shared_no_more(self, saved, place) -> None:
        """The next checkpoint is whole: it is written anew, even where the damage is in what it would not use."""
        run, copies, model = saved
        damage(run / "ckpt-2.data-00000-of-00001", copies[2][place])

        train(model, kc.ModelCheckpoint(run), epochs=1)

        assert "ckpt-10" not in kc.CheckpointDirectory(run).verify().listing.damaged

    def test_the_sidecar_tells_what_was_shared(self, saved) -> None:
        """By file, and in sum."""
        run, _, _ = saved
        first, second = list(kc.CheckpointDirectory(run))[:2]
        assert [file.shared for file in first.files] == [False, False]
        assert [file.shared for file in second.files] == [True, False, False]
        assert (first.size_shared, second.size_shared) == (0, second.files[0].size)

    def test_a_plan_tells_what_removing_frees(self, saved) -> None:
        """Not what others have too; and the directory takes what it takes."""
        run, _, _ = saved
        runs = kc.CheckpointDirectory(run)
        before = taken(run)

        plan = runs.plan(kc.LatestN(2))
        frees = [decision.size for decision in plan.decisions if not decision.kept]
        removed = runs.prune(plan)

        assert removed == [2, 4]
        # The sidecars, of which a plan does not speak, and the state file.
        assert sum(frees) < before - taken(run) < sum(frees) + 10_000
        assert max(frees) < 300_000
        assert re.search(r"which frees \d+ kB", str(plan))
        assert re.search(r"2 checkpoints, 2.\d+ MB on disk, for 2.\d+ MB of their sizes are shared", str(runs))


def damage(path: pathlib.Path, where: bytes) -> None:
    """Changes a bit of a file, in the first of some bytes."""
    content = bytearray(path.read_bytes())
    content[content.index(where)] ^= 1
    path.write_bytes(content)


def test_a_file_that_somebody_writes_to_is_shared_no_more(tmp_path) -> None:
    """While the training goes on that has it from memory what is in the file."""
    model, copies = frozen_model(), Copies()

    def write(epoch: int, logs: object) -> None:
        if epoch == 2:
            background.wait()
            damage(tmp_path / "ckpt-2.data-00000-of-00001", copies.taken[2]["model/frozen/kernel"])

    train(model, kc.ModelCheckpoint(tmp_path), copies, keras.callbacks.LambdaCallback(on_epoch_begin=write))

    assert kc.CheckpointDirectory(tmp_path).verify().listing.damaged.keys() == {"ckpt-2", "ckpt-4"}
    assert on_disk(str(tmp_path / "ckpt-6")) == copies.taken[6]


def test_a_file_that_somebody_writes_to_while_it_is_linked_is_shared_no_more(tmp_path, monkeypatch) -> None:
    """It is known as it was when it was looked at."""
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


def test_a_checkpoint_that_lists_another_file_is_shared_too(tmp_path) -> None:
    """A sidecar may name more than TensorFlow's files."""
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


def test_another_training_shares_too(tmp_path) -> None:
    """It finds what is there in the newest checkpoint, as another process does."""
    train(frozen_model(), kc.ModelCheckpoint(tmp_path), epochs=1)
    model = frozen_model()
    kc.restore(model, tmp_path)
    train(model, kc.ModelCheckpoint(tmp_path), epochs=1)

    _, second = kc.CheckpointDirectory(tmp_path)
    assert second.files[0].shared
    assert on_disk(second.prefix) == now(model)


def test_callbacks_that_save_the_same_step_share_all_but_what_one_has_alone(tmp_path) -> None:
    """Of a model that is trained in all its parts, so that nothing of earlier steps is the same."""
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


def test_what_is_written_while_another_callback_copies_is_as_its_digest_says(tmp_path, monkeypatch) -> None:
    """With XLA, on a slow disk: one saves the weights alone, and the other finds no memory but in the same pages."""
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


def test_a_file_that_is_mostly_dead_is_written_anew(tmp_path) -> None:
    """Of five layers another one changes in each epoch, and from the fourth on the first file has less than a half."""
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
    assert inodes[2][1] in inodes[3]  # of which all is used
    records = list(kc.CheckpointDirectory(tmp_path))
    assert max(record.size for record in records) < 2 * records[0].size
    assert on_disk(str(tmp_path / "ckpt-8")) == now(model)


def test_a_little_model_is_written_anew(tmp_path) -> None:
    """A link has its costs too."""
    model = keras.Sequential([keras.Input((700,)), keras.layers.Dense(10, trainable=False), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    train(model, kc.ModelCheckpoint(tmp_path))

    assert not any(record.size_shared for record in kc.CheckpointDirectory(tmp_path))


def test_on_another_disk_everything_is_written(tmp_path) -> None:
    """A link cannot leave its file system."""
    elsewhere = pathlib.Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    other = elsewhere / f"keras_ckpt-{os.getpid()}"
    model = frozen_model()
    try:
        train(model, kc.ModelCheckpoint(tmp_path / "run"), kc.ModelCheckpoint(other), epochs=2)
        assert [record.size_shared > 0 for record in kc.CheckpointDirectory(other)] == [False, True]
        assert on_disk(str(other / "ckpt-4")) == now(model)
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_at_the_limit_of_links_everything_is_written(tmp_path) -> None:
    """Of ext4 it is 65,000."""
    model = frozen_model()
    train(model, kc.ModelCheckpoint(tmp_path / "run"), epochs=1)
    (tmp_path / "links").mkdir()
    try:
        for number in range(70_000):
            os.link(tmp_path / "run" / "ckpt-2.data-00000-of-00001", tmp_path / "links" / str(number))
    except OSError:
        pass
    else:
        pytest.skip("this file system has no limit of links")
    train(model, kc.ModelCheckpoint(tmp_path / "run"), epochs=1)

    assert [record.size_shared for record in kc.CheckpointDirectory(tmp_path / "run")] == [0, 0]
    assert kc.CheckpointDirectory(tmp_path / "run").verify().ok


def test_a_full_disk_has_room_for_what_is_new(tmp_path, monkeypatch) -> None:
    """What is shared needs none."""
    model = frozen_model()
    monkeypatch.setattr(
        Folder, "free", lambda folder: 3_000_000 if not (tmp_path / "ckpt-2.json").exists() else 500_000
    )

    train(model, kc.ModelCheckpoint(tmp_path, on_full_disk="raise"), epochs=2)

    assert len(kc.CheckpointDirectory(tmp_path)) == 2


def test_a_step_that_is_saved_again_shares_with_the_one_before(tmp_path) -> None:
    """Its files have the same names."""
    model = frozen_model()
    train(model, kc.ModelCheckpoint(tmp_path), epochs=2)
    kc.restore(model, kc.CheckpointDirectory(tmp_path)[2])
    model.fit(X, Y + 1, batch_size=4, verbose=0, callbacks=[kc.ModelCheckpoint(tmp_path)])

    again = kc.CheckpointDirectory(tmp_path)[4]
    assert again.sequence == 3
    assert again.size_shared
    assert kc.CheckpointDirectory(tmp_path).verify().ok
    assert on_disk(again.prefix) == now(model)


def test_what_has_not_changed_is_apart_from_what_has(tmp_path) -> None:
    """Of a model less than a half of which is frozen, the first file is not worth a link, but the second."""
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


def test_a_table_of_which_few_rows_change_is_written_whole(tmp_path) -> None:
    """No part of a value is shared: optimizers with momentum change every row that was ever used."""
    model = keras.Sequential(
        [keras.Input((4,), dtype="int32"), keras.layers.Embedding(40_000, 32), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    rows = np.random.default_rng(0).choice(500, (8, 4)).astype("int32")

    model.fit(rows, np.ones((8, 4, 1)), batch_size=4, epochs=2, verbose=0, callbacks=[kc.ModelCheckpoint(tmp_path)])

    first, second = kc.CheckpointDirectory(tmp_path)
    assert (first.size_shared, second.size_shared) == (0, 0)
    assert on_disk(second.prefix) == now(model)
