"""What a person sees: a live view on a terminal, JSON lines everywhere else.

JSON mode prints one object a line on standard output, told apart by `event`:

| event | fields |
|---|---|
| `notice` | `message`: what a person should know: the server's notice, the headphones warning, a non-fatal error |
| `server` | `url`: the server that the client started for itself is up |
| `session` | `session`, `model`, `seed`, `num_codebooks`, `context_seconds`, `codec` |
| `listening` | `turn`: the turn that speech sent now belongs to |
| `speech_started`, `speech_stopped` | `turn`, `at_seconds` of the input (`--turn vad`) |
| `speaking` | `turn`, `prompt_seconds`, `dropped_seconds`: the continuation begins |
| `interrupted` | `turn`, `heard_seconds` |
| `turn` | a turn's end and its measurements, the fields of `TurnReport` |
| `input_lagging` | `behind_ms`: the server is so far behind what is said |
| `input_dropped` | `ms`: so much of what was said the server had to throw away |
| `connection_lost` | `kept_seconds`: for how long the server keeps the session; the client tries to come back |
| `connection_restored` | `after_ms`: nothing was lost |
| `session_lost` | `message`: the server no longer has the session; the microphone mode begins a new one |
| `levels` | once a second: the fields of `Meters` |
| `summary` | last, and only if a continuation came whole: `turns` that did, `output`, `record`, the last `TurnReport` |
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from streaming.audio import SILENCE_DBFS
from streaming.command import OutputError

LEVELS_INTERVAL_S = 1.0
_METER_WIDTH = 40
_METER_ROOM = 19
"""What a meter's line takes besides the meter."""
_METER_FLOOR_DBFS = -60.0
_COLOURS = {"listening": "green", "talking": "green", "ready": "cyan", "waiting": "yellow", "speaking": "magenta"}


@dataclass(slots=True)
class Meters:
    """What is shown continuously; the talk writes it, the view reads it.

    state: `listening`, or with push-to-talk `ready` (nobody talks) and `talking`; `waiting` for the continuation;
    `speaking`. away_seconds: None while connected, otherwise for how much longer the server keeps the session, 0 where
    it does no more. Levels in dBFS; `underruns` of this turn. `dropped_input_ms`: what the microphone had to throw
    away, the oldest first; `unheard_ms`: what the server had to; `behind_ms`: by how much it lags; `kept_input_ms`:
    what will be said once the connection is back. `first_audible_ms`: of the latest turn; `rtt_ms`: to the server and
    back; `sent_kbps`, `received_kbps`: over the last second.
    """

    state: str = "listening"
    turn: int = 1
    away_seconds: float | None = None
    sent_seconds: float = 0.0
    input_dbfs: float = SILENCE_DBFS
    output_dbfs: float = SILENCE_DBFS
    buffer_ms: float = 0.0
    underruns: int = 0
    dropped_input_ms: float = 0.0
    unheard_ms: float = 0.0
    behind_ms: float = 0.0
    kept_input_ms: float = 0.0
    first_audible_ms: float | None = None
    rtt_ms: float | None = None
    sent_kbps: float = 0.0
    received_kbps: float = 0.0


@dataclass(frozen=True, slots=True)
class TurnReport:
    """A turn in figures.

    whole: it ended by itself or at its length, and all its audio came. Times run from the end of speech as the client
    knows it (the last prompt sample handed to the socket; in vad mode the sample at which the server says that speech
    ended, so that the time it waits to be sure is in the figure): `first_audio_ms` to the first message,
    `first_audible_ms` to the first sample out of the jitter buffer (None in fast pace: nobody listens).
    `interval_p95_ms`: between audio messages. `realtime_factor`: seconds of continuation a second. `server_*`: the
    server's own figures.
    """

    turn: int
    reason: str
    whole: bool
    seconds: float
    first_audio_ms: float | None
    first_audible_ms: float | None
    interval_p95_ms: float | None
    underruns: int
    realtime_factor: float | None
    rtt_ms: float | None
    server_first_frame_ms: float | None
    server_step_ms: float | None

    def sentence(self) -> str:
        """Return the figures for a person, in one line."""
        parts = [f"{self.seconds:.2f} s of continuation ({self.reason.replace('_', ' ')})"]
        for label, value in (
            ("first audio after", self.first_audio_ms),
            ("first audible sample after", self.first_audible_ms),
            ("p95 between frames", self.interval_p95_ms),
            ("server's first frame", self.server_first_frame_ms),
            ("server's step", self.server_step_ms),
            ("round trip", self.rtt_ms),
        ):
            if value is not None:
                parts.append(f"{label} {value:.1f} ms")
        if self.realtime_factor is not None:
            parts.append(f"{self.realtime_factor:.2f}x real time")
        if self.first_audible_ms is not None:
            parts.append(f"{self.underruns} underrun{'' if self.underruns == 1 else 's'}")
        return ", ".join(parts)


