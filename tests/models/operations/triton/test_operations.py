"""The whole decoder on kernels: against `transformers`, and against itself on plain operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streaming.frame_step import FrameStep
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton.operations import TritonOperations
from tests.models.operations.triton.steps import assert_same_steps
from tests.models.test_llama import CODEBOOK_SIZE, assert_near, feed, judge
from tests.reference import load_codec, load_decoder


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(CODEBOOK_SIZE, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("by_token", [False, True], ids=["by-frame", "by-token"])
def test_logits_are_those_of_the_whole_prompt(device: torch.device, decoder_dir: Path, by_token: bool) -> None:
    """Pins a residual added twice or never, a layer's ring taken for another's, a head without its mask."""
    decoder = load_decoder(decoder_dir, device=device, operations=TritonOperations())
    stream = codes(2, 4)
    state = decoder.init_state(1, 20)
    state.ring.keys.fill_(torch.nan)
    state.ring.values[:, :, :, decoder.prefix :] = torch.nan
    active = torch.ones(1, dtype=torch.bool, device=device)
    ours = [feed(decoder, state, frame[None].to(device), active, 20, by_token, columns=1) for frame in stream]
    with torch.inference_mode(False):
        wanted = judge(decoder_dir, stream)
    assert_near(torch.cat(ours).cpu(), wanted)


def test_rows_that_slide_and_idle_say_what_plain_operations_say(device: torch.device, decoder_dir: Path) -> None:
    """Pins a window that slides otherwise, an idle row whose stream is touched, and a row that is the slot of its own
    number.
    """
    fused, plain = (
        load_decoder(decoder_dir, device=device, operations=each) for each in (TritonOperations(), TorchOperations())
    )
    states = [fused.init_state(3, 2, 1), plain.init_state(3, 2, 1)]
    slots = torch.tensor([2, 0], device=device)
    for number, frame in enumerate(codes(5, 2, 4).to(device)):
        active = torch.tensor([True, number % 3 != 1], device=device)
        ours, wanted = (
            feed(decoder, state, frame, active, 2, number % 2 == 0, fused.columns_for(states[1], 100), slots)
            for decoder, state in zip((fused, plain), states, strict=True)
        )
        assert_near(ours, wanted)
    assert states[0].frames.tolist() == states[1].frames.tolist() == [3, 0, 5]


def test_a_step_on_kernels_says_what_a_plain_step_says(
    device: torch.device, codec_dir: Path, decoder_dir: Path
) -> None:
    """Pins what is between the kernels: flags, draws' numbers, a slot that listens beside one that speaks."""
    codec = load_codec(codec_dir, device=device)
    fused, plain = (
        FrameStep(codec, load_decoder(decoder_dir, device=device, operations=each), 2, 3, 1)
        for each in (TritonOperations(), TorchOperations())
    )
    assert_same_steps(fused, plain, ["ll", "sl", "ss"] if device.type == "cpu" else ["ll", "sl", "ss", "-s"] * 8)
    assert [fused.frames(slot) for slot in (0, 1)] == [plain.frames(slot) for slot in (0, 1)]


@pytest.mark.parametrize("kernel", ["attend", "begin_frame", "norm", "matvec"])
def test_a_decoder_without_one_of_its_kernels_says_the_same(
    device: torch.device, decoder_dir: Path, kernel: str
) -> None:
    """Pins masks that nobody makes, because attention is a kernel's or was: what one kernel leaves to another."""
    fused, plain = (
        load_decoder(decoder_dir, device=device, operations=each)
        for each in (TritonOperations(without={kernel}), TorchOperations())
    )
    states = [fused.init_state(2, 2, 1), plain.init_state(2, 2, 1)]
    slots, active = torch.tensor([1], device=device), torch.ones(1, dtype=torch.bool, device=device)
    for frame in codes(3, 1, 4).to(device):
        ours, wanted = (
            feed(decoder, state, frame, active, 2, False, plain.columns_for(states[1], 100), slots)
            for decoder, state in zip((fused, plain), states, strict=True)
        )
        assert_near(ours, wanted)
