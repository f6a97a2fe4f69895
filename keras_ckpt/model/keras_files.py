"""Keras's own files, `.keras`, `.weights.h5` and `.h5`: the state of a model at one moment, written later.

The content is the content that Keras writes, so `keras.models.load_model`, `model.load_weights` and h5py read it.
"""

from __future__ import annotations

from typing import Literal

import keras

from keras_ckpt.formats.keras_file import Tail, write_archive, write_hdf5
from keras_ckpt.model.keras_internals import written_by_keras
from keras_ckpt.store.files import Folder
from keras_ckpt.store.record import CheckpointFile

Kind = Literal["keras", "weights", "legacy"]
"""The kind of a file: `.keras`, `.weights.h5`, or the legacy `.h5` of a whole model."""


class FileState:
    """The state of a model, as one of Keras's own files has it.

    Example:

    ```python
    file = FileState(model, "keras").snapshot().write(folder, "best.keras", lambda size, digest: b"")
    ```

    Args:
        model: A built model.
        kind: The kind of the file.
    """

    def __init__(self, model: keras.Model, kind: Kind) -> None:
        self._model = model
        self._kind: Kind = kind

    def snapshot(self) -> FileSnapshot:
        """Takes a snapshot of the present state. Call it in the thread that trains."""
        return FileSnapshot(self._kind, written_by_keras(self._model, self._kind))


class FileSnapshot:
    """The state of a model at one moment, to be written into one file.

    Example:

    ```python
    snapshot = FileState(model, "weights").snapshot()
    file = snapshot.write(folder, "best.weights.h5", lambda size, digest: b"")
    ```

    Attributes:
        size: The approximate bytes of the file.
    """

    def __init__(self, kind: Kind, image: bytes) -> None:
        self.size = len(image)
        self._kind = kind
        self._image = image

    def write(self, folder: Folder, name: str, tail: Tail) -> CheckpointFile:
        """Writes the file with a tail, and makes it durable. Call it in any thread.

        Args:
            folder: Where to write.
            name: The name of the file. An existing file of that name is an error.
            tail: Makes the tail, from the size and the digest of all bytes before it. In a `.keras` file the tail has
                at most 65,535 bytes, and its size must not depend on the digest.

        Returns:
            The file, with the size and the digest of all its bytes.
        """
        write = write_archive if self._kind == "keras" else write_hdf5
        return write(folder, name, [memoryview(self._image)], tail)
