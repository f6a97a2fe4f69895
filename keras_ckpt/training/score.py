"""The score of an epoch: one metric that the user's function makes of several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import as_metric
from keras_ckpt.store.tables import few
from keras_ckpt.training.monitor import metrics_in

ScoreFunction = Callable[[Mapping[str, Any]], float]
NAME = "score"
"""The name of the metric."""


class Score:
    """Adds the score to the logs of an epoch's end.

    A mistake in the function shows in the first epoch of a `fit`, and is an error there. In a later epoch it is a
    warning: a division by zero must not end a long training.

    Args:
        function: The function of the logs, `None` for no score.

    Raises:
        TypeError: `function` cannot be called.
    """

    def __init__(self, function: ScoreFunction | None) -> None:
        if function is not None and not callable(function):
            raise TypeError(f"score expected a function of the logs, which returns a number. Received: {function!r}")
        self._function = function
        self._worked = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the metrics that this adds."""
        return () if self._function is None else (NAME,)

    def begin(self) -> None:
        """Begins a `fit`."""
        self._worked = False

    @contextlib.contextmanager
    def added_to(self, logs: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """The logs with the score. Raises an error of the function after the block, which saves the epoch without it.

        Args:
            logs: The logs of an epoch's end.

        Raises:
            ValueError: No score was known in the first epoch.
        """
        if self._function is None:
            yield logs
            return
        try:
            scored, failure = {**logs, NAME: self._of(self._function, logs)}, None
            self._worked = True
        except Exception as error:  # noqa: BLE001 - the user's function may raise any error
            scored, failure = {**logs}, error
        yield scored
        if failure is None:
            return
        text = f"score(logs) gave no number: {failure!r}. The logs have {few(sorted(metrics_in(logs)))}."
        if not self._worked:
            raise ValueError(f"{text} The epoch is trained, and saved without a score if a save was due.") from failure
        warn(f"{text} This epoch has no score. Training continues.")

    @staticmethod
    def _of(function: ScoreFunction, logs: Mapping[str, Any]) -> float:
        if NAME in logs:
            raise ValueError(f"the model has a metric {NAME!r} of its own")
        return as_metric(NAME, function(logs))
