"""One round of FedVeil's secure aggregation, with the clients in this process and the server in another.

The stages are those of `privacy.secagg`, one after another. A client uploads its masked vector and its other messages,
which are mostly shares of keys.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.remote import UNAUTHENTICATED, Measures, Remote, cohort
from fedveil.core.settings.choice import ProtectionChoice
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.fixed_point import Layout, dequantize, quantize
from fedveil.privacy.plan import RESERVED, make_plan
from fedveil.privacy.secagg.client import SecAggClient, Stage
from fedveil.privacy.secagg.graph import choose_degree, neighbours
from fedveil.privacy.secagg.messages import Session
from fedveil.privacy.secagg.revealed import Revealed
from fedveil.privacy.secagg.server import SecAggServer
from fedveil.privacy.secagg.vectors import from_ring, read_masked, to_ring, write_masked

PRIVACY = Privacy(protection=ProtectionChoice("secagg"))


class MaskedServer(SecAggServer):
    """The server's side, with a masked vector as the bytes that came, and the sum as the bytes that go."""

    def add_bytes(self, client: int, upload: bytes) -> None:
        """Add a masked vector that a client uploaded."""
        self.add(client, read_masked(self.session, client, upload))

    def total_bytes(self) -> bytes:
        """Return the sum without masks."""
        return self.total().tobytes()


class Round:
    """The clients of a round and their server.

    seconds, said: CPU time and bytes of messages of each client
    """

    def __init__(self, size: int, clients: int, folder: Path) -> None:
        degree, self.threshold = choose_degree(clients, PRIVACY.protection.drop_outs, PRIVACY.protection.colluders)
        self.shares = degree + 1
        self.clients = range(clients)
        self._upload = folder / "upload"
        self._layout = Layout((("weights", (size,)),))
        self._grid = make_plan(PRIVACY, clients).grid
        self._session = Session(os.urandom(16), 1, 0, RESERVED + size, self.threshold, PRIVACY.least)
        self._maskers = [SecAggClient.begin(self._session, client) for client in self.clients]
        self.server = Remote(MaskedServer, self._session, self.clients, neighbours(self.clients, degree))
        self.seconds = [0.0] * clients
        self.said = [0] * clients

    def set_up(self) -> None:
        """Exchange keys, and shares of them."""
        for client, masker in enumerate(self._maskers):
            self._say("adverts", client, self.timed(client, masker.advertise))
        for client, masker in enumerate(self._maskers):
            self._say("shares", client, self.timed(client, masker.share, self.server.call("roster", client)))
        for client, masker in enumerate(self._maskers):
            self.timed(client, masker.receive, self.server.call("inbox", client))

    def protect(self, client: int, weights: np.ndarray, examples: int, reference: int) -> bytes:
        """Return the masked vector of a client with `examples` of the cohort's `reference`; weights: float32 [size]."""
        whole, _ = quantize(weights, examples, reference, self._grid, self._layout)
        return write_masked(self._session, client, self._maskers[client].mask(to_ring(whole, examples)))

    def pretend(self, client: int) -> bytes:
        """Return random numbers in place of a masked vector, which looks the same."""
        self._maskers[client].stage = Stage.MASKED
        return write_masked(self._session, client, np.frombuffer(os.urandom(4 * self._session.size), np.uint32))

    def send(self, client: int, upload: bytes) -> None:
        """Send a masked vector to the server, which adds it."""
        self._upload.write_bytes(upload)
        self.server.call("add_bytes", client, self._upload)

    def finish(self, there: range) -> bytes:
        """Reveal the shares of the clients in `there`; return the sum without masks."""
        survivors = self.server.call("survivors")
        for client in there:
            self._say("reveals", client, self.timed(client, self._maskers[client].reveal, survivors, Revealed()))
        download: bytes = self.server.call("total_bytes")
        self.server.close()
        return download

    def open(self, download: bytes, clients: int, examples: int, reference: int) -> np.ndarray:
        """Return the weighted mean, float32 [size], of `clients` clients with `examples` examples in all."""
        total = from_ring(np.frombuffer(download, np.uint32), examples, clients, self._grid)
        return dequantize(total, examples, reference, self._grid)

    def timed(self, client: int, work: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `work` returns; its time counts for the client."""
        started = time.process_time()
        answer = work(*arguments)
        self.seconds[client] += time.process_time() - started
        return answer

    def _say(self, stage: str, client: int, message: bytes) -> None:
        self.said[client] += len(message)
        self.server.call(stage, client, message)


def measure(size: int, clients: int, many: int, folder: Path, drop_outs: float = 0.0) -> Measures:
    """Measure a round, and the server's memory with `many` clients, not measured for 0.

    drop_outs: the share of clients that drop out after they shared their keys, in a second round of the server
    """
    whole = _play(size, clients, 0, folder)
    if drop_outs:
        whole |= {"server_dropped_s": _play(size, clients, int(drop_outs * clients), folder)["round_s"]}
    return whole | {"memory_many_mb": _memory(size, many, folder) if many else None}


def _play(size: int, clients: int, dropped: int, folder: Path) -> Measures:
    weights, examples = cohort(size, clients)
    reference = sum(examples)
    played = Round(size, clients, folder)
    there = range(dropped, clients)
    played.set_up()
    for client in there:
        upload = played.timed(client, played.protect, client, weights[client], examples[client], reference)
        played.send(client, upload)
    download = played.finish(there)
    for client in there:
        mean = played.timed(client, played.open, download, len(there), sum(examples[dropped:]), reference)
    expected = np.average(np.stack(weights[dropped:]).astype(np.float64), axis=0, weights=examples[dropped:])
    spent = sum(map(sum, played.server.seconds.values()))
    other = int(statistics.median(played.said[dropped:]))
    return {
        **UNAUTHENTICATED,
        "upload_bytes": len(upload) + other,
        "masked_bytes": len(upload),
        "other_bytes": other,
        "download_bytes": len(download),
        "client_s": statistics.median(played.seconds[dropped:]),
        "server_s": spent / clients,
        "once_s": played.server.seconds["total_bytes"][0],
        "round_s": spent,
        "error": float(np.abs(mean - expected).max()),
        "memory_mb": played.server.grown_mb,
        "shares": played.shares,
        "threshold": played.threshold,
    }


def _memory(size: int, clients: int, folder: Path) -> float:
    """Return the memory that a server of many clients grew by, in MB; their vectors are random numbers."""
    played = Round(size, clients, folder)
    played.set_up()
    for client in played.clients:
        played.send(client, played.pretend(client))
    played.finish(played.clients)
    return played.server.grown_mb
