"""Errors are one tree: whoever catches its root misses none of ours."""

from __future__ import annotations

import ast
from pathlib import Path

from streaming.errors import StreamingError

PACKAGE = Path(__file__).parents[1] / "streaming"


def test_every_error_of_the_package_is_of_one_tree() -> None:
    """The errors of two modules were bare exceptions, which no caller that tells our errors would have told."""
    bases = {
        node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    assert len(bases) > 40
    tree = {StreamingError.__name__}
    while grown := {name for name, above in bases.items() if tree & set(above)} - tree:
        tree |= grown
    assert set(bases) - tree == {"Error"}, "but the messages that tell of one"
