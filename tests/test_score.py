"""Likelihood scoring against `transformers`' own loss, and pairs whose answer is known."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, MimiModel

import streaming
from streaming.audio import FRAME, read_audio
from streaming.errors import AudioError
from streaming.models.token_layout import AUDIO, END_OF_AUDIO, unit_name
from streaming.scoring import Score, compare, main, score
from tests.reference import speech

ROOT = Path(__file__).parents[1]
_LENGTHS = (9, 30, 17)
"""Frames; the second and third also get a part of a frame more."""


@pytest.fixture
def recordings(tmp_path: Path) -> list[Path]:
    paths = []
    for number, frames in enumerate(_LENGTHS):
        wave = speech(frames + 1, seed=number)[: frames * FRAME + (0, FRAME // 2, 1301)[number]]
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], wave, 24_000, subtype="FLOAT")
    return paths


@torch.inference_mode()
def _published(path: Path, codec_dir: Path, decoder_dir: Path) -> tuple[float, float]:
    """What `eval/salmon.py` and `eval/sLM21.py` of the published code compare, but for the likelihood of `<audio>`."""
    model = LlamaForCausalLM.from_pretrained(decoder_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(decoder_dir)
    codec = MimiModel.from_pretrained(codec_dir).eval()
    wave = read_audio(path)
    books = model.config.num_quantizers
    codes = codec.encode(torch.from_numpy(wave)[None, None], num_quantizers=books).audio_codes[0].T
    units = "".join(unit_name(code, book) for frame in codes.tolist() for book, code in enumerate(frame))
    ids = tokenizer(AUDIO + units + END_OF_AUDIO, return_tensors="pt")["input_ids"]
    labels = ids.clone()
    labels[:, : ids.shape[1] - codes.numel() - 1] = -100
    loss = model(input_ids=ids, labels=labels).loss.item()
    semantic = torch.full_like(labels, -100)
    first = ids.shape[1] - codes.numel() - 1
    semantic[:, first::books] = ids[:, first::books]
    return loss, model(input_ids=ids, labels=semantic).loss.item()


@pytest.mark.parametrize("books", [4, 8])
def test_a_score_is_the_loss_that_transformers_gives(
    books: int, recordings: list[Path], codec_dir: Path, decoder_checkpoint: Callable[..., Path]
) -> None:
    """Clips of three lengths in one batch: pins padding that leaks into a shorter clip's codes, losses or end."""
    decoder_dir = decoder_checkpoint(num_codebooks=books)
    scores = score(recordings, decoder_dir, codec_dir, device="cpu")
    assert [entry.frames for entry in scores] == [9, 31, 18]
    for path, entry in zip(recordings, scores, strict=True):
        nats, semantic = _published(path, codec_dir, decoder_dir)
        assert entry.nats == pytest.approx(nats, abs=1e-4)
        assert entry.semantic == pytest.approx(semantic, abs=1e-4)


def test_bfloat16_is_near(recordings: list[Path], codec_dir: Path, decoder_dir: Path) -> None:
    """The output layer was in bfloat16 and its inputs in float32, which cannot be multiplied."""
    exact, low = (
        score(recordings, decoder_dir, codec_dir, device="cpu", dtype=kind) for kind in ("float32", "bfloat16")
    )
    assert [entry.nats for entry in low] == pytest.approx([entry.nats for entry in exact], abs=0.05)


def test_batches_and_the_order_of_the_clips_change_nothing(
    recordings: list[Path], codec_dir: Path, decoder_dir: Path
) -> None:
    together = score(recordings, decoder_dir, codec_dir, device="cpu")
    alone = score(reversed(recordings), decoder_dir, codec_dir, device="cpu", batch_size=1)
    for one, other in zip(together, reversed(alone), strict=True):
        assert one.path == other.path
        assert one.by_codebook == pytest.approx(other.by_codebook, abs=1e-4)
        assert one.ending == pytest.approx(other.ending, abs=1e-4)


def test_only_the_beginning_of_a_long_clip_counts(recordings: list[Path], codec_dir: Path, decoder_dir: Path) -> None:
    long = score(recordings[1:2], decoder_dir, codec_dir, device="cpu", max_seconds=9 * 0.08)
    assert [entry.frames for entry in long] == [9]


def test_a_tie_counts_half() -> None:
    """SALMon counts so: a model that gives everything the same score is at chance, not at nought."""

    def entry(first: float, second: float) -> Score:
        return Score("", 1, (first, second), 1.0)

    likely, unlikely, mixed = entry(1, 1), entry(2, 2), entry(3, 1)
    result = compare([likely, likely, unlikely, mixed], [unlikely, likely, likely, unlikely])
    assert (result.pairs, result.accuracy) == (4, 0.5)  # right, tie, wrong, tie: (1 + .5 + 0 + .5) / 4
    assert result.semantic_accuracy == 0.375  # the last one is wrong by codebook 0


def test_the_command_line_tells_accuracies_by_task(
    recordings: list[Path], codec_dir: Path, decoder_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The likelier of two clips is known from their scores. Paths are relative to the CSV, not to the caller."""
    models = ("--model", str(decoder_dir), "--codec", str(codec_dir), "--device", "cpu")
    report = tmp_path / "report.json"
    assert main([*map(str, recordings), *models, "--json", str(report)]) == 0
    nats = {clip["path"]: clip["nats"] for clip in json.loads(report.read_text())["clips"]}
    likely, _, unlikely = sorted((path.name for path in recordings), key=lambda name: nats[str(tmp_path / name)])
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(f"task,positive,negative\ngood,{likely},{unlikely}\nbad,{unlikely},{likely}\n")
    capsys.readouterr()
    assert main(["--pairs", str(pairs), *models, "--json", str(report)]) == 0
    assert capsys.readouterr().out.startswith("good: 1.000")
    assert {task: row["accuracy"] for task, row in json.loads(report.read_text())["tasks"].items()} == {
        "good": 1.0,
        "bad": 0.0,
    }


@pytest.mark.parametrize("text", ["positive\na.wav\n", "a,b\n1,2\n"])
def test_a_list_that_is_none_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(text)
    assert main(["--pairs", str(pairs)]) == 1
    assert "columns positive and negative" in capsys.readouterr().err


def test_an_empty_recording_is_an_error_of_its_own(tmp_path: Path, codec_dir: Path, decoder_dir: Path) -> None:
    path = tmp_path / "empty.wav"
    soundfile.write(path, np.zeros(0, np.float32), 24_000)
    with pytest.raises(AudioError, match="holds no audio"):
        score([path], decoder_dir, codec_dir, device="cpu")


def test_the_package_has_the_function_by_name() -> None:
    """Pins `streaming.score` becoming the module of that name when something has imported it."""
    with pytest.raises(ImportError, match=r"streaming\.scoring"):
        importlib.import_module("streaming.score")
    assert streaming.score is score


def test_the_command_has_the_same_name() -> None:
    """Pins a module that cannot be run because it may not be imported."""
    ran = subprocess.run([sys.executable, "-m", "streaming.score"], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 2
    assert "give recordings, or --pairs CSV" in ran.stderr
