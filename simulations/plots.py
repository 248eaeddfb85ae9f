"""Plots of a run: accuracy and loss by round, and the partition of the data."""

from __future__ import annotations

import io
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
MOST_BARS = 60  # limit on clients that are drawn as one bar each
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
    """Draw plots/accuracy.png, plots/loss.png and plots/partition.png of a run; return their paths."""
    experiment, federated = federation.experiment, federation.federated
    drawn = _draw_curves(experiment, _data(experiment, federated), record)
    draw_partition(experiment, federated, record.path("plots") / "partition.png")
    return [*drawn, record.path("plots") / "partition.png"]


def draw_record(record: Record) -> list[Path]:
    """Draw plots/accuracy.png and plots/loss.png from a record alone; return their paths.

    The partition of a run on other machines is not known here.
    """
    experiment = resumable(record.folder)
    return _draw_curves(experiment, experiment.data.dataset.name, record)


def _draw_curves(experiment: Experiment, data: str, record: Record) -> list[Path]:
    import pandas as pd

    metrics = pd.read_csv(record.path("metrics.csv"))
    folder = record.path("plots")
    folder.mkdir(exist_ok=True)
    title = _title(experiment, data)
    _curves(metrics, "accuracy", title, folder / "accuracy.png", experiment.federation.target_accuracy)
    _curves(metrics, "loss", title, folder / "loss.png")
    return [folder / name for name in ("accuracy.png", "loss.png")]


def _title(e: Experiment, data: str) -> str:
    return (
        f"{data}\n{e.federation.strategy}, {e.federation.cohort:,} of {e.data.clients:,} clients a round, seed {e.seed}"
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


def _curves(metrics: pd.DataFrame, what: str, title: str, path: Path, target: float | None = None) -> None:
    """Draw one metric by round, on test and validation data, and the loss on training data too."""
    names = [("test", "test"), ("validation", "validation (clients' own)")]
    names += [("train", "training (clients', local)")] if what == "loss" else []
    with _figure(path, (6, 3.7)) as axes:
        for colour, (part, label) in zip(COLOURS, names, strict=False):
            column = f"{part}_{what}"
            if column in metrics and metrics[column].notna().any():
                rows = metrics[metrics[column].notna()]
                marker = "o" if len(rows) <= 40 else None
                axes.plot(rows["round"], rows[column], color=colour, marker=marker, markersize=3.5, label=label)
        if what == "accuracy":
            if "test_f1" in metrics:
                rows = metrics[metrics["test_f1"].notna()]
                axes.plot(rows["round"], rows["test_f1"], color=COLOURS[2], linestyle="--", label="test F1")
            if target is not None:
                axes.axhline(target, color="0.4", linestyle=":", label=f"target {target:g}")
            axes.set_ylim(top=1.01)
        axes.set_xlabel("round")
        axes.set_ylabel("accuracy, F1" if what == "accuracy" and "test_f1" in metrics else what)
        axes.set_title(title, fontsize=9, loc="left")
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
        _bars(counts, classes, title, path)
    else:
        _heat_map(counts, chosen, population, classes, title, path)


def _bars(counts: np.ndarray, classes: tuple[str, ...], title: str, path: Path) -> None:
    clients = len(counts)
    with _figure(path, (6, 3.7)) as axes:
        import matplotlib as mpl

        # many classes take colours of one scale, which all readers can order
        scale = mpl.colormaps["viridis"](np.linspace(0, 1, len(classes)))
        colours = COLOURS if len(classes) <= len(COLOURS) else scale
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
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(title, fontsize=9, loc="left")
        if len(classes) <= 20:
            axes.legend(title="class", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, fontsize=8)


def _heat_map(
    counts: np.ndarray, chosen: np.ndarray, population: int, classes: tuple[str, ...], title: str, path: Path
) -> None:
    sizes = counts.sum(axis=1)
    shares = counts / np.maximum(sizes[:, None], 1)
    with _figure(path, (7, 4.2), rows=2, height_ratios=(1, 2.4)) as (top, below):
        top.fill_between(np.arange(len(chosen)), sizes, step="mid", color=COLOURS[0], linewidth=0)
        top.set_ylim(bottom=0)
        top.set_ylabel("examples")
        some = "" if len(chosen) == population else f"\n{len(chosen):,} of {population:,} clients, evenly taken"
        top.set_title(f"{title}{some}", fontsize=9, loc="left")
        image = below.imshow(
            shares.T, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest", origin="lower"
        )
        below.grid(visible=False)
        if len(classes) <= 20:
            below.set_yticks(range(len(classes)), classes)
        below.set_ylabel("class")
        below.set_xlabel("client")
        if some:
            ticks = np.linspace(0, len(chosen) - 1, 6).astype(np.int64)
            below.set_xticks(ticks, [f"{chosen[t]:,}" for t in ticks])
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
