"""Files that hold what is somebody's own."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

AnyBytes = bytes | bytearray | memoryview | mmap
_PIECE_BYTES = 1 << 20
_REST_S = 1e-4


def in_pieces(data: AnyBytes, size: int = _PIECE_BYTES) -> Iterator[memoryview]:
    """Yield data in pieces of this many bytes, and let Python's other threads run after each. A call that holds the
    interpreter while it copies or encrypts tens of megabytes would make them late.
    """
    view = memoryview(data)
    for start in range(0, len(view), size):
        yield view[start : start + size]
        time.sleep(_REST_S)  # a sleep of 0 may not wake who waits


def write_private(path: Path, data: AnyBytes) -> None:
    """Write a file that its owner alone may read, whole or not at all."""
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".part", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
