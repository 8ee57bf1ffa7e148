"""A measurement's result: a few facts about the run, rows of named figures, and what has to be said about them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Value = str | int | float | None
_DECIMALS = 4


@dataclass(frozen=True)
class Report:
    """facts: what was measured, on what. rows: one dictionary a line, all with the same keys; None: not known.

    notes: what a reader of the rows must know. series: the single values that rows sum up, by name, for plots.
    kind: what the rows are, for plots: levels of load, stretches of time one after another, or simulated fleets.
    """

    title: str
    facts: Mapping[str, Value]
    rows: Sequence[Mapping[str, Value]]
    notes: list[str] = field(default_factory=list)
    series: dict[str, list[float]] = field(default_factory=dict)
    kind: Literal["figures", "levels", "windows", "fleet"] = "figures"

    def table(self) -> str:
        """Return the report as text. Levels have more figures than fit a line: they stand side by side."""
        facts = ", ".join(f"{key} {_text(value, None)}" for key, value in self.facts.items())
        lines = [self.title, *textwrap.wrap(facts, 120), ""]
        keys = list(self.rows[0]) if self.rows else []
        columns = {key: _column([row[key] for row in self.rows]) for key in keys}
        if self.kind == "levels":
            cells = [[key, *columns[key]] for key in keys]
            left = [True] + [False] * len(self.rows)
        else:
            numbers = {key: any(isinstance(row[key], int | float) for row in self.rows) for key in keys}
            rules = ["-" * max(map(len, (key, *columns[key]))) for key in keys]
            cells = [keys, rules, *(list(row) for row in zip(*columns.values(), strict=True))]
            left = [not numbers[key] for key in keys]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            aligned = zip(row, widths, left, strict=True)
            lines.append("  ".join(c.ljust(w) if to_left else c.rjust(w) for c, w, to_left in aligned).rstrip())
        return "\n".join((*lines, *(f"note: {note}" for note in self.notes)))


def _column(values: list[Value]) -> list[str]:
    """Return a column's text: as many decimals as the values have, at most four, the same for all."""
    needed = [len(f"{v:.{_DECIMALS}f}".rstrip("0").partition(".")[2]) for v in values if isinstance(v, float)]
    return [_text(value, max(needed, default=0)) for value in values]


def _text(value: Value, decimals: int | None) -> str:
    """decimals: None for as few as possible."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}" if decimals is None else f"{value:.{decimals}f}"
    return str(value)
