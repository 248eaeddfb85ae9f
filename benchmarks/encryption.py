"""The cost of protection, beside TenSEAL as others use it and Flower's SecAgg+, and the targets for it.

One thread, CPU time, medians. Every round of every way runs in a new process, all in turn, several times.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import whole_runs
from benchmarks.contest import Entry, Measures, judged, run_once

PARAMETERS, CLIENTS = 1_000_000, 10
MANY = 100  # clients, with which the server's memory is measured as well
MASKED_PARAMETERS, MASKED_CLIENTS, DROP_OUTS = 55_050, 100, 0.1  # of secure aggregation alone; an MLP 784-64-64-10
WAYS = ("naive", "flare", "plain", "shared-mask", "ckks", "ckks, public API", "bfv", "secagg")
LATTICES = ("ckks", "ckks, public API", "bfv")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
SAID = {
    "upload": "upload, bytes a parameter",
    "download": "download, bytes a parameter",
    "client_ratio": "client CPU a round, of naive's",
    "server_ratio": "server CPU a client, of naive's",
    "memory_growth": f"server memory from {CLIENTS} to {MANY} clients, in uploads",
    "memory_peak": f"server memory at {MANY} clients, in unseeded uploads",
    "authentication": "CPU of authentication, of the client's without it",
    "tag_bytes": "tags, bytes a ciphertext",
    "masked_ratio": "upload without shares, of plain's",
    "added_ms": "CPU added to a client's round, ms",
    "times": "CPU of a run, of the plain run's",
}


@dataclass(frozen=True)
class Target:
    """A target: a row's `quantity`, a key of SAID, is at most `most`."""

    row: str
    quantity: str
    most: float


MASKED_ROW = "secagg, many clients"
SHORT_ROW, LONG_ROW = (job.name for job in whole_runs.JOBS)
TARGETS = (
    Target("ckks", "upload", 5.3),
    Target("ckks, public API", "upload", 20.5),
    Target("bfv", "upload", 3.7),
    Target("ckks", "download", 10.5),
    Target("ckks, public API", "download", 20.5),
    Target("bfv", "download", 7.2),
    *(Target(way, "client_ratio", 0.2) for way in LATTICES),
    Target("ckks", "server_ratio", 0.5),
    Target("ckks, public API", "server_ratio", 0.25),
    Target("bfv", "server_ratio", 0.5),
    *(Target(way, "authentication", 0.25) for way in LATTICES),
    *(Target(way, "tag_bytes", 32) for way in LATTICES),
    *(Target(way, "memory_growth", 1.0) for way in LATTICES),
    *(Target(way, "memory_peak", 2.5) for way in LATTICES),
    Target(MASKED_ROW, "masked_ratio", 1.1),
    Target(SHORT_ROW, "added_ms", 8.0),
    Target(LONG_ROW, "times", 1.05),
)


def measure(settings: dict[str, Any], repeats: int, progress: Callable[[str], None] = lambda _: None) -> Measures:
    """Measure every way, secure aggregation beside Flower's, and whole runs; say which targets are reached.

    settings: changes to the whole runs, such as `engine` and `workers`
    Raises FedveilError where a round fails; where a whole run fails, its figures are left out and `notes` says why.
    """
    runs: dict[str, list[Measures]] = defaultdict(list)
    for turn in range(1, repeats + 1):
        for way in WAYS:
            runs[way].append(run_once(_entry(way, size=PARAMETERS, clients=CLIENTS, many=MANY)))
            progress(f"{turn}/{repeats}  {way}: client {runs[way][-1]['client_s'] * 1e3:.3g} ms a round")
    rows = _compare(runs)
    masked = _masked(repeats, progress)
    whole, notes = whole_runs.measure(settings, repeats, progress)
    found = {row["way"]: row for row in rows} | {MASKED_ROW: masked["fedveil"]} | {row["job"]: row for row in whole}
    times = {way: found[way]["client_s"] * 1e3 for way in ("ckks", "naive", "flare")}
    return {
        "job": "encryption",
        "parameters": PARAMETERS,
        "clients": CLIENTS,
        "many": MANY,
        "ms_per_client": times["ckks"],
        "naive_ms_per_client": times["naive"],
        "flare_ms_per_client": times["flare"],
        "ways": rows,
        "secagg": masked,
        "whole_runs": whole,
        "targets": [
            {"row": target.row, **judged(found.get(target.row, {}), target.quantity, target.most)} for target in TARGETS
        ],
        "versions": {"tenseal": metadata.version("tenseal"), "flwr (peer)": masked["flower"]["version"]},
        "notes": notes,
    }


