"""`python -m streaming.score A.wav B.wav ...`: see `streaming.scoring`.

It is a command, and not to be imported: an import would take the place of the function `streaming.score`.
"""

from __future__ import annotations

import importlib
import sys

from streaming.command import end_on_signals

if __name__ != "__main__":
    raise ImportError("streaming.score is a function, and a command; what is to be imported is streaming.scoring")

end_on_signals()  # before torch is imported, which takes seconds
sys.exit(importlib.import_module("streaming.scoring").main())
