"""OpenAI's Live protocol as a dialect: audio streams both ways, and the machine decides by voice when to speak.

A Live client plays whatever it is sent, and never says what it heard: the lead is short, and when a voice interrupts,
all that was sent counts as heard. There are no words, so nothing is delegated, and what is appended to the context
in words is acknowledged and not heard. Source: the types of the `openai` package, version 3.54 (`types/live`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from streaming.audio import SAMPLE_RATE, to_int16
from streaming.conversation.conversation import Received
from streaming.conversation.outbox import Echo, Saved
from streaming.errors import ProtocolError
from streaming.protocol import messages
from streaming.protocol.messages import OPEN_TURN, AudioMessage, Message
from streaming.server.openai.formats import FormatDecoder, FormatEncoder
from streaming.server.openai.live_events import (
    Append,
    AppendCommentary,
    AppendInstructions,
    AppendThinking,
    AudioOption,
    LiveError,
    Mute,
    SessionClose,
    SessionStart,
    SessionUpdate,
    Unmute,
    decode,
    failure,
    rejection,
    say,
    session_format,
)
from streaming.server.openai.realtime_options import Model

LEAD_MS = 240
"""The lead over playback. It is small, since what was sent is played even when a voice interrupts it."""
_LIFETIME_S = 3600
"""The length of a session that clients are told. Ours has no end."""
_USAGE_SAMPLES = 5 * SAMPLE_RATE
"""Speech between two reports of usage."""


def native_start(model: Model, lead_ms: int) -> messages.SessionStart:
    """Return the session to open. lead_ms: at most."""
    vad = messages.VadOptions(prefix_ms=300, silence_ms=500)
    return messages.SessionStart(
        turn_taking="vad", vad=vad, lag="wait", max_seconds=model.seconds("inf"), lead_ms=min(LEAD_MS, lead_ms)
    )


class LiveDialect:
    """The dialect of one session, after its `session.start`."""

    ready = True

    def __init__(self, model: Model, start: SessionStart) -> None:
        format = session_format(start)
        self._model, self._start = model, start
        self._decoder, self._encoder, self._format = FormatDecoder(format), FormatEncoder(format), format
        self._id, self._events = f"live_{secrets.token_hex(8)}", 0
        self._begun = int(time.time())
        self._position = 0  # samples of input so far
        self._muted = False
        self._spoken = self._reported = 0  # samples so far, and how many of them the client was told of

    def decode(self, data: str | bytes) -> Sequence[Received]:
        try:
            event = decode(data)
            match event:
                case Append(audio=audio):
                    return self._append(audio)
                case SessionClose():
                    return [messages.SessionClose()]
                case SessionStart():
                    raise LiveError("session_already_started", "the session has started already")
                case SessionUpdate():
                    return [self._in_order("session.updated", event.event_id, session=self._session())]
                case Mute():
                    self._muted = True
                    return [self._in_order("session.input_audio.muted", event.event_id)]
                case Unmute():
                    self._muted = False
                    return [self._in_order("session.input_audio.unmuted", event.event_id)]
                case AppendInstructions() | AppendThinking() | AppendCommentary():
                    kind = str(event.__struct_config__.tag).replace(".append", ".appended")
                    now_ms = 1000 * self._position // SAMPLE_RATE
                    return [self._in_order(kind, event.event_id, start_ms=now_ms, end_ms=now_ms)]
        except ProtocolError as error:
            return [Echo(rejection(error, data))]

    def _in_order(self, kind: str, client_event_id: str | None, **fields: Any) -> Echo:
        """Say this once all that was given to the conversation before is handled."""
        return Echo({"type": kind, "client_event_id": client_event_id} | fields)

    def _append(self, audio: bytes) -> list[Received]:
        pcm = self._decoder.push(audio)
        if self._muted:
            pcm = np.zeros_like(pcm)
        given: list[Received] = []
        for at in range(0, len(pcm), messages.MAX_AUDIO_SAMPLES):
            piece = pcm[at : at + messages.MAX_AUDIO_SAMPLES]
            given.append(AudioMessage(OPEN_TURN, self._position, piece))
            self._position += len(piece)
        return given

    def encode(self, reply: Message | AudioMessage | Echo | Saved) -> Sequence[str | bytes]:
        said = []
        for event in self._say(reply):
            if event["type"] != "session.output_audio.delta":
                self._events += 1
                event = {"event_id": f"{self._id}_{self._events}"} | event
            said.append(say(event))
        return said

    def _say(self, reply: Message | AudioMessage | Echo | Saved) -> list[dict[str, Any]]:
        match reply:
            case AudioMessage(pcm=pcm):
                self._spoken += len(pcm)
                said = self._delta(self._encoder.push(to_int16(pcm)))
                return [*said, *self._usage_event()] if self._spoken - self._reported >= _USAGE_SAMPLES else said
            case messages.TurnDone():
                return [*self._delta(self._encoder.flush()), *self._usage_event()]
            case Echo(event):
                return [event]
            case messages.SessionStarted():
                return [self._started()]
            case messages.SessionQueued(place=place):
                return [{"type": "session.queued", "place": place}]
            case messages.SessionRefused(code=code, message=message, retry_after_ms=wait):
                return [failure(code, message, wait)]
            case messages.SessionClosed(reason=reason):
                why = "close_requested" if reason == "client" else "expired" if reason == "idle" else "remote_hangup"
                return [{"type": "session.closed", "reason": why, "session": self._session(), "usage": self._usage()}]
            case messages.Error(fatal=True, code=code, message=message):
                return [failure(code, message)]
        return []

    def _delta(self, data: bytes) -> list[dict[str, Any]]:
        return [{"type": "session.output_audio.delta", "delta": data}] if data else []

    def _started(self) -> dict[str, Any]:
        started = {"type": "session.started", "session": self._session()}
        return started | {"client_event_id": self._start.event_id}

    def _usage_event(self) -> list[dict[str, Any]]:
        self._reported = self._spoken
        return [{"type": "session.usage.updated", "usage": self._usage()}]

    def _usage(self) -> dict[str, float]:
        return {"seconds": round((self._position + self._spoken) / SAMPLE_RATE, 3)}

    def _session(self) -> dict[str, Any]:
        output = (self._start.session.audio or AudioOption()).output
        voice = output.voice if output is not None and isinstance(output.voice, str) else "continuation"
        return {
            "id": self._id,
            "model": self._model.name,
            "status": "active",
            "expires_at": self._begun + _LIFETIME_S,
            "audio": {
                "format": {"type": self._format.type, "rate": self._format.rate},
                "output": {"voice": voice[:64]},
            },
        }
