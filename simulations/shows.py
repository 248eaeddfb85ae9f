"""Who holds what, as a table for a terminal."""

from __future__ import annotations

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedveil.core.experiment import Experiment
from fedveil.datasets.federated import Federated

MOST_ROWS = 20


def partition_table(experiment: Experiment, federated: Federated) -> RenderableType:
    """Examples of each class at each client, the first 20 clients, and a summary of all."""
    dataset, partition = federated.dataset, federated.partition
    classes = dataset.task.classes
    counts = partition.counts(dataset.train.labels, len(classes))  # [clients, classes]
    sizes = counts.sum(axis=1)
    held = (counts > 0).sum(axis=1)
    made_up = " (made-up data)" if dataset.made_up else ""
    table = Table(
        title=f"{dataset.name}{made_up}: {experiment.data.partition} over {partition.clients:,} clients",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("client", justify="right", style="bold")
    table.add_column("examples", justify="right")
    for label in classes[:12]:
        table.add_column(Text(label), justify="right")
    for client in range(min(partition.clients, MOST_ROWS)):
        cells = [f"{count:,}" if count else "·" for count in counts[client, :12]]
        table.add_row(str(client), f"{sizes[client]:,}", *cells)
    more = partition.clients - MOST_ROWS
    note = f"… and {more:,} more clients\n" if more > 0 else ""
    note += f"… and {len(classes) - 12} more classes\n" if len(classes) > 12 else ""
    quantiles = np.percentile(sizes, [0, 50, 100]).astype(int)
    return Group(
        table,
        f"{note}{len(dataset.train):,} training examples, {quantiles[0]:,} to {quantiles[2]:,} a client "
        f"(median {quantiles[1]:,}); classes a client: {held.min()} to {held.max()}; "
        f"{len(dataset.test):,} test examples",
    )
