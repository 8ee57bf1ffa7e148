"""Do what the client's options say: stream a file or converse, and keep and sum up what came."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any

from streaming.audio import AudioReader, WavWriter
from streaming.client.dialing import SessionLostError
from streaming.command import INTERRUPTED, TERMINATED, complain, drop_output, raise_on_interrupt, say
from streaming.config import DEMO
from streaming.errors import ContinuationError, DeviceError, StreamingError
from streaming.protocol.messages import SessionStarted
from streaming.terminal.connecting import LEAD_MS, begin_anew, connect, find_server, save
from streaming.terminal.devices import Device, Microphone, Speaker, device_table, find_device, list_devices
from streaming.terminal.echo import EchoCanceller
from streaming.terminal.jitter_buffer import JitterBuffer
from streaming.terminal.keyboard import Keyboard, key_by_key
from streaming.terminal.loudspeaker import Loudspeaker, SimulatedLoudspeaker
from streaming.terminal.recording import Recording
from streaming.terminal.sources import file_pieces
from streaming.terminal.standard_error import held_back
from streaming.terminal.talk import Talk
from streaming.terminal.view import TurnReport, View, choose_view

MAX_BUFFER_MS = LEAD_MS - 80 - 80
"""Below the server's lead by a frame and by what playback reports lag behind. Otherwise the jitter buffer would wait
for audio that the server holds back.
"""

HEADPHONES = (
    "Wear headphones, or use --echo-cancellation: otherwise the microphone hears the loudspeaker, and the machine "
    "listens to itself."
)
ONLY_PLAYED = "The continuation is only played: --output WAV would keep it."
ONLY_TIMED = "The continuation is only timed: --output WAV would keep it."
_TOLD_LINES = 3
"""Lines of the sound system that are told where a device could not be used."""


def run(args: argparse.Namespace, program: str) -> int:
    """Do what the options say, and return the exit status. program: what its complaints begin with."""
    with held_back() as said:
        status, complaint = _run(args, program)
    lines = list(dict.fromkeys(said))  # ALSA says the same several times
    for line in lines if args.verbose else lines[-_TOLD_LINES:] if isinstance(complaint, DeviceError) else ():
        complain(f"sound system: {line}")
    if complaint is not None:
        complain(f"{program}: {complaint}")
    return status


def _run(args: argparse.Namespace, program: str) -> tuple[int, StreamingError | None]:
    """Return the exit status, and what there is to complain of."""
    try:
        raise_on_interrupt()
        if args.list_devices:
            _print_devices(list_devices(), json_lines=args.json)
        elif args.input is not None:
            asyncio.run(_politely(stream_file(args, program)))
        else:
            asyncio.run(_politely(converse(args, program)))
    except StreamingError as error:
        return 1, error
    except KeyboardInterrupt:
        return INTERRUPTED, None
    except asyncio.CancelledError:
        return TERMINATED, None
    except BrokenPipeError:
        drop_output()  # the reader of standard output is gone
        return 1, None
    return 0, None


async def _politely(work: Coroutine[Any, Any, None]) -> None:
    """Have SIGTERM and a closed terminal do what Ctrl-C does: close the session and leave no server behind."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows; not the main thread
        for number in signal.Signals:
            if number.name in ("SIGTERM", "SIGHUP"):  # Windows does not know SIGHUP
                loop.add_signal_handler(number, task.cancel)
    await task


async def stream_file(args: argparse.Namespace, program: str) -> None:
    realtime = args.pace == "realtime"
    with contextlib.ExitStack() as files:
        reader = files.enter_context(AudioReader(args.input))
        output = files.enter_context(WavWriter(args.output)) if args.output else None
        record = files.enter_context(Recording(args.record)) if args.record else None
        files.enter_context(key_by_key(releases=False))  # what is typed meanwhile would be seen in the view
        view = files.enter_context(
            choose_view(json_lines=args.json, hint="Ctrl-C ends it.", turns=args.turn == "vad", verbose=args.verbose)
        )
        async with contextlib.AsyncExitStack() as session:
            server = await find_server(args, session, view)
            client = await session.enter_async_context(connect(args, server, view, floats=not reader.sixteen_bits))
            loudspeaker = _loudspeaker(args, session) if realtime else None
            heard = isinstance(loudspeaker, Speaker)
            if output is None and record is None:
                view.event("notice", {"message": ONLY_PLAYED if heard else ONLY_TIMED})
            talk = Talk(
                client,
                view,
                turn_taking=args.turn,
                loudspeaker=loudspeaker,
                output=output,
                record=record,
            )
            report = await talk.run_file(file_pieces(reader, realtime=realtime))
            if args.save is not None:
                await save(client, args.save, view)
    _summarize(args, program, view, client.started, talk.whole_turns, report, heard=heard)


