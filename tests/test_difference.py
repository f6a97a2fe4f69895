"""`diff`: the layers of two checkpoints or models, with the change of each."""

import contextlib
import json
import math
import pathlib

import keras
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner

import keras_ckpt as kc
from keras_ckpt.cli import main
from keras_ckpt.formats.difference import difference, open_side
from keras_ckpt.formats.variables import SUFFIX
from keras_ckpt.store.writer import SaveRequest, Writer
from support.arrays import written
from support.models import dense_model, fit, save

FLOATS = ["float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"]
rng = np.random.default_rng(3)


def pair(path: pathlib.Path, a: np.ndarray, b: np.ndarray) -> kc.LayerDifference:
    """The difference of two checkpoints of one array each."""
    [layer] = kc.diff(written(path / "a", dense__kernel=a), written(path / "b", dense__kernel=b)).layers
    return layer


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [7, 200_001])
def test_the_changes_of_floats_are_those_of_whole_arrays_in_numpy(tmp_path, dtype, size) -> None:
    """The sums are of pieces, small types in float32."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    a = rng.normal(size=size).astype(dtype)
    b = np.where(rng.random(size) < 0.3, (a.astype("float64") * 1.5).astype(dtype), a)

    found = pair(tmp_path, a, b)

    x, y = a.astype("float64"), b.astype("float64")
    assert found.change == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-5)
    assert found.largest == pytest.approx(np.abs(y - x).max(), rel=1e-6)
    assert found.changed == np.mean(x != y)
    assert (found.not_finite, found.frozen) == (0, not (x != y).any())


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e30])
def test_a_change_of_tiny_and_huge_floats_is_not_lost(tmp_path, scale) -> None:
    """The squares of such numbers are beyond float32."""
    a = np.full(1000, scale, "float32")

    found = pair(tmp_path, a, a * np.float32(1.25))

    assert found.change == pytest.approx(0.25)
    assert found.largest == pytest.approx(scale / 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_elements_that_are_not_finite_are_counted_and_the_others_compared(tmp_path, dtype) -> None:
    """A NaN with other bits has changed too, and an equal infinity has not."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    a = np.array([1, 2, np.nan, np.inf, np.inf, 4], dtype)
    b = np.array([1, 3, np.nan, np.inf, 1, np.nan], dtype)

    found = pair(tmp_path, a, b)

    assert (found.not_finite, found.changed, found.largest) == (4, 3 / 6, 1)
    assert found.change == pytest.approx(1 / math.sqrt(5))


def test_a_layer_that_was_zero_has_an_infinite_change(tmp_path) -> None:
    found = pair(tmp_path, np.zeros(3, "float32"), np.ones(3, "float32"))

    assert (found.change, found.largest) == (math.inf, 1)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.arange(8), np.array([0, 1, 2, 3, 4, 5, 7, 6])),
        (np.zeros(4, bool), np.array([False, True, False, False])),
        (np.zeros(4, ml_dtypes.int4), np.array([0, 1, 0, 0], ml_dtypes.int4)),
        (np.array([b"a", b"b", b"c", b"d"]), np.array([b"a", b"b", b"c", b"long"])),
    ],
    ids=["int64", "bool", "int4", "strings"],
)
def test_values_without_fractions_have_the_fraction_that_differs(tmp_path, a, b) -> None:
    found = pair(tmp_path, a, b)

    assert found == kc.LayerDifference("dense", None, None, 0.25, 0, False)


def test_a_complex_number_counts_as_its_two_parts(tmp_path) -> None:
    for dtype in ("complex64", "complex128"):
        found = pair(tmp_path / dtype, np.array([3 + 4j, 0], dtype), np.array([3 + 5j, 0], dtype))

        assert (found.change, found.largest, found.changed) == (pytest.approx(0.2), 1, 0.25)


def test_empty_and_scalar_values_are_compared(tmp_path) -> None:
    assert pair(tmp_path / "empty", np.empty((0, 3), "float32"), np.empty((0, 3), "float32")).frozen
    assert pair(tmp_path / "scalar", np.array(2.0), np.array(3.0)).change == 0.5


def test_the_variables_of_a_layer_are_compared_together_and_layers_sorted_by_change(tmp_path) -> None:
    a = written(
        tmp_path / "a",
        small__kernel=np.full(4, 2.0),
        small__bias=np.zeros(2),
        still__kernel=np.ones(2),
        large__kernel=np.ones(2),
    )
    b = written(
        tmp_path / "b",
        small__kernel=np.full(4, 2.0),
        small__bias=np.ones(2),
        still__kernel=np.ones(2),
        large__kernel=np.full(2, 3.0),
    )

    found = kc.diff(a, b)

    assert [each.name for each in found.layers] == ["large", "small", "still"]
    assert [each.change for each in found.layers] == pytest.approx([2, math.sqrt(2 / 16), 0])
    assert [each.frozen for each in found.layers] == [False, False, True]
    assert not found.identical
    assert kc.diff(a, a).identical
    assert "3 layers, 3 frozen: the weights are identical" in str(kc.diff(a, a))


