"""One Realtime response and its only item, an assistant's audio: how its course is told."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from streaming.audio import FRAME
from streaming.server.openai import realtime_events as events
from streaming.server.openai.formats import FormatEncoder
from streaming.server.openai.realtime_events import Item, Limit, ServerEvent
from streaming.server.openai.realtime_options import Model, described

Status = Literal["completed", "cancelled", "failed", "incomplete", "in_progress"]
_NO_TRANSCRIPT = events.Part(type="audio", transcript="")


def new_id(kind: str) -> str:
    """Return an id that looks as OpenAI's do."""
    return f"{kind}_{secrets.token_hex(8)}"


@dataclass
class Response:
    """turn: the conversation's. sent: samples that the client got. speaking: it is neither over nor cancelled.

    prompt_frames: what was heard for it; cached_frames: what the stream held before.
    """

    turn: int
    model: Model
    conversation_id: str
    metadata: dict[str, str] | None
    limit: Limit
    encoder: FormatEncoder
    voice: str
    id: str = field(default_factory=lambda: new_id("resp"))
    item_id: str = field(default_factory=lambda: new_id("item"))
    sent: int = 0
    prompt_frames: int = 0
    cached_frames: int = 0
    speaking: bool = True

    def item(self, status: Status) -> Item:
        """Return the item, when the response has this status."""
        begun = status == "in_progress"
        return Item(
            id=self.item_id,
            type="message",
            object="realtime.item",
            status="in_progress" if begun else "completed" if status == "completed" else "incomplete",
            role="assistant",
            content=[] if begun else [events.Part(type="output_audio", transcript="")],
        )

    def begun(self, previous_item_id: str | None) -> list[ServerEvent]:
        item = self.item("in_progress")
        return [
            events.ResponseCreated(response=self._told("in_progress", None)),
            events.OutputItemAdded(response_id=self.id, output_index=0, item=item),
            events.ItemAdded(item=item, previous_item_id=previous_item_id),
            events.PartAdded(response_id=self.id, item_id=self.item_id, part=_NO_TRANSCRIPT),
        ]

    def delta(self, data: bytes) -> list[ServerEvent]:
        """Return the events of some audio. data: encoded; a resampler may have none yet."""
        return [events.AudioDelta(response_id=self.id, item_id=self.item_id, delta=data)] if data else []

    def ended(self, details: events.StatusDetails, previous_item_id: str | None) -> list[ServerEvent]:
        item = self.item(details.type)
        return [
            events.AudioDone(response_id=self.id, item_id=self.item_id),
            events.PartDone(response_id=self.id, item_id=self.item_id, part=_NO_TRANSCRIPT),
            events.OutputItemDone(response_id=self.id, output_index=0, item=item),
            events.ItemDone(item=item, previous_item_id=previous_item_id),
            events.ResponseDone(response=self._told(details.type, details, [item])),
        ]

    def failed(self, failure: events.Failure) -> list[ServerEvent]:
        """Return how a response that never was spoken is told."""
        details = events.StatusDetails(type="failed", error=failure)
        return [
            events.ResponseCreated(response=self._told("in_progress", None)),
            events.ResponseDone(response=self._told("failed", details)),
        ]

    def _told(
        self, status: Status, details: events.StatusDetails | None, output: Sequence[Item] = ()
    ) -> events.Response:
        return events.Response(
            id=self.id,
            status=status,
            status_details=details,
            output=list(output),
            conversation_id=self.conversation_id,
            output_modalities=["audio"],
            max_output_tokens=self.limit,
            audio={"output": {"format": described(self.encoder.format), "voice": self.voice}},
            usage=None if status == "in_progress" else self._usage(),
            metadata=self.metadata,
        )

    def _usage(self) -> events.Usage:
        """Return the usage in the model's tokens, one a codebook and frame. What it had heard and said counts as
        cached.
        """
        books = self.model.num_codebooks
        heard = min(self.cached_frames + self.prompt_frames, self.model.context_frames)
        cached = max(0, heard - self.prompt_frames) * books
        given, spoken = heard * books, self.sent // FRAME * books
        details = events.TokenDetails(
            audio_tokens=given,
            text_tokens=0,
            image_tokens=0,
            cached_tokens=cached,
            cached_tokens_details=events.TokenDetails(audio_tokens=cached, text_tokens=0, image_tokens=0),
        )
        return events.Usage(
            total_tokens=given + spoken,
            input_tokens=given,
            output_tokens=spoken,
            input_token_details=details,
            output_token_details=events.TokenDetails(audio_tokens=spoken, text_tokens=0),
        )
