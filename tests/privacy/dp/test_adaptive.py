"""The bound that follows the updates' norms: what it costs, where it settles, and that it cannot run away."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.privacy.dp.adaptive import (
    QUANTILE,
    RATE,
    START,
    count_deviation,
    next_bound,
    noisy_share,
    sum_multiplier,
)


@given(st.floats(1e-3, 1e3), st.integers(1, 10**6))
def test_the_sum_and_the_count_together_cost_what_the_sum_alone_would(z: float, cohort: int) -> None:
    """One client changes the vector (sum / (z_s C), count / s), whose noise is standard normal, by 1 / z at most."""
    s, z_s = count_deviation(z, cohort), sum_multiplier(z, cohort)
    assert math.isclose(math.hypot(1 / z_s, 0.5 / s), 1 / z, rel_tol=1e-9)
    assert z < z_s <= z * math.sqrt(4 / 3) * (1 + 1e-9)
    assert s >= cohort / 20


@given(st.integers(1, 50), st.data())
def test_the_share_is_that_of_the_clients_whose_bits_are_there_and_a_missing_one_counts_for_neither(cohort, data):
    bits = data.draw(st.lists(st.booleans(), max_size=cohort))
    centred = sum((1 if bit else -1) / 2 for bit in bits)
    assert noisy_share(sum(bits), len(bits), cohort, 0.0) == pytest.approx(0.5 + centred / cohort)
    for other in (True, False):  # one client more, or another answer of it, moves the count by a half
        assert (
            abs(noisy_share(sum(bits) + other, len(bits) + 1, cohort, 0.0) - (0.5 + centred / cohort))
            <= 0.5 / cohort + 1e-12
        )


def test_the_bound_settles_at_the_median_whatever_it_starts_from() -> None:
    random = np.random.default_rng(0)
    for start in (START, 50.0):
        bound = start
        for _ in range(200):
            norms = np.exp(random.normal(1.0, 0.5, 1000))  # whose median is e
            share = noisy_share(int((norms <= bound).sum()), 1000, 1000, 50 * float(random.standard_normal()))
            bound = next_bound(bound, share)
        assert abs(math.log(bound) - 1) < 0.1


def test_noise_moves_the_bound_by_no_more_than_all_bits_together_would() -> None:
    assert next_bound(1.0, 1e9) == next_bound(1.0, 1.0) == pytest.approx(math.exp(-RATE * (1 - QUANTILE)))
    assert next_bound(1.0, -1e9) == next_bound(1.0, 0.0) == pytest.approx(math.exp(RATE * QUANTILE))
