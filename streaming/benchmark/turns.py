"""Compare what the codec's encoder may have heard when a person speaks again.

Each trial is a conversation: a prompt, a continuation of it, a second prompt, and how that really went on. The
decoder's context is the same in all cases; only the encoder's state at the second prompt differs, and with it that
prompt's codes.

Two likelihoods tell: that of the second prompt's codes, and that of what follows them. The first compares different
codes, so blander ones win it; the second compares different contexts for the same codes, which is the question.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from streaming.benchmark import likelihood
from streaming.benchmark.likelihood import compare, speech_frames
from streaming.benchmark.report import Report, Value
from streaming.loading import load_models
from streaming.models.likelihood import feed
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi

_FRAMES = 38
"""Length of each part: 3 s."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    likelihood.add_arguments(parser)
    parser.add_argument(
        "--heard", choices=("codec", "original"), default="codec", help="What the encoder is given of a continuation."
    )


def measure(options: argparse.Namespace) -> Report:
    """`turns`: see the module. Raises as loading does."""
    models = load_models(options.model, options.codec, options.device, options.dtype)
    codec, decoder = models.codec, models.decoder
    speech = torch.from_numpy(speech_frames(options.input, (options.samples + 3) * _FRAMES)).to(codec.device)
    # [N, 4 * 38, 1920]: a prompt, what is taken as its continuation, a second prompt, and how it went on.
    trials = speech.unfold(0, 4 * _FRAMES, _FRAMES).transpose(1, 2).contiguous()
    prompt, between, second, _ = trials.split(_FRAMES, dim=1)
    if options.heard == "codec":  # as the codec speaks it; else as it is, which stands in for a better codec
        between = _decode(codec, _encode(codec, torch.cat((prompt, between), dim=1)))[:, _FRAMES:]

    everything = _encode(codec, trials)
    before, after = everything[:, : 2 * _FRAMES], everything[:, 3 * _FRAMES :]
    codes = {
        "hears the continuation (engine)": _encode(codec, torch.cat((prompt, between, second), dim=1))[
            :, 2 * _FRAMES :
        ],
        "goes on from the first prompt": _encode(codec, torch.cat((prompt, second), dim=1))[:, _FRAMES:],
        "starts anew": _encode(codec, second),
    }
    losses = {name: _losses(decoder, torch.cat((before, c, after), dim=1)) for name, c in codes.items()}
    reference_codes, reference = next(iter(codes.values())), next(iter(losses.values()))
    rows: list[dict[str, Value]] = []
    for name, loss in losses.items():
        row: dict[str, Value] = {"encoder": name}
        for part, label in ((2, "second prompt"), (3, "what follows")):
            span = slice(part * _FRAMES, (part + 1) * _FRAMES)
            mean, difference, error = compare(loss[:, span].mean(dim=1), reference[:, span].mean(dim=1))
            row |= {f"{label}, nats/token": mean, f"{label}, difference": difference, f"{label}, std. error": error}
        row["equal codes"] = float((codes[name] == reference_codes).float().mean())
        rows.append(row)
    facts: dict[str, Value] = {
        "model": models.name,
        "conversations": len(trials),
        "speech": options.input.name,
        "continuation heard": options.heard,
    }
    return Report("what the encoder hears between two turns", facts, rows)


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


def _losses(decoder: LlamaDecoder, codes: Tensor) -> Tensor:
    """codes: [N, F, Q]. Returns each frame's loss given those before it: [N, F]."""
    count, length, _ = codes.shape
    state = decoder.init_state(count, length)
    losses = []
    for f in range(length):
        view = decoder.begin_frame(state, state.every_slot, length, decoder.columns_for(state, f))
        losses.append(feed(decoder, state, view, codes[:, f]).mean(dim=1))
    return torch.stack(losses, dim=1).cpu()
