"""A Realtime session's options: what a client may ask for, what it gets, and what that is in native terms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from streaming.audio import FRAME_RATE, SAMPLE_RATE
from streaming.protocol.messages import SamplingOptions, SessionStart, VadOptions
from streaming.server.openai import realtime_client_events as asked
from streaming.server.openai.formats import G711_RATE, PCM, Format
from streaming.server.openai.realtime_events import EventError, Limit

_MAX_FRAMES = 45_000  # an hour
_SILENCE_MS = {"low": 1000, "medium": 500, "auto": 500, "high": 300}
"""The silence, in ms, that an eagerness of `semantic_vad` means to a detector that knows only silence."""
_SERVER_VAD = asked.TurnDetection()


@dataclass(frozen=True)
class Model:
    """The facts about the engine that the dialect needs. name: as the client asked for it."""

    name: str
    num_codebooks: int
    context_frames: int

    def seconds(self, limit: Limit) -> float:
        """Return the seconds that so many tokens last, one a codebook and frame; without a limit, what the model
        remembers.
        """
        frames = self.context_frames if limit == "inf" else max(1, limit // self.num_codebooks)
        return min(frames, _MAX_FRAMES) / FRAME_RATE


@dataclass(frozen=True)
class Options:
    """A session's options as they are. detection: None where the client says when it has spoken. temperature: None for
    the model's.
    """

    input: Format = PCM
    output: Format = PCM
    detection: asked.TurnDetection | None = _SERVER_VAD
    modalities: tuple[str, ...] = ("audio",)
    voice: str = "continuation"
    limit: Limit = "inf"
    temperature: float | None = None

    def vad(self) -> VadOptions:
        """Return the voice activity options as the conversation has them, held to what it allows."""
        detection = self.detection or asked.TurnDetection()
        threshold = 0.5 if detection.threshold is None else detection.threshold
        prefix = 300 if detection.prefix_padding_ms is None else detection.prefix_padding_ms
        silence = detection.silence_duration_ms
        if detection.type == "semantic_vad" or silence is None:
            silence = _SILENCE_MS[detection.eagerness or "auto"]
        return VadOptions(
            threshold=min(max(threshold, 0.01), 0.99),
            silence_ms=int(min(max(silence, 80), 10_000)),
            prefix_ms=int(min(max(prefix, 0), 2_000)),
            barge_in=detection.interrupt_response is not False,
            respond=self.responds and "audio" in self.modalities,
        )

    @property
    def responds(self) -> bool:
        """Return whether a response follows the end of speech unasked."""
        return self.detection is not None and self.detection.create_response is not False

    def updated(self, update: asked.SessionOption) -> Options:
        """Raises `EventError` for what no session can be."""
        audio = update.audio or asked.AudioOption()
        given, wanted = audio.input or asked.InputOption(), audio.output or asked.OutputOption()
        changes: dict[str, Any] = {}
        if given.format is not None:
            changes["input"] = format_of(given.format, "session.audio.input.format")
        if wanted.format is not None:
            changes["output"] = format_of(wanted.format, "session.audio.output.format")
        if isinstance(wanted.voice, str):
            changes["voice"] = wanted.voice[:64]
        detection = given.turn_detection
        if isinstance(detection, asked.TurnDetection):
            changes["detection"] = detection
        elif not isinstance(detection, msgspec.UnsetType):
            changes["detection"] = asked.TurnDetection() if detection else None
        if update.output_modalities is not None:
            changes["modalities"] = modalities_of(update.output_modalities, "session.output_modalities")
        if update.max_output_tokens is not None:
            changes["limit"] = limit_of(update.max_output_tokens, "session.max_output_tokens")
        if update.temperature is not None:
            changes["temperature"] = temperature_of(update.temperature)
        return replace(self, **changes)

    def for_response(self, wanted: asked.ResponseOption) -> Options:
        """Return the options of a response that wants this. Raises `EventError` for what none can be."""
        modalities, limit = self.modalities, self.limit
        if wanted.output_modalities is not None:
            modalities = modalities_of(wanted.output_modalities, "response.output_modalities")
        if wanted.max_output_tokens is not None:
            limit = limit_of(wanted.max_output_tokens, "response.max_output_tokens")
        return replace(self, modalities=modalities, limit=limit)

    def sampling(self, temperature: float | None, metadata: dict[str, str] | None) -> SamplingOptions | None:
        """Return how a response is drawn that has these, None if as all are. metadata: may hold a `seed`."""
        seed = (metadata or {}).get("seed", "")
        seeded = seed.isascii() and seed.isdigit() and int(seed[:20]) < 2**63
        if temperature is None and not seeded:
            return None
        drawn = self.temperature if temperature is None else temperature_of(temperature)
        return SamplingOptions(temperature=drawn, seed=int(seed[:20]) if seeded else None)

    def session(self, session_id: str, model: Model) -> dict[str, Any]:
        """Return the session as it is. It may differ from what was asked for: it has no instructions and no tools."""
        vad = self.vad()
        detection: dict[str, Any] | None = None
        if self.detection is not None:
            detection = {
                "type": self.detection.type,
                "threshold": vad.threshold,
                "prefix_padding_ms": vad.prefix_ms,
                "silence_duration_ms": vad.silence_ms,
                "create_response": self.responds,
                "interrupt_response": vad.barge_in,
            }
            if self.detection.type == "semantic_vad":
                detection["eagerness"] = self.detection.eagerness or "auto"
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": session_id,
            "model": model.name,
            "output_modalities": list(self.modalities),
            "instructions": "",
            "tools": [],
            "tool_choice": "none",
            "max_output_tokens": self.limit,
            "audio": {
                "input": {
                    "format": described(self.input),
                    "transcription": None,
                    "noise_reduction": None,
                    "turn_detection": detection,
                },
                "output": {"format": described(self.output), "voice": self.voice, "speed": 1.0},
            },
        }


def session_start(model: Model, lead_ms: int) -> SessionStart:
    """Return the session that a client finds before it has asked for anything."""
    vad = Options().vad()
    return SessionStart(turn_taking="vad", vad=vad, lag="wait", max_seconds=model.seconds("inf"), lead_ms=lead_ms)


def format_of(option: asked.FormatOption, param: str) -> Format:
    """Return the format that is asked for. Raises `EventError` for a rate that is not the format's."""
    rate = SAMPLE_RATE if option.type == "audio/pcm" else G711_RATE
    if option.rate not in (None, rate):
        raise EventError("invalid_value", f"{option.type} has {rate} samples a second here", f"{param}.rate")
    return Format(option.type, rate)


def described(format: Format) -> dict[str, Any]:
    """Return a format as a session names it."""
    return {"type": format.type, "rate": format.rate} if format.type == "audio/pcm" else {"type": format.type}


def modalities_of(wanted: list[str], param: str) -> tuple[str, ...]:
    """Return what a response is to be made of. Raises `EventError`."""
    if not wanted or not set(wanted) <= {"audio", "text"}:
        raise EventError("invalid_value", 'output_modalities are ["audio"] or ["text"]', param)
    return ("audio",) if "audio" in wanted else ("text",)


def limit_of(limit: Limit, param: str) -> Limit:
    """Return the limit. Raises `EventError` for less than one token."""
    if limit != "inf" and limit < 1:
        raise EventError("integer_below_min_value", "max_output_tokens is 1 or more, or inf", param)
    return limit


def temperature_of(temperature: float) -> float:
    """Return the temperature, held to what the sampler takes."""
    return min(max(temperature, 0.0), 10.0)
