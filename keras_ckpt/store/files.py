"""The file system: the only module that opens, renames, syncs or unlinks.

Everything goes through the descriptor of an open directory. A name is never looked up by path twice, a
link is never followed, and no name is ever a pattern, so a directory may be called `run[1]` or `lr*`.
What the package keeps for itself (locks, stages, trash) lies in a sub-folder, `.keras_ckpt`.
"""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Self

from blake3 import blake3

from keras_ckpt.store.locks import WriterLock, claim
from keras_ckpt.store.reading import Stamp
from keras_ckpt.store.streams import NewFile, OpenFile, read_into

PRIVATE = ".keras_ckpt"
_CHUNK, _LOOK = 1 << 20, 1 << 12
# Without O_NONBLOCK the open of a FIFO that somebody put here would hang.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


class UnfinishedError(OSError):
    """What was begun cannot be taken back, only finished: by the one who recovers the directory."""


class Folder:
    """An open directory; close it, or use it in a `with` statement.

    Args:
        path: The directory.
        create: Whether to make it, and its parents, where they are missing.

    Raises:
        FileNotFoundError: There is no such directory, and `create` is `False`.
        NotADirectoryError: The path is a file.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False) -> None:
        self.path = os.fspath(path)
        if create:
            _make_directories(self.path)
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError as error:
            raise NotADirectoryError(
                errno.ENOTDIR, "A checkpoint directory was expected, this is a file", self.path
            ) from error

    def folder(self, name: str, *, create: bool = False) -> Folder:
        """Opens a sub-folder, which a link may not stand for; one that is made is durably named."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        inner = Folder.__new__(Folder)
        inner.path = os.path.join(self.path, name)
        try:
            inner.descriptor = os.open(name, flags, dir_fd=self.descriptor)
        except FileNotFoundError:
            if not create:
                raise
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=self.descriptor)
                self.sync()
            inner.descriptor = os.open(name, flags, dir_fd=self.descriptor)
        return inner

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """The names in the directory, in no order."""
        return os.listdir(self.descriptor)

    def moving(self) -> set[str]:
        """The names of files that a writer publishes or removes at the moment: those in its stage and its trash."""
        found: set[str] = set()
        with contextlib.suppress(OSError), self.folder(PRIVATE) as private:
            for name in private.names():
                if name == "trash" or name.startswith("stage-"):
                    with contextlib.suppress(OSError), private.folder(name) as inner:
                        found.update(inner.names())
        return found

    def changed(self) -> int:
        """When a file in the directory was created, replaced or removed last, in nanoseconds."""
        return os.fstat(self.descriptor).st_mtime_ns

    def inodes(self) -> dict[str, int]:
        """The numbers of the files in the directory, by name. A file that is replaced has another number."""
        with os.scandir(self.descriptor) as entries:
            return {entry.name: entry.inode() for entry in entries}

    def exists(self, name: str) -> bool:
        try:
            os.lstat(name, dir_fd=self.descriptor)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return False
            raise
        return True

    def read(self, name: str, limit: int) -> bytes:
        """Reads a whole file; one of more than `limit` bytes is an error before it is read."""
        descriptor, size = self._open_regular(name)
        try:
            if size > limit:
                raise OSError(errno.EFBIG, f"{size} bytes, at most {limit} are read", name)
            data = os.pread(descriptor, size + 1, 0)
            if len(data) != size:
                raise OSError(errno.EBUSY, "it changed while it was read", name)
            return data
        finally:
            os.close(descriptor)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Reads some bytes of a file, fewer where it ends before."""
        descriptor, _ = self._open_regular(name)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def holds(self, name: str, offset: int, data: memoryview) -> bool:
        """Whether a file has these bytes there."""
        descriptor, _ = self._open_regular(name)
        try:
            # What differs often does so at once.
            cuts = [0, *range(min(_LOOK, len(data)), len(data), _CHUNK), len(data)]
            pieces = ((start, data[start:end]) for start, end in itertools.pairwise(cuts))
            return all(os.pread(descriptor, len(piece), offset + start) == bytes(piece) for start, piece in pieces)
        finally:
            os.close(descriptor)

    def size(self, name: str) -> int:
        """The size of a file in bytes."""
        return os.lstat(name, dir_fd=self.descriptor).st_size

    def shares_disk(self, other: Folder) -> bool:
        """Whether files of both may be links to each other."""
        return os.fstat(self.descriptor).st_dev == os.fstat(other.descriptor).st_dev

    def stamp(self, name: str) -> Stamp:
        """What tells later whether a file is as it is now."""
        return _stamp(os.lstat(name, dir_fd=self.descriptor))

    def links(self, name: str) -> tuple[int, int]:
        """The number of a file, which is one for all of its names, and how many names there are."""
        status = os.lstat(name, dir_fd=self.descriptor)
        return status.st_ino, status.st_nlink

    def free(self) -> int:
        """The bytes that may yet be written here; a quota is not known."""
        status = os.fstatvfs(self.descriptor)
        return status.f_bavail * status.f_frsize

    def digest(self, name: str, advance: Callable[[int], object] | None = None) -> tuple[int, str]:
        """The size of a file in bytes, and `"blake3:"` with its digest in hexadecimal.

        Args:
            name: The file.
            advance: Called with the number of bytes after each piece that was read.
        """
        descriptor, _ = self._open_regular(name)
        try:
            hasher, size, buffer = blake3(), 0, memoryview(bytearray(_CHUNK))
            while count := read_into(descriptor, [buffer], size, name):
                hasher.update(buffer[:count])
                size += count
                if advance is not None:
                    advance(count)
            return size, f"blake3:{hasher.hexdigest()}"
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def reading(self, name: str) -> Iterator[OpenFile]:
        """A file to read."""
        descriptor, size = self._open_regular(name)
        try:
            yield OpenFile(descriptor, size, name)
        finally:
            os.close(descriptor)

    def scatter(
        self, name: str, parts: Sequence[tuple[int, memoryview]], threads: concurrent.futures.Executor
    ) -> tuple[int, str]:
        """Reads all of a file, and parts of it into the memory that is given for them.

        Args:
            name: The file.
            parts: Where parts begin, each with its memory; one after another.
            threads: What reads.

        Returns:
            What `digest` does.
        """
        with self.reading(name) as file:
            # Of short pieces a digest is faster by one thread.
            several = file.size > len(parts) * _CHUNK
            hasher = blake3(max_threads=blake3.AUTO if several else 1)
            for memory in file.in_portions(parts, threads):
                for piece in memory:
                    hasher.update(piece)
            return file.size, f"blake3:{hasher.hexdigest()}"

    def create(self, name: str, data: bytes) -> None:
        """Writes a new file and makes its bytes durable; a file of that name is an error."""
        with self.writing(name) as file:
            file.write(memoryview(data))

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[NewFile]:
        """A new file to write; at the end of the `with` statement its bytes are durable.

        A file of that name is an error.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o666, dir_fd=self.descriptor)
        try:
            file = NewFile(descriptor)
            with contextlib.closing(file):
                yield file
                file.finish()
            os.fsync(descriptor)
            if (size := os.fstat(descriptor).st_size) != file.size:
                raise OSError(errno.EIO, f"{file.size} bytes were written, it has {size}", name)
        finally:
            os.close(descriptor)

    def replace(self, name: str, data: bytes) -> None:
        """Writes a file anew by one rename: readers see the old bytes or the new, whole and durable."""
        new = f"swap-{uuid.uuid4().hex}"
        with self.folder(PRIVATE, create=True) as private:
            try:
                private.create(new, data)
                private.move(new, self, name)
            except Exception:
                with contextlib.suppress(OSError):
                    private.remove(new)
                raise
        self.sync()

    def rename(self, name: str, new: str) -> None:
        """Gives a file another name."""
        os.rename(name, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def link(self, name: str, target: Folder, new: str) -> None:
        """Gives a file a name in another directory too.

        Raises:
            OSError: The file system has no links, or not that many, or the directory is on another.
        """
        os.link(name, new, src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor, follow_symlinks=False)

    def move(self, name: str, target: Folder, new: str | None = None) -> None:
        """Renames a file into another directory, over one of that name."""
        os.rename(name, new or name, src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor)

    def remove(self, name: str) -> None:
        """Unlinks a file; one that is gone already is as good."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def remove_folder(self, name: str) -> None:
        """Removes a sub-folder of the package's own with all that is in it, or a file."""
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except (IsADirectoryError, PermissionError):
            shutil.rmtree(name, dir_fd=self.descriptor)

    def sync_file(self, name: str) -> None:
        """Makes the bytes of a file durable."""
        descriptor, _ = self._open_regular(name)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Makes the names in the directory durable."""
        os.fsync(self.descriptor)

    def tensorflow_path(self, name: str) -> str:
        """A path for TensorFlow, valid while this folder is open.

        TensorFlow takes a path that it reads from for a pattern and fails in a directory named `run[1]`; the
        descriptor's path has no such characters.
        """
        if os.path.isdir("/proc/self/fd"):
            return f"/proc/self/fd/{self.descriptor}/{name}"
        return os.path.join(self.path, name)

    @contextlib.contextmanager
    def held(self, names: Iterable[str]) -> Iterator[Folder]:
        """Holds files open: a folder of the files as they are now, even if others remove or replace them."""
        with contextlib.ExitStack() as stack:
            descriptors = {}
            for name in names:
                descriptors[name], _ = self._open_regular(name)
                stack.callback(os.close, descriptors[name])
            yield _Held(self.path, descriptors)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Folder]:
        """A private folder for the files of one save; it is durable when it is made.

        An error removes it. An interrupt, such as Ctrl-C, is like a crash: the folder stays for recovery. So it does
        if the commit cannot be taken back.
        """
        with self.folder(PRIVATE, create=True) as private, private.folder(name, create=True) as folder:
            try:
                yield folder
            except UnfinishedError:
                raise
            except Exception:
                private.remove_folder(name)
                raise

    def empty(self) -> None:
        """Unlinks all files of the directory."""
        for name in self.names():
            self.remove(name)

    def remove_stage(self, lock: WriterLock) -> None:
        """Removes the folder for what is saved, if there is one."""
        name, lock.stage = lock.stage, ""
        if name:
            with self.folder(PRIVATE) as private:
                private.remove_folder(name)

    @contextlib.contextmanager
    def mutex(self) -> Iterator[None]:
        """Waits until no other process or thread changes the set of checkpoints, and keeps it so."""
        descriptor = self._open_lock("mutex")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            # A child that was forked meanwhile has the lock too, until it is said that nobody has.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def lock(self) -> WriterLock:
        """Makes this process the directory's one writing process, for as long as the lock is referenced.

        Within the process everyone gets the same lock, so that a notebook's cell can be run again after it was
        interrupted.

        Raises:
            DirectoryInUseError: Another process writes here; it is named.
        """
        return claim(self._open_lock("lock"), self.path)

    def _open_lock(self, name: str) -> int:
        """The descriptor of a private file that is there to be locked."""
        # Never unlinked: a lock on a file that somebody else unlinks guards nothing.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self.folder(PRIVATE, create=True) as private:
            try:
                return os.open(name, flags, 0o666, dir_fd=private.descriptor)
            except OSError as error:
                error.filename = os.path.join(self.path, PRIVATE, name)
                raise

    def _open_regular(self, name: str) -> tuple[int, int]:
        """The descriptor of a regular file, and its size."""
        descriptor = os.open(name, _READ, dir_fd=self.descriptor)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", name)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor, status.st_size


class _Held(Folder):
    """Open files, to be read, looked at and linked."""

    def __init__(self, path: str, descriptors: Mapping[str, int]) -> None:
        self.path = path
        self._descriptors = descriptors

    def size(self, name: str) -> int:
        return self.stamp(name).size

    def stamp(self, name: str) -> Stamp:
        return _stamp(os.fstat(self._opened(name)))

    def link(self, name: str, target: Folder, new: str) -> None:
        # Through the descriptor: the name may be another file's by now. Where there is no /proc, it fails.
        os.link(f"/proc/self/fd/{self._opened(name)}", new, dst_dir_fd=target.descriptor, follow_symlinks=True)

    def _open_regular(self, name: str) -> tuple[int, int]:
        # A copy has the offset of the original, which no read here uses.
        return os.dup(self._opened(name)), self.size(name)

    def _opened(self, name: str) -> int:
        if name not in self._descriptors:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self._descriptors[name]


def _make_directories(path: str) -> None:
    """Makes a directory and its missing parents, each durably named in the one above it."""
    if not path or os.path.lexists(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    _make_directories(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    with Folder(parent) as folder:
        folder.sync()


def files_below(path: str, limit: int) -> dict[str, bytes]:
    """The files in a directory and below it, by their paths from there.

    Raises:
        ValueError: A file has more than `limit` bytes.
    """
    found = {}
    for parent, _, names in os.walk(path):
        for name in names:
            with open(os.path.join(parent, name), "rb") as file:
                data = file.read(limit + 1)
            if len(data) > limit:
                raise ValueError(f"{name} has more than {limit} bytes")
            found[os.path.relpath(os.path.join(parent, name), path)] = data
    return dict(sorted(found.items()))


def write_below(path: str, files: Mapping[str, bytes]) -> None:
    """Writes files into a directory and below it, by their paths from there.

    Raises:
        ValueError: A path leads out of the directory.
    """
    for name, data in files.items():
        place = os.path.normpath(os.path.join(path, name))
        if not place.startswith(os.path.join(path, "")) or "\0" in name or "\\" in name:
            raise ValueError(f"the path {name!r:.200} leads out of its directory")
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "xb") as file:
            file.write(data)


@contextlib.contextmanager
def temporary_directory() -> Iterator[str]:
    """A directory for temporary files, for as long as it is used."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="keras_ckpt-") as path:
        yield path


def lasting_tensorflow_path(directory: str, name: str) -> str:
    """A path for TensorFlow's `restore`, which reads variables that are made later when they are made.

    It is the plain path, unless TensorFlow would take it for a pattern.
    """
    plain = os.path.join(directory, name)
    if not set(plain) & set("*?[\\"):
        return plain
    folder = Folder(directory)
    status = os.fstat(folder.descriptor)
    lasting = _lasting.setdefault((status.st_dev, status.st_ino), folder)
    if lasting is not folder:
        folder.close()
    return lasting.tensorflow_path(name)


_lasting: dict[tuple[int, int], Folder] = {}


def cut(path: str, size: int) -> None:
    """Takes away what was written into a log since it had a size."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.getsize(path) > size:
            os.truncate(path, size)


def remove_unused(path: str) -> None:
    """Removes a directory that holds nothing but the package's private folder, and that with it."""
    # One that stays, because it is a link or its parent cannot be written, does no harm.
    with contextlib.suppress(OSError):
        with Folder(path) as folder:
            if folder.names() != [PRIVATE]:
                return
            lock = folder.lock()
            folder.remove_folder(PRIVATE)
            del lock
        os.rmdir(path)
