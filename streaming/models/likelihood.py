"""Negative log-likelihood of frames under a decoder, with the engine's own cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from streaming.audio import FRAME
from streaming.models.attention import FrameView
from streaming.models.checkpoint import TensorSource
from streaming.models.linear import Linear, linear
from streaming.models.llama import DecoderState, LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.token_layout import TokenLayout


def encode(codec: StreamingMimi, frames: NDArray[np.float32]) -> Tensor:
    """Return the codes of one stream, [F, Q]. frames: [F, 1920]."""
    return encode_streams(codec, frames[None])[0]


@torch.inference_mode()
def encode_streams(codec: StreamingMimi, frames: NDArray[np.float32]) -> Tensor:
    """Return the codes of several streams, [B, F, Q]. frames: [B, F, 1920], a stream a row."""
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
    """Feed one frame to B rows. Return the last layer's output where each of its tokens is expected, [B, Q, hidden].

    codes: [B, Q].
    """
    batch = codes.shape[0]
    units = torch.cat((decoder.last_units(state, view.slots)[:, None], decoder.units(codes)[:, :-1]), dim=1)
    hidden = decoder.forward(units, state, view)
    decoder.end_frame(codes, state, view.slots, torch.ones(batch, dtype=torch.bool, device=codes.device))
    return hidden


def feed(decoder: LlamaDecoder, state: DecoderState, view: FrameView, codes: Tensor) -> Tensor:
    """Feed one frame to B rows. Return its negative log-likelihood a token, in nats: [B, Q]. codes: [B, Q].

    Among what a slot may emit, as the sampler sees it; `clip_losses` has it over the whole vocabulary.
    """
    hidden = advance(decoder, state, view, codes)
    losses = [
        F.cross_entropy(decoder.logits(hidden[:, book], book).float(), codes[:, book], reduction="none")
        for book in range(decoder.num_codebooks)
    ]
    return torch.stack(losses, dim=1)


@dataclass(frozen=True)
class OutputLayer:
    """The whole output layer, where the engine keeps only what it may emit.

    rows: from hidden to V; units: [Q, K] ids; end: the id of `</audio>`.
    """

    rows: Linear
    units: Tensor
    end: int

    @staticmethod
    def load(folder: Path, decoder: LlamaDecoder) -> OutputLayer:
        """Read the output layer from the decoder's checkpoint."""
        config = decoder.config
        source = TensorSource(folder, decoder.device, decoder.dtype)
        name = "lm_head.weight" if "lm_head.weight" in source else "model.embed_tokens.weight"
        layout = TokenLayout.load(folder, decoder.num_codebooks, decoder.codebook_size, config.vocab_size)
        rows = linear(source.load(name, (config.vocab_size, config.hidden_size)))
        return OutputLayer(rows, layout.units.to(decoder.device), layout.end)

    def losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Return the negative log-likelihoods, [N], in nats. hidden: [N, hidden]; ids: [N]."""
        return F.cross_entropy(self.rows(hidden).float(), ids, reduction="none")


@torch.inference_mode()
def clip_losses(decoder: LlamaDecoder, output: OutputLayer, codes: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the losses of clips, [B, F, Q], and of each clip's end, [B].

    codes: [B, F, Q]; lengths: [B], frames that count.
    """
    batch, frames, books = codes.shape
    state = decoder.init_state(batch, frames + 1)
    losses = torch.zeros(batch, frames, books)
    endings = torch.zeros(batch)
    ends = torch.full((batch,), output.end, device=codes.device)
    book = torch.arange(books, device=codes.device)
    for frame in range(frames + 1):
        view = decoder.begin_frame(state, state.every_slot, frames + 1, decoder.columns_for(state, frame))
        fed = codes[:, min(frame, frames - 1)]  # past the last frame only what its first column says is looked at
        hidden = advance(decoder, state, view, fed)
        ending = output.losses(hidden[:, 0], ends).cpu()
        endings = torch.where(lengths == frame, ending, endings)
        if frame < frames:
            ids = output.units[book, fed]  # [B, Q]
            losses[:, frame] = output.losses(hidden.flatten(0, 1), ids.flatten()).view(batch, books).cpu()
    return losses, endings
