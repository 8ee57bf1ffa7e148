"""What a person sees."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from streaming.terminal.live_view import LiveView
from streaming.terminal.talk import suggestion
from streaming.terminal.view import JsonView, Meters, NoViewError, TurnReport, choose_view

REPORT = TurnReport(
    turn=1,
    reason="max_seconds",
    whole=True,
    seconds=2.0,
    first_audio_ms=41.23456,
    first_audible_ms=45.0,
    interval_p95_ms=80.1,
    underruns=1,
    realtime_factor=1.2,
    rtt_ms=0.4,
    server_first_frame_ms=30.0,
    server_step_ms=20.0,
)


def test_json_is_one_object_a_line() -> None:
    out = io.StringIO()
    with JsonView(out) as view:
        view.event("turn", asdict(REPORT))
        view.event("notice", {"message": "two\nlines"})
        view.show(Meters())
    turn, notice = (json.loads(line) for line in out.getvalue().splitlines())
    assert (turn["event"], turn["first_audio_ms"], turn["whole"]) == ("turn", 41.235, True)
    assert notice == {"event": "notice", "message": "two\nlines"}


def test_json_tells_levels_once_a_second() -> None:
    now = [0.0]
    out = io.StringIO()
    view = JsonView(out, lambda: now[0])
    for _ in range(20):
        now[0] += 0.125
        view.show(Meters(turn=2))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["levels"] * 2
    assert lines[0]["turn"] == 2


def test_the_live_view_shows_meters_and_figures() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    with LiveView(console, hint="Enter: go on") as view:
        view.event("session", {"model": "demo", "seed": 3, "context_seconds": 20.5, "codec": "opus"})
        view.event("notice", {"message": "wear headphones"})
        view.event("levels", {})
        view.event("summary", {"sentence": "2.0 s in your voice -> out.wav"})
        view.event("turn", asdict(REPORT))
        view.event("interrupted", {"turn": 2, "heard_seconds": 0.5})
        view.event("turn", asdict(replace(REPORT, turn=3, voice="a deep voice")))
        meters = Meters(
            state="speaking",
            turn=2,
            voice="a deep voice",
            input_dbfs=-30.0,
            output_dbfs=0.0,
            first_audible_ms=45.0,
            rtt_ms=0.4,
        )
        view.show(meters)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for words in (
        "demo, seed 3",
        "wear headphones",
        "speaking in a deep voice turn 2",
        "turn 3: 2.0 s in a deep voice, first sound after 45 ms",
        "first sound after 45 ms",
        "Enter: go on",
        "2.0 s in your voice -> out.wav",
        "turn 1: 2.0 s, first sound after 45 ms",
    ):
        assert words in shown
    assert "█" * 40 in shown
    assert "█" * 20 + "·" * 20 in shown


def shown(width: int, meters: Meters) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    with LiveView(console) as view:
        view.show(meters)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_level_is_never_minus_nothing() -> None:
    """Full scale was "-0 dB"."""
    assert " 0 dB" in shown(80, Meters(input_dbfs=-0.3)) and "-0 dB" not in shown(80, Meters(input_dbfs=-0.3))


def test_a_lost_connection_is_a_state() -> None:
    """The loss was a line that scrolled away, above a meter that went on as if nothing had happened."""
    away = shown(100, Meters(state="speaking", away_seconds=12.3, kept_input_ms=2_500.0))
    assert "connection lost" in away
    assert "12 s left, 2.5 s of yours kept" in away
    assert "speaking" not in away
    assert "trying to begin anew" in shown(100, Meters(away_seconds=0.0))


def test_what_is_lost_is_shown() -> None:
    words = shown(100, Meters(dropped_input_ms=1_234.0, unheard_ms=80.0, behind_ms=400.0))
    assert "microphone: 1.2 s lost  server too slow: 0.1 s lost  server 400 ms behind" in words
    assert "lost" not in shown(100, Meters())


def test_a_narrow_terminal_breaks_between_figures() -> None:
    words = shown(40, Meters(rtt_ms=1.25, first_audible_ms=80.0, sent_kbps=30.0, received_kbps=31.0))
    assert "machine " + "·" * 21 + " -96 dB" in words
    for figure in ("first sound after 80 ms", "round trip 1.2 ms", "30 kbit/s up, 31 down"):
        assert figure in words
    assert max(map(len, words.splitlines())) <= 60  # some of it is how the cursor is moved


def test_what_stands_below_the_figures_does_not_jump() -> None:
    """The hint went up and down by a line whenever a figure became a digit longer or shorter."""
    console = Console(file=io.StringIO(), width=80)
    view = LiveView(console, hint="Enter: go on")
    heights = []
    for up in (0.0, 300.0, 5.0, 0.0):
        view.show(Meters(rtt_ms=13.3, buffer_ms=290.0, sent_kbps=up, received_kbps=up))
        heights.append(len(console.render_lines(view._render())))
    assert heights[0] < heights[1] == heights[2] == heights[3]


def test_no_line_breaks_what_one_might_say_in_two() -> None:
    """At 80 columns "A, B, C" was told as a line that ends in "A, B, and another one."""
    console = Console(file=io.StringIO(), width=80)
    LiveView(console).event(
        "notice", {"message": suggestion(("one, two, three", "Monday, Tuesday", "January, February", "A, B, C"))}
    )
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        'Try saying "one, two, three", "Monday, Tuesday", "January, February" or',
        '"A, B, C".',
    ]


def test_a_report_has_its_figures_in_words() -> None:
    words = REPORT.figures()
    assert "2.00 s of continuation (max seconds)" in words
    assert "first audible sample after 45.0 ms" in words
    assert words.endswith("1 underrun")


def test_a_turn_is_a_few_words_and_all_figures_by_request() -> None:
    """Each turn was nine figures in three lines."""
    for flags, words in (
        ({}, "turn 1: 2.0 s, first sound after 45 ms\n"),
        ({"verbose": True}, f"turn 1: {REPORT.figures()}\n"),
        ({"turns": False}, ""),
    ):
        console = Console(file=io.StringIO(), force_terminal=True, width=300, color_system=None)
        view = LiveView(console, **flags)
        view.event("turn", asdict(REPORT))
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue().replace("\r\n", "\n") == words
    assert replace(REPORT, first_audible_ms=None).first_sound() == ", first sound after 41 ms"
    assert replace(REPORT, first_audible_ms=None, first_audio_ms=None).first_sound() == ""


def test_what_is_done_before_there_is_a_session_is_shown() -> None:
    """Nothing was shown for the nine seconds that a start takes, or for the minutes of a download."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with LiveView(console) as view:
        view.progress("starting a server")
        view.progress("starting a server: 1 GB of 4 GB downloaded", 0.25)
        view.show(Meters())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "starting a server: 1 GB of 4 GB downloaded" in shown
    assert "━" * 10 in shown
    assert shown.index("downloaded") < shown.index("listening")


def test_a_program_is_told_of_progress_too() -> None:
    out = io.StringIO()
    JsonView(out).progress("loading")
    JsonView(out).progress("downloading", 0.12345)
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first == {"event": "progress", "message": "loading"}
    assert second == {"event": "progress", "message": "downloading", "share": 0.123}


def test_without_rich_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody got a traceback, even those who wanted JSON."""
    monkeypatch.setitem(sys.modules, "streaming.terminal.live_view", None)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(NoViewError, match="pip install rich"):
        choose_view(json_lines=False, hint="")
    assert isinstance(choose_view(json_lines=True, hint=""), JsonView)


def test_without_a_terminal_it_is_json() -> None:
    assert isinstance(choose_view(json_lines=False, hint=""), JsonView)
