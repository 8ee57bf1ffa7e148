"""A row's next code in one launch: `sampler.draw` with a `top_k` of at most `FEW`, to the bit.

The likeliest tokens come from a partial bitonic sort of keys that hold a logit's bits above its index: 64 bits, or 32
for bfloat16, whose logits have only 16 (half the instructions). All sums are of whole numbers, so that their order does
not matter and the choice is the reference's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streaming.models.operations.triton.device import on_its_device
from streaming.models.sampler import FEW, GOLDEN, LEAST_TEMPERATURE, MIX, WHOLE

WARPS = 8


@triton.jit
def _mix(bits, first: tl.constexpr, second: tl.constexpr):
    bits = (bits ^ (bits >> 30)) * tl.full([], first, tl.uint64)
    bits = (bits ^ (bits >> 27)) * tl.full([], second, tl.uint64)
    return bits ^ (bits >> 31)


@triton.jit
def _uniform(seed, number, golden: tl.constexpr, first: tl.constexpr, second: tl.constexpr):
    step = tl.full([], golden, tl.uint64)
    bits = _mix(seed.to(tl.uint64, bitcast=True) + step, first, second)
    bits = _mix(bits ^ (number.to(tl.uint64, bitcast=True) * step), first, second)
    return (bits >> 40).to(tl.int64).to(tl.float64) * (1.0 / 16777216.0)


@triton.jit(do_not_specialize=["book"])
def _kernel(
    logits,  # [B, count], a row in one piece
    temperature,
    top_k,
    top_p,
    seed,  # these four and the frames by slot
    slots,  # [B]
    frames,
    listening,
    speaking,
    codes,  # [B, books]
    ended,
    finite,
    unit,
    row_stride,
    flag_stride,
    book,
    books,
    count,
    narrow: tl.constexpr,
    block: tl.constexpr,
    few: tl.constexpr,
    least: tl.constexpr,
    whole: tl.constexpr,
    golden: tl.constexpr,
    first: tl.constexpr,
    second: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    column = tl.arange(0, block)
    held = column < count
    logit = tl.load(logits + row * row_stride + column, mask=held, other=float("-inf")).to(tl.float32)
    judged = held & ((column < count - 1) | (book == 0))
    unsound = judged & ~(tl.abs(logit) < float("inf"))
    sound = tl.max(unsound.to(tl.int32), axis=0) == 0
    tl.store(finite + row, (tl.load(finite + row) != 0) & sound)

    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)  # -0 becomes 0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the float's order
    rank = tl.arange(0, few)
    if narrow:
        key = (bits & -65536) | (count - 1 - column)
        key = tl.topk(tl.where(held, key, tl.full([block], -(2**31), tl.int32)), few)
        index = (count - 1 - (key & 0xFFFF)).to(tl.int64)
        bits = (key ^ ((key >> 31) & 0x7FFFFFFF)) & -65536
    else:
        wide = (bits.to(tl.int64) << 32) | (count - 1 - column).to(tl.int64)
        wide = tl.topk(tl.where(held, wide, tl.full([block], -(2**63), tl.int64)), few)
        index = count - 1 - (wide & 0xFFFFFFFF)
        top = (wide >> 32).to(tl.int32)
        bits = top ^ ((top >> 31) & 0x7FFFFFFF)
    value = bits.to(tl.float32, bitcast=True)
    value = tl.where(rank < count, value, float("-inf"))
    greedy = tl.sum(tl.where(rank == 0, index, 0), axis=0)
    largest = tl.sum(tl.where(rank == 0, value, 0.0), axis=0).to(tl.float64)

    heat = tl.load(temperature + slot)
    divisor = tl.maximum(tl.where(heat > 0, heat, 1.0), least).to(tl.float64)
    weight = (tl.exp((value.to(tl.float64) - largest) / divisor) * whole).to(tl.int64)
    most = tl.load(top_k + slot)
    weight = tl.where((most > 0) & (rank >= most), 0, weight)
    limit = tl.load(top_p + slot).to(tl.float64) * tl.sum(weight, axis=0).to(tl.float64)
    weight = tl.where((tl.cumsum(weight, axis=0) - weight).to(tl.float64) >= limit, 0, weight)
    reached = tl.cumsum(weight, axis=0)
    total = tl.sum(weight, axis=0)
    number = tl.load(frames + slot) * books + book
    threshold = _uniform(tl.load(seed + slot), number, golden, first, second) * total.to(tl.float64)
    choice = tl.sum(((reached.to(tl.float64) <= threshold) & (reached < total)).to(tl.int32), axis=0)
    drawn = tl.where(heat > 0, tl.sum(tl.where(rank == choice, index, 0), axis=0), greedy)

    if book == 0:
        now = (drawn == count - 1) & (tl.load(speaking + row * flag_stride) != 0)
        tl.store(ended + row, (tl.load(ended + row) != 0) | now)
    heard = tl.load(codes + row * books + book)
    listens = tl.load(listening + row * flag_stride) != 0
    code = tl.where(listens, heard, tl.minimum(tl.maximum(drawn, 0), count - 2))
    tl.store(codes + row * books + book, code)
    tl.store(unit + row, code + book * (count - 1))


@torch.library.custom_op("streaming::draw", mutates_args=("codes", "ended", "finite"))
@on_its_device
def draw(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    slots: Tensor,
    frames: Tensor,
    listening: Tensor,
    speaking: Tensor,
    codes: Tensor,
    ended: Tensor,
    finite: Tensor,
    book: int,
) -> Tensor:
    """logits: [B, K + 1]; codes: [B, Q]; the others as in `sampler.SamplerState` and `sampler.Drawing`.
    Writes codes, ended and finite in place, and returns the unit that is fed next, [B].
    """
    batch, count = logits.shape
    assert logits.stride(1) == 1 and codes.is_contiguous() and listening.stride() == speaking.stride()
    unit = slots.new_empty((batch,))
    _kernel[(batch,)](
        logits,
        temperature,
        top_k,
        top_p,
        seed,
        slots,
        frames,
        listening.view(torch.uint8),
        speaking.view(torch.uint8),
        codes,
        ended.view(torch.uint8),
        finite.view(torch.uint8),
        unit,
        logits.stride(0),
        listening.stride(0),
        book,
        codes.shape[1],
        count,
        logits.dtype == torch.bfloat16 and count <= 2**16,
        max(2 * FEW, triton.next_power_of_2(count)),
        FEW,
        LEAST_TEMPERATURE,
        WHOLE,
        GOLDEN % 2**64,
        MIX[0] % 2**64,
        MIX[1] % 2**64,
        num_warps=WARPS,
    )
    return unit


@draw.register_fake
def _(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    slots: Tensor,
    frames: Tensor,
    listening: Tensor,
    speaking: Tensor,
    codes: Tensor,
    ended: Tensor,
    finite: Tensor,
    book: int,
) -> Tensor:
    return slots.new_empty((logits.shape[0],))
