"""The words of the pages and of the public docstrings keep the rules of docs/development.md."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest
from markdown_it import MarkdownIt

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")})
RULES = (ROOT / "docs" / "development.md").read_text().partition("\n## Words\n")[2]
AVOIDED = re.findall("`([^`]+)`", "".join(re.findall(r"^\| .* \| (.*) \|$", RULES, re.MULTILINE)))
MARKDOWN = MarkdownIt("commonmark").enable("table")


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """The line and the words of each sentence. A heading, a cell of a table and an item end theirs; code is a word."""
    line = 0
    for token in MARKDOWN.parse(text):
        line = token.map[0] + 1 if token.map else line
        if token.type == "inline":
            parts = {"code_inline": "`code`", "softbreak": " ", "hardbreak": " "}
            words = "".join(parts.get(child.type, child.content) for child in token.children if child.type != "image")
            yield from ((line, sentence) for sentence in re.split(r"(?<=[.?!])[\")]*\s+(?=\W*[A-Z`])", words))


def faults(text: str) -> list[str]:
    """The sentences that break a rule, each with its line and the rule."""
    found = []
    for line, sentence in sentences(text):
        if (count := len(re.findall(r"[\w`][^\s]*", sentence))) > 30:
            found.append(f"{line}: {count} words: {sentence}")
        if re.match(r"\W*(Of|Whoever|What)\b", sentence) and not sentence.endswith("?"):
            found.append(f"{line}: begins with {sentence.split()[0]}: {sentence}")
        if words := re.findall(rf"\b(?:{'|'.join(AVOIDED)})\b", sentence, re.IGNORECASE):
            found.append(f"{line}: {', '.join(words)}: {sentence}")
    return found


def docstrings() -> Iterator[tuple[pathlib.Path, int, str]]:
    """The file, the line and the text of each docstring of a class or function without an underscore, as Markdown.

    An argument begins a paragraph, and its name is no part of its sentence.
    """
    for path in ROOT.glob("keras_ckpt/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_" and ast.get_docstring(node):
                start = r"^(\w+:$| {4}[\w*, ]+: )|^ +"
                text = re.sub(start, lambda found: "\n" * bool(found[1]), ast.get_docstring(node), flags=re.MULTILINE)
                yield path, node.body[0].lineno, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_keeps_the_rules_of_words(page) -> None:
    found = faults(page.read_text())

    assert not found, "\n".join(f"{page}:{fault}" for fault in found)


def test_the_docstrings_keep_the_rules_of_words() -> None:
    found = [(path, line, faults(text)) for path, line, text in docstrings()]

    texts = "\n".join(f"{path}:{line}+{fault}" for path, line, each in found for fault in each)
    assert not texts, texts


def test_the_rules_find_a_long_sentence_a_quaint_beginning_and_a_word_to_avoid() -> None:
    """Code, a link's address and the other cells of a table are not counted. A question may begin with What."""
    long = " word" * 22
    good = f"It runs `a b c`.{long}, [so it is](http://a/b?c) `d`. What is it?\n\n| Ok{long} | {long} |\n|---|---|\n"
    bad = f"What is, is.\n\nIt is{long}{long}.\n\n```text\nanew\n```\n\nIt is\nput back. Of all:"

    assert "anew" in AVOIDED
    assert faults(good) == []
    assert [fault.partition(":")[0] for fault in faults(bad)] == ["1", "3", "9", "9"]
