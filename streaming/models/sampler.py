"""Drawing the next code of every row, on the device, without asking the host.

Randomness is a pure function of the session's seed and the token's number in its stream, so a session repeats itself
whatever its neighbours do, in whichever slot, and a rewound stream draws again what it drew before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streaming.config import Sampling

FEW = 64
"""Tokens that need ranking for a `top_k` of at most so many."""
LEAST_TEMPERATURE = 1e-4
"""The least temperature above 0. It is as good as greedy, and far from overflow."""
WHOLE = 2.0**36
"""Chances are whole multiples of 1 / WHOLE of the likeliest token's. Sums of whole numbers are the same in any order,
so a draw is the same on every device; and they stay exact in float64 for 2**16 tokens.
"""


@dataclass
class SamplerState:
    """Each slot's options. All [S]: temperature, top_p float32; top_k, seed int64."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor

    @staticmethod
    def allocate(slots: int, device: torch.device) -> SamplerState:
        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, dtype=dtype, device=device)

        return SamplerState(zeros(torch.float32), zeros(torch.int64), zeros(torch.float32), zeros(torch.int64))

    def of(self, slots: Tensor) -> SamplerState:
        """Return the options of the rows that are these slots, [B] each. slots: [B] int64."""
        return SamplerState(self.temperature[slots], self.top_k[slots], self.top_p[slots], self.seed[slots])

    def set(self, slot: int, sampling: Sampling) -> None:
        self.temperature[slot] = sampling.temperature
        self.top_k[slot] = sampling.top_k
        self.top_p[slot] = sampling.top_p
        self.seed[slot] = sampling.seed


@dataclass(frozen=True)
class Drawing:
    """The tensors that the draws of one frame read and write, for B rows; all [B] but `frames` and `codes`.

    slots: int64, the slot of each row; frames: [S] int64, every slot's position; listening, speaking: bool. Written in
    place: codes [B, Q] int64, which hold the codec's where a row listens; ended: bool, where a speaking row drew
    `</audio>`; finite: bool, no more where logits are not.
    """

    slots: Tensor
    frames: Tensor
    listening: Tensor
    speaking: Tensor
    codes: Tensor
    ended: Tensor
    finite: Tensor


def draw(logits: Tensor, book: int, state: SamplerState, frame: Drawing, few: bool) -> Tensor:
    """Draw a codebook's code for every row and write it into `frame`, unless the row listens.

    logits: [B, K + 1], the last one `</audio>`, which stands in front of the first codebook alone (-inf elsewhere).
    few: see `sample`. Returns the unit that is fed next, [B] int64: see `LlamaDecoder`.
    """
    size = logits.shape[1] - 1
    frame.finite.logical_and_(logits[:, : size + (book == 0)].isfinite().all(dim=1))
    number = frame.frames[frame.slots] * frame.codes.shape[1] + book
    drawn = sample(logits, state.of(frame.slots), number, few)
    if book == 0:
        frame.ended.logical_or_(frame.speaking & (drawn == size))
    frame.codes[:, book] = torch.where(frame.listening, frame.codes[:, book], drawn.clamp(max=size - 1))
    return frame.codes[:, book] + book * size


def sample(logits: Tensor, state: SamplerState, number: Tensor, few: bool = False) -> Tensor:
    """Draw one token a row: temperature, then top-k, then top-p, as `transformers` orders them; temperature 0 is
    argmax.

    logits: [B, V] float, -inf where forbidden; state: of B rows; number: [B] int64, the token's number in its stream.
    few: whether all rows that matter have a `top_k` from 1 to `FEW`, which spares a full sort. Returns [B] int64.
    """
    logits = logits.float()
    size, top_k = logits.shape[1], state.top_k
    chosen = uniform(state.seed, number)
    order = _rank(logits, min(FEW, size))
    drawn = _draw(logits, state, chosen, order)
    if not few and size > FEW:
        # A row with a small top_k draws the same bits, whatever its neighbours have.
        every = _draw(logits, state, chosen, _rank(logits, size))
        drawn = torch.where((top_k > 0) & (top_k <= FEW), drawn, every)
    return torch.where(state.temperature > 0, drawn, order[:, 0])


def _draw(logits: Tensor, state: SamplerState, chosen: Tensor, order: Tensor) -> Tensor:
    """Draw from the likeliest tokens. chosen: [B] in [0, 1); order: [B, ranks] of these tokens. Returns [B] int64."""
    ranks = order.shape[1]
    temperature, top_k = state.temperature[:, None], state.top_k[:, None]
    ranked = logits.gather(-1, order).double()
    divisor = torch.where(temperature > 0, temperature, 1.0).clamp(min=LEAST_TEMPERATURE).double()
    weight = (((ranked - ranked[:, :1]) / divisor).exp() * WHOLE).long()
    weight = weight.masked_fill((top_k > 0) & (torch.arange(ranks, device=logits.device) >= top_k), 0)
    before = weight.cumsum(dim=-1) - weight
    limit = state.top_p[:, None].double() * weight.sum(dim=-1, keepdim=True).double()
    weight = weight.masked_fill(before.double() >= limit, 0)  # the first is always kept: 0 < top_p
    reached = weight.cumsum(dim=-1)
    total = reached[:, -1:]
    threshold = chosen[:, None].double() * total.double()
    # The first entry that reaches the total is the last that may be drawn, however the product was rounded.
    choice = ((reached.double() <= threshold) & (reached < total)).sum(dim=-1, keepdim=True)
    return order.gather(-1, choice).squeeze(-1)


def _rank(logits: Tensor, ranks: int) -> Tensor:
    """Return the `ranks` largest of each row, by index where equal (bfloat16 logits often are). [B, V] float32 to [B,
    ranks].

    A float's bits, read as an integer and turned over where negative, are in the float's order; with the index below
    them no two keys are equal, so that any way of sorting gives the same.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0 becomes 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = logits.shape[-1] - 1
    keys = (bits.long() << 32) | (last - torch.arange(last + 1, device=logits.device))
    keys = keys.topk(ranks, dim=-1).values if ranks <= last else keys.sort(dim=-1, descending=True).values
    return last - (keys & 0xFFFFFFFF)


def uniform(seed: Tensor, number: Tensor) -> Tensor:
    """Return a number in [0, 1) for each pair: [B] float32, multiples of 2**-24. seed, number: [B] int64.

    SplitMix64's finaliser (Steele et al., OOPSLA 2014, doi 10.1145/2714064.2660195) over the seed's own stream; int64
    wraps.
    """
    bits = _mix(_mix(seed + GOLDEN) ^ (number * GOLDEN))
    return ((bits >> 40) & 0xFFFFFF).float() * 2.0**-24


GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))) * MIX[0]
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))) * MIX[1]
    return bits ^ ((bits >> 31) & (2**33 - 1))
