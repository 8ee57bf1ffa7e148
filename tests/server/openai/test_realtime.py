"""The Realtime protocol over a real socket, against the stub step: what is said, in which order, and what the model's
context is afterwards.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from contextlib import suppress

import numpy as np
import pytest
from websockets.asyncio.client import connect

from streaming.audio import FRAME, to_float
from streaming.conversation.conversation import HEARD_TIMEOUT_S
from streaming.engine.engine import Engine
from streaming.protocol.messages import PATH, SessionStart
from streaming.server.openai import REALTIME_PATH
from streaming.server.openai.input_buffer import MAX_HELD_SAMPLES
from tests.engine.stub_step import StubStep
from tests.server.live_server import LiveServer, run, serving
from tests.server.live_server import client as native_client
from tests.server.openai.client import LOUD, MANUAL, QUIET, SPEECH, encoded, kinds, realtime, said_by

RESPONSE = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]
COMMIT = ["input_audio_buffer.committed", "conversation.item.added", "conversation.item.done"]
Q = 4


def test_a_turn_is_told_in_full_and_in_order(server: LiveServer, step: StubStep) -> None:
    """LiveKit's plugin fails an assertion where an event of the sequence is missing, and waits for its metadata."""

    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH[:700], SPEECH[700:])
            await session.send("input_audio_buffer.commit")
            metadata = {"client_event_id": "mine"}
            await session.send("response.create", response={"metadata": metadata, "max_output_tokens": 5 * Q})
            response = (await session.until("response.done"))["response"]
            assert session.audio[response["id"]] == said_by(step.streams[0])
            ids = {event["event_id"] for event in session.seen}
            assert len(ids) == len(session.seen)
            previous = [event.get("previous_item_id") for event in session.seen if "item.added" in event["type"]]
            assert previous == [None, None, session.seen[0]["item_id"]], "the last two are one item's"
            assert session.types() == COMMIT + RESPONSE
            assert response["metadata"] == metadata
            assert response["status_details"]["reason"] == "max_output_tokens"
            usage = response["usage"]
            assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (3 * Q, 5 * Q, 8 * Q)
            assert usage["output_token_details"]["audio_tokens"] == 5 * Q
            await session.append(SPEECH[:FRAME])
            await session.send("response.create", response={"max_output_tokens": Q})
            usage = (await session.until("response.done"))["response"]["usage"]
            assert (usage["input_tokens"], usage["input_token_details"]["cached_tokens"]) == (9 * Q, 8 * Q)
            assert session.types() == COMMIT + RESPONSE, "what was not committed is committed by going on from it"

    run(scenario())
    assert kinds(step.streams[0]) == "hhhssssshs"


def test_a_client_that_asks_for_no_limit_gets_a_completed_response(server: LiveServer, step: StubStep) -> None:
    """A client's log filled with 'response incomplete' for what is as it should be."""
    step.ends = lambda length, digest: length == 6

    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("response.create")
            response = (await session.until("response.done"))["response"]
            assert response["status"] == "completed"
            assert response["max_output_tokens"] == "inf"

    run(scenario())


@pytest.mark.usefixtures("heard_in_time")
def test_a_truncation_cuts_the_context_to_what_was_heard(server: LiveServer, step: StubStep) -> None:
    """What is said between the cancellation and the truncation, which is still on its way, follows the cut."""

    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("response.create")
            item_id = (await session.deltas(8))["item_id"]
            await session.send("response.cancel")
            await session.append(SPEECH[:FRAME])
            await session.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=170)
            truncated = await session.until("conversation.item.truncated")
            assert truncated["audio_end_ms"] == 170
            response = next(event for event in session.seen if event["type"] == "response.done")["response"]
            assert (response["status"], response["status_details"]["reason"]) == ("cancelled", "client_cancelled")
            assert response["output"][0]["status"] == "incomplete"
            await session.append(SPEECH[:FRAME])
            await session.send("response.create", response={"max_output_tokens": Q})
            await session.until("response.done")

    run(scenario())
    assert kinds(step.streams[0]) == "hhhss" + "hh" + "s"


