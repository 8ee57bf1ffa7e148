"""Measure how much of its device's memory a server of so many sessions takes, and how long its graphs take."""

from __future__ import annotations

import argparse
import time

import torch

from streaming.benchmark import models
from streaming.benchmark.report import Report
from streaming.device_step import slot_bytes
from streaming.frame_step import FrameStep
from streaming.loading import REWIND_FRAMES, check_memory, frames_of_context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser, 256)


def measure(options: argparse.Namespace) -> Report:
    """`room`: see the module. Raises as loading does."""
    loaded = models.load(options)
    codec, decoder, device = loaded.codec, loaded.decoder, loaded.codec.device
    frames = frames_of_context(decoder, options.context_tokens)
    rows: list[dict[str, str | int | float | None]] = []
    for slots in options.slots:
        check_memory(codec, decoder, slots, options.context_tokens)
        weights = _taken(device)
        step = FrameStep(codec, decoder, slots, frames, REWIND_FRAMES)
        state, started = _taken(device), time.perf_counter()
        step.warm_up()
        seconds = time.perf_counter() - started
        rows.append(
            {
                "slots": slots,
                "weights GB": _gb(weights),
                "sessions GB": _gb(state - weights),
                "predicted GB": _gb(slots * slot_bytes(codec, decoder, options.context_tokens, REWIND_FRAMES)),
                "graphs": len(step.buckets()),
                "graphs GB": _gb(_taken(device) - state),
                "seconds to capture": seconds,
            }
        )
        del step
    return Report("the memory of a server", loaded.facts(), rows)


def _taken(device: torch.device) -> int:
    """Return the bytes that this process holds on a GPU, its pools included; on a CPU they are not told apart: 0."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _gb(count: int) -> float:
    return count / 1e9
