"""What clients of OpenAI's protocols say, read: the first thing that is wrong is named."""

from __future__ import annotations

import pytest

from streaming.server.openai import live_events, realtime_client_events
from streaming.server.openai.formats import PCM, Format
from streaming.server.openai.live_events import LiveError
from streaming.server.openai.realtime_events import EventError, encode, server_error


def test_what_is_meant_for_other_models_is_read_over() -> None:
    """Clients send instructions and tools with every session: refusing them refused the clients."""
    event = realtime_client_events.decode('{"type": "session.update", "session": {"tools": [1], "instructions": "x"}}')
    assert event == realtime_client_events.SessionUpdate(session=realtime_client_events.SessionOption())


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        ("{", "invalid_json", None),
        ('{"x": ' + "[" * 5000, "invalid_json", None),
        ("[]", "missing_required_parameter", "type"),
        ('{"type": "sing"}', "invalid_value", "type"),
        ('{"type": "session.update"}', "invalid_value", None),
        ('{"type": "input_audio_buffer.append", "audio": 5}', "invalid_value", "audio"),
    ],
)
def test_a_damaged_event_says_where(text: str, code: str, param: str | None) -> None:
    with pytest.raises(EventError) as raised:
        realtime_client_events.decode(text)
    assert (raised.value.event_code, raised.value.param) == (code, param)


def test_the_id_of_a_damaged_event_is_found() -> None:
    assert realtime_client_events.event_id_of('{"type": 5, "event_id": "mine", "x": {}}') == "mine"
    assert realtime_client_events.event_id_of('{"event_id": 5}') is None
    assert realtime_client_events.event_id_of(b"\xff") is None


def test_only_what_passes_has_a_time_to_try_again() -> None:
    assert b"retry_after_ms" not in realtime_encoded(0)
    assert b'"retry_after_ms":1000' in realtime_encoded(1000)


def realtime_encoded(retry_after_ms: int) -> bytes:
    return encode(server_error("full", "later", retry_after_ms)).encode()


@pytest.mark.parametrize(
    ("option", "format"),
    [
        ("{}", PCM),
        ('{"audio": {"format": {"type": "audio/pcm", "rate": 16000}}}', Format("audio/pcm", 16_000)),
        ('{"audio": {"format": {"type": "audio/pcmu"}}}', Format("audio/pcmu", 8_000)),
    ],
)
def test_a_live_session_has_the_format_that_it_asks_for(option: str, format: Format) -> None:
    start = live_events.decode('{"type": "session.start", "session": ' + option + "}")
    assert isinstance(start, live_events.SessionStart)
    assert live_events.session_format(start) == format


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        (b"{}", "invalid_json", None),
        ("{", "invalid_json", None),
        ('{"type": "session.start"}', "invalid_value", None),
        ('{"type": "session.start", "session": {"audio": 5}}', "invalid_value", "session.audio"),
    ],
)
def test_a_damaged_live_event_says_where(text: str | bytes, code: str, param: str | None) -> None:
    with pytest.raises(LiveError) as raised:
        live_events.decode(text)
    assert (raised.value.event_code, raised.value.param) == (code, param)


def test_a_rate_that_is_not_the_formats_is_refused() -> None:
    option = '{"audio": {"format": {"type": "audio/pcm", "rate": 44100}}}'
    start = live_events.decode('{"type": "session.start", "session": ' + option + "}")
    assert isinstance(start, live_events.SessionStart)
    with pytest.raises(LiveError, match="24000"):
        live_events.session_format(start)