def test_without_a_truncation_the_clock_says_what_was_heard(server: LiveServer, step: StubStep) -> None:
    """A client that cancels and says no more left all that it was sent in the context, heard or not."""

    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("response.create")
            await session.deltas(8)  # at once: the lead; nobody can have played more than the first of it
            await session.send("response.cancel")
            await session.until("response.done")
            await session.append(SPEECH)
            await session.send("response.create", response={"max_output_tokens": Q})
            await session.until("response.done")

    run(scenario())
    said = kinds(step.streams[0]).removeprefix("hhh").removesuffix("hhhs")
    assert len(said) < 8 and set(said) <= {"s"}


def test_a_client_that_never_truncates_is_heard_again(server: LiveServer) -> None:
    """What is said after a cancellation waits for the truncation, which some clients never send: hands-free, they were
    not heard any more.
    """

    async def scenario() -> None:
        async with realtime(server.url) as session:
            detection = {"type": "server_vad", "silence_duration_ms": 200}
            await session.update({"audio": {"input": {"turn_detection": detection}}})
            await session.append(*[LOUD] * 4, *[QUIET] * 4)
            await session.deltas(3)
            await session.send("response.cancel")
            await session.until("response.done")
            await asyncio.sleep(1.2 * HEARD_TIMEOUT_S)
            await session.append(*[LOUD] * 4, *[QUIET] * 6)
            await session.until("input_audio_buffer.speech_started")
            await session.until("response.output_audio.delta")

    run(scenario(), 20)


@pytest.mark.usefixtures("heard_in_time")
def test_usage_counts_what_a_truncation_left_in_the_context(server: LiveServer) -> None:
    """A client that pays by its tokens paid for what was taken back, turn after turn."""

    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("response.create")
            item_id = (await session.deltas(8))["item_id"]
            await session.send("response.cancel")
            await session.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=170)
            await session.until("conversation.item.truncated")
            await session.append(SPEECH[:FRAME])
            await session.send("response.create", response={"max_output_tokens": Q})
            while (done := await session.until("response.done"))["response"]["status"] == "cancelled":
                pass
            usage = done["response"]["usage"]
            kept = (3 + 2) * Q
            assert (usage["input_token_details"]["cached_tokens"], usage["input_tokens"]) == (kept, kept + Q)

    run(scenario())


@pytest.mark.parametrize("unsaid", ["deleted", "truncated to nothing"])
def test_another_take_of_what_was_unsaid(unsaid: str) -> None:
    """Another response went on from what could not be rewound, and, where all could, said the same again, since its
    seed was the same. A take is had of a response of any length.
    """
    step = StubStep(1, rewind_frames=4)

    async def scenario(url: str) -> list[bytes]:
        async with realtime(url, MANUAL) as session:
            await session.append(SPEECH)
            said, used = [], []
            for _ in range(3):
                await session.send("response.create", response={"max_output_tokens": 6 * Q})
                response = (await session.until("response.done"))["response"]
                said.append(session.audio[response["id"]])
                used.append(response["usage"]["input_tokens"])
                item = {"item_id": response["output"][0]["id"]}
                if unsaid == "deleted":
                    await session.send("conversation.item.delete", **item)
                else:
                    await session.send("conversation.item.truncate", content_index=0, audio_end_ms=0, **item)
            assert used == [3 * Q] * 3, "the prompt alone"
            await session.append(SPEECH[:FRAME])
            await session.send("response.create", response={"max_output_tokens": Q})
            await session.until("response.done")
            return said

    with Engine(step, "stub") as engine, serving(engine) as live:
        said = run(scenario(live.url))
    assert len(set(said)) == 3
    assert kinds(step.streams[0]) == "hhh" + "h" + "s", "what is said next follows what is left"


def test_a_take_of_a_seed_is_that_seeds() -> None:
    """Pins a seed that is asked for and not had: a take can be had again."""
    step = StubStep(1)

    async def scenario(url: str) -> list[bytes]:
        async with realtime(url, MANUAL) as session:
            await session.append(SPEECH)
            said = []
            for seed in ("5", "6", "5"):
                wanted = {"max_output_tokens": 2 * Q, "metadata": {"seed": seed}}
                await session.send("response.create", response=wanted)
                response = (await session.until("response.done"))["response"]
                said.append(session.audio[response["id"]])
                await session.send("conversation.item.delete", item_id=response["output"][0]["id"])
            return said

    with Engine(step, "stub") as engine, serving(engine) as live:
        first, second, third = run(scenario(live.url))
    assert first == third != second


