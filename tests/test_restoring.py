"""`restore`: all or nothing, into the right layer, with a report that fits on a screen."""

import pathlib
import re

import keras
import msgspec
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.model import checkpoint_reader
from keras_ckpt.model.naming import named_variables
from keras_ckpt.model.position import position_of
from keras_ckpt.store import record as sidecars
from support import zoo
from support.frameworks import tf
from support.models import X, Y, dense_model, fit, same, save, values
from test_state import convolutional, functional, mixed, named, subclassed, two_of_one_path


@pytest.fixture
def model(runs) -> keras.Model:
    """A model whose state is on disk, as its only checkpoint."""
    model = dense_model()
    fit(model, kc.ModelCheckpoint(runs.path), epochs=2, validation_data=(X, Y))
    runs.prune(kc.LatestN(1))
    return model


@pytest.mark.parametrize("path", ["no run", "no run/ckpt-10"])
def test_a_missing_path_is_a_file_not_found_error(tmp_path, path) -> None:
    """The package's own error is a `KeyError` too."""
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint .*no run") as caught:
        kc.restore(dense_model(), tmp_path / path)

    assert isinstance(caught.value, kc.CheckpointNotFoundError | KeyError)


@pytest.mark.parametrize(
    "form", ["record", "directory", "path of the directory", "prefix", "index", "sidecar", "relative"]
)
def test_restore_takes_a_record_a_directory_or_a_path(runs, model, monkeypatch, form) -> None:
    """A path may be absolute or relative, a prefix, or a file of the checkpoint."""
    record = runs.latest()
    monkeypatch.chdir(pathlib.Path(runs.path).parent)
    checkpoint = {
        "record": record,
        "directory": runs,
        "path of the directory": pathlib.Path(runs.path),
        "prefix": record.prefix,
        "index": record.prefix + ".index",
        "sidecar": record.prefix + ".json",
        "relative": "run/ckpt-10",
    }[form]
    other = dense_model()

    kc.restore(other, checkpoint)

    assert same(model, other)


@pytest.mark.parametrize("restore", ["ours", "TensorFlow's"])
def test_a_restored_model_with_a_string_lookup_predicts_the_same(runs, restore) -> None:
    """The script has the vocabulary, the checkpoint has the embeddings."""

    def make() -> keras.Model:
        lookup = keras.layers.StringLookup(vocabulary=["low", "middle", "high"])
        text = keras.Input((1,), dtype="string")
        model = keras.Model(text, keras.layers.Dense(1)(keras.layers.Embedding(4, 2)(lookup(text))[:, 0]))
        model.compile("adam", "mse")
        return model

    words = tf.constant([["low"], ["high"], ["middle"], ["another"]])
    model, other = make(), make()
    model.fit(words, np.arange(4.0), verbose=0, callbacks=[kc.ModelCheckpoint(runs.path)])

    if restore == "ours":
        kc.restore(other, runs)
    else:
        tf.train.Checkpoint(model=other).restore(runs.latest().prefix).expect_partial()

    np.testing.assert_array_equal(other.predict(words, verbose=0), model.predict(words, verbose=0))


def test_restore_builds_an_unbuilt_optimizer(runs, model) -> None:
    """A compiled model has its slots before its first batch."""
    other = dense_model()
    assert not other.optimizer.built

    report = kc.restore(other, runs)

    assert same(model, other)
    assert not report.missing


def test_restore_gives_an_uncompiled_model_weights_and_seeds(runs, model) -> None:
    """The missing optimizer is not a difference."""
    other = dense_model(compiled=False)

    report = kc.restore(other, runs)

    assert all(np.array_equal(a.numpy(), b.numpy()) for a, b in zip(model.variables, other.variables, strict=True))
    assert {name.split("/")[0] for name in report.unexpected} == {"optimizer", "metrics"}
    assert "model 5 of 5" in str(report)


