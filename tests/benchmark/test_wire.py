"""`wire`: both servers, as processes of their own, move the same frames. What they cost is no test's business."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from streaming.benchmark.__main__ import main
from streaming.protocol.opus import opus_available

pytest.importorskip("silero_vad")
pytest.importorskip("onnxruntime")


def test_both_servers_move_the_same_frames(tmp_path: Path) -> None:
    """A server that refused its sessions, or a turn that never came, made a cheap frame of a missing one."""
    path = tmp_path / "wire.json"
    assert main(["wire", "--sessions", "2", "--seconds", "0.5", "--rounds", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    names = ["native, PCM", *["native, Opus"] * opus_available(), "OpenAI", "hands-free"]
    assert [row["traffic"] for row in rows] == names
    for row in rows:
        assert row["frames"] == row["bare_frames"] == 2 * 2 * 3, row
        assert row["server_ms"] > 0 and row["bare_ms"] > 0


def test_one_kind_of_traffic(tmp_path: Path) -> None:
    path = tmp_path / "wire.json"
    flags = ("--only", "openai", "--sessions", "1", "2", "--seconds", "0.5", "--rounds", "1")
    assert main(["wire", *flags, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["traffic"], row["sessions"]) for row in rows] == [("OpenAI", 1), ("OpenAI", 2)]
