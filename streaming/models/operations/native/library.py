"""Compile `kernels.c` with the system's C compiler, once for each processor and compiler, and open it.

It shares PyTorch's threads: it is linked with the OpenMP library that PyTorch has loaded. Two pools of threads, each
waiting for work in a loop, would take the processor from each other.

gcc and clang on Linux; on macOS Apple's clang, along the same lines, which nobody has run yet.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

from streaming.errors import StreamingError

_LOG = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fPIC")
"""Products and sums are fused where the source says so, and nowhere else: see `vectors.h`."""
NATIVE = "native"
"""The processor at hand, for `build`."""
_SECONDS = 120
"""Longest that the compiler may take."""
SWITCH = "STREAMING_NATIVE"
"""The environment's variable: 0 means PyTorch's operations alone."""
WIDENED = ("SSE2", "NEON", "plain C")
"""Instruction sets without products of bytes, as `native_instructions` names them."""

_COMPILERS = {"Linux": "Debian: apt install gcc libc6-dev", "Darwin": "xcode-select --install"}
"""How to install a compiler, by system."""

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
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError, _NotHereError) as error:
        said = getattr(error, "stderr", None)
        reason = said if isinstance(said, str) and said else str(error)
        _LOG.warning("running without native operations, slower: %s", " ".join(reason.split())[:500])
        return None
    _LOG.info("native operations for %s", opened.native_instructions().decode())
    return opened


class _NotHereError(StreamingError):
    """This system lacks what is needed."""


def build(target: str = NATIVE) -> ctypes.CDLL:
    """Return the operations for a processor, whether this one runs them or not.

    target: `NATIVE`, or what a compiler's `-march` takes (`x86-64-v3`). They come from the cache if they were compiled
    before, by this compiler, on this processor and with these threads.
    Raises `OSError`, `ValueError`, `AttributeError`, `subprocess.SubprocessError` and `_NotHereError`.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("gcc") or shutil.which("cc") or ""]
    if compiler == [""]:
        raise _NotHereError(f"there is no C compiler ({_COMPILERS.get(platform.system(), 'gcc or clang')})")
    threads = _openmp()
    flags = (*_FLAGS, _for(target))
    sources = [_SOURCE, *sorted(_SOURCE.parent.glob("*.h"))]
    parts = (
        *(path.read_text(encoding="utf-8") for path in sources),
        _run(*compiler, "--version"),
        *flags,
        str(threads),
        processor(),
    )
    name = f"native-{hashlib.sha256(chr(0).join(parts).encode(errors='replace')).hexdigest()[:24]}.so"
    cache = cache_folder("native")
    if cache is not None and (cache / name).exists():
        try:
            return _open(cache / name)
        except (OSError, AttributeError):
            pass  # the disk was full, or the machine died, as it was written: it is compiled anew
    _LOG.info("compiling the operations for this processor, which is done once")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        objects, built = Path(folder) / "kernels.o", Path(folder) / name
        _run(*compiler, *flags, "-c", str(_SOURCE), "-o", str(objects))
        _run(*compiler, "-shared", str(objects), str(threads), "-lm", "-o", str(built))
        opened = _open(built)  # and once open, its file may be moved, or deleted with its folder
        if cache is not None:
            built.chmod(0o700)
            built.replace(cache / name)
        return opened


def _for(target: str) -> str:
    """Return the compiler's flag. On Arm `-mcpu=native` is what both gcc and clang know."""
    arm = platform.machine() in ("aarch64", "arm64")
    return "-mcpu=native" if target == NATIVE and arm else f"-march={target}"


def _run(*command: str) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=_SECONDS, env=environment
    ).stdout


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
    raise _NotHereError("PyTorch has no OpenMP library here")


def _libraries() -> list[Path]:
    """Return the libraries that this process has loaded."""
    if platform.system() == "Linux":
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            return [Path(line.split(maxsplit=5)[-1].strip()) for line in maps]
    if platform.system() == "Darwin":
        system = ctypes.CDLL(None)
        system._dyld_get_image_name.restype = c_char_p
        return [Path(os.fsdecode(system._dyld_get_image_name(i))) for i in range(system._dyld_image_count())]
    raise _NotHereError(f"they are for Linux and macOS, this is {platform.system()}")


def processor() -> str:
    """Return a text that tells one kind of processor from another."""
    if platform.system() == "Windows":
        return platform.processor()
    if platform.system() == "Darwin":
        return _run("sysctl", "machdep.cpu", "hw.optional")
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = file.read().split("\n\n", maxsplit=1)[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))


def cache_folder(name: str) -> Path | None:
    """Return a folder that is ours alone, for what lies in it may be run; None where there can be none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "streaming-continuation" / name
    if not folder.is_absolute() or platform.system() == "Windows":  # Windows tells a file's owner by other means
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError:  # there is no home, or it cannot be written to
        return None
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        reason = "others could write to it" if found.st_uid == os.getuid() else "it belongs to another user"
        _LOG.warning("%s is not used, since %s: what it would keep is made anew", folder, reason)
        return None
    return folder if os.access(folder, os.W_OK) else None
