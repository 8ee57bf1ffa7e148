"""The frame step against the published batch pipeline, and slots against themselves: alone, rewound, reopened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming.config import Sampling
from streaming.frame_step import FrameStep, StepResult
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.slot_copy import SlotCopy
from tests.reference import FRAME, load_codec, load_decoder, published_pipeline, relative_error, speech

GREEDY = Sampling(temperature=0.0)
SAMPLED = Sampling(temperature=0.8, seed=5)
WINDOW = 6
REWIND = 4

Audio = NDArray[np.float32]
Codes = NDArray[np.int64]


def advance(step: FrameStep, slots: dict[int, Audio | None], lengths: dict[int, int] | None = None) -> StepResult:
    """One step, with a row for each slot in their order: those with a frame listen, those with None speak, with what
    they must not read in their rows. lengths: of frames that are not whole.

    Returns a result by slot, not by row, with zeros where a slot took no part.
    """
    pcm = speech(len(slots), seed=77).reshape(-1, FRAME)
    for row, frame in enumerate(slots.values()):
        if frame is not None:
            pcm[row] = frame
    listening = np.array([frame is not None for frame in slots.values()])
    ends = np.array([(lengths or {}).get(slot, FRAME) for slot in slots])
    named = np.array(list(slots))
    result = step(named, pcm, listening, ~listening, ends)
    fields = {"pcm": result.pcm, "codes": result.codes, "ended": result.ended, "broken": result.broken}
    spread = {name: np.zeros((step.num_slots, *rows.shape[1:]), rows.dtype) for name, rows in fields.items()}
    for name, rows in fields.items():
        spread[name][named] = rows
    return StepResult(**spread)


def frames_of(count: int, seed: int = 0) -> Audio:
    return speech(count, seed).reshape(count, FRAME)


def run(step: FrameStep, slot: int, prompt: Audio, spoken: int) -> tuple[Codes, Audio]:
    """Listen to `prompt` [F, 1920] and speak `spoken` frames. All codes [F + n, Q] and all audio [F + n, 1920]."""
    results = [advance(step, {slot: frame}) for frame in prompt]
    results += [advance(step, {slot: None}) for _ in range(spoken)]
    return np.stack([r.codes[slot] for r in results]), np.stack([r.pcm[slot] for r in results])


def opened(step: FrameStep, *sampling: Sampling) -> FrameStep:
    for slot, options in enumerate(sampling):
        step.open(slot, options)
    return step


@pytest.mark.twice
@pytest.mark.parametrize("variant", [{}, {"num_codebooks": 8}, {"shuffled": True, "bos": False}], ids=str)
@pytest.mark.parametrize("slot", [0, 2])
def test_greedy_speech_equals_the_published_batch_pipeline(
    codec_dir: Path, decoder_checkpoint: Callable[..., Path], variant: dict[str, object], slot: int
) -> None:
    """Pins everything between the stages: a frame late, codebooks swapped, a seam at the hand-over, a cold codec."""
    model_dir = decoder_checkpoint(**variant)
    decoder = load_decoder(model_dir)
    books = decoder.num_codebooks
    step = opened(FrameStep(load_codec(codec_dir, books), decoder, 3, 60, REWIND), GREEDY, GREEDY, GREEDY)
    prompt = frames_of(9, seed=slot)
    wanted = published_pipeline(codec_dir, model_dir, prompt.reshape(-1), 14)
    assert not wanted.ended
    assert len(np.unique(wanted.codes)) > 20
    codes, audio = run(step, slot, prompt, 14)
    assert np.array_equal(codes[:9], wanted.prompt_codes)
    assert np.array_equal(codes[9:], wanted.codes)
    assert relative_error(audio.reshape(-1), wanted.pcm) < 1e-4
    assert step.frames(slot) == 23


def test_the_end_comes_where_the_published_pipeline_has_it(
    codec_dir: Path, decoder_checkpoint: Callable[..., Path]
) -> None:
    """Pins `</audio>` missed, drawn within a frame, or a frame late."""
    model_dir = decoder_checkpoint(tie_word_embeddings=True)
    step = FrameStep(load_codec(codec_dir), load_decoder(model_dir), 1, 60, REWIND)
    lengths = set()
    for seed in range(20):
        prompt = frames_of(3, seed)
        wanted = published_pipeline(codec_dir, model_dir, prompt.reshape(-1), 25)
        step.open(0, GREEDY)
        for frame in prompt:
            advance(step, {0: frame})
        for index in range(25):
            result = advance(step, {0: None})
            assert result.ended[0] == (wanted.ended and index == len(wanted.codes))
            if result.ended[0]:
                break
            assert np.array_equal(result.codes[0], wanted.codes[index])
        if wanted.ended:
            lengths.add(len(wanted.codes))
        if len(lengths) > 1:
            return
    pytest.fail(f"the checkpoint ends too seldom to show anything: {lengths}")


Plan = list[list[str]]
"""What each slot does in each step: "l", "s" or "-"."""


def random_plan(random: np.random.Generator, steps: int, slots: int) -> Plan:
    """Turns of some frames, with pauses; every slot listens first."""
    plan = []
    for _ in range(slots):
        doing = ["-"] * int(random.integers(4)) + ["l"]
        while len(doing) < steps:
            doing += [str(random.choice(["l", "s", "-"], p=[0.4, 0.4, 0.2]))] * int(random.integers(1, 6))
        plan.append(doing[:steps])
    return [list(step) for step in zip(*plan, strict=True)]


@pytest.mark.twice
@pytest.mark.parametrize(
    ("sampling", "seed"),
    [(GREEDY, 0), (SAMPLED, 1), (Sampling(temperature=1.5, top_k=0, top_p=0.9, seed=2**62), 2)],
)
def test_sessions_out_of_step_each_say_what_they_say_alone(
    codec: StreamingMimi, decoder: LlamaDecoder, sampling: Sampling, seed: int
) -> None:
    """Pins a session that changes with its neighbours or its slot: through masks, the batch's width, the order of its
    rows, draws, or idle steps. Long enough to slide.
    """
    slots, steps, random = 4, 40, np.random.default_rng(seed)
    plan = random_plan(random, steps, slots)
    heard = [frames_of(steps, seed=10 + slot) for slot in range(slots)]
    together = opened(FrameStep(codec, decoder, slots, WINDOW, REWIND), *[sampling] * slots)
    alone = [opened(FrameStep(codec, decoder, 1, WINDOW, REWIND), sampling) for _ in range(slots)]
    spoken = 0
    for index, doing in enumerate(plan):
        order = [slot for slot in random.permutation(slots).tolist() if doing[slot] != "-"]
        part = {slot: heard[slot][index] if doing[slot] == "l" else None for slot in order}
        if not part:
            continue
        result = advance(together, part)
        for slot, frame in part.items():
            single = advance(alone[slot], {0: frame})
            assert result.ended[slot] == single.ended[0]
            if not result.ended[slot]:
                assert np.array_equal(result.codes[slot], single.codes[0]), (index, slot)
                assert np.array_equal(result.pcm[slot], single.pcm[0]), "to the last bit"
                spoken += frame is None
    assert [together.frames(slot) for slot in range(slots)] == [one.frames(0) for one in alone]
    assert spoken > steps


@pytest.mark.twice
@pytest.mark.parametrize(("heard", "cut"), [(2, 0), (2, 1), (2, REWIND), (0, REWIND), (30, 3), (30, REWIND)])
def test_a_rewound_session_goes_on_as_if_it_had_never_said_it(
    codec: StreamingMimi, decoder: LlamaDecoder, heard: int, cut: int
) -> None:
    """Pins an interruption that leaves a trace: in the codec, the context, the numbers of the draws, or the count of
    the frames that the encoder heard. Exact, after the context has slid too.
    """

    def session(astray: bool) -> list[StepResult]:
        step = opened(FrameStep(codec, decoder, 2, WINDOW, REWIND), SAMPLED, SAMPLED)
        for frame in frames_of(4):
            advance(step, {0: frame})
        for _ in range(heard):
            advance(step, {0: None})
        for _ in range(cut):  # the neighbour listens meanwhile
            advance(step, {0: None, 1: frames_of(1)[0]} if astray else {1: frames_of(1)[0]})
        if astray:
            step.rewind(0, cut)
        assert step.frames(0) == 4 + heard
        results = [advance(step, {0: frame}) for frame in frames_of(3, seed=1)]
        return results + [advance(step, {0: None}) for _ in range(8)]

    for ours, wanted in zip(session(True), session(False), strict=True):
        assert np.array_equal(ours.codes[0], wanted.codes[0])
        assert np.array_equal(ours.pcm[0], wanted.pcm[0])
        assert ours.ended[0] == wanted.ended[0]


def test_turns_interrupted_again_and_again_leave_no_trace(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins a rewind that is exact once only: each cut writes over what the next one needs."""
    random = np.random.default_rng(3)
    ours, wanted = (opened(FrameStep(codec, decoder, 1, WINDOW, REWIND), SAMPLED) for _ in range(2))
    for turn in range(8):
        for frame in frames_of(int(random.integers(1, 4)), seed=turn):
            assert np.array_equal(advance(ours, {0: frame}).pcm, advance(wanted, {0: frame}).pcm)
        for _ in range(int(random.integers(0, 5))):
            assert np.array_equal(advance(ours, {0: None}).pcm, advance(wanted, {0: None}).pcm)
        cut = int(random.integers(0, REWIND + 1))
        ended = [bool(advance(ours, {0: None}).ended[0]) for _ in range(cut)]
        ours.rewind(0, cut - sum(ended))
        assert ours.frames(0) == wanted.frames(0)


