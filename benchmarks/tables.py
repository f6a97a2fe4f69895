"""Writes the tables of the documentation from the results in this folder: `python benchmarks/tables.py`.

A table of a page follows a comment with its name, `<!-- table: blocked -->`. A test holds that each page is current.
"""

from __future__ import annotations

import collections
import json
import pathlib
import re
import statistics
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "docs" / name for name in ("performance.md", "guarantees.md")]
TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(?:\n(?:\|.*\n)+)?")

ROWS = {
    "floor: warm memcpy": "*a warm copy of the state*",
    "floor: write, sync": "*the same bytes written, and a sync*",
    "floor: read": "*the same bytes read*",
    "floor: the bare files, sync": "*the same four files written, and synced*",
    "this: ModelCheckpoint": "this, `ModelCheckpoint`",
    "this: ModelCheckpoint, all kept": "this, all kept",
    "this: ModelCheckpoint, the newest kept": "this, the newest kept",
    "this: ModelCheckpoint, and all else done": "and until the older one is removed",
    "this: .weights.h5": "this, `.weights.h5`",
    "this: .weights.h5, and all else done": "and until the older one is removed",
    "this: .keras": "this, `.keras`",
    "this: .keras, and all else done": "and until the older one is removed",
    "this: BackupAndRestore": "this, `BackupAndRestore`",
    "this: restore": "this, `restore`",
    "this: restore, check_digests=False": "this, `restore(check_digests=False)`",
    "this: restore of its .weights.h5": "this, `restore` of its own `.weights.h5`",
    "this: restore of its .keras": "this, `restore` of its own `.keras`",
    "this: restore of .weights.h5": "this, `restore` of Keras's `.weights.h5`",
    "this: restore of .keras": "this, `restore` of Keras's `.keras`",
    "ModelCheckpoint, .weights.h5": "Keras's `ModelCheckpoint`, `.weights.h5`",
    "ModelCheckpoint, .keras": "Keras's `ModelCheckpoint`, `.keras`",
    "keras BackupAndRestore": "Keras's `BackupAndRestore`",
    "OrbaxCheckpoint": "`OrbaxCheckpoint`",
    "tf.train.CheckpointManager": "`tf.train.CheckpointManager`",
    "SaveV2, sync": "TensorFlow's `SaveV2`, and a sync",
    "load_weights": "Keras's `load_weights`",
    "load_weights of .keras": "Keras's `load_weights` of `.keras`",
    "keras.models.load_model": "Keras's `load_model`",
    "tf.train.Checkpoint.restore": "`tf.train.Checkpoint.restore`",
    "torch.save, sync": "`torch.save`, and a sync",
    "dcp.async_save": "`torch.distributed.checkpoint.async_save`",
    "torch.load, copy": "`torch.load`, and a copy into the model",
}
"""The rows of the results that a page shows, in the page's order and words."""

SPEED: dict[str, tuple[str, list[str], str]] = {
    "blocked": ("milliseconds", ["blocked"], "speed.json"),
    "blocked_jit": ("milliseconds, XLA", ["blocked_jit"], "speed.json"),
    "lost": ("milliseconds", ["lost"], "speed.json"),
    "lost_jit": ("milliseconds, XLA", ["lost_jit"], "speed.json"),
    "durable": ("milliseconds", ["durable"], "speed.json"),
    "restore": ("milliseconds", ["restore"], "speed.json"),
    "memory": ("states", ["memory"], "speed.json"),
    "small": ("milliseconds", ["small_returned", "small_durable"], "speed.json"),
    "bytes": ("states", ["bytes", "taken"], "speed.json"),
}
OTHERS = {"JAX": "jax", "PyTorch": "torch"}
SPEED |= {
    f"{figure}_{backend}": (f"milliseconds, {name}", [figure], f"speed-{backend}.json")
    for name, backend in OTHERS.items()
    for figure in ("blocked", "durable", "restore")
}
"""The tables of the results: the unit, and the figures side by side. Other backends have a file each."""

COLUMNS = {
    "small_returned": {"500 KB": "until the callback returns"},
    "small_durable": {"500 KB": "until it is on disk"},
    "bytes": {
        "all values change": "written, all values change",
        "nine tenths are frozen": "written, nine tenths are frozen",
    },
    "taken": {
        "all values change": "ten kept, all values change",
        "nine tenths are frozen": "ten kept, nine tenths are frozen",
    },
}
"""The headings of columns, where a page has other words than `speed.json`."""

