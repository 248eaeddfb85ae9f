"""The partition of the data as a table for a terminal."""

from __future__ import annotations

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedveil.core.examples import Examples
from fedveil.core.settings.experiment import Experiment
from fedveil.datasets.federated import Federated
from fedveil.datasets.splits import evenly

MOST_ROWS = 20
MOST_MADE = 1000  # limit on clients that make their examples for the summary


def partition_table(experiment: Experiment, federated: Federated) -> RenderableType:
    """Return a table of the examples of each class at the first 20 clients, and a summary of all clients."""
    dataset, population = federated.dataset, experiment.data.clients
    classes = dataset.task.classes or ("all",)  # next_token has none: its examples are counted together
    stored = isinstance(dataset.train, Examples)
    summed = np.arange(population) if stored else evenly(population, MOST_MADE)
    all_counts = federated.counts(summed)  # [clients, classes]
    counts = federated.counts(np.arange(min(population, MOST_ROWS)))
    sizes = all_counts.sum(axis=1)
    held = (all_counts > 0).sum(axis=1)
    made_up = " (made-up data)" if dataset.made_up else ""
    table = Table(
        title=f"{dataset.name}{made_up}: {experiment.data.partition} over {population:,} clients",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("client", justify="right", style="bold")
    table.add_column("examples", justify="right")
    for label in classes[:12]:
        table.add_column(Text(label), justify="right")
    for client, row in enumerate(counts):
        cells = [f"{count:,}" if count else "·" for count in row[:12]]
        table.add_row(str(client), f"{row.sum():,}", *cells)
    more = population - MOST_ROWS
    note = f"… and {more:,} more clients\n" if more > 0 else ""
    note += f"… and {len(classes) - 12} more classes\n" if len(classes) > 12 else ""
    if isinstance(dataset.train, Examples):
        examples, of = f"{len(dataset.train):,} training examples", ""
    else:
        few = len(summed) < population
        examples, of = "each client makes its own", f" ({len(summed):,} clients, evenly taken)" if few else ""
    quantiles = np.percentile(sizes, [0, 50, 100]).astype(int)
    return Group(
        table,
        f"{note}{examples}, {quantiles[0]:,} to {quantiles[2]:,} a client "
        f"(median {quantiles[1]:,}); classes a client: {held.min()} to {held.max()}{of}; "
        f"{len(dataset.test):,} test examples",
        *([f"scale: {dataset.scaling.rule}"] if dataset.scaling else []),
        *(f"note: {note}" for note in dataset.notes),
        *([Text(f"files: {'; '.join(dataset.files)}")] if dataset.files else []),
    )
