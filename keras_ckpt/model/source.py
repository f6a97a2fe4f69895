"""The protocol of an open checkpoint, from which a restore reads. Its variables have the names of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import keras
import numpy as np

from keras_ckpt.formats.description import Description
from keras_ckpt.model.backends import backend
from keras_ckpt.model.matching import Kind


class Source(Protocol):
    """An open checkpoint."""

    prefix: str
    """The path of the checkpoint, for messages."""
    description: Description | None
    """The description of the model, `None` if the checkpoint has none."""
    arrays: list[np.ndarray]
    """The arrays of the learned state of the model's objects."""
    assets: list[bytes]
    """The assets of that state."""
    unfit: Sequence[str]
    """Descriptions of the optimizers in the checkpoint that are skipped, because they do not fit the model's."""
    lacking: Sequence[str]
    """The names of the objects whose learned state the format of the checkpoint cannot hold."""

    @property
    def origin(self) -> str:
        """The kind of the checkpoint, for messages: the end of a sentence about it."""

    @property
    def lacks_seeds(self) -> bool:
        """Whether the checkpoint never has states of seed generators."""

    def kinds(self) -> Mapping[str, Kind]:
        """The kinds of the variables, by name."""

    def build_optimizers(self, model: keras.Model, wanted: Mapping[str, Any]) -> None:
        """Builds the optimizers of a model as in this checkpoint. An error of an optimizer is not damage.

        Args:
            model: The model.
            wanted: The model's variables by name.
        """

    def read(self, names: Sequence[str]) -> dict[str, backend.Tensor]:
        """Reads the values of variables, all before any is used, and checks digests and checksums."""
