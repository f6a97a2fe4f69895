"""The command `keras-ckpt`. Each subcommand calls a `CheckpointDirectory` once, and prints the result."""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click
import msgspec

from keras_ckpt.errors import CheckpointError, CheckpointNotFoundError, MonitorError
from keras_ckpt.store.directory import CheckpointDirectory
from keras_ckpt.store.listing import PIN_LIMIT, Listing
from keras_ckpt.store.plan import PrunePlan
from keras_ckpt.store.policies import BestN, EveryNEpochs, EveryNHours, EveryNSteps, LatestN, PreservationPolicy
from keras_ckpt.store.record import CheckpointRecord, Mode, members
from keras_ckpt.store.tables import counted, printable, text
from keras_ckpt.version import __version__


class _Group(click.Group):
    """A group of commands that prints an expected error in one line and exits with 1; wrong usage exits with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader closed the pipe
        except MonitorError as error:
            raise click.UsageError(str(error)) from error
        except (CheckpointError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """List, inspect, verify and prune the checkpoints of a run.

    Exit codes: 0 done, 1 not found or damaged, 2 wrong usage.
    """


_path = click.argument("path", type=click.Path())
_step = click.argument("step", type=int)
_json = click.option("--json", "as_json_text", is_flag=True, help="Print JSON.")
_monitor = click.option("--monitor", help="The metric. Default: the metric that training monitored.")
_mode = click.option("--mode", type=click.Choice(["min", "max"]), help="Whether less or more of the metric is better.")


@main.command()
@_path
@_json
def ls(path: str, as_json_text: bool) -> None:
    """List the checkpoints of the directory PATH.

    Example: keras-ckpt ls runs/digits
    """
    runs = _existing(path)
    if not as_json_text:
        click.echo(text(runs, color=True))
        return
    listing = runs.listing()
    _print_json(
        {
            "checkpoints": [_facts(record) for record in listing.records],
            "damaged": _reasons(listing),
            "without_sidecar": listing.unmanaged,
        }
    )


@main.command()
@_path
@_step
@_json
def show(path: str, step: int, as_json_text: bool) -> None:
    """Show all facts of the checkpoint of a STEP.

    Example: keras-ckpt show runs/digits 120
    """
    _show(_existing(path)[step], as_json_text)


@main.command()
@_path
@_monitor
@_mode
@_json
def best(path: str, monitor: str | None, mode: Mode | None, as_json_text: bool) -> None:
    """Show the best checkpoint.

    Example: keras-ckpt best runs/digits --monitor val_accuracy --mode max
    """
    record = _existing(path).best(monitor, mode)
    if record is None:
        raise CheckpointNotFoundError(f"There is no checkpoint in {path}.")
    _show(record, as_json_text)


@main.command()
@_path
@click.option("--keep-latest", type=int, metavar="N", help="Keep the N newest.")
@click.option("--keep-best", type=int, metavar="N", help="Keep the N best.")
@click.option("--keep-every-steps", type=int, metavar="N", help="Keep one checkpoint every N steps.")
@click.option("--keep-every-epochs", type=int, metavar="N", help="Keep one checkpoint every N epochs.")
@click.option("--keep-every-hours", type=float, metavar="H", help="Keep one checkpoint every H hours.")
@_monitor
@_mode
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan, and remove nothing.")
@_json
def prune(
    path: str,
    keep_latest: int | None,
    keep_best: int | None,
    keep_every_steps: int | None,
    keep_every_epochs: int | None,
    keep_every_hours: float | None,
    monitor: str | None,
    mode: Mode | None,
    dry_run: bool,
    as_json_text: bool,
) -> None:
    """Remove the checkpoints that no --keep option keeps. Pinned checkpoints stay.

    Example: keras-ckpt prune runs/digits --keep-latest 1 --keep-best 1 --monitor val_loss --mode min --dry-run
    """
    if keep_best is None and (monitor or mode):
        raise click.UsageError("--monitor and --mode define the ranking of --keep-best N. --keep-best is missing.")
    kinds: Mapping[Any, Any] = {
        LatestN: keep_latest,
        functools.partial(BestN, monitor=monitor, mode=mode): keep_best,
        EveryNSteps: keep_every_steps,
        EveryNEpochs: keep_every_epochs,
        EveryNHours: keep_every_hours,
    }
    with _arguments():
        policies: list[PreservationPolicy] = [kind(value) for kind, value in kinds.items() if value is not None]
    if not policies:
        raise click.UsageError("Give a --keep option, for example --keep-latest 3. To remove everything, use clear.")
    runs = _existing(path)
    plan = runs.plan(functools.reduce(operator.or_, policies))
    if not dry_run:
        runs.prune(plan)
    if as_json_text:
        _print_json(_plan_facts(plan))
    else:
        click.echo(text(plan, color=True))
        click.echo("Nothing was removed: this was a dry run." if dry_run else "Done.")


@main.command()
@_path
@_json
@click.pass_context
def verify(context: click.Context, path: str, as_json_text: bool) -> None:
    """Read every byte of every checkpoint. Exit with 1 if a checkpoint is damaged. Change nothing.

    Example: keras-ckpt verify runs/digits
    """
    import rich.console
    import rich.progress

    runs = _existing(path)
    terminal = rich.console.Console(stderr=True)
    with rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.DownloadColumn(),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    ) as bar:
        task = bar.add_task("verifying", total=None)
        found = runs.verify(lambda done, total: bar.update(task, completed=done, total=total))
    if as_json_text:
        _print_json(
            {
                "whole": [record.step for record in found.listing.records],
                "damaged": _reasons(found.listing),
                "without_sidecar": found.listing.unmanaged,
            }
        )
    else:
        click.echo(text(found, color=True))
    context.exit(0 if found.ok else 1)


@main.command()
@_path
@_step
@click.argument("reason", default="")
def pin(path: str, step: int, reason: str) -> None:
    """Pin the checkpoint of a STEP, so that no policy removes it.

    Example: keras-ckpt pin runs/digits 120 "paper figure 3"
    """
    if len(reason.encode()) > PIN_LIMIT:
        raise click.UsageError(f"The reason of a pin expected at most {PIN_LIMIT} bytes. Received: {reason:.50}...")
    _existing(path).pin(step, reason)
    click.echo(f"Pinned step {step}.")


@main.command()
@_path
@_step
def unpin(path: str, step: int) -> None:
    """Unpin the checkpoint of a STEP, so that policies may remove it.

    Example: keras-ckpt unpin runs/digits 120
    """
    _existing(path).unpin(step)
    click.echo(f"Unpinned step {step}.")


@main.command()
@_path
@click.option("--yes", is_flag=True, help="Do not ask.")
def clear(path: str, yes: bool) -> None:
    """Remove all checkpoints of the directory PATH.

    Example: keras-ckpt clear runs/digits
    """
    runs = _existing(path)
    if not yes:
        click.confirm(f"Remove {counted(len(runs), 'checkpoint')} in {path}?", abort=True)
    click.echo(f"Removed {counted(len(runs.clear()), 'checkpoint')}.")


@main.command()
@click.argument("path", type=click.Path(), default="runs/demo")
def demo(path: str) -> None:
    """Train a small network on handwritten digits, save into the directory PATH, and show the package's features.

    Example: keras-ckpt demo runs/demo
    """
    # TensorFlow prints a page of remarks in every program.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        from keras_ckpt.cli import demo as demonstration
    except ImportError as error:
        raise click.ClickException(
            f"The demo needs a package that is not installed ({error}). Install it: pip install 'keras-ckpt[demo]'."
        ) from error
    demonstration.run(path)


@contextlib.contextmanager
def _arguments() -> Iterator[None]:
    """Shows a `ValueError` of arguments as wrong usage. A `ValueError` elsewhere is a bug, and shows its traceback."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _existing(path: str) -> CheckpointDirectory:
    with _arguments():
        runs = CheckpointDirectory(path)
    if not os.path.lexists(runs.path):
        raise CheckpointNotFoundError(f"There is no directory {path}.")
    return runs


