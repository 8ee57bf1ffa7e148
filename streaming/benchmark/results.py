"""Every measurement that this machine can take, and its GPU's tests, into one file: docs/results/DEVICE.json.

Each is a command of its own, one after another; the file is written after each, so that a run that is cut off leaves
what it has, and `--only` takes some of them anew. A machine that lacks the clients' packages skips what needs them,
and the file says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from streaming.benchmark import machine
from streaming.benchmark.report import Report
from streaming.command import OutputError, check_result
from streaming.errors import StreamingError
from streaming.loading import pick_device
from streaming.options import positive

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "transformers", "triton", "moshi", "websockets", "numpy")
_TAIL = 2000  # characters of what a failed run said


@dataclass(frozen=True)
class Run:
    """arguments: after `python -m`; of a measurement, `--json FILE` is added. needs: modules that it imports."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def is_test(self) -> bool:
        return self.arguments[0] == "pytest"


def _benchmark(name: str, *arguments: str, needs: tuple[str, ...] = ()) -> Run:
    return Run(name, ("streaming.benchmark", *arguments), needs)


_LIVE = ("websockets", "soundfile", "msgspec", "rich")
_WEIGHTS: dict[str, tuple[str, ...]] = {
    "bfloat16": (),
    "int8": ("--quantize", "int8"),
    "int4": ("--quantize", "int4"),
}
CPU_RUNS = (
    _benchmark("step demo", "step", "--model", "demo"),
    _benchmark("step mimi", "step", "--random", "mimi", "--slots", "1"),
    *(
        _benchmark(f"step 1.3b {kind}", "step", "--random", "1.3b", "--slots", "1", *flags)
        for kind, flags in _WEIGHTS.items()
    ),
    _benchmark("baseline mimi", "baseline", "--random", "mimi"),
    *(
        _benchmark(f"baseline 1.3b {kind}", "baseline", "--random", "1.3b", "--seconds", "60", *flags)
        for kind, flags in _WEIGHTS.items()
    ),
    _benchmark("latency demo", "latency", "--model", "demo", "--sessions", "1", "4", needs=_LIVE),
    _benchmark("capacity demo", "capacity", "--model", "demo", "--seconds", "30", needs=_LIVE),
)
CUDA_RUNS = (
    Run("tests", ("pytest", "-q", "-m", "gpu", "tests"), ("pytest",)),
    _benchmark("step demo", "step", "--model", "demo", "--slots", "1", "64"),
    _benchmark("step 1.3b", "step", "--random", "1.3b", "--slots", "1", "16", "64", "256"),
    _benchmark("step 1.3b int8", "step", "--random", "1.3b", "--slots", "1", "64", "--quantize", "int8"),
    _benchmark("step 8b", "step", "--random", "8b", "--slots", "1", "64"),
    _benchmark("baseline 1.3b", "baseline", "--random", "1.3b"),
    _benchmark(
        "latency 1.3b",
        *("latency", "--model", "random:1.3b", "--sessions", "1", "16", "64", "--max-sessions", "64"),
        needs=_LIVE,
    ),
    _benchmark(
        "capacity 1.3b",
        *("capacity", "--model", "random:1.3b", "--max-sessions", "512", "--seconds", "20", "--tries", "1"),
        needs=_LIVE,
    ),
    _benchmark(
        "capacity 8b",
        *("capacity", "--model", "random:8b", "--max-sessions", "128", "--seconds", "20", "--tries", "1"),
        needs=_LIVE,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="runs whose names begin so")
    parser.add_argument("--list", action="store_true", help="the runs, without running them")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "results", metavar="DIR")
    parser.add_argument("--timeout", type=positive, default=600.0, metavar="S", help="of each run")


def measure(options: argparse.Namespace) -> Report:
    """`results`: see the module. Raises `StreamingError` for a device that is not there, or a name that no run has."""
    device = pick_device(options.device)
    runs = CUDA_RUNS if device.type == "cuda" else CPU_RUNS
    chosen = [run for run in runs if not options.only or run.name.startswith(tuple(options.only))]
    if not chosen:
        raise StreamingError(f"no run is named so; there are {', '.join(run.name for run in runs)}")
    path: Path = options.folder / f"{_slug(device)}.json"
    rows: list[dict[str, str | int | float]] = []
    if not options.list:
        _check_place(path)
    for run in chosen:
        if options.list:
            rows.append({"run": run.name, "command": " ".join(("python", "-m", *run.arguments))})
            continue
        record = take(run, options.timeout)
        keep(path, device, run.name, record)
        rows.append({"run": run.name, "outcome": record["outcome"], "seconds": record["seconds"]})
        print(f"{run.name}: {record['outcome']}, {record['seconds']:.0f} s", file=sys.stderr, flush=True)
    return Report(f"results of {machine.name_of(device)}", {"file": str(path)}, rows)


def _check_place(path: Path) -> None:
    """Raise `OutputError` where results could not be kept, before hours are spent on them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--folder {path.parent} cannot be made: {error.strerror or error}") from None
    check_result("--folder", path)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is damaged ({error}); move it away") from None
    if not isinstance(found, dict) or not isinstance(found.get("runs"), dict):
        raise OutputError(f"{path} is no file of results; move it away")


def take(run: Run, timeout_s: float) -> dict[str, Any]:
    """Return what came of a run: its command, how long it took, and its report, or why there is none."""
    record: dict[str, Any] = {
        "command": ["python", "-m", *run.arguments],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "seconds": 0.0,
    }
    missing = [name for name in run.needs if importlib.util.find_spec(name) is None]
    if missing:
        return record | {"outcome": f"skipped: {', '.join(missing)} not installed"}
    with tempfile.TemporaryDirectory(prefix="results-") as folder:
        report = Path(folder) / "report.json"
        flags = [] if run.is_test else ["--json", str(report)]
        started = time.monotonic()
        status, output = _run([sys.executable, "-m", *run.arguments, *flags], timeout_s)
        record["seconds"] = round(time.monotonic() - started, 1)
        said = output[-_TAIL:]
        if status is None:
            return record | {"outcome": f"stopped after {timeout_s:g} s", "said": said}
        if status:
            return record | {"outcome": f"failed with status {status}", "said": said}
        if run.is_test:
            return record | {"outcome": "ok", "said": said.strip().splitlines()[-1:]}
        return record | {"outcome": "ok", "report": json.loads(report.read_text(encoding="utf-8"))}


def _run(command: list[str], timeout_s: float) -> tuple[int | None, str]:
    """Its status, None if it had to be stopped, and what it said. Whatever it started ends with it."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def keep(path: Path, device: torch.device, name: str, record: dict[str, Any]) -> None:
    """Into the file, beside the other runs'."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    found |= {"device": machine.name_of(device), "machine": _machine()}
    found["runs"][name] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _machine() -> dict[str, Any]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cores": os.cpu_count(),
        "cpu": machine.processor(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _slug(device: torch.device) -> str:
    """Return a file's name: the GPU's, or how many cores of what."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu {os.cpu_count()} cores {machine.processor()}"
    )
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower()))


def _commit() -> str:
    command: Sequence[str] = ("git", "describe", "--always", "--dirty")
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
