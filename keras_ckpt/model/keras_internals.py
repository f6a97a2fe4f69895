"""Every private name of Keras that this package needs, behind a function with a public name.

A test calls each function, and names the one whose private name has changed in Keras.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, TypeAlias

import keras

# Keras has no public name for the generator of unseeded keras.random functions, nor for a check whether it exists.
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute

# Keras's public functions write files to paths alone.
from keras.src.legacy.saving import legacy_h5_format
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator
from keras.src.saving import saving_lib

# Keras's public switch of safe mode holds for the whole program.
from keras.src.saving.serialization_lib import SafeModeScope

# Keras tells no callback whether the data of a fit is read by index.
from keras.src.trainers.data_adapters import data_adapter
from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.utils import module_utils

from keras_ckpt.formats.keras_writer import hdf5_in_memory

DataAdapter: TypeAlias = data_adapter.DataAdapter
"""The class of objects that `fit` reads batches from, through a method for each backend."""


def layers_of(model: keras.Model) -> list[Any]:
    """The model and all layers in it, nested layers too."""
    return list(model._flatten_layers(include_self=True, recursive=True))  # noqa: SLF001


def trained_by(optimizer: Any) -> list[Any]:
    """The variables that an optimizer was built for, in its order."""
    return list(optimizer._trainable_variables) if optimizer.built else []  # noqa: SLF001


def value_of(variable: Any) -> Any:
    """The value of a variable in the backend."""
    # The public property looks for scopes first, which is slower than reading the variable.
    return variable._value if isinstance(variable, keras.Variable) else variable  # noqa: SLF001


def model_of(callback: keras.callbacks.Callback) -> keras.Model:
    """The model of a callback. On JAX, Keras's own property gives the variables their values at each access."""
    return callback._model if keras.backend.backend() == "jax" else callback.model  # noqa: SLF001


def set_value(variable: keras.Variable, value: Any) -> None:
    """Sets the value of a variable to a value of the backend, of its shape and type."""
    variable._direct_assign(value)  # noqa: SLF001


_PARTS_OF_JAX_FIT = "trainable_variables", "non_trainable_variables", "optimizer_variables", "metrics_variables"


def state_of_jax_fit(model: keras.Model) -> Mapping[str, Sequence[Any]] | None:
    """The values of variables that a `fit` on JAX holds, by part; `None` if the variables have their values."""
    state: Mapping[str, Sequence[Any]] | None = getattr(model, "_jax_state", None)
    if not state or model._jax_state_synced:  # noqa: SLF001
        return None
    return {part: state.get(part) or () for part in _PARTS_OF_JAX_FIT}


def places_in_jax_fit(model: keras.Model) -> dict[int, tuple[str, int]]:
    """The part and the place of each variable in that state, by the identity of the variable."""
    optimizer = getattr(model, "optimizer", None)
    parts = (
        model.trainable_variables,
        model.non_trainable_variables,
        optimizer.variables if optimizer is not None else (),
        model.metrics_variables,
    )
    return {
        id(variable): (part, place)
        for part, variables in zip(_PARTS_OF_JAX_FIT, parts, strict=True)
        for place, variable in enumerate(variables)
    }


_checking = threading.RLock()


@contextlib.contextmanager
def new_variables_checked(check: Callable[[tuple[int, ...], str], None]) -> Iterator[None]:
    """Calls a function with the shape and the type of each new variable, before the variable takes memory."""
    kind = keras.Variable
    with _checking:
        before = kind._initialize_with_initializer  # noqa: SLF001

        def initialize(self: Any, initializer: Any) -> None:
            check(tuple(self._shape), self._dtype)
            before(self, initializer)

        kind._initialize_with_initializer = initialize  # noqa: SLF001
        try:
            yield
        finally:
            kind._initialize_with_initializer = before  # noqa: SLF001


def unlock(layer: Any) -> None:
    """Lets a built layer add variables."""
    layer._tracker.unlock()  # noqa: SLF001


def metrics_given(metric: Any) -> list[Any]:
    """The metrics given to `compile`, from the compile metric that holds them before Keras builds them."""
    given = getattr(metric, "_user_metrics", None), getattr(metric, "_user_weighted_metrics", None)
    return [each for each in keras.tree.flatten(given) if each is not None]


def direction_of(metric: Any) -> str | None:
    """The better direction of a metric: `"up"` or `"down"`, `None` if Keras does not know."""
    direction: str | None = getattr(metric, "_direction", None)
    return direction


def loss_weights(model: keras.Model) -> Any:
    """The loss weights given to `compile`. Keras's public way would serialize all arguments of `compile`."""
    return getattr(getattr(model, "_compile_loss", None), "_user_loss_weights", None)


def arguments_of(loss: Any) -> Mapping[str, Any]:
    """The arguments of the function that a loss of Keras wraps. The config of some losses lacks them."""
    found: Mapping[str, Any] = getattr(loss, "_fn_kwargs", {})
    return found


