"""Labels, read from the last bias: its gradient is what the network thought of each class less what was true.

For cross entropy, db_c is the mean over the batch of p_c - [y = c], with p the network's probabilities. So a single
example's class is the only one with a negative gradient (Zhao et al. 2020, "iDLG", section 3), a class with a negative
gradient is in the batch for sure, and how often follows from the mean of p (Wainakh et al. 2022, "User-Level Label
Leakage from Gradients in Federated Learning").
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def find(parameters: Mapping[str, np.ndarray], classes: int) -> str | None:
    """The name of the bias of the output layer, the last tensor; None where that is no number a class, or one for two."""
    if not parameters:
        return None
    name, values = list(parameters.items())[-1]
    outputs = (classes, 1) if classes == 2 else (classes,)
    return name if values.ndim == 1 and len(values) in outputs else None


def per_class(gradient: np.ndarray) -> np.ndarray:
    """The gradient of a bias as one number a class; of the one logit of two classes, [1], that of the second is it."""
    return np.array([-gradient[0], gradient[0]]) if len(gradient) == 1 else gradient


def one(gradient: np.ndarray) -> int:
    """The class of the only example: the least entry of the gradient [classes]."""
    return int(gradient.argmin())


def present(gradient: np.ndarray) -> np.ndarray:
    """Classes that are in the batch for sure, those with a negative gradient [classes]: rising, int64 [m]."""
    return np.flatnonzero(gradient < 0)


def counts(gradient: np.ndarray, shares: np.ndarray, examples: int) -> np.ndarray:
    """How many of a batch's B examples are of each class: B (p_c - db_c) in whole numbers that add up to B, int64 [classes].

    gradient: of the last bias, [classes]; shares: the mean of the network's probabilities over the batch, [classes]
    """
    return whole(examples * (shares - gradient), examples)


def whole(wanted: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of at least 0 near `wanted` that add up to `total`, the largest remainders rounded up: int64 [n]."""
    low, high = float(wanted.min()) - total, float(wanted.max())
    for _ in range(60):  # the shift at which what is left above zero adds up to the total
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(wanted - middle, 0).sum() > total else (low, middle)
    level = np.maximum(wanted - high, 0)
    found = np.floor(level).astype(np.int64)
    left = total - int(found.sum())
    found[np.argsort(found - level, kind="stable")[:left]] += 1
    return found
