"""The command `keras-ckpt`. Each subcommand calls a method of each `CheckpointDirectory`, and prints the result."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import click
import msgspec

from keras_ckpt.cli import arguments
from keras_ckpt.errors import CheckpointError, CheckpointNotFoundError, MonitorError, PlanError
from keras_ckpt.store import layout
from keras_ckpt.store.bounds import MaxBytes, MaxCount
from keras_ckpt.store.directory import CheckpointDirectory, Verification
from keras_ckpt.store.files import Folder
from keras_ckpt.store.history import Past
from keras_ckpt.store.listing import PIN_LIMIT, Listing
from keras_ckpt.store.periods import Daily, KeepWithin, Monthly, Weekly
from keras_ckpt.store.plan import PrunePlan
from keras_ckpt.store.policies import BestN, EveryNEpochs, EveryNHours, EveryNSteps, LatestN, PreservationPolicy
from keras_ckpt.store.record import CheckpointRecord, Mode, encodable_metadata, members, to_json
from keras_ckpt.store.runs import Runs, RunsPlan
from keras_ckpt.store.tables import Shown, counted, few, printable, relative, text
from keras_ckpt.store.watching import views
from keras_ckpt.version import __version__

_LEAST, _AROUND = 6, 12
"""The smallest number of rows of a watched table, and the lines of a terminal that are no rows."""
_KEEP: Mapping[str, Any] = {
    "keep_latest": LatestN,
    "keep_best": BestN,
    "keep_every_steps": EveryNSteps,
    "keep_every_epochs": EveryNEpochs,
    "keep_every_hours": EveryNHours,
    "keep_daily": Daily,
    "keep_weekly": Weekly,
    "keep_monthly": Monthly,
    "keep_within": KeepWithin,
}
"""The policies of the options of `prune`, which `|` joins."""
_BOUNDS: Mapping[str, Any] = {"max_bytes": MaxBytes, "max_count": MaxCount}
"""The bounds of the options of `prune`."""


class _Group(click.Group):
    """A group of commands that prints an expected error in one line and exits with 1; wrong usage exits with 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # the reader closed the pipe
        except MonitorError as error:
            raise click.UsageError(str(error)) from error
        except CheckpointError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(_plain(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """List, inspect, verify and prune the checkpoints of a run.

    PATH is the directory of a run, a file of Keras, or the template of such files in quotes. Default: the current
    directory; demo has its own. STEP is a number, latest, best, or the name of a file of Keras. A PATH that is a file
    needs no STEP.

    Exit codes: 0 done, 1 not found or damaged, 2 wrong usage.
    """


@main.command()
@arguments.paths
@click.option(
    "-a", "--all", "everything", is_flag=True, help="List removed checkpoints and skipped saves too, and why."
)
@arguments.form("json")
def ls(paths: Sequence[str], everything: bool, form: str | None) -> None:
    """List the checkpoints of each PATH. List the runs below a PATH that holds no run itself, the best first.

    Example: keras-ckpt ls runs/digits
    """
    if everything:
        for each in itertools.chain.from_iterable(_each_run(runs) for runs in _directories(*paths)):
            past = each.seen().past
            _report(form, past, functools.partial(_past_facts, past))
        return
    for runs in map(_or_runs_below, _directories(*paths)):
        _report(form, runs, functools.partial(_directory_facts, runs))


@main.command(cls=arguments.OfOneStep)
@arguments.path
@arguments.step
@arguments.form("path", "json", "all")
def show(path: str, step: int | str, form: str | None) -> None:
    """Show the checkpoint of a STEP.

    Example: keras-ckpt show runs/digits 120
    """
    _show(_record(path, step)[1], form)


@main.command(cls=arguments.OfOneStep)
@arguments.path
@arguments.step
def why(path: str, step: int | str) -> None:
    """Tell why the checkpoint of a STEP is kept, was removed, or was never saved.

    Example: keras-ckpt why runs/digits 120
    """
    if isinstance(step, int):
        (runs,) = _whole(path)
        click.echo(runs.why(step))
        return
    _, record = _record(path, step)
    click.echo(CheckpointDirectory(record.directory, layout.Series(record.template)).why(record))


@main.command()
@arguments.paths
@arguments.monitor
@arguments.mode
@arguments.form("path", "json", "all")
def best(paths: Sequence[str], monitor: str | None, mode: Mode | None, form: str | None) -> None:
    """Show the best checkpoint of each PATH. A PATH that holds no run itself means all runs below it.

    Example: keras-ckpt best runs/digits --monitor val_accuracy --mode max
    """
    for runs in map(_or_runs_below, _whole(*paths)):
        _show(_found(runs.path, runs.best(monitor, mode)), form)


@main.command()
@arguments.paths
@click.option("--keep-latest", type=int, metavar="N", help="Keep the N newest.")
@click.option("--keep-best", type=int, metavar="N", help="Keep the N best.")
@click.option("--keep-every-steps", type=int, metavar="N", help="Keep one checkpoint every N steps.")
@click.option("--keep-every-epochs", type=int, metavar="N", help="Keep one checkpoint every N epochs.")
@click.option("--keep-every-hours", type=float, metavar="H", help="Keep one checkpoint every H hours.")
@click.option("--keep-daily", type=int, metavar="N", help="Keep the first of each of the N newest days.")
@click.option("--keep-weekly", type=int, metavar="N", help="Keep the first of each of the N newest weeks.")
@click.option("--keep-monthly", type=int, metavar="N", help="Keep the first of each of the N newest months.")
@click.option("--keep-within", metavar="TIME", help="Keep those of the last TIME of the run, such as 2d or 36h.")
@click.option("--max-bytes", metavar="SIZE", help="Of these keep as many as fit into SIZE, such as 50GB.")
@click.option("--max-count", type=int, metavar="N", help="Of these keep at most N.")
@arguments.monitor
@arguments.mode
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan, and remove nothing.")
@arguments.yes
@arguments.form("quiet", "json")
def prune(
    paths: Sequence[str],
    monitor: str | None,
    mode: Mode | None,
    dry_run: bool,
    yes: bool,
    form: str | None,
    **rules: Any,
) -> None:
    """Remove the checkpoints of each PATH that no --keep option keeps. Pinned checkpoints stay.

    A PATH that holds no run itself means each run below it. --max-bytes and --max-count bound what all --keep options
    keep together, by the order of these options. Without a --keep option they keep the newest that fit. At a terminal,
    the command prints its plan and asks.

    Example: keras-ckpt prune runs/digits --keep-latest 1 --keep-best 1 --monitor val_loss --mode min --dry-run
    """
    if rules["keep_best"] is None and (monitor or mode):
        raise click.UsageError("--monitor and --mode define the ranking of --keep-best N. --keep-best is missing.")
    best = functools.partial(BestN, monitor=monitor, mode=mode)
    with _arguments():
        policies = _policies({**_KEEP, "keep_best": best}, rules)
        bounds = _policies(_BOUNDS, rules)
    union = [functools.reduce(operator.or_, policies)] if policies else []
    if not (union or bounds):
        raise click.UsageError("Give a --keep option, for example --keep-latest 3. To remove everything, use clear.")
    policy = functools.reduce(operator.and_, [*union, *bounds])
    plans: list[Any] = [(runs, runs.plan(policy)) for runs in map(_or_runs_below, _whole(*paths))]
    for _, plan in plans:
        _report(form, plan, functools.partial(_plan_facts, plan))
    if dry_run:
        _say(form, "Nothing was removed: this was a dry run.")
        return
    planned = sum(len(plan.removed) for _, plan in plans)
    if planned and not yes and sys.stdin.isatty() and sys.stdout.isatty():
        click.confirm(f"Remove {counted(planned, 'checkpoint')}?", abort=True)
    removed = sum(len(runs.prune(plan)) for runs, plan in plans)
    _say(form, f"Removed {counted(removed, 'checkpoint')}.")


def _policies(kinds: Mapping[str, Any], rules: Mapping[str, Any]) -> list[PreservationPolicy]:
    """The policies of the options that were given, in the order of the command line."""
    return [kinds[name](value) for name, value in rules.items() if value is not None and name in kinds]


@main.command()
@arguments.paths
@arguments.form("quiet", "json")
@click.pass_context
def verify(context: click.Context, paths: Sequence[str], form: str | None) -> None:
    """Read every byte of every checkpoint of each PATH. Exit with 1 if a checkpoint is damaged. Change nothing.

    Example: keras-ckpt verify runs/digits
    """
    ok = True
    for runs in _directories(*paths):
        found = [_verified(each, form) for each in runs.each_series()]
        ok = ok and all(each.ok for each in found)
        if form == "json":
            _print_json(_verification_facts([each.listing for each in found]))
        elif form is None:
            _print_verifications(runs, found)
    context.exit(0 if ok else 1)


@main.command()
@arguments.two
@click.option("--optimizer", is_flag=True, help="Compare the state of the optimizer too.")
@arguments.form("json")
def diff(paths: Sequence[tuple[str, int | str | None]], optimizer: bool, form: str | None) -> None:
    """Compare the weights of two checkpoints, layer by layer.

    A STEP alone is of the PATH before it. A PATH without a STEP means its newest checkpoint.

    Example: keras-ckpt diff runs/digits 40 120
    """
    import keras_ckpt  # the other commands need no NumPy

    a, b = (_compared(path, step) for path, step in paths)
    try:
        found = keras_ckpt.diff(a, b, optimizer=optimizer)
    except CheckpointError:
        raise
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    _report(form, found, lambda: encodable_metadata(dataclasses.asdict(found)))


@main.command()
@arguments.path
def watch(path: str) -> None:
    """Show the table of PATH, and again after each change, until the training ends or Ctrl-C.

    Example: keras-ckpt watch runs/digits
    """
    import rich.console
    import rich.live

    with _arguments():
        runs = CheckpointDirectory(path)
    console = rich.console.Console()
    rows = max(_LEAST, console.height - _AROUND)
    # The training may begin later, so the directory may be missing yet.
    with contextlib.suppress(KeyboardInterrupt), rich.live.Live(console=console, auto_refresh=False) as live:
        for view in views(runs, rows, threading.Event()):
            live.update(view, refresh=True)
    if not console.is_terminal:
        click.echo()  # rich ends the last line in a terminal alone


@main.command()
@arguments.path
@click.option("-o", "--output", metavar="FILE", default="report.html", help="The page to write. Default: report.html.")
@arguments.form("quiet")
def report(path: str, output: str, form: str | None) -> None:
    """Write a report of PATH: one page of HTML with facts, the plot, and the table of the checkpoints.

    The page of a PATH that holds no run itself has the runs below it.

    Example: keras-ckpt report runs/digits -o report.html
    """
    (runs,) = map(_or_runs_below, _directories(path))
    runs.report(output)
    _say(form, f"Wrote {output}.")


@main.command(cls=arguments.OfOneStep)
@arguments.path
@arguments.step
@click.argument("file", type=click.Path())
@click.option("--weights-only", is_flag=True, help="Skip the optimizer and the metrics.")
@click.option(
    "--names",
    type=click.Choice(["variables", "state_dict"]),
    default="variables",
    help="The names of the values in an .npz or .safetensors file: of load_variables, or of a state_dict of PyTorch.",
)
def export(
    path: str, step: int | str, file: str, weights_only: bool, names: Literal["variables", "state_dict"]
) -> None:
    """Export the checkpoint of a STEP to a FILE. Its ending is the format.

    .keras, .weights.h5, .safetensors and .npz need no TensorFlow. For .onnx, and for a SavedModel at a path that ends
    in / or has no ending, the model is built.

    Example: keras-ckpt export runs/digits best digits.keras
    """
    import keras_ckpt  # the other commands need no NumPy

    checkpoint, name = _exported(path, step)
    try:
        keras_ckpt.export(checkpoint, file, weights_only=weights_only, names=names)
    except CheckpointError:
        raise
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    except ImportError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"Exported {name} to {file}.")


@main.command(cls=arguments.OfOneStep)
@arguments.path
@arguments.step
@click.argument("reason", default="")
@arguments.form("quiet")
def pin(path: str, step: int | str, reason: str, form: str | None) -> None:
    """Pin the checkpoint of a STEP, so that no policy removes it.

    Example: keras-ckpt pin runs/digits 120 "paper figure 3"
    """
    if len(reason.encode()) > PIN_LIMIT:
        raise click.UsageError(f"The reason of a pin expected at most {PIN_LIMIT} bytes. Received: {reason:.50}...")
    runs, record = _record(path, step)
    runs.pin(record, reason)
    _say(form, f"Pinned step {record.step}.")


@main.command(cls=arguments.OfOneStep)
@arguments.path
@arguments.step
@arguments.form("quiet")
def unpin(path: str, step: int | str, form: str | None) -> None:
    """Unpin the checkpoint of a STEP, so that policies may remove it.

    Example: keras-ckpt unpin runs/digits 120
    """
    runs, record = _record(path, step)
    runs.unpin(record)
    _say(form, f"Unpinned step {record.step}." if record.pinned else f"Step {record.step} has no pin.")


@main.command()
@arguments.paths
@click.option("--pinned", is_flag=True, help="Remove pinned checkpoints too.")
@arguments.yes
@arguments.form("quiet")
def clear(paths: Sequence[str], pinned: bool, yes: bool, form: str | None) -> None:
    """Remove all checkpoints of each PATH.

    Example: keras-ckpt clear runs/digits
    """
    directories = _whole(*paths)
    if not pinned:
        _refuse_pinned(directories, paths)
    if not yes:
        count = counted(sum(map(len, directories)), "checkpoint")
        click.confirm(f"Remove {count} in {', '.join(paths)}?", abort=True)
    removed = sum(len(runs.clear(pinned=pinned)) for runs in directories)
    _say(form, f"Removed {counted(removed, 'checkpoint')}.")


@main.command()
@click.argument("path", type=click.Path(), default="runs/demo")
def demo(path: str) -> None:
    """Train a small network on handwritten digits, save into the directory PATH, and show the package's features.

    Default of PATH: runs/demo.

    Example: keras-ckpt demo runs/demo
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with _without_log():
            from keras_ckpt.cli import demo as demonstration
    except ImportError as error:
        raise click.ClickException(
            f"The demo needs a package that is not installed ({error}). Install it: pip install 'keras-ckpt[demo]'."
        ) from error
    demonstration.run(path)


@contextlib.contextmanager
def _without_log() -> Iterator[None]:
    """Hides the lines that TensorFlow logs from C++ before it reads `TF_CPP_MIN_LOG_LEVEL`."""
    import tempfile

    with tempfile.TemporaryFile() as log:
        stderr = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextlib.contextmanager
def _arguments() -> Iterator[None]:
    """Shows a `ValueError` of arguments as wrong usage. A `ValueError` elsewhere is a bug, and shows its traceback."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _whole(*paths: str) -> list[CheckpointDirectory]:
    """The directories, each of which means all checkpoints of one series."""
    directories = _existing(*paths)
    for runs in directories:
        with _arguments():
            runs.refuse_one_file()
    return directories


def _each_run(runs: CheckpointDirectory) -> Iterable[CheckpointDirectory]:
    """The series of a directory, or each run below a directory that holds no checkpoints itself."""
    found = _or_runs_below(runs)
    return found if isinstance(found, Runs) else runs.each_series()


def _or_runs_below(runs: CheckpointDirectory) -> CheckpointDirectory | Runs:
    """The directory, or the runs below a directory that holds no checkpoints itself."""
    if runs.series.template or any(each.listing() for each in runs.each_series()):
        return runs
    below = Runs(runs.path)
    return below if len(below) else runs


def _existing(*paths: str) -> list[CheckpointDirectory]:
    """The directories, each of which means one series."""
    directories = _directories(*paths)
    for runs in directories:
        with _arguments():
            runs.open().close()
    return directories


def _directories(*paths: str) -> list[CheckpointDirectory]:
    """The directories, each of which exists."""
    with _arguments():
        directories = [CheckpointDirectory(path) for path in paths]
    for runs, path in zip(directories, paths, strict=True):
        try:
            Folder(runs.path).close()
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"There is no directory {path}.") from error
    return directories


