"""The part of its examples that a client holds out to evaluate on."""

from __future__ import annotations

import numpy as np


def hold_out(indices: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Divide a client's examples at random: indices to train on, and `round(n * fraction)` to evaluate on.

    int64 [n - m], int64 [m], each in the order given. Where fraction > 0 and n >= 2, both parts have at least 1;
    a client with one example trains on it.
    """
    n = len(indices)
    chosen = np.zeros(n, bool)
    chosen[rng.permutation(n)[: held_out(np.array(n), fraction)]] = True
    return indices[~chosen], indices[chosen]


def held_out(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """How many examples clients with so many hold out, as `hold_out` says: int64, in the shape of `sizes` (int64)."""
    most = np.maximum(sizes - 1, 0)
    rounded = np.rint(sizes * fraction).astype(np.int64)
    return np.minimum(np.maximum(rounded, 1), most) if fraction > 0 else np.zeros_like(sizes)
