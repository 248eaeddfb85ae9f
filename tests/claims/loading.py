"""How long a large file of a user's own takes to load, beside pandas."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fedveil.core.settings.sections import Data
from fedveil.datasets.own.own import own

ROWS, COLUMNS = 1_000_000, 10
MOST = 3.0  # times what pandas takes
REPEATS = 5


@dataclass(frozen=True)
class Loading:
    """Median seconds of processor time: of `own`, which divides into training and test part, and of `pandas.read_csv`."""

    own: float
    pandas: float

    @property
    def holds(self) -> bool:
        """Whether loading takes at most MOST times what pandas takes."""
        return self.own <= MOST * self.pandas


def measure(rows: int = ROWS, repeats: int = REPEATS) -> Loading:
    """Load a CSV file of random numbers both ways in turn."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.standard_normal((rows, COLUMNS)), columns=[f"x{i}" for i in range(COLUMNS)])
    frame.insert(0, "label", rng.choice(list("abc"), rows))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "numbers.csv"
        frame.to_csv(path, index=False)
        data = Data(dataset="own", path=str(path))
        seconds = [(_timed(lambda: own(data)), _timed(lambda: pd.read_csv(path))) for _ in range(repeats)]
    return Loading(*(statistics.median(times) for times in zip(*seconds, strict=True)))


def _timed(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def section(found: Loading) -> str:
    """The section on loading."""
    return f"""
## A large file of your own

A CSV file of {ROWS:,} rows of {COLUMNS} numbers loads in {found.own:.1f} s of processor time, {found.own / found.pandas:.1f} times what `pandas.read_csv` takes
({found.pandas:.1f} s){"" if found.holds else f" (missed: at most {MOST:g})"}; medians of {REPEATS}.
"""
