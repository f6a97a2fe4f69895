"""The tables of the README have the answers and the figures that the benchmarks noted."""

import json
import pathlib
import re
import statistics

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SPEED = {
    "a save blocks training": ("blocked", "this: ModelCheckpoint", "ModelCheckpoint, .weights.h5"),
    "until the save is on disk": ("durable", "this: ModelCheckpoint", "ModelCheckpoint, .weights.h5"),
    "a restore": ("restore", "this: restore", "load_weights"),
}
"""For each row, its figure in speed.json, and the rows of this package and of Keras."""


def table(section: str) -> list[list[str]]:
    """The cells of the table in a section."""
    text = re.search(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]
    return [re.split(r" *\| *", line.strip("| ")) for line in re.findall(r"^\|.*\|$", text, re.MULTILINE)]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_the_comparison_has_the_answer_of_each_trial() -> None:
    peers = json.loads((ROOT / "benchmarks" / "peers.json").read_text())
    _, _, *rows = table("Why not Keras's own callbacks?")

    assert rows == [[row, *answers.values()] for row, answers in peers["answers"].items()]
    assert all(version in README for version in (*peers["versions"].values(), peers["date"]))


def test_the_costs_are_medians_of_the_benchmark() -> None:
    figures = json.loads((ROOT / "benchmarks" / "speed.json").read_text())["figures"]
    (_, *sizes), _, *rows = table("Costs")

    def median(figure: str, size: str, row: str) -> str:
        value = statistics.median(figures[figure][f"{size}, 20 variables"][row])
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

    for name, *cells in rows:
        figure, ours, theirs = SPEED[name]
        assert cells == [f"{median(figure, size, ours)} / {median(figure, size, theirs)}" for size in sizes]
