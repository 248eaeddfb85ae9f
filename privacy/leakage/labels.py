"""Labels, read from the last bias: its gradient is the network's probability of each class less the truth.

For cross entropy, db_c is the mean over the batch of p_c - [y = c], with p the network's probabilities. So a single
example's class is the only one with a negative gradient (Zhao et al. 2020, "iDLG", section 3). A class with a negative
gradient is in the batch for sure, and the mean of p tells how often (Wainakh et al. 2022, "User-Level Label Leakage
from Gradients in Federated Learning").
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def find(parameters: Mapping[str, np.ndarray], classes: int) -> str | None:
    """Return the name of the bias of the output layer, the last tensor.

    None where that has neither a number for each class nor, for two classes, a single one.
    """
    if not parameters:
        return None
    name, values = list(parameters.items())[-1]
    outputs = (classes, 1) if classes == 2 else (classes,)
    return name if values.ndim == 1 and len(values) in outputs else None


def per_class(gradient: np.ndarray) -> np.ndarray:
    """Return the gradient of a bias as one number a class: of the one logit of two classes, [1], it is the second's."""
    return np.array([-gradient[0], gradient[0]]) if len(gradient) == 1 else gradient


def one(gradient: np.ndarray) -> int:
    """Return the class of the only example: the least entry of the gradient [classes]."""
    return int(gradient.argmin())


def present(gradient: np.ndarray) -> np.ndarray:
    """Return the classes with a negative gradient [classes], which are in the batch for sure: int64 [m], rising."""
    return np.flatnonzero(gradient < 0)


def counts(gradient: np.ndarray, shares: np.ndarray, examples: int) -> np.ndarray:
    """Return how many of a batch's B examples are of each class, int64 [classes].

    They are B (p_c - db_c), rounded so that they add up to B.
    gradient: of the last bias, [classes]; shares: the mean of the network's probabilities over the batch, [classes]
    """
    return whole(examples * (shares - gradient), examples)


def whole(wanted: np.ndarray, total: int) -> np.ndarray:
    """Return whole numbers of at least 0 near `wanted` that add up to `total`, int64 [n].

    The largest remainders are rounded up.
    """
    low, high = float(wanted.min()) - total, float(wanted.max())
    for _ in range(60):  # bisect for the shift at which the parts above zero add up to the total
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(wanted - middle, 0).sum() > total else (low, middle)
    level = np.maximum(wanted - high, 0)
    found = np.floor(level).astype(np.int64)
    left = total - int(found.sum())
    found[np.argsort(found - level, kind="stable")[:left]] += 1
    return found
