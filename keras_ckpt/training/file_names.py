"""The names of Keras's files: a template, checked before training and formatted at each save."""

from __future__ import annotations

import contextlib
import re
import string
from collections.abc import Mapping
from typing import Any

from keras_ckpt.store.notices import warn

_OWN = ("epoch", "batch")
_LONGEST = 60
"""The most characters of a value: a file name has at most 255 bytes."""


class Template:
    """A template of file names, such as `{epoch:02d}-{val_loss:.2f}.keras`.

    A value that is missing becomes `nan`. A value that does not fit its format is formatted as a float, or as text. No
    value leads into another folder. So a name never ends a training.

    Example:

    ```python
    Template("{epoch:02d}-{val_loss:.2f}.keras").name({"epoch": 3, "val_loss": 0.25})  # '03-0.25.keras'
    ```

    Args:
        template: The file name, with named fields as `str.format` has them.

    Raises:
        ValueError: A field has no name, or is an expression.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        self._warned = False
        try:
            self._parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ValueError(f"The template {template!r} is malformed: {error}. Write {{{{ for a brace.") from None
        for _, field, spec, conversion in self._parts:
            if field is not None and (
                not re.fullmatch(r"[^\W\d][^.\[\]/]*", field) or conversion or "{" in (spec or "")
            ):
                raise ValueError(
                    f"The template {template!r} has the field {{{field}}}. Expected epoch, batch or the name of a "
                    "metric, with an optional format: {epoch:02d}, {val_loss:.2f}."
                )

    @property
    def fields(self) -> list[str]:
        """The names of the fields."""
        return [field for _, field, *_ in self._parts if field is not None]

    def name(self, values: Mapping[str, Any]) -> str:
        """The file name for the values of a save: the epoch, the batch and the logs."""
        parts = (
            literal + ("" if field is None else _formatted(values.get(field, float("nan")), spec or ""))
            for literal, field, spec, _ in self._parts
        )
        folders = "".join(parts).split("/")
        return "/".join("_" if each in (".", "..") else each for each in folders)

    def warn_of_missing(self, values: Mapping[str, Any]) -> None:
        """Warns once of values that a name lacks. Arguments as in `name`."""
        missing = [field for field in self.fields if field not in values]
        if missing and not self._warned:
            self._warned = True
            there = ", ".join(name for name in values if name not in _OWN) or "none"
            warn(
                f"{self._template} has {{{missing[0]}}}, which a save does not have; its place is 'nan'. The metrics "
                f"are: {there}."
            )


def _formatted(value: Any, spec: str) -> str:
    text = str(value)
    for convert in (lambda each: each, float, str):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            text = format(convert(value), spec)
            break
    return re.sub(r"[/\0]", "_", text[:_LONGEST]) or "_"
