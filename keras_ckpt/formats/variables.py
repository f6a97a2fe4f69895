"""The variables of a checkpoint by name, as NumPy arrays that are read on access."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from keras_ckpt.errors import CheckpointNotFoundError, DamagedCheckpointError
from keras_ckpt.formats import arrays
from keras_ckpt.formats.bundle_index import Index, read_index
from keras_ckpt.formats.bundle_reader import read_values
from keras_ckpt.formats.damage import errors_as_damage
from keras_ckpt.formats.targets import Target, fill
from keras_ckpt.store.checks import unreadable
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord

if TYPE_CHECKING:
    from keras_ckpt.formats.keras_writer import Dataset

SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
"""The suffix that TensorFlow appends to a variable's name in a checkpoint."""
COUNTER = f"save_counter{SUFFIX}"
"""The key of TensorFlow's save counter, which is not part of a model."""
_LINES = 20


def load_variables(checkpoint: CheckpointRecord | CheckpointDirectory | str | os.PathLike[str]) -> Variables:
    """Loads the values of a checkpoint as NumPy arrays, without TensorFlow and without the model.

    The names are the names that `restore` matches. A file of Keras has its own names, such as `layers/dense/vars/0`.
    Each access reads a value. No file stays open.

    Example:

    ```python
    kernel = keras_ckpt.load_variables(runs.best())["model/dense/kernel"]
    ```

    Args:
        checkpoint: A record, a directory (its newest checkpoint), or the path of a directory or a checkpoint. A
            checkpoint that TensorFlow wrote is accepted too, and a `.keras`, `.weights.h5` or `.h5` file.

    Returns:
        A read-only mapping of names to arrays. `ml_dtypes` has the types that NumPy lacks, such as `bfloat16`.

    Raises:
        DamagedCheckpointError: The checkpoint cannot be trusted.
        CheckpointNotFoundError: There is no such checkpoint.
    """

    def read(files: Folder, name: str, record: CheckpointRecord | None) -> Variables:
        values = values_in_file(files, name, record) if files.series.template else values_in_bundle(files, name, record)
        return Variables(files, name, values)

    return read_checkpoint(checkpoint, read)


