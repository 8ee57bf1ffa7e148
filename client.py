"""Speak, or stream a file, and hear it go on in the same voice. `python client.py --help`.

Exit status: 0 if a continuation came whole, 1 if not, 2 for wrong flags, 130 after Ctrl-C, 143 after
SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from streaming.audio import AudioReader, WavWriter
from streaming.console.conversation import Conversation
from streaming.console.devices import Device, Microphone, Speaker, device_table, find_device, list_devices
from streaming.console.jitter_buffer import JitterBuffer
from streaming.console.keyboard import presses, unechoed
from streaming.console.loudspeaker import SimulatedLoudspeaker
from streaming.console.own_server import own_server, server_command
from streaming.console.recording import Recording
from streaming.console.sources import file_pieces
from streaming.console.view import TurnReport, View, choose_view
from streaming.errors import ContinuationError, StreamingError
from streaming.wire.client import ContinuationClient
from streaming.wire.messages import SamplingOptions, SessionStart

# The server runs at most this far ahead of playback. The jitter buffer stays below it by a frame and by what playback
# reports lag behind; otherwise it would wait for audio that the server holds back.
LEAD_MS = 400
MAX_BUFFER_MS = LEAD_MS - 80 - 80

HEADPHONES = (
    "wear headphones: what the loudspeaker says would reach the microphone, and the machine would listen to itself"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the client with these command line arguments; returns the exit status."""
    args = _parse(arguments)
    try:
        if args.list_devices:
            _print_devices(list_devices(), json_lines=args.json)
        elif args.input is not None:
            asyncio.run(_politely(_stream_file(args)))
        else:
            asyncio.run(_politely(_converse(args)))
    except StreamingError as error:
        print(f"client.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except asyncio.CancelledError:
        return 143
    except BrokenPipeError:
        # Whoever read standard output is gone; the interpreter must not try to flush it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


async def _politely(work: Coroutine[Any, Any, None]) -> None:
    """Has SIGTERM and a closed terminal do what Ctrl-C does: close the session and leave no server behind."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # Windows; not the main thread
        for number in signal.Signals:
            if number.name in ("SIGTERM", "SIGHUP"):  # the latter is unknown to Windows
                loop.add_signal_handler(number, task.cancel)
    await task


async def _stream_file(args: argparse.Namespace) -> None:
    realtime = args.pace == "realtime"
    with contextlib.ExitStack() as files:
        reader = files.enter_context(AudioReader(args.input))
        output = files.enter_context(WavWriter(args.output)) if args.output else None
        record = files.enter_context(Recording(args.record)) if args.record else None
        view = files.enter_context(choose_view(json_lines=args.json, hint="Ctrl-C ends it"))
        async with contextlib.AsyncExitStack() as session:
            client = await _open(args, session, view)
            conversation = Conversation(
                client,
                view,
                turn_taking=args.turn,
                loudspeaker=SimulatedLoudspeaker(JitterBuffer(max_ms=MAX_BUFFER_MS)) if realtime else None,
                output=output,
                record=record,
            )
            report = await conversation.run_file(file_pieces(reader, realtime=realtime))
    _summarize(args, view, conversation.whole_turns, report)


async def _converse(args: argparse.Namespace) -> None:
    devices = list_devices()
    microphone_device = find_device(devices, args.input_device, "input")
    speaker_device = find_device(devices, args.output_device, "output")
    manual = args.turn == "manual"
    hint = "Enter: go on, or interrupt.  Ctrl-D or Ctrl-C: quit" if manual else "just talk.  Ctrl-D or Ctrl-C: quit"
    with contextlib.ExitStack() as files:
        output = files.enter_context(WavWriter(args.output)) if args.output else None
        record = files.enter_context(Recording(args.record)) if args.record else None
        files.enter_context(unechoed())
        view = files.enter_context(choose_view(json_lines=args.json, hint=hint))
        view.event("notice", {"message": HEADPHONES})
        async with contextlib.AsyncExitStack() as session:
            client = await _open(args, session, view)
            speaker = session.enter_context(Speaker(speaker_device, max_buffer_ms=MAX_BUFFER_MS))
            microphone = session.enter_context(Microphone(microphone_device))
            conversation = Conversation(
                client, view, turn_taking=args.turn, loudspeaker=speaker, output=output, record=record
            )
            try:
                await conversation.run_microphone(microphone, presses())
            finally:
                # However it ended, what was said was said: keep it.
                if output is not None and output.samples:
                    output.close()
                if record is not None:
                    record.close()
        if conversation.last_report is None or not conversation.whole_turns:
            raise ContinuationError("no continuation came whole")
    _summarize(args, view, conversation.whole_turns, conversation.last_report)


async def _open(args: argparse.Namespace, session: contextlib.AsyncExitStack, view: View) -> ContinuationClient:
    """A session on the server at --url, or on one of our own; both end with `session`."""
    resume = args.url is not None  # a server of our own that is gone does not come back
    url, token = args.url, os.environ.get("STREAMING_TOKEN", "").strip() or None
    if url is None:
        command = server_command(Path(__file__).with_name("server.py"), args.model, args.codec)
        # A token of its own: whoever else is on this machine can reach the port, and has no business there.
        token = secrets.token_urlsafe(32)
        environment = {**os.environ, "STREAMING_TOKENS": f"client:{token}"}
        url = await session.enter_async_context(own_server(command, environment=environment, said=_notice(view)))
        view.event("server", {"url": url})
    start = SessionStart(
        turn_taking=args.turn,
        pace=args.pace,
        max_seconds=args.max_seconds,
        lag="wait" if args.input else "drop",  # a file is better late than with holes
        lead_ms=LEAD_MS,
        resume=resume,
        sampling=SamplingOptions(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed),
    )
    return await session.enter_async_context(ContinuationClient.connect(url, start, token=token))


def _notice(view: View) -> Callable[[str], None]:
    return lambda line: view.event("notice", {"message": line})


def _summarize(args: argparse.Namespace, view: View, turns: int, report: TurnReport) -> None:
    files = {"output": args.output, "record": args.record}
    view.event("summary", {"turns": turns, **files, **asdict(report)})
    if not args.json and not sys.stdout.isatty():  # on a terminal the view has said it
        print(f"client.py: {report.sentence()}", file=sys.stderr)


def _print_devices(devices: list[Device], *, json_lines: bool) -> None:
    if json_lines:
        for device in devices:
            print(json.dumps(asdict(device)))
    elif devices:
        Console().print(device_table(devices))
    else:
        print("no sound devices")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="client.py",
        description="Streams speech to a continuation server and plays, saves and times what it makes of it. "
        "With --input a file is streamed and continued; without, the microphone: Enter ends your turn, or interrupts "
        "the machine's.",
        epilog="Without --url a server of its own is started, and ended with the client. A server that asks for a "
        "token gets the one in the environment variable STREAMING_TOKEN. On a terminal a live view is shown, otherwise "
        "JSON lines. Exit status 0 only if a continuation came whole.",
    )
    parser.add_argument("--url", help="server, ws://HOST:PORT[/v1/continue] (default: start one)")
    parser.add_argument("--model", help="model of the own server: demo, a hub id or a directory (default: demo)")
    parser.add_argument("--codec", help="codec of the own server (default: that of the demo, or kyutai/mimi)")
    parser.add_argument("--input", metavar="WAV", help="audio file to stream; any rate, channels and common format")
    parser.add_argument("--output", metavar="WAV", help="write the continuation alone here, 24 kHz mono")
    parser.add_argument("--record", metavar="WAV", help="write both sides here: left what was sent, right what came")
    parser.add_argument(
        "--max-seconds",
        type=_number(float, 0, 3600, above=True),
        default=20.0,
        metavar="S",
        help="length (default: 20)",
    )
    parser.add_argument(
        "--temperature", type=_number(float, 0, 10), default=0.8, metavar="T", help="0 is greedy (default: 0.8)"
    )
    parser.add_argument(
        "--top-k", type=_number(int, 0, 2**31 - 1), default=30, metavar="K", help="0 is off (default: 30)"
    )
    parser.add_argument(
        "--top-p", type=_number(float, 0, 1, above=True), default=1.0, metavar="P", help="1 is off (default: 1)"
    )
    parser.add_argument(
        "--seed", type=_number(int, 0, 2**63 - 1), metavar="N", help="same seed and speech, same answer"
    )
    parser.add_argument(
        "--turn", choices=("manual", "vad"), default="manual", help="who says that you are done (default: manual)"
    )
    parser.add_argument(
        "--pace", choices=("realtime", "fast"), default="realtime", help="of --input and its answer (default: realtime)"
    )
    parser.add_argument("--list-devices", action="store_true", help="list sound devices and quit")
    parser.add_argument("--input-device", metavar="X", help="microphone: number or part of a name")
    parser.add_argument("--output-device", metavar="X", help="loudspeaker: number or part of a name")
    parser.add_argument("--json", action="store_true", help="JSON lines on a terminal, too")
    args = parser.parse_args(arguments)
    if args.url is not None and args.model is not None:
        parser.error("--model is for the own server; the one at --url has its model already")
    if args.input is not None and (args.input_device or args.output_device):
        parser.error("--input streams a file; --input-device and --output-device are for the microphone mode")
    if args.pace == "fast" and args.input is None:
        parser.error("--pace fast needs --input: a microphone is always in real time")
    if args.pace == "fast" and args.turn == "vad":
        parser.error("--turn vad needs --pace realtime: silence is heard in real time")
    if args.output and args.record and Path(args.output).resolve() == Path(args.record).resolve():
        parser.error("--output and --record name the same file")
    args.model = args.model or "demo"
    return args


def _number(kind: Callable[[str], float], low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite number from `low` (or above it) to `high`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"not a number: {text!r}") from None
        if not math.isfinite(value) or value > high or value < low or (above and value == low):
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if above else 'at least'} {low} and at most {high}"
            )
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
