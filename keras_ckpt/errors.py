"""The errors of this package: one class for each condition. Each class also derives from the matching builtin.

CheckpointError
├── CheckpointNotFoundError    KeyError,        no such checkpoint, or no checkpoint has the metric
│                              FileNotFoundError
├── DamagedCheckpointError     ValueError       a sidecar or a file differs from the saved bytes
├── FormatVersionError         ValueError       written by a newer version of this package
├── MismatchError              ValueError       the checkpoint and the model differ
├── CannotBuildError           ValueError       the model cannot be built without its code
├── PlanError                  ValueError       a plan would remove all checkpoints
├── MonitorError               ValueError       the metric to rank by, or its mode, is not known
├── DirectoryInUseError        BlockingIOError  another process writes into the directory
├── DirectoryNotEmptyError     FileExistsError  the directory holds another run's checkpoints
└── SaveError                  OSError          a checkpoint could not be written
    └── DiskFullError                           the disk is full
"""


class CheckpointError(Exception):
    """The base of all errors of this package; wrong arguments are plain ValueError and TypeError."""


class CheckpointNotFoundError(CheckpointError, KeyError, FileNotFoundError):
    """The checkpoint or the directory does not exist."""

    # KeyError shows the repr of its argument: the message would appear in quotes.
    __str__ = Exception.__str__


class DamagedCheckpointError(CheckpointError, ValueError):
    """A sidecar, or a file that it lists, differs from the saved bytes."""


class FormatVersionError(CheckpointError, ValueError):
    """A newer version of this package wrote the sidecar."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint does not match the model; nothing was restored."""


class CannotBuildError(CheckpointError, ValueError):
    """The model of a checkpoint cannot be built from its config; the checkpoint is as it was."""


class PlanError(CheckpointError, ValueError):
    """A plan would remove all checkpoints, or a checkpoint that must stay."""


class MonitorError(CheckpointError, ValueError):
    """Neither the arguments nor the sidecars give the metric to rank by, or its mode."""


class DirectoryInUseError(CheckpointError, BlockingIOError):
    """Another process writes into the directory."""


class DirectoryNotEmptyError(CheckpointError, FileExistsError):
    """The directory holds checkpoints of another run, or foreign files with a checkpoint's names."""


class SaveError(CheckpointError, OSError):
    """A checkpoint could not be written; earlier checkpoints are untouched."""


class DiskFullError(SaveError):
    """The disk has no room for a checkpoint; earlier checkpoints are untouched."""
