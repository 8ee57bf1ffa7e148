"""One session in the event loop: the order of messages across voice activity, the line, timers, ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest

from streaming.audio import FRAME
from streaming.config import ModelVoices, Sampling
from streaming.conversation.conversation import Received
from streaming.conversation.ends import GONE, INTERNAL
from streaming.conversation.outbox import Echo, End, Reply
from streaming.engine.events import Event, Failed
from streaming.errors import EngineFullError, StepFailedError
from streaming.models.voice_activity import VoiceActivityUnavailableError
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, SessionStart, SessionUpdate
from streaming.server.driver import Driver, Shared
from streaming.server.opus_threads import Work
from streaming.server.voice_activity import VoiceActivity
from tests.conversation.engine_model import Counts, EngineModel
from tests.server.live_server import run

LOUD, QUIET = np.full(FRAME, 20_000, np.int16), np.zeros(FRAME, np.int16)
BY_HAND = SessionStart()
BY_VOICE = SessionStart(turn_taking="vad", vad=messages.VadOptions(silence_ms=96, prefix_ms=0))


class Slot(EngineModel):
    """A slot that says when it is free again."""

    seed = 7
    closed = False
    turn = 1

    def close(self) -> None:
        self.closed = True


class Line:
    """Instead of `Admission`: `open` lets the session in. early: what its slot tells before it is handed over."""

    def __init__(self, *early: Event, error: Exception | None = None) -> None:
        self.slot, self.open, self.early, self.error = Slot(), asyncio.Event(), early, error
        self.left = False
        self.freed = 0

    async def attach(
        self,
        on_event: Callable[[Event], None],
        sampling: Sampling,
        slides: bool,
        waiting: Callable[[int], None],
        snapshot: None = None,
    ) -> Slot:
        assert snapshot is None
        if self.error is not None:
            raise self.error
        if not self.open.is_set():
            waiting(1)
        try:
            await self.open.wait()
        except asyncio.CancelledError:
            self.left = True
            raise
        for event in self.early:
            on_event(event)
        self.on_event = on_event
        return self.slot

    def released(self) -> None:
        self.freed += 1


@dataclass
class Engine:
    model: str = "model"
    num_codebooks: int = 4
    context_frames: int = 64
    rewind_frames: int = 16
    notice: str | None = None
    suggestions: tuple[str, ...] = ()
    voices: ModelVoices | None = None
    sampling: Sampling = field(default_factory=Sampling)


class Watch(Counts):
    """An observer that knows how the session ended."""

    def ended(self, end: End) -> None:
        self.end = end


class Voices:
    """Instead of `VoiceActivity`: answers when the test says so. loads: the load waits for it, and may fail."""

    def __init__(self) -> None:
        self.loaded = False
        self.loads: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked: list[Callable[[Sequence[float] | Exception], None]] = []

    async def load(self) -> None:
        await asyncio.shield(self.loads)
        self.loaded = True

    def stream(self) -> object:
        assert self.loaded
        return object()

    def judge(self, stream: object, pcm: object, judged: Callable[[Sequence[float] | Exception], None]) -> None:
        self.asked.append(judged)


class Session:
    """A driver, what is around it, and its client."""

    def __init__(self, line: Line, start: SessionStart = BY_HAND, idle_s: float = 60.0) -> None:
        self.line, self.voices, self.watch = line, Voices(), Watch()
        shared = Shared(cast(Any, Engine()), cast(Any, line), cast(VoiceActivity, self.voices), idle_s)
        self.driver = Driver(shared, start, observer=cast(Any, self.watch))
        self.driver.tell_of_replies(self._told)
        self.waits = asyncio.Event()
        self.running = asyncio.create_task(self.driver.run())

    def _told(self) -> None:
        self.waits.set()

    async def next_reply(self) -> Reply | None:
        """The next reply, taken; None where no socket is to take any."""
        while not self.driver.muted and self.driver.waiting_reply is None:
            self.waits.clear()
            await self.waits.wait()
        return self.driver.take_reply()

    async def until(self, kind: type) -> Any:
        while not isinstance(reply := await self.next_reply(), kind):
            pass
        return reply

    async def rest(self) -> list[Reply]:
        """What comes until the end, which is last."""
        found = [await self.next_reply()]
        while not isinstance(found[-1], End):
            found.append(await self.next_reply())
        await self.running
        assert self.watch.end == found[-1]
        return found

    def step(self) -> None:
        while self.line.slot.step():
            while self.line.slot.events:
                self.line.on_event(self.line.slot.events.popleft())


def opened() -> Line:
    line = Line()
    line.open.set()
    return line


def driven(main: Callable[[], Awaitable[None]]) -> None:
    run(main())


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_messages_wait_for_the_audio_before_them_to_be_judged() -> None:
    """A `session.update` overtook audio that was said before it, and the voice activity of two messages overlapped."""

    async def main() -> None:
        session = Session(opened(), BY_VOICE)
        session.voices.loads.set_result(None)
        await session.until(messages.SessionStarted)
        driver, asked = session.driver, session.voices.asked
        driver.give(AudioMessage(0, 0, LOUD))
        driver.give(Echo("first"))
        driver.give(AudioMessage(0, FRAME, LOUD))
        driver.give(Echo("second"))
        await settled()
        assert len(asked) == 1 and not len(session.line.slot.log)
        asked[0]([0.9, 0.9])
        assert await session.next_reply() == Echo("first")
        assert len(asked) == 2
        asked[1]([0.9, 0.9, 0.9])
        assert isinstance(await session.next_reply(), messages.SpeechStarted)
        assert await session.next_reply() == Echo("second")
        assert len(session.line.slot.frames) == 2
        driver.leave()
        await session.running
        assert session.line.slot.closed and session.line.freed == 1

    driven(main)


def test_a_voice_model_that_fails_ends_the_session(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        session = Session(opened(), BY_VOICE)
        session.voices.loads.set_result(None)
        await session.until(messages.SessionStarted)
        session.driver.give(AudioMessage(0, 0, LOUD))
        session.voices.asked[0](ValueError("not today"))
        assert await session.rest() == [INTERNAL]
        assert "not today" in caplog.text

    driven(main)


def test_a_session_by_voice_without_the_model_is_refused() -> None:
    async def main() -> None:
        session = Session(opened(), BY_VOICE)
        session.voices.loads.set_exception(VoiceActivityUnavailableError("not installed"))
        (end,) = await session.rest()
        assert isinstance(end, End) and isinstance(end.message, messages.SessionRefused)
        assert (end.message.code, end.message.retry_after_ms) == ("vad_unavailable", 0)
        assert session.line.freed == 0, "there was no slot to give back"

    driven(main)


@pytest.mark.parametrize("there", [True, False])
def test_what_follows_a_switch_to_voice_waits_for_the_model(there: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Audio after the switch was heard by hand, because the model was still being loaded."""

    async def main() -> None:
        session = Session(opened())
        await session.until(messages.SessionStarted)
        session.driver.give(SessionUpdate(turn_taking="vad"))
        session.driver.give(AudioMessage(0, 0, LOUD))
        await settled()
        assert not session.line.slot.log
        if not there:
            session.voices.loads.set_exception(VoiceActivityUnavailableError("not installed"))
            (end,) = await session.rest()
            assert isinstance(end, End) and isinstance(end.message, messages.Error)
            assert (end.message.code, end.message.fatal) == ("vad_unavailable", True)
            return
        session.voices.loads.set_result(None)
        assert (await session.until(messages.SessionUpdated)).turn_taking == "vad"
        assert len(session.voices.asked) == 1
        session.driver.give(SessionUpdate(turn_taking="manual"))
        session.driver.give(AudioMessage(0, FRAME, QUIET))
        session.voices.asked[0]([0.0, 0.0])
        await session.until(messages.SessionUpdated)
        assert len(session.line.slot.frames) == 1, "by hand again, nobody is asked"
        session.driver.stop()
        await session.rest()

    driven(main)


