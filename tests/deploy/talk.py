"""A client that talks turn by turn while servers come and go, and keeps what it was told, to be compared."""

from __future__ import annotations

import asyncio

import numpy as np

from streaming.audio import FRAME
from streaming.client.client import Audio, ContinuationClient
from streaming.client.resumable_connection import ConnectionLost, ConnectionRestored
from streaming.protocol.messages import SamplingOptions, SessionStart, TurnDone

SPEECH = (np.arange(6 * FRAME) % 251).astype(np.int16)


class Talk:
    """turns: what was said in each; away_ms: how long each return took."""

    def __init__(self) -> None:
        self.turns: list[bytes] = []
        self.lost = 0
        self.away_ms: list[float] = []

    async def run(self, url: str, done: asyncio.Event, most_turns: int, pace: str) -> None:
        """Talk until this is done, to the end of the turn."""
        sampling = SamplingOptions(seed=5)
        start = SessionStart(pace=pace, max_seconds=2, resume=True, sampling=sampling)  # type: ignore[arg-type]
        async with ContinuationClient.connect(url, start) as session:
            while len(self.turns) < most_turns and not done.is_set():
                await session.send(SPEECH)
                await session.speak()
                self.turns.append(await self._hear(session))

    async def _hear(self, session: ContinuationClient) -> bytes:
        pieces = []
        async for event in session.events():
            match event:
                case Audio(pcm=pcm):
                    pieces.append(pcm)
                case ConnectionLost():
                    self.lost += 1
                case ConnectionRestored(after_ms=after):
                    self.away_ms.append(after)
                case TurnDone():
                    return np.concatenate(pieces).tobytes()
        raise AssertionError
