"""Reports as text."""

from __future__ import annotations

from streaming.benchmark.report import Report, Value

ROWS: list[dict[str, Value]] = [
    {"name": "a", "n": 1, "ms": 12.0, "share": 0.12345},
    {"name": "long", "n": 200, "ms": None, "share": 0.5},
]


def test_rows_are_lines_and_a_column_has_as_many_decimals_as_its_values() -> None:
    table = Report("title", {"model": "m", "seconds": 4.0}, ROWS, notes=["look out"]).table()
    assert table.splitlines() == [
        "title",
        "model m, seconds 4",
        "",
        "name    n  ms   share",
        "----  ---  --  ------",
        "a       1  12  0.1235",
        "long  200   -  0.5000",
        "note: look out",
    ]


def test_levels_of_load_stand_side_by_side() -> None:
    """Twenty figures do not fit a line."""
    table = Report("title", {}, ROWS, kind="levels").table()
    assert table.splitlines()[2:] == [
        "name        a    long",
        "n           1     200",
        "ms         12       -",
        "share  0.1235  0.5000",
    ]
