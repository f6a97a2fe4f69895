"""The rest of an epoch that another process began, inside of a `fit` that knows nothing of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras

Logs = Mapping[str, Any] | None

_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_test_begin", "on_epoch_end")


class EpochRest:
    """Makes the epoch that begins one of which some batches are done.

    `fit` counts an epoch's batches from 0 and trains as many as an epoch has. So for this epoch the callbacks are told
    the numbers that the batches have in the whole, and training stops after the last.

    If its training is over and what comes after is not, one step is taken that trains nothing and gives the logs
    of the last batch, which no callback hears of.

    Args:
        callbacks: The list that `fit` calls; its methods stand back for those of this class until the epoch's training
            is over.
        done: How many batches are done.
        steps: How many batches the epoch has.
        logs: The logs of the last batch if the epoch's training is over, else `None`.
    """

    def __init__(self, callbacks: keras.callbacks.CallbackList, done: int, steps: int, logs: Logs) -> None:
        self._callbacks = callbacks
        self._model = callbacks.model
        self._done = done
        self._steps = steps
        self._stopped = False
        self._logs = logs
        self._trained = logs is not None
        for hook in _HOOKS:
            setattr(callbacks, hook, getattr(self, hook))

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        if self._trained:
            # The step follows at once: no error of a callback can come before it and keep this in the model.
            self._model.train_function = functools.partial(self._take_no_step, self._model.train_function)
        else:
            type(self._callbacks).on_train_batch_begin(self._callbacks, self._done + batch, logs)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if not self._trained:
            type(self._callbacks).on_train_batch_end(self._callbacks, self._done + batch, logs)
        # Where somebody has stopped the training, it is to stay stopped.
        if (self._trained or self._done + batch + 1 >= self._steps) and not self._model.stop_training:
            self._model.stop_training = self._stopped = True

    def on_test_begin(self, logs: Logs = None) -> None:
        self._end()
        self._callbacks.on_test_begin(logs)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._end()
        self._callbacks.on_epoch_end(epoch, logs)

    def _take_no_step(self, train_function: Callable[..., Logs], iterator: Any) -> Logs:
        self._model.train_function = train_function
        return self._logs

    def _end(self) -> None:
        for hook in _HOOKS:
            delattr(self._callbacks, hook)
        if self._stopped:
            self._model.stop_training = False
