"""TensorFlow: the variables of Keras's TensorFlow backend, their memory, and the objects that TensorFlow tracks."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import numbers
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import tensorflow as tf

# No public operation reads many variables in one call, and the calls are what a snapshot costs. The generator of
# TensorFlow that seeds eager operations has no public name.
from tensorflow.python.eager import context, execute

# TensorFlow has a public function that makes operations deterministic, and none that says whether they are.
from tensorflow.python.framework.config import is_op_determinism_enabled

from keras_ckpt.formats import arrays
from keras_ckpt.formats.arena import Packed
from keras_ckpt.model.keras_internals import value_of
from keras_ckpt.model.matching import Kind

VERSIONS = {"tensorflow": tf.__version__}
PURGES_VARIABLES = False
COPIES_AT_ONCE = False
"""A value that is held does not change: TensorFlow copies it before it changes the variable."""
Tensor: TypeAlias = tf.Tensor
Variable: TypeAlias = tf.Variable
Table: TypeAlias = tf.lookup.experimental.MutableHashTable | tf.lookup.experimental.DenseHashTable
Module: TypeAlias = tf.Module
Tracked = tf.Module.__mro__[-2]
"""The class of all that TensorFlow tracks, which has no public name."""
OutOfMemory = tf.errors.ResourceExhaustedError
FIXED = tf.DType, tf.Tensor, tf.data.Dataset
"""The classes of objects that never change."""
OF_THE_PROCESS = (tf.summary.SummaryWriter,)
"""The classes of objects that belong to a process."""

_NO_NUMBERS = (tf.string, tf.resource, tf.variant)
_SMALL, _MOST_PACKED = 1 << 16, 16 << 20
"""Values of fewer bytes are packed, up to so many bytes in all."""
_EMPTY = {
    dtype.as_datatype_enum: dtype
    for dtype in (
        tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64, tf.complex128, tf.bool,
        tf.int8, tf.int16, tf.int32, tf.int64, tf.uint8, tf.uint16, tf.uint32, tf.uint64,
    )
}  # fmt: skip
"""The types of which TensorFlow allocates tensors that are not filled yet."""


class Reader:
    """Reads variables of a model, those of a device in one call, again and again.

    Args:
        model: The model.
        variables: The variables by key.

    Attributes:
        small: The places of small variables when their values are packed, one after another.
        transfers: Whether the values that are read are copies on the way from an accelerator: they never are.
    """

    transfers = False

    def __init__(self, model: Any, variables: Mapping[str, Any]) -> None:
        values = {key: value_of(variable) for key, variable in variables.items()}
        devices: dict[str, dict[str, Variable]] = collections.defaultdict(dict)
        self._distributed: dict[str, Variable] = {}
        for key, variable in values.items():
            if isinstance(variable, tf.distribute.DistributedValues):
                self._distributed[key] = variable
            else:
                devices[variable.device][key] = variable
        self._calls = [_Call(group) for group in devices.values()]
        self.small = _small(values)

    def read(self) -> dict[str, Tensor]:
        """Reads the present values of the variables.

        A tensor is the memory of its variable. TensorFlow copies the memory before it changes the variable.
        """
        values: dict[str, Tensor] = {}
        for call in self._calls:
            values.update(zip(call.keys, call.run(), strict=True))
        return values | {key: variable.read_value() for key, variable in self._distributed.items()}


class _Call:
    """One operation that reads many variables of a device."""

    def __init__(self, variables: Mapping[str, Variable]) -> None:
        self.keys = tuple(variables)
        self._handles = [each.handle for each in variables.values()]
        types = [each.dtype.as_datatype_enum for each in variables.values()]
        self._attributes = ("N", len(types), "dtypes", types)

    def run(self) -> Sequence[Tensor]:
        found: Sequence[Tensor] = execute.execute(
            b"_ReadVariablesOp", len(self.keys), self._handles, self._attributes, context.context()
        )
        return found


def _small(variables: Mapping[str, Variable]) -> Mapping[str, Packed]:
    """The variables with small values that are packed, and their places."""
    found, end = {}, 0
    for key, variable in variables.items():
        dtype, shape = variable.dtype, variable.shape
        if dtype in _NO_NUMBERS or not shape.is_fully_defined():
            continue
        size = shape.num_elements() * dtype.size
        if size < _SMALL and end + size <= _MOST_PACKED:
            found[key] = Packed(key.encode(), dtype.as_datatype_enum, tuple(shape), end, size)
            end += size
    return found


def kind_of(variable: Any) -> Kind:
    """The shape and the type of a variable of TensorFlow or Keras."""
    if isinstance(variable.dtype, str):
        return Kind(tuple(variable.shape), variable.dtype)
    shape = tf.TensorShape(variable.shape)
    return Kind(None if shape.rank is None else tuple(shape), tf.as_dtype(variable.dtype).name)


def size_of(variable: Any) -> int:
    """The bytes of a variable as it is now."""
    variable = value_of(variable)
    elements = tf.TensorShape(variable.shape).num_elements()
    return int(tf.size(variable) if elements is None else elements) * int(variable.dtype.size)


def array_of(value: Any) -> np.ndarray:
    """The memory of a tensor; a copy of it, where that is not the memory of the processor."""
    try:
        return np.asarray(value)
    except ValueError:  # NumPy has no scalars of types that are not its own
        return np.asarray(tf.reshape(value, [1])).reshape([])


def allocate(dtype: int, shape: tuple[int, ...]) -> tuple[Any, memoryview]:
    """Allocates a tensor to be filled. A variable that it is assigned to takes over its memory.

    Args:
        dtype: The number of its type.
        shape: Its shape.

    Returns:
        The tensor, an array where TensorFlow gives none, and its memory.
    """
    if dtype not in _EMPTY:
        return arrays.empty(dtype, shape)
    with tf.device("CPU"):
        tensor = tf.raw_ops.Empty(shape=_shape(shape), dtype=_EMPTY[dtype], init=False)
    array = array_of(tensor)
    address = array.__array_interface__["data"][0]
    return tensor, memoryview((ctypes.c_ubyte * array.nbytes).from_address(address)).cast("B")


@functools.lru_cache  # a model has few, and to make one takes as long as the rest
def _shape(shape: tuple[int, ...]) -> Tensor:
    return tf.constant(shape, tf.int32, (len(shape),))


def tensor_of(value: Any) -> Tensor:
    """A tensor of an array; a tensor itself."""
    if isinstance(value, tf.Tensor):
        return value
    with tf.device("CPU"):
        return tf.constant(value)


def synchronize(model: Any) -> None:
    """Does nothing: the variables always have their values."""


def assign(variable: Any, value: Tensor) -> None:
    """Gives a variable the memory of a value."""
    variable = value_of(variable)
    if isinstance(variable, tf.distribute.DistributedValues):
        variable.assign(value, read_value=False)
    else:
        tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


def storage_of(variable: Any) -> Any:
    """The object that holds the values of a variable for its whole life."""
    return value_of(variable)


def scope(model: Any) -> contextlib.AbstractContextManager[Any]:
    """The scope in which the variables of a model are made."""
    found: contextlib.AbstractContextManager[Any] = model.distribute_strategy.scope()
    return found


class VariableLimit:
    """A limit of the memory of new variables. A variable above it is refused before it takes memory.

    Example:

    ```python
    memory = VariableLimit(1 << 30)
    with memory.scope():
        model = build()
    ```

    Args:
        limit: The most bytes of all variables.

    Attributes:
        is_exceeded: Whether a variable was refused.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.is_exceeded = False
        self._size = 0

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """A scope in which the limit holds."""

        def create(creator: Callable[..., Variable], **arguments: Any) -> Variable:
            self._size += _size_of_value(arguments.get("initial_value"))
            if self._size > self.limit:
                self.is_exceeded = True
                raise MemoryError(f"the variables have more than {self.limit} bytes")
            return creator(**arguments)

        with tf.variable_creator_scope(create):
            yield


