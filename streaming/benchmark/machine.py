"""What a machine can do at most, measured in the same run as what it does: reading memory and multiplying matrices."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_READ_BYTES = {"cpu": 2**29, "cuda": 2**32}
_SIDE = {"cpu": 1024, "cuda": 8192}


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """How long this takes once."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return 1e3 * (time.perf_counter() - started)


def captured(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The work as a CUDA graph, so that what is timed is the device and not the host; on a CPU the work itself."""
    if device.type != "cuda":
        return work
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            work()
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            work()
    return graph.replay


def block_to_read(device: torch.device) -> torch.Tensor:
    """More than any cache holds: bytes read per second are its size by the time of its `sum`."""
    return torch.ones(_READ_BYTES[device.type] // 4, device=device)


def matrix_rate(device: torch.device, dtype: torch.dtype, tries: int = 7) -> float:
    """Operations per second of a large matrix product, the best of several; two for each product and sum."""
    side = _SIDE[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = min(milliseconds(lambda: left @ right, device) for _ in range(tries))
    return 2 * side**3 / best * 1e3


def interleaved(
    stages: dict[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of each stage, in turn, again and again: whatever else the machine does meets them all alike."""
    taken: dict[str, list[float]] = {name: [] for name in stages}
    for work in stages.values():
        work()  # the first time is another thing
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or min(map(len, taken.values())) < 3:
        for name, work in stages.items():
            taken[name].append(milliseconds(work, device))
    return taken


def median(times: list[float]) -> float:
    return statistics.median(times)


def name_of(device: torch.device) -> str:
    """For a table's head."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"
