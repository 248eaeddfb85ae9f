"""What clipping and noise guarantee: epsilon at delta, after so many rounds, for one client's whole data.

Two runs are neighbours where they differ in one client's data: it is there, or the client's update counts as zero (the
zero-out relation of Kairouz et al. 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling").
Who takes part is the same in both, as it is drawn without a look at the data, so the number that a mean is divided by is no
secret, and the sum of clipped updates differs by C at most. For neighbours whose client has other data instead, it is 2 C:
as with half the noise multiplier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fedveil.core.settings.experiment import Experiment

UNIT = "one client's whole data"
SECRET = "from the operating system's generator"
SEEDED = "from the seed: it protects nobody, and shows what secret noise would"
NOT_COVERED = (
    "epsilon is of updates alone: not of who takes part, of seconds and clipped values, or of a vocabulary made of the "
    "text"
)
MEANINGLESS = 20.0  # an epsilon above this promises nothing that a person could use


@dataclass(frozen=True)
class Shown:
    """What a run has shown so far, which no data has a part in.

    rounds: whose models were made; asked: how often the client was asked that was asked most often
    fewest: clients in the smallest sum of updates
    population, cohort: the fewest clients that a round's were drawn from, and the most that were drawn
    """

    rounds: int
    asked: int
    fewest: int
    population: int
    cohort: int


def gaussian_epsilon(multiplier: float, releases: float, delta: float) -> float:
    """Epsilon of `releases` Gaussian mechanisms, each with a noise of `multiplier` sensitivities: exact.

    Together they are one of multiplier / sqrt(releases) (Dong et al. 2022, corollary 3.3), of which Balle and Wang 2018,
    theorem 8, give delta. inf where there is no noise.
    """
    if releases == 0:
        return 0.0
    if multiplier <= 0:
        return math.inf
    from dp_accounting.gaussian_mechanism import get_epsilon_gaussian

    with np.errstate(divide="ignore"):  # of next to no noise
        return float(get_epsilon_gaussian(multiplier / math.sqrt(releases), delta))


def sampled_epsilon(multiplier: float, releases: int, population: int, cohort: int, delta: float) -> float:
    """Epsilon of `releases` noisy sums, each of `cohort` clients drawn from `population` without replacement: a bound.

    For who does not know whom a round drew. Wang, Balle and Kasiviswanathan 2019, theorem 27 of the long version, in Renyi
    divergences. Its proof compares a sum with the client, one without its data, and one with another client in its place: those
    differ by 2 C, so the multiplier halves, and the bound holds for either relation of neighbours.
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
    """Renyi orders, and the divergence at each of one sampled release."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    accountant.compose(SampledWithoutReplacementDpEvent(population, cohort, GaussianDpEvent(multiplier / 2)))
    return accountant.orders, accountant.rdp


def observers(experiment: Experiment) -> dict[str, str]:
    """The epsilons that a run has, by the name of their column, and against whom each holds; none without noise."""
    privacy = experiment.privacy
    if not privacy.noisy:
        return {}
    if privacy.noise_at == "server":
        sees = "each update" if not privacy.protected else "each sum of updates"
        return {
            "epsilon": f"against who sees the models, and not who took part; none against the server, which sees {sees}"
        }
    if not privacy.protected:
        return {
            "epsilon": "against the server, which sees each update",
            "epsilon_sum": "against who sees the models alone, another client say",
        }
    return {
        "epsilon": "against who sees sums of updates and the models alone",
        "epsilon_update": "against who comes to see a client's own update",
    }


def epsilons(experiment: Experiment, shown: Shown) -> dict[str, float]:
    """Epsilon against each of `observers`, by column, at privacy.delta.

    A client's own update is seen once for each time it was asked. The noise of a sum is that of its clients without those whom
    the observer works with, who know theirs: privacy.protection.colluders under secure aggregation, else one. Of both no advantage is
    taken of sampling: the server draws who takes part. A server's own noise is accounted by the better of two bounds, with
    and without sampling.
    """
    privacy = experiment.privacy
    multiplier, delta = privacy.noise_multiplier, privacy.delta
    names = observers(experiment)
    if not names:
        return {}
    if privacy.noise_at == "server":
        plain = gaussian_epsilon(multiplier, shown.asked, delta)
        if shown.cohort >= shown.population:
            return {"epsilon": plain}
        sampled = sampled_epsilon(multiplier, shown.rounds, shown.population, shown.cohort, delta)
        return {"epsilon": min(plain, sampled)}
    colluders = privacy.protection.colluders if privacy.shows == "mean" else 0.0
    knowing = max(1, math.floor(experiment.federation.cohort * colluders + 1e-9))  # 0.29 of 100 are 29, not 28
    honest = max(0, shown.fewest - knowing)
    found = {
        "update": gaussian_epsilon(multiplier, shown.asked, delta),
        "sum": gaussian_epsilon(multiplier * math.sqrt(honest), shown.asked, delta),
    }
    first, second = ("update", "sum") if not privacy.protected else ("sum", "update")
    return dict(zip(names, (found[first], found[second]), strict=True))


def describe(experiment: Experiment, *, secret: bool) -> dict[str, Any]:
    """What is guaranteed, for whom, and what is not, for a run's record; nothing without noise.

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
    """`epsilon 4.38 at delta 1e-05 for one client's whole data, against ...`, and where it is so, that it means nothing."""
    said = f"epsilon {epsilon:.3g} at delta {delta:g} for {UNIT}, {against}"
    return said if epsilon <= MEANINGLESS else f"{said}: no meaningful guarantee"