@pytest.mark.filterwarnings(
    "ignore:Compiled differently"
)  # the test gives all variables random values, learning rates too
@pytest.mark.parametrize("build", [convolutional, functional, subclassed, named, two_of_one_path, mixed])
def test_restore_is_bit_exact_for_all_kinds_of_models(tmp_path, build) -> None:
    """Functional, sequential, subclassed, nested, shared path, frozen, mixed precision, averaged, accumulated."""
    model, other = build(), build()
    if not model.compiled:
        for each in (model, other):
            each.compile("adam", "mse")
            each.optimizer.build(each.trainable_variables)
    random = np.random.default_rng(1)
    for variable in named_variables(model).values():
        variable.assign(
            random.integers(0, 100, variable.shape).astype(
                variable.dtype if isinstance(variable.dtype, str) else "float32"
            )
        )
    save(model, tmp_path)

    kc.restore(other, tmp_path)

    for name, variable in named_variables(other).items():
        assert np.array_equal(variable.numpy(), named_variables(model)[name].numpy()), name


class Remembers(keras.layers.Layer):
    """A layer with a variable of any number of rows, and a variable of any shape."""

    def __init__(self, columns: int = 2) -> None:
        super().__init__()
        self.rows = tf.Variable(tf.zeros((1, columns)), shape=(None, columns), trainable=False)
        self.any = tf.Variable(0.0, shape=tf.TensorShape(None), trainable=False)

    def call(self, x):
        return x


def remembering(columns: int = 2) -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), Remembers(columns), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    return model


def test_restore_gives_a_variable_without_a_fixed_shape_its_saved_shape(tmp_path) -> None:
    """The shape at the beginning of the fit and the shape in the other model do not matter."""

    class Grows(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None) -> None:
            self.model.layers[0].rows.assign(tf.fill((100_000 * (epoch + 1), 2), float(epoch)))
            self.model.layers[0].any.assign(tf.range(float(epoch)))

    fit(remembering(), Grows(), kc.ModelCheckpoint(tmp_path), epochs=3)

    for epoch, record in enumerate(kc.CheckpointDirectory(tmp_path)):
        other = remembering()
        assert not kc.restore(other, record).mismatched
        assert other.layers[0].rows.numpy().tolist() == [[epoch, epoch]] * (100_000 * (epoch + 1))
        assert other.layers[0].any.numpy().tolist() == [*range(epoch)]


class Fussy(keras.optimizers.SGD):
    """An optimizer that raises an error in its build."""

    def build(self, variables) -> None:
        raise LookupError("not today")


def test_an_error_of_the_optimizer_is_not_damage(runs, model) -> None:
    """Restore raises the optimizer's own error, and does not fall back to an older checkpoint."""
    with pytest.raises(LookupError, match="not today"):
        kc.restore(dense_model(optimizer=Fussy(momentum=0.9)), runs)


def test_restore_enters_the_scope_of_a_models_strategy(runs, model) -> None:
    """The caller need not enter the scope, as with `fit`."""
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        other = dense_model(run_eagerly=False)

    kc.restore(other, runs)

    assert same(model, other)


@pytest.mark.parametrize(
    "error", [MemoryError, lambda: tf.errors.ResourceExhaustedError(None, None, "OOM")], ids=["Python", "TensorFlow"]
)
def test_a_lack_of_memory_is_not_damage(runs, model, monkeypatch, error) -> None:
    """Restore does not fall back: an older checkpoint would need as much memory."""
    raised = error()

    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(checkpoint_reader, "read_values", fail)

    with pytest.raises(type(raised)):
        kc.restore(dense_model(), runs)


