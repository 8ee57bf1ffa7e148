"""The Realtime dialect without a socket: what a client's events ask of the conversation, what its replies become."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import numpy as np
import pytest

from streaming.audio import FRAME
from streaming.conversation.conversation import HeardByClock, Received
from streaming.conversation.outbox import Echo
from streaming.protocol import messages
from streaming.protocol.messages import AudioMessage
from streaming.server.openai.interruptions import ALL_SENT
from streaming.server.openai.realtime import RealtimeDialect
from streaming.server.openai.realtime_options import Model
from tests.client.fake_server import Reason
from tests.server.openai.client import MANUAL, encoded

Q = 4


class Talk:
    """A session of the dialect. now: of its clock; given: what it gave to the conversation by itself."""

    def __init__(self) -> None:
        self.now, self.given = 0.0, list[Received]()
        self._dialect = RealtimeDialect(Model("stub", Q, 64), self.given.append, lambda: self.now)
        self._echoes = deque[Echo]()

    def append(self, *frames: int) -> list[Received]:
        """Speech: a frame for each, of this value."""
        pcm = np.repeat(np.array(frames, np.int16), FRAME)
        return self.client("input_audio_buffer.append", audio=encoded(pcm))

    def client(self, kind: str, **fields: Any) -> list[Received]:
        """What the conversation is asked for by this event."""
        asked = list(self._dialect.decode(json.dumps({"type": kind} | fields)))
        self._echoes += [item for item in asked if isinstance(item, Echo)]
        return asked

    def server(self, reply: messages.Message | AudioMessage | Echo) -> list[dict[str, Any]]:
        """What the client is told by this reply."""
        return [json.loads(event) for event in self._dialect.encode(reply)]

    def handled(self) -> list[dict[str, Any]]:
        """Have all before handled."""
        return self.server(self._echoes.popleft())

    def speaks(self, frames: int, **response: Any) -> str:
        """In manual mode a response has begun, and so much of it is sent. Returns its item's id."""
        self.manual()
        self.client("response.create", response=response)
        created = self.handled()
        for number in range(frames):
            self.server(audio(1, number))
        return str(next(event["item"]["id"] for event in created if event["type"] == "response.output_item.added"))

    def manual(self) -> None:
        """Have the client take the turns."""
        self.client("session.update", session={"type": "realtime"} | MANUAL)

    def done(self, reason: Reason, frames: int, turn: int = 1) -> list[dict[str, Any]]:
        """The turn is over, and so many frames of it were sent."""
        done = messages.TurnDone(
            turn=turn, reason=reason, samples=frames * FRAME, first_frame_ms=None, mean_step_ms=None
        )
        return self.server(done)


def audio(turn: int, number: int = 0) -> AudioMessage:
    """A frame of a continuation."""
    return AudioMessage(turn, number * FRAME, np.zeros(FRAME, np.int16))


def heard(given: list[Received]) -> list[int]:
    """The values of the frames that the conversation is to hear."""
    pcm = [message.pcm for message in given if isinstance(message, AudioMessage)]
    return np.concatenate([np.zeros(0, np.int16), *pcm])[::FRAME].tolist()


def code(events: list[dict[str, Any]]) -> str:
    """Return the code of the error that these events are."""
    (event,) = events
    assert event["type"] == "error", event
    return str(event["error"]["code"])


