"""Find how much memory there is, with the limit of a container where this process runs in one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Memory in bytes. total: what this process could have if it were alone. free: what it can have now."""

    total: int
    free: int


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Memory | None:
    """Return the machine's memory, or its container's if that is less; None where the system does not tell."""
    machine = _machine(proc)
    if machine is None:
        return None
    limits = [machine, *_containers(proc, cgroups)]
    return Memory(min(limit.total for limit in limits), min(limit.free for limit in limits))


def resident(proc: Path = Path("/proc")) -> int:
    """Return what this process holds of the machine's memory, in bytes; 0 where the system does not tell."""
    try:
        return int((proc / "self" / "statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def size(count: float) -> str:
    """Return bytes as a person reads them: `1.2 TB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.0f} PB"


def _machine(proc: Path) -> Memory | None:
    try:
        lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        names = getattr(os, "sysconf_names", {})
        if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
            return None
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(total, total)
    values = {name: 1024 * int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return Memory(values["MemTotal"], values["MemAvailable"])


def _containers(proc: Path, cgroups: Path) -> Iterator[Memory]:
    """Return the limits of this process's control groups, of both versions (kernel:
    Documentation/admin-guide/cgroup-v2.rst).

    What is cached of files counts as used there and is given back when it is needed: it is free.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, most, used, cached = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, most, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        inside = root / path.lstrip("/")  # not there in a container without its own namespace; the one above it is
        for folder in (inside, *inside.parents):
            try:
                limit = (folder / most).read_text(encoding="utf-8").strip()
                taken = int((folder / used).read_text(encoding="utf-8"))
                statistics = (folder / "memory.stat").read_text(encoding="utf-8").split()
            except OSError:
                limit = "max"
            if limit != "max":
                counts = dict(zip(statistics[::2], map(int, statistics[1::2]), strict=True))
                yield Memory(int(limit), max(0, int(limit) - taken + counts.get(cached, 0)))
            if folder == root:
                break
