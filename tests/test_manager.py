"""`CheckpointManager`: the behavior of TensorFlow's manager, with policies and sidecars."""

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
    """The setup of a test, once with TensorFlow's class and once with this package's."""
    return Setup(request.param, tmp_path / "run")


@pytest.fixture
def ours(tmp_path) -> Setup:
    return Setup(kc.CheckpointManager, tmp_path / "run")


class TestTensorFlowBehavior:
    """Each test runs with both classes: eager code for TensorFlow's manager runs unchanged."""

    def test_saves_are_numbered_by_the_save_counter(self, setup) -> None:
        """From 1. Each save returns its prefix."""
        manager = setup.manager()

        assert [manager.save(), manager.save()] == setup.prefixes("ckpt-1", "ckpt-2")
        assert manager.latest_checkpoint == setup.prefixes("ckpt-2")[0]
        assert manager.checkpoints == setup.prefixes("ckpt-1", "ckpt-2")
        assert int(setup.checkpoint.save_counter) == 2

    def test_max_to_keep_removes_the_oldest_checkpoints(self, setup) -> None:
        """In the order of saving."""
        manager = setup.manager(2)
        for _ in range(4):
            manager.save()

        assert manager.checkpoints == setup.prefixes("ckpt-3", "ckpt-4")
        assert setup.on_disk() == {"ckpt-3", "ckpt-4"}

    def test_an_empty_directory_has_no_latest_checkpoint(self, setup) -> None:
        """`latest_checkpoint` is `None`, `checkpoints` is empty."""
        manager = setup.manager(3)

        assert manager.latest_checkpoint is None
        assert manager.checkpoints == []

    @pytest.mark.parametrize("number", [70, tf.Variable(70), tf.constant(70, tf.int64)])
    def test_the_number_of_a_save_may_be_an_int_a_variable_or_a_tensor(self, setup, number) -> None:
        """The save counter is incremented, the given variable is not."""
        number = tf.Variable(70) if isinstance(number, tf.Variable) else number
        manager = setup.manager(3)

        assert manager.save(number) == setup.prefixes("ckpt-70")[0]
        assert manager.save(checkpoint_number=number) == setup.prefixes("ckpt-70")[0]
        assert int(number) == 70
        assert int(setup.checkpoint.save_counter) == 2
        assert manager.checkpoints == setup.prefixes("ckpt-70")

    def test_a_number_that_is_saved_again_is_the_newest_checkpoint(self, setup) -> None:
        """The order is the order of saving, not of the numbers."""
        manager = setup.manager(2)
        for number in (1, 2, 3, 2, 4):
            manager.save(number)

        assert manager.checkpoints == setup.prefixes("ckpt-2", "ckpt-4")
        assert setup.on_disk() == {"ckpt-2", "ckpt-4"}

    @pytest.mark.parametrize("name", ["model", "ü", "a b", "my-name"])
    def test_checkpoint_name_is_the_prefix_of_the_names(self, setup, name) -> None:
        manager = setup.manager(1, checkpoint_name=name)
        manager.save(), manager.save()

        assert manager.checkpoints == setup.prefixes(f"{name}-2")
        assert setup.on_disk() == {f"{name}-2"}
        assert setup.manager(1, checkpoint_name=name).latest_checkpoint == setup.prefixes(f"{name}-2")[0]

    def test_a_new_manager_continues_with_the_checkpoints_on_disk(self, setup) -> None:
        """It lists them and prunes them."""
        manager = setup.manager(2)
        manager.save(), manager.save()

        again = setup.manager(2)
        assert again.checkpoints == setup.prefixes("ckpt-1", "ckpt-2")
        again.save()

        assert again.checkpoints == setup.prefixes("ckpt-2", "ckpt-3")

    def test_restore_or_initialize_restores_the_latest_checkpoint(self, setup) -> None:
        """`init_fn` runs only if there is no checkpoint."""
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

    def test_restore_or_initialize_restores_variables_that_are_created_later(self, setup) -> None:
        """TensorFlow's deferred restoration."""
        setup.value.assign(7)
        setup.manager(3).save()
        setup.checkpoint = tf.train.Checkpoint()
        setup.manager(3).restore_or_initialize()

        setup.checkpoint.value = tf.Variable(0)

        assert int(setup.checkpoint.value) == 7

    def test_a_save_within_the_interval_is_skipped(self, setup) -> None:
        """The step counter measures it. Unchecked, only a second save at one step is skipped."""
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
    def test_the_interval_counts_from_last_checkpoint_step(self, setup, last, saved) -> None:
        accepted = inspect.signature(type(setup.manager(9))).parameters
        if "last_checkpoint_step" not in accepted:
            pytest.skip("TensorFlow 2.18 has no last_checkpoint_step")
        counter = tf.Variable(1)
        manager = setup.manager(9, step_counter=counter, checkpoint_interval=3, last_checkpoint_step=last)

        assert (manager.save() is not None) == saved

    def test_the_interval_counts_from_the_restored_step(self, setup) -> None:
        """`restore_or_initialize` sets the last step."""
        counter = tf.Variable(5)
        setup.manager(9).save()
        manager = setup.manager(9, step_counter=counter, checkpoint_interval=3)
        manager.restore_or_initialize()
        counter.assign(7)
        assert manager.save() is None
        counter.assign(8)
        assert manager.save() is not None

    @pytest.mark.parametrize("hours", [2, 0.5])
    def test_keep_checkpoint_every_n_hours_preserves_checkpoints(self, setup, monkeypatch, hours) -> None:
        """A preserved checkpoint is no longer listed, and no later manager removes it."""
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

    def test_the_hours_count_from_the_first_manager_in_the_directory(self, setup, monkeypatch) -> None:
        """Even if only a later manager asks for preserved checkpoints."""
        now = [1_000_000.0]
        monkeypatch.setattr(time, "time", lambda: now[0])
        setup.manager(1).save()
        for _ in range(2):
            now[0] += 3600
            setup.manager(1, keep_checkpoint_every_n_hours=1).save()

        assert setup.on_disk() == {"ckpt-2", "ckpt-3"}

    def test_write_callbacks_of_the_options_are_called_with_the_path(self, setup) -> None:
        """Callbacks with and without a parameter. The options are not changed."""
        calls = []
        options = tf.train.CheckpointOptions(experimental_write_callbacks=[calls.append, lambda: calls.append("done")])

        path = setup.manager(3).save(options=options)

        assert calls == [path, "done"]
        assert len(options.experimental_write_callbacks) == 2

    def test_the_properties_return_the_arguments(self, setup) -> None:
        """`directory` and `checkpoint`. `sync` returns at once."""
        manager = setup.manager(3)

        assert manager.directory == setup.directory
        assert manager.checkpoint is setup.checkpoint
        manager.sync()

    def test_the_directory_may_be_a_path_object_or_a_relative_path(self, setup, tmp_path, monkeypatch) -> None:
        """The prefixes start with the directory as given."""
        monkeypatch.chdir(tmp_path)
        for directory in (pathlib.Path("relative"), "relative"):
            manager = setup.kind(setup.checkpoint, directory, 3)
            assert manager.save(1) == os.path.join("relative", "ckpt-1")
            assert manager.latest_checkpoint == os.path.join("relative", "ckpt-1")

    @pytest.mark.parametrize("options", [{"max_to_keep": 0}, {"max_to_keep": -1}, {"checkpoint_interval": 3}])
    def test_invalid_arguments_are_a_value_error(self, setup, options) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 - TensorFlow has another text
            setup.manager(**options)

    def test_a_sharded_checkpoint_is_saved_and_pruned_as_a_whole(self, setup) -> None:
        """TensorFlow gets the sharding callback of the options."""
        setup.checkpoint.more = tf.Variable(tf.zeros(1000))
        sharding = tf.train.experimental.MaxShardSizePolicy(max_shard_size=500)
        manager = setup.manager(1)
        for _ in range(2):
            manager.save(options=tf.train.CheckpointOptions(experimental_sharding_callback=sharding))

        names = {path.name for path in pathlib.Path(setup.directory).iterdir() if "data" in path.name}
        assert len(names) > 2
        assert all(name.startswith("ckpt-2.data-") for name in names)


