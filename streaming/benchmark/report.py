"""A measurement's result: a few facts about the run, and rows of named figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """facts: what was measured, on what. rows: one dictionary a line, all with the same keys."""

    title: str
    facts: dict[str, str | int | float]
    rows: list[dict[str, str | int | float]]

    def table(self) -> str:
        """The report as text."""
        cells = [[_text(value) for value in row.values()] for row in self.rows]
        head = list(self.rows[0])
        widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
        lines = [self.title, ", ".join(f"{key} {_text(value)}" for key, value in self.facts.items()), ""]
        rows = (head, ["-" * width for width in widths], *cells)
        lines += ["  ".join(c.ljust(width) for c, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)


def _text(value: str | int | float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