def test_a_response_that_is_deleted_while_it_is_spoken_is_taken_anew(server: LiveServer, step: StubStep) -> None:
    """A client that is in a hurry for another response cancels, deletes and asks all at once."""

    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("response.create")
            item_id = (await session.deltas(8))["item_id"]
            await session.send("conversation.item.delete", item_id=item_id)
            await session.send("response.create", response={"max_output_tokens": 2 * Q})
            cancelled = (await session.until("response.done"))["response"]
            taken = (await session.until("response.done"))["response"]
            assert (cancelled["status"], taken["status"]) == ("cancelled", "incomplete")
            assert session.audio[taken["id"]] != session.audio[cancelled["id"]][: 4 * FRAME]
            assert "conversation.item.deleted" in session.types()

    run(scenario())
    assert kinds(step.streams[0]) == "hhhss"


def test_a_take_that_is_not_kept_fails_in_words_and_the_session_goes_on() -> None:
    """The server keeps none with `--takes 0`; an `error` would end pipecat's session."""
    step = StubStep(1, rewind_frames=4)

    async def scenario(url: str) -> None:
        async with realtime(url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("response.create", response={"max_output_tokens": 6 * Q})
            item_id = (await session.until("response.done"))["response"]["output"][0]["id"]
            await session.send("conversation.item.delete", item_id=item_id)
            await session.send("response.create", response={"metadata": {"a": "b"}})
            failed = (await session.until("response.done"))["response"]
            error = failed["status_details"]["error"]
            assert (failed["status"], failed["metadata"]) == ("failed", {"a": "b"})
            assert (error["type"], error["code"]) == ("invalid_request_error", "take_gone")
            await session.append(SPEECH[:FRAME])
            await session.send("response.create", response={"max_output_tokens": Q})
            assert (await session.until("response.done"))["response"]["status"] == "incomplete"

    with Engine(step, "stub") as engine, serving(engine, takes=0) as live:
        run(scenario(live.url))
    assert kinds(step.streams[0]) == "hhh" + "ss" + "h" + "s"


@pytest.mark.usefixtures("heard_in_time")
def test_a_voice_that_interrupts_before_anything_was_heard_follows_what_it_said_before(
    server: LiveServer, step: StubStep
) -> None:
    """The voice is answered as ever: only a response that follows nothing new is a take."""

    async def scenario() -> None:
        async with realtime(server.url) as session:
            detection = {"type": "server_vad", "silence_duration_ms": 200}
            await session.update({"audio": {"input": {"turn_detection": detection}}})
            await session.append(*[LOUD] * 4, *[QUIET] * 4)
            item_id = (await session.deltas(8))["item_id"]
            await session.append(*[LOUD] * 4)
            await session.until("input_audio_buffer.speech_started")
            await session.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=0)
            await session.until("conversation.item.truncated")
            await session.append(*[LOUD] * 2, *[QUIET] * 4)
            await session.deltas(1)

    run(scenario())
    assert set(kinds(step.streams[0]).rstrip("s")) == {"h"}


def test_what_is_said_over_a_long_response_is_kept_for_half_a_minute(server: LiveServer, step: StubStep) -> None:
    """A client that talks on while it is spoken to filled the server's memory."""
    second, most = 24_000, MAX_HELD_SAMPLES // FRAME

    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("response.create")
            await session.deltas(1)
            for number in range(35):
                await session.append(np.full(second, number, np.int16))
            await session.send("response.cancel")
            await session.until("response.done")
            await session.send("response.create", response={"max_output_tokens": Q})
            await session.until("response.done")

    run(scenario())
    heard = kinds(step.streams[0]).rstrip("s").removeprefix("hhh").lstrip("s")
    assert heard == "h" * most
    oldest = to_float(np.full(FRAME, 5, np.int16))
    assert step.streams[0].entries[-1 - most] == ("heard", zlib.crc32(oldest.tobytes())), "the oldest five are gone"


