"""What the client does with its options: streams a file or converses, and keeps and sums up what came."""

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

from rich.console import Console

from streaming.audio import AudioReader, WavWriter
from streaming.client.dialing import SessionLostError
from streaming.command import INTERRUPTED, TERMINATED, complain, drop_output, raise_on_interrupt, say
from streaming.errors import ContinuationError, StreamingError
from streaming.terminal.connecting import LEAD_MS, begin_anew, connect, find_server
from streaming.terminal.devices import Device, Microphone, Speaker, device_table, find_device, list_devices
from streaming.terminal.echo import EchoCanceller
from streaming.terminal.jitter_buffer import JitterBuffer
from streaming.terminal.keyboard import Keyboard, key_by_key
from streaming.terminal.loudspeaker import SimulatedLoudspeaker
from streaming.terminal.recording import Recording
from streaming.terminal.sources import file_pieces
from streaming.terminal.talk import Talk
from streaming.terminal.view import TurnReport, View, choose_view

MAX_BUFFER_MS = LEAD_MS - 80 - 80
"""Below the server's lead by a frame and by what playback reports lag behind. Otherwise the jitter buffer would wait
for audio that the server holds back.
"""

HEADPHONES = (
    "wear headphones: what the loudspeaker says would reach the microphone, and the machine would listen to itself "
    "(or --echo-cancellation)"
)


def run(args: argparse.Namespace, program: str) -> int:
    """Do what the options say, and return the exit status. program: what its complaints begin with."""
    try:
        raise_on_interrupt()
        if args.list_devices:
            _print_devices(list_devices(), json_lines=args.json)
        elif args.input is not None:
            asyncio.run(_politely(stream_file(args, program)))
        else:
            asyncio.run(_politely(converse(args, program)))
    except StreamingError as error:
        complain(f"{program}: {error}")
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except asyncio.CancelledError:
        return TERMINATED
    except BrokenPipeError:
        drop_output()  # whoever read it is gone
        return 1
    return 0


async def _politely(work: Coroutine[Any, Any, None]) -> None:
    """Have SIGTERM and a closed terminal do what Ctrl-C does: close the session and leave no server behind."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows; not the main thread
        for number in signal.Signals:
            if number.name in ("SIGTERM", "SIGHUP"):  # the latter is unknown to Windows
                loop.add_signal_handler(number, task.cancel)
    await task


async def stream_file(args: argparse.Namespace, program: str) -> None:
    realtime = args.pace == "realtime"
    with contextlib.ExitStack() as files:
        reader = files.enter_context(AudioReader(args.input))
        output = files.enter_context(WavWriter(args.output)) if args.output else None
        record = files.enter_context(Recording(args.record)) if args.record else None
        view = files.enter_context(choose_view(json_lines=args.json, hint="Ctrl-C ends it"))
        async with contextlib.AsyncExitStack() as session:
            server = await find_server(args, session, view)
            client = await session.enter_async_context(connect(args, server, view, floats=not reader.sixteen_bits))
            talk = Talk(
                client,
                view,
                turn_taking=args.turn,
                loudspeaker=SimulatedLoudspeaker(JitterBuffer(max_ms=MAX_BUFFER_MS)) if realtime else None,
                output=output,
                record=record,
            )
            report = await talk.run_file(file_pieces(reader, realtime=realtime))
    _summarize(args, program, view, talk.whole_turns, report)


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
        view = files.enter_context(choose_view(json_lines=args.json, hint=_hint(args, releases)))
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
                    except SessionLostError as error:
                        if args.url is None:
                            raise  # a server of our own that is gone does not come back
                        view.event("session_lost", {"message": f"{error}; a new conversation begins"})
                    finally:
                        whole_turns, last = whole_turns + talk.whole_turns, talk.last_report or last
                    if not over:
                        client = await begin_anew(args, server, session, view, talk.meters)
        finally:
            # However it ended, what was said was said: keep it.
            if output is not None and output.samples:
                output.close()
            if record is not None:
                record.close()
        if last is None or not whole_turns:
            raise ContinuationError("no continuation came whole")
    _summarize(args, program, view, whole_turns, last)


def _hint(args: argparse.Namespace, releases: bool) -> str:
    if args.turn == "vad":
        return "just talk.  Ctrl-D or Ctrl-C: quit"
    if not args.push_to_talk:
        return "Enter: go on, or interrupt.  Ctrl-D or Ctrl-C: quit"
    return f"{'hold Space to talk' if releases else 'Space: talk, Space again: go on'}.  Ctrl-D or Ctrl-C: quit"


def _summarize(args: argparse.Namespace, program: str, view: View, turns: int, report: TurnReport) -> None:
    files = {"output": args.output, "record": args.record}
    view.event("summary", {"turns": turns, **files, **asdict(report)})
    if not args.json and not sys.stdout.isatty():  # on a terminal the view has said it
        complain(f"{program}: {report.sentence()}")


def _print_devices(devices: list[Device], *, json_lines: bool) -> None:
    if json_lines:
        say("\n".join(json.dumps(asdict(device)) for device in devices))
    elif devices:
        table = Console()
        with table.capture() as drawn:
            table.print(device_table(devices))
        say(drawn.get().rstrip())
    else:
        say("no sound devices")
