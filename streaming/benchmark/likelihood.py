"""What the likelihood measurements share: their flags, their speech, and how two runs are compared."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming.audio import FRAME, read_audio
from streaming.loading import DEMO, DTYPES
from streaming.models.likelihood import feed
from streaming.models.llama import LlamaDecoder
from streaming.options import count

PROMPT = Path(__file__).resolve().parents[2] / "examples" / "prompt.wav"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=DEMO, metavar="demo|HUB_ID|DIR", help="The Llama-Mimi checkpoint (default: demo)."
    )
    parser.add_argument(
        "--codec", metavar="HUB_ID|DIR", help="The Mimi checkpoint (default: kyutai/mimi, or the demo's)."
    )
    parser.add_argument("--device", default="auto", help="Where it runs: auto, cpu or cuda[:N] (default: auto).")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="The type that the decoder computes in."
    )
    parser.add_argument(
        "--input", type=Path, default=PROMPT, metavar="WAV", help="The speech, which is repeated if it is too short."
    )
    parser.add_argument("--samples", type=count, default=64, metavar="N", help="At how many places it is measured.")


def speech_frames(path: Path, count: int) -> NDArray[np.float32]:
    """Return the first `count` frames of a recording, repeated as often as it takes: [count, 1920]."""
    speech = read_audio(path)
    speech = np.tile(speech, -(-count * FRAME // len(speech)))
    return speech[: count * FRAME].reshape(count, FRAME)


@torch.inference_mode()
def losses(decoder: LlamaDecoder, codes: Tensor) -> Tensor:
    """Return the negative log-likelihood of each code of a stream, from its beginning on, in nats: [F, Q].

    codes: [F, Q].
    """
    state = decoder.init_state(1, len(codes))
    columns = decoder.columns_for(state, len(codes))
    return torch.cat(
        [
            feed(decoder, state, decoder.begin_frame(state, state.every_slot, len(codes), columns), frame[None])
            for frame in codes.to(decoder.device)
        ]
    )


def compare(losses: Tensor, reference: Tensor) -> tuple[float, float, float]:
    """losses, reference: [N]. Returns the mean, the mean difference to the reference, and the difference's standard
    error.
    """
    difference = losses - reference
    error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else 0.0
    return float(losses.mean()), float(difference.mean()), error
