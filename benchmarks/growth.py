"""The growth of cost with the cohort, then with the population, for one small network on small clients.

Time should grow with the cohort and hardly with the population; memory with what is kept of the cohort.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contest import Measures, fedveil, run_once
from fedveil.core.settings.experiment import Experiment

COHORTS = (10, 100, 1000, 10_000)  # of a population of 10,000
POPULATIONS = (100, 1000, 10_000, 100_000, 1_000_000)  # a cohort of 100
EXAMPLES, BATCH, HIDDEN, ROUNDS = 20, 10, (32,), 6


def experiment(population: int, cohort: int) -> Experiment:
    """Return an experiment with 32 hidden units, in which each client makes 20 examples and takes two steps."""
    return Experiment(
        name=f"growth-{population}-{cohort}",
        data={
            "dataset": {"name": "synthetic", "examples": EXAMPLES, "spread": 0.0},
            "clients": population,
            "partition": "iid",
        },
        model={"name": "mlp", "hidden": HIDDEN},
        training={"epochs": 1, "batch_size": BATCH, "learning_rate": 0.1},
        federation={"rounds": ROUNDS, "cohort": cohort},
        evaluation={"every": ROUNDS},
    )


def measure(
    settings: dict[str, Any],
    progress: Callable[[str], None] = lambda _: None,
    *,
    cohorts: Sequence[int] = COHORTS,
    populations: Sequence[int] = POPULATIONS,
) -> list[Measures]:
    """Measure a row for each point, by cohorts, then by populations; `settings`: changes to every experiment."""
    points = [("cohort", max(cohorts), cohort) for cohort in cohorts]
    points += [("population", population, 100) for population in populations]
    rows = []
    for grows, population, cohort in points:
        run = run_once(fedveil(experiment(population, cohort).override(settings)))
        round_s = statistics.median(run["round_s"])
        rows.append({
            "grows": grows,
            "population": population,
            "cohort": cohort,
            "ms_per_round": round_s * 1e3,
            "ms_per_client": round_s * 1e3 / cohort,
            "first_round_s": run["first_round_s"],
            "memory_mb": run["memory_mb"],
            "engine": run["engine"],
        })  # fmt: skip
        progress(f"growth  {cohort:,} of {population:,} clients: {round_s * 1e3:.3g} ms a round")
    return rows


def draw(rows: list[Measures], path: Path) -> None:
    """Draw time and memory over the cohort and over the population, all axes logarithmic."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fedveil.simulations.plots import COLOURS, STYLE

    curves = (("ms_per_round", "ms a round"), ("ms_per_client", "ms a client"), ("memory_mb", "peak memory, MB"))
    with mpl.rc_context({**STYLE, "savefig.dpi": 110}):
        figure = Figure(figsize=(7.5, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, grows in zip(figure.subplots(1, 2, sharey=True), ("cohort", "population"), strict=True):
            points = [row for row in rows if row["grows"] == grows]
            for colour, (key, label) in zip(COLOURS, curves, strict=False):
                x, y = [row[grows] for row in points], [row[key] for row in points]
                axes.loglog(x, y, color=colour, marker="o", markersize=3.5, label=label)
            other = "population" if grows == "cohort" else "cohort"
            axes.set_title(f"{other} {points[0][other]:,}", fontsize=9, loc="left")
            axes.set_xlabel(f"{grows}, clients")
            if grows == "cohort":
                axes.legend(fontsize=8)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
