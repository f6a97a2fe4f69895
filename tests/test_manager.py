"""`CheckpointManager`: what TensorFlow's does, it does; and what a policy keeps."""

import errno
import inspect
import os
import pathlib
import re
import shutil
import time
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_ckpt as kc
from keras_ckpt.store.files import Folder
from support.models import dense_model, fit


class Setup:
    """A checkpoint of one variable, and managers of it in a directory."""

    def __init__(self, kind: type, directory: pathlib.Path) -> None:
        self.kind = kind
        self.directory = str(directory)
        self.value = tf.Variable(0)
        self.checkpoint = tf.train.Checkpoint(value=self.value)

    def manager(self, max_to_keep=None, **options) -> tf.train.CheckpointManager:
        return self.kind(self.checkpoint, self.directory, max_to_keep, **options)

    def prefixes(self, *names: str) -> list[str]:
        return [os.path.join(self.directory, name) for name in names]

    def on_disk(self) -> set[str]:
        names = (path.name for path in pathlib.Path(self.directory).iterdir())
        return {name.removesuffix(".index") for name in names if name.endswith(".index")}


@pytest.fixture(params=[tf.train.CheckpointManager, kc.CheckpointManager], ids=["tensorflow", "keras_ckpt"])
def setup(request, tmp_path) -> Setup:
    """The same code, for TensorFlow's class and for this one."""
    return Setup(request.param, tmp_path / "run")


@pytest.fixture
def ours(tmp_path) -> Setup:
    return Setup(kc.CheckpointManager, tmp_path / "run")


