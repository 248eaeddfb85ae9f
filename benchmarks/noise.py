"""What noise costs, on one thread, in CPU time.

Exact samplers beside the float one, a client's whole share, and a server's clipped sum with noise beside a mean.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from benchmarks.contest import Measures
from benchmarks.report import Grid, tables_section
from fedveil.algorithms.fedavg import weighted_mean
from fedveil.privacy.dp.distributed import contribution, noise_share
from fedveil.privacy.dp.noise import secret_normal
from fedveil.privacy.dp.samplers import gaussian_table, round_within, secret_bytes, skellam_table
from fedveil.server.protection.noise import NoisySum

NUMBERS = 1_000_000
DEVIATIONS = (
    4.0,
    300.0,
    4096.0,
)  # of a client's share in units of rounding: the least that is allowed, and about the most
MODEL = 55_050  # numbers of mnist-mlp
CLIENTS = 1000
SERVERS = {"digits": (64, 128, 64, 10), "mnist-mlp": (784, 64, 64, 10)}  # widths of the layers


def measure(
    repeats: int, say: Callable[[str], None] = lambda _: None, numbers: int = NUMBERS, clients: int = CLIENTS
) -> Measures:
    """Return milliseconds for a million numbers, by what draws them, of one client's share, and of a server's round.

    numbers: drawn in each repeat; clients: of the server's round
    """
    rng = np.random.default_rng(0)
    vector, update = rng.normal(0, 10, numbers), rng.normal(size=MODEL)
    update /= np.linalg.norm(update)
    work: dict[str, Callable[[], object]] = {
        "normal numbers in float64, the operating system's": lambda: secret_normal(numbers),
        "rounding at random": lambda: round_within(vector, 2**60, secret_bytes),
    }
    for name, table_of in (("discrete Gaussian", gaussian_table), ("Skellam", skellam_table)):
        for deviation in DEVIATIONS:
            table = table_of(deviation)
            work[f"{name}, sigma {deviation:,.0f}"] = lambda table=table: table.draw(numbers, secret_bytes)  # type: ignore[misc]
    rows = []
    for name, draw in work.items():
        rows.append({"name": name, "ms_per_million": [ms * 1e6 / numbers for ms in _timed(draw, repeats)]})
        say(f"{name}: {statistics.median(rows[-1]['ms_per_million']):.1f} ms")  # type: ignore[type-var]
    share = noise_share(1.0, 1.0, 2.0**-14, 60, MODEL)
    still = np.zeros(MODEL)
    whole = _timed(lambda: contribution(still, update, 6.0, share, secret_bytes), repeats)
    tables = _timed(lambda: gaussian_table.__wrapped__(share.deviation), repeats)
    server = [_server(name, sizes, clients, repeats) for name, sizes in SERVERS.items()]
    return {"rows": rows, "client_ms": whole, "table_ms": tables, "server": server, "notes": []}


def _server(name: str, layers: Sequence[int], clients: int, repeats: int) -> Measures:
    """Return milliseconds of what a server makes of a round's updates: their mean, and a clipped sum with its noise."""
    rng = np.random.default_rng(0)
    given: dict[str, np.ndarray] = {}
    for before, after in pairwise(layers):
        given |= {f"{before}": rng.normal(size=(after, before)), f"{before}-bias": rng.normal(size=after)}
    model = {key: value.astype(np.float32) for key, value in given.items()}
    rows = {key: np.repeat(value[None] + np.float32(0.01), clients, axis=0) for key, value in model.items()}
    weights = [{key: value[k] for key, value in rows.items()} for k in range(clients)]
    noisy = NoisySum(model, 1.0, clients, 1.0, secret_normal)
    return {
        "name": f"{name}, {clients:,} clients",
        "mean_ms": _timed(lambda: weighted_mean(weights, [1.0] * clients), repeats),
        "noisy_ms": _timed(lambda: noisy.of_updates(weights), repeats),
    }


def _timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Return the milliseconds of CPU time of each repeat, after one that is not counted."""
    work()
    found = []
    for _ in range(repeats):
        started = time.process_time()
        work()
        found.append(1e3 * (time.process_time() - started))
    return found


def grids(found: Measures) -> list[Grid]:
    """Return the tables of a million numbers, of a client's share, and of a server's round."""
    numbers = [[row["name"], *_spread(row["ms_per_million"])] for row in found["rows"]]
    client = [
        [f"rounding and noise of an update of {MODEL:,} numbers", *_spread(found["client_ms"])],
        ["the table of its noise, once in a process", *_spread(found["table_ms"])],
    ]
    headings = ("", "ms", "least to most")
    server = [
        [row["name"], *_spread(row["mean_ms"]), *_spread(row["noisy_ms"])] for row in found["server"]
    ]  # fmt: skip
    wide = ("", "mean, ms", "least to most", "clipped sum and noise, ms", "least to most")
    return [
        ("A million numbers", headings, numbers),
        ("A client's share", headings, client),
        ("A server's round", wide, server),
    ]


def _spread(found: list[float]) -> list[str]:
    return [f"{statistics.median(found):.1f}", f"{min(found):.1f} to {max(found):.1f}"]


def section(found: Measures, around: Measures, repeats: int) -> str:
    """Return the page's section as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in around["versions"].items())
    opening = (
        f"Measured on {around['date'][:10]} with `{' '.join(around['command'])}` on one core of "
        f"{around['machine']['processor']}, {versions}; the median of {repeats} runs. Times are CPU time."
    )
    return tables_section(opening, grids(found), found["notes"])
