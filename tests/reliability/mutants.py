"""Mutants of the package: each lacks one thing that keeps checkpoints safe, and names a test that must fail for it.

Mutants without a sync are in test_crash_states.py, which drops the sync from its replay.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from support.functions import Change, repeated, replaced, swapped, without

TESTS = pathlib.Path(__file__).parents[1]
STATES = "reliability/test_crash_states.py::test_a_crash_loses_no_acknowledged_checkpoint"
POWER = "reliability/test_crash_states.py::test_a_power_cut_after_a_kill_loses_no_checkpoint"


class Mutant(NamedTuple):
    """A change to the package, and the test that finds it."""

    change: Change
    test: str


def _replace_in_place(replace: Callable[..., None], folder: Any, name: str, data: bytes) -> None:
    folder.remove(name)
    folder.create(name, data)


def _copy(move: Callable[..., None], folder: Any, name: str, target: Any, new: str | None = None) -> None:
    target.remove(new or name)
    target.create(new or name, folder.read(name, 1 << 30))
    folder.remove(name)


def _remove_data_first(withdraw: Callable[..., None], folder: Any, records: Any) -> None:
    for record in records:
        for file in record.files:
            folder.remove(file.name)
    withdraw(folder, records)


def _same_step(superseded: Callable[..., Any], record: Any, others: Any) -> list[Any]:
    return [other for other in others if other.step == record.step]


@contextlib.contextmanager
def _hold_nothing(held: Callable[..., Any], folder: Any, names: object) -> Iterator[Any]:
    yield folder


MUTANTS = {
    "the sidecar moves before the data": Mutant(
        swapped("store.commit.publish", "move 1", "move 2"), f"{STATES}[a save over a leftover pin]"
    ),
    "a sidecar is written over in place": Mutant(
        replaced("store.files.Folder.replace", _replace_in_place), f"{STATES}[metrics added]"
    ),
    "a stage is copied instead of renamed": Mutant(
        replaced("store.files.Folder.move", _copy), f"{STATES}[a step saved again]"
    ),
    "pruning removes the data before the sidecar": Mutant(
        replaced("store.commit.withdraw", _remove_data_first), f"{STATES}[an explicit prune]"
    ),
    "a save prunes before it publishes": Mutant(
        swapped("store.writer.Writer._publish", "publish", "retain 2"), f"{STATES}[saves with pruning]"
    ),
    "a save supersedes the same step only, not the same name": Mutant(
        replaced("store.record.superseded", _same_step), f"{STATES}[another step under the same name]"
    ),
    "recovery does not roll forward": Mutant(
        without("store.commit.recover", "_roll_forward"), f"{STATES}[a step saved again]"
    ),
    "recovery rolls a damaged stage forward": Mutant(
        without("store.commit._roll_forward", "_holds"),
        "test_writer.py::test_a_stage_that_is_not_what_it_says_is_thrown_away",
    ),
    "recovery relies on changes that are not synced": Mutant(without("store.commit.recover", "sync"), POWER),
    "recovery rolls forward files that are not synced": Mutant(
        without("store.commit._publish_again", "sync_file", "sync"), POWER
    ),
    "a new directory is not durably named": Mutant(
        without("store.files._make_directories", "sync"), "test_files.py::test_missing_parents_are_made"
    ),
    "a failed sync is tried again": Mutant(
        repeated("store.files.Folder.writing", "fsync"),
        "reliability/test_errors.py::test_an_error_at_any_call_loses_nothing",
    ),
    "changes take no mutex": Mutant(
        without("store.files.Folder.mutex", "flock"),
        "test_directory.py::test_what_is_visible_changes_under_the_mutex",
    ),
    "a writer takes no lock": Mutant(
        without("store.locks.claim", "flock"),
        "test_files.py::test_a_second_process_is_refused_with_the_holders_name",
    ),
    "a reader holds no files": Mutant(
        replaced("store.files.Folder.held", _hold_nothing), "test_directory.py::test_what_is_read_is_not_taken_away"
    ),
    "digests are not compared": Mutant(
        without("store.checks.refuse_changed", "lower"),
        "test_directory.py::test_verify_tells_the_whole_from_the_damaged",
    ),
    "pruning trusts sizes": Mutant(
        without("store.directory.CheckpointDirectory.prune", "refuse_damaged"),
        "test_directory.py::test_nothing_is_removed_in_favour_of_what_is_damaged",
    ),
    "names from disk are not checked": Mutant(
        without("store.record.decode", "_check_names"),
        "test_directory.py::test_a_sidecar_that_names_other_files_removes_none_of_them",
    ),
}


def run(name: str) -> tuple[int, str]:
    """Runs the test of a mutant in a forked process: pytest's exit code, and its output."""
    with tempfile.NamedTemporaryFile("r") as output:
        process = multiprocessing.get_context("fork").Process(target=_run, args=(name, output.name))
        process.start()
        process.join()
        return process.exitcode, output.read()


def _run(name: str, output: str) -> None:
    mutant = MUTANTS[name]
    options = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--seed=0", "--rootdir", str(TESTS.parent)]
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(output, "w"))
        stack.enter_context(contextlib.redirect_stdout(file))
        stack.enter_context(contextlib.redirect_stderr(file))
        mutant.change(stack.enter_context(pytest.MonkeyPatch.context()))
        code = pytest.main([*options, str(TESTS / mutant.test)])
    os._exit(code)