TRIALS = {
    "reliability": {
        "a kill before each system call of saves, prunes and recoveries": ["test_a_kill_before_any_system_call"],
        "a kill at a random moment of a training": ["test_a_kill_at_random"],
        "a power cut while training, ext4 and XFS": ["test_a_power_cut_while_training"],
        "a power cut 6, 7 and 33 seconds after a save with `LatestN(1)`": ["test_a_power_cut_after_a_wait"],
        "a state that a crash may leave on disk, of workloads and their recoveries": [
            "test_a_crash_loses_no_acknowledged_checkpoint",
            "test_a_crash_during_recovery_loses_no_checkpoint",
            "test_a_power_cut_after_a_kill_loses_no_checkpoint",
        ],
        "an error at a call of the file system: once, or from then on": [
            "test_an_error_at_any_call_loses_nothing",
            "test_an_error_in_a_recovery_loses_nothing",
        ],
        "a disk without enough room": ["test_whatever_the_room_nothing_is_lost"],
        "a changed bit, page or file": [
            "test_each_bit_of_a_sidecar",
            "test_each_bit_of_an_index",
            "test_bits_of_a_data_file",
            "test_cut_zeroed_and_longer_files",
            "test_files_of_another_checkpoint",
        ],
        "an index made to do harm, then read by TensorFlow if it was accepted": [
            "test_tensorflow_survives_what_is_not_refused"
        ],
        "a restore beside a training that keeps one checkpoint, by eight processes": [
            "test_readers_are_not_disturbed_by_one_who_prunes"
        ],
    },
    "resume": {
        "killed at the end of a batch, each batch in turn, and resumed": [
            "test_a_run_that_is_killed_at_a_batch_ends_as_if_it_were_not"
        ],
        "killed ten times at random moments, one after another": [
            "test_a_run_that_is_killed_often_ends_as_if_it_were_not"
        ],
        "asked to end by SIGTERM, SIGUSR1 or Ctrl-C at a random moment": [
            "test_a_run_that_is_asked_to_end_has_all_that_it_trained"
        ],
    },
}
"""The rows of the tables of harnesses: the tests whose trials a row counts, variants and continuations of them too."""


def table(name: str) -> str:
    """A table in Markdown."""
    return trials(name) if name in TRIALS else speed(name)


def speed(name: str) -> str:
    """A table of medians."""
    unit, figures, file = SPEED[name]
    results = json.loads((ROOT / "benchmarks" / file).read_text())["figures"]
    columns = {
        COLUMNS.get(figure, {}).get(column, column.removesuffix(" variables")): rows
        for figure in figures
        for column, rows in results[figure].items()
    }
    shown = [row for row in ROWS if any(row in rows for rows in columns.values())]
    cells = ([ROWS[row], *(median(rows.get(row)) for rows in columns.values())] for row in shown)
    return markdown([unit, *columns], cells)


def median(samples: list[float] | None) -> str:
    """A median in three digits."""
    if not samples:
        return ""
    value = statistics.median(samples)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def trials(name: str) -> str:
    """A table of the counts of the newest long run."""
    newest = newest_run(name)
    kinds = ["acknowledged", "lost", "invalid"] if name == "reliability" else ["differing"]
    cells = []
    for title, tests in TRIALS[name].items():
        sums: collections.Counter[str] = collections.Counter()
        for found, counts in newest["harnesses"].items():
            if any(is_variant(found, test) for test in tests):
                sums.update({kind: counts[kind] for kind in ("trials", *kinds) if kind in counts})
        cells.append([title, *(f"{sums[kind]:,}" if kind in sums else "" for kind in ("trials", *kinds))])
    return markdown([f"trial ({newest['date']})", "times", *kinds], cells)


def newest_run(name: str) -> dict[str, Any]:
    """The counts of the newest long run of some harnesses."""
    return json.loads((ROOT / "benchmarks" / f"{name}.jsonl").read_text().splitlines()[-1])


def is_variant(found: str, test: str) -> bool:
    """Whether a harness of a long run is a test, a variant of it, or its continuation under a longer name."""
    return found.partition("::")[2].startswith(test)


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def current(text: str) -> str:
    """The text of a page, with its tables of the newest results."""
    return TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(current(page.read_text()))
