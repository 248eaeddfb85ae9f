"""What a GPU gives: whole rounds of large cohorts on random data, beside the same arithmetic without FedVeil.

`python -m benchmarks gpu` takes less than eight minutes on one GPU and needs nothing but FedVeil and PyTorch: the data is
made here, and all runs share a process. A figure is milliseconds a client: the median round without the first and the
last, divided by the cohort.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks import bare, jobs
from benchmarks.contest import Measures
from benchmarks.data import POOL
from benchmarks.one_run import RoundClock
from benchmarks.report import Grid, short, tables_section
from fedveil.core.errors import SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.models.computing import find_device
from fedveil.simulations.run import run

LONGEST = 420.0  # seconds after which no further row is begun
POPULATION = 20_000
MLP = {"data.dataset": "benchmarks.data:pooled_images", "data.dataset.examples": 600, "model.hidden": jobs.HIDDEN}
LSTM = {
    "data.dataset": "benchmarks.data:pooled_messages", "data.dataset.examples": 64, "model.name": "lstm",
    "data.vocabulary_size": jobs.VOCABULARY, "data.max_tokens": jobs.TOKENS, "training.batch_size": 16,
    "model.embedding": jobs.EMBEDDING, "model.units": jobs.UNITS,
}  # fmt: skip
NOISE = {"privacy.clip": 1.0, "privacy.noise_multiplier": 0.5}
EVALUATES = {"evaluation.federated": True, "data.validation_fraction": 0.1}


@dataclass(frozen=True)
class Row:
    """A row of the table: clients of one kind, a cohort of them, and counted rounds.

    by_hand: also measure the bare loop of the same batches (`bare.by_hand`)
    evaluates: clients evaluate in each round, and that part alone is quoted: what it adds to the row before
    """

    name: str
    cohort: int
    rounds: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    by_hand: bool = False
    evaluates: bool = False


ROWS = (
    *(Row("MLP, batches of 64", cohort, 6, MLP, by_hand=True) for cohort in (100, 1000, 4000)),
    Row("MLP, batches of 10", 1000, 3, {**MLP, "training.batch_size": 10}, by_hand=True),
    Row("MLP, one after another", 20, 3, {**MLP, "engine": "sequential"}),
    *(Row("LSTM", cohort, 4, LSTM) for cohort in (100, 1000)),
    *(Row("preset million", cohort, 4, {"preset": "million"}) for cohort in (1000, 10_000)),
    Row("MLP, with dropout", 1000, 3, {**MLP, "model.dropout": 0.2}),
    Row("MLP, clipped and with noise", 1000, 3, {**MLP, **NOISE}),
    Row("MLP, under secagg's masks", 100, 3, {**MLP, "privacy.protection": "secagg"}),
    Row("MLP, holding a tenth out", 1000, 3, {**MLP, "data.validation_fraction": 0.1}),
    Row("its evaluation by clients", 1000, 3, {**MLP, **EVALUATES}, evaluates=True),
)


def check(settings: Mapping[str, Any]) -> None:
    """Raise SettingsError where there is no GPU, or settings are given, which this benchmark has of its own."""
    for key in settings:
        raise SettingsError(f"--{key}: the rows of `gpu` have their own; leave it out, or name other jobs")
    find_device("cuda")


def experiment(row: Row, device: str) -> Experiment:
    """Return a row as an experiment; the server evaluates before the first round and after the last one only."""
    settings, rounds = dict(row.settings), row.rounds + 2
    preset = settings.pop("preset", None)
    base = Experiment.preset(preset) if preset else Experiment(training={"epochs": 1, "batch_size": 64})
    if not preset:
        settings = {"data.clients": POPULATION, "training.learning_rate": jobs.LEARNING_RATE, **settings}
    every = 1 if row.evaluates else rounds
    return base.override({
        **settings, "name": "gpu", "device": device, "federation.rounds": rounds, "federation.cohort": row.cohort,
        "evaluation.every": every,
    })  # fmt: skip


def measure(
    progress: Callable[[str], None] = lambda _: None, *, rows: Sequence[Row] = ROWS, device: str = "cuda"
) -> Measures:
    """Measure all rows; return them with the device's name. A row for which no time is left is a note."""
    found: list[Measures] = []
    notes: list[str] = []
    started = time.perf_counter()
    for row in rows:
        if time.perf_counter() - started > LONGEST:
            notes.append(f"{row.name}, cohort {row.cohort:,}: not measured, as {LONGEST:.0f} s had passed")
            continue
        found.append(_measure(row, device, found[-1] if found else None))
        line = found[-1]
        progress(f"{row.name}, cohort {row.cohort:,}: {short(line['ms_per_client'])} ms a client")
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU, as a stand-in"
    return {"device": name, "rows": found, "notes": notes, "seconds": time.perf_counter() - started}


