"""A server in a separate process, where its memory and CPU time can be measured, and the cohort that it serves."""

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

# parts of authentication: a client's own seeds expanded, products with pads, those pads, the check; a client's tags added
AUTHENTICATION = ("expand_s", "products_s", "pads_s", "check_s", "tags_s")
UNAUTHENTICATED: dict[str, Any] = {**dict.fromkeys(AUTHENTICATION), "tag_bytes": None}
Measures = dict[str, Any]


class Remote:
    """An object that `make` returns in another process, called by its methods' names.

    A path among the arguments of a call is replaced by the file's bytes in that process.
    seconds: CPU time of each call, by method, without the reading
    grown_mb: the peak memory of that process, less its memory when the object was made
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
        """Return what the server's method returns; raise EOFError where its process ended, which prints the reason."""
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
        forget.write_text("5")  # resets the peak
    before = peak_mb()
    while (asked := connection.recv()) is not None:
        method, given = asked
        values = [value.read_bytes() if isinstance(value, Path) else value for value in given]
        started = time.process_time()
        answer = getattr(server, method)(*values)
        seconds = time.process_time() - started
        connection.send((answer, seconds, peak_mb() - before))
        del values, answer  # else memory would hold two uploads at once


def cohort(size: int, clients: int) -> tuple[list[np.ndarray], list[int]]:
    """Draw the weights of each client, float32 [size], mostly the same for all, and its number of examples."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 0.05, size)
    examples = [int(count) for count in rng.integers(100, 1000, clients)]
    return [(common + rng.normal(0, 0.01, size)).astype(np.float32) for _ in range(clients)], examples
