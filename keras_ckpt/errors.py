"""What can go wrong with a checkpoint: one class a condition, each also the builtin that fits it.

CheckpointError
├── CheckpointNotFoundError    KeyError,        no such checkpoint, or none that has the metric
│                              FileNotFoundError
├── DamagedCheckpointError     ValueError       a sidecar or a file is not what was written
├── FormatVersionError         ValueError       written by a newer version of this package
├── MismatchError              ValueError       the checkpoint and the model differ
├── PlanError                  ValueError       a plan that would remove all checkpoints
├── MonitorError               ValueError       nothing says by which metric to rank, or in which direction
├── DirectoryInUseError        BlockingIOError  another process writes into the directory
├── DirectoryNotEmptyError     FileExistsError  the directory holds another run's checkpoints
└── SaveError                  OSError          a checkpoint could not be written
    └── DiskFullError                           for want of room
"""


class CheckpointError(Exception):
    """The base of all errors of this package; wrong arguments are plain ValueError and TypeError."""


class CheckpointNotFoundError(CheckpointError, KeyError, FileNotFoundError):
    """There is no such checkpoint, or no such directory."""

    # KeyError shows the repr of its argument, which would quote the whole sentence.
    __str__ = Exception.__str__


class DamagedCheckpointError(CheckpointError, ValueError):
    """A sidecar, or a file that it lists, is not what was written."""


class FormatVersionError(CheckpointError, ValueError):
    """A sidecar was written by a newer version of this package."""


class MismatchError(CheckpointError, ValueError):
    """The checkpoint does not fit the model; nothing was restored."""


class PlanError(CheckpointError, ValueError):
    """A plan would remove all checkpoints, or one that it must not."""


class MonitorError(CheckpointError, ValueError):
    """Neither the arguments nor the sidecars say by which metric to rank, or which direction of it is better."""


class DirectoryInUseError(CheckpointError, BlockingIOError):
    """Another trainer writes into the directory."""


class DirectoryNotEmptyError(CheckpointError, FileExistsError):
    """The directory holds checkpoints of another run, or files in a checkpoint's place."""


class SaveError(CheckpointError, OSError):
    """A checkpoint could not be written; those that were there before are untouched."""


class DiskFullError(SaveError):
    """There is no room for a checkpoint; those that were there before are untouched."""
