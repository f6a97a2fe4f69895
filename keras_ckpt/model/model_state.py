"""The training state of a model, as a checkpoint has it. The variables and constants to write are planned once."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import msgspec
import numpy as np

from keras_ckpt.formats import config, description, graph
from keras_ckpt.formats.bundle_writer import Value, string_value
from keras_ckpt.formats.threads import begin
from keras_ckpt.formats.variables import COUNTER, SUFFIX
from keras_ckpt.model import building, compiled, naming, object_graph, parts
from keras_ckpt.model.backends import backend
from keras_ckpt.model.integers import Reader
from keras_ckpt.model.keras_internals import trained_by
from keras_ckpt.model.learned import Learners
from keras_ckpt.model.places import places_of
from keras_ckpt.model.snapshot import Late, Snapshot
from keras_ckpt.model.structure import Structure
from keras_ckpt.version import __version__

NAMES_KEY = "_KERAS_CKPT_NAMES"
"""The key of a string that marks a checkpoint with the names of `naming`."""
TRAINING_KEY = "_KERAS_CKPT_TRAINING"
"""The key of the fit's state in a backup: a string of JSON. Its arrays have the key with `/0`, `/1` and so on."""
_OVERHEAD = 1 << 10
"""The approximate bytes of Python objects for each value of a snapshot."""


class ModelState:
    """The training state of a model, as a checkpoint has it.

    The checkpoint is a plain TensorFlow checkpoint: `tf.train.Checkpoint(model=model).restore(prefix)` restores every
    weight and slot from it.

    Example:

    ```python
    values = ModelState(model).snapshot().move(arena)
    ```

    Args:
        model: A built model.
        weights_only: Whether to skip the optimizer and the metrics.
    """

    def __init__(self, model: keras.Model, weights_only: bool = False) -> None:
        self.model = model
        self._weights_only = weights_only
        self._plan: _Plan | None = None

    def names(self) -> dict[str, Any]:
        """The variables that a snapshot has, by name."""
        return naming.named_variables(self.model, self._weights_only)

    def sizes(self) -> Mapping[bytes, int]:
        """The bytes of each variable, by its key in a snapshot."""
        return self._current_plan().sizes

    def config(self) -> Callable[[], config.Config]:
        """A function that makes the config of the model once, for a thread: it takes up to half a second."""
        made = self._current_plan().config
        return lambda: made.config

    def snapshot(self, step: int = 0, others: Mapping[str, Any] = {}, later: Late | None = None) -> Snapshot:
        """Takes a snapshot of the present values of the variables.

        Args:
            step: The step of the checkpoint: TensorFlow's own manager continues to count from here.
            others: Arrays and texts to write too, by key.
            later: Arrays to write too, which are known when the snapshot is moved.
        """
        others = {COUNTER: np.array(step, np.int64), **others}
        if (plan := self._plan) is not None:
            # Other threads may run Python while TensorFlow reads, so a thread checks meanwhile whether the plan holds.
            holds = begin(plan.structure.holds)
            snapshot = plan.snapshot(others, later)
            if holds():
                return snapshot
        self._plan = plan = self._new_plan()
        return plan.snapshot(others, later)

    def attributes(self) -> dict[str, Any]:
        """The plain attributes of layers, which no checkpoint has, by place, for `unsaved`."""
        return parts.plain_attributes(self.model, self._current_plan().learners.names())

    def unsaved(self, before: Mapping[str, Any]) -> list[str]:
        """The places of state that a checkpoint of the model does not have.

        Args:
            before: The result of `attributes` when training began. Attributes that changed since are state.
        """
        plan = self._current_plan()
        moved = [name.rstrip("/") for name, value in self.attributes().items() if before.get(name, value) != value]
        # A checkpoint of the weights alone skips these on purpose.
        others = {} if self._weights_only else parts.owners_of(self.model, parts.tracked(self.model))
        untracked = parts.untracked(self.model, [*plan.variables, *plan.owners], others)
        return [*untracked, *plan.learners.collect().failed, *moved]

    def _current_plan(self) -> _Plan:
        plan = self._plan
        if plan is None or not plan.structure.holds():
            self._plan = plan = self._new_plan()
        return plan

    def _new_plan(self) -> _Plan:
        model = self.model
        backend.synchronize(model)
        below = parts.tracked(model)
        optimizers = parts.optimizers_of(model, below)
        owners = [*optimizers.values(), *parts.losses_of(model, below).values()]
        names = self.names()
        by_id = {id(variable): name for name, variable in names.items()}
        variables = {f"{name}{SUFFIX}": variable for name, variable in names.items()}
        objects = object_graph.encoded(model, {id(variable): key for key, variable in variables.items()})
        texts = {graph.KEY: objects, NAMES_KEY: b"1"}
        learners = Learners(model, by_id, self._described(optimizers, by_id), self._weights_only)
        made = _Config(model, by_id, learners.names())
        if backend.PURGES_VARIABLES:
            _ = made.constants
        return _Plan(
            variables=[*variables.values()],
            reader=Reader(model, variables),
            constants={key.encode(): string_value([text], ()) for key, text in texts.items()},
            sizes={key.encode(): backend.size_of(variable) for key, variable in variables.items()},
            learners=learners,
            config=made,
            owners=owners,
            structure=Structure(model, owners, [*variables.values()]),
        )

    def _described(self, optimizers: Mapping[str, Any], names: Mapping[int, str]) -> description.Description:
        """The description of the model in a checkpoint, without the learned state of its objects.

        A variable that an optimizer trains and the model does not have gets the empty name.
        """
        found = description.Description(
            lora=parts.lora_scales(self.model, names), state_dict=backend.state_dict_names(self.model, names)
        )
        if self._weights_only:
            return found
        built = {prefix: optimizer for prefix, optimizer in optimizers.items() if optimizer.built}
        trained = {prefix: [names.get(id(v), "") for v in trained_by(built[prefix])] for prefix in built}
        settings = compiled.encoded(compiled.settings_of(self.model, optimizers))
        return msgspec.structs.replace(found, optimizers=trained, compiled=settings)


