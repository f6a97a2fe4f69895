"""The variables of a checkpoint by name, as NumPy arrays that are read on access."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import numpy as np

from keras_ckpt.errors import CheckpointNotFoundError, DamagedCheckpointError
from keras_ckpt.formats import arrays
from keras_ckpt.formats.bundle_index import Index, read_index
from keras_ckpt.formats.bundle_reader import read_values
from keras_ckpt.formats.dtypes import NAMES
from keras_ckpt.store.checks import unreadable
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.record import CheckpointRecord

SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
"""The suffix that TensorFlow appends to a variable's name in a checkpoint."""
COUNTER = f"save_counter{SUFFIX}"
"""The key of TensorFlow's save counter, which is not part of a model."""
_LINES = 20


def load_variables(checkpoint: CheckpointRecord | CheckpointDirectory | str | os.PathLike[str]) -> Variables:
    """Loads the values of a checkpoint as NumPy arrays, without TensorFlow and without the model.

    The names are the names that `restore` matches. Each access reads and verifies a value. No file stays open.

    Example:

    ```python
    kernel = keras_ckpt.load_variables(runs.best())["model/dense/kernel"]
    ```

    Args:
        checkpoint: A record, a directory (its newest checkpoint), or the path of a directory or a checkpoint. A
            checkpoint that TensorFlow wrote is accepted too.

    Returns:
        A read-only mapping of names to arrays. `ml_dtypes` has the types that NumPy lacks, such as `bfloat16`.

    Raises:
        DamagedCheckpointError: The checkpoint cannot be trusted.
        CheckpointNotFoundError: There is no such checkpoint.
    """

    def read(files: Folder, name: str, record: CheckpointRecord | None) -> Variables:
        if files.series.template:
            raise ValueError(
                f"{files.path}/{name} is a file in a format of Keras, and its values need its model: "
                f"keras_ckpt.load_model({name!r}) or keras_ckpt.restore(model, {name!r}). load_variables and export "
                "read the checkpoints of a directory."
            )
        index = read_index(files, name, record.files if record else ())
        return Variables(files, name, index)

    return read_checkpoint(checkpoint, read)


class Variables(Mapping[str, np.ndarray]):
    """The variables of a checkpoint by name: a read-only mapping to NumPy arrays.

    Each access reads a value from disk into a new array. The value's checksum in the index is compared. The digest of
    the index was compared when the checkpoint was loaded. So each value is verified, although the rest of its file is
    not read.

    Example:

    ```python
    weights = keras_ckpt.load_variables("runs/digits")
    print(weights)
    for name, value in weights.items():
        print(name, value.std())
    ```

    Raises:
        DamagedCheckpointError: When a value is read: its checksum does not match.
        CheckpointNotFoundError: When a value is read: the checkpoint was removed or saved again since it was loaded.
    """

    def __init__(self, files: Folder, name: str, index: Index) -> None:
        self._directory = files.path
        self._prefix = os.path.join(files.path, name)
        self._index = index
        self._inodes = {file: files.stamp(file).inode for file in index.files.values()}
        self._keys = names_in(index)

    def __getitem__(self, name: str) -> np.ndarray:
        key = self._keys[name].encode()
        try:
            with Folder(self._directory) as folder, folder.held(self._inodes) as files:
                if any(files.stamp(file).inode != inode for file, inode in self._inodes.items()):
                    raise FileNotFoundError(f"{self._prefix} was saved again")
                value: np.ndarray = read_values(files, self._index, [key], arrays.empty)[key]
                return value
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"{self._prefix} was removed or saved again since it was loaded. Load it again."
            ) from error
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{self._prefix} cannot be trusted: {error}") from error
        except OSError as error:
            raise unreadable(error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: object) -> bool:
        return name in self._keys

    def kinds(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """The types and shapes of the variables by name, without their values. Strings are of type `object`."""
        entries = {name: self._index.entries[key.encode()] for name, key in self._keys.items()}
        return {name: (arrays.dtype_of(entry.dtype), entry.shape) for name, entry in entries.items()}

    def __repr__(self) -> str:
        entries = {name: self._index.entries[key.encode()] for name, key in self._keys.items()}
        lines = [f"  {name}: {NAMES[entry.dtype]} {entry.shape}" for name, entry in entries.items()]
        more = [f"  and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
        return "\n".join([f"variables of {self._prefix}:", *lines[:_LINES], *more])


def names_in(index: Index) -> dict[str, str]:
    """The keys of the variables in a checkpoint, by name.

    If any key has TensorFlow's suffix of variables, only keys with it count. A checkpoint of TensorFlow 1 has none.
    """
    marked = [key for key in index.variables if key.endswith(SUFFIX) and key != COUNTER]
    return {key.removesuffix(SUFFIX): key for key in sorted(marked or index.variables)}
