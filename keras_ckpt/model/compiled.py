"""The settings of `compile`: saved with a checkpoint, and compared when it is restored into another program's model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import keras

from keras_ckpt.model.companions import companion
from keras_ckpt.model.keras_internals import arguments_of, get_config_of, loss_weights

_IGNORED = {"name", "module", "registered_name", "is_legacy_optimizer"}
RATE = "learning_rate"
CLASS = "class"


class _FirstSettings(dict[str, Any]):
    """The settings of an optimizer when it was first seen: a callback may change the learning rate later."""


def settings_of(model: keras.Model, optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `compile` by name, as plain values.

    The first call for an optimizer decides, so call it before training or a restore changes a learning rate.

    Args:
        model: The model.
        optimizers: The model's optimizers by prefix.
    """
    found: dict[str, Any] = {}
    for prefix, optimizer in optimizers.items():
        first = companion(optimizer, _FirstSettings)
        if not first:
            first.update(_settings(optimizer))
        found |= {f"{prefix}/{name}": value for name, value in first.items()}
    if getattr(model, "compiled", False):
        found |= dict(_flatten("loss", _loss(getattr(model, "loss", None))))
        weights = loss_weights(model)
        found |= {} if weights is None else dict(_flatten("loss_weights", _plain(weights)))
    return found


def replace(optimizers: Mapping[str, Any], name: str, value: Any) -> None:
    """Replaces a setting of an optimizer, which the program gave, with the restored setting of a checkpoint."""
    prefix, _, setting = name.rpartition("/")
    companion(optimizers[prefix], _FirstSettings)[setting] = value


def adopt(model: keras.Model, optimizers: Mapping[str, Any], saved: str) -> None:
    """Takes the settings in a checkpoint for the program's, because the model was built from the checkpoint.

    A callback may have changed the learning rate before the model's config was made.

    Args:
        model: The model.
        optimizers: The model's optimizers by prefix.
        saved: The settings in the checkpoint, as JSON.
    """
    there = json.loads(saved)
    for name in settings_of(model, optimizers):
        if name in there and name.rpartition("/")[0] in optimizers:
            replace(optimizers, name, there[name])


def encoded(settings: Mapping[str, Any]) -> str:
    """The settings as JSON."""
    return json.dumps(settings, sort_keys=True, default=repr)


class Difference(NamedTuple):
    """A setting that differs between the program and a checkpoint.

    Attributes:
        name: The name of the setting.
        program: The value that the program gave to `compile`.
        saved: The value in the checkpoint.
        restored: Whether a restore sets the saved value: a learning rate that is a number on both sides is a variable.
    """

    name: str
    program: Any
    saved: Any

    @property
    def restored(self) -> bool:
        is_rate = self.name.rpartition("/")[2] == RATE  # a schedule has an initial_learning_rate
        return is_rate and isinstance(self.program, float) and isinstance(self.saved, float)

    def __str__(self) -> str:
        name = self.name.removesuffix(f"/{CLASS}").removeprefix("optimizer/")
        program, saved = _short(self.program), _short(self.saved)
        if self.restored:
            return f"{name} is {saved} as saved, not {program} as in the program"
        return f"{name} is {program} as in the program, not {saved} as saved"


def differences(now: Mapping[str, Any], before: str) -> list[Difference]:
    """The settings that differ between the program and a checkpoint.

    Args:
        now: The settings of `compile` in the program.
        before: The settings of `compile` in the checkpoint, as JSON.
    """
    here, there = json.loads(encoded(now)), json.loads(before)
    names = [name for name in {**here, **there} if (name in here and name in there) or name.startswith("loss")]
    return [Difference(name, here.get(name), there.get(name)) for name in names if here.get(name) != there.get(name)]


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else f"{value!r:.80}"


def _settings(optimizer: Any) -> Iterator[tuple[str, Any]]:
    yield CLASS, type(optimizer).__name__
    try:
        config = get_config_of(optimizer)
    except Exception:  # noqa: BLE001 - a user's class may have no config
        return
    for name, value in config.items():
        if name not in _IGNORED:
            yield from _flatten(name, _plain(value))


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The plain values in nested dicts, with their paths."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, each in value.items():
        if key not in _IGNORED:
            yield from _flatten(name if key in ("config", "class_name", "class") else f"{name}/{key}", each)


def _loss(value: Any) -> Any:
    """A loss in plain JSON. A loss of Keras has the same form, whether given by an alias, a function or an object."""
    if isinstance(value, Mapping):
        return {str(key): _loss(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return _loss(value[0]) if len(value) == 1 else [_loss(each) for each in value]
    return _plain(keras.losses.get(value) if isinstance(value, str) else value)


def _plain(value: Any) -> Any:
    """A value in plain JSON: an object by its class and its config, a function by its name."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, keras.losses.Loss):
        return _default_name(value) or [type(value).__name__, _config_of(value)]
    if isinstance(value, str | int | float | bool | None):
        return value
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value) if not hasattr(value, "item") else value.item()


def _default_name(loss: Any) -> str | None:
    """The name of the function of a loss of Keras, if Keras makes an equal loss from that name."""
    function = getattr(loss, "fn", None)
    if function is None or not type(loss).__module__.startswith("keras."):
        return None
    try:
        usual = type(loss)(name=loss.name)  # without a name, Keras would count an automatic name
    except TypeError:
        return None
    return str(function.__name__) if _config_of(usual) == _config_of(loss) else None


def _config_of(loss: Any) -> Any:
    try:
        config = {**loss.get_config(), **arguments_of(loss)}  # Huber's config lacks its delta
        return _plain({name: each for name, each in config.items() if name not in _IGNORED})
    except Exception:  # noqa: BLE001 - a user's class may have no config
        return None
