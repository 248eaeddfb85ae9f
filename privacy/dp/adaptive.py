"""A bound of updates that follows a quantile of their norms, found privately from round to round.

Andrew, Thakkar, McMahan and Ramaswamy 2021, "Differentially Private Learning with Adaptive Clipping", algorithm 1. Each
client tells one bit beside its clipped update, whether the update was no longer than C. The server adds noise to the
number of those bits, and to the sum of updates somewhat more than without the bits.

**Both together cost what the sum alone would**: divide a client's part of the sum, at most C long, by the sum's noise
z_s C, and its bit less one half, at most 1/2, by the count's noise s. Both are one vector with standard normal noise,
whose part of one client has a squared length of 1 / z_s^2 + 1 / (2 s)^2 at most (theorem 1 of the paper). z_s is chosen
so that this is 1 / z^2: the sensitivity of a sum with noise of z C. A client that counts as zero counts so in both.
"""

from __future__ import annotations

import math

START = 0.1  # C of the first round: public, and small, as it grows faster than noise lets a large one fall
QUANTILE = 0.5  # of the norms, at which C settles
RATE = 0.2  # C changes by a factor of exp(RATE QUANTILE) in a round at most
SHARE = 20  # the count's noise is a cohort's twentieth at least (section 3.1)


def count_deviation(multiplier: float, cohort: int) -> float:
    """Return s, the standard deviation of the noise in the count: at least z, so that the sum's grows by 15.5 % at most."""
    return max(cohort / SHARE, multiplier)


def sum_multiplier(multiplier: float, cohort: int) -> float:
    """Return z_s, the noise multiplier of the sum beside the count, so that both are accounted as one sum with z."""
    return 1 / math.sqrt(multiplier**-2 - (2 * count_deviation(multiplier, cohort)) ** -2)


def noisy_share(within: int, clients: int, cohort: int, noise: float) -> float:
    """Return the noisy share of updates that were no longer than C; it may lie outside 0 and 1.

    within: how many of `clients` said so; cohort: the public number that sums are divided by; noise: of the count
    Bits count as 1/2 and -1/2, so that a client that is missing counts as zero.
    """
    return 0.5 + (within - clients / 2 + noise) / cohort


def next_bound(bound: float, share: float) -> float:
    """Return C exp(-RATE (share - QUANTILE)); a share beyond 0 and 1, which noise alone makes, counts as 0 or 1."""
    return bound * math.exp(-RATE * (min(max(share, 0.0), 1.0) - QUANTILE))