def test_the_encoder_hears_what_was_spoken_once_the_audio_is_there(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins a listener who waits for it, a frame that is heard twice, and a slot that hears what another said."""
    step = opened(FrameStep(codec, decoder, 3, WINDOW, REWIND), SAMPLED, SAMPLED, SAMPLED)
    run(step, 0, frames_of(2), 0)
    run(step, 2, frames_of(2), 0)
    heard = step._device.codec_state.encoder.frames
    advance(step, {2: None, 1: frames_of(1)[0], 0: None})
    assert heard.tolist() == [2, 1, 2, 0]
    step.follow()
    step.follow()
    assert heard.tolist() == [3, 1, 3, 0]
    advance(step, {2: None})
    step.rewind(2, 2)
    assert heard.tolist() == [3, 1, 2, 0], "a rewind takes back what was heard by then"


def test_listened_frames_are_rewound_too(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins an encoder rewound by another count than the decoders: by spoken frames, or by heard ones alone."""

    def session(astray: bool) -> list[StepResult]:
        step = opened(FrameStep(codec, decoder, 1, WINDOW, REWIND), SAMPLED)
        for frame in frames_of(5):
            advance(step, {0: frame})
        if astray:
            for frame in (None, *frames_of(2, seed=8), None):
                advance(step, {0: frame})
            step.rewind(0, 4)
        return [advance(step, {0: frame}) for frame in (*frames_of(2, seed=1), None, None)]

    for ours, wanted in zip(session(True), session(False), strict=True):
        assert np.array_equal(ours.codes, wanted.codes)
        assert np.array_equal(ours.pcm, wanted.pcm)


def test_rewinding_further_than_was_kept_is_a_programmers_error(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins a stream continued in silence from contexts that belong to other frames."""
    step = opened(FrameStep(codec, decoder, 1, WINDOW, REWIND), GREEDY)
    advance(step, {0: frames_of(1)[0]})
    assert step.reach(0) == 1
    with pytest.raises(AssertionError):
        step.rewind(0, 2)
    with pytest.raises(AssertionError):
        step.rewind(0, -1)
    run(step, 0, frames_of(REWIND + 2), 0)
    assert step.reach(0) == REWIND
    with pytest.raises(AssertionError):
        step.rewind(0, REWIND + 1)
    step.rewind(0, REWIND - 1)
    assert step.reach(0) == 1
    step.rewind(0, 1)
    with pytest.raises(AssertionError):
        step.rewind(0, 1)
    run(step, 0, frames_of(1), 1)  # not yet beyond where it was: nothing more was kept
    assert step.reach(0) == 2
    step.rewind(0, 2)
    with pytest.raises(AssertionError):
        step.rewind(0, 1)
    step.open(0, GREEDY)
    assert (step.frames(0), step.reach(0)) == (0, 0)
    run(step, 0, frames_of(1), 0)
    assert step.reach(0) == 1, "a new session can be rewound as far as it goes, whatever was in the slot before it"


def test_the_end_token_does_not_advance_its_slot(
    codec: StreamingMimi, decoder: LlamaDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pins a session that cannot be continued after the model ended its speech: half a frame would stand in its
    context, and silence in the codec. Its neighbours hear nothing of it.
    """
    logits = decoder.logits

    def session(tries: bool) -> list[StepResult]:
        step = opened(FrameStep(codec, decoder, 3, WINDOW, REWIND), SAMPLED, SAMPLED, SAMPLED)
        results = [advance(step, {0: a, 1: b}) for a, b in zip(frames_of(8), frames_of(8, 1), strict=True)]

        def ending(hidden: Tensor, codebook: int) -> Tensor:
            out = logits(hidden, codebook).clone()
            if tries:
                out[2, -1] += 1000.0  # the second slot's row alone; forbidden within a frame, and stays so
            return out

        with monkeypatch.context() as patch:
            patch.setattr(decoder, "logits", ending)
            for frame in frames_of(2, seed=2):
                result = advance(step, {0: None, 2: frame} | ({1: None} if tries else {}))
                assert result.ended.tolist() == [False, tries, False]
                results.append(result)
        assert [step.frames(slot) for slot in range(3)] == [10, 8, 2]
        later = zip(frames_of(4, 3), [None] * 4, strict=True)
        return (
            results
            + [advance(step, {0: None, 1: mine, 2: other}) for mine, other in later]
            + [advance(step, {1: None}) for _ in range(4)]
        )

    for index, (ours, wanted) in enumerate(zip(session(True), session(False), strict=True)):
        slots = [0, 2] if index in (8, 9) else [1] if index >= 14 else [0, 1, 2] if index > 9 else [0, 1]
        assert np.array_equal(ours.codes[slots], wanted.codes[slots])
        assert np.array_equal(ours.pcm[slots], wanted.pcm[slots])


@pytest.mark.twice
def test_open_leaves_nothing_of_the_session_before(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins a voice that reaches the next user, and a slot lost for good to one NaN. The prefix must outlive both."""

    def session(used: bool) -> tuple[list[StepResult], FrameStep]:
        step = FrameStep(codec, decoder, 2, WINDOW, REWIND)
        if used:
            step.open(1, Sampling(temperature=2.0, top_k=3, top_p=0.5, seed=99))
            run(step, 1, frames_of(9, seed=50), 3)
            advance(step, {1: np.full(FRAME, np.nan, np.float32)})
            for half in (step._device.codec_state.encoder, step._device.codec_state.decoder):
                for memory in (half.contexts, half.ring.keys, half.ring.values):
                    memory[1] = torch.nan
            prefix = decoder.prefix  # its values are constants that no step writes
            step._device.decoder_state.ring.keys[1] = torch.nan
            step._device.decoder_state.ring.values[1, :, :, prefix:] = torch.nan
            step._device.decoder_state.lasts[1] = 7
        step.open(0, GREEDY)
        step.open(1, SAMPLED)
        assert step.frames(1) == 0
        results = [advance(step, {0: frame, 1: frame}) for frame in frames_of(8)]
        return results + [advance(step, {0: None, 1: None}) for _ in range(8)], step

    ours, step = session(True)
    wanted, _ = session(False)
    for one, other in zip(ours, wanted, strict=True):
        assert np.array_equal(one.codes, other.codes)
        assert np.array_equal(one.pcm, other.pcm)
        assert np.isfinite(one.pcm).all()
    with pytest.raises(AssertionError):
        opened(step, GREEDY).rewind(0, 1)


def test_a_session_that_feeds_nan_harms_itself_alone(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins a broken microphone that silences every user of the server."""

    def session(frame: Audio) -> list[StepResult]:
        step = opened(FrameStep(codec, decoder, 2, WINDOW, REWIND), SAMPLED, SAMPLED)
        results = [advance(step, {0: good, 1: frame}) for good in frames_of(4)]
        return results + [advance(step, {0: None, 1: None}) for _ in range(4)]

    broken = session(np.full(FRAME, np.nan, np.float32))
    for ours, wanted in zip(broken, session(frames_of(1, 5)[0]), strict=True):
        assert ours.broken.tolist() == [False, True]
        assert not wanted.broken.any()
        assert np.array_equal(ours.codes[0], wanted.codes[0])
        assert np.array_equal(ours.pcm[0], wanted.pcm[0])


def _poison_the_decoder(step: FrameStep) -> None:
    step._device.decoder_state.ring.values[1, :, :, step._device.decoder.prefix :] = torch.nan


def _poison_what_is_heard(step: FrameStep) -> None:
    step._device.codec_state.encoder.contexts[1] = torch.nan


def _poison_what_is_said(step: FrameStep) -> None:
    step._device.codec_state.decoder.contexts[1] = torch.nan


@pytest.mark.twice
@pytest.mark.parametrize("poison", [_poison_the_decoder, _poison_what_is_heard, _poison_what_is_said])
@pytest.mark.parametrize("speaks", [False, True], ids=["listening", "speaking"])
def test_numbers_that_break_anywhere_are_told(
    codec: StreamingMimi, decoder: LlamaDecoder, poison: Callable[[FrameStep], None], speaks: bool
) -> None:
    """A NaN that came up where nobody looked was spoken, or silently fed to the model, for as long as the session
    lasted. What breaks while the encoder hears what was spoken is told with the next frame: the frame itself is sound,
    and may have been sent.
    """
    step = opened(FrameStep(codec, decoder, 2, WINDOW, REWIND), SAMPLED, SAMPLED)
    for first, second in zip(frames_of(4), frames_of(4, 1), strict=True):
        assert not advance(step, {0: first, 1: second}).broken.any()
    poison(step)
    if speaks and poison is _poison_what_is_heard:
        assert not advance(step, dict.fromkeys((0, 1))).broken.any()
    result = advance(step, dict.fromkeys((0, 1)) if speaks else {0: frames_of(1)[0], 1: frames_of(1, 2)[0]})
    assert result.broken.tolist() == [False, True]


def test_an_end_that_is_no_number_is_told(
    codec: StreamingMimi, decoder: LlamaDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end's logit was left out of the look at the others: where it alone broke, speech never ended."""
    step = opened(FrameStep(codec, decoder, 2, WINDOW, REWIND), SAMPLED, SAMPLED)
    advance(step, {0: frames_of(1)[0], 1: frames_of(1, 1)[0]})
    logits = decoder.logits

    def broken(hidden: Tensor, codebook: int) -> Tensor:
        out = logits(hidden, codebook).clone()
        out[1, -1] = torch.nan if codebook == 0 else -torch.inf
        return out

    monkeypatch.setattr(decoder, "logits", broken)
    assert advance(step, {0: None, 1: None}).broken.tolist() == [False, True]


def test_only_a_lost_device_is_the_end(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Too little memory for one wide step ended the server; or a lost device did not end it, and every session failed
    for as long as clients came.
    """
    step = FrameStep(codec, decoder, 1, WINDOW, REWIND)
    assert step.is_fatal(torch.AcceleratorError("an illegal memory access was encountered"))
    for error in (torch.OutOfMemoryError("no memory"), RuntimeError("shapes"), MemoryError(), ZeroDivisionError()):
        assert not step.is_fatal(error)


@pytest.mark.twice
def test_audio_is_read_where_a_row_listens_and_nowhere_else(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins rubbish in the row of a slot that speaks which ends up in its stream, rewound or not."""

    def session(rubbish: float) -> list[StepResult]:
        step = opened(FrameStep(codec, decoder, 2, WINDOW, REWIND), SAMPLED, SAMPLED)
        results = []
        plan = ["ll", "ll", "l-", "ls", "ss", "-s", "s-", "ss", "l-", "rr", "ll", "l-", "sl", "ss"]
        for index, doing in enumerate(plan):
            if doing == "rr":
                step.rewind(0, 2)
                step.rewind(1, 2)
                continue
            slots = np.array([slot for slot, what in enumerate(doing) if what != "-"])
            listening = np.array([doing[slot] == "l" for slot in slots])
            pcm = frames_of(2, seed=index)[slots]
            pcm[~listening] = rubbish
            results.append(step(slots, pcm, listening, ~listening))
        return results

    for ours, wanted in zip(session(np.nan), session(0.0), strict=True):
        assert np.array_equal(ours.pcm, wanted.pcm)


@pytest.mark.twice
def test_a_frame_that_ends_early_is_the_end_of_a_file_and_changes_no_bit_of_its_neighbours(
    codec: StreamingMimi, decoder: LlamaDecoder
) -> None:
    """Others listen and speak in the same step. What stands behind the frame's end is not read. Pins a batch that is
    computed differently because one of its rows is shorter.
    """
    ends = 300
    runs = []
    for lengths in ([FRAME, FRAME, FRAME], [FRAME, ends, FRAME]):
        step = opened(FrameStep(codec, decoder, 3, 30, REWIND), SAMPLED, GREEDY, SAMPLED)
        prompt = frames_of(4)
        for frame in prompt[:3]:
            advance(step, {0: frame, 1: frame, 2: frame})
        short = prompt[3].copy()
        short[ends:] = 0.5
        results = [
            advance(step, {0: prompt[3], 1: short, 2: None}, dict(enumerate(lengths))),
            *(advance(step, {0: None, 1: None, 2: None}) for _ in range(4)),
        ]
        runs.append(results)
    for whole, short in zip(*runs, strict=True):
        for slot in (0, 2):
            assert np.array_equal(whole.codes[slot], short.codes[slot])
            assert np.array_equal(whole.pcm[slot], short.pcm[slot])
    state, on = codec.init_state(1), torch.tensor([True])
    for frame in prompt[:3]:
        codec.encode(torch.from_numpy(frame)[None], state, on)
    wanted = codec.encode(torch.from_numpy(prompt[3])[None], state, on, torch.tensor([ends]))
    assert np.array_equal(runs[1][0].codes[1], wanted[0].numpy())
    assert not np.array_equal(runs[0][0].codes[1], wanted[0].numpy())


@pytest.mark.parametrize("lengths", [[0], [FRAME + 1], [-1], [FRAME, FRAME]], ids=str)
def test_a_length_that_is_none_is_a_programmers_error(
    codec: StreamingMimi, decoder: LlamaDecoder, lengths: list[int]
) -> None:
    """Pins a frame of no samples, after which the encoder would stand for something that was never said."""
    step = opened(FrameStep(codec, decoder, 1, 30, REWIND), GREEDY)
    yes = np.ones(1, np.bool_)
    with pytest.raises(AssertionError):
        step(np.zeros(1, np.int64), frames_of(1), yes, ~yes, np.array(lengths))


@pytest.mark.twice
def test_a_step_of_listening_leaves_what_a_mixed_step_leaves(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins the two ways through the decoder, one forward of Q tokens or Q of one, growing apart."""
    plain, mixed = (opened(FrameStep(codec, decoder, 2, WINDOW, REWIND), SAMPLED, SAMPLED) for _ in range(2))
    for step in (plain, mixed):
        advance(step, {1: frames_of(1, 9)[0]})
    for frame in frames_of(20):
        one, other = advance(plain, {0: frame}), advance(mixed, {0: frame, 1: None})
        assert np.array_equal(one.codes[0], other.codes[0])
        assert np.array_equal(one.pcm[0], other.pcm[0])
    for ours, wanted in zip(_memory(plain, 0), _memory(mixed, 0), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    for _ in range(4):
        assert np.array_equal(advance(plain, {0: None}).codes[0], advance(mixed, {0: None}).codes[0])


def _memory(step: FrameStep, slot: int) -> list[Tensor]:
    """What a slot's stream is made of: all that is within its windows, as floats."""
    step.follow()
    codec, state = step._device.codec_state, step._device.decoder_state
    decoder, encoder = codec.decoder, codec.encoder
    frames, books = step.frames(slot), step.num_codebooks
    ring = state.ring
    position = ring.prefix - 1 + torch.arange((frames - WINDOW) * books, frames * books)
    held = ring.index(position)
    parts = [
        ring.keys[slot, :, :, held],
        ring.values[slot, :, :, held],
        state.lasts[slot, (frames - 1) % state.lasts.shape[1]],
    ]
    for half in (encoder, decoder):
        parts.append(half.frames[slot])
        parts.append(half.contexts[slot, (frames - 1) % half.contexts.shape[1]])
        held = half.ring.index(torch.arange(2 * frames - 20, 2 * frames))
        parts += [half.ring.keys[slot, :, :, held], half.ring.values[slot, :, :, held]]
    return [part.float() for part in parts]


@pytest.mark.parametrize("slots", [[0, 0], [2], [-1], [0, 3], []], ids=str)
def test_slots_that_there_are_not_or_twice_are_a_programmers_error(
    codec: StreamingMimi, decoder: LlamaDecoder, slots: list[int]
) -> None:
    """Pins a row that writes into the spare slot's memory, or two that write into one's."""
    step = opened(FrameStep(codec, decoder, 2, WINDOW, REWIND), GREEDY, GREEDY)
    yes = np.ones(len(slots), np.bool_)
    with pytest.raises(AssertionError):
        step(np.array(slots, np.int64), frames_of(len(slots)), yes, ~yes)


def test_a_row_neither_listens_nor_speaks_only_where_it_is_nobody_s(
    codec: StreamingMimi, decoder: LlamaDecoder
) -> None:
    """Pins a step that pays for sessions which have nothing to do."""
    step = opened(FrameStep(codec, decoder, 2, WINDOW, REWIND), GREEDY, GREEDY)
    for listening, speaking in (([True, False], [False, False]), ([True, True], [False, True])):
        with pytest.raises(AssertionError):
            step(np.arange(2), frames_of(2), np.array(listening), np.array(speaking))


def test_new_options_hold_from_the_next_token(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins a temperature changed between turns that is heard only in the next session."""
    ours, greedy = (
        opened(FrameStep(codec, decoder, 1, 30, REWIND), SAMPLED),
        opened(FrameStep(codec, decoder, 1, 30, REWIND), GREEDY),
    )
    ours.configure(0, GREEDY)
    assert np.array_equal(run(ours, 0, frames_of(3), 5)[0], run(greedy, 0, frames_of(3), 5)[0])
    ours.configure(0, SAMPLED)
    assert not all(np.array_equal(advance(ours, {0: None}).codes, advance(greedy, {0: None}).codes) for _ in range(5))


def test_a_seed_repeats_itself_and_another_does_not(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins a continuation that cannot be had again, and one that all users get."""
    step = FrameStep(codec, decoder, 3, WINDOW, REWIND)

    def spoken(slot: int, seed: int) -> Codes:
        step.open(slot, Sampling(temperature=1.0, seed=seed))
        return run(step, slot, frames_of(3), 8)[0]

    first = spoken(0, 1)
    assert np.array_equal(first, spoken(2, 1))
    assert not np.array_equal(first, spoken(0, 2))


def copied(
    step: FrameStep,
    slot: int,
    reach: int | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    base: SlotCopy | None = None,
    common: int = 0,
) -> SlotCopy:
    """A copy of a slot, with something that happens between its pieces."""
    copying = step.copy(slot, step.reach(slot) if reach is None else reach, base, common)
    while True:
        try:
            next(copying)
        except StopIteration as done:
            copy: SlotCopy = done.value
            return copy
        meanwhile()


def poison(step: FrameStep, slot: int) -> None:
    """Leave NaN in a slot wherever a stream could have left something."""
    for track in step._device.tracks():
        for tensor in (track.ring.keys[slot, :, :, track.ring.prefix :], track.ring.values[slot], track.history[slot]):
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
    step._device.decoder_state.ring.values[slot, :, :, : step._device.decoder.prefix] = (
        step._device.decoder._prefix_values
    )


def bystanders(step: FrameStep, frame: Audio) -> None:
    """A step in which slot 1 takes no part."""
    advance(step, {0: frame, 2: None})


@pytest.mark.twice
@pytest.mark.parametrize("seed", range(4))
def test_a_slot_that_was_copied_out_and_put_into_another_goes_on_to_the_bit(
    codec: StreamingMimi, decoder: LlamaDecoder, seed: int
) -> None:
    """Pins what a copy leaves out: a context, the last token, a piece of a ring that came round, how far it can be
    rewound; what of the slot's last stream it leaves in; and pieces that are copied while others advance.
    """
    random = np.random.default_rng(seed)
    stays = opened(FrameStep(codec, decoder, 3, WINDOW, REWIND), GREEDY, SAMPLED, GREEDY)
    other = opened(FrameStep(codec, decoder, 3, WINDOW, REWIND), GREEDY, GREEDY, GREEDY)
    heard = frames_of(100, seed)
    before = int(random.integers(1, 30)) if seed else 0
    for index in range(before):
        advance(stays, {1: heard[index] if index < 2 or random.random() < 0.5 else None})
        if random.random() < 0.1:
            stays.rewind(1, int(random.integers(0, stays.reach(1) + 1)))
    for index in range(5):
        advance(other, {0: heard[index], 2: heard[index]})
    poison(other, 1)
    copy = copied(stays, 1, meanwhile=lambda: bystanders(stays, heard[0]))
    putting = other.put(1, copy, SAMPLED)
    for _ in putting:
        advance(other, {0: None, 2: heard[3]})
    assert (other.frames(1), other.reach(1)) == (stays.frames(1), stays.reach(1))
    back = int(random.integers(0, stays.reach(1) + 1))
    for step in (stays, other):
        step.rewind(1, back)
    doing = [heard[60 + index] if random.random() < 0.4 or not before else None for index in range(15)]
    for frame in doing:
        results = [advance(step, {1: frame}) for step in (stays, other)]
        assert np.array_equal(results[0].pcm[1], results[1].pcm[1])
        assert np.array_equal(results[0].codes[1], results[1].codes[1])
        assert results[0].ended[1] == results[1].ended[1]


@pytest.mark.parametrize("before", [1, 5, 30])
@pytest.mark.parametrize("after", [0, 2, 20])
def test_a_slot_goes_back_to_a_copy_that_was_taken_while_it_went_on(
    codec: StreamingMimi, decoder: LlamaDecoder, before: int, after: int
) -> None:
    """Pins a mark that holds what came after it, and going back that spares what the ring has lost."""
    heard = frames_of(40, seed=before)
    step = opened(FrameStep(codec, decoder, 1, WINDOW, REWIND), SAMPLED)
    for frame in heard[:before]:
        advance(step, {0: frame})
    went_on = [0]

    def go_on() -> None:
        if went_on[0] < min(REWIND, after):
            went_on[0] += 1
            first.append(advance(step, {0: None}))

    first: list[StepResult] = []
    copy = copied(step, 0, reach=0, meanwhile=go_on)
    while len(first) < after:
        first.append(advance(step, {0: None}))
    longest = step.frames(0)
    for _ in step.put(0, copy, SAMPLED, common=before, longest=longest):
        pass
    assert (step.frames(0), step.reach(0)) == (before, 0)
    for was in first:
        now = advance(step, {0: None})
        assert np.array_equal(now.pcm, was.pcm) and np.array_equal(now.codes, was.codes)


def test_copies_of_one_stream_share_what_has_not_changed(codec: StreamingMimi, decoder: LlamaDecoder) -> None:
    """Pins a mark at every turn that costs a whole window each."""
    step = opened(FrameStep(codec, decoder, 1, 64, REWIND), GREEDY)
    for frame in frames_of(50):
        advance(step, {0: frame})
    first = copied(step, 0, reach=0)
    for frame in frames_of(4, seed=1):
        advance(step, {0: frame})
    second, alone = copied(step, 0, reach=0, base=first, common=50), copied(step, 0, reach=0)
    new = {piece: size for piece, size in second.pieces().items() if piece not in first.pieces()}
    assert sum(new.values()) < sum(alone.pieces().values()) / 2
    for name, track in second.tracks.items():
        for block, wanted in zip(track.blocks, alone.tracks[name].blocks, strict=True):
            assert (block.first, block.end) == (wanted.first, wanted.end)
            assert torch.equal(block.both, wanted.both)
