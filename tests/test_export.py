"""`export`: the variables of a checkpoint in files of other formats."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import keras_ckpt as kc
from keras_ckpt.cli import main
from support.bundles import NUMBERS, content, write
from support.models import dense_model, fit

LACKED_BY_SAFETENSORS = {"complex128"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("trained")
    fit(dense_model(), kc.ModelCheckpoint(path), epochs=2)
    return path


@pytest.fixture
def runs(trained, tmp_path) -> kc.CheckpointDirectory:
    return kc.CheckpointDirectory(shutil.copytree(trained, tmp_path / "run"))


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a safetensors file with its library, which checks it. The library's functions for NumPy lack some types."""
    import safetensors

    types = {
        "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U64": "u8",
        "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "?", "C64": "c8", "BF16": ml_dtypes.bfloat16,
        "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    }  # fmt: skip
    return {
        name: np.frombuffer(each["data"], types[each["dtype"]]).reshape(each["shape"])
        for name, each in safetensors.deserialize(path.read_bytes())
    }


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    return dict(np.load(path)) if path.suffix == ".npz" else read_safetensors(path)


def ways(runs: kc.CheckpointDirectory) -> dict[str, object]:
    return {"record": runs.latest(), "directory": runs, "path": pathlib.Path(runs.path), "prefix": runs.latest().prefix}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("way", ["record", "directory", "path", "prefix"])
def test_an_exported_file_has_the_variables_of_load_variables(runs, tmp_path, suffix, way) -> None:
    """Names, types, shapes and values are equal."""
    path = tmp_path / f"values{suffix}"

    kc.export(ways(runs)[way], path)

    expected, found = kc.load_variables(runs), read(path)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape)
        assert value.tobytes() == expected[name].tobytes()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_weights_only_skips_the_optimizer_and_the_metrics(runs, tmp_path, suffix) -> None:
    path = tmp_path / f"values{suffix}"

    kc.export(runs, path, weights_only=True)

    assert set(read(path)) == {name for name in kc.load_variables(runs) if name.startswith("model/")}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("dtype", NUMBERS, ids=lambda dtype: dtype.name)
def test_each_type_is_exported_with_its_values(tmp_path, dtype, suffix) -> None:
    """A type that the format lacks becomes a larger type."""
    between = tf.int8 if dtype.name.endswith("int4") else tf.float32
    value = tf.cast(tf.cast(tf.constant([[0, 1], [2, 3]]), between), dtype)
    write(tmp_path, {"value": value}, "ckpt-1")
    path = tmp_path / f"values{suffix}"
    if suffix == ".safetensors" and dtype.name in LACKED_BY_SAFETENSORS:
        with pytest.raises(ValueError, match=f"cannot hold 'value', which is of {dtype.name}"):
            kc.export(tmp_path, path)
        assert not path.exists()
        return

    kc.export(tmp_path, path)

    found = read(path)["value"]
    exact = found.dtype == dtype.as_numpy_dtype
    np.testing.assert_array_equal(found.astype(complex), kc.load_variables(tmp_path)["value"].astype(complex))
    assert not exact or found.tobytes() == content(value)
    assert exact or found.dtype in ("float32", "int8", "uint8")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_scalars_and_empty_arrays_are_exported(tmp_path, suffix) -> None:
    write(tmp_path, {"scalar": tf.constant(3.0), "empty": tf.zeros((0, 4)), "one": tf.ones(1, tf.int8)}, "ckpt-1")

    kc.export(tmp_path / "ckpt-1", tmp_path / f"values{suffix}")

    found = read(tmp_path / f"values{suffix}")
    assert {name: value.shape for name, value in found.items()} == {"scalar": (), "empty": (0, 4), "one": (1,)}
    assert found["scalar"] == 3


