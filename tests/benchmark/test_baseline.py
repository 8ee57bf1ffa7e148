"""The same weights with others and here, on tiny checkpoints: it runs with the `transformers` that is installed."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from streaming.benchmark import baseline


@pytest.mark.filterwarnings("ignore")  # what `transformers` says of its own arguments
def test_both_sides_do_both_halves_of_the_codec_and_the_decoder(codec_dir: Path, decoder_dir: Path) -> None:
    """Pins caches that `transformers` renamed, and codebooks of 2,048 taken for granted: it ended with a traceback."""
    parser = argparse.ArgumentParser()
    baseline.add_arguments(parser)
    flags = ["--model", str(decoder_dir), "--codec", str(codec_dir), "--device", "cpu", "--dtype", "float32"]
    report = baseline.measure(parser.parse_args([*flags, "--tokens", "8", "--seconds", "0.01"]))
    rows = {(row["task"], row["with"]) for row in report.rows}
    sides = ("streaming", "transformers")
    tasks = ("codec, in", "codec, out", "decoder", "file, in and out")
    assert rows >= {(task, side) for task in tasks for side in sides}
    assert all(float(row["ms"]) > 0 for row in report.rows)
    for model in ("codec", "decoder"):
        assert report.facts[f"{model}'s operations"] in ("native", "PyTorch")
