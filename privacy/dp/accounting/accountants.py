"""Epsilon of clipped sums with Gaussian noise, by how the clients in them were drawn, and the noise for an epsilon.

All are upper bounds, by libraries that others wrote and by theorems that others proved; `tests/privacy/dp` compares
them with published figures and other accountants. The multiplier is that of the noise to the most that one client, or
one example, changes a sum: z = sigma / C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fedveil.core.errors import SettingsError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

INTERVAL = 1e-3  # of privacy losses, at most where possible: epsilon comes out .02 % high
POINTS = 4e6  # of a distribution of losses, about; a coarser interval is taken where more would be needed
HOPELESS = 3000.0  # an epsilon above this is not made smaller by counting the sampling
LEAST, MOST = 1e-2, 1e6  # multipliers that calibration looks between


def gaussian_epsilon(multiplier: float, releases: float, delta: float) -> float:
    """Return the exact epsilon of `releases` Gaussian mechanisms, each with noise of `multiplier` sensitivities.

    Together they equal one mechanism of multiplier / sqrt(releases) (Dong et al. 2022, corollary 3.3), whose delta is
    that of Balle and Wang 2018, theorem 8. inf where there is no noise.
    """
    if releases == 0:
        return 0.0
    if multiplier <= 0:
        return math.inf
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    with np.errstate(divide="ignore"):  # next to no noise
        return float(get_epsilon_gaussian(multiplier / math.sqrt(releases), delta))


@lru_cache(maxsize=256)
def poisson_epsilon(multiplier: float, rate: float, releases: int, delta: float) -> float:
    """Return epsilon of `releases` noisy sums, each of those whom a coin of probability `rate` chose, each by its own.

    Against who does not know whom the coins chose, where one is added or removed, and the sum is divided by a public
    number. Privacy loss distributions (Koskela et al. 2020; Doroshenko et al. 2022), as dp-accounting computes them.
    """
    known = gaussian_epsilon(multiplier, releases, delta)
    if rate >= 1 or not 0 < known < HOPELESS:
        return known
    loss = _poisson_loss(multiplier, rate, _interval(multiplier, rate, releases, delta))
    return min(known, _composed(loss, releases, delta))


@lru_cache(maxsize=256)
def subset_epsilon(multiplier: float, population: int, cohort: int, releases: int, delta: float) -> float:
    """Return epsilon of `releases` noisy sums, each of `cohort` of `population` clients, all subsets equally likely.

    Against who does not know the cohorts, where one client's update counts as zero. A client in the cohort takes
    another's place, so that sums differ by 2 C, and half the multiplier counts. With gamma = cohort / population,
    delta at 1 + gamma (e^epsilon - 1) is at most gamma times delta of the sum at e^epsilon (Balle, Barthe and Gaboardi
    2018, theorem 9); below one, delta follows from the divergence of the two in turn. Mechanisms that a pair of
    distributions dominates compose as the pair does (Zhu, Dong and Wang 2022, theorem 10).
    """
    known = gaussian_epsilon(multiplier, releases, delta)
    if cohort >= population or not 0 < known < HOPELESS:
        return known
    interval = _interval(multiplier / 2, cohort / population, releases, delta)
    loss = _subset_loss(multiplier / 2, cohort / population, interval)
    return min(known, _composed(loss, releases, delta))


def calibrate(spent: Callable[[float], float], epsilon: float) -> float:
    """Return the least noise multiplier, to a part in a thousand, whose `spent` epsilon is at most `epsilon`.

    spent: multiplier -> epsilon, which falls as the multiplier grows
    Raise SettingsError where no noise would do.
    """
    from scipy.optimize import brentq

    low = high = 1.0
    while spent(high) > epsilon:
        if high > MOST:
            raise SettingsError(
                f"privacy.epsilon = {epsilon:g}: no noise is enough for so small a budget at this privacy.delta; take a larger "
                "privacy.epsilon, fewer federation.rounds, or a larger privacy.delta"
            )
        low, high = high, 2 * high
    while low > LEAST and spent(low) <= epsilon:
        low, high = low / 2, low
    if spent(low) <= epsilon:
        return low

    def excess(log: float) -> float:
        return math.log(min(spent(math.exp(log)), 1e300)) - math.log(epsilon)

    found = math.exp(brentq(excess, math.log(low), math.log(high), xtol=3e-4))
    while spent(found) > epsilon:
        found *= 1.0003
    return found


def _interval(multiplier: float, rate: float, releases: int, delta: float) -> float:
    """Return an interval a fifth of one loss's deviation, or one that leaves the sum of all losses no more than `POINTS`."""
    deviation = rate * math.sqrt(math.expm1(min(1 / multiplier**2, 20.0)))
    return max(min(INTERVAL, deviation / 5), 4 * gaussian_epsilon(multiplier, releases, delta * 1e-3) / POINTS)


def _composed(loss: PrivacyLossDistribution, releases: int, delta: float) -> float:
    """Return epsilon of so many losses; inf where they are too large to be added up."""
    try:
        with np.errstate(over="ignore", divide="ignore"):
            return float(loss.self_compose(releases).get_epsilon_for_delta(delta))
    except OverflowError:
        return math.inf


@lru_cache(maxsize=64)
def _poisson_loss(multiplier: float, rate: float, interval: float) -> PrivacyLossDistribution:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    return from_gaussian_mechanism(multiplier, value_discretization_interval=interval, sampling_prob=rate)


@lru_cache(maxsize=64)
def _subset_loss(multiplier: float, share: float, interval: float) -> PrivacyLossDistribution:
    """Return losses that dominate one sampled sum's, whose divergence is known at each multiple of the interval."""
    from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
    from scipy.special import log_ndtr

    # beyond twelve deviations, less than 10^-32 of the unsampled loss is left
    most = math.ceil((0.5 / multiplier**2 + 12 / multiplier) / interval)
    steps = np.arange(0, most + 1)
    epsilons = steps * interval
    unsampled = epsilons + np.log1p(-(1 - share) * np.exp(-epsilons)) - math.log(share)
    near, far = 0.5 / multiplier - unsampled * multiplier, -0.5 / multiplier - unsampled * multiplier
    above = share * (np.exp(log_ndtr(near)) - np.exp(unsampled + log_ndtr(far)))
    above = np.maximum.accumulate(np.maximum(above, 0)[::-1])[::-1]
    below = -np.expm1(-epsilons[:0:-1]) + np.exp(-epsilons[:0:-1]) * above[:0:-1]
    rounded = np.concatenate([-steps[:0:-1], steps])
    pmf = create_pmf_pessimistic_connect_dots(interval, rounded, np.concatenate([below, above]))
    return PrivacyLossDistribution(pmf)