def test_who_leaves_the_line_is_not_given_a_slot() -> None:
    """A slot went to a client that was gone, and nobody gave it back."""

    async def main() -> None:
        session = Session(line := Line())
        assert (await session.until(messages.SessionQueued)).place == 1
        session.driver.leave()
        await session.running
        assert line.left and session.watch.end is GONE
        line.open.set()
        await settled()
        assert line.freed == 0

    driven(main)


@pytest.mark.parametrize("end", ["stop", "revoke"])
def test_who_stands_in_line_is_told_the_end_of_it(end: str) -> None:
    async def main() -> None:
        session = Session(Line())
        await session.until(messages.SessionQueued)
        getattr(session.driver, end)()
        (last,) = await session.rest()
        assert isinstance(last, End)
        codes = {"stop": messages.SessionClosed(reason="stopping")}
        assert end not in codes or last.message == codes[end]
        assert end != "revoke" or (isinstance(last.message, messages.Error) and last.message.code == "unauthorized")

    driven(main)


def test_a_full_server_says_so() -> None:
    async def main() -> None:
        session = Session(Line(error=EngineFullError("full")))
        (end,) = await session.rest()
        assert isinstance(end, End) and isinstance(end.message, messages.SessionRefused)
        assert end.message.code == "full"

    driven(main)


def test_what_the_engine_tells_before_the_slot_is_handed_over_is_not_lost() -> None:
    """A step that failed between the two left a session without an engine, waiting."""

    async def main() -> None:
        line = Line(Failed(StepFailedError("the step failed")))
        line.open.set()
        started, end = await Session(line).rest()
        assert isinstance(started, messages.SessionStarted)
        assert isinstance(end, End) and isinstance(end.message, messages.Error)
        assert end.message.code == "step_failed"
        assert line.slot.closed

    driven(main)


