"""The tables of the documentation are those of the results in `benchmarks/`, and the drawings those of their script."""

import importlib.util
import pathlib
import re
from types import ModuleType

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def script(path: str) -> ModuleType:
    """A script of the repository, as a module."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tables, drawings = script("benchmarks/tables.py"), script("docs/figures/drawings.py")


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_have_the_newest_results(page) -> None:
    """`python benchmarks/tables.py` writes them."""
    assert page.read_text() == tables.current(page.read_text())


def test_each_table_of_results_is_on_a_page() -> None:
    shown = [name for page in tables.PAGES for _, name in tables.TABLE.findall(page.read_text())]

    assert sorted(shown) == sorted([*tables.SPEED, *tables.TRIALS])


@pytest.mark.parametrize("name", tables.TRIALS)
def test_each_test_of_a_row_has_trials_in_the_newest_long_run(name) -> None:
    """A renamed test would leave a row without its trials."""
    newest = tables.newest_run(name)

    for title, tests in tables.TRIALS[name].items():
        for test in tests:
            assert any(tables.is_variant(each, test) for each in newest["harnesses"]), (title, test)


def test_each_test_that_a_promise_names_is_there() -> None:
    """The table of promises in guarantees.md names a file below `tests/`, then its tests."""
    page = (ROOT / "docs" / "guarantees.md").read_text()
    promises = re.findall(r"^\| [^|]+ \| (`[^|]*test_[^|]*) \|$", page, re.MULTILINE)
    named = [re.findall(r"`([^`]+)`", group) for promise in promises for group in promise.split("; ")]

    assert len(named) > 20
    for file, *tests in named:
        source = (ROOT / "tests" / file).read_text()
        assert tests, file
        for test in tests:
            assert f"def {test}(" in source, (file, test)


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_a_drawing_is_the_drawing_of_its_script(name) -> None:
    """`python docs/figures/drawings.py` draws it."""
    assert (drawings.IMAGES / name).read_text() == drawings.DRAWINGS[name]
