"""`python -m tests.benchmark.stub_run DEED --json FILE`: a measurement that goes as it is told to."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

deed, _, report = sys.argv[1:]
if deed == "fails":
    sys.exit("benchmark: there is no such device")
if deed == "hangs":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
Path(report).write_text(json.dumps({"title": "a stub", "facts": {"deed": deed}, "rows": []}), encoding="utf-8")