def test_a_saved_shape_that_a_flexible_variable_cannot_have_is_a_difference(tmp_path) -> None:
    """The variable may have any number of rows, but only 3 columns."""
    fit(remembering(), kc.ModelCheckpoint(tmp_path))

    with pytest.raises(kc.MismatchError, match=r"rows: shape \(None, 3\) float32 in the model, shape \(1, 2\) float32"):
        kc.restore(remembering(3), tmp_path)


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd"},
        {"optimizer": lambda: keras.optimizers.AdamW(use_ema=True, ema_overwrite_frequency=2)},
        {"optimizer": lambda: keras.optimizers.Adam(gradient_accumulation_steps=2)},
        {"optimizer": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9))},
        {"optimizer": "adafactor"},
        {"optimizer": "muon"},
    ],
)
def test_training_of_a_restored_model_ends_like_an_unbroken_training(runs, options) -> None:
    """Two epochs, a restore and two more epochs give the same bits as four epochs."""
    make = options["optimizer"]
    options = lambda: {"optimizer": make() if callable(make) else make}  # noqa: E731
    whole = dense_model(**options())
    start = whole.get_weights()
    seeds = [variable.numpy().copy() for variable in whole.variables]
    fit(whole, epochs=4)
    first = dense_model(**options())
    first.set_weights(start)
    for variable, value in zip(first.variables, seeds, strict=True):
        variable.assign(value)
    fit(first, kc.ModelCheckpoint(runs.path), epochs=2)

    second = dense_model(**options())
    kc.restore(second, runs)
    fit(second, initial_epoch=2, epochs=4)

    assert same(whole, second)


def test_mixed_precision_training_of_a_restored_model_gives_the_same_bits(runs) -> None:
    """The loss scale and its counter are state too."""
    keras.mixed_precision.set_dtype_policy("mixed_float16")
    try:
        model, other = dense_model(), dense_model()
        fit(model, kc.ModelCheckpoint(runs.path))
        kc.restore(other, runs)
        fit(model), fit(other)
    finally:
        keras.mixed_precision.set_dtype_policy("float32")

    assert same(model, other)


def test_restore_gives_the_model_the_position_of_the_checkpoint(runs, model) -> None:
    """The position is run, step, epoch and batch."""
    other = dense_model()
    kc.restore(other, runs)

    position = position_of(other)
    assert (position.run_id, position.step, position.epoch, position.batch) == (runs.latest().run_id, 10, 2, 0)


def wider(name: str) -> keras.Model:
    """A model that the checkpoint does not fit."""
    layers = {
        "another shape": [keras.layers.Dense(3), keras.layers.Dropout(0.5), keras.layers.Dense(2)],
        "a layer more": [
            keras.layers.Dense(3),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1),
            keras.layers.Dense(1),
        ],
        "a layer less": [keras.layers.Dense(1), keras.layers.Dropout(0.5)],
        "no dropout": [keras.layers.Dense(3), keras.layers.Dense(1)],
        "another name": [keras.layers.Dense(3, name="head"), keras.layers.Dropout(0.5), keras.layers.Dense(1)],
        "another dtype": [keras.layers.Dense(3, dtype="float16"), keras.layers.Dropout(0.5), keras.layers.Dense(1)],
        "another optimizer": [keras.layers.Dense(3), keras.layers.Dropout(0.5), keras.layers.Dense(1)],
    }[name]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("sgd" if name == "another optimizer" else "adam", "mse", run_eagerly=True)
    return model


@pytest.mark.parametrize(
    ("case", "line"),
    [
        (
            "another shape",
            r"model/dense_1/kernel: shape \(3, 2\) float32 in the model, shape \(3, 1\) float32 in the checkpoint",
        ),
        ("a layer more", "model/dense_2/kernel: not in the checkpoint"),
        ("a layer less", "model/dense_1/kernel: in the checkpoint, not in the model"),
        ("no dropout", "model/seed_generator/seed_generator_state: in the checkpoint, not in the model"),
        ("another name", "model/head/kernel: not in the checkpoint"),
        ("another dtype", r"model/dense/kernel: shape \(4, 3\) float16 in the model, shape \(4, 3\) float32"),
        ("another optimizer", "optimizer/dense/kernel/velocity: in the checkpoint, not in the model"),
    ],
)
def test_a_difference_is_an_error_before_anything_changes(runs, model, case, line) -> None:
    """The error names the variables with their shapes, and the option that helps."""
    other = wider(case)
    other.optimizer.build(other.trainable_variables)
    before = values(other)

    with pytest.raises(kc.MismatchError, match=line) as caught:
        kc.restore(other, runs)

    assert isinstance(caught.value, ValueError)
    assert ("weights_only=True" if case == "another optimizer" else "strict=False") in str(caught.value)
    assert all(np.array_equal(a, b) for a, b in zip(before, values(other), strict=True))


