"""JAX: the variables of Keras's JAX backend, whose values `fit` holds itself while it trains."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
import keras
import numpy as np

from keras_ckpt.model import keras_internals
from keras_ckpt.model.backends.arrays import *  # noqa: F403 - the rest of the backend
from keras_ckpt.model.backends.arrays import Tensor, attributes_of, bytes_of, children_in, small
from keras_ckpt.model.matching import Kind

VERSIONS = {"jax": jax.__version__}
PURGES_VARIABLES = True
"""Within an epoch `fit` holds the values, and the variables have none, so other threads cannot read them."""
COPIES_AT_ONCE = True
"""A value that is held makes the next step allocate memory, because the step cannot reuse the memory of the value."""
_PINNED = "pinned_host"
"""JAX's name of memory of the host into which an accelerator copies while it computes."""
FIXED = (jax.Array,)
"""The classes of objects that never change."""


class Reader:
    """Reads variables of a model, again and again, also where `fit` holds their values.

    Args:
        model: The model.
        variables: The variables by key.

    Attributes:
        small: The places of small variables when their values are packed, one after another.
        transfers: Whether the values that are read are copies on the way from an accelerator.

    Raises:
        ValueError: A part of a variable is in another process.
    """

    def __init__(self, model: Any, variables: Mapping[str, Any]) -> None:
        _refuse_several_processes(variables)
        self._model = model
        self._variables = variables
        self._places: dict[int, tuple[str, int]] | None = None
        self.small = small({key: kind_of(each) for key, each in variables.items()})
        self.transfers = has_accelerator()

    def read(self) -> dict[str, Tensor]:
        """Reads the present values of the variables.

        An array is the memory of its variable. While the array is held, JAX does not reuse the memory. On an
        accelerator the values are copied into pinned memory of the host. JAX donates no memory before its copy is made.
        """
        values = self._values()
        if self.transfers:
            places = {key: value.sharding.with_memory_kind(_PINNED) for key, value in values.items()}
            return jax.device_put(values, places)  # type: ignore[no-any-return]
        return {key: np.asarray(value) for key, value in values.items()}

    def _values(self) -> dict[str, jax.Array]:
        state = keras_internals.state_of_jax_fit(self._model)
        if state is None:
            return {key: keras_internals.value_of(each) for key, each in self._variables.items()}
        if self._places is None:
            self._places = keras_internals.places_in_jax_fit(self._model)
        values = {}
        for key, variable in self._variables.items():
            part, index = self._places.get(id(variable), ("", 0))
            held = state[part] if part else ()  # `evaluate` holds no optimizer
            values[key] = held[index] if held else keras_internals.value_of(variable)
        return values


def has_accelerator() -> bool:
    """Whether models are on an accelerator which copies into pinned memory of the host.

    The tests let the processor take this path. This package was never run beside an accelerator.
    """
    device = jax.devices()[0]
    return device.platform != "cpu" and _PINNED in {each.kind for each in device.addressable_memories()}


def _refuse_several_processes(variables: Mapping[str, Any]) -> None:
    for name, variable in variables.items():
        value = keras_internals.value_of(variable)
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            raise ValueError(
                f"{name} is spread over several processes. Received: {jax.process_count()} processes. keras_ckpt saves "
                "and restores models whose arrays are in one process. Save the model of a single process, or save with "
                "Orbax."
            )


def kind_of(variable: Any) -> Kind:
    """The shape of a variable, and the type of its values. Without `jax_enable_x64`, JAX has none of 64 bits."""
    dtype = keras.backend.standardize_dtype(variable.dtype)
    return Kind(tuple(variable.shape), jax.dtypes.canonicalize_dtype(dtype).name)


def size_of(variable: Any) -> int:
    """The bytes of a variable."""
    return bytes_of(kind_of(variable))


def synchronize(model: Any) -> None:
    """Gives the variables of a model the values that `fit` holds, before code of others looks at them."""
    model.jax_state_sync()


def assign(variable: Any, value: Tensor) -> None:
    """Gives a variable the memory of a value."""
    keras_internals.set_value(variable, jax.device_put(value))


def children(each: Any) -> Mapping[str, Any]:
    """The objects that TensorFlow would track in the attributes of another, by the names of the attributes."""
    return children_in(attributes_of(each))


def generators() -> dict[str, Any]:
    """The states of global generators of random numbers. JAX has none."""
    return {}


def set_generators(states: Mapping[str, Any]) -> None:
    """Does nothing: JAX has no global generators."""


def settings() -> dict[str, Any]:
    """The settings of JAX that decide the last bits of a result."""
    return {
        "JAX": jax.__version__,
        "devices": ", ".join(sorted(each.device_kind for each in jax.devices())),
        "64-bit types": bool(jax.config.jax_enable_x64),
        "precision of products": str(jax.config.jax_default_matmul_precision),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def module_state(layer: Any) -> dict[str, Any]:
    """The state of a layer as a module of PyTorch: there is none."""
    return {}


def state_dict_names(model: Any, names: Mapping[int, str]) -> dict[str, str]:
    """The names of a model's variables by the names in its `state_dict`: it has none."""
    return {}


def has_extra_state(layer: Any) -> bool:
    """Whether a layer wraps a module of PyTorch with more than variables and buffers: there is none."""
    return False
