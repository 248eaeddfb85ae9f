"""Auditing differential privacy: lower bounds on epsilon, and an estimate, from what one run answered about canaries.

A canary takes part or not by a fair coin of its own. Who sees only what the run released gives each canary a score, and
guesses the coins of the canaries with the highest scores (in) and with the lowest (out); of the others it says nothing.
Too many right guesses refute a claimed epsilon. How many guesses are made is fixed before scores are seen: `GUESSES`,
and each number of them gets an equal share of the chance of error (Bonferroni), so that all bounds hold together.

Two bounds: of any mechanism that is (epsilon, delta)-private (Steinke, Nasr and Jagielski 2023, "Privacy Auditing with
One (1) Training Run"), and of one whose whole trade-off curve is a Gaussian mechanism's (Mahloujifar, Melis and
Chaudhuri 2024, "Auditing f-Differential Privacy in One Run"), which is tighter. Both are low by their proofs, as all
canaries share one run: a run may be worse than both say. The estimate has no proof and is mostly close (Andrew et al.
2023, "One-shot Empirical Privacy Estimation for Federated Learning").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon

GUESSES = (100, 400)  # fewer are surer and tell less from chance: one is best for more noise, the other for less
LARGEST_EPSILON, LARGEST_MU = 50.0, 30.0  # that a search tries
_STEPS = 40  # of a bisection: the range of 50 to within 1e-10


@dataclass(frozen=True)
class Guessed:
    """How many coins of so many canaries were guessed, and how many of them rightly."""

    canaries: int
    guesses: int
    right: int


def guess(scores: np.ndarray, included: np.ndarray) -> Iterator[Guessed]:
    """Yield the result of each number of guesses of `GUESSES` that the canaries allow.

    scores: float [m], higher where a canary seems to be in; included: bool [m], its coin
    """
    canaries, order = len(scores), np.argsort(scores, kind="stable")
    for guesses in _numbers(canaries):
        low, high = order[: guesses // 2], order[canaries - (guesses - guesses // 2) :]
        yield Guessed(canaries, guesses, int(np.sum(~included[low])) + int(np.sum(included[high])))


def _numbers(canaries: int) -> tuple[int, ...]:
    return tuple(number for number in GUESSES if number <= canaries) or (canaries,)


def p_value(found: Guessed, epsilon: float, delta: float) -> float:
    """Return a bound on the chance of so many right guesses or more, were the mechanism (epsilon, delta)-private.

    With q = 1 / (1 + exp(-epsilon)) and B ~ Binomial(guesses, q): P[B >= right] + 2 m delta max over i of
    P[right > B >= right - i] / i (Steinke et al. 2023, theorem 5.2 and appendix D).
    """
    from scipy.stats import binom

    right, q = found.right, 1 / (1 + math.exp(-epsilon))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), found.guesses, q))  # [i - 1]: P[right > B >= right - i]
    alpha = float(np.max(below / np.arange(1, right + 1))) if right else 0.0
    return min(1.0, float(binom.sf(right - 1, found.guesses, q)) + 2 * found.canaries * delta * alpha)


def epsilon_bound(scores: np.ndarray, included: np.ndarray, delta: float, error: float) -> float:
    """Return the largest epsilon at delta that the guesses refute, 0 where they refute none.

    It exceeds the mechanism's epsilon with a chance of `error` at most. scores, included: as `guess` takes them
    """
    results = list(guess(scores, included))
    share = error / len(results)

    def refuted(epsilon: float) -> bool:
        return any(p_value(found, epsilon, delta) <= share for found in results)

    return _largest(refuted, LARGEST_EPSILON)


def gaussian_bound(scores: np.ndarray, included: np.ndarray, error: float) -> float:
    """Return the largest mu for which the guesses refute mu-Gaussian differential privacy, 0 where they refute none.

    One Gaussian mechanism of noise multiplier z has mu = 1 / z, and T of them sqrt(T) / z (Dong et al. 2022).
    scores, included: as `guess` takes them; error: the chance, at most, that it exceeds the mechanism's mu
    """
    results = list(guess(scores, included))
    share = error / len(results)
    return _largest(lambda mu: any(refutes_gaussian(found, mu, share) for found in results), LARGEST_MU)


def refutes_gaussian(found: Guessed, mu: float, error: float) -> bool:
    """Say whether so many right guesses have a chance below `error` under mu-Gaussian differential privacy.

    Algorithm 3 of Mahloujifar et al. 2024 for two answers. Were the chance `error`, the canaries guessed rightly when i
    or more guesses are right would have at least the weight `hit`, and the others `miss`; each step down from the number
    found, the trade-off curve asks for more misses, and so for more hits, until all guesses weigh more than there are.
    """
    from scipy.special import ndtr, ndtri

    guesses, right = found.guesses, found.right
    hit = error * right / found.canaries
    miss = error * (guesses - right) / found.canaries
    for i in range(right - 1, -1, -1):
        more = max(miss, float(ndtr(ndtri(min(hit, 1.0)) - mu)))
        if more == miss:
            break
        hit += i / (guesses - i) * (more - miss)
        miss = more
    return hit + miss > guesses / found.canaries


def gaussian_estimate(scores: np.ndarray, included: np.ndarray) -> float:
    """Return mu of two normal distributions like the scores of canaries that are in, and of those that are out.

    The distance of their means in standard deviations of one (Andrew et al. 2023, section 3, from scores instead of
    cosines). nan where one side has fewer than two canaries. scores, included: as `guess` takes them
    """
    inside, outside = scores[included], scores[~included]
    if min(len(inside), len(outside)) < 2:
        return math.nan
    spread = math.sqrt((float(inside.var(ddof=1)) + float(outside.var(ddof=1))) / 2)
    apart = float(inside.mean()) - float(outside.mean())
    return max(0.0, apart / spread) if spread else math.inf if apart > 0 else 0.0


def epsilon_of(mu: float, delta: float) -> float:
    """Return the epsilon at delta of mu-Gaussian differential privacy; inf for an infinite mu."""
    return 0.0 if mu == 0 else gaussian_epsilon(1 / mu, 1, delta)


def _largest(refuted: Callable[[float], bool], most: float) -> float:
    """Return the largest number in [0, most] that is refuted, as all smaller ones are; 0 where none is."""
    if not refuted(1e-9):
        return 0.0
    low, high = 0.0, most
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
