"""The arguments and options of the commands, and their completion in a shell."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from keras_ckpt.errors import CheckpointError
from keras_ckpt.store import layout
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.record import CheckpointRecord

_Command = TypeVar("_Command", bound=Callable[..., Any])
_NAMED = ("latest", "best")
"""The names that stand for a step."""


class _Step(click.ParamType):  # type: ignore[type-arg] # generic since click 8.4
    """A step: a number, `latest`, `best`, or the name of a file of Keras."""

    name = "STEP"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if not (_is_step(value) or _is_file(value)):
            self.fail(f"{value!r} is neither a number nor 'latest' nor 'best' nor a file of Keras.", param, ctx)
        return int(value) if value.isdecimal() else value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _matching((*_NAMED, *(str(record.step) for record in _known(ctx))), incomplete)


class OfOneStep(click.Command):
    """A command of the arguments [PATH] STEP. The PATH may be missing, and the STEP if PATH is one checkpoint."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [word for word in args if not word.startswith("-")]
        if words and not any(map(_is_step, words[1:2])) and (found := _path_and_step(words[0])):
            place = args.index(words[0])
            args = [*args[:place], *found, *args[place + 1 :]]
        return super().parse_args(ctx, args)


def _path_and_step(word: str) -> tuple[str, str] | None:
    """The PATH and the STEP in one word: a step, a file of Keras, or a prefix as `show --path` prints it."""
    folder, name = os.path.split(word)
    folder = folder or "."
    if _is_step(word) or _is_file(word):
        return folder, name
    if os.path.isfile(layout.sidecar(word)) and not os.path.isdir(word):
        return folder, str(CheckpointDirectory(folder, layout.TENSORFLOW).listing().named(name).step)
    return None


def _two(ctx: click.Context, param: click.Parameter, words: tuple[str, ...]) -> Iterable[Any]:
    """Two checkpoints, each a PATH with a STEP, or with `None` for the newest.

    A STEP alone is of the PATH before it. A completion needs the paths alone.
    """
    if ctx.resilient_parsing:
        return [word for word in words if not _is_step(word)] or ["."]
    path, found = ".", list[tuple[str, str | None]]()
    for word in words:
        if _is_step(word) or (_is_file(word) and "/" not in word):
            opened = bool(found) and found[-1][1] is None
            found[len(found) - opened :] = [(path, word)]
        else:
            path, step = _path_and_step(word) or (word, None)
            found.append((path, step))
    if len(found) != 2:
        raise click.UsageError(
            f"Expected two checkpoints, such as runs/digits 120 360. Received {len(found)}: {' '.join(words) or 'none'}"
        )
    return [(path, step and _Step().convert(step, param, ctx)) for path, step in found]


def _is_step(word: str) -> bool:
    """Whether a word is a number, `latest` or `best`."""
    return word in _NAMED or (word.isascii() and word.isdecimal())


def _is_file(word: str) -> bool:
    """Whether a word is the path of a file of Keras, and of no template."""
    return layout.is_keras_file(word) and layout.Series(word).is_one_name


def _known(ctx: click.Context) -> Iterable[CheckpointRecord]:
    """The checkpoints that a completion knows: those of the PATH so far, of the current directory without a PATH."""
    # An option that still lacks its value ends the parsing, and leaves the words before it in `args`.
    paths = ctx.args or ctx.params.get("paths") or [ctx.params.get("path", ".")]
    with contextlib.suppress(CheckpointError, OSError, ValueError):
        return [record for path in paths for record in CheckpointDirectory(path)]
    return []


def _matching(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in dict.fromkeys(words) if word.startswith(incomplete)]


def _complete_path(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The directories and the files of Keras; for a command whose PATH may be missing, the steps too."""
    if isinstance(ctx.command, OfOneStep):
        return _complete_path_or_step(ctx, param, incomplete)
    files = _keras_files(incomplete)
    # A shell completes files by itself, together with directories. It does not know which files are Keras's.
    return [CompletionItem(incomplete, type="file" if files else "dir")]


def _complete_path_or_step(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The directories, the steps and the files of Keras."""
    steps = _Step().shell_complete(ctx, param, incomplete)
    return [CompletionItem(incomplete, type="dir"), *steps, *map(CompletionItem, _keras_files(incomplete))]


def _keras_files(incomplete: str) -> list[str]:
    """The paths of the files of Keras that begin with a text."""
    folder = os.path.dirname(incomplete)
    with contextlib.suppress(OSError):
        paths = (os.path.join(folder, name) for name in sorted(os.listdir(folder or ".")))
        return [path for path in paths if path.startswith(incomplete) and layout.is_keras_file(path)]
    return []


def _complete_metric(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return _matching((name for record in _known(ctx) for name in record.metrics), incomplete)


path = click.argument("path", default=".", type=click.Path(), shell_complete=_complete_path)
paths = click.argument(
    "paths",
    metavar="[PATH]...",
    nargs=-1,
    type=click.Path(),
    callback=lambda ctx, param, value: value or (".",),
    shell_complete=_complete_path,
)
two = click.argument(
    "paths",
    metavar="[PATH] [STEP] [PATH] [STEP]",
    nargs=-1,
    type=click.Path(),
    callback=_two,
    shell_complete=_complete_path_or_step,
)
step = click.argument("step", type=_Step())
yes = click.option("-y", "--yes", is_flag=True, help="Do not ask.")
monitor = click.option(
    "--monitor",
    metavar="METRIC",
    shell_complete=_complete_metric,
    help="The metric. Default: the metric that training monitored.",
)
mode = click.option("--mode", type=click.Choice(["min", "max"]), help="Whether less or more of the metric is better.")
_FORMS = {
    "all": ("-v", "--verbose", "Print all facts."),
    "json": ("--json", "Print all facts as JSON, a line for each PATH."),
    "path": ("--path", "Print the prefix only."),
    "quiet": ("-q", "--quiet", "Print errors only."),
}


def form(*names: str) -> Callable[[_Command], _Command]:
    """The options for the form of the output; without an option, it is a table."""

    def decorate(command: _Command) -> _Command:
        for name in names:
            *flags, help_text = _FORMS[name]
            command = click.option(*flags, "form", flag_value=name, default=None, help=help_text)(command)
        return command

    return decorate
