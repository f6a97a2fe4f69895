"""Shared fixtures, the samples of the short form, and the counts of the harnesses."""

from __future__ import annotations

import collections
import contextlib
import gc
import json
import os
import pathlib
import platform
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Generator, Iterator

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.pop("COLUMNS", None)  # a table would fit this width; a pipe has none

from keras_ckpt import CheckpointDirectory
from support.fork_server import ForkServer
from support.runs import HOLD, Filler

EVERY_BACKEND = [
    "averaging",
    "backends",
    "backup_and_restore",
    "callbacks",
    "data",
    "evaluating",
    "file_checkpoints",
    "integers",
    "jax_backend",
    "keras_internals",
    "learned",
    "load_best",
    "loading",
    "model_checkpoint",
    "new_run",
    "on_nan",
    "other_backends",
    "restoring",
    "restoring_files",
    "resume",
    "resuming_on_each_backend",
    "rollback",
    "state",
    "torch_backend",
    "torch_modules",
    "torch_page",
    "torn",
]
"""The tests that run on JAX and PyTorch too, where TensorFlow is not installed. The others need TensorFlow, or no
backend."""
OF_THE_BACKENDS = [
    "backends",
    "jax_backend",
    "other_backends",
    "resuming_on_each_backend",
    "torch_backend",
    "torch_modules",
    "torch_page",
    "torn",
]
"""The files about the backends, whose tests all run. The short form runs an eighth of the tests of the other files, the
same tests in each run."""
MEMORY = "/dev/shm"
"""A file system in memory, where a sync takes no time. The tests of power cuts bring file systems of their own."""
ROOM = 4 << 30
"""The free bytes there with which the suite keeps its temporary files in memory."""


@pytest.fixture
def filler(tmp_path: pathlib.Path) -> Filler:
    return Filler(tmp_path / "run")


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> CheckpointDirectory:
    return CheckpointDirectory(tmp_path / "run")


@pytest.fixture
def backup(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "backup"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the writer's lock of a directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """The server of a test worker, which runs scripts in processes of their own with Keras loaded."""
    with contextlib.closing(ForkServer()) as server:
        yield server


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of the samples: the short form runs a sample of trials and rows, the long form runs all."""
    parser.addoption("--long", action="store_true", help="run the long form: all trials and all rows of tables")
    parser.addoption("--seed", type=int, help="the seed of the samples, to repeat a run")
    parser.addoption("--log", help="append the counts of the harnesses to this file, a line of JSON for each run")


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the seed of the samples and the place of temporary files; a worker has those of its controller."""
    if hasattr(config, "workerinput"):
        config.option.seed = config.workerinput["seed"]
        return
    if config.option.seed is None:
        config.option.seed = random.randrange(1 << 30)
    if os.environ["KERAS_BACKEND"] == "jax":
        # A model is compiled once, in whichever process: to compile it takes longer than most tests.
        cache = tempfile.mkdtemp(prefix="keras_ckpt-jax-")
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))
        os.environ |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    if os.path.isdir(MEMORY) and shutil.disk_usage(MEMORY).free > ROOM:
        place = tempfile.mkdtemp(prefix="keras_ckpt-", dir=MEMORY)
        config.add_cleanup(lambda: shutil.rmtree(place, ignore_errors=True))
        os.environ["TMPDIR"] = tempfile.tempdir = place


def pytest_ignore_collect(collection_path: pathlib.Path) -> bool | None:
    """On JAX and PyTorch, only the files of every backend run."""
    if os.environ["KERAS_BACKEND"] == "tensorflow" or collection_path.suffix != ".py":
        return None
    name = collection_path.stem
    return (name.startswith("test_") and name.removeprefix("test_") not in EVERY_BACKEND) or None


def pytest_configure_node(node) -> None:
    """Gives the seed to a worker."""
    node.workerinput["seed"] = node.config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    """Tells how to repeat the samples."""
    return f"samples: --seed={config.option.seed}"