def test_audio_that_comes_while_a_response_is_spoken_belongs_to_the_next_turn(
    server: LiveServer, step: StubStep
) -> None:
    """The native protocol drops it; this one's input buffer does not."""

    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("response.create", response={"max_output_tokens": 4 * Q})
            await session.until("response.created")
            await session.append(SPEECH[: 2 * FRAME])
            await session.until("response.done")
            await session.send("input_audio_buffer.commit")
            await session.send("response.create", response={"max_output_tokens": Q})
            await session.until("response.done")

    run(scenario())
    assert kinds(step.streams[0]) == "hhhsssshhs"


def test_clearing_forgets_what_was_not_committed(server: LiveServer, step: StubStep) -> None:
    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("input_audio_buffer.clear")
            await session.until("input_audio_buffer.cleared")
            await session.append(SPEECH[: FRAME + 100])
            await session.send("input_audio_buffer.commit")
            await session.append(SPEECH[:960])
            await session.send("input_audio_buffer.clear")
            await session.until("input_audio_buffer.cleared")
            await session.send("response.create", response={"max_output_tokens": Q})
            usage = (await session.until("response.done"))["response"]["usage"]
            assert usage["input_tokens"] == 2 * Q, "a frame and the 100 samples that were committed"

    run(scenario())
    padded = np.concatenate((to_float(SPEECH[FRAME : FRAME + 100]), np.zeros(FRAME - 100, np.float32)))
    assert step.streams[0].entries[1] == ("heard", zlib.crc32(padded.tobytes()))


@pytest.mark.parametrize(
    "detection", [{"type": "server_vad", "silence_duration_ms": 200}, {"type": "semantic_vad", "eagerness": "high"}]
)
def test_the_end_of_speech_is_heard_and_answered(server: LiveServer, step: StubStep, detection: dict) -> None:
    async def scenario() -> None:
        async with realtime(server.url) as session:
            options = {"audio": {"input": {"turn_detection": detection}}, "max_output_tokens": 2 * Q}
            updated = (await session.update(options))["session"]["audio"]["input"]["turn_detection"]
            assert (updated["type"], updated["create_response"]) == (detection["type"], True)
            session.types()
            await session.append(*[QUIET] * 6, *[LOUD] * 6, *[QUIET] * 8)
            await session.until("response.done")
            started, stopped, committed = session.seen[:3]
            assert started["item_id"] == stopped["item_id"] == committed["item_id"]
            assert started["audio_start_ms"] == 480 - 300
            assert stopped["audio_end_ms"] - 960 in (200, 300)
            speech = ["input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped"]
            assert session.types() == speech + COMMIT + RESPONSE

    run(scenario())


@pytest.mark.usefixtures("heard_in_time")
def test_a_voice_interrupts_and_the_truncation_that_follows_cuts(server: LiveServer, step: StubStep) -> None:
    """Pipecat truncates when it is told of the speech; the response is over by then, and its audio stops at once."""

    async def scenario() -> None:
        async with realtime(server.url) as session:
            await session.update(
                {"audio": {"input": {"turn_detection": {"type": "server_vad", "silence_duration_ms": 200}}}}
            )
            await session.append(*[LOUD] * 4, *[QUIET] * 4)
            item_id = (await session.deltas(8))["item_id"]
            await session.append(*[LOUD] * 4)
            await session.until("input_audio_buffer.speech_started")
            response = (await session.until("response.done"))["response"]
            assert (response["status"], response["status_details"]["reason"]) == ("cancelled", "turn_detected")
            await session.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=250)
            await session.until("conversation.item.truncated")
            session.types()
            await session.append(*[LOUD] * 2, *[QUIET] * 4)
            await session.until("response.output_audio.delta")
            assert session.types()[:4] == ["input_audio_buffer.speech_stopped", *COMMIT], "and no late audio"

    run(scenario())
    heard, said = kinds(step.streams[0]).split("s", 1)
    assert 4 <= len(heard) <= 8
    assert said.startswith("ss" + "h"), "three whole frames were heard"


def test_nobody_is_interrupted_where_the_client_does_not_want_it(server: LiveServer) -> None:
    async def scenario() -> None:
        detection = {"type": "server_vad", "silence_duration_ms": 200, "interrupt_response": False}
        async with realtime(server.url) as session:
            await session.update({"audio": {"input": {"turn_detection": detection}}, "max_output_tokens": 10 * Q})
            await session.append(*[LOUD] * 4, *[QUIET] * 4)
            await session.until("response.created")
            await session.append(*[LOUD] * 4, *[QUIET] * 8)
            assert (await session.until("response.done"))["response"]["status"] == "incomplete"

    run(scenario())


