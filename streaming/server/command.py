"""The server's command: its flags, and what they must be to each other. Nothing that takes time is imported before they
are read, so that `--help` and a wrong flag are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping

from streaming.config import CONTEXT_TOKENS, DEMO, DTYPES
from streaming.options import OptionParser, count_or_auto

PROGRAM = "server.py"
"""What the command is called where nobody says otherwise."""
_DESCRIPTION = "The server: speech in, its continuation out, over WebSockets."
_OTHER_VARIABLES = (
    "STREAMING_TOKENS",
    "STREAMING_TOKEN",  # of clients
    "STREAMING_METRICS_TOKEN",  # of benchmarks
    "STREAMING_NATIVE",
    "STREAMING_DEMO_ROOT",  # of the recipe
    "STREAMING_LONG_SESSION_MINUTES",  # of a test
)
"""In the environment, and of no flag."""
_LEAST_THREADS_LIMIT = 64
"""So many threads can be had everywhere, though more than cores only wait for each other."""


def parse(
    arguments: list[str] | None = None, environment: Mapping[str, str] = os.environ, program: str = PROGRAM
) -> argparse.Namespace:
    """Return the options. Ends the process with a sentence and status 2 where they make no sense."""
    # STREAMING_TOKENS are the tokens themselves, which no flag may hold
    parser = OptionParser(program, _DESCRIPTION, {"tokens": "STREAMING_TOKENS_FILE"}, _OTHER_VARIABLES)
    parser.add_argument(
        "--model",
        default=DEMO,
        metavar="demo|HUB_ID|DIR",
        help="Llama-Mimi checkpoint (default: demo); random:1.3b and random:8b have random weights",
    )
    parser.add_argument("--codec", metavar="HUB_ID|DIR", help="Mimi checkpoint (default: kyutai/mimi, or the demo's)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8765, help="port; 0 takes any free one (default: 8765)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:N] (default: auto)")
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPES), default="auto", help="what the decoder computes in (default: auto)"
    )
    parser.add_argument(
        "--quantize", choices=("none", "int8", "int4"), default="none", help="how its weights are kept (default: none)"
    )
    parser.add_argument(
        "--codec-dtype", choices=DTYPES, default="float32", help="of the codec; bfloat16 changes some codes"
    )
    parser.add_argument(
        "--codec-window",
        type=int,
        metavar="STEPS",
        help="how many steps of 40 ms the codec looks back (default: as its config says, 250)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="threads for a CPU's work (default: all cores but one)"
    )
    parser.add_argument(
        "--max-sessions",
        type=count_or_auto,
        default="auto",
        metavar="N",
        help="sessions at once (default: auto, as many as the memory holds and the machine keeps up with)",
    )
    parser.add_argument(
        "--context-tokens",
        type=int,
        default=CONTEXT_TOKENS,
        metavar="N",
        help=f"what a session remembers (default: {CONTEXT_TOKENS}, what the released models were trained on)",
    )
    parser.add_argument(
        "--memory-share",
        type=float,
        default=1.0,
        metavar="F",
        help="of the device's memory, at most so much, for several servers on one GPU (default: 1)",
    )
    parser.add_argument("--queue", type=int, default=0, metavar="N", help="clients that may wait in line (default: 0)")
    parser.add_argument(
        "--resume-seconds",
        type=float,
        default=30,
        metavar="S",
        help="how long to keep a session whose connection broke, 0: not at all (default: 30)",
    )
    parser.add_argument(
        "--idle-seconds",
        type=float,
        default=300,
        metavar="S",
        help="end sessions that do nothing for so long (default: 300)",
    )
    parser.add_argument(
        "--takes",
        type=int,
        default=2,
        metavar="N",
        help="of how many of its latest turns a session can make another take (default: 2; 0: of none)",
    )
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=30,
        metavar="S",
        help="how long running turns may take at the end (default: 30)",
    )
    parser.add_argument("--tokens", metavar="FILE", help="who may come in, name:token a line (or STREAMING_TOKENS)")
    parser.add_argument("--allow-origin", action="append", default=[], metavar="URL", help="a page that may connect")
    parser.add_argument(
        "--trusted-proxy",
        action="append",
        default=[],
        metavar="NETWORK",
        help="proxies whose X-Forwarded-For is believed, so that their clients are counted one by one",
    )
    parser.add_argument("--tls-cert", metavar="FILE", help="certificate chain, PEM")
    parser.add_argument("--tls-key", metavar="FILE", help="its key, PEM")
    parser.add_argument(
        "--insecure-plaintext", action="store_true", help="allow to listen beyond this machine without TLS"
    )
    parser.add_argument(
        "--sessions-per-token", type=int, default=32, metavar="N", help="sessions at once (default: 32)"
    )
    parser.add_argument(
        "--sessions-per-address",
        type=int,
        default=8,
        metavar="N",
        help="sessions at once; loopback is not limited (default: 8)",
    )
    parser.add_argument(
        "--until-eof", action="store_true", help="end when standard input ends, for programs that start a server"
    )
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="one event a line (default: text)"
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="the least that is logged (default: info)",
    )
    options = parser.parse(arguments, environment)
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
    return options


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run the server with these command line arguments; return the exit status."""
    options = parse(arguments, program=program)
    from streaming.server.start import run  # with all that a server is made of

    return run(options, program)
