"""The mean of checkpoints, as a checkpoint of its own. It is made without a framework."""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from keras_ckpt.errors import CheckpointNotFoundError, DirectoryNotEmptyError, MismatchError, SaveError
from keras_ckpt.formats import arrays
from keras_ckpt.formats.bundle_index import Index, read_index
from keras_ckpt.formats.bundle_reader import read_values
from keras_ckpt.formats.bundle_writer import Value, array_value, write_bundle
from keras_ckpt.formats.damage import damage_of
from keras_ckpt.formats.variables import Kind, is_of_optimizer, names_in, values_of
from keras_ckpt.store import layout, tails
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.plan import resolved
from keras_ckpt.store.policies import BestN
from keras_ckpt.store.record import CheckpointFile, CheckpointRecord, Mode, step_in
from keras_ckpt.store.runs import Runs
from keras_ckpt.store.tables import few, relative
from keras_ckpt.store.writer import SaveRequest, Write, Writer
from keras_ckpt.version import __version__

if TYPE_CHECKING:
    from keras_ckpt.formats.exporting import Checkpoint
    from keras_ckpt.formats.keras_export import KerasContent

_ARCHIVE, _WEIGHTS = ".keras", ".weights.h5"
_DIFFERENCES = 12


class Mean:
    """The mean of arrays of floats of one kind, in float32 or a larger type. Equal arrays have themselves as mean.

    Example:

    ```python
    mean = Mean(first)
    mean.add(second)
    array = mean.value()
    ```

    Args:
        first: The first array.
    """

    def __init__(self, first: np.ndarray) -> None:
        self._first = first
        self._count = 1
        self._equal = True
        self._total = first.astype(np.result_type(first.dtype, np.float32))

    def add(self, array: np.ndarray) -> None:
        """Adds an array. NumPy converts small types in pieces, without a copy of the whole array."""
        self._equal = self._equal and np.array_equal(_bytes(array), _bytes(self._first))
        self._count += 1
        np.add(self._total, array, out=self._total)

    def value(self) -> np.ndarray:
        """The mean, in the type of the arrays."""
        if self._equal:
            return self._first
        np.divide(self._total, self._count, out=self._total)
        return self._total.astype(self._first.dtype, copy=False)


