"""The transfer of an open checkpoint into a model. It compares and reads everything before a variable changes."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import keras

from keras_ckpt.errors import DamagedCheckpointError, MismatchError
from keras_ckpt.formats.description import Learned
from keras_ckpt.model import compiled, learned, matching, naming
from keras_ckpt.model import tensorflow as backend
from keras_ckpt.model.checkpoint_reader import Source
from keras_ckpt.model.keras_internals import trained_by, value_of
from keras_ckpt.model.matching import Matching
from keras_ckpt.model.parts import lora_scales
from keras_ckpt.model.position import Position, set_position
from keras_ckpt.model.report import RestoreReport, by_layer, shortened
from keras_ckpt.store.files import Folder
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord

_SEED = "/seed_generator_state"
_OPTIMIZER = "optimizer/"


@dataclasses.dataclass(frozen=True)
class Request:
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


def transfer(
    model: keras.Model, files: Folder, name: str, record: CheckpointRecord | None, request: Request
) -> RestoreReport:
    """Restores a checkpoint into a model, or leaves the model as it was.

    Args:
        model: A built model.
        files: The files of the checkpoint, open and held.
        name: The name of the checkpoint.
        record: The record of the checkpoint, `None` if it has no sidecar.
        request: The options.

    Raises:
        MismatchError: The checkpoint does not fit the model.
        DamagedCheckpointError: The checkpoint differs from its digests or cannot be read.
    """
    objects = naming.named_objects(model)
    undo = learned.Undo(learned.learners(objects, request.weights_only).values())
    try:
        return _Transfer(model, files, name, record, request, objects).run()
    except BaseException:
        undo.undo()
        raise


class _Transfer:
    """One transfer, step by step."""

    def __init__(
        self,
        model: keras.Model,
        files: Folder,
        name: str,
        record: CheckpointRecord | None,
        request: Request,
        objects: Mapping[str, Any],
    ) -> None:
        digested: Sequence[CheckpointFile] = record.files if record and request.check_digests else ()
        self._model = model
        self._record = record
        self._request = request
        self._prefix = os.path.join(files.path, name)
        self._optimizers = {key: each for key, each in objects.items() if isinstance(each, keras.optimizers.Optimizer)}
        self._compiled = compiled.settings_of(model, self._optimizers)  # before a learning rate changes
        self._source = Source(files, name, digested)
        self._arrays, self._assets = self._source.read_learned()
        automatic = None if request.strict else naming.automatic_stems(model)
        self._wanted = self._names()
        names = {id(variable): name for name, variable in self._wanted.items()}
        learners = learned.learners(objects, request.weights_only)
        self._objects = learned.pair(learners, self._source.description, names, self._assets, automatic)
        self._automatic = automatic
        self._adapted = [each for each in learners.values() if hasattr(each, "adapt")]

    def run(self) -> RestoreReport:
        self._build()
        found = self._match()
        new_slots = self._new_slots(found.missing)
        report = self._report(found, new_slots)
        differences = self._check(report)
        read = self._read(found)
        values = {name: read[other] for name, other in found.matched.items()} | new_slots | self._merged(read)
        self._warn(report, values)
        self._assign(values, read)
        self._keep_rates(values)
        self._set_position(bool(differences))
        return report

    def _names(self) -> dict[str, Any]:
        return naming.named_variables(self._model, self._request.weights_only)

    def _build(self) -> None:
        """Builds the layers and the optimizers that are built in the checkpoint and not in the model."""
        unexpected = {name.rpartition("/")[0] for name in self._source.kinds() if name not in self._wanted}
        lacking = {name: pair for name, pair in self._objects.paired.items() if name in unexpected}
        for name, (each, entry) in self._objects.paired.items():
            (learned.build if name in lacking else learned.rebuild)(each, entry)
        if lacking:
            self._wanted = self._names()
        if self._source.foreign:
            unfit = self._source.find(self._model)
            if unfit and not self._request.weights_only:
                warn(f"{self._prefix} has {' and '.join(unfit)}. It is skipped; the model's stays as compiled.")
        elif not self._request.weights_only and not all(each.built for each in self._optimizers.values()):
            other = self._trained_differently()
            # A difference is reported before an optimizer is built in vain.
            self._check(self._report(self._match("model/"), (), other))
            if not other:
                self._source.build_optimizers(self._model, self._wanted)
        else:
            return
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
        return {f"{_OPTIMIZER}{name.removeprefix('model/')}": reason for name, reason in reasons.items()}

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
            id(self._wanted[name]): name for name in missing if name in self._wanted and name.startswith(_OPTIMIZER)
        }
        if self._source.description is None or not names:
            return {}
        found: dict[str, backend.Tensor] = {}
        for prefix, optimizer in self._optimizers.items():
            lacks = any(id(each) in names for each in optimizer.variables)
            if lacks and optimizer.built and prefix not in self._source.description.optimizers:
                new = type(optimizer).from_config(optimizer.get_config())
                new.build(trained_by(optimizer))
                pairs = zip(optimizer.variables, new.variables, strict=True)
                found |= {names[id(mine)]: other.value for mine, other in pairs if id(mine) in names}
        return found

    def _report(
        self, found: Matching, new_slots: Collection[str], mismatched: Mapping[str, str] = MappingProxyType({})
    ) -> RestoreReport:
        record, objects = self._record, self._objects
        return RestoreReport(
            self._prefix,
            record.step if record else None,
            record.epoch if record else None,
            matched=(*found.matched, *new_slots, *objects.matched),
            missing=(*(name for name in found.missing if name not in new_slots), *objects.missing),
            unexpected=(*found.unexpected, *objects.unexpected),
            mismatched={**found.mismatched, **objects.mismatched, **mismatched},
        )

    def _check(self, report: RestoreReport) -> list[str]:
        """Raises an error if the differences forbid the restore.

        Returns:
            The differences that the restore allows, a line each.
        """
        differences = self._differences(report)
        of_model = [line for line in differences if not line.startswith(_OPTIMIZER)]
        if self._request.strict and differences:
            raise MismatchError(
                f"{self._prefix} does not fit the model {self._model.name!r}; nothing was restored.\n"
                + "\n".join(shortened(differences))
                + f"\n{self._advice(bool(of_model), report)}"
            )
        if not self._request.strict and not self._has_weights(report.matched):
            raise MismatchError(
                f"{self._prefix} has nothing that fits the model {self._model.name!r}; nothing was restored.\n"
                + "\n".join(shortened(differences))
                + "\nGive the layers the names that they had when the checkpoint was saved."
            )
        return differences

    def _has_weights(self, matched: Iterable[str]) -> bool:
        """Whether any state of the model but seeds is matched, or seeds of a model that has seeds alone."""
        only_seeds = all(name.endswith(_SEED) for name in self._wanted if name.startswith("model/"))
        of_model = (name for name in matched if name.startswith(("model/", "learned/")))
        return any(only_seeds or not name.endswith(_SEED) for name in of_model)

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
        counts: tuple[str, ...] = ("model/", "learned/", _OPTIMIZER)
        there = self._source.kinds()
        known = [*report.matched, *report.missing, *report.mismatched]
        saved_without = not any(name.startswith(_OPTIMIZER) for name in there)
        not_compiled = not any(name.startswith(_OPTIMIZER) for name in known)
        if saved_without or not_compiled:
            counts = ("model/", "learned/")
        missing = [name for name in report.missing if not (self._source.foreign and name.endswith(_SEED))]
        reasons = dict.fromkeys(missing, "not in the checkpoint")
        reasons |= dict.fromkeys(report.unexpected, "in the checkpoint, not in the model")
        reasons |= report.mismatched
        for setting in self._settings:
            # A schedule has no variable, a fixed rate has. If one side has a schedule, nothing can be restored.
            if setting.name.endswith(compiled.RATE) and not setting.restored:
                reasons.pop(setting.name, None)
        return [f"{name}: {reason}" for name, reason in reasons.items() if name.startswith(counts)]

    def _read(self, found: Matching) -> dict[str, backend.Tensor]:
        """Reads the values, by their names on disk."""
        names = {*found.matched.values()}
        for _, entry in self._objects.paired.values():
            names |= set(entry.variables.values())
        if self._request.weights_only:
            names |= {name for pair in self._lora().values() for name in pair}
        if unknown := names - self._source.kinds().keys():
            raise DamagedCheckpointError(f"its description names {unknown.pop()!r:.200}, which its index does not")
        return self._source.read(sorted(names))

    def _lora(self) -> dict[str, tuple[str, str]]:
        return matching.lora_in(self._source.kinds())

    def _merged(self, read: Mapping[str, backend.Tensor]) -> dict[str, backend.Tensor]:
        """The kernels with the checkpoint's low-rank updates merged in, and zeros for the model's own updates."""
        if not self._request.weights_only:
            return {}
        wanted = self._wanted
        factors = self._source.description.lora if self._source.description else {}
        values = {}
        for kernel, (first, second) in self._lora().items():
            if kernel in wanted and first not in wanted:
                if not backend.is_floating(read[kernel]):
                    raise MismatchError(
                        f"{self._prefix} has a low-rank update of {kernel}, which is quantized. Nothing was restored: "
                        "merging it loses precision. Restore into a model with LoRA enabled, as it was saved."
                    )
                values[kernel] = backend.merged(read[kernel], read[first], read[second], factors.get(first, 1.0))
        # One zero factor makes the product zero, so the other factor may stay.
        zero = [name for name in wanted if matching.is_lora(name) and name.endswith("_b") and name not in read]
        return values | {name: backend.zeros_like(wanted[name]) for name in zero}

    def _warn(self, report: RestoreReport, values: Mapping[str, backend.Tensor]) -> None:
        """Warns before the model changes: where warnings are errors, the model stays as it was."""
        if self._request.again:
            return
        of_model = {name: value for name, value in values.items() if name.startswith("model/")}
        if not_finite := [name for name, value in of_model.items() if not backend.is_finite(value)]:
            warn(f"{self._prefix} has NaN or infinity in {', '.join(shortened(not_finite))}")
        left = [name for name in (*report.missing, *report.mismatched) if name.startswith(("model/", "learned/"))]
        if left and not self._request.strict:
            warn(
                f"{self._prefix} lacks a part of the model. Left as they were: {', '.join(shortened(by_layer(left)))}."
            )
        updates = [*filter(matching.is_lora, report.unexpected)]
        if updates and not self._request.weights_only:
            warn(
                f"{self._prefix} has low-rank updates (LoRA) that the model lacks. Without them its predictions "
                f"differ: {', '.join(shortened(by_layer(updates)))}. restore(..., weights_only=True) merges them."
            )
        if self._objects.unknown:
            kind = "TensorFlow" if self._source.foreign else "an older version of keras_ckpt"
            warn(
                f"{self._prefix} was written by {kind}. It lacks the state beyond variables, such as a vocabulary, "
                f"of these layers. They are as they were: {', '.join(self._objects.unknown)}."
            )
        if not self._request.weights_only:
            self._warn_of_settings(report, values)

    @functools.cached_property
    def _settings(self) -> list[compiled.Difference]:
        """The settings of `compile` that differ from the checkpoint's."""
        description = self._source.description
        if not (self._model.compiled and description and description.compiled):
            return []
        return compiled.differences(self._compiled, description.compiled)

    def _warn_of_settings(self, report: RestoreReport, values: Mapping[str, backend.Tensor]) -> None:
        """Warns in one line of each setting that differs, and says whether the program's or the saved one holds."""
        optimized = any(name.startswith(_OPTIMIZER) for name in report.matched)
        ending = "" if optimized else f"/{compiled.CLASS}"  # without the optimizer's state only its class matters
        found = [each for each in self._settings if not each.name.startswith(_OPTIMIZER) or each.name.endswith(ending)]
        rates = {name: float(value) for name, value in values.items() if name.endswith(compiled.RATE)}
        found = [each._replace(saved=rates[each.name]) if self._is_restored(each, rates) else each for each in found]
        found = [each for each in found if each.program != each.saved]
        if not found:
            return
        where = " in on_train_batch_begin of a callback" if self._request.backup else " after the restore"
        advice = f" To take the program's, set model.optimizer.{compiled.RATE}{where}."
        restored = any(each.restored for each in found)
        warn(f"Compiled differently than {self._prefix}: {'; '.join(map(str, found))}.{advice if restored else ''}")

    def _is_restored(self, setting: compiled.Difference, values: Container[str]) -> bool:
        return setting.restored and setting.name in values

    def _keep_rates(self, values: Container[str]) -> None:
        """Records the restored learning rates as settings, so later checkpoints save them, not the program's."""
        for each in self._settings:
            if self._is_restored(each, values):
                compiled.replace(self._optimizers, each.name, each.saved)

    def _assign(self, values: Mapping[str, backend.Tensor], read: Mapping[str, backend.Tensor]) -> None:
        """Assigns the values to the model and restores its objects; after an error, resets the variables."""
        variables = {name: value_of(self._wanted[name]) for name in values}
        objects = self._objects
        changes_objects = bool(objects.paired or objects.variables_only)
        before = backend.Reader(variables).read() if changes_objects else {}
        for name, value in values.items():
            backend.assign(variables[name], value)
        if not changes_objects:
            return
        try:
            for name, (each, entry) in objects.paired.items():
                self._restore_object(name, each, entry, read)
            names = {id(self._wanted[name]): name for name in values}
            for name, each in objects.variables_only.items():
                with self._refusal(name):
                    learned.restore_variables(each, names, values)
        except BaseException:
            for name, value in before.items():
                backend.assign(variables[name], value)
            raise
        _retrace(self._model)

    def _restore_object(self, name: str, each: Any, entry: Learned, read: Mapping[str, backend.Tensor]) -> None:
        """Restores the learned state of an object."""
        store = {key: backend.array_of(read[other]) for key, other in entry.variables.items()}
        store |= {key: self._arrays[index] for key, index in entry.values.items()}
        files = {path: self._assets[asset.index] for path, asset in entry.assets.items()}
        undo = learned.Undo([each])
        with self._refusal(name):
            try:
                learned.restore_state(each, entry, store, files)
            except DamagedCheckpointError:
                raise
            except Exception:
                undo.undo()
                # Some layers of Keras cannot read what they wrote. That is harmless if the program adapted them again.
                if not (type(each).__module__.startswith("keras.") and learned.has_state(each, entry, store, files)):
                    raise

    @contextlib.contextmanager
    def _refusal(self, name: str) -> Iterator[None]:
        """Turns an error of an object that is being restored into an error that names the object."""
        try:
            yield
        except DamagedCheckpointError:
            raise
        except Exception as error:
            raise MismatchError(
                f"{name} refused its state in {self._prefix}; nothing was restored. It raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def _set_position(self, differs: bool) -> None:
        record = self._record
        position = None
        # A model without its optimizer does not continue the run, however it is trained later.
        if record and record.run_id and self._model.compiled and (self._request.weights_only or not differs):
            position = Position(record.run_id, record.step, record.epoch or 0, record.batch or 0)
        set_position(self._model, position, with_optimizer=not self._request.weights_only)


def _retrace(model: keras.Model) -> None:
    """Makes a model trace its functions again: a traced function may hold an old learned state as a constant."""
    for kind in ("train", "test", "predict"):
        if getattr(model, f"{kind}_function", None) is not None:
            getattr(model, f"make_{kind}_function")(force=True)
