"""Draws docs/images/terminal.svg: what `keras-ckpt` prints of a run, in a terminal of 80 columns."""

import contextlib
import io
import os
import pathlib
import pty
import re
import subprocess
import sys
import tempfile

from rich.console import Console
from rich.text import Text
from run import EPOCHS, IMAGES, train

COMMANDS = (
    "keras-ckpt ls runs/noisy",
    "keras-ckpt prune runs/noisy --keep-best 2 --keep-latest 1 --dry-run",
)
WIDTH = 80
TITLE = "Terminal"
# rich names a font that a browser would load from the network.
FONTS = 'ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace'


def printed(command: str, folder: str) -> str:
    """The output of a command at a terminal, which has colors."""
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "keras_ckpt", *command.split()[1:]]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(WIDTH)}
    with subprocess.Popen(arguments, cwd=folder, env=environment, stdout=theirs) as process, open(ours, "rb") as output:
        os.close(theirs)
        lines = []
        with contextlib.suppress(OSError):  # Linux reports the end of a terminal as an error
            lines.extend(output)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return b"".join(lines).decode().replace("\r\n", "\n")


def screen(outputs: dict[str, str]) -> str:
    """The picture of a terminal in which each command was typed."""
    console = Console(width=WIDTH, record=True, file=io.StringIO(), force_terminal=True)
    for command, output in outputs.items():
        console.print(Text(f"$ {command}", "bold"))
        console.print(Text.from_ansi(output))
    svg = console.export_svg(title=TITLE, unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    return re.sub(r"font-family: (?:Fira Code, monospace|arial)", f"font-family: {FONTS}", svg)


def draw(images: pathlib.Path, epochs: int = EPOCHS) -> None:
    """Trains, and takes the picture of each command."""
    with tempfile.TemporaryDirectory() as folder:
        train(os.path.join(folder, "runs", "noisy"), epochs)
        svg = screen({command: printed(command, folder) for command in COMMANDS})
    (images / "terminal.svg").write_text(svg)


if __name__ == "__main__":
    draw(pathlib.Path(sys.argv[1]) if sys.argv[1:] else IMAGES)