def test_speech_may_be_heard_without_an_answer_until_one_is_asked_for(server: LiveServer, step: StubStep) -> None:
    async def scenario() -> None:
        detection = {"type": "server_vad", "silence_duration_ms": 200, "create_response": False}
        async with realtime(server.url) as session:
            await session.update({"audio": {"input": {"turn_detection": detection}}})
            session.types()
            for _ in range(2):
                await session.append(*[LOUD] * 4, *[QUIET] * 8)
                await session.until("conversation.item.done")
                speech = ["input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped"]
                assert session.types() == speech + COMMIT
            await session.send("response.create", response={"max_output_tokens": Q})
            await session.until("response.done")
            assert session.types() == RESPONSE

    run(scenario())
    assert kinds(step.streams[0]).count("s") == 1


def test_a_response_may_be_asked_for_while_the_voice_takes_turns(server: LiveServer) -> None:
    """LiveKit's `generate_reply` asks, whatever the turn detection is. Who asks twice is refused, as the API does."""

    async def scenario() -> None:
        async with realtime(server.url) as session:
            await session.update({"audio": {"input": {"turn_detection": {"type": "server_vad"}}}})
            await session.append(*[LOUD] * 5)
            await session.until("input_audio_buffer.speech_started")
            session.types()
            await session.send("response.create", response={"max_output_tokens": 12 * Q})
            await session.until("response.output_audio.delta")
            assert session.types() == ["input_audio_buffer.speech_stopped", *COMMIT, *RESPONSE[:5]]
            await session.send("response.create", event_id="twice")
            while (event := await session.next())["type"] != "error":
                pass
            assert event["error"]["code"] == "conversation_already_has_active_response"
            assert event["error"]["event_id"] == "twice"
            assert (await session.until("response.done"))["response"]["status"] == "incomplete"

    run(scenario())


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ({}, "empty_prompt"),
        ({"output_modalities": ["text"]}, "unsupported_modality"),
        ({"conversation": "none"}, "unsupported_conversation"),
        ({"input": []}, "unsupported_conversation"),
    ],
)
def test_a_response_that_cannot_be_fails_without_an_error_event(server: LiveServer, response: dict, code: str) -> None:
    """Pipecat asks for one before anything was heard, and stops receiving at the first `error`."""

    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.send("response.create", response=response | {"metadata": {"a": "b"}})
            failed = (await session.until("response.done"))["response"]
            assert failed["status"] == "failed"
            assert failed["status_details"]["error"]["code"] == code
            assert failed["metadata"] == {"a": "b"}
            assert session.types() == ["response.created", "response.done"]
            await session.append(SPEECH)
            await session.send("response.create", response={"max_output_tokens": Q})
            assert (await session.until("response.done"))["response"]["status"] == "incomplete"

    run(scenario())


def test_what_other_models_have_is_accepted_quietly(server: LiveServer) -> None:
    """LiveKit and pipecat send all of this unasked, and an `error` ends pipecat's session."""

    async def scenario() -> None:
        async with realtime(server.url) as session:
            updated = await session.update(
                {
                    "model": "gpt-realtime",
                    "instructions": "Be brief.",
                    "tools": [{"type": "function", "name": "f", "parameters": {}}],
                    "tool_choice": "auto",
                    "tracing": "auto",
                    "truncation": "auto",
                    "include": None,
                    "audio": {
                        "input": {
                            "format": {"type": "audio/pcm", "rate": 24000},
                            "transcription": {"model": "whisper-1", "language": None},
                            "noise_reduction": {"type": "near_field"},
                            "turn_detection": False,
                        },
                        "output": {"voice": "marin", "speed": 1.2, "format": None},
                    },
                }
            )
            assert updated["session"]["audio"]["input"]["turn_detection"] is None
            assert updated["session"]["audio"]["output"]["voice"] == "marin"
            assert updated["session"]["tools"] == []
            item = {"type": "message", "role": "system", "content": [{"type": "input_text", "text": "hello"}]}
            await session.send("conversation.item.create", item=item | {"id": "mine"})
            added = await session.until("conversation.item.added")
            assert added["item"]["id"] == "mine"
            await session.send("conversation.item.retrieve", item_id="mine")
            assert (await session.until("conversation.item.retrieved"))["item"]["content"] == item["content"]
            await session.send("conversation.item.delete", item_id="mine")
            await session.until("conversation.item.deleted")
            await session.append(SPEECH)
            await session.send("response.create", response={"max_output_tokens": Q, "instructions": "x", "tools": []})
            item_id = (await session.until("response.done"))["response"]["output"][0]["id"]
            await session.send("conversation.item.truncate", item_id=item_id, content_index=0, audio_end_ms=90_000)
            await session.until("conversation.item.truncated")
            await session.send("output_audio_buffer.clear")

    run(scenario())


