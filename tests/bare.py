"""`python -m tests.bare MODULE ARGUMENTS...`: a module run as on a machine with a GPU and little else.

What such a machine has is torch, Triton, transformers and what they bring. What only the wire and audio files need is
hidden here, as if it were not installed.
"""

from __future__ import annotations

import runpy
import sys
from importlib.machinery import ModuleSpec
from typing import Any

HIDDEN = {"msgspec", "onnxruntime", "silero_vad", "sounddevice", "soundfile", "soxr", "sphn", "websockets"}


class _Without:
    """A finder of modules that does not find the hidden ones."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if name.partition(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)


if __name__ == "__main__":
    sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]  # type: ignore[misc]
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