class TestAsTensorFlow:
    """Each test runs with both classes: eager code written for TensorFlow's runs unchanged."""

    def test_saves_are_numbered_by_the_save_counter(self, setup) -> None:
        """From 1, and each returns its prefix."""
        manager = setup.manager()

        assert [manager.save(), manager.save()] == setup.prefixes("ckpt-1", "ckpt-2")
        assert manager.latest_checkpoint == setup.prefixes("ckpt-2")[0]
        assert manager.checkpoints == setup.prefixes("ckpt-1", "ckpt-2")
        assert int(setup.checkpoint.save_counter) == 2

    def test_the_oldest_are_removed(self, setup) -> None:
        """max_to_keep stay, in the order of saving."""
        manager = setup.manager(2)
        for _ in range(4):
            manager.save()

        assert manager.checkpoints == setup.prefixes("ckpt-3", "ckpt-4")
        assert setup.on_disk() == {"ckpt-3", "ckpt-4"}

    def test_an_empty_directory_has_no_latest(self, setup) -> None:
        """None, and no checkpoints."""
        manager = setup.manager(3)

        assert manager.latest_checkpoint is None
        assert manager.checkpoints == []

    @pytest.mark.parametrize("number", [70, tf.Variable(70), tf.constant(70, tf.int64)])
    def test_a_number_may_be_given(self, setup, number) -> None:
        """An int, a variable or a tensor; the counter is incremented all the same, the number is not."""
        number = tf.Variable(70) if isinstance(number, tf.Variable) else number
        manager = setup.manager(3)

        assert manager.save(number) == setup.prefixes("ckpt-70")[0]
        assert manager.save(checkpoint_number=number) == setup.prefixes("ckpt-70")[0]
        assert int(number) == 70
        assert int(setup.checkpoint.save_counter) == 2
        assert manager.checkpoints == setup.prefixes("ckpt-70")

    def test_a_number_that_is_saved_again_is_the_newest(self, setup) -> None:
        """The order is that of saving."""
        manager = setup.manager(2)
        for number in (1, 2, 3, 2, 4):
            manager.save(number)

        assert manager.checkpoints == setup.prefixes("ckpt-2", "ckpt-4")
        assert setup.on_disk() == {"ckpt-2", "ckpt-4"}

    @pytest.mark.parametrize("name", ["model", "ü", "a b", "my-name"])
    def test_the_name_may_be_given(self, setup, name) -> None:
        """Names begin with it."""
        manager = setup.manager(1, checkpoint_name=name)
        manager.save(), manager.save()

        assert manager.checkpoints == setup.prefixes(f"{name}-2")
        assert setup.on_disk() == {f"{name}-2"}
        assert setup.manager(1, checkpoint_name=name).latest_checkpoint == setup.prefixes(f"{name}-2")[0]

    def test_a_new_manager_goes_on(self, setup) -> None:
        """What is there is found, and swept as before."""
        manager = setup.manager(2)
        manager.save(), manager.save()

        again = setup.manager(2)
        assert again.checkpoints == setup.prefixes("ckpt-1", "ckpt-2")
        again.save()

        assert again.checkpoints == setup.prefixes("ckpt-2", "ckpt-3")

    def test_restores_the_latest_or_initializes(self, setup) -> None:
        """init_fn runs only if there is nothing to restore."""
        calls = []
        manager = setup.manager(3, init_fn=lambda: calls.append("init"))
        assert manager.restore_or_initialize() is None
        assert calls == ["init"]

        setup.value.assign(7)
        manager.save()
        setup.value.assign(0)

        again = setup.manager(3, init_fn=lambda: calls.append("again"))
        assert again.restore_or_initialize() == setup.prefixes("ckpt-1")[0]
        assert int(setup.value) == 7
        assert int(setup.checkpoint.save_counter) == 1
        assert calls == ["init"]

    def test_restores_variables_that_are_made_later(self, setup) -> None:
        """TensorFlow's deferred restoration works through restore_or_initialize."""
        setup.value.assign(7)
        setup.manager(3).save()
        setup.checkpoint = tf.train.Checkpoint()
        setup.manager(3).restore_or_initialize()

        setup.checkpoint.value = tf.Variable(0)

        assert int(setup.checkpoint.value) == 7

    def test_saves_only_when_the_interval_is_over(self, setup) -> None:
        """Counted from the last checkpoint by the step counter; unchecked, but for the very same step."""
        counter = tf.Variable(0)
        manager = setup.manager(9, step_counter=counter, checkpoint_interval=3)
        saved = []
        for step in range(8):
            counter.assign(step)
            saved += [step] * (manager.save(step) is not None)
        assert saved == [0, 3, 6]
        assert manager.checkpoint_interval == 3

        assert manager.save(7, check_interval=False) is not None
        assert manager.save(7, check_interval=False) is None
        counter.assign(8)
        assert manager.save(8) is None

    @pytest.mark.parametrize(("last", "saved"), [(None, True), (0, False), (-2, True)])
    def test_the_interval_counts_from_a_given_step(self, setup, last, saved) -> None:
        """last_checkpoint_step says where."""
        counter = tf.Variable(1)
        manager = setup.manager(9, step_counter=counter, checkpoint_interval=3, last_checkpoint_step=last)

        assert (manager.save() is not None) == saved

    def test_the_interval_counts_from_a_restored_step(self, setup) -> None:
        """restore_or_initialize sets the last step."""
        counter = tf.Variable(5)
        setup.manager(9).save()
        manager = setup.manager(9, step_counter=counter, checkpoint_interval=3)
        manager.restore_or_initialize()
        counter.assign(7)
        assert manager.save() is None
        counter.assign(8)
        assert manager.save() is not None

    @pytest.mark.parametrize("hours", [2, 0.5])
    def test_every_so_many_hours_one_is_kept_for_good(self, setup, monkeypatch, hours) -> None:
        """It is no longer listed, and no later manager removes it."""
        now = [1_000_000.0]
        monkeypatch.setattr(time, "time", lambda: now[0])
        manager = setup.manager(1, keep_checkpoint_every_n_hours=hours)
        for _ in range(6):
            now[0] += 3600
            manager.save()
            listed = manager.checkpoints
        again = setup.manager(1)
        now[0] += 3600
        again.save()

        assert listed == setup.prefixes("ckpt-6")
        kept = {2: {"ckpt-2", "ckpt-4", "ckpt-7"}, 0.5: {f"ckpt-{n}" for n in (1, 2, 3, 4, 5, 7)}}[hours]
        assert setup.on_disk() == kept

    def test_hours_count_from_the_first_manager(self, setup, monkeypatch) -> None:
        """A later manager asks for hours. The time before it counts too."""
        now = [1_000_000.0]
        monkeypatch.setattr(time, "time", lambda: now[0])
        setup.manager(1).save()
        for _ in range(2):
            now[0] += 3600
            setup.manager(1, keep_checkpoint_every_n_hours=1).save()

        assert setup.on_disk() == {"ckpt-2", "ckpt-3"}

    def test_callbacks_of_the_options_are_called_with_the_path(self, setup) -> None:
        """Those that take it, and those that take nothing; the options are not changed."""
        calls = []
        options = tf.train.CheckpointOptions(experimental_write_callbacks=[calls.append, lambda: calls.append("done")])

        path = setup.manager(3).save(options=options)

        assert calls == [path, "done"]
        assert len(options.experimental_write_callbacks) == 2

    def test_what_it_was_given(self, setup) -> None:
        """directory, checkpoint; sync waits for nothing."""
        manager = setup.manager(3)

        assert manager.directory == setup.directory
        assert manager.checkpoint is setup.checkpoint
        manager.sync()

    def test_a_path_object_and_a_relative_path(self, setup, tmp_path, monkeypatch) -> None:
        """The prefixes begin as the directory was given."""
        monkeypatch.chdir(tmp_path)
        for directory in (pathlib.Path("relative"), "relative"):
            manager = setup.kind(setup.checkpoint, directory, 3)
            assert manager.save(1) == os.path.join("relative", "ckpt-1")
            assert manager.latest_checkpoint == os.path.join("relative", "ckpt-1")

    @pytest.mark.parametrize("options", [{"max_to_keep": 0}, {"max_to_keep": -1}, {"checkpoint_interval": 3}])
    def test_wrong_arguments_are_refused(self, setup, options) -> None:
        """With a ValueError."""
        with pytest.raises(ValueError):  # noqa: PT011 - TensorFlow's text is its own
            setup.manager(**options)

    def test_sharded_checkpoints(self, setup) -> None:
        """Options for the files reach TensorFlow, and all files of a checkpoint go together."""
        setup.checkpoint.more = tf.Variable(tf.zeros(1000))
        sharding = tf.train.experimental.MaxShardSizePolicy(max_shard_size=500)
        manager = setup.manager(1)
        for _ in range(2):
            manager.save(options=tf.train.CheckpointOptions(experimental_sharding_callback=sharding))

        names = {path.name for path in pathlib.Path(setup.directory).iterdir() if "data" in path.name}
        assert len(names) > 2
        assert all(name.startswith("ckpt-2.data-") for name in names)


