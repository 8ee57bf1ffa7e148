"""A streaming real-time speech continuation engine: speech in, its continuation out, in the same voice.

    import streaming

    with streaming.load_engine("demo") as engine, engine.open(temperature=0.8, seed=1) as session:
        for frame in frames:                            # float32 [1920], 24 kHz
            session.listen(frame)
        for pcm in session.speak(max_frames=125):       # float32 [1920]
            play(pcm)

Names are loaded when first used: a client can import this package's protocol without having torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streaming.at_once import continuations
    from streaming.engine.blocking import Mark, Session
    from streaming.engine.engine import Engine
    from streaming.loading import load_codec, load_engine
    from streaming.models.mimi import StreamingMimi
    from streaming.scoring import score

__all__ = ["Engine", "Mark", "Session", "StreamingMimi", "continuations", "load_codec", "load_engine", "score"]

_HOMES = {
    "Engine": "streaming.engine.engine",
    "Mark": "streaming.engine.blocking",
    "Session": "streaming.engine.blocking",
    "StreamingMimi": "streaming.models.mimi",
    "continuations": "streaming.at_once",
    "load_codec": "streaming.loading",
    "load_engine": "streaming.loading",
    "score": "streaming.scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