def is_run_everywhere(item: pytest.Item) -> bool:
    """Whether the short form runs a test on JAX and PyTorch too."""
    of_the_backends = item.path.stem.removeprefix("test_") in OF_THE_BACKENDS
    return of_the_backends or zlib.crc32(item.nodeid.encode()) % 8 == 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects variants of a test that is marked with `sample`, except so many; the long form runs all."""
    if config.option.long:
        return
    if os.environ["KERAS_BACKEND"] != "tensorflow":
        config.hook.pytest_deselected(items=[item for item in items if not is_run_everywhere(item)])
        items[:] = [item for item in items if is_run_everywhere(item)]
    variants = collections.defaultdict(list)
    for item in items:
        if mark := item.get_closest_marker("sample"):
            variants[item.nodeid.partition("[")[0], mark.args[0]].append(item)
    left_out = set()
    for (test, number), found in variants.items():
        chance = random.Random(f"{config.option.seed} {test}")
        left_out |= set(found) - set(chance.sample(found, min(number, len(found))))
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def pytest_collection_finish() -> None:
    """Prepares a process with TensorFlow: its iterators end at once, and a collection of garbage takes no second.

    The loaded modules are excluded from collections.
    """
    if "tensorflow" in sys.modules:
        from support import iterators

        iterators.end_at_once()
    gc.freeze()


@pytest.fixture
def dice(request: pytest.FixtureRequest) -> random.Random:
    """Chooses the samples of a test: other samples in each run, the same samples for the same `--seed`."""
    return random.Random(f"{request.config.option.seed} {request.node.nodeid.rpartition('/')[2]}")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether this run is the long form."""
    return request.config.getoption("--long")


@pytest.fixture
def tally(request: pytest.FixtureRequest, record_property):
    """Counts the results of a harness. A harness without trials has failed.

    `acknowledged` checkpoints were reported as saved. `lost` checkpoints are acknowledged, not pruned, and gone.
    `invalid` checkpoints are visible and differ from the written bytes. `leftovers` of a killed process were not
    removed by the next process. `differing` runs ended otherwise than the undisturbed run.
    """
    counts = collections.Counter(trials=0, lost=0, invalid=0)
    yield counts
    record_property("tally", dict(counts))
    assert counts["trials"], "the harness ran no trial"
    assert not counts["lost"], counts
    assert not counts["invalid"], counts
    assert not counts["leftovers"], counts
    assert not counts["differing"], counts


def counts_of(report: object) -> dict[str, object] | None:
    """The counts of a harness, or the reason why it did not run; `None` for any other test."""
    if not isinstance(report, pytest.TestReport) or not re.search("tests/(reliability|resume)/", report.nodeid):
        return None
    if report.skipped:
        return {"not run": report.longrepr[2]}
    return dict(report.user_properties).get("tally")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Skips a test of a layer for which Keras needs TensorFlow, such as a layer of words, where it is not installed."""
    try:
        yield
    except ImportError as error:
        if "requires TensorFlow" in str(error):
            pytest.skip(str(error))
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tells how to repeat the samples of a test that has failed."""
    report = yield
    if report.failed and {"dice", "long"} & set(getattr(item, "fixturenames", ())):
        report.sections.append(("Samples", f"repeat them with --seed={item.config.option.seed}"))
    return report


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Prints a line for each harness, and writes one to the log."""
    if hasattr(config, "workerinput"):
        return  # the process that started the workers prints all counts
    reports = [report for category in terminalreporter.stats.values() for report in category]
    harnesses = {report.nodeid.rpartition("/")[2]: counts for report in reports if (counts := counts_of(report))}
    if not harnesses:
        return
    terminalreporter.section(f"harnesses (--seed={config.option.seed})")
    for test, counts in sorted(harnesses.items()):
        terminalreporter.line(f"{test}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    if path := config.getoption("--log"):
        entry = {"date": time.strftime("%Y-%m-%d"), "kernel": platform.release(), "seed": config.option.seed}
        with open(path, "a") as file:
            file.write(json.dumps(entry | {"harnesses": harnesses}) + "\n")
