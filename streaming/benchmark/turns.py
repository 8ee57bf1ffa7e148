"""What the codec's encoder should have heard when a person speaks again: by the likelihood of what they then say.

Each trial is a conversation: a prompt, a continuation of it, and a second prompt that follows. The decoder's context is
the same in all cases; only the encoder's state at the second prompt differs, and with it the codes of that prompt.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from streaming.benchmark.likelihood import compare, feed, speech_frames
from streaming.benchmark.report import Report
from streaming.loading import load_models
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi

_FRAMES = 38
"""Length of each part: 3 s."""


def measure(options: argparse.Namespace) -> Report:
    """`turns`: see the module. Raises as loading does."""
    models = load_models(options.model, options.codec, options.device, options.dtype)
    codec, decoder = models.codec, models.decoder
    trials = options.samples
    speech = torch.from_numpy(speech_frames(options.input, trials * 3 * _FRAMES)).to(codec.device)
    # [N, 3, F, 1920]: a prompt, what is taken as its continuation, and a second prompt.
    parts = speech.view(trials, 3, _FRAMES, -1)
    first = _encode(codec, parts[:, :1].flatten(1, 2))
    # The continuation is heard as the codec speaks it: real speech, through the codec.
    between = _encode(codec, parts[:, :2].flatten(1, 2))[:, _FRAMES:]
    heard = _decode(codec, torch.cat((first, between), dim=1))[:, _FRAMES:]
    second = {
        "hears the continuation (engine)": _encode(codec, torch.cat((parts[:, 0], heard, parts[:, 2]), dim=1))[
            :, 2 * _FRAMES :
        ],
        "goes on from the first prompt": _encode(codec, torch.cat((parts[:, 0], parts[:, 2]), dim=1))[:, _FRAMES:],
        "starts anew": _encode(codec, parts[:, 2]),
    }
    before = torch.cat((first, between), dim=1)
    losses = {name: _second_turn(decoder, before, codes) for name, codes in second.items()}
    reference_codes, reference = next(iter(second.values())), next(iter(losses.values()))
    rows: list[dict[str, str | int | float]] = []
    for name, loss in losses.items():
        mean, difference, error = compare(loss.mean(dim=1), reference.mean(dim=1))
        early, early_difference, early_error = compare(loss[:, :6].mean(dim=1), reference[:, :6].mean(dim=1))
        rows.append(
            {
                "encoder": name,
                "nats/token": mean,
                "difference": difference,
                "std. error": error,
                "first 0.5 s": early,
                "difference ": early_difference,
                "std. error ": early_error,
                "equal codes": float((second[name] == reference_codes).float().mean()),
            }
        )
    facts: dict[str, str | int | float] = {"model": models.name, "trials": trials, "speech": options.input.name}
    return Report("likelihood of the second turn, by what the encoder heard before it", facts, rows)


@torch.inference_mode()
def _encode(codec: StreamingMimi, pcm: Tensor) -> Tensor:
    """pcm: [N, F, 1920], N streams from their beginning. Returns codes [N, F, Q]."""
    state = codec.init_state(pcm.shape[0])
    active = torch.ones(pcm.shape[0], dtype=torch.bool, device=codec.device)
    return torch.stack([codec.encode(pcm[:, f], state, active) for f in range(pcm.shape[1])], dim=1)


@torch.inference_mode()
def _decode(codec: StreamingMimi, codes: Tensor) -> Tensor:
    """codes: [N, F, Q]. Returns pcm [N, F, 1920]."""
    state = codec.init_state(codes.shape[0])
    active = torch.ones(codes.shape[0], dtype=torch.bool, device=codec.device)
    return torch.stack([codec.decode(codes[:, f], state, active) for f in range(codes.shape[1])], dim=1)


def _second_turn(decoder: LlamaDecoder, before: Tensor, codes: Tensor) -> Tensor:
    """before, codes: [N, F, Q]. Returns the loss of `codes` after `before`: [N, F]."""
    frames = torch.cat((before, codes), dim=1)
    count, length, _ = frames.shape
    state = decoder.init_state(count, length)
    losses = []
    for f in range(length):
        view = decoder.begin_frame(state, count, length, decoder.columns_for(state, f))
        losses.append(feed(decoder, state, view, frames[:, f]).mean(dim=1))
    return torch.stack(losses[before.shape[1] :], dim=1).cpu()