def _size_of_value(value: Any) -> int:
    """The bytes of an initial value. The value of an initializer is not computed."""
    if callable(value):
        try:
            with tf.Graph().as_default():
                value = tf.convert_to_tensor(value())
        except Exception:  # noqa: BLE001 - a user's initializer may run outside of graphs alone
            return 0
    value = tf.convert_to_tensor(value) if not hasattr(value, "shape") else value
    return int(tf.TensorShape(value.shape).num_elements() or 0) * int(tf.as_dtype(value.dtype).size)


def is_floating(value: Tensor) -> bool:
    """Whether the elements of a tensor are fractions."""
    return bool(value.dtype.is_floating)


def is_finite(value: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in a tensor."""
    if not value.dtype.is_floating:
        return True
    if value.dtype in (tf.float32, tf.float64):
        # The fastest look at the values; a sum that overflows proves nothing.
        array = np.asarray(value).reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.dot(array, array)):
                return True
    if value.dtype.size == 1:
        value = tf.cast(value, tf.float32)  # TensorFlow has no arithmetic for float8
    return bool(tf.math.is_finite(tf.reduce_sum(value))) or bool(tf.reduce_all(tf.math.is_finite(value)))


def merged(kernel: Tensor, first: Tensor, second: Tensor, scale: float) -> Tensor:
    """A kernel with a low-rank update of it, the product of two factors."""
    return kernel + tf.cast(tf.matmul(first, second) * scale, kernel.dtype)


def zeros(kind: Kind) -> Tensor:
    """Zeros of a shape and a type."""
    return tf.zeros(kind.shape, kind.dtype)


def children(each: Any) -> Mapping[str, Any]:
    """The objects that TensorFlow tracks in the attributes of another, by the names of the attributes."""
    found: Mapping[str, Any] = tf.train.TrackableView.children(each)
    return found


def generators() -> dict[str, Any]:
    """The states of the global generators of random numbers, as plain values.

    Generators inside operations, such as an unseeded `tf.random.uniform` in a graph, have no readable state. A Python
    generator seeds operations that run eagerly, if the script has called `tf.random.set_seed`.
    """
    return {
        "tensorflow": None if (generator := _global_generator()) is None else generator.state.numpy(),
        "operations": _operations_state(),
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """Sets each generator to the state that `generators` returned. Ignores the states of other generators."""
    state = states.get("tensorflow")
    if state is not None and (generator := _global_generator()) is not None:
        generator.state.assign(state)
    if (operations := states.get("operations")) is not None:
        tf.random.set_seed(operations["seed"])
        _eager_generator().setstate(operations["generator"])


def _operations_state() -> dict[str, Any] | None:
    """The global seed and the generator that seed TensorFlow's eager operations, `None` without a global seed."""
    seed = context.global_seed()
    if not isinstance(seed, numbers.Integral):
        return None
    return {"seed": int(seed), "generator": _eager_generator().getstate()}


def _eager_generator() -> random.Random:
    """The generator that seeds eager operations. It exists once `tf.random.set_seed` was called."""
    generator: random.Random = context.context()._rng  # noqa: SLF001
    return generator


def _global_generator() -> tf.random.Generator | None:
    """TensorFlow's global generator, `None` if operations are deterministic and the script has not set one."""
    try:
        return tf.random.get_global_generator()
    except RuntimeError:
        return None


def settings() -> dict[str, Any]:
    """The settings of TensorFlow that decide the last bits of a result."""
    return {
        "TensorFlow": tf.__version__,
        "threads of an operation": tf.config.threading.get_intra_op_parallelism_threads(),
        "threads of operations": tf.config.threading.get_inter_op_parallelism_threads(),
        "deterministic operations": is_op_determinism_enabled(),
    }


def build_metrics(model: Any, element_spec: Any) -> None:
    """Makes the variables that metrics have from their first batch on, by tracing a step that is not run."""
    with contextlib.suppress(Exception):  # TensorFlow may be unable to trace the step of a user's model
        tf.function(model.train_step).get_concrete_function(element_spec)


def module_state(layer: Any) -> dict[str, Any]:
    """The state of a layer as a module of PyTorch: there is none."""
    return {}


def state_dict_names(model: Any, names: Mapping[int, str]) -> dict[str, str]:
    """The names of a model's variables by the names in its `state_dict`: it has none."""
    return {}


def has_extra_state(layer: Any) -> bool:
    """Whether a layer wraps a module of PyTorch with more than variables and buffers: there is none."""
    return False
