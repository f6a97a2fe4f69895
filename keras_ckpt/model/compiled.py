"""What `compile` was given: kept with a checkpoint, compared when it is restored into a model compiled otherwise."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import keras

from keras_ckpt.model.keras_internals import arguments_of, loss_weights

_NO_SETTINGS = {"name", "module", "registered_name", "is_legacy_optimizer"}
RATE = "learning_rate"
CLASS = "class"

# By optimizer, as it was when it was first seen: a callback may change the learning rate later.
_seen: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def note(model: keras.Model, optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """What `compile` was given, by name, in plain values.

    The first call for an optimizer decides, so it comes before training or a restore changes a learning rate.

    Args:
        model: The model.
        optimizers: Its optimizers by prefix.
    """
    found: dict[str, Any] = {}
    for prefix, optimizer in optimizers.items():
        if optimizer not in _seen:
            _seen[optimizer] = dict(_settings(optimizer))
        found |= {f"{prefix}/{name}": value for name, value in _seen[optimizer].items()}
    if getattr(model, "compiled", False):
        found |= dict(_flat("loss", _loss(getattr(model, "loss", None))))
        weights = loss_weights(model)
        found |= {} if weights is None else dict(_flat("loss_weights", _spelled(weights)))
    return found


def replace(optimizers: Mapping[str, Any], name: str, value: Any) -> None:
    """Has a setting of an optimizer be another than the program gave: that of a checkpoint, which was restored."""
    prefix, _, setting = name.rpartition("/")
    _seen[optimizers[prefix]][setting] = value


def encoded(settings: Mapping[str, Any]) -> str:
    """The settings as JSON."""
    return json.dumps(settings, sort_keys=True, default=repr)


class Difference(NamedTuple):
    """A setting that is another in the program than in a checkpoint.

    Attributes:
        name: Its name.
        program: What the program gave to `compile`.
        saved: What the checkpoint was saved with.
        restored: Whether a restore brings it along. A learning rate is a variable, if it is a number on both sides.
    """

    name: str
    program: Any
    saved: Any

    @property
    def restored(self) -> bool:
        return self.name.endswith(RATE) and isinstance(self.program, float) and isinstance(self.saved, float)

    def __str__(self) -> str:
        name = self.name.removesuffix(f"/{CLASS}").removeprefix("optimizer/")
        program, saved = _shown(self.program), _shown(self.saved)
        if self.restored:
            return f"{name} is {saved} as saved, not {program} as in the program"
        return f"{name} is {program} as in the program, not {saved} as saved"


def differences(now: Mapping[str, Any], before: str) -> list[Difference]:
    """The settings that are others in the program than in a checkpoint.

    Args:
        now: What `compile` was given here.
        before: What it was given there, as JSON.
    """
    here, there = json.loads(encoded(now)), json.loads(before)
    names = [name for name in {**here, **there} if (name in here and name in there) or name.startswith("loss")]
    return [Difference(name, here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)]


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value!r:.80}"


def _settings(optimizer: Any) -> Iterator[tuple[str, Any]]:
    yield CLASS, type(optimizer).__name__
    try:
        config = optimizer.get_config()
    except Exception:  # noqa: BLE001 - it is the user's class, and may not have one
        return
    for name, value in config.items():
        if name not in _NO_SETTINGS:
            yield from _flat(name, _spelled(value))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The plain values in dicts, by path."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, each in value.items():
        if key not in _NO_SETTINGS:
            yield from _flat(name if key in ("config", "class_name", "class") else f"{name}/{key}", each)


def _loss(value: Any) -> Any:
    """A loss as `_spelled`; a function of Keras has one name, by whichever it was given."""
    if isinstance(value, Mapping):
        return {str(key): _loss(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return _loss(value[0]) if len(value) == 1 else [_loss(each) for each in value]
    return _spelled(keras.losses.get(value) if isinstance(value, str) else value)


def _spelled(value: Any) -> Any:
    """A value in plain JSON: an object by its class and its config, a function by its name."""
    if isinstance(value, Mapping):
        return {str(key): _spelled(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled(each) for each in value]
    if isinstance(value, keras.losses.Loss):
        return _default_name(value) or [type(value).__name__, _config_of(value)]
    if isinstance(value, str | int | float | bool | None):
        return value
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value) if not hasattr(value, "item") else value.item()


def _default_name(loss: Any) -> str | None:
    """The name of the function of a loss of Keras, if the loss is what Keras makes of that name."""
    function = getattr(loss, "fn", None)
    if function is None or not type(loss).__module__.startswith("keras."):
        return None
    try:
        usual = type(loss)(name=loss.name)  # without a name, Keras's counter of automatic names would go on
    except TypeError:
        return None
    return str(function.__name__) if _config_of(usual) == _config_of(loss) else None


def _config_of(loss: Any) -> Any:
    try:
        config = {**loss.get_config(), **arguments_of(loss)}  # Huber's config lacks its delta
        return _spelled({name: each for name, each in config.items() if name not in _NO_SETTINGS})
    except Exception:  # noqa: BLE001 - as of an optimizer
        return None
