"""The README's own examples and tables, run and compared."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"example {n + 1}" for n in range(len(EXAMPLES))])
def test_the_readmes_python_runs_as_it_stands(example: str) -> None:
    """Documentation that nobody runs goes wrong."""
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", ["server.py", "client.py"])
def test_the_readmes_tables_name_every_flag(program: str) -> None:
    """A flag that no table names does not exist for its users."""
    done = subprocess.run(
        [sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    table = README.partition(f"\n`python {program}`\n\n")[2].partition("\n\n")[0]
    flags = set(re.findall(r"--[a-z][a-z-]*", done.stdout)) - {"--help"}
    assert flags
    assert flags == set(re.findall(r"--[a-z][a-z-]*", table))
