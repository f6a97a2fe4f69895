"""The notebooks run from top to bottom, and again where they ran before."""

import functools
import pathlib
import random

import nbformat
import pytest
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class Manager(AsyncKernelManager):
    """A manager without Jupyter's heartbeat, whose thread may wait for ever for a message that it has seen."""

    def client(self, **options) -> AsyncKernelClient:
        client = super().client(**options)
        client.start_channels = functools.partial(client.start_channels, hb=False)
        return client


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(tmp_path, monkeypatch, long, request, path) -> None:
    """Every cell runs without an error, and again in a new kernel where the notebook ran before.

    The second run is for all notebooks in the long form, for a sample of one in the short form.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    twice = NOTEBOOKS if long else [random.Random(request.config.option.seed).choice(NOTEBOOKS)]
    for _ in range(2 if path in twice else 1):
        notebook = nbformat.read(path, as_version=4)

        resources = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, timeout=300, resources=resources, kernel_manager_class=Manager).execute()

        assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_names_no_path_of_a_machine(path) -> None:
    """Its outputs are the same on every machine."""
    text = path.read_text()

    assert "/home/" not in text
    assert "/tmp/" not in text
    assert "/root/" not in text


def test_there_are_four() -> None:
    """Train and retain, inspect and restore, prune, interrupt and resume."""
    assert len(NOTEBOOKS) == 4