def _entry(way: str, **settings: Any) -> Entry:
    command = (sys.executable, "-P", "-m", "benchmarks.protected_round", way, json.dumps(settings))
    return Entry("encryption", way, command, environment=dict(ONE_THREAD))


def _compare(runs: dict[str, list[Measures]]) -> list[Measures]:
    """Return a row for each way: medians over its runs, and their ratios to those of naive."""
    middle = {way: _medians(found) for way, found in runs.items()}
    naive = middle["naive"]
    rows = []
    for way, row in middle.items():
        many = row["memory_many_mb"]
        if way in LATTICES:
            added = row["expand_s"] + row["products_s"] + row["pads_s"] + row["check_s"]
            row |= {"authentication": added / (row["client_s"] - added)}
        rows.append({
            "way": way,
            **row,
            "client_s_range": _range(runs[way], "client_s"),
            "server_s_range": _range(runs[way], "server_s"),
            "upload": row["upload_bytes"] / PARAMETERS,
            "download": row["download_bytes"] / PARAMETERS,
            "client_ratio": row["client_s"] / naive["client_s"],
            "server_ratio": row["server_s"] / naive["server_s"],
            "memory_growth": None if many is None else (many - row["memory_mb"]) / (row["upload_bytes"] / 1e6),
            # an aggregate is as large as an upload without seeds
            "memory_peak": None if many is None else many / (row["download_bytes"] / 1e6),
        })  # fmt: skip
    return rows


def _masked(repeats: int, progress: Callable[[str], None]) -> Measures:
    """Measure secure aggregation of many small updates, and Flower's with as many neighbours.

    Flower's runs once, as it takes minutes.
    """
    size, clients = MASKED_PARAMETERS, MASKED_CLIENTS
    own = []
    for turn in range(1, repeats + 1):
        own.append(run_once(_entry("secagg", size=size, clients=clients, many=0, drop_outs=DROP_OUTS)))
        progress(f"{turn}/{repeats}  secagg, {clients} clients: client {own[-1]['client_s'] * 1e3:.3g} ms a round")
    row = _medians(own)
    settings = {"size": size, "clients": clients, "drop_outs": DROP_OUTS}
    settings |= {"shares": own[0]["shares"], "threshold": own[0]["threshold"]}
    script = Path(__file__).with_name("peers") / "flower_secagg.py"
    command = (sys.executable, str(script), json.dumps(settings))
    peer = run_once(Entry("flower", "SecAgg+", command, environment=dict(ONE_THREAD)))
    progress(f"Flower's SecAgg+, {clients} clients: client {peer['client_s'] * 1e3:.3g} ms a round")
    whole = {"parameters": size, "clients": clients, "shares": own[0]["shares"], "threshold": own[0]["threshold"]}
    return whole | {
        name: {**found, "masked_ratio": found["masked_bytes"] / (4 * size)}
        for name, found in (("fedveil", row), ("flower", peer))
    }


def _medians(runs: Sequence[Measures]) -> Measures:
    """Return the median of every number; None where it was not measured."""
    return {key: None if runs[0][key] is None else statistics.median(run[key] for run in runs) for key in runs[0]}


def _range(runs: Sequence[Measures], key: str) -> list[float]:
    return [min(run[key] for run in runs), max(run[key] for run in runs)]