def _loudspeaker(args: argparse.Namespace, session: contextlib.AsyncExitStack) -> Loudspeaker:
    """Return where a file's continuation is played: aloud if somebody is there and keeps it nowhere, and it can be."""
    if sys.stdout.isatty() and not (args.json or args.output or args.record):
        with contextlib.suppress(DeviceError):
            device = find_device(list_devices(), None, "output")
            return session.enter_context(Speaker(device, max_buffer_ms=MAX_BUFFER_MS))
    return SimulatedLoudspeaker(JitterBuffer(max_ms=MAX_BUFFER_MS))


async def converse(args: argparse.Namespace, program: str) -> None:
    devices = list_devices()
    microphone_device = find_device(devices, args.input_device, "input")
    speaker_device = find_device(devices, args.output_device, "output")
    echo = EchoCanceller() if args.echo_cancellation else None
    whole_turns, last = 0, None
    with contextlib.ExitStack() as files:
        output = files.enter_context(WavWriter(args.output)) if args.output else None
        record = files.enter_context(Recording(args.record)) if args.record else None
        releases = files.enter_context(key_by_key(releases=args.push_to_talk))
        view = files.enter_context(choose_view(json_lines=args.json, hint=_hint(args, releases), verbose=args.verbose))
        if echo is None:
            view.event("notice", {"message": HEADPHONES})
        try:
            async with contextlib.AsyncExitStack() as session:
                server = await find_server(args, session, view)
                client = await session.enter_async_context(connect(args, server, view))
                speaker = session.enter_context(Speaker(speaker_device, max_buffer_ms=MAX_BUFFER_MS, echo=echo))
                microphone = session.enter_context(Microphone(microphone_device, echo))
                keys = Keyboard(steady=args.push_to_talk)
                over = False
                while not over:
                    talk = Talk(
                        client,
                        view,
                        turn_taking=args.turn,
                        loudspeaker=speaker,
                        output=output,
                        record=record,
                        push_to_talk=args.push_to_talk,
                    )
                    try:
                        await talk.run_microphone(microphone, keys)
                        over = True
                        if args.save is not None:
                            await talk.hush()
                            await save(client, args.save, view)
                    except SessionLostError as error:
                        if args.url is None:
                            raise  # the client's own server does not come back
                        view.event("session_lost", {"message": f"{error}; a new conversation begins"})
                    finally:
                        whole_turns, last = whole_turns + talk.whole_turns, talk.last_report or last
                    if not over:
                        client = await begin_anew(args, server, session, view, talk.meters)
        finally:
            # However it ended, what was said is kept.
            if output is not None and output.samples:
                output.close()
            if record is not None:
                record.close()
        if last is None or not whole_turns:
            raise ContinuationError("no continuation came whole")
    _summarize(args, program, view, client.started, whole_turns, last, heard=True)


def _hint(args: argparse.Namespace, releases: bool) -> str:
    if args.turn == "vad":
        return "just talk.  t: another take.  Ctrl-D or Ctrl-C: quit"
    if not args.push_to_talk:
        return "Enter: go on, or interrupt.  t: another take.  Ctrl-D or Ctrl-C: quit"
    how = "hold Space to talk" if releases else "Space: talk, Space again: go on"
    return f"{how}.  t: another take.  Ctrl-D or Ctrl-C: quit"


def _summarize(
    args: argparse.Namespace,
    program: str,
    view: View,
    started: SessionStarted,
    turns: int,
    report: TurnReport,
    *,
    heard: bool,
) -> None:
    sentence = result(started, turns, report, [path for path in (args.output, args.record) if path], heard=heard)
    files = {"output": args.output, "record": args.record}
    view.event("summary", {"sentence": sentence, "turns": turns, **files, **asdict(report)})
    if not args.json and not sys.stdout.isatty():  # on a terminal the view has said so
        complain(f"{program}: {sentence}")
        if args.verbose:
            complain(f"{program}: {report.figures()}")


def result(started: SessionStarted, turns: int, report: TurnReport, files: list[str], *, heard: bool) -> str:
    """Return what came of it, in one sentence. report: of the last turn. heard: it was played to somebody."""
    whose = "in your voice"
    if started.notice is not None:  # the model has said that it does something else
        whose = "by the demo model" if started.model == DEMO else f"by {started.model}"
    if turns > 1:
        what = f"{turns} turns {whose}"
    else:
        what = report.length() if report.voice is not None else f"{report.length()} {whose}"
    kept = f" -> {' and '.join(files)}" if files else ", only played" if heard else ", only timed"
    return f"{what}{kept}{report.first_sound()}"


def _print_devices(devices: list[Device], *, json_lines: bool) -> None:
    if json_lines:
        say("\n".join(json.dumps(asdict(device)) for device in devices))
    elif devices:
        say(device_table(devices))
    else:
        say("no sound devices")
