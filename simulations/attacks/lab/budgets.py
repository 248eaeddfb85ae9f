"""What a budget of differential privacy costs and buys: accuracy of whole runs beside what attacks recover, by epsilon.

The budgets are of the matrix's columns: each example of a client is protected by its own DP-SGD, whose noise the server
meets in every update. An attack sees one round that spends the whole budget; a run spends it over all its rounds, with
more noise in each. So the attacks are stronger here than on any round of the runs whose accuracy stands beside them.
"""

from __future__ import annotations

import csv
import io
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from fedveil.core.settings.experiment import Experiment
from fedveil.simulations.attacks.lab.matrix import BUDGETS, Cell, budget, here
from fedveil.simulations.run import run

PRESET = "mnist-mlp"
# by the preset that its data allows: rounds in which all clients take a few steps, as noise asks for
RUNS: Mapping[str, Mapping[str, Any]] = {
    "mnist-mlp": {"federation.cohort": 100, "training.batch_size": 60, "training.learning_rate": 0.5},
    "digits": {"federation.cohort": 10, "training.batch_size": 32, "training.learning_rate": 0.3},
}
STEPS = {"federation.rounds": 20, "training.epochs": None, "training.steps": 5}


@dataclass(frozen=True)
class Bought:
    """What one budget costs and buys.

    epsilon: of each example, inf without noise; accuracy: on test data, of a run that spends it
    shares: what each attack recovers, 0 as guessing and 1 all of it, NaN where it cannot be run, by the row's name
    """

    epsilon: float
    accuracy: float
    shares: Mapping[str, float]


def measure(cells: Sequence[Cell], seed: int, progress: Callable[[str], None] = lambda _text: None) -> list[Bought]:
    """Train once with each budget that the matrix has cells of, and without; return them by rising epsilon.

    cells: of the matrix, whose shares are taken
    """
    columns = {cell.column.name for cell in cells}
    found = []
    for epsilon in (*sorted(BUDGETS), math.inf):
        name = "none" if math.isinf(epsilon) else budget(epsilon).name
        if name not in columns:
            continue
        accuracy = trained(epsilon, seed)
        progress(f"a run with {'no noise' if math.isinf(epsilon) else f'epsilon {epsilon:g}'}: accuracy {accuracy:.3f}")
        shares = {cell.row.name: cell.share for cell in cells if cell.column.name == name}
        found.append(Bought(epsilon, accuracy, shares))
    return found


def trained(epsilon: float, seed: int) -> float:
    """Return the test accuracy of a run with a budget of epsilon for each example, or without noise for inf."""
    preset = here(PRESET)
    noise = {} if math.isinf(epsilon) else budget(epsilon).settings
    experiment = Experiment.preset(preset).override({**STEPS, **RUNS[preset], **noise, "seed": seed})
    with tempfile.TemporaryDirectory() as folder:
        result = run(experiment, out=Path(folder) / "run", plots=False)
    return float(result.summary["test_accuracy"])


def table(found: Sequence[Bought]) -> Table:
    """Return budgets, accuracy, and the share that each attack recovers, as a table for a terminal."""
    grid = Table(box=None, pad_edge=False)
    grid.add_column("epsilon of an example", no_wrap=True)
    for each in found:
        grid.add_column(_named(each.epsilon), justify="right", no_wrap=True)
    grid.add_row("accuracy of a run", *(f"{each.accuracy:.3f}" for each in found))
    for row in found[0].shares if found else ():
        grid.add_row(row, *(_share(each.shares[row]) for each in found))
    return grid


def as_csv(found: Sequence[Bought]) -> bytes:
    """Write the budgets as CSV, a row each; empty cells where an attack cannot be run."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = list(found[0].shares) if found else []
    writer.writerow(["epsilon", "accuracy", *names])
    for each in found:
        shares = (each.shares[name] for name in names)
        writer.writerow([
            each.epsilon, f"{each.accuracy:.4f}", *("" if math.isnan(share) else f"{share:.4f}" for share in shares)
        ])  # fmt: skip
    return text.getvalue().encode()


def picture(found: Sequence[Bought]) -> bytes:
    """Draw a PNG: accuracy by epsilon as a thick line, and what each attack recovers as thin ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from fedveil.simulations.attacks.lab.pictures import to_png
    from fedveil.simulations.plots import COLOURS, STYLE

    places = range(len(found))
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.2, 4.2))
        axis.plot(places, [each.accuracy for each in found], color="black", linewidth=2.5, marker="o", label="accuracy")
        rows = [row for row in found[0].shares if any(not math.isnan(each.shares[row]) for each in found)]
        for number, row in enumerate(rows):
            colour, line = COLOURS[number % 6], ("--", ":", "-.")[number // 6 % 3]
            axis.plot(places, [each.shares[row] for each in found], color=colour, linestyle=line, marker=".", label=row)
        axis.set_xticks(places, [_named(each.epsilon) for each in found])
        axis.set(
            xlabel="epsilon of each example", ylabel="accuracy; share recovered, 0 as guessing", ylim=(-0.03, 1.03)
        )
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return to_png(figure)


def _named(epsilon: float) -> str:
    return "no noise" if math.isinf(epsilon) else f"{epsilon:g}"


def _share(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.2f}"
