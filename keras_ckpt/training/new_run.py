"""A new run where another run is: refused, put into a sub-directory, or put in its place."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Callable
from typing import Literal, cast, get_args

from keras_ckpt.errors import DirectoryInUseError, DirectoryNotEmptyError
from keras_ckpt.model.position import Position
from keras_ckpt.store import layout
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.listing import Listing
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord, step_in
from keras_ckpt.store.tables import counted, few, metric, relative
from keras_ckpt.store.writer import Writer

NewRun = Literal["refuse", "subdirectory", "replace"]


def checked_new_run(value: object) -> NewRun:
    """Checks the argument `new_run` of a callback."""
    if value not in get_args(NewRun):
        raise ValueError(f"new_run expected 'refuse', 'subdirectory' or 'replace'. Received: {value!r}")
    return cast(NewRun, value)


def runs_to_replace(listing: Listing, position: Position, replaces: bool) -> frozenset[str]:
    """Decides whether a fit may save into a directory or a series of files.

    Args:
        listing: The listing of the directory.
        position: The position of the model.
        replaces: Whether the fit may remove another run.

    Returns:
        The runs that the first save of the fit removes.

    Raises:
        DirectoryNotEmptyError: The directory holds another run, or checkpoints that no fit can continue or remove.
        FormatVersionError: A newer version of this package wrote here.
    """
    newest = listing.records[-1] if listing.records else None
    begins = newest is None or newest.run_id != position.run_id
    if not listing.series.template:
        listing.refuse_newer()
        if newest is not None and begins and not replaces:
            raise DirectoryNotEmptyError(_refusal(listing, newest))
        _refuse_unreadable(listing, position)
    elif begins and not replaces:
        _warn_of_replacement(listing, position)
    runs = {record.run_id for record in listing.all_runs} if replaces else set()
    return frozenset(runs - {position.run_id})


def answer_pin(listing: Listing, position: Position) -> set[str]:
    """Answers a pinned file of a fixed name, which no save replaces, before the first batch.

    Args:
        listing: The listing of the directory.
        position: The position of the model.

    Returns:
        The names of the pinned files that a warning has named.

    Raises:
        DirectoryNotEmptyError: The file is another run's, is damaged or has no record, so the fit could save nothing.
    """
    name = listing.series.template
    if not name or not listing.series.is_one_name:
        return set()
    path = relative(os.path.join(listing.path, name))
    unpin = f"keras-ckpt unpin {shlex.quote(path)}"
    for record in listing.all_runs:
        if record.pinned and record.run_id == position.run_id:
            warn(
                f"{_described(record)} is pinned, so this fit saves nothing there. In a shell, {unpin} lets the fit "
                "replace the file. Or give ModelCheckpoint another filepath."
            )
            return {name}
        if record.pinned:
            raise _refusal_of_pin(f"{_described(record)} is of another run and pinned", unpin)
    if (files := _without_run(listing)) and os.path.exists(layout.pin(path)):
        raise _refusal_of_pin(f"{files[0]} is pinned", f"rm {shlex.quote(layout.pin(path))}")
    return set()


def _refusal_of_pin(fact: str, unpin: str) -> DirectoryNotEmptyError:
    return DirectoryNotEmptyError(
        f"{fact}, so this fit could save nothing. In a shell, {unpin} lets the fit replace the file. Or give "
        "ModelCheckpoint new_run='subdirectory', or another filepath."
    )


def opened_in_subdirectory(
    base: CheckpointDirectory,
    run_id: str | None,
    session: object,
    make: Callable[[CheckpointDirectory], Writer],
) -> Writer:
    """Opens the writer of a fit, in a directory or in a numbered sub-directory of it.

    A fit that continues a run gets the directory of the run. A new run gets the first place without a run into which no
    process saves: the directory, then its sub-directories `2`, `3` and so on. The writer's lock gives each of several
    processes a place of its own.

    Args:
        base: The directory.
        run_id: The run of the fit, `None` for a new run.
        session: The owner of the writing.
        make: Makes the writer of a directory.
    """
    for place in base.places() if run_id else ():
        if (newest := place.latest()) is not None and newest.run_id == run_id:
            return make(place)
    candidates = itertools.chain([base], (base.subdirectory(str(number)) for number in itertools.count(2)))
    opened = (_opened_if_free(make(place), run_id, session) for place in candidates)
    return next(writer for writer in opened if writer is not None)


def _opened_if_free(writer: Writer, run_id: str | None, session: object) -> Writer | None:
    """Opens the writer of a directory, unless the directory holds another run or another process saves into it."""
    if writer.directory.listing():
        return None
    try:
        writer.open(session)
    except DirectoryInUseError:
        return None
    # The recovery of a dead process, or another process, may have saved a checkpoint since.
    listing = writer.directory.listing()
    if listing and not (listing.records and listing.records[-1].run_id == run_id):
        writer.close()
        return None
    return writer


def _refusal(listing: Listing, newest: CheckpointRecord) -> str:
    path = relative(listing.path)
    run = "another run" if newest.end is None else f"a finished run of {newest.end.epochs} epochs"
    return (
        f"{path} holds {counted(len(listing.records), 'checkpoint')} of {run}, the newest of step {newest.step}. Type "
        f"keras_ckpt.restore(model, {path!r}) and fit(..., initial_epoch={newest.epoch or 0}) to continue it. Or give "
        "ModelCheckpoint new_run='subdirectory' to keep it, or new_run='replace' to remove it. In a shell, "
        f"keras-ckpt clear {shlex.quote(path)} removes it."
    )


def _refuse_unreadable(listing: Listing, position: Position) -> None:
    """Refuses a directory with checkpoints that a fit can neither continue nor remove."""
    unmanaged = [name for name in listing.unmanaged if not listing.records or (step_in(name) or 0) > position.step]
    if unmanaged or (listing.damaged and not listing.records):
        names = ", ".join([*unmanaged, *listing.damaged][:10])
        raise DirectoryNotEmptyError(
            f"{listing.path} holds checkpoints without a sidecar, or with a damaged sidecar: {names}. No run can "
            "resume from them, so they are left alone. Move them away, or train into another directory. "
            "keras_ckpt.restore(model, path) restores a checkpoint that TensorFlow wrote."
        )


def _warn_of_replacement(listing: Listing, position: Position) -> None:
    """Warns that a fit replaces files by their names, as Keras does: of another run, without a record, or damaged."""
    earlier = [record for record in reversed(listing.all_runs) if record.run_id != position.run_id]
    files = [*map(_described, earlier), *_without_run(listing)]
    if not files:
        return
    replaced = "it" if listing.series.is_one_name else "files of the same names"
    continues = (
        f" To continue its run, type keras_ckpt.restore(model, {relative(earlier[0].prefix)!r}) before fit."
        if earlier
        else ""
    )
    warn(
        f"An earlier training wrote {few(files)}. This fit replaces {replaced}, as Keras does.{continues} To keep all "
        "files, give ModelCheckpoint new_run='subdirectory'."
    )


def _without_run(listing: Listing) -> list[str]:
    """The files of unknown runs, to display: without a record, or damaged."""
    facts = [(name, "no record") for name in listing.unmanaged] + [(name, "damaged") for name in listing.damaged]
    return [f"{relative(os.path.join(listing.path, name))} ({fact})" for name, fact in facts]


def _described(record: CheckpointRecord) -> str:
    value = record.metrics.get(record.monitor or "")
    measured = "" if value is None else f", {record.monitor} {metric(value)}"
    return f"{relative(record.prefix)} (step {record.step}{measured})"