def _show(record: CheckpointRecord, as_json_text: bool) -> None:
    facts = _facts(record)
    if as_json_text:
        _print_json(facts)
        return
    facts["time"] = f"{record.saved_at:%Y-%m-%d %H:%M:%S}"
    for name, value in facts.items():
        fact = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        click.echo(f"{name:16}{printable(fact)}")


def _facts(record: CheckpointRecord) -> dict[str, Any]:
    """The facts of a checkpoint: its prefix, size, pin and sidecar."""
    prefix = record.prefix
    if not prefix.isascii():  # a path may have bytes that are not UTF-8
        prefix = os.fsencode(prefix).decode(errors="replace")
    return {
        "prefix": prefix,
        "size": record.size,
        "size_shared": record.size_shared,
        "pin": record.pin,
        **members(record),
    }


def _reasons(listing: Listing) -> dict[str, str]:
    return {name: str(error) for name, error in listing.damaged.items()}


def _plan_facts(plan: PrunePlan) -> dict[str, Any]:
    decisions: Iterable[dict[str, Any]] = (
        {
            "step": decision.record.step,
            "kept": decision.kept,
            "reason": decision.reason,
            "size": decision.size,
        }
        for decision in plan.decisions
    )
    return {"policy": repr(plan.policy), "checkpoints": list(decisions)}


def _print_json(value: Any) -> None:
    click.echo(msgspec.json.encode(value).decode())
