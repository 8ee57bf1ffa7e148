"""The responses of a Realtime session, and the dialect around them, without a socket or an engine."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest

from streaming.audio import FRAME
from streaming.conversation.conversation import HeardByClock, Received
from streaming.conversation.outbox import Echo
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage, Message
from streaming.server.openai.realtime import RealtimeDialect
from streaming.server.openai.realtime_options import Model
from tests.server.openai.client import MANUAL

G711 = {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}


class Session:
    """A dialect, and what its conversation was given. now: the time."""

    def __init__(self, session: dict[str, Any] | None = None) -> None:
        self.now = 0.0
        self.given: list[Received] = []
        self.dialect = RealtimeDialect(Model("model", 4, 64), self.given.append, lambda: self.now)
        if session is not None:
            self.say("session.update", session={"type": "realtime"} | session)
            self.reply(
                messages.SessionUpdated(max_seconds=1.0, sampling=messages.SamplingOptions(), turn_taking="manual")
            )
            self.given.clear()

    def say(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        """Return what is answered at once, by echoes."""
        given = list(self.dialect.decode(json.dumps({"type": kind, "event_id": "mine"} | fields)))
        self.given += given
        return [event for one in given if isinstance(one, Echo) for event in self.reply(one)]

    def append(self, samples: int) -> None:
        self.say("input_audio_buffer.append", audio=base64.b64encode(np.ones(samples, np.int16)).decode())

    def append_g711(self) -> None:
        """A tenth of a second: 2,400 samples."""
        self.say("input_audio_buffer.append", audio=base64.b64encode(bytes([0x10]) * 800).decode())

    def reply(self, reply: Message | AudioMessage | Echo) -> list[dict[str, Any]]:
        return [json.loads(event) for event in self.dialect.encode(reply)]

    def speaking(self, turn: int, prompt: int = 1) -> list[dict[str, Any]]:
        return self.reply(messages.TurnSpeaking(turn=turn, prompt_samples=prompt * FRAME, dropped_samples=0))

    def done(self, turn: int, frames: int, reason: Any = "end") -> list[dict[str, Any]]:
        done = messages.TurnDone(
            turn=turn, reason=reason, samples=frames * FRAME, first_frame_ms=None, mean_step_ms=None
        )
        return self.reply(done)

    def audio(self) -> int:
        """Samples that the conversation was given, one after another."""
        position = 0
        for audio in self.given:
            if isinstance(audio, AudioMessage):
                assert audio.position_samples == position, "the conversation ends a session that leaves a gap"
                position += len(audio.pcm)
        return position


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


def error_code(events: list[dict[str, Any]]) -> str:
    (event,) = events
    assert event["error"]["event_id"] == "mine"
    return str(event["error"]["code"])


def test_a_response_is_told_from_its_beginning_to_its_end() -> None:
    session = Session(MANUAL)
    session.append(FRAME)
    begun = session.say("response.create")
    assert types(begun)[:1] == ["input_audio_buffer.committed"]
    assert types(begun)[3:] == [
        "response.created",
        "response.output_item.added",
        "conversation.item.added",
        "response.content_part.added",
    ]
    assert session.speaking(1) == []
    (delta,) = session.reply(AudioMessage(1, 0, np.ones(FRAME, np.int16)))
    assert delta["type"] == "response.output_audio.delta"
    *_, done = session.done(1, 1)
    assert done["response"]["status"] == "completed"
    assert done["response"]["usage"]["input_token_details"]["cached_tokens"] == 0
    assert done["response"]["usage"]["output_tokens"] == 4


def test_what_a_response_was_cut_by_is_not_counted_as_cached() -> None:
    session = Session(MANUAL)
    session.append(FRAME)
    session.say("response.create")
    session.speaking(1)
    session.done(1, 10)
    session.reply(messages.Interrupted(turn=1, kept_samples=4 * FRAME))
    session.append(FRAME)
    session.say("response.create")
    session.speaking(2)
    *_, done = session.done(2, 0)
    assert done["response"]["usage"]["input_token_details"]["cached_tokens"] == 4 * (1 + 4)


def test_a_response_that_is_asked_for_before_the_last_is_over_begins_after_it() -> None:
    session = Session(MANUAL)
    session.append(FRAME)
    first = session.say("response.create")[3]["response"]["id"]
    session.speaking(1)
    session.say("response.cancel")
    session.append(FRAME)
    assert "response.created" not in types(session.say("response.create"))
    told = session.done(1, 1, "interrupted")
    assert types(told)[-4] == "response.created"
    ends = [event["response"] for event in told if event["type"] == "response.done"]
    assert [(end["id"], end["status"]) for end in ends] == [(first, "cancelled")]


def test_a_refused_response_is_an_error_and_an_empty_one_fails() -> None:
    session = Session(MANUAL)
    (echo,) = [one for one in session.dialect.decode('{"type": "response.create", "event_id": "mine"}')
               if isinstance(one, Echo)]  # fmt: skip
    session.reply(messages.Error(code="bad_state", message="no", fatal=False, in_reply_to="speak"))
    assert error_code(session.reply(echo)) == "conversation_already_has_active_response"
    (echo,) = [one for one in session.dialect.decode('{"type": "response.create"}') if isinstance(one, Echo)]
    session.reply(messages.Error(code="empty_prompt", message="no", fatal=False, in_reply_to="speak"))
    *_, done = session.reply(echo)
    assert (done["response"]["status"], done["response"]["status_details"]["error"]["code"]) == (
        "failed",
        "empty_prompt",
    )


def test_a_session_that_ends_fails_the_response_that_is_being_spoken() -> None:
    session = Session(MANUAL)
    session.append(FRAME)
    session.say("response.create")
    told = session.reply(messages.SessionClosed(reason="stopping"))
    assert types(told)[-2:] == ["response.done", "error"]
    assert told[-2]["response"]["status"] == "failed"
    assert types(session.reply(messages.SessionClosed(reason="idle"))) == ["error"]


def test_audio_that_was_given_is_not_lost_when_a_commit_is_refused() -> None:
    """What was committed during a response was given after it, and a refusal lost it: the session ended at a gap."""
    session = Session(MANUAL)
    session.append(FRAME)
    session.say("response.create")
    session.speaking(1)
    session.append(FRAME)
    session.say("input_audio_buffer.commit")
    session.done(1, 1)
    assert error_code(session.say("input_audio_buffer.commit")) == "input_audio_buffer_commit_empty"
    session.append(FRAME)
    assert session.audio() == 3 * FRAME


def test_audio_that_was_given_is_not_lost_when_a_response_is_refused() -> None:
    """Where the voice takes turns, in G.711, a refusal lost what was left in the resampler."""
    session = Session(G711)
    session.speaking(1)
    session.append_g711()
    held_back = 2400 - session.audio()
    assert held_back > 0
    assert error_code(session.say("response.create")) == "conversation_already_has_active_response"
    assert session.audio() == 2400
    session.append_g711()
    assert session.audio() == 4800 - held_back


@pytest.mark.parametrize("waits", [True, False])
def test_input_waits_until_what_was_heard_of_a_cancelled_response_is_said(waits: bool) -> None:
    session = Session(MANUAL)
    session.append(FRAME)
    session.say("response.create")
    session.speaking(1)
    session.say("response.cancel")
    session.done(1, 1, "interrupted")
    session.given.clear()
    session.now = 0.4 if waits else 0.5
    session.append(FRAME)
    if waits:
        assert session.given == []
        return
    clock, audio = session.given
    assert clock == HeardByClock(1)
    assert isinstance(audio, AudioMessage)
