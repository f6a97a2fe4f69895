"""What the README and the docstrings show is run; a block that is not run says why."""

import inspect
import pathlib
import re
import shlex
import shutil

import pytest
from click.testing import CliRunner

import keras_ckpt as kc
from keras_ckpt.cli import main

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"^```([^\n]*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def examples() -> dict[str, str]:
    """The example of each public name, and of each method, that has one."""
    found = {}
    for name in kc.__all__:
        owner = getattr(kc, name)
        methods = vars(owner).items() if inspect.isclass(owner) else ()
        members = {name: owner} | {f"{name}.{key}": value for key, value in methods if inspect.isfunction(value)}
        for key, value in members.items():
            for code in re.findall(r"```python\n(.*?)```", inspect.getdoc(value) or "", re.DOTALL):
                found[key] = code
    return found


def test_every_block_of_the_readme_is_run_or_is_output_or_set_up() -> None:
    """Python and shell are run here; `text` is output; `sh setup` sets the machine up, which .ci/run does."""
    assert {kind for kind, _ in BLOCKS} == {"python", "sh", "text", "sh setup"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_of_a_page_leads_to_a_file_or_a_heading(page) -> None:
    """Links to other sites are not followed."""
    for place, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), place
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch) -> None:
    """Python in one namespace, commands in the same directory; the demo has a test of its own."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for kind, code in BLOCKS:
        if kind == "python":
            exec(code, namespace)
        elif kind == "sh":
            for line in code.splitlines():
                command, *words = shlex.split(line)
                assert command == "keras-ckpt"
                if words[0] != "demo":
                    result = CliRunner().invoke(main, words)
                    assert result.exit_code == 0, (line, result.output)


def test_every_public_thing_that_does_something_has_an_example() -> None:
    """Errors, and the report that restore gives, speak for themselves."""
    silent = {name for name in kc.__all__ if name.endswith("Error")} | {"RestoreReport", "__version__"}

    assert set(kc.__all__) - silent <= {name.split(".")[0] for name in examples()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A directory in which runs/digits is a training of three epochs."""
    from support.models import X, Y, dense_model, fit

    path = tmp_path_factory.mktemp("trained")
    checkpoint = kc.ModelCheckpoint(path / "runs" / "digits", monitor="val_accuracy")
    model = dense_model(metrics=["accuracy"], run_eagerly=False)
    fit(model, checkpoint, epochs=3, batches=40, validation_data=(X, Y))
    return path


@pytest.mark.parametrize("name", examples())
def test_the_example_runs(tmp_path, monkeypatch, trained, name) -> None:
    """In a directory in which runs/digits is a training of three epochs, unless it begins one itself."""
    import keras
    import tensorflow as tf

    from support.models import X, Y, dense_model

    monkeypatch.chdir(tmp_path)
    model = dense_model(metrics=["accuracy"], run_eagerly=False)
    if name not in ("ModelCheckpoint", "CheckpointManager"):
        shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
        kc.restore(model, "runs/digits")
    namespace = {
        "keras": keras,
        "tf": tf,
        "keras_ckpt": kc,
        "model": model,
        "optimizer": model.optimizer,
        "x": X,
        "y": Y,
        "x_test": X,
        "y_test": Y,
        "valid": (X, Y),
        "runs": kc.CheckpointDirectory("runs/digits"),
        "train_one_epoch": lambda: 0.5,
    }

    exec(examples()[name], namespace)
