"""The decoder against `transformers.LlamaForCausalLM`: inside the window, out of step, and hours beyond it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from streaming.models.llama import DecoderState, LlamaDecoder
from streaming.models.operations.torch import TorchOperations
from streaming.models.token_layout import AUDIO, END_OF_AUDIO, unit_name
from tests.reference import CODEBOOK_SIZE, load_decoder

HUGE = 1e30
"""Poison for memory that was never written. Not NaN: a masked entry has weight zero, and zero times NaN is NaN."""


@torch.inference_mode()
def judge(folder: Path, codes: Tensor) -> Tensor:
    """Logits in front of every token of a prompt, by `transformers`. codes: [F, Q]. Returns [F, Q, K + 1], as ours."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    books = codes.shape[1]
    text = AUDIO + "".join(unit_name(code, book) for frame in codes.tolist() for book, code in enumerate(frame))
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    logits = model(ids[:, :-1]).logits[0, -codes.numel() :].view(*codes.shape, -1)
    names = [[unit_name(c, book) for c in range(CODEBOOK_SIZE)] + [END_OF_AUDIO] for book in range(books)]
    columns = torch.tensor([tokenizer.convert_tokens_to_ids(row) for row in names])
    picked = logits.gather(-1, columns.expand(len(codes), -1, -1))
    picked[:, 1:, -1] = -torch.inf
    return picked


