"""The training loop of every stage: steps until the time is over, a checkpoint every few minutes, nothing lost.

A checkpoint is written aside and renamed, so that a killed process leaves the last whole one. SIGTERM and SIGINT save
first. What is exported is the running average of the weights, so that a stage can be stopped at any time without a
cool-down.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

_SAVE_SECONDS = 120.0
_CHECK_SECONDS = 360.0
"""Of CPU time: a check must not be most of the work where others have the machine."""
_LOG_STEPS = 50
_WARMUP_STEPS = 200


class Loop:
    """Weights, their average, their optimisers and their counters.

    modules: what is trained, by name, each with an optimiser of its own, all on one device. average: the name of the
    one that is averaged. betas: of AdamW, which is used where no other `optimiser` is made of a module and a rate.
    """

    def __init__(
        self,
        path: Path,
        modules: Mapping[str, nn.Module],
        rate: float,
        average: str,
        decay: float,
        betas: tuple[float, float] = (0.8, 0.99),
        optimiser: Callable[[nn.Module, float], torch.optim.Optimizer] | None = None,
    ) -> None:
        self.path, self.modules, self.rate, self._decay = path, dict(modules), rate, decay
        self._average_of = average
        self.average = deepcopy(self.modules[average]).requires_grad_(False)
        self.optimisers = {
            name: optimiser(module, rate) if optimiser else _adamw(module, rate, betas)
            for name, module in self.modules.items()
        }
        self.steps: int = 0
        self.seconds: float = 0.0  # CPU time of all threads: what others do on the machine does not count
        self.audio_seconds: float = 0.0
        if path.is_file():
            self._load()
        self._totals = multiprocessing.Array("d", [self.steps, self.seconds, self.audio_seconds])

    def _load(self) -> None:
        saved = torch.load(self.path, map_location=next(self.average.parameters()).device)
        for name, module in self.modules.items():
            if name in saved["modules"]:  # a stage may have grown a module since
                module.load_state_dict(saved["modules"][name])
                self.optimisers[name].load_state_dict(saved["optimisers"][name])
        self.average.load_state_dict(saved["average"])
        self.steps, self.seconds, self.audio_seconds = saved["steps"], saved["seconds"], saved["audio_seconds"]

    def save(self) -> None:
        """The checkpoint, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        torch.save(
            {
                "modules": {name: module.state_dict() for name, module in self.modules.items()},
                "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
                "average": self.average.state_dict(),
                "steps": self.steps,
                "seconds": self.seconds,
                "audio_seconds": self.audio_seconds,
            },
            part,
        )
        part.replace(self.path)

    def update(self, name: str, loss: Tensor, clip: float = 1.0) -> float:
        """One step of a module's optimiser. Returns the gradient's norm. A step that is not finite is left out."""
        optimiser = self.optimisers[name]
        optimiser.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.modules[name].parameters(), clip))
        if norm == norm and norm != float("inf"):
            for group in optimiser.param_groups:
                group["lr"] = self.rate * min(1.0, (self.steps + 1) / _WARMUP_STEPS)
            optimiser.step()
        return norm

    def run(
        self,
        step: Callable[[], tuple[dict[str, float], float]],
        check: Callable[[nn.Module], dict[str, float]],
        minutes: float,
        budget: float = math.inf,
        helpers: Sequence[Callable[[], tuple[dict[str, float], float]]] = (),
    ) -> None:
        """Trains for so many minutes of wall time, or until the stage has had `budget` CPU seconds in all.

        step: returns figures and the seconds of audio that it took. check: figures of the averaged module on held-out
        material, every `_CHECK_SECONDS` and at the end. helpers: as many processes beside this one take these steps
        on the same weights and moments, which lie in shared memory. None waits for another, so a gradient may be a
        step late. Before this call nothing may have been differentiated, since a fork does not survive it.
        """
        if helpers:
            self._share()
        beside = [multiprocessing.get_context("fork").Process(target=self._help, args=(one,)) for one in helpers]
        for process in beside:
            process.start()
        stop = False

        def end(_signal: int, _frame: FrameType | None) -> None:
            nonlocal stop
            stop = True

        previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        log = self.path.with_suffix(".jsonl")
        log.parent.mkdir(parents=True, exist_ok=True)
        begun, saved, cpu = time.monotonic(), time.monotonic(), time.process_time()
        checked = self.seconds
        sums: dict[str, float] = {}
        summed = 0
        with tqdm(desc=self.path.stem, unit="step", initial=self.steps, mininterval=5) as bar, log.open("a") as file:

            def note(kind: str, figures: dict[str, float]) -> None:
                counters = {"steps": self.steps, "seconds": self.seconds, "audio_seconds": self.audio_seconds}
                record: dict[str, Any] = {"kind": kind, **counters, **figures}
                file.write(
                    json.dumps(
                        {key: round(value, 5) if isinstance(value, float) else value for key, value in record.items()}
                    )
                    + "\n"
                )
                file.flush()

            while not stop and time.monotonic() - begun < 60 * minutes and self.seconds < budget:
                figures, audio_seconds = step()
                self._follow()
                for key, value in figures.items():
                    sums[key] = sums.get(key, 0.0) + value
                summed += 1
                cpu = self._count(cpu, audio_seconds)
                bar.update(self.steps - bar.n)
                if summed == _LOG_STEPS:
                    if any(process.exitcode is not None for process in beside):
                        raise RuntimeError("A process that helps to train has ended.")
                    means = {key: value / summed for key, value in sums.items()}
                    bar.set_postfix({key: f"{value:.3f}" for key, value in means.items()}, refresh=False)
                    note("train", means)
                    sums.clear()
                    summed = 0
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                if self.seconds - checked > _CHECK_SECONDS:
                    with torch.no_grad():
                        note("check", check(self.average))
                    checked, cpu = self.seconds, time.process_time()
            for process in beside:
                process.terminate()
                process.join()
            self.save()
            with torch.no_grad():
                note("check", check(self.average))
        for number, handler in previous.items():
            signal.signal(number, handler)

    def _share(self) -> None:
        """Move weights and moments, which begin at zero, into shared memory."""
        for name, module in self.modules.items():
            module.share_memory()
            for group in self.optimisers[name].param_groups:
                for parameter in group["params"]:
                    moments = self.optimisers[name].state[parameter]
                    if not moments:
                        zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                        moments.update(step=torch.zeros(()), **zeros)
                    for moment in moments.values():
                        moment.share_memory_()

    def _help(self, step: Callable[[], tuple[dict[str, float], float]]) -> None:
        """Take steps until this process is ended."""
        cpu = time.process_time()
        while True:
            _, audio_seconds = step()
            cpu = self._count(cpu, audio_seconds)

    def _count(self, cpu: float, audio_seconds: float) -> float:
        """Add a step of this process, which began at a CPU time, to the counters of all. Returns the CPU time now."""
        now = time.process_time()
        with self._totals.get_lock():
            for place, amount in enumerate((1.0, now - cpu, audio_seconds)):
                self._totals[place] += amount
            self.steps, self.seconds, self.audio_seconds = int(self._totals[0]), self._totals[1], self._totals[2]
        return now

    def _follow(self) -> None:
        weight = 1 - min(self._decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.modules[self._average_of].parameters(), strict=True):
                mean.lerp_(now, weight)


def _adamw(module: nn.Module, rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Weight decay for matrices and kernels only."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1]},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, weight_decay=0.01)
