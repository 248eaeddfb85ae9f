"""Noise that a trusted server adds once to the sum of a round's updates: central differential privacy.

The server sees the updates before its noise. Those who receive the models do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.privacy.dp.noise import Normal, Update, add_noise, clip, secret_normal


@dataclass(frozen=True)
class ServerNoise:
    """The noise of a round: C, sigma = z C, and the generator of its numbers."""

    bound: float
    deviation: float
    normal: Normal

    def mean(self, given: Mapping[str, np.ndarray], weights: Sequence[Mapping[str, np.ndarray]]) -> Update:
        """Return given + (sum of clip(w_k - given) + N(0, sigma^2)) / K, float32, for K clients.

        McMahan et al. 2018, algorithm 1. Updates are clipped again here, because an update may arrive longer, by its
        encoding or on purpose.
        """
        total = {name: np.zeros(value.shape) for name, value in given.items()}
        for own in weights:
            update = clip({name: np.subtract(own[name], given[name], dtype=np.float64) for name in total}, self.bound)
            for name, value in update.items():
                total[name] += value
        noisy = add_noise(total, self.deviation, self.normal)
        return {name: np.asarray(given[name] + value / len(weights), np.float32) for name, value in noisy.items()}

    def on_mean(self, mean: Mapping[str, np.ndarray], clients: int) -> Update:
        """Return mean + N(0, sigma^2) / K, float32, of K clients' weights whose updates were clipped before the sum."""
        noisy = add_noise(mean, self.deviation / clients, self.normal)
        return {name: np.asarray(value, np.float32) for name, value in noisy.items()}


def server_noise(experiment: Experiment, number: int, *, secret: bool) -> ServerNoise | None:
    """Return the noise of a round; None where the server adds none.

    secret: draw it from the operating system's generator, not from the seed
    """
    privacy = experiment.privacy
    if not privacy.noisy or privacy.noise_at != "server" or privacy.bound is None:
        return None
    normal = secret_normal if secret else Stream(experiment.seed, number).generator("server noise").standard_normal
    return ServerNoise(privacy.bound, privacy.deviation, normal)
