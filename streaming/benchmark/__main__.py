"""Run a measurement: `python -m streaming.benchmark NAME ... --json FILE`."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, cast

from streaming.command import (
    INTERRUPTED,
    OutputError,
    check_result,
    complain,
    end_on_signals,
    raise_on_interrupt,
    say,
    write_result,
)

if __name__ == "__main__":
    end_on_signals()

from streaming.benchmark import plot
from streaming.benchmark.report import Report
from streaming.errors import StreamingError

COMMANDS = {
    "step": "one frame step, its stages against what the machine allows",
    "baseline": "the same weights with transformers, moshi and here, turn by turn",
    "slide": "what a sliding context costs in likelihood, against a full re-prefill",
    "turns": "what the encoder should hear between two turns, by likelihood",
    "latency": "end of speech to first audible sample, and what goes wrong, at given loads",
    "capacity": "the most sessions with no underrun and steps under 80 ms",
    "fleet": "many servers behind a balancer, simulated with the step times of one",
    "churn": "how many sessions a second a server opens and closes, and what one costs",
    "device": "a quarter of an hour with a GPU: what has to be known first, each result as it comes",
    "versions": "what this machine is and has",
    "smoke": "whether the kernels run, and say what plain PyTorch says",
    "profile": "which kernels a step runs, and how long each takes",
    "sweep": "the kernels' constants, tried one against another",
    "room": "what a server of so many sessions takes of its device's memory",
    "results": "all of these that this machine can take, and its GPU's tests, into one file",
    "wire": "what a frame costs the server beside the step, against a bare WebSocket server",
    "soak": "hours of talk: memory, latency and step time at the end against the start",
}
"""Each is the module of that name. Only the one that is asked for is imported: who measures a server from afar needs no
torch.
"""


class Measurement(Protocol):
    """A module of this folder that measures something."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...
    def measure(self, options: argparse.Namespace) -> Report: ...


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m streaming.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    for name, help_text in COMMANDS.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        if arguments[:1] == [name]:
            module = cast(Measurement, importlib.import_module(f"streaming.benchmark.{name}"))
            command.set_defaults(measure=module.measure, plot=None, check=lambda *_: None)
            module.add_arguments(command)
            command.add_argument("--json", type=Path, metavar="FILE", help="Write the result to this file, too.")
            options = parser.parse_args(arguments)
            options.check(command, options)
            return options
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        raise_on_interrupt()
        check_result("--json", options.json)
        if options.plot is not None:
            plot.check(options.plot)
        _show(options.measure(options), options)
    except StreamingError as error:
        complain(f"benchmark: {error}")
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return INTERRUPTED
    return 0


def _show(report: Report, options: argparse.Namespace) -> None:
    """Write the results to all places that were asked for, even if some of them fail."""
    try:
        say(report.table())
    finally:
        try:
            if options.json is not None:
                write_result("--json", options.json, json.dumps(asdict(report), indent=2) + "\n")
        finally:
            if options.plot is not None:
                _draw(report, options.plot)


def _draw(report: Report, path: Path) -> None:
    try:
        plot.draw(report, path)
    except OSError as error:
        raise OutputError(f"cannot write --plot {path}: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
