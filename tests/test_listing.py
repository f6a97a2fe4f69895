"""Listings: a writer reads a directory once, then only its changes, and misses no change."""

import errno
import os
import pathlib
import zipfile

import pytest
from blake3 import blake3

import keras_ckpt as kc
from keras_ckpt.store.files import Folder
from keras_ckpt.store.layout import TENSORFLOW
from keras_ckpt.store.listing import Known, examine, scan, verify
from keras_ckpt.store.policies import BestN, LatestN
from keras_ckpt.store.reading import Stamp
from keras_ckpt.store.writer import SaveRequest, Writer
from support.runs import Filler, payload


def looked_at(runs: kc.CheckpointDirectory, known: Known):
    """The listing of a look that uses the cache of earlier looks."""
    with Folder(runs.path) as folder:
        return examine(folder, known)


def saves(runs: kc.CheckpointDirectory, known: Known) -> None:
    Filler(pathlib.Path(runs.path)).save("3:0.5")


def saves_again(runs: kc.CheckpointDirectory, known: Known) -> None:
    Writer(runs).save(SaveRequest(step=200, run_id="run", metrics={"loss": 9.0}), payload(b"again"))


def pins(runs: kc.CheckpointDirectory, known: Known) -> None:
    runs.pin(100, "mine")


def pins_by_hand(runs: kc.CheckpointDirectory, known: Known) -> None:
    pathlib.Path(runs.path, "ckpt-100.keep").touch()


def unpins(runs: kc.CheckpointDirectory, known: Known) -> None:
    runs.pin(100)
    looked_at(runs, known)
    runs.unpin(100)


def measures(runs: kc.CheckpointDirectory, known: Known) -> None:
    runs.add_metrics(100, accuracy=0.5)


def prunes(runs: kc.CheckpointDirectory, known: Known) -> None:
    runs.prune(LatestN(5))


def removes_by_hand(runs: kc.CheckpointDirectory, known: Known) -> None:
    pathlib.Path(runs.path, "ckpt-100.index").unlink()


def removes_a_sidecar(runs: kc.CheckpointDirectory, known: Known) -> None:
    pathlib.Path(runs.path, "ckpt-100.json").unlink()


def copies_over(runs: kc.CheckpointDirectory, known: Known) -> None:
    path = pathlib.Path(runs.path, "ckpt-100.index")
    other = path.with_name("other")
    other.write_bytes(b"another")
    other.rename(path)


def brings_others(runs: kc.CheckpointDirectory, known: Known) -> None:
    pathlib.Path(runs.path, "ckpt-9999.index").write_bytes(b"of TensorFlow")


