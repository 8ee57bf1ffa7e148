"""Where the layers are put together: the demo model, random weights, kinds of numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from streaming import loading
from streaming.audio import FRAME
from streaming.benchmark.likelihood import PROMPT, speech_frames
from streaming.config import LlamaConfig, Sampling, transformer_parameters
from streaming.errors import CheckpointError, StreamingError, TooLargeError
from streaming.frame_step import FrameStep
from streaming.memory import Memory
from streaming.models import random_weights
from streaming.models.checkpoint import read_config
from streaming.models.likelihood import encode
from streaming.models.operations.torch import TorchOperations
from streaming.models.random_weights import LLAMA_MIMI_1_3B


@pytest.mark.parametrize("codec_dtype", ["float32", "bfloat16"])
def test_the_demo_hears_and_speaks_in_either_kind_of_numbers(codec_dtype: str) -> None:
    """A codec in bfloat16 gives mostly the same codes, and its frames leave as float32 whatever it is."""
    models = loading.load_models("demo", device="cpu", codec_dtype=codec_dtype)
    assert models.codec.dtype == loading.DTYPES[codec_dtype]
    step = FrameStep(models.codec, models.decoder, 1, 40, 0)
    step.open(0, Sampling(seed=1))
    slot, yes, no = np.zeros(1, np.int64), np.ones(1, np.bool_), np.zeros(1, np.bool_)
    speech = speech_frames(PROMPT, 30)
    heard = np.concatenate([step(slot, frame[None], yes, no).codes for frame in speech])
    spoken = np.concatenate([step(slot, np.zeros((1, FRAME), np.float32), no, yes).pcm[0] for _ in range(10)])
    assert spoken.dtype == np.float32 and np.isfinite(spoken).all() and spoken.std() > 1e-3
    wanted = encode(loading.load_models("demo", device="cpu").codec, speech).numpy()
    same = (heard == wanted).mean()
    assert same == 1.0 if codec_dtype == "float32" else same > 0.6


def test_random_weights_go_by_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real sizes are gigabytes; what is asked for is what is made."""
    made = []
    monkeypatch.setattr(loading, "random_codec", lambda *_: "codec")
    monkeypatch.setattr(loading, "random_decoder", lambda config, *rest: made.append((config, *rest)) or "decoder")
    models = loading.load_models("random:1.3b", device="cpu", dtype="bfloat16", quantize="int8")
    assert (models.name, models.codec, models.decoder) == ("random:1.3b", "codec", "decoder")
    assert made == [(LLAMA_MIMI_1_3B, torch.device("cpu"), torch.bfloat16, "int8", None)]
    assert models.notice.notice is not None and "noise" in models.notice.notice
    with pytest.raises(StreamingError, match=r"random:70b: random weights come in the sizes 1\.3b, 8b, tiny"):
        loading.load_models("random:70b", device="cpu")
    assert random_weights.DECODERS.keys() == {"1.3b", "8b", "tiny"}


