"""Tell whether the kernels run and agree: the same frames by plain operations, kernels, and on a GPU captured graphs.

It fails, and says why, if either model did not get the kernels, or if they say something else than plain PyTorch; then
each kernel is left out in turn, to find the one that is wrong.
Whoever measures anything on a new machine asks this first: a fallback that nobody notices is measured for the kernels.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streaming.audio import FRAME
from streaming.benchmark import models
from streaming.benchmark.likelihood import losses
from streaming.benchmark.models import StepModels
from streaming.benchmark.report import Report
from streaming.config import Sampling
from streaming.errors import StreamingError
from streaming.frame_step import FrameStep
from streaming.models.llama import LlamaDecoder
from streaming.models.mimi import StreamingMimi
from streaming.models.operations.torch import TorchOperations
from streaming.models.operations.triton import KERNELS, NAME, WITHOUT

_CONTEXT_FRAMES = 64
_HEARD, _SPOKEN = 12, 12
_TIMED = 5
"""The last frames of each kind, which are timed: in the first ones kernels are compiled and chosen."""
_LEAST_SAME_CODES = 0.95
_MOST_PCM_ERROR = 1e-2
_MOST_NATS = 0.1
"""Means over codes, samples, tokens. In bfloat16 sums in another order turn a near-tie now and then; what is wrong is
off by far more.
"""


class SmokeError(StreamingError):
    """The kernels do not run, or do not agree: nothing that is measured after this would mean anything."""

    code = "smoke"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models.add_arguments(parser)


def measure(options: argparse.Namespace) -> Report:
    """`smoke`: see the module. Raises `SmokeError`, and as loading does."""
    loaded = models.load(options)
    codec, decoder = loaded.codec, loaded.decoder
    _require_kernels(loaded)
    plain = _run(codec.on(TorchOperations()), decoder.on(TorchOperations()), graphs=False)
    runs = {"plain": plain, "kernels": _run(codec, decoder, graphs=False)}
    if codec.device.type == "cuda":
        runs["graphs"] = _run(codec, decoder, graphs=True)
    report = _compare(loaded, runs)
    try:
        _judge(report, runs)
    except SmokeError as error:
        raise SmokeError(f"{error}\n{_culprit(loaded, plain)}") from None
    return report


def _compare(loaded: StepModels, runs: dict[str, _Run]) -> Report:
    """runs: the first is plain PyTorch's."""
    decoder, plain = loaded.decoder, runs["plain"]
    nats = {
        "plain": losses(decoder.on(TorchOperations()), plain.heard).cpu(),
        "kernels": losses(decoder, plain.heard).cpu(),
    }
    rows: list[dict[str, str | int | float | None]] = []
    for name, run in runs.items():
        found = nats.get(name)
        rows.append(
            {
                "runs": name,
                "listening ms": run.listening_ms,
                "speaking ms": run.speaking_ms,
                "codes heard as plain": float((run.heard == plain.heard).float().mean()),
                "audio error": _error(run.pcm, plain.pcm),
                "nats off a token": None if found is None else float((found - nats["plain"]).abs().mean()),
                "codes spoken as plain": float((run.spoken == plain.spoken).float().mean()),
                "codes spoken as kernels": float((run.spoken == runs["kernels"].spoken).float().mean()),
            }
        )
    return Report("smoke: one session by plain operations, by kernels, by graphs", loaded.facts(), rows)


def _culprit(loaded: StepModels, plain: _Run) -> str:
    """Return which kernel has to be left out for the others to agree, and how; or that there is no such one."""
    codec, decoder = loaded.codec, loaded.decoder
    if not all(each.operations.name.startswith(NAME) for each in (codec, decoder)):
        return "no kernel can be left out here"
    from streaming.models.operations.triton.operations import TritonOperations

    before: set[str] = set()
    for each in (codec, decoder):
        assert isinstance(each.operations, TritonOperations)
        before |= each.operations.without
    for kernel in KERNELS:
        names = before | {kernel}
        if names == before:
            continue
        fewer = StepModels(
            loaded.name,
            codec.on(TritonOperations(without=names)),
            decoder.on(TritonOperations(without=names)),
        )
        runs = {"plain": plain, "kernels": _run(fewer.codec, fewer.decoder, graphs=False)}
        try:
            _judge(_compare(fewer, runs), runs)
        except SmokeError:
            continue
        return f"without {kernel} they agree; {WITHOUT}={','.join(sorted(names))} leaves it out"
    return "they do not agree without any one of the kernels either"


def _require_kernels(loaded: StepModels) -> None:
    """Raise `SmokeError` if a model got the reference's operations."""
    for name, operations in (("decoder", loaded.decoder.operations), ("codec", loaded.codec.operations)):
        if type(operations) is TorchOperations:
            raise SmokeError(f"the {name} runs on plain PyTorch: the warning above says why it did not get the kernels")


@dataclass(frozen=True)
class _Run:
    """heard, spoken: int64 [F, Q]; pcm: float32 [F * 1920], what was heard, decoded again."""

    heard: Tensor
    spoken: Tensor
    pcm: NDArray[np.float32]
    listening_ms: float
    speaking_ms: float
    broken: bool


def _run(codec: StreamingMimi, decoder: LlamaDecoder, graphs: bool) -> _Run:
    """Run a session that hears noise and goes on, greedily."""
    step = FrameStep(codec, decoder, 1, _CONTEXT_FRAMES, 0, graphs)
    step.open(0, Sampling(temperature=0.0))
    noise = 0.1 * np.random.default_rng(0).standard_normal((_HEARD, 1, FRAME)).astype(np.float32)
    row, yes, no = np.zeros(1, np.int64), np.ones(1, np.bool_), np.zeros(1, np.bool_)
    results, times = [], []
    for number in range(_HEARD + _SPOKEN):
        speaks = number >= _HEARD
        started = time.perf_counter()
        results.append(step(row, noise[min(number, _HEARD - 1)], no if speaks else yes, yes if speaks else no))
        times.append(1e3 * (time.perf_counter() - started))
    codes = torch.from_numpy(np.concatenate([result.codes for result in results]))
    return _Run(
        codes[:_HEARD],
        codes[_HEARD:],
        np.concatenate([result.pcm[0] for result in results[:_HEARD]]),
        float(np.median(times[_HEARD - _TIMED : _HEARD])),
        float(np.median(times[-_TIMED:])),
        any(bool(result.broken.any()) for result in results),
    )


def _error(pcm: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """Return the difference of the whole, relative to its level."""
    return float(np.linalg.norm(pcm - wanted) / max(1e-9, float(np.linalg.norm(wanted))))


def _judge(report: Report, runs: dict[str, _Run]) -> None:
    for row in report.rows:
        name, same, error, nats = (
            row[key] for key in ("runs", "codes heard as plain", "audio error", "nats off a token")
        )
        assert isinstance(same, float) and isinstance(error, float)
        wrong = [
            f"only {100 * same:.0f} % of the codes that it hears are plain PyTorch's" * (same < _LEAST_SAME_CODES),
            f"its audio is off by {100 * error:.1f} %" * (not error < _MOST_PCM_ERROR and same == 1.0),
            f"its tokens are off by {nats} nats" * (isinstance(nats, float) and not nats < _MOST_NATS),
            "its numbers are not finite" * runs[str(name)].broken,
        ]
        if any(wrong):
            raise SmokeError(f"{name}: {'; '.join(filter(None, wrong))}\n{report.table()}")