def test_a_difference_in_metrics_is_only_reported(runs) -> None:
    """A strict restore succeeds with other metrics."""
    fit(dense_model(metrics=["mae"]), kc.ModelCheckpoint(runs.path))
    other = dense_model(metrics=["mse"])
    fit(other)

    report = kc.restore(other, runs)

    assert set(report.unexpected) == {f"metrics/mean_absolute_error/{part}" for part in ("total", "count")}
    assert set(report.missing) == {f"metrics/mean_squared_error/{part}" for part in ("total", "count")}


def test_restore_without_strict_restores_the_matching_variables(runs, model) -> None:
    """A head of another size keeps its weights, the rest is restored, and the model belongs to no run."""
    other = wider("another shape")
    head = other.layers[-1].get_weights()

    with pytest.warns(UserWarning, match=r"Left as they were: model/dense_1 \(2\)"):
        report = kc.restore(other, runs, strict=False)

    assert np.array_equal(other.layers[0].get_weights()[0], model.layers[0].get_weights()[0])
    assert all(np.array_equal(a, b) for a, b in zip(head, other.layers[-1].get_weights(), strict=True))
    assert "model/dense_1/kernel" in report.mismatched
    assert position_of(other) is None


@pytest.mark.parametrize("case", ["a layer more", "a layer less"])
def test_restore_without_strict_skips_automatic_names_if_their_number_differs(tmp_path, case) -> None:
    """With more or fewer layers of an automatic name, a name may mean another layer: none of them is restored."""

    def build(count: int) -> keras.Model:
        model = keras.Sequential(
            [keras.Input((4,)), *(keras.layers.Dense(4) for _ in range(count)), keras.layers.Dense(1, name="head")]
        )
        model.compile("sgd", "mse", run_eagerly=True)
        return model

    fit(build(3), kc.ModelCheckpoint(tmp_path))
    other = build(4 if case == "a layer more" else 2)
    before = [layer.get_weights() for layer in other.layers[:-1]]

    with pytest.warns(UserWarning, match=r"Left as they were: model/dense"):
        report = kc.restore(other, tmp_path, strict=False)

    assert "another number of these layers" in report.mismatched["model/dense_1/kernel"]
    assert "model/head/kernel" in report.matched
    assert all(np.array_equal(a, layer.get_weights()[0]) for (a, _), layer in zip(before, other.layers, strict=False))


def test_layers_named_by_the_user_are_restored_at_any_place(tmp_path) -> None:
    """A user's name identifies the layer."""

    def build(*layers: str) -> keras.Model:
        model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(4, name=name) for name in layers)])
        model.compile("sgd", "mse", run_eagerly=True)
        return model

    first = build("stem", "middle", "head")
    fit(first, kc.ModelCheckpoint(tmp_path))
    other = build("middle", "stem")

    kc.restore(other, tmp_path, strict=False)

    for name in ("middle", "stem"):
        assert np.array_equal(first.get_layer(name).kernel.numpy(), other.get_layer(name).kernel.numpy())


