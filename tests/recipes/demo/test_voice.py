"""The model in the package: it is whole, it is what the published pipeline's code takes it for, and it speaks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaForCausalLM, MimiModel

import streaming
from recipes.demo import recipe
from streaming.audio import FRAME, read_audio
from streaming.benchmark.likelihood import PROMPT
from streaming.config import Sampling
from streaming.frame_step import FrameStep
from streaming.loading import folders, load_models
from streaming.models.likelihood import encode
from streaming.models.voice_activity import SpeechStream, load_vad_model, speech_probabilities

DECODER, CODEC = folders()


@pytest.fixture(scope="module")
def prompt() -> NDArray[np.float32]:
    """A real recording, in whole frames: [N]."""
    speech = read_audio(PROMPT)
    return speech[: len(speech) // FRAME * FRAME]


def test_it_is_small_enough_for_a_package() -> None:
    files = [file for folder in (DECODER, CODEC) for file in folder.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 30_000_000
    assert sorted({file.suffix for file in files}) == [".json", ".safetensors"]


def test_transformers_takes_it_for_a_released_model(prompt: NDArray[np.float32]) -> None:
    """The codes that it hears are those of `MimiModel`, and the likeliest next token is `LlamaForCausalLM`'s."""
    books = recipe.CODEC["num_quantizers"]
    codec = streaming.load_codec("demo", num_codebooks=books)
    ours = encode(codec, prompt.reshape(-1, FRAME))
    mimi = MimiModel.from_pretrained(CODEC, dtype=torch.float32)
    with torch.no_grad():
        theirs = mimi.encode(torch.from_numpy(prompt)[None, None], num_quantizers=books).audio_codes[0].T
    assert (ours == theirs).float().mean() > 0.99, "but for near-ties"

    tokenizer = AutoTokenizer.from_pretrained(DECODER)
    text = "<audio>" + "".join(f"<{code}_{book}>" for frame in theirs.tolist() for book, code in enumerate(frame))
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.shape[1] == 2 + theirs.numel()
    llama = LlamaForCausalLM.from_pretrained(DECODER, dtype=torch.float32)
    with torch.no_grad():
        wanted = int(llama(ids).logits[0, -1].argmax())
    models = load_models("demo", device="cpu")
    step = FrameStep(models.codec, models.decoder, 1, recipe.CONTEXT_FRAMES, 0)
    step.open(0, Sampling(temperature=0))
    slot, yes, no = np.zeros(1, np.int64), np.ones(1, np.bool_), np.zeros(1, np.bool_)
    for frame in prompt.reshape(-1, 1, FRAME):
        step(slot, frame, yes, no)
    result = step(slot, np.zeros((1, FRAME), np.float32), no, yes)
    said = "</audio>" if result.ended[0] else f"<{result.codes[0, 0]}_0>"
    assert tokenizer.convert_ids_to_tokens(wanted) == said


def test_it_speaks(prompt: NDArray[np.float32]) -> None:
    """What it said before it was trained was noise, which no voice activity detector takes for speech."""
    frames: list[NDArray[np.float32]] = []
    with streaming.load_engine("demo", device="cpu", max_sessions=1) as engine:
        for seed in itertools.count(1):  # it ends some turns soon
            with engine.open(temperature=0.8, seed=seed) as session:
                for frame in prompt.reshape(-1, FRAME):
                    session.listen(frame)
                frames += session.speak(max_frames=50)
            if len(frames) >= 60:
                break
            assert seed < 30, "it ends every turn at once"
    said = np.concatenate(frames)
    assert 0.01 < said.std() < 0.3
    stream = SpeechStream(load_vad_model())
    [probabilities] = speech_probabilities(load_vad_model(), [stream], [stream.push(said)])
    assert np.mean([probability > 0.5 for probability in probabilities]) > 0.5
