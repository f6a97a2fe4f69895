"""The package as a whole: its public names, its layers, and its imports."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import keras_ckpt as kc
from keras_ckpt.formats.bundle_writer import array_value, write_bundle
from keras_ckpt.store.files import Folder

PACKAGE = pathlib.Path(kc.__file__).parent
ROOMS = ["errors", "version", "store", "formats", "model", "training", "resume"]
"""Each room imports from itself and earlier rooms; `cli` from `store` and earlier rooms."""
PURE = ["cli", "formats.bundle_index", "training.schedule", "training.backlog"]


def modules(room: str = "") -> list[pathlib.Path]:
    """The modules of a room, or of the package."""
    place = PACKAGE / room
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def imports(module: pathlib.Path) -> set[str]:
    """The full names of a module's imports, without imports for the type checker."""
    tree = ast.parse(module.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing_only:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_each_public_name_of_the_stub_can_be_imported_and_has_a_docstring() -> None:
    """`__all__` and `dir()` have the names of the stub."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    typed = {alias.name for node in ast.walk(stub) if isinstance(node, ast.ImportFrom) for alias in node.names}

    assert typed == set(kc.__all__) == set(dir(kc))
    assert all(getattr(kc, name).__doc__ for name in kc.__all__)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="KeepBest"):
        _ = kc.KeepBest


def named(room: str) -> list[str]:
    """The names of the modules of a room."""
    return [f"{room}.{path.stem}" for path in modules(room) if path.stem != "__init__"]


def imported(code: str) -> set[str]:
    """The top-level modules that a program has loaded at its end."""
    out = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], capture_output=True, check=True, text=True
    )
    return {name.split(".")[0] for name in out.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import keras_ckpt",
        "".join(f"import keras_ckpt.{name}\n" for name in [*PURE, *named("store")]),
        "import keras_ckpt as kc\nruns = kc.CheckpointDirectory({path!r})\nrepr(runs), runs._repr_html_()\n"
        "runs.pin(10), runs.unpin(10), runs.add_metrics(10, x=1.0), runs.best('loss', 'min')\n"
        "print(runs.plan(kc.BestN(1, 'loss', 'min') | kc.EveryNHours(1)))\n"
        "print(kc.Runs({path!r}), kc.Runs({path!r}).best(), kc.Runs({path!r}).plan(1))\n"
        "runs.prune(kc.LatestN(1)), runs.clear()",
        "from click.testing import CliRunner\nfrom keras_ckpt.cli import main\n"
        "for command in (['ls'], ['ls', '--json'], ['best'], ['verify']):\n"
        "    assert CliRunner().invoke(main, [*command, {path!r}]).exit_code == 0\n",
    ],
)
def test_reading_choosing_and_pruning_load_no_framework_and_no_numpy(filler, code) -> None:
    """Their imports take seconds."""
    runs = filler.save("10:0.5 20:0.4", monitor="loss", mode="min")

    assert not imported(code.replace("{path!r}", repr(runs.path))) & {"tensorflow", "keras", "numpy", "h5py"}


def test_the_import_of_the_command_line_does_not_load_rich() -> None:
    """Only tables need it."""
    assert not imported("import keras_ckpt.cli") & {"rich"}


@pytest.mark.parametrize("room", [*ROOMS, "cli"])
def test_imports_between_rooms_run_one_way(room) -> None:
    below = [*ROOMS[: ROOMS.index(room) + 1]] if room in ROOMS else ["cli", "errors", "version", "store"]
    for path in modules(room):
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("keras_ckpt.")}
        # The demo shows the whole package.
        assert rooms <= {*below, *ROOMS[: 7 * (path.stem == "demo")]}, path


def test_imports_between_modules_have_no_cycle() -> None:
    """Within a room too."""
    modules_of_rooms = [path for path in modules() if path.stem != "__init__"]
    found = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): imports(path) for path in modules_of_rooms
    }
    graph = {
        name: {other for other in found if any(f"{each}.".startswith(f"{other}.") for each in names)}
        for name, names in found.items()
    }

    graphlib.TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    "use",
    [
        "kc.load_variables({path!r})['value'].sum() == 3",
        "kc.diff({path!r}, {path!r}).identical",
        "kc.average([{path!r}], into={path!r} + '/average').step == 1",
    ],
)
def test_the_values_of_checkpoints_are_read_and_compared_without_a_framework(tmp_path, use) -> None:
    """A value is a NumPy array."""
    with Folder(tmp_path) as folder:
        write_bundle(folder, "ckpt-1", [{b"value": array_value(np.ones(3))}])
    code = f"import keras_ckpt as kc\nassert {use.format(path=str(tmp_path))}"

    assert not imported(code) & {"tensorflow", "keras", "jax", "torch", "h5py"}


@pytest.mark.parametrize("framework", ["tensorflow", "jax", "torch"])
def test_only_the_module_of_a_backend_imports_its_framework(framework) -> None:
    """Beside it there is the manager of TensorFlow's checkpoints, and a module for the data of each framework."""
    importing = {
        str(path.relative_to(PACKAGE))
        for room in ROOMS
        for path in modules(room)
        if any(name.split(".")[0] == framework for name in imports(path))
    }
    others = {
        "tensorflow": {"training/checkpoint_manager.py", "resume/pipelines.py"},
        "torch": {"resume/data_loaders.py"},
    }

    assert importing == {f"model/backends/{framework}.py", *others.get(framework, ())}


@pytest.mark.parametrize("room", ["store", "formats"])
def test_rooms_below_the_model_import_no_framework(room) -> None:
    """`store` does not import NumPy either."""
    names = {name.split(".")[0] for path in modules(room) for name in imports(path)}

    assert not names & {"tensorflow", "keras", "jax", "torch"}
    assert room != "store" or "numpy" not in names


def test_the_package_has_only_the_known_rooms() -> None:
    """A new room is a decision."""
    rooms = {path.stem for path in PACKAGE.iterdir() if path.stem not in ("__init__", "__main__", "__pycache__", "py")}

    assert rooms == {*ROOMS, "cli"}


def test_only_one_module_touches_files() -> None:
    """Only `files` opens, renames, syncs and unlinks."""
    touching = {
        "open",
        "rename",
        "replace",
        "unlink",
        "remove",
        "fsync",
        "mkdir",
        "makedirs",
        "rmdir",
        "link",
        "symlink",
        "truncate",
    }
    for path in set(modules()) - {PACKAGE / "store" / "files.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called != "open", path
                assert not (called.startswith(("os.", "shutil.", "pathlib.")) and called.split(".")[-1] in touching), (
                    path
                )


def test_only_one_module_names_files() -> None:
    """Only `layout` has the suffixes of a checkpoint's files, except in docstrings and messages."""
    for path in set(modules()) - {PACKAGE / "store" / "layout.py"}:
        tree = ast.parse(path.read_text())
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told]
        named = [text for text in texts if isinstance(text, str) and re.match(r"\\?\.(json|keep|index|data-)", text)]
        assert not named, path


def test_no_code_is_ever_loaded_from_a_checkpoint() -> None:
    """No pickle, no eval, and no import by a name from disk."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "runpy"}
    for path in modules():
        tree = ast.parse(path.read_text())
        names = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not names & forbidden, path
        assert not calls & {"eval", "exec", "compile", "__import__"}, path
        assert "importlib" not in names, path
