"""Each mutant of the package is found by a test."""

from __future__ import annotations

import re

import pytest

from reliability import mutants
from reliability.trainer import station
from support.functions import repeated, replaced, swapped, without

ASSERTION = re.compile(r"^E +(AssertionError|assert |Failed: DID NOT RAISE|keras_ckpt.errors.Damaged)", re.MULTILINE)


@pytest.fixture(scope="module")
def place():
    """The process from which the processes of the mutants are forked."""
    with station() as executor:
        yield executor


@pytest.mark.sample(6)
@pytest.mark.parametrize("mutant", mutants.MUTANTS)
def test_a_mutant_is_found(place, mutant) -> None:
    """The named test passes without the change, as the suite shows, and fails with it by an assertion."""
    code, output = place.submit(mutants.run, mutant).result()

    assert code == 1, output[-2000:]
    assert ASSERTION.search(output), output[-2000:]


@pytest.mark.parametrize(
    "change",
    [
        without("store.commit.publish", "vanished"),
        without("store.commit.publish", "move 99"),
        swapped("store.commit.publish", "move", "vanished"),
        swapped("store.commit.publish", "move", "move"),
        repeated("store.files.Folder.writing", "vanished"),
        without("store.commit.vanished", "move"),
        replaced("store.commit.vanished", print),
    ],
)
def test_a_change_that_no_longer_applies_is_an_error(monkeypatch, change) -> None:
    """It names a function or a call that is gone."""
    with pytest.raises((LookupError, AttributeError), match=r"vanished|move 99|in no two statements"):
        change(monkeypatch)
