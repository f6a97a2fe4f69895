"""Saving one run's checkpoints into a directory: what is wanted, staged, committed and pruned.

The payload is somebody else's: a function that writes files into a folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from keras_ckpt.errors import CheckpointError, DirectoryNotEmptyError, DiskFullError, SaveError
from keras_ckpt.store import commit, layout, tables
from keras_ckpt.store import record as sidecars
from keras_ckpt.store.directory import CheckpointDirectory, remove
from keras_ckpt.store.files import Folder, UnfinishedError
from keras_ckpt.store.listing import Known, Listing, amend, examine
from keras_ckpt.store.locks import WriterLock
from keras_ckpt.store.notices import warn
from keras_ckpt.store.policies import PreservationPolicy, kept_in_training
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord

Write = Callable[[Folder, str], Sequence[CheckpointFile]]
"""Writes the files of a checkpoint of a name into a folder, durably, and says what they are."""

_FULL = {
    errno.ENOSPC: "Free some space, or keep fewer checkpoints.",
    errno.EDQUOT: "Free some of the quota, or keep fewer checkpoints.",
}
_MENDS = _FULL | {
    errno.EACCES: "Make the directory writable for this user, or choose another.",
    errno.EROFS: "The file system is mounted read-only: choose another directory.",
    errno.ENOMEM: "A save needs memory for a copy of all that it saves: free some.",
}


class Writer:
    """The writing side of a directory.

    Args:
        target: The directory.
        keep: What stays, asked before each save and after it; `None` keeps all.
        only: What a new checkpoint must satisfy besides to be written at all.
        base: What the names of the checkpoints begin with.

    Raises:
        ValueError: The directory is `/`, or the user's home.
    """

    def __init__(
        self,
        target: CheckpointDirectory,
        keep: PreservationPolicy | None = None,
        only: PreservationPolicy | None = None,
        base: str = "ckpt",
    ) -> None:
        if os.path.realpath(target.path) in {"/", os.path.realpath(os.path.expanduser("~"))}:
            raise ValueError(f"{target.path} is no directory of one run's own: name one in it, such as runs/digits.")
        self.directory = target
        self.keep = keep
        self.only = only
        self.base = base
        self._lock: WriterLock | None = None
        self._session: object = None
        self._known = Known()

    def open(self, session: object = None) -> None:
        """Becomes the one that writes here, and finishes what a process that died had begun.

        Args:
            session: What the writing is for, such as one `fit`; it may have one writer a directory.

        Raises:
            DirectoryInUseError: Another process writes here.
            DirectoryNotEmptyError: Another writer of the same session does.
            SaveError: The directory cannot be written.
        """
        lock = self._claim()
        if session is not None and lock.session is session:
            self._lock = None
            raise DirectoryNotEmptyError(
                f"Two callbacks of this training save into {self.directory.path}. Give each a directory of its own; "
                "two ModelCheckpoints may become one with keep=first | second."
            )
        lock.session = self._session = session

    def close(self) -> None:
        """Lets another process write here."""
        if self._lock is not None and self._lock.session is self._session:
            self._lock.session = None
            with contextlib.suppress(OSError), Folder(self.directory.path) as folder:
                folder.remove_stage(self._lock)
        self._lock = None

    def save(
        self,
        write: Write,
        *,
        step: int,
        size: int | None = None,
        began: float | None = None,
        went_on: float | None = None,
        **facts: Any,
    ) -> CheckpointRecord | None:
        """Saves a checkpoint, unless it would be pruned at once, and prunes.

        After a crash there is the directory as it was or as it is afterwards, never anything between.

        Args:
            write: Writes the checkpoint's files, whose names all begin with its own.
            step: Its step; a checkpoint of that step which is there already is superseded.
            size: The bytes that it will need, 0 if `write` looks for the room itself; defaults to those of the newest.
            began: When training began to wait for it, by `time.perf_counter`; defaults to now.
            went_on: When training went on; defaults to when everything is sealed.
            **facts: More fields of its record; without a `run_id`, it belongs to the run of the newest.

        Returns:
            Its record; `None` if it was not wanted.

        Raises:
            DiskFullError: There is no room for it. The others are untouched.
            SaveError: It could not be saved, or another run than that of this session was, meanwhile. The others are
                untouched.
        """
        began = time.perf_counter() if began is None else began
        lock = self._claim()
        with lock.saving, Folder(self.directory.path, create=True) as folder:
            with self.explaining(step):
                listing = examine(folder, self._known)
            candidate = self._candidate(listing, step, facts)
            if self._session is not None:
                self._refuse_other_run(listing, candidate)
            # Refuses what no sidecar can hold before anything is written.
            sidecars.encode(candidate)
            if not self._wanted(candidate, listing.records) or _pinned(listing, step):
                return None
            try:
                with self.explaining(step), folder.stage(lock) as stage:
                    look_for_room(stage, _size_of_newest(listing) if size is None else size)
                    record = _stage(stage, candidate, write, began, went_on)
                    with folder.mutex():
                        listing = examine(folder, self._known)
                        if _pinned(listing, step) or _pinned_and_damaged(folder, listing, step):
                            return None
                        if listing.sequence >= record.sequence:
                            raise OSError(errno.EIO, "a sidecar could not be read, so the order of saving is not known")
                        commit.publish(folder, stage, record, _of(listing, step))
                        self.retain(folder, listing.joined_by(record))
            except (KeyboardInterrupt, SystemExit, SaveError):
                # What is left of it is seen to at the next save or the next start; a complete stage goes forward.
                lock.recovered = False
                raise
        return record

    def latest(self) -> CheckpointRecord | None:
        """The checkpoint that was saved last. What the last save has read is not read again."""
        with self._explaining("Cannot read"), Folder(self.directory.path) as folder:
            records = examine(folder, self._known).records
        return records[-1] if records else None

    def amend(self, record: CheckpointRecord, **facts: Any) -> CheckpointRecord | None:
        """Replaces facts of a saved checkpoint, and prunes by them.

        Returns:
            Its record, `None` if it was pruned meanwhile.
        """
        what = f"Could not add to step {record.step} in"
        with self._explaining(what), Folder(self.directory.path) as folder, folder.mutex():
            listing = examine(folder, self._known)
            current = [each for each in _of(listing, record.step) if each.sequence == record.sequence]
            if not current:
                return None
            changed = amend(folder, current[0], **facts)
            self.retain(folder, listing.joined_by(changed))
            return changed

    def retain(self, folder: Folder, listing: Listing) -> None:
        """Removes what the policy does not keep. The caller holds the mutex, and listed the directory under it."""
        with self._explaining("What was to be saved is saved, but older ones could not be removed from"):
            remove(folder, listing, [] if listing.newer else self.unkept(listing.records))

    def unkept(self, records: Sequence[CheckpointRecord]) -> list[CheckpointRecord]:
        """Those that the policy does not keep and nobody pinned, oldest first."""
        if self.keep is None:
            return []
        kept = kept_in_training(self.keep, records)
        return [record for record in records if record.step not in kept and not record.pinned]

    def explaining(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Says of any error in the saving of a step what it is, and how to mend it."""
        return self._explaining(f"Could not save step {step} into")

    def _claim(self) -> WriterLock:
        # Asked for each time: the directory may be another one since, and then so is its lock.
        with self._explaining("Cannot write into"), Folder(self.directory.path, create=True) as folder:
            self._lock = folder.lock()
            if self._lock.session is None:
                self._lock.session = self._session
            with self._lock.saving:
                if not self._lock.recovered:
                    with folder.mutex():
                        commit.recover(folder)
                    self._lock.recovered = True
        return self._lock

    @contextlib.contextmanager
    def _explaining(self, what: str) -> Iterator[None]:
        """Says of any error what could not be done, and how to mend it."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:  # the payload is written by somebody else
            number = error.errno or 0 if isinstance(error, OSError) else 0
            kind, mend = DiskFullError if number in _FULL else SaveError, _MENDS.get(number, "")
            text = _plain(str(error)) or type(error).__name__
            if isinstance(error, UnfinishedError):
                rest = "It is there after the next save or the next start, in place of the one before."
            else:
                rest = "What was there before is untouched."
            sentences = (f"{what} {self.directory.path}: {text}.", mend, rest)
            raise kind(" ".join(filter(None, sentences))) from error

    def _candidate(self, listing: Listing, step: int, facts: dict[str, Any]) -> CheckpointRecord:
        newest = listing.records[-1] if listing.records else None
        facts = {"run_id": newest.run_id if newest else uuid.uuid4().hex, **facts}
        return CheckpointRecord(
            step=step,
            sequence=listing.sequence + 1,
            name=f"{self.base}-{step}",
            directory=self.directory.path,
            **facts,
        )

    def _refuse_other_run(self, listing: Listing, candidate: CheckpointRecord) -> None:
        """Refuses to go on where another training saves at the same time."""
        newest = listing.records[-1] if listing.records else candidate
        if newest.run_id != candidate.run_id:
            raise SaveError(
                f"Could not save step {candidate.step} into {self.directory.path}: by now it holds checkpoints of "
                f"another run, the newest of step {newest.step}, which another fit of this process has saved. Give "
                "each fit a directory of its own. What was there before is untouched."
            )

    def _wanted(self, candidate: CheckpointRecord, records: Sequence[CheckpointRecord]) -> bool:
        """Whether the policies would keep it; "save" and "prune" are one question."""
        others = [record for record in records if record.step != candidate.step]
        policies = (policy for policy in (self.keep, self.only) if policy is not None)
        return all(candidate.step in kept_in_training(policy, [*others, candidate]) for policy in policies)


def _size_of_newest(listing: Listing) -> int:
    return listing.records[-1].size if listing.records else 0


def look_for_room(folder: Folder, size: int) -> None:
    """Refuses before anything is written what would not fit."""
    free = folder.free()
    if free < size:
        raise OSError(errno.ENOSPC, f"{tables.size(size)} are needed, {tables.size(free)} are free")


def by_prefix(write: Callable[[str], object]) -> Write:
    """What a function writes that takes a prefix, as TensorFlow's do, and leaves the rest to the one who calls it."""

    def write_files(stage: Folder, name: str) -> Sequence[CheckpointFile]:
        write(stage.tensorflow_path(name))
        names = sorted(stage.names())
        if not names:
            raise OSError(f"no files were written with the prefix {name}")
        files = [CheckpointFile(each, *stage.digest(each)) for each in names]
        for each in names:
            stage.sync_file(each)
        return files

    return write_files


