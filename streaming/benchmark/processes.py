"""Measurements as commands, a process each: started, timed, stopped when they take too long, and written down as they
end. Nothing here imports torch, so that a device that hangs keeps nobody from writing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from streaming.benchmark import supervisor
from streaming.command import OutputError, check_result

ROOT = Path(__file__).resolve().parents[2]
GPU_TESTS = ("tests/test_gpu.py", "tests/models/operations/triton")
"""The files of all tests that need a GPU. They import nothing that only the wire needs, which a machine may lack."""
LIVE = ("websockets", "msgspec", "soundfile", "soxr", "rich", "prometheus_client")
"""The packages that a server and the clients that measure it import."""
_PACKAGES = ("torch", "transformers", "triton", "moshi", "websockets", "numpy")
_TAIL = 2000
"""Bytes of what a run said that are kept, if it failed."""


@dataclass(frozen=True)
class Run:
    """arguments: after `python -m`; of a measurement, `--json FILE` is added. needs: modules that it imports."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def is_test(self) -> bool:
        return self.arguments[0] == "pytest"


def take(
    run: Run, limit_s: float, log: Path | None = None, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what came of a run: its command, how long it took, and its report, or why there is none.

    log: a file to which all that it says is added, as it says it.
    """
    record: dict[str, Any] = {
        "command": ["python", "-m", *run.arguments],
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "seconds": 0.0,
    }
    missing = [name for name in run.needs if not _is_there(name, environment)]
    if missing:
        return record | {"outcome": f"skipped: {', '.join(missing)} not installed"}
    with tempfile.TemporaryDirectory(prefix="results-") as folder:
        report, said = Path(folder) / "report.json", log or Path(folder) / "said"
        flags = [] if run.is_test else ["--json", str(report)]
        with said.open("ab") as output:
            begins = output.tell()
            started = time.monotonic()
            status = supervisor.run([sys.executable, "-m", *run.arguments, *flags], limit_s, output, environment)
            record["seconds"] = round(time.monotonic() - started, 1)
        told = said.read_bytes()[begins:][-_TAIL:].decode(errors="replace")
        if report.is_file():  # a run that failed may say why in its report
            record["report"] = json.loads(report.read_text(encoding="utf-8"))
        if status is None:
            return record | {"outcome": f"stopped after {limit_s:g} s", "said": told}
        if status:
            return record | {"outcome": f"failed with status {status}", "said": told}
        if run.is_test:
            summary = told.strip().splitlines()[-1:]
            some_ran = any(" passed" in line for line in summary)
            return record | {"outcome": "ok" if some_ran else "skipped: no test ran", "said": summary}
        return record | {"outcome": "ok"}


def _is_there(module: str, environment: Mapping[str, str] | None) -> bool:
    """Return whether a module could be imported, here or from the folders that the environment adds."""
    if importlib.util.find_spec(module) is not None:
        return True
    added = (environment or {}).get("PYTHONPATH", "").split(os.pathsep)
    return any((Path(folder) / name).exists() for folder in added if folder for name in (module, f"{module}.py"))


def check_place(path: Path, flag: str) -> None:
    """Raise `OutputError` where results could not be kept, before hours are spent on them. flag: that named it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{flag} {path.parent} cannot be made: {error.strerror or error}") from None
    check_result(flag, path)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} is damaged ({error}); move it away") from None
    if not isinstance(found, dict) or not isinstance(found.get("runs"), dict):
        raise OutputError(f"{path} is no file of results; move it away")


def keep(path: Path, facts: Mapping[str, Any], name: str, record: Mapping[str, Any]) -> None:
    """Write a run's record into the file, beside the other runs'. facts: of the machine."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"runs": {}}
    found.update(facts)
    found["runs"][name] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def machine_facts() -> dict[str, Any]:
    """Return what this process runs on and with."""
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ("git", "describe", "--always", "--dirty")
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"
