"""Triton launches on the current device, PyTorch on its tensors': what a kernel's operation needs for cuda:1."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launch: Callable[P, R]) -> Callable[P, R]:
    """Runs `launch` with the device of its first tensor as the current one."""

    @wraps(launch)
    def on_device(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        if not first.is_cuda:
            return launch(*args, **kwargs)
        with torch.cuda.device(first.device):
            return launch(*args, **kwargs)

    return on_device
