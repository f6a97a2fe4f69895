"""The metrics in the logs of `fit`, and their modes: whether less or more is better."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import keras

from keras_ckpt.model.keras_internals import direction_of, metrics_given
from keras_ckpt.store.record import Mode, as_metric


def metrics_in(logs: Mapping[str, Any] | None) -> dict[str, float]:
    """The metrics in the logs of `fit`. Entries that are not one number are skipped."""
    metrics = {}
    for name, value in (logs or {}).items():
        if value is not None:
            with contextlib.suppress(TypeError):
                metrics[name] = as_metric(name, value)
    return metrics


def mode_of(model: keras.Model, monitor: str) -> Mode:
    """The mode of a metric, found as in Keras for `mode="auto"`, but before training.

    Raises:
        ValueError: Keras does not know the mode either.
    """
    known_modes = modes_of(model, [monitor])
    if monitor in known_modes:
        return known_modes[monitor]
    outputs = getattr(model, "output_names", None) or ()
    name = monitor.removeprefix("val_")
    directions = _known_directions(model)
    text = (
        f"It is unknown whether less or more of monitor={monitor!r} is better. Pass mode='max' if more is better, "
        "mode='min' if less is better."
    )
    if len(outputs) <= 1:
        known = sorted({"loss", *directions})
        close = difflib.get_close_matches(name, known, n=1)
        meant = f" Did you mean {monitor.removesuffix(name) + close[0]!r}?" if close else ""
        text += f" Keras knows the mode of {', '.join(known)}, and of the same names with the prefix val_.{meant}"
    raise ValueError(text)


def modes_of(model: keras.Model, monitors: Iterable[str]) -> dict[str, Mode]:
    """The modes of metrics by name, of those that Keras knows."""
    outputs = getattr(model, "output_names", None) or ()
    directions = _known_directions(model) | {"loss": "down"}
    found: dict[str, Mode] = {}
    for monitor in monitors:
        name = monitor.removeprefix("val_")
        # The logs of a model of several outputs name each metric after its output.
        for metric in (name, *(name.removeprefix(f"{output}_") for output in outputs if name.startswith(f"{output}_"))):
            if metric in directions:
                found.setdefault(monitor, "max" if directions[metric] == "up" else "min")
    return found


def missing_metric_warning(monitor: str, logs: Mapping[str, Any]) -> str:
    """The text of a warning that the monitored metric is missing in the logs or is not one number."""
    kept = "so nothing can be ranked by it: every checkpoint is saved and none is removed."
    if monitor in logs:
        shape = getattr(logs[monitor], "shape", None)
        what = f"an array of shape {tuple(shape)}" if shape else repr(logs[monitor])[:100]
        return f"The monitored metric {monitor!r} is not one number but {what}, {kept} Reduce it, e.g. by a mean."
    numbers = sorted(metrics_in(logs))
    close = difflib.get_close_matches(monitor, numbers, n=1, cutoff=0.4)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return (
        f"The monitored metric {monitor!r} is not there, {kept} The metrics are: {', '.join(numbers) or 'none'}.{hint}"
    )


def _known_directions(model: keras.Model) -> dict[str, str]:
    return {name: direction for name, direction in _directions(model) if direction is not None}


def _directions(model: keras.Model) -> Iterable[tuple[str, str | None]]:
    """The names of the compiled metrics with their directions: `"up"`, `"down"` or `None`."""
    # Keras builds the metrics of compile() at the first batch.
    for metric in model.metrics:
        for built in getattr(metric, "metrics", ()):
            yield built.name, direction_of(built)
        for identifier in metrics_given(metric):
            yield _name_and_direction(identifier)


def _name_and_direction(identifier: Any) -> tuple[str, str | None]:
    """The name and the direction of a metric that Keras has not built yet."""
    if isinstance(identifier, str) and identifier.lower() in ("accuracy", "acc"):
        return identifier, "up"  # the same for every kind of accuracy
    metric = identifier if isinstance(identifier, keras.metrics.Metric) else keras.metrics.get(identifier)
    if not isinstance(metric, keras.metrics.Metric):
        name = identifier if isinstance(identifier, str) else getattr(metric, "__name__", "")
        metric = keras.metrics.MeanMetricWrapper(metric, name=name or None)
    name = identifier if isinstance(identifier, str) else metric.name
    return name, direction_of(metric)
