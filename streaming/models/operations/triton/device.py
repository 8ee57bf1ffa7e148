"""The device of a launch, and whether the launch may begin before the one in front of it has ended."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Runs `launch` with the device of its first tensor as the current one: Triton launches on the current device,
    PyTorch on its tensors'. It is what a kernel's operation needs for cuda:1.
    """

    @wraps(launch)
    def on_device(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if not first.is_cuda:
            return launch(*args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(*args, **kwargs)

    return on_device


def follows_early(tensor: Tensor) -> bool:
    """Return whether a kernel may be launched while the one before it still runs: from Hopper on, "programmatic
    dependent launch" (CUDA C++ Programming Guide).

    Such a kernel calls `gdc_launch_dependents` first, which lets the next one come, then asks for what no kernel has
    written, its weights, and calls `gdc_wait` before it touches anything else. All its programs have to wait: that the
    one before the one before has ended follows from that alone.
    """
    return tensor.is_cuda and _has_dependent_launch(tensor.device)


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)
