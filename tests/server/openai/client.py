"""A client of OpenAI's protocols that is driven by hand, and voice activity that can be heard without a model."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect

from streaming.audio import FRAME, to_int16
from streaming.models.voice_activity import VadState, VoiceActivityModel
from streaming.protocol.messages import PATH
from streaming.server.openai import LIVE_PATH, REALTIME_PATH
from tests.engine.stub_step import Stream, pcm_of

Event = dict[str, Any]
SPEECH = (np.arange(3 * FRAME) % 251).astype(np.int16)
LOUD, QUIET = np.full(FRAME, 20_000, np.int16), np.zeros(FRAME, np.int16)
MANUAL = {"audio": {"input": {"turn_detection": None}}}


class LoudIsSpeech(VoiceActivityModel):
    """Instead of the model that `voice_activity.load_vad_model` gives."""

    def __init__(self) -> None:
        pass

    def __call__(self, window: NDArray[np.float32], state: VadState) -> NDArray[np.float32]:
        return np.where(abs(window).mean(axis=1) > 0.3, np.float32(0.9), np.float32(0.0))


def encoded(pcm: NDArray[np.int16] | bytes) -> str:
    return base64.b64encode(pcm if isinstance(pcm, bytes) else pcm.tobytes()).decode()


def said_by(stream: Stream, start: int = 0) -> bytes:
    """What the stub has said in a stream: the frames from this one on that it spoke."""
    pairs = list(zip(stream.entries, stream.digests[1:], strict=True))[start:]
    return b"".join(to_int16(pcm_of(digest)).tobytes() for (kind, _), digest in pairs if kind == "spoken")


def kinds(stream: Stream) -> str:
    """h for a frame heard, s for one spoken."""
    return "".join(kind[0] for kind, _ in stream.entries)


@dataclass
class Client:
    """seen: all events so far; audio: what came in deltas, by response (of Live: under "")."""

    socket: ClientConnection
    seen: list[Event] = field(default_factory=list)
    audio: dict[str, bytes] = field(default_factory=dict)

    async def send(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind} | fields))

    async def append(self, *pcm: NDArray[np.int16] | bytes) -> None:
        for part in pcm:
            await self.send("input_audio_buffer.append", audio=encoded(part))

    async def update(self, session: Event) -> Event:
        await self.send("session.update", session={"type": "realtime"} | session)
        return await self.until("session.updated")

    async def next(self) -> Event:
        event: Event = json.loads(await self.socket.recv())
        if "delta" in event:
            response = event.get("response_id", "")
            self.audio[response] = self.audio.get(response, b"") + base64.b64decode(event["delta"])
        self.seen.append(event)
        return event

    async def until(self, kind: str) -> Event:
        while True:
            event = await self.next()
            if event["type"] == kind:
                return event
            assert event["type"] != "error", event

    async def deltas(self, count: int) -> Event:
        """Return the last of so many."""
        for _ in range(count):
            event = await self.until("response.output_audio.delta")
        return event

    def types(self) -> list[str]:
        """Of what came since the last call, repetitions told once."""
        found = [event["type"] for event in self.seen]
        self.seen.clear()
        return [kind for n, kind in enumerate(found) if n == 0 or kind != found[n - 1]]


@asynccontextmanager
async def realtime(url: str, session: Event | None = None, **connecting: Any) -> AsyncIterator[Client]:
    """A session that is open; session: how it is changed at once."""
    async with connect(url.replace(PATH, REALTIME_PATH), compression=None, max_size=None, **connecting) as socket:
        client = Client(socket)
        await client.until("session.created")
        if session is not None:
            await client.update(session)
        client.types()
        yield client


@asynccontextmanager
async def live(url: str, format: Event | None = None, **connecting: Any) -> AsyncIterator[Client]:
    """A Live session that has started."""
    async with connect(url.replace(PATH, LIVE_PATH), compression=None, **connecting) as socket:
        client = Client(socket)
        audio = {} if format is None else {"audio": {"format": format}}
        await client.send("session.start", session={"model": "any"} | audio, event_id="first")
        assert (await client.until("session.started"))["client_event_id"] == "first"
        yield client
