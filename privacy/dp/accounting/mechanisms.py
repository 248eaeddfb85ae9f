"""The combinations of noise that FedVeil has: what each guarantees, against whom, how it is accounted, what is refused.

`core/settings/checks.mechanism_of` names the combination of an experiment's settings; `fedveil list mechanisms` lists
all. Two runs are neighbours where one has a client's data, and in the other that client's update counts as zero (the
zero-out relation of Kairouz et al. 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling"); under
Poisson sampling, where one has a client more. Cohorts are drawn without looking at data, and sums are divided by public
numbers. So sums of neighbours differ by C at most. Where a client, or an example, has other data instead, they differ
by 2 C: the same as half the noise multiplier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Settings
from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon, poisson_epsilon, subset_epsilon
from fedveil.privacy.dp.accounting.refusals import (
    nothing_more,
    refuse_for_examples,
    refuse_for_examples_in_sums,
    refuse_for_shares,
    refuse_uncovered,
)
from fedveil.privacy.dp.distributed import NoiseShare, divergences, effective_multiplier
from fedveil.privacy.dp.sensitivity import of_updates
from fedveil.privacy.plan import plan_for, share_for

ORDERS = [*range(2, 65), 80, 96, 128, 192, 256, 512, 1024]  # of Renyi divergences, where noise is Skellam's
CLIENT, EXAMPLE = "one client's whole data", "one example of a client"
KNOWN = "epsilon_known"
KNOWING = "against who also knows who took part, as the server and a neighbour in secure aggregation do"


@dataclass(frozen=True)
class Shown:
    """What a run has released so far. None of these numbers depends on what the data says.

    rounds: rounds whose models were made; asked: the most rounds that one client was asked in
    fewest: clients in the smallest sum of updates
    population, cohort: the fewest clients that a cohort was drawn from, and the largest cohort
    numbers: in a model
    smallest: examples of the client whose examples are used most; 0 where nobody knows
    """

    rounds: int
    asked: int
    fewest: int
    population: int
    cohort: int
    numbers: int
    smallest: int = 0


Spent = Callable[[Experiment, float, Shown], dict[str, float]]


@dataclass(frozen=True)
class Mechanism:
    """A combination of noise and sampling.

    unit: whose data epsilon is about
    against: by column of metrics.csv, against whom that epsilon holds
    spent: (experiment, noise multiplier, what was shown) -> epsilon by column; `epsilon` is what a budget is about
    refuse: raises SettingsError for settings with which the guarantee would not hold
    """

    unit: str
    against: Callable[[Experiment], Mapping[str, str]]
    spent: Spent
    refuse: Callable[[Settings], None]

    def check(self, experiment: Settings) -> None:
        """Raise SettingsError, with the reason and the nearest that works, where the settings cannot be guaranteed."""
        refuse_uncovered(experiment)
        self.refuse(experiment)


def lengthened(experiment: Experiment, shown: Shown) -> float:
    """Return how much longer than C a client's part of a sum may be, as rounding to a grid precedes the server's noise.

    Each of d numbers moves by a unit of rounding at most: (C + sqrt(d) unit) / C.
    """
    privacy = of_updates(experiment)
    if not privacy.protected or privacy.bound is None:
        return 1.0
    plan = plan_for(experiment)
    return 1 + math.sqrt(shown.numbers) * plan.grid.step * plan.cohort / privacy.bound


def knowing(experiment: Experiment) -> int:
    """Return how many clients of a cohort may tell the observer of a sum their own noise."""
    privacy = experiment.privacy
    colluders = privacy.protection.colluders if privacy.shows == "mean" else 0.0
    return max(1, math.floor(experiment.federation.cohort * colluders + 1e-9))  # 0.29 of 100 are 29, not 28


def rate_of(experiment: Experiment, examples: int) -> float:
    """Return the probability that a step uses one example of a client that has so many; 1 where nobody knows."""
    size = experiment.training.batch_size
    return 1.0 if size == "full" or not examples else min(1.0, size / examples)


def steps_of(experiment: Experiment, examples: int) -> int:
    """Return the local steps of a client with so many examples in a round."""
    training = experiment.training
    size = max(1, examples) if training.batch_size == "full" else min(training.batch_size, max(1, examples))
    return training.steps or training.epochs * math.ceil(max(1, examples) / size)


def _by_poisson(experiment: Experiment, multiplier: float, shown: Shown) -> dict[str, float]:
    multiplier /= lengthened(experiment, shown)
    delta, rate = experiment.privacy.delta, experiment.federation.cohort / experiment.data.clients
    known = gaussian_epsilon(multiplier, shown.asked, delta)
    return {"epsilon": min(known, poisson_epsilon(multiplier, rate, shown.rounds, delta)), KNOWN: known}


def _by_order(experiment: Experiment, multiplier: float, shown: Shown) -> dict[str, float]:
    return {
        "epsilon": gaussian_epsilon(multiplier / lengthened(experiment, shown), shown.asked, experiment.privacy.delta)
    }


def _by_subsets(experiment: Experiment, multiplier: float, shown: Shown) -> dict[str, float]:
    multiplier, delta = multiplier / lengthened(experiment, shown), experiment.privacy.delta
    known = gaussian_epsilon(multiplier, shown.asked, delta)
    if experiment.federation.cohort >= experiment.data.clients:
        return {"epsilon": known}
    found = known
    if shown.rounds and shown.cohort < shown.population:
        found = subset_epsilon(multiplier, shown.population, shown.cohort, shown.rounds, delta)
    return {"epsilon": min(known, found), KNOWN: known}


def _own_noise(experiment: Experiment, multiplier: float, shown: Shown) -> dict[str, float]:
    """Return epsilon of each update, and of their sum, which has the noise of all clients but those who tell theirs."""
    delta, honest = (
        experiment.privacy.delta,
        max(0, (shown.fewest or experiment.federation.cohort) - knowing(experiment)),
    )
    update = gaussian_epsilon(multiplier, shown.asked, delta)
    found = gaussian_epsilon(multiplier * math.sqrt(honest), shown.asked, delta)
    if experiment.privacy.protected:
        return {"epsilon": found, "epsilon_update": update}
    # an encoding other than float32 rounds each update's noise away from the sum
    return {"epsilon": update} | ({"epsilon_sum": found} if experiment.communication.encoding == "float32" else {})


def _distributed(experiment: Experiment, multiplier: float, shown: Shown) -> dict[str, float]:
    """Return epsilon of sums with shares of noise, of the fewest clients that a sum may have."""
    federation, delta = experiment.federation, experiment.privacy.delta
    share, honest = _share_of(experiment, multiplier, shown)
    if experiment.privacy.distribution == "skellam":
        return {"epsilon": _divergent(share, honest, shown.asked, delta)}
    equal, slack = effective_multiplier(share, honest)
    known = _slackened(lambda less: gaussian_epsilon(equal, shown.asked, less), delta, slack * shown.asked)
    if federation.sampling != "poisson":
        return {"epsilon": known}
    rate = federation.cohort / experiment.data.clients
    sampled = _slackened(lambda less: poisson_epsilon(equal, rate, shown.rounds, less), delta, slack * shown.rounds)
    return {"epsilon": min(known, sampled), KNOWN: known}


def _share_of(experiment: Experiment, multiplier: float, shown: Shown) -> tuple[NoiseShare, int]:
    """Return a client's share of the noise with this multiplier, and how many shares each sum has at least."""
    found = with_multiplier(experiment, multiplier)
    plan = plan_for(found)
    return share_for(found, plan, shown.numbers), plan.honest


