"""What readers of a user's files share: labelled examples, where each is, what was not read, and a CSV file's columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Table:
    """Labelled examples as a file has them.

    labels: [n], as words
    place: the function from example i to where it is, for errors: "reviews.csv, line 3"
    texts: [n]; None for other kinds
    features: float64 or uint8 [n, d], to be scaled, or images, float32 [n, c, h, w] in [0, 1]; None for text
    columns: names of the features of a CSV file
    sources: [n], as words; None where no column names them
    notes: what of the file was left out or changed, with counts
    """

    kind: Literal["text", "features", "images"]
    labels: list[str]
    place: Callable[[int], str]
    texts: list[str] | None = None
    features: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    sources: list[str] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Header:
    """The columns of a CSV file.

    line: of the header, the first is 1; before it are blank lines, and Excel's line `sep=;`
    width: columns of the header, empty ones at its end included; named: without these
    label, text, source: indices of columns; take: those of the features
    """

    separator: str
    line: int
    names: tuple[str, ...]
    width: int
    label: int
    text: int | None
    source: int | None
    take: tuple[int, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The features' names."""
        return tuple(self.names[i] for i in self.take)


def count(number: int, noun: str) -> str:
    """Write a number with its noun, as in `1 row` and `2 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
