"""One round under one protection, with the clients in this process and the server in another.

`python -m benchmarks.protected_round WAY SETTINGS_AS_JSON STARTED` prints a JSON line. Seconds are CPU time of the
process that did the work; memory is what the server's process grew by. Uploads are passed as files.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import masked_round, own_ways
from benchmarks.peers import tenseal_ways
from benchmarks.remote import UNAUTHENTICATED, Measures, Remote, cohort

OPENINGS = 3  # times that the same download is opened; the median counts
# The client and the server of each way, made from the folder that they share and the numbers of weights and clients.
WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "naive": (tenseal_ways.NaiveClient, tenseal_ways.NaiveServer),
    "flare": (tenseal_ways.FlareClient, tenseal_ways.FlareServer),
    "plain": (own_ways.PlainClient, own_ways.PlainServer),
    "shared-mask": (own_ways.SharedMaskClient, own_ways.SharedMaskServer),
    "ckks": (partial(own_ways.LatticeClient, "ckks"), partial(own_ways.LatticeServer, "ckks")),
    "ckks, public API": (
        partial(own_ways.LatticeClient, "ckks", compact=False),
        partial(own_ways.LatticeServer, "ckks"),
    ),
    "bfv": (partial(own_ways.LatticeClient, "bfv"), partial(own_ways.LatticeServer, "bfv")),
}


def measure(way: str, size: int, clients: int, many: int, folder: Path) -> Measures:
    """Measure a round, and the server's memory with `many` clients, which repeat the same uploads.

    `naive` adds uploads as they come, which is faster. For its memory it holds them, for `clients` and for one, and the
    difference gives the memory of each.
    """
    weights, examples = cohort(size, clients)
    reference = sum(examples)
    make_client, make_server = WAYS[way]
    client = make_client(folder, size, clients)
    server = Remote(make_server, folder, size, clients)
    protecting, opening, sizes = [], [], []
    path = folder / "upload"
    for number in range(clients):
        started = time.process_time()
        upload = client.protect(weights[number], number, examples[number], reference)
        protecting.append(time.process_time() - started)
        sizes.append(path.write_bytes(upload))
        server.call("add", path, number, examples[number], reference)
    download = server.call("total")
    tags_s = server.call("tag_seconds") if hasattr(client, "parts") else None
    server.close()
    for _ in range(OPENINGS):
        started = time.process_time()
        mean = client.open(download, clients, reference)
        opening.append(time.process_time() - started)
    expected = np.average(np.stack(weights).astype(np.float64), axis=0, weights=examples)
    once = server.seconds["total"][0]
    found = {
        "upload_bytes": max(sizes),
        "download_bytes": len(download),
        "client_s": statistics.median(protecting) + statistics.median(opening),
        "server_s": (sum(server.seconds["add"]) + once) / clients,
        "once_s": once,
        "error": float(np.abs(mean - expected).max()),
        "memory_mb": server.grown_mb,
        **UNAUTHENTICATED,
    }
    if tags_s is not None:
        parts = {part: statistics.median(seconds) for part, seconds in client.parts.items()}
        found |= parts | {"tags_s": tags_s, "tag_bytes": client.tag_bytes}
    if way == "naive":
        few, all_of_them = (
            memory_mb(make_client, tenseal_ways.HoldingServer, size, held, clients, folder) for held in (1, clients)
        )
        each = (all_of_them - few) / (clients - 1)
        return found | {"memory_mb": all_of_them, "memory_many_mb": None, "memory_each_mb": each}
    return found | {"memory_many_mb": memory_mb(make_client, make_server, size, many, clients, folder)}


def memory_mb(
    make_client: Callable[..., Any],
    make_server: Callable[..., Any],
    size: int,
    clients: int,
    uploads: int,
    folder: Path,
) -> float:
    """Return the memory by which a server of `clients` grows, in MB; they send the same few uploads in turn."""
    weights, examples = cohort(size, uploads)
    client, reference = make_client(folder, size, clients), sum(examples)
    paths = [folder / f"upload-{number}" for number in range(uploads)]
    for number, path in enumerate(paths):
        path.write_bytes(client.protect(weights[number], number, examples[number], reference))
    server = Remote(make_server, folder, size, clients)
    for turn in range(clients):
        number = turn % uploads
        server.call("add", paths[number], number, examples[number], reference)
    server.call("total")
    server.close()
    return server.grown_mb


def main(way: str, settings: str, _started: str) -> None:
    """Print a round's figures, and keep the warnings of TenSEAL's C++ code off standard output."""
    printed = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    with tempfile.TemporaryDirectory() as folder:
        run = masked_round.measure if way == "secagg" else partial(measure, way)
        found = run(**json.loads(settings), folder=Path(folder))
    os.write(printed, json.dumps(found).encode() + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
