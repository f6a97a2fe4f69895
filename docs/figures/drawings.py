"""Draws the figures of docs/how-it-works.md: `python docs/figures/drawings.py`.

A drawing is 390 pixels wide, as a phone is. All text stands on the background of a box, so that it can be read on a
light and on a dark page.
"""

from __future__ import annotations

import html
import pathlib
from typing import NamedTuple

IMAGES = pathlib.Path(__file__).parents[1] / "images"
WIDTH, LINE, PADDING, GAP = 390, 18, 9, 16
COLORS = {
    "training": ("#fdf0d5", "#b97a10"),
    "background": ("#e3edfb", "#4a7fc1"),
    "disk": ("#e0f2e5", "#3f9257"),
    "stop": ("#fbe4e4", "#c14a4a"),
    "plain": ("#eceff3", "#7f8c9b"),
}
"""By the kind of a box, its background and its border."""


class Box(NamedTuple):
    """A box: its kind, its title, and the lines below the title."""

    kind: str
    title: str
    lines: tuple[str, ...] = ()

    @property
    def height(self) -> int:
        return 2 * PADDING + LINE * (1 + len(self.lines))

    def drawn(self, x: int, y: int, width: int) -> str:
        background, border = COLORS[self.kind]
        texts = [
            f'<text x="{x + PADDING}" y="{y + PADDING + LINE * number + 13}"{weight}>{html.escape(text)}</text>'
            for number, (text, weight) in enumerate(
                [(self.title, ' font-weight="600"'), *((line, "") for line in self.lines)]
            )
        ]
        rectangle = (
            f'<rect x="{x}" y="{y}" width="{width}" height="{self.height}" rx="7" fill="{background}" '
            f'stroke="{border}" stroke-width="1.5"/>'
        )
        return "\n".join([rectangle, *texts])


class Row(NamedTuple):
    """A row of a drawing: a box, and a box beside it. An arrow leads from the row to the next."""

    box: Box
    beside: Box | None = None
    arrow: bool = True


def drawing(title: str, rows: list[Row], left: int = WIDTH - 4) -> str:
    """A drawing as SVG.

    Args:
        title: The title, for readers that do not see the drawing.
        rows: The rows, from the top to the bottom.
        left: The width of the boxes; the boxes beside them have the rest.
    """
    parts, y = [], 2
    for number, (box, beside, arrow) in enumerate(rows):
        height = max(box.height, beside.height if beside else 0)
        parts.append(box.drawn(2, y, left if beside else WIDTH - 4))
        if beside:
            parts.append(beside.drawn(left + 12, y, WIDTH - left - 14))
        if arrow and number + 1 < len(rows):
            x, begin, end = 2 + left // 2, y + box.height, y + height + GAP - 2
            parts.append(f'<path d="M{x} {begin}V{end - 5}" stroke="#7f8c9b" stroke-width="2"/>')
            parts.append(f'<path d="M{x - 5} {end - 6}h10l-5 6z" fill="#7f8c9b"/>')
        y += height + (GAP if arrow else 6)
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    font = 'font-family="system-ui, sans-serif" font-size="13.5" fill="#1c2430"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font} role="img">',
            f"<title>{html.escape(title)}</title>",
            *parts,
            "</svg>\n",
        ]
    )


DRAWINGS = {
    "rooms.svg": drawing(
        "The rooms of the package",
        [
            Row(Box("training", "resume/", ("a killed run ends like an unbroken one",))),
            Row(Box("training", "training/", ("one fit or loop that saves",))),
            Row(Box("training", "model/", ("the state of a Keras model: named, copied, restored",))),
            Row(Box("plain", "from here on without Keras and TensorFlow"), arrow=True),
            Row(Box("background", "formats/", ("the bytes of one checkpoint: NumPy",))),
            Row(
                Box("disk", "store/", ("a directory: listed, chosen,", "verified, committed, pruned")),
                Box("plain", "cli/", ("stands on", "store/")),
            ),
            Row(Box("plain", "errors.py", ("what can go wrong",))),
        ],
        left=270,
    ),
    "save.svg": drawing(
        "One save, and what a crash leaves after each step",
        [
            Row(
                Box("training", "An epoch ends", ("Is a save due? The metrics",)),
                Box("plain", "a crash leaves", ("the older ones",)),
            ),
            Row(Box("training", "Snapshot", ("one operation reads all variables, without a copy",))),
            Row(Box("background", "Copy into kept memory", ("finds unchanged values; training continues",))),
            Row(Box("background", "Ask the policy", ("not kept: the save ends here",))),
            Row(
                Box(
                    "disk",
                    "Write a stage, and sync",
                    ("link the unchanged files, write the others,", "write the sidecar last"),
                )
            ),
            Row(
                Box("disk", "Rename the data files", ("into their places,", "and sync")),
                Box("plain", "a crash leaves", ("the older ones;", "the next start", "ends this save")),
            ),
            Row(
                Box("disk", "Rename the sidecar", ("now the checkpoint counts,", "and sync")),
                Box("plain", "a crash leaves", ("the new one too",)),
            ),
            Row(Box("disk", "Prune", ("of each checkpoint the sidecar first, then its files",))),
        ],
        left=238,
    ),
    "restore.svg": drawing(
        "One restore",
        [
            Row(Box("disk", "Find the checkpoint", ("and hold its files open against a prune",))),
            Row(Box("disk", "Read the index", ("names, shapes, types, places",))),
            Row(
                Box("background", "Pair the names", ("with the model's variables,", "by name, shape and type")),
                Box("stop", "a misfit", ("is an error",)),
            ),
            Row(
                Box("background", "Read every byte", ("by several threads; compare", "digests and checksums")),
                Box("stop", "damage", ("is an error;", "or the older", "one is taken")),
            ),
            Row(Box("plain", "The model has not changed until here")),
            Row(Box("training", "Assign all values", ("weights, seeds, optimizer, learned state",))),
            Row(Box("training", "Report", ("what was restored, and what differs",))),
        ],
        left=270,
    ),
    "restart.svg": drawing(
        "One restart of a killed fit",
        [
            Row(Box("training", "fit begins", ("the same script, run again",))),
            Row(Box("disk", "Recover the directory of the backup", ("end or discard the save of the dead process",))),
            Row(Box("background", "Read the backup, compare digests", ("the files stay open",))),
            Row(
                Box(
                    "training",
                    "Restore",
                    ("model, callbacks, seeds, place in the data;", "fit begins with the right epoch"),
                )
            ),
            Row(Box("plain", "Keras begins the epoch", ("and resets metrics and callbacks",))),
            Row(Box("training", "Restore again", ("from the open files, without digests",))),
            Row(Box("training", "Skip the batches that are done", ("the next batch is the one that was next",))),
        ],
    ),
}
"""The text of each drawing, by the name of its file."""


if __name__ == "__main__":
    for name, text in DRAWINGS.items():
        (IMAGES / name).write_text(text)
