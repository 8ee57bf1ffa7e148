"""Speak, or stream a file, and hear it go on in the same voice. `python client.py --help`.

Exit status: 0 if a continuation came whole, 1 if not, 2 for wrong flags, 130 after Ctrl-C, 143 after
SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streaming.command import INTERRUPTED, TERMINATED, complain, drop_output, end_on_signals, raise_on_interrupt, say

if __name__ == "__main__":
    end_on_signals()

from rich.console import Console

from streaming.audio import AudioReader, WavWriter
from streaming.client.client import ContinuationClient
from streaming.client.dialing import RefusedError, SessionLostError, leads_to_this_machine
from streaming.errors import ContinuationError, StreamingError
from streaming.protocol.messages import SamplingOptions, SessionStart
from streaming.protocol.opus import opus_available
from streaming.terminal.devices import Device, Microphone, Speaker, device_table, find_device, list_devices
from streaming.terminal.echo import EchoCanceller
from streaming.terminal.jitter_buffer import JitterBuffer
from streaming.terminal.keyboard import Keyboard, key_by_key
from streaming.terminal.loudspeaker import SimulatedLoudspeaker
from streaming.terminal.own_server import own_server, server_command
from streaming.terminal.recording import Recording
from streaming.terminal.sources import file_pieces
from streaming.terminal.talk import Talk
from streaming.terminal.view import Meters, TurnReport, View, choose_view

# The server runs at most this far ahead of playback. The jitter buffer stays below it by a frame and by what playback
# reports lag behind; otherwise it would wait for audio that the server holds back.
LEAD_MS = 400
MAX_BUFFER_MS = LEAD_MS - 80 - 80

HEADPHONES = (
    "wear headphones: what the loudspeaker says would reach the microphone, and the machine would listen to itself "
    "(or --echo-cancellation)"
)
NO_OPUS = (
    "the server has no Opus (`pip install opuslib-next-bundled` there): audio is sent as it is, 384 kbit/s each way"
)
AGAIN_S = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Before each attempt to begin anew; the last one again and again."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the client with these command line arguments, and return the exit status."""
    args = _parse(arguments)
    try:
        raise_on_interrupt()
        if args.list_devices:
            _print_devices(list_devices(), json_lines=args.json)
        elif args.input is not None:
            asyncio.run(_politely(_stream_file(args)))
        else:
            asyncio.run(_politely(_converse(args)))
    except StreamingError as error:
        complain(f"client.py: {error}")
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


