"""Files: locks, replacement and unusual names. Tests of two processes use a real second process."""

import concurrent.futures
import errno
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest

from keras_ckpt.errors import DirectoryInUseError
from keras_ckpt.store import files
from keras_ckpt.store.files import PRIVATE, Folder, lasting_tensorflow_path, remove_unused
from reliability.crash_states import Recorder
from support.runs import HOLD


def test_a_second_process_is_refused_with_the_holders_name(tmp_path, holder) -> None:
    """The error names the holder's process, host and command."""
    with pytest.raises(DirectoryInUseError, match=f"process {holder.pid} on .* since"), Folder(tmp_path) as folder:
        folder.lock()


def test_a_holder_that_writes_its_name_late_is_named_too(tmp_path, holder) -> None:
    """The holder writes its name after it has the lock; another process may look before."""
    lock = tmp_path / PRIVATE / "lock"
    name = lock.read_bytes()
    lock.write_bytes(b"")
    leaves = threading.Timer(0.05, lock.write_bytes, [name])
    leaves.start()

    with pytest.raises(DirectoryInUseError, match=f"process {holder.pid} on .* since"), Folder(tmp_path) as folder:
        folder.lock()

    leaves.join()


def test_the_lock_of_a_dead_process_is_free(tmp_path, holder) -> None:
    """A kill needs no cleanup."""
    holder.kill()
    holder.wait()

    with Folder(tmp_path) as folder:
        assert folder.lock()


def test_a_process_shares_its_lock_until_the_last_reference_is_dropped(tmp_path) -> None:
    """A notebook cell that runs again gets the lock of the interrupted cell."""
    with Folder(tmp_path) as folder:
        lock = folder.lock()
        assert folder.lock() is lock
        del lock

        result = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path)], input="", capture_output=True, text=True, check=True
        )

    assert result.stdout == "held\n"


def _idle(ready, done) -> None:
    ready.set()
    done.wait()


def test_a_forked_child_does_not_keep_the_lock_alive(tmp_path) -> None:
    """A data worker that outlives its trainer does not block the next trainer."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    with Folder(tmp_path) as folder:
        lock = folder.lock()
        child = context.Process(target=_idle, args=(ready, done))
        child.start()
        ready.wait()
        del lock

        result = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], input="", capture_output=True, check=False)
        done.set()
        child.join()

    assert result.returncode == 0


def test_garbage_in_the_lock_file_does_not_block_the_lock(tmp_path) -> None:
    """The content of the lock file is only the holder's name."""
    private = tmp_path / PRIVATE
    private.mkdir()
    (private / "lock").write_bytes(b"\0garbage{" * 1000)

    with Folder(tmp_path) as folder:
        assert folder.lock()


def test_replacing_leaves_the_old_bytes_or_the_new(tmp_path) -> None:
    """One rename replaces the file, and leaves no temporary file."""
    with Folder(tmp_path) as folder:
        folder.replace("name", b"old")
        folder.replace("name", b"new")

        assert folder.read("name", 10) == b"new"
        assert sorted(folder.names()) == [PRIVATE, "name"]
        assert os.listdir(tmp_path / PRIVATE) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_adopting_makes_all_bytes_and_names_durable_before_the_rename(tmp_path, monkeypatch, kind) -> None:
    """Another library writes a file, or a folder with folders. The rename is made durable last."""
    events: list[int | str] = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda each: (events.append(os.fstat(each).st_ino), sync(each)))
    monkeypatch.setattr(os, "rename", lambda *names, **places: (events.append("rename"), rename(*names, **places)))

    with Folder(tmp_path) as folder, folder.adopting("name") as path:
        written = [pathlib.Path(path)]
        if kind == "folder":
            written += [written[0] / "inner", written[0] / "inner" / "values"]
            written[1].mkdir(parents=True)
        written[-1].write_bytes(b"bytes")
        inodes = {each.stat().st_ino for each in written}

    assert set(events[: events.index("rename")]) == inodes
    assert events[-2:] == ["rename", tmp_path.stat().st_ino]
    assert os.listdir(tmp_path) == ["name"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_while_adopting_leaves_the_old_file(tmp_path, kind) -> None:
    (tmp_path / "name").write_bytes(b"old")

    def write(path: pathlib.Path) -> None:
        if kind == "folder":
            path.mkdir()
            path = path / "values"
        path.write_bytes(b"half")
        raise OSError("full")

    with Folder(tmp_path) as folder, pytest.raises(OSError, match="full"), folder.adopting("name") as path:
        write(pathlib.Path(path))

    assert os.listdir(tmp_path) == ["name"]
    assert (tmp_path / "name").read_bytes() == b"old"


def test_reading_is_bounded(tmp_path) -> None:
    """A huge file is refused before it is read."""
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 1 << 40)

    with Folder(tmp_path) as folder, pytest.raises(OSError, match="at most 100 are allowed"):
        folder.read("huge", 100)


