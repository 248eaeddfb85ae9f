"""Bulyan: El Mhamdi et al. 2018, "The Hidden Vulnerability of Distributed Learning in Byzantium", section 4."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedveil.algorithms.algorithm import Algorithm, Arrays
from fedveil.algorithms.rules.krum import USES, by_score, require_cohort
from fedveil.core.declaration import part
from fedveil.core.errors import TrainingError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import NoSettings


def bulyan_mean(weights: Sequence[Arrays], byzantine: int) -> Arrays:
    """Return the trimmed mean of the n - 2 f updates that Krum selects, float32.

    For each weight, it is the mean of the n - 4 f values nearest to the median of the selected updates.
    byzantine: f. As in Flower, Krum selects all updates at once; in the paper, one after another among those left.
    Raise TrainingError where there are fewer than 4 f + 3 clients.
    """
    clients = len(weights)
    if clients < 4 * byzantine + 3:
        raise TrainingError(
            f"bulyan needs {4 * byzantine + 3} updates against {byzantine} that lie (4 f + 3), and {clients} came"
        )
    chosen = by_score(weights, byzantine)[: clients - 2 * byzantine]
    nearest = len(chosen) - 2 * byzantine

    def trim(values: np.ndarray) -> np.ndarray:  # [chosen, ...] -> [...]
        distances = np.abs(values - np.median(values, axis=0))
        order = np.argpartition(distances, nearest - 1, axis=0)[:nearest]
        return np.asarray(np.mean(np.take_along_axis(values, order, axis=0), axis=0))

    return {name: trim(np.stack([weights[i][name] for i in chosen])) for name in weights[0]}


def check(_: NoSettings, experiment: Experiment) -> None:
    """Raise SettingsError where the cohort is smaller than 4 f + 3."""
    require_cohort(experiment, 4 * experiment.federation.byzantine_clients + 3)


@part(needs="each", uses=USES, why="Bulyan compares updates", check=check)
def bulyan(_: NoSettings, experiment: Experiment) -> Algorithm:
    """Return Bulyan: Krum's selection, then a trimmed mean of each weight."""
    liars = experiment.federation.byzantine_clients
    return Algorithm(rule=lambda cohort: bulyan_mean(cohort.weights, liars))