def test_a_model_built_three_times_in_a_process_gets_its_own_layers(tmp_path) -> None:
    """Other layers are made in between, and all shapes are equal."""

    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((4,)), *(keras.layers.Dense(4) for _ in range(6))])
        model.compile("sgd", "mse", run_eagerly=True)
        return model

    model = build()
    fit(model, kc.ModelCheckpoint(tmp_path))
    for _ in range(3):
        keras.layers.Dense(4)
    build()

    other = build()
    kc.restore(other, tmp_path)

    assert same(model, other)


def test_the_report_fits_on_a_screen(tmp_path) -> None:
    """A report of a hundred layers that do not fit counts variables by layer."""

    def build(prefix: str) -> keras.Model:
        layers = [keras.layers.Dense(2, name=f"{prefix}{n}") for n in range(100)]
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="stem"), *layers])
        model.compile("adam", "mse")
        return model

    model = build("a")
    save(model, tmp_path)

    with pytest.warns(UserWarning, match="Left as they were") as caught:
        report = kc.restore(build("b"), tmp_path, strict=False)

    assert len(str(caught[0].message).splitlines()) < 20
    assert len(report.unexpected) == 200
    assert len(str(report).splitlines()) < 40
    assert "model/a0 (2)" in str(report)
    assert repr(report) == str(report)
    assert "in the checkpoint, not in the model: model/a0 (2), " in report._repr_html_()
    with pytest.raises(kc.MismatchError) as caught:
        kc.restore(build("b"), tmp_path)
    assert len(str(caught.value).splitlines()) < 20


def test_a_report_is_a_table_of_the_parts_of_the_model_in_a_notebook(runs, model) -> None:
    """The table has the counts of the text."""
    report = kc.restore(model, runs)
    counts = re.findall(r"(\w+) (\d+) of (\d+)", str(report))

    cells = re.findall("<td[^>]*>([^<]*)", report._repr_html_())

    assert counts
    assert cells == [cell for row in counts for cell in row]
    assert str(report).split(": ")[0] in report._repr_html_()


@pytest.mark.parametrize(
    "unbuilt", [lambda: keras.Sequential([keras.layers.Dense(3)]), subclassed.__globals__["Subclassed"]]
)
def test_the_error_of_an_unbuilt_model_says_how_to_build_it(runs, model, unbuilt) -> None:
    """An unbuilt model has no variables to restore."""
    with pytest.raises(ValueError, match=r"not built.*model\.build\(input_shape\)"):
        kc.restore(unbuilt(), runs)


class OneVariable(keras.layers.Layer):
    """A layer whose only variable is a `tf.Variable`."""

    def __init__(self) -> None:
        super().__init__()
        self.variable = tf.Variable(1.0)

    def call(self, x):
        return x * self.variable


def test_a_model_with_only_tf_variables_is_restored(tmp_path) -> None:
    """Keras does not list these variables."""
    saved, restored = (keras.Sequential([keras.Input((4,)), OneVariable()]) for _ in range(2))
    saved.layers[0].variable.assign(3.0)
    zoo.save(saved, tmp_path)

    kc.restore(restored, tmp_path)

    assert float(restored.layers[0].variable) == 3.0


def test_a_model_without_variables_has_nothing_to_restore(runs) -> None:
    """The error does not say that the model is not built."""
    with pytest.raises(ValueError, match="is built and has no variables"):
        kc.restore(keras.Sequential([keras.Input((4,)), keras.layers.Flatten()]), runs)


@pytest.mark.parametrize(("kind", "older"), [("data", 10), ("sidecar", 10), ("both", 5)])
@pytest.mark.filterwarnings("ignore:.*ckpt-10.*Going back to ckpt-5")
def test_restore_falls_back_from_a_damaged_newest_checkpoint_to_the_next_older(runs, kind, older) -> None:
    """A warning names the damaged checkpoint and the older checkpoint."""
    fit(dense_model(), kc.ModelCheckpoint(runs.path), epochs=3)
    damaged = {
        "data": ["ckpt-15.data-00000-of-00001"],
        "sidecar": ["ckpt-15.json"],
        "both": ["ckpt-15.json", "ckpt-10.data-00000-of-00001"],
    }
    for name in damaged[kind]:
        path = pathlib.Path(runs.path, name)
        path.write_bytes(bytes(len(path.read_bytes())))

    with pytest.warns(UserWarning, match=r"ckpt-15.*Going back to ckpt-10"):
        report = kc.restore(dense_model(), runs)

    assert report.step == older