def feed(
    decoder: LlamaDecoder,
    state: DecoderState,
    codes: Tensor,
    active: Tensor | None = None,
    context_frames: int = 100,
    by_token: bool = False,
    columns: int | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    """One frame. codes: [B, Q]; slots: [B]; None: row i is slot i. Returns the logits that each token was drawn from,
    [B, Q, K + 1].
    """
    batch = len(codes)
    active = torch.ones(batch, dtype=torch.bool) if active is None else active
    columns = columns or decoder.columns_for(state, int(state.frames.max()))
    slots = torch.arange(batch, device=codes.device) if slots is None else slots
    view = decoder.begin_frame(state, slots, context_frames, columns)
    units = torch.cat((decoder.last_units(state, slots)[:, None], decoder.units(codes)[:, :-1]), dim=1)
    if by_token:
        books = range(decoder.num_codebooks)
        hidden = torch.cat([decoder.forward(units[:, b : b + 1], state, view.columns(b, b + 1)) for b in books], dim=1)
    else:
        hidden = decoder.forward(units, state, view)
    decoder.end_frame(codes, state, slots, active)
    return torch.stack([decoder.logits(hidden[:, book], book) for book in range(decoder.num_codebooks)], dim=1)


def poisoned(decoder: LlamaDecoder, slots: int, context_frames: int = 100, rewind_frames: int = 0) -> DecoderState:
    state = decoder.init_state(slots, context_frames, rewind_frames)
    state.ring.keys.fill_(HUGE)
    state.ring.values[:, :, :, decoder.prefix :] = HUGE
    return state


def random_codes(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(CODEBOOK_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def assert_near(ours: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    """The same tokens forbidden, the others within `tolerance` of the largest logit."""
    assert torch.equal(ours.isinf(), wanted.isinf())
    ours, wanted = (x.masked_fill(x.isinf(), 0.0) for x in (ours, wanted))
    torch.testing.assert_close(ours, wanted, rtol=0.0, atol=tolerance * float(wanted.abs().max()))


VARIANTS: dict[str, dict[str, object]] = {
    "Q4": {},
    "Q8": {"num_codebooks": 8},
    "tied": {"tie_word_embeddings": True},
    "shuffled": {"shuffled": True},
    "without-bos": {"bos": False},
    "not-grouped": {"num_key_value_heads": 4},
    "wide-heads": {"head_dim": 32},
    "plain-rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
}


@pytest.mark.twice
@pytest.mark.parametrize("by_token", [False, True], ids=["by-frame", "by-token"])
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_those_of_the_whole_prompt(
    decoder_checkpoint: Callable[..., Path], variant: dict[str, object], by_token: bool
) -> None:
    """Pins a position off by one, a wrong frequency band, ids computed instead of read, a head read from the wrong
    table, a token that sees a later one.
    """
    folder = decoder_checkpoint(**variant)
    decoder = load_decoder(folder)
    codes = random_codes(40, decoder.num_codebooks)
    state = poisoned(decoder, 1)
    ours = torch.cat([feed(decoder, state, frame[None], by_token=by_token) for frame in codes])
    assert_near(ours, judge(folder, codes))


@pytest.fixture(scope="module")
def judged(decoder_dir: Path) -> tuple[Tensor, Tensor]:
    """Codes [S, F, Q] of three streams and the logits before each of them."""
    codes = random_codes(3, 30, 4)
    return codes, torch.stack([judge(decoder_dir, stream) for stream in codes])


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[int, int, int, bool]]:
    """Steps of (batch, slots that advance, slots reset first, whether by token), the slots as bit masks."""
    masks = st.integers(0, 7)
    rarely = st.one_of(*[st.just(0)] * 9, masks)
    return draw(st.lists(st.tuples(st.integers(1, 3), masks, rarely, st.booleans()), min_size=15, max_size=30))


@pytest.mark.twice
@settings(max_examples=15)
@given(schedules())
def test_slots_out_of_step_each_equal_their_own_prompt(
    decoder: LlamaDecoder, judged: tuple[Tensor, Tensor], schedule: list[tuple[int, int, int, bool]]
) -> None:
    """Pins a slot that sees a neighbour's keys, an idle one that advances or spoils its own, a reset that fails."""
    codes, wanted = judged
    state = poisoned(decoder, 3)
    at = [0, 0, 0]
    for batch, advancing, resetting, by_token in schedule:
        state.reset(torch.tensor([bool(resetting >> slot & 1) for slot in range(3)]))
        at = [0 if resetting >> slot & 1 else at[slot] for slot in range(3)]
        fed = torch.stack([codes[slot, at[slot]] for slot in range(batch)])
        active = torch.tensor([bool(advancing >> slot & 1) for slot in range(batch)])
        ours = feed(decoder, state, fed, active, by_token=by_token)
        for slot in active.nonzero().flatten().tolist():
            assert_near(ours[slot], wanted[slot, at[slot]])
            at[slot] += 1
    assert state.frames.tolist() == at


WINDOW = 6


@pytest.fixture(scope="module", params=[4, 8], ids=["Q4", "Q8"])
def shallow(request: pytest.FixtureRequest, decoder_checkpoint: Callable[..., Path]) -> Path:
    """One layer deep: keys and values then depend on their own token alone, so a window that slid must equal a prompt
    of the frames in it. (With more layers, what is kept of a frame was computed with what stood before it.)
    """
    return decoder_checkpoint(num_codebooks=request.param, num_hidden_layers=1)


def in_window(folder: Path, codes: Tensor, frame: int) -> Tensor:
    """Logits of a frame's tokens in a prompt of the prefix and the last frames only."""
    return judge(folder, codes[max(0, frame + 1 - WINDOW) : frame + 1])[-1]


@pytest.mark.twice
@pytest.mark.parametrize("rewind_frames", [0, 3])
def test_a_context_that_slid_equals_a_prompt_of_its_last_frames(shallow: Path, rewind_frames: int) -> None:
    """Pins a prefix that stays behind, a window off by a frame, keys found in the wrong place once the ring wraps."""
    decoder = load_decoder(shallow)
    frames = 5 * (WINDOW + rewind_frames + 2)  # five times round the ring
    codes = random_codes(frames, decoder.num_codebooks)
    state = poisoned(decoder, 1, WINDOW, rewind_frames)
    for frame in range(frames):
        ours = feed(decoder, state, codes[frame][None], context_frames=WINDOW, by_token=frame % 3 == 0)
        if frame < 2 * WINDOW or frame % 5 == 0:
            assert_near(ours[0], in_window(shallow, codes, frame))


@pytest.mark.parametrize(("start", "tolerance"), [(45_000, 1e-4), (20_000_000, 1e-4), (8192 // 8 - 3, 1e-3)])
def test_positions_of_hours_are_as_good_as_the_first(shallow: Path, start: int, tolerance: float) -> None:
    """Pins angles rounded to float32: an hour of speech is position 180,000, and the fast angles would be noise.

    The last start crosses position 8192 with 8 codebooks, where rounding changes from `transformers`' float32 to exact:
    the error there is `transformers`' own.
    """
    decoder = load_decoder(shallow)
    frames = 3 * WINDOW
    codes = random_codes(frames, decoder.num_codebooks)
    state = poisoned(decoder, 1, WINDOW)
    state.frames.fill_(start)
    state.ring.keys.zero_()  # the frames before the start are in the window and never were: they must leave it
    state.ring.values[:, :, :, decoder.prefix :] = 0.0
    for frame in range(frames):
        ours = feed(decoder, state, codes[frame][None], context_frames=WINDOW)
        if frame > WINDOW:
            assert_near(ours[0], in_window(shallow, codes, frame), tolerance)


@pytest.mark.twice
def test_the_length_of_the_ring_changes_nothing(decoder: LlamaDecoder) -> None:
    """Pins keys found in the wrong place in the deeper layers, which the shallow tests cannot see."""
    codes = random_codes(40, 4)
    states = [poisoned(decoder, 1, WINDOW, rewind_frames) for rewind_frames in (0, 1, 7, 40)]
    for frame in codes:
        first, *others = (feed(decoder, state, frame[None], context_frames=WINDOW) for state in states)
        for other in others:
            assert_near(other, first, 1e-5)


@pytest.mark.twice
@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("length", [3, WINDOW, 4 * WINDOW])
def test_a_rewound_stream_goes_on_as_if_it_had_never_gone_there(decoder: LlamaDecoder, length: int, cut: int) -> None:
    """Pins keys in the window that the cut frames overwrote, and a last token taken from them. Exact."""
    codes, away = random_codes(length + 5, 4), random_codes(3, 4, seed=9)

    def run(astray: bool) -> list[Tensor]:
        state = poisoned(decoder, 2, WINDOW, rewind_frames=3)
        after = []
        for index in range(length + cut + 5):
            both = torch.tensor([True, True])
            if index < length:
                feed(decoder, state, codes[index].expand(2, -1), both, WINDOW)
            elif index < length + cut:
                feed(decoder, state, away[index - length].expand(2, -1), torch.tensor([astray, False]), WINDOW)
            else:
                if astray and index == length + cut:
                    state.frames[0] -= cut
                columns = decoder.columns_for(state, length + 5)
                after.append(feed(decoder, state, codes[index - cut].expand(2, -1), both, WINDOW, columns=columns))
        return after

    for ours, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no-bos"])
def test_every_token_sees_itself_however_long_its_stream_is(decoder_checkpoint: Callable[..., Path], bos: bool) -> None:
    """Counted a frame short, the columns that attention reads end before the last token of every 32nd frame: it did not
    see itself, and the codes of a long session had a fault every two and a half seconds.
    """
    decoder = load_decoder(decoder_checkpoint(bos=bos), operations=TorchOperations())
    state = decoder.init_state(1, 300)
    for frames in range(1, 290):  # the first token of a stream is the prefix's last, which is always seen
        state.frames.fill_(frames)
        view = decoder.begin_frame(state, state.every_slot, 300, decoder.columns_for(state, frames))
        assert view.index is not None and view.visible is not None
        assert int(view.index.max()) < view.visible.shape[-1], f"{frames} frames: not among what is read"
        assert view.visible[0, 0].gather(1, view.index[0][:, None]).all(), f"{frames} frames"


@pytest.mark.twice
def test_reading_only_what_is_held_changes_nothing(decoder_dir: Path) -> None:
    """Pins a stream that outgrows the columns that are read: the newest keys would be missing. In PyTorch, since
    compiled operations read what a slot holds, whatever they are told.
    """
    decoder = load_decoder(decoder_dir, operations=TorchOperations())
    codes = random_codes(70, 4)
    short, whole = (poisoned(decoder, 1, context_frames=60) for _ in range(2))
    every = whole.ring.keys.shape[3]
    widths = set()
    for frame in codes:
        widths.add(decoder.columns_for(short, int(short.frames[0])))
        ours = feed(decoder, short, frame[None], context_frames=60)
        assert_near(ours, feed(decoder, whole, frame[None], context_frames=60, columns=every), 1e-5)
    assert widths == {128, 248 + decoder.prefix}


def test_context_tokens_are_counted_with_the_prefix(decoder: LlamaDecoder) -> None:
    """Pins a context one frame longer than what the model was trained on."""
    assert decoder.prefix == 2
    assert [decoder.context_frames(tokens) for tokens in (5, 6, 9, 10, 1024)] == [0, 1, 1, 2, 255]


def test_bfloat16_is_near(decoder_dir: Path, decoder: LlamaDecoder) -> None:
    """Pins a float32 tensor left in the path, which would not even run, and a norm or a rotation in the wrong type."""
    codes = random_codes(30, 4)
    low = load_decoder(decoder_dir, dtype=torch.bfloat16)
    state, exact = poisoned(low, 1), poisoned(decoder, 1)
    for frame in codes:
        ours, wanted = feed(low, state, frame[None]), feed(decoder, exact, frame[None])
        assert ours.dtype == (low.operations.activations or torch.bfloat16)
        assert_near(ours.float(), wanted, 0.1)


def test_on_other_operations_the_layers_are_run_by_these(decoder: LlamaDecoder) -> None:
    """Kernels would have been compared with themselves: the layers stayed with the operations that they came with."""

    class Counted(TorchOperations):
        attended = 0

        def attend(self, *args: Any) -> Tensor:
            self.attended += 1
            return super().attend(*args)

    counted = Counted()
    other, frame = decoder.on(counted), random_codes(1, 4)[0]
    said = feed(other, poisoned(other, 1), frame[None])
    assert counted.attended == decoder.config.num_layers
    assert_near(said, feed(decoder, poisoned(decoder, 1), frame[None]), 1e-4)
    assert counted.attended == decoder.config.num_layers


@pytest.mark.twice
def test_scrub_forgets_even_nan(decoder: LlamaDecoder) -> None:
    """Pins a slot that stays poisoned for every later session, and one that loses its prefix when it is cleaned."""
    state, fresh = decoder.init_state(2, WINDOW), decoder.init_state(2, WINDOW)
    for frame in random_codes(3, 2, 4, seed=5):
        feed(decoder, state, frame, context_frames=WINDOW)
    state.ring.keys[1] = torch.nan
    state.ring.values[1, :, :, decoder.prefix :] = torch.nan
    state.scrub(0)
    state.scrub(1)
    for frame in random_codes(3 * WINDOW, 2, 4):
        assert torch.equal(
            feed(decoder, state, frame, context_frames=WINDOW), feed(decoder, fresh, frame, context_frames=WINDOW)
        )
