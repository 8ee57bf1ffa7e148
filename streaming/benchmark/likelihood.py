"""Negative log-likelihood of frames under a decoder, with the engine's own cache: what the likelihood measurements
share.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming.audio import FRAME, read_audio
from streaming.loading import DEMO, DTYPES
from streaming.models.attention import FrameView
from streaming.models.llama import DecoderState, LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.options import count

PROMPT = Path(__file__).resolve().parents[2] / "examples" / "prompt.wav"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=DEMO, metavar="demo|HUB_ID|DIR")
    parser.add_argument("--codec", metavar="HUB_ID|DIR")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--input", type=Path, default=PROMPT, metavar="WAV", help="speech; repeated if too short")
    parser.add_argument("--samples", type=count, default=64, metavar="N", help="how many places to measure at")


def speech_frames(path: Path, count: int) -> NDArray[np.float32]:
    """The first `count` frames of a recording, repeated as often as it takes: [count, 1920]."""
    speech = read_audio(path)
    speech = np.tile(speech, -(-count * FRAME // len(speech)))
    return speech[: count * FRAME].reshape(count, FRAME)


def encode(codec: StreamingMimi, frames: NDArray[np.float32]) -> Tensor:
    """frames: [F, 1920] of one stream. Returns codes [F, Q]."""
    return encode_streams(codec, frames[None])[0]


@torch.inference_mode()
def encode_streams(codec: StreamingMimi, frames: NDArray[np.float32]) -> Tensor:
    """frames: [B, F, 1920], a stream a row. Returns codes [B, F, Q]."""
    state = codec.init_state(len(frames))
    active = torch.ones(len(frames), dtype=torch.bool, device=codec.device)
    pcm = torch.from_numpy(frames).to(codec.device)
    return torch.stack([codec.encode(frame, state, active) for frame in pcm.unbind(1)], dim=1)


@torch.inference_mode()
def encode_recordings(codec: StreamingMimi, waves: Sequence[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """waves: of any lengths from 1 sample on. Returns codes [B, F, Q], F the most frames of any, and how many frames
    of each row count, [B].
    """
    samples = torch.tensor([len(wave) for wave in waves])
    frames = -(-samples // FRAME)
    pcm = np.zeros((len(waves), int(frames.max()) * FRAME), np.float32)
    for row, wave in zip(pcm, waves, strict=True):
        row[: len(wave)] = wave
    state = codec.init_state(len(waves))
    active = torch.ones(len(waves), dtype=torch.bool, device=codec.device)
    starts = torch.arange(int(frames.max())) * FRAME
    lengths = (samples - starts[:, None]).clamp(1, FRAME).to(codec.device)  # past a row's end nothing is looked at
    given = torch.from_numpy(pcm).to(codec.device).view(len(waves), -1, FRAME).unbind(1)
    codes = [codec.encode(frame, state, active, length) for frame, length in zip(given, lengths, strict=True)]
    return torch.stack(codes, dim=1), frames


def advance(decoder: LlamaDecoder, state: DecoderState, view: FrameView, codes: Tensor) -> Tensor:
    """Feeds one frame to B slots. codes: [B, Q]. Returns the last layer's output where each of them is expected, [B, Q,
    hidden].
    """
    batch = codes.shape[0]
    units = torch.cat((decoder.last_units(state, batch)[:, None], decoder.units(codes)[:, :-1]), dim=1)
    hidden = decoder.forward(units, state, view)
    decoder.end_frame(codes, state, torch.ones(batch, dtype=torch.bool, device=codes.device))
    return hidden


def feed(decoder: LlamaDecoder, state: DecoderState, view: FrameView, codes: Tensor) -> Tensor:
    """Feeds one frame to B slots. codes: [B, Q]. Returns its negative log-likelihood a token, in nats: [B, Q].

    Among what a slot may emit, as the sampler sees it; `streaming.scoring` has it over the whole vocabulary.
    """
    hidden = advance(decoder, state, view, codes)
    losses = [
        torch.nn.functional.cross_entropy(
            decoder.logits(hidden[:, book], book).float(), codes[:, book], reduction="none"
        )
        for book in range(decoder.num_codebooks)
    ]
    return torch.stack(losses, dim=1)


def compare(losses: Tensor, reference: Tensor) -> tuple[float, float, float]:
    """losses, reference: [N]. Returns the mean, the mean difference to the reference, and the difference's standard
    error.
    """
    difference = losses - reference
    error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else 0.0
    return float(losses.mean()), float(difference.mean()), error