def test_it_is_an_instance_of_tensorflows_manager(ours) -> None:
    assert isinstance(ours.manager(), tf.train.CheckpointManager)


def test_every_public_name_of_tensorflows_manager_is_overridden() -> None:
    """No method of the parent works on state that this class does not have."""
    theirs = {name for name in vars(tf.train.CheckpointManager) if not name.startswith("_")}

    assert theirs <= set(vars(kc.CheckpointManager))
    assert len(theirs) == 8


def test_the_first_arguments_are_those_of_tensorflow_in_the_same_order() -> None:
    """This class adds keyword-only arguments."""
    for name in ("__init__", "save"):
        ours, theirs = (
            list(inspect.signature(getattr(each, name)).parameters)
            for each in (kc.CheckpointManager, tf.train.CheckpointManager)
        )
        assert ours[: len(theirs)] == theirs


def test_a_policy_ranks_by_the_metrics_of_each_save(ours) -> None:
    """Records also have the metadata and the epoch of the save."""
    manager = ours.manager(keep=kc.BestN(2, "loss", "min") | kc.LatestN(1))
    losses = [0.5, 0.2, 0.4, 0.3, 0.6]

    paths = [manager.save(metrics={"loss": loss}, metadata={"by": "hand"}, epoch=2) for loss in losses]

    assert manager.checkpoints == ours.prefixes("ckpt-2", "ckpt-4", "ckpt-5")
    assert None not in paths
    record = kc.CheckpointDirectory(ours.directory)[4]
    assert (record.metrics, record.metadata, record.epoch) == ({"loss": 0.3}, {"by": "hand"}, 2)