@pytest.mark.parametrize(
    ("generation", "config", "top_p"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 1}, {}, 0.9),
        ({"temperature": 0.6}, {"top_p": 0.5}, 1.0),
        ({"top_p": None}, {}, 1.0),
        (None, {"top_p": 0.5}, 0.5),
        (None, {}, 1.0),
    ],
    ids=["llama-3.2", "no-top-p", "null", "old", "none"],
)
def test_what_the_published_script_leaves_open_is_the_checkpoints(
    decoder_dir: Path,
    codec_dir: Path,
    tmp_path: Path,
    generation: dict[str, object] | None,
    config: dict[str, object],
    top_p: float,
) -> None:
    """The script names a temperature and a top-k; `generate` takes top-p from the files, 0.9 for what was made from
    Llama 3.2. Pins 1.0, which sounds wilder than the script. The file's own temperature is overruled.
    """
    folder = shutil.copytree(decoder_dir, tmp_path / "model")
    (folder / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    with loading.load_engine(folder, codec_dir, device="cpu", max_sessions=1, context_tokens=64) as engine:
        assert engine.sampling == Sampling(temperature=0.8, top_k=30, top_p=top_p)
    published = LlamaForCausalLM.from_pretrained(folder).generation_config
    assert (1.0 if published.top_p is None else published.top_p) == top_p


def test_what_the_sampler_does_not_have_is_told(
    decoder_dir: Path, codec_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(decoder_dir, tmp_path / "model")
    asked = {"min_p": 0.05, "repetition_penalty": 1.0, "no_repeat_ngram_size": 3, "eta_cutoff": 0.0, "num_beams": 1}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    loading.load_models(folder, codec_dir, device="cpu")
    assert "asks for min_p, no_repeat_ngram_size, which there is not here" in caplog.text


@pytest.mark.parametrize("top_p", ["0.9", True, -0.5, [0.9]], ids=str)
def test_a_top_p_that_is_none_is_told_with_its_file(
    decoder_dir: Path, codec_dir: Path, tmp_path: Path, top_p: object
) -> None:
    folder = shutil.copytree(decoder_dir, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"top_p": top_p}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p is"):
        loading.load_models(folder, codec_dir, device="cpu")


def test_what_is_asked_for_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags were read and not passed on: a server in int8 kept every weight whole, a codec went to bfloat16 with its
    decoder, an interruption cut no further than by default, graphs were recorded in mid-conversation.
    """
    models = loading.load_models("demo", device="cpu", dtype="bfloat16")
    assert (models.codec.dtype, models.decoder.dtype) == (torch.float32, torch.bfloat16)
    whole, eight = (loading.load_models("demo", device="cpu", quantize=kind) for kind in ("none", "int8"))
    error = (whole.decoder.prefix_keys - eight.decoder.prefix_keys).norm() / whole.decoder.prefix_keys.norm()
    assert 0 < error < 0.2, "rounded to 8 bits"
    warmed: list[FrameStep] = []
    monkeypatch.setattr(FrameStep, "warm_up", lambda step: warmed.append(step))
    with loading.load_engine(device="cpu", max_sessions=2, rewind_frames=3, context_tokens=500) as engine:
        assert (engine.stats().slots, engine.rewind_frames) == (2, 3)
        assert engine.context_frames == (500 - whole.decoder.prefix) // whole.decoder.num_codebooks
        assert warmed == [engine._step]


@pytest.mark.parametrize(
    ("error", "told", "memory"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "an illegal memory access", False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "mat1 and mat2", False),
        (torch.OutOfMemoryError("CUDA out of memory"), "fewer --max-sessions", True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "fewer --max-sessions", True),
    ],
)
def test_what_kept_a_step_from_being_ready_is_told(
    error: Exception, told: str, memory: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever went wrong in the first minute on a GPU was told as a want of memory."""

    def broken(step: FrameStep) -> None:
        raise error

    monkeypatch.setattr(FrameStep, "warm_up", broken)
    with pytest.raises(TooLargeError if memory else StreamingError, match=told) as caught:
        loading.load_engine(device="cpu", max_sessions=1)
    assert isinstance(caught.value, TooLargeError) == memory
    assert caught.value.__cause__ is error
    assert ("could not be made ready" in caplog.text) == (not memory)


def test_an_engine_says_which_operations_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton failed, plain operations ran silently, and were measured for it."""
    with loading.load_engine(device="cpu", max_sessions=1) as engine:
        assert engine.operations in ("native", "PyTorch")
    models = loading.load_models("demo", device="cpu", operations=TorchOperations())
    monkeypatch.setattr(models.codec, "operations", SimpleNamespace(name="Triton"))
    step = FrameStep(models.codec, models.decoder, 1, 4, 0)
    assert step.operations == "decoder PyTorch, codec Triton"


def test_the_demo_speaks_through_another_codec_if_it_is_given_one(tmp_path: Path) -> None:
    """`--codec` was taken for a flag of other models."""
    assert loading.folders("demo")[1].name == "codec"
    (tmp_path / "config.json").write_text("{}")
    assert loading.folders("demo", tmp_path)[1] == tmp_path


@pytest.mark.parametrize(("count", "cores", "variable", "threads"), [(0, 8, None, 7), (0, 1, None, 1), (3, 8, "5", 3)])
def test_a_core_is_left_to_those_who_move_the_bytes(
    monkeypatch: pytest.MonkeyPatch, count: int, cores: int, variable: str | None, threads: int
) -> None:
    """On all cores, the products waited for the one on which the event loop ran, and every step was late."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(loading.os, "cpu_count", lambda: cores)
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    loading.use_threads(count)
    assert told == [threads]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    loading.use_threads()
    assert told == [threads], "the variable says it"


def test_a_decoder_that_is_too_large_in_float32_is_kept_in_bfloat16_on_a_cpu(
    decoder_dir: Path, codec_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pins a process that the system kills without a word. Who names a type gets it."""
    needed = 4 * transformer_parameters(LlamaConfig.from_dict(read_config(decoder_dir)))
    for free, dtype, kept in (
        (needed, "auto", torch.bfloat16),
        (needed, "float32", torch.float32),
        (2 * needed, "auto", torch.float32),
    ):
        monkeypatch.setattr(loading, "available_memory", lambda free=free: Memory(total=10 * needed, free=free))
        caplog.clear()
        assert loading.load_models(decoder_dir, codec_dir, device="cpu", dtype=dtype).decoder.dtype == kept
        assert ("is kept in bfloat16: in float32 it needs" in caplog.text) == (kept == torch.bfloat16)


@pytest.mark.parametrize("kinds", [{"dtype": "float16"}, {"codec_dtype": "float16"}])
def test_a_kind_of_numbers_that_there_is_not_is_told(kinds: dict[str, str]) -> None:
    with pytest.raises(StreamingError, match="'float16' is not supported: use auto, float32, bfloat16"):
        loading.load_models("demo", device="cpu", **kinds)
