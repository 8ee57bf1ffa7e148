"""The likelihood benchmarks, run as a person runs them, where the right answer is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile

from streaming.benchmark.__main__ import main
from tests.reference import speech


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, speech(120, seed=4), 24_000)
    return path


def _rows(command: str, tmp_path: Path, *flags: str) -> dict[str, dict[str, Any]]:
    path = tmp_path / "report.json"
    assert main([command, "--device", "cpu", "--json", str(path), *flags]) == 0
    rows = json.loads(path.read_text())["rows"]
    return {str(next(iter(row.values()))): row for row in rows}


def test_in_a_single_layer_a_slide_costs_nothing_but_leaving_the_prefix_does(
    codec_dir: Path,
    decoder_checkpoint: Callable[..., Path],
    recording: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There, keys and values depend on their token alone: sliding with the prefix moved along is a full re-prefill."""
    decoder = decoder_checkpoint(num_hidden_layers=1)
    flags = ("--model", str(decoder), "--codec", str(codec_dir), "--input", str(recording))
    _rows("slide", tmp_path, *flags, "--context-tokens", "42", "--samples", "2", "--dtype", "bfloat16")
    rows = _rows("slide", tmp_path, *flags, "--context-tokens", "42", "--samples", "6")
    assert rows["re-prefill, every frame"]["difference"] == 0
    assert abs(rows["slide by a frame, prefix moved along (engine)"]["difference"]) < 1e-4
    assert abs(rows["slide by a frame, prefix left behind"]["difference"]) > 1e-4
    assert abs(rows["slide by a frame, no prefix"]["difference"]) > 1e-4
    quarter = ("slide by a quarter, prefix moved along", "slide by a quarter, re-prefill")
    assert rows[quarter[0]]["nats/token"] == pytest.approx(rows[quarter[1]]["nats/token"], abs=1e-4)
    assert "prefix moved along (engine)" in capsys.readouterr().out


def test_the_turns_benchmark_compares_three_encoders_over_the_same_continuation(
    codec_dir: Path, decoder_dir: Path, recording: Path, tmp_path: Path
) -> None:
    flags = ("--model", str(decoder_dir), "--codec", str(codec_dir), "--input", str(recording), "--samples", "2")
    rows = _rows("turns", tmp_path, *flags, "--heard", "original")
    assert rows["hears the continuation (engine)"]["equal codes"] == 1
    assert 0 < rows["starts anew"]["equal codes"] < 1
    assert rows["starts anew"]["second prompt, nats/token"] > 0


def test_a_checkpoint_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slide", "--model", "/nowhere"]) == 1
    assert "--model demo" in capsys.readouterr().err