def test_what_is_said_in_line_is_heard_and_a_drain_there_ends_it_after_its_beginning() -> None:
    async def main() -> None:
        session = Session(line := Line())
        await session.until(messages.SessionQueued)
        session.driver.give(AudioMessage(0, 0, LOUD))
        session.driver.give(messages.Speak(turn=0))
        session.driver.drain()
        line.open.set()
        *_, end = await session.rest()
        assert isinstance(end, End) and end.message == messages.SessionClosed(reason="stopping")

    driven(main)


def test_a_client_that_says_too_much_is_read_no_further() -> None:
    """Messages behind a full engine were kept without a bound."""

    async def main() -> None:
        session = Session(line := Line())
        for number in range(16):
            session.driver.give(Echo(number))
        waiting = asyncio.create_task(session.driver.room())
        await settled()
        assert not waiting.done()
        line.open.set()
        await waiting
        session.driver.stop()
        echoes = [reply.token for reply in await session.rest() if isinstance(reply, Echo)]
        assert echoes == list(range(16))

    driven(main)


def test_what_is_said_behind_audio_that_is_being_decoded_waits_for_it() -> None:
    """Opus is decoded by a thread: the word to go on must not overtake the speech before it, nor must a second piece
    that is decoded sooner.
    """

    async def main() -> None:
        session = Session(opened())
        await session.until(messages.SessionStarted)
        first, second = (Work[Received]([], lambda _, at=at: AudioMessage(0, at, LOUD)) for at in (0, FRAME))
        for received in (first, second, Echo("behind")):
            session.driver.give(received)
        second.finish([])
        await settled()
        assert not session.line.slot.frames
        first.finish([])
        assert await session.next_reply() == Echo("behind")
        assert len(session.line.slot.frames) == 2
        session.driver.leave()
        await session.running

    driven(main)


def test_audio_that_is_being_decoded_counts_among_what_waits() -> None:
    async def main() -> None:
        session = Session(opened())
        await session.until(messages.SessionStarted)
        works = [Work[Received]([], lambda _: Echo("decoded")) for _ in range(16)]
        for work in works:
            session.driver.give(work)
        waiting = asyncio.create_task(session.driver.room())
        await settled()
        assert not waiting.done()
        works[0].finish([])
        await waiting
        session.driver.leave()
        await session.running

    driven(main)


def test_a_session_is_not_put_down_before_its_audio_is_decoded() -> None:
    """What its client has said, and counts as received, would be missing where the session goes on."""

    async def main() -> None:
        session = Session(opened())
        await session.until(messages.SessionStarted)
        work = Work[Received]([], lambda _: AudioMessage(0, 0, LOUD))
        session.driver.give(work)
        putting = asyncio.create_task(session.driver.put_down())
        await settled()
        assert not session.line.slot.frames and not session.line.slot.log
        work.finish([])
        await settled()
        assert len(session.line.slot.frames) == 1 and session.line.slot.log[-1] == ("keep",)
        putting.cancel()
        session.driver.leave()
        await session.running

    driven(main)


def test_a_turn_goes_through_and_time_is_looked_at() -> None:
    async def main() -> None:
        session = Session(opened(), SessionStart(pace="fast", max_seconds=0.16), idle_s=1.0)
        await session.until(messages.SessionStarted)
        session.driver.give(AudioMessage(0, 0, LOUD))
        session.driver.give(messages.Speak(turn=0))
        session.step()
        speaking, one, two, done, end = await session.rest()
        assert isinstance(speaking, messages.TurnSpeaking)
        assert [part.position_samples for part in (one, two) if isinstance(part, AudioMessage)] == [0, FRAME]
        assert isinstance(done, messages.TurnDone) and isinstance(end, End)
        assert end.message == messages.SessionClosed(reason="idle")

    driven(main)


def test_a_fault_of_the_servers_ends_one_session_and_says_whose_it_was(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        session = Session(opened())
        await session.until(messages.SessionStarted)
        session.driver.give(cast(Any, AudioMessage(0, 0, np.zeros((1, 1, 1), np.int16))))
        assert await session.rest() == [INTERNAL]
        assert "a session failed" in caplog.text

    driven(main)


def test_nothing_is_lost_when_the_wait_for_a_reply_is_given_up() -> None:
    """The reply that came in the moment when a connection was lost was neither sent nor kept."""

    async def main() -> None:
        session = Session(opened())
        await session.until(messages.SessionStarted)
        waiting = asyncio.create_task(session.next_reply())
        await settled()
        session.driver.answer(messages.Ack(received=1))
        waiting.cancel()
        await settled()
        assert waiting.cancelled()
        assert await session.next_reply() == messages.Ack(received=1)
        session.driver.leave()
        await session.running

    driven(main)
