"""The contexts of convolutions: of each layer's input, the last steps that the next frame still needs."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Contexts:
    """The contexts of B rows in one frame: what each stream's last frame left, zeros at its beginning, and what this
    one leaves for the next.

    memory: [S, depth, N], every slot's after each of its last frames, at index frame % depth; slots, frames: [B] int64.
    Layers take and leave theirs in the order in which they lie in N.
    """

    def __init__(self, memory: Tensor, slots: Tensor, frames: Tensor) -> None:
        self.memory, self.slots, self.frames = memory, slots, frames
        self._taken = 0
        self._left: list[Tensor] = []

    def take(self, steps: int, channels: int) -> Tensor:
        """Return the next layer's context, [B, steps, channels]."""
        return self._before[:, self._next(steps * channels)].view(len(self.frames), steps, channels)

    def leave(self, context: Tensor) -> None:
        """Take note of what a layer needs next. context: [B, steps, channels]."""
        self._left.append(context)

    def keep(self) -> None:
        """Put down what all layers have left."""
        flat = torch.cat([context.flatten(1) for context in self._left], dim=1)
        self.memory[self.slots, self.frames.remainder(self.memory.shape[1])] = flat

    def _next(self, width: int) -> slice:
        first, self._taken = self._taken, self._taken + width
        return slice(first, self._taken)

    @cached_property
    def _before(self) -> Tensor:
        flat = self.memory[self.slots, (self.frames - 1).remainder(self.memory.shape[1])]
        nothing = torch.zeros((), dtype=flat.dtype, device=flat.device)
        return torch.where((self.frames == 0)[:, None], nothing, flat)