def test_strings_are_exported_to_npz_alone(tmp_path) -> None:
    """They need no pickle."""
    write(tmp_path, {"words": tf.constant(["some", "words"])}, "ckpt-1")

    kc.export(tmp_path, tmp_path / "words.npz")

    assert np.load(tmp_path / "words.npz", allow_pickle=False)["words"].tolist() == [b"some", b"words"]
    with pytest.raises(ValueError, match="cannot hold 'words', which is of strings"):
        kc.export(tmp_path, tmp_path / "words.safetensors")


def test_an_export_loads_no_framework(runs, tmp_path) -> None:
    """A `.keras` file may be the checkpoint too."""
    code = (
        "import sys, keras_ckpt as kc\n"
        "kc.export(sys.argv[1], 'a.npz'), kc.export(sys.argv[1], 'a.safetensors', weights_only=True)\n"
        "kc.export(sys.argv[1], 'a.keras'), kc.export('a.keras', 'a.weights.h5')\n"
        "assert not {'tensorflow', 'keras', 'jax', 'torch'} & set(sys.modules), sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(kc.__file__).parents[1])}

    subprocess.run([sys.executable, "-c", code, runs.path], check=True, cwd=tmp_path, env=environment)

    assert {"a.npz", "a.safetensors", "a.keras", "a.weights.h5"} <= set(os.listdir(tmp_path))


@pytest.mark.parametrize("name", ["values.h5", "values.NPZ", "values.v1"])
def test_an_unknown_ending_is_refused(runs, tmp_path, name) -> None:
    with pytest.raises(ValueError, match=r"files that end in \.keras, .* SavedModels to paths .* Received: .*values"):
        kc.export(runs, tmp_path / name)

    assert os.listdir(tmp_path) == ["run"]


def test_weights_only_refuses_a_checkpoint_that_does_not_tell_weights_apart(tmp_path) -> None:
    write(tmp_path, {"words": tf.ones(3)}, "ckpt-1")

    with pytest.raises(ValueError, match="found no variable whose name begins with 'model/'"):
        kc.export(tmp_path, tmp_path / "values.npz", weights_only=True)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".keras", ".weights.h5"])
def test_a_failed_export_leaves_the_file_of_before(runs, tmp_path, suffix) -> None:
    """The data of the checkpoint is damaged, so its checksum does not match."""
    path = tmp_path / f"values{suffix}"
    path.write_bytes(b"before")
    (data,) = pathlib.Path(runs.path).glob(f"{runs.latest().name}.data-*")
    data.write_bytes(bytes(data.stat().st_size))

    with pytest.raises(kc.DamagedCheckpointError, match="cannot be trusted"):
        kc.export(runs.latest(), path)

    assert path.read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["run", path.name]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_an_export_of_values_is_refused_as_a_checkpoint(runs, tmp_path, suffix) -> None:
    """The error says which exports can be restored."""
    kc.export(runs, tmp_path / f"values{suffix}")

    with pytest.raises(kc.CheckpointNotFoundError, match=rf"values{suffix} is an export of values.* export to \.keras"):
        kc.restore(dense_model(), tmp_path / f"values{suffix}")


def test_an_export_replaces_a_file(runs, tmp_path) -> None:
    path = tmp_path / "values.npz"
    path.write_bytes(b"before")

    kc.export(runs, path)

    assert "model/dense/kernel" in np.load(path)
    assert sorted(os.listdir(tmp_path)) == ["run", "values.npz"]


def test_an_export_replaces_no_checkpoint(runs, tmp_path) -> None:
    """The file would lose its record, and a pin would protect the values of another checkpoint."""
    best = tmp_path / "best.keras"
    fit(dense_model(), kc.ModelCheckpoint(best), epochs=1)
    before = best.read_bytes()

    with pytest.raises(FileExistsError, match="An export replaces no checkpoint"):
        kc.export(runs, best)

    assert best.read_bytes() == before


