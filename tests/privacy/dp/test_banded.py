"""Noise that later rounds take back: against the dense matrices of the papers, and its sensitivity by all patterns there are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fedveil.privacy.dp.banded import BandedNoise, bands_of, coefficients
from fedveil.privacy.dp.noise import keyed_normal, secret_normal


def matrix(bands: int, rounds: int) -> np.ndarray:
    """C, dense [rounds, rounds]."""
    return sum(c * np.eye(rounds, k=-j) for j, c in enumerate(coefficients(bands)[:rounds]))


def fresh(number: int, size: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(size)


@pytest.mark.parametrize(("bands", "rounds"), [(1, 5), (2, 7), (4, 4), (5, 12), (9, 6)])
def test_the_noises_of_all_rounds_solve_c_w_x(bands, rounds) -> None:
    noise = BandedNoise(bands, fresh)
    w = np.stack([noise(number, 3) for number in range(1, rounds + 1)])
    x = np.stack([fresh(number, 3) for number in range(1, rounds + 1)])
    np.testing.assert_allclose(matrix(bands, rounds) @ w, x, atol=1e-12)


def test_all_bands_square_to_the_matrix_of_sums() -> None:
    c = matrix(8, 8)
    np.testing.assert_allclose((c / c[0, 0]) @ (c / c[0, 0]), np.tril(np.ones((8, 8))), atol=1e-12)


def test_a_column_is_one_long() -> None:
    for bands in (1, 2, 10, 300):
        assert np.sum(coefficients(bands) ** 2) == pytest.approx(1)
    assert (coefficients(300) > 0).all()


def patterns(rounds: int, apart: int, turns: int) -> list[tuple[int, ...]]:
    """All ways to take part in `turns` rounds that are at least so far apart."""
    return [
        chosen
        for chosen in itertools.combinations(range(rounds), turns)
        if all(b - a >= apart for a, b in itertools.pairwise(chosen))
    ]


@pytest.mark.parametrize(("bands", "rounds", "turns"), [(2, 6, 3), (3, 9, 3), (4, 8, 2), (5, 9, 2), (3, 5, 1)])
def test_one_client_changes_what_is_released_by_the_root_of_its_turns_at_most(bands, rounds, turns) -> None:
    """For each pattern and updates of length 1 in any directions: the worst are along one line, with any signs."""
    c, worst = matrix(bands, rounds), 0.0
    for chosen in patterns(rounds, bands, turns):
        for signs in itertools.product((1, -1), repeat=turns):
            worst = max(worst, float(np.linalg.norm(sum(s * c[:, t] for s, t in zip(signs, chosen, strict=True)))))
    assert worst <= math.sqrt(turns) + 1e-12
    assert worst > 0.8 * math.sqrt(turns)  # and the bound is not wide of the mark


def test_rounds_nearer_than_the_bands_would_break_the_bound() -> None:
    c = matrix(4, 8)
    assert np.linalg.norm(c[:, 0] + c[:, 2]) > math.sqrt(2) + 0.1


def test_the_noise_in_a_model_is_less_than_that_of_independent_rounds() -> None:
    """The deviation of prefix sums, at the same cost of a client that takes part in every tenth of 60 rounds."""
    bands, rounds = 10, 60
    inverse = np.linalg.inv(matrix(bands, rounds))
    prefix = np.tril(np.ones((rounds, rounds)))
    banded = np.sqrt(np.sum((prefix @ inverse) ** 2, axis=1))
    independent = np.sqrt(np.arange(1, rounds + 1))
    assert banded[-1] < 0.66 * independent[-1]
    assert banded.mean() < 0.72 * independent.mean()
    noise = BandedNoise(bands, fresh)
    sums = np.cumsum([noise(number, 20_000) for number in range(1, rounds + 1)], axis=0)
    np.testing.assert_allclose(sums.std(axis=1), banded, rtol=0.05)


def test_a_process_that_begins_in_a_later_round_makes_the_same_noise() -> None:
    whole, later = BandedNoise(4, fresh), BandedNoise(4, fresh)
    made = [whole(number, 5) for number in range(1, 8)]
    np.testing.assert_array_equal(later(6, 5), made[5])
    np.testing.assert_array_equal(later(6, 5), made[5])  # a round that is tried again
    np.testing.assert_array_equal(later(7, 5), made[6])
    np.testing.assert_array_equal(later(2, 5), made[1])


def test_a_round_without_a_release_leaves_no_gap() -> None:
    noise, all_rounds = BandedNoise(3, fresh), BandedNoise(3, fresh)
    wanted = [all_rounds(number, 2) for number in range(1, 6)]
    np.testing.assert_array_equal(noise(1, 2), wanted[0])
    np.testing.assert_array_equal(noise(5, 2), wanted[4])


def test_bands_reach_from_one_turn_to_the_next_and_no_further_than_the_run() -> None:
    assert (bands_of(1000, 100, 60), bands_of(10**6, 800, 60), bands_of(105, 10, 60)) == (10, 60, 10)


def test_a_key_decides_normal_numbers_that_differ_by_round() -> None:
    key = bytes(range(32))
    first, second = keyed_normal(key, 1, 100_001), keyed_normal(key, 2, 100_001)
    np.testing.assert_array_equal(first, keyed_normal(key, 1, 100_001))
    assert first.size == 100_001
    for drawn in (first, second, secret_normal(100_001)):
        assert abs(drawn.mean()) < 5 / math.sqrt(drawn.size)
        assert abs(drawn.std() - 1) < 5 / math.sqrt(2 * drawn.size)
        assert abs((drawn**4).mean() / 3 - 1) < 0.1
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(first.size)
    assert abs(np.corrcoef(first, keyed_normal(bytes(32), 1, 100_001))[0, 1]) < 5 / math.sqrt(first.size)
