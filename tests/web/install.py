"""Installs axe-core, which `test_accessibility.py` runs in the page, unless it is there: npm's, of one version."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

VERSION = "4.14.1"
FOLDER = Path(__file__).parents[2] / ".npm-checks"
AXE = FOLDER / "node_modules" / "axe-core" / "axe.min.js"


def installed() -> bool:
    """Return whether axe-core is there, in this version."""
    about = AXE.with_name("package.json")
    return AXE.exists() and about.exists() and json.loads(about.read_text(encoding="utf-8"))["version"] == VERSION


def main() -> str | None:
    """Install it. Returns what to do where that cannot be, for `sys.exit`."""
    if installed():
        return None
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed; on Debian: apt-get install npm"
    FOLDER.mkdir(exist_ok=True)
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--silent"]
    subprocess.run([npm, "install", *flags, "--prefix", str(FOLDER), f"axe-core@{VERSION}"], check=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
