"""`python -m streaming.score A.wav B.wav ...`, and `streaming.score([...])`: see `streaming.scoring`.

The command and the function share a name, so the module can be called: an import of it takes the function's place.
"""

from __future__ import annotations

import sys
from types import ModuleType

from streaming.command import end_on_signals

if __name__ == "__main__":
    end_on_signals()

from streaming.scoring import main, score


class _Function(ModuleType):
    """A module that is its function."""

    __call__ = staticmethod(score)


sys.modules[__name__].__class__ = _Function

if __name__ == "__main__":
    sys.exit(main())