class _Plan(NamedTuple):
    """The content of a model's checkpoint. A plan seldom changes, and takes longer to make than values to read.

    Attributes:
        variables: The model's variables, in the reader's order.
        reader: The reader of the variables' values.
        constants: The encoded object graph, and the mark of the names.
        sizes: The bytes of the variables by key.
        learners: The objects that hold more than variables.
        config: The config of the model.
        owners: The model's optimizers and losses.
        structure: The structure of the model.
    """

    variables: Sequence[Any]
    reader: Reader
    constants: Mapping[bytes, Value]
    sizes: Mapping[bytes, int]
    learners: Learners
    config: _Config
    owners: Sequence[Any]
    structure: Structure

    def snapshot(self, others: Mapping[str, Any], later: Late | None) -> Snapshot:
        """Takes a snapshot of the present values, with other values to write."""
        learned = self.learners.collect()
        others = {**others, **{description.value_key(i): array for i, array in enumerate(learned.arrays)}}
        constants = {**self.constants, **learned.constants}
        size = sum(self.sizes.values()) + _OVERHEAD * len(self.sizes)
        return Snapshot(self.reader, others, lambda: {**constants, **self.config.constants}, later, size)


class _Config:
    """The config of a model, which is made when it is first needed.

    Args:
        model: The model.
        names: The names of its variables by identity.
        learners: The names of the objects whose learned state a checkpoint describes, by identity.
    """

    def __init__(self, model: keras.Model, names: Mapping[int, str], learners: Mapping[int, str]) -> None:
        self._model = model
        self._names = names
        self._learners = learners

    @functools.cached_property
    def config(self) -> config.Config:
        made = building.config_of(self._model)
        return msgspec.structs.replace(made, places=places_of(self._model, self._names, self._learners))

    @functools.cached_property
    def constants(self) -> Mapping[bytes, Value]:
        """The encoded config by its key."""
        return {config.KEY.encode(): string_value([config.encode(self.config)], ())}


def versions() -> dict[str, str]:
    """The versions of the packages and of Python that write a checkpoint."""
    return {
        "keras_ckpt": __version__,
        "keras": keras.__version__,
        **backend.VERSIONS,
        "python": platform.python_version(),
    }
