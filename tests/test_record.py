"""Sidecars: encoding and decoding keep each field, and invalid sidecars are refused field by field."""

import datetime
import json
import math

import msgspec
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from keras_ckpt.errors import DamagedCheckpointError, FormatVersionError
from keras_ckpt.store.record import (
    SIZE_LIMIT,
    CheckpointFile,
    CheckpointRecord,
    decode,
    encodable_metadata,
    encode,
    step_in,
    update,
)

FILES = (
    CheckpointFile("ckpt-120.data-00000-of-00001", 9, f"blake3:{'0' * 64}"),
    CheckpointFile("ckpt-120.index", 3, f"blake3:{'a' * 64}"),
)
RECORD = CheckpointRecord(
    sequence=7,
    step=120,
    epoch=3,
    batch=0,
    run_id="run",
    metrics={"loss": 0.25, "val_loss": math.nan, "worst": math.inf, "best": -math.inf, "zero": -0.0},
    monitor="val_loss",
    mode="min",
    time=1795448343.25,
    reason="epoch",
    metadata={"dataset": "digits", "nested": {"list": [1, 2.5, None, True]}, "name": "ü \n 数"},
    versions={"keras": "3.15.1"},
    timings={"write_ms": 5.25, "blocked_ms": 6.0},
    files=FILES,
    name="ckpt-120",
)


def sealed(members: dict | str) -> bytes:
    """A sidecar as another program might write it: any JSON, with its digest as the last member."""
    text = members if isinstance(members, str) else json.dumps(members)
    body = text.rstrip()[:-1].rstrip().encode()
    return body + b', "digest": "blake3:%s"}' % blake3(body).hexdigest().encode()


def members(**changes: object) -> dict:
    facts = json.loads(encode(RECORD))
    del facts["digest"]
    return {key: value for key, value in {**facts, **changes}.items() if value is not ...}


def test_decoding_an_encoded_record_returns_the_record() -> None:
    """Every field survives, also NaN, infinities and a negative zero."""
    back = decode(encode(RECORD), "ckpt-120", "runs", "a reason")

    assert repr(msgspec.structs.asdict(back)) == repr(
        msgspec.structs.asdict(msgspec.structs.replace(RECORD, directory="runs", pin="a reason"))
    )
    assert back.prefix == "runs/ckpt-120"
    assert back.size == 12
    assert back.pinned


@given(
    st.dictionaries(st.text(), st.floats()),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda children: st.lists(children) | st.dictionaries(st.text(), children),
        max_leaves=8,
    ),
)
def test_any_metrics_and_metadata_survive_encoding_and_decoding(metrics, value) -> None:
    """Names and texts may have any characters, numbers any size."""
    record = msgspec.structs.replace(RECORD, metrics=metrics, metadata={"value": value})

    back = decode(encode(record), "ckpt-120")

    assert repr(back.metrics) == repr(metrics)
    assert back.metadata == {"value": value}


def test_the_time_of_a_save_is_a_datetime_with_a_zone() -> None:
    """`saved_at` is the moment of `time`, in the local time zone."""
    record = CheckpointRecord(sequence=1, step=1, time=86400.5)

    assert record.saved_at == datetime.datetime(1970, 1, 2, 0, 0, 0, 500_000, datetime.UTC)
    assert record.saved_at.utcoffset() is not None


@pytest.mark.parametrize("time", [1e12, 1e300])
def test_a_time_beyond_the_calendar_is_the_last_year(time) -> None:
    """A sidecar may hold any number, and displaying it raises no error."""
    assert CheckpointRecord(sequence=1, step=1, time=time).saved_at.year == 9999


def test_a_sidecar_is_plain_json_that_ends_with_a_digest_of_all_before() -> None:
    """Any JSON reader reads a sidecar, and any program with BLAKE3 can check it."""
    data = encode(RECORD)

    assert json.loads(data)["metrics"]["val_loss"] == "NaN"
    before = data[: data.rindex(b",")]
    assert json.loads(data)["digest"] == f"blake3:{blake3(before).hexdigest()}"


def test_a_sidecar_of_another_program_is_read() -> None:
    """The order of members, white space, escapes, the form of numbers and the case of digests are free.

    Most members are optional.
    """
    facts = {
        "metadata": {"größe": 10**21},
        "step": 120,
        "files": [{"size": 3, "name": "ckpt-120.index", "digest": f"blake3:{'A' * 64}"}],
        "format_version": 1,
        "format": "keras_ckpt",
        "sequence": 1,
    }

    text = json.dumps(facts, indent=7).replace(str(10**21), "1E+21")

    record = decode(sealed(text), "ckpt-120")

    assert (record.step, record.metadata) == (120, {"größe": 1e21})


@pytest.mark.parametrize("cut", range(0, len(encode(RECORD)) - 2, 7))
def test_a_truncated_sidecar_is_damaged(cut: int) -> None:
    """The digest detects every truncation."""
    with pytest.raises(DamagedCheckpointError):
        decode(encode(RECORD)[:cut], "ckpt-120")


