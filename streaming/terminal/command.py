"""The client's command: its flags, and what they must be to each other. Nothing that takes time is imported before they
are read, so that `--help` and a wrong flag are answered at once.

Exit status: 0 if a continuation came whole, 1 if not, 2 for wrong flags, 130 after Ctrl-C, 143 after
SIGTERM.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

PROGRAM = "client.py"
"""What the command is called where nobody says otherwise."""


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the client with these command line arguments, and return the exit status."""
    options = parse(arguments, program)
    from streaming.terminal.start import run  # with all that a conversation takes

    return run(options, program)


def parse(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> argparse.Namespace:
    """Return the options. Ends the process with a sentence and status 2 where they make no sense."""
    parser = argparse.ArgumentParser(
        prog=program,
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
    if args.transport == "opus":
        from streaming.protocol.opus import opus_available  # brings numpy

        if not opus_available():
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
