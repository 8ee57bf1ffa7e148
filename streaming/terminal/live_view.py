"""The live view: what is being done before there is a session, then levels and figures that stay in place, with the
events that matter to a person above them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from streaming.terminal.view import Meters, TurnReport

_METER_WIDTH = 40
_METER_ROOM = 19
"""Columns that a meter's line takes besides the meter."""
_METER_FLOOR_DBFS = -60.0
_COLOURS = {"listening": "green", "talking": "green", "ready": "cyan", "waiting": "yellow", "speaking": "magenta"}
_REFRESHES_PER_S = 10.0
_TELL_SECONDS_S = 1.0
"""A stage that takes less is not worth a figure."""
_WORD = re.compile(r'\S*"[^"]*"\S*|\S+')
"""A word, or a quotation with what adjoins it: what one might say is not broken in two."""


@dataclass(frozen=True, slots=True)
class _Doing:
    """A stage: what is being done, since when, and how much of it is done."""

    message: str
    since_s: float
    share: float | None
    spinner: Spinner


class LiveView:
    """A few lines that stay in place, with the events that matter to a person scrolling above them."""

    def __init__(
        self, console: Console | None = None, hint: str = "", *, turns: bool = True, verbose: bool = False
    ) -> None:
        self._hint, self._turns, self._verbose = hint, turns, verbose
        self._doing: _Doing | None = None
        self._meters: Meters | None = None
        self._figure_lines = 1  # as many as were needed once: what stands below them does not jump
        self._live = Live(
            console=console or Console(),
            get_renderable=self._render,
            refresh_per_second=_REFRESHES_PER_S,  # by itself: what is being done may take seconds
            transient=True,
        )

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        line = self._turn(fields) if name == "turn" else _line(name, fields, self._live.console.width)
        if line is not None:
            self._live.console.print(line)

    def progress(self, message: str, share: float | None = None) -> None:
        before, now_s = self._doing, time.monotonic()
        goes_on = before is not None and before.share is not None and share is not None
        since_s = before.since_s if before is not None and goes_on else now_s
        self._meters, self._doing = None, _Doing(message, since_s, share, Spinner("dots"))
        self._live.refresh()

    def show(self, meters: Meters) -> None:
        self._doing, self._meters = None, meters
        self._live.refresh()

    def __enter__(self) -> Self:
        # The line that was printed before there was a view is erased.
        self._live.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def _turn(self, fields: Mapping[str, Any]) -> Text | None:
        report = TurnReport(**fields)
        if self._verbose:
            return Text(f"turn {report.turn}: {report.figures()}", style="dim")
        return (
            Text(f"turn {report.turn}: {report.length()}{report.first_sound()}", style="dim") if self._turns else None
        )

    def _render(self) -> Group:
        if self._meters is not None:
            return self._levels(self._meters)
        return Group() if self._doing is None else self._progress(self._doing)

    def _progress(self, doing: _Doing) -> Group:
        past_s = time.monotonic() - doing.since_s
        line = Table.grid(padding=(0, 1))
        line.add_row(
            doing.spinner,
            Text(doing.message),
            Text(f"{past_s:.0f} s" if past_s >= _TELL_SECONDS_S else "", style="dim"),
        )
        if doing.share is None:
            return Group(line)
        return Group(line, ProgressBar(total=1.0, completed=doing.share, width=self._width()))

    def _width(self) -> int:
        return max(4, min(_METER_WIDTH, self._live.console.width - _METER_ROOM))

    def _levels(self, meters: Meters) -> Group:
        width = self._width()
        bars = Table.grid(padding=(0, 1))
        for column in range(3):
            bars.add_column(no_wrap=True, justify="right" if column == 2 else "left")
        bars.add_row("you", _bar(meters.input_dbfs, width), f"{round(meters.input_dbfs)} dB")
        bars.add_row("machine", _bar(meters.output_dbfs, width), f"{round(meters.output_dbfs)} dB")
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
        shown = _flow(figures, self._live.console.width)
        self._figure_lines = max(self._figure_lines, 1 + shown.plain.count("\n"))
        shown.append("\n" * (self._figure_lines - 1 - shown.plain.count("\n")))
        lines: list[RenderableType] = [_state(meters), bars, shown]
        troubles = [
            f"microphone: {meters.dropped_input_ms / 1e3:.1f} s lost" if meters.dropped_input_ms else "",
            f"server too slow: {meters.unheard_ms / 1e3:.1f} s lost" if meters.unheard_ms else "",
            f"server {meters.behind_ms:.0f} ms behind" if meters.behind_ms else "",
        ]
        if any(troubles):
            lines.append(_flow(list(filter(None, troubles)), self._live.console.width, "bold red"))
        return Group(*lines, Text(self._hint, style="dim italic")) if self._hint else Group(*lines)


def _state(meters: Meters) -> Text:
    turn = (f"turn {meters.turn}", "dim")
    if meters.away_seconds is None:
        voice = f" in {meters.voice}" if meters.state == "speaking" and meters.voice is not None else ""
        return Text.assemble((meters.state, f"bold {_COLOURS[meters.state]}"), f"{voice} ", turn)
    if meters.away_seconds <= 0:
        return Text.assemble(("no connection", "bold red"), " trying to begin anew")
    kept = f", {meters.kept_input_ms / 1e3:.1f} s of yours kept" if meters.kept_input_ms else ""
    left = f"coming back, {meters.away_seconds:.0f} s left{kept}"
    return Text.assemble(("connection lost", "bold red"), f" {left} ", turn)


def _bar(dbfs: float, width: int) -> Text:
    filled = round(width * min(1.0, max(0.0, 1 - dbfs / _METER_FLOOR_DBFS)))
    colour = "red" if dbfs > -3 else "yellow" if dbfs > -12 else "green"
    return Text.assemble(("█" * filled, colour), ("·" * (width - filled), "dim"))


def _flow(parts: list[str], width: int, style: str = "dim", between: str = "  ") -> Text:
    """Parts in as few lines as they need, none broken in two."""
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}{between}{part}" if lines[-1] else part
        if lines[-1] and len(joined) > width:
            lines.append(part)
        else:
            lines[-1] = joined
    return Text("\n".join(lines), style=style)


def _line(name: str, fields: Mapping[str, Any], width: int) -> Text | None:
    match name:
        case "notice":
            return _flow(_WORD.findall(str(fields["message"])), width, "yellow", between=" ")
        case "session":
            codec = ", Opus" if fields["codec"] == "opus" else ""
            remembers = f"remembers {fields['context_seconds']:.1f} s"
            return Text(f"{fields['model']}, seed {fields['seed']}, {remembers}{codec}", style="dim")
        case "take":
            return Text(
                f"turn {fields['turn']}: another take of turn {fields['of']}, seed {fields['seed']}", style="dim"
            )
        case "interrupted":
            return Text(f"turn {fields['turn']}: interrupted after {fields['heard_seconds']:.2f} s", style="dim")
        case "connection_lost":
            return Text(
                f"connection lost: trying to return (the session is kept for {fields['kept_seconds']:g} s)",
                style="bold yellow",
            )
        case "connection_restored":
            return Text(f"connection restored after {fields['after_ms'] / 1e3:.1f} s, nothing lost", style="green")
        case "went_back":
            lost = f"the server died; another goes on: what was said since turn {fields['turn']} began is lost"
            return Text(lost, style="bold yellow")
        case "session_lost":
            return Text(str(fields["message"]), style="bold red")
        case "saved":
            return Text(f"the conversation is kept in {fields['file']}; --load goes on with it", style="dim")
        case "summary":
            return Text(str(fields["sentence"]), style="bold")
    return None
