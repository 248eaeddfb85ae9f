"""Plots of a run: accuracy and loss by round, and the partition of the data."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedveil.core.record.record import Record, write_atomically
from fedveil.core.settings.choice import Choice
from fedveil.core.settings.experiment import resumable
from fedveil.datasets.federated import Federated
from fedveil.datasets.splits import evenly

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fedveil.core.settings.experiment import Experiment
    from fedveil.server.federation import Federation

# the palette of Okabe and Ito, which all readers can tell apart, in print too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# columns of metrics.csv in each picture, and what they are called there
CURVES = {
    "accuracy": [
        ("test_accuracy", "test accuracy"),
        ("validation_accuracy", "validation accuracy, of clients' own data"),
        ("test_f1", "test F1"),
        ("validation_f1", "validation F1, of clients' own data"),
    ],
    "loss": [
        ("test_loss", "test"),
        ("validation_loss", "validation, of clients' own data"),
        ("train_loss", "training, of clients' own data"),
    ],
}
WIDTH = 92  # characters of a title's line
MOST_BARS = 60  # limit on clients that are drawn as one bar each
MOST_TICKS = 20  # limit on labels of clients
MOST_ROWS = 1000  # limit on clients that are drawn as columns of a heat map
STYLE: Any = {
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def draw(federation: Federation, record: Record) -> list[Path]:
    """Draw plots/accuracy.png, plots/loss.png and plots/partition.png of a run; return their paths.

    What a run has no values of is not drawn.
    """
    experiment, federated = federation.experiment, federation.federated
    drawn = _draw_curves(experiment, _data(experiment, federated), record)
    draw_partition(experiment, federated, record.path("plots") / "partition.png")
    return [*drawn, record.path("plots") / "partition.png"]


def draw_record(record: Record) -> list[Path]:
    """Draw plots/accuracy.png and plots/loss.png from a record alone; return their paths.

    The partition of a run on other machines is not known here. What a run has no values of is not drawn.
    """
    experiment = resumable(record.folder)
    return _draw_curves(experiment, experiment.data.dataset.name, record)


def _draw_curves(experiment: Experiment, data: str, record: Record) -> list[Path]:
    import pandas as pd

    metrics = pd.read_csv(record.path("metrics.csv"))
    folder, title = record.path("plots"), _title(experiment, data)
    folder.mkdir(exist_ok=True)
    drawn = []
    for what in ("accuracy", "loss"):
        curves = {label: metrics[["round", name]].dropna() for name, label in CURVES[what] if name in metrics}
        curves = {label: rows for label, rows in curves.items() if len(rows)}
        if curves:
            drawn.append(folder / f"{what}.png")
            target = experiment.federation.target_accuracy if what == "accuracy" else None
            _curves(curves, what, title, drawn[-1], target)
    return drawn


def _title(e: Experiment, data: str) -> str:
    privacy = e.privacy
    noise = f", noise multiplier {privacy.multiplier:.3g}, clip {privacy.clip}" if privacy.noisy else ""
    protection = f", {privacy.protection.name}" if privacy.protected else ""
    return (
        f"{data}\n{e.federation.strategy}, {e.federation.cohort:,} of {e.data.clients:,} clients a round, "
        f"seed {e.seed}{protection}{noise}"
    )


def _data(e: Experiment, federated: Federated) -> str:
    """Describe the data and its partition in words."""
    name = Path(e.data.path).name if e.data.path else federated.dataset.name
    made_up = " (made-up data)" if federated.dataset.made_up else ""
    return f"{name}{_settings(e.data.dataset)}{made_up}: {e.data.partition}{_settings(e.data.partition)} over {e.data.clients:,} clients"


def _settings(choice: Choice) -> str:
    """Return the settings of a choice in brackets, empty where it has none."""
    told = ", ".join(f"{key} {value}" for key, value in choice.dump().items() if key != "name")
    return f" ({told})" if told else ""


def _wrapped(title: str) -> str:
    return "\n".join(wrap for line in title.splitlines() for wrap in textwrap.wrap(line, WIDTH))


def _curves(curves: dict[str, pd.DataFrame], what: str, title: str, path: Path, target: float | None) -> None:
    """Draw one metric by round, a curve for each column of scores.

    The untrained model's score would flatten all others, so that it is told in the legend alone.
    """
    from matplotlib.ticker import NullFormatter

    with _figure(path, (6, 3.7)) as axes:
        for colour, (label, rows) in zip(COLOURS, curves.items(), strict=False):
            if len(rows) > 1 and rows["round"].iloc[0] == 0:
                label = f"{label} (untrained: {float(rows.iloc[:, 1].iloc[0]):.3g})"
                rows = rows[rows["round"] > 0]
            marker, style = "o" if len(rows) <= 40 else None, "--" if "F1" in label else "-"
            axes.plot(rows["round"], rows.iloc[:, 1], style, color=colour, marker=marker, markersize=3.5, label=label)
        if target is not None:
            axes.axhline(target, color="0.4", linestyle=":", label=f"target {target:g}")
        if what == "loss" and all((rows.iloc[:, 1] > 0).all() for rows in curves.values()):
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
        axes.set_xlabel("round")
        axes.set_ylabel("score" if what == "accuracy" and len(curves) > 1 else what)
        axes.set_title(_wrapped(title), fontsize=9, loc="left")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="lower right" if what == "accuracy" else "upper right")


def draw_partition(experiment: Experiment, federated: Federated, path: Path) -> None:
    """Draw how many examples of each class each client holds.

    Up to 60 clients: a stacked bar each, in the clients' order. More: shares of the classes as a heat map and
    sizes above it, for up to 1,000 clients at even intervals.
    """
    classes, population = federated.dataset.task.classes or ("all",), experiment.data.clients
    chosen = evenly(population, MOST_ROWS)
    counts = federated.counts(chosen)  # [clients, classes]
    title = f"{_data(experiment, federated)}, seed {experiment.seed}"
    if population <= MOST_BARS:
        groups = federated.dataset.group_names
        # with as many clients as sources, client k holds source k
        natural = experiment.data.partition.name == "natural" and len(groups) == population
        _bars(counts, groups if natural else tuple(map(str, range(population))), classes, title, path)
    else:
        _heat_map(counts, chosen, population, classes, title, path)


def _bars(counts: np.ndarray, names: tuple[str, ...], classes: tuple[str, ...], title: str, path: Path) -> None:
    clients = len(counts)
    with _figure(path, (6, 3.7)) as axes:
        import matplotlib as mpl

        # classes have no order, and so no scale: as many different colours as can be told apart
        several = mpl.color_sequences["tab10" if len(classes) <= 10 else "tab20"]
        colours = COLOURS if len(classes) <= len(COLOURS) else several
        bottom = np.zeros(clients)
        for k, label in enumerate(classes):
            axes.bar(
                np.arange(clients),
                counts[:, k],
                bottom=bottom,
                width=0.85,
                color=colours[k % len(colours)],
                label=label,
            )
            bottom += counts[:, k]
        axes.set_xlabel("client")
        axes.set_ylabel("training examples")
        axes.grid(axis="x", visible=False)
        axes.set_xlim(-0.6, clients - 0.4)
        axes.set_ylim(top=1.05 * max(1, counts.sum(axis=1).max()))
        every = -(-clients // MOST_TICKS)
        long = max(map(len, names)) > 3
        axes.set_xticks(
            range(0, clients, every), names[::every], rotation=35 if long else 0, ha="right" if long else "center"
        )
        axes.set_title(_wrapped(title), fontsize=9, loc="left")
        if len(classes) <= 20:
            axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, fontsize=8)


def _heat_map(
    counts: np.ndarray, chosen: np.ndarray, population: int, classes: tuple[str, ...], title: str, path: Path
) -> None:
    from matplotlib.ticker import MaxNLocator

    sizes = counts.sum(axis=1)
    shares = counts / np.maximum(sizes[:, None], 1)
    with _figure(path, (7, 4.2), rows=2, height_ratios=(1, 2.4)) as (top, below):
        edges = np.arange(len(chosen) + 1) - 0.5  # as a column of the image below
        top.stairs(sizes, edges, color=COLOURS[0], fill=True, alpha=0.25)
        top.stairs(sizes, edges, color=COLOURS[0], linewidth=0.8)
        top.set_ylim(0, 1.1 * max(1, sizes.max()))
        top.set_ylabel("examples")
        some = "" if len(chosen) == population else f"\n{len(chosen):,} of {population:,} clients, evenly taken"
        top.set_title(_wrapped(f"{title}{some}"), fontsize=9, loc="left")
        image = below.imshow(shares.T, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest", origin="lower")
        below.grid(visible=False)
        if len(classes) <= 20:
            below.set_yticks(range(len(classes)), classes)
        below.set_ylabel("class")
        below.set_xlabel("client")
        if some:
            ticks = [t for t in MaxNLocator(5, integer=True).tick_values(0, population - 1) if 0 <= t < population]
            below.set_xticks(np.interp(ticks, chosen, np.arange(len(chosen))), [f"{t:,.0f}" for t in ticks])
        below.figure.colorbar(image, ax=[top, below], label="share of the client's examples", pad=0.02)


@contextmanager
def _figure(
    path: Path, size: tuple[float, float], rows: int = 1, height_ratios: tuple[float, ...] = (1,)
) -> Iterator[Any]:
    """Yield the axes of a figure that is written to `path` at the end of the block; `size` is in inches."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # no pyplot: it keeps figures alive, and picks a window system
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes: Axes | np.ndarray = figure.subplots(rows, 1, sharex=rows > 1, height_ratios=height_ratios)
        yield axes
        picture = io.BytesIO()
        figure.savefig(picture, format=path.suffix[1:])
    write_atomically(path, picture.getvalue())
