"""Bounds and estimates of epsilon from canaries: against slow tellings of the papers, and by runs of known mechanisms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, norm

from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon
from fedveil.privacy.dp.audit import (
    GUESSES,
    Guessed,
    epsilon_bound,
    epsilon_of,
    gaussian_bound,
    gaussian_estimate,
    guess,
    p_value,
    refutes_gaussian,
)

ERROR = 0.05
Run = tuple[np.ndarray, np.ndarray]


def slow_p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Steinke et al. 2023, theorem 5.2, term by term."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    at = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = max((sum(at[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, sum(at[v:]) + 2 * m * delta * alpha)


def slow_refutes(m: int, r: int, v: int, mu: float, error: float) -> bool:
    """Mahloujifar et al. 2024, algorithm 3 with k = 2, with its lists h and r."""
    hits, misses = [0.0] * (v + 1), [0.0] * (v + 1)
    hits[v], misses[v] = error * v / m, error * (r - v) / m
    for i in range(v - 1, -1, -1):
        misses[i] = max(misses[i + 1], norm.cdf(norm.ppf(min(1.0, hits[i + 1])) - mu))
        hits[i] = hits[i + 1] + i / (r - i) * (misses[i] - misses[i + 1])
    return bool(hits[0] + misses[0] > r / m)


def randomized_response(m: int, epsilon: float, seed: int) -> Run:
    """Coins, each told rightly with probability e^epsilon / (1 + e^epsilon), in scores that break ties at random."""
    rng = np.random.default_rng(seed)
    coins = rng.random(m) < 0.5
    right = rng.random(m) < 1 / (1 + math.exp(-epsilon))
    return np.where(coins == right, 1.0, -1.0) + rng.random(m) / 2, coins


def gaussian(m: int, mu: float, seed: int) -> Run:
    rng = np.random.default_rng(seed)
    coins = rng.random(m) < 0.5
    return rng.standard_normal(m) + mu * coins, coins


@given(
    r=st.integers(1, 60), share=st.floats(0, 1), more=st.integers(0, 100), epsilon=st.floats(0, 4),
    delta=st.sampled_from([0.0, 1e-5, 1e-3]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_p_value_is_that_of_the_theorem_term_by_term(r, share, more, epsilon, delta) -> None:
    v = round(share * r)
    found = p_value(Guessed(r + more, r, v), epsilon, delta)
    assert found == pytest.approx(slow_p_value(r + more, r, v, epsilon, delta), abs=1e-9)


@given(r=st.integers(1, 60), share=st.floats(0, 1), more=st.integers(0, 400), mu=st.floats(0.01, 3))
@settings(max_examples=60, deadline=None)
def test_a_gaussian_curve_is_refuted_where_the_paper_s_algorithm_does(r, share, more, mu) -> None:
    v = round(share * r)
    assert refutes_gaussian(Guessed(r + more, r, v), mu, ERROR) == slow_refutes(r + more, r, v, mu, ERROR)


def test_the_guesses_are_of_the_highest_and_the_lowest_scores() -> None:
    scores, coins = gaussian(1000, 1.0, 0)
    for found in guess(scores, coins):
        half = found.guesses // 2
        ranked = sorted(zip(scores, coins, strict=True))
        right = sum(not coin for _, coin in ranked[:half]) + sum(coin for _, coin in ranked[-half:])
        assert (found.canaries, found.right) == (1000, right)
    assert [found.guesses for found in guess(scores, coins)] == list(GUESSES)


def test_fewer_canaries_than_guesses_are_all_guessed() -> None:
    (found,) = guess(np.array([3.0, 1.0, 2.0]), np.array([True, False, True]))
    assert found == Guessed(3, 3, 3)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_a_bound_exceeds_the_epsilon_of_randomized_response_in_no_more_runs_than_its_chance_of_error(epsilon) -> None:
    """One coin each, independent: the case in which the theorem is tight."""
    runs = 200
    over = sum(epsilon_bound(*randomized_response(500, epsilon, seed), 0.0, ERROR) > epsilon for seed in range(runs))
    assert over <= binom.ppf(0.999, runs, ERROR)


@pytest.mark.parametrize("mu", [0.3, 1.0])
def test_a_bound_of_mu_exceeds_that_of_independent_gaussians_in_no_more_runs_than_its_chance_of_error(mu) -> None:
    runs = 100
    over = sum(gaussian_bound(*gaussian(1000, mu, seed), ERROR) > mu for seed in range(runs))
    assert over <= binom.ppf(0.999, runs, ERROR)


def test_a_bound_of_randomized_response_is_near_its_epsilon() -> None:
    found = [epsilon_bound(*randomized_response(1000, 1.0, seed), 0.0, ERROR) for seed in range(10)]
    assert 0.55 < float(np.median(found)) < 1.0


def test_canaries_that_are_all_guessed_give_the_epsilon_of_which_that_is_as_likely_as_the_error() -> None:
    coins = np.random.default_rng(0).random(1000) < 0.5
    share = ERROR / len(GUESSES)
    q = share ** (1 / max(GUESSES))  # all right with chance q^400
    assert epsilon_bound(coins.astype(float), coins, 0.0, ERROR) == pytest.approx(math.log(q / (1 - q)), rel=1e-6)
    assert gaussian_bound(coins.astype(float), coins, ERROR) > 1.5


def test_scores_that_tell_nothing_give_no_bound_and_no_estimate_worth_naming() -> None:
    for seed in range(5):
        scores, coins = gaussian(2000, 0.0, seed)
        assert epsilon_bound(scores, coins, 1e-5, ERROR) == 0.0
        assert gaussian_bound(scores, coins, ERROR) == 0.0
        assert gaussian_estimate(scores, coins) < 0.15


def test_a_larger_delta_proves_less() -> None:
    scores, coins = gaussian(2000, 2.0, 0)
    bounds = [epsilon_bound(scores, coins, delta, ERROR) for delta in (0.0, 1e-5, 1e-3)]
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > bounds[-1]


def test_the_gaussian_curve_proves_more_than_one_point_of_it() -> None:
    for seed in range(3):
        scores, coins = gaussian(4000, 1.0, seed)
        curve = epsilon_of(gaussian_bound(scores, coins, ERROR), 1e-5)
        assert epsilon_bound(scores, coins, 1e-5, ERROR) < curve < gaussian_epsilon(1.0, 1, 1e-5)


def test_bounds_depend_on_the_order_of_the_scores_alone() -> None:
    scores, coins = gaussian(1000, 1.0, 0)
    assert epsilon_bound(np.exp(3 * scores), coins, 1e-5, ERROR) == epsilon_bound(scores, coins, 1e-5, ERROR)
    assert gaussian_bound(scores**3, coins, ERROR) == gaussian_bound(scores, coins, ERROR)


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_the_estimate_is_near_the_mu_of_gaussians(mu) -> None:
    found = [gaussian_estimate(*gaussian(4000, mu, seed)) for seed in range(5)]
    assert found == pytest.approx([mu] * 5, abs=0.1)


def test_an_estimate_of_noiseless_scores_is_infinite_and_of_too_few_there_is_none() -> None:
    coins = np.array([True, False] * 50)
    assert gaussian_estimate(coins.astype(float), coins) == math.inf
    assert gaussian_estimate(np.zeros(100), coins) == 0.0
    assert math.isnan(gaussian_estimate(np.array([1.0]), np.array([True])))
    assert epsilon_of(math.inf, 1e-5) == math.inf
    assert epsilon_of(0.0, 1e-5) == 0.0
