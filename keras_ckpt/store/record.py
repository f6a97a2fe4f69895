"""The record of one checkpoint, and the sidecar file that stores it.

A sidecar is strict JSON of bounded size. Its last member is a digest of all bytes before it, which detects a
truncated or altered sidecar. The norm is docs/format.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from blake3 import blake3

from keras_ckpt.errors import DamagedCheckpointError, FormatVersionError
from keras_ckpt.store import layout, tables

FORMAT_VERSION = 2
"""keras_ckpt 0.1.0 writes version 1: its checkpoint names end in their steps."""
SIZE_LIMIT = 1 << 20
"""The largest size of a sidecar in bytes; a larger file is not read."""
REASON_LIMIT = 200
"""The largest length of a reason in characters."""

if TYPE_CHECKING:
    Metric = float
else:
    # A sidecar has strings for NaN and infinities; a record holds floats.
    Metric = float | Literal["NaN", "Infinity", "-Infinity"]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Digest = Annotated[str, msgspec.Meta(pattern="^blake3:[0-9a-fA-F]{64}$")]
Mode = Literal["min", "max"]

INITIAL_EPOCH = "initial_epoch"
"""In the metadata of a backup: the index of the epoch that `fit` begins with."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LAST_MEMBER = re.compile(rb',\s*"digest":\s*"blake3:([0-9a-fA-F]{64})"\s*\}\s*\Z')
_NAME = re.compile(r"(?P<base>.+)-(?P<step>0|[1-9][0-9]{0,18})", re.ASCII | re.DOTALL)


