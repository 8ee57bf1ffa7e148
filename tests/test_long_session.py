"""A long session: what grows with a call, or goes stale in it, shows here.

Ten minutes of speech, or `STREAMING_LONG_SESSION_MINUTES`; an hour takes a few minutes, and pytest's `--timeout`.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from torch import Tensor

from streaming.audio import FRAME, to_int16
from streaming.engine.engine import Engine
from streaming.frame_step import FrameStep
from streaming.protocol import messages
from streaming.protocol.messages import SamplingOptions, SessionStart
from tests.faults.harness import resident_mib
from tests.reference import load_codec, load_decoder, speech
from tests.server.live_server import client, run, serving

FRAMES = round(float(os.environ.get("STREAMING_LONG_SESSION_MINUTES", "10")) * 60 * 12.5)
TURN_FRAMES = 250
"""Of speech, and as many of its continuation: 20 s each, as often as fit."""
CONTEXT_FRAMES = 40
MORE_BLOCKS = FRAMES // 2 // 20
"""Of Python's memory, over the second half: one object in twenty frames that stays is found. What is bounded fills in
the first: some 2,500 blocks in seven turns, and none from there on.
"""
MORE_MIB = FRAMES // 2 * 1920 * 2 / 2**20 / 3
"""Of the process' memory, over the second half: a third of its audio, and one side's is half of it."""


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that an object of this project holds."""
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen and (hasattr(value, "__dict__") or isinstance(value, list | tuple | dict)):
        seen.add(id(value))
        parts = value if isinstance(value, list | tuple) else getattr(value, "__dict__", value)
        for part in parts.values() if isinstance(parts, dict) else parts:
            if isinstance(part, Tensor | list | tuple | dict) or type(part).__module__.startswith("streaming"):
                yield from _tensors(part, seen)


def test_a_long_session_is_as_fresh_as_its_first_second(
    codec_checkpoint: Callable[..., Path],
    decoder_checkpoint: Callable[..., Path],
    record_property: Callable[[str, object], None],
) -> None:
    """Caches grew, positions ran out of precision, samples and frames drifted apart.

    Memory: no tensor is added or moved after the first minutes, no Python object stays, the process does not grow. Time
    is reported, not judged. The context slides all along; every sample in is heard, every frame out is 1,920 samples.
    """
    codec = codec_checkpoint(num_filters=2, hidden_size=16, upsample_groups=16, num_hidden_layers=1, head_dim=8)
    decoder = load_decoder(decoder_checkpoint(num_hidden_layers=1))
    step = FrameStep(load_codec(codec), decoder, 1, CONTEXT_FRAMES, 8)
    prompt = to_int16(speech(TURN_FRAMES))
    turns = FRAMES // (2 * TURN_FRAMES)
    half_seconds: list[float] = []
    blocks: list[int] = []
    resident: list[float] = []
    tensors: list[set[int]] = []

    def snapshot() -> None:
        gc.collect()
        blocks.append(sys.getallocatedblocks())
        resident.append(resident_mib())
        tensors.append({id(t) if t.is_mkldnn else t.data_ptr() for t in _tensors(step, set())})

    async def scenario(url: str) -> None:
        start = SessionStart(
            pace="fast", max_seconds=TURN_FRAMES / 12.5, sampling=SamplingOptions(temperature=0.8, seed=1)
        )
        async with client(url, start, ping_interval=None) as session:  # as fast as it goes: answers may take their time
            spoken = 0
            for turn in range(1, turns + 1):
                began = asyncio.get_running_loop().time()
                await session.hear(prompt, turn=turn)
                await session.send(messages.Speak(turn=turn))
                speaking = await session.expect(messages.TurnSpeaking)
                assert speaking.prompt_samples == len(prompt)
                heard = turn * TURN_FRAMES + spoken
                assert speaking.dropped_samples == max(0, heard + 1 - CONTEXT_FRAMES) * FRAME
                done = await session.expect(messages.TurnDone)
                pcm = session.audio.pop(turn)
                assert done.samples == sum(map(len, pcm))
                assert all(np.isfinite(part).all() and part.any() for part in pcm)
                spoken += len(pcm)
                session.said.clear()
                half_seconds.append((asyncio.get_running_loop().time() - began) / (TURN_FRAMES + len(pcm)))
                assert step.frames(0) == turn * TURN_FRAMES + spoken, "a frame was lost or doubled"
                if turn in (max(1, turns // 10), max(1, turns // 2), turns):
                    snapshot()

    with Engine(step, "tiny") as engine, serving(engine, keepalive_s=300) as server:
        run(scenario(server.url), seconds=900)
        stats = engine.stats()
    assert tensors[0] == tensors[-1], "state moved or grew"
    assert blocks[-1] - blocks[-2] < MORE_BLOCKS, blocks
    assert resident[-1] - resident[-2] < MORE_MIB, resident
    assert stats.steps >= step.frames(0)
    tenth = max(1, turns // 10)
    record_property("ms_per_frame_first_tenth", 1e3 * float(np.median(half_seconds[:tenth])))
    record_property("ms_per_frame_last_tenth", 1e3 * float(np.median(half_seconds[-tenth:])))
    print(
        f"{FRAMES / 750:.0f} minutes in {sum(half_seconds) * 2 * TURN_FRAMES:.0f} s; ms a frame, first and last tenth: "
        f"{1e3 * np.median(half_seconds[:tenth]):.2f}, {1e3 * np.median(half_seconds[-tenth:]):.2f}; "
        f"blocks: {blocks}; MiB: {resident}"
    )