def test_is_a_manager_of_tensorflow(ours) -> None:
    """isinstance holds."""
    assert isinstance(ours.manager(), tf.train.CheckpointManager)


def test_covers_all_public_names_of_tensorflows() -> None:
    """Nothing of the parent's works on state that this class does not have."""
    theirs = {name for name in vars(tf.train.CheckpointManager) if not name.startswith("_")}

    assert theirs <= set(vars(kc.CheckpointManager))
    assert len(theirs) == 8


def test_takes_tensorflows_arguments_in_their_order() -> None:
    """And adds keyword-only ones."""
    for name in ("__init__", "save"):
        ours, theirs = (
            list(inspect.signature(getattr(each, name)).parameters)
            for each in (kc.CheckpointManager, tf.train.CheckpointManager)
        )
        assert ours[: len(theirs)] == theirs


def test_keeps_by_policy(ours) -> None:
    """The metrics of a save rank it, and what would be removed at once is not written."""
    manager = ours.manager(keep=kc.BestN(2, "loss", "min") | kc.LatestN(1))
    losses = [0.5, 0.2, 0.4, 0.3, 0.6]

    paths = [manager.save(metrics={"loss": loss}, metadata={"by": "hand"}, epoch=2) for loss in losses]

    assert manager.checkpoints == ours.prefixes("ckpt-2", "ckpt-4", "ckpt-5")
    assert None not in paths
    record = kc.CheckpointDirectory(ours.directory)[4]
    assert (record.metrics, record.metadata, record.epoch) == ({"loss": 0.3}, {"by": "hand"}, 2)


