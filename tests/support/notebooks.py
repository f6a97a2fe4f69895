"""Runs notebooks in one kernel. As a program it runs all of them, and stores their outputs:

python tests/support/notebooks.py

The program needs TensorFlow, JAX and PyTorch in one environment.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

import nbformat
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OF_THREE_BACKENDS = ROOT / "notebooks" / "2_restore_load_compare.ipynb"
BACKENDS = '"jax", "torch", "tensorflow"'
"""The backends of that notebook, as its first line names them. Its kernel has the second."""


class Manager(AsyncKernelManager):
    """A manager without Jupyter's heartbeat, whose thread may wait for ever for a message that it has seen."""

    def client(self, **options) -> AsyncKernelClient:
        client = super().client(**options)
        client.start_channels = functools.partial(client.start_channels, hb=False)
        return client


class Kernel:
    """A kernel for all notebooks, because the import of Keras takes longer than a notebook.

    TensorFlow is imported already, because it logs lines which belong to no notebook. On every backend Keras imports it
    to set a seed, if it is installed.
    """

    def __init__(self, client: NotebookClient) -> None:
        self._client = client
        self._execute("import keras\nkeras.utils.set_random_seed(0)")

    def run(self, path: pathlib.Path, directory: pathlib.Path, backends: str = BACKENDS) -> NotebookNode:
        """Runs a notebook in a directory, as a new kernel would. Paths in its outputs are relative to the directory."""
        shutil.copy(path.with_name("digits.py"), directory)
        self._execute(f"%cd -q {directory}\nget_ipython().execution_count = 1\n%reset -f")
        notebook = nbformat.reads(path.read_text().replace(json.dumps(BACKENDS)[1:-1], json.dumps(backends)[1:-1]), 4)
        self._run(notebook)
        return nbformat.reads(nbformat.writes(notebook).replace(f"{directory}/", ""), as_version=4)

    def _execute(self, code: str) -> None:
        self._run(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]))

    def _run(self, notebook: NotebookNode) -> None:
        self._client.nb = notebook
        for place, cell in enumerate(notebook.cells):
            self._client.execute_cell(cell, place)


@contextlib.contextmanager
def kernel(backend: str = "tensorflow") -> Iterator[Kernel]:
    """Starts a kernel for one backend, and ends it."""
    options = {"timeout": 300, "record_timing": False, "coalesce_streams": True, "kernel_manager_class": Manager}
    client = NotebookClient(nbformat.v4.new_notebook(), **options)
    environment = {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": backend}
    with client.setup_kernel(env={**os.environ, **environment}):
        yield Kernel(client)


def outline(notebook: NotebookNode) -> list[list[str]]:
    """For each cell of code its outputs, without the values that differ from machine to machine.

    The text of streams is without numbers. Tables have their heads, other outputs their types.
    """
    return [[_kind(output) for output in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]


def _kind(output: NotebookNode) -> str:
    if output.output_type == "stream":
        return f"{output.name}: {re.sub(r'[0-9.]+', '#', output.text)}"
    heads = re.findall("<div.*?>|<th.*?</th>", output.data.get("text/html", ""))
    return " ".join([*sorted(output.data), *heads])


def store() -> None:
    """Runs all notebooks, each in an empty directory, and stores their outputs."""
    with kernel() as running, kernel("torch") as other:
        for path in NOTEBOOKS:
            with tempfile.TemporaryDirectory() as directory:
                chosen = other if path == OF_THREE_BACKENDS else running
                nbformat.write(chosen.run(path, pathlib.Path(directory)), path)


if __name__ == "__main__":
    store()
