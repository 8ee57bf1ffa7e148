"""A quarter of an hour with a GPU, in one command: `python -m streaming.benchmark device --minutes 9 --out DIR`.

What has to be known first comes first: whether both models get their kernels, and whether these say what plain PyTorch
says. If one kernel alone is to blame, everything is measured without it; otherwise it stops there. Everything else
follows in the order of its worth, each a process of its own with a limit of its own, and every result is in
`DIR/device-SIZE.json` as soon as it is there; what the processes said is in `DIR/device-SIZE.log`. All of them end with
this one, whatever ends it.

It needs torch, Triton, transformers and numpy; `--wheels` names a folder of wheels of what else the live measurements
import, where nothing can be downloaded. Without a GPU everything runs in tiny sizes, so that a mistake in this very
command shows before a GPU is paid for.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streaming.benchmark.processes import GPU_TESTS, LIVE, Run, check_place, keep, machine_facts, take
from streaming.benchmark.report import Report, Value
from streaming.command import OutputError
from streaming.errors import StreamingError
from streaming.models.operations.triton import WITHOUT
from streaming.options import positive

SIZES = ("1.3b", "8b", "tiny")
_LEAST_S = 5.0
"""An item for which less is left is not begun."""
_RESERVE_S = 2.0
"""The time that is kept for writing the results."""
_WHEELS_S = 60.0
_ANSWER_S = 120.0
"""How long the device may take to answer: torch is read from a cold disk first."""
_BLAMED = re.compile(rf"{WITHOUT}=([a-z_,]+)")
"""The words of a process that names the kernels to leave out."""
_LEVEL_S = (6.0, 30.0)
"""The seconds of speech at each load of `latency`: as many as the time allows."""


@dataclass(frozen=True)
class Item:
    """One measurement. arguments: by the seconds that are left for it. limit_s: the most it may take. decides: whether
    nothing after it is run if it fails.
    """

    name: str
    arguments: Callable[[float], tuple[str, ...]]
    limit_s: float
    needs: tuple[str, ...] = ()
    decides: bool = False


def _benchmark(name: str, limit_s: float, *arguments: str, decides: bool = False) -> Item:
    return Item(name, lambda _: ("streaming.benchmark", *arguments), limit_s, decides=decides)


def _tests(limit_s: float) -> Item:
    each = f"--timeout={limit_s:g}"
    return Item(
        "tests", lambda _: ("pytest", "-q", "-m", "gpu", "--maxfail=20", each, *GPU_TESTS), limit_s, ("pytest",)
    )


def _latency(model: str, loads: Sequence[int], limit_s: float) -> Item:
    """Loads one after another on one server, as long each as the limit allows."""

    def arguments(left_s: float) -> tuple[str, ...]:
        least, most = _LEVEL_S
        each = min(most, max(least, (min(left_s, limit_s) - 50.0) / len(loads) - 8.0))
        return (
            *("streaming.benchmark", "latency", "--model", f"random:{model}", "--seconds", f"{each:.0f}"),
            *("--sessions", *map(str, loads), "--max-sessions", str(max(loads))),
        )

    return Item("latency", arguments, limit_s, LIVE)


def _sweep(model: str, limit_s: float) -> Item:
    """Trials begin in the first half of the time; the other half is for the weights and the last trial's compile."""

    def arguments(left_s: float) -> tuple[str, ...]:
        return ("streaming.benchmark", "sweep", "--random", model, "--seconds", f"{min(left_s, limit_s) / 2:g}")

    return Item("sweep", arguments, limit_s)


def plan(size: str) -> tuple[Item, ...]:
    """Return what is measured, in order."""
    weights = ("--random", size)
    if size == "tiny":
        return (
            _benchmark("versions", 60.0, "versions"),
            _benchmark("smoke", 60.0, "smoke", *weights, decides=True),
            _tests(60.0),
            _benchmark("step 1 3", 60.0, "step", *weights, "--slots", "1", "3", "--seconds", "0.5"),
            _benchmark("profile", 60.0, "profile", *weights, "--slots", "1", "3", "--top", "8"),
            _sweep(size, 60.0),
            _latency(size, (1, 2), 120.0),
            _benchmark("room", 60.0, "room", *weights, "--slots", "3"),
        )
    if size == "8b":
        return (
            _benchmark("versions", 25.0, "versions"),
            _benchmark("smoke", 75.0, "smoke", *weights, decides=True),
            _benchmark("step 1 64", 60.0, "step", *weights, "--slots", "1", "64", "--seconds", "5"),
            _benchmark("profile", 30.0, "profile", *weights, "--slots", "1"),
            _latency(size, (1, 16), 100.0),
        )
    return (
        _benchmark("versions", 25.0, "versions"),
        _benchmark("smoke", 75.0, "smoke", *weights, decides=True),
        _tests(90.0),
        _benchmark("step 1 256", 50.0, "step", *weights, "--slots", "1", "256", "--seconds", "5"),
        _benchmark("step 64 16", 40.0, "step", *weights, "--slots", "64", "16", "--seconds", "4"),
        _benchmark("profile", 40.0, "profile", *weights, "--slots", "1", "256"),
        _sweep(size, 45.0),
        _latency(size, (1, 16, 64, 256), 185.0),
        _benchmark("room", 30.0, "room", *weights, "--slots", "256"),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes", type=positive, default=9.0, metavar="M", help="How long all of it may take (default: 9)."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="Where the results are written.")
    parser.add_argument(
        "--size", choices=SIZES, help="The size of the random weights (default: 1.3b; without a GPU tiny)."
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="Wheels of packages that this machine lacks.")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="Only the items whose names begin so.")
    parser.add_argument("--list", action="store_true", help="List the items, without running them.")


