"""The parts of a TensorFlow checkpoint of this package besides its variables: texts, and the state of objects."""

from __future__ import annotations

import numpy as np
from blake3 import blake3

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats import arrays, config, description
from keras_ckpt.formats.bundle_index import Index
from keras_ckpt.formats.bundle_reader import read_values
from keras_ckpt.formats.config import Config
from keras_ckpt.formats.damage import errors_as_damage
from keras_ckpt.formats.description import ASSET_LIMIT, Asset, Description
from keras_ckpt.formats.dtypes import STRING
from keras_ckpt.store.files import Folder

_STRING_OVERHEAD = 32
"""The most bytes that a string takes on disk besides its content: its length and two checksums."""


class BundleParts:
    """The parts of a checkpoint besides its variables.

    Args:
        folder: The directory of the checkpoint, open as long as the parts are read.
        index: The index of the checkpoint.

    Attributes:
        description: The description of the model, `None` if TensorFlow or an older version wrote the checkpoint.
        arrays: The arrays of the learned state of the model's objects.
        assets: The assets of that state.

    Raises:
        DamagedCheckpointError: A part cannot be read.
    """

    def __init__(self, folder: Folder, index: Index) -> None:
        self._folder = folder
        self._index = index
        self.description: Description | None = None
        if description.KEY in index.variables:
            self.description = description.decode(self.text(description.KEY))
        self.arrays, self.assets = self._read_learned()

    def config(self) -> Config | None:
        """The config of the model, `None` if TensorFlow or an older version wrote the checkpoint."""
        return config.decode(self.text(config.KEY)) if config.KEY in self._index.variables else None

    def text(self, key: str, asset: Asset | None = None) -> bytes:
        """Reads a string and compares it with its asset's size and digest. A string that is too long is not read."""
        name = key.encode()
        with errors_as_damage():
            entry = self._index.entries[name]
            if entry.dtype != STRING or entry.shape:
                raise DamagedCheckpointError(f"{key} is not a string")
            if entry.size > _STRING_OVERHEAD + (ASSET_LIMIT if asset is None else asset.size):
                raise DamagedCheckpointError(f"{key} has {entry.size} bytes, which are too many")
            text = bytes(read_values(self._folder, self._index, [name], arrays.empty)[name].item())
            if asset and (len(text), f"blake3:{blake3(text).hexdigest()}") != (asset.size, asset.digest):
                raise DamagedCheckpointError(f"{key} differs from its size or digest")
            return text

    def _read_learned(self) -> tuple[list[np.ndarray], list[bytes]]:
        """Reads and checks the arrays and the assets of the learned state of the model's objects."""
        objects = () if self.description is None else self.description.objects.values()
        assets = {asset.index: asset for each in objects for asset in each.assets.values()}
        numbers = {index for each in objects for index in each.values.values()}
        if assets.keys() != set(range(len(assets))) or numbers != set(range(len(numbers))):
            raise DamagedCheckpointError(
                "its description of the model refers to arrays or assets that it does not have"
            )
        texts = [self.text(description.asset_key(index), assets[index]) for index in range(len(assets))]
        keys = [description.value_key(index).encode() for index in range(len(numbers))]
        with errors_as_damage():
            values = read_values(self._folder, self._index, keys, arrays.empty)
        return [_as_array(values[key]) for key in keys], texts


def _as_array(array: np.ndarray) -> np.ndarray:
    """An array as it was saved: strings of a fixed size are read as objects."""
    return np.array(array.tolist()) if array.dtype == object else array
