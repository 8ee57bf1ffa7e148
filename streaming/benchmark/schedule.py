"""Who speaks when: every session's turns, fixed by a seed before the first one begins, so that no server can delay
them.

A session does the same whatever the others do, and however many they are: levels of load differ in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from streaming.audio import FRAME, SAMPLE_RATE

_PHASE_S = 2.0
"""Sessions that open together begin to speak at random within this time: people do not all begin at once."""


class Turn(msgspec.Struct, frozen=True):
    """One turn. Times are in seconds from the session's arrival.

    speaks_s: speech begins. prompt_samples: its length; prompt_at: where in the recordings it is cut from, 0 to 1.
    over_s: what is not heard of the continuation by then is cut, whether that was planned (`interrupts`) or not.
    """

    speaks_s: float
    prompt_samples: int
    prompt_at: float
    over_s: float
    interrupts: bool


class SessionPlan(msgspec.Struct, frozen=True):
    """One session. arrives_s: from the start of the run. seed: for the server's sampling."""

    number: int
    arrives_s: float
    seed: int
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Manner:
    """A way to talk. prompt_s, pause_s: shortest and longest. max_seconds: of a continuation.

    pause_s: between the time at which a continuation is over if its first sample is heard at once, and the next prompt.
    interrupts: the share of turns that are cut off between a quarter and three quarters of their continuation; then the
    next prompt begins at once.
    """

    prompt_s: tuple[float, float]
    pause_s: tuple[float, float]
    max_seconds: float
    interrupts: float


def held(sessions: int, seconds: float, manner: Manner, seed: int) -> list[SessionPlan]:
    """Return plans of so many sessions that last from the first second to the last: each has all turns that begin in
    `seconds`, and at least one.
    """
    return [_plan(number, 0.0, seconds, None, manner, seed) for number in range(sessions)]


def arriving(rate: float, seconds: float, turns: int, manner: Manner, seed: int) -> list[SessionPlan]:
    """Return plans of sessions that come as a Poisson process of `rate` a second and stay for `turns` turns each; at
    least one.
    """
    random = np.random.default_rng([seed, 0])
    plans: list[SessionPlan] = []
    arrives_s = 0.0
    while not plans or arrives_s < seconds:
        plans.append(_plan(len(plans), arrives_s, None, turns, manner, seed))
        arrives_s += float(random.exponential(1 / rate))
    return plans


def _plan(
    number: int, arrives_s: float, seconds: float | None, count: int | None, manner: Manner, seed: int
) -> SessionPlan:
    random = np.random.default_rng([seed, 1, number])
    turns: list[Turn] = []
    at = float(random.uniform(0, _PHASE_S))
    while not turns or (at < seconds if seconds is not None else len(turns) < (count or 1)):
        samples = max(1, round(float(random.uniform(*manner.prompt_s)) * SAMPLE_RATE))
        prompt_at, pause, drawn, share = random.uniform(
            (0, manner.pause_s[0], 0, 0.25), (1, manner.pause_s[1], 1, 0.75)
        )
        interrupts = bool(drawn < manner.interrupts)
        spoken = -(-manner.max_seconds * SAMPLE_RATE // FRAME) * FRAME / SAMPLE_RATE  # rounded up to whole frames
        over = at + samples / SAMPLE_RATE + float(share * spoken if interrupts else spoken + pause)
        turns.append(Turn(at, samples, float(prompt_at), over, interrupts))
        at = over
    return SessionPlan(number, arrives_s, int(random.integers(2**31)), tuple(turns))
