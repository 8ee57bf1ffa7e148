"""The conversation without a socket: messages are given to it, and its replies taken, when the test says so."""

from __future__ import annotations

import asyncio

import numpy as np

from streaming.audio import FRAME
from streaming.engine.engine import Engine
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, SessionStart
from streaming.server.admission import Admission
from streaming.server.conversation import Conversation
from streaming.server.watch.health import Health
from streaming.server.watch.metrics import Metrics
from streaming.server.watch.observer import Observer
from tests.engine.stub_step import StubStep
from tests.server.live_server import run


def test_frames_of_an_old_turn_that_leave_late_are_none_of_the_next() -> None:
    """A client that read slowly and interrupted had the next turn run ahead by what was still on its way to it."""
    lead_frames = 3

    async def scenario(engine: Engine) -> None:
        admission = Admission(engine)
        observer = Observer(Metrics(Health(engine, admission, (), "1.0"))).session(None)
        start = SessionStart(max_seconds=20, lead_ms=80 * lead_frames)
        conversation = Conversation(engine, admission, start, 300.0, observer=observer)
        running = asyncio.create_task(conversation.run())
        audio: dict[int, list[AudioMessage]] = {1: [], 2: []}

        async def until(kind: type[messages.Message]) -> None:
            while not isinstance(reply := await conversation.outbox.get(), kind):
                if isinstance(reply, AudioMessage):
                    audio[reply.turn].append(reply)

        async def take(turn: int, frames: int) -> None:
            while len(audio[turn]) < frames:
                reply = await conversation.outbox.get()
                assert isinstance(reply, AudioMessage)
                audio[turn].append(reply)

        await until(messages.SessionStarted)
        conversation.give(AudioMessage(1, 0, np.ones(FRAME, np.int16)))
        conversation.give(messages.Speak(turn=1))
        await until(messages.TurnSpeaking)
        await take(1, lead_frames)
        conversation.give(messages.Interrupt(turn=1, heard_samples=0))
        await until(messages.Interrupted)
        conversation.give(messages.Speak(turn=2))
        await until(messages.TurnSpeaking)
        for late in audio[1]:
            conversation.sending(late)
        conversation.give(messages.Played(turn=2, samples=lead_frames * FRAME))  # which it was never sent
        await take(2, lead_frames)
        await asyncio.sleep(0.3)
        assert len(conversation.outbox) == 0
        conversation.leave()
        await running

    with Engine(StubStep(1, rewind_frames=16), "stub", device="cpu", dtype="float32") as engine:
        run(scenario(engine), 20)
