"""The server's command: its flags, and which of them go together. Nothing that takes time is imported before they
are read, so that `--help` and a wrong flag are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

from streaming.command import STARTING, complain
from streaming.config import CONTEXT_TOKENS, DEMO, DTYPES
from streaming.options import OptionParser, add_about, count_or_auto

PROGRAM = "server.py"
"""The command's name where nobody gives another."""
_DESCRIPTION = "Serve continuations of speech: speech comes in over WebSockets, and goes on in the same voice."
_VARIABLES = {"tokens": "STREAMING_TOKENS_FILE", "session-key": "STREAMING_SESSION_KEY_FILE"}
"""The flags that name a file with secrets. The variable of the same name holds the secrets themselves."""
_OTHER_VARIABLES = (
    "STREAMING_TOKENS",
    "STREAMING_SESSION_KEY",
    "STREAMING_TOKEN",  # of clients
    "STREAMING_METRICS_TOKEN",  # of benchmarks
    "STREAMING_NATIVE",
    "STREAMING_WITHOUT_KERNELS",
    "STREAMING_DEMO_ROOT",  # of the recipe
    "STREAMING_LONG_SESSION_MINUTES",  # of a test
)
"""Variables that no flag stands for."""
_LEAST_THREADS_LIMIT = 64
"""So many threads may be asked for on any machine. More threads than cores only wait for each other."""


def parse(
    arguments: list[str] | None = None, environment: Mapping[str, str] = os.environ, program: str = PROGRAM
) -> argparse.Namespace:
    """Return the options. Ends the process with a sentence and status 2 where they make no sense."""
    parser = OptionParser(program, _DESCRIPTION, _VARIABLES, _OTHER_VARIABLES)
    _add_model(parser.add_argument_group("The model"))
    _add_sessions(parser.add_argument_group("Sessions"))
    _add_leaving(parser.add_argument_group("Sessions that leave the server"))
    _add_door(parser.add_argument_group("Where it listens, and to whom"))
    _add_process(parser.add_argument_group("The process"))
    add_about(parser)
    options = parser.parse(arguments, environment)
    _check(parser, options, environment)
    return options


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        default=DEMO,
        metavar="demo|HUB_ID|DIR",
        help="The Llama-Mimi checkpoint (default: demo); random:1.3b and random:8b have random weights.",
    )
    group.add_argument(
        "--codec", metavar="HUB_ID|DIR", help="The Mimi checkpoint (default: kyutai/mimi, or the demo's)."
    )
    group.add_argument(
        "--device", default="auto", help="Where it runs: auto, cpu or cuda[:N] (default: auto, CUDA if there is any)."
    )
    group.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="The type that the decoder computes in (default: auto).",
    )
    group.add_argument(
        "--quantize",
        choices=("auto", "none", "int8", "int4"),
        default="none",
        help="How the decoder's weights are kept; auto: with the least loss that is fast enough (default: none).",
    )
    group.add_argument(
        "--codec-dtype",
        choices=DTYPES,
        default="float32",
        help="How the codec's weights are kept (default: float32); with bfloat16 some codes differ.",
    )
    group.add_argument(
        "--codec-window",
        type=int,
        metavar="STEPS",
        help="How many steps of 40 ms the codec looks back (default: as its config says, 250).",
    )
    group.add_argument(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="How many threads share a CPU's work (default: 0, all cores but one).",
    )


def _add_sessions(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-sessions",
        type=count_or_auto,
        default="auto",
        metavar="auto|N",
        help="How many sessions run at once (default: auto, what the memory holds and the machine keeps up with).",
    )
    group.add_argument(
        "--context-tokens",
        type=int,
        default=CONTEXT_TOKENS,
        metavar="N",
        help=f"How many tokens a session remembers (default: {CONTEXT_TOKENS}, as the released models were trained).",
    )
    group.add_argument(
        "--memory-share",
        type=float,
        default=1.0,
        metavar="F",
        help="The largest share of the device's memory that it takes, for several servers on one GPU (default: 1).",
    )
    group.add_argument(
        "--queue", type=int, default=0, metavar="N", help="How many clients may wait in line (default: 0)."
    )
    group.add_argument(
        "--resume-seconds",
        type=float,
        default=30,
        metavar="S",
        help="How long a session is kept after its connection broke (default: 30; 0: it ends at once).",
    )
    group.add_argument(
        "--idle-seconds",
        type=float,
        default=300,
        metavar="S",
        help="How long a client may do nothing before its session ends (default: 300).",
    )
    group.add_argument(
        "--takes",
        type=int,
        default=4,
        metavar="N",
        help="For how many of its latest turns a session can make another take (default: 4; 0: for none).",
    )
    group.add_argument(
        "--drain-seconds",
        type=float,
        default=30,
        metavar="S",
        help="How long running turns may take when the server is told to stop (default: 30).",
    )
    group.add_argument(
        "--sessions-per-token",
        type=int,
        default=32,
        metavar="N",
        help="How many sessions a token may have at once (default: 32).",
    )
    group.add_argument(
        "--sessions-per-address",
        type=int,
        default=8,
        metavar="N",
        help="How many sessions an address may have at once; loopback has no limit (default: 8).",
    )


