"""Distributed noise: each client adds a share in whole numbers, and the sum under a protection has what a server would add.

A client's update u, no longer than C, is divided by a public unit, rounded at random to whole numbers q of a norm of D at
most (`samplers.round_within`), and gets noise of sigma in each number. Neighbours, of which one counts as zero, differ by
q, so D is the sensitivity of the sum, whatever u is. sigma = z D / sqrt(h) makes the noise of h clients z D: h are those
that stay and keep their noise to themselves. Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian Mechanism
for Federated Learning with Secure Aggregation"; Agarwal, Kairouz and Liu 2021, "The Skellam Mechanism for Differentially
Private Federated Learning".

**Discrete Gaussian noise costs what Gaussian noise does**: write g(x, s) = exp(-x^2 / 2 s^2). By Poisson's summation the sum
of g(y - x, s) over all whole y is s sqrt(2 pi) (1 + e), |e| <= k(s) = 2 (exp(-2 pi^2 s^2) + exp(-8 pi^2 s^2) + ...).

1. N_Z(0, a^2) + N_Z(0, b^2) has at x the weight of g(y, a) g(x - y, b) summed over y, which is g(x, sqrt(a^2 + b^2)) times
   such a sum with s = a b / sqrt(a^2 + b^2). So its probabilities are those of N_Z(0, a^2 + b^2) but for a factor within
   (1 + k(s)) / (1 - k(s)) and its inverse. Adding the next of h equal ones, s^2 = sigma^2 j / (j + 1), j = 1, ..., h - 1: the
   terms of tau in theorem 1 of Kairouz et al.
2. Take the Gaussian mechanism's answer y = q + N(0, S^2 - r^2), q whole, and draw a whole number about it with weights
   g(x - y, r). The same sum, s = r, shows that x is q + N_Z(0, S^2) but for such a factor (Peikert 2010, "An Efficient and
   Parallel Gaussian Sampler for Lattices", theorem 3.1). That draw looks at the answer alone.

So the sum is a Gaussian mechanism's answer of multiplier sqrt(h sigma^2 - r^2) / D, processed, but for a factor that r = 2
and sigma >= 4 keep within exp(10^-33) for each number of the vector. It needs no conversion between kinds of privacy.
Skellam noise adds up exactly, has heavier tails, and is accounted in Renyi divergences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedveil.privacy.dp.samplers import Bytes, Table, gaussian_table, round_within, skellam_table

BETA = math.exp(-0.5)  # the chance that rounding is tried again, at most
SMOOTH = 2.0  # r above, in units
FINEST = 4096  # units in sigma, about the most: the samplers' tables have 33 numbers for each
LONGEST = 1.5  # how much rounding may lengthen an update, which the noise then hides
FAR = 10  # standard deviations of the sum's noise that fit beside it under a protection: one number in 10^23 wraps


@dataclass(frozen=True)
class NoiseShare:
    """What each client rounds and adds, in units of what it rounds to.

    distribution: of the noise; unit: in weights
    bounded: rounding is at random, within D; else it is to the nearest, and D is how much an example changes what comes of it
    square: D^2, the largest squared norm of a rounded update; deviation: sigma; size: numbers of an update
    """

    distribution: Literal["gaussian", "skellam"]
    unit: float
    square: int
    deviation: float
    size: int
    bounded: bool = True

    @property
    def sensitivity(self) -> float:
        """D, in units."""
        return math.sqrt(self.square)

    @property
    def table(self) -> Table:
        """The distribution of a number of the noise."""
        return (gaussian_table if self.distribution == "gaussian" else skellam_table)(self.deviation)

    def lengthening(self, bound: float) -> float:
        """Return how much longer than C = `bound` a rounded update may be: D unit / C."""
        return self.sensitivity * self.unit / bound


def honest_clients(clients: int, missing: float, colluding: float) -> int:
    """Return h: how many of a cohort's clients stay, and keep their noise to themselves.

    missing, colluding: shares of the cohort. At least one client colludes: a client that reads the sum knows its own noise.
    """
    gone, bad = (math.floor(clients * share + 1e-9) for share in (missing, colluding))  # 0.29 of 100 are 29, not 28
    return clients - gone - max(1, bad)


def rounded_square(length: float, size: int, beta: float = BETA) -> int:
    """Return D^2: what the squared norm of a vector is after rounding at random, but for a chance of `beta`.

    length: C, the vector's norm, in units. Kairouz et al. 2021, theorem 1.
    """
    certain = (length + math.sqrt(size)) ** 2
    likely = length**2 + size / 4 + math.sqrt(2 * math.log(1 / beta)) * (length + math.sqrt(size) / 2)
    return math.ceil(min(certain, likely))


def noise_share(
    multiplier: float,
    bound: float,
    unit: float,
    honest: int,
    size: int,
    distribution: Literal["gaussian", "skellam"] = "gaussian",
    *,
    bounded: bool = True,
) -> NoiseShare:
    """Return each client's share of noise of `multiplier` sensitivities, z, of which `honest` shares are enough.

    bounded: whole updates are no longer than C; else single examples' parts of them are, and two updates that differ by one
    of these differ by C and a unit of rounding in each number at most
    bound: C, in weights; unit: in weights; size: numbers of an update
    """
    square = rounded_square(bound / unit, size) if bounded else math.ceil((bound / unit + math.sqrt(size)) ** 2)
    return NoiseShare(distribution, unit, square, multiplier * math.sqrt(square / honest), size, bounded)


def contribution(
    given: np.ndarray, update: np.ndarray, limit: float, share: NoiseShare, random: Bytes
) -> tuple[np.ndarray, np.ndarray]:
    """Return the given model in units, and what a client adds to it: its rounded update with its noise; int64 [size] each.

    given, update: float64 [size], finite; limit: of weights, a public range

    The first is the same for all clients, and so no secret: the given weights, clipped to the range and rounded. The
    second is round_within(clip(given + u) - clip(given)) + noise. Clipping a number moves two numbers no further apart, so
    each number of that difference is no larger than the update's, and its norm is at most C. The noise comes after the
    clip, which would swallow it at the edge of the range.
    """
    base = np.clip(given, -limit, limit)
    moved = np.clip(given + update, -limit, limit) - base
    most = math.floor(limit / share.unit)
    known = np.clip(np.rint(base / share.unit), -most, most).astype(np.int64)
    steps = moved / share.unit
    own = round_within(steps, share.square, random) if share.bounded else np.rint(steps).astype(np.int64)
    return known, own + share.table.draw(share.size, random)


def effective_multiplier(share: NoiseShare, honest: int) -> tuple[float, float]:
    """Return the multiplier of a Gaussian mechanism, and a slack: what a sum of discrete Gaussian noise is accounted as.

    honest: clients in the sum whose noise nobody else knows, 0 where there is none

    Where that mechanism, over the rounds, sampled or not, has epsilon at delta, the sums have epsilon + 2 slacks at
    exp(slacks) delta, where `slacks` is the slack times the rounds: see the module's proof. 0 where no noise is left.
    """
    if share.distribution != "gaussian":
        raise ValueError("Skellam noise is no Gaussian mechanism's; account it by its divergences")
    variance = honest * share.deviation**2 - SMOOTH**2
    if variance <= 0:
        return 0.0, 0.0
    adding = (honest - 1) * _factor(share.deviation / math.sqrt(2))
    return math.sqrt(variance) / share.sensitivity, share.size * (adding + _factor(SMOOTH))


def divergences(share: NoiseShare, honest: int, orders: Sequence[float]) -> np.ndarray:
    """Return the Renyi divergence of a sum with noise of `honest` clients, at each order > 1; they add up over rounds.

    Skellam: Agarwal et al. 2021, corollary 3.6, for whole orders, and others take the next larger one's. It takes the L1 norm
    too, which for whole numbers is at most D^2, and at most sqrt(size) D. Discrete Gaussian: those of
    `effective_multiplier`, with its slack. inf where no noise is left.
    """
    alpha = np.asarray(orders, np.float64)
    if share.distribution == "gaussian":
        multiplier, slack = effective_multiplier(share, honest)
        if multiplier == 0:
            return np.full(alpha.shape, np.inf)
        return np.asarray(alpha / (2 * multiplier**2) + (2 * alpha - 1) / (alpha - 1) * slack)
    variance = honest * share.deviation**2
    if variance <= 0:
        return np.full(alpha.shape, np.inf)
    alpha, square = np.ceil(alpha), float(share.square)
    absolute = min(square, math.sqrt(share.size * square))
    more = np.minimum(((2 * alpha - 1) * square + 6 * absolute) / (4 * variance**2), 3 * absolute / (2 * variance))
    return np.asarray(alpha * square / (2 * variance) + more)


def _factor(deviation: float) -> float:
    """Return log((1 + k) / (1 - k)) for k(s) of the module's proof; s = deviation, at least 1."""
    k = 2 * math.exp(-2 * (math.pi * deviation) ** 2) * (1 + 1e-9)  # the next terms are 10^-25 of the first
    return math.log1p(2 * k / (1 - k))
