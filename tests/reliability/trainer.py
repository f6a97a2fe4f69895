"""A process that saves checkpoints and acknowledges each, to be killed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import random
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.policies import PreservationPolicy
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.writer import SaveRequest, Write, Writer
from support.runs import payload

Acknowledge = Callable[[CheckpointRecord], None]
_forks = multiprocessing.get_context("fork")


def station() -> concurrent.futures.ProcessPoolExecutor:
    """A process without threads and without TensorFlow, to fork trainers from."""
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def keras_station(prepare: Callable[[], object]) -> concurrent.futures.ProcessPoolExecutor:
    """A process without threads, to fork trainers from once it is prepared. All such processes import Keras once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["keras", "sklearn.datasets"])
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_prepare, initargs=(prepare,))


def _prepare(prepare: Callable[[], object]) -> None:
    if os.environ["KERAS_BACKEND"] == "tensorflow":
        from support import iterators

        iterators.end_at_once()
    prepare()


class Noise:
    """Checkpoints that are made without TensorFlow; no two are equal."""

    def station(self) -> concurrent.futures.ProcessPoolExecutor:
        return station()

    def write(self, step: int, directory: CheckpointDirectory) -> Write:
        return payload(b"%d " % step + os.urandom(random.randrange(20_000)))

    def saved(self, write: Write, record: CheckpointRecord) -> None:
        """Nothing is to be remembered."""

    def step_in(self, record: CheckpointRecord) -> int:
        return int(pathlib.Path(f"{record.prefix}.data-00000-of-00001").read_bytes().split()[0])


class RealModel:
    """Checkpoints of a small model; its first bias is the step."""

    def station(self) -> concurrent.futures.ProcessPoolExecutor:
        return keras_station(_prepare_real_model)

    def write(self, step: int, directory: CheckpointDirectory) -> Write:
        import numpy as np

        from keras_ckpt.formats.sharing import SharingWrite

        model, state = _real_model()
        arena = _arena(os.getpid())
        for variable in model.trainable_variables:
            variable.assign(np.random.default_rng().random(variable.shape))
        model.layers[0].bias.assign(np.full(3, step))
        return SharingWrite(state.snapshot().move(arena), arena, Writer(directory))

    def saved(self, write: Write, record: CheckpointRecord) -> None:
        write.remember(record)

    def step_in(self, record: CheckpointRecord) -> int:
        import tensorflow as tf

        bias = tf.train.load_variable(record.prefix, "model/dense/bias/.ATTRIBUTES/VARIABLE_VALUE")
        (step,) = set(bias.tolist())
        return int(step)


def _prepare_real_model() -> None:
    """Builds the model before trainers are forked, so that each trainer has it."""
    from keras_ckpt.formats import sharing

    _real_model()
    sharing._WORTHWHILE = 1


@functools.cache
def _real_model():
    """A model of which most is never trained, and its training state."""
    import keras

    from keras_ckpt.model.model_state import ModelState

    frozen = keras.layers.Dense(5000, trainable=False)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), frozen, keras.layers.Dense(1)])
    model.compile("sgd")
    model.optimizer.build(model.trainable_variables)
    return model, ModelState(model)


@functools.cache
def _arena(process: int):
    """The memory for copies of a process; one that is forked knows nothing of what is on disk."""
    from keras_ckpt.formats.arena import Arena

    return Arena()


@dataclasses.dataclass(frozen=True)
class Job:
    """What a trainer saves, where, and what it keeps."""

    path: str
    keep: PreservationPolicy
    payload: Noise | RealModel = dataclasses.field(default_factory=Noise)

    def writer(self) -> Writer:
        return Writer(CheckpointDirectory(self.path), self.keep)

    def save(self, writer: Writer, step: int) -> CheckpointRecord | None:
        # Later ones are better, but not each, so that a policy that ranks goes on wanting some.
        metrics = {"loss": step * 7 % 11 - step}
        write = self.payload.write(step, writer.directory)
        record = writer.save(SaveRequest(step=step, metrics=metrics, batch=0), write)
        if record is not None:
            self.payload.saved(write, record)
        return record

    def newest(self) -> int:
        return max((record.step for record in CheckpointDirectory(self.path)), default=0)


def train(acknowledge: Acknowledge, job: Job, advances: Iterable[int]) -> None:
    """Saves a checkpoint after each advance by so many steps, and acknowledges it."""
    writer, step = job.writer(), job.newest()
    for advance in advances:
        step += advance
        if record := job.save(writer, step):
            acknowledge(record)


def at_random() -> Iterator[int]:
    """Advances without end; by no step at times, so that one is saved again."""
    while True:
        yield random.choice((0, 1, 2))


class Child:
    """A forked process that acts once it is told to, and what it has acknowledged."""

    def __init__(self, action: Callable[..., None], *arguments: object) -> None:
        self.acknowledged: list[Any] = []
        self._ours, theirs = _forks.Pipe()
        self.process = _forks.Process(target=self._run, args=(theirs, action, arguments), daemon=True)
        self.process.start()
        theirs.close()
        self._ours.recv()  # what comes before its action is done

    def _run(self, theirs: Connection, action: Callable[..., None], arguments: tuple[object, ...]) -> None:
        # Were this end open here, it would not be noticed that the parent is gone.
        self._ours.close()
        theirs.send(None)
        theirs.recv()
        action(theirs.send, *arguments)

    def go(self) -> None:
        self._ours.send(None)

    def listen(self, seconds: float | None = None) -> None:
        """Hears acknowledgements for so long, or to the end."""
        end = None if seconds is None else time.monotonic() + seconds
        with contextlib.suppress(EOFError, OSError):
            while self._ours.poll(None if end is None else max(0, end - time.monotonic())):
                self.acknowledged.append(self._ours.recv())

    def go_on(self, seconds: float) -> None:
        """Lets it go until so long after its first acknowledgement."""
        self.go()
        self.acknowledged.append(self._ours.recv())
        self.listen(seconds)

    def kill(self) -> None:
        self.process.kill()
        self.end()

    def end(self) -> int:
        """Waits for its end, hears the last acknowledgements, and gives the exit code."""
        self.listen()
        self.process.join()
        return self.process.exitcode

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._ours.close()


def acknowledged_by(action: Callable[..., None], *arguments: object) -> list[Any]:
    """Runs an action in a forked process to its end. Returns the values that the action acknowledged."""
    with Child(action, *arguments) as child:
        child.go()
        assert child.end() == 0
        return child.acknowledged