@pytest.mark.parametrize(
    ("event", "code", "param"),
    [
        ({"type": "hum"}, "invalid_value", "type"),
        (
            {"type": "session.update", "session": {"max_output_tokens": 0}},
            "integer_below_min_value",
            "session.max_output_tokens",
        ),
        (
            {"type": "session.update", "session": {"max_output_tokens": "all"}},
            "invalid_value",
            "session.max_output_tokens",
        ),
        (
            {"type": "session.update", "session": {"output_modalities": ["smell"]}},
            "invalid_value",
            "session.output_modalities",
        ),
        (
            {
                "type": "session.update",
                "session": {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}},
            },
            "invalid_value",
            "session.audio.input.format.rate",
        ),
        ({"type": "session.update"}, "invalid_value", None),
        ({"type": "input_audio_buffer.append", "audio": "!!!"}, "invalid_value", "audio"),
        ({"type": "input_audio_buffer.append", "audio": "AAAA"}, "invalid_value", None),
        ({"type": "input_audio_buffer.commit"}, "input_audio_buffer_commit_empty", None),
        ({"type": "response.cancel"}, "response_cancel_not_active", None),
        (
            {"type": "conversation.item.truncate", "item_id": "x", "content_index": 0, "audio_end_ms": 1},
            "item_truncate_invalid_item_id",
            "item_id",
        ),
        ({"type": "conversation.item.retrieve", "item_id": "x"}, "item_retrieve_invalid_item_id", None),
        ({"type": "conversation.item.delete", "item_id": "x"}, "item_delete_invalid_item_id", "item_id"),
        (
            {
                "type": "conversation.item.create",
                "item": {"type": "message", "role": "user", "content": [{"type": "input_audio"}]},
            },
            "invalid_value",
            "item.content",
        ),
        ({"type": "conversation.item.create", "item": {"type": "message"}}, "missing_required_parameter", "item.role"),
        ({"no": "type"}, "missing_required_parameter", "type"),
    ],
)
def test_what_the_api_refuses_is_refused_and_the_session_goes_on(
    server: LiveServer, event: dict, code: str, param: str | None
) -> None:
    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.socket.send(json.dumps(event | {"event_id": "asked"}))
            error = (await session.next())["error"]
            assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param), error
            assert error["event_id"] == "asked"
            await session.append(SPEECH)
            await session.send("response.create", response={"max_output_tokens": Q})
            await session.until("response.done")

    run(scenario())


@pytest.mark.parametrize("name", ["audio/pcmu", "audio/pcma"])
def test_telephone_audio_goes_both_ways(server: LiveServer, step: StubStep, name: str) -> None:
    async def scenario() -> None:
        formats = {"input": {"format": {"type": name}, "turn_detection": None}, "output": {"format": {"type": name}}}
        async with realtime(server.url) as session:
            updated = await session.update({"audio": formats})
            assert updated["session"]["audio"]["output"]["format"] == {"type": name}
            for _ in range(12):
                await session.append(bytes(160))  # 20 ms
            await session.send("input_audio_buffer.commit")
            await session.send("response.create", response={"max_output_tokens": 5 * Q})
            response = (await session.until("response.done"))["response"]
            assert len(session.audio[response["id"]]) == 5 * FRAME // 3

    run(scenario())
    assert kinds(step.streams[0]) == "hhhsssss"