def test_reading_a_range_stops_at_the_end_of_the_file(tmp_path) -> None:
    """The size of the file does not matter."""
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, 1 << 40)

    with Folder(tmp_path) as folder:
        assert folder.read_range("huge", (1 << 40) - 3, 10) == bytes(3)


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_only_regular_files_are_read(tmp_path, kind) -> None:
    """A FIFO would hang, a link would lead out of the directory."""
    (tmp_path / "file").write_bytes(b"data")
    make = {"fifo": os.mkfifo, "folder": os.mkdir, "link": lambda path: path.symlink_to(tmp_path / "file")}[kind]
    make(tmp_path / "name")

    with Folder(tmp_path) as folder, pytest.raises(OSError):  # noqa: PT011 - the number depends on the kind
        folder.read("name", 100)


def test_a_directory_that_is_a_file_is_refused(tmp_path) -> None:
    """The error names the file."""
    (tmp_path / "file").touch()

    with pytest.raises(NotADirectoryError, match=r"this is a file: .*file"):
        Folder(tmp_path / "file")


def test_missing_parents_are_made(tmp_path, monkeypatch) -> None:
    """Each parent of a/b/c has a durable name before the next is created."""
    recorder = Recorder(tmp_path)
    monkeypatch.setattr(files, "os", recorder)

    with Folder(tmp_path / "a" / "b" / "c", create=True):
        assert (tmp_path / "a" / "b" / "c").is_dir()

    assert [(kind, path) for kind, path, *_ in recorder.log] == [
        *(("mkdir", "a"), ("sync", ".")),
        *(("mkdir", "a/b"), ("sync", "a")),
        *(("mkdir", "a/b/c"), ("sync", "a/b")),
    ]


def test_an_unused_directory_is_removed_and_a_used_one_is_not(tmp_path) -> None:
    """A directory is unused if it has only the package's private folder."""
    for name in ("used", "unused"):
        with Folder(tmp_path / name, create=True) as folder, folder.mutex():
            pass
    (tmp_path / "used" / "mine").touch()

    remove_unused(tmp_path / "used")
    remove_unused(tmp_path / "unused")
    remove_unused(tmp_path / "never there")

    assert [path.name for path in tmp_path.iterdir()] == ["used"]


@pytest.mark.parametrize("name", ["plain", "a b", "ü", "run[1]", "lr*", "what?", "back\\slash"])
def test_a_path_for_tensorflow_leads_to_the_directory(tmp_path, name) -> None:
    """Plain where that is safe, through the descriptor where TensorFlow would see a pattern."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").write_text("here")

    path = lasting_tensorflow_path(str(tmp_path / name), "file")

    assert pathlib.Path(path).read_text() == "here"
    assert not set(path) & set("*?[\\")


def test_held_files_keep_their_bytes(tmp_path) -> None:
    """They can be read after others removed or replaced them, and no file stays open."""
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    before = os.listdir("/proc/self/fd")

    with Folder(tmp_path) as folder, folder.held(["a", "b"]) as held:
        folder.remove("a")
        (tmp_path / "new").write_bytes(b"3")
        (tmp_path / "new").rename(tmp_path / "b")
        assert [held.read(name, 1) for name in "abab"] == [b"1", b"2", b"1", b"2"]
        with pytest.raises(FileNotFoundError):
            held.read("new", 1)

    assert set(os.listdir("/proc/self/fd")) <= set(before)


def test_an_unused_directory_that_is_a_link_stays(tmp_path) -> None:
    """The end of a training raises no error if the directory cannot be removed."""
    (tmp_path / "run" / PRIVATE).mkdir(parents=True)
    (tmp_path / "link").symlink_to("run", target_is_directory=True)

    remove_unused(str(tmp_path / "link"))

    assert (tmp_path / "run").is_dir()


def test_threads_share_the_lock(tmp_path) -> None:
    """No thread is refused because of another."""
    with Folder(tmp_path) as folder, concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            locks = list(pool.map(lambda _: folder.lock(), range(8)))
            assert len(set(map(id, locks))) == 1
            del locks


def test_a_lasting_path_leads_to_a_directory_that_was_created_again(tmp_path) -> None:
    """A notebook may remove a run and train it again."""
    for text in ("first", "second"):
        (tmp_path / "run[1]").mkdir()
        (tmp_path / "run[1]" / "file").write_text(text)
        assert pathlib.Path(lasting_tensorflow_path(str(tmp_path / "run[1]"), "file")).read_text() == text
        shutil.rmtree(tmp_path / "run[1]")


def test_replace_succeeds_if_temporary_files_cannot_be_removed(tmp_path, monkeypatch) -> None:
    """The next start removes them."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "injected")

    with Folder(tmp_path) as folder:
        monkeypatch.setattr(shutil, "rmtree", refuse)
        folder.replace("file", b"new")

    assert (tmp_path / "file").read_bytes() == b"new"