def begin_with_epoch(model: keras.Model, epoch: int | None) -> None:
    """Makes the next `fit` begin with an epoch; `None` undoes it. Keras's BackupAndRestore uses the same attribute."""
    model._initial_epoch = epoch  # noqa: SLF001


AVERAGES_AFTER_ERRORS = keras.backend.backend() == "jax"
"""Whether `fit` replaces the weights by the averages of the optimizer after an error too, not at its end alone."""


def no_step(logs: Any, arguments: Sequence[Any]) -> Any:
    """The result of a train function that trains nothing. On JAX a train function takes the state of the model too.

    Args:
        logs: The logs of the step.
        arguments: The arguments of the train function.
    """
    return (logs, arguments[0]) if keras.backend.backend() == "jax" else logs


def seed_of_random() -> Any:
    """The state of the generator of unseeded functions of `keras.random`, `None` if there is no such generator yet."""
    # Read it without creating a generator: Keras would draw the seed of a new generator from Python's.
    generator = get_global_attribute(GLOBAL_SEED_GENERATOR)
    return None if generator is None else generator.state


def set_seed_of_random(state: Any) -> None:
    """Sets the state of that generator; `None` removes the generator."""
    if state is None:
        set_global_attribute(GLOBAL_SEED_GENERATOR, None)
    else:
        global_seed_generator().state.assign(state)


_BESIDE = ("y", "sample_weight", "class_weight")


@dataclasses.dataclass(frozen=True)
class FitInProgress:
    """The arguments and data of a `fit` in progress, which Keras does not pass to callbacks.

    Attributes:
        callbacks: The list of callbacks that calls the callback; `None` if the user calls the callback directly.
        steps_per_epoch: The number of batches after which an epoch ends; `None` if an epoch ends with the data.
        batches: The number of batches of the data; `None` if it is endless or not known.
        adapter: The object through which `fit` reads its data; `None` if a user's training loop is in progress.
        typed: The data and its order as arguments of a dataset: `x, y, batch_size=32, shuffle=True`.
        beside: The names of the arguments of `fit` that describe the data beside `x`.
    """

    callbacks: keras.callbacks.CallbackList | None = None
    steps_per_epoch: int | None = None
    batches: int | None = None
    adapter: DataAdapter | None = None
    typed: str = "x, y, ..."
    beside: tuple[str, ...] = ()

    @property
    def is_known(self) -> bool:
        """Whether Keras's `fit` is in progress, and not a user's training loop."""
        return self.adapter is not None


def fit_in_progress(callback: keras.callbacks.Callback | None = None) -> FitInProgress:
    """Finds the `fit` that calls, by one walk up the stack.

    Args:
        callback: The callback whose list of callbacks to find too.
    """
    callbacks, frame = None, inspect.currentframe()
    while frame is not None:
        # Reading f_locals makes a frame keep the values of all its variables, so few frames are read.
        if callback is not None and callbacks is None and frame.f_code.co_varnames[:1] == ("self",):
            callbacks = _list_in(frame, callback)
        if frame.f_code.co_name == "fit" and {"steps_per_epoch", "epoch_iterator"} <= {*frame.f_locals}:
            steps = frame.f_locals["steps_per_epoch"] or keras.config.max_steps_per_epoch()
            adapter = frame.f_locals["epoch_iterator"].data_adapter
            typed = _typed(frame.f_locals, adapter)
            beside = [name for name in _BESIDE if frame.f_locals.get(name) is not None]
            return FitInProgress(callbacks, steps, adapter.num_batches, adapter, typed, tuple(beside))
        frame = frame.f_back
    return FitInProgress(callbacks)


def _typed(given: Mapping[str, Any], adapter: Any) -> str:
    """The data of a `fit` and its order, as a user types them to make a dataset of the same batches.

    Args:
        given: The arguments of `fit`.
        adapter: The adapter that reads the data.
    """
    reads_by_index = isinstance(adapter, ArrayDataAdapter | PyDatasetAdapter)
    arguments = [name for name in ("x", "y", "sample_weight") if given.get(name) is not None]
    if given.get("class_weight") is not None:
        arguments.append("class_weight=class_weight")
    if isinstance(adapter, ArrayDataAdapter):
        arguments.append(f"batch_size={adapter.batch_size}")
    if reads_by_index and given.get("shuffle"):
        arguments.append("shuffle=True")
    return ", ".join(arguments)


