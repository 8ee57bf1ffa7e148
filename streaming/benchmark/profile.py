"""Which kernels a step runs, and how long each takes: what a step's time is made of, and what stands between them."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

from torch.profiler import ProfilerActivity, profile

from streaming.benchmark import models
from streaming.benchmark.full import FullStep
from streaming.benchmark.report import Report
from streaming.loading import check_memory
from streaming.options import count

_STEPS = 5
_MOST_NAME = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser, 1, 256)
    parser.add_argument("--top", type=count, default=24, metavar="N", help="How many kernels are named.")


def measure(options: argparse.Namespace) -> Report:
    """`profile`: steps in which everybody speaks, contexts full. Raises as loading does."""
    loaded = models.load(options)
    check_memory(loaded.codec, loaded.decoder, max(options.slots), options.context_tokens)
    on_gpu = loaded.codec.device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    rows: list[dict[str, str | int | float]] = []
    for slots in options.slots:
        full = FullStep(loaded.codec, loaded.decoder, slots, options.context_tokens)
        for _ in range(3):
            full.speak()
        started = time.perf_counter()
        for _ in range(_STEPS):
            full.speak()
        wall_us = 1e6 * (time.perf_counter() - started) / _STEPS
        with profile(activities=[activity]) as seen:
            for _ in range(_STEPS):
                full.speak()
        totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for event in seen.events():
            if not on_gpu or event.device_type.name == "CUDA":
                totals[_short(event.name)][0] += 1 / _STEPS
                totals[_short(event.name)][1] += _own_us(event, on_gpu) / _STEPS
        launches, busy_us = (sum(part) for part in zip(*totals.values(), strict=True))
        rows.append(_row(slots, "a step by the clock, unprofiled", launches, wall_us, wall_us))
        rows.append(_row(slots, "all kernels" if on_gpu else "all operations", launches, busy_us, wall_us))
        largest = sorted(totals.items(), key=lambda item: -item[1][1])[: options.top]
        rows += [_row(slots, name, calls, us, wall_us) for name, (calls, us) in largest]
        del full  # frees its memory before the next one takes some
    return Report(f"what a step is made of, the mean of {_STEPS}", loaded.facts(), rows)


def _row(slots: int, name: str, calls: float, us: float, wall_us: float) -> dict[str, str | int | float]:
    return {"slots": slots, "kernel": name, "calls a step": calls, "us a step": us, "share of the step": us / wall_us}


def _own_us(event: Any, on_gpu: bool) -> float:
    return float(event.device_time_total if on_gpu else event.self_cpu_time_total)


def _short(name: str) -> str:
    return name if len(name) <= _MOST_NAME else name[: _MOST_NAME - 3] + "..."
