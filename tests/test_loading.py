"""Where the layers are put together: the demo model, random weights, kinds of numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streaming import loading
from streaming.audio import FRAME
from streaming.benchmark.likelihood import PROMPT, speech_frames
from streaming.config import Sampling
from streaming.errors import StreamingError
from streaming.frame_step import FrameStep
from streaming.models import random_weights
from streaming.models.likelihood import encode
from streaming.models.random_weights import LLAMA_MIMI_1_3B


@pytest.mark.parametrize("codec_dtype", ["float32", "bfloat16"])
def test_the_demo_hears_and_speaks_in_either_kind_of_numbers(codec_dtype: str) -> None:
    """A codec in bfloat16 gives mostly the same codes, and its frames leave as float32 whatever it is."""
    models = loading.load_models("demo", device="cpu", codec_dtype=codec_dtype)
    assert models.codec.dtype == loading.DTYPES[codec_dtype]
    step = FrameStep(models.codec, models.decoder, 1, 40, 0)
    step.open(0, Sampling(seed=1))
    yes, no = np.ones(1, np.bool_), np.zeros(1, np.bool_)
    speech = speech_frames(PROMPT, 30)
    heard = np.concatenate([step(frame[None], yes, no).codes for frame in speech])
    spoken = np.concatenate([step(np.zeros((1, FRAME), np.float32), no, yes).pcm[0] for _ in range(10)])
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
    assert models.notice and "noise" in models.notice
    with pytest.raises(StreamingError, match=r"random:70b: random weights come in the sizes 1\.3b, 8b"):
        loading.load_models("random:70b", device="cpu")
    assert random_weights.DECODERS.keys() == {"1.3b", "8b"}


@pytest.mark.parametrize("kinds", [{"dtype": "float16"}, {"codec_dtype": "float16"}])
def test_a_kind_of_numbers_that_there_is_not_is_told(kinds: dict[str, str]) -> None:
    with pytest.raises(StreamingError, match="'float16' is not supported: use auto, float32, bfloat16"):
        loading.load_models("demo", device="cpu", **kinds)