@pytest.mark.parametrize("position", range(0, len(encode(RECORD)) - 3, 5))
def test_a_flipped_bit_is_detected(position: int) -> None:
    """Also where the result is still valid JSON of the right types."""
    data = bytearray(encode(RECORD))
    data[position] ^= 1

    with pytest.raises((DamagedCheckpointError, FormatVersionError)):
        decode(bytes(data), "ckpt-120")


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"step": "120"}, "$.step"),
        ({"step": True}, "$.step"),
        ({"step": 120.0}, "$.step"),
        ({"step": -1}, "$.step"),
        ({"step": 2**63}, "$.step"),
        ({"step": None}, "$.step"),
        ({"step": ...}, "step"),
        ({"sequence": 0}, "$.sequence"),
        ({"sequence": ...}, "sequence"),
        ({"epoch": -1}, "$.epoch"),
        ({"batch": "0"}, "$.batch"),
        ({"metrics": []}, "$.metrics"),
        ({"metrics": {"loss": "0.5"}}, "$.metrics"),
        ({"metrics": {"loss": None}}, "$.metrics"),
        ({"metrics": {"loss": True}}, "$.metrics"),
        ({"metrics": {"loss": [0.5]}}, "$.metrics"),
        ({"mode": "up"}, "$.mode"),
        ({"monitor": 3}, "$.monitor"),
        ({"time": "now"}, "$.time"),
        ({"time": -1.0}, "$.time"),
        ({"reason": "x" * 201}, "$.reason"),
        ({"run_id": 7}, "$.run_id"),
        ({"metadata": "digits"}, "$.metadata"),
        ({"versions": {"keras": 3}}, "$.versions"),
        ({"timings": {"write_ms": -1}}, "$.timings"),
        ({"format": "other"}, "$.format"),
        ({"format_version": 0}, "$.format_version"),
        ({"files": {}}, "$.files"),
        ({"files": [{"name": "ckpt-120.index", "size": -1, "digest": FILES[1].digest}]}, "$.files"),
        ({"files": [{"name": "ckpt-120.index", "size": 3, "digest": "sha256:00"}]}, "$.files"),
        ({"files": [{"name": "ckpt-120.index", "size": 3}]}, "digest"),
        ({"files": []}, "lists no files"),
        ({"format_version": 1, "step": 121}, "its step is 121, but its name is ckpt-120"),
    ],
)
def test_the_error_of_an_invalid_field_names_the_field(changes: dict, place: str) -> None:
    """Types, ranges and sizes are checked field by field."""
    with pytest.raises(DamagedCheckpointError) as caught:
        decode(sealed(members(**changes)), "ckpt-120")

    assert place in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "ckpt-120.a/b",
        "ckpt-12.index",
        "ckpt-120.json",
        "ckpt-120.keep",
        "",
        "..",
        "x",
    ],
)
def test_a_file_that_is_not_the_checkpoints_own_is_refused(name: str) -> None:
    """No name from disk becomes a path to another file."""
    files = [{"name": name, "size": 3, "digest": FILES[0].digest}]

    with pytest.raises(DamagedCheckpointError, match="not the checkpoint's own"):
        decode(sealed(members(files=files)), "ckpt-120")


def test_a_file_that_is_listed_twice_is_refused() -> None:
    """Two entries of one file might differ."""
    entry = {"name": "ckpt-120.index", "size": 3, "digest": FILES[0].digest}

    with pytest.raises(DamagedCheckpointError, match="twice"):
        decode(sealed(members(files=[entry, entry])), "ckpt-120")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 500,
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b'{"metadata":' + b"[" * 100_000,
        b'{"format": "keras_ckpt", "step": ' + b"1" * 5000 + b"}",
        b'{"format": "keras_ckpt", "step": NaN}',
        b'{"format": "keras_ckpt", "step": 1e999}',
        "﻿{}".encode(),
        json.dumps(members()).encode("utf-16"),
        json.dumps(members()).encode(),
        b'{"metadata": {"x": "\xff\xfe"}}',
        b'{"metadata": {"x": "\\ud800"}}',
    ],
)
def test_invalid_bytes_are_a_damaged_sidecar(data: bytes) -> None:
    """Empty, zeroed, foreign or deeply nested bytes, huge numbers, wrong encodings and a missing digest."""
    with pytest.raises(DamagedCheckpointError):
        decode(data, "ckpt-120")


@given(st.binary(max_size=400))
@example(b'{"format":"keras_ckpt","format_version":3')
def test_no_bytes_raise_anything_but_a_checkpoint_error(data: bytes) -> None:
    """A sidecar may have any content."""
    with pytest.raises((DamagedCheckpointError, FormatVersionError)):
        decode(data, "ckpt-120")


