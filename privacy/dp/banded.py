"""Noise that is taken back in later rounds: the banded matrix mechanism, for clients that take part in turn.

A run releases the sums of its updates over rounds 1 to t: the models. With independent noise their noise adds up. A
lower triangular matrix C over rounds lets later rounds take back a part of earlier ones': the noises w of all rounds are
the solution of C w = x, x standard normal. What is released is then the Gaussian mechanism's answer to C u, u the rounds'
updates, each known from those before (Denisov et al. 2022, "Improved Differential Privacy for SGD via Optimal Private
Linear Operators on Adaptive Streams", theorem 2.1: later updates may depend on earlier answers).

C is the square root of the matrix of sums, with the diagonals of the series of (1 - x)^(-1/2) (Fichtenberger, Henzinger
and Upadhyay 2023, "Constant Matters"), cut after b of them (Choquette-Choo et al. 2023, "(Amplified) Banded Matrix
Factorization", section 4), and divided by a column's length.

**Sensitivity**: a client that takes part in rounds at least b apart changes C u by its updates along columns that share no
row. Each is at most 1 long, so k participations change C u by sqrt(k) times the longest update, as k independent sums do.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Fresh = Callable[
    [int, int], np.ndarray
]  # (round, size) -> standard normal numbers, the same whenever they are asked for


def bands_of(clients: int, cohort: int, rounds: int) -> int:
    """Return b: the rounds from one turn of a client to its next, at least; no more than there are rounds."""
    return min(clients // cohort, rounds)


def coefficients(bands: int) -> np.ndarray:
    """Return the diagonals c_0, ..., c_(b-1) of C, float64 [b], whose squares add up to 1."""
    steps = np.arange(1, bands)
    series = np.concatenate([[1.0], np.cumprod((2 * steps - 1) / (2 * steps))])
    norm: float = np.linalg.norm(series).item()
    return np.asarray(series / norm)


class BandedNoise:
    """The noises of a run's rounds, each from that of the b - 1 rounds before it.

    Past noise is secret, and no checkpoint holds it: after a resume it is made again from what `fresh` repeats.
    """

    def __init__(self, bands: int, fresh: Fresh) -> None:
        """Start before round 1; fresh: draws x of each round."""
        self._c, self._fresh = coefficients(bands), fresh
        self._past: list[np.ndarray] = []  # the newest first
        self._number = 0

    def __call__(self, number: int, size: int) -> np.ndarray:
        """Return w of round `number`, float64 [size]: (x - sum over j from 1 of c_j w of j rounds before) / c_0."""
        if number < self._number:
            self._past, self._number = [], 0
        while self._number < number:
            self._number += 1
            noise = self._fresh(self._number, size)
            for c, past in zip(self._c[1:], self._past, strict=False):
                noise = noise - c * past
            self._past = [noise / self._c[0], *self._past][: max(1, len(self._c) - 1)]
        return self._past[0].copy()
