"""`average`: the mean of checkpoints, as a checkpoint of its own or in a model."""

import os

import keras
import ml_dtypes
import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.formats.averaging import average_into
from keras_ckpt.model.averaged import count_statistics
from keras_ckpt.model.naming import named_variables
from support.arrays import written
from support.frameworks import tf
from support.models import Reports, X, Y, dense_model, fit, same, save, values

rng = np.random.default_rng(5)


def normalized(*, trainable: bool = True, **options) -> keras.Model:
    """A model with batch normalization and dropout, both of which change in a pass of training."""
    layers = [
        keras.layers.Dense(3),
        keras.layers.BatchNormalization(trainable=trainable, momentum=0.9),
        keras.layers.Dropout(0.5, seed=1),
        keras.layers.Dense(1),
    ]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("adam", "mse", run_eagerly=True, **options)
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> kc.CheckpointDirectory:
    """A run of five epochs. The three best are the steps 10, 15 and 25."""
    path = tmp_path_factory.mktemp("trained") / "run"
    losses = [5.0, 1.0, 2.0, 4.0, 3.0]
    model = normalized()
    checkpoint = kc.ModelCheckpoint(path, monitor="score", mode="min", metadata={"data": "digits"})
    fit(model, Reports(score=losses), checkpoint, epochs=5, batches=10, batch_size=2)
    return kc.CheckpointDirectory(path)


def means(records: list[kc.CheckpointRecord]) -> dict[str, np.ndarray]:
    """The means of the weights by NumPy on whole arrays, and the other values of the newest."""
    loaded = [kc.load_variables(record) for record in records]
    found = {name: loaded[-1][name] for name in loaded[-1]}
    for name in loaded[-1].weights:
        if loaded[-1][name].dtype.kind == "f":
            found[name] = np.mean(np.stack([each[name] for each in loaded]), axis=0, dtype="float32")
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_a_mean_is_that_of_whole_arrays_in_numpy(tmp_path, dtype, count) -> None:
    """In float32, and in the type of the larger types, one after another. The type of the values stays."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    stored = [rng.normal(size=(50, 300)).astype(dtype) for _ in range(count)]
    records = [written(tmp_path / "run", step, d__w=each) for step, each in enumerate(stored, 1)]

    found = kc.load_variables(kc.average(records, into=tmp_path / "average"))["model/d/w"]

    wide = np.result_type(dtype, np.float32)
    expected = np.mean(np.stack([each.astype(wide) for each in stored]), axis=0, dtype=wide).astype(dtype)
    assert found.dtype == dtype
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_values_that_are_equal_in_all_stay_to_the_bit(tmp_path, dtype) -> None:
    """The sum of seven and its division would round. A frozen layer stays frozen."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    value = np.append(rng.normal(size=1000), [np.nan, np.inf, -np.inf]).astype(dtype)
    records = [written(tmp_path / "run", step, d__w=value) for step in range(1, 8)]

    found = kc.average(records, into=tmp_path / "average")

    assert kc.load_variables(found)["model/d/w"].tobytes() == value.tobytes()


def test_values_without_fractions_are_those_of_the_newest(tmp_path) -> None:
    """The newest in the order of saving, wherever it is in the list."""
    arrays = [
        {"d__count": np.array([step]), "d__flag": np.array([step > 1]), "d__words": np.array([b"a" * step]), "d__w": w}
        for step, w in enumerate([np.ones(2), np.full(2, 3.0)], 1)
    ]
    first, second = (written(tmp_path / "run", step, **each) for step, each in enumerate(arrays, 1))

    found = kc.load_variables(kc.average([second, first], into=tmp_path / "average"))

    assert found["model/d/count"].tolist() == [2]
    assert found["model/d/flag"].tolist() == [True]
    assert found["model/d/words"].tolist() == [b"aa"]
    assert found["model/d/w"].tolist() == [2, 2]


def test_the_best_checkpoints_of_a_run_are_averaged(trained, tmp_path) -> None:
    """Into a directory that tells what it was made of. No metric was measured on it."""
    record = kc.average(trained, into=tmp_path / "average")

    best = [trained[step] for step in (10, 15, 25)]
    assert record.metadata == {
        "data": "digits",
        "average_of": [10, 15, 25],
        "average_from": [each.prefix for each in best],
    }
    assert (record.step, record.epoch, record.metrics, record.reason) == (25, 5, {}, "average")
    assert record.run_id != best[0].run_id
    assert list(kc.CheckpointDirectory(tmp_path / "average")) == [record]
    assert kc.CheckpointDirectory(tmp_path / "average").verify().ok
    found, expected = kc.load_variables(record), means(best)
    assert found.keys() == expected.keys()
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize(("best", "expected"), [(1, [10]), (2, [10, 15]), (9, [5, 10, 15, 20, 25])])
def test_a_run_gives_as_many_of_its_best_as_it_has(trained, tmp_path, best, expected) -> None:
    assert kc.average(trained.path, best, into=tmp_path).metadata["average_of"] == expected


