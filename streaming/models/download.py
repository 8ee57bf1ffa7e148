"""Find what of a hub repository is not in the cache yet, and how much of it has come while it is fetched."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache

from streaming.memory import size

_LOG = logging.getLogger(__name__)
_WORTH_SAYING = 100_000_000
"""Bytes. A smaller download takes only seconds."""
_EVERY_S = 10.0


@dataclass(frozen=True)
class Missing:
    """files: how many are not in the cache; bytes: of all of them."""

    files: int
    bytes: int


def missing(name: str, patterns: Sequence[str]) -> Missing:
    """Return what of the repository `name` would be downloaded. Raises whatever the hub's client does without a
    network.
    """
    info = HfApi().model_info(name, files_metadata=True)
    files = [
        file
        for file in info.siblings or []
        if any(fnmatch(file.rfilename, pattern) for pattern in patterns)
        and not isinstance(try_to_load_from_cache(name, file.rfilename, revision=info.sha), str)
    ]
    return Missing(len(files), sum(file.size or 0 for file in files))


@contextmanager
def told(name: str, wanted: Missing, every_s: float = _EVERY_S) -> Iterator[None]:
    """Say how much is to be downloaded while the block does it, and again how much is there whenever that has grown:
    who waits for lines can tell a slow download from one that stands still.
    """
    if wanted.bytes < _WORTH_SAYING:
        yield
        return
    _LOG.info("%s: downloading %s in %d files, once", name, size(wanted.bytes), wanted.files)
    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    before, over = _held(folder), threading.Event()

    def watch() -> None:
        seen = 0
        while not over.wait(every_s):
            here = min(_held(folder) - before, wanted.bytes)
            if here > seen:
                seen = here
                _LOG.info("%s: %s of %s downloaded", name, size(here), size(wanted.bytes))

    watching = threading.Thread(target=watch, name="download", daemon=True)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()


def _held(folder: Path) -> int:
    """Return the bytes in the cache's files, unfinished ones included."""
    try:
        return sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    except OSError:  # the folder is not there yet, or a file was renamed just now
        return 0
