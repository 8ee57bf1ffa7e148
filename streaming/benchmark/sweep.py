"""The constants of the kernels, tried one against another on the device at hand.

Each trial is one change to a constant of a kernel, in a pass of the decoder or a frame of the codec, captured as a
graph. A line is printed as each is measured, so that a sweep that is cut off leaves what it has.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal
from unittest.mock import patch

import torch

from streaming.audio import FRAME
from streaming.benchmark import machine, models
from streaming.benchmark.full import FullStep
from streaming.benchmark.models import StepModels
from streaming.benchmark.report import Report, Value
from streaming.errors import StreamingError
from streaming.models.operations.triton import NAME
from streaming.options import positive

_ROOM = "streaming.models.operations.triton."
_TIMED = 20


def _never(_: object) -> bool:
    return False


@dataclass(frozen=True)
class Trial:
    """work: a pass of one token, four draws, or a frame of the codec, out or in. constants: by `module.NAME`."""

    work: Literal["pass", "frame", "out", "in"]
    slots: int
    constants: Mapping[str, object] = field(default_factory=dict)

    @property
    def changes(self) -> str:
        told = (f"{name} {value}" for name, value in self.constants.items() if not callable(value))
        return ", ".join((*told, *(f"no {name}" for name, value in self.constants.items() if callable(value)))) or "-"


TRIALS = (
    Trial("pass", 1),
    Trial("pass", 1, {"operations.MATVEC_ROWS": 0}),
    Trial("pass", 1, {"matvec.follows_early": _never, "attention.follows_early": _never}),
    Trial("pass", 1, {"matvec.TILE": 8 * 1024}),
    Trial("pass", 1, {"matvec.WARPS": 8}),
    Trial("pass", 1, {"attention.PROGRAMS": 128}),
    Trial("pass", 1, {"attention.BLOCK": 32}),
    Trial("frame", 1),
    Trial("frame", 1, {"draw.WARPS": 8}),
    Trial("frame", 1, {"draw.WARPS": 32}),
    Trial("out", 64),
    Trial("out", 64, {"operations.LEAST_ROWS": 1024}),
    Trial("out", 64, {"windows.WARPS": 4}),
    Trial("out", 64, {"windows.BLOCK_IN": 64}),
    Trial("in", 64),
    Trial("in", 64, {"operations.LEAST_ROWS": 1024}),
    Trial("pass", 64),
    Trial("pass", 64, {"attention.BLOCK": 128}),
    Trial("pass", 64, {"attention.WARPS": 2}),
    Trial("pass", 4),
    Trial("pass", 4, {"operations.MATVEC_ROWS": 0}),
)
"""The variants, the most promising first: the time may not be enough for all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)
    parser.add_argument("--seconds", type=positive, default=40.0, metavar="S", help="After how long no trial is begun.")


def measure(options: argparse.Namespace) -> Report:
    """`sweep`: see the module. Where no kernels run, what runs instead is timed. Raises as loading does."""
    loaded = models.load(options)
    until = time.monotonic() + options.seconds
    kernels = all(each.operations.name.startswith(NAME) for each in (loaded.decoder, loaded.codec))
    rows: list[dict[str, Value]] = []
    for trial in TRIALS:
        if time.monotonic() > until or (trial.constants and not kernels):
            continue
        row: dict[str, Value] = {"work": trial.work, "slots": trial.slots, "change": trial.changes}
        try:
            row |= {"us": _time(trial, loaded, options.context_tokens), "failed": None}
        except (RuntimeError, StreamingError) as error:  # a tile that asks for more memory than there is
            row |= {"us": None, "failed": " ".join(str(error).split())[:200]}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return Report("the kernels' constants", loaded.facts(), rows)


def _time(trial: Trial, loaded: StepModels, context_tokens: int) -> float:
    """Return the median of its runs, in microseconds."""
    with ExitStack() as stack, torch.inference_mode():
        for name, value in trial.constants.items():
            module, _, constant = name.rpartition(".")
            stack.enter_context(patch.object(importlib.import_module(_ROOM + module), constant, value))
        device = loaded.codec.device
        run = machine.captured(_work(trial, loaded, context_tokens), device)
        run()
        return 1e3 * machine.median([machine.milliseconds(run, device) for _ in range(_TIMED)])


def _work(trial: Trial, loaded: StepModels, context_tokens: int) -> Callable[[], object]:
    codec, decoder, slots = loaded.codec, loaded.decoder, trial.slots
    if trial.work in ("out", "in"):
        state, active = codec.init_state(slots), torch.ones(slots, dtype=torch.bool, device=codec.device)
        codes = torch.zeros(slots, codec.num_codebooks, dtype=torch.int64, device=codec.device)
        pcm = 0.1 * torch.randn(slots, FRAME, device=codec.device)
        if trial.work == "out":
            return lambda: codec.decode(codes, state, active)
        return lambda: codec.encode(pcm, state, active)
    full = FullStep(codec, decoder, slots, context_tokens, graphs=False)
    return full.one_pass if trial.work == "pass" else full.one_frame
