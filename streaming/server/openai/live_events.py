"""The events of OpenAI's Live protocol, as far as a model without words takes part in them: pure values.

Source: the types of the `openai` package, version 3.54 (`types/live`).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from streaming.errors import ProtocolError
from streaming.server.openai.formats import G711_RATE, PCM, Format
from streaming.server.openai.realtime_client_events import event_id_of


class ClientEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    event_id: str | None = None


class FormatOption(msgspec.Struct, frozen=True):
    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"] = "audio/pcm"
    rate: float | None = None


class OutputOption(msgspec.Struct, frozen=True):
    voice: Any = None


class AudioOption(msgspec.Struct, frozen=True):
    format: FormatOption | None = None
    output: OutputOption | None = None


class SessionOption(msgspec.Struct, frozen=True):
    model: str | None = None
    audio: AudioOption | None = None


class SessionStart(ClientEvent, kw_only=True, tag="session.start", frozen=True):
    session: SessionOption


class SessionUpdate(ClientEvent, kw_only=True, tag="session.update", frozen=True):
    pass


class Append(ClientEvent, kw_only=True, tag="session.input_audio.append", frozen=True):
    audio: bytes  # base64 on the wire


class Mute(ClientEvent, kw_only=True, tag="session.input_audio.mute", frozen=True):
    pass


class Unmute(ClientEvent, kw_only=True, tag="session.input_audio.unmute", frozen=True):
    pass


class AppendInstructions(ClientEvent, kw_only=True, tag="session.instructions.append", frozen=True):
    pass


class AppendThinking(ClientEvent, kw_only=True, tag="session.thinking.append", frozen=True):
    pass


class AppendCommentary(ClientEvent, kw_only=True, tag="session.commentary.append", frozen=True):
    pass


class SessionClose(ClientEvent, kw_only=True, tag="session.close", frozen=True):
    pass


AnyClientEvent = (
    SessionStart
    | SessionUpdate
    | Append
    | Mute
    | Unmute
    | AppendInstructions
    | AppendThinking
    | AppendCommentary
    | SessionClose
)

_decoder: msgspec.json.Decoder[AnyClientEvent] = msgspec.json.Decoder(AnyClientEvent)


class LiveError(ProtocolError):
    """An event that cannot be taken."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.event_code, self.param = code, param


def decode(text: str | bytes) -> AnyClientEvent:
    """Return what a client said. Raises `LiveError`."""
    try:
        if isinstance(text, str):
            return _decoder.decode(text)
        raise LiveError("invalid_json", "events are text messages")
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise LiveError("invalid_value", message, path.rstrip("`") or None) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise LiveError("invalid_json", f"not JSON: {error}") from None


def session_format(start: SessionStart) -> Format:
    """Return the format that a session asks for. Raises `LiveError` for a rate that is not the format's."""
    option = (start.session.audio or AudioOption()).format
    if option is None:
        return PCM
    rates = (24_000, 16_000) if option.type == "audio/pcm" else (G711_RATE,)
    if option.rate not in (None, *rates):
        raise LiveError("invalid_value", f"{option.type} has {rates} samples a second", "session.audio.format.rate")
    return Format(option.type, rates[0] if option.rate is None else int(option.rate))


def rejection(error: ProtocolError, data: str | bytes) -> dict[str, Any]:
    """Return what was wrong with this event of the client's."""
    code, param = (error.event_code, error.param) if isinstance(error, LiveError) else ("invalid_value", "audio")
    client_event_id = event_id_of(data)
    described = {"type": "invalid_request_error", "code": code, "message": str(error)[:1000], "param": param}
    described["client_event_id"] = client_event_id
    return {"type": "error", "client_event_id": client_event_id, "error": described}


def failure(code: str, message: str, retry_after_ms: int = 0) -> dict[str, Any]:
    """retry_after_ms: not OpenAI's; when it is worth trying again, 0 where it is not."""
    error = {"type": "server_error", "code": code, "message": message}
    return {"type": "error", "error": error | ({"retry_after_ms": retry_after_ms} if retry_after_ms else {})}


_encoder = msgspec.json.Encoder()


def say(event: dict[str, Any]) -> str:
    """Return an event as the text to send."""
    return _encoder.encode(event).decode()