def test_the_report_has_the_epoch_for_initial_epoch(runs, model) -> None:
    """The report has the completed steps and epochs of the checkpoint."""
    report = kc.restore(dense_model(), runs)

    assert (report.step, report.epoch) == (10, 2)


def test_the_report_of_a_complete_restore_is_one_line(runs) -> None:
    """Metrics that are not built yet are not a difference."""
    fit(dense_model(metrics=["mae"]), kc.ModelCheckpoint(runs.path))

    report = kc.restore(dense_model(metrics=["mae"]), runs)

    assert str(report) == (f"restored {runs.path}/ckpt-5 at step 5: model 5 of 5, optimizer 10 of 10, metrics 2 of 2")


def test_restore_without_strict_skips_an_optimizer_of_another_class(runs, model) -> None:
    """The learning rate and the counter are skipped too: they mean nothing in another optimizer."""
    other = dense_model(optimizer=keras.optimizers.SGD(1e-5, momentum=0.9))

    with pytest.warns(UserWarning, match="optimizer is 'SGD' as in the program, not 'Adam' as saved"):
        report = kc.restore(other, runs, strict=False)

    assert float(other.optimizer.learning_rate) == pytest.approx(1e-5)
    assert int(other.optimizer.iterations) == 0
    assert "part of an optimizer that differs" in report.mismatched["optimizer/learning_rate"]
    assert np.array_equal(other.get_weights()[0], model.get_weights()[0])


def test_arguments_in_the_wrong_order_are_an_error_with_the_right_order(runs, model) -> None:
    """`restore(path, model)` is an easy mistake."""
    with pytest.raises(TypeError, match=r"restore\(model, checkpoint\) expected a Keras model first"):
        kc.restore(runs.path, model)


