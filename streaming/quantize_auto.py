"""`--quantize auto`: of the ways to keep a decoder's weights, the one that loses least and is fast enough here.

How long a step takes is measured at the first start, and kept in a file for the next one.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from streaming.compiler import cache_folder
from streaming.files import write_private
from streaming.models.linear import Dense, Linear
from streaming.models.operations.native.library import WIDENED, library
from streaming.models.operations.native.matrix import NativeLinear
from streaming.models.quantized_weights import Quantize

_LOG = logging.getLogger(__name__)
KINDS: tuple[Quantize, ...] = ("none", "int8", "int4")
"""The kinds, from the one that loses least on."""
_KEPT = 64
"""Models and machines that the file remembers, the latest ones."""
_SHAPE = (8192, 2048)
"""Outputs and inputs of the matrix of a trial: more bytes than most caches hold."""
_TRIES = 5


def measured_file() -> Path | None:
    """Return where measurements are kept; None where nothing can be."""
    folder = cache_folder("quantize")
    return None if folder is None else folder / "seconds.json"


def choose(
    kinds: Sequence[Quantize],
    measure: Callable[[Quantize], float],
    least: Callable[[Quantize], float],
    frame_s: float,
    share: float,
    help_: str,
    key: str,
    file: Path | None,
) -> Quantize:
    """Return the first of these kinds with which a step of one session takes at most this share of a frame; where none
    is, the fastest of them. The log says what was chosen and why.

    kinds: from the one that loses least on. measure: the seconds of a step; called for no more kinds than needed, and
    for none that `file` has under `key`. least: no step takes less, which is known in a moment; what is too slow by
    that alone is not measured, and kept as infinity. help_: what would help where nothing is fast enough.
    """
    taken, limit = _read(file).get(key, {}), share * frame_s
    known = set(taken)

    def measured(kind: Quantize) -> float:
        _LOG.info("--quantize auto: measuring a step with %s, which is done once", kind)
        return measure(kind)

    for kind in kinds:
        if kind not in taken:
            taken[kind] = measured(kind) if least(kind) <= limit else math.inf
        if taken[kind] <= limit:
            break
    looked = [kind for kind in kinds if kind in taken]
    if all(math.isinf(taken[kind]) for kind in looked):
        fastest = min(looked, key=least)
        taken[fastest] = measured(fastest)
        known.discard(fastest)
    enough = [kind for kind in looked if taken[kind] <= limit]
    chosen = enough[0] if enough else min(looked, key=taken.__getitem__)
    if not known.issuperset(looked):
        _keep(file, key, taken)
    others = ", ".join(_told(kind, taken[kind]) for kind in looked if kind != chosen)
    found = (
        f"--quantize auto takes {chosen}: a step of one session takes {1e3 * taken[chosen]:.0f} ms of a frame's "
        f"{1e3 * frame_s:.0f}{f' ({others})' if others else ''}"
    )
    if enough:
        lost = "nothing is lost" if chosen == "none" else "what loses less is too slow here"
        source = f"measured at an earlier start, see {file}" if known.issuperset(looked) else "measured now"
        _LOG.info("%s; %s; %s", found, lost, source)
    else:
        late = "it will stutter" if taken[chosen] > frame_s else "that leaves no room for anything else"
        _LOG.warning("%s, which is the fastest here, and %s. %s would help", found, late, help_)
    return chosen


def _told(kind: Quantize, seconds: float) -> str:
    return f"{kind} is too slow by its products alone" if math.isinf(seconds) else f"{kind} {1e3 * seconds:.0f}"


def least_s(kind: Quantize, weights: int) -> float:
    """Return what products with so many weights take at least: what a matrix that may lie in a cache takes, in bfloat16
    for `none`, since a checkpoint's numbers may be that. 0 without native operations.
    """
    outputs, inputs = _SHAPE
    return 0.0 if library() is None else product_s(kind, 0.5) * weights / (outputs * inputs)


def warn_if_slower(kind: Quantize, measure: Callable[[Quantize], float] | None = None) -> None:
    """Say so where this processor multiplies integers more slowly than float32; only one without products of bytes can.

    measure: the seconds of a product; by default it is tried.
    """
    opened = library()
    if kind == "none" or opened is None:
        return
    instructions = opened.native_instructions().decode()
    if instructions not in WIDENED:
        return
    measure = measure or product_s
    ours, plain = measure(kind), measure("none")
    if ours > plain:
        _LOG.warning(
            "%s is slower than float32 on this processor, which has no products of bytes (%s): %.1f ms a product, "
            "float32 %.1f. --quantize none is faster here",
            kind,
            instructions,
            1e3 * ours,
            1e3 * plain,
        )


@torch.inference_mode()
def product_s(kind: Quantize, number: float = 0.1) -> float:
    """Return the seconds of one row's product with a matrix that few caches hold, the least of some tries. number: all
    of its weights, if they are kept as they are. 0.1 is not a number of bfloat16's, 0.5 is.
    """
    matrix, x = _matrix(kind, number), torch.ones(1, _SHAPE[1])
    taken = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        matrix(x)
        taken.append(time.perf_counter() - started)
    return min(taken)


def _matrix(kind: Quantize, number: float) -> Linear:
    outputs, inputs = _SHAPE
    if kind == "none":
        weight = torch.full(_SHAPE, number)
        return NativeLinear.pack(weight) if NativeLinear.can(weight) else Dense(weight)
    ones = torch.ones(_SHAPE, dtype=torch.int8)
    if kind == "int8":
        return NativeLinear.pack_int8(ones, torch.ones(outputs))
    return NativeLinear.pack_int4(ones, torch.ones(outputs, inputs // 128, dtype=torch.bfloat16))


def _read(file: Path | None) -> dict[str, dict[Quantize, float]]:
    """Return what is kept, by key; nothing of a file that is missing, damaged, or another program's."""
    try:
        kept = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {key: _seconds(taken) for key, taken in kept.items() if isinstance(taken, dict)}


def _seconds(taken: dict[str, object]) -> dict[Quantize, float]:
    numbers: Collection[tuple[Quantize, object]] = [(kind, taken.get(kind)) for kind in KINDS]
    return {kind: s for kind, s in numbers if isinstance(s, float) and s > 0}


def _keep(file: Path | None, key: str, taken: dict[Quantize, float]) -> None:
    """Write what was measured beside what was kept before. A full disk costs a measurement at the next start."""
    if file is None:
        return
    kept = {name: seconds for name, seconds in _read(file).items() if name != key}
    latest = dict([*kept.items(), (key, taken)][-_KEPT:])
    try:
        write_private(file, json.dumps(latest).encode())
    except OSError as error:
        _LOG.warning("what --quantize auto measured could not be kept in %s: %s", file, error)