def test_the_same_seed_gives_the_same_response_at_the_temperature_asked_for(server: LiveServer, step: StubStep) -> None:
    async def scenario(response: dict) -> bytes:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("response.create", response=response | {"max_output_tokens": 3 * Q})
            return session.audio[(await session.until("response.done"))["response"]["id"]]

    seeded = {"metadata": {"seed": "7"}}
    assert run(scenario(seeded)) == run(scenario(seeded)) != run(scenario(seeded | {"temperature": 0.3}))


def test_a_long_append_is_taken_and_a_longer_one_is_too_much(
    server: LiveServer, step: StubStep, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 MiB in one event is what clients may send; the native protocol's limit is 96 KiB."""
    step.context_frames = 10_000
    monkeypatch.setattr("streaming.engine.engine._APART_S", 0.0)  # there are 4,096 steps, which wait for nobody
    monkeypatch.setattr("streaming.server.event_loop._TOGETHER_S", 0.0)

    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(bytes(15 * 2**20))
            await session.send("response.create", response={"max_output_tokens": Q})
            usage = (await session.until("response.done"))["response"]["usage"]
            assert usage["input_tokens"] == -(-15 * 2**20 // (2 * FRAME)) * Q
            announced = b"\x81\xff" + (21 * 2**20).to_bytes(8, "big") + bytes(4)  # a text frame (RFC 6455, section 5.2)
            session.socket.transport.write(announced)
            await session.socket.wait_closed()
            assert session.socket.close_code == 1009

    run(scenario())


def test_a_session_that_cannot_listen_yet_is_not_sent_hundreds_of_megabytes(server: LiveServer) -> None:
    """Sixteen events of 20 MiB each were kept for a client whose audio could not be heard as fast as it came."""
    gate = StubStep(1, gated=True)

    async def scenario(url: str) -> int:
        event = json.dumps({"type": "input_audio_buffer.append", "audio": encoded(bytes(2**20))})
        async with realtime(url, MANUAL) as session:
            sent = 0
            with suppress(TimeoutError):
                async with asyncio.timeout(2):
                    while sent < 100:
                        await session.socket.send(event)
                        sent += 1
            session.socket.transport.abort()
            return sent

    with Engine(gate, "stub") as engine, serving(engine) as live:
        assert run(scenario(live.url)) < 12, "what TCP holds, included"
        gate.allow_all()


def test_a_full_server_says_so_and_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(url: str) -> None:
        async with native_client(url, SessionStart()), connect(url.replace(PATH, REALTIME_PATH)) as socket:
            error = json.loads(await socket.recv())["error"]
            assert (error["type"], error["code"], error["retry_after_ms"]) == ("server_error", "full", 1000)
            await socket.wait_closed()
            assert socket.close_code == 1013

    with Engine(StubStep(1), "stub") as engine, serving(engine) as live:
        run(scenario(live.url))


def test_a_client_in_line_is_told_its_place() -> None:
    async def scenario(url: str) -> None:
        async with native_client(url, SessionStart()) as first, connect(url.replace(PATH, REALTIME_PATH)) as socket:
            queued = json.loads(await socket.recv())
            assert (queued["type"], queued["place"]) == ("session.queued", 1)
            await first.socket.close()
            assert json.loads(await socket.recv())["type"] == "session.created"

    with Engine(StubStep(1), "stub") as engine, serving(engine, queue=1) as live:
        run(scenario(live.url))


def test_a_server_that_stops_fails_what_it_cannot_finish(server: LiveServer) -> None:
    async def scenario() -> None:
        async with realtime(server.url, MANUAL) as session:
            await session.append(SPEECH)
            await session.send("response.create")
            await session.deltas(2)
            server.stop()
            server.stop()
            assert (await session.until("response.done"))["response"]["status"] == "failed"
            assert (await session.next())["error"]["code"] == "session_stopping"
            await session.socket.wait_closed()
            assert session.socket.close_code == 1001

    run(scenario())


def test_any_model_may_be_asked_for(server: LiveServer) -> None:
    """The SDK cannot connect without one."""

    async def scenario(query: str) -> str:
        async with connect(server.url.replace(PATH, REALTIME_PATH) + query) as socket:
            model: str = json.loads(await socket.recv())["session"]["model"]
            return model

    assert run(scenario("?model=gpt-realtime")) == "gpt-realtime"
    assert run(scenario("")) == "stub"