def _bytes(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def chosen(
    checkpoints: CheckpointDirectory | str | os.PathLike[str] | Iterable[Checkpoint],
    best: int,
    monitor: str | None,
    mode: Mode | None,
) -> Sequence[Checkpoint]:
    """The checkpoints to average, the newest last: the best of a run, or all of a list.

    Raises:
        CheckpointNotFoundError: There is no checkpoint, or none has the metric.
        MonitorError: Neither the arguments nor the sidecars give the metric, or its mode.
        TypeError, ValueError: An argument is wrong.
    """
    if not isinstance(checkpoints, CheckpointDirectory | str | os.PathLike):
        return _listed(checkpoints, monitor, mode)
    runs = checkpoints if isinstance(checkpoints, CheckpointDirectory) else CheckpointDirectory(checkpoints)
    runs.refuse_one_file()
    listing, wanted = runs.listing(), BestN(best, monitor, mode)
    if not listing.records:
        raise CheckpointNotFoundError(f"There is no checkpoint in {runs.path}.")
    policy = resolved(wanted, listing, CheckpointNotFoundError)
    steps = policy.select(listing.records)
    if not steps:
        raise CheckpointNotFoundError(f"No checkpoint in {runs.path} is best: {policy!r} found no finite value.")
    return [record for record in listing.records if record.step in steps]


def _listed(checkpoints: Any, monitor: str | None, mode: Mode | None) -> Sequence[Checkpoint]:
    """The checkpoints of a list. Those of one series are in the order of saving."""
    if isinstance(checkpoints, CheckpointRecord | Runs) or not isinstance(checkpoints, Iterable):
        raise TypeError(
            f"average() expected a directory or a list of checkpoints first. Received: {checkpoints!r:.200}"
        )
    found = [*checkpoints]
    if not found or monitor or mode:
        raise ValueError(
            "average() averages all checkpoints of a list. Expected at least one checkpoint, and neither monitor nor "
            f"mode. Received: {len(found)} checkpoints, monitor={monitor!r}, mode={mode!r}"
        )
    records = [each for each in found if isinstance(each, CheckpointRecord)]
    in_order: Sequence[CheckpointRecord] = sorted(records, key=lambda record: record.sequence)
    one_series = len(records) == len(found) and len({(each.directory, each.template) for each in records}) == 1
    return in_order if one_series else found


def average_into(checkpoints: Sequence[Checkpoint], path: str) -> CheckpointRecord:
    """Saves the mean of checkpoints into a new directory, or as a file of Keras.

    Args:
        checkpoints: The checkpoints, the newest last.
        path: The directory, or the path of the file.

    Raises:
        MismatchError: The checkpoints have weights of other names, shapes or types.
        DirectoryNotEmptyError: Checkpoints are at the path.
        DamagedCheckpointError, CheckpointNotFoundError: A checkpoint cannot be read.
        ValueError: The path cannot hold the checkpoints.
        SaveError: The mean cannot be saved.
    """
    target = _target(path)
    form = _as_file if target.series.template else _as_bundle
    with contextlib.ExitStack() as keep_open:
        opened = [read_checkpoint(each, form, keep_open) for each in checkpoints]
        refuse_other_weights({each.prefix: each.kinds for each in opened})
        mean = _Means(opened)
        write, size = opened[-1].writer(mean)
        return _save(target, opened, write, size)


def refuse_other_weights(kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses to average checkpoints whose weights have other names, shapes or types than the newest's.

    Args:
        kinds: The kinds of the weights by name, by the title of the checkpoint, the newest last.

    Raises:
        MismatchError: The weights differ. The error names them.
    """
    newest, expected = [*kinds.items()][-1]
    for title, each in kinds.items():
        names = [name for name in {**each, **expected} if each.get(name) != expected.get(name)]
        lines = [f"{name}: {_kind(each.get(name))}, {_kind(expected.get(name))} in {newest}" for name in names]
        if len(lines) > _DIFFERENCES:
            lines[_DIFFERENCES - 1 :] = [f"and {len(lines) - _DIFFERENCES + 1} more"]
        if lines:
            raise MismatchError(
                f"{title} cannot be averaged with {newest}: their weights differ.\n" + "\n".join(lines) + "\nAverage "
                "checkpoints of one model."
            )


def title_of(prefixes: Sequence[str]) -> str:
    """The title of an average, for messages."""
    return f"the average of {few([relative(prefix) for prefix in prefixes])}"


def _kind(kind: Any) -> str:
    return "missing" if kind is None else f"{kind.dtype} {kind.shape}"


class _Opened(NamedTuple):
    """An open checkpoint.

    Attributes:
        prefix: Its path.
        name: Its name.
        record: Its record, `None` if it has none.
        kinds: The kinds of the model's own values by name.
        read: Reads a value.
        writer: The function that writes the checkpoint with other values, and their approximate bytes.
    """

    prefix: str
    name: str
    record: CheckpointRecord | None
    kinds: Mapping[str, Kind]
    read: Callable[[str], np.ndarray]
    writer: Callable[[_Means], tuple[Write, int]]


class _Means:
    """The values of an average: the means of the model's own floats, and all else of the newest checkpoint.

    Args:
        opened: The checkpoints, the newest last.
    """

    def __init__(self, opened: Sequence[_Opened]) -> None:
        self._opened = opened
        self.names: Set[str] = {name for name, kind in opened[-1].kinds.items() if arrays.is_floating(kind.dtype)}

    def read(self, name: str) -> np.ndarray:
        if name not in self.names:
            return self._opened[-1].read(name)
        mean = Mean(self._opened[0].read(name))
        for each in self._opened[1:]:
            mean.add(each.read(name))
        return mean.value()


def _as_bundle(files: Folder, name: str, record: CheckpointRecord | None) -> _Opened:
    prefix = os.path.join(files.path, name)
    if files.series.template:
        raise ValueError(
            f"{relative(prefix)} is a file of Keras, and a directory holds TensorFlow checkpoints. Average it into a "
            f"path that ends in {_ARCHIVE} or {_WEIGHTS}, or into a model."
        )
    digested = record.files if record else ()
    index = read_index(files, name, digested)
    values = values_of(index, digested)

    def read(name: str) -> np.ndarray:
        with damage_of(prefix):
            return values.read(files, name)

    def writer(mean: _Means) -> tuple[Write, int]:
        with damage_of(prefix):
            content = _bundle(files, index, mean)
        return lambda stage, record: write_bundle(stage, record.name, [content])[0], _size(content)

    return _Opened(prefix, name, record, {each: values.kinds[each] for each in values.own}, read, writer)


def _bundle(files: Folder, index: Index, mean: _Means) -> dict[bytes, Value]:
    """The values of a TensorFlow checkpoint by key, with the means in the places of its own."""
    keys = {key.encode(): None for key in sorted(index.variables)}
    means = {key.encode(): name for name, key in names_in(index).items() if name in mean.names}
    others = read_values(files, index, keys.keys() - means.keys(), arrays.empty)
    return {key: array_value(mean.read(means[key]) if key in means else others[key]) for key in keys}


def _size(content: Mapping[bytes, Value]) -> int:
    return sum(len(value.data) for value in content.values())


def _as_file(files: Folder, name: str, record: CheckpointRecord | None) -> _Opened:
    from keras_ckpt.formats.keras_export import keras_content  # a directory needs no h5py

    content = keras_content(files, name, record)
    own = {path: kind for path, kind in content.kinds.items() if not is_of_optimizer(path)}
    writer = functools.partial(_file_writer, content)
    return _Opened(content.prefix, name, record, own, content.read, writer)


def _file_writer(content: KerasContent, mean: _Means) -> tuple[Write, int]:
    from keras_ckpt.formats.keras_export import archive_of, weights_of
    from keras_ckpt.formats.keras_writer import write_archive, write_hdf5

    averaged = content._replace(read=mean.read)

    def write(stage: Folder, record: CheckpointRecord) -> Sequence[CheckpointFile]:
        files: list[CheckpointFile] = []

        def tail(size: int, digest: str) -> bytes:
            files[:] = [CheckpointFile(record.name, size, digest)]
            return tails.tail(record, size, digest)

        if record.name.endswith(_ARCHIVE):
            write_archive(stage, record.name, archive_of(averaged), tail)
        else:
            write_hdf5(stage, record.name, weights_of(averaged), tail)
        return files

    return write, sum(int(np.prod(kind.shape)) * kind.dtype.itemsize for kind in content.kinds.values())


def _target(path: str) -> CheckpointDirectory:
    """The place of an average.

    Raises:
        ValueError: The path is a template, or has another ending.
        DirectoryNotEmptyError: Checkpoints are there.
    """
    if not layout.is_keras_file(path):
        target = CheckpointDirectory(path, layout.TENSORFLOW)
    elif path.endswith((_ARCHIVE, _WEIGHTS)) and layout.split(path)[1].is_one_name:
        target = CheckpointDirectory(path)
    else:
        raise ValueError(
            f"average() writes into a directory, or a file that ends in {_ARCHIVE} or {_WEIGHTS}, without fields in "
            f"braces. Received: into={path!r}"
        )
    _refuse_checkpoints(target)
    return target


def _refuse_checkpoints(target: CheckpointDirectory) -> None:
    listing = target.listing()
    if listing:
        names = [*(record.name for record in listing.records), *listing.damaged, *listing.unmanaged]
        raise DirectoryNotEmptyError(
            f"{relative(target.path)} has checkpoints: {few(names)}. An average is a run of its own, so choose another "
            "path."
        )


def _save(target: CheckpointDirectory, opened: Sequence[_Opened], write: Write, size: int) -> CheckpointRecord:
    """Saves an average as the only checkpoint of its place. It belongs to no run, so it begins one."""
    newest = opened[-1].record
    step = newest.step if newest else step_in(opened[-1].name) or 0
    request = SaveRequest(
        step=step,
        name=target.series.template,
        run_id=uuid.uuid4().hex,
        epoch=newest.epoch if newest else None,
        batch=newest.batch if newest else None,
        monitor=newest.monitor if newest else None,
        mode=newest.mode if newest else None,
        modes=newest.modes if newest else {},
        reason="average",
        metadata={
            **(newest.metadata if newest else {}),
            "average_of": [each.record.step if each.record else each.name for each in opened],
            "average_from": [each.prefix for each in opened],
        },
        versions={**(newest.versions if newest else {}), "keras_ckpt": __version__},
        seeds=newest.seeds if newest else {},
        size=size,
    )
    writer = Writer(target)
    writer.open(session=object())
    try:
        # Another process may have saved since the first look.
        _refuse_checkpoints(target)
        record = writer.save(request, write)
    finally:
        writer.close()
    if record is None:
        raise SaveError(f"The average was not saved into {target.path}: a pin is in its place. Choose another path.")
    return record