def test_a_save_that_the_policy_would_not_keep_is_not_written_and_returns_none(ours) -> None:
    manager = ours.manager(keep=kc.BestN(1), monitor="loss", mode="min")

    assert manager.save(metrics={"loss": 0.5})
    assert manager.save(metrics={"loss": 0.6}) is None
    assert ours.on_disk() == {"ckpt-1"}
    assert kc.CheckpointDirectory(ours.directory).best().step == 1


def test_metadata_of_a_save_updates_the_managers_metadata(ours) -> None:
    """The sidecar has both."""
    manager = ours.manager(metadata={"a": 1, "b": 1})
    manager.save(metadata={"b": 2})

    assert kc.CheckpointDirectory(ours.directory).latest().metadata == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": 3, "max_to_keep": 3}, "keep and max_to_keep exclude each other"),
        ({"keep": kc.BestN(3)}, "has no metric to rank by"),
        ({"keep": kc.BestN(3, "loss")}, "give mode='min' or mode='max'"),
        ({"checkpoint_name": "a/b"}, "Received: 'a/b'"),
        ({"checkpoint_name": ""}, "Received: ''"),
        ({"max_to_keep": True}, "Received: True"),
        ({"metadata": {"x": object()}}, "metadata"),
        ({"min_free": "10 G"}, "min_free expected a size above 0, such as '50 GB'"),
    ],
)
def test_the_error_of_an_invalid_argument_has_the_received_value_or_the_fix(ours, options, text) -> None:
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
def test_the_constructor_refuses_arguments_that_would_fail_later(ours, options, text) -> None:
    """Not at the first save."""
    with pytest.raises((ValueError, TypeError), match=text):
        ours.manager(**options)


def test_an_object_that_is_no_checkpoint_is_refused(tmp_path) -> None:
    """The error says how to wrap it."""
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
def test_facts_that_no_sidecar_can_hold_are_refused_before_any_write(ours, facts, text) -> None:
    """The next save works."""
    with pytest.raises((ValueError, TypeError), match=text):
        ours.manager().save(**facts)

    assert kc.CheckpointDirectory(ours.directory).listing().records == ()
    assert ours.manager().save() is not None


def test_an_epoch_may_be_a_variable_or_a_numpy_integer(ours) -> None:
    manager = ours.manager()
    manager.save(epoch=tf.Variable(3)), manager.save(epoch=np.int64(4))

    assert [record.epoch for record in kc.CheckpointDirectory(ours.directory)] == [3, 4]


def test_saving_over_a_run_of_fit_requires_a_restore(ours) -> None:
    """Otherwise the manager would overwrite and prune the run."""
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
    """A layer that holds another layer, which Keras builds at the first call."""

    def __init__(self, held=lambda layer: layer) -> None:
        super().__init__()
        self.part = held(keras.layers.Dense(2))

    def call(self, x):
        part = self.part if callable(self.part) else next(iter(self.part))
        return part(x)


X = np.ones((1, 4), "float32")


