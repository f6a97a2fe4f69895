"""Hostile inputs: each is skipped for the next older checkpoint, is refused in plain words, or is harmless.

Hostile indexes are in test_index.py, single flipped bits in test_bit_rot.py, fields of the sidecar in test_record.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable

import keras
import numpy as np
import pytest
from blake3 import blake3

import keras_ckpt as kc
from keras_ckpt.model import transfer
from keras_ckpt.model.checkpoint_reader import BundleSource
from keras_ckpt.store.files import Folder
from keras_ckpt.store.listing import examine
from keras_ckpt.store.policies import LatestN
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord, encode
from keras_ckpt.store.writer import SaveRequest, Writer
from support.models import dense_model, fit, values
from support.runs import Filler, payload, unprivileged_user

ROOT = pathlib.Path(__file__).parents[2]
SIDECAR, INDEX, DATA = "ckpt-10.json", "ckpt-10.index", "ckpt-10.data-00000-of-00001"
Harm = Callable[[pathlib.Path], object]


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> pathlib.Path:
    """A run of two checkpoints, of steps 5 and 10."""
    path = tmp_path_factory.mktemp("template") / "run"
    fit(dense_model(), kc.ModelCheckpoint(path), epochs=2)
    return path


@pytest.fixture
def run(template, tmp_path) -> pathlib.Path:
    return shutil.copytree(template, tmp_path / "run")


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return dense_model()


def write(name: str, data: bytes | Callable[[bytes], bytes]) -> Harm:
    """Replaces the bytes of a file, by other bytes or by a function of its bytes."""

    def harm(run: pathlib.Path) -> None:
        path = run / name
        path.write_bytes(data if isinstance(data, bytes) else data(path.read_bytes()))

    return harm


def text(old: str, new: str) -> Harm:
    """Replaces text in the sidecar, and seals it again."""

    def harm(run: pathlib.Path) -> None:
        body = (run / SIDECAR).read_text().rpartition(",")[0]
        assert old in body
        reseal(run, body.replace(old, new, 1))

    return harm


def member(name: str, value: object) -> Harm:
    """Replaces a member of the sidecar, and seals it again."""

    def harm(run: pathlib.Path) -> None:
        facts = json.loads((run / SIDECAR).read_text())
        del facts["digest"]
        reseal(run, json.dumps(facts | {name: value})[:-1])

    return harm


def file(**changes: object) -> Harm:
    """Changes what the sidecar says of its first file, and seals it again."""

    def harm(run: pathlib.Path) -> None:
        files = json.loads((run / SIDECAR).read_text())["files"]
        member("files", [files[0] | changes, *files[1:]])(run)

    return harm


def reseal(run: pathlib.Path, body: str) -> None:
    data = body.encode(errors="surrogatepass")
    (run / SIDECAR).write_bytes(data + b', "digest": "blake3:%s"}' % blake3(data).hexdigest().encode())


def remove(name: str) -> Harm:
    return lambda run: (run / name).unlink()


def instead(name: str, make: Callable[[pathlib.Path], object]) -> Harm:
    """Puts something else in the place of a file, which is moved aside."""

    def harm(run: pathlib.Path) -> None:
        (run / name).rename(run / "aside")
        make(run / name)

    return harm


def sparse(size: int) -> Harm:
    return lambda run: os.truncate(run / SIDECAR, size)


def swap(*names: str) -> Harm:
    """Puts the files of the other checkpoint in the place of this one's."""

    def harm(run: pathlib.Path) -> None:
        for name in names:
            (run / name).unlink()
            shutil.copy(run / name.replace("-10", "-5"), run / name)

    return harm


def zero_a_page(data: bytes) -> bytes:
    return bytes(min(4096, len(data))) + data[4096:]


