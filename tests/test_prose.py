"""The documents' form: lines that fit a screen, paths that lead somewhere, decisions that are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")))
}
WIDTH = 120
ENTRY_LINES = 12
"""Most lines of a decision, with its tables."""
PLACES = (ROOT, ROOT / "streaming", ROOT / "tests", ROOT / "docs", ROOT / "deploy" / "kubernetes")
"""What a page's paths may start from."""
FOLDERS = {path.name for place in PLACES for path in place.iterdir() if path.is_dir()}
PATH = re.compile(r"`([\w.-]+/(?:[\w.-]+/)*(?:[\w-]+\.(?:c|h|js|json|md|mjs|py|toml|wav|webp|yaml|yml))?)(?:::[^`]*)?`")


def missing(text: str) -> list[str]:
    """Return the paths in a text that there are not, of those that begin with a folder of this project's.

    A file whose name is in capitals stands for many.
    """
    named = [path for path in PATH.findall(text) if path.partition("/")[0] in FOLDERS and not Path(path).stem.isupper()]
    return [path for path in named if not any((place / path).exists() for place in PLACES)]


def entries(text: str) -> dict[str, int]:
    """Return how many lines each decision has, by what it begins with. It begins with words in bold type."""
    counts: dict[str, int] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("#"):
            title = ""
        elif found := re.match(r"\*\*(.+?)(?:\*\*|$)", line):
            title = found[1]
        if title and line.strip():
            counts[title] = counts.get(title, 0) + 1
    return counts


@pytest.mark.parametrize("page", PAGES)
def test_every_line_fits_a_screen(page: str) -> None:
    """Paragraphs in one line, and tables of whole paragraphs, cannot be read where they are edited."""
    assert [f"{number}: {line}" for number, line in enumerate(PAGES[page].splitlines(), 1) if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_path_is_there(page: str) -> None:
    """The pages led to folders that had been moved."""
    assert missing(PAGES[page]) == []


def test_a_path_that_is_not_there_is_found() -> None:
    """Pins a check that is green because it takes nothing for a path."""
    assert missing("`streaming/wire/` and `engine/nowhere.py` but `engine/session.py`, `docs/NAME.json`") == [
        "streaming/wire/",
        "engine/nowhere.py",
    ]


def test_a_decision_is_a_few_lines() -> None:
    """Entries of two screens were read by nobody."""
    found = entries(PAGES["docs/decisions.md"])
    assert len(found) > 50
    assert {title: lines for title, lines in found.items() if lines > ENTRY_LINES} == {}