def test_one_that_the_policy_would_not_keep_returns_none(ours) -> None:
    """And is not on disk."""
    manager = ours.manager(keep=kc.BestN(1), monitor="loss", mode="min")

    assert manager.save(metrics={"loss": 0.5})
    assert manager.save(metrics={"loss": 0.6}) is None
    assert ours.on_disk() == {"ckpt-1"}
    assert kc.CheckpointDirectory(ours.directory).best().step == 1


def test_metadata_of_the_manager_and_of_the_save(ours) -> None:
    """Those of the save come on top."""
    manager = ours.manager(metadata={"a": 1, "b": 1})
    manager.save(metadata={"b": 2})

    assert kc.CheckpointDirectory(ours.directory).latest().metadata == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": 3, "max_to_keep": 3}, "keep and max_to_keep exclude each other"),
        ({"keep": kc.BestN(3)}, "does not say what to rank by"),
        ({"keep": kc.BestN(3, "loss")}, "give mode='min' or mode='max'"),
        ({"checkpoint_name": "a/b"}, "Received: 'a/b'"),
        ({"checkpoint_name": ""}, "Received: ''"),
        ({"max_to_keep": True}, "Received: True"),
        ({"metadata": {"x": object()}}, "metadata"),
    ],
)
def test_wrong_arguments_say_what_was_received(ours, options, text) -> None:
    """And what to give instead."""
    with pytest.raises((ValueError, TypeError), match=text):
        ours.manager(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "MIN"}, "Received: mode='MIN'"),
        ({"init_fn": 3}, "init_fn expected a function"),
        ({"checkpoint_name": 3}, "Received: 3"),
        ({"keep_checkpoint_every_n_hours": -1}, "Received: -1"),
        ({"max_to_keep": "3"}, "Received: '3'"),
    ],
)
def test_arguments_that_would_only_fail_later_are_refused_at_once(ours, options, text) -> None:
    """Not when the first checkpoint is due."""
    with pytest.raises((ValueError, TypeError), match=text):
        ours.manager(**options)


def test_something_else_than_a_checkpoint_is_refused(tmp_path) -> None:
    """With how to wrap it."""
    with pytest.raises(TypeError, match=r"tf\.train\.Checkpoint\(model=model\)"):
        kc.CheckpointManager(tf.Variable(0), tmp_path)


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"epoch": -1}, r"Step 1 cannot be recorded.*\$\.epoch"),
        ({"epoch": 2**70}, r"\$\.epoch"),
        ({"checkpoint_number": 2**63}, r"\$\.step"),
        ({"metrics": [1]}, "a dict of metrics"),
        ({"metrics": {"loss": "low"}}, "A metric is one number"),
        ({"metadata": [1]}, "metadata must be a dict"),
    ],
)
def test_what_no_sidecar_can_hold_is_refused_before_anything_is_written(ours, facts, text) -> None:
    """What is written can be read."""
    with pytest.raises((ValueError, TypeError), match=text):
        ours.manager().save(**facts)

    assert kc.CheckpointDirectory(ours.directory).listing().records == ()
    assert ours.manager().save() is not None


def test_an_epoch_may_be_a_variable(ours) -> None:
    """Or a number of NumPy's, as a checkpoint's number may."""
    manager = ours.manager()
    manager.save(epoch=tf.Variable(3)), manager.save(epoch=np.int64(4))

    assert [record.epoch for record in kc.CheckpointDirectory(ours.directory)] == [3, 4]


