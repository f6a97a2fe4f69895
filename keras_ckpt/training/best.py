"""The best checkpoint of a run, restored when its `fit` ends."""

from __future__ import annotations

from collections.abc import Iterable

import keras

from keras_ckpt.errors import CheckpointError
from keras_ckpt.model.position import position_of
from keras_ckpt.model.restoring import restore
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.notices import warn
from keras_ckpt.store.policies import BestN, LatestN, PreservationPolicy, is_known, joined
from keras_ckpt.store.record import CheckpointRecord


def refuse_no_best(keep: PreservationPolicy | None, best: BestN, improves: bool, is_one_file: bool) -> None:
    """Refuses arguments with which the best checkpoint may be removed before `fit` ends.

    Args:
        keep: The policy.
        best: The policy that selects the best checkpoint. Its mode may be open.
        improves: Whether only improvements are saved, so the newest checkpoint is the best.
        is_one_file: Whether each save replaces the same file.

    Raises:
        ValueError: The policy does not keep the best.
    """
    parts = keep.parts if keep is not None else (LatestN(1),) if is_one_file else ()
    if parts and not any(_keeps(part, best, improves) for part in parts):
        kept = f"keep={keep!r}" if keep is not None else "a file that each save replaces"
        mend = f"keep={joined(keep, BestN(1))!r}" if keep is not None and not is_one_file else "save_best_only=True"
        raise ValueError(
            f"load_best_at_end=True needs the checkpoint with the best {best.monitor!r}, and {kept} does not keep it. "
            f"Pass {mend}."
        )


def _keeps(part: PreservationPolicy, best: BestN, improves: bool) -> bool:
    """Whether a policy keeps the best checkpoint. A user's own policy may keep it."""
    if isinstance(part, BestN):
        same_mode = part.mode is None or best.mode is None or part.mode == best.mode
        return part.monitor in (None, best.monitor) and same_mode
    return not is_known(part) or (improves and isinstance(part, LatestN))


def load_best(model: keras.Model, places: Iterable[CheckpointDirectory], best: BestN) -> CheckpointRecord | None:
    """Restores the best checkpoint of a model's run. A model without a run stays as it is.

    An error is a warning, because an error at the end of `fit` would lose its history.

    Args:
        model: The model.
        places: The directories in which the run may be.
        best: The policy that selects the best checkpoint.

    Returns:
        The restored checkpoint, `None` if the model is as it was.
    """
    position = position_of(model)
    if position is None:
        return None
    stays = "so the model stays as training left it."
    try:
        records = [record for place in places for record in place.listing().all_runs]
        own = [record for record in records if record.run_id == position.run_id]
        steps = best.select(own)
        if not steps:
            warn(f"No checkpoint of the run has a finite {best.monitor!r}, {stays}")
            return None
        found = next(record for record in own if record.step in steps)
        restore(model, found)
    except (CheckpointError, OSError) as error:
        warn(f"The best checkpoint could not be restored, {stays} {error}")
        return None
    return found