def types(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"] for event in events]


@pytest.mark.parametrize(("audio_end_ms", "heard_samples"), [(100, 2_400), (1e300, 24 * 2**31)])
def test_what_was_heard_of_a_response_is_the_clients_word(audio_end_ms: float, heard_samples: int) -> None:
    """The dialect passes on what the client says; it is the conversation that believes no more than was sent."""
    talk = Talk()
    item_id = talk.speaks(frames=2)
    truncated = talk.client("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=audio_end_ms)
    assert truncated == [messages.Interrupt(turn=1, heard_samples=heard_samples)]


def test_an_answer_that_keeps_more_than_there_was_adds_nothing_to_the_usage() -> None:
    talk = Talk()
    talk.speaks(frames=2)
    talk.server(messages.TurnSpeaking(turn=1, prompt_samples=3 * FRAME, dropped_samples=0))
    talk.done("interrupted", frames=2)
    talk.server(messages.Interrupted(turn=1, kept_samples=9 * FRAME))
    talk.client("response.create")
    talk.handled()
    talk.server(messages.TurnSpeaking(turn=2, prompt_samples=0, dropped_samples=0))
    usage = talk.done("end", frames=0, turn=2)[-1]["response"]["usage"]
    assert usage["input_tokens"] == (3 + 2) * Q


def test_usage_counts_no_more_than_the_model_remembers() -> None:
    """All of an hour's talk was told, and paid for, in every response."""
    talk = Talk()
    talk.speaks(frames=1)
    talk.server(messages.TurnSpeaking(turn=1, prompt_samples=1000 * FRAME, dropped_samples=0))
    usage = talk.done("end", frames=1)[-1]["response"]["usage"]
    assert (usage["input_tokens"], usage["input_token_details"]["cached_tokens"]) == (64 * Q, 0)


@pytest.mark.parametrize(("limit", "status"), [("inf", "completed"), (2 * Q, "incomplete")])
def test_what_nobody_limited_is_complete(limit: object, status: str) -> None:
    """Such a response ends with what the model remembers. It was told as cut off, which filled a client's log with
    warnings.
    """
    talk = Talk()
    talk.speaks(frames=2, max_output_tokens=limit)
    assert talk.done("max_seconds", frames=2)[-1]["response"]["status"] == status


def test_nothing_is_sent_of_a_response_after_its_cancellation() -> None:
    """A client that had said "stop" went on playing."""
    talk = Talk()
    talk.speaks(frames=2)
    assert talk.client("response.cancel") == [messages.Interrupt(turn=1, heard_samples=ALL_SENT)]
    assert talk.server(audio(1, 2)) == []


def test_nothing_of_an_old_turn_is_in_a_new_response() -> None:
    talk = Talk()
    talk.speaks(frames=1)
    talk.done("end", frames=1)
    talk.client("response.create")
    talk.handled()
    assert talk.server(audio(1, 1)) == []
    assert types(talk.server(audio(2))) == ["response.output_audio.delta"]


@pytest.mark.parametrize("early", [False, True], ids=["spoken", "asked for"])
def test_the_cancellation_of_another_response_cancels_none(early: bool) -> None:
    """A cancellation that came too late for its own response cut the next one off."""
    talk = Talk()
    if early:
        talk.manual()
        talk.client("response.create")
    else:
        talk.speaks(frames=2)
    asked = talk.client("response.cancel", response_id="resp_another")
    if early:
        assert "response.created" in types(talk.handled())
    assert not any(isinstance(message, messages.Interrupt) for message in [*asked, *talk.given])
    assert code(talk.handled()) == "response_cancel_not_active"
    assert not talk.given


def test_what_is_played_after_a_cancellation_was_not_heard() -> None:
    """A client that never truncates stops to play when it cancels; the conversation knows what it heard by then."""
    talk = Talk()
    talk.speaks(frames=10)  # all at once
    talk.now = 0.2
    talk.client("response.cancel")
    talk.now = 0.8
    assert talk.append(1)[0] == HeardByClock(turn=1)


def test_a_response_that_is_asked_for_while_the_last_one_ends_is_told_in_its_turn() -> None:
    """The client heard audio of a response that it had never been told of; LiveKit fails an assertion."""
    talk = Talk()
    talk.speaks(frames=2)
    talk.client("response.cancel")
    talk.client("response.create")
    assert talk.handled() == [], "the first one is not over"
    told = types(talk.done("interrupted", frames=2))
    assert told.index("response.done") < told.index("response.created")


def test_what_is_said_between_a_cancellation_and_its_truncation_is_heard_after_it() -> None:
    talk = Talk()
    item_id = talk.speaks(frames=4)
    talk.client("response.cancel")
    assert talk.append(1, 2) == []
    truncated = talk.client("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=80)
    assert truncated[0] == messages.Interrupt(turn=1, heard_samples=FRAME)
    assert heard(truncated) == [1, 2]


def test_what_was_held_is_heard_when_the_voice_takes_the_turns() -> None:
    """What was held lay there for the rest of the session."""
    talk = Talk()
    talk.speaks(frames=2)
    assert talk.append(1, 2) == []
    given = talk.client(
        "session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": {"type": "server_vad"}}}}
    )
    assert heard(given) == [1, 2]
    assert isinstance(given[-1], messages.SessionUpdate)


