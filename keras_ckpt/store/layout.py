"""The file names in a directory of checkpoints. No other module spells them.

    checkpoint                       TensorFlow's state file
    ckpt-120.index                   a plain TensorFlow checkpoint
    ckpt-120.data-00000-of-00001
    ckpt-120.json                    the sidecar; without a sidecar there is no checkpoint
    ckpt-120.keep                    a pin
    journal.jsonl                    the journal

    07-0.31.keras                    a file of the template {epoch:02d}-{val_loss:.2f}.keras, with its record at its end
    07-0.31.keras.json               its sidecar
    07-0.31.keras.keep               its pin

The folder `.keras_ckpt/` beside these files has locks, stages and trash; those of a template are in a folder of their
own there, with their journal. `files` and `commit` name the contents.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import string
from collections.abc import Container, Iterable

STATE_FILE = "checkpoint"
JOURNAL = "journal.jsonl"
KERAS_SUFFIXES = (".keras", ".h5")
"""The suffixes of files in Keras's own formats."""
_SIDECAR, _PIN, _INDEX, _DATA = ".json", ".keep", ".index", ".data-"
_PRIVATE = "series-"
_SHARD = r"\.data-\d{5}-of-\d{5}"


@dataclasses.dataclass(frozen=True)
class Series:
    """The checkpoints of a directory with one form of names.

    Attributes:
        template: The template of the names of Keras's files; `""` for TensorFlow checkpoints. Its folders may have
            fields too, as in `e{epoch:02d}/model.keras`: then a name is a path below the directory.
        only: The only name to read, `""` to read all files of the template.
    """

    template: str = ""
    only: str = ""

    @property
    def private(self) -> str:
        """The name of the private folder of a template, `""` for TensorFlow checkpoints."""
        return self.template and f"{_PRIVATE}{self.template.replace('/', '%2F')}.d"

    @property
    def depth(self) -> int:
        """The number of folders between the directory and the files."""
        return self.template.count("/")

    def checkpoints(self, files: Iterable[str]) -> set[str]:
        """The names of the checkpoints among the files of a directory.

        Files of other programs and of other templates may also match a template. Their records tell.
        """
        if not self.template:
            return {name for name in of_sidecars(files) if not is_keras_file(name)}
        return {name for name in files if (name == self.only if self.only else self._pattern.fullmatch(name))}

    @property
    def is_one_name(self) -> bool:
        """Whether all checkpoints have the name that is the template, so a save replaces the checkpoint before."""
        return all(field is None for _, field, _ in _parts(self.template))

    def next_to(self, name: str, taken: Container[str]) -> str:
        """A free name for a checkpoint whose name is taken: `~2`, `~3` and so on come before the suffix."""
        stem = name.removesuffix(self._suffix)
        names = (f"{stem}~{number}{self._suffix}" for number in itertools.count(2))
        return next(each for each in names if each not in taken)

    @property
    def _suffix(self) -> str:
        return next(suffix for suffix in (".weights.h5", *KERAS_SUFFIXES) if self.template.endswith(suffix))

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str]:
        fields = _parts(self.template.removesuffix(self._suffix))
        parts = (re.escape(literal) + _values(field, spec) for literal, field, spec in fields)
        return re.compile(f"{''.join(parts)}(~[0-9]+)?{re.escape(self._suffix)}", re.DOTALL)


TENSORFLOW = Series()
"""The TensorFlow checkpoints of a directory."""


def _parts(template: str) -> list[tuple[str, str | None, str]]:
    """The literal texts of a template, the fields after them and their formats.

    A malformed template is a name, of a copied file.
    """
    try:
        return [(literal, field, spec or "") for literal, field, spec, _ in string.Formatter().parse(template)]
    except ValueError:
        return [(template, None, "")]


def _values(field: str | None, spec: str) -> str:
    """The pattern of the values of a field. An epoch is a number, so `{epoch}.keras` is no template of `best.keras`."""
    if field is None:
        return ""
    return " *[0-9]+" if field == "epoch" and re.fullmatch("[0-9]*d?", spec) else "[^/]+"


def is_of_template(name: str, template: str) -> bool:
    """Whether a file of Keras has a name of a template."""
    return is_keras_file(template) and bool(Series(template).checkpoints([name]))


def split(path: str) -> tuple[str, Series]:
    """The directory and the series of a path: of a directory, of a file of Keras, or of a template."""
    folder = path.partition("{")[0].rpartition("/")[0]
    template = path[len(folder) :].lstrip("/")
    return (
        (folder or "/" * path.startswith("/") or ".", Series(template)) if is_keras_file(path) else (path, TENSORFLOW)
    )


def template_in(private: str) -> str:
    """The template in the name of a private folder, `""` for a name of another form."""
    name = private.removesuffix(".d")
    return name.removeprefix(_PRIVATE).replace("%2F", "/") if name.startswith(_PRIVATE) and name != private else ""


def is_keras_file(path: str) -> bool:
    """Whether a path has the suffix of a file in Keras's own formats."""
    return path.endswith(KERAS_SUFFIXES)


def numbered(step: int, base: str = "ckpt") -> str:
    """The default name of a step's checkpoint."""
    return f"{base}-{step}"


def sidecar(name: str) -> str:
    """The file name of a checkpoint's sidecar."""
    return name + _SIDECAR


def pin(name: str) -> str:
    """The file name of a checkpoint's pin."""
    return name + _PIN


def index(name: str) -> str:
    """The file name of a TensorFlow checkpoint's index."""
    return name + _INDEX


def data(name: str, shard: int, number: int) -> str:
    """The file name of one of the `number` data shards of a TensorFlow checkpoint."""
    return f"{name}{_DATA}{shard:05d}-of-{number:05d}"


def is_sidecar(file: str) -> bool:
    """Whether a file name is a sidecar's."""
    return file.endswith(_SIDECAR)


def is_data(file: str) -> bool:
    """Whether a file name is a data shard's."""
    return _DATA in file


def of_sidecars(files: Iterable[str]) -> set[str]:
    """The names of the checkpoints with a sidecar among `files`."""
    return {file.removesuffix(_SIDECAR) for file in files if file.endswith(_SIDECAR)}


def of_indexes(files: Iterable[str]) -> set[str]:
    """The names of the checkpoints with an index among `files`."""
    return {file.removesuffix(_INDEX) for file in files if file.endswith(_INDEX)}


def named_by(file: str) -> str:
    """The checkpoint's name in a file name; a checkpoint's name stays as it is."""
    return re.sub(rf"(\.index|\.json|{_SHARD})\Z", "", file)


def is_of(file: str, name: str) -> bool:
    """Whether a file is the sidecar, the index or a data shard of a checkpoint."""
    return file != name and named_by(file) == name


def is_tensorflows(file: str, name: str) -> bool:
    """Whether a file is the index or a data shard of a checkpoint."""
    return is_of(file, name) and not is_sidecar(file)
