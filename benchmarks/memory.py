"""The peak memory of a process, and of a process with all that it started."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

LOOK = 0.5  # seconds between samples of other processes


class Watch:
    """A sampler, inside `with`, of the memory of other processes and of all that these started.

    roots: ids of processes by name
    The peak of a name is the largest sum, in any sample, of the peak resident memory of its living processes; what they
    share counts in each of them.
    """

    def __init__(self, roots: Mapping[str, int]) -> None:
        self._roots = dict(roots)
        self._seen: list[tuple[float, dict[str, float]]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def peaks_mb(self, until: float = float("inf")) -> dict[str, float]:
        """Return by name the peak until a moment (seconds since the epoch), in MB (10^6 bytes)."""
        peaks = dict.fromkeys(self._roots, 0.0)
        for when, found in list(self._seen):
            if when <= until:
                peaks = {name: max(peak, found[name]) for name, peak in peaks.items()}
        return peaks

    def _run(self) -> None:
        while not self._over.wait(LOOK):
            self._seen.append((time.time(), {name: _resident_mb(root) for name, root in self._roots.items()}))


def _resident_mb(root: int) -> float:
    """Return the sum of peak resident memory over a process and its descendants, in MB."""
    total, waiting = 0, [root]
    while waiting:
        process = waiting.pop()
        try:
            waiting += _children(process)
            total += _peak_kb(process)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return total * 1024 / 1e6


def peak_mb() -> float:
    """Return the peak resident memory of this process, and what its workers do not share, in MB (10^6 bytes).

    Where there is no /proc (macOS), it is of this process alone.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
    workers = sum(_peak_kb(process) - _shared_kb(process) for process in _descendants(os.getpid()))
    return (_peak_kb(os.getpid()) + workers) * 1024 / 1e6


def _peak_kb(process: int) -> int:
    """Return the peak resident memory; ru_maxrss would start from the peak of the parent process."""
    return _kb(Path(f"/proc/{process}/status"), "VmHWM")


def _shared_kb(process: int) -> int:
    return _kb(Path(f"/proc/{process}/smaps_rollup"), "Shared_")


def _kb(path: Path, key: str) -> int:
    """Return the sum of the lines of a file of /proc that start with `key`."""
    return sum(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(key))


def _descendants(process: int) -> list[int]:
    children = _children(process)
    return children + [below for child in children for below in _descendants(child)]


def _children(process: int) -> list[int]:
    return [
        int(child)
        for path in Path(f"/proc/{process}/task").glob("*/children")
        for child in path.read_text().split()
    ]  # fmt: skip
