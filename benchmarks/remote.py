"""A server in a process of its own, so that its memory and its CPU time are its own; and the cohort that it serves."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import peak_mb

Measures = dict[str, Any]


class Remote:
    """What `make` makes, in another process, called by the names of its methods; a path among the arguments is read there.

    seconds: CPU time of each call, by method, without the reading; grown_mb: by how much memory at its peak was above what
    it was once the server was made
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any) -> None:
        context = get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, arguments), daemon=True)
        self._process.start()
        other.close()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.grown_mb = 0.0

    def call(self, method: str, *arguments: Any) -> Any:
        """What the server's method returns; raise EOFError where its process ended, which says why itself."""
        self._connection.send((method, arguments))
        answer, seconds, self.grown_mb = self._connection.recv()
        self.seconds[method].append(seconds)
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.send(None)
        self._process.join()


def _serve(connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    server = make(*arguments)
    gc.collect()
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # the peak is from now on
    before = peak_mb()
    while (asked := connection.recv()) is not None:
        method, given = asked
        values = [value.read_bytes() if isinstance(value, Path) else value for value in given]
        started = time.process_time()
        answer = getattr(server, method)(*values)
        seconds = time.process_time() - started
        connection.send((answer, seconds, peak_mb() - before))
        del values, answer  # or two uploads would be here at once


def cohort(size: int, clients: int) -> tuple[list[np.ndarray], list[int]]:
    """Random weights of each client, float32 [size], mostly the same for all, and how many examples each has."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 0.05, size)
    examples = [int(count) for count in rng.integers(100, 1000, clients)]
    return [(common + rng.normal(0, 0.01, size)).astype(np.float32) for _ in range(clients)], examples
