"""Show a person what happens: a live view on a terminal, JSON lines everywhere else.

JSON mode prints one object a line on standard output, told apart by `event`:

| event | fields |
|---|---|
| `progress` | `message`: what is being done before there is a session; `share`: how much of it, 0 to 1, if known |
| `notice` | `message`: what a person should know: the server's notice, the headphones warning, a non-fatal error |
| `server` | `url`: the server that the client started for itself is up |
| `session` | `session`, `model`, `seed`, `num_codebooks`, `context_seconds`, `codec` |
| `listening` | `turn`: the turn that speech sent now belongs to |
| `speech_started`, `speech_stopped` | `turn`, `at_seconds` of the input (`--turn vad`) |
| `speaking` | `turn`, `prompt_seconds`, `dropped_seconds`: the continuation begins |
| `voice` | `turn`, `voice`: the name of the voice in which the model goes on, where it has several |
| `take` | `turn`, `of`, `seed`: the turn is another take of the turn `of` |
| `interrupted` | `turn`, `heard_seconds` |
| `turn` | a turn's end and its measurements, the fields of `TurnReport` |
| `input_lagging` | `behind_ms`: the server is so far behind what is said |
| `input_dropped` | `ms`: so much of what was said the server had to throw away |
| `connection_lost` | `kept_seconds`: for how long the server keeps the session; the client tries to come back |
| `connection_restored` | `after_ms`: nothing was lost |
| `went_back` | `turn`, `after_ms`: the server died; this turn is open again, and what was said in it is lost |
| `session_lost` | `message`: the server no longer has the session; the microphone mode begins a new one |
| `saved` | `file`, `bytes`: the conversation is kept, for `--load` |
| `levels` | once a second: the fields of `Meters` |
| `summary` | last, and only if a continuation came whole: `sentence`, `turns`, `output`, `record`, last `TurnReport` |
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self, TextIO

from streaming.audio import SILENCE_DBFS
from streaming.command import OutputError
from streaming.errors import StreamingError

LEVELS_INTERVAL_S = 1.0


class NoViewError(StreamingError):
    """The live view cannot be had. The message says what to install."""

    code = "no_view"


@dataclass(slots=True)
class Meters:
    """The state that is shown continuously; the talk writes it, the view reads it.

    state: `listening`, or with push-to-talk `ready` (nobody talks) and `talking`; `waiting` for the continuation;
    `speaking`, in a `voice` that may have a name. away_seconds: None while connected, otherwise for how much longer
    the server keeps the session, 0 where it does no more. Levels in dBFS; `underruns` of this turn.
    `dropped_input_ms`: what the microphone had to throw away, the oldest first; `unheard_ms`: what the server had to;
    `behind_ms`: by how much it lags; `kept_input_ms`: what will be said once the connection is back.
    `first_audible_ms`: of the latest turn; `rtt_ms`: to the server and back; `sent_kbps`, `received_kbps`: over the
    last second.
    """

    state: str = "listening"
    turn: int = 1
    voice: str | None = None
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
    server's own figures. voice: the name of the one that spoke, if it has one.
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
    voice: str | None = None

    def length(self) -> str:
        """Return how long it is, and in which voice, as the beginning of a sentence."""
        return f"{self.seconds:.1f} s{'' if self.voice is None else f' in {self.voice}'}"

    def first_sound(self) -> str:
        """Return when the first sound came, as the end of a sentence; nothing where it was not timed."""
        first_ms = self.first_audio_ms if self.first_audible_ms is None else self.first_audible_ms
        return "" if first_ms is None else f", first sound after {first_ms:.0f} ms"

    def figures(self) -> str:
        """Return all figures for a person, in one line."""
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
    """A view that shows what happened (`event`) and the present state (`show`). It is a context manager."""

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Show one of the events above."""

    def progress(self, message: str, share: float | None = None) -> None:
        """Show what is being done before there is a session, and how much of it, from 0 to 1, if that is known."""

    def show(self, meters: Meters) -> None:
        """Show the present state; called some 25 times a second."""

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

    def progress(self, message: str, share: float | None = None) -> None:
        self.event("progress", {"message": message} if share is None else {"message": message, "share": share})

    def show(self, meters: Meters) -> None:
        if self._now_s() >= self._next_levels_s:
            self._next_levels_s = self._now_s() + LEVELS_INTERVAL_S
            self.event("levels", asdict(meters))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def choose_view(*, json_lines: bool, hint: str, turns: bool = True, verbose: bool = False) -> View:
    """Return the live view when standard output is a terminal and JSON was not asked for.

    turns: whether each turn has a line; verbose: whether it has all figures. Raises `NoViewError` without `rich`.
    """
    if json_lines or not sys.stdout.isatty():
        return JsonView()
    try:
        from streaming.terminal.live_view import LiveView
    except ModuleNotFoundError:
        raise NoViewError("the live view needs the Python package: `pip install rich`; or ask for --json") from None
    return LiveView(hint=hint, turns=turns, verbose=verbose)


def _rounded(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in fields.items()}