def test_a_model_takes_exported_weights(runs, tmp_path) -> None:
    kc.export(runs, tmp_path / "values.npz")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])

    values = np.load(tmp_path / "values.npz")
    model.set_weights(
        [values[f"model/{layer}/{name}"] for layer in ("dense", "dense_1") for name in ("kernel", "bias")]
    )

    x = np.ones((3, 4), "float32")
    np.testing.assert_array_equal(model.predict(x, verbose=0), kc.load_model(runs).predict(x, verbose=0))


def test_the_command_exports_the_checkpoint_of_a_step(runs, tmp_path, monkeypatch) -> None:
    """PATH may be missing, as in other commands."""
    monkeypatch.chdir(runs.path)
    file = str(tmp_path / "values.npz")

    result = CliRunner().invoke(main, ["export", "5", file, "--weights-only"])

    assert (result.exit_code, result.output) == (0, f"Exported step 5 to {file}.\n")
    expected = kc.load_variables(runs[5])
    np.testing.assert_array_equal(np.load(file)["model/dense/kernel"], expected["model/dense/kernel"])
    assert CliRunner().invoke(main, ["export", runs.path, "latest", file]).exit_code == 0


def test_the_command_exports_a_file_of_keras(tmp_path, monkeypatch) -> None:
    """A file needs no STEP, whatever the ending of the export."""
    monkeypatch.chdir(tmp_path)
    model = dense_model()
    fit(model, kc.ModelCheckpoint("w/best.keras"))

    for words in ("w/best.keras", "w best.keras", "w/best.keras latest"):
        result = CliRunner().invoke(main, ["export", *words.split(), "other.keras"])

        name = "step 5" if "latest" in words else "w/best.keras"
        assert (result.exit_code, result.output) == (0, f"Exported {name} to other.keras.\n")
        assert all(map(np.array_equal, keras.models.load_model("other.keras").get_weights(), model.get_weights()))
        os.remove("other.keras")


@pytest.mark.parametrize("name", ["best.keras", "best.weights.h5"])
def test_the_command_exports_a_file_without_a_record(tmp_path, monkeypatch, name) -> None:
    """Keras wrote it, or an earlier export."""
    monkeypatch.chdir(tmp_path)
    model = dense_model()
    (model.save_weights if "weights" in name else model.save)(name)

    result = CliRunner().invoke(main, ["export", name, "values.npz"])

    assert (result.exit_code, result.output) == (0, f"Exported {name} to values.npz.\n")
    np.testing.assert_array_equal(np.load("values.npz")["layers/dense/vars/0"], model.layers[0].kernel)


@pytest.mark.parametrize(
    ("step", "name", "code"), [("5", "values.h5", 2), ("7", "values.npz", 1), ("5", "run", 1), ("5", "values.onnx", 1)]
)
def test_the_command_explains_an_error_in_a_line(runs, tmp_path, monkeypatch, step, name, code) -> None:
    """An unknown ending is wrong usage. A SavedModel replaces nothing. The packages for ONNX may be missing."""
    monkeypatch.setitem(sys.modules, "tf2onnx", None)

    result = CliRunner().invoke(main, ["export", runs.path, step, str(tmp_path / name)])

    assert result.exit_code == code
    assert "Error: " in result.output


@pytest.mark.parametrize(
    ("name", "names", "words"),
    [
        ("x.safetensors", "state_dict", "Keras did not run on PyTorch. With KERAS_BACKEND=torch"),
        ("x.keras", "state_dict", "is for files that end in .safetensors or .npz"),
        ("x.npz", "torch", "names expected 'variables' or 'state_dict'. Received: 'torch'"),
    ],
)
def test_names_of_a_state_dict_are_refused_where_there_are_none(runs, tmp_path, name, names, words) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        kc.export(runs, tmp_path / name, names=names)

    assert not (tmp_path / name).exists()


def test_a_file_of_keras_has_no_names_of_a_state_dict(tmp_path) -> None:
    dense_model().save(tmp_path / "model.keras")

    with pytest.raises(ValueError, match="is a file of Keras, which has no names of a state_dict"):
        kc.export(tmp_path / "model.keras", tmp_path / "x.npz", names="state_dict")
