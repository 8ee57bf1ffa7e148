"""The page's modules in node: what needs no browser is tested without one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="node is not installed; on Debian: apt-get install nodejs")
@pytest.mark.parametrize("file", sorted(file.name for file in HERE.glob("*.test.mjs")))
def test_the_modules_pass_their_tests_in_node(file: str) -> None:
    """Each file says what it pins."""
    done = subprocess.run(["node", "--test", file], cwd=HERE, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
