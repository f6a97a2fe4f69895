"""The package as a whole: its names, its layers, and what it does not load."""

import ast
import pathlib
import subprocess
import sys

import pytest

import keras_ckpt as kc

PACKAGE = pathlib.Path(kc.__file__).parent
PURE = [
    "streams",
    "locks",
    "files",
    "record",
    "policies",
    "listing",
    "commit",
    "directory",
    "tables",
    "cli",
    "errors",
    "bundle",
    "background",
    "writer",
    "schedule",
]
# Each layer imports from those to its left only.
ORDER = [
    "version",
    "errors", "notices", "streams", "locks", "files", "bundle", "record", "policies", "listing", "tables", "commit",
    "background", "directory", "cli", "writer", "schedule", "backlog", "monitor", "document", "threads", "capture",
    "description", "bundle_writer", "arena", "snapshot", "bundle_reader", "sharing", "matching", "report", "parts",
    "naming", "compiled", "learned", "object_graph", "state", "position", "source", "transfer", "restoring", "session",
    "manager", "model_checkpoint", "data", "data_place", "seeds", "callback_places", "callback_states", "epoch_rest",
    "signals", "restart", "training", "backup_and_restore", "demo",
]  # fmt: skip


def test_the_public_names_are_those_of_the_table_of_contents() -> None:
    """`__all__`, `dir()`, and what can be imported agree, and each name has a docstring."""
    assert set(kc.__all__) | {"__version__"} == set(dir(kc))
    for name in kc.__all__:
        assert getattr(kc, name).__doc__
    typed = {
        alias.name
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras_ckpt.")
        for alias in node.names
    }
    assert typed == {*kc.__all__, "__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As of any module."""
    with pytest.raises(AttributeError, match="has no attribute 'KeepBest'"):
        _ = kc.KeepBest


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
        "".join(f"import keras_ckpt.{name}\n" for name in PURE),
        "import keras_ckpt as kc\nruns = kc.CheckpointDirectory({path!r})\nrepr(runs), runs._repr_html_()\n"
        "runs.pin(10), runs.unpin(10), runs.add_metrics(10, x=1.0), runs.best('loss', 'min')\n"
        "print(runs.plan(kc.BestN(1, 'loss', 'min') | kc.EveryNHours(1)))\nruns.prune(kc.LatestN(1)), runs.clear()",
        "from click.testing import CliRunner\nfrom keras_ckpt.cli import main\n"
        "for command in (['ls'], ['ls', '--json'], ['best'], ['verify']):\n"
        "    assert CliRunner().invoke(main, [*command, {path!r}]).exit_code == 0\n",
    ],
)
def test_reading_choosing_and_pruning_load_no_tensorflow(filler, code) -> None:
    """Nor Keras, nor NumPy: these take seconds."""
    runs = filler.save("10:0.5 20:0.4", monitor="loss", mode="min")

    assert not imported(code.replace("{path!r}", repr(runs.path))) & {"tensorflow", "keras", "numpy", "h5py"}


def test_listing_as_json_loads_no_tables() -> None:
    """Nor rich, which only tables need."""
    assert not imported("import keras_ckpt.cli") & {"rich"}


def test_imports_run_one_way() -> None:
    """Each module imports only from layers below its own; types alone may look up."""
    for name in ORDER:
        tree = ast.parse((PACKAGE / f"{name}.py").read_text())
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or id(node) in typing_only or node.module is None:
                continue
            below = [node.module.split(".")[1]] if node.module.startswith("keras_ckpt.") else []
            below += [alias.name for alias in node.names if node.module == "keras_ckpt" and alias.name in ORDER]
            for other in below:
                allowed = ORDER.index(other) < ORDER.index(name) or (name, other) == ("cli", "demo")
                assert allowed, f"{name} imports {other}"


def test_every_module_has_its_place() -> None:
    """A new module is a decision."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}

    assert modules == set(ORDER)


def test_only_one_module_touches_files() -> None:
    """Opening, renaming, syncing and unlinking are in `files`, and nowhere else."""
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
    for name in set(ORDER) - {"files"}:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called != "open", name
                assert not (called.startswith(("os.", "shutil.", "pathlib.")) and called.split(".")[-1] in touching), (
                    name
                )


def test_no_code_is_ever_loaded_from_a_checkpoint() -> None:
    """JSON and bytes only: no pickle, no eval, no import by a name from disk."""
    forbidden = {"pickle", "marshal", "shelve", "dill", "joblib", "yaml", "runpy"}
    for path in PACKAGE.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not names & forbidden, path
        assert not calls & {"eval", "exec", "compile", "__import__"}, path
        assert "importlib" not in names or path.name == "__init__.py"
