"""Every attribute of a Keras object that a resume replaces: installed here, and removed here."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_ckpt.model.keras_internals import AVERAGES_AFTER_ERRORS, begin_with_epoch, no_step

Logs = Mapping[str, Any] | None

_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_test_begin", "on_epoch_end")


class Patches:
    """The replaced attributes of the Keras objects of one `fit`. `remove` restores each of them.

    | Method | replaces | until |
    |---|---|---|
    | `keep_csv_files` | `append` of each `CSVLogger` | training begins |
    | `begin_with` | the first epoch of `fit`, `on_epoch_begin` of the list | the first epoch begins |
    | `resume_within` | four methods of the list, `train_function` for one step | the batches of the epoch are done |
    | `before_averages` | on JAX, `finalize_variable_values` of the optimizer | the fit ends |

    Each of the first three begins after the one before was removed. An error that ends `fit` is followed by `remove`.
    """

    def __init__(self) -> None:
        self._installed = contextlib.ExitStack()
        self._until_the_end = contextlib.ExitStack()

    def remove(self) -> None:
        """Restores all that is replaced."""
        self._installed.close()
        self._until_the_end.close()

    def keep_csv_files(self, callbacks: keras.callbacks.CallbackList) -> list[keras.callbacks.CSVLogger]:
        """Keeps each `CSVLogger` from emptying its file when training begins.

        Returns:
            Each `CSVLogger` that would have emptied its file.
        """
        loggers = [each for each in callbacks.callbacks if isinstance(each, keras.callbacks.CSVLogger)]
        loggers = [each for each in loggers if not each.append]
        for logger in loggers:
            self._set(logger, "append", True)
        return loggers

    def begin_with(self, model: keras.Model, callbacks: keras.callbacks.CallbackList | None, epoch: int | None) -> None:
        """Has `fit` begin with an epoch.

        Args:
            model: The model.
            callbacks: The list that `fit` calls, if there is one.
            epoch: The index of the epoch; `None` leaves the epoch to `fit`.
        """
        begin_with_epoch(model, epoch)
        self._installed.callback(begin_with_epoch, model, None)
        if callbacks is not None:
            # The next fit must not begin there, even if another callback raises in the first epoch.
            self._set(callbacks, "on_epoch_begin", functools.partial(self._begin_epoch, callbacks))

    def resume_within(self, callbacks: keras.callbacks.CallbackList, done: int, steps: int, logs: Logs) -> None:
        """Makes the epoch in progress one of which some batches are done.

        Args:
            callbacks: The list that `fit` calls.
            done: The number of batches that are done.
            steps: The number of batches of the epoch.
            logs: The logs of the last batch if no batch is left, else `None`.
        """
        rest = _EpochRest(callbacks, done, steps, logs, self._installed.close)
        for hook in _HOOKS:
            self._set(callbacks, hook, getattr(rest, hook))

    def before_averages(self, model: keras.Model, call: Callable[[], object]) -> None:
        """Calls a function before `fit` replaces the weights by averages after an error, when no callback is called."""
        optimizer = model.optimizer
        if AVERAGES_AFTER_ERRORS and optimizer is not None:
            finalize = optimizer.finalize_variable_values

            def finalize_after(variables: Any) -> None:
                self._until_the_end.close()
                call()
                finalize(variables)

            self._set(optimizer, "finalize_variable_values", finalize_after, self._until_the_end)

    def _begin_epoch(self, callbacks: keras.callbacks.CallbackList, epoch: int, logs: Logs = None) -> None:
        self._installed.close()
        callbacks.on_epoch_begin(epoch, logs)

    def _set(self, owner: Any, name: str, value: Any, installed: contextlib.ExitStack | None = None) -> None:
        """Replaces an attribute until `remove`."""
        own = vars(owner)
        restore = functools.partial(setattr, owner, name, own[name]) if name in own else None
        setattr(owner, name, value)
        (installed or self._installed).callback(restore or functools.partial(delattr, owner, name))


class _EpochRest:
    """The rest of an epoch that another process began, within a `fit` that does not know of it.

    `fit` counts the batches of an epoch from 0 and trains all of them. So the callbacks are told the number of each
    batch in the whole epoch, and training stops after the last.

    If only validation is left, one step that trains nothing returns the logs of the last batch. Callbacks do not see
    the step.

    Args:
        callbacks: The list that `fit` calls.
        done: The number of batches that are done.
        steps: The number of batches of the epoch.
        logs: The logs of the last batch if no batch is left, else `None`.
        remove: Removes the methods of this class from the list.
    """

    def __init__(
        self,
        callbacks: keras.callbacks.CallbackList,
        done: int,
        steps: int,
        logs: Logs,
        remove: Callable[[], None],
    ) -> None:
        self._callbacks = callbacks
        self._model = callbacks.model
        self._done = done
        self._steps = steps
        self._logs = logs
        self._remove = remove
        self._stopped = False

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        if self._logs is None:
            type(self._callbacks).on_train_batch_begin(self._callbacks, self._done + batch, logs)
        else:
            # The step follows at once: no callback can raise in between and leave this in the model.
            self._model.train_function = functools.partial(self._take_no_step, self._model.train_function)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        if self._logs is None:
            type(self._callbacks).on_train_batch_end(self._callbacks, self._done + batch, logs)
        # A training that a callback has stopped stays stopped.
        is_last = self._logs is not None or self._done + batch + 1 >= self._steps
        if is_last and not self._model.stop_training:
            self._model.stop_training = self._stopped = True

    def on_test_begin(self, logs: Logs = None) -> None:
        self._end()
        self._callbacks.on_test_begin(logs)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        self._end()
        self._callbacks.on_epoch_end(epoch, logs)

    def _take_no_step(self, train_function: Callable[..., Any], *arguments: Any) -> Any:
        self._model.train_function = train_function
        return no_step(self._logs, arguments)

    def _end(self) -> None:
        self._remove()
        if self._stopped:
            self._model.stop_training = False