class View(Protocol):
    """Shows what happened (`event`) and how things stand (`show`). It is a context manager."""

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """One of the events above."""

    def show(self, meters: Meters) -> None:
        """The present levels; called some 25 times a second."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class JsonView:
    """Prints a JSON object a line."""

    def __init__(self, out: TextIO | None = None, now_s: Callable[[], float] = time.monotonic) -> None:
        self._out = out or sys.stdout
        self._now_s = now_s
        self._next_levels_s = now_s() + LEVELS_INTERVAL_S

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        try:
            self._out.write(json.dumps({"event": name, **_rounded(fields)}) + "\n")
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"cannot write to standard output: {error.strerror or error}") from None

    def show(self, meters: Meters) -> None:
        if self._now_s() >= self._next_levels_s:
            self._next_levels_s = self._now_s() + LEVELS_INTERVAL_S
            self.event("levels", asdict(meters))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class LiveView:
    """A few lines that stay in place, with the events that matter to a person scrolling above them."""

    def __init__(self, console: Console | None = None, hint: str = "") -> None:
        self._hint = hint
        self._live = Live(console=console or Console(), auto_refresh=False, transient=True)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        line = _line(name, fields)
        if line is not None:
            self._live.console.print(line)

    def show(self, meters: Meters) -> None:
        self._live.update(self._render(meters), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def _render(self, meters: Meters) -> Group:
        width = max(4, min(_METER_WIDTH, self._live.console.width - _METER_ROOM))
        bars = Table.grid(padding=(0, 1))
        for column in range(3):
            bars.add_column(no_wrap=True, justify="right" if column == 2 else "left")
        bars.add_row("you", _bar(meters.input_dbfs, width), f"{meters.input_dbfs:.0f} dB")
        bars.add_row("machine", _bar(meters.output_dbfs, width), f"{meters.output_dbfs:.0f} dB")
        figures = [
            f"sent {meters.sent_seconds:.1f} s",
            f"buffer {meters.buffer_ms:.0f} ms",
            f"underruns {meters.underruns}",
        ]
        if meters.first_audible_ms is not None:
            figures.append(f"first sound after {meters.first_audible_ms:.0f} ms")
        if meters.rtt_ms is not None:
            figures.append(f"round trip {meters.rtt_ms:.1f} ms")
        if meters.sent_kbps or meters.received_kbps:
            figures.append(f"{meters.sent_kbps:.0f} kbit/s up, {meters.received_kbps:.0f} down")
        lines: list[RenderableType] = [_state(meters), bars, _flow(figures, self._live.console.width)]
        troubles = [
            f"microphone: {meters.dropped_input_ms / 1e3:.1f} s lost" if meters.dropped_input_ms else "",
            f"server too slow: {meters.unheard_ms / 1e3:.1f} s lost" if meters.unheard_ms else "",
            f"server {meters.behind_ms:.0f} ms behind" if meters.behind_ms else "",
        ]
        if any(troubles):
            lines.append(_flow(list(filter(None, troubles)), self._live.console.width, "bold red"))
        return Group(*lines, Text(self._hint, style="dim italic")) if self._hint else Group(*lines)


def choose_view(*, json_lines: bool, hint: str) -> View:
    """Return the live view when standard output is a terminal and JSON was not asked for."""
    return LiveView(hint=hint) if sys.stdout.isatty() and not json_lines else JsonView()


def _state(meters: Meters) -> Text:
    turn = (f"turn {meters.turn}", "dim")
    if meters.away_seconds is None:
        return Text.assemble((meters.state, f"bold {_COLOURS[meters.state]}"), " ", turn)
    if meters.away_seconds <= 0:
        return Text.assemble(("no connection", "bold red"), " trying to begin anew")
    kept = f", {meters.kept_input_ms / 1e3:.1f} s of yours kept" if meters.kept_input_ms else ""
    left = f"coming back, {meters.away_seconds:.0f} s left{kept}"
    return Text.assemble(("connection lost", "bold red"), f" {left} ", turn)


def _bar(dbfs: float, width: int) -> Text:
    filled = round(width * min(1.0, max(0.0, 1 - dbfs / _METER_FLOOR_DBFS)))
    colour = "red" if dbfs > -3 else "yellow" if dbfs > -12 else "green"
    return Text.assemble(("█" * filled, colour), ("·" * (width - filled), "dim"))


def _flow(parts: list[str], width: int, style: str = "dim") -> Text:
    """Parts in as few lines as they need, none broken in two."""
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}  {part}" if lines[-1] else part
        if lines[-1] and len(joined) > width:
            lines.append(part)
        else:
            lines[-1] = joined
    return Text("\n".join(lines), style=style)


def _line(name: str, fields: Mapping[str, Any]) -> Text | None:
    match name:
        case "notice":
            return Text(str(fields["message"]), style="yellow")
        case "session":
            codec = ", Opus" if fields["codec"] == "opus" else ""
            remembers = f"remembers {fields['context_seconds']:.1f} s"
            return Text(f"{fields['model']}, seed {fields['seed']}, {remembers}{codec}", style="dim")
        case "interrupted":
            return Text(f"turn {fields['turn']}: interrupted after {fields['heard_seconds']:.2f} s", style="dim")
        case "connection_lost":
            return Text(f"connection lost; coming back (kept for {fields['kept_seconds']:g} s)", style="bold yellow")
        case "connection_restored":
            return Text(f"connection restored after {fields['after_ms'] / 1e3:.1f} s, nothing lost", style="green")
        case "session_lost":
            return Text(str(fields["message"]), style="bold red")
        case "turn":
            return Text(f"turn {fields['turn']}: {TurnReport(**fields).sentence()}", style="dim")
        case "summary":
            written = [str(fields[name]) for name in ("output", "record") if fields[name]]
            return Text(f"wrote {' and '.join(written)}", style="dim") if written else None
    return None


def _rounded(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in fields.items()}
