"""Cohorts whose sums together show a few clients: differences of sums, and of combinations of them.

Each sum that was revealed is a vector of 0 and 1, a place a client. Whoever knows several knows all their linear
combinations. A combination that is not zero for fewer than k clients, and zero for all others, shows those few:
for two cohorts that differ by one client, that client's update alone. Clients that are in the same cohorts cannot be
told apart, and count as one class. Updates of other rounds are not the same numbers, so this refuses too much rather
than too little.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

Cohort = frozenset[str]  # names of clients

MOST = 20_000  # sets of classes that are tested; where there are more, the cohort is refused


def exposed(known: Sequence[Cohort], cohort: Cohort, least: int) -> str:
    """Say how a sum over `cohort`, with those known, would show fewer than `least` clients; empty where it would not.

    A combination that the known sums allow already is no reason. Ranks are computed modulo a random prime of 31 bits,
    which errs for n clients with a chance of about n log2(n) / 10^9.
    """
    if cohort in known:
        return ""
    columns = Counter(tuple(name in each for each in (*known, cohort)) for name in frozenset().union(*known, cohort))
    classes = list(columns)
    sizes = [columns[column] for column in classes]
    rows = np.array(classes, np.int64).T  # [cohorts, classes]
    if sum(1 for size in sizes if size < least) == 0:
        return ""
    prime = _prime()
    new, old = null_space(rows, prime), null_space(rows[:-1], prime)
    if new.shape == old.shape:
        return ""  # the cohort is a combination of those known
    narrow = _project(new, least, prime)
    for number, few in enumerate(_few(sizes, least)):
        if number >= MOST:
            return f"too many small differences of the {len(known) + 1} cohorts to be sure of each ({len(classes)} classes)"
        # a combination that is zero elsewhere exists just where these rows of the null space depend on each other
        if rank(narrow[few], prime) < len(few) and rank(new[few], prime) < rank(old[few], prime):
            return (
                f"the sum over these {len(cohort)} clients, with the {len(known)} in which it was revealed before, would show "
                f"{sum(sizes[each] for each in few)} clients or fewer"
            )
    return ""


def _few(sizes: Sequence[int], least: int) -> Iterator[list[int]]:
    """Yield sets of classes with fewer than `least` clients in all, but for those within a larger such set."""
    small = sorted((place for place, size in enumerate(sizes) if size < least), key=lambda place: sizes[place])

    def grow(start: int, chosen: list[int], left: int) -> Iterator[list[int]]:
        grown = False
        for position in range(start, len(small)):
            size = sizes[small[position]]
            if size > left:
                break  # the others are as large or larger
            grown = True
            yield from grow(position + 1, [*chosen, small[position]], left - size)
        if not grown and chosen:
            yield chosen

    yield from grow(0, [], least - 1)


def null_space(rows: np.ndarray, prime: int) -> np.ndarray:
    """Return a basis of the vectors that are orthogonal to all rows, modulo a prime: int64 [n, n - rank]."""
    reduced, pivots = _reduce(rows, prime)
    width = rows.shape[1]
    free = [column for column in range(width) if column not in set(pivots)]
    basis = np.zeros((width, len(free)), np.int64)
    for place, column in enumerate(free):
        basis[column, place] = 1
        basis[pivots, place] = -reduced[: len(pivots), column] % prime
    return basis


def rank(rows: np.ndarray, prime: int) -> int:
    """Return the rank of a matrix modulo a prime."""
    return len(_reduce(rows, prime)[1])


def _reduce(rows: np.ndarray, prime: int) -> tuple[np.ndarray, list[int]]:
    """Return the reduced row echelon form modulo a prime below 2^31, and the columns of its pivots."""
    found, pivots = rows % prime, list[int]()
    for column in range(found.shape[1]):
        done = len(pivots)
        below = np.flatnonzero(found[done:, column])
        if not len(below):
            continue
        found[[done, done + below[0]]] = found[[done + below[0], done]]
        found[done] = found[done] * pow(int(found[done, column]), -1, prime) % prime
        factors = found[:, column].copy()
        factors[done] = 0
        found = (found - factors[:, None] * found[done]) % prime
        pivots.append(column)
    return found, pivots


def _project(basis: np.ndarray, width: int, prime: int) -> np.ndarray:
    """Return random combinations of a basis' vectors, int64 [n, width]: fewer than `width` rows keep their rank."""
    draw = np.random.default_rng(secrets.randbits(128))
    combined = np.zeros((len(basis), width), np.int64)
    for vector in basis.T:  # one by one, so that no product is larger than 64 bits
        combined = (combined + vector[:, None] * draw.integers(prime, size=width)) % prime
    return combined


def _prime() -> int:
    """Draw a prime of 31 bits, which a server that chooses cohorts cannot foresee."""
    while True:
        number = 2**30 + 2 * secrets.randbelow(2**29) + 1
        if _is_prime(number):
            return number


def _is_prime(number: int) -> bool:
    """Test by Miller and Rabin with bases that decide every odd number from 11 to 2^31 (Jaeschke 1993)."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7):
        power = pow(base, odd, number)
        if power not in (1, number - 1) and not any(
            (power := power * power % number) == number - 1 for _ in range(twos - 1)
        ):
            return False
    return True
