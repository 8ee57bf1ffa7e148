"""The whole path, over a real WebSocket, against the published batch pipeline run by `transformers` alone."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from numpy.typing import NDArray
from transformers import MimiModel

from streaming.audio import FRAME, AudioReader, to_float, to_int16
from streaming.client.client import Audio, ContinuationClient
from streaming.config import Sampling
from streaming.engine.engine import Engine
from streaming.frame_step import FrameStep, StepResult
from streaming.protocol import messages
from streaming.protocol.messages import SamplingOptions, SessionStart
from streaming.terminal.sources import file_pieces
from tests.reference import load_codec, load_decoder, published_pipeline, speech
from tests.server.live_server import Client, LiveServer, client, run, serving

CONTEXT_FRAMES = 60
GREEDY = SamplingOptions(temperature=0.0, seed=1)


class RecordingStep:
    """The real step, keeping the codes of each slot's stream as the context holds them."""

    def __init__(self, step: FrameStep) -> None:
        self._step = step
        self.num_slots, self.num_codebooks = step.num_slots, step.num_codebooks
        self.context_frames, self.rewind_frames = step.context_frames, step.rewind_frames
        self.frames, self.configure, self.is_fatal = step.frames, step.configure, step.is_fatal
        self.reach, self.follow, self.identity = step.reach, step.follow, step.identity
        self.copy, self.put, self.pack, self.unpack = step.copy, step.put, step.pack, step.unpack
        self.codes: dict[int, list[NDArray[np.int64]]] = defaultdict(list)

    def open(self, slot: int, sampling: Sampling) -> None:
        self.codes[slot] = []
        self._step.open(slot, sampling)

    def rewind(self, slot: int, frames: int) -> None:
        del self.codes[slot][len(self.codes[slot]) - frames :]
        self._step.rewind(slot, frames)

    def __call__(
        self,
        slots: NDArray[np.int64],
        pcm: NDArray[np.float32],
        listening: NDArray[np.bool_],
        speaking: NDArray[np.bool_],
        lengths: NDArray[np.int64],
    ) -> StepResult:
        result = self._step(slots, pcm, listening, speaking, lengths)
        for row in np.flatnonzero(~result.ended).tolist():
            self.codes[int(slots[row])].append(result.codes[row])
        return result

    def stream(self, slot: int) -> NDArray[np.int64]:
        """Codes [F, Q] that the slot's context is made of."""
        return np.stack(self.codes[slot])


@pytest.fixture(autouse=True)
def _never_overloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the machine does: a session that is refused says nothing about tokens."""
    monkeypatch.setattr(Engine, "overloaded", False)


@contextmanager
def _serving(codec: Path, decoder: Path, slots: int = 4) -> Iterator[tuple[LiveServer, RecordingStep]]:
    loaded = load_decoder(decoder)
    mimi = load_codec(codec, loaded.num_codebooks)
    step = RecordingStep(FrameStep(mimi, loaded, slots, CONTEXT_FRAMES, 16))
    with Engine(step, "tiny") as engine, serving(engine) as server:
        yield server, step


def _prompt(seed: int, samples: int = 20 * FRAME) -> NDArray[np.int16]:
    return to_int16(speech(-(-samples // FRAME), seed)[:samples])


@pytest.mark.parametrize("num_codebooks", [4, 8])
def test_the_continuation_is_the_published_pipelines_token_for_token(
    num_codebooks: int,
    codec_checkpoint: Callable[..., Path],
    decoder_checkpoint: Callable[..., Path],
) -> None:
    """Encode all, codes as text, generate held to each slot's tokens, decode prompt and continuation as one stream."""
    codec, decoder = codec_checkpoint(), decoder_checkpoint(num_codebooks=num_codebooks)
    prompt = _prompt(3, 20 * FRAME - 700)
    wanted = published_pipeline(codec, decoder, to_float(prompt), 25)

    async def scenario(url: str) -> NDArray[np.int16]:
        async with client(url, SessionStart(pace="fast", sampling=GREEDY, max_seconds=2.0)) as session:
            await session.hear(prompt, piece=1000)
            await session.speak()
            return session.spoken()

    with _serving(codec, decoder) as (server, step):
        pcm = run(scenario(server.url))
    assert len(wanted.codes) > 0
    np.testing.assert_array_equal(step.stream(0), np.concatenate((wanted.prompt_codes, wanted.codes)))
    expected = to_int16(wanted.pcm[len(wanted.prompt_codes) * FRAME :]).astype(int)
    assert len(pcm) == len(expected)
    assert np.abs(pcm - expected).max() <= 1, "within the wire's 16 bits"