def saved_model(ours, make) -> keras.Layer:
    """Builds a model with random weights, and saves it."""
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
def test_an_unbuilt_model_gets_the_restored_values_at_its_first_call(ours, make) -> None:
    """As in TensorFlow for variables that are created later."""
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
def test_a_restore_into_an_unbuilt_layer_with_parts_is_refused(ours, make) -> None:
    """Keras would initialize the parts after the restore. TensorFlow loses the values silently."""
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
def test_a_partial_restore_warns_with_the_skipped_names(ours, saved, restored, message) -> None:
    """On either side. Another name of the same object is not skipped."""
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
def test_weights_that_tensorflow_does_not_save_cause_one_warning(ours, held) -> None:
    """TensorFlow does not track lists and sets of a Keras 3 layer."""
    layer = Composite(held)
    layer(np.ones((1, 4), "float32"))
    ours.checkpoint = tf.train.Checkpoint(layer=layer)
    manager = ours.manager()

    with pytest.warns(UserWarning, match=r"does not save these weights: layer: .*/kernel, layer: .*/bias\. "):
        manager.save()
    manager.save()


class Listed(keras.Model):
    """A model that holds its layers only in a list."""

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
def test_a_restore_warns_of_unbuilt_layers_in_a_list(ours, parts) -> None:
    """The checkpoint does not have them, and TensorFlow restores nothing silently."""
    ours.checkpoint = tf.train.Checkpoint(model=Listed(parts))
    ours.checkpoint.model(X)
    with pytest.warns(UserWarning, match="does not save these weights"):
        ours.manager().save()
    ours.checkpoint = tf.train.Checkpoint(model=Listed(parts))

    with pytest.warns(UserWarning, match=r"but not in the checkpoint: model: \w+ \(not built\)") as caught:
        ours.manager().restore_or_initialize()

    assert "flatten" not in str(caught[0].message)


def test_saving_over_checkpoints_that_were_not_restored_warns(ours) -> None:
    """TensorFlow's manager silently numbers from 1 again."""
    ours.manager().save()
    ours.checkpoint = tf.train.Checkpoint(value=ours.value)

    with pytest.warns(UserWarning, match=r"was not restored from them\. So its numbers begin again"):
        ours.manager().save()


def test_damaged_checkpoints_never_lead_to_init_fn(ours) -> None:
    """A damaged checkpoint is skipped with a warning. If all are damaged, it is an error."""
    manager = ours.manager(init_fn=lambda: pytest.fail("init_fn was called"))
    first, second = manager.save(), manager.save()

    pathlib.Path(f"{second}.data-00000-of-00001").unlink()
    with pytest.warns(UserWarning, match=r"ckpt-2 is damaged: .* is missing. Going back to ckpt-1"):
        assert manager.restore_or_initialize() == first

    os.truncate(f"{first}.index", 10)
    with pytest.raises(
        kc.DamagedCheckpointError, match=r"No checkpoint in .* can be restored. ckpt-1 is damaged: .*ckpt-2"
    ):
        manager.restore_or_initialize()


def test_files_of_another_checkpoint_under_its_name_are_not_restored(ours) -> None:
    """TensorFlow reads files of another step without an error."""
    manager = ours.manager()
    first, second = manager.save(), manager.save()
    for ending in ("index", "data-00000-of-00001"):
        shutil.copy(f"{first}.{ending}", f"{second}.{ending}")
    ours.value.assign(7)

    with pytest.raises(kc.DamagedCheckpointError, match=r"ckpt-2 cannot be trusted: .*digest does not match"):
        manager.restore_or_initialize()

    assert int(ours.value) == 7


def test_a_checkpoint_that_is_pruned_during_its_restore_is_replaced_by_the_next(ours, monkeypatch) -> None:
    """Another process saves and prunes between the check and TensorFlow's read."""
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
def test_a_refused_save_does_not_use_up_a_number(ours, arguments, text) -> None:
    """The next save has the number of the refused save."""
    manager = ours.manager()

    with pytest.raises((ValueError, TypeError), match=text):
        manager.save(**arguments)

    assert manager.save() == ours.prefixes("ckpt-1")[0]


@pytest.mark.parametrize("keep", [None, 2, kc.EveryNSteps(2) | kc.LatestN(1)])
def test_a_tensorflow_manager_opened_later_lists_the_same_checkpoints(ours, keep) -> None:
    """The latest checkpoint is the same too."""
    manager = ours.manager(keep=keep)
    for _ in range(5):
        manager.save()

    theirs = tf.train.CheckpointManager(ours.checkpoint, ours.directory, 10)

    assert theirs.checkpoints == manager.checkpoints
    assert theirs.latest_checkpoint == manager.latest_checkpoint == tf.train.latest_checkpoint(ours.directory)


