"""Rubbish in every form and order: what comes back are the protocol's own events and typed errors, or a close that says
why, and the server is ready for the next.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from streaming.models.voice_activity import load_vad_model
from streaming.protocol.messages import PATH
from streaming.server.openai import LIVE_PATH, REALTIME_PATH
from tests.faults.harness import Watched, _turns, alone, wait_for, watched
from tests.faults.test_fuzz import any_text, literal
from tests.server.live_server import run
from tests.server.openai.client import SPEECH, encoded

REFUSALS = {
    "invalid_json",
    "invalid_value",
    "missing_required_parameter",
    "integer_below_min_value",
    "string_above_max_length",
    "input_audio_buffer_commit_empty",
    "response_cancel_not_active",
    "conversation_already_has_active_response",
    "item_truncate_invalid_item_id",
    "item_delete_invalid_item_id",
    "item_retrieve_invalid_item_id",
    "item_create_duplicate_item_id",
    "session_already_started",
    "session_not_started",
}

value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.sampled_from(
        ["", "inf", "none", "audio", "text", "item", "audio/pcm", "audio/pcmu", "audio/pcma", "server_vad"]
    )
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "audio",
                    "input",
                    "output",
                    "format",
                    "type",
                    "rate",
                    "turn_detection",
                    "threshold",
                    "metadata",
                    "content",
                ]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
audio = st.one_of(
    st.just(encoded(SPEECH)), st.binary(max_size=64).map(encoded), st.text(max_size=8), st.just("A" * 1001), value
)
session = st.fixed_dictionaries(
    {},
    optional={
        "audio": st.fixed_dictionaries(
            {},
            optional={
                "input": st.fixed_dictionaries(
                    {},
                    optional={
                        "format": st.sampled_from([{"type": "audio/pcm"}, {"type": "audio/pcmu"}]) | value,
                        "turn_detection": st.sampled_from([None, False, {"type": "server_vad"}]) | value,
                    },
                ),
                "output": st.fixed_dictionaries(
                    {}, optional={"format": st.just({"type": "audio/pcma"}), "voice": value}
                ),
            },
        ),
        "max_output_tokens": st.integers(-1, 2**70) | value,
        "temperature": st.floats(allow_nan=False, allow_infinity=False) | value,
        "output_modalities": value,
    },
)
realtime_event = st.one_of(
    st.builds(lambda audio: {"type": "input_audio_buffer.append", "audio": audio}, audio),
    st.builds(lambda it: {"type": "session.update", "session": it}, session | value),
    st.sampled_from(
        [
            {"type": "input_audio_buffer.commit"},
            {"type": "input_audio_buffer.clear"},
            {"type": "response.create"},
            {"type": "response.create", "response": {"max_output_tokens": 8}},
            {"type": "response.cancel"},
            {"type": "output_audio_buffer.clear"},
            {"type": "conversation.item.create", "item": {"type": "message", "role": "user", "id": "item"}},
            {"type": "conversation.item.truncate", "item_id": "item", "audio_end_ms": 1e300},
            {"type": "conversation.item.delete", "item_id": "item"},
            {"type": "conversation.item.retrieve", "item_id": "item"},
        ]
    ),
    st.builds(
        lambda kind, fields: {"type": kind} | fields,
        st.sampled_from(
            ["response.create", "conversation.item.create", "conversation.item.truncate", "response.cancel"]
        ),
        st.dictionaries(
            st.sampled_from(["response", "item", "item_id", "audio_end_ms", "event_id"]), value, max_size=3
        ),
    ),
)
live_event = st.one_of(
    st.builds(lambda audio: {"type": "session.input_audio.append", "audio": audio}, audio),
    st.sampled_from(["session.start", "session.update", "session.input_audio.mute", "session.thinking.append"]).flatmap(
        lambda kind: st.builds(lambda it: {"type": kind, "session": it}, session | value)
    ),
)


def texts(event: st.SearchStrategy[dict]) -> st.SearchStrategy[list[str | bytes]]:
    """A session's worth of messages, most of them meant well."""
    return st.lists(event.map(json.dumps) | any_text | literal | st.binary(max_size=32), max_size=12)


thorough = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def shared() -> Iterator[Watched]:
    load_vad_model()  # it opens files that stay open
    with watched(slots=64, step_s=0.0) as it:
        yield it


@pytest.fixture
def server(shared: Watched) -> Iterator[Watched]:
    """One for all; after each test nothing is left of anybody, and it says in a turn what it says alone."""
    yield shared
    wait_for("free slots", lambda: shared.sessions() == 0)
    wait_for("tasks to end", lambda: shared.count_tasks() <= shared.tasks)
    assert shared.engine.failure is None
    assert shared.health()["status"] == "ready"
    assert run(_turns(shared.url, 1)) == alone(1)


async def _converse(url: str, sent: list[str | bytes], last: str) -> None:
    """Say all of it, then something that is surely answered, and look at everything that comes back."""
    async with connect(url, compression=None) as socket:
        with suppress(ConnectionClosed):
            for data in [*sent, last]:
                await socket.send(data)
            async with asyncio.timeout(10):
                while True:
                    event = json.loads(await socket.recv())
                    assert isinstance(event["type"], str)
                    if event["type"] == "error":
                        assert event["error"]["code"] in REFUSALS, event
                    if "last" in json.dumps(event):
                        return
        assert socket.close_code in (1000, 1007, 1008), (socket.close_code, socket.close_reason)


@thorough
@given(texts(realtime_event))
def test_any_realtime_events_in_any_order(server: Watched, sent: list[str | bytes]) -> None:
    """Any of them that raises ends the session with 1011 or leaves the client without an answer."""
    last = json.dumps({"type": "conversation.item.retrieve", "item_id": "?", "event_id": "last"})
    run(_converse(server.url.replace(PATH, REALTIME_PATH), sent, last))


@thorough
@given(st.booleans(), texts(live_event))
def test_any_live_events_in_any_order(server: Watched, starts: bool, sent: list[str | bytes]) -> None:
    start = [json.dumps({"type": "session.start", "session": {"model": "x"}})] if starts else []
    last = json.dumps({"type": "session.input_audio.unmute", "event_id": "last"})
    run(_converse(server.url.replace(PATH, LIVE_PATH), [*start, *sent], last))