def _slackened(spent: Callable[[float], float], delta: float, slack: float) -> float:
    """Return epsilon of mechanisms that are Gaussian but for factors within exp(slack), in all."""
    return spent(delta * math.exp(-slack)) + 2 * slack


def _divergent(share: NoiseShare, honest: int, releases: int, delta: float) -> float:
    """Return epsilon of so many sums with Skellam noise, from Renyi divergences."""
    from dp_accounting.rdp import compute_epsilon

    if releases == 0:
        return 0.0
    orders = [float(order) for order in ORDERS]
    epsilon, _ = compute_epsilon(np.array(orders), releases * divergences(share, honest, orders), delta)
    return float(epsilon)


def with_multiplier(experiment: Experiment, multiplier: float) -> Experiment:
    """Return an experiment with another noise multiplier; it is for computing, and not checked."""
    key = "noise_multiplier" if experiment.privacy.epsilon is None else "calibrated"
    privacy = experiment.privacy.model_copy(update={key: multiplier})
    return experiment.model_copy(update={"privacy": privacy})


def _own_examples(experiment: Experiment, multiplier: float, shown: Shown) -> dict[str, float]:
    """Return epsilon of an example, of the client with the fewest, whose examples are used most often."""
    rate, releases = rate_of(experiment, shown.smallest), shown.asked * steps_of(experiment, shown.smallest)
    return {"epsilon": poisson_epsilon(multiplier, rate, releases, experiment.privacy.delta)}


