"""`python -m tests.benchmark.stub_run DEED --json FILE`: a measurement that goes as it is told to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from streaming.models.operations.triton import WITHOUT

deed, _, report = sys.argv[1:]
if deed == "fails":
    sys.exit("benchmark: there is no such device")
if deed == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
without = os.environ.get(WITHOUT, "")
if deed.startswith("blames"):
    blamed = "draw" if deed == "blames always" or not without else "draw,gate"
    if without != blamed or deed == "blames always":
        sys.exit(f"benchmark: wrong; {WITHOUT}={blamed} leaves it out")
facts = {"deed": deed} | ({"without": without} if without else {})
Path(report).write_text(json.dumps({"title": "a stub", "facts": facts, "rows": []}), encoding="utf-8")
