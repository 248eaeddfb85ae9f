"""The guarantee of a run: its mechanism's epsilon at delta, as spent so far, calibrated to a budget, and in words.

Under a protection each client that adds noise of its own rounds its noisy weights to multiples of a unit before they are
added. The epsilon of the sum counts the noise of all its h honest clients as one, N(0, h sigma^2). That holds for
rounded noise too. With U uniform within half a unit, a client with weight x sends the multiple y with probability unit
f(y - x), f being the density of N(0, sigma^2) + U: it sends samples of a density. If those lost nothing (Widrow, Kollar
and Liu 1996, "Statistical theory of quantization", theorem I), the sum of h clients would have samples of the density of
all their N and U together. So has round(sum of x + N(0, h sigma^2) + h - 1 U's), which is made of the Gaussian
mechanism's answer and of nothing else. What samples lose, frequencies above half their rate, is of the order of
h exp(-2 pi^2 (sigma / unit)^2 (h - 1) / h) for each number, the term by which discrete Gaussians miss closing under
addition (Kairouz, Liu and Steinke 2021, theorem 1): for sigma = `plan.UNITS` = 4 units less than 10^-67, which no number
of weights and rounds brings near delta. `plan.make_plan` refuses less noise. The numbers are drawn as float64, and
differ from normal ones by that much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedveil.core.catalog import MECHANISMS
from fedveil.core.errors import SettingsError
from fedveil.core.settings.checks import mechanism_of
from fedveil.core.settings.experiment import Experiment
from fedveil.privacy.dp.accounting.accountants import calibrate
from fedveil.privacy.dp.accounting.mechanisms import Mechanism, Shown, with_multiplier

SECRET = "from the operating system's generator"
SEEDED = "from the seed: it protects nobody, and shows what secret noise would"
NOT_COVERED = "epsilon is of updates alone: not of who takes part, of seconds, or of a vocabulary made of the text"
MEANINGLESS = 20.0  # an epsilon above this promises nothing that a person could use


def mechanism(experiment: Experiment) -> Mechanism | None:
    """Return the mechanism of an experiment's noise; None without noise."""
    if not experiment.privacy.noisy:
        return None
    found: Mechanism = MECHANISMS.load(name_of(experiment), "privacy")
    return found


def name_of(experiment: Experiment) -> str:
    """Return the name of the mechanism of an experiment's noise, as `fedveil list mechanisms` has it; empty without noise."""
    return mechanism_of(experiment.privacy, experiment.federation) if experiment.privacy.noisy else ""


def observers(experiment: Experiment) -> Mapping[str, str]:
    """Return against whom each epsilon of a run holds, by the name of its column; nothing without noise."""
    found = mechanism(experiment)
    return {} if found is None else found.against(experiment)


def epsilons(experiment: Experiment, shown: Shown) -> dict[str, float]:
    """Return epsilon against each of `observers`, by column, at privacy.delta."""
    found = mechanism(experiment)
    return {} if found is None else found.spent(experiment, experiment.privacy.multiplier, shown)


def exhausted(experiment: Experiment, shown: Shown, asked: int | None = None) -> bool:
    """Say whether another round might spend more than privacy.epsilon.

    asked: the most rounds that one client will be asked in; without it every client counts as asked in the next
    """
    budget = experiment.privacy.epsilon
    if budget is None:
        return False
    after = replace(
        shown,
        rounds=shown.rounds + 1,
        asked=shown.asked + 1 if asked is None else asked,
        fewest=shown.fewest or experiment.federation.cohort,
    )
    return epsilons(experiment, after)["epsilon"] > budget * (1 + 1e-9)


def overspent(experiment: Experiment, shown: Shown, clients: int) -> bool:
    """Say whether a sum of so many clients' updates, if it were seen, would have spent more than privacy.epsilon.

    shown: with the round of the sum. Where each client adds noise of its own, sums of fewer have less.
    """
    budget = experiment.privacy.epsilon
    if budget is None or clients >= (shown.fewest or experiment.federation.cohort):
        return False
    return epsilons(experiment, replace(shown, fewest=clients))["epsilon"] > budget * (1 + 1e-9)


def planned(experiment: Experiment, numbers: int, smallest: int = 0) -> Shown:
    """Return the most that a whole run will have shown.

    numbers: in a model; smallest: examples of the client whose examples are used most, 0 where nobody knows
    """
    federation, clients = experiment.federation, experiment.data.clients
    rounds, cohort = federation.rounds, federation.cohort
    asked = math.ceil(rounds * cohort / clients) if federation.sampling == "order" else rounds
    return Shown(rounds, asked, cohort, clients, cohort, numbers, smallest)


def calibrated(experiment: Experiment, numbers: int, smallest: int = 0) -> Experiment:
    """Return an experiment whose noise spends privacy.epsilon in all its rounds; the same one without a budget.

    numbers, smallest: as in `planned`. An experiment whose noise is calibrated already keeps it.
    Every party of a run finds the same noise from the same settings. What the settings name is not imported for it.
    Raise SettingsError where no noise is enough.
    """
    privacy, found = experiment.privacy, mechanism(experiment)
    if found is None or privacy.epsilon is None or privacy.calibrated is not None:
        return experiment
    end = planned(experiment, numbers, smallest)

    impossible: list[SettingsError] = []

    def spent(multiplier: float) -> float:
        try:
            return found.spent(experiment, multiplier, end)["epsilon"]
        except SettingsError as error:  # so little, or so much, noise may have no grid, where more or less has one
            impossible.append(error)
            return math.inf

    try:
        multiplier = calibrate(spent, privacy.epsilon)
    except SettingsError as error:
        raise (impossible[0] if impossible else error) from None
    return with_multiplier(experiment, float(f"{multiplier * 1.00001:.6g}"))


def describe(experiment: Experiment, *, secret: bool) -> dict[str, Any]:
    """Return what a run guarantees, for whom, and what it does not cover, for its record; nothing without noise.

    secret: the noise came from the operating system's generator, and not from the seed
    """
    found = mechanism(experiment)
    if found is None:
        return {}
    return {
        "mechanism": name_of(experiment),
        "noise_multiplier": experiment.privacy.multiplier,
        "delta": experiment.privacy.delta,
        "epsilon_unit": found.unit,
        "epsilon_against": observers(experiment),
        "guarantee": MECHANISMS[name_of(experiment)],
        "not_covered": NOT_COVERED,
        "noise": SECRET if secret else SEEDED,
    }


def explain(epsilon: float, delta: float, against: str, unit: str) -> str:
    """Write out an epsilon: `epsilon 4.38 at delta 1e-05 for one client's whole data, against ...`.

    Above `MEANINGLESS` the text adds that it is no meaningful guarantee.
    """
    said = f"epsilon {epsilon:.3g} at delta {delta:g} for {unit}, {against}"
    return said if epsilon <= MEANINGLESS else f"{said}: no meaningful guarantee"
