"""Keras's own tests of its callbacks pass with the callbacks of this package in their place."""

from __future__ import annotations

import unittest

import pytest

import keras_ckpt as kc


def failures_of(module: str, case: str, monkeypatch, **classes: type) -> tuple[int, list[str]]:
    """Runs the tests of a module of Keras with other classes. Returns their number, and the names of the failed."""
    tests = pytest.importorskip(module, reason="Keras 3.14 comes without its tests")
    for name, each in classes.items():
        monkeypatch.setattr(tests.callbacks, name, each)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(getattr(tests, case))
    # The base class of Keras's test cases is a test without content.
    result = unittest.TestResult()
    suite.run(result)
    return result.testsRun, [str(test) + trace for test, trace in (*result.failures, *result.errors)]


@pytest.mark.filterwarnings("default")
def test_keras_own_tests_of_model_checkpoint_pass(monkeypatch) -> None:
    """They cover each argument with `.keras` and `.weights.h5` files, and loading."""
    number, failed = failures_of(
        "keras.src.callbacks.model_checkpoint_test",
        "ModelCheckpointTest",
        monkeypatch,
        ModelCheckpoint=kc.ModelCheckpoint,
    )

    assert failed == []
    assert number == 2


@pytest.mark.filterwarnings("default")
def test_keras_own_tests_of_backup_and_restore_pass_but_one(monkeypatch) -> None:
    """The other test saves a batch whose end raises an error in a later callback.

    Keras's callback saves it, because it stands before the other. This callback moves to the end of the list, so that a
    backup has the effects of all callbacks, and does not hear of the end of that batch.
    """
    number, failed = failures_of(
        "keras.src.callbacks.backup_and_restore_test",
        "BackupAndRestoreCallbackTest",
        monkeypatch,
        BackupAndRestore=kc.BackupAndRestore,
    )

    assert number == 7
    # Its backup may still be written while Keras removes the folder, which is an error of its own.
    assert {each.partition(" ")[0] for each in failed} == {"test_best_case_step"}
