"""The examples that a client holds out to evaluate on."""

from __future__ import annotations

import numpy as np

from fedveil.core.settings.sections import Data


def hold_out(indices: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split a client's examples at random into a training and a validation part of `m = round(n * fraction)`.

    indices: int64 [n]; the parts are int64 [n - m] and int64 [m], each in the given order. Where fraction > 0 and
    n >= 2, both parts have at least 1 example; a client with one example trains on it.
    """
    n = len(indices)
    chosen = np.zeros(n, bool)
    chosen[rng.permutation(n)[: held_out(np.array(n), fraction)]] = True
    return indices[~chosen], indices[chosen]


def held_out(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Return how many of its examples a client of each size holds out by `hold_out`: int64, in the shape of `sizes`."""
    most = np.maximum(sizes - 1, 0)
    rounded = np.rint(sizes * fraction).astype(np.int64)
    return np.minimum(np.maximum(rounded, 1), most) if fraction > 0 else np.zeros_like(sizes)


def fewest_left(data: Data) -> int:
    """Return the fewest examples that a client trains on: of `data.min_examples`, those that it does not hold out."""
    least = np.array(data.min_examples)
    return int(least - held_out(least, data.validation_fraction))
