"""Speech from a file, delivered as a microphone would, or as fast as it is taken."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator

import numpy as np

from streaming.audio import SAMPLE_RATE, AudioReader, Pcm16, Samples
from streaming.client.tasks import sleep_until

PIECE_SAMPLES = SAMPLE_RATE // 50
"""20 ms, what a microphone hands over at a time."""
FAST_PIECE_SAMPLES = SAMPLE_RATE // 2
"""The length of a piece that nobody waits for: fewer messages are better."""


async def file_pieces(reader: AudioReader, *, realtime: bool) -> AsyncIterator[Samples]:
    """Yield the file as float32 pieces, [480] in real time and [12000] otherwise, the last one shorter.

    In real time each piece comes when its last sample would have been spoken, by a schedule from the first call on, so
    that delays do not add up. Raises `AudioError` for a damaged file.
    """
    start_s = time.monotonic()
    given = 0
    for piece in _cut(reader, PIECE_SAMPLES if realtime else FAST_PIECE_SAMPLES):
        given += len(piece)
        if realtime:
            await sleep_until(start_s + given / SAMPLE_RATE)
        yield piece


async def silence_pieces() -> AsyncIterator[Pcm16]:
    """Yield silence in real time, int16 [480] pieces, for ever: a microphone in a room where nobody speaks."""
    start_s = time.monotonic()
    given = 0
    while True:
        given += PIECE_SAMPLES
        await sleep_until(start_s + given / SAMPLE_RATE)
        yield np.zeros(PIECE_SAMPLES, np.int16)


def _cut(reader: AudioReader, samples: int) -> Iterator[Samples]:
    rest = np.zeros(0, np.float32)
    for block in reader.blocks():
        rest = np.concatenate([rest, block])
        while len(rest) >= samples:
            yield rest[:samples]
            rest = rest[samples:]
    if len(rest):
        yield rest
