"""Voice activity of many sessions in one event loop: judged together, and failing alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from streaming.audio import SPEECH_WINDOW
from streaming.models.voice_activity import VadState, VoiceActivityUnavailableError
from streaming.server.voice_activity import VoiceActivity
from tests.server.live_server import run
from tests.server.openai.client import LoudIsSpeech

Answer = Sequence[float] | Exception
LOUD, QUIET = np.full(SPEECH_WINDOW, 0.9, np.float32), np.zeros(SPEECH_WINDOW, np.float32)


class Gated(LoudIsSpeech):
    """Speech is what is loud; a call waits until it may go on, and fails while `failure` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.began, self.go_on = threading.Event(), threading.Event()
        self.failure: Exception | None = None

    def __call__(self, window: NDArray[np.float32], state: VadState) -> NDArray[np.float32]:
        self.batches.append(len(window))
        self.began.set()
        assert self.go_on.wait(30)
        if self.failure is not None:
            raise self.failure
        return super().__call__(window, state)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Gated:
    gated = Gated()
    monkeypatch.setattr("streaming.models.voice_activity.load_vad_model", lambda: gated)
    return gated


async def answers(found: list[Answer], count: int) -> list[Answer]:
    while len(found) < count:
        await asyncio.sleep(0.001)
    return found


def test_what_waits_while_the_model_runs_is_judged_in_one_call(model: Gated) -> None:
    """Each session had a call of its own: 64 sessions were 64 calls a frame, and the loop waited for threads."""

    async def main() -> None:
        voices, found = VoiceActivity(), list[Answer]()
        assert not voices.loaded
        await voices.load()
        assert voices.loaded
        streams = [voices.stream() for _ in range(4)]
        voices.judge(streams[0], LOUD, found.append)
        await asyncio.to_thread(model.began.wait, 30)
        for stream, pcm in zip(streams[1:], (QUIET, LOUD, np.concatenate([QUIET, LOUD])), strict=True):
            voices.judge(stream, pcm, found.append)
        assert found == []
        model.go_on.set()
        silence, speech = 0.0, pytest.approx(0.9)
        assert await answers(found, 4) == [[speech], [silence], [speech], [silence, speech]]
        assert model.batches == [1, 3, 1]

    run(main())


def test_what_comes_soon_after_a_call_is_judged_together(model: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is quicker than the time between two messages: 128 sessions were 128 calls a frame all the same."""
    monkeypatch.setattr("streaming.server.voice_activity._TOGETHER_S", 0.5)

    async def main() -> None:
        voices, found = VoiceActivity(), list[Answer]()
        await voices.load()
        model.go_on.set()
        voices.judge(voices.stream(), LOUD, found.append)
        await answers(found, 1)
        for count in (2, 3, 4):
            voices.judge(voices.stream(), LOUD, found.append)
            await asyncio.sleep(0.01)
            assert len(found) < count, "it waits for the others"
        await answers(found, 4)
        assert model.batches == [1, 3]

    run(main())


def test_what_completes_no_window_is_answered_at_once(model: Gated) -> None:
    async def main() -> None:
        voices, found = VoiceActivity(), list[Answer]()
        await voices.load()
        stream = voices.stream()
        voices.judge(stream, LOUD[:-1], found.append)
        assert found == [()]
        model.go_on.set()
        voices.judge(stream, LOUD[:1], found.append)
        assert (await answers(found, 2))[1] == [pytest.approx(0.9)]

    run(main())


def test_a_model_that_fails_is_told_to_those_that_it_failed_and_serves_the_next(model: Gated) -> None:
    """One failure left every hands-free session of the server waiting for ever."""

    async def main() -> None:
        voices, found = VoiceActivity(), list[Answer]()
        await voices.load()
        model.failure = ValueError("not today")
        model.go_on.set()
        voices.judge(voices.stream(), LOUD, found.append)
        voices.judge(voices.stream(), LOUD, found.append)
        assert await answers(found, 2) == [model.failure] * 2
        model.failure = None
        voices.judge(voices.stream(), LOUD, found.append)
        assert (await answers(found, 3))[2] == [pytest.approx(0.9)]

    run(main())


def test_a_session_that_fails_over_its_answer_fails_alone(model: Gated) -> None:
    """An exception out of one session's callback ended the judging: nobody was answered any more."""

    async def main() -> None:
        voices, found, failures = VoiceActivity(), list[Answer](), list[str]()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context["message"]))
        await voices.load()

        def fail(answer: Answer) -> None:
            raise RuntimeError("mine")

        model.go_on.set()
        voices.judge(voices.stream(), LOUD, fail)
        voices.judge(voices.stream(), LOUD, found.append)
        await answers(found, 1)
        voices.judge(voices.stream(), LOUD, found.append)
        await answers(found, 2)
        assert len(failures) == 1

    run(main())


def test_a_model_that_cannot_be_loaded_may_be_there_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        voices = VoiceActivity()

        def missing() -> None:
            raise VoiceActivityUnavailableError("not installed")

        monkeypatch.setattr("streaming.models.voice_activity.load_vad_model", missing)
        with pytest.raises(VoiceActivityUnavailableError):
            await voices.load()
        assert not voices.loaded
        monkeypatch.setattr("streaming.models.voice_activity.load_vad_model", LoudIsSpeech)
        await voices.load()
        assert voices.loaded

    run(main())
