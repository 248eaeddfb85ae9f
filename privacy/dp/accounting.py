"""Differential privacy accounting: epsilon at delta of clipping and noise over the rounds, for one client's whole data.

Two runs are neighbours where one has a client's data, and in the other that client's update counts as zero (the
zero-out relation of Kairouz et al. 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling"). Both
have the same cohorts, which are drawn without looking at the data. So the divisor of a mean is no secret, and the sum
of clipped updates differs by C at most. Where the client has other data instead, the sum differs by 2 C at most: the
same as half the noise multiplier.

Under a protection each client rounds its noisy weights to multiples of a unit before they are added. The epsilon of the
sum counts the noise of all its h honest clients as one, N(0, h sigma^2). That holds for rounded noise too. With U uniform
within half a unit, a client with weight x sends the multiple y with probability unit f(y - x), f being the density of
N(0, sigma^2) + U: it sends samples of a density. If those lost nothing (Widrow, Kollar and Liu 1996, "Statistical theory
of quantization", theorem I), the sum of h clients would have samples of the density of all their N and U together. So
has round(sum of x + N(0, h sigma^2) + h - 1 U's), which is made of the Gaussian mechanism's answer and of nothing else.
What samples lose, frequencies above half their rate, is of the order of h exp(-2 pi^2 (sigma / unit)^2 (h - 1) / h) for
each number, the term by which discrete Gaussians miss closing under addition (Kairouz, Liu and Steinke 2021, theorem 1):
for sigma = `plan.UNITS` = 4 units less than 10^-67, which no number of weights and rounds brings near delta.
`plan.make_plan` refuses less noise. The numbers are drawn as float64, and differ from normal ones by that much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fedveil.core.settings.experiment import Experiment
from fedveil.privacy.plan import make_plan

UNIT = "one client's whole data"
SECRET = "from the operating system's generator"
SEEDED = "from the seed: it protects nobody, and shows what secret noise would"
NOT_COVERED = "epsilon is of updates alone: not of who takes part, of seconds, or of a vocabulary made of the text"
MEANINGLESS = 20.0  # an epsilon above this promises nothing that a person could use


@dataclass(frozen=True)
class Shown:
    """What a run has released so far. None of these numbers depends on data.

    rounds: rounds whose models were made; asked: the most rounds that one client was asked in
    fewest: clients in the smallest sum of updates
    population, cohort: the fewest clients that a cohort was drawn from, and the largest cohort
    numbers: in a model
    """

    rounds: int
    asked: int
    fewest: int
    population: int
    cohort: int
    numbers: int


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


def sampled_epsilon(multiplier: float, releases: int, population: int, cohort: int, delta: float) -> float:
    """Return a bound on epsilon of `releases` noisy sums, each of `cohort` of `population` clients without replacement.

    It holds against an observer who does not know the cohorts. Wang, Balle and Kasiviswanathan 2019, theorem 27 of the
    long version, in Renyi divergences. The proof compares a sum with the client, one without its data, and one with
    another client in its place. Those differ by 2 C, so the multiplier is halved, and the bound holds for both
    relations of neighbours.
    """
    if releases == 0:
        return 0.0
    if multiplier <= 0:
        return math.inf
    from dp_accounting.rdp import compute_epsilon

    orders, divergences = _divergences(multiplier, population, cohort)
    epsilon, _ = compute_epsilon(orders, divergences * releases, delta)
    return float(epsilon)


@lru_cache(maxsize=64)
def _divergences(multiplier: float, population: int, cohort: int) -> tuple[np.ndarray, np.ndarray]:
    """Return Renyi orders, and the divergence of one sampled release at each."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    accountant.compose(SampledWithoutReplacementDpEvent(population, cohort, GaussianDpEvent(multiplier / 2)))
    return accountant.orders, accountant.rdp


