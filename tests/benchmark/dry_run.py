"""`python -m tests.benchmark.dry_run`: every measurement of `benchmark device` that needs nothing of the wire, in tiny
sizes, one after another in this process. A line is printed for each.
"""

from __future__ import annotations

from streaming.benchmark.__main__ import parse
from streaming.benchmark.device import plan

_SECONDS = 2.0
"""Each item is told that so much time is left for it."""

if __name__ == "__main__":
    for item in plan("tiny"):
        if not item.needs:
            options = parse(list(item.arguments(_SECONDS)[1:]))
            report = options.measure(options)
            print(item.name, len(report.rows), report.rows[0], sep=": ", flush=True)
