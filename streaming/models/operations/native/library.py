"""Compile `kernels.c`, and open it.

It shares PyTorch's threads: it is linked with the OpenMP library that PyTorch has loaded. Two pools of threads, each
waiting for work in a loop, would take the processor from each other.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

from streaming import compiler
from streaming.compiler import SWITCH, processor

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC")
"""Products and sums are fused where the source says so, and nowhere else: see `vectors.h`."""
NATIVE = "native"
"""The processor at hand, for `build`."""
WIDENED = ("SSE2", "NEON", "plain C")
"""Instruction sets without products of bytes, as `native_instructions` names them."""

_FUNCTIONS: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "native_lanes": (c_int64, ()),
    "native_block": (c_int64, ()),
    "native_instructions": (c_char_p, ()),
    "native_width": (c_int64, (c_int64,)),
    "native_product": (c_int64, (c_void_p, c_void_p, c_void_p, c_void_p, c_int)),
    "native_rms_norm": (None, (c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p, c_void_p)),
    "native_layer_norm": (None, (c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p)),
    "native_convolutions": (
        c_int64,
        (c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int),
    ),
    "native_draw": (None, (c_void_p, c_void_p, *[c_int64] * 4, c_void_p)),
    "native_layers": (c_int64, (c_void_p, c_int64, c_void_p, c_void_p, c_void_p)),
    "native_codec_layers": (c_int64, (c_void_p, c_int64, c_void_p, c_void_p)),
    "native_encode": (c_int64, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "native_decode": (c_int64, (c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p)),
    "native_quantise": (c_int64, (c_void_p, c_void_p, c_int64, c_void_p, c_int)),
    "native_attend": (c_int64, (c_void_p, c_void_p, c_void_p, *[c_int64] * 5, c_void_p, c_int)),
}
"""The functions' results and arguments."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled operations, or None where they cannot be had; a line in the log says why."""
    if os.environ.get(SWITCH) == "0":
        _LOG.info("running without native operations, slower: %s=0 says so", SWITCH)
        return None
    try:
        opened = build()
    except compiler.FAILURES as error:
        _LOG.warning("running without native operations, slower: %s", compiler.reason(error))
        return None
    _LOG.info("native operations for %s", opened.native_instructions().decode())
    return opened


def build(target: str = NATIVE) -> ctypes.CDLL:
    """Return the operations for a processor, whether this one runs them or not.

    target: `NATIVE`, or what a compiler's `-march` takes (`x86-64-v3`). They come from the cache if they were compiled
    before, by this compiler, on this processor and with these threads. Raises `compiler.FAILURES`.
    """
    command, threads = compiler.compiler(), _openmp()
    flags = (*_FLAGS, _for(target))
    sources = [_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))]
    parts = (
        *(path.read_text(encoding="utf-8") for path in sources),
        compiler.run(*command, "--version"),
        *flags,
        str(threads),
        processor(),
    )

    def make(built: Path) -> None:
        objects = built.with_suffix(".o")
        compiler.run(*command, *flags, "-c", str(_SOURCE), "-o", str(objects))
        compiler.run(*command, "-shared", str(objects), str(threads), "-lm", "-o", str(built))

    return compiler.kept("native", parts, make, _open)


def _for(target: str) -> str:
    """Return the compiler's flag. On Arm `-mcpu=native` is what both gcc and clang know."""
    arm = platform.machine() in ("aarch64", "arm64")
    return "-mcpu=native" if target == NATIVE and arm else f"-march={target}"


def _open(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))
    for name, (gives, takes) in _FUNCTIONS.items():
        function = getattr(opened, name)
        function.argtypes, function.restype = takes, gives
    return opened


def _openmp() -> Path:
    """Return the OpenMP library of this process, which PyTorch has brought."""
    for path in _libraries():
        if path.name.startswith(("libgomp", "libiomp", "libomp")):
            return path
    raise compiler.NotHereError("PyTorch has no OpenMP library here")


def _libraries() -> list[Path]:
    """Return the libraries that this process has loaded."""
    if platform.system() == "Linux":
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            return [Path(line.split(maxsplit=5)[-1].strip()) for line in maps]
    if platform.system() == "Darwin":
        system = ctypes.CDLL(None)
        system._dyld_get_image_name.restype = c_char_p
        return [Path(os.fsdecode(system._dyld_get_image_name(i))) for i in range(system._dyld_image_count())]
    raise compiler.NotHereError(f"they are for Linux and macOS, this is {platform.system()}")