def _examples_in_sums(experiment: Experiment, multiplier: float, shown: Shown) -> dict[str, float]:
    rate, federation, slack = rate_of(experiment, shown.smallest), experiment.federation, 0.0
    if experiment.privacy.noise_at == "distributed":
        multiplier, slack = effective_multiplier(*_share_of(experiment, multiplier, shown))
    else:
        multiplier /= lengthened(experiment, shown)

    def spent(rate: float, releases: int) -> float:
        return _slackened(
            lambda less: poisson_epsilon(multiplier, rate, releases, less), experiment.privacy.delta, slack * releases
        )

    known = spent(rate, shown.asked)
    if federation.sampling != "poisson":
        return {"epsilon": known}
    share = federation.cohort / experiment.data.clients
    return {"epsilon": min(known, spent(rate * share, shown.rounds)), KNOWN: known}


def _models(experiment: Experiment) -> dict[str, str]:
    sees = "each update" if not experiment.privacy.protected else "each sum of updates"
    found = {
        "epsilon": f"against who sees the models, and not who took part; none against the server, which sees {sees}",
        KNOWN: f"against who sees the models, and who took part; none against the server, which sees {sees}",
    }
    counts = experiment.federation.sampling == "poisson" or not experiment.privacy.per_example
    return found if _sampled(experiment) and counts else {"epsilon": found[KNOWN]}


def _sums(experiment: Experiment) -> dict[str, str]:
    helped = _helpers(experiment)
    with_server = (
        "" if experiment.privacy.shows == "mean" else ", unless it works with the server: both open every upload"
    )
    start = f"against who sees sums of updates and the models, the server too, helped by {helped}{with_server}"
    if not _sampled(experiment) or experiment.federation.sampling == "fixed":
        return {"epsilon": start}
    return {"epsilon": "against who sees the models, and not who took part", KNOWN: f"{start}; {KNOWING}"}


def _updates(experiment: Experiment) -> dict[str, str]:
    found = {"epsilon": "against the server, which sees each update"}
    if experiment.communication.encoding == "float32":
        found["epsilon_sum"] = "against who sees the models alone, another client say; float32's rounding not counted"
    return found


def _protected_updates(experiment: Experiment) -> dict[str, str]:
    return {
        "epsilon": (
            f"against who sees sums of updates and the models alone, helped by {_helpers(experiment)}: not a server that lies"
        ),
        "epsilon_update": "against who comes to see a client's own update, a server that lies too",
    }


def _everybody(_experiment: Experiment) -> dict[str, str]:
    return {
        "epsilon": "against everybody but its own client, the server too; of the client whose examples are used most"
    }


def _helpers(experiment: Experiment) -> str:
    helped = knowing(experiment)
    return f"{helped} client{'s' if helped > 1 else ''}"


def _sampled(experiment: Experiment) -> bool:
    """Say whether there are clients who may not have taken part, and whose absence nobody is told."""
    federation = experiment.federation
    return federation.sampling == "poisson" or (
        federation.sampling == "fixed" and federation.cohort < experiment.data.clients
    )


SERVER_POISSON = Mechanism(CLIENT, _models, _by_poisson, nothing_more)
SERVER_ORDER = Mechanism(CLIENT, _models, _by_order, nothing_more)
SERVER_BANDED = Mechanism(CLIENT, _models, _by_order, nothing_more)
SERVER_FIXED = Mechanism(CLIENT, _models, _by_subsets, nothing_more)
CLIENT_CLEAR = Mechanism(CLIENT, _updates, _own_noise, nothing_more)
CLIENT_SUM = Mechanism(CLIENT, _protected_updates, _own_noise, nothing_more)
CLIENT_DISTRIBUTED = Mechanism(CLIENT, _sums, _distributed, refuse_for_shares)
EXAMPLE_CLIENT = Mechanism(EXAMPLE, _everybody, _own_examples, refuse_for_examples)
EXAMPLE_SERVER = Mechanism(EXAMPLE, _models, _examples_in_sums, refuse_for_examples_in_sums)
EXAMPLE_DISTRIBUTED = Mechanism(EXAMPLE, _sums, _examples_in_sums, refuse_for_examples_in_sums)