def bind(path: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


SKIPPED: dict[str, Harm] = {
    "sidecar empty": write(SIDECAR, b""),
    "sidecar cut": write(SIDECAR, lambda data: data[: len(data) // 2]),
    "sidecar all NUL": write(SIDECAR, lambda data: bytes(len(data))),
    "one bit, and still JSON": write(SIDECAR, lambda data: data.replace(b'"epoch": 2', b'"epoch": 3')),
    "sidecar missing": remove(SIDECAR),
    "data missing": remove(DATA),
    "index missing": remove(INDEX),
    "sidecar of 2 GiB": sparse(2 << 30),
    "nested deeply": write(SIDECAR, b"[" * 100_000),
    "nested deeply in metadata": text('"metadata": {}', '"metadata": {"a": ' + "[" * 9999 + "]" * 9999 + "}"),
    "a member twice": text('"step": 10', '"step": 10, "step": 10'),
    "NaN as a step": text('"step": 10', '"step": NaN'),
    "infinity as a size": text('"size": ', '"size": 1e999, "was": '),
    "NaN as a metric": text('"loss": ', '"loss": NaN, "was": '),
    "an integer of 5,000 digits": text('"step": 10', f'"step": {"1" * 5000}'),
    "a byte order mark": write(SIDECAR, lambda data: b"\xef\xbb\xbf" + data),
    "UTF-16": write(SIDECAR, lambda data: data.decode().encode("utf-16")),
    "no UTF-8": write(SIDECAR, lambda data: data.replace(b"epoch", b"\xffpoch", 1)),
    "half a character": text('"metadata": {}', '"metadata": {"a": "\ud800"}'),
    "no files": member("files", []),
    "a step of text": member("step", "10"),
    "a step that is true": member("step", True),
    "a step with a fraction": text('"step": 10', '"step": 10.5'),
    "a negative step": member("step", -1),
    "a step of 2^63": member("step", 2**63),
    **{
        f"a file named {name[:20]!r}": file(name=name)
        for name in ("../../etc/passwd", "/etc/passwd", "a/b", ".", "", "ckpt-10.\0", "..\\x", "ckpt-10." + "x" * 300)
    },
    "lists the sidecar": file(name=SIDECAR),
    "lists a file twice": file(name=INDEX),
    "another digest": file(digest="blake3:" + "0" * 64),
    "an unknown kind of digest": file(digest="sha256:" + "0" * 64),
    "another step than its name": swap(SIDECAR),
    "data empty": write(DATA, b""),
    "half the data": write(DATA, lambda data: data[: len(data) // 2]),
    "a byte less": write(DATA, lambda data: data[:-1]),
    "a hundred bytes more": write(DATA, lambda data: data + bytes(100)),
    "a page of zeros": write(DATA, zero_a_page),
    "first bit": write(DATA, lambda data: bytes([data[0] ^ 1]) + data[1:]),
    "last bit": write(DATA, lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "data of another step": swap(DATA),
    "index and data of another step": swap(INDEX, DATA),
    "index empty": write(INDEX, b""),
    "half an index": write(INDEX, lambda data: data[: len(data) // 2]),
    "index of garbage": write(INDEX, b"garbage" * 99),
    "the sidecar is a link": instead(SIDECAR, lambda path: path.symlink_to("aside")),
    "a link to nothing": instead(SIDECAR, lambda path: path.symlink_to("nowhere")),
    "a link to itself": instead(SIDECAR, lambda path: path.symlink_to(path.name)),
    "the data is a link": instead(DATA, lambda path: path.symlink_to("aside")),
    "the data is a FIFO": instead(DATA, os.mkfifo),
    "the data is a directory": instead(DATA, os.mkdir),
    "the data is a socket": instead(DATA, bind),
    "the sidecar is a FIFO": instead(SIDECAR, os.mkfifo),
    "the sidecar is a pickle": write(SIDECAR, pickle.dumps({"step": 10})),
}


OTHERS = {"sidecar missing"}
"""Rows without damage: TensorFlow may have written the checkpoint."""


def contents(run: pathlib.Path) -> dict[str, object]:
    """What lies in a directory: names, kinds, and the bytes of files."""
    return {
        path.name: (path.lstat().st_mode, path.read_bytes() if path.is_file() and path.lstat().st_size < 1e9 else None)
        for path in run.iterdir()
        if path.name != ".keras_ckpt"
    }


@pytest.mark.parametrize("row", SKIPPED)
def test_a_damaged_checkpoint_is_skipped_for_the_next_older(run, model, row) -> None:
    """A restore of the damaged checkpoint by name is refused, and changes no variable. Pruning deletes nothing."""
    SKIPPED[row](run)
    before, state = contents(run), values(model)
    runs = kc.CheckpointDirectory(run)

    if row not in OTHERS:
        with pytest.raises(kc.CheckpointError):
            kc.restore(model, run / "ckpt-10", strict=False)
        assert all(np.array_equal(a, b) for a, b in zip(state, values(model), strict=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = kc.restore(model, runs)
    assert report.step == 5
    assert row in OTHERS or any("ckpt-10" in str(warning.message) for warning in caught)
    with contextlib.suppress(kc.PlanError):
        assert runs.prune(kc.LatestN(1)) == []
    assert contents(run) == before
    assert row in OTHERS or list(runs.verify().listing.damaged) == ["ckpt-10"]


def write_more(run: pathlib.Path, *names: str) -> None:
    for name in names:
        (run / name).write_text("mine")


def touch_at(run: pathlib.Path, seconds: int) -> None:
    for path in run.iterdir():
        os.utime(path, (seconds, seconds))


HOSTILE = b"\n".join(
    b'{"at":%s,"kind":"%s","step":%d,"policy":%s,"name":"../x","why":"<script>","metrics":{"loss":1e300}}'
    % (at, kind, step, policy)
    for at, kind, step, policy in [
        (b"1", b"run", 0, b"\"__import__('os').system('touch x')\""),
        (b"1e300", b"restored", 2**62, b'[["LatestN",[[1]]]]'),
        (b"0", b"saved", 7, b"[[]]"),
        (b"0", b"removed", 7, b'[["MaxCount",1],["MaxCount",2]]'),
        (b"0", b"run", 0, b'[["BestN",1,"loss","sideways"]]'),
        (b"0", b"run", 0, b'[["PreservationPolicy"]]'),
    ]
)
"""Events that contradict each other and the checkpoints, and policies that are none."""
HARMLESS: dict[str, Harm] = {
    "an unknown member": member("later", {"a": 1}),
    "another file of that name": lambda run: write_more(run, "ckpt-10.notes"),
    "a digest in capitals": lambda run: file(digest="blake3:" + digest_of(run / DATA).upper())(run),
    "the data is a hard link": lambda run: os.link(run / DATA, run / "mine"),
    "numbers that are none": lambda run: write_more(run, "ckpt-\uff11\uff12.json", "ckpt-1_0.json", "CKPT-x.json"),
    "files of TensorFlow": lambda run: write_more(run, "checkpoint.tmp12", "ckpt-4_temp"),
    "a state file that leads outside": write("checkpoint", b'model_checkpoint_path: "../outside/victim"\n'),
    "a hostile journal": write("journal.jsonl", HOSTILE),
    "files of 1970": lambda run: touch_at(run, 0),
    "files of 2106": lambda run: touch_at(run, 2**32),
}


def digest_of(path: pathlib.Path) -> str:
    return blake3(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("row", HARMLESS)
def test_a_harmless_change_is_ignored(run, model, row) -> None:
    """The newest checkpoint is restored. Files of other programs stay when the run is cleared."""
    HARMLESS[row](run)
    foreign = {path.name for path in run.iterdir() if not path.name.startswith((".", "ckpt-5.", "ckpt-10.json"))}
    runs = kc.CheckpointDirectory(run)

    assert kc.restore(model, runs).step == 10
    assert runs.verify().ok

    runs.clear()
    own = {INDEX, DATA, "checkpoint", "journal.jsonl"}
    assert {path.name for path in run.iterdir()} == foreign - own | {".keras_ckpt"}


def test_a_newer_format_is_refused_and_nothing_is_pruned(run, model) -> None:
    """The intent of the newer version is unknown, so restore and prune raise `FormatVersionError`."""
    member("format_version", 3)(run)
    before = contents(run)
    runs = kc.CheckpointDirectory(run)

    with pytest.raises(kc.FormatVersionError, match="upgrade"):
        kc.restore(model, run / "ckpt-10")
    with pytest.raises(kc.FormatVersionError):
        runs.prune(kc.LatestN(1))
    assert contents(run) == before


def test_a_copy_under_the_name_of_another_step_is_damaged(run) -> None:
    """The sidecar of the copy says another step than its name."""
    for name in (SIDECAR, INDEX, DATA):
        shutil.copy(run / name, run / name.replace("-10", "-11"))

    listing = kc.CheckpointDirectory(run).listing()

    assert [record.step for record in listing.records] == [5, 10]
    assert list(listing.damaged) == ["ckpt-11"]


def test_a_restore_of_nan_weights_warns(tmp_path) -> None:
    """The weights are restored as saved. Where the warning is an error, the model does not change."""
    spoiled, other = dense_model(), dense_model()
    fit(spoiled, kc.ModelCheckpoint(tmp_path))
    spoiled.layers[0].kernel.assign(np.full(spoiled.layers[0].kernel.shape, np.nan))
    kc.CheckpointDirectory(tmp_path).clear()
    fit(spoiled, kc.ModelCheckpoint(tmp_path))
    before = other.get_weights()

    # The tests make every warning an error.
    with pytest.raises(UserWarning, match="NaN or infinity in model/dense/kernel"):
        kc.restore(other, tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(before, other.get_weights(), strict=True))

    with pytest.warns(UserWarning, match="NaN"):
        kc.restore(other, tmp_path)
    assert np.isnan(other.get_weights()[0]).all()


def test_a_path_that_is_no_run_is_refused(run, tmp_path, model) -> None:
    """The root, the home, a file, a directory of another library, and a missing directory."""
    (tmp_path / "orbax" / "0").mkdir(parents=True)
    (tmp_path / "orbax" / "0" / "_CHECKPOINT_METADATA").write_text("{}")

    for path in ("/", os.path.expanduser("~")):
        with pytest.raises(ValueError, match="name a directory below it"):
            fit(model, kc.ModelCheckpoint(path))
    with pytest.raises(NotADirectoryError, match="this is a file"):
        kc.CheckpointDirectory(run / DATA).latest()
    for path in ("orbax", "orbax/0", "not/there"):
        with pytest.raises(kc.CheckpointNotFoundError, match="There is no checkpoint"):
            kc.restore(model, tmp_path / path)


def test_a_hundred_thousand_checkpoints_are_listed(tmp_path, long) -> None:
    """The short form lists five thousand."""
    count = 100_000 if long else 5_000
    for step in range(1, count + 1):
        name = f"ckpt-{step}"
        files = (CheckpointFile(f"{name}.index", 0, f"blake3:{'0' * 64}"),)
        (tmp_path / f"{name}.json").write_bytes(encode(CheckpointRecord(sequence=step, step=step, files=files)))
        (tmp_path / files[0].name).touch()
    runs = kc.CheckpointDirectory(tmp_path)

    assert len(runs) == count
    assert runs.latest().step == count
    assert len(str(runs).splitlines()) < 60


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_a_directory_that_is_taken_away_during_a_save_loses_nothing_else(filler, tmp_path, how) -> None:
    """The save fails, or is in the moved directory. The next save works under a new lock."""
    runs = filler.save("1")
    elsewhere = tmp_path / "elsewhere"

    def write_and_take_away(folder, record):
        written = payload()(folder, record)
        if how == "removed":
            shutil.rmtree(runs.path)
        else:
            os.rename(runs.path, elsewhere)
        if how == "replaced":
            os.mkdir(runs.path)
        return written

    writer = Writer(runs)
    if how == "removed":
        with pytest.raises(kc.SaveError):
            writer.save(SaveRequest(step=2), write_and_take_away)
    else:
        writer.save(SaveRequest(step=2), write_and_take_away)
        assert [record.step for record in kc.CheckpointDirectory(elsewhere)] == [1, 2]
    writer.save(SaveRequest(step=3), payload())

    assert [record.step for record in runs] == [3]
    assert os.path.exists(f"{runs.path}/.keras_ckpt/lock")


@pytest.mark.parametrize("content", [b"", b"garbage", b'{"pid": 0}', b'{"pid": -1, "host": "x"}', b"[" * 9999])
def test_the_content_of_a_lock_file_blocks_no_writer(filler, content) -> None:
    """The content is only shown: the lock is the kernel's."""
    runs = filler.save("1")
    pathlib.Path(runs.path, ".keras_ckpt", "lock").write_bytes(content)

    assert [record.step for record in filler.save("2")] == [1, 2]


@pytest.mark.parametrize("kind", ["a directory", "a link", "a FIFO"])
def test_a_lock_that_is_no_file_is_neither_followed_nor_removed(filler, tmp_path, kind) -> None:
    """A directory, a link and a FIFO stand at the place of the lock file."""
    (tmp_path / "victim").write_text("mine")
    lock = tmp_path / "run" / ".keras_ckpt" / "lock"
    lock.parent.mkdir(parents=True)
    {"a directory": os.mkdir, "a link": lambda path: path.symlink_to("../../victim"), "a FIFO": os.mkfifo}[kind](lock)

    with contextlib.suppress(kc.SaveError):
        filler.save("1")

    assert (tmp_path / "victim").read_text() == "mine"
    assert os.path.lexists(lock)


@pytest.mark.parametrize("name", ["../x", "{0.__class__}", "ü 数", "__proto__", "a\nb", "\x1b[2J", "x" * 100_000])
def test_a_metric_may_have_any_name(filler, name) -> None:
    """The name is never part of a file name, and its escape codes are not printed."""
    runs = filler.save("1")
    runs.add_metrics(1, {name: 0.5})

    assert runs[1].metrics[name] == 0.5
    assert {entry.partition(".")[0] for entry in os.listdir(runs.path)} == {"", "checkpoint", "ckpt-1", "journal"}
    assert "\x1b" not in str(runs)


def test_files_that_are_swapped_after_the_check_are_not_read(run, monkeypatch) -> None:
    """TensorFlow reads the very files that were checked."""
    expected, other = dense_model(), dense_model()
    kc.restore(expected, run / "ckpt-10")

    def swap_then_open(*arguments) -> BundleSource:
        swap(INDEX, DATA)(run)
        return BundleSource(*arguments)

    monkeypatch.setattr(transfer, "BundleSource", swap_then_open)

    kc.restore(other, run / "ckpt-10")

    assert all(np.array_equal(a, b) for a, b in zip(values(expected), values(other), strict=True))


LOOK = """
import sys
import keras_ckpt as kc
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.policies import BestN, LatestN

def look(path):
    runs = CheckpointDirectory(path)
    str(runs), runs._repr_html_(), len(runs), runs.latest(), runs.verify()
    try:
        str(runs.plan(LatestN(1) | BestN(1, "loss", "min")))
        runs.prune(LatestN(1) | BestN(1, "loss", "min"))
        runs.best("loss", "min")
    except kc.CheckpointError:
        pass

sound, *hostile = sys.argv[1:]
look(sound)  # loads the modules that are loaded on first use

refused = ("exec", "compile", "import", "marshal.", "pickle.", "subprocess.", "ctypes.", "socket.", "os.system")

def refuse(event, arguments):
    if event.startswith(refused):
        print(event, arguments, file=sys.stderr)
        leave(1)

from os import _exit as leave
sys.addaudithook(refuse)
for path in hostile:
    look(path)
print("looked at", len(hostile))
"""


def test_no_code_from_disk_runs(template, tmp_path) -> None:
    """Listing, verifying, choosing and pruning execute, import, compile and unpickle nothing."""
    harms = SKIPPED | HARMLESS
    for number, harm in enumerate(harms.values()):
        harm(shutil.copytree(template, tmp_path / str(number)))
    shutil.copytree(template, tmp_path / "sound")

    result = subprocess.run(
        [sys.executable, "-c", LOOK, tmp_path / "sound", *(tmp_path / str(number) for number in range(len(harms)))],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )

    assert result.stdout == f"looked at {len(harms)}\n", result.stderr


WORK = """
import os, sys
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.policies import LatestN
from keras_ckpt.store.writer import SaveRequest, Writer, by_prefix

assert False, "assertions are to be off"
os.umask(0o777)
os.mkdir("gone", 0o700), os.chdir("gone"), os.rmdir("../gone")

def write(prefix):
    with open(f"{prefix}.index", "wb") as file:
        file.write(b"index")

runs = CheckpointDirectory(sys.argv[1])
writer = Writer(runs, LatestN(1))
for step in (1, 2):
    writer.save(SaveRequest(step=step, metadata={"name": "ü"}), by_prefix(write))
runs.pin(2, "ü")
assert runs.verify().ok
print(str(runs).encode("ascii", "replace").decode(), [record.step for record in runs])
"""


def test_the_environment_of_the_process_does_not_matter(tmp_path) -> None:
    """The process has no locale, no home, no working directory, no default permissions and no assertions."""
    result = subprocess.run(
        [sys.executable, "-O", "-c", WORK, tmp_path / "run"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"LANG": "C", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "0"},
    )

    assert result.stdout.endswith("[2]\n"), result.stderr


def test_a_sidecar_without_read_permission_is_damaged(filler) -> None:
    """The other checkpoints are listed. The error names the permission."""
    runs = filler.save("1 2 3")
    os.chmod(f"{runs.path}/ckpt-2.json", 0)
    with Folder(runs.path) as folder, unprivileged_user():
        listing = examine(folder)

    assert [record.step for record in listing.records] == [1, 3]
    assert "Permission denied" in str(listing.damaged["ckpt-2"])


NAMES = [
    *(
        "[1]",
        "*",
        "?",
        "\\",
        "{a,b}",
        "%d",
        "$(x)",
        "~",
        "-rf",
        " ",
        "\t",
        "new\nline",
        "\u2028",
        "e\u0301",
        "\u200fx",
        "😀",
    ),
    *("x" * 255, "é" * 127, os.fsdecode(b"\xff\xfe"), "{epoch}", "a.keras.d", "..."),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_directory_may_have_any_name(tmp_path, name) -> None:
    """And be reached by a link: saving, pinning, pruning and verifying, beside one that a pattern would match."""
    sibling = Filler(tmp_path / "1").save("1")
    (tmp_path / "link").symlink_to(name, target_is_directory=True)
    (tmp_path / name).mkdir()
    runs = Filler(tmp_path / "link").save("1 2 3", LatestN(2))
    runs.pin(2)
    runs.prune(LatestN(1))

    found = kc.CheckpointDirectory(tmp_path / name)
    assert [record.step for record in found] == [2, 3]
    assert found.verify().ok
    assert b"2 checkpoints" in str(found).encode()
    assert [record.step for record in sibling] == [1]