def test_the_metric_and_its_mode_may_be_given(trained, tmp_path) -> None:
    record = kc.average(trained, 2, into=tmp_path, monitor="score", mode="max")

    assert record.metadata["average_of"] == [5, 20]


def test_an_averaged_checkpoint_is_restored_loaded_and_exported(trained, tmp_path) -> None:
    """With the optimizer of the newest."""
    record = kc.average(trained, into=tmp_path / "average")
    model = normalized()

    kc.restore(model, record)

    expected = means([trained[step] for step in (10, 15, 25)])
    np.testing.assert_array_equal(model.layers[0].kernel, expected["model/dense/kernel"])
    assert model.optimizer.iterations.numpy() == 25
    assert same(kc.load_model(record), model)
    kc.export(record, tmp_path / "average.keras")
    exported = keras.models.load_model(tmp_path / "average.keras")
    np.testing.assert_array_equal(exported.predict(X, verbose=0), model.predict(X, verbose=0))


@pytest.mark.parametrize("ending", [".keras", ".weights.h5"])
def test_an_average_may_be_a_file_of_keras(trained, tmp_path, ending) -> None:
    """Of a directory, or of files of Keras."""
    model = normalized()
    checkpoint = kc.ModelCheckpoint(tmp_path / ("{epoch}" + ending), save_weights_only=ending != ".keras")
    fit(model, checkpoint, epochs=3, batches=10, batch_size=2)
    files = [tmp_path / f"{epoch}{ending}" for epoch in (1, 2, 3)]

    from_files = kc.average(files, into=tmp_path / f"files{ending}")
    from_run = kc.average(trained, into=tmp_path / f"run{ending}")

    assert from_files.metadata["average_of"] == [5, 10, 15]
    loaded = [kc.load_variables(each) for each in files]
    found = kc.load_variables(from_files)
    for name in found.weights:
        if found[name].dtype == "float32":
            expected = np.mean(np.stack([each[name] for each in loaded]), axis=0, dtype="float32")
            np.testing.assert_array_equal(found[name], expected)
    kc.restore(model, from_run)
    expected = means([trained[step] for step in (10, 15, 25)])
    np.testing.assert_array_equal(model.layers[0].kernel, expected["model/dense/kernel"])
    assert kc.CheckpointDirectory(tmp_path / f"run{ending}").verify().ok


def test_an_average_is_assigned_to_a_model(trained) -> None:
    """Its optimizer stays, and the model belongs to no run."""
    model = normalized()
    kc.restore(model, trained)
    optimizer = [each.numpy().copy() for each in model.optimizer.variables]

    report = kc.average(trained, into=model)

    expected = means([trained[step] for step in (10, 15, 25)])
    found = named_variables(model, weights_only=True)
    assert all(np.array_equal(each, expected[name]) for name, each in found.items())
    assert all(np.array_equal(a, b) for a, b in zip(optimizer, model.optimizer.variables, strict=True))
    assert kc.initial_epoch(model) == 0
    assert str(report).startswith("restored the average of ")
    assert set(report.matched) == found.keys()


def test_files_of_keras_and_checkpoints_of_tensorflow_are_averaged_in_a_model(tmp_path) -> None:
    """Each by its own names."""

    model, kernels = dense_model(), []
    fit(model, kc.ModelCheckpoint(tmp_path / "a.keras"))
    kernels.append(model.layers[0].kernel.numpy())
    fit(model)
    theirs = tf.train.Checkpoint(model=model).save(str(tmp_path / "theirs" / "ckpt"))
    kernels.append(model.layers[0].kernel.numpy())
    fit(model)

    kc.average([tmp_path / "a.keras", theirs], into=model)

    np.testing.assert_array_equal(model.layers[0].kernel, np.mean(kernels, axis=0, dtype="float32"))


def test_values_of_bfloat16_are_averaged_in_a_model(tmp_path) -> None:
    kernels = []
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="bfloat16")])
    for step in (1, 2, 3):
        model.layers[0].kernel.assign(rng.normal(size=(4, 3)))
        kernels.append(np.asarray(model.layers[0].kernel.numpy()))
        save(model, tmp_path, step)

    kc.average(list(kc.CheckpointDirectory(tmp_path)), into=model)

    expected = np.mean(np.stack(kernels).astype("float32"), axis=0, dtype="float32").astype(ml_dtypes.bfloat16)
    assert np.asarray(model.layers[0].kernel.numpy()).tobytes() == expected.tobytes()