CHANGES = [
    saves, saves_again, pins, pins_by_hand, unpins, measures, prunes, removes_by_hand, removes_a_sidecar, copies_over,
    brings_others,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_cached_look_finds_the_same_as_a_first_look(filler, change) -> None:
    """After every kind of change between the looks."""
    runs = filler.save(" ".join(f"{step}:0.5" for step in range(10, 600, 10)))
    known = Known()
    looked_at(runs, known)

    change(runs, known)

    found, first = looked_at(runs, known), runs.listing()
    assert (found.records, found.unmanaged, found.sequence) == (first.records, first.unmanaged, first.sequence)
    assert {name: str(error) for name, error in found.damaged.items()} == {
        name: str(error) for name, error in first.damaged.items()
    }
    assert [record.pin for record in found.records] == [record.pin for record in first.records]
    assert [record.metrics for record in found.records] == [record.metrics for record in first.records]


def test_cached_looks_find_a_file_truncated_in_place(filler) -> None:
    """The directory does not show this change, so each look reads some checkpoints again."""
    runs = filler.save(" ".join(map(str, range(100))))
    known = Known()
    looked_at(runs, known)
    with open(os.path.join(runs.path, "ckpt-77.index"), "r+b") as file:
        file.truncate(1)

    looks = 0
    while not looked_at(runs, known).damaged:
        pathlib.Path(runs.path, f"notes-{looks}").touch()  # as each save changes the directory
        looks += 1

    assert looks <= 10


def test_a_damaged_checkpoint_keeps_its_place_in_the_order_of_saving(filler) -> None:
    """The next checkpoint is newer than the damaged one."""
    runs = filler.save("1 2 3")
    pathlib.Path(runs.path, "ckpt-3.index").write_bytes(b"")

    assert Writer(runs).save(SaveRequest(step=4, run_id="run"), payload()).sequence == 4


def test_a_save_reads_no_more_files_with_six_hundred_kept_than_with_thirty(tmp_path, monkeypatch) -> None:
    """A save looks twice at the directory, and reads no unchanged checkpoint again."""
    reads = []
    read, size = Folder.read, Folder.size
    monkeypatch.setattr(Folder, "read", lambda self, *arguments: reads.append(1) or read(self, *arguments))
    monkeypatch.setattr(Folder, "size", lambda self, *arguments: reads.append(1) or size(self, *arguments))
    counts = []
    for kept in (30, 600):
        writer = Writer(kc.CheckpointDirectory(tmp_path / str(kept)), LatestN(kept) | BestN(1, "loss", "min"))
        for step in range(kept + 5):
            writer.save(SaveRequest(step=step, run_id="run", metrics={"loss": float(step)}), payload())
        reads.clear()
        writer.save(SaveRequest(step=1000, run_id="run", metrics={"loss": 1.0}), payload())
        counts.append(len(reads))

    assert counts[1] < counts[0] + 16


class Archive:
    """A directory of checkpoints in a zip file, with the protocol of `store/reading.py`."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = str(path)
        self.series = TENSORFLOW
        self.files = zipfile.ZipFile(path)

    def names(self) -> list[str]:
        return self.files.namelist()

    def moving(self) -> set[str]:
        return set()

    def exists(self, name: str) -> bool:
        return name in self.files.namelist()

    def read(self, name: str, limit: int) -> bytes:
        if self.size(name) > limit:
            raise OSError(errno.EFBIG, "too large", name)
        return self.files.read(name)

    def size(self, name: str) -> int:
        if not self.exists(name):
            raise FileNotFoundError(errno.ENOENT, "not in the archive", name)
        return self.files.getinfo(name).file_size

    def stamp(self, name: str) -> Stamp:
        return Stamp(self.files.getinfo(name).CRC, self.size(name), 0)

    def read_end(self, name: str, size: int) -> tuple[int, bytes]:
        return self.size(name), self.files.read(name)[-size:]

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        return self.files.read(name)[offset : offset + size]

    def digest(self, name: str, advance=None, end=None) -> tuple[int, str]:
        data = self.files.read(name)[:end]
        if advance is not None:
            advance(len(data))
        return len(data), f"blake3:{blake3(data).hexdigest()}"


def archived(path: str, target: pathlib.Path) -> Archive:
    """Makes a zip file of a directory's files."""
    with zipfile.ZipFile(target, "w") as archive:
        for file in pathlib.Path(path).iterdir():
            if file.is_file():
                archive.write(file, file.name)
    return Archive(target)


def test_scan_lists_any_implementation_of_the_reading_protocol(filler, tmp_path) -> None:
    """A zip file of a directory has the same listing as the directory, with pins and metrics."""
    runs = filler.save("10:0.5 20:0.4")
    runs.pin(10, "mine")

    listing = scan(archived(runs.path, tmp_path / "run.zip"))

    assert [(record.step, record.metrics, record.pin) for record in listing.records] == [
        (10, {"loss": 0.5}, "mine"),
        (20, {"loss": 0.4}, None),
    ]


def test_verify_reads_any_implementation_of_the_reading_protocol(filler, tmp_path) -> None:
    """Verify finds a changed byte in a zip file."""
    runs = filler.save("10 20")
    data = pathlib.Path(runs.path) / "ckpt-10.data-00000-of-00001"
    data.write_bytes(b"99")

    listing = verify(archived(runs.path, tmp_path / "run.zip"), lambda done, total: None)

    assert [record.step for record in listing.records] == [20]
    assert "digest does not match" in str(listing.damaged["ckpt-10"])
