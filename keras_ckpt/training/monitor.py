"""What a training reports about itself: which of it are metrics, and whether less or more of one is better."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_ckpt.model.keras_internals import direction_of, metrics_given
from keras_ckpt.store.record import Mode, as_metric


def metrics_in(logs: Mapping[str, Any] | None) -> dict[str, float]:
    """The logs of `fit` as metrics. What is not one number is left out."""
    metrics = {}
    for name, value in (logs or {}).items():
        if value is not None:
            with contextlib.suppress(TypeError):
                metrics[name] = as_metric(name, value)
    return metrics


def mode_of(model: keras.Model, monitor: str) -> Mode:
    """Whether less or more of a metric is better, found as Keras does for `mode="auto"`, but before training.

    Raises:
        ValueError: Keras does not know it either.
    """
    known_modes = modes_of(model, [monitor])
    if monitor in known_modes:
        return known_modes[monitor]
    outputs = getattr(model, "output_names", None) or ()
    name = monitor.removeprefix("val_")
    directions = _known_directions(model)
    text = (
        f"Nothing says whether less or more of monitor={monitor!r} is better. Pass mode='max' if more is, mode='min' "
        "if less is."
    )
    if len(outputs) <= 1:
        known = sorted({"loss", *directions})
        close = difflib.get_close_matches(name, known, n=1)
        meant = f" Did you mean {monitor.removesuffix(name) + close[0]!r}?" if close else ""
        text += f" Keras knows it of {', '.join(known)}, and with validation data of the same with val_ before.{meant}"
    raise ValueError(text)


def modes_of(model: keras.Model, monitors: Iterable[str]) -> dict[str, Mode]:
    """The directions of metrics, as far as Keras knows them, by name."""
    outputs = getattr(model, "output_names", None) or ()
    directions = _known_directions(model) | {"loss": "down"}
    found: dict[str, Mode] = {}
    for monitor in monitors:
        name = monitor.removeprefix("val_")
        # The logs of a model of several outputs name each metric after its output.
        for each in (name, *(name.removeprefix(f"{output}_") for output in outputs if name.startswith(f"{output}_"))):
            if each in directions:
                found.setdefault(monitor, "max" if directions[each] == "up" else "min")
    return found


def no_such_metric(monitor: str, logs: Mapping[str, Any]) -> str:
    """The warning about a monitored metric that the logs do not have, or that is not one number."""
    kept = "so nothing can be ranked by it: every checkpoint is saved and none is removed."
    if monitor in logs:
        shape = getattr(logs[monitor], "shape", None)
        what = f"an array of shape {tuple(shape)}" if shape else repr(logs[monitor])[:100]
        return f"The monitored metric {monitor!r} is not one number but {what}, {kept} Reduce it, as by a mean."
    numbers = sorted(metrics_in(logs))
    close = difflib.get_close_matches(monitor, numbers, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"The monitored metric {monitor!r} is not there, {kept} The metrics are: {', '.join(numbers) or 'none'}.{hint}"
    )


def _known_directions(model: keras.Model) -> dict[str, str]:
    return {name: direction for name, direction in _directions(model) if direction is not None}


def _directions(model: keras.Model) -> Iterable[tuple[str, str | None]]:
    """The names of the compiled metrics with their direction, `"up"`, `"down"` or unknown."""
    # Keras builds the metrics that compile() was given with the first batch.
    for metric in model.metrics:
        for built in getattr(metric, "metrics", ()):
            yield built.name, direction_of(built)
        for identifier in metrics_given(metric):
            yield _name_and_direction(identifier)


def _name_and_direction(identifier: Any) -> tuple[str, str | None]:
    """Those of a metric that is not built yet, as Keras will find them."""
    if isinstance(identifier, str) and identifier.lower() in ("accuracy", "acc"):
        return identifier, "up"  # whichever of the accuracies it will be
    metric = identifier if isinstance(identifier, keras.metrics.Metric) else keras.metrics.get(identifier)
    if not isinstance(metric, keras.metrics.Metric):
        name = identifier if isinstance(identifier, str) else getattr(metric, "__name__", "")
        metric = keras.metrics.MeanMetricWrapper(metric, name=name or None)
    name = identifier if isinstance(identifier, str) else metric.name
    return name, direction_of(metric)
