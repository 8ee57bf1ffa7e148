"""One session of a client process, on a clock that is moved by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import numpy as np
import pytest

from streaming.audio import FRAME, SAMPLE_RATE
from streaming.benchmark import load
from streaming.benchmark.load import Job, Record, TurnRecord
from streaming.benchmark.schedule import SessionPlan, Turn
from streaming.protocol.messages import InputDropped

PROMPT = Turn(0.0, 5 * FRAME, 0.0, 9.0, False)
JOB = Job("ws://nowhere", (), (), FRAME, 80, 400, 1.0, "realtime")
SPEECH = np.zeros(SAMPLE_RATE, np.int16)


def session(told: list[Record]) -> load._Session:
    return load._Session(JOB, SessionPlan(0, 0.0, 0, (PROMPT,)), SPEECH, 100.0, told.append)


def test_a_frame_s_lateness_is_against_a_listener_who_began_with_the_first() -> None:
    """Reckoned by another rate, or from another frame's arrival, a continuation that stutters is on time."""
    told: list[Record] = []
    hearing = load._Hearing(1, 101.0, [0.5])
    hearing.frames = [(102.0, 0), (102.1, FRAME), (102.13, 2 * FRAME), (102.5, 3 * FRAME)]
    session(told)._record(hearing, PROMPT, "whole", 102.2, 4 * FRAME, 0)
    (turn,) = told
    assert isinstance(turn, TurnRecord)
    assert turn.frames_late_ms == [20.0, -30.0, 260.0]
    assert turn.first_audio_ms == pytest.approx(1000) and turn.first_audible_ms == pytest.approx(1200)
    assert (turn.ended_s, turn.prompt_seconds, turn.heard_seconds) == (pytest.approx(1.0), 0.4, pytest.approx(0.32))


def test_speech_that_was_lost_is_counted_in_the_turn_that_lost_it() -> None:
    """Loss was counted again in every turn after it: one hiccup became a row of them."""
    told: list[Record] = []
    one = session(told)

    class Client:
        async def events(self) -> AsyncIterator[InputDropped]:
            for _ in range(2):
                yield InputDropped(turn=1, samples=FRAME)

    asyncio.run(one._receive(Client()))  # type: ignore[arg-type]
    for _ in range(2):
        one._record(load._Hearing(1, 101.0, [0.5]), PROMPT, "overrun", None, 0, 0)
    assert [turn.dropped_ms for turn in told if isinstance(turn, TurnRecord)] == [160.0, 0.0]


@pytest.mark.parametrize(("takes_s", "wakes_late_s"), [(0.5, 0.0), (0.0, 0.03)], ids=["held-back", "late"])
def test_a_socket_that_the_server_holds_back_is_no_lateness_of_the_client_s(
    monkeypatch: pytest.MonkeyPatch, takes_s: float, wakes_late_s: float
) -> None:
    """A server that reads slowly made its own measurement invalid: what it cost its clients was said to be their own
    fault. And what they are late by themselves counts.
    """
    now_s = 100.0

    async def sleep_until(due_s: float) -> None:
        nonlocal now_s
        now_s = max(now_s, due_s) + wakes_late_s

    class Client:
        turn = 1

        async def send(self, pcm: np.ndarray) -> None:
            nonlocal now_s
            now_s += takes_s

        async def speak(self) -> None: ...

    monkeypatch.setattr(load, "sleep_until", sleep_until)
    monkeypatch.setattr(load, "time", SimpleNamespace(monotonic=lambda: now_s))
    one = session([])
    asyncio.run(one._prompt(Client(), PROMPT, 100.0))  # type: ignore[arg-type]
    assert one._hearing is not None
    assert one._hearing.sends_late_ms == pytest.approx([1e3 * wakes_late_s] * 5)
    assert one._hearing.ended_s == pytest.approx(100.4 + wakes_late_s), "a server that holds back stops no clock"
