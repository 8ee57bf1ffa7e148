"""Measure what it costs to let the context slide, in likelihood, against feeding the window anew for every frame.

The engine keeps the keys and values that a token got when it was new, although what it was computed from has since left
the window. Feeding the window anew is the only exact way, and hundreds of times the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from streaming.benchmark import likelihood
from streaming.benchmark.likelihood import compare, speech_frames
from streaming.benchmark.report import Report, Value
from streaming.loading import CONTEXT_TOKENS, frames_of_context, load_models
from streaming.models.attention import FrameView, rotate
from streaming.models.likelihood import encode, feed
from streaming.models.llama import DecoderState, LlamaDecoder
from streaming.models.operations.torch import TorchOperations
from streaming.options import count

_BATCH = 16
Alter = Callable[[LlamaDecoder, DecoderState, FrameView], FrameView]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    likelihood.add_arguments(parser)
    parser.add_argument(
        "--context-tokens", type=count, default=CONTEXT_TOKENS, metavar="N", help="The context, which slides."
    )


def measure(options: argparse.Namespace) -> Report:
    """`slide`: see the module. Raises as loading does."""
    # One of the policies takes a mask, which only the reference knows.
    models = load_models(options.model, options.codec, options.device, options.dtype, operations=TorchOperations())
    decoder = models.decoder
    window = frames_of_context(decoder, options.context_tokens)
    # Two windows to fill the first and turn it over once; from there on everything that is cached has slid.
    places = torch.linspace(2 * window, 5 * window, options.samples).round().long().unique()
    codes = encode(models.codec, speech_frames(options.input, int(places[-1]) + 1))

    block = max(1, window // 4)
    policies: dict[str, tuple[Tensor, float]] = {
        "re-prefill, every frame": (_prefilled(decoder, codes, places, lambda t: window - 1), window),
        "slide by a frame, prefix moved along (engine)": (_slid(decoder, codes, lambda t: window)[places], 1),
        "slide by a quarter, prefix moved along": (
            _slid(decoder, codes, lambda t: _blocks(t, window, block))[places],
            1,
        ),
        "slide by a quarter, re-prefill": (
            _prefilled(decoder, codes, places, lambda t: _blocks(t, window, block) - 1),
            1 + (window - block) / block,
        ),
        "slide by a frame, prefix left behind": (_slid(decoder, codes, lambda t: window, _leave_prefix)[places], 1),
        "slide by a frame, no prefix": (_slid(decoder, codes, lambda t: window, _hide_prefix)[places], 1),
    }
    reference = next(iter(policies.values()))[0]
    rows: list[dict[str, Value]] = []
    for name, (losses, cost) in policies.items():
        mean, difference, error = compare(losses, reference)
        rows.append(
            {
                "policy": name,
                "nats/token": mean,
                "difference": difference,
                "std. error": error,
                "frames fed": round(cost, 1),
            }
        )
    facts: dict[str, Value] = {
        "model": models.name,
        "window": f"{window} frames",
        "places": len(places),
        "speech": options.input.name,
    }
    return Report("likelihood cost of a sliding context", facts, rows)


def _blocks(frame: int, window: int, block: int) -> int:
    """Return how many frames, this one included, are in the window if a block of them leaves whenever it is full."""
    return frame + 1 if frame < window else window - block + 1 + (frame - window) % block


def _slid(decoder: LlamaDecoder, codes: Tensor, context: Callable[[int], int], alter: Alter | None = None) -> Tensor:
    """Return the loss of every frame, one stream through one cache, frame t with a window of context(t) frames: [F]."""
    widest = max(context(t) for t in range(len(codes)))
    state = decoder.init_state(1, widest)
    losses = []
    for t, frame in enumerate(codes):
        view = decoder.begin_frame(state, state.every_slot, context(t), decoder.columns_for(state, t))
        if alter is not None:
            view = alter(decoder, state, view)
        losses.append(feed(decoder, state, view, frame[None]).mean())
    return torch.stack(losses)


def _prefilled(decoder: LlamaDecoder, codes: Tensor, places: Tensor, before: Callable[[int], int]) -> Tensor:
    """Return the loss of the frames at `places`, each after before(t) frames fed to an empty cache: [N]."""
    losses = []
    for batch in places.split(_BATCH):
        lengths = [before(int(t)) for t in batch]
        state = decoder.init_state(len(batch), max(lengths) + 1)
        result = torch.zeros(len(batch))
        for step in range(max(lengths) + 1):
            frames = [min(int(t), int(t) - length + step) for t, length in zip(batch, lengths, strict=True)]
            view = decoder.begin_frame(state, state.every_slot, max(lengths) + 1, decoder.columns_for(state, step))
            loss = feed(decoder, state, view, codes[frames]).mean(dim=1).cpu()
            now = torch.tensor([step == length for length in lengths])
            result = torch.where(now, loss, result)
        losses.append(result)
    return torch.cat(losses)


def _leave_prefix(decoder: LlamaDecoder, state: DecoderState, view: FrameView) -> FrameView:
    """Keep the prefix at its first positions while the window moves away from it."""
    positions = torch.arange(decoder.prefix, device=decoder.device)[None]
    cos, sin = (t[:, None, None] for t in decoder.rotary(positions))
    state.ring.keys[:1, :, :, : decoder.prefix] = rotate(decoder.prefix_keys, cos, sin)
    return view


def _hide_prefix(decoder: LlamaDecoder, state: DecoderState, view: FrameView) -> FrameView:
    """Let the prefix leave with the first frames."""
    assert view.visible is not None
    visible = view.visible.clone()
    visible[..., : decoder.prefix] &= state.frames[:1, None, None, None] < state.ring.size // decoder.num_codebooks - 2
    return replace(view, visible=visible)