class Variables(Mapping[str, np.ndarray]):
    """The variables of a checkpoint by name: a read-only mapping to NumPy arrays.

    Each access reads a value from disk into a new array. In a TensorFlow checkpoint the value's checksum in the index
    is compared. The digest of the index was compared when the checkpoint was loaded. So each value is verified,
    although the rest of its file is not read. A file of Keras has no checksums of values, so the whole file was
    compared with its digest when it was loaded.

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

    def __init__(self, files: Folder, name: str, values: Values) -> None:
        self._directory = files.path
        self._prefix = os.path.join(files.path, name)
        self._values = values
        self._stamps = {file: files.stamp(file) for file in values.files}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._values.kinds:
            raise KeyError(name)
        try:
            with Folder(self._directory) as folder, folder.held(self._stamps) as files:
                if any(files.stamp(file) != stamp for file, stamp in self._stamps.items()):
                    raise FileNotFoundError(f"{self._prefix} was saved again")
                return self._values.read(files, name)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(
                f"{self._prefix} was removed or saved again since it was loaded. Load it again."
            ) from error
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(f"{self._prefix} cannot be trusted: {error}") from error
        except OSError as error:
            raise unreadable(error) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._values.kinds)

    def __len__(self) -> int:
        return len(self._values.kinds)

    def __contains__(self, name: object) -> bool:
        return name in self._values.kinds

    def kinds(self) -> Mapping[str, Kind]:
        """The types and shapes of the variables by name, without their values. Strings are of type `object`."""
        return self._values.kinds

    @property
    def weights(self) -> Sequence[str]:
        """The names of the model's own variables, without those of its optimizer and its metrics."""
        return self._values.weights

    def __repr__(self) -> str:
        lines = [f"  {name}: {kind.dtype} {kind.shape}" for name, kind in self.kinds().items()]
        more = [f"  and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
        return "\n".join([f"variables of {self._prefix}:", *lines[:_LINES], *more])


class Kind(NamedTuple):
    """The type and the shape of a value. Strings are of type `object`."""

    dtype: np.dtype
    shape: tuple[int, ...]


class Values(NamedTuple):
    """The values of a checkpoint, which are read when they are needed.

    Attributes:
        files: The names of the files that have them.
        kinds: Their types and shapes by name.
        weights: The names of the model's own, without those of its optimizer and its metrics.
        read: Reads a value from a folder with the files.
        places: The digest of the file that has a value, and the value's place in the file, by name. Two values of one
            kind with equal places are equal to the bit. A value without a digest has no place.
    """

    files: Collection[str]
    kinds: Mapping[str, Kind]
    weights: Sequence[str]
    read: Callable[[Folder, str], np.ndarray]
    places: Mapping[str, tuple[str, int]] = MappingProxyType({})

    @property
    def own(self) -> Sequence[str]:
        """The names of the model's own. In a checkpoint of TensorFlow, all that may be: no name may tell them."""
        return self.weights or [name for name in self.kinds if not is_of_optimizer(name)]


def values_in_bundle(files: Folder, name: str, record: CheckpointRecord | None) -> Values:
    """The values of a TensorFlow checkpoint."""
    digested = record.files if record else ()
    return values_of(read_index(files, name, digested), digested)


def values_of(index: Index, digested: Iterable[CheckpointFile] = ()) -> Values:
    """The values of a TensorFlow checkpoint by its index and the files whose digests are known."""
    keys = {name: key.encode() for name, key in names_in(index).items()}
    entries = {name: index.entries[key] for name, key in keys.items()}

    def read(files: Folder, name: str) -> np.ndarray:
        value: np.ndarray = read_values(files, index, [keys[name]], arrays.empty)[keys[name]]
        return value

    kinds = {name: Kind(arrays.dtype_of(entry.dtype), entry.shape) for name, entry in entries.items()}
    weights = [name for name in kinds if name.startswith("model/")]
    digests = {file.name: file.digest for file in digested}
    places = {
        name: (digests[index.files[entry.shard]], entry.offset)
        for name, entry in entries.items()
        if not entry.slices and index.files[entry.shard] in digests
    }
    return Values(index.files.values(), kinds, weights, read, places)


def values_in_file(files: Folder, name: str, record: CheckpointRecord | None) -> Values:
    """The values of a file of Keras."""
    from keras_ckpt.formats.keras_reader import read_verified  # the other checkpoints need no h5py

    with errors_as_damage():
        return values_at(name, read_verified(files, name, record).datasets)


def values_at(file: str, datasets: Mapping[str, Dataset]) -> Values:
    """The values at places in a file of Keras."""

    def read(files: Folder, name: str) -> np.ndarray:
        each = datasets[name]
        array = np.empty(each.shape, each.dtype)
        fill(files, [Target(name.encode(), file, each.offset, array.reshape(-1).view(np.uint8).data, None)])
        return array

    kinds = {name: Kind(each.dtype, each.shape) for name, each in datasets.items()}
    return Values([file], kinds, [name for name in kinds if not is_of_optimizer(name)], read)


def is_of_optimizer(path: str) -> bool:
    """Whether a path in a file of Keras leads to an optimizer, of the model or of a model in it."""
    return not {"optimizer", "optimizer_weights"}.isdisjoint(path.split("/"))


def names_in(index: Index) -> dict[str, str]:
    """The keys of the variables in a checkpoint, by name.

    If any key has TensorFlow's suffix of variables, only keys with it count. A checkpoint of TensorFlow 1 has none.
    """
    marked = [key for key in index.variables if key.endswith(SUFFIX) and key != COUNTER]
    return {key.removesuffix(SUFFIX): key for key in sorted(marked or index.variables)}