def measure(options: argparse.Namespace) -> Report:
    """`device`: see the module. Raises `OutputError` if the results cannot be kept, `StreamingError` for a name that no
    item has, or wheels that cannot be installed.
    """
    until = time.monotonic() + 60.0 * options.minutes - _RESERVE_S
    size = options.size or ("1.3b" if _has_gpu() else "tiny")
    items = [item for item in plan(size) if not options.only or item.name.startswith(tuple(options.only))]
    if not items:
        raise StreamingError(f"no item is named so; there are {', '.join(item.name for item in plan(size))}")
    if options.list:
        rows: list[dict[str, Value]] = [
            {"item": item.name, "limit_s": item.limit_s, "command": " ".join(item.arguments(item.limit_s))}
            for item in items
        ]
        return Report(f"what is measured of {size}", {"seconds at most": sum(item.limit_s for item in items)}, rows)
    path = options.out / f"device-{size}.json"
    check_place(path, "--out")
    with tempfile.TemporaryDirectory(prefix="device-") as site:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if options.wheels is not None:
            _install(options.wheels, Path(site))
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
        rows = _measure(items, path, until, environment)
    return Report(f"{size}: what was measured", {"results": str(path)}, rows)


def _measure(items: Sequence[Item], path: Path, until: float, environment: Mapping[str, str]) -> list[dict[str, Value]]:
    """Run the items until the time is over. Each one's record is in the file when the next begins."""
    rows: list[dict[str, Value]] = []
    stopped, waiting = "", deque(items)
    while waiting:
        item = waiting.popleft()
        left_s = until - time.monotonic()
        record: dict[str, Any]
        if stopped or left_s < _LEAST_S:
            record = {"outcome": f"skipped: {stopped or 'no time was left'}", "seconds": 0.0}
        else:
            run = Run(item.name, item.arguments(left_s), item.needs)
            record = take(run, min(item.limit_s, left_s), path.with_suffix(".log"), environment)
        keep(path, {"machine": machine_facts()}, item.name, record)
        rows.append({"item": item.name, "outcome": record["outcome"], "seconds": record["seconds"]})
        print(f"{item.name}: {record['outcome']}, {record['seconds']:.0f} s", file=sys.stderr, flush=True)
        if item.decides and not stopped and record["outcome"] != "ok":
            print(record.get("said", ""), file=sys.stderr, flush=True)
            blamed = _BLAMED.findall(record.get("said", ""))[-1:]
            if blamed and blamed[0] != environment.get(WITHOUT):
                environment = {**environment, WITHOUT: blamed[0]}
                waiting.appendleft(replace(item, name=f"{item.name.split()[0]} without {blamed[0]}"))
            else:
                stopped = f"{item.name} {record['outcome']}"
    return rows


def _has_gpu() -> bool:
    """Return whether there is a GPU, asked in a process of its own: a driver that hangs must not stop this one."""
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    try:
        return subprocess.run([sys.executable, "-c", program], timeout=_ANSWER_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        raise StreamingError(
            f"the device does not answer: torch.cuda.is_available() took more than {_ANSWER_S:g} s"
        ) from None


def _install(wheels: Path, site: Path) -> None:
    """Unpack the wheels into a folder of their own, which the measurements import from. Raises `StreamingError`."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise OutputError(f"--wheels {wheels}: there are no wheels in it")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target")
    try:
        done = subprocess.run([*pip, site, *found], capture_output=True, text=True, timeout=_WHEELS_S, check=False)
    except subprocess.TimeoutExpired:
        raise StreamingError(f"--wheels {wheels}: pip took more than {_WHEELS_S:g} s") from None
    if done.returncode:
        raise StreamingError(f"--wheels {wheels}: {done.stderr.strip()}")
