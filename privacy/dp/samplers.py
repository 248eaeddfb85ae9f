"""Exact noise in whole numbers, and the rounding before it: discrete Gaussian and Skellam, by a table of probabilities.

A table has the cumulative probabilities of a distribution on the whole numbers as 192-bit numbers. A number is drawn by
comparing 64 random bits with the first 64 bits of the table (inversion: Devroye 1986, section III.2); where those are
equal, 128 further bits decide. No step is in floating point, so no bit of a float tells anything of what is hidden
(Mironov 2012). Tables are made in whole numbers of 320 bits. A number drawn is within 2^-170 in total variation of the
distribution that the docstrings name, for tables of up to 2^20 values: added up over all numbers that a federation
ever draws, that is nothing beside delta.

Random bits come as `Bytes`: from the operating system's generator where noise protects somebody, and from a seeded
stream in a simulation.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedveil.core.errors import ProtectionError

Bytes = Callable[[int], bytes]  # size -> random bytes

BITS = 192  # of a cumulative probability
HEAD = 64  # of them, compared first
BUCKETS = 16  # bits that find the place in a table to begin the comparison at
STEPS = 4  # from there, before the place is searched for
_WIDE = BITS + 128  # bits of the weights that a table is made of
_TAIL = 2 * (BITS + 8) * math.log(2)  # beyond sqrt(_TAIL) standard deviations lies less than 2^-BITS
_CONTEXT = Context(prec=math.ceil(_WIDE * math.log10(2)) + 10)
_FRACTION = 2.0**-53


def secret_bytes(size: int) -> bytes:
    """Return random bytes: a ChaCha20 stream (RFC 8439), each under a new key from the operating system's generator."""
    return Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), None).encryptor().update(bytes(size))


