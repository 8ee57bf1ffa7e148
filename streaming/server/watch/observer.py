"""Count and log what happens to a server and its sessions, as an operator sees them.

A session is observed by what it tells its client in the native protocol's messages, the same for every dialect.
Everything is called in the event loop.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from http import HTTPStatus

from streaming.audio import FRAME_RATE, SAMPLE_RATE
from streaming.conversation.ends import MOVED
from streaming.conversation.outbox import End
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, Message
from streaming.server.openai import OPENAI_PATHS
from streaming.server.watch.health import HEALTH, LIVE, READY
from streaming.server.watch.log import Value, event
from streaming.server.watch.metrics import METRICS, Metrics

_LOG = logging.getLogger(__name__)
_PATHS = frozenset(("/", messages.PATH, *OPENAI_PATHS, HEALTH, LIVE, READY, METRICS))
_OUR_FAULTS = frozenset(("internal", "step_failed", "engine_stopped"))
_TIMED_TURNS = 1_000


class Observer:
    """Counts and logs what happens at a server."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def answered(self, path: str, status: HTTPStatus | int) -> None:
        """Count a request that was answered. path: as it came; nothing of its query is kept."""
        plain = path.partition("?")[0]
        self.metrics.requests.labels(plain if plain in _PATHS else "other", str(int(status))).inc()

    def refused(self, code: str) -> None:
        """Count somebody who was not let in."""
        self.metrics.refused.labels(code).inc()
        event(_LOG, logging.WARNING, "refused", code=code)

    def dismissed(self, end: End) -> None:
        """Count a socket that closes without having had a session."""
        match end.message:
            case messages.SessionRefused(code=code):
                self.refused(code)
            case messages.Error(code=code):
                self.failed(code)

    def failed(self, code: str, session: str | None = None) -> None:
        """Count an error that a client was told of."""
        self.metrics.errors.labels(code).inc()
        event(_LOG, logging.ERROR if code in _OUR_FAULTS else logging.WARNING, "error", code=code, session=session)

    def session(self, holder: str | None) -> SessionObserver:
        """Return an observer of one session. holder: the name of its client's token."""
        return SessionObserver(self, holder)


class SessionObserver:
    """Counts and logs what happens in a session, from before it begins."""

    def __init__(self, server: Observer, holder: str | None) -> None:
        self._server, self._metrics, self._holder = server, server.metrics, holder
        self._id: str | None = None
        self._began_at = 0.0
        self._turns = self._interruptions = self._returns = self._underruns = 0
        self._heard_frames = self._spoken_frames = self._dropped_samples = 0
        self._first_frames_ms: deque[float] = deque(maxlen=_TIMED_TURNS)
        self._reported = (0, 0)  # a turn, and the underruns that its client has reported

    def said(self, reply: Message | AudioMessage) -> None:
        """Count what the client is told."""
        match reply:
            case AudioMessage():
                self._spoken_frames += 1
            case messages.TurnDone():
                self._turn_done(reply)
            case messages.Interrupted():
                self._interruptions += 1
                self._metrics.interruptions.inc()
            case messages.InputDropped(samples=samples):
                self._dropped_samples += samples
                self._metrics.input_dropped.inc(samples / SAMPLE_RATE)
            case messages.Error(code=code):
                self._server.failed(code, self._id)
            case messages.SessionStarted(session=name):
                self._id, self._began_at = name, time.monotonic()
                self._metrics.opened.inc()
                self._event("session.opened", holder=self._holder)

    def moved_here(self, session: str) -> None:
        """Note that a session goes on here that another server had, or this one before its client was away."""
        self._id, self._began_at = session, time.monotonic()
        self._metrics.opened.inc()
        self._event("session.moved_here", holder=self._holder)

    def heard(self) -> None:
        """Count a frame of the client's speech that was heard."""
        self._heard_frames += 1

    def played(self, turn: int, underruns: int, sent_frames: int) -> None:
        """Count the underruns that the client reports of this turn so far, at most one for each frame it was sent."""
        before = self._reported[1] if self._reported[0] == turn else 0
        reported = max(before, min(underruns, sent_frames))
        self._reported = turn, reported
        if reported > before:
            self._underruns += reported - before
            self._metrics.underruns.inc(reported - before)

    def lost(self) -> None:
        """Note that the connection broke, and that the session waits for its client."""
        self._metrics.lost.inc()
        self._event("session.lost")

    def resumed(self) -> None:
        """Note that the client has come back."""
        self._returns += 1
        self._metrics.resumed.inc()
        self._event("session.resumed")

    def ended(self, end: End) -> None:
        """Note that the session is over, or could not begin."""
        if self._id is None:
            self._server.dismissed(end)
            return
        if isinstance(end.message, messages.Error):
            self._server.failed(end.message.code, self._id)
        reason = _reason(end)
        self._metrics.ended.labels(reason).inc()
        first_frames = self._first_frames_ms
        self._event(
            "session.ended",
            holder=self._holder,
            reason=reason,
            seconds=round(time.monotonic() - self._began_at, 3),
            turns=self._turns,
            heard_s=round(self._heard_frames / FRAME_RATE, 2),
            spoken_s=round(self._spoken_frames / FRAME_RATE, 2),
            first_frame_ms_p50=round(statistics.median(first_frames), 1) if first_frames else None,
            interruptions=self._interruptions,
            underruns=self._underruns,
            dropped_s=round(self._dropped_samples / SAMPLE_RATE, 2),
            resumed=self._returns,
        )

    def _turn_done(self, done: messages.TurnDone) -> None:
        self._turns += 1
        self._metrics.turns.labels(done.reason).inc()
        if done.first_frame_ms is not None:
            self._first_frames_ms.append(done.first_frame_ms)
            self._metrics.first_frame.observe(done.first_frame_ms / 1e3)
        event(
            _LOG,
            logging.DEBUG,
            "turn.done",
            session=self._id,
            turn=done.turn,
            reason=done.reason,
            spoken_s=round(done.samples / SAMPLE_RATE, 2),
            first_frame_ms=done.first_frame_ms and round(done.first_frame_ms, 1),
        )

    def _event(self, name: str, **fields: Value) -> None:
        event(_LOG, logging.INFO, name, session=self._id, **fields)


def _reason(end: End) -> str:
    match end.message:
        case messages.SessionClosed(reason=reason):
            return reason
        case messages.Error(code=code) | messages.SessionRefused(code=code):
            return code
    return "moved" if end is MOVED else "left"
