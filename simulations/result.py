"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


@dataclass(frozen=True)
class Result:
    """The result of a run.

    run_dir: the folder of the record
    metrics: a row for each round, as in metrics.csv
    clients: a row for each client in each round, as in clients.csv
    model: the trained network, in evaluation mode, on the CPU
    summary: what `fedveil run --json` prints
    """

    run_dir: Path
    metrics: pd.DataFrame
    clients: pd.DataFrame
    model: nn.Module
    summary: dict[str, Any]