def _measure(row: Row, device: str, before: Measures | None) -> Measures:
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    asked = experiment(row, device)
    clock = RoundClock(None, asked.federation.rounds)
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        result = run(asked, out=Path(folder) / "run", display=clock, plots=False)
    ends = clock.ends
    spent = [(after - before) * 1e3 / row.cohort for before, after in pairwise(ends[1:-1])]
    figure = statistics.median(spent)
    if row.evaluates and before is not None:
        figure -= before["ms_per_client"]
    return {
        "name": row.name, "cohort": row.cohort, "ms_per_client": figure, "round_ms_per_client": spent,
        "by_hand_ms_per_client": _by_hand(asked, row, device) if row.by_hand else None,
        "first_round_s": ends[1] - started, "engine": result.summary["engine"],
        "model_sha256": result.summary["model_sha256"],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0,
    }  # fmt: skip


def _by_hand(asked: Experiment, row: Row, device: str) -> float:
    """Return the milliseconds a client of the bare loop: the same batches, drawn and trained on the device."""
    examples, size = asked.data.dataset.settings.examples, int(asked.training.batch_size)
    features = torch.rand(POOL, jobs.PIXELS, device=device)
    labels = torch.randint(jobs.CLASSES, (POOL,), device=device)
    layers = [(weight.to(device), bias.to(device)) for weight, bias in bare.dense_layers()]
    spent = []
    for _ in range(4):
        started = time.perf_counter()
        held = torch.randint(POOL, (row.cohort, examples), device=device)
        layers = bare.by_hand(layers, features, labels, torch.split(held, size, dim=1), jobs.LEARNING_RATE)
        layers[0][0].cpu()  # waits for the device
        spent.append((time.perf_counter() - started) * 1e3 / row.cohort)
    return statistics.median(spent[1:])


def grids(found: Measures) -> list[Grid]:
    """Return the table of the rows."""
    headings = (
        "clients",
        "cohort",
        "ms a client",
        "bare loop by hand",
        "clients a second",
        "first round, s",
        "GB",
        "engine",
    )
    rows = [
        [
            row["name"], f"{row['cohort']:,}", short(row["ms_per_client"]),
            "" if row["by_hand_ms_per_client"] is None else short(row["by_hand_ms_per_client"]),
            short(1e3 / row["ms_per_client"]) if row["ms_per_client"] > 0 else "", f"{row['first_round_s']:.1f}",
            f"{row['peak_gb']:.2f}", row["engine"],
        ]
        for row in found["rows"]
    ]  # fmt: skip
    return [(f"On {found['device']}", headings, rows)]


def section(found: Measures, around: Measures) -> str:
    """Return the page's section as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in around["versions"].items())
    opening = (
        f"Measured on {around['date'][:10]} with `{' '.join(around['command'])}` on one {found['device']}, beside "
        f"{around['machine']['cores']} cores of {around['machine']['processor']}, {versions}; {found['seconds']:.0f} s in all."
    )
    return tables_section(opening, grids(found), found["notes"])
