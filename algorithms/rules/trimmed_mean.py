"""The coordinate-wise trimmed mean: Yin et al. 2018, "Byzantine-Robust Distributed Learning", definition 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field

from fedveil.algorithms.algorithm import Algorithm, Arrays
from fedveil.core.declaration import part
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import Section


class TrimmedMean(Section):
    """Settings of the trimmed mean."""

    fraction: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.2, description="share of the clients' values cut off at each end"
    )


def trimmed_mean(weights: Sequence[Arrays], fraction: float) -> Arrays:
    """Return the mean of each weight over the clients, without its smallest and largest values, float32.

    fraction: the share cut off at each end. As in Flower, the number is rounded down in floating point: 0.29 of 100 is
        28.
    """
    clients = len(weights)
    cut = int(fraction * clients)

    def trim(values: np.ndarray) -> np.ndarray:  # [clients, ...] -> [...]
        inner = np.partition(values, (cut, clients - cut - 1), axis=0)[cut : clients - cut]
        return np.asarray(np.mean(inner, axis=0))

    return {name: trim(np.stack([own[name] for own in weights])) for name in weights[0]}


@part(TrimmedMean, needs="each", why="a trimmed mean compares updates")
def fedtrimmedavg(settings: TrimmedMean, _: Experiment) -> Algorithm:
    """Return the coordinate-wise trimmed mean as an algorithm."""
    return Algorithm(rule=lambda cohort: trimmed_mean(cohort.weights, settings.fraction))
