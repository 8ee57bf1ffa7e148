"""docs/architecture.md against the tree: every file and every name that the page gives is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILE = re.compile(r"`([\w./-]+(?:/|\.(?:py|js|h|md)))`")


def found(path: str) -> Path | None:
    """Return where a file or folder of the page is: within `streaming/`, or else at the repository's root."""
    return next((place for place in (ROOT / "streaming" / path, ROOT / path) if place.exists()), None)


def rows() -> list[tuple[str, str]]:
    """Return the file and each name of every row that has both."""
    given = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and len(cells) >= 3 and (file := FILE.fullmatch(cells[-2])):
            given += [(file[1], name) for name in re.findall(r"`([^`]+)`", cells[-1])]
    return given


def names_of(path: Path) -> set[str]:
    """Return the functions and classes of a module, and `Class.method` of what its classes define."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


@pytest.mark.parametrize("path", sorted(set(FILE.findall(PAGE))))
def test_a_file_of_the_page_is_there(path: str) -> None:
    """Pins a page that leads to where a file once was."""
    assert found(path) is not None


@pytest.mark.parametrize(("path", "name"), rows())
def test_a_name_of_the_page_is_in_its_file(path: str, name: str) -> None:
    """Pins a function that was renamed or moved, and is looked for in vain."""
    place = found(path)
    assert place is not None
    if place.suffix == ".py":
        assert name in names_of(place)
    else:
        assert re.search(rf"\b(?:class|function) {re.escape(name)}\b", place.read_text(encoding="utf-8"))


def test_the_page_says_where_enough_is() -> None:
    """Pins a check that is green because it finds no rows."""
    assert len(rows()) > 60
    assert PAGE.count("\n| ") > 120