def test_a_run_of_fit_is_not_taken_over_without_being_restored(ours) -> None:
    """It would be saved over and pruned away."""
    fit(dense_model(), kc.ModelCheckpoint(ours.directory), epochs=3)

    with pytest.raises(kc.DirectoryNotEmptyError, match=r"holds a run of fit, the newest checkpoint of step 15"):
        ours.manager(1).save()

    assert ours.on_disk() == {"ckpt-5", "ckpt-10", "ckpt-15"}
    ours.checkpoint = tf.train.Checkpoint(model=dense_model())
    manager = ours.manager(keep=4)
    manager.restore_or_initialize()
    manager.save()
    assert ours.on_disk() == {"ckpt-5", "ckpt-10", "ckpt-15", "ckpt-16"}


class Composite(keras.layers.Layer):
    """A layer whose part is built when the layer is called."""

    def __init__(self, held=lambda layer: layer) -> None:
        super().__init__()
        self.part = held(keras.layers.Dense(2))

    def call(self, x):
        part = self.part if callable(self.part) else next(iter(self.part))
        return part(x)


X = np.ones((1, 4), "float32")


def saved_model(ours, make) -> keras.Layer:
    """A model that was called, with values of its own, and saved."""
    model = make()
    model(X)
    for variable in model.weights:
        variable.assign(np.random.default_rng(1).normal(size=variable.shape))
    ours.checkpoint = tf.train.Checkpoint(model=model)
    ours.manager().save()
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.Dense(2),
        lambda: keras.Sequential([keras.layers.Dense(3), keras.layers.BatchNormalization()]),
        lambda: keras.Sequential([keras.Sequential([keras.layers.Dense(3)])]),
    ],
)
def test_a_model_that_is_not_called_gets_its_values_when_it_is_called(ours, make) -> None:
    """As TensorFlow does it for variables that are made later."""
    saved, restored = saved_model(ours, make), make()
    ours.checkpoint = tf.train.Checkpoint(model=restored)
    ours.manager().restore_or_initialize()

    np.testing.assert_array_equal(restored(X), saved(X))


@pytest.mark.parametrize(
    "make",
    [
        Composite,
        lambda: keras.Sequential([Composite(), keras.layers.Dense(3)]),
        lambda: keras.Sequential([keras.layers.Reshape((4, 1)), keras.layers.LSTM(3)]),
    ],
)
def test_a_layer_of_parts_that_is_not_called_is_refused(ours, make) -> None:
    """Keras initializes the parts after the restore: TensorFlow loses their values without a word."""
    saved, restored = saved_model(ours, make), make()
    ours.checkpoint = tf.train.Checkpoint(model=restored)
    with pytest.raises(ValueError, match=r"Call the model on a batch before restore_or_initialize\(\)"):
        ours.manager().restore_or_initialize()

    restored(X)
    ours.manager().restore_or_initialize()

    np.testing.assert_array_equal(restored(X), saved(X))