def test_variables_of_one_side_and_other_shapes_and_types_are_lines(tmp_path) -> None:
    a = written(tmp_path / "a", one__w=np.ones(2), shape__w=np.ones((2, 3)), type__w=np.ones(2), same__w=np.ones(1))
    b = written(
        tmp_path / "b", two__w=np.ones(2), shape__w=np.ones((2, 4)), type__w=np.ones(2, "f4"), same__w=np.ones(1)
    )

    found = kc.diff(a, b)

    assert (found.only_in_a, found.only_in_b) == (("model/one/w",), ("model/two/w",))
    assert found.mismatched == {
        "model/shape/w": "float64 (2, 3) in a, float64 (2, 4) in b",
        "model/type/w": "float64 (2,) in a, float32 (2,) in b",
    }
    assert not found.identical
    for line in ("only in a: model/one/w", "only in b: model/two/w", "not compared: model/type/w is float64 (2,) in a"):
        assert line in repr(found)
        assert line in found._repr_html_()


def shared(path: pathlib.Path, changed: np.ndarray) -> list[kc.CheckpointRecord]:
    """Two checkpoints of a directory, which share the file of all values but one."""
    from keras_ckpt.formats.arena import Arena
    from keras_ckpt.formats.sharing import SharingWrite
    from keras_ckpt.model.backends import backend
    from keras_ckpt.model.snapshot import Snapshot

    arrays = {f"model/body/kernel{SUFFIX}": np.ones(1 << 19, "float32"), f"model/head/kernel{SUFFIX}": changed}
    arena, writer, records = Arena(), Writer(kc.CheckpointDirectory(path)), []
    for step in (1, 2, 3):
        arrays[f"model/head/kernel{SUFFIX}"] = changed * step
        write = SharingWrite(Snapshot(backend.Reader(None, {}), arrays).move(arena), arena, writer)
        records.append(writer.save(SaveRequest(step=step), write))
        write.remember(records[-1])
    writer.close()
    return records[1:]


def test_a_layer_in_a_shared_file_is_frozen_and_not_read(tmp_path) -> None:
    """Its bytes may even be damaged: a `verify` finds that."""
    a, b = shared(tmp_path, np.ones(3, "float32"))
    [file] = [file for file in b.files if file.shared]
    with open(tmp_path / file.name, "r+b") as data:
        data.seek(100)
        data.write(b"other")

    found = kc.diff(a, b)

    body, head = sorted(found.layers, key=lambda each: each.name)
    assert body == kc.LayerDifference("body", 0.0, 0.0, 0.0, None, True)
    assert head.change == pytest.approx(0.5)


def test_a_model_in_memory_is_compared_with_its_checkpoint(tmp_path) -> None:
    model = dense_model()
    record = save(model, tmp_path)

    before = kc.diff(model, record)
    model.layers[0].kernel.assign(model.layers[0].kernel * 2)
    after = kc.diff(record, model)

    assert before.identical
    assert not before.mismatched
    assert [each.name for each in after.layers if not each.frozen] == ["dense"]
    assert after.layers[0].change == pytest.approx(1)
    assert (after.a, after.b) == (record.prefix, f"the model {model.name!r}")


def test_integers_of_two_types_are_compared_by_value(tmp_path) -> None:
    """Backends count in other types: a seed of a model on PyTorch is int32, and int64 in its checkpoint."""
    found = pair(tmp_path, np.array([1, 2, 3, -4], np.int32), np.array([1, 2, 5, -4]))

    assert (found.changed, found.frozen) == (0.25, False)


def test_the_optimizer_is_compared_on_request(tmp_path) -> None:
    model = dense_model()
    fit(model)
    a = save(model, tmp_path, step=1)
    fit(model)
    b = save(model, tmp_path, step=2)

    plain, full = kc.diff(a, b), kc.diff(a, b, optimizer=True)

    assert not any("optimizer" in each.name for each in plain.layers)
    assert {"optimizer", "optimizer/dense/kernel"} <= {each.name for each in full.layers}
    assert {each.name for each in plain.layers} == {"dense", "dense_1", "seed_generator"}


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
def test_a_file_of_keras_is_compared_with_a_directory_and_a_model(tmp_path, name) -> None:
    """By the names of the file."""
    model = dense_model()
    fit(model, kc.ModelCheckpoint(tmp_path / name, save_weights_only="weights" in name))
    record = save(model, tmp_path / "run")

    for found in (kc.diff(tmp_path / name, record), kc.diff(record, tmp_path / name), kc.diff(model, tmp_path / name)):
        assert {each.name for each in found.layers} >= {"layers/dense", "layers/dense_1"}
        assert all(each.frozen for each in found.layers)
        assert not found.mismatched
    full = kc.diff(tmp_path / name, model, optimizer=True)
    assert any("optimizer" in each.name for each in full.layers)
    assert not full.only_in_a