async def _stream_file(args: argparse.Namespace) -> None:
    realtime = args.pace == "realtime"
    with contextlib.ExitStack() as files:
        reader = files.enter_context(AudioReader(args.input))
        output = files.enter_context(WavWriter(args.output)) if args.output else None
        record = files.enter_context(Recording(args.record)) if args.record else None
        view = files.enter_context(choose_view(json_lines=args.json, hint="Ctrl-C ends it"))
        async with contextlib.AsyncExitStack() as session:
            server = await _find_server(args, session, view)
            client = await session.enter_async_context(_connect(args, server, view, floats=not reader.sixteen_bits))
            conversation = Talk(
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
                server = await _find_server(args, session, view)
                client = await session.enter_async_context(_connect(args, server, view))
                speaker = session.enter_context(Speaker(speaker_device, max_buffer_ms=MAX_BUFFER_MS, echo=echo))
                microphone = session.enter_context(Microphone(microphone_device, echo))
                keys = Keyboard(steady=args.push_to_talk)
                over = False
                while not over:
                    conversation = Talk(
                        client,
                        view,
                        turn_taking=args.turn,
                        loudspeaker=speaker,
                        output=output,
                        record=record,
                        push_to_talk=args.push_to_talk,
                    )
                    try:
                        await conversation.run_microphone(microphone, keys)
                        over = True
                    except SessionLostError as error:
                        if args.url is None:
                            raise  # a server of our own that is gone does not come back
                        view.event("session_lost", {"message": f"{error}; a new conversation begins"})
                    finally:
                        whole_turns, last = whole_turns + conversation.whole_turns, conversation.last_report or last
                    if not over:
                        client = await _begin_anew(args, server, session, view, conversation.meters)
        finally:
            # However it ended, what was said was said: keep it.
            if output is not None and output.samples:
                output.close()
            if record is not None:
                record.close()
        if last is None or not whole_turns:
            raise ContinuationError("no continuation came whole")
    _summarize(args, view, whole_turns, last)


def _hint(args: argparse.Namespace, releases: bool) -> str:
    if args.turn == "vad":
        return "just talk.  Ctrl-D or Ctrl-C: quit"
    if not args.push_to_talk:
        return "Enter: go on, or interrupt.  Ctrl-D or Ctrl-C: quit"
    return f"{'hold Space to talk' if releases else 'Space: talk, Space again: go on'}.  Ctrl-D or Ctrl-C: quit"


@dataclass(frozen=True, slots=True)
class Server:
    """Where it is, and what lets us in."""

    url: str
    token: str | None


async def _find_server(args: argparse.Namespace, session: contextlib.AsyncExitStack, view: View) -> Server:
    """Return the server at --url, or start one of our own, which ends with `session`."""
    if args.url is not None:
        return Server(args.url, os.environ.get("STREAMING_TOKEN", "").strip() or None)
    command = server_command(Path(__file__).with_name("server.py"), args.model, args.codec)
    command += ["--max-sessions", "1"]
    # A token of its own: whoever else is on this machine can reach the port, and has no business there.
    token = secrets.token_urlsafe(32)
    # What the environment says to servers is not for this one: it could not even be reached with other tokens or TLS.
    # How it computes is another matter.
    ours = ("STREAMING_NATIVE",)
    environment = {
        name: value for name, value in os.environ.items() if name in ours or not name.startswith("STREAMING_")
    }
    environment["STREAMING_TOKENS"] = f"client:{token}"
    url = await session.enter_async_context(own_server(command, environment=environment, said=_notice(view)))
    view.event("server", {"url": url})
    return Server(url, token)


@contextlib.asynccontextmanager
async def _connect(
    args: argparse.Namespace, server: Server, view: View, *, floats: bool = False
) -> AsyncIterator[ContinuationClient]:
    """floats: whether what will be sent is more than 16 bits hold."""
    plain = ("float32", "pcm16") if floats else ("pcm16",)
    start = SessionStart(
        turn_taking=args.turn,
        pace=args.pace,
        max_seconds=args.max_seconds,
        lag="wait" if args.input else "drop",  # a file is better late than with holes
        lead_ms=LEAD_MS,
        resume=args.url is not None,
        codecs=("opus", *plain) if _wants_opus(args, server) else plain,
        sampling=SamplingOptions(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed),
    )
    async with ContinuationClient.connect(server.url, start, token=server.token) as client:
        if args.transport == "opus" and client.started.codec != "opus":
            view.event("notice", {"message": NO_OPUS})
        yield client


def _wants_opus(args: argparse.Namespace, server: Server) -> bool:
    """Return whether audio goes as Opus: not on this machine, where Opus gains nothing and changes the voice."""
    if args.transport == "auto":
        return opus_available() and not leads_to_this_machine(server.url)
    return bool(args.transport == "opus")


async def _begin_anew(
    args: argparse.Namespace, server: Server, session: contextlib.AsyncExitStack, view: View, meters: Meters
) -> ContinuationClient:
    """Open a new session, however long that takes. Raises `RefusedError` where there is no use in trying."""
    meters.away_seconds = 0.0
    for wait_s in itertools.chain(AGAIN_S, itertools.repeat(AGAIN_S[-1])):
        view.show(meters)
        await asyncio.sleep(wait_s)
        try:
            return await session.enter_async_context(_connect(args, server, view))
        except RefusedError as error:
            if not error.retry_after_ms:
                raise
        except ContinuationError:
            pass  # it is away, perhaps for longer
    raise AssertionError


def _notice(view: View) -> Callable[[str], None]:
    return lambda line: view.event("notice", {"message": line})


def _summarize(args: argparse.Namespace, view: View, turns: int, report: TurnReport) -> None:
    files = {"output": args.output, "record": args.record}
    view.event("summary", {"turns": turns, **files, **asdict(report)})
    if not args.json and not sys.stdout.isatty():  # on a terminal the view has said it
        complain(f"client.py: {report.sentence()}")


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


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="client.py",
        description="Stream speech to a continuation server, and play, save and time its continuation. With --input a "
        "file is streamed. Without, you talk into the microphone: Enter ends your turn, or interrupts the machine.",
        epilog="Without --url the client starts a server of its own, and ends it with itself. A server that asks for a "
        "token gets the one in the environment variable STREAMING_TOKEN. On a terminal you see a live view, otherwise "
        "JSON lines. The exit status is 0 only if a continuation came whole.",
    )
    parser.add_argument("--url", help="server, ws://HOST:PORT[/v1/continue] (default: start one)")
    parser.add_argument("--model", help="model of the own server: demo, a hub id or a directory (default: demo)")
    parser.add_argument("--codec", help="codec of the own server (default: that of the demo, or kyutai/mimi)")
    parser.add_argument("--input", metavar="WAV", help="audio file to stream; any rate, channels and common format")
    parser.add_argument("--output", metavar="WAV", help="where to write the continuation alone, 24 kHz mono")
    parser.add_argument(
        "--record", metavar="WAV", help="where to write both sides: left what was sent, right what came"
    )
    parser.add_argument(
        "--max-seconds",
        type=_number(float, 0, 3600, above=True),
        default=20.0,
        metavar="S",
        help="longest continuation (default: 20)",
    )
    parser.add_argument(
        "--temperature", type=_number(float, 0, 10), metavar="T", help="0 is greedy (default: the model's, 0.8)"
    )
    parser.add_argument(
        "--top-k", type=_number(int, 0, 2**31 - 1), metavar="K", help="0 is off (default: the model's, 30)"
    )
    parser.add_argument(
        "--top-p", type=_number(float, 0, 1, above=True), metavar="P", help="1 is off (default: the model's)"
    )
    parser.add_argument(
        "--seed",
        type=_number(int, 0, 2**63 - 1),
        metavar="N",
        help="the same seed and speech give the same continuation",
    )
    parser.add_argument(
        "--turn", choices=("manual", "vad"), default="manual", help="who says that you are done (default: manual)"
    )
    parser.add_argument(
        "--pace",
        choices=("realtime", "fast"),
        default="realtime",
        help="how fast --input is sent and answered (default: realtime)",
    )
    parser.add_argument(
        "--push-to-talk",
        action="store_true",
        help="be heard only while Space is held, or from Space to Space where the terminal does not tell of releases",
    )
    parser.add_argument(
        "--echo-cancellation",
        action="store_true",
        help="take the loudspeaker out of the microphone; needs `pip install livekit`",
    )
    parser.add_argument(
        "--transport",
        choices=("auto", "pcm", "opus"),
        default="auto",
        help="how audio travels: pcm takes 384 kbit/s, opus 30 (`pip install opuslib-next-bundled`); auto is opus to "
        "other machines, where both sides have it (default: auto)",
    )
    parser.add_argument("--list-devices", action="store_true", help="list sound devices and quit")
    parser.add_argument("--input-device", metavar="X", help="microphone: number or part of a name")
    parser.add_argument("--output-device", metavar="X", help="loudspeaker: number or part of a name")
    parser.add_argument("--json", action="store_true", help="print JSON lines on a terminal, too")
    args = parser.parse_args(arguments)
    for name in ("url", "model", "codec", "input", "output", "record", "input_device", "output_device"):
        if getattr(args, name) is not None and not getattr(args, name).strip():
            parser.error(f"--{name.replace('_', '-')} is empty")
    if args.url is not None and (args.model is not None or args.codec is not None):
        parser.error("--model and --codec are for the own server; the one at --url has its own already")
    for name in ("input_device", "output_device", "push_to_talk", "echo_cancellation"):
        if args.input is not None and getattr(args, name):
            parser.error(f"--input streams a file; --{name.replace('_', '-')} is for the microphone mode")
    if args.push_to_talk and args.turn == "vad":
        parser.error(
            "--push-to-talk and --turn vad exclude each other: a key or your voice says when you talk; choose one"
        )
    if args.pace == "fast" and args.input is None:
        parser.error("--pace fast needs --input: a microphone is always in real time")
    if args.pace == "fast" and args.turn == "vad":
        parser.error("--turn vad needs --pace realtime, since it hears silence in real time")
    files = [name for name in ("input", "output", "record") if getattr(args, name)]
    for one, other in itertools.combinations(files, 2):
        if Path(getattr(args, one)).resolve() == Path(getattr(args, other)).resolve():
            parser.error(f"--{one} and --{other} name the same file")
    if args.transport == "opus" and not opus_available():
        parser.error("--transport opus needs the Python package: `pip install opuslib-next-bundled`")
    args.model = args.model or "demo"
    return args


def _number(kind: Callable[[str], float], low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    """Return an argparse type: a finite number from `low` (or above it) to `high`."""

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