@pytest.mark.parametrize(
    ("saved", "restored", "message"),
    [
        ("model optimizer", "model", r"not in the program: optimizer \(6 variables\)\.$"),
        ("model optimizer", "net optimizer", None),
        ("model", "model step", r"In the program, but not in the checkpoint: step\.$"),
        ("model step", "step", r"not in the program: model \(2 variables\)\.$"),
        ("model optimizer", "model optimizer", None),
    ],
)
def test_what_a_restore_leaves_out_is_named(ours, saved, restored, message) -> None:
    """On either side. What a restore takes by another name in the same object is not left out."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    things = {"model": model, "net": model, "optimizer": optimizer, "step": tf.Variable(1)}
    ours.checkpoint = tf.train.Checkpoint(**{name: things[name] for name in saved.split()})
    ours.manager().save()
    ours.checkpoint = tf.train.Checkpoint(**{name: things[name] for name in restored.split()})

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours.manager().restore_or_initialize()

    if message is None:
        assert not caught
    else:
        assert re.search(message, str(caught[0].message))
        assert caught[0].filename == __file__


@pytest.mark.parametrize("held", [lambda layer: [layer], lambda layer: {layer}])
def test_weights_that_tensorflow_does_not_save_are_named_once(ours, held) -> None:
    """TensorFlow does not look into the lists and sets of a layer of Keras 3."""
    layer = Composite(held)
    layer(np.ones((1, 4), "float32"))
    ours.checkpoint = tf.train.Checkpoint(layer=layer)
    manager = ours.manager()

    with pytest.warns(UserWarning, match=r"does not save these weights: layer: .*/kernel, layer: .*/bias\. "):
        manager.save()
    manager.save()


class Listed(keras.Model):
    """A model whose layers are in a list alone."""

    def __init__(self, parts) -> None:
        super().__init__()
        self.parts = [part() for part in parts]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize(
    "parts",
    [
        [lambda: keras.layers.Dense(2), keras.layers.BatchNormalization],
        [lambda: keras.layers.Dense(2), keras.layers.Flatten],
        [lambda: keras.Sequential([keras.layers.Dense(2)])],
    ],
    ids=["two layers", "a layer without weights", "a Sequential"],
)
def test_layers_in_a_list_of_a_model_that_is_not_called_are_named(ours, parts) -> None:
    """The checkpoint has nothing of them, and TensorFlow restores nothing without a word."""
    ours.checkpoint = tf.train.Checkpoint(model=Listed(parts))
    ours.checkpoint.model(X)
    with pytest.warns(UserWarning, match="does not save these weights"):
        ours.manager().save()
    ours.checkpoint = tf.train.Checkpoint(model=Listed(parts))

    with pytest.warns(UserWarning, match=r"but not in the checkpoint: model: \w+ \(not built\)") as caught:
        ours.manager().restore_or_initialize()

    assert "flatten" not in str(caught[0].message)


def test_beginning_over_is_warned_of(ours) -> None:
    """TensorFlow's manager numbers from 1 again without a word."""
    ours.manager().save()
    ours.checkpoint = tf.train.Checkpoint(value=ours.value)

    with pytest.warns(UserWarning, match=r"was not restored from them\. So its numbers begin again"):
        ours.manager().save()


def test_nothing_begins_anew_beside_damaged_checkpoints(ours) -> None:
    """One that is damaged is gone back from with a warning; if all are, it is an error."""
    manager = ours.manager(init_fn=lambda: pytest.fail("begins anew"))
    first, second = manager.save(), manager.save()

    pathlib.Path(f"{second}.data-00000-of-00001").unlink()
    with pytest.warns(UserWarning, match=r"ckpt-2 is damaged: .* is missing. Going back to ckpt-1"):
        assert manager.restore_or_initialize() == first

    os.truncate(f"{first}.index", 10)
    with pytest.raises(
        kc.DamagedCheckpointError, match=r"No checkpoint in .* can be restored. ckpt-1 is damaged: .*ckpt-2"
    ):
        manager.restore_or_initialize()


def test_files_of_another_checkpoint_are_not_restored(ours) -> None:
    """TensorFlow reads an index and data of another step and says nothing."""
    manager = ours.manager()
    first, second = manager.save(), manager.save()
    for ending in ("index", "data-00000-of-00001"):
        shutil.copy(f"{first}.{ending}", f"{second}.{ending}")
    ours.value.assign(7)

    with pytest.raises(kc.DamagedCheckpointError, match=r"ckpt-2 cannot be trusted: .*digest does not match"):
        manager.restore_or_initialize()

    assert int(ours.value) == 7


def test_what_is_pruned_while_it_is_restored_gives_way_to_the_next(ours, monkeypatch) -> None:
    """Another process saves and prunes between the check and TensorFlow's reading."""
    ours.manager(1).save()
    reader = Setup(kc.CheckpointManager, ours.directory)
    restoring = reader.checkpoint.restore

    def late(path):
        if path.endswith("ckpt-1"):
            ours.value.assign(2)
            ours.manager(1).save()
        return restoring(path)

    monkeypatch.setattr(reader.checkpoint, "restore", late)

    assert reader.manager(1).restore_or_initialize() == ours.prefixes("ckpt-2")[0]
    assert int(reader.value) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"checkpoint_number": -1}, "checkpoint_number=-1"),
        ({"epoch": "second"}, "second"),
        ({"metadata": [1]}, "metadata must be a dict"),
    ],
)
def test_a_refused_argument_does_not_count(ours, arguments, text) -> None:
    """The next save has the number that this one would have had."""
    manager = ours.manager()

    with pytest.raises((ValueError, TypeError), match=text):
        manager.save(**arguments)

    assert manager.save() == ours.prefixes("ckpt-1")[0]


