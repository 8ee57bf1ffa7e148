"""Measure what a machine can do at most, in the same run as what it does: reading memory, multiplying matrices."""

from __future__ import annotations

import platform
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from streaming.models.huge_pages import on_huge_pages
from streaming.models.operations.native.library import library

_READ_BYTES = {"cpu": 2**29, "cuda": 2**32}
_SIDE = {"cpu": 1024, "cuda": 8192}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long this takes once."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return the work as a CUDA graph, so that the device is timed and not the host; on a CPU the work itself."""
    if device.type != "cuda":
        return work
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()  # what the work reads may still be written, on another stream
        with torch.cuda.stream(stream):
            work()
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
        torch.cuda.synchronize()
    return graph.replay


def block_to_read(device: torch.device) -> torch.Tensor:
    """Return a block that no cache holds: bytes read per second are its size by the time of its `sum`. It lies as
    weights do.
    """
    block = torch.ones(_READ_BYTES[device.type] // 4, device=device)
    return on_huge_pages(block) if device.type == "cpu" else block


def matrix_rate(device: torch.device, dtype: torch.dtype, tries: int = 7) -> float:
    """Return the operations per second of a large matrix product, the best of several; two for each product and sum. A
    CPU multiplies in float32 whatever its weights are kept in.
    """
    side = _SIDE[device.type]
    if device.type == "cpu":
        dtype = torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = min(milliseconds(lambda: left @ right, device) for _ in range(tries))
    return 2 * side**3 / best * 1e3


def interleaved(
    stages: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Return the milliseconds of each stage, run in turn again and again: other work of the machine slows all alike."""
    taken: dict[str, list[float]] = {name: [] for name in stages}
    for work in stages.values():
        work()  # the first run also prepares, and is not timed
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, taken.values())) < 3:
        for name, work in stages.items():
            taken[name].append(milliseconds(work, device))
    return taken


def median(times: list[float]) -> float:
    return statistics.median(times)


def name_of(device: torch.device) -> str:
    """Return a table's head: a GPU, or how many threads of which processor, and what it multiplies with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    native = library()
    instructions = native.native_instructions().decode() if native is not None else "no native operations"
    return f"{torch.get_num_threads()} threads of {processor()}, {instructions}"


def processor() -> str:
    """Return the processor's name and, since a name alone (`AMD EPYC`) may stand for several generations, its family
    and model; where the system tells them.
    """
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    told = [re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")]
    name, family, model = (found[1] if found else None for found in told)
    if name is None:
        return platform.processor() or platform.machine()
    return name if family is None or model is None else f"{name} (family {family}, model {model})"
