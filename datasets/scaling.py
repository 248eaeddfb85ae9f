"""The scaling of features: networks learn from numbers of about one size, and users' tables have ages, incomes, pixels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedveil.core.errors import DataError, SettingsError
from fedveil.core.settings.sections import Data

SMALL, LARGE = 0.01, 10.0  # a column whose largest magnitude lies outside is not of the size that networks learn from
CUT = 10.0  # standard deviations: a column that is hardly ever other than 0 would otherwise hold a few huge numbers


@dataclass(frozen=True, eq=False)
class Scaling:
    """Features are less `offset`, divided by `size`, and kept within -`cut` to `cut` where there is one.

    rule: how offset and size were found, and why, in words
    offset, size: float64, each [d]
    """

    rule: str
    offset: np.ndarray
    size: np.ndarray
    cut: float | None = None

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the features [n, d] scaled, float32 [n, d]."""
        scaled: np.ndarray = np.subtract(features, self.offset, dtype=np.float64)
        scaled /= self.size
        if self.cut is not None:
            np.clip(scaled, -self.cut, self.cut, out=scaled)
        return scaled.astype(np.float32)

    def dump(self, columns: Sequence[str]) -> bytes:
        """Return the scaling as JSON, with the columns' names where they have names."""
        told = {"rule": self.rule, "columns": list(columns), "offset": self.offset.tolist(), "size": self.size.tolist()}
        return json.dumps({**told, "cut": self.cut}, indent=1).encode() + b"\n"


def scaling(
    features: np.ndarray, rows: np.ndarray, columns: Sequence[str], data: Data
) -> tuple[Scaling | None, tuple[str, ...]]:
    """Return the scaling that the settings ask for, and what may keep a network from learning, a line each.

    features: of all examples, [n, d]; rows: those to train on, from which it is found, int64 [m]
    columns: their names; empty where they have none
    The statistics are those of all clients' training examples together: counts, means and squares of each would give
    them too. Raise SettingsError where declared ranges do not fit the columns; DataError where a value lies outside.
    """
    if data.ranges is not None:
        return declared(features, columns, data), ()
    train = features[rows]
    notes = _indices(train, columns)
    odd = unusual(train, columns)
    rule = ("standard" if odd else "none") if data.scale == "auto" else data.scale
    if rule == "none":
        said = f"{odd}, and features are not scaled (data.scale = 'none'): a network may learn nothing of them"
        return None, (*notes, *([said] if odd else []))
    why = f"data.scale = '{data.scale}'" + (f": {odd}" if odd and data.scale == "auto" else "")
    if rule == "standard" and data.scale == "auto" and features.dtype == np.uint8:
        zero = np.zeros(features.shape[1])
        return Scaling(f"pixels: 0 to 255 become 0 to 1, as in images ({why})", zero, zero + 255), notes
    if rule == "minmax":
        low, high = train.min(axis=0).astype(np.float64), train.max(axis=0).astype(np.float64)
        return Scaling(f"minmax: 0 to 1 over the training examples ({why})", low, _size(high - low)), notes
    mean, deviation = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    words = f"standard: mean 0 and standard deviation 1 over the training examples, cut at {CUT:g} ({why})"
    return Scaling(words, mean, _size(deviation), CUT), notes


def declared(features: np.ndarray, columns: Sequence[str], data: Data) -> Scaling:
    """Return the scaling to 0 to 1 by `data.ranges`, in which all features [n, d] must lie; raise as `scaling` does."""
    low, high = limits(data, features.shape[1])
    outside = ((features < low) | (features > high)).any(axis=0)
    if outside.any():
        k = int(np.argmax(outside))
        raise DataError(
            f"{_range(features, columns, k)}, outside {low[k]:g} to {high[k]:g}, which data.ranges declares; correct "
            "the value or the range"
        )
    return Scaling("minmax: 0 to 1 over data.ranges", low, high - low)


def limits(data: Data, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the lowest and the highest value that `data.ranges` declares for each of d columns, float64, each [d].

    Raise SettingsError where it does not fit so many columns.
    """
    ranges = np.array(data.ranges, np.float64)
    if len(ranges) not in (1, d):
        raise SettingsError(
            f"data.ranges: names {len(ranges):,} ranges, and the examples have {d:,} columns of features; give one pair for "
            "all, or a pair for each in their order"
        )
    low, high = np.broadcast_to(ranges, (d, 2)).T.copy()
    return low, high


def unusual(features: np.ndarray, columns: Sequence[str]) -> str:
    """Return the column furthest from the size that networks learn from, with its range; empty where none is.

    A column of one small value is passed over: it tells nothing and disturbs nothing.
    """
    low, high = features.min(axis=0).astype(np.float64), features.max(axis=0).astype(np.float64)
    most = np.maximum(np.abs(low), np.abs(high))
    off = np.maximum(most / LARGE, np.where(low < high, SMALL / np.maximum(most, 1e-300), 0))
    k = int(np.argmax(off))
    return _range(features, columns, k) if off[k] > 1 else ""


def _range(features: np.ndarray, columns: Sequence[str], k: int) -> str:
    """Name a column and its range."""
    name = columns[k] if columns else f"{k + 1} of {features.shape[1]}"
    return f"column {name} runs from {features[:, k].min():.6g} to {features[:, k].max():.6g}"


def _indices(features: np.ndarray, columns: Sequence[str]) -> tuple[str, ...]:
    """Return a note for each named column that numbers the examples: it tells nothing, or tells them apart."""
    n = len(features)
    if n < 10 or not columns:
        return ()
    spans = np.flatnonzero(features.max(axis=0) - features.min(axis=0) == n - 1).tolist()
    return tuple(
        f"column {columns[k]} numbers the examples, and is learned from as a feature; leave it out of the file"
        for k in spans
        if (np.diff(np.sort(features[:, k])) == 1).all()
    )


def _size(size: np.ndarray) -> np.ndarray:
    """Return what to divide by: 1 for a column of one value."""
    found: np.ndarray = np.where(size > 0, size, 1.0)
    return found
