"""Access to the file system: the only module that opens, renames, syncs or unlinks.

All operations use the descriptor of an open directory. They look up no path twice, follow no link, and treat no name as
a pattern: a directory may be called `run[1]` or `lr*`. The sub-folder `.keras_ckpt` has the package's private files:
locks, stages and trash.
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

from keras_ckpt.store.layout import TENSORFLOW, Series, template_in
from keras_ckpt.store.locks import WriterLock, claim
from keras_ckpt.store.reading import Stamp
from keras_ckpt.store.streams import NewFile, OpenFile, read_into

PRIVATE = ".keras_ckpt"
_CHUNK, _LOOK = 1 << 20, 1 << 12
# Without O_NONBLOCK, opening a FIFO in the directory would hang.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


class UnfinishedError(OSError):
    """A failed commit that cannot be undone. Recovery of the directory finishes it."""


class Folder:
    """An open directory; close it, or use it in a `with` statement.

    Args:
        path: The directory.
        series: The series of checkpoints, whose private folder is used.
        create: Whether to create the directory and its parents where missing.

    Raises:
        FileNotFoundError: There is no such directory, and `create` is `False`.
        NotADirectoryError: The path is a file.
    """

    def __init__(self, path: str | os.PathLike[str], series: Series = TENSORFLOW, *, create: bool = False) -> None:
        self.path = os.fspath(path)
        self.series = series
        if create:
            _make_directories(self.path)
        try:
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError as error:
            raise NotADirectoryError(
                errno.ENOTDIR, "Expected a checkpoint directory, this is a file", self.path
            ) from error

    def folder(self, name: str, *, create: bool = False, series: Series = TENSORFLOW) -> Folder:
        """Opens a sub-folder, but no link to a folder. The name of a created sub-folder is durable.

        Args:
            name: The name of the sub-folder.
            create: Whether to create it where it is missing.
            series: The series of the files in it.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        inner = Folder.__new__(Folder)
        inner.path, inner.series = os.path.join(self.path, name), series
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

    @contextlib.contextmanager
    def private(self, *, create: bool = False) -> Iterator[Folder]:
        """Opens the private folder of the series."""
        with self.folder(PRIVATE, create=create) as private:
            if not self.series.private:
                yield private
                return
            with private.folder(self.series.private, create=create) as inner:
                yield inner

    def templates(self) -> set[str]:
        """The templates of files of Keras that writers saved here: each has a private folder."""
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError), self.folder(PRIVATE) as private:
            names = private.names()
        return set(map(template_in, names)) - {""}

    def close(self) -> None:
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def names(self) -> list[str]:
        """The names in the directory, in any order. In folders of a template they are paths below the directory."""
        return [name for name, _ in self._entries()] if self.series.depth else os.listdir(self.descriptor)

    def _entries(self) -> Iterator[tuple[str, int]]:
        """The names and inodes of the files in the directory, and in the folders of its template."""
        for prefix, names, descriptor in self._folders():
            for name in names:
                yield prefix + name, os.lstat(name, dir_fd=descriptor).st_ino

    def _folders(self) -> Iterator[tuple[str, list[str], int]]:
        """The directory and the folders of its template: the prefix of its files, their names, and its descriptor."""
        for parent, folders, names, descriptor in os.fwalk(".", dir_fd=self.descriptor, follow_symlinks=False):
            prefix = os.path.relpath(parent, ".") + "/" if parent != "." else ""
            yield prefix, names, descriptor
            folders[:] = [name for name in folders if name != PRIVATE] if prefix.count("/") < self.series.depth else []

    def moving(self) -> set[str]:
        """The names of files that a writer publishes or removes now: the files in its stage and its trash."""
        found: set[str] = set()
        with contextlib.suppress(OSError), self.private() as private:
            for name in private.names():
                if name == "trash" or name.startswith("stage-"):
                    with contextlib.suppress(OSError), private.folder(name) as inner:
                        found.update(inner.names())
        return found

    def changed(self) -> int:
        """The time of the last creation, replacement or removal in the directory, in nanoseconds.

        The folders of a template count too.
        """
        if self.series.depth:
            return max(os.fstat(descriptor).st_mtime_ns for _, _, descriptor in self._folders())
        return os.fstat(self.descriptor).st_mtime_ns

    def inodes(self) -> dict[str, int]:
        """The inodes of the files in the directory, by name. A replaced file has another inode."""
        if self.series.depth:
            return dict(self._entries())
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
        """Reads a whole file. A file of more than `limit` bytes is an error, and is not read."""
        with self.reading(name) as file:
            if file.size > limit:
                raise OSError(errno.EFBIG, f"{file.size} bytes, at most {limit} are allowed", name)
            data = os.pread(file.descriptor, file.size + 1, 0)
            if len(data) != file.size:
                raise OSError(errno.EBUSY, "it changed while it was read", name)
            return data

    def read_end(self, name: str, size: int) -> tuple[int, bytes]:
        """The size of a file, and the bytes at its end, at most `size` bytes."""
        with self.reading(name) as file:
            return file.size, os.pread(file.descriptor, size, max(0, file.size - size))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """Reads `size` bytes of a file from an offset, fewer at its end."""
        with self.reading(name) as file:
            return os.pread(file.descriptor, size, offset)

    def holds(self, name: str, offset: int, data: memoryview) -> bool:
        """Whether a file has these bytes at an offset."""
        with self.reading(name) as file:
            # Different data often differs in its first bytes.
            cuts = [0, *range(min(_LOOK, len(data)), len(data), _CHUNK), len(data)]
            pieces = ((start, data[start:end]) for start, end in itertools.pairwise(cuts))
            return all(os.pread(file.descriptor, len(piece), offset + start) == bytes(piece) for start, piece in pieces)

    def size(self, name: str) -> int:
        """The size of a file in bytes."""
        return os.lstat(name, dir_fd=self.descriptor).st_size

    def shares_disk(self, other: Folder) -> bool:
        """Whether hard links between both directories are possible."""
        return os.fstat(self.descriptor).st_dev == os.fstat(other.descriptor).st_dev

    def stamp(self, name: str) -> Stamp:
        """A stamp that differs once the file has changed."""
        return _stamp(os.lstat(name, dir_fd=self.descriptor))

    def links(self, name: str) -> tuple[int, int]:
        """The inode of a file, and the number of its names."""
        status = os.lstat(name, dir_fd=self.descriptor)
        return status.st_ino, status.st_nlink

    def free(self) -> int:
        """The free bytes of the file system, without regard to quotas."""
        status = os.fstatvfs(self.descriptor)
        return status.f_bavail * status.f_frsize

    def reading(self, name: str) -> OpenFile:
        """Opens a regular file for reading, in a `with` statement."""
        descriptor = self._open(name)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", name)
        except OSError:
            os.close(descriptor)
            raise
        return OpenFile(descriptor, status.st_size, name)

    def digest(
        self, name: str, advance: Callable[[int], object] | None = None, end: int | None = None
    ) -> tuple[int, str]:
        """The number of bytes that were read, and `"blake3:"` with their digest in hexadecimal.

        Args:
            name: The file.
            end: The number of bytes to read; defaults to the whole file.
            advance: Called with the number of bytes after each piece that was read.
        """
        with self.reading(name) as file:
            hasher, size, buffer = blake3(), 0, memoryview(bytearray(_CHUNK))
            while count := read_into(file.descriptor, [buffer[: None if end is None else end - size]], size, name):
                hasher.update(buffer[:count])
                size += count
                if advance is not None:
                    advance(count)
            return size, f"blake3:{hasher.hexdigest()}"

    def scatter(
        self,
        name: str,
        parts: Sequence[tuple[int, memoryview]],
        threads: concurrent.futures.Executor,
        end: int | None = None,
    ) -> tuple[int, str]:
        """Reads a whole file, with given parts of it into given memory.

        Args:
            name: The file.
            parts: The offset of each part, with its memory, in the order of the file.
            threads: The threads that read.
            end: The number of bytes to read; defaults to the whole file.

        Returns:
            The size and the digest, as `digest` returns them.
        """
        with self.reading(name) as file:
            # One thread digests short pieces faster.
            size = file.size if end is None else end
            several = size > len(parts) * _CHUNK
            hasher = blake3(max_threads=blake3.AUTO if several else 1)
            for memory in file.in_portions(size, parts, threads):
                for piece in memory:
                    hasher.update(piece)
            return size, f"blake3:{hasher.hexdigest()}"

    def create(self, name: str, data: bytes) -> None:
        """Writes a new file and makes its bytes durable. An existing file of that name is an error."""
        with self.writing(name) as file:
            file.write(memoryview(data))

    def append(self, name: str, line: bytes, limit: int) -> None:
        """Appends a line to a file by one write, and creates the file where it is missing. The line is not durable.

        The lines of several processes do not mix. The write ends a line that another process left incomplete. A file
        that would have more than `limit` bytes is an error.
        """
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o666, dir_fd=self.descriptor)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", name)
            if status.st_size + len(line) >= limit:
                raise OSError(errno.EFBIG, f"{status.st_size} bytes, at most {limit} are allowed", name)
            # The line of a write in progress looks cut too. Then an empty line comes after it, which readers skip.
            is_cut = status.st_size and os.pread(descriptor, 1, status.st_size - 1) != b"\n"
            os.write(descriptor, b"\n" + line if is_cut else line)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[NewFile]:
        """Opens a new file for writing. At the end of the `with` statement its bytes are durable.

        An existing file of that name is an error.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self._make_folders(name)
        descriptor = os.open(name, flags, 0o666, dir_fd=self.descriptor)
        try:
            file = NewFile(descriptor)
            with contextlib.closing(file):
                yield file
                file.finish()
            os.fsync(descriptor)
            if (size := os.fstat(descriptor).st_size) != file.size:
                raise OSError(errno.EIO, f"{file.size} bytes were written, the file has {size}", name)
        finally:
            os.close(descriptor)

    def replace(self, name: str, data: bytes) -> None:
        """Replaces a file by one rename: readers see the old or the new bytes, complete and durable."""
        new = f"swap-{uuid.uuid4().hex}"
        with self.private(create=True) as private:
            try:
                private.create(new, data)
                private.move(new, self, name)
            except Exception:
                with contextlib.suppress(OSError):
                    private.remove(new)
                raise
        self.sync()

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[NewFile]:
        """Opens a file for writing that replaces a file of that name at the end, complete and durable, by one rename.

        An error leaves the old file.
        """
        new = f"{name}.{uuid.uuid4().hex}"
        try:
            with self.writing(new) as file:
                yield file
            self.rename(new, name)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove(new)
            raise
        self.sync()

    @contextlib.contextmanager
    def adopting(self, name: str) -> Iterator[str]:
        """Yields a path for a file or a folder of another library. At the end it gets the name, complete and durable.

        The rename replaces a file, but no folder with contents. An error removes what was written.
        """
        new = f".{uuid.uuid4().hex}.{name}"
        try:
            yield os.path.join(self.path, new)
            self._sync_below(new)
            self.rename(new, name)
        except BaseException:
            with contextlib.suppress(OSError):
                self.remove_folder(new)
            raise
        self.sync()

    def _sync_below(self, name: str) -> None:
        """Makes a file durable, or a folder with its contents."""
        if stat.S_ISREG(os.lstat(name, dir_fd=self.descriptor).st_mode):
            self.sync_file(name)
            return
        for parent, _, names, descriptor in os.fwalk(name, dir_fd=self.descriptor):
            for each in names:
                self.sync_file(os.path.join(parent, each))
            os.fsync(descriptor)

    def rename(self, name: str, new: str) -> None:
        """Gives a file another name."""
        os.rename(name, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def link(self, name: str, target: Folder, new: str) -> None:
        """Makes a hard link to a file in another directory.

        Raises:
            OSError: The file system has no hard links, or not that many, or the directory is on another file system.
        """
        os.link(name, new, src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor, follow_symlinks=False)

    def move(self, name: str, target: Folder, new: str | None = None) -> None:
        """Renames a file into another directory. Replaces a file of that name."""
        target._make_folders(new or name)
        os.rename(name, new or name, src_dir_fd=self.descriptor, dst_dir_fd=target.descriptor)
        target._sync_folders(new or name)

    def _make_folders(self, name: str) -> None:
        """Creates the folders of a template above a file, each with a durable name."""
        folder = os.path.dirname(name)
        if folder and not self.exists(folder):
            self._make_folders(folder)
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, dir_fd=self.descriptor)
            self._sync_folders(folder)

    def _sync_folders(self, name: str) -> None:
        """Makes the name of a file in a folder of a template durable."""
        if self.series.depth:
            with self.folder(os.path.dirname(name) or ".") as folder:
                folder.sync()

    def remove(self, name: str) -> None:
        """Unlinks a file. A missing file is no error."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.descriptor)

    def remove_empty_folders(self, name: str) -> None:
        """Removes the folders of a template above a file that is removed, if they are empty."""
        while (name := os.path.dirname(name)) and self.series.depth:
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=self.descriptor)

    def remove_folder(self, name: str) -> None:
        """Removes a file, or a private sub-folder with its contents."""
        try:
            os.unlink(name, dir_fd=self.descriptor)
        except (IsADirectoryError, PermissionError):
            shutil.rmtree(name, dir_fd=self.descriptor)

    def sync_file(self, name: str) -> None:
        """Makes the bytes of a file durable."""
        with self.reading(name) as file:
            os.fsync(file.descriptor)

    def sync(self) -> None:
        """Makes the names in the directory durable."""
        os.fsync(self.descriptor)

    def tensorflow_path(self, name: str) -> str:
        """A path for TensorFlow, valid while this folder is open.

        TensorFlow treats a path to read as a pattern, and fails in a directory named `run[1]`. The descriptor's path
        has no pattern characters.
        """
        if os.path.isdir("/proc/self/fd"):
            return f"/proc/self/fd/{self.descriptor}/{name}"
        return os.path.join(self.path, name)

    @contextlib.contextmanager
    def held(self, names: Iterable[str]) -> Iterator[Folder]:
        """Holds files open: the folder has the files as they are now, even if others remove or replace them."""
        with contextlib.ExitStack() as stack:
            descriptors = {name: stack.enter_context(self.reading(name)).descriptor for name in names}
            yield _Held(self.path, self.series, descriptors)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Folder]:
        """A private folder for the files of one save, with a durable name.

        An error removes the folder. An interrupt, such as Ctrl-C, acts like a crash: the folder stays for recovery. It
        also stays if the commit cannot be undone.
        """
        with self.private(create=True) as private, private.folder(name, create=True, series=self.series) as folder:
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
        """Removes the lock's empty stage, if any."""
        name, lock.stage = lock.stage, ""
        if name:
            with self.private() as private:
                private.remove_folder(name)

    @contextlib.contextmanager
    def mutex(self) -> Iterator[None]:
        """Holds the mutex: no other process or thread changes the set of checkpoints."""
        descriptor = self._open_lock("mutex")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            # A child forked meanwhile shares the lock; only an explicit unlock releases it for both.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def lock(self) -> WriterLock:
        """Makes this process the directory's one writing process, for as long as the lock is referenced.

        All callers in the process get the same lock, so an interrupted notebook cell can run again.

        Raises:
            DirectoryInUseError: Another process writes here. The error names the process.
        """
        return claim(self._open_lock("lock"), self.path)

    def _open_lock(self, name: str) -> int:
        """The descriptor of a private lock file."""
        # The file is never unlinked: a lock on an unlinked file guards nothing.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with self.private(create=True) as private:
            try:
                return os.open(name, flags, 0o666, dir_fd=private.descriptor)
            except OSError as error:
                error.filename = os.path.join(private.path, name)
                raise

    def _open(self, name: str) -> int:
        return os.open(name, _READ, dir_fd=self.descriptor)


