"""What each combination of noise guarantees, against whom, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil import Experiment
from fedveil.core.catalog import MECHANISMS
from fedveil.core.errors import SettingsError
from fedveil.models.local.batches import steps_of as steps_in_training
from fedveil.models.local.private import rate_of as chance_in_training
from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon, poisson_epsilon, subset_epsilon
from fedveil.privacy.dp.accounting.guarantee import (
    calibrated,
    epsilons,
    exhausted,
    explain,
    name_of,
    observers,
    planned,
)
from fedveil.privacy.dp.accounting.mechanisms import CLIENT, Shown, rate_of, steps_of
from fedveil.privacy.dp.examples import most_used, own_multiplier


def noisy(**privacy) -> Experiment:
    federation = {"cohort": 10}
    return Experiment(federation=federation, privacy={"clip": 1.0, "noise_multiplier": 1.0, **privacy})


def test_without_noise_there_is_no_epsilon() -> None:
    shown = Shown(rounds=1, asked=1, fewest=10, population=10, cohort=10, numbers=100)
    for experiment in (Experiment(), Experiment(privacy={"clip": 1.0})):
        assert observers(experiment) == epsilons(experiment, shown) == {}


@pytest.mark.parametrize("protection", ["none", "secagg", "ckks", "bfv"])
def test_noise_of_clients_adds_up_for_who_sees_sums_alone(protection) -> None:
    shown = Shown(rounds=9, asked=4, fewest=9, population=100, cohort=10, numbers=100)
    found = epsilons(noisy(protection=protection), shown)
    knowing = 2 if protection == "secagg" else 1  # colluders: 0.2 of 10
    update, total = gaussian_epsilon(1.0, 4, 1e-5), gaussian_epsilon(math.sqrt(9 - knowing), 4, 1e-5)
    if protection == "none":
        assert found == {"epsilon": update, "epsilon_sum": total}
    else:
        assert found == {"epsilon": total, "epsilon_update": update}
    assert list(found) == list(observers(noisy(protection=protection)))


def test_epsilon_of_a_sum_is_said_to_be_against_no_server_that_lies_and_is_not_told_of_what_rounds_by_itself() -> None:
    for protection, helped in (("secagg", "2 clients"), ("ckks", "1 client"), ("bfv", "1 client")):
        said = observers(noisy(protection=protection))
        assert said["epsilon"].endswith(f"helped by {helped}: not a server that lies")
        assert "a server that lies too" in said["epsilon_update"]
    shown = Shown(rounds=1, asked=1, fewest=10, population=10, cohort=10, numbers=100)
    for encoding in ("float16", "int8"):
        rough = noisy().override({"communication.encoding": encoding})
        assert list(observers(rough)) == ["epsilon"]
        assert epsilons(rough, shown) == {"epsilon": gaussian_epsilon(1.0, 1, 1e-5)}


def test_a_client_alone_in_its_sum_has_no_noise_of_others() -> None:
    found = epsilons(noisy(), Shown(rounds=1, asked=1, fewest=1, population=10, cohort=1, numbers=100))
    assert found["epsilon_sum"] == math.inf


def test_noise_of_the_server_is_accounted_by_the_better_of_two_bounds() -> None:
    everybody = noisy(noise_at="server")
    all_of_them = Shown(rounds=3, asked=3, fewest=10, population=10, cohort=10, numbers=100)
    assert epsilons(everybody, all_of_them) == {"epsilon": gaussian_epsilon(1.0, 3, 1e-5)}
    assert list(observers(everybody)) == ["epsilon"]
    some = everybody.override({"data.clients": 1000})
    assert list(observers(some)) == ["epsilon", "epsilon_known"]
    many = Shown(rounds=100, asked=90, fewest=10, population=1000, cohort=10, numbers=100)
    known = gaussian_epsilon(1.0, 90, 1e-5)
    assert epsilons(some, many) == {"epsilon": subset_epsilon(1.0, 1000, 10, 100, 1e-5), "epsilon_known": known}
    assert epsilons(some, many)["epsilon"] < known
    few = Shown(rounds=1, asked=1, fewest=10, population=1000, cohort=10, numbers=100)
    assert epsilons(some, few)["epsilon"] <= gaussian_epsilon(1.0, 1, 1e-5)


def test_coins_and_orders_are_accounted_as_they_are() -> None:
    shown = Shown(rounds=60, asked=9, fewest=80, population=1000, cohort=121, numbers=100)
    some = noisy(noise_at="server").override({"data.clients": 1000, "federation.cohort": 100})
    known = gaussian_epsilon(1.0, 9, 1e-5)
    poisson = some.override({"federation.sampling": "poisson"})
    assert epsilons(poisson, shown) == {"epsilon": poisson_epsilon(1.0, 0.1, 60, 1e-5), "epsilon_known": known}
    for noise in ("independent", "banded"):
        order = some.override({"federation.sampling": "order", "privacy.noise": noise})
        assert epsilons(order, shown) == {"epsilon": known}
        assert list(observers(order)) == ["epsilon"]


def test_examples_are_accounted_by_the_client_whose_examples_are_used_most() -> None:
    """A client with one example more than a batch takes two steps of nearly all, and one with a batch takes one of all."""
    own = Experiment(
        training={"batch_size": 32, "epochs": 1}, privacy={"clip": 1.0, "noise_multiplier": 1.0, "unit": "example"}
    )

    def spent(experiment: Experiment, examples: int) -> float:
        return epsilons(experiment, planned(experiment, 0, examples))["epsilon"]

    sizes = np.array([32, 33, 40, 64, 65, 200, 31])
    assert most_used(own, 31, sizes) == most_used(own, 31) == 33
    assert spent(own, 33) == max(spent(own, int(n)) for n in sizes) > 1.4 * spent(own, 31)
    assert all(
        spent(own, most_used(own, least)) >= spent(own, n) for least in (1, 30, 70) for n in range(least, 300, 7)
    )
    assert most_used(own, 31, np.array([31, 32])) == 31
    assert most_used(own, 40, np.array([40, 300])) == 40
    for others in ({"training.batch_size": "full"}, {"training.steps": 3, "training.epochs": None}):
        assert most_used(own.override(others), 31, sizes) == 31
    budget = own.override({"privacy.noise_multiplier": None, "privacy.epsilon": 3.0})  # each has noise for its own
    assert most_used(budget, 31, sizes) == 31
    assert own_multiplier(budget, 33) > own_multiplier(budget, 32)


def test_examples_are_accounted_by_the_steps_and_the_batches_of_a_client() -> None:
    own = Experiment(
        training={"batch_size": 10, "epochs": 2}, privacy={"clip": 1.0, "noise_multiplier": 1.0, "unit": "example"}
    )
    shown = Shown(rounds=5, asked=3, fewest=10, population=10, cohort=10, numbers=100, smallest=95)
    assert epsilons(own, shown) == {"epsilon": poisson_epsilon(1.0, 10 / 95, 3 * 20, 1e-5)}
    unknown = Shown(rounds=5, asked=3, fewest=10, population=10, cohort=10, numbers=100)
    assert epsilons(own, unknown)["epsilon"] == gaussian_epsilon(1.0, 3 * 2, 1e-5)
    one = own.override({"training.steps": 1, "training.epochs": None, "privacy.noise_at": "server"})
    assert epsilons(one, shown) == {"epsilon": poisson_epsilon(1.0, 10 / 95, 3, 1e-5)}
    coins = one.override({"data.clients": 100, "federation.sampling": "poisson"})
    assert epsilons(coins, shown) == {
        "epsilon": poisson_epsilon(1.0, 10 / 95 / 10, 5, 1e-5),
        "epsilon_known": poisson_epsilon(1.0, 10 / 95, 3, 1e-5),
    }


EVERY = {
    "server-poisson": {"noise_at": "server", "sampling": "poisson"},
    "server-order": {"noise_at": "server", "sampling": "order"},
    "server-banded": {"noise_at": "server", "sampling": "order", "noise": "banded"},
    "server-fixed": {"noise_at": "server"},
    "client-clear": {},
    "client-sum": {"protection": "secagg"},
    "client-distributed": {"noise_at": "distributed", "protection": "secagg"},
    "example-client": {"unit": "example"},
    "example-server": {"unit": "example", "noise_at": "server"},
    "example-distributed": {"unit": "example", "noise_at": "distributed", "protection": "bfv"},
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_budget_decides_the_noise_of_each_mechanism_and_ends_with_its_rounds(name) -> None:
    settings = dict(EVERY[name])
    federation = {"cohort": 10, "rounds": 12, "sampling": settings.pop("sampling", "fixed")}
    experiment = Experiment(
        data={"clients": 40},
        federation=federation,
        training={"steps": 1},
        privacy={"clip": 1.0, "epsilon": 3.0, **settings},
    )
    assert name_of(experiment) == name
    made = calibrated(experiment, 1000, smallest=50)
    assert calibrated(made, 1000, smallest=50) is made
    end = planned(made, 1000, smallest=50)
    assert 2.99 < epsilons(made, end)["epsilon"] <= 3.0
    assert list(epsilons(made, end)) == list(observers(made))
    assert exhausted(made, end)
    assert not exhausted(made, Shown(0, 0, 0, 0, 0, 1000, 50))
    assert not exhausted(experiment.override({"privacy.epsilon": None, "privacy.noise_multiplier": 9.0}), end)
    assert Experiment.parse(made.toml()) == made


REFUSED = [
    ({"privacy.noise_multiplier": 1.0}, "privacy.epsilon = 3.0, privacy.noise_multiplier = 1: a budget decides how much"),
    ({"privacy.clip": None}, "privacy.epsilon = 3: noise hides an update only up to its norm"),
    ({"privacy.noise_at": "distributed"}, "privacy.protection = 'none' shows each update; use secagg or bfv"),
    ({"privacy.noise_at": "distributed", "privacy.protection": "ckks"}, "'ckks' adds noise of its own"),
    ({"privacy.noise_at": "server", "privacy.protection": "bfv"}, "use privacy.noise_at = 'distributed'"),
    ({"privacy.noise": "banded", "privacy.noise_at": "server"}, "use it with federation.sampling = 'order'"),
    (
        {"privacy.noise": "banded", "privacy.noise_at": "server", "federation.sampling": "order", "federation.cohort": 8},
        "there is nothing to take back; use 'independent'",
    ),
    ({"privacy.clip": "adaptive"}, "privacy.clip = 'adaptive': the server finds the bound"),
    ({"privacy.clip": "adaptive", "privacy.noise_at": "server", "privacy.unit": "example"}, "privacy.clip = 'adaptive'"),
    ({"privacy.leak_guard": "refuse"}, "would depend on its data"),
    ({"communication.encoding": "int8"}, "communication.encoding = 'int8': carries what it lost"),
    ({"privacy.unit": "example", "privacy.noise_at": "server"}, "set training.steps = 1, or privacy.noise_at = 'client'"),
    (
        {"privacy.unit": "example", "privacy.noise_at": "server", "training.steps": 1, "training.optimizer": "adam"},
        "training.optimizer = 'adam': noise in the sum hides gradients",
    ),
    ({"privacy.unit": "example", "training.max_grad_norm": 1.0}, "each example's gradient is clipped to privacy.clip"),
    ({"privacy.delta": 0.1}, "must be smaller than 1 / data.clients"),
    ({"federation.sampling": "poisson", "privacy.protection": "bfv"}, "cannot divide what it cannot read; use secagg"),
    ({"data.dataset": "spam-demo", "model.name": "bag"}, "data.vocabulary = 'train': is made of the clients' own words"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "said"), REFUSED)
def test_what_no_noise_would_cover_is_refused_with_what_works(settings, said) -> None:
    with pytest.raises(SettingsError) as refused:
        Experiment.preset("digits").override({"privacy.clip": 1.0, "privacy.epsilon": 3.0, **settings})
    assert said in str(refused.value)


def test_an_epsilon_is_said_with_its_unit_and_above_20_with_what_it_is_worth() -> None:
    assert (
        explain(4.377, 1e-5, "against all", CLIENT)
        == "epsilon 4.38 at delta 1e-05 for one client's whole data, against all"
    )
    assert "no meaningful guarantee" not in explain(20.0, 1e-5, "against all", CLIENT)
    assert explain(20.1, 1e-5, "against all", CLIENT).endswith("against all: no meaningful guarantee")
    assert explain(math.inf, 1e-5, "against all", CLIENT).startswith("epsilon inf at delta")


@given(st.integers(1, 300), st.sampled_from([1, 7, 64, 300, "full"]), st.integers(1, 4), st.sampled_from([None, 1, 9]))
def test_what_is_accounted_is_what_training_does(examples, batch_size, epochs, steps) -> None:
    """The chance of an example and the number of steps stand in two rooms, neither of which may import the other."""
    training = {"batch_size": batch_size} | ({"epochs": epochs} if steps is None else {"steps": steps})
    experiment = Experiment(training=training)
    assert rate_of(experiment, examples) == chance_in_training(examples, experiment.training)
    assert steps_of(experiment, examples) == steps_in_training(examples, experiment.training)