@pytest.mark.parametrize("num_codebooks", [4, 8])
def test_a_prompt_of_any_length_is_the_published_pipelines(
    num_codebooks: int, codec_checkpoint: Callable[..., Path], decoder_checkpoint: Callable[..., Path]
) -> None:
    """The pipeline is given the samples that there are. Pins a last frame padded with silence on its way to the codec:
    other codes, and a continuation that had no token in common. Sessions end in the same steps as others, and in none.
    """
    codec, decoder = codec_checkpoint(), decoder_checkpoint(num_codebooks=num_codebooks)
    random = np.random.default_rng(num_codebooks)
    lengths = [1, 961, 1919, 3 * FRAME, *random.integers(2, 3 * FRAME, 3), *random.integers(3 * FRAME, 40_000, 2)]
    prompts = [_prompt(seed, int(length)) for seed, length in enumerate(lengths)]

    async def converse(url: str, prompt: NDArray[np.int16]) -> NDArray[np.int16]:
        start = SessionStart(pace="fast", lag="wait", sampling=GREEDY, max_seconds=0.8)
        async with client(url, start) as session:
            await session.hear(prompt, piece=1000)
            await session.speak()
            return session.spoken()

    async def together(url: str) -> list[NDArray[np.int16]]:
        return await asyncio.gather(*(converse(url, prompt) for prompt in prompts))

    with _serving(codec, decoder, slots=len(prompts)) as (server, _):
        heard = run(together(server.url))
    for prompt, pcm in zip(prompts, heard, strict=True):
        wanted = published_pipeline(codec, decoder, to_float(prompt), 10)
        expected = to_int16(wanted.pcm[len(wanted.prompt_codes) * FRAME :]).astype(int)
        assert len(pcm) == len(expected), len(prompt)
        assert np.abs(pcm - expected).max(initial=0) <= 1, len(prompt)


def test_a_recording_of_any_rate_is_the_published_pipelines(tmp_path: Path, codec_dir: Path, decoder_dir: Path) -> None:
    """The pipeline resamples by torchaudio, the client by its own. Pins another filter, and samples rounded to 16 bits
    between client and server: either gives other codes now and then.
    """
    soundfile = pytest.importorskip("soundfile")
    random = np.random.default_rng(5)
    kinds = [
        (24_000, 1, "PCM_16"),
        (24_000, 1, "FLOAT"),
        (16_000, 1, "PCM_16"),
        (44_100, 2, "PCM_16"),
        (48_000, 1, "PCM_24"),
    ]
    paths = []
    for number, (rate, channels, subtype) in enumerate(kinds * 2):
        wave = np.stack([speech(40, 2 * number + channel) for channel in range(channels)], axis=1)
        paths.append(tmp_path / f"{number}.wav")
        soundfile.write(paths[-1], wave[: random.integers(20_000, 60_000)], rate, subtype=subtype)

    async def converse(url: str, path: Path) -> NDArray[np.int16]:
        heard = [np.zeros(0, np.int16)]
        with AudioReader(path) as reader:
            codecs = ("pcm16",) if reader.sixteen_bits else ("float32", "pcm16")
            start = SessionStart(pace="fast", lag="wait", sampling=GREEDY, max_seconds=0.4, codecs=codecs)
            async with ContinuationClient.connect(url, start) as session:
                async for piece in file_pieces(reader, realtime=False):
                    await session.send(piece)
                await session.speak()
                async for event in session.events():
                    if isinstance(event, messages.TurnDone):
                        break
                    if isinstance(event, Audio):
                        heard.append(event.pcm)
        return np.concatenate(heard)

    with _serving(codec_dir, decoder_dir, slots=1) as (server, step):
        for path in paths:
            pcm = run(converse(server.url, path))
            wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
            prompt = torchaudio.transforms.Resample(rate, 24_000)(torch.from_numpy(wave.mean(axis=1))).numpy()
            wanted = published_pipeline(codec_dir, decoder_dir, prompt, 5)
            codes = np.concatenate((wanted.prompt_codes, wanted.codes))
            np.testing.assert_array_equal(step.stream(0), codes, err_msg=str(path))
            expected = to_int16(wanted.pcm[len(wanted.prompt_codes) * FRAME :]).astype(int)
            assert np.abs(pcm - expected).max(initial=0) <= 1