def _record(path: str, step: int | str) -> tuple[CheckpointDirectory, CheckpointRecord]:
    """The directory and the checkpoint of a STEP."""
    if isinstance(step, str) and layout.is_keras_file(step):
        # A folder may hold several series, but only one has the name. A name with folders is of the series of its PATH.
        (runs,) = _existing(path if layout.is_keras_file(path) or "/" in step else os.path.join(path, step))
        return runs, runs.listing().named(step)
    (runs,) = _whole(path)
    if isinstance(step, int):
        return runs, runs[step]
    return runs, _found(runs.path, runs.latest() if step == "latest" else runs.best())


def _plain(error: OSError) -> str:
    """An error of the file system without its number."""
    reason = error.strerror or str(error)
    return f"{relative(error.filename)}: {reason}" if isinstance(error.filename, str) else reason


def _exported(path: str, step: int | str) -> tuple[CheckpointRecord | str, str]:
    """The checkpoint of a STEP, and its name. A file of Keras may have no record."""
    if isinstance(step, str) and layout.is_keras_file(step):
        file = os.path.join(layout.split(path)[0], step)
        return file, relative(file)
    record = _record(path, step)[1]
    return record, f"step {record.step}"


def _compared(path: str, step: int | str | None) -> CheckpointRecord | CheckpointDirectory | str:
    """The checkpoint of a STEP; without a STEP the directory, which means its newest checkpoint."""
    return _existing(path)[0] if step is None else _exported(path, step)[0]