def statistics(model: keras.Model, x: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The means of the statistics of the batches before the normalization, by NumPy."""
    hidden = x @ model.layers[0].kernel.numpy() + model.layers[0].bias.numpy()
    batches = [hidden[at : at + batch_size] for at in range(0, len(x), batch_size)]
    return np.mean([each.mean(0) for each in batches], 0), np.mean([each.var(0) for each in batches], 0)


@pytest.mark.parametrize("form", ["array", "dataset"])
def test_the_statistics_of_batch_normalization_are_counted_again_from_data(trained, form) -> None:
    """Nothing else changes: neither the seeds of dropout nor the momentum."""
    data, size = (X, 32) if form == "array" else (tf.data.Dataset.from_tensor_slices((X, Y)).batch(8), 8)
    plain, model = normalized(), normalized()
    kc.average(trained, into=plain)

    kc.average(trained, into=model, data=data)

    layer = model.layers[1]
    mean, variance = statistics(model, X, size)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-4)
    assert layer.momentum == 0.9
    counted = {id(layer.moving_mean), id(layer.moving_variance)}
    for mine, other in zip(model.variables, plain.variables, strict=True):
        assert id(mine) in counted or np.array_equal(mine, other)


def test_statistics_with_nan_are_counted_again(trained, tmp_path) -> None:
    model = normalized()
    kc.restore(model, trained)
    model.layers[1].moving_mean.assign(np.full(3, np.nan))
    record = save(model, tmp_path)

    with pytest.warns(UserWarning, match="has NaN or infinity in model/batch_normalization/moving_mean"):
        kc.average([record], into=model, data=X)

    np.testing.assert_allclose(model.layers[1].moving_mean, statistics(model, X, 32)[0], rtol=1e-4, atol=1e-6)


class InInference(keras.Model):
    """A model that calls another in inference, even while it is trained."""

    def __init__(self, inner: keras.Model) -> None:
        super().__init__()
        self.inner = inner

    def call(self, inputs):
        return self.inner(inputs, training=False)


def test_statistics_of_a_layer_that_does_not_train_stay(trained) -> None:
    """Because it is not trainable, or because its model calls it in inference."""
    frozen, inner = normalized(trainable=False), normalized()
    outer = InInference(inner)
    outer(X)
    inner.layers[1].moving_mean.assign(np.full(3, 7))

    kc.average(trained, into=frozen, data=X)
    count_statistics(outer, X)

    averaged = means([trained[step] for step in (10, 15, 25)])
    np.testing.assert_array_equal(frozen.layers[1].moving_mean, averaged["model/batch_normalization/moving_mean"])
    np.testing.assert_array_equal(inner.layers[1].moving_mean, np.full(3, 7))
    np.testing.assert_array_equal(inner.layers[1].moving_variance, np.ones(3))


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("data", [np.ones((8, 5), "float32"), X[:0], "no data"], ids=["shape", "empty", "text"])
def test_data_that_does_not_fit_leaves_the_model_as_it_was(trained, data) -> None:
    """With its run, and with its momentum."""
    model = normalized()
    kc.restore(model, trained)
    before = values(model)

    with pytest.raises((ValueError, TypeError)):
        kc.average(trained, into=model, data=data)

    assert all(np.array_equal(mine, other) for mine, other in zip(values(model), before, strict=True))
    assert model.layers[1].momentum == 0.9
    assert kc.initial_epoch(model) == 5


def test_checkpoints_of_other_structures_are_refused_by_name(tmp_path) -> None:
    """Nothing is written."""
    records = [
        written(tmp_path / "a", d__w=np.ones(2), d__old=np.ones(1), d__type=np.ones(1)),
        written(tmp_path / "b", d__w=np.ones(3), d__new=np.ones(1), d__type=np.ones(1, "float32")),
    ]

    with pytest.raises(kc.MismatchError) as caught:
        kc.average(records, into=tmp_path / "average")

    text = str(caught.value)
    assert f"model/d/w: float64 (2,), float64 (3,) in {records[1].prefix}" in text
    assert f"model/d/old: float64 (1,), missing in {records[1].prefix}" in text
    assert f"model/d/new: missing, float64 (1,) in {records[1].prefix}" in text
    assert f"model/d/type: float64 (1,), float32 (1,) in {records[1].prefix}" in text
    assert not (tmp_path / "average").exists()


def test_checkpoints_that_do_not_fit_the_model_leave_it_as_it_was(trained, tmp_path) -> None:
    model = dense_model()
    record = save(model, tmp_path)
    before = values(model)

    with pytest.raises(kc.MismatchError, match=r"the average of .* does not fit the model"):
        kc.average(trained, into=model)
    with pytest.raises(kc.MismatchError, match="cannot be averaged with"):
        kc.average([record, trained.latest()], into=model)

    assert all(np.array_equal(mine, other) for mine, other in zip(values(model), before, strict=True))


@pytest.mark.parametrize("where", ["itself", "another run", "a file"])
def test_an_average_never_joins_other_checkpoints(tmp_path, where) -> None:
    records = [written(tmp_path / "run", step, d__w=np.ones(2)) for step in (1, 2)]
    written(tmp_path / "other", d__w=np.ones(2))
    (tmp_path / "best.keras").write_bytes(b"mine")
    path = {"itself": "run", "another run": "other", "a file": "best.keras"}[where]

    with pytest.raises(kc.DirectoryNotEmptyError, match=r"has checkpoints: .*choose another path"):
        kc.average(records, into=tmp_path / path)

    assert [record.step for record in kc.CheckpointDirectory(tmp_path / "run")] == [1, 2]
    assert (tmp_path / "best.keras").read_bytes() == b"mine"


def test_a_damaged_checkpoint_is_named_and_nothing_is_written(tmp_path) -> None:
    model = dense_model()
    records = [save(model, tmp_path / "run", step) for step in (1, 2)]
    before = values(model)
    [data] = [file.name for file in records[0].files if "data" in file.name]
    path = tmp_path / "run" / data
    path.write_bytes(b"changed" + path.read_bytes()[7:])

    for into in (tmp_path / "average", model):
        with pytest.raises(kc.DamagedCheckpointError, match=r"run/ckpt-1 cannot be trusted: .*(checksum|digest)"):
            kc.average(records, into=into)

    assert not (tmp_path / "average").exists()
    assert all(np.array_equal(mine, other) for mine, other in zip(values(model), before, strict=True))


def test_a_checkpoint_that_was_pruned_is_not_found(tmp_path) -> None:
    records = [written(tmp_path / "run", step, d__w=np.ones(2)) for step in (1, 2)]
    kc.CheckpointDirectory(tmp_path / "run").prune(kc.LatestN(1))

    with pytest.raises(kc.CheckpointNotFoundError, match=r"There is no checkpoint .*ckpt-1"):
        kc.average(records, into=tmp_path / "average")

    assert not (tmp_path / "average").exists()


def test_an_average_that_cannot_be_saved_leaves_nothing(tmp_path) -> None:
    records = [written(tmp_path / "run", step, d__w=np.ones(2)) for step in (1, 2)]
    (tmp_path / "file").write_text("mine")

    with pytest.raises((kc.SaveError, NotADirectoryError)):
        kc.average(records, into=tmp_path / "file" / "average")

    assert sorted(os.listdir(tmp_path)) == ["file", "run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"into": "average", "data": X}, r"average\(data=...\) needs a model"),
        ({"into": "{epoch}.keras"}, "without fields in braces"),
        ({"into": "average.h5"}, "ends in .keras or .weights.h5"),
        ({"into": "average", "best": 0}, "BestN expected n >= 1"),
        ({"into": None}, "expected a Keras model or a path"),
        ({"into": keras.Sequential([keras.layers.Dense(2)])}, "is not built"),
        ({"into": "average", "checkpoints": []}, "Expected at least one checkpoint"),
        ({"into": "average", "checkpoints": 3}, "expected a directory or a list"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused(trained, tmp_path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises((ValueError, TypeError), match=message):
        kc.average(**{"checkpoints": trained, **arguments})

    assert not os.listdir(tmp_path)


def test_several_runs_are_refused(trained, tmp_path) -> None:
    """The mean of the newest checkpoints of other runs would be no model."""
    with pytest.raises(TypeError, match=r"expected a directory or a list of checkpoints first"):
        kc.average(kc.Runs(trained.path), into=tmp_path / "mean")


def test_a_list_has_no_metric(trained, tmp_path) -> None:
    """All of it is averaged, so a metric would not matter."""
    with pytest.raises(ValueError, match="neither monitor nor mode"):
        kc.average(list(trained), into=tmp_path / "average", monitor="score")


def test_a_run_without_the_metric_is_not_averaged(trained, tmp_path) -> None:
    with pytest.raises(kc.CheckpointNotFoundError, match="'other', which no checkpoint has"):
        kc.average(trained, into=tmp_path / "average", monitor="other", mode="min")
    with pytest.raises(kc.CheckpointNotFoundError, match="There is no checkpoint in"):
        kc.average(tmp_path / "empty", into=tmp_path / "average")


def test_files_of_keras_are_not_averaged_into_a_directory(tmp_path) -> None:
    """A directory holds TensorFlow checkpoints, whose names such files do not have."""
    model = dense_model()
    fit(model, kc.ModelCheckpoint(tmp_path / "a.keras"))

    with pytest.raises(ValueError, match=r"a\.keras is a file of Keras.* path that ends in \.keras or \.weights\.h5"):
        average_into([tmp_path / "a.keras"], str(tmp_path / "average"))
