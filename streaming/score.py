"""`python -m streaming.score A.wav B.wav ...`: see `streaming.scoring`.

This file is the command alone. The function has the same name, `streaming.score`, and an import of this module would
take its place.
"""

from __future__ import annotations

import sys

from streaming.scoring import main

if __name__ != "__main__":
    raise ImportError("streaming.score is a function, and a command; what is to be imported is streaming.scoring")

sys.exit(main())