@dataclass(frozen=True, eq=False)
class Table:
    """The cumulative distribution of a random whole number.

    first: the least number it may be; thresholds: P[X <= first + i] 2^192 for i = 0, 1, ..., rounded down; the last
    is 2^192
    heads: uint64, the first 64 bits of all thresholds but the last, then the largest number, STEPS + 1 times
    starts: int64 [2^BUCKETS], the first threshold that a draw with these first bits may lie below; bounds: its head
    """

    first: int
    thresholds: tuple[int, ...]
    heads: np.ndarray
    starts: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, first: int, weights: list[int]) -> Table:
        """Make the table of the probabilities weights / sum(weights), of the numbers first, first + 1, ..."""
        total, running, thresholds = sum(weights), 0, []
        for weight in weights:
            running += weight
            thresholds.append((running << BITS) // total)
        inner = np.array([threshold >> (BITS - HEAD) for threshold in thresholds[:-1]], np.uint64)
        edges = np.arange(1 << BUCKETS, dtype=np.uint64) << np.uint64(HEAD - BUCKETS)
        starts = np.searchsorted(inner, edges, "left").astype(np.int64)
        heads = np.concatenate([inner, np.full(STEPS + 1, 2**HEAD - 1, np.uint64)])
        return cls(first, tuple(thresholds), heads, starts, heads[starts])

    def draw(self, size: int, random: Bytes) -> np.ndarray:
        """Draw independent numbers, int64 [size]."""
        bits = np.frombuffer(random(8 * size), "<u8")
        bucket = (bits >> np.uint64(HEAD - BUCKETS)).astype(np.int64)
        found = self.starts.take(bucket)
        # most draws lie below the first threshold of their bucket; the others walk on
        behind = np.flatnonzero(self.bounds.take(bucket) <= bits)
        place, head = found.take(behind), bits.take(behind)
        left = np.arange(behind.size)
        for _ in range(STEPS):  # few need more than one or two; those in the tails, hundreds
            place[left] += 1
            left = left[self.heads.take(place.take(left)) <= head.take(left)]
        place[left] = np.searchsorted(self.heads, head.take(left), "right")
        for i in np.flatnonzero(self.heads.take(place - 1) == head):  # once in about 2^64 / len(table) draws
            place[i] = self._tie(int(head[i]), random)
        found[behind] = place
        found += self.first
        return np.asarray(found)

    def _tie(self, head: int, random: Bytes) -> int:
        """Return the place of a draw whose first bits are a threshold's."""
        rest = int.from_bytes(random((BITS - HEAD) // 8), "big")
        return bisect_right(self.thresholds, head << (BITS - HEAD) | rest)


@lru_cache(maxsize=8)
def gaussian_table(deviation: float) -> Table:
    """Return the table of the discrete Gaussian N_Z(0, sigma^2): P[X = k] proportional to exp(-k^2 / 2 sigma^2).

    deviation: sigma. Canonne, Kamath and Steinke 2020, "The Discrete Gaussian for Differential Privacy", definition 1.
    Neighbouring weights have the ratio q^(2k + 1), q = exp(-1 / 2 sigma^2).
    """
    numerator, denominator = (Fraction(deviation) ** 2).as_integer_ratio()
    ratio, factor = (_exponential(-denominator, numerator * n) for n in (2, 1))
    weights = [1 << _WIDE]
    for _ in range(math.ceil(deviation * math.sqrt(_TAIL)) + 1):
        weights.append(weights[-1] * ratio >> _WIDE)
        ratio = ratio * factor >> _WIDE
    return _symmetric(weights)


@lru_cache(maxsize=8)
def skellam_table(deviation: float) -> Table:
    """Return the table of the symmetric Skellam distribution: Poisson(v / 2) - Poisson(v / 2), of variance v = sigma^2.

    deviation: sigma. P[X = k] is proportional to the Bessel function I_|k|(v) (Skellam 1946), which Miller's recurrence
    I_(k-1) = I_(k+1) + (2k / v) I_k gives downwards, from 0 and 1 far out in the tail (Olver 1964).
    """
    numerator, denominator = (Fraction(deviation) ** 2).as_integer_ratio()
    last = math.ceil(deviation * math.sqrt(_TAIL) + _TAIL) + 1
    below, own, weights = 0, 1 << _WIDE, [1 << _WIDE]
    for k in range(last, 0, -1):
        below, own = own, below + 2 * k * denominator * own // numerator
        weights.append(own)
    return _symmetric(weights[::-1])


def round_within(vector: np.ndarray, square: int, random: Bytes) -> np.ndarray:
    """Round each number up or down at random, so that it is right on average, until |q|^2 <= square; int64 [size].

    vector: float64 [size]
    Kairouz, Liu and Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
    Aggregation", section 4.1 (conditional randomized rounding). The bound holds whatever the vector is: a client's
    part of a sum is never longer. Where `square` is `distributed.rounded_square` of a bound on |vector|, each try
    succeeds with a chance of 1 - BETA or more.
    Raise ProtectionError where the vector itself is longer.
    """
    if float(vector @ vector) > square:
        raise ProtectionError(
            "an update is longer than what its rounding is accounted for: it was not clipped to privacy.clip"
        )
    low = np.floor(vector)
    above = vector - low
    low = low.astype(np.int64)
    while True:
        uniform = (np.frombuffer(random(8 * vector.size), "<u8") >> np.uint64(11)) * _FRACTION
        rounded = low + (uniform < above)
        if int(rounded @ rounded) <= square:
            return np.asarray(rounded)


def _exponential(numerator: int, denominator: int) -> int:
    """Return exp(numerator / denominator), at most 1, as a multiple of 2^-_WIDE."""
    power = _CONTEXT.exp(_CONTEXT.divide(Decimal(numerator), Decimal(denominator)))
    return int(_CONTEXT.multiply(power, Decimal(1 << _WIDE)))


def _symmetric(weights: list[int]) -> Table:
    """Return the table of the numbers ..., -1, 0, 1, ..., from the weights of 0, 1, ..."""
    return Table.of(1 - len(weights), weights[:0:-1] + weights)