def test_a_session_among_others_out_of_step_gives_what_it_gives_alone(codec_dir: Path, decoder_dir: Path) -> None:
    """Neighbours leaked into each other's batches, or moved each other's random numbers."""
    starts = [
        SessionStart(pace="fast", max_seconds=1.6, sampling=SamplingOptions(temperature=t, seed=seed, top_k=k))
        for t, seed, k in ((0.0, 1, 0), (0.8, 2, 30), (0.8, 2, 30), (1.0, 3, 0))
    ]
    prompts = [_prompt(seed, length) for seed, length in ((1, 40_000), (2, 9_000), (5, 77_777), (4, 1))]

    async def converse(url: str, number: int, delay: float) -> NDArray[np.int16]:
        await asyncio.sleep(delay)
        async with client(url, starts[number]) as session:
            for turn in (1, 2, 3):
                for at in range(0, len(prompts[number]), 5000):
                    await session.hear(prompts[number][at : at + 5000], turn=turn)
                    await asyncio.sleep(delay / 5)
                await session.speak(turn)
                if turn == 2:
                    await session.send(messages.Interrupt(turn=2, heard_samples=12 * FRAME))
                    await session.expect(messages.Interrupted)
            return np.concatenate([session.spoken(turn) for turn in (1, 2, 3)])

    async def together(url: str) -> list[NDArray[np.int16]]:
        return await asyncio.gather(*(converse(url, n, 0.01 * n) for n in range(4)))

    with _serving(codec_dir, decoder_dir) as (server, _):
        alone = [run(converse(server.url, n, 0.0)) for n in range(4)]
        crowd = run(together(server.url))
    for one, other in zip(alone, crowd, strict=True):
        assert len(one) > 0
        assert np.array_equal(one, other)


def _heard_codes(
    codec: Path, prompt: NDArray[np.int16], codes: NDArray[np.int64], second: NDArray[np.int16]
) -> NDArray[np.int64]:
    """Codes of a second prompt, encoded by `transformers` after the first and the continuation that was heard."""
    mimi = MimiModel.from_pretrained(codec).eval()
    books = codes.shape[1]
    with torch.inference_mode():
        first = torch.from_numpy(to_float(prompt))
        first_codes = mimi.encode(first[None, None], num_quantizers=books).audio_codes
        stream = torch.cat((first_codes, torch.from_numpy(codes).T[None]), dim=2)
        heard = mimi.decode(stream).audio_values[0, 0, len(prompt) :]
        whole = torch.cat((first, heard, torch.from_numpy(to_float(second))))
        return mimi.encode(whole[None, None], num_quantizers=books).audio_codes[0, :, stream.shape[2] :].T.numpy()


async def _interrupted_turn(session: Client, first: NDArray[np.int16], second: NDArray[np.int16], heard: int) -> None:
    await session.hear(first)
    await session.send(messages.Speak(turn=1))
    await session.send(messages.Played(turn=1, samples=0))
    await session.expect(messages.TurnSpeaking)
    await session.expect_audio(1, 8)
    await session.send(messages.Interrupt(turn=1, heard_samples=heard))
    await session.hear(second, turn=2)
    await session.send(messages.Speak(turn=2))
    done = await session.expect(messages.TurnDone)
    assert done.reason == "interrupted"
    assert (await session.expect(messages.TurnDone)).turn == 2