@pytest.mark.parametrize("changes", [{}, {"step": "a new kind of step"}, {"files": ...}])
def test_the_error_of_a_newer_format_says_to_upgrade(changes: dict) -> None:
    """Also if the members of the newer format differ."""
    with pytest.raises(FormatVersionError, match=r"version is 3, this package reads up to 2: upgrade"):
        decode(sealed(members(format_version=3, **changes)), "ckpt-120")


@pytest.mark.parametrize(
    ("member", "again"),
    [
        ('"step": 120', '"step": 120, "step" :120'),
        ('"step": 120', '"step": 120, "st\\u0065p": 120'),
        ('"nested": {', '"nested": 1, "nested": {'),
        ('"loss": 0.25', '"loss": 0.25, "loss": 0.5'),
        ('"size": 9', '"size": 9, "size": 8'),
    ],
)
def test_a_duplicate_member_is_refused(member, again) -> None:
    """JSON readers differ in which of the two they take."""
    text = json.dumps(members())
    assert member in text

    with pytest.raises(DamagedCheckpointError, match="twice"):
        decode(sealed(text.replace(member, again, 1)), "ckpt-120")


def test_an_updated_sidecar_keeps_unknown_members() -> None:
    """A later version or another program may have added them, also to the files' entries."""
    facts = members(signature="abc", later={"deep": [1, {"x": 2}]})
    facts["files"][0]["compressed"] = True
    data = sealed(facts)

    changed = msgspec.structs.replace(decode(data, "ckpt-120"), metrics={"test_accuracy": 0.97})
    back = json.loads(update(data, changed))

    assert back["signature"] == "abc"
    assert back["later"] == {"deep": [1, {"x": 2}]}
    assert back["files"][0]["compressed"] is True
    assert decode(update(data, changed), "ckpt-120").metrics == {"test_accuracy": 0.97}


def test_directory_name_and_pin_in_a_sidecar_are_ignored() -> None:
    """These facts come from the directory."""
    record = decode(sealed(members(directory="/elsewhere", name="other", pin="by myself")), "ckpt-120", "runs")

    assert (record.directory, record.name, record.pin) == ("runs", "ckpt-120", None)


def test_numpy_scalars_in_metadata_become_numbers() -> None:
    """A metadata function may return NumPy scalars."""
    metadata = {"rate": np.float32(0.5), "count": np.int64(3), "zero": np.array(0.0)}

    assert encodable_metadata(metadata) == {"rate": 0.5, "count": 3, "zero": 0.0}


def test_nan_and_infinity_in_metadata_become_strings() -> None:
    """A NaN in the metadata does not stop training."""
    assert encodable_metadata({"lr": math.nan, "l": [math.inf]}) == {"lr": "NaN", "l": ["Infinity"]}


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"when": object()}, r"metadata\['when'\] is of type object"),
        ({"a": [1, {2, 3}]}, r"metadata\['a'\]\[1\] is of type set"),
        ({"a": {1: 2}}, r"metadata\['a'\] has the key 1"),
        ({1: 2}, "has the key 1"),
        ({"x": np.zeros(3)}, "is of type ndarray"),
        ({"x": b"bytes"}, "is of type bytes"),
        ({"x": 2**64}, "cannot hold: 18446744073709551616"),
        (["x"], "must be a dict"),
        ("text", "must be a dict"),
    ],
)
def test_metadata_that_json_cannot_hold_is_refused(metadata: object, text: str) -> None:
    """The error names the place and the type."""
    with pytest.raises(TypeError, match=text):
        encodable_metadata(metadata)


def test_a_sidecar_too_large_to_read_is_not_written() -> None:
    """The size limit of reading also applies to writing."""
    with pytest.raises(ValueError, match="Give less metadata"):
        encode(msgspec.structs.replace(RECORD, metadata={"text": "x" * SIZE_LIMIT}))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("ckpt-120", 120),
        ("ckpt-0", 0),
        ("a-b-7", 7),
        ("ü-7", 7),
        ("ckpt-007", None),
        ("ckpt-", None),
        ("-7", None),
        ("ckpt", None),
        ("ckpt--7", 7),
        ("ckpt-1_000", None),
        ("ckpt-\uff11\uff12", None),
        ("ckpt- 7", None),
        ("ckpt-7\n", None),
    ],
)
def test_the_step_in_a_name(name: str, step: int | None) -> None:
    """The number at the end of a name has exactly one spelling."""
    assert step_in(name) == step


def test_the_repr_of_a_record_has_step_epoch_metrics_and_prefix() -> None:
    """Equal records are equal members of a set."""
    record = CheckpointRecord(sequence=1, step=120, epoch=3, metrics={"loss": 0.25}, directory="runs", name="ckpt-120")

    assert repr(record) == "CheckpointRecord(step=120, epoch=3, loss=0.25, prefix='runs/ckpt-120')"
    assert len({record, record}) == 1