def builds_a_model() -> bool:
    """Whether Keras reads a batch for its shapes, to build a model, and does not train on it."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "_symbolic_build":
        frame = frame.f_back
    return frame is not None


def is_running(callbacks: keras.callbacks.CallbackList, frame: FrameType | None) -> bool:
    """Whether a frame, or a caller of it, uses a list of callbacks: the training of the list is in progress."""
    while frame is not None:
        if any(value is callbacks for value in frame.f_locals.values()):
            return True
        frame = frame.f_back
    return False


def _list_in(frame: FrameType, callback: keras.callbacks.Callback) -> keras.callbacks.CallbackList | None:
    caller = frame.f_locals.get("self")
    return caller if isinstance(caller, keras.callbacks.CallbackList) and callback in caller.callbacks else None


def written_by_keras(model: keras.Model, kind: str) -> bytes:
    """A file that Keras's own writer makes in memory.

    Args:
        model: The model.
        kind: `"keras"`, `"weights"`, or `"legacy"` for a whole model in HDF5.
    """
    with _no_more_frameworks():
        if kind == "legacy":
            return hdf5_in_memory(functools.partial(legacy_h5_format.save_model_to_hdf5, model))
        memory = _WeightsInMemory()
        if kind == "weights":
            saving_lib.save_weights_only(model, memory)
        else:
            saving_lib.save_model(model, memory)
        return memory.getvalue()


def places_in_files(model: keras.Model) -> dict[str, Any]:
    """The objects that Keras asks for their variables when it saves a model, by path."""
    _remember_skipped_attributes()
    found: dict[str, Any] = {}

    class Notes(saving_lib.H5IOStore):
        def __init__(self) -> None:
            """Opens no file."""

        def __bool__(self) -> bool:
            # Keras asks an object for its variables if the store is true.
            asker = inspect.currentframe().f_back.f_locals  # type: ignore[union-attr]
            found[asker["inner_path"]] = asker["saveable"]
            return False

    saving_lib._save_state(model, Notes(), None, "", set())  # noqa: SLF001
    return found


def answers_of(each: Any) -> dict[str, Any]:
    """The answers of an object that Keras asks for its variables. Most answers are variables, not their values.

    A plain optimizer is not asked: it would copy the values of its variables, in their order.
    """
    if _is_plain_optimizer(each):
        return {str(place): variable for place, variable in enumerate(each.variables)}
    answers: dict[str, Any] = {}
    each.save_own_variables(answers)
    return answers


def _is_plain_optimizer(each: Any) -> bool:
    """Whether an object is an optimizer that saves the values of its variables, in their order."""
    plain = keras.optimizers.Optimizer
    return isinstance(each, plain) and each.save_own_variables == types.MethodType(plain.save_own_variables, each)


def _remember_skipped_attributes() -> None:
    """Fills a cache that Keras 3.15 reads under another name than it writes. Each visit of an object would miss it."""
    for kind in ("Layer", "Functional", "Sequential", "Metric", "Optimizer", "Loss"):
        if get_global_attribute(f"saving_attr_skiplist_{kind}") is None:
            set_global_attribute(f"saving_attr_skiplist_{kind}", saving_lib.get_attr_skipset(kind))


def config_of(model: keras.Model, values: Sequence[tuple[keras.Variable, Any]]) -> tuple[str, str]:
    """The config of a model in a `.keras` file, and the metadata, both as JSON.

    Args:
        model: The model.
        values: The values that variables have in the config. Another thread may change the variables meanwhile.
    """
    with keras.StatelessScope(values, initialize_variables=False), _no_more_frameworks():
        config, metadata = saving_lib._serialize_model_as_json(model)  # noqa: SLF001
    return config, metadata


def get_config_of(each: Any) -> dict[str, Any]:
    """The config of an object. It may have other objects, such as a schedule, which Keras serializes."""
    with _no_more_frameworks():
        return each.get_config()  # type: ignore[no-any-return]


def serialized(each: Any) -> Any:
    """The config of an object as Keras serializes it."""
    with _no_more_frameworks():
        return keras.saving.serialize_keras_object(each)


@contextlib.contextmanager
def _no_more_frameworks() -> Iterator[None]:
    """Keeps Keras from importing TensorFlow only to ask whether an object is TensorFlow's.

    The import takes seconds and half a gigabyte. Without it no object can be TensorFlow's. No object is built in this
    scope, because some layers need TensorFlow.
    """
    tensorflow = module_utils.tensorflow
    if "tensorflow" in sys.modules or tensorflow._available is not None:  # noqa: SLF001
        yield
        return
    tensorflow._available = False  # noqa: SLF001
    try:
        yield
    finally:
        tensorflow._available = None  # noqa: SLF001


def built_from(config: Any, custom_objects: Mapping[str, Any]) -> Any:
    """The object that Keras builds from a config in safe mode, even in a program that turned safe mode off.

    An object that the config has in several places is built once.
    """
    with _building(custom_objects):
        return keras.saving.deserialize_keras_object(config, dict(custom_objects))


def compile_from(model: keras.Model, config: Mapping[str, Any], custom_objects: Mapping[str, Any]) -> None:
    """Compiles a model from a config in safe mode."""
    with _building(custom_objects):
        model.compile_from_config(dict(config))


@contextlib.contextmanager
def _building(custom_objects: Mapping[str, Any]) -> Iterator[None]:
    with saving_lib.ObjectSharingScope(), SafeModeScope(True), keras.saving.custom_object_scope(dict(custom_objects)):
        yield


def set_path(each: keras.Layer | keras.Variable, path: str) -> None:
    """Sets the path of a layer or a variable: the names of the scopes that it was built in."""
    each._path = path  # noqa: SLF001


class _WeightsInMemory(io.BytesIO):
    """Memory with the name that Keras demands of a file of weights."""

    def __str__(self) -> str:
        return "model.weights.h5"
