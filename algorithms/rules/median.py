"""The coordinate-wise median: Yin et al. 2018, "Byzantine-Robust Distributed Learning", definition 1, algorithm 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedveil.algorithms.algorithm import Algorithm, Arrays
from fedveil.core.declaration import part
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import NoSettings


def median(weights: Sequence[Arrays]) -> Arrays:
    """Return the median of each weight over the clients, float32."""
    return {name: np.median(np.stack([own[name] for own in weights]), axis=0) for name in weights[0]}


@part(needs="each", why="a median compares updates")
def fedmedian(_settings: NoSettings, _: Experiment) -> Algorithm:
    """Return the coordinate-wise median as an algorithm."""
    return Algorithm(rule=lambda cohort: median(cohort.weights))