def test_a_checkpoint_that_is_removed_meanwhile_is_compared_to_the_end(tmp_path) -> None:
    """Its files are held open."""
    a, b = written(tmp_path / "a", d__w=np.ones(2)), written(tmp_path / "b", d__w=np.ones(2))

    with contextlib.ExitStack() as keep_open:
        sides = [open_side(each, keep_open) for each in (a, b)]
        for each in (a, b):
            kc.CheckpointDirectory(each.directory).clear()
        found = difference(*sides, optimizer=False)

    assert found.identical


def test_a_damaged_value_is_an_error_that_names_the_checkpoint(tmp_path) -> None:
    a, b = written(tmp_path / "a", d__w=np.ones(2)), written(tmp_path / "b", d__w=np.zeros(2))
    [data] = [file.name for file in b.files if "data" in file.name]
    (tmp_path / "b" / data).write_bytes(b"1" * 16)

    with pytest.raises(kc.DamagedCheckpointError, match=r"b/ckpt-1 cannot be trusted: .*checksum"):
        kc.diff(a, b)


def test_a_missing_checkpoint_is_not_found(tmp_path) -> None:
    a = written(tmp_path / "a", d__w=np.ones(2))

    with pytest.raises(kc.CheckpointNotFoundError, match="There is no checkpoint"):
        kc.diff(a, tmp_path / "b")


@pytest.mark.parametrize("wrong", [None, 3, ""])
def test_an_argument_that_is_no_checkpoint_is_a_type_error(tmp_path, wrong) -> None:
    with pytest.raises(TypeError, match="Expected a record, a directory, or a path"):
        kc.diff(written(tmp_path, d__w=np.ones(2)), wrong)


def test_a_model_that_is_not_built_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="is not built"):
        kc.diff(keras.Sequential([keras.layers.Dense(2)]), written(tmp_path, d__w=np.ones(2)))


def run(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["diff", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    "words",
    [
        ["run", "2", "3"],
        ["2", "3"],
        ["run", "2", "run", "3"],
        ["run", "2", "run"],
        ["run/ckpt-2", "3"],
        ["run/ckpt-2", "run/ckpt-3"],
        ["run/ckpt-2", "latest"],
    ],
    ids=" ".join,
)
def test_the_command_takes_each_checkpoint_as_a_path_and_a_step(tmp_path, monkeypatch, words) -> None:
    """A step alone is of the path before it, and a path alone means its newest checkpoint."""
    shared(tmp_path / "run", np.ones(3, "float32"))
    monkeypatch.chdir(tmp_path / "run" if words[0] == "2" else tmp_path)

    assert run(*words) == f"{kc.diff(tmp_path / 'run' / 'ckpt-2', tmp_path / 'run' / 'ckpt-3')}\n"


def test_the_command_prints_json(tmp_path) -> None:
    """An infinity is a string, because JSON has none."""
    a, b = written(tmp_path / "a", d__w=np.zeros(2), e__w=np.ones(1)), written(tmp_path / "b", d__w=np.ones(2))

    found = json.loads(run(tmp_path / "a", tmp_path / "b", "--json"))

    [layer] = found.pop("layers")
    assert found == {"a": a.prefix, "b": b.prefix, "only_in_a": ["model/e/w"], "only_in_b": [], "mismatched": {}}
    assert layer == {
        "name": "d",
        "change": "Infinity",
        "largest": 1.0,
        "changed": 1.0,
        "not_finite": 0,
        "frozen": False,
    }


@pytest.mark.parametrize("words", [[], ["3"], ["1", "2", "3"]], ids=len)
def test_the_command_refuses_another_number_of_checkpoints(words) -> None:
    assert f"Expected two checkpoints, such as runs/digits 120 360. Received {len(words)}" in run(*words, code=2)


def test_the_command_names_a_missing_checkpoint(tmp_path) -> None:
    written(tmp_path / "a", d__w=np.zeros(2))

    assert "No checkpoint of step 7" in run(tmp_path / "a", 1, 7, code=1)
    assert "There is no directory" in run(tmp_path / "a", tmp_path / "b", code=1)
    (tmp_path / "empty").mkdir()
    assert "There is no checkpoint in" in run(tmp_path / "a", tmp_path / "empty", code=1)
