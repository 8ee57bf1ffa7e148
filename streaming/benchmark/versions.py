"""List what a machine has: its device, its driver, the packages that matter here."""

from __future__ import annotations

import argparse
import platform

import torch

from streaming.benchmark import machine
from streaming.benchmark.processes import version
from streaming.benchmark.report import Report
from streaming.loading import pick_device

_PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy"),
    *("websockets", "msgspec", "soundfile", "soxr", "prometheus-client", "rich", "pytest", "hypothesis"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="Where it runs: auto, cpu or cuda[:N] (default: auto).")


def measure(options: argparse.Namespace) -> Report:
    """`versions`: see the module. Raises `StreamingError` for a device that is not there."""
    device = pick_device(options.device)
    facts: dict[str, str | int | float] = {
        "device": machine.name_of(device),
        "kind": device.type,
        "python": platform.python_version(),
        "processor": machine.processor(),
        "cuda of torch": torch.version.cuda or "none",
    }
    if device.type == "cuda":
        told = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        facts |= {
            "compute capability": f"{told.major}.{told.minor}",
            "multiprocessors": told.multi_processor_count,
            "memory GB": total / 1e9,
            "free GB": free / 1e9,
        }
    rows = [{"package": name, "version": version(name)} for name in _PACKAGES]
    return Report("what there is", facts, rows)
