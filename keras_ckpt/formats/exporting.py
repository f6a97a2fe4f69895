"""Exports a checkpoint to a file of another format, without TensorFlow and without building the model."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

import numpy as np

from keras_ckpt.errors import DamagedCheckpointError
from keras_ckpt.formats.bundle_index import read_index
from keras_ckpt.formats.bundle_parts import BundleParts
from keras_ckpt.formats.keras_export import archive_of, keras_content, weights_of
from keras_ckpt.formats.keras_writer import Member, archive
from keras_ckpt.formats.variables import Variables, load_variables, values_of
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.files import Folder
from keras_ckpt.store.locating import read_checkpoint
from keras_ckpt.store.notices import warn
from keras_ckpt.store.record import CheckpointRecord
from keras_ckpt.store.tails import read_tail

_ARCHIVE, _NPZ = ".keras", ".npz"
_OF_KERAS = _ARCHIVE, ".weights.h5"
NAMED = ".safetensors", _NPZ
"""The endings of the files that have values by name."""
ENDINGS = (*_OF_KERAS, *NAMED)
"""The endings of the files that `export_values` writes."""
_OWN = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip
"""The names of types in a safetensors file."""

_FROM_PYTORCH = (
    "With KERAS_BACKEND=torch, restore it into the model, and save the model's own state_dict: "
    "safetensors.torch.save_model(model, path)."
)

Names: TypeAlias = Literal["variables", "state_dict"]
Checkpoint: TypeAlias = CheckpointRecord | CheckpointDirectory | str | os.PathLike[str]


def export_values(checkpoint: Checkpoint, path: str, weights_only: bool = False, names: Names = "variables") -> None:
    """Exports the values of a checkpoint to a file whose ending is one of `ENDINGS`.

    Args:
        checkpoint: A record, a directory (its newest checkpoint), or the path of a directory or a checkpoint.
        path: The file to write. One rename replaces a file at the path, but no checkpoint.
        weights_only: Whether to skip the optimizer and the metrics.
        names: The names of the values in a file that is not Keras's.

    Raises:
        DamagedCheckpointError: The checkpoint cannot be trusted.
        CheckpointNotFoundError: There is no such checkpoint.
        ValueError: The format cannot hold the checkpoint. No file is written.
        FileExistsError: The path is a checkpoint.
        OSError: The file cannot be written.
    """
    _refuse_checkpoint(path)
    with contextlib.ExitStack() as stack:
        if path.endswith(_OF_KERAS):
            content = read_checkpoint(checkpoint, keras_content, keep_open=stack)
            content = content.without_optimizer() if weights_only else content
            pieces = archive_of(content) if path.endswith(_ARCHIVE) else weights_of(content)
        else:
            values = _of_state_dict(checkpoint) if names == "state_dict" else _by_own_names(checkpoint, weights_only)
            pieces = (_npz if path.endswith(_NPZ) else _safetensors)(*values)
        folder = stack.enter_context(Folder(os.path.dirname(path)))
        file = stack.enter_context(folder.replacing(os.path.basename(path)))
        for piece in pieces:
            file.write(piece)


def _refuse_checkpoint(path: str) -> None:
    """Refuses to replace a checkpoint, which would lose its record."""
    name = os.path.basename(path)
    with Folder(os.path.dirname(path)) as folder:
        if path.endswith(_OF_KERAS) and folder.exists(name) and read_tail(folder, name):
            raise FileExistsError(errno.EEXIST, "An export replaces no checkpoint. Choose another path", path)


def _by_own_names(checkpoint: Checkpoint, weights_only: bool) -> tuple[Variables, Mapping[str, str]]:
    """The variables of a checkpoint, and the names of those to write."""
    variables = load_variables(checkpoint)
    names = variables.weights if weights_only else [*variables]
    if weights_only and not names:
        raise ValueError("export(..., weights_only=True) found no variable whose name begins with 'model/'.")
    return variables, {name: name for name in names}


def _of_state_dict(checkpoint: Checkpoint) -> tuple[Variables, Mapping[str, str]]:
    """The variables of a checkpoint, and the names of the model's own by their names in its `state_dict`."""

    def read(files: Folder, name: str, record: CheckpointRecord | None) -> tuple[Variables, Mapping[str, str]]:
        prefix, digested = os.path.join(files.path, name), record.files if record else ()
        if files.series.template:
            raise ValueError(f"{prefix} is a file of Keras, which has no names of a state_dict. {_FROM_PYTORCH}")
        index = read_index(files, name, digested)
        description, values = BundleParts(files, index).description, values_of(index, digested)
        if description is None or not description.state_dict:
            raise ValueError(f"{prefix} has no names of a state_dict: Keras did not run on PyTorch. {_FROM_PYTORCH}")
        found = description.state_dict
        if unknown := [each for each in found.values() if each not in values.kinds]:
            raise DamagedCheckpointError(f"{prefix} does not have {unknown[0]:.200}, which its description names")
        if lacking := [each for each in values.weights if each not in found.values()]:
            warn(
                f"The state_dict of the model of {prefix} lacks {', '.join(lacking):.300}: Keras has no module in an "
                'attribute that holds them. Export with names="variables", which has them.'
            )
        return Variables(files, name, values), found

    return read_checkpoint(checkpoint, read)


def _npz(variables: Variables, names: Mapping[str, str]) -> Iterator[memoryview]:
    """NumPy's archive, which `np.load` reads."""

    def members() -> Iterator[Member]:
        for name, variable in names.items():
            array = variables[variable]
            # Strings have a fixed size here, because NumPy pickles other strings.
            array = np.asarray(array, "S") if array.dtype == object else array.astype(_for_npz(array.dtype), copy=False)
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
            yield Member(f"{name}.npy", array.nbytes, [memoryview(header.getvalue()), _bytes(array)])

    return archive(members())


def _safetensors(variables: Variables, names: Mapping[str, str]) -> Iterator[memoryview]:
    """A safetensors file: the length of a header, the header in JSON, and the values."""
    kinds = {name: variables.kinds()[variable] for name, variable in names.items()}
    types = {name: _for_safetensors(name, kind.dtype) for name, kind in kinds.items()}
    # The largest types come first, so that each value is aligned.
    order = sorted(names, key=lambda name: (-types[name].itemsize, name))
    header, end = {}, 0
    for name in order:
        shape = kinds[name].shape
        begin, end = end, end + math.prod(shape) * types[name].itemsize
        header[name] = {"dtype": _OWN[types[name].name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return _joined(text, (variables[names[name]].astype(types[name], copy=False) for name in order))


def _joined(header: bytes, values: Iterator[np.ndarray]) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(8, "little") + header)
    yield from map(_bytes, values)


def _for_npz(dtype: np.dtype) -> np.dtype:
    """The type of NumPy itself that holds all values of a type."""
    return dtype if dtype.isbuiltin == 1 else _wider(dtype)


def _for_safetensors(name: str, dtype: np.dtype) -> np.dtype:
    """The type of a safetensors file that holds all values of a type.

    Raises:
        ValueError: The format has no such type.
    """
    dtype = dtype if dtype.name in _OWN or dtype.kind in "Oc" else _wider(dtype)
    if dtype.name not in _OWN:
        kind = "strings" if dtype.kind == "O" else str(dtype)
        raise ValueError(f"a .safetensors file cannot hold {name!r:.200}, which is of {kind}. Export to .npz.")
    return dtype


def _wider(dtype: np.dtype) -> np.dtype:
    """The next larger type of NumPy for a type of `ml_dtypes`."""
    return np.dtype("uint8" if "uint" in dtype.name else "int8" if "int" in dtype.name else "float32")


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