def _found(path: str, record: CheckpointRecord | None) -> CheckpointRecord:
    if record is None:
        raise CheckpointNotFoundError(f"There is no checkpoint in {path}.")
    return record


def _refuse_pinned(directories: Sequence[CheckpointDirectory], paths: Sequence[str]) -> None:
    """Refuses to clear pinned checkpoints, before anything is asked or removed."""
    for runs, path in zip(directories, paths, strict=True):
        if names := [record.name for record in runs if record.pinned]:
            raise PlanError(
                f"{path} has pinned checkpoints: {few(names)}. Nothing was removed. To remove them too, type "
                f"keras-ckpt clear --pinned {shlex.join(paths)}"
            )


def _verified(runs: CheckpointDirectory, form: str | None) -> Verification:
    """Verifies a directory, with a progress bar in a terminal."""
    import rich.console
    import rich.progress

    terminal = rich.console.Console(stderr=True, quiet=form == "quiet")
    with rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.DownloadColumn(),
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    ) as bar:
        task = bar.add_task("verifying", total=None)
        return runs.verify(lambda done, total: bar.update(task, completed=done, total=total))


def _print_verifications(runs: CheckpointDirectory, verifications: Sequence[Verification]) -> None:
    """Prints the table of each series, and one line for all files without a record."""
    unknown: list[str] = []
    for found in verifications:
        if len(verifications) == 1 or found.listing.all_runs or found.listing.damaged:
            click.echo(text(found, color=True))
        else:
            unknown += found.listing.unmanaged
    if unknown:
        click.echo(f"{relative(runs.path)}: without a record, cannot be verified: {few(unknown)}")