def _add_leaving(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--allow-save",
        action="store_true",
        help="Let clients keep their sessions, and come with them again; this takes a session key.",
    )
    group.add_argument(
        "--session-key",
        metavar="FILE",
        help="The secret that signs sessions which leave the server, 32 characters or more (or STREAMING_SESSION_KEY).",
    )
    group.add_argument(
        "--session-store",
        metavar="URL",
        help="Where sessions go when the server stops or their client is away, so that any server goes on with them: "
        "a folder, s3://…, memory:// and whatever fsspec knows.",
    )


def _add_door(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="The address to listen on (default: 127.0.0.1).")
    group.add_argument(
        "--port", type=int, default=8765, help="The port to listen on (default: 8765); 0 takes any that is free."
    )
    group.add_argument(
        "--tokens", metavar="FILE", help="Who may come in: a line name:token for each (or STREAMING_TOKENS)."
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="A page besides the server's own that may connect; may be given more than once.",
    )
    group.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="NETWORK",
        help="A proxy whose X-Forwarded-For is believed, so that its clients are counted one by one; may be given more "
        "than once.",
    )
    group.add_argument("--tls-cert", metavar="FILE", help="The certificate chain for wss://, in PEM form.")
    group.add_argument("--tls-key", metavar="FILE", help="The certificate's key, in PEM form.")
    group.add_argument(
        "--insecure-plaintext",
        action="store_true",
        help="Listen beyond this machine without TLS, where something else encrypts.",
    )


def _add_process(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--config", metavar="FILE", help="Take options from a TOML file; a flag or a variable comes first."
    )
    group.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="How events are logged, one a line (default: text).",
    )
    group.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="The least that is logged (default: info).",
    )
    group.add_argument(
        "--until-eof", action="store_true", help="End when standard input ends, for programs that start a server."
    )


def _check(parser: OptionParser, options: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Check the flags, alone and together."""
    if not 0 <= options.port <= 65535:
        parser.error(f"--port is {options.port}, must be from 0 to 65535")
    most_threads = max(os.cpu_count() or 1, _LEAST_THREADS_LIMIT)
    if not 0 <= options.threads <= most_threads:
        parser.error(f"--threads is {options.threads}, must be from 1 to {most_threads}, or 0 for all cores but one")
    if environment.get("STREAMING_NATIVE", "") not in ("", "0", "1"):
        parser.error("the environment variable STREAMING_NATIVE must be 0 or 1")
    if options.until_eof and sys.stdin is None:
        parser.error("--until-eof ends the server with standard input, which is closed already")
    if not 1 <= options.context_tokens < 2**40:
        parser.error(f"--context-tokens is {options.context_tokens}, must be at least 1 and below 2**40")
    if options.queue < 0 or not options.drain_seconds >= 0 or not 0 <= options.resume_seconds <= 3600:
        parser.error("--queue and --drain-seconds must be 0 or more, --resume-seconds from 0 to 3600")
    if options.takes < 0:
        parser.error("--takes must be 0 or more")
    if not options.idle_seconds > 0:
        parser.error("--idle-seconds must be above 0")
    if options.sessions_per_token < 1 or options.sessions_per_address < 1:
        parser.error("--sessions-per-token and --sessions-per-address must be at least 1")


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run the server with these command line arguments; return the exit status."""
    options = parse(arguments, program=program)
    if options.log_format == "text" and options.log_level in ("debug", "info"):
        complain(STARTING)
    from streaming.server.start import run  # imports all that a server is made of

    return run(options, program)
