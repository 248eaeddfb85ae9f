"""Examples to learn from, and the task they pose: what data sets give and networks take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Examples:
    """Features and labels of n examples.

    features: images float32 [n, channels, height, width] in [0, 1]; tabular float32 [n, d];
        text int32 [n, tokens], padded at the end with 0 (`text.PADDING`)
    labels: int64 [n], an index into `Task.classes`
    """

    features: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Examples:
        """A copy of the examples at `indices` (int64 [m]), in that order."""
        return Examples(self.features[indices], self.labels[indices])

    def select(self, indices: np.ndarray) -> Selection:
        """As `take`, copied only when they are read."""
        return Selection(self, indices)


class Selection(Examples):
    """Examples that are rows of others: what many clients hold of one data set is not copied to be trained on.

    source: the others; rows: int64 [n]
    """

    source: Examples
    rows: np.ndarray

    def __init__(self, source: Examples, rows: np.ndarray) -> None:
        self.__dict__.update(source=source, rows=rows)  # frozen, as Examples are

    @cached_property
    def features(self) -> np.ndarray:
        """A copy of the rows."""
        copied: np.ndarray = self.source.features[self.rows]
        return copied

    @cached_property
    def labels(self) -> np.ndarray:
        """A copy of the rows."""
        copied: np.ndarray = self.source.labels[self.rows]
        return copied

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: np.ndarray) -> Selection:
        """Rows of the same source."""
        return Selection(self.source, self.rows[indices])


@dataclass(frozen=True)
class Task:
    """What a network must fit: the shape of one example, and the classes to tell apart.

    kind: what one example is
    shape: of one example: (channels, height, width), (d,), or (tokens,)
    classes: names of the classes; where there are two, the second is the positive one (spam)
    vocabulary_size: for text, the number of word ids, padding (0) and unknown (1) included; else 0
    """

    kind: Literal["images", "features", "text"]
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    vocabulary_size: int = 0
