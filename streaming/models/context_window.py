"""The window over a stream: where it slides, and which tokens the decoder still sees.

A stream is the prefix `<bos><audio>`, then a token a codebook, frame by frame. Of these the decoder sees the prefix and
the newest `context_frames` frames. Once the window is full, every frame pushes the oldest one out. The prefix's keys
are then turned to the positions right before the window, so that the decoder finds the prefix where it has always been
(docs/decisions.md). `operations/triton/begin_frame.py` does the same arithmetic in a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def window_start(frames: Tensor, context_frames: int, books: int, prefix: int) -> Tensor:
    """Return the position of the first token that the next frame sees behind the prefix, [B, 1].

    frames: [B, 1], how many each slot has had; context_frames: how many fit into the window, the next one included.
    """
    return prefix + books * (frames + 1 - context_frames).clamp(min=0)


def frame_positions(frames: Tensor, books: int, prefix: int) -> Tensor:
    """Return the positions at which the next frame's tokens are predicted, [B, Q]: each from the token before it.

    frames: [B, 1], how many each slot has had.
    """
    return prefix - 1 + frames * books + torch.arange(books, device=frames.device)