def _stage(
    stage: Folder, candidate: CheckpointRecord, write: Write, began: float, went_on: float | None
) -> CheckpointRecord:
    """Writes everything into the stage, durably, the sidecar last."""
    started = time.perf_counter()
    files = write(stage, candidate.name)
    sealed = time.perf_counter()
    blocked = _milliseconds(began, sealed if went_on is None else went_on)
    timings = {"write_ms": _milliseconds(started, sealed), "blocked_ms": blocked}
    record = msgspec.structs.replace(candidate, files=tuple(files), timings=timings)
    stage.create(layout.sidecar(record.name), sidecars.encode(record))
    stage.sync()
    return record


def _of(listing: Listing, step: int) -> list[CheckpointRecord]:
    return [record for record in listing.records if record.step == step]


def _pinned(listing: Listing, step: int) -> bool:
    pinned = [record for record in _of(listing, step) if record.pinned]
    for record in pinned:
        warn(
            f"Step {step} is pinned in {record.directory}, so it is not saved again over the one that is there. "
            "Unpin it, or go on in another directory."
        )
    return bool(pinned)


def _pinned_and_damaged(folder: Folder, listing: Listing, step: int) -> bool:
    names = [name for name in listing.damaged if sidecars.step_in(name) == step and folder.exists(layout.pin(name))]
    for name in names:
        warn(
            f"{name} in {folder.path} is pinned and damaged, so step {step} is not saved over what is left of it: "
            f"{listing.damaged[name]}. Move its files away, or go on in another directory."
        )
    return bool(names)


def _plain(text: str) -> str:
    """The first line of an error, without what TensorFlow adds of its own workings."""
    line = text.partition("\n")[0]
    return re.sub(r"\{\{.*?\}\} ?|/proc/self/fd/\d+/", "", line).rstrip(". ")


def _milliseconds(start: float, end: float) -> float:
    return round((end - start) * 1000, 3)
