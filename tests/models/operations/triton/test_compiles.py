"""The kernels compiled for an H100, where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]


def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    """The interpreter runs what the compiler refuses: a name that changes its shape in a branch was the first."""
    pytest.importorskip("triton.backends.nvidia")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.models.operations.triton.compile_for_h100", "--branches"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    compiled = {tuple(line.split()[:2]) for line in ran.stdout.splitlines()}
    folder = ROOT / "streaming/models/operations/triton"
    files = {path.stem for path in folder.glob("*.py") if "@triton.jit" in path.read_text()}
    assert {name for name, _ in compiled} == files
    lines = [line.split() for line in ran.stdout.splitlines()]
    for name, _, _, copies, early, registers, outside, _ in lines:
        assert int(registers) < 255 or name == "windows", "a tile that hardly fits"
        # An angle of float64 beyond some size is reduced by way of a table on the stack; nothing else may be there.
        assert int(outside) == 0 or name == "begin_frame", "what does not fit into registers goes by way of memory"
        assert int(copies) > 0 or name not in ("attention",), "its loop is not pipelined"
        assert int(early) > 8 or name != "matvec", "it waits before it asks for its weights"
        assert int(early) == 0 or name != "attention", "it reads what may not be written yet"
