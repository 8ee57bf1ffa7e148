"""Compile C with the system's compiler, once for each source, compiler and processor, and open it.

gcc and clang on Linux; on macOS Apple's clang, along the same lines, which nobody has run yet.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from streaming.errors import StreamingError

Library = TypeVar("Library")
_LOG = logging.getLogger(__name__)
SWITCH = "STREAMING_NATIVE"
"""The environment's variable: 0 means that nothing is compiled."""
_SECONDS = 120
"""Longest that the compiler may take."""
_COMPILERS = {"Linux": "Debian: apt install gcc libc6-dev", "Darwin": "xcode-select --install"}
"""How to install a compiler, by system."""


class NotHereError(StreamingError):
    """This system lacks what is needed."""


FAILURES = (OSError, ValueError, AttributeError, subprocess.SubprocessError, NotHereError)
"""What `compiler` and `kept` may raise."""


def reason(error: BaseException) -> str:
    """Return one of `FAILURES` as a line, with what the compiler had to say."""
    said = getattr(error, "stderr", None)
    return " ".join((said if isinstance(said, str) and said else str(error)).split())[:500]


def compiler() -> list[str]:
    """Return the compiler's command, `CC` where it is set."""
    command = shlex.split(os.environ.get("CC", "")) or [shutil.which("gcc") or shutil.which("cc") or ""]
    if command == [""]:
        raise NotHereError(f"there is no C compiler ({_COMPILERS.get(platform.system(), 'gcc or clang')})")
    return command


def run(*command: str) -> str:
    """Return what a command says."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=True, timeout=_SECONDS, env=environment
    ).stdout


def kept(name: str, parts: Sequence[str], make: Callable[[Path], object], opened: Callable[[Path], Library]) -> Library:
    """Return a library that was made before of the same parts, or make it.

    parts: whatever its code depends on. make: is to write it to a path, in a folder of its own. opened: opens it, and
    raises `OSError` or `AttributeError` where it is damaged.
    """
    file = f"{name}-{hashlib.sha256(chr(0).join(parts).encode(errors='replace')).hexdigest()[:24]}.so"
    cache = cache_folder("native")
    if cache is not None and (cache / file).exists():
        try:
            return opened(cache / file)
        except (OSError, AttributeError):
            pass  # the disk was full, or the machine died, as it was written: it is made anew
    _LOG.info("compiling %s for this processor, which is done once", name)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / file
        make(built)
        found = opened(built)  # and once open, its file may be moved, or deleted with its folder
        if cache is not None:
            built.chmod(0o700)
            built.replace(cache / file)
        return found


def processor() -> str:
    """Return a text that tells one kind of processor from another."""
    if platform.system() == "Windows":
        return platform.processor()
    if platform.system() == "Darwin":
        return run("sysctl", "machdep.cpu", "hw.optional")
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
