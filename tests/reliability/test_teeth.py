"""Mutants of the package, each without one thing that keeps checkpoints safe, and a test that turns red for it.

Those without a sync are in test_crash_states.py, which leaves the sync out of what it replays.
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest

ROOT = pathlib.Path(__file__).parents[2]


class Mutant(NamedTuple):
    """A text of a module, what stands there instead, and the test that finds it."""

    module: str
    text: str
    instead: str
    test: str


ASSERTION = re.compile(r"^E +(AssertionError|assert |Failed: DID NOT RAISE|keras_ckpt.errors.Damaged)", re.MULTILINE)
STATES = "reliability/test_crash_states.py::test_a_crash_leaves_what_was_acknowledged_and_nothing_else"

MUTANTS = {
    "the sidecar before the data": Mutant(
        "store/commit",
        "        for name in staged:\n            stage.move(name, folder)\n        folder.sync()\n"
        "        stage.move(sidecar, folder)\n        folder.sync()\n",
        "        stage.move(sidecar, folder)\n        folder.sync()\n"
        "        for name in staged:\n            stage.move(name, folder)\n        folder.sync()\n",
        f"{STATES}[in order-a save over a leftover pin]",
    ),
    "a sidecar written over in place": Mutant(
        "store/files",
        "                private.move(new, self, name)\n",
        "                self.remove(name)\n                self.create(name, data)\n",
        f"{STATES}[in order-metrics added]",
    ),
    "a stage copied instead of renamed": Mutant(
        "store/files",
        "        os.rename(name, new or name, src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor)\n",
        "        target.remove(new or name)\n        target.create(new or name, self.read(name, 1 << 30))\n"
        "        self.remove(name)\n",
        f"{STATES}[in any order-a step saved again]",
    ),
    "the data before the sidecar, when pruning": Mutant(
        "store/commit",
        "        for record in records:\n            folder.move(",
        "        for record in records:\n            for file in record.files:\n"
        "                folder.remove(file.name)\n            folder.move(",
        f"{STATES}[in order-an explicit prune]",
    ),
    "pruning before saving": Mutant(
        "store/writer",
        "                commit.publish(folder, stage, record, superseded(record, listing.records))\n"
        "                self.retain(folder, listing.joined_by(record))\n",
        "                doomed = self.unkept(listing.joined_by(record).records)\n"
        "                commit.withdraw(folder, doomed)\n"
        "                commit.publish(folder, stage, record, superseded(record, listing.records))\n"
        "                commit.write_state(folder, examine(folder).records)\n",
        f"{STATES}[in order-saves with pruning]",
    ),
    "only the same step superseded": Mutant(
        "store/record",
        "    return [other for other in others if record.step == other.step or record.name == other.name]\n",
        "    return [other for other in others if record.step == other.step]\n",
        f"{STATES}[in order-another step under the same name]",
    ),
    "no roll forward": Mutant(
        "store/commit",
        "                        _roll_forward(folder, stage, sidecar)\n",
        "                        pass\n",
        f"{STATES}[in order-a step saved again]",
    ),
    "a roll forward of whatever there is": Mutant(
        "store/commit",
        "        if not _holds(holder, file):\n            return\n",
        "",
        "test_writer.py::test_a_stage_that_is_not_what_it_says_is_thrown_away",
    ),
    "a recovery that relies on what was not synced": Mutant(
        "store/commit",
        "            changed.sync()\n",
        "            pass\n",
        "reliability/test_crash_states.py::test_a_power_cut_after_a_kill_loses_nothing",
    ),
    "a roll forward of what is not synced": Mutant(
        "store/commit",
        "    for name in stage.names():\n        stage.sync_file(name)\n    stage.sync()\n",
        "",
        "reliability/test_crash_states.py::test_a_power_cut_after_a_kill_loses_nothing",
    ),
    "a directory that is not durably named": Mutant(
        "store/files",
        "    with Folder(parent) as folder:\n        folder.sync()\n",
        "",
        "test_files.py::test_missing_parents_are_made",
    ),
    "a sync that is tried once more": Mutant(
        "store/files",
        "                file.finish()\n            os.fsync(descriptor)\n",
        "                file.finish()\n"
        "            with contextlib.suppress(OSError):\n                os.fsync(descriptor)\n",
        "reliability/test_errors.py::test_an_error_at_any_call_loses_nothing",
    ),
    "no mutex": Mutant(
        "store/files",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX)\n            yield\n",
        "            yield\n",
        "test_directory.py::test_what_is_visible_changes_under_the_mutex",
    ),
    "no writer's lock": Mutant(
        "store/locks",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            pass\n",
        "reliability/test_concurrency.py::test_of_several_writers_one_writes",
    ),
    "a reader that holds nothing": Mutant(
        "store/files",
        '        if not os.path.isdir("/proc/self/fd"):\n            yield self\n            return\n',
        "        yield self\n        return\n",
        "test_directory.py::test_what_is_read_is_not_taken_away",
    ),
    "digests that are not compared": Mutant(
        "store/listing",
        "    if digest not in (None, file.digest.lower()):",
        "    if not digest and file.digest:",
        "test_directory.py::test_verify_tells_the_whole_from_the_damaged",
    ),
    "a pruning that trusts sizes": Mutant(
        "store/directory",
        "        _refuse_damaged(plan)\n",
        "",
        "test_directory.py::test_nothing_is_removed_in_favour_of_what_is_damaged",
    ),
    "names from disk that are not checked": Mutant(
        "store/record",
        "    _check_names(record.files, name)\n",
        "",
        "test_directory.py::test_a_sidecar_that_names_other_files_removes_none_of_them",
    ),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> pathlib.Path:
    """The package and its tests, to be changed."""
    path = tmp_path_factory.mktemp("copy")
    for name in ("keras_ckpt", "tests"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", path)
    return path


def run(copy: pathlib.Path, test: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", copy / "tests" / test],
        check=False,
        capture_output=True,
        text=True,
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found(copy, name) -> None:
    """The test passes without the change, as the suite shows, and fails with it: by an assertion, not by accident."""
    mutant = MUTANTS[name]
    module = copy / "keras_ckpt" / f"{mutant.module}.py"
    sound = module.read_text()
    assert sound.count(mutant.text) == 1
    module.write_text(sound.replace(mutant.text, mutant.instead))
    try:
        result = run(copy, mutant.test)
    finally:
        module.write_text(sound)

    assert result.returncode == 1, result.stdout[-2000:]
    assert ASSERTION.search(result.stdout), result.stdout[-2000:]
