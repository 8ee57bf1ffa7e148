"""`python -m streaming.benchmark slide|turns ... --json FILE`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from streaming.benchmark import slide, turns
from streaming.benchmark.report import Report
from streaming.errors import StreamingError
from streaming.loading import CONTEXT_TOKENS, DEMO

_PROMPT = Path(__file__).resolve().parents[2] / "examples" / "prompt.wav"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m streaming.benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measures: dict[str, tuple[str, Callable[[argparse.Namespace], Report]]] = {
        "slide": ("what a sliding context costs in likelihood, against a full re-prefill", slide.measure),
        "turns": ("what the encoder should hear between two turns, by likelihood", turns.measure),
    }
    for name, (help_text, measure) in measures.items():
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(measure=measure)
        command.add_argument("--model", default=DEMO, metavar="demo|HUB_ID|DIR")
        command.add_argument("--codec", metavar="HUB_ID|DIR")
        command.add_argument("--device", default="auto")
        command.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
        command.add_argument("--input", type=Path, default=_PROMPT, metavar="WAV", help="speech; repeated if too short")
        command.add_argument("--samples", type=int, default=64, metavar="N", help="how many places to measure at")
        command.add_argument("--json", type=Path, metavar="FILE")
        if name == "slide":
            command.add_argument("--context-tokens", type=int, default=CONTEXT_TOKENS, metavar="N")
        else:
            command.add_argument("--heard", choices=("codec", "original"), default="codec", help="the continuation")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        report: Report = options.measure(options)
    except StreamingError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    print(report.table())
    if options.json is not None:
        options.json.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
