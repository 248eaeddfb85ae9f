"""Epsilon against formulas and integrals of our own, and how it moves with all it depends on."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm as normal

from fedveil import Experiment
from fedveil.privacy.dp.accounting import (
    Shown,
    epsilons,
    explain,
    gaussian_epsilon,
    observers,
    sampled_epsilon,
)

multipliers, deltas = st.floats(0.2, 20), st.floats(1e-9, 1e-2)


def exact_delta(epsilon: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8, for a sensitivity of mu standard deviations."""
    tail = math.exp(epsilon + normal.logcdf(-epsilon / mu - mu / 2))
    return float(normal.cdf(mu / 2 - epsilon / mu)) - tail


def noisy(**privacy) -> Experiment:
    federation = {"cohort": 10}
    return Experiment(federation=federation, privacy={"clip": 1.0, "noise_multiplier": 1.0, **privacy})


@pytest.mark.parametrize(("multiplier", "wanted"), [(0.01, 5426), (0.1, 91.8), (0.5, 9.997), (1, 4.377), (2, 1.993)])
def test_one_release_has_the_published_epsilon(multiplier, wanted) -> None:
    assert gaussian_epsilon(multiplier, 1, 1e-5) == pytest.approx(wanted, rel=5e-4)


@given(multipliers, st.integers(1, 400), deltas)
def test_epsilon_of_many_releases_gives_back_delta(multiplier, releases, delta) -> None:
    epsilon = gaussian_epsilon(multiplier, releases, delta)
    assert exact_delta(epsilon, math.sqrt(releases) / multiplier) == pytest.approx(delta, rel=1e-4)


@given(multipliers, st.integers(1, 100), deltas, st.floats(1.01, 3))
def test_more_noise_or_a_larger_delta_is_less_epsilon_and_more_releases_are_more(m, releases, delta, more) -> None:
    epsilon = gaussian_epsilon(m, releases, delta)
    assert gaussian_epsilon(m * more, releases, delta) < epsilon
    assert gaussian_epsilon(m, releases, min(delta * more, 0.5)) < epsilon
    assert gaussian_epsilon(m, releases + 1, delta) > epsilon


@settings(deadline=None, max_examples=2)
@given(st.floats(0.5, 5), st.integers(1, 50), st.integers(2, 20), st.integers(2, 40))
def test_a_sampled_bound_moves_the_same_way_and_grows_with_the_share_that_is_drawn(m, releases, cohort, times) -> None:
    population = cohort * times
    epsilon = sampled_epsilon(m, releases, population, cohort, 1e-5)
    assert sampled_epsilon(1.5 * m, releases, population, cohort, 1e-5) < epsilon
    assert sampled_epsilon(m, releases, population, cohort, 1e-4) <= epsilon
    assert sampled_epsilon(m, releases + 1, population, cohort, 1e-5) >= epsilon
    assert sampled_epsilon(m, releases, population - 1, cohort, 1e-5) >= epsilon * (1 - 1e-9)


def test_nothing_shown_costs_nothing_and_no_noise_protects_from_nothing() -> None:
    assert gaussian_epsilon(1.0, 0, 1e-5) == sampled_epsilon(1.0, 0, 100, 10, 1e-5) == 0
    assert gaussian_epsilon(0.0, 1, 1e-5) == sampled_epsilon(0.0, 1, 100, 10, 1e-5) == math.inf


@pytest.mark.parametrize("multiplier", [0.7, 1.5, 4.0])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("others", [-1, 0, 1])
@pytest.mark.parametrize("instead", [0.0, -1.0])
def test_the_sampled_bound_holds_for_sums_that_are_integrated(multiplier, share, others, instead) -> None:
    """One number a client: the one in question sends 1, or `instead`; all others send `others`. Both ways round.

    Without it a sum has another client in its place, so that the two mixtures have the parts 0, 1 - others (0, instead - others).
    """
    delta = 1e-5
    epsilon = sampled_epsilon(multiplier, 1, 1000, int(1000 * share), delta)
    x = np.linspace(-4 - 10 * multiplier, 4 + 10 * multiplier, 200_001)
    without = (1 - share) * normal.pdf(x, 0, multiplier)
    one = without + share * normal.pdf(x, 1 - others, multiplier)
    other = without + share * normal.pdf(x, instead - others, multiplier)
    for p, q in ((one, other), (other, one)):
        assert np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x) <= delta


def test_without_sampling_the_bound_is_that_of_two_sensitivities() -> None:
    """Renyi divergence alpha / 2 (2 / z)^2 of Gaussians 2 C apart, turned into epsilon: above the exact one, and near it."""
    bound, exact = sampled_epsilon(4.0, 5, 10, 10, 1e-5), gaussian_epsilon(2.0, 5, 1e-5)
    assert exact < bound < 1.15 * exact


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
    all_of_them = Shown(rounds=3, asked=3, fewest=10, population=10, cohort=10, numbers=100)
    assert epsilons(noisy(noise_at="server"), all_of_them) == {"epsilon": gaussian_epsilon(1.0, 3, 1e-5)}
    many = Shown(rounds=100, asked=30, fewest=10, population=1000, cohort=10, numbers=100)
    assert epsilons(noisy(noise_at="server"), many) == {"epsilon": sampled_epsilon(1.0, 100, 1000, 10, 1e-5)}
    few = Shown(rounds=1, asked=1, fewest=10, population=1000, cohort=10, numbers=100)
    assert epsilons(noisy(noise_at="server"), few) == {"epsilon": gaussian_epsilon(1.0, 1, 1e-5)}


def test_an_epsilon_is_said_with_its_unit_and_above_20_with_what_it_is_worth() -> None:
    assert explain(4.377, 1e-5, "against all") == "epsilon 4.38 at delta 1e-05 for one client's whole data, against all"
    assert "no meaningful guarantee" not in explain(20.0, 1e-5, "against all")
    assert explain(20.1, 1e-5, "against all").endswith("against all: no meaningful guarantee")
    assert explain(math.inf, 1e-5, "against all").startswith("epsilon inf at delta")


def test_the_accountant_is_imported_only_where_there_is_noise() -> None:
    code = (
        "import sys\nfrom fedveil import Experiment\n"
        "from fedveil.privacy.dp.accounting import Shown, epsilons\n"
        "assert epsilons(Experiment(privacy={'clip': 1.0}), Shown(1, 1, 10, 10, 10, 100)) == {}\n"
        "print([m for m in sys.modules if m.startswith('dp_accounting')])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
