"""How much memory a process took at most."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path


def peak_mb() -> float:
    """Peak resident memory of this process, and of its worker processes what they do not share, in MB (10^6 bytes).

    Where there is no /proc (macOS), this process alone.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
    workers = sum(_peak_kb(process) - _shared_kb(process) for process in _descendants(os.getpid()))
    return (_peak_kb(os.getpid()) + workers) * 1024 / 1e6


def _peak_kb(process: int) -> int:
    """The most that was resident; ru_maxrss would start from the peak of the process that started this one."""
    return _kb(Path(f"/proc/{process}/status"), "VmHWM")


def _shared_kb(process: int) -> int:
    return _kb(Path(f"/proc/{process}/smaps_rollup"), "Shared_")


def _kb(path: Path, key: str) -> int:
    """The sum of all lines of a file of /proc whose name starts with `key`."""
    return sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key))


def _descendants(process: int) -> list[int]:
    children = [
        int(child)
        for path in Path(f"/proc/{process}/task").glob("*/children")
        for child in path.read_text().split()
    ]  # fmt: skip
    return children + [below for child in children for below in _descendants(child)]