@pytest.mark.parametrize(
    ("checkpoint", "error", "text"),
    [
        ("run/ckpt-11", FileNotFoundError, "ckpt-11"),
        ("nowhere", FileNotFoundError, "nowhere"),
        ("nowhere/ckpt-1", FileNotFoundError, "nowhere"),
        (None, TypeError, "latest"),
        (10, TypeError, "Received: 10"),
        ("", TypeError, "Received: ''"),
    ],
)
def test_the_error_of_a_wrong_checkpoint_names_it(runs, model, tmp_path, monkeypatch, checkpoint, error, text) -> None:
    """The error shows the missing name, or the value that was received."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises((error, kc.CheckpointNotFoundError), match=text):
        kc.restore(dense_model(), checkpoint)


def test_restore_from_an_empty_directory_is_an_error(tmp_path) -> None:
    """Restore never returns without having restored anything."""
    with pytest.raises(kc.CheckpointNotFoundError, match="There is no checkpoint in"):
        kc.restore(dense_model(), tmp_path)


@pytest.mark.parametrize(
    "harm", ["data cut", "data flipped", "index flipped", "data of another", "data missing", "sidecar cut"]
)
def test_a_damaged_checkpoint_changes_nothing(runs, model, harm) -> None:
    """Sizes and digests are compared before a variable changes."""
    record = runs.latest()
    data, index, sidecar = (pathlib.Path(f"{record.prefix}.{end}") for end in ("data-00000-of-00001", "index", "json"))
    content = data.read_bytes()
    match harm:
        case "data cut":
            data.write_bytes(content[:-1])
        case "data flipped":
            data.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        case "index flipped":
            index.write_bytes(bytes([index.read_bytes()[0] ^ 1]) + index.read_bytes()[1:])
        case "data of another":
            data.write_bytes(bytes(len(content)))
        case "data missing":
            data.unlink()
        case "sidecar cut":
            sidecar.write_bytes(sidecar.read_bytes()[:-20])
    other = dense_model()
    before = values(other)

    with pytest.raises(kc.DamagedCheckpointError):
        kc.restore(other, record)
    with pytest.raises(kc.DamagedCheckpointError):
        kc.restore(other, runs)

    assert all(
        np.array_equal(a, b)
        for a, b in zip(before, values(dense_model()) and values(other)[: len(before)], strict=True)
    )


class TestCheckpointsOfTensorFlow:
    """Restore of checkpoints that `tf.train.Checkpoint` wrote, through their object graph."""

    @pytest.mark.parametrize(
        "root",
        [
            lambda model: tf.train.Checkpoint(model=model),
            lambda model: tf.train.Checkpoint(net=model, step=tf.Variable(3)),
            lambda model: tf.train.Checkpoint(optimizer=model.optimizer, model=model),
            lambda model: tf.train.Checkpoint(root=model),
        ],
    )
    @pytest.mark.parametrize("build", [convolutional, subclassed])
    def test_restore_finds_the_model_under_any_name(self, tmp_path, root, build) -> None:
        """All variables are restored but seeds, which TensorFlow does not save."""
        model, other = build(), build()
        for each in (model, other):
            each.compile("adam", "mse")
            each.optimizer.build(each.trainable_variables)
        for index, variable in enumerate([*model.weights, *model.optimizer.variables]):
            variable.assign(keras.ops.full(variable.shape, index + 1))
        prefix = root(model).save(tmp_path / "ckpt")

        report = kc.restore(other, prefix)

        for mine, theirs in zip(
            [*model.weights, *model.optimizer.variables], [*other.weights, *other.optimizer.variables], strict=True
        ):
            assert np.array_equal(mine.numpy(), theirs.numpy())
        assert all("seed_generator" in name or name.startswith("metrics/") for name in report.missing)
        assert report.step is None

    def test_the_newest_of_a_directory_is_the_latest_of_its_state_file(self, tmp_path) -> None:
        """`tf.train.latest_checkpoint` finds the same checkpoint."""
        model = dense_model()
        fit(model)
        manager = tf.train.CheckpointManager(tf.train.Checkpoint(model=model), tmp_path, 3)
        manager.save(7), manager.save(3)
        other = dense_model()

        report = kc.restore(other, tmp_path)

        assert report.prefix == str(tmp_path / "ckpt-3")

    def test_a_checkpoint_that_does_not_fit_is_refused(self, tmp_path) -> None:
        """The model stays as it was."""
        prefix = tf.train.Checkpoint(model=convolutional()).write(tmp_path / "ckpt")
        other = dense_model()
        before = other.get_weights()

        with pytest.raises(kc.MismatchError):
            kc.restore(other, prefix)

        assert all(np.array_equal(a, b) for a, b in zip(before, other.get_weights(), strict=True))

    def test_a_file_that_is_no_checkpoint_is_damaged(self, tmp_path) -> None:
        """The error is the package's, not TensorFlow's."""
        (tmp_path / "ckpt-1.index").write_bytes(b"not a table" * 20)

        with pytest.raises(kc.DamagedCheckpointError, match="does not end as an index does"):
            kc.restore(dense_model(), tmp_path / "ckpt-1")


@pytest.mark.parametrize(
    "name", ["run[1]", "lr*", "a b", "ü", "what?", "back\\slash", "new\nline", "$(x)", "~", "-rf", "😀"]
)
def test_a_directory_may_have_any_name(tmp_path, name) -> None:
    """TensorFlow itself reads some of these names as patterns and fails."""
    (tmp_path / "run1").mkdir()
    model, other = dense_model(), dense_model()
    runs = kc.CheckpointDirectory(tmp_path / name)
    fit(model, kc.ModelCheckpoint(runs.path, keep=1), epochs=2)

    kc.restore(other, runs)

    assert same(model, other)
    assert [record.step for record in runs] == [10]


def test_a_checkpoint_that_is_being_removed_is_not_restored(runs, model) -> None:
    """Its sidecar is in the trash and its files are still there, but it is not a checkpoint of TensorFlow."""
    record = runs.latest()
    pathlib.Path(f"{record.prefix}.json").rename(pathlib.Path(runs.path, ".keras_ckpt", "trash", f"{record.name}.json"))

    with pytest.raises(kc.CheckpointNotFoundError):
        kc.restore(dense_model(), record.prefix)


def test_a_record_is_refused_if_its_checkpoint_was_saved_again(runs, model) -> None:
    """The new checkpoint is not restored in place of the old one."""
    record = runs.latest()
    save(model, runs.path, step=record.step, run_id=record.run_id)

    with pytest.raises(kc.CheckpointNotFoundError, match="was saved again"):
        kc.restore(dense_model(), record)


def test_check_digests_false_checks_only_the_values_that_are_read(runs, model) -> None:
    """Sizes are compared, and TensorFlow's checksums of the values. A wrong digest is not noticed."""
    record, other = runs.latest(), dense_model()
    sidecar = pathlib.Path(f"{record.prefix}.json")
    files = tuple(
        msgspec.structs.replace(file, digest=f"blake3:{'0' * 64}") if file.name.endswith(".index") else file
        for file in record.files
    )
    sidecar.write_bytes(sidecars.encode(msgspec.structs.replace(record, files=files)))

    with pytest.raises(kc.DamagedCheckpointError, match="digest"):
        kc.restore(other, record)
    kc.restore(other, record, check_digests=False)
    assert same(model, other)

    data = pathlib.Path(f"{record.prefix}.data-00000-of-00001")
    data.write_bytes(bytes(len(data.read_bytes())))
    with pytest.raises(kc.DamagedCheckpointError):
        kc.restore(other, record, check_digests=False)
    assert same(model, other)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3fn", "bfloat16", "float16", "float64", "int8"])
