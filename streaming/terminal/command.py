"""The client's command: its flags, and which of them go together. Nothing that takes time is imported before they
are read, so that `--help` and a wrong flag are answered at once.

Exit status: 0 if a continuation came whole, 1 if not, 2 for wrong flags, 130 after Ctrl-C, 143 after
SIGTERM.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from streaming.command import STARTING, complain
from streaming.config import DEMO
from streaming.options import add_about, number, refuse_empty

PROGRAM = "client.py"
"""The command's name where nobody gives another."""
_DESCRIPTION = (
    "Speak, or stream a file, and hear it go on in the same voice. In the microphone mode Enter ends your turn, or "
    "interrupts the machine."
)
_EPILOG = (
    "Without --url the client starts a server, and ends it with itself. A server that asks for a token gets the one in "
    "the environment variable STREAMING_TOKEN. On a terminal you see a live view, and JSON lines everywhere else. The "
    "exit status is 0 only if a continuation came whole."
)


def main(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the client with these command line arguments, and return the exit status."""
    options = parse(arguments, program)
    if sys.stdout is not None and sys.stdout.isatty() and not (options.json or options.list_devices):
        print(STARTING, end="\r", flush=True)  # the next line is written over it
    try:
        from streaming.terminal.start import run  # imports all that a talk needs
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "streaming":
            raise
        complain(f"{program}: a Python package is missing: `pip install {error.name.partition('.')[0]}`")
        return 1
    return run(options, program)


def parse(arguments: Sequence[str] | None = None, program: str = PROGRAM) -> argparse.Namespace:
    """Return the options. Ends the process with a sentence and status 2 where they make no sense."""
    parser = argparse.ArgumentParser(
        prog=program, usage="%(prog)s [WAV] [flags]", description=_DESCRIPTION, epilog=_EPILOG, add_help=False
    )
    _add_speech(parser.add_argument_group("What is continued"))
    _add_continuation(parser.add_argument_group("The continuation"))
    _add_files(parser.add_argument_group("What is kept, and what is shown"))
    _add_server(parser.add_argument_group("The server"))
    _add_devices(parser.add_argument_group("Microphone and loudspeaker"))
    add_about(parser)
    options = parser.parse_args(arguments)
    refuse_empty(parser, options)
    if options.file is not None and options.input is not None:
        parser.error(f"{options.file} and --input name a file each; give one")
    options.input = options.input or options.file
    _check(parser, options)
    options.model = options.model or DEMO
    return options


def _add_speech(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "file", nargs="?", metavar="WAV", help="The speech to continue; without it you talk into the microphone."
    )
    group.add_argument(
        "--input", metavar="WAV", help="The same as WAV: an audio file of any rate, channels and common format."
    )
    group.add_argument(
        "--pace",
        choices=("realtime", "fast"),
        default="realtime",
        help="How fast a file is sent and answered (default: realtime).",
    )
    group.add_argument(
        "--turn",
        choices=("manual", "vad"),
        default="manual",
        help="Who says that you are done: Enter, or with vad a pause in your speech (default: manual).",
    )
    group.add_argument(
        "--push-to-talk",
        action="store_true",
        help="Be heard only while Space is held, or from Space to Space where the terminal does not tell of releases.",
    )


def _add_continuation(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-seconds",
        type=number(float, 0, 3600, above=True),
        default=20.0,
        metavar="S",
        help="How long it may be (default: 20).",
    )
    group.add_argument(
        "--temperature",
        type=number(float, 0, 10),
        metavar="T",
        help="How freely it is drawn; 0 takes the likeliest, and repeats itself exactly (default: the model's, 0.8).",
    )
    group.add_argument(
        "--top-k",
        type=number(int, 0, 2**31 - 1),
        metavar="K",
        help="From how many of the likeliest codes it is drawn; 0 is from all (default: the model's, 30).",
    )
    group.add_argument(
        "--top-p",
        type=number(float, 0, 1, above=True),
        metavar="P",
        help="From how much of the probability it is drawn; 1 is from all (default: the model's).",
    )
    group.add_argument(
        "--seed",
        type=number(int, 0, 2**63 - 1),
        metavar="N",
        help="The same seed and the same speech give the same continuation (default: drawn by the server).",
    )


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--output", metavar="WAV", help="Write the continuation alone, 24 kHz mono.")
    group.add_argument("--record", metavar="WAV", help="Write both sides, left what was sent, right what came.")
    group.add_argument(
        "--save", metavar="FILE", help="Keep the conversation as it is at the end, for --load; it holds your voice."
    )
    group.add_argument("--load", metavar="FILE", help="Go on with a conversation that --save has kept.")
    group.add_argument("--verbose", action="store_true", help="Show all figures, and what the sound system says.")
    group.add_argument("--json", action="store_true", help="Print JSON lines on a terminal, too.")


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--url",
        help="Talk to this server: its page's address, ws://HOST:PORT/v1/continue, or HOST:PORT (default: start one).",
    )
    group.add_argument(
        "--model",
        metavar="demo|HUB_ID|DIR",
        help="The model of a server that the client starts (default: demo).",
    )
    group.add_argument(
        "--codec",
        metavar="HUB_ID|DIR",
        help="The codec of a server that the client starts (default: kyutai/mimi, or the demo's).",
    )
    group.add_argument(
        "--transport",
        choices=("auto", "pcm", "opus"),
        default="auto",
        help="How audio travels: pcm takes 384 kbit/s, opus 30 (`pip install opuslib-next-bundled`); auto is opus to "
        "other machines, where both sides have it (default: auto).",
    )


def _add_devices(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--list-devices", action="store_true", help="List the sound devices, and end.")
    group.add_argument("--input-device", metavar="X", help="The microphone, by its number or a part of its name.")
    group.add_argument("--output-device", metavar="X", help="The loudspeaker, by its number or a part of its name.")
    group.add_argument(
        "--echo-cancellation",
        action="store_true",
        help="Take the loudspeaker's sound out of the microphone's (`pip install livekit`).",
    )


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Check the flags together."""
    if options.url is not None and (options.model is not None or options.codec is not None):
        parser.error(
            "--model and --codec are for a server of the client's own; the server at --url has its model already"
        )
    for name in ("input_device", "output_device", "push_to_talk", "echo_cancellation"):
        if options.input is not None and getattr(options, name):
            parser.error(f"{options.input} is a file, and --{name.replace('_', '-')} is for the microphone mode")
    if options.push_to_talk and options.turn == "vad":
        parser.error("--push-to-talk lets a key say when you talk, and --turn vad your voice: choose one")
    if options.pace == "fast" and options.input is None:
        parser.error("--pace fast needs a file (--input): a microphone is always in real time")
    if options.pace == "fast" and options.turn == "vad":
        parser.error("--turn vad needs --pace realtime, since it hears silence in real time")
    files = [name for name in ("input", "output", "record") if getattr(options, name)]
    for one, other in itertools.combinations(files, 2):
        if Path(getattr(options, one)).resolve() == Path(getattr(options, other)).resolve():
            parser.error(f"--{one} and --{other} name the same file")
    if options.transport == "opus":
        from streaming.protocol.opus import opus_available  # imports numpy

        if not opus_available():
            parser.error("--transport opus needs a Python package: `pip install opuslib-next-bundled`")
