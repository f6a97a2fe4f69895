"""Every private name of Keras that this package needs, behind a function with a public name.

A test calls each function, and names the one whose private name has changed in Keras.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras

# Keras has no public names for the generator of unseeded functions of keras.random, and for a look whether it is there.
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute
from keras.src.random.seed_generator import GLOBAL_SEED_GENERATOR, global_seed_generator


def layers_of(model: keras.Model) -> list[Any]:
    """The model and all layers in it, those in layers that are no models too."""
    return list(model._flatten_layers(include_self=True, recursive=True))  # noqa: SLF001


def trained_by(optimizer: Any) -> list[Any]:
    """The variables that an optimizer was built for, in its order."""
    return list(optimizer._trainable_variables) if optimizer.built else []  # noqa: SLF001


def value_of(variable: Any) -> Any:
    """A variable's value as TensorFlow's functions take it."""
    # The public property looks for scopes first, which takes longer than to read the variable.
    return variable._value if isinstance(variable, keras.Variable) else variable  # noqa: SLF001


def unlock(layer: Any) -> None:
    """Lets a layer that is built get more variables."""
    layer._tracker.unlock()  # noqa: SLF001


def metrics_given(metric: Any) -> list[Any]:
    """The metrics that `compile` was given, which the metric of `compile` holds before Keras builds them."""
    given = getattr(metric, "_user_metrics", None), getattr(metric, "_user_weighted_metrics", None)
    return [each for each in keras.tree.flatten(given) if each is not None]


def direction_of(metric: Any) -> str | None:
    """Whether more of a metric is better, `"up"`, or less, `"down"`; `None` if Keras does not know."""
    direction: str | None = getattr(metric, "_direction", None)
    return direction


def loss_weights(model: keras.Model) -> Any:
    """The weights of losses that `compile` was given. Keras's public way serializes all that it was given."""
    return getattr(getattr(model, "_compile_loss", None), "_user_loss_weights", None)


def arguments_of(loss: Any) -> Mapping[str, Any]:
    """The arguments of the function that a loss of Keras wraps. The config of some losses lacks them."""
    found: Mapping[str, Any] = getattr(loss, "_fn_kwargs", {})
    return found


def begin_with_epoch(model: keras.Model, epoch: int | None) -> None:
    """Has `fit` begin with an epoch, which it reads before its first. Keras's BackupAndRestore has no other way."""
    model._initial_epoch = epoch  # noqa: SLF001


def seed_of_random() -> Any:
    """The state of the generator of unseeded functions of `keras.random`, `None` if there is no such generator yet."""
    # A look makes no generator: Keras would draw the seed of a new one from Python's.
    generator = get_global_attribute(GLOBAL_SEED_GENERATOR)
    return None if generator is None else generator.state


def set_seed_of_random(state: Any) -> None:
    """Puts that generator where it was; `None` removes it."""
    if state is None:
        set_global_attribute(GLOBAL_SEED_GENERATOR, None)
    else:
        global_seed_generator().state.assign(state)


class FitData(NamedTuple):
    """What the `fit` that is calling was given to train on.

    Attributes:
        steps_per_epoch: After how many batches an epoch ends; `None` if the data say so themselves.
        batches: How many batches the data have, `None` if they have no end, or it is not known.
        dataset: The `tf.data.Dataset` that is read, `None` if the data are none of TensorFlow's.
        is_known: Whether there is a `fit`, and not a loop of a user's own.
    """

    steps_per_epoch: int | None = None
    batches: int | None = None
    dataset: Any = None
    is_known: bool = False


def data_of_fit() -> FitData:
    """What the `fit` that is calling trains on. Keras tells a callback nothing of it."""
    frame = inspect.currentframe()
    while frame is not None:
        # Of no other frame: one whose variables were looked at is kept, with all that it has.
        if frame.f_code.co_name == "fit" and {"steps_per_epoch", "epoch_iterator"} <= frame.f_locals.keys():
            steps: int | None = frame.f_locals["steps_per_epoch"] or keras.config.max_steps_per_epoch()
            adapter = frame.f_locals["epoch_iterator"].data_adapter
            return FitData(steps, adapter.num_batches, getattr(adapter, "_dataset", None), is_known=True)
        frame = frame.f_back
    return FitData()


def callbacks_of_fit(callback: keras.callbacks.Callback) -> keras.callbacks.CallbackList | None:
    """The list of callbacks that is calling a callback. Keras tells a callback nothing of the others."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList) and callback in caller.callbacks:
            return caller
        frame = frame.f_back
    return None
