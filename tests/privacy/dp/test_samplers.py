"""Exact noise and rounding: tables against slow arithmetic, draws against rejection in fractions, and bits that nobody repeats."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chi2, chi2_contingency, skellam

from fedveil.core.errors import ProtectionError
from fedveil.core.randomness import Stream
from fedveil.privacy.dp.distributed import BETA, rounded_square
from fedveil.privacy.dp.samplers import BITS, Table, gaussian_table, round_within, secret_bytes, skellam_table

ALL = 1 << BITS
TABLES = {"gaussian": gaussian_table, "skellam": skellam_table}
Draw = Callable[[random.Random], int]


def probabilities(table: Table) -> dict[int, Fraction]:
    """P[X = k] as a table has it."""
    steps = [below - above for above, below in pairwise((0, *table.thresholds))]
    return {table.first + i: Fraction(step, ALL) for i, step in enumerate(steps)}


def exact_gaussian(sigma: float, k: int) -> Decimal:
    """The weight of k, by the formula."""
    return (-(Decimal(k) ** 2) / (2 * Decimal(sigma) ** 2)).exp()


def exact_skellam(sigma: float, k: int) -> Decimal:
    """P[X = k], by summing over what both Poisson numbers may be."""
    mean = Decimal(sigma) ** 2 / 2
    term = mean ** abs(k) / math.factorial(abs(k))
    total, n = Decimal(0), 0
    while n < 20 * mean + 20 or term > total * Decimal(10) ** -80:
        total += term
        n += 1
        term *= mean * mean / (n * (n + abs(k)))
    return (-2 * mean).exp() * total


@pytest.mark.parametrize("sigma", [0.7, 4.0, 30.25])
@pytest.mark.parametrize("kind", ["gaussian", "skellam"])
def test_a_table_has_the_probabilities_of_the_formula_to_180_bits(kind, sigma) -> None:
    found = probabilities(TABLES[kind](sigma))
    formula = exact_gaussian if kind == "gaussian" else exact_skellam
    with localcontext(prec=140):
        reach = 13 if sigma < 1 else round(8 * sigma)
        total = sum(formula(sigma, k) for k in range(-40 * reach, 40 * reach + 1)) if kind == "gaussian" else Decimal(1)
        for k in {0, 1, -1, 2, reach // 2, -reach, reach}:
            share = found[k]
            wrong = abs(Decimal(share.numerator) / Decimal(share.denominator) - formula(sigma, k) / total)
            assert wrong < Decimal(2) ** -180, k


@pytest.mark.parametrize("sigma", [0.7, 4.0, 300.0, 4096.0])
@pytest.mark.parametrize("kind", ["gaussian", "skellam"])
def test_all_probabilities_of_a_table_add_up_to_one_and_have_the_deviation(kind, sigma) -> None:
    found = TABLES[kind](sigma)
    assert found.thresholds[-1] == ALL
    assert list(found.thresholds) == sorted(found.thresholds)
    shares = probabilities(found)
    assert sum(shares.values()) == 1
    if sigma >= 4:  # a discrete Gaussian of less has another variance than sigma^2
        variance = sum(k * k * share for k, share in shares.items())
        assert float(variance) == pytest.approx(sigma**2, rel=1e-12)
    lowest, highest = min(shares), max(shares)
    assert lowest == -highest
    for k in (1, highest // 2, highest):  # rounding down is not the same on both sides
        assert abs(shares[k] - shares[-k]) <= Fraction(2, ALL)


def slow_draw(table: Table, bits: int) -> int:
    """The number that 192 bits choose: the first whose cumulative probability is above them."""
    return table.first + bisect_right(table.thresholds, bits)


class Bits:
    """Random bytes that a test gives: first the 64-bit heads of all draws, then the rest of each tie."""

    def __init__(self, heads: list[int], rest: int) -> None:
        self._heads, self._rest, self.ties = heads, rest, 0

    def __call__(self, size: int) -> bytes:
        if size == 8 * len(self._heads):
            return b"".join(head.to_bytes(8, "little") for head in self._heads)
        assert size == (BITS - 64) // 8
        self.ties += 1
        return self._rest.to_bytes(size, "big")


@pytest.mark.parametrize("rest", [0, 1, 2**127 + 5, 2**128 - 1])
@pytest.mark.parametrize(
    ("kind", "sigma"), [("gaussian", 4.0), ("skellam", 4.0), ("gaussian", 0.7), ("gaussian", 1000.0)]
)
def test_a_fast_draw_is_the_slow_one_also_where_the_first_bits_tie(kind, sigma, rest) -> None:
    table, rng = TABLES[kind](sigma), random.Random(rest)
    edges = [t >> 128 for t in rng.sample(table.thresholds[:-1], min(20, len(table.thresholds) // 2))]
    near = [max(0, min(2**64 - 1, edge + d)) for edge in edges for d in (-1, 0, 1)]
    heads = [*near, 0, 1, 2**64 - 1, 2**64 - 2, 2**63, *(rng.getrandbits(64) for _ in range(3000))]
    bits = Bits(heads, rest)
    drawn = table.draw(len(heads), bits)
    assert drawn.tolist() == [slow_draw(table, head << 128 | rest) for head in heads]
    assert bits.ties >= len(set(edges))
    assert drawn.dtype == np.int64


def bernoulli_exp(gamma: Fraction, rng: random.Random) -> bool:
    """True with probability exp(-gamma): Canonne, Kamath and Steinke 2020, algorithm 1."""
    while gamma > 1:
        if not bernoulli_exp(Fraction(1), rng):
            return False
        gamma -= 1
    k = 1
    while rng.randrange(gamma.denominator * k) < gamma.numerator:
        k += 1
    return k % 2 == 1


def slow_gaussian(sigma: int, rng: random.Random) -> int:
    """A discrete Gaussian number by rejection from a discrete Laplace one: the same paper, algorithms 2 and 3."""
    t = sigma + 1
    while True:
        u = rng.randrange(t)
        if not bernoulli_exp(Fraction(u, t), rng):
            continue
        v = 0
        while bernoulli_exp(Fraction(1), rng):
            v += 1
        size, negative = u + t * v, rng.randrange(2) == 1
        if negative and size == 0:
            continue
        if bernoulli_exp((size - Fraction(sigma**2, t)) ** 2 / (2 * sigma**2), rng):
            return -size if negative else size


def slow_skellam(sigma: int, rng: random.Random) -> int:
    """The difference of two Poisson numbers, each of sigma^2 / 2 numbers of mean 1, by rejection from 2^-(k+1)."""

    def poisson() -> int:
        while True:
            k = 0
            while rng.randrange(2):
                k += 1
            if rng.randrange(2 * math.factorial(k)) < 2**k:
                return k

    half = sigma**2 // 2
    return sum(poisson() for _ in range(half)) - sum(poisson() for _ in range(half))


@pytest.mark.parametrize(("kind", "slow"), [("gaussian", slow_gaussian), ("skellam", slow_skellam)])
def test_draws_are_distributed_as_slow_exact_ones(kind, slow) -> None:
    rng, few = random.Random(5), 6000
    theirs = np.array([slow(4, rng) for _ in range(few)])
    ours = TABLES[kind](4.0).draw(100_000, Stream(5).generator("noise").bytes)
    edges = np.arange(-10.5, 11.5)
    counts = [
        np.histogram(np.clip(drawn, -11, 11), np.concatenate([[-12], edges, [12]]))[0] for drawn in (theirs, ours)
    ]
    assert chi2_contingency(np.array(counts)).pvalue > 1e-4


def gaussian_shares(sigma: float, numbers: np.ndarray) -> np.ndarray:
    wide = np.arange(-int(20 * sigma) - 20, int(20 * sigma) + 21)
    return np.exp(-((numbers / sigma) ** 2) / 2) / np.exp(-((wide / sigma) ** 2) / 2).sum()


@pytest.mark.parametrize("sigma", [0.7, 4.0, 57.3, 300.0])
@pytest.mark.parametrize("kind", ["gaussian", "skellam"])
def test_secret_draws_pass_a_chi_square_test(kind, sigma) -> None:
    """A right sampler fails this once in 10^6 times; one that is off by 2 % in sigma always."""
    size = 400_000
    drawn = TABLES[kind](sigma).draw(size, secret_bytes)
    assert abs(drawn.var() / (sigma**2 if sigma > 1 else 0.49002) - 1) < 0.02
    numbers = np.arange(drawn.min(), drawn.max() + 1)
    groups = (numbers - numbers[0]) // max(1, round(sigma / 8))

    def distance(shares: np.ndarray) -> float:
        expected = np.bincount(groups, shares) * size
        often = np.bincount(groups, np.bincount(drawn - numbers[0], minlength=numbers.size))
        kept = expected > 10
        others = (often[~kept].sum() - (size - expected[kept].sum())) ** 2 / (size - expected[kept].sum() + 10)
        return float(chi2.sf(((often - expected)[kept] ** 2 / expected[kept]).sum() + others, kept.sum()))

    right = gaussian_shares(sigma, numbers) if kind == "gaussian" else skellam.pmf(numbers, sigma**2 / 2, sigma**2 / 2)
    assert distance(right) > 1e-6
    assert distance(gaussian_shares(1.02 * sigma, numbers)) < 1e-6


def test_secret_bytes_are_as_many_as_asked_for_never_the_same_and_even() -> None:
    assert [len(secret_bytes(n)) for n in (0, 1, 64, 1001)] == [0, 1, 64, 1001]
    assert secret_bytes(32) != secret_bytes(32)
    often = np.bincount(np.frombuffer(secret_bytes(1 << 20), np.uint8), minlength=256)
    assert chi2.sf(((often - 4096) ** 2 / 4096).sum(), 255) > 1e-7
    assert (gaussian_table(4.0).draw(100, secret_bytes) != gaussian_table(4.0).draw(100, secret_bytes)).any()


def test_rounding_takes_a_neighbour_of_each_number_as_a_slow_loop_does() -> None:
    rng = np.random.default_rng(0)
    vector = np.concatenate([rng.normal(0, 50, 500), [3.0, -7.0, 0.0, -0.25, 1e-300]])
    bits = rng.bytes(8 * vector.size)
    uniform = [(int.from_bytes(bits[i : i + 8], "little") >> 11) / 2**53 for i in range(0, len(bits), 8)]
    wanted = [math.floor(x) + (u < x - math.floor(x)) for x, u in zip(vector, uniform, strict=True)]
    assert round_within(vector, 10**9, lambda _size: bits).tolist() == wanted


def test_rounding_is_right_on_average() -> None:
    rng = np.random.default_rng(1)
    vector, times = rng.uniform(-2, 2, 64), 20_000
    square = rounded_square(float(np.linalg.norm(vector)), vector.size)
    drawn = np.array([round_within(vector, square, rng.bytes) for _ in range(times)])
    above = vector - np.floor(vector)
    errors = drawn.mean(0) - vector
    # dropping at most BETA of the tries moves a mean a little towards 0; the rest is chance
    assert abs(errors).max() < 5 * math.sqrt(0.25 / times) + 0.01
    np.testing.assert_allclose(drawn.var(0), above * (1 - above), atol=0.02)


@pytest.mark.parametrize(("length", "size"), [(3.0, 2000), (300.0, 2000), (30.0, 4)])
def test_a_rounded_vector_is_never_longer_than_its_bound_and_few_are_tried_again(length, size) -> None:
    rng, tries, times = np.random.default_rng(2), [], 300

    def bits(n: int) -> bytes:
        tries.append(n)
        return rng.bytes(n)

    square = rounded_square(length, size)
    for _ in range(times):
        vector = rng.normal(size=size)
        vector *= length / np.linalg.norm(vector)
        rounded = round_within(vector, square, bits)
        assert rounded @ rounded <= square
        assert (abs(rounded - vector) < 1).all()
    assert len(tries) <= times / (1 - BETA) + 60


def test_a_bound_that_most_tries_miss_is_kept_by_trying_again() -> None:
    rng = np.random.default_rng(3)
    vector = np.full(100, 0.5)
    found = [int(r @ r) for r in (round_within(vector, 45, rng.bytes) for _ in range(200))]
    assert max(found) <= 45
    assert min(found) < 45


def test_a_vector_that_is_longer_than_its_bound_is_refused() -> None:
    with pytest.raises(ProtectionError, match="it was not clipped"):
        round_within(np.array([3.0, 4.5]), 25, secret_bytes)
    assert (round_within(np.array([3.0, 4.0]), 25, secret_bytes) == [3, 4]).all()