class CheckpointFile(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """One file of a checkpoint.

    Attributes:
        name: The file name in the directory.
        size: The size in bytes.
        digest: `"blake3:"` and the digest in hexadecimal. Size and digest of a file of Keras are those of its content,
            without the record at its end.
        shared: Whether the file is a hard link to a file of an older checkpoint.
    """

    name: str
    size: Count
    digest: Digest
    shared: bool = False


class RunEnd(msgspec.Struct, frozen=True, gc=False):
    """The end of a run that one `fit` trained.

    Attributes:
        epochs: The number of epochs that `fit` was asked for.
        step: The step of the checkpoint with the weights that `fit` left.
    """

    epochs: Count
    step: Count


class CheckpointRecord(tables.Shown, msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The facts about one checkpoint: a frozen value, read from the sidecar file.

    Example:

    ```python
    best = keras_ckpt.CheckpointDirectory("runs/digits").best("val_accuracy", mode="max")
    best.step, best.epoch, best.metrics, best.metadata
    tf.train.load_checkpoint(best.prefix)
    ```

    Attributes:
        step: Training batches completed since the run began.
        sequence: Place in the order of saving, from 1; the newest checkpoint has the largest.
        epoch: Epochs completed since the run began; `None` if not known.
        batch: Batches completed in the current epoch, 0 at an epoch's end; `None` if not known.
        metrics: The metrics measured on exactly these weights, by name.
        monitor: The monitored metric, if any.
        mode: Whether smaller (`"min"`) or larger (`"max"`) values of `monitor` are better.
        modes: The modes of other metrics, by name, where known.
        time: When the save began, in seconds since 1970. `saved_at` is the same as a `datetime`.
        reason: The trigger of the save, such as `"epoch"`.
        metadata: The user's metadata.
        end: The end of the run, if `fit` has ended and this checkpoint is its last. `BackupAndRestore` notes it.
        versions: Versions of Python and of the packages that wrote the checkpoint.
        timings: `write_ms`: the time from the first byte of data until the data was durable. `blocked_ms`: how long
            the save blocked training. Both are in milliseconds, and end when the sidecar was sealed.
        run_id: The run of the checkpoint.
        files: The checkpoint's files.
        weights: For a file of Keras, the digest of the model's weights, by which a loaded model is recognized.
        seeds: For a file of Keras, the states of the model's seed generators by name: the file's format lacks them.
        template: The template of the names of the series, for a file of Keras; `""` for a TensorFlow checkpoint.
        format: Always `"keras_ckpt"`.
        format_version: The version of the sidecar's format.
        directory: The path of the directory. Not in the sidecar: a directory may be moved.
        name: The checkpoint's name in the directory, such as `"ckpt-120"`. Not in the sidecar.
        pin: The reason of the pin, `""` without a reason, `None` without a pin. Not in the sidecar.
    """

    format: Literal["keras_ckpt"] = "keras_ckpt"
    format_version: Annotated[int, msgspec.Meta(ge=1)] = FORMAT_VERSION
    run_id: Annotated[str, msgspec.Meta(max_length=200)] = ""
    template: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    weights: Digest | None = None
    seeds: dict[str, list[int]] = {}
    sequence: Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
    step: Count
    epoch: Count | None = None
    batch: Count | None = None
    metrics: dict[str, Metric] = {}
    monitor: str | None = None
    mode: Mode | None = None
    modes: dict[str, Mode] = {}
    time: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    reason: Annotated[str, msgspec.Meta(max_length=REASON_LIMIT)] = ""
    metadata: dict[str, Any] = {}
    end: RunEnd | None = None
    versions: dict[str, str] = {}
    timings: dict[str, Annotated[float, msgspec.Meta(ge=0)]] = {}
    files: tuple[CheckpointFile, ...] = ()
    directory: str = ""
    name: str = ""
    pin: str | None = None

    def __post_init__(self) -> None:
        for value in self.metrics.values():
            if isinstance(value, str):
                msgspec.structs.force_setattr(self, "metrics", from_json(self.metrics))
                return

    def __hash__(self) -> int:
        return hash(self.identity)

    def __repr__(self) -> str:
        metrics = "".join(f", {name}={value:.6g}" for name, value in self.metrics.items())
        return f"CheckpointRecord(step={self.step}, epoch={self.epoch}{metrics}, prefix={self.prefix!r})"

    def _table(self) -> tables.Table:
        """The table of the facts that a person asks for first."""
        names = sorted(self.metrics, key=lambda name: (name != self.monitor, not name.startswith("val_")))
        facts = [
            ("step", str(self.step)),
            ("epoch", "" if self.epoch is None else str(self.epoch)),
            ("batch", str(self.batch or "")),
            *((name, tables.metric(self.metrics[name])) for name in names),
            ("saved", f"{self.saved_at:%Y-%m-%d %H:%M:%S}"),
            ("reason", self.reason),
            ("size", tables.size(self.size)),
            ("pin", "" if self.pin is None else self.pin or "pinned"),
            ("metadata", msgspec.json.encode(self.metadata).decode() if self.metadata else ""),
        ]
        cells = [(tables.printable(name), tables.printable(fact)) for name, fact in facts if fact]
        columns = (tables.Column("", column, words=True) for column in zip(*cells, strict=True))
        return tables.Table(tables.printable(self.prefix), tuple(columns))

    @property
    def prefix(self) -> str:
        """The checkpoint's path for TensorFlow's functions, without file suffixes."""
        return f"{self.directory}/{self.name}" if self.directory else self.name

    @property
    def paths(self) -> list[str]:
        """The paths of the checkpoint's files, the sidecar first."""
        names = [layout.sidecar(self.name), *(file.name for file in self.files)]
        return [f"{self.directory}/{name}" for name in names]

    @property
    def size(self) -> int:
        """The bytes of data, without the sidecar."""
        return sum(file.size for file in self.files)

    @property
    def size_shared(self) -> int:
        """The bytes of data that are hard links to files of an older checkpoint."""
        return sum(file.size for file in self.files if file.shared)

    @property
    def pinned(self) -> bool:
        return self.pin is not None

    @property
    def is_backup(self) -> bool:
        """Whether `BackupAndRestore` saved the checkpoint: a backup has the place of its `fit`, and no monitor."""
        epoch = self.metadata.get(INITIAL_EPOCH)
        return isinstance(epoch, int) and not isinstance(epoch, bool) and epoch >= 0 and self.monitor is None

    @property
    def known_modes(self) -> dict[str, Mode]:
        """The modes of all metrics, of the monitor too, where known."""
        monitored: dict[str, Mode] = {self.monitor: self.mode} if self.monitor and self.mode else {}
        return {**self.modes, **monitored}

    def finite(self, metric: str) -> float | None:
        """The value of a metric; `None` where it is missing, NaN or infinite, and can never be best."""
        value = self.metrics.get(metric)
        return value if value is not None and math.isfinite(value) else None

    @property
    def identity(self) -> tuple[str, int, int]:
        """The run, the place in the order of saving, and the step: the same for all records of one save."""
        return self.run_id, self.sequence, self.step

    def same_save(self, other: CheckpointRecord) -> bool:
        """Whether both records are of one save; metrics and pins added later may differ."""
        return self.identity == other.identity

    @property
    def saved_at(self) -> datetime:
        """When the save began, in the local time zone. A time beyond the calendar is the last `datetime`."""
        return local_time(self.time)


def local_time(seconds: float) -> datetime:
    """A time in seconds since 1970, in the local time zone. A time beyond the calendar is the last `datetime`."""
    try:
        return datetime.fromtimestamp(seconds, UTC).astimezone()
    except (OverflowError, ValueError, OSError):
        return datetime.max.replace(tzinfo=UTC)


def superseded(record: CheckpointRecord, others: Iterable[CheckpointRecord]) -> list[CheckpointRecord]:
    """The checkpoints that a record replaces: the same step or the same name."""
    return [other for other in others if record.step == other.step or record.name == other.name]


# Text outside UTF-8 raises a ValueError.
_UNREADABLE = (msgspec.MsgspecError, RecursionError, ValueError)
_CONTEXT = ("directory", "name", "pin")
_decode = msgspec.json.Decoder(CheckpointRecord).decode


def step_in(name: str) -> int | None:
    """The number at the end of a checkpoint's name, or `None` without a number."""
    match = _NAME.fullmatch(name)
    return int(match["step"]) if match else None


def decode(data: bytes, name: str, directory: str = "", pin: str | None = None) -> CheckpointRecord:
    """Reads a sidecar.

    Args:
        data: The bytes of the file.
        name: The checkpoint's name: the file name without `.json`.
        directory: The path of the directory.
        pin: The reason of the pin, `None` without a pin.

    Raises:
        DamagedCheckpointError: The bytes are not a complete, unaltered sidecar of this name.
        FormatVersionError: The sidecar has a newer format.
    """
    try:
        record = _decode(data)
    except _UNREADABLE as error:
        _refuse_newer(data)
        raise DamagedCheckpointError(f"it is not a sidecar: {_line(error)}; received {len(data)} bytes") from None
    _refuse_newer_version(record.format_version)
    last = _LAST_MEMBER.match(data, max(0, data.rfind(b",")))
    if last is None:
        raise DamagedCheckpointError("its last member is not a digest of itself")
    if bytes.fromhex(last[1].decode()) != blake3(data[: last.start()]).digest():
        raise DamagedCheckpointError("its digest does not match: it was changed after it was written")
    _refuse_duplicates(data)
    if record.format_version == 1 and not name.endswith(f"-{record.step}"):
        raise DamagedCheckpointError(f"its step is {record.step}, but its name is {name}")
    _check_names(record, name)
    msgspec.structs.force_setattr(record, "directory", directory)
    msgspec.structs.force_setattr(record, "name", name)
    msgspec.structs.force_setattr(record, "pin", pin)
    return record


def decode_tail(data: bytes, name: str, directory: str) -> CheckpointRecord:
    """Reads the record at the end of a file, which may have another name than when it was saved.

    A file with another name is a copy: its own name is its template. Arguments and errors are those of `decode`.
    """
    try:
        files = _decode(data).files
    except _UNREADABLE:
        files = ()
    record = decode(data, files[0].name if files else name, directory)
    if record.name == name:
        return record
    file = msgspec.structs.replace(record.files[0], name=name)
    return msgspec.structs.replace(record, name=name, template=name, files=(file,))


def _refuse_duplicates(data: bytes) -> None:
    """Refuses a duplicate member: readers differ in which of the two they take."""
    try:
        # Text that is the same after decoding has no duplicates. The text of another program is searched.
        if msgspec.json.encode(msgspec.json.decode(data)) != msgspec.json.format(data, indent=-1):
            json.loads(data.decode(), object_pairs_hook=_once)
    except _UNREADABLE as error:
        raise DamagedCheckpointError(f"it is not a sidecar: {_line(error)}") from None


def _once(members: list[tuple[str, object]]) -> None:
    if len(dict(members)) != len(members):
        names = [name for name, _ in members]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r:.100} twice")


def _check_names(record: CheckpointRecord, name: str) -> None:
    """Refuses file names from disk that do not belong to the checkpoint."""
    files = record.files
    if record.template:
        if [file.name for file in files] != [name]:
            raise DamagedCheckpointError(f"it lists other files than {name}")
        if not layout.is_of_template(name, record.template):
            raise DamagedCheckpointError(f"its template {record.template!r:.100} does not have the name {name}")
        return
    own = f"{name}."
    seen = {layout.sidecar(name), layout.pin(name)}
    for file in files:
        if not file.name.startswith(own) or "/" in file.name or "\0" in file.name or file.name in seen:
            raise DamagedCheckpointError(
                f"it lists a file that is not the checkpoint's own, or lists a file twice: {file.name[:100]!r}"
            )
        seen.add(file.name)
    if not files:
        raise DamagedCheckpointError("it lists no files")


def encode(record: CheckpointRecord) -> bytes:
    """Writes a sidecar.

    Raises:
        ValueError: A member has the wrong type or is out of range, or the sidecar would be too large.
    """
    facts = members(record)
    try:
        msgspec.convert(facts, CheckpointRecord)
    except msgspec.ValidationError as error:
        raise ValueError(f"Step {record.step} cannot be recorded. {_line(error)}") from error
    return _sealed(facts)


def update(data: bytes, record: CheckpointRecord) -> bytes:
    """Rewrites a sidecar for a changed record of the same files. Keeps members that this version does not know."""
    known = members(record)
    # The files do not change, and unknown members of their entries stay.
    del known["files"]
    return _sealed(msgspec.json.decode(data, type=dict[str, Any]) | known)


def members(record: CheckpointRecord) -> dict[str, Any]:
    """The members of a record's sidecar in JSON types, without the digest."""
    found = msgspec.structs.asdict(record) | {"metrics": to_json(record.metrics)}
    for field in _CONTEXT:
        del found[field]
    if not record.template:
        del found["template"], found["weights"], found["seeds"]
    return found


def to_json(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Metrics in JSON types: NaN and infinities become strings."""
    return {name: _number(value) for name, value in metrics.items()}


def from_json(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """The metrics that `to_json` returned."""
    return {name: _NON_FINITE.get(str(value), value) for name, value in metrics.items()}


def _sealed(facts: dict[str, Any]) -> bytes:
    facts.pop("digest", None)
    text = msgspec.json.format(msgspec.json.encode(facts), indent=2).removesuffix(b"\n}")
    data = text + b',\n  "digest": "%s"\n}\n' % _seal(text).encode()
    if len(data) > SIZE_LIMIT:
        raise ValueError(
            f"The sidecar of step {facts['step']} would have {len(data)} bytes, at most {SIZE_LIMIT} are allowed. "
            "Give less metadata; store large values in a separate file."
        )
    return data


def encodable_metadata(metadata: object) -> dict[str, Any]:
    """A copy of metadata in plain JSON types. NaN and infinities become strings, array scalars become numbers.

    Raises:
        TypeError: The metadata is not a dict, or holds a value that JSON cannot hold. The error names its place.
    """
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must be a dict, or a function of logs that returns one. Received: {metadata!r}")
    return {_key(name, "metadata"): _encodable(value, f"metadata[{name!r}]") for name, value in metadata.items()}


def as_metric(name: str, value: object) -> float:
    """A metric's value as a float: one number, alone or in an array or list of any shape.

    Raises:
        TypeError: The value is not one number.
    """
    number: Any = value
    if isinstance(value, list | tuple) and len(value) == 1:
        return as_metric(name, value[0])
    if getattr(value, "shape", ()) != () and getattr(value, "size", 0) == 1 and hasattr(value, "item"):
        number = value.item()
    elif hasattr(value, "numpy") and getattr(value, "shape", ()) != ():
        return as_metric(name, value.numpy())
    if isinstance(number, bool) or getattr(number, "shape", ()) != () or isinstance(number, str | bytes):
        raise TypeError(f"A metric is one number. Received: {name}={value!r:.200}. Reduce it first.")
    try:
        return float(number)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            f"A metric is one number. Received: {name}={value!r:.200} ({error}). Reduce it first."
        ) from error


def _encodable(value: object, where: str) -> Any:
    match value:
        case None | bool() | str():
            return value
        case int():
            if not -(2**63) <= value < 2**64:
                raise TypeError(f"{where} is an integer that JSON readers cannot hold: {value}. Write it as a string.")
            return int(value)
        case float():
            return _number(float(value))
        case Mapping():
            return {_key(key, where): _encodable(item, f"{where}[{key!r}]") for key, item in value.items()}
        case list() | tuple():
            return [_encodable(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _encodable(value.item(), where)
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which JSON cannot hold. "
        "Expected numbers, strings, booleans, None, lists, and dicts with string keys."
    )


def _number(value: float) -> float | str:
    """A number in JSON types: NaN and infinities become strings."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {key!r}, but JSON keys must be strings")
    return key


def _seal(data: bytes) -> str:
    return f"blake3:{blake3(data).hexdigest()}"


class _Head(msgspec.Struct):
    format: Literal["keras_ckpt"]
    format_version: int


_decode_head = msgspec.json.Decoder(_Head).decode


def _refuse_newer(data: bytes) -> None:
    try:
        version = _decode_head(data).format_version
    except _UNREADABLE:
        return
    _refuse_newer_version(version)


def _refuse_newer_version(version: int) -> None:
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"its format version is {version}, this package reads up to {FORMAT_VERSION}: upgrade keras_ckpt"
        )


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:200]
