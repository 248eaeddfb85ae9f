"""Noise that hides single examples: how much of it a client adds in each step, and how many examples it must have."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from fedveil.core.errors import SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.privacy.dp.accounting.accountants import calibrate
from fedveil.privacy.dp.accounting.guarantee import planned
from fedveil.privacy.dp.accounting.mechanisms import EXAMPLE_CLIENT
from fedveil.privacy.dp.sensitivity import in_sums


def own_multiplier(experiment: Experiment, examples: int) -> float:
    """Return the noise multiplier of each step of a client with so many examples, which adds its own noise.

    With a budget, each client finds its own, for the rounds that it may be asked in at most: clients with few examples use
    each more often, and add more noise. 0 where the noise is added to the sum.
    """
    privacy = experiment.privacy
    if privacy.noise_at != "client":
        return 0.0
    return privacy.noise_multiplier if privacy.epsilon is None else _calibrated(experiment, examples)


def most_used(experiment: Experiment, smallest: int, sizes: np.ndarray | None = None) -> int:
    """Return how many examples the client has whose examples are used most: epsilon is the largest for it.

    smallest: examples of the client that has the fewest; sizes: of all clients, int64 [clients]; None where nobody knows

    It is the smallest, whose steps take each of its examples most often, but for one case: in passes, with one noise
    multiplier for all, a client whose examples fill a few batches and little of another takes a step more in each pass.
    Of such clients those with the fewest batches tell most.
    """
    privacy, training, size = experiment.privacy, experiment.training, experiment.training.batch_size
    if privacy.epsilon is not None or privacy.noise_at != "client" or training.steps is not None or size == "full":
        return smallest
    full = size * math.ceil(smallest / size)
    larger = np.array([full + 1]) if sizes is None else sizes[sizes > full]

    def spent(examples: int) -> float:
        return EXAMPLE_CLIENT.spent(experiment, privacy.multiplier, planned(experiment, 0, examples))["epsilon"]

    return max(smallest, int(larger.min()), key=spent) if larger.size else smallest


def check_sizes(experiment: Experiment, smallest: int) -> None:
    """Raise SettingsError where a client has fewer examples than a step of noise in the sum takes on average.

    smallest: examples of the client that has the fewest
    """
    size, privacy = experiment.training.batch_size, experiment.privacy
    if not in_sums(privacy):
        return
    if size == "full" or smallest < size:
        raise SettingsError(
            f"training.batch_size = {size}: with privacy.noise_at = '{privacy.noise_at}' every client's sum of gradients is divided "
            f"by it, so it must be a number, and no client may have fewer examples; the smallest has {smallest}"
        )


@lru_cache(maxsize=4096)
def _calibrated(experiment: Experiment, examples: int) -> float:
    budget = experiment.privacy.epsilon
    assert budget is not None
    end = planned(experiment, 0, examples)
    return calibrate(lambda z: EXAMPLE_CLIENT.spent(experiment, z, end)["epsilon"], budget)