def test_what_the_voice_had_is_nothing_to_commit() -> None:
    """A client that took the turns back committed what had been answered already."""
    talk = Talk()
    talk.append(1)
    talk.manual()
    talk.client("input_audio_buffer.commit")
    talk.server(
        messages.SessionUpdated(
            max_seconds=1.0, sampling=messages.SamplingOptions(), turn_taking="manual", vad=messages.VadOptions()
        )
    )
    assert code(talk.handled()) == "input_audio_buffer_commit_empty"


def test_the_end_of_what_was_said_in_another_format_is_heard() -> None:
    talk = Talk()

    def format(kind: str) -> list[Received]:
        return talk.client(
            "session.update", session={"type": "realtime", "audio": {"input": {"format": {"type": kind}}}}
        )

    format("audio/pcmu")
    given = talk.client("input_audio_buffer.append", audio=encoded(bytes(160)))
    given += format("audio/pcm")
    assert sum(len(message.pcm) for message in given if isinstance(message, AudioMessage)) == 3 * 160
    assert isinstance(given[-1], messages.SessionUpdate)


@pytest.mark.parametrize("over", [False, True], ids=["while it is spoken to", "afterwards"])
def test_what_was_committed_while_a_response_was_spoken_is_not_cleared(over: bool) -> None:
    """A clear took back what was committed as well: the client had an item of speech that the model never heard."""
    talk = Talk()
    talk.speaks(frames=2)
    talk.append(1, 2)
    talk.client("input_audio_buffer.commit")
    talk.append(3)
    if over:
        talk.done("end", frames=2)
    given = talk.client("input_audio_buffer.clear")
    if not over:
        talk.done("end", frames=2)
    given += talk.client("response.create")
    assert heard(given) == [1, 2]
    assert any(isinstance(message, messages.Speak) for message in given)
    assert [message.keep_samples for message in given if isinstance(message, messages.InputClear)] == [2 * FRAME] * over


def test_speech_never_began_before_the_session() -> None:
    """The time before the first word that counts as speech reached beyond the session's beginning: clients index their
    recording with it.
    """
    talk = Talk()
    (started,) = talk.server(messages.SpeechStarted(turn=1, at_samples=24))
    assert started["audio_start_ms"] == 0


def message_item(item_id: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "id": item_id, "content": [{"type": "input_text", "text": text}]}


def test_items_are_kept_within_bounds() -> None:
    """A client could have the server keep what it liked: as many items as it sent, each of up to 20 MiB."""
    talk = Talk()
    for number in range(300):
        talk.client("conversation.item.create", item=message_item(f"item_{number}", "hello"))
        talk.handled()
    talk.client("conversation.item.create", item=message_item("long", "x" * 20_000))
    talk.handled()

    def retrieved(item_id: str) -> list[dict[str, Any]]:
        talk.client("conversation.item.retrieve", item_id=item_id)
        return talk.handled()

    assert code(retrieved("item_0")) == "item_retrieve_invalid_item_id"
    assert retrieved("item_299")[0]["item"]["content"][0]["text"] == "hello"
    assert retrieved("long")[0]["item"]["content"] == []
    talk.client("conversation.item.create", item=message_item("longer", "x" * 2**20))
    assert code(talk.handled()) == "string_above_max_length"
