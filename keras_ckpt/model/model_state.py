"""The training state of a model as a checkpoint: what is to be written of it, found out once."""

from __future__ import annotations

import functools
import operator
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import msgspec

from keras_ckpt.formats import description
from keras_ckpt.formats.bundle_writer import Value, string_value
from keras_ckpt.formats.threads import begin
from keras_ckpt.formats.variables import COUNTER, SUFFIX
from keras_ckpt.model import compiled, naming, object_graph, parts
from keras_ckpt.model import tensorflow as backend
from keras_ckpt.model.keras_internals import layers_of, trained_by, value_of
from keras_ckpt.model.learned import LearnedState, Learners
from keras_ckpt.model.snapshot import Late, Snapshot
from keras_ckpt.version import __version__

NAMES_KEY = "_KERAS_CKPT_NAMES"
"""The key of a string that marks a checkpoint whose names are those of this module."""
TRAINING_KEY = "_KERAS_CKPT_TRAINING"
"""The key of what a backup holds beside the model: a string of JSON, and with `/0`, `/1` and so on the arrays in it."""
_OVERHEAD = 1 << 10
"""About so many bytes of objects there are for each value of a snapshot."""

_PARTS_OF_KERAS = keras.layers.Layer, keras.Variable


class ModelState:
    """A model's training state, as a checkpoint has it.

    The checkpoint is a plain TensorFlow checkpoint: `tf.train.Checkpoint(model=model).restore(prefix)` restores every
    weight and slot from it.

    Example:

    ```python
    values = ModelState(model).snapshot().move(arena)
    ```

    Args:
        model: A built model.
        weights_only: Whether to leave out the optimizer and the metrics.

    Raises:
        ValueError: Keras runs on another backend than TensorFlow.
    """

    def __init__(self, model: keras.Model, weights_only: bool = False) -> None:
        if keras.backend.backend() != "tensorflow":
            raise ValueError(
                f"keras_ckpt saves models of Keras's TensorFlow backend. Received: {keras.backend.backend()}. "
                "Set KERAS_BACKEND=tensorflow before Keras is imported."
            )
        self.model = model
        self._root = backend.Root(model)
        self._weights_only = weights_only
        self._plan: _Plan | None = None

    def names(self) -> dict[str, Any]:
        """The variables that it writes, by name."""
        return naming.named_variables(self.model, self._weights_only)

    @property
    def size(self) -> int:
        """The bytes of a snapshot, when the variables were looked at last; 0 before the first time."""
        plan = self._plan
        return sum(plan.sizes.values()) + _OVERHEAD * len(plan.sizes) if plan else 0

    @property
    def save_counter(self) -> Any:
        """The variable in which TensorFlow counts saves."""
        return self._root.save_counter

    def sizes(self) -> Mapping[bytes, int]:
        """The bytes of each variable, by its key in a snapshot."""
        return self._current_plan().sizes

    def snapshot(self, others: Mapping[str, Any] = {}, later: Late | None = None) -> Snapshot:
        """The values that the variables have now.

        Args:
            others: More to write, by key; arrays and texts.
            later: More to write: arrays that are known when the snapshot is moved.
        """
        if (plan := self._plan) is not None:
            # While TensorFlow reads, other threads may run Python: one sees whether these are the right things to read.
            holds = begin(functools.partial(plan.holds, self.model))
            snapshot = plan.snapshot(others, later)
            if holds():
                return snapshot
        self._plan = plan = self._new_plan()
        return plan.snapshot(others, later)

    def attributes(self) -> dict[str, Any]:
        """The plain attributes of layers that no checkpoint has, by place, for `unsaved`."""
        return parts.plain_attributes(self.model, self._current_plan().learners.identities())

    def unsaved(self, before: Mapping[str, Any]) -> list[str]:
        """The places of state that a checkpoint of the model does not have.

        Args:
            before: What `attributes` gave when training began. Those that changed since are state.
        """
        plan = self._current_plan()
        moved = [name.rstrip("/") for name, value in self.attributes().items() if before.get(name, value) != value]
        # A checkpoint of the weights alone leaves these out by intent.
        others = {} if self._weights_only else parts.owners_of(self.model, parts.tracked(self.model))
        untracked = parts.untracked(self.model, [*plan.variables, *plan.owners], others)
        return [*untracked, *plan.learners.collect().failed, *moved]

    def _current_plan(self) -> _Plan:
        plan = self._plan
        if plan is None or not plan.holds(self.model):
            self._plan = plan = self._new_plan()
        return plan

    def _new_plan(self) -> _Plan:
        model = self.model
        below = parts.tracked(model)
        optimizers = parts.optimizers_of(model, below)
        owners = [*optimizers.values(), *parts.losses_of(model, below).values()]
        made_of = _made_of(model, owners)
        names = self.names()
        by_id = {id(variable): name for name, variable in names.items()}
        variables = {f"{name}{SUFFIX}": variable for name, variable in names.items()}
        variables[COUNTER] = self._root.save_counter
        graph = self._root.graph({id(variable): key for key, variable in variables.items()})
        described = self._described(optimizers, by_id)
        texts = {object_graph.KEY: graph, NAMES_KEY: b"1", description.KEY: description.encode(described)}
        return _Plan(
            variables=[*variables.values()],
            reader=backend.Reader({key: value_of(variable) for key, variable in variables.items()}),
            constants={key.encode(): string_value([text], ()) for key, text in texts.items()},
            sizes={key.encode(): backend.size_of(value_of(variable)) for key, variable in variables.items()},
            described=described,
            learners=Learners(model, by_id, self._weights_only),
            encoded=_Encoded(),
            owners=owners,
            made_of=made_of,
            identities=list(map(id, made_of)),
            built=_built(owners),
        )

    def _described(self, optimizers: Mapping[str, Any], names: Mapping[int, str]) -> description.Description:
        """What a checkpoint says of the model, but for what its objects learned.

        A variable that an optimizer trains and that is not the model's has the empty name.
        """
        lora = parts.lora_scales(self.model, names)
        if self._weights_only:
            return description.Description(lora=lora)
        built = {prefix: optimizer for prefix, optimizer in optimizers.items() if optimizer.built}
        trained = {prefix: [names.get(id(v), "") for v in trained_by(built[prefix])] for prefix in built}
        return description.Description(
            optimizers=trained, compiled=compiled.encoded(compiled.note(self.model, optimizers)), lora=lora
        )