def observers(experiment: Experiment) -> dict[str, str]:
    """Return against whom each epsilon of a run holds, by the name of its column; nothing without noise."""
    privacy = experiment.privacy
    if not privacy.noisy:
        return {}
    if privacy.noise_at == "server":
        sees = "each update" if not privacy.protected else "each sum of updates"
        return {
            "epsilon": f"against who sees the models, and not who took part; none against the server, which sees {sees}"
        }
    if not privacy.protected:
        found = {"epsilon": "against the server, which sees each update"}
        if experiment.communication.encoding == "float32":  # others round each update's noise away from the sum
            found["epsilon_sum"] = (
                "against who sees the models alone, another client say; float32's rounding not counted"
            )
        return found
    helped = _knowing(experiment)
    return {
        "epsilon": (
            f"against who sees sums of updates and the models alone, helped by {helped} client{'s' if helped > 1 else ''}: "
            "not a server that lies"
        ),
        "epsilon_update": "against who comes to see a client's own update, a server that lies too",
    }


def epsilons(experiment: Experiment, shown: Shown) -> dict[str, float]:
    """Return epsilon against each of `observers`, by column, at privacy.delta.

    A client's own update counts once for each round that asked for it. The noise of a sum counts without that of the
    colluders, who know theirs: privacy.protection.colluders of the cohort under secure aggregation, else one client.
    Both ignore sampling, because the server draws the cohort. Noise of the server is accounted with and without
    sampling, and the smaller epsilon counts.
    """
    privacy = experiment.privacy
    multiplier, delta = privacy.noise_multiplier, privacy.delta
    names = observers(experiment)
    if not names:
        return {}
    if privacy.noise_at == "server":
        multiplier /= _lengthened(experiment, shown)
        plain = gaussian_epsilon(multiplier, shown.asked, delta)
        if shown.cohort >= shown.population:
            return {"epsilon": plain}
        sampled = sampled_epsilon(multiplier, shown.rounds, shown.population, shown.cohort, delta)
        return {"epsilon": min(plain, sampled)}
    honest = max(0, shown.fewest - _knowing(experiment))
    found = {
        "update": gaussian_epsilon(multiplier, shown.asked, delta),
        "sum": gaussian_epsilon(multiplier * math.sqrt(honest), shown.asked, delta),
    }
    order = ("update", "sum") if not privacy.protected else ("sum", "update")
    return {name: found[which] for name, which in zip(names, order, strict=False)}


def _knowing(experiment: Experiment) -> int:
    """Return how many clients may tell the observer of a sum their own noise."""
    privacy = experiment.privacy
    colluders = privacy.protection.colluders if privacy.shows == "mean" else 0.0
    return max(1, math.floor(experiment.federation.cohort * colluders + 1e-9))  # 0.29 of 100 are 29, not 28


def _lengthened(experiment: Experiment, shown: Shown) -> float:
    """Return how much longer than C a client's part of a sum may be, as rounding to a grid precedes the server's noise.

    Each of d numbers moves by a unit of rounding at most: (C + sqrt(d) unit) / C.
    """
    privacy, cohort = experiment.privacy, experiment.federation.cohort
    if not privacy.protected or privacy.clip is None:
        return 1.0
    return 1 + math.sqrt(shown.numbers) * make_plan(privacy, cohort).grid.step * cohort / privacy.clip


def describe(experiment: Experiment, *, secret: bool) -> dict[str, Any]:
    """Return what a run guarantees, for whom, and what it does not cover, for its record; nothing without noise.

    secret: the noise came from the operating system's generator, and not from the seed
    """
    if not experiment.privacy.noisy:
        return {}
    return {
        "delta": experiment.privacy.delta,
        "epsilon_unit": UNIT,
        "epsilon_against": observers(experiment),
        "not_covered": NOT_COVERED,
        "noise": SECRET if secret else SEEDED,
    }


def explain(epsilon: float, delta: float, against: str) -> str:
    """Write out an epsilon: `epsilon 4.38 at delta 1e-05 for one client's whole data, against ...`.

    Above `MEANINGLESS` the text adds that it is no meaningful guarantee.
    """
    said = f"epsilon {epsilon:.3g} at delta {delta:g} for {UNIT}, {against}"
    return said if epsilon <= MEANINGLESS else f"{said}: no meaningful guarantee"
