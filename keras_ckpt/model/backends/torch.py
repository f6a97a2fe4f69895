"""PyTorch: the variables of Keras's PyTorch backend, which change in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np
import torch

from keras_ckpt.model import keras_internals
from keras_ckpt.model.backends.arrays import *  # noqa: F403 - the rest of the backend
from keras_ckpt.model.backends.arrays import Tensor, attributes_of, bytes_of, children_in, small
from keras_ckpt.model.matching import Kind

VERSIONS = {"torch": str(torch.__version__)}
Variable = torch.nn.Parameter
"""A variable that Keras does not know, for instance of a module in a list. The search for unsaved state finds it."""
PURGES_VARIABLES = False
COPIES_AT_ONCE = True
"""The next step changes the memory of the values in place."""
FIXED = torch.dtype, torch.device
"""The classes of objects that never change."""
_WITHOUT_NUMPY = {
    torch.bfloat16: (torch.int16, np.dtype(ml_dtypes.bfloat16)),
    torch.float8_e4m3fn: (torch.int8, np.dtype(ml_dtypes.float8_e4m3fn)),
    torch.float8_e5m2: (torch.int8, np.dtype(ml_dtypes.float8_e5m2)),
}
"""The types that NumPy lacks, each with an integer of PyTorch of its size, and with the type of `ml_dtypes`."""
_OF_ML_DTYPES = {ours: theirs for theirs, (_, ours) in _WITHOUT_NUMPY.items()}


class Reader:
    """Reads variables of a model, again and again.

    Args:
        model: The model.
        variables: The variables by key.

    Attributes:
        small: The places of small variables when their values are packed, one after another.
        transfers: Whether the values that are read are copies on the way from an accelerator.
    """

    def __init__(self, model: Any, variables: Mapping[str, Any]) -> None:
        self._variables = variables
        self.small = small({key: kind_of(each) for key, each in variables.items()})
        self._stream = _stream_beside(keras_internals.value_of(each) for each in variables.values())
        self.transfers = self._stream is not None

    def read(self) -> dict[str, Any]:
        """Reads the present values of the variables, as arrays or as objects of which NumPy makes arrays.

        An array is the memory of its variable, and changes with it. Values on a CUDA device are copied into pinned
        memory of the host by a stream of its own. The next step waits for the stream, and `fit` does not.
        """
        tensors = {key: keras_internals.value_of(each).detach() for key, each in self._variables.items()}
        if self._stream is None:
            return {key: _array(tensor) for key, tensor in tensors.items()}
        return _transfers(tensors, self._stream)


def _stream_beside(tensors: Iterable[torch.Tensor]) -> torch.cuda.Stream | None:
    """A stream for copies beside the training, where all tensors are on one CUDA device; `None` elsewhere.

    This package was never run beside a CUDA device.
    """
    devices = {each.device for each in tensors}
    if len(devices) != 1 or (device := devices.pop()).type != "cuda":
        return None
    return torch.cuda.Stream(device)


def _transfers(tensors: Mapping[str, torch.Tensor], stream: torch.cuda.Stream) -> dict[str, _Transfer]:
    training = torch.cuda.current_stream(stream.device)
    stream.wait_stream(training)
    with torch.cuda.stream(stream):
        copies = {key: _pinned(tensor) for key, tensor in tensors.items()}
    training.wait_stream(stream)
    copied = stream.record_event()
    return {key: _Transfer(copy, copied) for key, copy in copies.items()}


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


class _Transfer:
    """A copy that a stream makes in memory of the host. NumPy waits for the copy."""

    def __init__(self, copy: torch.Tensor, copied: torch.cuda.Event) -> None:
        self._copy, self._copied = copy, copied

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        self._copied.synchronize()
        return _array(self._copy)


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a tensor; a copy of it, where that is not the memory of the processor."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype in _WITHOUT_NUMPY:
        integer, dtype = _WITHOUT_NUMPY[tensor.dtype]
        found: np.ndarray = tensor.view(integer).numpy().view(dtype)
        return found
    plain: np.ndarray = tensor.numpy()
    return plain


def kind_of(variable: Any) -> Kind:
    """The shape of a variable, and the type of its values. Keras has values of uint32 as int64 on PyTorch."""
    value = keras_internals.value_of(variable)
    dtype = variable.dtype if value is None else value.dtype
    return Kind(tuple(variable.shape), keras.backend.standardize_dtype(dtype))


def size_of(variable: Any) -> int:
    """The bytes of a variable."""
    return bytes_of(kind_of(variable))


def synchronize(model: Any) -> None:
    """Does nothing: the variables always have their values."""


def assign(variable: Any, value: Tensor) -> None:
    """Copies a value into a variable."""
    if value.dtype in _OF_ML_DTYPES:
        tensor = torch.from_numpy(value.view(f"i{value.dtype.itemsize}")).view(_OF_ML_DTYPES[value.dtype])
    else:
        tensor = torch.from_numpy(value)
    if isinstance(variable, torch.Tensor):
        with torch.no_grad():
            variable.copy_(tensor)
    else:
        keras_internals.set_value(variable, tensor)


def module_state(layer: keras.Layer) -> dict[str, Any]:
    """The variables and the buffers that a layer has as a module of PyTorch, by the names of a `state_dict`.

    Keras knows the parameters of a module that it wraps as variables, but neither their names nor the buffers.
    """
    transient = layer._non_persistent_buffers_set  # noqa: SLF001 - a `state_dict` of a layer has its variables too
    found = {name: each for name, each in layer.named_buffers(recurse=False) if name not in transient}
    if isinstance(layer, keras.layers.TorchModuleWrapper):
        tensors = {id(keras_internals.value_of(each)): each for each in layer.variables}
        tensors |= {id(each): each for each in layer.module.buffers()}
        found |= {name: tensors[id(each)] for name, each in _entries(layer) if id(each) in tensors}
    return found


def state_dict_names(model: Any, names: Mapping[int, str]) -> dict[str, str]:
    """The names of a model's variables by the names in its `state_dict`, which may have a variable several times.

    Args:
        model: The model.
        names: The names of the variables and buffers of the model, by identity.
    """
    layers = keras_internals.layers_of(model)
    held = [*model.variables, *(each for layer in layers for each in module_state(layer).values())]
    tensors = {id(keras_internals.value_of(each)): names[id(each)] for each in held}
    entries = model.state_dict(keep_vars=True).items()
    return {name: tensors[id(each)] for name, each in entries if id(each) in tensors}


def has_extra_state(layer: Any) -> bool:
    """Whether the `state_dict` of a wrapped module has more than variables and buffers."""
    if not isinstance(layer, keras.layers.TorchModuleWrapper):
        return False
    known = module_state(layer)
    return any(name not in known for name, _ in _entries(layer))


def _entries(wrapper: Any) -> Iterable[tuple[str, Any]]:
    """The entries of the `state_dict` of a wrapped module, uncopied."""
    return wrapper.module.state_dict(keep_vars=True).items()  # type: ignore[no-any-return]


def children(each: Any) -> Mapping[str, Any]:
    """The objects that TensorFlow would track in the attributes of another, by the names of the attributes."""
    modules = each._modules if isinstance(each, keras.Layer) else {}  # noqa: SLF001 - `named_children` skips duplicates
    return children_in({**attributes_of(each), **modules})


def generators() -> dict[str, Any]:
    """The states of the global generators of random numbers, as arrays: of the processor, and of each CUDA device."""
    return {
        "torch": torch.get_rng_state().numpy(),
        "cuda": [state.numpy() for state in torch.cuda.get_rng_state_all()],
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """Sets each generator to the state that `generators` returned. Ignores the states of other generators."""
    if (state := states.get("torch")) is not None:
        torch.set_rng_state(torch.from_numpy(state))
    for device, state in zip(range(torch.cuda.device_count()), states.get("cuda", ()), strict=False):
        torch.cuda.set_rng_state(torch.from_numpy(state), device)


def settings() -> dict[str, Any]:
    """The settings of PyTorch that decide the last bits of a result."""
    return {
        "PyTorch": str(torch.__version__),
        "devices": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "cpu",
        "threads of an operation": torch.get_num_threads(),
        "deterministic operations": torch.are_deterministic_algorithms_enabled(),
        "precision of products": torch.get_float32_matmul_precision(),
    }