def test_a_tensorflow_manager_opened_later_does_not_remove_pinned_checkpoints(ours) -> None:
    """TensorFlow's list does not have them."""
    manager = ours.manager(keep=3)
    for _ in range(3):
        manager.save()
    kc.CheckpointDirectory(ours.directory).pin(2)
    manager.save()

    theirs = tf.train.CheckpointManager(ours.checkpoint, ours.directory, 1)
    theirs.save()

    assert "ckpt-2" in ours.on_disk()


def test_it_continues_from_checkpoints_of_tensorflows_manager(ours) -> None:
    """They are restored, counted, listed as without a sidecar, and not pruned."""
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


def test_a_later_save_of_tensorflows_manager_is_the_latest(ours) -> None:
    """TensorFlow's state file names it."""
    ours.manager().save(5)
    tf.train.CheckpointManager(ours.checkpoint, ours.directory, 9).save(3)

    assert ours.manager().latest_checkpoint == ours.prefixes("ckpt-3")[0]


def test_a_checkpoint_of_tensorflows_manager_is_never_overwritten(ours) -> None:
    """A save without a restore is an error, and loses nothing."""
    theirs = tf.train.CheckpointManager(ours.checkpoint, ours.directory, 3)
    theirs.save()
    before = pathlib.Path(ours.directory, "ckpt-1.index").read_bytes()
    ours.checkpoint.save_counter.assign(0)

    with pytest.raises(kc.DirectoryNotEmptyError, match="left alone"):
        ours.manager(3).save()

    assert pathlib.Path(ours.directory, "ckpt-1.index").read_bytes() == before


@pytest.mark.parametrize("name", ["run[1]", "lr*", "a b", "ü", "what?", "back\\slash"])
def test_a_directory_may_have_glob_characters_in_its_name(tmp_path, name) -> None:
    """Files of a sibling that the pattern would match stay."""
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


def test_a_preserved_checkpoint_is_pinned(ours, monkeypatch) -> None:
    """So no policy removes it, and the table shows the reason."""
    now = [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    manager = ours.manager(1, keep_checkpoint_every_n_hours=1)
    for _ in range(3):
        now[0] += 3600
        manager.save()

    records = {record.step: record.pin for record in kc.CheckpointDirectory(ours.directory)}
    assert records == {1: "keep_checkpoint_every_n_hours", 2: "keep_checkpoint_every_n_hours", 3: None}


def test_a_full_disk_without_room_for_a_pin_removes_nothing(ours, monkeypatch) -> None:
    """The error says that the checkpoint is saved. The next save prunes."""
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


def test_a_failed_save_does_not_start_the_interval(ours) -> None:
    """The save can be tried again at once."""
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


def test_a_new_manager_keeps_the_run_id_of_the_newest_checkpoint(ours) -> None:
    ours.manager().save()
    ours.manager().save()

    assert len({record.run_id for record in kc.CheckpointDirectory(ours.directory)}) == 1


def test_listing_and_restoring_take_no_lock_and_change_no_file(ours) -> None:
    ours.manager().save()
    before = sorted(path.name for path in pathlib.Path(ours.directory).rglob("*"))

    manager = ours.manager(1)
    manager.restore_or_initialize()

    assert manager._writer._lock is None
    assert sorted(path.name for path in pathlib.Path(ours.directory).rglob("*")) == before


def test_a_save_with_enable_async_is_committed_when_it_returns(ours) -> None:
    path = ours.manager().save(options=tf.train.CheckpointOptions(enable_async=True))

    assert kc.CheckpointDirectory(ours.directory).latest().prefix == path


def test_restore_accepts_a_checkpoint_of_a_custom_training_loop(tmp_path) -> None:
    """The manager saved the model in a `tf.train.Checkpoint`."""
    model, other = dense_model(), dense_model()
    fit(model)
    kc.CheckpointManager(tf.train.Checkpoint(model=model, epoch=tf.Variable(3)), tmp_path).save()

    report = kc.restore(other, tmp_path)

    assert [weight.tolist() for weight in other.get_weights()] == [weight.tolist() for weight in model.get_weights()]
    assert report.step == 1