class _Held(Folder):
    """A folder of open files, which can be read and hard-linked."""

    def __init__(self, path: str, series: Series, descriptors: Mapping[str, int]) -> None:
        self.path = path
        self.series = series
        self._descriptors = descriptors

    def size(self, name: str) -> int:
        return self.stamp(name).size

    def stamp(self, name: str) -> Stamp:
        return _stamp(os.fstat(self._opened(name)))

    def link(self, name: str, target: Folder, new: str) -> None:
        # The descriptor is used because the name may be another file's by now. Without /proc the call fails.
        os.link(f"/proc/self/fd/{self._opened(name)}", new, dst_dir_fd=target.descriptor, follow_symlinks=True)

    def _open(self, name: str) -> int:
        # A duplicate shares the original's offset, which no read here uses.
        return os.dup(self._opened(name))

    def _opened(self, name: str) -> int:
        if name not in self._descriptors:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return self._descriptors[name]


def _make_directories(path: str) -> None:
    """Creates a directory and its missing parents, each with a durable name."""
    if not path or os.path.lexists(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    _make_directories(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    with Folder(parent) as folder:
        folder.sync()


def folders_below(path: str, failed: Callable[[OSError], object]) -> Iterator[tuple[str, list[str], list[str]]]:
    """A directory and the folders below it, each with the names of its folders and of its files, in natural order.

    Links and hidden folders are not entered. A folder that the caller removes from the list is not entered either.

    Args:
        path: The directory.
        failed: Called with the error of each folder that cannot be read.
    """
    for folder, folders, names in os.walk(path, onerror=failed):
        yield folder, folders, names
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=lambda name: (len(name), name))


def files_below(path: str, limit: int) -> dict[str, bytes]:
    """Reads the files in a directory and below it, by relative path.

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
    """Writes files into a directory and below it, by relative path.

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
    """A temporary directory, removed at the end of the `with` statement."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="keras_ckpt-") as path:
        yield path


def lasting_tensorflow_path(directory: str, name: str) -> str:
    """A path for TensorFlow's `restore`, valid for the whole process: it reads later variables at their creation.

    It is the plain path, unless TensorFlow would treat it as a pattern.
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
    """Truncates a log to an earlier size."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.getsize(path) > size:
            os.truncate(path, size)


def remove_unused(path: str) -> None:
    """Removes a directory that has only the package's private folder."""
    # Best effort: a directory that stays, such as a link or in a read-only parent, does no harm.
    with contextlib.suppress(OSError):
        with Folder(path) as folder:
            if folder.names() != [PRIVATE]:
                return
            lock = folder.lock()
            folder.remove_folder(PRIVATE)
            del lock
        os.rmdir(path)
