"""What one half of the codec remembers of each slot's stream."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from streaming.models.attention import KeyValueRing

STEPS = 2
"""Transformer steps a frame: 25 Hz against 12.5."""


@dataclass
class HalfState:
    """The memory of one half of the codec, for each slot's stream.

    frames: [S] int64, the stream's position; the only clock. contexts: [S, depth, N], the convolutions' contexts after
    each of the last frames, at index frame % depth, so that a stream can be rewound by lowering its position.
    """

    frames: Tensor
    contexts: Tensor
    ring: KeyValueRing

    def scrub(self, slot: int) -> None:
        """Start a slot anew and forget its content."""
        self.frames[slot] = 0
        self.contexts[slot].zero_()
        self.ring.scrub(slot)
