"""Every block of code in the README, the pages of docs and the docstrings runs, and every link leads somewhere."""

import contextlib
import errno
import fcntl
import inspect
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

import keras_ckpt as kc
from keras_ckpt.cli import main

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
RECIPES = "".join((ROOT / "tests" / name).read_text() for name in ("test_trackers.py", "test_torch_page.py"))
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)
"""A block that runs, and its output, if the page shows it directly below."""
END = "end of the output of a block"


def named(page: pathlib.Path) -> str:
    """The name of a page in the names of tests."""
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=named)


def command(line: str) -> None:
    """Runs a line of `sh`, and answers a question with yes. The demo has a test of its own."""
    name, *words = shlex.split(line, comments=True)
    assert name == "keras-ckpt", line
    if words[0] != "demo":
        result = CliRunner().invoke(main, words, input="y\n")
        click.echo(result.output)
        assert result.exit_code == 0, (line, result.exception)


def script(text: str) -> str:
    """The page as a Python script with the same numbers of lines: `sh` is calls of `command`, and text is empty."""
    lines = ["import sys; sys.stderr = sys.stdout; from test_docs import END, command"] + [""] * text.count("\n")
    for block in RUN.finditer(text):
        begin, code = text.count("\n", 0, block.start(2)), block[2].splitlines()
        calls = code if block[1] == "python" else [f"command({line!r})" for line in code]
        lines[begin : begin + len(code) + 1] = [*calls, "print(END)"]
    return "\n".join(lines)


def words(output: str) -> set[str]:
    """The words of an output, without numbers, the home directory, and the note on the columns of a narrow terminal."""
    return set(re.findall(r"[^\W\d]+", re.sub(r"/home/me/|not shown in .*|\d(st|nd|rd|th)\b", "", output)))


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


@each_page
def test_each_block_of_a_page_has_a_kind_that_is_checked(page) -> None:
    """Python and shell run, Bash and JSON are parsed, `text` is output, and `sh setup` sets a machine up.

    Python that needs another package names it. `python mlflow` runs in `test_trackers.py`, `python torch` in
    `test_torch_page.py`.
    """
    text = page.read_text()
    blocks = BLOCK.findall(text)

    assert len(re.findall("^ *(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks), "a block is indented or not closed"
    for kind, code in blocks:
        assert re.fullmatch(r"python( \w+)*|sh|sh setup|text|bash|json", kind)
        if kind == "bash":
            subprocess.run(["bash", "-n"], input=code, text=True, check=True)
        elif kind == "json":
            json.loads(code)
        elif kind.startswith("python "):
            assert page.name in RECIPES


@each_page
def test_each_link_of_a_page_leads_to_a_file_or_a_heading(page) -> None:
    """Links to other sites are not followed. The site has the files in docs alone, so its pages link to no others."""
    for place, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = pathlib.Path(os.path.normpath(page.parent / place)) if place else page
        assert target.is_file(), place
        assert page.parent == ROOT or target.is_relative_to(DOCS), f"{place} is not on the site"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_each_test_that_the_page_of_security_names_exists() -> None:
    """Each statement of SECURITY.md names its tests."""
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text()))
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))

    assert named
    assert named <= set(re.findall(r"def (test_\w+)", code))


def test_the_navigation_of_the_site_has_every_page_once() -> None:
    navigation = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)

    assert sorted(navigation) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_reference_has_every_public_name_once() -> None:
    text = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))

    assert sorted(re.findall(r"^::: keras_ckpt\.(\w+)$", text, re.MULTILINE)) == sorted({*kc.__all__} - {"__version__"})


@pytest.mark.parametrize("page", [page for page in PAGES if RUN.search(page.read_text())], ids=named)
def test_a_page_runs_from_top_to_bottom_and_prints_what_it_shows(fork_server, tmp_path, monkeypatch, page) -> None:
    """As one script in an empty directory. Numbers may differ, words may not. It shows each warning and curve too."""
    monkeypatch.chdir(tmp_path)

    ended = fork_server.run(script(page.read_text()))

    assert ended.returncode == 0, ended.stdout
    for warning in re.findall(r"Warning: (.*)", ended.stdout):
        assert warning in page.read_text()
    for (_, code, shown), output in zip(RUN.findall(page.read_text()), ended.stdout.split(END), strict=False):
        assert words(shown) <= words(output), (code, shown, output)
        assert not shown or ("▁" in shown) == ("▁" in output), (code, shown, output)


def test_each_public_name_has_an_example_in_its_docstring() -> None:
    """The version is text, which has no docstring of its own."""
    assert set(kc.__all__) - {"__version__"} <= examples().keys()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> pathlib.Path:
    """A directory in which runs/digits is a training of three epochs."""
    from support.models import X, Y, dense_model, fit

    path = tmp_path_factory.mktemp("trained")
    checkpoint = kc.ModelCheckpoint(path / "runs" / "digits", monitor="val_accuracy")
    model = dense_model(metrics=["accuracy"], run_eagerly=False)
    fit(model, checkpoint, epochs=3, batches=40, validation_data=(X, Y))
    return path


@contextlib.contextmanager
def met(name: str, path: pathlib.Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes a run meet an error, where the example of the error does not itself."""
    runs = kc.CheckpointDirectory(path)
    with contextlib.ExitStack() as stack:
        if name == "DamagedCheckpointError":
            file = path / runs.best().files[0].name
            file.write_bytes(bytes(file.stat().st_size))
        elif name == "FormatVersionError":
            (path / "ckpt-1000.json").write_text('{"format": "keras_ckpt", "format_version": 1000}')
        elif name == "DirectoryInUseError":
            # Another descriptor holds the lock as another process does.
            lock = stack.enter_context(open(path / ".keras_ckpt" / "lock"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        elif name == "SaveError":
            shutil.rmtree(path)
            path.write_text("a file in the place of the directory")
        elif name == "DiskFullError":
            patch.setattr(os, "fsync", full)
        yield


def full(descriptor: int) -> None:
    """The answer of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", examples())
def test_the_example_runs(tmp_path, monkeypatch, trained, name) -> None:
    """In a directory in which runs/digits is a training of three epochs, unless it begins one itself.

    The example of an error meets the error.
    """
    import keras
    import tensorflow as tf

    from support.models import X, Y, dense_model

    monkeypatch.chdir(tmp_path)
    printed: list[object] = []
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
        "print": lambda *values: printed.extend([*values, *map(str, values)]),
    }

    with met(name, tmp_path / "runs" / "digits", monkeypatch):
        exec(examples()[name], namespace)

    assert not name.endswith("Error") or any(isinstance(value, getattr(kc, name)) for value in printed)


@pytest.mark.parametrize("name", main.commands)
def test_the_example_in_the_help_of_a_command_runs(tmp_path, monkeypatch, trained, name) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    [line] = re.findall("^ *Example: (.*)$", main.commands[name].help, re.MULTILINE)
    command(line)
