"""The whole recipe in small: every stage from the command line, one after the other, and again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.demo import clips, features, free_speech, joint, quantiser
from recipes.demo.latents import Latents
from recipes.demo.recipe import Run
from recipes.demo.train import main
from streaming.audio import FRAME
from tests.reference import speech


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of two voices of noise, no need for the libraries that made the real one, and little to fit to and to
    judge by: what a stage reads and writes is the same.
    """
    for number, voice in enumerate(("one", "two")):
        for split, blocks in (("train", (1, 2)), ("test", (49,))):
            folder = tmp_path / "corpus" / voice / split
            folder.mkdir(parents=True)
            for block in blocks:
                soundfile.write(folder / f"{block:05d}.flac", speech(40, seed=10 * number + block), 24_000)

    def prosody(pcm: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.resize(np.float32([1, 1, -1, -1, 0.5, 0.2, 0, 0]), (len(pcm) // FRAME, features.PROSODY))

    def few_to_judge_by(run: Run, frames: int, steps: int, _: int) -> tuple[clips.Crops, tuple[Tensor, Tensor]]:
        return material(run, frames, steps, 2)

    def fit_to_few(crops: clips.Crops, _: int) -> Latents:
        return fit(crops, 2)

    material, fit = clips.material, Latents.fit
    monkeypatch.setattr(clips, "material", few_to_judge_by)
    monkeypatch.setattr(Latents, "fit", fit_to_few)
    monkeypatch.setattr(features, "prosody", prosody)
    monkeypatch.setattr(quantiser, "_FRAMES", 1200)
    monkeypatch.setattr(quantiser, "_ROUNDS", 1)
    return tmp_path


def test_all_stages_run_resume_and_end_in_a_checkpoint_that_speaks(root: Path) -> None:
    """Pins a stage that cannot read what the one before it wrote, and one that begins anew instead of going on."""

    def run(stage: str, *flags: str) -> None:
        threads = str(torch.get_num_threads())
        main(
            ["--stage", stage, "--root", str(root), "--minutes", "0.001", "--threads", threads, "--batch", "1", *flags]
        )

    def steps(stage: str) -> int:
        return int(json.loads((root / "stages" / f"{stage}.jsonl").read_text().splitlines()[-1])["steps"])

    run("cache")
    run("latents")
    run("quantiser", "--oracle")
    run("codes", "--oracle")
    run("decoder", "--oracle")
    for stage, *flags in (("encoder",), ("decoder", "--judged"), ("language", "--frames", "16")):
        run(stage, *flags)
        before = steps(stage)
        run(stage, *flags)
        assert steps(stage) > before > 0
    run("quantiser")
    run("codes")
    run("export")
    assembled = joint.trained(root / "stages").state_dict()
    for flags in ((), ("--judged",)):
        before = steps("joint") if flags else 0
        run("joint", *flags)
        assert steps("joint") > before
    refined = joint.trained(root / "stages").state_dict()
    moved = {name.partition(".")[0] for name in assembled if not torch.equal(assembled[name], refined[name])}
    assert {"encoder", "decoder"} <= moved
    assert all(torch.equal(assembled[name], refined[name]) for name in assembled if "codebook" in name)
    run("codes")
    run("export")
    codec = free_speech.load_codec(root / "export" / "codec")
    decoder = free_speech.load_decoder(root / "export" / "decoder", codec)
    heard, _ = free_speech.speak(codec, decoder, [speech(2)], frames=2, seed=1)
    assert heard.shape == (1, 4 * FRAME) and np.isfinite(heard).all()