@pytest.mark.parametrize("keep", [None, 2, kc.EveryNSteps(2) | kc.LatestN(1)])
def test_tensorflow_opened_afterwards_agrees(ours, keep) -> None:
    """Its manager lists the same, and its latest is the same."""
    manager = ours.manager(keep=keep)
    for _ in range(5):
        manager.save()

    theirs = tf.train.CheckpointManager(ours.checkpoint, ours.directory, 10)

    assert theirs.checkpoints == manager.checkpoints
    assert theirs.latest_checkpoint == manager.latest_checkpoint == tf.train.latest_checkpoint(ours.directory)


def test_tensorflow_opened_afterwards_does_not_remove_what_is_pinned(ours) -> None:
    """A pinned checkpoint is not in its list."""
    manager = ours.manager(keep=3)
    for _ in range(3):
        manager.save()
    kc.CheckpointDirectory(ours.directory).pin(2)
    manager.save()

    theirs = tf.train.CheckpointManager(ours.checkpoint, ours.directory, 1)
    theirs.save()

    assert "ckpt-2" in ours.on_disk()


def test_starts_from_checkpoints_of_tensorflow(ours) -> None:
    """They are restored and counted on, listed as without a sidecar, and not pruned."""
    theirs = tf.train.CheckpointManager(ours.checkpoint, ours.directory, 3)
    ours.value.assign(7)
    theirs.save(), theirs.save()
    ours.value.assign(0)
    manager = ours.manager(1)
    assert manager.latest_checkpoint == ours.prefixes("ckpt-2")[0]
    assert manager.checkpoints == ours.prefixes("ckpt-1", "ckpt-2")

    assert manager.restore_or_initialize() == ours.prefixes("ckpt-2")[0]
    assert int(ours.value) == 7
    manager.save(), manager.save()

    assert manager.checkpoints == ours.prefixes("ckpt-4")
    assert ours.on_disk() == {"ckpt-1", "ckpt-2", "ckpt-4"}
    assert kc.CheckpointDirectory(ours.directory).listing().unmanaged == ("ckpt-1", "ckpt-2")


def test_what_tensorflow_saved_last_is_the_latest(ours) -> None:
    """Its state file says so."""
    ours.manager().save(5)
    tf.train.CheckpointManager(ours.checkpoint, ours.directory, 9).save(3)

    assert ours.manager().latest_checkpoint == ours.prefixes("ckpt-3")[0]


def test_does_not_overwrite_a_checkpoint_of_tensorflow(ours) -> None:
    """One who forgets to restore is told, and loses nothing."""
    theirs = tf.train.CheckpointManager(ours.checkpoint, ours.directory, 3)
    theirs.save()
    before = pathlib.Path(ours.directory, "ckpt-1.index").read_bytes()
    ours.checkpoint.save_counter.assign(0)

    with pytest.raises(kc.DirectoryNotEmptyError, match="left alone"):
        ours.manager(3).save()

    assert pathlib.Path(ours.directory, "ckpt-1.index").read_bytes() == before


@pytest.mark.parametrize("name", ["run[1]", "lr*", "a b", "ü", "what?", "back\\slash"])
def test_a_directory_may_have_any_name(tmp_path, name) -> None:
    """And the files of a sibling that a pattern would match are left alone."""
    sibling = Setup(tf.train.CheckpointManager, tmp_path / "run1")
    sibling.manager().save()
    other = Setup(tf.train.CheckpointManager, tmp_path / "lr9")
    other.manager().save()
    ours = Setup(kc.CheckpointManager, tmp_path / name)
    manager = ours.manager(1)
    for value in range(3):
        ours.value.assign(value)
        manager.save()
    ours.value.assign(9)

    assert manager.restore_or_initialize() == ours.prefixes("ckpt-3")[0]
    assert int(ours.value) == 2
    assert ours.on_disk() == {"ckpt-3"}
    assert sibling.on_disk() == other.on_disk() == {"ckpt-1"}


