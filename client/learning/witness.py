"""A simulation's record of unprotected contributions, with which a protected sum is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


class Witness:
    """The contributions of a round, as clients made them."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Mapping[str, np.ndarray], int]] = {}

    def saw(self, client: int, weights: Mapping[str, np.ndarray], examples: int) -> None:
        """Record one client's weights and the number of its examples."""
        self._made[client] = weights, examples

    def error(self, model: Mapping[str, np.ndarray], clients: Sequence[int]) -> float:
        """Return the largest distance of `model` from the mean of these clients' weights, in float64.

        The record is cleared.
        """
        made = [self._made[client] for client in clients]
        total = sum(examples for _, examples in made)
        largest = 0.0
        for name, value in model.items():
            mean = np.zeros(value.shape)
            for weights, examples in made:
                mean += weights[name] * np.float64(examples / total)
            largest = max(largest, float(np.abs(mean - value).max(initial=0.0)))
        self._made.clear()
        return largest
