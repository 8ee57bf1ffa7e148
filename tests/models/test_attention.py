"""Rotary angles against `transformers`, and the ring against a plain list of what was written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from streaming.config import Rope
from streaming.models.attention import KeyValueRing, Rotary, attend, rotate
from streaming.models.operations.torch import TorchOperations

CPU = torch.device("cpu")
RELEASED = Rope(500_000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
SMALL = Rope(10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)


@pytest.mark.parametrize(("rope", "head_dim"), [(RELEASED, 64), (SMALL, 16), (Rope(10_000.0), 64)])
def test_angles_are_those_of_transformers(rope: Rope, head_dim: int) -> None:
    """Pins a frequency in the wrong band, and angles rounded otherwise, which would turn near-ties of greedy tokens."""
    parameters = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.factor != 1.0:
        parameters = {
            "rope_type": "llama3",
            "rope_theta": rope.theta,
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_context,
        }
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=head_dim, rope_parameters=parameters))
    position = torch.arange(8192)[None]
    cos, sin = theirs(torch.zeros(1), position)
    ours = Rotary(rope, head_dim, CPU)
    torch.testing.assert_close(ours.frequency, theirs.inv_freq, rtol=1e-6, atol=0.0)
    for got, wanted in zip(ours(position), (cos, sin), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.0, atol=1e-3)  # a last bit of a frequency, 8192 times
    query, key = torch.randn(2, 1, 3, 8192, head_dim)
    turned, _ = apply_rotary_pos_emb(query, key, cos, sin)
    torch.testing.assert_close(rotate(query, cos[:, None], sin[:, None]), turned)


@pytest.mark.parametrize("far", [8192, 10**6, 10**8])
def test_scores_depend_on_the_difference_of_positions_alone(far: int) -> None:
    """Pins angles computed in float32: at position 10**8 they are off by several radians."""
    rotary = Rotary(RELEASED, 64, CPU)
    query, key = torch.randn(2, 1, 1, 300, 64)

    def scores(start: int) -> torch.Tensor:
        cos, sin = (t[None, None] for t in rotary(start + torch.arange(300)))
        return rotate(query, cos, sin) @ rotate(key, cos, sin).transpose(-1, -2)

    torch.testing.assert_close(scores(far), scores(0), rtol=0.0, atol=1e-3)


@given(
    prefix=st.integers(0, 3),
    size=st.integers(4, 12),
    window=st.integers(1, 12),
    time=st.integers(1, 3),
    newest=st.lists(st.integers(0, 60), min_size=1, max_size=3),
)
def test_entries_are_seen_that_hold_a_position_of_the_window(
    prefix: int, size: int, window: int, time: int, newest: list[int]
) -> None:
    """Pins an entry taken for the position that it will hold, or held one lap ago: the ring marks nothing, so the
    arithmetic is all there is.
    """
    window = min(window, size - time + 1)
    ring = KeyValueRing.allocate(len(newest), 1, 1, size, 2, prefix, CPU, torch.float32)
    assert ring.size == size
    for step in range(0, max(newest) + 1, time):
        position = torch.tensor([[prefix + min(step, last // time * time) + t for t in range(time)] for last in newest])
        written = position[:, None, :, None].expand(-1, 1, -1, 2).float()
        ring.update(0, torch.arange(len(newest)), ring.index(position), written, written)
    start = (position - (window - 1)).clamp(min=prefix)
    visible = ring.visible(position, start, prefix + size)
    assert visible.shape == (len(newest), 1, time, prefix + size)
    assert visible[..., :prefix].all()
    for slot in range(len(newest)):
        for t in range(time):
            seen = ring.values[slot, 0, 0, prefix:, 0][visible[slot, 0, t, prefix:]]
            assert sorted(seen.tolist()) == list(range(int(start[slot, t]), int(position[slot, t]) + 1))


@pytest.mark.parametrize(("heads", "groups", "time"), [(1, 1, 1), (2, 3, 1), (2, 2, 4)])
def test_grouped_heads_attend_as_if_keys_were_repeated(heads: int, groups: int, time: int) -> None:
    """Pins query heads folded with the wrong key head, or masks of one query, or a slot's keys, given to another."""
    batch, size, dim, slots = 2, 9, 8, torch.tensor([2, 0])
    ring = KeyValueRing(*torch.randn(2, 3, 2, heads, size, dim), prefix=0)
    query = torch.randn(batch, heads * groups, time, dim)
    visible = torch.rand(batch, 1, time, size) < 0.5
    visible[..., 0] = True
    keys, values = (t[slots, 1].repeat_interleave(groups, dim=1) for t in (ring.keys, ring.values))
    wanted = F.scaled_dot_product_attention(query, keys, values, attn_mask=visible).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attend(query, ring, 1, slots, visible), wanted)


def test_a_part_of_a_view_has_the_windows_of_its_own_tokens() -> None:
    """Windows that begin per token stayed those of the whole frame: a token fed alone had another one's window."""
    operations, rotary = TorchOperations(), Rotary(SMALL, 16, CPU)
    ring = KeyValueRing.allocate(2, 1, 1, 40, 16, 0, CPU, torch.float32)
    position = torch.tensor([[20, 21, 22, 23], [8, 9, 10, 11]])
    slots = torch.tensor([1, 0])
    whole = operations.view(slots, position, position - 5, ring, rotary, 40)
    for first, last in ((0, 1), (1, 3), (3, 4)):
        part, alone = whole.columns(first, last), slice(first, last)
        wanted = operations.view(slots, position[:, alone], position[:, alone] - 5, ring, rotary, 40)
        for name in ("slots", "position", "start", "cos", "sin", "index"):
            assert torch.equal(getattr(part, name), getattr(wanted, name)), name
    start = torch.tensor([[15], [3]])
    assert torch.equal(operations.view(slots, position, start, ring, rotary, 40).columns(1, 2).start, start)


def test_writing_touches_its_own_slots_and_layer_only() -> None:
    """Pins an index that is broadcast over slots."""
    ring = KeyValueRing.allocate(3, 2, 2, 5, 4, 1, CPU, torch.float32)
    key, value = torch.randn(2, 2, 2, 1, 4)
    ring.update(1, torch.tensor([2, 0]), torch.tensor([[3], [5]]), key, value)
    written = torch.zeros(3, 2, 2, 6, 4, dtype=torch.bool)
    written[2, 1, :, 3] = written[0, 1, :, 5] = True
    for memory, source in ((ring.keys, key), (ring.values, value)):
        assert torch.equal(memory[2, 1, :, 3], source[0, :, 0])
        assert torch.equal(memory[0, 1, :, 5], source[1, :, 0])
        assert not memory[~written].any()


def test_scrub_leaves_the_prefix_and_the_other_slots() -> None:
    """Pins the prefix's values zeroed with the rest: they are written once, when the state is made, so every session
    after the first `open` of a slot spoke without `<bos><audio>`.
    """
    ring = KeyValueRing(*torch.randn(2, 2, 1, 2, 6, 4), prefix=2)
    keys, values = ring.keys.clone(), ring.values.clone()
    ring.keys[1, :, :, 2:] = ring.values[1, :, :, 2:] = torch.nan
    ring.scrub(1)
    for memory, before in ((ring.keys, keys), (ring.values, values)):
        assert torch.equal(memory[0], before[0])
        assert torch.equal(memory[1, :, :, :2], before[1, :, :, :2])
        assert not memory[1, :, :, 2:].any()