def test_restore_takes_weights_of_any_dtype(tmp_path, dtype) -> None:
    """TensorFlow cannot sum float8, so the check for NaN must not sum it."""

    class Scaled(keras.layers.Layer):
        def build(self, shape) -> None:
            def zeros(shape, dtype) -> tf.Tensor:
                return tf.cast(tf.zeros(shape), dtype)

            self.scale = self.add_weight(shape=(3,), dtype=dtype, initializer=zeros, name="scale", trainable=False)

        def call(self, x):
            return x

    model, other = (keras.Sequential([keras.Input((4,)), Scaled()]) for _ in range(2))
    model.layers[0].scale.assign(tf.cast([1.0, 2.0, 3.0], dtype))
    save(model, tmp_path)

    kc.restore(other, tmp_path)

    assert tf.cast(other.layers[0].scale.value, "float32").numpy().tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("bias", [True, False], ids=["large and small variables", "two large variables"])
def test_restore_of_a_large_model_is_bit_exact(tmp_path, bias) -> None:
    """Several threads read it, each a part of the variables."""

    def build() -> keras.Model:
        layers = [keras.layers.Dense(1500, use_bias=bias), keras.layers.Dense(1500, use_bias=bias)]
        return keras.Sequential([keras.Input((1500,)), *layers])

    model, other = build(), build()
    for index, variable in enumerate(model.variables):
        variable.assign(keras.random.normal(variable.shape, seed=index))
    save(model, tmp_path)

    report = kc.restore(other, tmp_path)

    assert report.matched == tuple(named_variables(other))
    for mine, theirs in zip(model.variables, other.variables, strict=True):
        assert np.array_equal(mine.numpy(), theirs.numpy())