def _report(form: str | None, shown: Shown, facts: Callable[[], Any]) -> None:
    """Prints a table or JSON."""
    if form == "json":
        _print_json(facts())
    elif form is None:
        click.echo(text(shown, color=True))


def _say(form: str | None, line: str) -> None:
    """Prints a line beside a table."""
    if form is None:
        click.echo(line)


def _show(record: CheckpointRecord, form: str | None) -> None:
    if form == "path":
        click.echo(os.fsencode(record.prefix))
    elif form == "all":
        for name, value in _facts(record).items():
            fact = value if isinstance(value, str) else msgspec.json.encode(value).decode()
            click.echo(f"{name:16}{printable(fact)}")
    else:
        _report(form, record, functools.partial(_facts, record))


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


def _past_facts(past: Past) -> dict[str, Any]:
    saves = [
        {
            "state": fate.state,
            "why": fate.why,
            "by": fate.by,
            "at": fate.at,
            "branch": fate.branch,
            **{name: getattr(fate.facts, name) for name in ("step", "epoch", "batch", "name", "run_id", "size")},
            "metrics": to_json(fate.facts.metrics),
        }
        for fate in past.fates()
    ]
    return {"saves": saves}


def _directory_facts(runs: CheckpointDirectory | Runs) -> dict[str, Any]:
    if isinstance(runs, Runs):
        return {"runs": runs.facts()}
    listings = [each.listing() for each in runs.each_series()]
    return {
        "checkpoints": [_facts(record) for listing in listings for record in listing.records],
        "earlier_runs": [_facts(record) for listing in listings for record in listing.other_runs],
        **_others(*listings),
    }


def _verification_facts(listings: Sequence[Listing]) -> dict[str, Any]:
    return {"whole": [record.step for listing in listings for record in listing.records], **_others(*listings)}


def _others(*listings: Listing) -> dict[str, Any]:
    """The damaged and the unmanaged checkpoints."""
    return {
        "damaged": {name: str(error) for listing in listings for name, error in listing.damaged.items()},
        "without_sidecar": sorted({name for listing in listings for name in listing.unmanaged}),
    }


def _plan_facts(plan: PrunePlan | RunsPlan) -> dict[str, Any]:
    if isinstance(plan, RunsPlan):
        return {"runs": [{"path": each.listing.path, **_plan_facts(each)} for each in plan.plans]}
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
