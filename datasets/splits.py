"""Test parts for data sets that have none; they are the same for every seed, so that runs can be compared."""

from __future__ import annotations

import numpy as np

from fedveil.core.errors import DataError
from fedveil.core.randomness import Stream

Split = tuple[np.ndarray, np.ndarray]  # int64 [n - m] to train on, int64 [m] to test on


def shuffled(n: int, fraction: float) -> Split:
    """Split n examples at random, `round(n * fraction)` of them into the test part; each part gets at least 1.

    Raise DataError for fewer than two examples.
    """
    if n < 2:
        raise DataError(f"{n} example(s) cannot be split into a training and a test part; at least 2 are needed")
    order = Stream(0).generator("test split").permutation(n)
    m = min(max(round(n * fraction), 1), n - 1)
    return order[m:], order[:m]


def stratified(labels: np.ndarray, fraction: float) -> Split:
    """Split examples at random, about `n_c * fraction` of each class c into the test part, and about that share of all.

    labels: int64 [n]. A class keeps at least 1 example to train on, and gives no more than its share rounded up: where
    many classes have 1 example, the test part is smaller. Raise DataError where no class has 2 examples.
    """
    order = Stream(0).generator("test split").permutation(len(labels))
    by_label = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    place = np.arange(len(labels)) - np.repeat(starts, sizes)  # the index of each example within its class
    if sizes.max(initial=0) < 2:
        raise DataError(
            f"no class of the {len(labels)} examples has 2, one to train on and one to test on; "
            "labels that are numbers to be predicted are no classes"
        )
    to_test = _shares(sizes, fraction, order[np.minimum(starts, len(labels) - 1)])
    test = np.zeros(len(labels), bool)
    test[by_label[place < np.repeat(to_test, sizes)]] = True
    return order[~test[order]], order[test[order]]


def _shares(sizes: np.ndarray, fraction: float, ties: np.ndarray) -> np.ndarray:
    """Return how many examples of classes of these sizes (int64 [c]) are tested: int64 [c].

    Each class's share is rounded, if that gives the share of all within a tenth. It does not where classes are many and
    small: there shares are rounded by largest remainder (Hamilton's method), so that the total is as asked.
    ties: distinct numbers [c], by which equal remainders are ordered
    """
    most = np.maximum(sizes - 1, 0)
    asked = max(round(int(sizes.sum()) * fraction), 1)
    rounded: np.ndarray = np.clip(np.rint(sizes * fraction), 0, most).astype(np.int64)
    if abs(int(rounded.sum()) - asked) <= asked / 10:
        return rounded
    quotas = np.round(sizes * fraction, 9)  # 0.29 * 100 is 28.999999999999996
    most = np.minimum(np.ceil(quotas), most).astype(np.int64)
    shares: np.ndarray = np.minimum(np.floor(quotas).astype(np.int64), most)
    ranked = np.lexsort((ties, shares - quotas))  # the largest remainder first
    ranked = ranked[shares[ranked] < most[ranked]]
    shares[ranked[: max(asked - int(shares.sum()), 0)]] += 1
    return shares


def evenly(clients: int, most: int) -> np.ndarray:
    """Return up to `most` clients, evenly spaced among all: int64 [min(clients, most)], ascending."""
    return np.linspace(0, clients - 1, min(clients, most)).astype(np.int64)
