"""FedAvg.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedveil.algorithms.algorithm import Algorithm, Arrays, Cohort
from fedveil.core.declaration import part
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import NoSettings


def weighted_mean(weights: Sequence[Arrays], examples: Sequence[float]) -> Arrays:
    """Return sum_k n_k w_k / sum_k n_k, float32, summed in the given order; n_k = examples[k].

    All products n_k w_k / n share one array for each name; keeping those of a cohort would double its memory.
    """
    total = sum(examples)
    mean: dict[str, np.ndarray] = {}
    product: dict[str, np.ndarray] = {}
    for arrays, count in zip(weights, examples, strict=True):
        share = count / total
        if not mean:
            mean = {name: array * share for name, array in arrays.items()}
            product = {name: np.empty_like(array) for name, array in mean.items()}
            continue
        for name, array in arrays.items():
            np.multiply(array, share, out=product[name])
            mean[name] += product[name]
    return mean


def mean(cohort: Cohort) -> Arrays:
    """Return the mean of the clients' weights, weighted by examples."""
    return weighted_mean(cohort.weights, cohort.examples)


@part(needs="sum")
def fedavg(_settings: NoSettings, _: Experiment) -> Algorithm:
    """Return FedAvg: the next model is the mean of the clients' weights, weighted by examples."""
    return Algorithm(rule=mean)
