"""Run one conversation in the event loop: its slot, its messages, the engine's events, voice activity, timers.

Everything is called in the loop, so nothing here needs a lock. At most `_UNHANDLED` messages wait for the conversation;
after that `room` waits, the socket is not read, and TCP holds the client back.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVarTuple, Unpack

from msgspec import structs

from streaming.audio import FRAME, SAMPLE_RATE, to_float
from streaming.conversation.books import ConversationBooks, first_books
from streaming.conversation.conversation import Conversation, Observer, Received
from streaming.conversation.ends import GONE, INTERNAL, fatal, refusal, revoked, stopped
from streaming.conversation.outbox import End, Outbox, Reply
from streaming.conversation.settings import filled, sampling_of
from streaming.conversation.takes import Takes
from streaming.engine import events
from streaming.engine.engine import Engine
from streaming.engine.session import EngineSession
from streaming.engine.snapshot import SessionSnapshot
from streaming.errors import StreamingError
from streaming.models.voice_activity import SpeechStream
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, Message, SessionStart, SessionUpdate
from streaming.server.admission import Admission, StoppingError
from streaming.server.opus_threads import Work
from streaming.server.session_bytes import SessionState
from streaming.server.voice_activity import VoiceActivity
from streaming.server.watch.observer import SessionObserver

_LOG = logging.getLogger(__name__)
_UNHANDLED = 16
Arguments = TypeVarTuple("Arguments")


@dataclass(frozen=True, slots=True)
class Shared:
    """What all sessions of a server share. idle_s: a client that does nothing for so long is told goodbye."""

    engine: Engine
    admission: Admission
    voices: VoiceActivity
    idle_s: float


class Driver:
    """Runs one session. `run` returns when the session is over and its slot is free; its last reply is an `End`.

    resume: where the client may come back after its connection was lost, as it is told. sent_is_heard, takes, saves:
    see `Conversation`. saved: what a client had of a session that this one goes on with. state: the session that this
    one is, and whose client is told nothing of it. turn_ended: is given the session as it is at the end of each turn.
    """

    def __init__(
        self,
        shared: Shared,
        start: SessionStart,
        resume: messages.Resumption | None = None,
        *,
        observer: SessionObserver,
        sent_is_heard: bool = False,
        takes: Takes | None = None,
        saved: SessionSnapshot | None = None,
        saves: bool = False,
        state: SessionState | None = None,
        turn_ended: Callable[[SessionState], None] | None = None,
    ) -> None:
        engine = shared.engine
        usual = engine.sampling if saved is None else saved.books.sampling
        seed = start.sampling.seed
        if seed is None:
            seed = secrets.randbits(63) if saved is None else usual.seed
        self._usual = replace(usual, seed=seed)  # what a client may leave open
        self._start = structs.replace(start, sampling=filled(start.sampling, self._usual))
        self._engine, self._admission, self._voices = engine, shared.admission, shared.voices
        self._idle_s, self._resume, self._sent_is_heard = shared.idle_s, resume, sent_is_heard
        self._observer, self._takes = observer, takes
        self._saved, self._saves, self._state, self._turn_ended = saved, saves, state, turn_ended
        self._id = secrets.token_hex(8) if state is None else state.session
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox()
        self._conversation: Conversation | None = None  # once there is a slot
        self._early: deque[events.Event] = deque()  # what the engine told before that
        self._inbox: deque[Received | Work[Received]] = deque()
        self._asked = False  # a message waits for voice activity
        self._stream: SpeechStream | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._early_end: End | None = None
        self._over, self._may_read = asyncio.Event(), asyncio.Event()
        self._reply_waits: Callable[[], None] | None = None
        self._draining = False
        self._begins: asyncio.Future[bool] = self._loop.create_future()
        # To be put down
        self.muted = False
        """Whether no socket is to take a reply."""
        self._putting: asyncio.Future[SessionState | None] | None = None
        self._held = False  # until somebody goes on with it, here or elsewhere
        self._unsent: list[Reply] = []

    async def run(self) -> None:
        """Wait for a slot, and serve the session until it is over."""
        try:
            vad = self._start.turn_taking == "vad" if self._state is None else self._state.books.taker is not None
            if vad:
                await self._voices.load()
            end = await self._converse(await self._wait_for_slot())
        except StreamingError as error:
            end = self._early_end or refusal(error)
        except Exception:  # the boundary of a session: a fault of ours is told, and is not the other sessions'
            _LOG.exception("a session failed")
            end = INTERNAL
        self._observer.ended(end)
        self._over.set()
        if not self._begins.done():
            self._begins.set_result(False)
        if self._conversation is None or self._conversation.end is None:
            self._outbox.put(end)
        self._may_read.set()
        self._tell()

    # From whoever has the socket

    @property
    def has_room(self) -> bool:
        """Return whether the client may say more."""
        return len(self._inbox) < _UNHANDLED

    async def room(self) -> None:
        """Wait until the client may say more."""
        while not self.has_room:
            self._may_read.clear()
            await self._may_read.wait()

    def give(self, received: Received | Work[Received]) -> None:
        """Take what the client said, or why it could not be understood. What a thread is still finding out is handled
        when its turn has come and the thread is done.
        """
        self._inbox.append(received)
        if isinstance(received, Work):
            received.then = self._look
        else:
            self._interact(None)

    def _look(self) -> None:
        self._interact(None)

    async def begins(self) -> bool:
        """Wait for a slot. Return whether there is one; if not, the reply says why."""
        return await asyncio.shield(self._begins)

    def tell_of_replies(self, waits: Callable[[], None] | None) -> None:
        """Call this whenever a reply waits that may have come just now, and when no more are to be taken."""
        self._reply_waits = waits

    @property
    def waiting_reply(self) -> Reply | None:
        """Return the next reply, which stays, or None if there is none."""
        return self._outbox.next

    def take_reply(self) -> Reply | None:
        """Return the next reply, which counts as sent from here on; None if there is none, or none is to be taken."""
        reply = None if self.muted else self._outbox.take()
        if reply is not None and self._conversation is not None:
            if isinstance(reply, AudioMessage):
                self._interact(self._conversation.sent, reply.turn, self._loop.time())
            elif self._inbox:  # which may have waited until fewer replies do
                self._interact(None)
        return reply

    def answer(self, message: Message) -> None:
        """Reply with a message of the connection's own, which the conversation has no part in."""
        self._outbox.put(message)
        self._tell()

    def _tell(self) -> None:
        if self._reply_waits is not None:
            self._reply_waits()

    def expect_replay(self, position_samples: int) -> None:
        """Drop no input up to this position: it was said without a connection, and comes faster than it was said."""
        if self._conversation is not None:
            self._conversation.expect_replay(position_samples)

    # From whoever puts it down

    def mute(self) -> None:
        """Give no more replies to the socket: the session is about to be put down."""
        self.muted = True
        self._tell()

    async def put_down(self) -> SessionState | None:
        """Bring the session to a moment from which another can go on with it, hold it there and return it.

        Nobody may have its socket meanwhile; what it has to say is in `unsent`. Then call `leave`, or `go_on`. Returns
        None where it is over, or has not begun.
        """
        if self._conversation is None or self._conversation.end is not None:
            return None
        self._putting = self._loop.create_future()
        try:
            self._interact(None)
            return await self._putting
        finally:
            self._putting = None

    def unsent(self) -> list[Reply]:
        """Return what was said and no socket has taken; it counts as sent."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def go_on(self) -> None:
        """Go on as if nothing had been: the session could not be put down."""
        self.muted = self._held = False
        if self._conversation is not None:
            self._interact(self._conversation.tick, self._loop.time())  # what was due meanwhile

    def _look_for_rest(self, putting: asyncio.Future[SessionState | None], conversation: Conversation) -> None:
        """Ask for a snapshot as soon as nothing of what the client said waits."""
        if conversation.end is not None:
            putting.set_result(None)
            return
        self._take_unsent(conversation)
        self._handle_messages(conversation)
        if conversation.end is None and not (self._held or self._inbox or self._asked) and conversation.calm:
            self._held = True
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            conversation.keep(lambda snapshot: self._kept(putting, conversation, snapshot))

    def _take_unsent(self, conversation: Conversation) -> None:
        while conversation.end is None and (reply := self._outbox.take()) is not None:
            if isinstance(reply, AudioMessage):
                conversation.sent(reply.turn, self._loop.time())
            self._unsent.append(reply)

    def _kept(
        self, putting: asyncio.Future[SessionState | None], conversation: Conversation, snapshot: SessionSnapshot
    ) -> None:
        if putting.done():
            return  # nobody waits for the session any more
        self._take_unsent(conversation)
        speech = None if self._stream is None else self._stream.to_bytes()
        putting.set_result(SessionState(self._id, snapshot, conversation.books(self._loop.time()), speech))

    def _told_of_end(self, snapshot: SessionSnapshot, books: ConversationBooks) -> None:
        assert self._turn_ended is not None
        self._turn_ended(SessionState(self._id, snapshot, books, None))

    # From the server

    def leave(self, end: End = GONE) -> None:
        """End the session because its client is gone for good: nothing that it said matters any more."""
        self._finish(end)
        self._outbox.clear()

    def drain(self) -> None:
        """End the session when its turn is over, now if it is listening: the server will stop."""
        self._draining = True
        if self._conversation is not None:
            self._interact(self._conversation.drain)

    def stop(self) -> None:
        """End the session at once: the server stops."""
        self._finish(stopped())

    def revoke(self) -> None:
        """End the session because its token is no longer valid."""
        self._finish(revoked())

    def _finish(self, end: End) -> None:
        if self._conversation is not None:
            self._interact(self._conversation.finish, end)
        else:
            self._early_end = self._early_end or end
            self._over.set()

    # Opening

    async def _wait_for_slot(self) -> EngineSession:
        """Return a slot, perhaps after some time in line; nobody stands in line for a client that has left."""

        def waiting(place: int) -> None:
            queued = messages.SessionQueued(place=place)
            self._observer.said(queued)
            self._outbox.put(queued)
            self._tell()

        slides, sampling, snapshot = self._start.overflow == "slide", sampling_of(self._start.sampling), self._saved
        if self._state is not None:
            snapshot = self._state.snapshot
            sampling = snapshot.books.sampling
        slot = asyncio.create_task(self._admission.attach(self._happened, sampling, slides, waiting, snapshot))
        over = asyncio.create_task(self._over.wait())
        try:
            await asyncio.wait((slot, over), return_when=asyncio.FIRST_COMPLETED)
            if not slot.done():
                raise StoppingError("the session ended while it waited in line")
            return slot.result()
        finally:
            slot.cancel()
            over.cancel()

    async def _converse(self, session: EngineSession) -> End:
        try:
            if self._early_end is not None:
                return self._early_end
            conversation = self._begin(session)
            self._begins.set_result(True)
            await self._over.wait()
            assert conversation.end is not None
            return conversation.end
        finally:
            if self._timer is not None:
                self._timer.cancel()
            session.close()
            self._admission.released()

    def _begin(self, session: EngineSession) -> Conversation:
        engine, state = self._engine, self._state
        started = messages.SessionStarted(
            session=self._id,
            protocol=messages.PROTOCOL_VERSION,
            model=engine.model,
            num_codebooks=engine.num_codebooks,
            sample_rate=SAMPLE_RATE,
            frame_samples=FRAME,
            context_samples=engine.context_frames * FRAME,
            rewind_samples=engine.rewind_frames * FRAME,
            seed=session.seed,
            turn=session.turn,
            notice=engine.notice,
            suggestions=engine.suggestions,
            resume=self._resume,
            sampling=self._start.sampling,
            takes=0 if self._takes is None else self._takes.turns,
            saves=self._saves,
        )
        if state is None:
            self._observer.said(started)
            self._outbox.put(started)
        else:
            self._observer.moved_here(self._id)
        observer: Observer = self._observer
        books, saved = None if state is None else state.books, self._saved
        if saved is not None:
            books = first_books(self._start, saved.books.turn, saved.books.prompt_frames)
        conversation = Conversation(
            session,
            self._outbox,
            self._start,
            self._usual,
            rewind_frames=engine.rewind_frames,
            idle_s=self._idle_s,
            observer=observer,
            now=self._loop.time(),
            sent_is_heard=self._sent_is_heard,
            takes=self._takes,
            books=books,
            saves=self._saves,
            voices=engine.voices if self._start.voices else None,
            turn_ended=None if self._turn_ended is None else self._told_of_end,
        )
        if conversation.hears_voice:
            self._stream = self._voices.stream()
            if state is not None and state.speech is not None:
                self._stream.restore(state.speech)
        self._conversation = conversation
        while self._early:
            conversation.happened(self._early.popleft(), self._loop.time())
        if state is not None:
            self._interact(conversation.tick, self._loop.time())  # what was due meanwhile
        self._interact(conversation.drain if self._draining else None)
        return conversation

    # Running

    def _happened(self, event: events.Event) -> None:
        """Take an event of the engine's session."""
        if self._conversation is None:
            self._early.append(event)
            return
        self._interact(self._conversation.happened, event, self._loop.time())

    def _interact(self, action: Callable[[Unpack[Arguments]], None] | None, *arguments: *Arguments) -> None:
        """Do this to the conversation, then handle the messages that it is ready for, and set its timer."""
        conversation = self._conversation
        if conversation is None:
            return
        try:
            if action is not None:
                action(*arguments)
            self._handle_messages(conversation)
        except Exception:  # as in `run`
            _LOG.exception("a session failed")
            conversation.finish(INTERNAL)
        if conversation.end is not None:
            self._over.set()
            self._inbox.clear()
        elif not self._held:
            self._set_timer(conversation)
        if self._putting is not None and not self._putting.done():
            self._look_for_rest(self._putting, conversation)
        if self.has_room:
            self._may_read.set()
        if len(self._outbox):
            self._tell()

    def _handle_messages(self, conversation: Conversation) -> None:
        while self._inbox and not (self._asked or self._held) and conversation.ready and conversation.end is None:
            received = self._inbox[0]
            if isinstance(received, Work):
                if not received.finished:
                    break
                received = received.result()
            self._inbox.popleft()
            if isinstance(received, AudioMessage) and self._stream is not None:
                self._judge(received, self._stream)
            elif isinstance(received, SessionUpdate) and received.turn_taking == "vad" and not self._voices.loaded:
                self._asked = True
                self._loading = asyncio.create_task(self._load_voices(received))
            else:
                self._handle(received)

    def _handle(self, received: Received, probabilities: Sequence[float] = ()) -> None:
        conversation = self._conversation
        assert conversation is not None
        conversation.receive(received, self._loop.time(), probabilities)
        if conversation.hears_voice != (self._stream is not None):
            self._stream = self._voices.stream() if conversation.hears_voice else None

    def _judge(self, audio: AudioMessage, stream: SpeechStream) -> None:
        """Handle audio once it is known where it holds speech."""
        later = False

        def judged(answer: Sequence[float] | Exception) -> None:
            self._asked = False
            if isinstance(answer, Exception):
                _LOG.error("voice activity failed", exc_info=answer)
                self._finish(INTERNAL)
            elif later:
                self._interact(self._handle, audio, answer)
            else:
                self._handle(audio, answer)

        self._asked = True
        self._voices.judge(stream, to_float(audio.pcm), judged)
        later = True

    async def _load_voices(self, update: SessionUpdate) -> None:
        try:
            await self._voices.load()
        except StreamingError as error:
            self._finish(fatal(error))
            return
        except Exception:  # as in `run`
            _LOG.exception("voice activity failed")
            self._finish(INTERNAL)
            return
        self._asked = False
        self._interact(self._handle, update)

    def _set_timer(self, conversation: Conversation) -> None:
        deadline = conversation.deadline(self._loop.time())
        if self._timer is None or deadline < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._tick)

    def _tick(self) -> None:
        self._timer = None
        conversation = self._conversation
        assert conversation is not None
        self._interact(conversation.tick, self._loop.time())