def test_what_is_kept_for_good_is_pinned(ours, monkeypatch) -> None:
    """So that no policy of anybody removes it, and the table says why."""
    now = [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    manager = ours.manager(1, keep_checkpoint_every_n_hours=1)
    for _ in range(3):
        now[0] += 3600
        manager.save()

    records = {record.step: record.pin for record in kc.CheckpointDirectory(ours.directory)}
    assert records == {1: "keep_checkpoint_every_n_hours", 2: "keep_checkpoint_every_n_hours", 3: None}


def test_a_full_disk_that_has_no_room_for_a_pin_removes_nothing(ours, monkeypatch) -> None:
    """What was to be saved is saved, which the error says, and the next save makes up for the rest."""
    now, replace = [1_000_000.0], Folder.replace
    monkeypatch.setattr(time, "time", lambda: now[0])
    manager = ours.manager(1, keep_checkpoint_every_n_hours=2)

    def save() -> None:
        now[0] += 3600
        manager.save()

    def full(folder: Folder, name: str, data: bytes) -> None:
        if name.endswith(".keep"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        replace(folder, name, data)

    save()
    save()
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "replace", full)
        with pytest.raises(kc.DiskFullError, match="is saved, but the checkpoint to preserve could not be pinned"):
            save()
    assert ours.on_disk() == {"ckpt-2", "ckpt-3"}

    save()
    assert ours.on_disk() == {"ckpt-2", "ckpt-4"}


def test_a_save_that_failed_can_be_tried_again(ours) -> None:
    """The interval begins with what was saved."""
    step = tf.Variable(1)
    manager = ours.manager(step_counter=step, checkpoint_interval=5)
    foreign = pathlib.Path(ours.directory, "ckpt-1.data-00000-of-00001")
    foreign.parent.mkdir()
    foreign.write_bytes(b"mine")
    with pytest.raises(kc.DirectoryNotEmptyError):
        manager.save()
    with pytest.raises(TypeError):
        manager.save(metrics={"loss": "low"})

    assert manager.save(metrics={"loss": 0.5}) == ours.prefixes("ckpt-2")[0]
    assert manager.save() is None


def test_a_directory_of_one_run_has_one_run_id(ours) -> None:
    """A manager that is made anew goes on with the run of the newest."""
    ours.manager().save()
    ours.manager().save()

    assert len({record.run_id for record in kc.CheckpointDirectory(ours.directory)}) == 1


def test_an_evaluator_that_only_reads_takes_no_lock(ours) -> None:
    """Listing and restoring leave the directory as it is."""
    ours.manager().save()
    before = sorted(path.name for path in pathlib.Path(ours.directory).rglob("*"))

    manager = ours.manager(1)
    manager.restore_or_initialize()

    assert manager._writer._lock is None
    assert sorted(path.name for path in pathlib.Path(ours.directory).rglob("*")) == before


def test_background_options_save_at_once(ours) -> None:
    """What save() returns is committed, whatever the options say."""
    path = ours.manager().save(options=tf.train.CheckpointOptions(enable_async=True))

    assert kc.CheckpointDirectory(ours.directory).latest().prefix == path


def test_a_checkpoint_of_a_manager_is_restored_into_a_model(tmp_path) -> None:
    """One that a custom training loop saved, by restore()."""
    model, other = dense_model(), dense_model()
    fit(model)
    kc.CheckpointManager(tf.train.Checkpoint(model=model, epoch=tf.Variable(3)), tmp_path).save()

    report = kc.restore(other, tmp_path)

    assert [weight.tolist() for weight in other.get_weights()] == [weight.tolist() for weight in model.get_weights()]
    assert report.step == 1
