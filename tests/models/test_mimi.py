"""The streaming codec against `transformers.MimiModel`, which sees the whole file at once.

`check` runs what is marked `twice` on the operations that suit the processor, and in PyTorch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MimiModel
from transformers.models.mimi.modeling_mimi import MimiConv1d

from streaming import loading
from streaming.errors import CheckpointError, StreamingError
from streaming.models.mimi import MimiState, StreamingMimi
from tests.reference import FRAME, load_codec, relative_error, speech

SLOTS = 4
ENOUGH = 10
"""Lengths for which silence in place of the end must give other codes. No more of them are tried."""
ON = torch.tensor([True])
HUGE = 1e30
"""Poison for memory that was never written. Not NaN: a masked entry has weight zero, and zero times NaN is NaN."""


@torch.inference_mode()
def offline(folder: Path, pcm: Tensor, num_codebooks: int) -> tuple[Tensor, Tensor]:
    """pcm: [n, F * 1920]. Codes [n, F, Q] and audio [n, F * 1920] as `transformers` has them."""
    model = MimiModel.from_pretrained(folder).eval()
    codes = model.encode(pcm[:, None], num_quantizers=num_codebooks).audio_codes
    return codes.transpose(1, 2), model.decode(codes).audio_values[:, 0]


def stream(codec: StreamingMimi, pcm: Tensor) -> tuple[Tensor, Tensor]:
    """pcm: [F * 1920]. Codes [F, Q] and audio [F * 1920], frame by frame, from a fresh poisoned state."""
    state = poisoned(codec, 1)
    codes = torch.cat([codec.encode(frame[None], state, ON) for frame in pcm.view(-1, FRAME)])
    return codes, torch.cat([codec.decode(frame[None], state, ON)[0] for frame in codes])


def poisoned(codec: StreamingMimi, slots: int, rewind_frames: int = 0) -> MimiState:
    state = codec.init_state(slots, rewind_frames)
    for half in (state.encoder, state.decoder):
        for memory in (half.contexts, half.ring.keys, half.ring.values):
            memory.fill_(HUGE)
    return state


def streams(frames: int, count: int = SLOTS) -> Tensor:
    return torch.from_numpy(np.stack([speech(frames, seed) for seed in range(count)]))


@pytest.mark.twice
@pytest.mark.parametrize(
    ("overrides", "num_codebooks", "frames"),
    [
        ({}, 8, 35),
        ({}, 4, 35),
        ({"num_residual_layers": 2}, 4, 12),
        ({"num_residual_layers": 3, "dilation_growth_rate": 3, "residual_kernel_size": 5}, 4, 12),
        ({"codebook_dim": 32, "vector_quantization_hidden_dimension": 32}, 4, 12),
        ({"num_semantic_quantizers": 2}, 4, 12),
        ({"num_key_value_heads": 1}, 4, 25),
        ({"upsampling_ratios": [5, 4, 8, 6], "kernel_size": 5, "last_kernel_size": 5, "compress": 1}, 4, 12),
        ({"sliding_window": 250}, 4, 140),
    ],
    ids=["Q8", "Q4", "dilated", "dilated3", "unprojected", "semantic2", "grouped", "other-kernels", "window250"],
)
def test_frame_by_frame_equals_the_whole_file(
    codec_checkpoint: Callable[..., Path], overrides: dict[str, object], num_codebooks: int, frames: int
) -> None:
    """Pins a seam between frames: a context of the wrong length or dilation, a window off by one, the downsampling's
    first frame padded with zeros instead of itself, a projection where the checkpoint has none.
    """
    folder = codec_checkpoint(**overrides)
    pcm = streams(frames, 1)
    codes, audio = offline(folder, pcm, num_codebooks)
    ours, heard = stream(load_codec(folder, num_codebooks), pcm[0])
    assert len(codes[0, :, 0].unique()) >= 5, "the checkpoint says too little to tell streams apart"
    assert torch.equal(ours, codes[0])
    assert relative_error(heard, audio[0]) < 1e-4


def test_a_longer_window_is_that_of_older_transformers(codec_dir: Path) -> None:
    """Before 5.2 `transformers` attended without a window in Mimi: 20 s are 500 steps. Newer ones do so when their
    config says 512, so this test is the same in both; it has been run with 4.57.1, too.
    """
    pcm = streams(250, 1)
    model = MimiModel.from_pretrained(codec_dir, sliding_window=512).eval()
    with torch.inference_mode():
        wanted = model.encode(pcm[:, None], num_quantizers=4).audio_codes[0].T
    whole = loading.load_codec(codec_dir, 4, window=512)
    assert torch.equal(stream(whole, pcm[0])[0], wanted)
    assert not torch.equal(stream(load_codec(codec_dir), pcm[0])[0], wanted), "a window of 20 steps is the same"
    for window in (0, 5000):
        with pytest.raises(StreamingError, match=f"a codec's window is 1 to 4096 steps, not {window}"):
            loading.load_codec(codec_dir, 4, window=window)


def stream_of_any_length(codec: StreamingMimi, pcm: Tensor) -> Tensor:
    """pcm: [n]. Codes [F, Q] of a stream that ends where the samples do."""
    state = poisoned(codec, 1)
    codes = []
    for start in range(0, len(pcm), FRAME):
        frame = torch.full((1, FRAME), HUGE)  # what lies past the end is not looked at
        heard = pcm[start : start + FRAME]
        frame[0, : len(heard)] = heard
        codes.append(codec.encode(frame, state, ON, torch.tensor([len(heard)])))
    return torch.cat(codes)


@pytest.mark.twice
@pytest.mark.parametrize("num_codebooks", [4, 8])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_residual_layers": 3, "dilation_growth_rate": 3, "residual_kernel_size": 5},
        {"upsampling_ratios": [5, 4, 8, 6], "kernel_size": 5, "last_kernel_size": 5, "compress": 1},
    ],
    ids=["tiny", "dilated", "other-kernels"],
)
def test_a_recording_of_any_length_equals_the_whole_file(
    codec_checkpoint: Callable[..., Path], overrides: dict[str, object], num_codebooks: int
) -> None:
    """Pins a last frame that is padded with silence: `transformers` is given the samples that there are and pads each
    layer's input, so that 1,919 of 1,920 lengths ended in other codes, and the continuation was another one.
    """
    folder = codec_checkpoint(**overrides)
    codec = load_codec(folder, num_codebooks)
    model = MimiModel.from_pretrained(folder).eval()
    random = np.random.default_rng(num_codebooks)
    wave = torch.from_numpy(speech(30))
    edges = [1, 2, 7, 8, 959, 960, 961, 1919, 1920, 1921, 2880, 2881, 3839, 3840, 5759]
    differ = 0
    for length in (*edges, *random.integers(1, 3 * FRAME, 25), *random.integers(3 * FRAME, len(wave), 5)):
        pcm = wave[: int(length)]
        with torch.inference_mode():
            wanted = model.encode(pcm[None, None], num_quantizers=num_codebooks).audio_codes[0].T
        assert torch.equal(stream_of_any_length(codec, pcm), wanted), length
        if differ <= ENOUGH:
            padded = torch.nn.functional.pad(pcm, (0, -len(pcm) % FRAME))
            differ += not torch.equal(stream_of_any_length(codec, padded), wanted)
    assert differ > ENOUGH, "the checkpoint says too little to tell silence from an end"


@pytest.mark.twice
def test_what_follows_an_end_finds_every_layers_input_as_the_end_left_it(codec_dir: Path) -> None:
    """A live stream goes on after a turn's last frame. Judged by `transformers`' own layers, with zeros past the end in
    the input of each; and no slot beside it changes by a bit. Pins a context that holds what the end's step computed
    of samples that were never there.
    """
    codec = load_codec(codec_dir)
    for ends in (1, 700, 960, 961, 1500, 1919):
        pcm = streams(30, 3)
        lengths = torch.full((30, 3), FRAME)
        lengths[9, 1] = ends
        active = torch.tensor([True, True, True])
        state, undisturbed = poisoned(codec, 3), poisoned(codec, 3)
        frames = pcm.view(3, -1, FRAME).unbind(1)
        ours = [codec.follow(frame, state, active, length) for frame, length in zip(frames, lengths, strict=True)]
        whole = [codec.follow(frame, undisturbed, active) for frame in frames]
        for both, alone in zip(ours, whole, strict=True):
            assert torch.equal(both[[0, 2]], alone[[0, 2]])
        latents = torch.stack(ours)[:, 1]
        assert relative_error(latents, padded_within(codec_dir, pcm[1], 9 * FRAME + ends)) < 1e-5
        assert relative_error(latents[10:], torch.stack(whole)[10:, 1]) > 1e-4, "it could not have failed"


@torch.inference_mode()
def padded_within(folder: Path, pcm: Tensor, end: int) -> Tensor:
    """Latents [F, hidden] of pcm [F * 1920]; from sample `end` to the end of its frame each layer's input is zero."""
    model = MimiModel.from_pretrained(folder).eval()
    frames, until = len(pcm) // FRAME, -(-end // FRAME)

    def end_early(conv: MimiConv1d, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = given[0].clone()
        hop = FRAME * frames // x.shape[2]
        if conv.pad_mode == "replicate":
            last = (end - 1) // hop
            x[..., last : until * FRAME // hop] = x[..., last : last + 1]
        else:
            x[..., -(-end // hop) : until * FRAME // hop] = 0
        return (x, *given[1:])

    for module in model.modules():
        if isinstance(module, MimiConv1d):
            module.register_forward_pre_hook(end_early)
    latents: Tensor = model.encoder(pcm[None, None]).latents[0].T
    return latents


def test_fewer_codebooks_are_the_first_ones_and_only_they_are_loaded(codec_dir: Path) -> None:
    """Pins memory spent on 32 codebooks where a decoder uses 4, and the wrong ones of them."""
    pcm = torch.from_numpy(speech(6))
    few, many = load_codec(codec_dir, 3), load_codec(codec_dir, 8)
    assert few.quantizer.codebooks.shape[0] == few.quantizer.latents.shape[0] == 3
    assert torch.equal(stream(few, pcm)[0], stream(many, pcm)[0][:, :3])


@pytest.mark.parametrize("num_codebooks", [1, 9])
def test_codebooks_that_the_codec_lacks_are_refused(codec_dir: Path, num_codebooks: int) -> None:
    """Pins an index error deep in the loader when decoder and codec do not belong together."""
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_codec(codec_dir, num_codebooks)


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """Steps of (batch, slots that encode, slots that decode, slots reset first), the slots as bit masks."""
    masks = st.integers(0, 2**SLOTS - 1)
    often = st.one_of(st.just(2**SLOTS - 1), masks)
    rarely = st.one_of(*[st.just(0)] * 9, masks)
    return draw(st.lists(st.tuples(st.integers(1, SLOTS), often, often, rarely), min_size=20, max_size=40))


@pytest.fixture(scope="module")
def judged(codec_dir: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Audio of as many streams as slots, with its codes and decoded audio offline."""
    pcm = streams(40)
    return pcm.view(SLOTS, -1, FRAME), *offline(codec_dir, pcm, 4)


@pytest.mark.twice
@settings(max_examples=12)
@given(schedules())
def test_streams_out_of_step_each_equal_their_own_file(
    codec: StreamingMimi, judged: tuple[Tensor, Tensor, Tensor], schedule: list[tuple[int, int, int, int]]
) -> None:
    """Pins state that leaks: between slots, from idle slots that are computed along, from the stream before a reset,
    from memory never written.
    """
    pcm, codes, audio = judged
    audio = audio.view(SLOTS, -1, FRAME)
    state = poisoned(codec, SLOTS)
    encoded, decoded = [0] * SLOTS, [0] * SLOTS

    def mask(bits: int, batch: int) -> Tensor:
        return torch.tensor([bool(bits >> slot & 1) for slot in range(batch)])

    for batch, encoding, decoding, resetting in schedule:
        for half in (state.encoder, state.decoder):  # their content stays, and must not matter
            half.frames.masked_fill_(mask(resetting, SLOTS), 0)
        for slot in mask(resetting, SLOTS).nonzero().flatten().tolist():
            encoded[slot] = decoded[slot] = 0
        ours = codec.encode(torch.stack([pcm[s, encoded[s]] for s in range(batch)]), state, mask(encoding, batch))
        fed = torch.stack([codes[s, decoded[s]] for s in range(batch)])
        heard = codec.decode(fed, state, mask(decoding, batch))
        for slot in range(batch):
            if encoding >> slot & 1:
                assert torch.equal(ours[slot], codes[slot, encoded[slot]]), (slot, encoded[slot])
                encoded[slot] += 1
            if decoding >> slot & 1:
                assert relative_error(heard[slot], audio[slot, decoded[slot]]) < 1e-4, (slot, decoded[slot])
                decoded[slot] += 1
    assert state.encoder.frames.tolist() == encoded
    assert state.decoder.frames.tolist() == decoded


@pytest.mark.twice
@pytest.mark.parametrize("cut", [1, 3, 4])
@pytest.mark.parametrize("length", [3, 4, 12, 23])
def test_a_rewound_stream_goes_on_as_if_it_had_never_gone_there(codec: StreamingMimi, length: int, cut: int) -> None:
    """Pins a context or a key that the cut frames overwrote. Exact, and so are the slots that idled meanwhile."""
    cut = min(cut, length)
    pcm = streams(length + 8, 3).view(3, -1, FRAME)
    away = torch.from_numpy(speech(cut, 99)).view(-1, FRAME)

    def run(astray: bool) -> list[Tensor]:
        state = poisoned(codec, 3, rewind_frames=4)
        after = []
        for index in range(length + cut + 4):
            active = torch.tensor([True, True, True])
            frames = pcm[:, index].clone()
            if length <= index < length + cut:  # the first slot goes astray or idles, the last one idles
                active = torch.tensor([astray, True, False])
                frames[0] = away[index - length]
            elif index >= length + cut:
                frames[0], frames[2] = pcm[0, index - cut], pcm[2, index - cut]
            if astray and index == length + cut:
                for half in (state.encoder, state.decoder):
                    half.frames[0] -= cut
            codes = codec.encode(frames, state, active)
            audio = codec.decode(codes, state, active)
            if index >= length + cut:
                after.extend((codes, audio))
        return after

    for ours, wanted in zip(run(True), run(False), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.twice
def test_scrub_forgets_even_nan(codec: StreamingMimi) -> None:
    """Pins a slot that stays poisoned for every later session once one of them fed NaN."""
    state, fresh = codec.init_state(2), codec.init_state(2)
    both = torch.tensor([True, True])
    for _ in range(3):
        codec.encode(torch.full((2, FRAME), torch.nan), state, torch.tensor([False, True]))
    for half in (state.encoder, state.decoder):
        for memory in (half.contexts, half.ring.keys, half.ring.values):
            memory[1] = torch.nan
    state.scrub(1)
    pcm = streams(14, 2).view(2, -1, FRAME)
    for index in range(14):
        codes, wanted = codec.encode(pcm[:, index], state, both), codec.encode(pcm[:, index], fresh, both)
        assert torch.equal(codes, wanted)
        assert torch.equal(codec.decode(codes, state, both), codec.decode(wanted, fresh, both))


@pytest.mark.twice
def test_following_is_encoding_without_the_codes(codec: StreamingMimi) -> None:
    """Pins an encoder that is warm after listening only, not after hearing a continuation."""
    pcm = streams(14, 1).view(1, -1, FRAME)
    state, other = codec.init_state(1), codec.init_state(1)
    for index in range(12):
        codec.encode(pcm[:, index], state, ON)
        codec.follow(pcm[:, index], other, ON)
    for index in range(12, 14):
        assert torch.equal(codec.encode(pcm[:, index], state, ON), codec.encode(pcm[:, index], other, ON))


def test_bfloat16_is_near(codec_dir: Path) -> None:
    """Pins a float32 tensor left in the path, which would not even run, or a sum in the wrong type."""
    pcm = torch.from_numpy(speech(14))
    codes, audio = stream(load_codec(codec_dir), pcm)
    low = load_codec(codec_dir, dtype=torch.bfloat16)
    state = low.init_state(1)
    heard = torch.cat([low.decode(frame[None], state, ON)[0] for frame in codes])
    assert relative_error(heard, audio) < 0.1
    assert (stream(low, pcm)[0][:, 0] == codes[:, 0]).float().mean() > 0.5