def test_after_an_interruption_the_session_goes_on_from_exactly_what_was_heard(
    codec_dir: Path, decoder_dir: Path
) -> None:
    """Shown by tokens: the context is the first prompt, what was heard, and the second prompt as heard after it.

    And its continuation is what a session gives that never said more than what was heard.
    """
    first, second = _prompt(6), _prompt(7, 8 * FRAME)
    start = SessionStart(sampling=GREEDY, max_seconds=4.0, lead_ms=800)
    short = SessionStart(pace="fast", sampling=GREEDY, max_seconds=5 * FRAME / 24_000)

    async def interrupted(url: str) -> NDArray[np.int16]:
        async with client(url, start) as session:
            await _interrupted_turn(session, first, second, 5 * FRAME + 1900)
            return session.spoken(2)

    async def never_said_more(url: str) -> NDArray[np.int16]:
        async with client(url, short) as session:
            await session.hear(first)
            await session.speak(1)
            await session.send(messages.SessionUpdate(max_seconds=4.0))
            await session.hear(second, turn=2)
            await session.speak(2)
            return session.spoken(2)

    with _serving(codec_dir, decoder_dir) as (server, step):
        pcm = run(interrupted(server.url))
        stream = step.stream(0)
        expected = run(never_said_more(server.url))
        np.testing.assert_array_equal(stream, step.stream(0))
    assert len(pcm) == 50 * FRAME
    assert np.abs(pcm.astype(int) - expected).max() <= 1

    prompt, said = stream[:20], stream[20:25]
    published = published_pipeline(codec_dir, decoder_dir, to_float(first), 5)
    np.testing.assert_array_equal(prompt, published.prompt_codes)
    np.testing.assert_array_equal(said, published.codes)
    np.testing.assert_array_equal(stream[25:33], _heard_codes(codec_dir, first, said, second))


@pytest.mark.parametrize(("answers", "kept_frames"), [(True, 3), (False, 2)])
def test_voice_activity_takes_the_turns_and_a_voice_interrupts(
    codec_dir: Path, decoder_dir: Path, request: pytest.FixtureRequest, answers: bool, kept_frames: int
) -> None:
    """The microphone stays open: the prompt ends by itself, and speech during playback cuts to what was heard.

    answers: whether the client says how much that was; if it does not, the last report counts.
    """
    if answers:
        request.getfixturevalue("heard_in_time")
    soundfile = pytest.importorskip("soundfile")
    voice, rate = soundfile.read(Path(__file__).parents[1] / "examples" / "prompt.wav", dtype="int16")
    assert rate == 24_000
    silence = np.zeros(24_000, np.int16)
    start = SessionStart(turn_taking="vad", lag="wait", max_seconds=60, sampling=GREEDY)

    async def scenario(url: str) -> messages.Interrupted:
        async with client(url, start) as session:
            await session.hear(np.concatenate((silence, voice, silence)))
            started = await session.expect(messages.SpeechStarted)
            stopped = await session.expect(messages.SpeechStopped)
            assert abs(started.at_samples - 24_000) < 12_000
            assert abs(stopped.at_samples - 24_000 - len(voice)) < 12_000
            speaking = await session.expect(messages.TurnSpeaking)
            assert speaking.prompt_samples >= stopped.at_samples - started.at_samples
            await session.send(messages.Played(turn=1, samples=0))
            await session.expect_audio(1, 4)
            await session.send(messages.Played(turn=1, samples=2 * FRAME + 5))
            await session.hear(voice, turn=1)
            barge_in = await session.expect(messages.SpeechStarted)
            assert barge_in.turn == 1
            if answers:
                await session.send(messages.Interrupt(turn=1, heard_samples=3 * FRAME))
            assert (await session.expect(messages.TurnDone)).reason == "interrupted"
            interrupted = await session.expect(messages.Interrupted)
            await session.hear(silence, turn=2)
            assert (await session.expect(messages.SpeechStopped)).turn == 2
            assert (await session.expect(messages.TurnSpeaking)).turn == 2
            return interrupted

    with _serving(codec_dir, decoder_dir) as (server, _):
        assert run(scenario(server.url)).kept_samples == kept_frames * FRAME
