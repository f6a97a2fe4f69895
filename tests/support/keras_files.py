"""The contents of files of Keras, to compare."""

from __future__ import annotations

import io
import json
import pathlib
import re
import zipfile
from typing import Any

import h5py
import numpy as np


def content(path: pathlib.Path) -> dict[str, Any]:
    """Everything that h5py and zipfile show of a file, without the date and without addresses in memory."""
    if not zipfile.is_zipfile(path):
        return hdf5(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        members = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(members.pop("metadata.json"))
    assert metadata.pop("date_saved")
    weights = hdf5(io.BytesIO(members.pop("model.weights.h5")))
    return {"metadata": metadata, "config": _renumbered(members.pop("config.json")), **members, **weights}


def _renumbered(config: bytes) -> Any:
    """A config whose shared objects have numbers from 0, in the place of their addresses."""
    numbers: dict[str, int] = {}
    text = json.dumps(json.loads(config), sort_keys=True)
    return json.loads(
        re.sub(r'(?<="shared_object_id": )\d+', lambda found: str(numbers.setdefault(found[0], len(numbers))), text)
    )


def hdf5(file: Any) -> dict[str, Any]:
    """Everything that h5py shows of an HDF5 file, by path."""
    found = {}

    def look(name: str, each: Any) -> None:
        attributes = {key: np.asarray(value).tolist() for key, value in each.attrs.items()}
        values = (each.shape, each.dtype, each[()].tobytes()) if isinstance(each, h5py.Dataset) else None
        found[name] = attributes, values

    with h5py.File(file, "r") as opened:
        look("/", opened)
        opened.visititems(look)
    return found
