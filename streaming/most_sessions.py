"""`--max-sessions auto`: how many sessions a machine carries, measured in a second or two at the start."""

from __future__ import annotations

import logging

from streaming.audio import FRAME_RATE
from streaming.config import OVERLOAD
from streaming.frame_step import FrameStep
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi

_LOG = logging.getLogger(__name__)
_REAL_TIME_S = 1 / FRAME_RATE
_MOST = 512
"""What is found at most: the widest step that is captured."""
_REHEARSED = {"cpu": 8, "cuda": 64}
"""Sessions in the wider of the two steps that are measured."""
_REHEARSAL_S = 0.4
_REHEARSALS = 7
"""Steps of a kind that are measured: this many, or for so long."""


def most_sessions(
    codec: StreamingMimi, decoder: LlamaDecoder, context_frames: int, rewind_frames: int, fitting: int | None = None
) -> int:
    """Return how many sessions this machine carries: as many as fit into its memory and can all speak in real time.

    Steps of one session and of several are measured, and a straight line is laid through them. The log says what was
    found; a model that is too slow for one session is a warning, and gets one. fitting: how many fit into the memory;
    None where nobody knows.
    """
    device, fitting = codec.device, _MOST if fitting is None else fitting
    if fitting <= 1:
        return 1
    rows = min(fitting, _REHEARSED[device.type])
    step = FrameStep(codec, decoder, rows, context_frames, rewind_frames)
    one = rehearsed_s(step, 1)
    if one >= _REAL_TIME_S:
        _LOG.warning(
            "one session alone takes %.0f ms for each 80 ms of speech here: it will stutter. %s",
            1e3 * one,
            "A GPU would help, or --quantize auto" if device.type == "cpu" else "A smaller model would help",
        )
        return 1
    rows = min(rows, max(2, int(_REHEARSAL_S / one)))
    several = rehearsed_s(step, rows)
    more = max((several - one) / (rows - 1), 1e-6)
    in_time = 1 + max(0, int((OVERLOAD * _REAL_TIME_S - one) / more))
    found = min(in_time, fitting, _MOST)
    _LOG.info(
        "%d sessions: a step takes %.1f ms for one and %.1f ms for %d, so %s are in time; %s fit into memory",
        found,
        1e3 * one,
        1e3 * several,
        rows,
        f"{in_time:,}",
        f"{fitting:,}",
    )
    return found


def rehearsed_s(step: FrameStep, rows: int) -> float:
    """Return the quickest of some steps, after a first one that also captures or prepares what it needs.

    What other programs take for a moment says nothing of the hours to come; where it lasts, `Engine.overloaded` sees
    it.
    """
    first = step.rehearse(rows)
    if first > _REHEARSAL_S:
        return first
    return min(step.rehearse(rows) for _ in range(min(_REHEARSALS, int(_REHEARSAL_S / first))))
