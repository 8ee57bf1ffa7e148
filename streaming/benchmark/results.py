"""Every measurement that this machine can take, and its GPU's tests, into one file: docs/results/DEVICE.json.

Each is a command of its own, one after another; the file is written after each, so that a run that is cut off leaves
what it has, and `--only` takes some of them anew. A machine that lacks the clients' packages skips what needs them,
and the file says so.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch

from streaming.benchmark import machine
from streaming.benchmark.processes import GPU_TESTS, LIVE, ROOT, Run, check_place, keep, machine_facts, take
from streaming.benchmark.report import Report
from streaming.errors import StreamingError
from streaming.loading import pick_device
from streaming.options import positive


def _benchmark(name: str, *arguments: str, needs: tuple[str, ...] = ()) -> Run:
    return Run(name, ("streaming.benchmark", *arguments), needs)


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
    _benchmark("latency demo", "latency", "--model", "demo", "--sessions", "1", "4", needs=LIVE),
    _benchmark("capacity demo", "capacity", "--model", "demo", "--seconds", "30", needs=LIVE),
)
CUDA_RUNS = (
    Run("tests", ("pytest", "-q", "-m", "gpu", *GPU_TESTS), ("pytest",)),
    _benchmark("step demo", "step", "--model", "demo", "--slots", "1", "64"),
    _benchmark("step 1.3b", "step", "--random", "1.3b", "--slots", "1", "16", "64", "256"),
    _benchmark("step 1.3b int8", "step", "--random", "1.3b", "--slots", "1", "64", "--quantize", "int8"),
    _benchmark("step 8b", "step", "--random", "8b", "--slots", "1", "64"),
    _benchmark("baseline 1.3b", "baseline", "--random", "1.3b"),
    _benchmark(
        "latency 1.3b",
        *("latency", "--model", "random:1.3b", "--sessions", "1", "16", "64", "--max-sessions", "64"),
        needs=LIVE,
    ),
    _benchmark(
        "capacity 1.3b",
        *("capacity", "--model", "random:1.3b", "--max-sessions", "512", "--seconds", "20", "--tries", "1"),
        needs=LIVE,
    ),
    _benchmark(
        "capacity 8b",
        *("capacity", "--model", "random:8b", "--max-sessions", "128", "--seconds", "20", "--tries", "1"),
        needs=LIVE,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="Where it runs: auto, cpu or cuda[:N] (default: auto).")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[], help="Only the runs whose names begin so.")
    parser.add_argument("--list", action="store_true", help="List the runs, without running them.")
    parser.add_argument(
        "--folder",
        type=Path,
        default=_default_folder(),
        metavar="DIR",
        help="Where the file of results is (default: the repository's docs/results, or without one results).",
    )
    parser.add_argument("--timeout", type=positive, default=600.0, metavar="S", help="How long a run may take.")


def _default_folder() -> Path:
    """Return the repository's folder of results; beside an installed package there is none, so it is one here."""
    return ROOT / "docs" / "results" if (ROOT / "pyproject.toml").is_file() else Path("results")


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
        check_place(path, "--folder")
    for run in chosen:
        if options.list:
            rows.append({"run": run.name, "command": " ".join(("python", "-m", *run.arguments))})
            continue
        record = take(run, options.timeout)
        keep(path, _facts(device), run.name, record)
        rows.append({"run": run.name, "outcome": record["outcome"], "seconds": record["seconds"]})
        print(f"{run.name}: {record['outcome']}, {record['seconds']:.0f} s", file=sys.stderr, flush=True)
    return Report(f"results of {machine.name_of(device)}", {"file": str(path)}, rows)


def _facts(device: torch.device) -> dict[str, Any]:
    return {"device": machine.name_of(device), "machine": {"cpu": machine.processor(), **machine_facts()}}


def _slug(device: torch.device) -> str:
    """Return a file's name: the GPU's, or how many cores of what."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu {machine_facts()['cores']} cores {machine.processor()}"
    )
    return "-".join(re.findall(r"[a-z0-9.]+", name.lower()))
