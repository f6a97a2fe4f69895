"""Every state that a crash may leave on disk: what the file module does is recorded, and replayed on a model.

The model knows of each change whether it is durable. Of those that are not, a crash keeps any choice.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import random
import stat
import sys
import types
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias, TypeVar

from keras_ckpt.store.files import PRIVATE, Folder
from keras_ckpt.store.layout import JOURNAL
from support.functions import call_at

Place: TypeAlias = tuple[int, str]
Tree: TypeAlias = dict[Place, int]
Snapshot: TypeAlias = "dict[str, bytes | Snapshot]"
Choice = TypeVar("Choice")

ROOT = 0
IN_ORDER, IN_ANY_ORDER, RENAMES_IN_TWO = "in order", "in any order", "renames in two"


class Operation(NamedTuple):
    """One thing that was done to the disk; `path` is relative to the root of the recording.

    Attributes:
        kind: `create`, `write`, `mkdir`, `rename`, `link`, `unlink`, `rmdir` or `sync`.
        path: What it was done to.
        target: The new path, of a rename and of a link.
        data: The bytes, of a write.
        site: The call that asked for it, of a sync.
    """

    kind: str
    path: str
    target: str = ""
    data: bytes = b""
    site: str = ""


class Recorder:
    """`os` for the file module, which logs what changes the disk below a directory."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.path.realpath(root)
        self.log: list[Operation] = []

    def __getattr__(self, name: str):
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        place = self._place(path, dir_fd)
        created = flags & os.O_CREAT and not os.path.lexists(place)
        descriptor = os.open(path, flags, mode, dir_fd=dir_fd)
        if created:
            self._add("create", place)
        return descriptor

    def write(self, descriptor: int, data: bytes) -> int:
        count = os.write(descriptor, data)
        self._add("write", _opened(descriptor), data=bytes(data[:count]))
        return count

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        self._add("sync", _opened(descriptor), site=_site(sys._getframe(1)))

    def mkdir(self, path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        os.mkdir(path, mode, dir_fd=dir_fd)
        self._add("mkdir", self._place(path, dir_fd))

    def rename(self, source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        old, new = self._place(source, src_dir_fd), self._place(target, dst_dir_fd)
        os.rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        self._add("rename", old, target=os.path.relpath(new, self.root))

    def link(self, source: str, target: str, *, dst_dir_fd: int, follow_symlinks: bool) -> None:
        new = self._place(target, dst_dir_fd)
        os.link(source, target, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)
        self._add("link", os.path.realpath(source), target=os.path.relpath(new, self.root))

    def unlink(self, path: str, *, dir_fd: int) -> None:
        place = self._place(path, dir_fd)
        os.unlink(path, dir_fd=dir_fd)
        self._add("unlink", place)

    def rmdir(self, path: str, *, dir_fd: int | None = None) -> None:
        place = self._place(path, dir_fd)
        os.rmdir(path, dir_fd=dir_fd)
        self._add("rmdir", place)

    def rmtree(self, name: str, *, dir_fd: int) -> None:
        """As `shutil.rmtree`, for a directory without sub-folders."""
        descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
        try:
            for inner in os.listdir(descriptor):
                self.unlink(inner, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        self.rmdir(name, dir_fd=dir_fd)

    def _place(self, path: str, dir_fd: int | None) -> str:
        folder, name = os.path.split(path)
        base = os.path.realpath(folder or ".") if dir_fd is None else _opened(dir_fd)
        return os.path.join(base, name)

    def _add(self, kind: str, place: str, **more: str | bytes) -> None:
        path = os.path.relpath(place, self.root)
        # Nothing ever depends on a lock's file or on the journal; without them there are fewer states.
        if path.split("/")[0] != ".." and not _is_ignored(path):
            self.log.append(Operation(kind, path, **more))


def _is_ignored(path: str) -> bool:
    folder, name = os.path.split(path)
    return name == JOURNAL or (folder.startswith(PRIVATE) and name in ("lock", "mutex"))


def _opened(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


_SYNCING = (Folder.create, Folder.writing.__wrapped__, Folder.sync_file, Folder.sync)
"""The callers of these functions ask for the sync."""


def _site(frame: types.FrameType) -> str:
    """The call that asked for a sync."""
    own = [function.__code__ for function in _SYNCING]
    while frame.f_code.co_filename == contextlib.__file__ or frame.f_code in own:
        frame = frame.f_back
    return call_at(frame)


class Change(NamedTuple):
    """A change to directories; a rename is one, or two of which the second needs the first."""

    inode: int
    removed: Place | None
    added: Place | None
    needed: Place | None = None

    @property
    def anchor(self) -> int:
        """The directory whose sync makes it durable."""
        return (self.added or self.removed)[0]

    def apply(self, tree: Tree) -> Tree:
        if self.needed and tree.get(self.needed) != self.inode:
            return tree
        tree = dict(tree)
        if self.removed and tree.get(self.removed) == self.inode:
            del tree[self.removed]
        if self.added is None:
            return {place: inode for place, inode in tree.items() if place[0] != self.inode}
        if self.added[0] == ROOT or self.added[0] in tree.values():
            tree[self.added] = self.inode
        return tree


class Disk:
    """A disk that is replayed an operation after the other, and cut off at any moment.

    Args:
        start: What is on it, durably.
        order: `IN_ORDER` if changes to directories reach it in their order, and all of them by any sync, as where there
            is a journal. `IN_ANY_ORDER` if each reaches it by a sync of its directory, and before that any of them
            may. `RENAMES_IN_TWO` if, besides, the old name of what is renamed goes by a sync of its own directory.
        dropped: The site of a sync that is left out.
    """

    def __init__(self, start: Snapshot, order: str, *, dropped: str = "") -> None:
        self.order = order
        self.dropped = dropped
        self.numbers = itertools.count(ROOT + 1)
        self.contents: dict[int, bytes] = {}
        self.written: Tree = {}
        self._load(start, ROOT)
        self.durable = self.written
        self.unsynced: set[int] = set()
        self.changes: list[tuple[Change, bool]] = []

    def replay(self, operation: Operation) -> None:
        match operation:
            case Operation("create" | "mkdir" as kind, path):
                inode = next(self.numbers)
                if kind == "create":
                    self.contents[inode] = b""
                    self.unsynced.add(inode)
                self._change(inode, None, self._place(path))
            case Operation("write", path):
                inode = self.written[self._place(path)]
                self.contents[inode] += operation.data
                self.unsynced.add(inode)
            case Operation("rename", path, target):
                old, new = self._place(path), self._place(target)
                inode = self.written[old]
                if self.order == RENAMES_IN_TWO:
                    self._change(inode, None, new)
                    self._change(inode, old, None, needed=new)
                else:
                    self._change(inode, old, new)
            case Operation("link", path, target):
                self._change(self.written[self._place(path)], None, self._place(target))
            case Operation("unlink" | "rmdir", path):
                place = self._place(path)
                self._change(self.written[place], place, None)
            case Operation("sync", path) if operation.site != self.dropped:
                self._sync(ROOT if path == "." else self.written[self._place(path)])

    def crash(self, limit: int, chance: random.Random) -> Iterator[Snapshot]:
        """What a crash at this moment may leave: all of it, or a sample where that is more than `limit`."""
        for tree in self._trees(limit, chance):
            lost = sorted(self.unsynced.intersection(tree.values()))
            choices = list(itertools.product(*(_torn(self.contents[inode]) for inode in lost)))
            for choice in _at_most(limit, choices, chance):
                yield _snapshot(tree, self.contents | dict(zip(lost, choice, strict=True)), ROOT)

    def whole(self) -> Snapshot:
        """What the process itself sees, and what a process that is killed leaves."""
        return _snapshot(self.written, self.contents, ROOT)

    def _load(self, snapshot: Snapshot, folder: int) -> None:
        for name, content in snapshot.items():
            inode = self.written[folder, name] = next(self.numbers)
            if isinstance(content, bytes):
                self.contents[inode] = content
            else:
                self._load(content, inode)

    def _place(self, path: str) -> Place:
        folder = ROOT
        *parents, name = path.split("/")
        for parent in parents:
            folder = self.written[folder, parent]
        return folder, name

    def _change(self, inode: int, removed: Place | None, added: Place | None, needed: Place | None = None) -> None:
        change = Change(inode, removed, added, needed)
        self.written = change.apply(self.written)
        self.changes.append((change, False))

    def _sync(self, inode: int) -> None:
        self.unsynced.discard(inode)
        journal = self.order == IN_ORDER
        self.changes = [(change, done or journal or change.anchor == inode) for change, done in self.changes]
        while self.changes and self.changes[0][1]:
            self.durable = self.changes.pop(0)[0].apply(self.durable)

    def _trees(self, limit: int, chance: random.Random) -> list[Tree]:
        trees = [self.durable]
        for change, done in self.changes:
            if self.order == IN_ORDER:
                trees.append(change.apply(trees[-1]))
                continue
            changed = [change.apply(tree) for tree in trees]
            both = changed if done else trees + changed
            distinct = {frozenset(tree.items()): tree for tree in both}
            trees = _at_most(limit, list(distinct.values()), chance)
        return trees


def _at_most(limit: int, choices: list[Choice], chance: random.Random) -> list[Choice]:
    return choices if len(choices) <= limit else chance.sample(choices, limit)


def _torn(content: bytes) -> list[bytes]:
    """What may be there of bytes that no sync made durable."""
    half = len(content) // 2
    return list(dict.fromkeys([content, b"", content[:half], bytes(len(content)), content[:half] + b"\xa5" * half]))


def _snapshot(tree: Tree, contents: dict[int, bytes], folder: int) -> Snapshot:
    return {
        name: contents[inode] if inode in contents else _snapshot(tree, contents, inode)
        for (parent, name), inode in tree.items()
        if parent == folder
    }


def read(path: pathlib.Path) -> Snapshot:
    """What a directory holds, without locks and journals."""
    place = str(pathlib.Path(*path.parts[path.parts.index(PRIVATE) :])) if PRIVATE in path.parts else ""
    names = (name for name in sorted(os.listdir(path)) if not _is_ignored(os.path.join(place, name)))
    return {
        name: read(path / name) if stat.S_ISDIR((path / name).lstat().st_mode) else (path / name).read_bytes()
        for name in names
    }


def make(snapshot: Snapshot, path: pathlib.Path) -> None:
    """Makes a directory that holds a snapshot."""
    path.mkdir()
    for name, content in snapshot.items():
        if isinstance(content, bytes):
            (path / name).write_bytes(content)
        else:
            make(content, path / name)


def key(snapshot: Snapshot) -> frozenset[tuple[str, object]]:
    """Equal for states that differ in nothing but the random names of scratch folders."""
    return frozenset(
        (name, content) if isinstance(content, bytes) else (name.partition("-")[0], key(content))
        for name, content in snapshot.items()
    )
