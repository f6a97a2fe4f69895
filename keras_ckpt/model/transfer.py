"""Transfers an open checkpoint into a model. It compares and reads everything before a variable changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import keras

from keras_ckpt.errors import DamagedCheckpointError, MismatchError
from keras_ckpt.formats.description import Learned
from keras_ckpt.model import compiled, integers, learned, matching, naming
from keras_ckpt.model.backends import backend
from keras_ckpt.model.checkpoint_reader import BundleSource
from keras_ckpt.model.comparison import OPTIMIZER, Comparison, Fit, RestoreRequest
from keras_ckpt.model.file_reader import FileSource
from keras_ckpt.model.position import Position, set_position
from keras_ckpt.model.report import RestoreReport, by_layer, shortened
from keras_ckpt.model.source import Source
from keras_ckpt.store.files import Folder
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord


def transfer(
    model: keras.Model, files: Folder, name: str, record: CheckpointRecord | None, request: RestoreRequest
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

    def opened(objects: Mapping[str, Any]) -> Source:
        return open_source(model, objects, files, name, record, request.check_digests)

    fit = transfer_from(model, opened, record, request)
    _set_position(model, record, request, fit.differs)
    return fit.report


def transfer_from(
    model: keras.Model,
    opened: Callable[[Mapping[str, Any]], Source],
    record: CheckpointRecord | None,
    request: RestoreRequest,
) -> Fit:
    """Restores a source into a model, or leaves the model as it was. The position of the model stays.

    Args:
        model: A built model.
        opened: Opens the source, given the objects of the model by name.
        record: The record of the checkpoint, `None` if it has none.
        request: The options.

    Raises:
        MismatchError: The source does not fit the model.
        DamagedCheckpointError: The source cannot be read.
    """
    objects = naming.named_objects(model)
    undo = learned.Undo(learned.learners(objects, request.weights_only).values())
    try:
        source = opened(objects)
        fit = Comparison(model, source, record, request, objects).fit()
        _Transfer(model, source, request, fit).run()
        return fit
    except BaseException:
        undo.undo()
        raise


def open_source(
    model: keras.Model,
    objects: Mapping[str, Any],
    files: Folder,
    name: str,
    record: CheckpointRecord | None,
    check_digests: bool,
) -> Source:
    """The source of the checkpoint, whose variables have the names of the model."""
    if files.series.template:
        return FileSource(model, objects, files, name, record, check_digests)
    source = BundleSource(files, name, record.files if record and check_digests else ())
    if source.foreign:
        source.find(model)
    return source


class _Transfer:
    """The transfer of the parts that fit, step by step."""

    def __init__(self, model: keras.Model, source: Source, request: RestoreRequest, fit: Fit) -> None:
        self._model = model
        self._source = source
        self._prefix = source.prefix
        self._request = request
        self._fit = fit

    def run(self) -> None:
        """Reads all values, warns, and assigns them."""
        read = self._read()
        fit = self._fit
        values = self._matched(read) | {**fit.new_slots} | self._merged(read)
        self._warn(values)
        self._assign(values, read)
        self._keep_rates(values)

    def _read(self) -> dict[str, backend.Tensor]:
        """Reads the values, by their names on disk."""
        names = {*self._fit.matched.values()}
        for _, entry in self._fit.objects.paired.values():
            names |= set(entry.variables.values())
        if self._request.weights_only:
            names |= {name for pair in self._lora().values() for name in pair}
        if unknown := names - self._source.kinds().keys():
            raise DamagedCheckpointError(f"its description names {unknown.pop()!r:.200}, which its index does not")
        return self._source.read(sorted(names))

    def _matched(self, read: Mapping[str, backend.Tensor]) -> dict[str, backend.Tensor]:
        """The values of matched variables, each in the type of its variable."""
        kinds, values = self._source.kinds(), {}
        for name, other in self._fit.matched.items():
            dtype = backend.kind_of(self._fit.variables[name]).dtype
            same = kinds[other].dtype == dtype
            values[name] = read[other] if same else integers.converted(name, read[other], dtype)
        return values

    def _lora(self) -> dict[str, tuple[str, str]]:
        return matching.lora_in(self._source.kinds())

    def _merged(self, read: Mapping[str, backend.Tensor]) -> dict[str, backend.Tensor]:
        """The kernels with the checkpoint's low-rank updates merged in, and zeros for the model's own updates."""
        if not self._request.weights_only:
            return {}
        wanted = self._fit.variables
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
        return values | {name: backend.zeros(backend.kind_of(wanted[name])) for name in zero}

    def _warn(self, values: Mapping[str, backend.Tensor]) -> None:
        """Warns before the model changes: where warnings are errors, the model stays as it was."""
        if self._request.again:
            return
        report = self._fit.report
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
        if unknown := [*self._fit.objects.unknown, *self._source.lacking]:
            warn(
                f"{self._prefix} {self._source.origin}. It lacks the state beyond variables, such as a vocabulary, of "
                f"these layers. They are as they were: {', '.join(unknown)}."
            )
        if not self._request.weights_only:
            self._warn_of_settings(values)

    def _warn_of_settings(self, values: Mapping[str, backend.Tensor]) -> None:
        """Warns in one line of each setting that differs, and says whether the program's or the saved one holds."""
        optimized = any(name.startswith(OPTIMIZER) for name in self._fit.report.matched)
        ending = "" if optimized else f"/{compiled.CLASS}"  # without the optimizer's state only its class matters
        found = [
            each for each in self._fit.settings if not each.name.startswith(OPTIMIZER) or each.name.endswith(ending)
        ]
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
        for each in self._fit.settings:
            if self._is_restored(each, values):
                compiled.replace(self._fit.optimizers, each.name, each.saved)

    def _assign(self, values: Mapping[str, backend.Tensor], read: Mapping[str, backend.Tensor]) -> None:
        """Assigns the values to the model and restores its objects; after an error, resets the variables."""
        variables = {name: self._fit.variables[name] for name in values}
        objects = self._fit.objects
        changes_objects = bool(objects.paired or objects.variables_only)
        before = UndoAssignment(self._model, variables if changes_objects else {})
        for name, value in values.items():
            backend.assign(variables[name], value)
        if not changes_objects:
            return
        try:
            for name, (each, entry) in objects.paired.items():
                self._restore_object(name, each, entry, read)
            names = {id(self._fit.variables[name]): name for name in values}
            for name, each in objects.variables_only.items():
                with self._refusal(name):
                    learned.restore_variables(each, names, values)
        except BaseException:
            before.undo()
            raise
        retrace(self._model)

    def _restore_object(self, name: str, each: Any, entry: Learned, read: Mapping[str, backend.Tensor]) -> None:
        """Restores the learned state of an object."""
        store = {key: backend.array_of(read[other]) for key, other in entry.variables.items()}
        store |= {key: self._source.arrays[index] for key, index in entry.values.items()}
        files = {path: self._source.assets[asset.index] for path, asset in entry.assets.items()}
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


