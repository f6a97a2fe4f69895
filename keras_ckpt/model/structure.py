"""The structure of a model: the parts whose change means other variables."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from keras_ckpt.model import parts
from keras_ckpt.model.backends import backend
from keras_ckpt.model.keras_internals import layers_of

_PARTS_OF_KERAS = keras.layers.Layer, keras.Variable


class Structure:
    """The structure of a model at one moment.

    Example:

    ```python
    structure = Structure(model, [model.optimizer], model.variables)
    structure.holds()
    ```

    Args:
        model: The model.
        owners: Its optimizers and losses.
        variables: The variables that are read.
    """

    def __init__(self, model: keras.Model, owners: Sequence[Any], variables: Sequence[Any]) -> None:
        self._model = model
        self._owners = owners
        self._variables = variables
        self._values = list(map(backend.storage_of, variables))
        # The parts are held, so that no new object gets the identity of a part.
        self._parts = _parts_of(model, owners)
        self._identities = list(map(id, self._parts))
        self._built = _built(owners)

    def holds(self) -> bool:
        """Whether the model still has the same parts, and the variables have the same values of the backend."""
        same = list(map(id, _parts_of(self._model, self._owners))) == self._identities
        return same and _built(self._owners) == self._built and self._reads_the_same()

    def _reads_the_same(self) -> bool:
        return all(map(operator.is_, map(backend.storage_of, self._variables), self._values))


def _built(owners: Iterable[Any]) -> list[bool]:
    """Whether each optimizer is built. A build may make no variable, so variables do not tell."""
    return [bool(getattr(each, "built", False)) for each in owners]


def _parts_of(model: keras.Model, owners: Iterable[Any]) -> list[Any]:
    """The variables of a model, its optimizers and its losses, and the objects whose change may mean new variables."""
    layers = layers_of(model)
    attributes = [each for layer in layers for each in vars(layer).values()]
    # Checked once for each class, because TensorFlow's check is slow.
    kinds = {kind for kind in set(map(type, attributes)) if issubclass(kind, backend.Tracked)}
    others = {kind for kind in kinds if not issubclass(kind, _PARTS_OF_KERAS)}  # the model does not list them
    found = [each for each in attributes if type(each) in others]
    holders = [each for each in found if not isinstance(each, backend.Variable | keras.optimizers.Optimizer)]
    found += [each for holder in holders for each in parts.tracked(holder).values()]
    found += parts.contents_of(layers)
    for owner in owners:
        found += owner.variables if isinstance(owner, keras.optimizers.Optimizer) else vars(owner).values()
    found += [each for layer in layers for each in backend.module_state(layer).values()]
    return [*layers, *found, *model.variables, *parts.states_of(layers), *model.metrics_variables]
