"""An hour in one session: what grows with a call, or goes stale in it, shows here."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from streaming.audio import FRAME, to_int16
from streaming.engine.engine import Engine
from streaming.frame_step import FrameStep
from streaming.wire import messages
from streaming.wire.messages import SamplingOptions, SessionStart
from tests.reference import load_codec, load_decoder, speech
from tests.wire.live_server import client, run, serving

HOUR_FRAMES = 45_000
TURN_FRAMES = 250
"""Of speech, and as many of its continuation: 20 s each, as often as fit the hour."""
CONTEXT_FRAMES = 40


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


def test_an_hour_long_session_is_as_fresh_as_its_first_second(
    codec_checkpoint: Callable[..., Path],
    decoder_checkpoint: Callable[..., Path],
    record_property: Callable[[str, object], None],
) -> None:
    """Caches grew, positions ran out of precision, samples and frames drifted apart.

    Memory: no tensor is added or moved after the first minutes, and Python's own allocations stay flat. Time is
    reported, not judged. The context slides all along; every sample in is heard, every frame out is 1,920 samples.
    """
    codec = codec_checkpoint(num_filters=2, hidden_size=16, upsample_groups=16, num_hidden_layers=1, head_dim=8)
    decoder = load_decoder(decoder_checkpoint(num_hidden_layers=1))
    step = FrameStep(load_codec(codec), decoder, 1, CONTEXT_FRAMES, 8)
    prompt = to_int16(speech(TURN_FRAMES))
    turns = HOUR_FRAMES // (2 * TURN_FRAMES)
    half_seconds: list[float] = []
    memory: list[int] = []
    tensors: list[set[int]] = []

    def snapshot() -> None:
        gc.collect()
        memory.append(tracemalloc.get_traced_memory()[0])
        tensors.append({id(t) if t.is_mkldnn else t.data_ptr() for t in _tensors(step, set())})

    async def scenario(url: str) -> None:
        start = SessionStart(
            pace="fast", max_seconds=TURN_FRAMES / 12.5, sampling=SamplingOptions(temperature=0.8, seed=1)
        )
        async with client(url, start) as session:
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
                if turn in (turns // 10, turns):
                    snapshot()

    torch.set_num_threads(1)
    tracemalloc.start()
    try:
        with Engine(step, "tiny") as engine, serving(engine) as server:
            run(scenario(server.url), seconds=900)
            stats = engine.stats()
    finally:
        tracemalloc.stop()
        torch.set_num_threads(2)
    assert tensors[0] == tensors[1], "state moved or grew"
    assert memory[1] - memory[0] < 200_000, memory
    assert stats.steps >= step.frames(0)
    tenth = max(1, turns // 10)
    record_property("ms_per_frame_first_tenth", 1e3 * float(np.median(half_seconds[:tenth])))
    record_property("ms_per_frame_last_tenth", 1e3 * float(np.median(half_seconds[-tenth:])))
    print(
        f"an hour in {sum(half_seconds) * 2 * TURN_FRAMES:.0f} s; ms a frame, first and last tenth: "
        f"{1e3 * np.median(half_seconds[:tenth]):.2f}, {1e3 * np.median(half_seconds[-tenth:]):.2f}; "
        f"bytes: {memory}"
    )