class UndoAssignment:
    """Remembers the values of variables, to undo an assignment.

    Args:
        model: The model of the variables.
        variables: The variables by name.
    """

    def __init__(self, model: keras.Model, variables: Mapping[str, Any]) -> None:
        self._variables = variables
        self._before = backend.Reader(model, variables).read()
        if backend.COPIES_AT_ONCE:  # the next assignment changes the memory of the values in place
            self._before = {name: backend.array_of(value).copy() for name, value in self._before.items()}

    def undo(self, but: Iterable[Any] = ()) -> None:
        """Assigns the values again.

        Args:
            but: The variables that stay as they are.
        """
        stay = {id(each) for each in but}
        for name, variable in self._variables.items():
            if id(variable) not in stay:
                backend.assign(variable, self._before[name])


def _set_position(model: keras.Model, record: CheckpointRecord | None, request: RestoreRequest, differs: bool) -> None:
    position = None
    # A model without its optimizer does not continue the run, however it is trained later.
    if record and record.run_id and model.compiled and (request.weights_only or not differs):
        position = Position(record.run_id, record.step, record.epoch or 0, record.batch or 0)
    set_position(model, position, with_optimizer=not request.weights_only)


def retrace(model: keras.Model) -> None:
    """Makes a model trace its functions again: a traced function may hold an old learned state as a constant."""
    for kind in ("train", "test", "predict"):
        if getattr(model, f"{kind}_function", None) is not None:
            getattr(model, f"make_{kind}_function")(force=True)
