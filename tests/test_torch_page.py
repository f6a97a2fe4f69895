"""The blocks of docs/guides/pytorch.md, which need Keras on PyTorch."""

import contextlib
import io
import pathlib
import re

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("the backend of this process is another", allow_module_level=True)

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "guides" / "pytorch.md").read_text()
BLOCKS = re.findall(r"^```python torch\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:keras_ckpt.load_model.. cannot build")
def test_the_page_for_pytorch_runs_from_top_to_bottom_and_prints_what_it_shows(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}

    for code, shown in BLOCKS:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert not shown or printed.getvalue() == shown

    loaded, given = names["model"].block.module.state_dict(), names["module"].state_dict()
    assert all(np.array_equal(loaded[name], given[name]) for name in given)
