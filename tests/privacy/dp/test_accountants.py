"""Epsilon against formulas and integrals of our own, published figures and other accountants, and calibration."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm as normal

from fedveil.core.errors import SettingsError
from fedveil.privacy.dp.accounting.accountants import calibrate, gaussian_epsilon, poisson_epsilon, subset_epsilon

multipliers, deltas = st.floats(0.2, 20), st.floats(1e-9, 1e-2)


def exact_delta(epsilon: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8, for a sensitivity of mu standard deviations."""
    tail = math.exp(epsilon + normal.logcdf(-epsilon / mu - mu / 2))
    return float(normal.cdf(mu / 2 - epsilon / mu)) - tail


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


@pytest.mark.parametrize(
    ("population", "cohort", "multiplier", "releases", "delta", "wanted"),
    [(1000, 100, 1.0, 100, 1e-5, 7.05), (10_000, 100, 0.8, 200, 1e-5, 1.80), (10**6, 1000, 0.6, 100, 1e-7, 2.07)],
)
def test_poisson_sampling_costs_what_others_compute(population, cohort, multiplier, releases, delta, wanted) -> None:
    """`wanted`: as dp.md's and Opacus' PRV accountant; Renyi divergences, another library's way, give a looser bound."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    found = poisson_epsilon(multiplier, cohort / population, releases, delta)
    assert found == pytest.approx(wanted, rel=5e-3)
    loose = RdpAccountant()
    loose.compose(PoissonSampledDpEvent(cohort / population, GaussianDpEvent(multiplier)), releases)
    assert found < loose.get_epsilon(delta) < 2 * found


@settings(max_examples=8)
@given(st.floats(0.6, 5), st.integers(1, 50), st.integers(2, 20), st.integers(2, 40))
def test_sampled_epsilons_move_the_same_way_and_grow_with_the_share_that_is_drawn(m, releases, cohort, times) -> None:
    population = cohort * times
    for spent in (
        lambda m, releases, population, delta: poisson_epsilon(m, cohort / population, releases, delta),
        lambda m, releases, population, delta: subset_epsilon(m, population, cohort, releases, delta),
    ):
        epsilon = spent(m, releases, population, 1e-5)
        assert spent(1.5 * m, releases, population, 1e-5) < epsilon
        assert spent(m, releases, population, 1e-4) <= epsilon * 1.001
        assert spent(m, releases + 1, population, 1e-5) >= epsilon * 0.999
        assert spent(m, releases, population - 1, 1e-5) >= epsilon * 0.999
        assert epsilon <= gaussian_epsilon(m, releases, 1e-5)


def test_nothing_shown_costs_nothing_and_no_noise_protects_from_nothing() -> None:
    assert gaussian_epsilon(1.0, 0, 1e-5) == poisson_epsilon(1.0, 0.1, 0, 1e-5) == 0
    assert subset_epsilon(1.0, 100, 10, 0, 1e-5) == 0
    assert gaussian_epsilon(0.0, 1, 1e-5) == poisson_epsilon(0.0, 0.1, 1, 1e-5) == math.inf
    assert subset_epsilon(0.0, 100, 10, 1, 1e-5) == math.inf


@pytest.mark.parametrize("multiplier", [0.7, 1.5, 4.0])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_the_poisson_bound_holds_for_a_sum_that_is_integrated_and_is_tight(multiplier, share) -> None:
    delta, x = 1e-5, np.linspace(-3 - 10 * multiplier, 4 + 10 * multiplier, 400_001)
    without = normal.pdf(x, 0, multiplier)
    one = (1 - share) * without + share * normal.pdf(x, 1, multiplier)
    epsilon = poisson_epsilon(multiplier, share, 1, delta)
    divergences = [
        [np.trapezoid(np.maximum(p - math.exp(e) * q, 0), x) for p, q in ((one, without), (without, one))]
        for e in (epsilon, 0.98 * epsilon)
    ]
    assert max(divergences[0]) <= delta * 1.001 < max(divergences[1])


@pytest.mark.parametrize("multiplier", [0.7, 1.5, 4.0])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("others", [-1, 0, 1])
def test_the_bound_of_subsets_holds_for_sums_that_are_integrated(multiplier, share, others) -> None:
    """One number a client: the one in question sends 1, or nothing; all others send `others`. Both ways round.

    Without it a sum has another client in its place, so that the two mixtures have the parts 0, 1 - others (0, -others).
    """
    delta = 1e-5
    epsilon = subset_epsilon(multiplier, 1000, int(1000 * share), 1, delta)
    x = np.linspace(-4 - 10 * multiplier, 4 + 10 * multiplier, 200_001)
    without = (1 - share) * normal.pdf(x, 0, multiplier)
    one = without + share * normal.pdf(x, 1 - others, multiplier)
    other = without + share * normal.pdf(x, -others, multiplier)
    for p, q in ((one, other), (other, one)):
        assert np.trapezoid(np.maximum(p - math.exp(epsilon) * q, 0), x) <= delta


def test_the_bound_of_subsets_holds_for_two_rounds_that_are_integrated() -> None:
    """Two answers in a plane, of the mixtures above: the composed bound covers what no single round shows."""
    multiplier, share, delta = 1.5, 0.3, 1e-4
    epsilon = subset_epsilon(multiplier, 1000, 300, 2, delta)
    x = np.linspace(-18, 18, 1501)
    one = (1 - share) * normal.pdf(x, 0, multiplier) + share * normal.pdf(x, 2, multiplier)
    other = (1 - share) * normal.pdf(x, 0, multiplier) + share * normal.pdf(x, 1, multiplier)
    for p, q in ((one, other), (other, one)):
        both = np.maximum(np.outer(p, p) - math.exp(epsilon) * np.outer(q, q), 0)
        assert np.trapezoid(np.trapezoid(both, x), x) <= delta


def test_the_bound_of_subsets_is_tighter_than_renyi_divergences() -> None:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SampledWithoutReplacementDpEvent
    from dp_accounting.rdp import RdpAccountant

    loose = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    loose.compose(SampledWithoutReplacementDpEvent(1000, 100, GaussianDpEvent(0.5)), 100)
    found = subset_epsilon(1.0, 1000, 100, 100, 1e-5)
    assert 34.1 < found < 34.3
    assert loose.get_epsilon(1e-5) > 2 * found


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0, 8.0, 50.0])
@pytest.mark.parametrize(
    "spent",
    [
        lambda z: gaussian_epsilon(z, 20, 1e-5),
        lambda z: poisson_epsilon(z, 0.1, 100, 1e-5),
        lambda z: poisson_epsilon(z, 0.001, 100, 1e-7),
        lambda z: subset_epsilon(z, 1000, 100, 60, 1e-5),
    ],
    ids=["all", "poisson", "poisson of a million", "subsets"],
)
def test_calibrated_noise_spends_the_budget_and_no_more(spent, epsilon) -> None:
    multiplier = calibrate(spent, epsilon)
    assert spent(multiplier) <= epsilon
    assert spent(multiplier * 0.998) > epsilon * 0.999


def test_a_budget_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"privacy.epsilon = 0.5: no noise is enough for so small a budget"):
        calibrate(lambda _z: 1.0, 0.5)


def test_the_accountant_is_imported_only_where_there_is_noise() -> None:
    code = (
        "import sys\nfrom fedveil import Experiment\n"
        "from fedveil.privacy.dp.accounting.guarantee import epsilons\nfrom fedveil.privacy.dp.accounting.mechanisms import Shown\n"
        "assert epsilons(Experiment(privacy={'clip': 1.0}), Shown(1, 1, 10, 10, 10, 100)) == {}\n"
        "print([m for m in sys.modules if m.startswith('dp_accounting')])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
