"""The notebooks run from top to bottom, and again in the directory where they ran before."""

import importlib.util
import pathlib
import random
import re
from collections.abc import Iterator

import nbformat
import pytest
from nbformat import NotebookNode

from support.notebooks import NOTEBOOKS, OF_THREE_BACKENDS, Kernel, kernel, outline
from test_prose import faults

PRESENT = {name for name in ("jax", "torch") if importlib.util.find_spec(name)}
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: pathlib.Path, kind: str) -> list[NotebookNode]:
    """The cells of a notebook that have code, or text."""
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


@pytest.fixture(scope="module")
def running() -> Iterator[Kernel]:
    with kernel() as started:
        yield started


@each_notebook
def test_the_notebook_runs_and_shows_its_stored_outputs(running, tmp_path, long, request, path) -> None:
    """Every cell runs without an error, and again where the notebook ran before.

    The notebook of three backends runs on TensorFlow thrice, as it says to users of one framework. The second run is
    for all notebooks in the long form, for a sample of one in the short form.
    """
    stored = outline(nbformat.read(path, as_version=4))
    if path == OF_THREE_BACKENDS:  # the report of a restore has no note of another backend
        stored = [[output.removesuffix(" <div>") for output in cell] for cell in stored]
    twice = NOTEBOOKS if long else [random.Random(request.config.option.seed).choice(NOTEBOOKS)]

    for _ in range(2 if path in twice else 1):
        assert outline(running.run(path, tmp_path, backends=", ".join(['"tensorflow"'] * 3))) == stored


@pytest.mark.skipif(not {"jax", "torch"} <= PRESENT, reason="needs JAX and PyTorch beside TensorFlow")
def test_a_notebook_trains_on_jax_restores_on_pytorch_and_deploys_from_tensorflow(tmp_path) -> None:
    """Each process has another backend of Keras. The notebook shows its stored outputs."""
    stored = nbformat.read(OF_THREE_BACKENDS, as_version=4)

    with kernel("torch") as running:
        ran = running.run(OF_THREE_BACKENDS, tmp_path)

    assert outline(ran) == outline(stored)
    assert "saved on the backend jax" in str(ran)


@each_notebook
def test_the_stored_outputs_are_clean(path) -> None:
    """They have no warnings, no lines of a log and no paths of a machine."""
    outputs = [output for cell in cells(path, "code") for output in cell.outputs]

    assert "stderr" not in [output.get("name") for output in outputs]
    assert not re.search("/(home|tmp|root)/", path.read_text())


@each_notebook
def test_each_image_has_an_alternative_text(path) -> None:
    images = [cell for cell in cells(path, "code") if "image/png" in str(cell.outputs)]

    assert images
    assert all(cell.metadata.get("alt") for cell in images)


@each_notebook
def test_the_text_keeps_the_rules_of_words_and_links_to_files(path) -> None:
    """Each notebook has a link to the next notebook."""
    text = "\n\n".join(cell.source for cell in cells(path, "markdown"))
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)

    assert not faults(text)
    assert links
    assert all((path.parent / link).exists() for link in links), links


def test_there_are_five() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "1_keep_the_right_ones",
        "2_restore_load_compare",
        "3_interrupt_and_resume",
        "4_a_search_over_runs",
        "5_from_checkpoint_to_deployment",
    ]
