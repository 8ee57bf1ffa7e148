"""Tell how long a step of so many sessions takes: measured (a file of `step --json`), or computed from a roofline.

The two are kept apart: what was computed says so in its name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streaming.audio import FRAME_MS
from streaming.errors import StreamingError

_STAGE = "whole step, speaking"
"""The longest that a step can be: everybody is in it, and draws tokens one codebook after another."""
_WIDTHS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)

Floats = NDArray[np.float64]


class StepsError(StreamingError):
    """A file that holds no step times, or more sessions than were measured together."""

    code = "bad_steps"


def series_name(sessions: int, stage: str) -> str:
    """Return the name that the single times of a stage have in a report's series."""
    return f"{stage}, {sessions}"


@dataclass(frozen=True)
class StepCurve:
    """Step times by the number of sessions. times_ms: for each of `widths`, sorted; one value where it is computed."""

    name: str
    widths: tuple[int, ...]
    times_ms: tuple[Floats, ...]

    @property
    def carries(self) -> int:
        """The most sessions whose steps (p99) are in time: 0 if none are."""
        sessions = np.arange(1, self.widths[-1] + 1)
        too_slow = self.quantile_ms(sessions, np.full(len(sessions), 0.99)) >= FRAME_MS
        return int(too_slow.argmax()) if too_slow.any() else len(sessions)

    def quantile_ms(self, sessions: NDArray[np.integer[Any]], share: Floats) -> Floats:
        """Return the step time that so large a share stays below, on a straight line between the numbers that there
        are.

        Raises `StepsError` for more sessions than there are figures of.
        """
        if sessions.size and sessions.max() > self.widths[-1]:
            raise StepsError(f"{self.name} knows steps of {self.widths[-1]} sessions at most, not of {sessions.max()}")
        above = np.clip(np.searchsorted(self.widths, sessions), 1, max(1, len(self.widths) - 1))
        found = np.zeros(len(sessions))
        for index in np.unique(above):
            here = above == index
            low, high = max(0, index - 1), min(index, len(self.widths) - 1)
            n, u = sessions[here], share[here]
            one, other = (np.quantile(self.times_ms[i], u) for i in (low, high))
            span = self.widths[high] - self.widths[low]
            found[here] = one + (other - one) * np.clip((n - self.widths[low]) / max(1, span), 0, 1)
        return found

    def late(self, sessions: int) -> float:
        """Return the share of steps that take longer than a frame lasts."""
        share = np.linspace(0, 1, 1001)
        times = self.quantile_ms(np.full(len(share), max(1, sessions)), share)
        return float((times > FRAME_MS).mean())


def measured(path: Path, run: str | None = None) -> StepCurve:
    """Read `step --json`, or a run of that in a file of `results`. Raises `StepsError`."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if run is not None and run not in report["runs"]:
            raise StepsError(f"{path} has no run {run}: it has {', '.join(report['runs'])}")
        series: dict[str, list[float]] = (report["runs"][run]["report"] if run is not None else report)["series"]
        prefix = series_name(0, _STAGE)[:-1]
        found = {int(name.removeprefix(prefix)): times for name, times in series.items() if name.startswith(prefix)}
        if not found or not all(times and min(times) > 0 for times in found.values()):
            raise ValueError("no step times in it")
    except OSError as error:
        raise StepsError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError) as error:
        where = f"{path}, {run}," if run is not None else path
        raise StepsError(f"{where} has no step times as `step --json` writes them: {error!r}") from None
    widths = tuple(sorted(found))
    name = f"measured: {path.name}" + (f", {run}" if run is not None else "")
    return StepCurve(name, widths, tuple(np.sort(np.array(found[n], float)) for n in widths))


@dataclass(frozen=True)
class Roofline:
    """The floor of a step's time, on a device of which only the data sheet is known.

    bytes_per_s, flop_per_s: that are reached (not the peak). launch_s: of a small kernel in a graph. weight_bytes: that
    a frame reads, whoever is in it: every codebook's pass reads all of the decoder's; context_bytes, codec_bytes: read
    for each session; decoder_flop, codec_flop: done for each.
    """

    name: str
    weight_bytes: float
    context_bytes: float
    decoder_flop: float
    launches: int
    matrix_ends_s: float
    bytes_per_s: float = 0.9 * 3.35e12
    flop_per_s: float = 0.5 * 989e12
    launch_s: float = 1.75e-6
    codec_launches: int = 345
    codec_weight_bytes: float = 0.32e9
    codec_bytes: float = 16.4e6
    codec_flop: float = 0.86e9
    codec_flop_per_s: float = 0.5 * 67e12

    def step_ms(self, sessions: int) -> float:
        """Return the floor of a step of so many sessions, their contexts full."""
        decoder = max(self.weight_bytes / self.bytes_per_s, sessions * self.decoder_flop / self.flop_per_s)
        decoder += sessions * self.context_bytes / self.bytes_per_s + self.matrix_ends_s
        codec = (self.codec_weight_bytes + sessions * self.codec_bytes) / self.bytes_per_s
        codec = max(codec, sessions * self.codec_flop / self.codec_flop_per_s)
        return 1e3 * (decoder + codec + (self.launches + self.codec_launches) * self.launch_s)


ROOFLINES = {
    "1.3b-h100": Roofline("1.3b-h100", 7.82e9, 134e6, 10.4e9, 410, 0.26e-3),
    "8b-h100": Roofline("8b-h100", 55.5e9, 536e6, 64e9, 770, 0.5e-3),
}
"""As docs/performance.md predicts them, in bfloat16, 4 codebooks; docs/scale.md says where each number is from."""


def computed(name: str, share_of_floor: float, spread: StepCurve | None = None) -> StepCurve:
    """Return a roofline, of which only so large a share is reached. spread: times vary about it as these do about
    theirs.
    """
    roofline = ROOFLINES[name]
    shape = np.array([1.0])
    if spread is not None:
        shape = np.sort(np.concatenate([times / np.median(times) for times in spread.times_ms]))
    times = tuple(roofline.step_ms(n) / share_of_floor * shape for n in _WIDTHS)
    told = f"computed: {name} at {100 * share_of_floor:g} % of its floor" + (", spread measured" if spread else "")
    return StepCurve(told, _WIDTHS, times)


def curve(source: str, share_of_floor: float, spread: str | None = None) -> StepCurve:
    """source: a roofline's name, or a file, or `FILE:RUN` of a file of `results`. Raises `StepsError`."""
    if source in ROOFLINES:
        return computed(source, share_of_floor, measured(Path(spread)) if spread else None)
    path, _, run = source.partition(".json:")
    if run:
        return measured(Path(f"{path}.json"), run)
    if not Path(source).is_file():
        raise StepsError(f"{source} is neither a file of `step --json` nor one of {', '.join(ROOFLINES)}")
    return measured(Path(source))


def erlang_b(erlangs: float, servers: int) -> float:
    """Return the share of arrivals that find all servers busy and leave (Erlang's first formula, by its recursion)."""
    blocked = 1.0
    for number in range(1, servers + 1):
        blocked = erlangs * blocked / (number + erlangs * blocked)
    return blocked
