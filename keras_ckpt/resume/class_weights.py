"""Weights of samples by their classes, as `fit(class_weight=...)` gives them."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np


class ClassWeights:
    """The weights of classes, by the numbers of the classes.

    Args:
        weights: The dict that is given to `fit`.

    Raises:
        ValueError: A key is no number.
    """

    def __init__(self, weights: Mapping[int, float]) -> None:
        if not all(isinstance(each, numbers.Integral) for each in weights):
            raise ValueError(f"class_weight expected a dict by the numbers of classes. Received: {weights!r}")
        ordered = sorted((int(number), float(weight)) for number, weight in weights.items())
        self._numbers = np.array([number for number, _ in ordered])
        self._weights = np.array([weight for _, weight in ordered], keras.config.floatx())
        self._shown = str(dict(ordered))

    def __str__(self) -> str:
        return self._shown

    def of(self, targets: np.ndarray) -> np.ndarray:
        """The weights of samples with these targets. A class without a weight has the weight 1."""
        classes = _classes(targets)
        places = np.searchsorted(self._numbers, classes).clip(max=len(self._numbers) - 1)
        known = self._numbers[places] == classes
        return np.where(known, self._weights[places], np.ones((), self._weights.dtype))

    def weigh(self, batch: Any) -> Any:
        """A batch of inputs and targets, with the weights of its samples.

        Raises:
            ValueError: The batch has weights already, or the targets are not one array.
        """
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
        if sample_weight is not None or not isinstance(y, np.ndarray):
            raise ValueError(
                "class_weight expected batches of (x, y) without sample_weight, where y is one array of classes. "
                f"Received: {keras.tree.map_structure(lambda each: each.shape, batch)}"
            )
        return x, y, self.of(y)


def _classes(targets: np.ndarray) -> np.ndarray:
    """The class numbers of targets, which are numbers, numbers with an axis of length 1, or probability vectors."""
    if targets.ndim > 1:
        targets = targets.squeeze(-1) if targets.shape[-1] == 1 else targets.argmax(-1)
    return np.round(targets).astype(np.int64)