class _Plan(NamedTuple):
    """What is written of a model, which takes longer to find out than to read, and seldom changes.

    Attributes:
        variables: The model's, in the order of the reader's.
        reader: Reads their values.
        constants: The object graph, the mark of these names, and what is said of the model, as they are written.
        sizes: The bytes of the variables, by their keys.
        described: What is said of the model, but for what its objects learned.
        learners: The objects that hold more than variables.
        encoded: What is written of these.
        owners: The model's optimizers and losses.
        made_of: What the model was made of. It is held, so that no other thing gets the identity of one of them.
        identities: Theirs.
        built: Which of the owners are built.
    """

    variables: Sequence[Any]
    reader: backend.Reader
    constants: Mapping[bytes, Value]
    sizes: Mapping[bytes, int]
    described: description.Description
    learners: Learners
    encoded: _Encoded
    owners: Sequence[Any]
    made_of: Sequence[Any]
    identities: Sequence[int]
    built: Sequence[bool]

    def snapshot(self, others: Mapping[str, Any], later: Late | None) -> Snapshot:
        """The values of now, with more to write beside them."""
        if not self.learners:
            return Snapshot(self.reader, others, self.constants, later)
        taken = self.learners.collect()
        arrays = {description.value_key(index): array for index, array in enumerate(taken.arrays)}
        constants = self.encoded.constants(self.described, taken)
        return Snapshot(self.reader, {**others, **arrays}, {**self.constants, **constants}, later)

    def holds(self, model: keras.Model) -> bool:
        """Whether the model is made of the same things still, and the reader reads their values."""
        same = list(map(id, _made_of(model, self.owners))) == self.identities and _built(self.owners) == self.built
        return same and all(map(operator.is_, map(value_of, self.variables), self.reader.variables))


class _Encoded:
    """What is written of objects that learned more than variables, encoded again when that has changed."""

    def __init__(self) -> None:
        self._taken: LearnedState | None = None
        self._constants: dict[bytes, Value] = {}

    def constants(self, described: description.Description, taken: LearnedState) -> Mapping[bytes, Value]:
        """The description of a model with its objects, and their assets, as they are written."""
        if self._taken is not taken:
            whole = msgspec.structs.replace(described, objects=dict(taken.objects))
            texts = {description.KEY: description.encode(whole)}
            texts |= {description.asset_key(index): data for index, data in enumerate(taken.assets)}
            self._constants = {key.encode(): string_value([text], ()) for key, text in texts.items()}
            self._taken = taken
        return self._constants


def _built(owners: Iterable[Any]) -> list[bool]:
    """Which optimizers are built. Some get no variable by that."""
    return [bool(getattr(each, "built", False)) for each in owners]


def _made_of(model: keras.Model, owners: Iterable[Any]) -> list[Any]:
    """The variables of a model, of its optimizers and of its losses, and what would show that there are more."""
    layers = layers_of(model)
    attributes = [each for layer in layers for each in vars(layer).values()]
    # Asked once for each class, because TensorFlow's answer takes long.
    kinds = {kind for kind in set(map(type, attributes)) if issubclass(kind, backend.Tracked)}
    others = {kind for kind in kinds if not issubclass(kind, _PARTS_OF_KERAS)}  # which the model does not list
    found = [each for each in attributes if type(each) in others]
    holders = [each for each in found if not isinstance(each, backend.Variable | keras.optimizers.Optimizer)]
    found += [each for holder in holders for each in parts.tracked(holder).values()]
    found += parts.contents_of(layers)
    for owner in owners:
        found += owner.variables if isinstance(owner, keras.optimizers.Optimizer) else vars(owner).values()
    return [*layers, *found, *model.variables, *parts.states_of(layers), *model.metrics_variables]


def versions() -> dict[str, str]:
    """The versions of what a checkpoint is written with."""
    return {
        "keras_ckpt": __version__,
        "keras": keras.__version__,
        **backend.VERSIONS,
        "python": platform.python_version(),
    }
