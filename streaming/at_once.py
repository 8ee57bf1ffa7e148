"""Several continuations of one prompt, made at once: the prompt is heard once, and all are spoken in one batch."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streaming.audio import FRAME
from streaming.engine.engine import Engine
from streaming.loading import load_engine


def continuations(
    prompt: NDArray[np.float32],
    count: int = 4,
    *,
    max_frames: int = 125,
    engine: Engine | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] | None = None,
) -> list[NDArray[np.float32]]:
    """Return `count` continuations of a prompt, float32 [n] each, at 24 kHz; each ends where the model ends it, at the
    latest after `max_frames`.

    prompt: float32 [n] in [-1, 1], 24 kHz mono. engine: with `count` free slots; None: the demo model's, made for this.
    seeds: one for each; None: drawn at random. The other options are as for `Engine.open`.

    Raises `EmptyPromptError` for no sample, `EngineFullError` where there are too few slots; `ValueError` for options
    out of range.
    """
    if count < 1 or max_frames < 1:
        raise ValueError(f"count is {count}, max_frames {max_frames}: at least 1 each")
    if seeds is not None and len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} continuations")
    seeds = [secrets.randbits(63) for _ in range(count)] if seeds is None else seeds
    with contextlib.ExitStack() as stack:
        if engine is None:
            engine = stack.enter_context(load_engine(max_sessions=count))
        first = stack.enter_context(engine.open(temperature=temperature, top_k=top_k, top_p=top_p, seed=seeds[0]))
        for start in range(0, len(prompt), FRAME):
            first.listen(prompt[start : start + FRAME])
        sessions = [first, *(stack.enter_context(first.fork(seed=seed)) for seed in seeds[1:])]
        spoken: list[list[NDArray[np.float32]]] = [[] for _ in sessions]
        speaking = dict(enumerate(session.speak(max_frames) for session in sessions))
        while speaking:
            for number, frames in list(speaking.items()):
                pcm = next(frames, None)
                if pcm is None:
                    del speaking[number]
                else:
                    spoken[number].append(pcm)
    return [np.concatenate(frames) if frames else np.zeros(0, np.float32) for frames in spoken]
