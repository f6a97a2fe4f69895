"""Compares a checkpoint with a model: what fits, and which differences a restore refuses."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import keras

from keras_ckpt.errors import MismatchError
from keras_ckpt.model import compiled, learned, matching, naming
from keras_ckpt.model.backends import NAMES, backend
from keras_ckpt.model.keras_internals import get_config_of, trained_by
from keras_ckpt.model.matching import Matching
from keras_ckpt.model.naming import SEED
from keras_ckpt.model.parts import lora_scales
from keras_ckpt.model.report import RestoreReport, shortened
from keras_ckpt.model.source import Source
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord

OPTIMIZER = "optimizer/"


@dataclasses.dataclass(frozen=True)
class RestoreRequest:
    """The options of a restore.

    Attributes:
        strict: Whether a difference is an error.
        weights_only: Whether the optimizer stays as compiled.
        check_digests: Whether every byte is compared with the digests.
        backup: The directory of a backup of `BackupAndRestore`, `None` for another checkpoint.
        again: Whether this checkpoint was just restored into this model, so warnings are not repeated.
    """

    strict: bool = True
    weights_only: bool = False
    check_digests: bool = True
    backup: str | None = None
    again: bool = False


@dataclasses.dataclass(frozen=True)
class Fit:
    """The parts of a checkpoint that fit a model.

    Attributes:
        variables: The variables of the model, by name.
        matched: The names of variables in the model, each with its name in the checkpoint.
        new_slots: The initial values of slots that the checkpoint does not have yet, by name.
        optimizers: The optimizers of the model, by prefix.
        objects: The objects of the model with state beyond variables, paired with the checkpoint's.
        settings: The settings of `compile` that differ.
        report: The report of the restore.
        differs: Whether the restore skips any part that `strict=True` would refuse.
    """

    variables: Mapping[str, Any]
    matched: Mapping[str, str]
    new_slots: Mapping[str, backend.Tensor]
    optimizers: Mapping[str, Any]
    objects: learned.Pairing
    settings: list[compiled.Difference]
    report: RestoreReport
    differs: bool


class Comparison:
    """The comparison of a checkpoint with a model. It builds the layers and optimizers that the checkpoint has built.

    Example:

    ```python
    fit = Comparison(model, source, record, RestoreRequest(strict=False), objects).fit()
    ```

    Args:
        model: A built model.
        source: The checkpoint.
        record: The record of the checkpoint, `None` if it has no sidecar.
        request: The options of the restore.
        objects: The objects of the model, by name.
    """

    def __init__(
        self,
        model: keras.Model,
        source: Source,
        record: CheckpointRecord | None,
        request: RestoreRequest,
        objects: Mapping[str, Any],
    ) -> None:
        self._model = model
        self._source = source
        self._record = record
        self._request = request
        self._optimizers = {key: each for key, each in objects.items() if isinstance(each, keras.optimizers.Optimizer)}
        self._compiled = compiled.settings_of(model, self._optimizers)  # before a learning rate changes
        self._automatic = None if request.strict else naming.automatic_stems(model)
        self._wanted = self._names()
        names = {id(variable): name for name, variable in self._wanted.items()}
        learners = learned.learners(objects, request.weights_only)
        self._objects = learned.pair(learners, source.description, names, source.assets, self._automatic)
        self._adapted = [each for each in learners.values() if hasattr(each, "adapt")]

    def fit(self) -> Fit:
        """Compares, and refuses a checkpoint that does not fit.

        Raises:
            MismatchError: The checkpoint does not fit the model.
        """
        self._build()
        found = self._match()
        new_slots = self._new_slots(found.missing)
        report = self._report(found, new_slots)
        differs = bool(self._check(report))
        return Fit(
            self._wanted, found.matched, new_slots, self._optimizers, self._objects, self._settings, report, differs
        )

    def _build(self) -> None:
        """Builds the layers and the optimizers that are built in the checkpoint and not in the model."""
        unexpected = {name.rpartition("/")[0] for name in self._source.kinds() if name not in self._wanted}
        lacking = {name: pair for name, pair in self._objects.paired.items() if name in unexpected}
        for name, (each, entry) in self._objects.paired.items():
            (learned.build if name in lacking else learned.rebuild)(each, entry)
        if lacking:
            self._wanted = self._names()
        if self._request.weights_only:
            return
        if unfit := self._source.unfit:
            warn(f"{self._source.prefix} has {' and '.join(unfit)}. It is skipped; the model's stays as compiled.")
        if not all(each.built for each in self._optimizers.values()):
            other = self._trained_differently()
            # A difference is reported before an optimizer is built in vain.
            self._check(self._report(self._match("model/"), (), other))
            if not other:
                self._source.build_optimizers(self._model, self._wanted)
                self._wanted = self._names()

    def _trained_differently(self) -> dict[str, str]:
        """The weights that only the saved or only the compiled optimizer trains, each with the reason.

        The weights that a user's own `train_step` trains are not known in advance.
        """
        optimizer, description = getattr(self._model, "optimizer", None), self._source.description
        own_step = type(self._model).train_step is not keras.Model.train_step
        if optimizer is None or optimizer.built or own_step or description is None:
            return {}
        names = {id(variable): name for name, variable in self._wanted.items()}
        here = {names[id(variable)] for variable in self._model.trainable_variables}
        there = set(description.optimizers.get("optimizer", here))
        reasons = dict.fromkeys(sorted(here - there), "trainable in the model, not trained in the checkpoint")
        reasons |= dict.fromkeys(sorted(there - here), "trained in the checkpoint, not trainable in the model")
        return {f"{OPTIMIZER}{name.removeprefix('model/')}": reason for name, reason in reasons.items()}

    def _match(self, part: str = "") -> Matching:
        """Matches the variables whose names begin with a part, except the variables that an object reads itself."""
        part = "model/" if self._request.weights_only else part
        here = {name: backend.kind_of(variable) for name, variable in self._wanted.items() if name.startswith(part)}
        there = {name: kind for name, kind in self._source.kinds().items() if name.startswith(part)}
        adapted = {id(each) for owner in self._adapted for each in owner.variables}
        movable = {name for name, variable in self._wanted.items() if id(variable) in adapted}
        found = self._skip_other_optimizers(matching.match(here, there, self._automatic, movable))
        names = {id(variable): name for name, variable in self._wanted.items()}
        own = self._objects.self_read_variables(names)
        if self._request.weights_only:
            own |= {name for name in (*found.missing, *found.unexpected) if matching.is_lora(name)}
        scales = self._differing_scales(names)
        return Matching(
            {name: other for name, other in found.matched.items() if name not in scales},
            [name for name in found.missing if name not in own],
            [name for name in found.unexpected if name not in own],
            {name: why for name, why in found.mismatched.items() if name not in own} | scales,
        )

    def _differing_scales(self, names: Mapping[int, str]) -> dict[str, str]:
        """The low-rank updates (LoRA) whose scale differs between model and checkpoint, each with the reason."""
        there = self._source.description.lora if self._source.description else {}
        return {
            name: f"lora_alpha / rank is {scale:.6g} in the model, {there[name]:.6g} in the checkpoint"
            for name, scale in lora_scales(self._model, names).items()
            if name in there and there[name] != scale
        }

    def _skip_other_optimizers(self, found: Matching) -> Matching:
        """Skips an optimizer if the checkpoint has the state of another class, which fits it only in part."""
        others = [each for each in self._settings if each.name.endswith(f"/{compiled.CLASS}")]
        if not others:
            return found
        classes = {each.name.removesuffix(compiled.CLASS): each for each in others}
        unbuilt = {f"{prefix}/" for prefix, optimizer in self._optimizers.items() if not optimizer.built}
        missing = {prefix for prefix in classes if any(name.startswith(prefix) for name in found.missing)}
        partly = tuple(prefix for prefix in classes if prefix in unbuilt | missing)
        other = [name for name in found.matched if name.startswith(partly)]
        reasons = {
            name: f"of another optimizer, {classes[prefix].saved}"
            for name in other
            for prefix in partly
            if name.startswith(prefix)
        }
        matched = {name: here for name, here in found.matched.items() if name not in reasons}
        return found._replace(matched=matched, mismatched={**found.mismatched, **reasons})

    def _new_slots(self, missing: Iterable[str]) -> dict[str, backend.Tensor]:
        """The values of a new optimizer's slots, for an optimizer that was not built yet in the checkpoint."""
        names = {
            id(self._wanted[name]): name for name in missing if name in self._wanted and name.startswith(OPTIMIZER)
        }
        if self._source.description is None or not names:
            return {}
        found: dict[str, backend.Tensor] = {}
        for prefix, optimizer in self._optimizers.items():
            lacks = any(id(each) in names for each in optimizer.variables)
            if lacks and optimizer.built and prefix not in self._source.description.optimizers:
                new = type(optimizer).from_config(get_config_of(optimizer))
                new.build(trained_by(optimizer))
                pairs = zip(optimizer.variables, new.variables, strict=True)
                slots = {names[id(mine)]: other for mine, other in pairs if id(mine) in names}
                found |= backend.Reader(self._model, slots).read()
        return found

    def _report(
        self, found: Matching, new_slots: Collection[str], mismatched: Mapping[str, str] = MappingProxyType({})
    ) -> RestoreReport:
        record, objects = self._record, self._objects
        return RestoreReport(
            self._source.prefix,
            record.step if record else None,
            record.epoch if record else None,
            matched=(*found.matched, *new_slots, *objects.matched),
            missing=(*(name for name in found.missing if name not in new_slots), *objects.missing),
            unexpected=(*found.unexpected, *objects.unexpected),
            mismatched={**found.mismatched, **objects.mismatched, **mismatched},
            other_backend=other_backend(record),
        )

    def _check(self, report: RestoreReport) -> list[str]:
        """Raises an error if the differences forbid the restore.

        Returns:
            The differences that the restore allows, a line each.
        """
        differences = self._differences(report)
        of_model = [line for line in differences if not line.startswith(OPTIMIZER)]
        if self._request.strict and differences:
            raise MismatchError(
                f"{self._source.prefix} does not fit the model {self._model.name!r}; nothing was restored.\n"
                + "\n".join(shortened(differences))
                + f"\n{self._advice(bool(of_model), report)}"
            )
        if not self._request.strict and not self._has_weights(report.matched):
            raise MismatchError(
                f"{self._source.prefix} has nothing that fits the model {self._model.name!r}; nothing was restored.\n"
                + "\n".join(shortened(differences))
                + "\nGive the layers the names that they had when the checkpoint was saved."
            )
        return differences

    def _has_weights(self, matched: Iterable[str]) -> bool:
        """Whether any state of the model but seeds is matched, or seeds of a model that has seeds alone."""
        only_seeds = all(name.endswith(SEED) for name in self._wanted if name.startswith("model/"))
        of_model = (name for name in matched if name.startswith(("model/", "learned/")))
        return any(only_seeds or not name.endswith(SEED) for name in of_model)

    def _advice(self, of_model: bool, report: RestoreReport) -> str:
        """The advice for a strict restore that finds differences."""
        if self._request.backup is not None:
            return (
                "Build and compile the model as it was when the backup was saved. To start the training over, remove "
                f"the backup: keras_ckpt.CheckpointDirectory({self._request.backup!r}).clear()."
            )
        if any(map(matching.is_lora, report.unexpected)):
            return (
                "The checkpoint has low-rank updates (LoRA) of kernels. To merge them into the kernels, restore with "
                "weights_only=True. To train them further, enable LoRA in the model as in the saved model."
            )
        if any(map(matching.is_lora, report.missing)):
            return (
                "The checkpoint has no low-rank updates (LoRA), or has them merged into the kernels. To begin them at "
                "zero, restore with weights_only=True."
            )
        if of_model:
            return (
                "Build and compile the model as it was when the checkpoint was saved, or restore what matches with "
                "strict=False."
            )
        return (
            "The weights fit, the optimizer does not. Compile the model as it was when the checkpoint was saved. To "
            "continue this run with the optimizer as compiled now, restore with weights_only=True."
        )

    def _differences(self, report: RestoreReport) -> list[str]:
        """The differences that a strict restore refuses, a line each."""
        counts: tuple[str, ...] = ("model/", "learned/", OPTIMIZER)
        there = self._source.kinds()
        known = [*report.matched, *report.missing, *report.mismatched]
        saved_without = not any(name.startswith(OPTIMIZER) for name in there)
        not_compiled = not any(name.startswith(OPTIMIZER) for name in known)
        if saved_without or not_compiled:
            counts = ("model/", "learned/")
        missing = [name for name in report.missing if not (self._source.lacks_seeds and name.endswith(SEED))]
        reasons = dict.fromkeys(missing, "not in the checkpoint")
        reasons |= dict.fromkeys(report.unexpected, "in the checkpoint, not in the model")
        reasons |= report.mismatched
        for setting in self._settings:
            # A schedule has no variable, a fixed rate has. If one side has a schedule, nothing can be restored.
            if setting.name.endswith(compiled.RATE) and not setting.restored:
                reasons.pop(setting.name, None)
        return [f"{name}: {reason}" for name, reason in reasons.items() if name.startswith(counts)]

    @functools.cached_property
    def _settings(self) -> list[compiled.Difference]:
        """The settings of `compile` that differ from the checkpoint's."""
        description = self._source.description
        if not (self._model.compiled and description and description.compiled):
            return []
        return compiled.differences(self._compiled, description.compiled)

    def _names(self) -> dict[str, Any]:
        return naming.named_variables(self._model, self._request.weights_only)


def other_backend(record: CheckpointRecord | None) -> str | None:
    """The backend that saved a checkpoint, if it is not the present one."""
    versions = record.versions if record else {}
    return next((name for name in NAMES if name in versions and name not in backend.VERSIONS), None)
