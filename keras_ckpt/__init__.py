"""Checkpoints for Keras: kept by policy, explained by sidecars, never lost.

A name is loaded when it is first used, so reading a directory does not wait for TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from keras_ckpt.version import __version__ as __version__

if TYPE_CHECKING:
    from keras_ckpt.errors import CheckpointError as CheckpointError
    from keras_ckpt.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from keras_ckpt.errors import DamagedCheckpointError as DamagedCheckpointError
    from keras_ckpt.errors import DirectoryInUseError as DirectoryInUseError
    from keras_ckpt.errors import DirectoryNotEmptyError as DirectoryNotEmptyError
    from keras_ckpt.errors import DiskFullError as DiskFullError
    from keras_ckpt.errors import FormatVersionError as FormatVersionError
    from keras_ckpt.errors import MismatchError as MismatchError
    from keras_ckpt.errors import MonitorError as MonitorError
    from keras_ckpt.errors import PlanError as PlanError
    from keras_ckpt.errors import SaveError as SaveError
    from keras_ckpt.formats.variables import Variables as Variables
    from keras_ckpt.formats.variables import load_variables as load_variables
    from keras_ckpt.model.report import RestoreReport as RestoreReport
    from keras_ckpt.model.restoring import restore as restore
    from keras_ckpt.resume.backup_and_restore import BackupAndRestore as BackupAndRestore
    from keras_ckpt.resume.resumable_dataset import ResumableDataset as ResumableDataset
    from keras_ckpt.store.directory import Change as Change
    from keras_ckpt.store.directory import CheckpointDirectory as CheckpointDirectory
    from keras_ckpt.store.directory import Decision as Decision
    from keras_ckpt.store.directory import PrunePlan as PrunePlan
    from keras_ckpt.store.directory import Verification as Verification
    from keras_ckpt.store.listing import Listing as Listing
    from keras_ckpt.store.policies import BestN as BestN
    from keras_ckpt.store.policies import EveryNEpochs as EveryNEpochs
    from keras_ckpt.store.policies import EveryNHours as EveryNHours
    from keras_ckpt.store.policies import EveryNSteps as EveryNSteps
    from keras_ckpt.store.policies import LatestN as LatestN
    from keras_ckpt.store.policies import PreservationPolicy as PreservationPolicy
    from keras_ckpt.store.record import CheckpointRecord as CheckpointRecord
    from keras_ckpt.training.checkpoint_manager import CheckpointManager as CheckpointManager
    from keras_ckpt.training.model_checkpoint import ModelCheckpoint as ModelCheckpoint

_HOMES = {
    "resume.backup_and_restore": ("BackupAndRestore",),
    "resume.resumable_dataset": ("ResumableDataset",),
    "store.directory": ("Change", "CheckpointDirectory", "Decision", "PrunePlan", "Verification"),
    "store.listing": ("Listing",),
    "errors": (
        "CheckpointError",
        "CheckpointNotFoundError",
        "DamagedCheckpointError",
        "DirectoryInUseError",
        "DirectoryNotEmptyError",
        "FormatVersionError",
        "MismatchError",
        "MonitorError",
        "PlanError",
        "DiskFullError",
        "SaveError",
    ),
    "training.checkpoint_manager": ("CheckpointManager",),
    "training.model_checkpoint": ("ModelCheckpoint",),
    "store.policies": ("BestN", "EveryNEpochs", "EveryNHours", "EveryNSteps", "LatestN", "PreservationPolicy"),
    "store.record": ("CheckpointRecord",),
    "formats.variables": ("Variables", "load_variables"),
    "model.report": ("RestoreReport",),
    "model.restoring": ("restore",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605 - one table is enough


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'keras_ckpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"keras_ckpt.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
