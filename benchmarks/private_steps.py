"""The cost of DP-SGD: a private step beside a plain one in turn, and beside Opacus' ghost clipping.

One thread, CPU time, made-up examples, and one client that holds them all. A private step draws its batch by coins,
clips each example's gradient and adds noise from the seed; a plain one takes the next batch of a pass. Both are measured
by training for some steps, with all that belongs to it, in turn; the quoted ratio is the median over turns. The
allocator keeps the memory that was freed, for all contestants.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contest import Entry, Measures, judged, run_once
from benchmarks.encryption import ONE_THREAD
from benchmarks.peers.opacus_steps import CLASSES, TOKENS, WORDS, made_up
from benchmarks.report import Grid, short, tables_section, verdict

OPACUS = Path(".venv-opacus", "bin", "python")
# without it, in some processes and not in others, the allocator gives memory back to the system in every step
KEPT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 26), "MALLOC_TRIM_THRESHOLD_": str(1 << 28)}
TURNS = 9  # of a process, in which plain and private steps alternate
SLOWER = 3.0  # Opacus' step in private steps of ours, at least


@dataclass(frozen=True)
class Job:
    """A network and an expected batch; `steps` of a turn; `most`: the target for a private step in plain ones."""

    name: str
    network: str
    batch: int
    steps: int
    most: float


JOBS = (
    Job("MLP 784-64-64-10", "mlp", 256, 80, 1.7),
    Job("MLP 784-64-64-10", "mlp", 1024, 30, 1.4),
    Job("bag of words 4,000 x 64, 32 hidden", "bag", 256, 40, 1.7),
    Job("LSTM 4,000 x 32, 64 units", "lstm", 256, 4, 1.4),
)


def measure(repeats: int, progress: Callable[[str], None] = lambda _: None, opacus: Path = OPACUS) -> Measures:
    """Measure every job in `repeats` processes, and Opacus in turn where the Python `opacus` is there.

    Raises FedveilError where a process fails.
    """
    peer = opacus.absolute()
    notes = [] if peer.is_file() else [f"Opacus: not measured, there is no {opacus} here; see peers/opacus_steps.py"]
    rows = []
    for job in JOBS:
        own, other = [], []
        for _ in range(repeats):
            own.append(run_once(_entry("FedVeil", job, (sys.executable, "-P", "-m", "benchmarks.private_steps"))))
            if not notes:
                script = Path(__file__).with_name("peers") / "opacus_steps.py"
                other.append(run_once(_entry("Opacus", job, (str(peer), "-P", str(script)))))
        row: Measures = {"job": job.name, "batch": job.batch}
        row |= {key: statistics.median(run[key] for run in own) for key in ("plain_ms", "private_ms", "ratio")}
        row |= {"opacus_ms": statistics.median(run["ms"] for run in other) if other else None}
        row["opacus_ratio"] = row["opacus_ms"] / row["private_ms"] if other else None
        row["targets"] = [
            judged(row, "ratio", job.most), _at_least(row["opacus_ratio"], SLOWER),
        ]  # fmt: skip
        rows.append(row)
        progress(f"{job.name}, batch {job.batch}: {row['private_ms']:.3g} ms, {row['ratio']:.2f} plain steps")
    versions = {"opacus (peer)": other[0]["version"]} if other else {}
    return {"job": "private", "rows": rows, "versions": versions, "notes": notes}


def grids(found: Measures) -> list[Grid]:
    """Return the table of the rows."""
    headings = (
        "network", "batch", "plain, ms", "private, ms", "private / plain", "at most", "", "Opacus, ms",
        "Opacus / private", "at least", "",
    )  # fmt: skip
    rows = []
    for row in found["rows"]:
        plain, peer = row["targets"]
        rows.append([
            row["job"], f"{row['batch']:,}", short(row["plain_ms"]), short(row["private_ms"]), f"{row['ratio']:.2f}",
            f"{plain['most']:.2g}", verdict(plain)[1], "" if peer["found"] is None else short(row["opacus_ms"]),
            "" if peer["found"] is None else f"{peer['found']:.1f}", f"{peer['least']:.2g}", verdict(peer)[1],
        ])  # fmt: skip
    return [("CPU time of a step of DP-SGD, one thread", headings, rows)]


def section(found: Measures, around: Measures, repeats: int) -> str:
    """Return the page's section as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in (around["versions"] | found["versions"]).items())
    opening = (
        f"Measured on {around['date'][:10]} with `{' '.join(around['command'])}` on one core of "
        f"{around['machine']['processor']}, {versions}; medians of {repeats} processes."
    )
    return tables_section(opening, grids(found), found["notes"])


def _entry(contestant: str, job: Job, command: tuple[str, ...]) -> Entry:
    settings = json.dumps({"job": job.network, "batch": job.batch, "steps": job.steps})
    return Entry(contestant, f"{job.name}, {job.batch}", (*command, settings), environment={**ONE_THREAD, **KEPT})


def _at_least(found: float | None, least: float) -> Measures:
    return {
        "quantity": "opacus_ratio", "least": least, "found": found, "reached": None if found is None else found >= least,
    }  # fmt: skip


def steps(network: str, batch: int, number: int) -> dict[str, Any]:
    """Return the medians over turns of the milliseconds of a plain and a private step, and of their ratio."""
    import numpy as np
    import torch

    from fedveil.core.examples import Examples, Task
    from fedveil.core.randomness import Stream
    from fedveil.core.settings.choice import Model
    from fedveil.core.settings.sections import Training
    from fedveil.models import parameters as weights
    from fedveil.models.local.private import Private, private_way, seeded
    from fedveil.models.local.private import made_up as probe
    from fedveil.models.local.training import train_clients
    from fedveil.models.networks.build import build
    from fedveil.models.vectorized.looped import Looped

    torch.set_num_threads(1)
    if network == "mlp":
        task, model = Task("images", (1, 28, 28), tuple(map(str, range(CLASSES)))), Model(hidden=(64, 64))
    else:
        task = Task("text", (TOKENS,), ("ham", "spam"), vocabulary_size=WORDS)
        bag = Model(name="mlp", embedding=64, hidden=(32,))
        model = bag if network == "bag" else Model(name="lstm", pooling="last")
    examples = Examples(*made_up(task.kind))
    client = examples.select(np.arange(len(examples)))  # of a data set, which no training copies
    built = build(task, model, Stream(0))
    way = private_way(built, probe(built, examples.features))
    assert not isinstance(way, Looped)
    start, training = weights.get(built), Training(steps=number, batch_size=batch, learning_rate=0.01)
    private = Private(1.0, np.ones(1), seeded)

    def spent(turn: int, protection: Private | None) -> float:
        began = time.process_time()
        train_clients(
            built, start, [client], training, 0.01, [Stream(0, turn)], classes=len(task.classes), together=way,
            private=protection,
        )  # fmt: skip
        return (time.process_time() - began) / number * 1e3

    turns = [(spent(turn, None), spent(turn, private)) for turn in range(TURNS + 1)][1:]  # the first one warms up
    return {
        "plain_ms": statistics.median(plain for plain, _ in turns),
        "private_ms": statistics.median(own for _, own in turns),
        "ratio": statistics.median(own / plain for plain, own in turns),
    }


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(steps(asked["job"], asked["batch"], asked["steps"])))
