"""Voice activity for all hands-free sessions: what waits is judged together, in one call of the model, off the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from streaming.audio import Samples
from streaming.models import voice_activity
from streaming.models.voice_activity import SpeechStream, VoiceActivityModel

_TOGETHER_S = 0.01
"""The model runs no more often than this. Whoever speaks alone does not wait for it; what comes from many within this
time is judged together. It is a third of a window, and little beside the silence that ends speech.
"""
Judged = Callable[[Sequence[float] | Exception], None]
"""A function that is given the probabilities of speech, one a window, or what went wrong."""


@dataclass(frozen=True, slots=True)
class _Request:
    stream: SpeechStream
    windows: Samples
    judged: Judged


class VoiceActivity:
    """Judges where speech is, for all sessions of one event loop."""

    def __init__(self) -> None:
        self._model: VoiceActivityModel | None = None
        self._waiting: list[_Request] = []
        self._judging: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "voice-activity")  # one, so that the model stays in its cache

    @property
    def loaded(self) -> bool:
        """Return whether `stream` and `judge` may be called."""
        return self._model is not None

    async def load(self) -> None:
        """Load the model, once. Raises `VoiceActivityUnavailableError`."""
        if self._model is None:
            self._model = await asyncio.to_thread(voice_activity.load_vad_model)

    def stream(self) -> SpeechStream:
        """Return a stream that has heard nothing yet."""
        assert self._model is not None
        return voice_activity.SpeechStream(self._model)

    def judge(self, stream: SpeechStream, pcm: Samples, judged: Judged) -> None:
        """Have the stream hear these samples [n]; `judged` is called by the loop, at once if they complete no window.

        A stream's calls must not overlap.
        """
        windows = stream.push(pcm)
        if not len(windows):
            judged(())
            return
        self._waiting.append(_Request(stream, windows, judged))
        if self._judging is None:
            self._judging = asyncio.create_task(self._judge_all())

    async def _judge_all(self) -> None:
        """Judge until nothing waits. What comes while the model runs is judged together after it."""
        assert self._model is not None
        loop = asyncio.get_running_loop()
        while self._waiting:
            began = loop.time()
            requests, self._waiting = self._waiting, []
            answers: Sequence[Sequence[float] | Exception]
            try:
                answers = await loop.run_in_executor(
                    self._thread,
                    voice_activity.speech_probabilities,
                    self._model,
                    [request.stream for request in requests],
                    [request.windows for request in requests],
                )
            except Exception as error:  # each session is told, and ends; the server's loop goes on
                answers = [error] * len(requests)
            for request, answer in zip(requests, answers, strict=True):
                try:
                    request.judged(answer)
                except Exception as error:  # each by itself: no session can fail another
                    context = {"message": "a session failed over its voice activity", "exception": error}
                    loop.call_exception_handler(context)
            await asyncio.sleep(began + _TOGETHER_S - loop.time())
        self._judging = None
